"""What the stages tell and write beside what their preflight checks, and how they are found."""

import sys
from functools import partial

import pytest
from small import PROMPTS, lengths, small_policy
from tolerances import FP64

from rlhf_min import ppo
from rlhf_min.errors import BadInput
from rlhf_min.harness import stages
from rlhf_min.harness.cli import RunOptions
from rlhf_min.harness.report.curves import title
from rlhf_min.harness.run import folder
from rlhf_min.harness.run.folder import start_log
from rlhf_min.harness.run.layout import clear, stage_modules, users_paths_below
from rlhf_min.harness.run.reading import read_run
from rlhf_min.harness.run.saving import measures
from rlhf_min.harness.stages.rollouts import too_far
from rlhf_min.harness.stages.run_stage import copy_policy


def ppo_run(**options):
    policy = small_policy(critic="shared")
    config = ppo.PPOConfig(steps=4, batch_size=6, minibatch_size=3, max_new_tokens=4, **options)
    state = ppo.new_state(policy, PROMPTS, config)
    buffers = []
    steps = ppo.train(
        policy, small_policy(seed=1), lengths, config, state, on_rollout=buffers.append
    )
    return state, steps, buffers


def test_a_kl_that_is_too_large_shows_its_samples():
    state, steps, buffers = ppo_run(max_kl=0.01, kl="k3")
    (metrics,) = list(steps)
    text, samples = too_far(state, buffers[-1], 0.01)
    rollout = buffers[-1].rollout
    kls = []
    for row, n in enumerate(rollout.lengths.tolist()):
        pairs = zip(rollout.logprobs[row, :n], rollout.ref_logprobs[row, :n], strict=True)
        kls.append(sum(float(ours - theirs) for ours, theirs in pairs))
    largest = sorted(range(6), key=lambda row: -kls[row])[:3]
    assert [x["kl"] for x in samples] == pytest.approx([kls[row] for row in largest], abs=FP64)
    assert [x["prompt"] for x in samples] == [rollout.prompts[row] for row in largest]
    assert [x["response"] for x in samples] == [rollout.responses[row] for row in largest]
    assert [x["score"] for x in samples] == [float(rollout.scores[row]) for row in largest]
    lines = text.splitlines()
    assert lines[0].startswith(
        f"ended after step 1: the KL to the reference is {metrics['k1']:.3f} nats per response, "
        "above --max_kl 0.01"
    )
    assert len(lines) == 4
    assert repr(samples[0]["response"]) in lines[1]


def test_a_run_that_did_not_go_too_far_has_nothing_to_show():
    state, steps, buffers = ppo_run()
    next(steps)
    assert too_far(state, buffers[-1], None) is None


def test_a_copy_to_train_is_as_plain_as_its_original():
    assert not copy_policy(small_policy(), critic="none").plain
    plain = small_policy()
    plain.plain = True
    assert copy_policy(plain, critic="shared").plain


ANOTHER = """
from dataclasses import dataclass

@dataclass(frozen=True)
class ANOTHERConfig:
    steps: int = 3

STAGE, TITLE, ROWS, CONFIG = "another", "ANOTHER", "prompts", ANOTHERConfig
MEASURED = {"score": "higher", "surprise": "lower"}
MONITORS, WRITES, CURVES = True, (), ()

def trained_before(options):
    return ["sft"]
"""


@pytest.fixture
def another(monkeypatch, tmp_path):
    """A stage whose file lies beside the others."""
    (tmp_path / "another.py").write_text(ANOTHER, encoding="utf-8")
    monkeypatch.setattr(folder, "_held", {})  # no run is this process's own afterwards
    monkeypatch.setattr(stages, "__path__", [*stages.__path__, str(tmp_path)])
    stage_modules.cache_clear()
    yield stage_modules()["another"]
    stage_modules.cache_clear()
    del sys.modules["rlhf_min.harness.stages.another"]


def test_another_stage_is_known_where_its_file_is_put(another, tmp_path):
    run = tmp_path / "run"
    start = partial(start_log, run, monitors=["gold_reward"])
    for name in ("eval/surprise", "eval/gold_reward", "eval/perplexity"):
        start(RunOptions(keep_best=name), another.CONFIG())
    with pytest.raises(BadInput, match="--keep_best eval/ties is measured by no stage"):
        start(RunOptions(keep_best="eval/ties"), another.CONFIG())
    assert measures("another", "eval/surprise")
    assert not measures("sft", "eval/surprise")

    log = start(RunOptions(), another.CONFIG())
    log._write("another", 2, {"epoch": 1.0})
    assert read_run(run).unfinished() == ["another is at step 2 of 3"]
    assert title("another") == "ANOTHER"
    ours = ["another/config.json", "checkpoints/another/step-000001/weights.safetensors"]
    for name in (*ours, "mine/config.json"):
        (run / name).parent.mkdir(parents=True)
        (run / name).touch()
    assert users_paths_below(run / "checkpoints") == []
    assert [path.parent.name for path in clear(run) if path.parent != run] == ["mine"]


def test_every_stage_says_what_is_asked_of_it():
    modules = stage_modules()
    assert set(modules) >= {"sft", "reward_model", "ppo", "grpo", "rloo", "dpo"}
    for stage, module in modules.items():
        assert stage == module.STAGE
        assert module.TITLE
        assert module.ROWS
        assert set(module.MEASURED.values()) <= {"higher", "lower"}
        assert isinstance(module.MONITORS, bool)
        assert isinstance(module.WRITES, tuple)
        assert all(curve.stage == stage for curve in module.CURVES)
        assert module.checks
        assert module.run
