"""GRPO and RLOO beside trl, live, on given responses.

Each cause is shown alone: all others are followed, the gap is there; it too, and the gap is gone.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import live
from compare import options as words
from compare.command import parse_options
from compare.conventions import Cause
from compare.group_causes import causes, setup_of
from compare.job import WEIGHTS, Job, Record
from compare.ours.groups import Setup, Side, counts_positions
from compare.ours.ppo import make_rollouts
from compare.theirs import Refused
from safetensors.torch import load_file
from small import PAD, SYLLABLES, gpt2, llama, syllables
from tolerances import FP64, LEGACY_STEP

from rlhf_min.config import GroupConfig, GRPOConfig, RLOOConfig

pytest.importorskip("trl", reason="needs trl", exc_type=ImportError)
from compare.theirs import groups as theirs

pytestmark = pytest.mark.filterwarnings("ignore")  # of trl to transformers

SIZES = {"batch_size": 8, "minibatch_size": 8, "group_size": 4, "max_new_tokens": 8, "seed": 2}
CONFIGS: dict[str, type[GroupConfig]] = {"grpo": GRPOConfig, "rloo": RLOOConfig}
SHIFT, EPS = "left padding shifts positions", "Adam's epsilon"
MICRO, TOKENS = "mean of micro-batch means", "tokens of the rollout"
TIMES, WHITENED = "KL times the ratio", "advantages whitened"
TWO = {"per_device_train_batch_size": 2, "steps_per_generation": 4}
TWO |= {"gradient_accumulation_steps": 2, "num_iterations": 2}
# The model, trl's options, and what there is to be followed.
RUNS: dict[str, tuple[Callable[..., Any], str, dict[str, Any], list[str]]] = {
    "dapo": (gpt2, "grpo", TWO | {"beta": 0.1, "epsilon_high": 0.3}, [SHIFT, EPS, TIMES, TOKENS]),
    "dr_grpo": (
        llama,
        "grpo",
        TWO | {"loss_type": "dr_grpo", "scale_rewards": "none", "adam_beta2": 0.9}
        | {"importance_sampling_level": "sequence", "beta": 0.1},
        [EPS, TIMES, "betas"],
    ),
    "grpo": (llama, "grpo", {"loss_type": "grpo", "num_iterations": 3, "beta": 0.2}, [EPS, TIMES]),
    "bnpo": (
        llama,
        "grpo",
        TWO | {"loss_type": "bnpo", "scale_rewards": "batch", "warmup_steps": 1},
        [EPS, MICRO],
    ),
    "rloo": (gpt2, "rloo", TWO | {"normalize_advantages": True}, [SHIFT, EPS, WHITENED]),
    "plain rloo": (llama, "rloo", {"reward_clip_range": [-0.5, 0.5]}, [EPS]),
}  # fmt: skip
ALONE = [(name, cause) for name, (*_, found) in RUNS.items() for cause in found]


@dataclass
class Beside:
    """Both sides of a run."""

    job: Job
    record: Record
    side: Side
    setup: Setup
    weights: dict[str, torch.Tensor]

    @property
    def causes(self) -> list[Cause[Setup]]:
        absolute = counts_positions(self.side.policy)
        return causes(self.setup, self.record, absolute=absolute)

    def followed(self, *, without: str = "") -> Setup:
        setup = self.setup
        for cause in self.causes:
            if cause.follow is not None and cause.name != without:
                setup = cause.follow(setup)
        return setup

    def gaps(self, setup: Setup) -> tuple[float, float]:
        """Of the metrics, relative to numbers above 1, and of the weights."""
        metrics = list(self.side.run(setup))
        assert len(metrics) == len(self.record.steps) == len(self.job.rollouts)
        of_metrics = [
            abs(ours[name] - value) / max(1.0, abs(value))
            for ours, step in zip(metrics, self.record.steps, strict=True)
            for name, value in step.items()
        ]
        of_weights = [
            (p - self.weights[name]).abs().max() for name, p in self.side.module.named_parameters()
        ]
        return max(of_metrics), float(torch.stack(of_weights).max())


def job_of(
    folder: Path, stage: str, options: dict[str, Any], *, model: Any, dropout: float = 0.0
) -> Job:
    """Two rollouts of a tiny model."""
    made = model(1, vocabulary=28, dropout=dropout)
    made.config.pad_token_id = PAD
    made.float().save_pretrained(folder / "model")
    syllables().save_pretrained(folder / "model")
    rng = random.Random(5)
    rows = [{"prompt": " ".join(rng.choices(SYLLABLES, k=rng.randint(1, 6)))} for _ in range(24)]
    given = make_rollouts(
        folder / "model",
        rows,
        lambda _, responses: [len(text.split()) / 3 - 1 for text in responses],
        CONFIGS[stage](**SIZES),
        steps=2,
        template="{prompt}",
    )
    told = {"learning_rate": 3e-3, "num_generations": 4, "max_completion_length": 8}
    return Job(
        stage,  # type: ignore[arg-type]
        str(folder / "model"),
        steps=2,
        rows=[],
        options=told | options,
        float64=True,
        rollouts=given.rollouts,
    )


def beside(job: Job, folder: Path, **given: Any) -> Beside:
    theirs.run(job, folder)
    record = Record.load(folder)
    setup = setup_of(record, job.rollouts, given)
    return Beside(job, record, Side.load(job), setup, load_file(folder / WEIGHTS))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Beside]:
    """Each run is made once."""
    made: dict[str, Beside] = {}

    def make(name: str) -> Beside:
        if name not in made:
            folder = tmp_path_factory.mktemp("run")
            model, stage, options, _ = RUNS[name]
            made[name] = beside(job_of(folder, stage, options, model=model), folder)
        return made[name]

    return make


@pytest.mark.parametrize("name", RUNS)
def test_with_all_causes_followed_ours_is_trls(name: str, run: Callable[[str], Beside]) -> None:
    both = run(name)
    assert sorted(cause.name for cause in both.causes) == sorted(RUNS[name][3])
    of_metrics, of_weights = both.gaps(both.followed())
    assert of_metrics <= FP64
    assert of_weights <= LEGACY_STEP


@pytest.mark.parametrize(("name", "cause"), ALONE)
def test_a_cause_alone_is_the_gap(name: str, cause: str, run: Callable[[str], Beside]) -> None:
    both = run(name)
    assert max(both.gaps(both.followed(without=cause))) > 1e-6


def test_dropout_that_trl_leaves_on_is_named(tmp_path: Path) -> None:
    job = job_of(tmp_path, "grpo", {}, model=gpt2, dropout=0.2)
    both = beside(job, tmp_path)
    (dropout,) = [cause for cause in both.causes if cause.name == "dropout"]
    assert both.gaps(both.followed())[0] > 1e-3

    both = beside(replace(job, **dict(dropout.undo)), tmp_path)
    assert "dropout" not in [cause.name for cause in both.causes]
    assert both.gaps(both.followed())[0] <= FP64


def test_options_that_differ_are_causes(run: Callable[[str], Beside]) -> None:
    both = run("grpo")
    own: dict[str, Any] = {"clip": 0.3, "loss_mean": "token", "kl_in": "reward", "epochs": 1}
    setup = setup_of(both.record, both.job.rollouts, own)
    found = {cause.name: cause for cause in causes(setup, both.record, absolute=False)}
    assert found["loss_mean"].says == "loss_mean is sequence in trl and token here"
    assert own.keys() <= found.keys()
    for cause in found.values():
        assert cause.follow is not None
        setup = cause.follow(setup)
    assert setup == both.followed()
    assert both.gaps(setup)[0] <= FP64


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("grpo", {"delta": 2.0}, "delta is 2.0 in trl, which is not here"),
        ("grpo", {"entropy_coef": 0.1}, "entropy_coef is 0.1 in trl, which is not here"),
        ("grpo", {"loss_type": "cispo"}, "trl's loss is 'cispo', which is not here"),
        ("grpo", {"lr_scheduler_type": "polynomial"}, "schedule is polynomial in trl and linear"),
        ("plain rloo", {"reward_clip_range": [-1, 2]}, "trl clips scores to [-1, 2], here either"),
    ],
)
def test_what_ours_has_not_is_told(
    name: str, given: dict[str, Any], says: str, run: Callable[[str], Beside]
) -> None:
    both = run(name)
    record = replace(both.record, options=both.record.options | given)
    setup = setup_of(record, both.job.rollouts, {})
    unable = [x.says for x in causes(setup, record, absolute=False) if x.follow is None]
    assert [line for line in unable if line.startswith(says)] == unable != []


@pytest.mark.parametrize("stage", CONFIGS)
def test_our_options_come_back_from_trls(stage: str, run: Callable[[str], Beside]) -> None:
    trl = run("grpo" if stage == "grpo" else "plain rloo").record.options
    ours = {"batch_size": 12, "minibatch_size": 4, "epochs": 3, "group_size": 3, "clip": 0.3}
    ours |= {"clip_high": 0.4, "kl_coef": 0.3, "max_new_tokens": 9, "temperature": 0.7}
    ours |= {"max_grad_norm": None, "learning_rate": 1e-4, "seed": 3, "weight_decay": 0.1}
    ours |= {"schedule": "cosine", "warmup_share": 0.1}
    if stage == "grpo":
        ours |= {"loss_mean": "constant", "advantage_scale": "none", "mask_cut": True}
        ours |= {"ratio_level": "sequence"}
    else:
        ours |= {"score_clip": 2.0}
    told = words.in_trl_words(stage, ours, steps=10)
    back = words.in_our_words(stage, trl | told, total_steps=90)
    assert {name: back[name] for name in ours} == ours
    assert CONFIGS[stage](**back).steps == 10


def test_what_does_not_fit_the_rollouts_is_refused(tmp_path: Path) -> None:
    job = job_of(tmp_path, "grpo", {}, model=gpt2)
    for given, says in [
        ({"per_device_train_batch_size": 4}, "has per_device_train_batch_size 4 times"),
        ({"num_generations": 8}, "num_generations is 8, and the rollouts have other groups"),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 1}, "2 must divide"),
        ({"no_such_option": 1}, "trl's GRPOConfig: TypeError"),
    ]:
        with pytest.raises(Refused, match=says):
            theirs.run(replace(job, options=job.options | given), tmp_path)


def test_the_command_explains_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def here(job: Job, folder: Path, _python: str) -> Record:
        theirs.run(job, folder)
        return Record.load(folder)

    monkeypatch.setattr(live.start, "run", here)
    found = {"trl": "1.16.0", "transformers": "5", "torch": "2"}
    monkeypatch.setattr(live.start, "probe", lambda _: found)
    job_of(tmp_path, "grpo", {}, model=gpt2)
    lines = "".join(json.dumps({"prompt": f"{a} {b}"}) + "\n" for a in SYLLABLES for b in ("", a))
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
    reward = "def words(prompts, responses):\n    return [len(x.split()) / 3 for x in responses]"
    (tmp_path / "words.py").write_text(reward, encoding="utf-8")
    told = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "rows.jsonl")]
    told += ["--reward", f"{tmp_path / 'words.py'}:words", "--steps", "2", "--max_new_tokens", "6"]
    told += ["--float64", "--learning_rate", "1e-3", "--batch_size", "8", "--minibatch_size", "4"]
    told += ["--stage", "grpo", "--loss_mean", "token", "--kl_coef", "0.1", "--trl", "epsilon=0.1"]
    assert live.compare(parse_options("", told), tmp_path)
    text = capsys.readouterr().out
    text = text[text.index("They ") :]
    assert "nothing else differs" in text.splitlines()[1]
    for name in (SHIFT, EPS, TIMES, TOKENS):
        assert f"\n{name} " in text
    assert "clip is 0.1 in trl and 0.2 here" in text
