"""Metrics reach other libraries as they are; what is not there is refused before the run."""

import json
import sys
from types import ModuleType

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf_min.errors import BadInput
from rlhf_min.harness.metrics import MetricsLog
from rlhf_min.harness.trackers import check_trackers

STEPS = [{"loss": 0.5, "kl": 2.0}, {"loss": 0.25, "kl": 3.0}]


def test_tensorboard_reads_back_what_was_logged(tmp_path):
    log = MetricsLog(lambda: tmp_path, report_to=["tensorboard"])
    log.follow("ppo", iter(STEPS), total=2, show=("loss",))
    log.follow("dpo", iter(STEPS[:1]), total=1, show=("loss",))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    read = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }
    assert read == {
        "ppo/loss": [(1, 0.5), (2, 0.25)],
        "ppo/kl": [(1, 2.0), (2, 3.0)],
        "dpo/loss": [(1, 0.5)],
        "dpo/kl": [(1, 2.0)],
    }


def test_wandb_gets_the_same(tmp_path, monkeypatch):
    logged, started = [], []
    wandb = ModuleType("wandb")  # the real one asks for an account
    wandb.log = logged.append
    wandb.init = lambda **kwargs: started.append(kwargs) or wandb
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log = MetricsLog(lambda: tmp_path, report_to=["wandb"])
    log.follow("ppo", iter(STEPS), total=2, show=())
    assert started == [{"dir": str(tmp_path), "name": tmp_path.name}]
    assert logged == [
        {"ppo/loss": 0.5, "ppo/kl": 2.0, "ppo/step": 1},
        {"ppo/loss": 0.25, "ppo/kl": 3.0, "ppo/step": 2},
    ]


def test_unknown_and_missing_trackers_are_refused(monkeypatch):
    with pytest.raises(
        BadInput, match="--report_to mlflow is not known; give tensorboard or wandb"
    ):
        check_trackers(["tensorboard", "mlflow"])
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(BadInput, match="not installed; pip install tensorboard"):
        check_trackers(["tensorboard"])


def test_samples_are_lines_of_json(tmp_path):
    log = MetricsLog(lambda: tmp_path)
    log.add_samples("ppo", 10, [{"prompt": "Ä\n?", "response": "b", "score": 1.5}])
    log.add_samples("ppo", 20, [{"prompt": "c", "response": "\ud800", "score": -1.0}])
    lines = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"stage": "ppo", "step": 10, "prompt": "Ä\n?", "response": "b", "score": 1.5},
        {"stage": "ppo", "step": 20, "prompt": "c", "response": "\ud800", "score": -1.0},
    ]
