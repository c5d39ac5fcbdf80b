"""Metrics reach other libraries as they are; what is not there is refused before the run."""

import json
import sys
from types import ModuleType

import pytest
from counting import counting_stage, log_in
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf_min.errors import BadInput
from rlhf_min.harness.run.log import MetricsLog
from rlhf_min.harness.trackers import check_trackers

STEPS = [
    {"loss": 0.5, "kl": 2.0, "skipped": 0, "time/seconds": 1.5},
    {"loss": 0.25, "kl": 3.0, "skipped": 1, "time/seconds": 0.5},
]


def scalars(folder):
    """What TensorBoard shows of a run: steps and values of each tag, all files taken together."""
    read = {}
    for stage in sorted((folder / "tensorboard").iterdir()):
        events = EventAccumulator(str(stage)).Reload()
        for tag in events.Tags()["scalars"]:
            read[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    return read


def test_tensorboard_reads_back_what_was_logged(tmp_path):
    log = log_in(tmp_path, report_to=["tensorboard"])
    log.follow(counting_stage("ppo", total=2), iter(STEPS), show=("loss",))
    log.follow(counting_stage("dpo", total=1), iter(STEPS[:1]), show=("loss",))
    first, second = STEPS
    assert scalars(tmp_path) == {
        **{f"ppo/{name}": [(1, first[name]), (2, second[name])] for name in first},
        **{f"dpo/{name}": [(1, first[name])] for name in first},
    }


class Wandb(ModuleType):
    """Stands in for the real one, which asks for an account: what each id was sent."""

    def __init__(self):
        super().__init__("wandb")
        self.started, self.sent = [], {}

    def init(self, **options):
        self.started.append(options)
        run = ModuleType("run")
        run.id = options.get("id", f"id-{len(self.started)}")
        run.log = self.sent.setdefault(run.id, []).append
        return run


@pytest.fixture
def wandb(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", module := Wandb())
    return module


def test_wandb_gets_the_same(wandb, tmp_path):
    log = log_in(tmp_path, report_to=["wandb"])
    log.follow(counting_stage("ppo", total=2), iter(STEPS), show=())
    assert wandb.started == [{"dir": str(tmp_path), "name": tmp_path.name}]
    assert wandb.sent["id-1"] == [
        {f"ppo/{name}": value for name, value in {**metrics, "step": step}.items()}
        for step, metrics in enumerate(STEPS, start=1)
    ]


def follow(folder, first, last, *, stage="ppo", loss=lambda step: float(step), changed=False):
    """A process that makes these steps of a stage, the others having been made by one before."""
    log = MetricsLog(
        lambda: folder,
        report_to=["tensorboard", "wandb"],
        on_resume=(lambda: None) if changed else None,
    )
    for step in range(first, last + 1):
        log._write(stage, step, {"loss": loss(step)})


def test_steps_after_the_checkpoint_stand_once_when_they_are_made_again(wandb, tmp_path):
    follow(tmp_path, 1, 9, stage="sft")
    follow(tmp_path, 1, 5)  # killed; its checkpoint is of step 2
    follow(tmp_path, 3, 4)  # killed again, before it came so far as the first
    follow(tmp_path, 3, 7)
    whole = {"sft": range(1, 10), "ppo": range(1, 8)}
    assert scalars(tmp_path) == {
        f"{stage}/loss": [(step, float(step)) for step in steps] for stage, steps in whole.items()
    }
    assert list(wandb.sent) == ["id-1"]
    assert wandb.sent["id-1"] == [
        {f"{stage}/loss": float(step), f"{stage}/step": step}
        for stage, steps in whole.items()
        for step in steps
    ]
    assert wandb.started[0].keys() == {"dir", "name"}
    assert all(x["id"] == "id-1" and x["resume"] == "allow" for x in wandb.started[1:])


def test_with_other_options_what_was_sent_is_not_what_is_made(wandb, tmp_path):
    follow(tmp_path, 1, 5)
    follow(tmp_path, 3, 6, loss=lambda step: -step, changed=True)
    follow(tmp_path, 5, 7, loss=lambda step: -step)  # and resumed as it is
    shown = [(1, 1.0), (2, 2.0), (3, -3.0), (4, -4.0), (5, -5.0), (6, -6.0), (7, -7.0)]
    assert scalars(tmp_path) == {"ppo/loss": shown}
    assert [row["ppo/loss"] for row in wandb.sent["id-1"]] == [1, 2, 3, 4, 5]
    assert [row["ppo/loss"] for row in wandb.sent["id-2"]] == [-3, -4, -5, -6, -7]


def test_what_was_sent_and_is_not_known_is_sent_to_another_run(wandb, tmp_path):
    follow(tmp_path, 1, 3)
    (tmp_path / "wandb.json").write_text('{"id": "id-1", "se', encoding="utf-8")
    follow(tmp_path, 3, 4)
    assert [row["ppo/step"] for row in wandb.sent["id-2"]] == [3, 4]


def test_a_resume_that_is_refused_reaches_no_tracker(wandb, tmp_path):
    log = log_in(tmp_path, report_to=["wandb"], resumed=True)
    assert log.folder == tmp_path
    assert wandb.started == []


def test_unknown_and_missing_trackers_are_refused(monkeypatch):
    with pytest.raises(
        BadInput, match="--report_to mlflow is not known; give tensorboard or wandb"
    ):
        check_trackers(["tensorboard", "mlflow"])
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(BadInput, match="not installed; pip install tensorboard"):
        check_trackers(["tensorboard"])


def test_samples_are_lines_of_json(tmp_path):
    log = log_in(tmp_path)
    log.add_samples("ppo", 10, [{"prompt": "Ä\n?", "response": "b", "score": 1.5}])
    log.add_samples("ppo", 20, [{"prompt": "c", "response": "\ud800", "score": -1.0}])
    lines = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"stage": "ppo", "step": 10, "prompt": "Ä\n?", "response": "b", "score": 1.5},
        {"stage": "ppo", "step": 20, "prompt": "c", "response": "\ud800", "score": -1.0},
    ]
