"""PPO beside trl: 1.12.0's trainer live, 0.11.3's `step` as it was recorded, on given responses.

Each cause is shown alone: all others are followed, the gap is there; it too, and the gap is gone.
``recorded/ppo_step`` is made by ``python -m compare.theirs tests/compare/recorded/ppo_step`` with
the Python of trl 0.11.3 and ``PYTHONPATH=examples``, from the model and the job that lie there.
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
from compare.job import COLUMNS, WEIGHTS, Job, Record
from compare.ours.ppo import Setup, Side, make_rollouts
from compare.ppo_causes import STEP, causes, setup_of
from compare.theirs import Refused
from safetensors.torch import load_file
from small import EOS, PAD, SYLLABLES, gpt2, llama, syllables
from tolerances import FP32, FP64, LEGACY_STEP

from rlhf_min.config import PPOConfig

pytest.importorskip("trl", reason="needs trl", exc_type=ImportError)
from compare.theirs import ppo as theirs

pytestmark = pytest.mark.filterwarnings("ignore")  # of trl to transformers

RECORDED = Path(__file__).parent / "recorded" / "ppo_step"
TEMPERATURE = 0.8
CONFIG = PPOConfig(
    batch_size=8, minibatch_size=4, max_new_tokens=8, temperature=TEMPERATURE, seed=2
)
COMMON = ["value head without bias", "no gradient clipping", "schedule by rollout"]
COMMON += ["temperature plus 1e-7", "Adam's epsilon", "definitions of metrics"]
ACCUMULATED, TWO_STEPS = "minibatches are accumulated", "two steps in an epoch"
MICRO = "mean of micro-batch means"
# Of trl 1.12.0: the tokenizer's pad token, trl's options, and what there is to be followed.
RUNS: dict[str, tuple[str | None, dict[str, Any], list[str]]] = {
    "plain": ("<pad>", {"missing_eos_penalty": 0.5}, ["score cell", *COMMON]),
    "no pad token": (
        None,
        {"whiten_rewards": True},
        ["EOS taken for padding", "padding inside prompts", *COMMON],
    ),
    ACCUMULATED: (
        "<pad>",
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_mini_batches": 2},
        ["score cell", *COMMON, MICRO],
    ),
    TWO_STEPS: (
        "<pad>",
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_mini_batches": 4}
        | {"kl_estimator": "k3", "warmup_steps": 1, "adam_beta2": 0.9},
        ["score cell", *COMMON, MICRO, "betas"],
    ),
}
RECORDED_CAUSES = [
    *("temperature left out of scoring", "only the first step is clipped"),
    *("whitened rewards leak from padding", "early stop by last minibatch"),
    *("large ratios count nothing", "Adam's epsilon", "definitions of metrics"),
]
SINGLE = {
    **{("plain", name): 1e-8 for name in RUNS["plain"][2]},
    **{("no pad token", name): 1e-5 for name in RUNS["no pad token"][2][:2]},
    **{(run, MICRO): 1e-5 for run, (_, _, names) in RUNS.items() if MICRO in names},
    (TWO_STEPS, "betas"): 1e-5,
    **{("recorded", name): 1e-5 for name in RECORDED_CAUSES},
}


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
        return causes(self.setup, self.record)

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
    folder: Path,
    options: dict[str, Any],
    *,
    pad: str | None = "<pad>",
    model: Callable[..., Any] = gpt2,
    float64: bool = True,
) -> Job:
    """Two rollouts of a tiny model; a prompt with EOS inside, which is a pad token at times."""
    made = model(1, vocabulary=28, dropout=0.2)
    made.config.pad_token_id = None if pad is None else PAD
    made.float().save_pretrained(folder / "model")
    syllables(pad=pad).save_pretrained(folder / "model")
    rng = random.Random(5)
    rows = [{"prompt": " ".join(rng.choices(SYLLABLES, k=rng.randint(1, 6)))} for _ in range(24)]
    given = make_rollouts(
        folder / "model",
        rows,
        lambda _, responses: [len(text.split()) / 3 - 1 for text in responses],
        CONFIG,
        steps=2,
        template="{prompt}",
    )
    given.rollouts[0].prompt_ids[2][1:1] = [EOS]
    return Job(
        "ppo",
        str(folder / "model"),
        steps=2,
        rows=[],
        options={"learning_rate": 3e-3} | options,
        float64=float64,
        rollouts=given.rollouts,
        value_head=given.value_head,
    )


def beside(job: Job, record: Record, folder: Path, **given: Any) -> Beside:
    side = Side.load(job, "shared" if record.trainer == STEP else "separate")
    setup = setup_of(record, job.rollouts, given)
    return Beside(job, record, side, setup, load_file(folder / WEIGHTS))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Beside]:
    """Each run is made once."""
    made: dict[str, Beside] = {}

    def make(name: str) -> Beside:
        if name not in made:
            made[name] = recorded() if name == "recorded" else live(name)
        return made[name]

    def live(name: str) -> Beside:
        folder = tmp_path_factory.mktemp("run")
        pad, options, _ = RUNS[name]
        job = job_of(folder, options, pad=pad)
        theirs.run(job, folder)
        return beside(job, Record.load(folder), folder)

    def recorded() -> Beside:
        job = replace(Job.load(RECORDED / "job.json"), model=str(RECORDED / "model"))
        return beside(job, Record.load(RECORDED), RECORDED, temperature=TEMPERATURE)

    return make


@pytest.mark.parametrize("name", [*RUNS, "recorded"])
def test_with_all_causes_followed_ours_is_trls(name: str, run: Callable[[str], Beside]) -> None:
    both = run(name)
    expected = RECORDED_CAUSES if name == "recorded" else RUNS[name][2]
    assert sorted(cause.name for cause in both.causes) == sorted(expected)
    assert both.gaps(both.setup)[1] > 1e-3
    of_metrics, of_weights = both.gaps(both.followed())
    assert of_metrics <= FP64
    assert of_weights <= LEGACY_STEP
    # And all that trl logs of a rollout, the counters aside, whether we have it or not.
    for ours, logged in zip(both.side.in_words_of_trl, both.record.logged, strict=True):
        if name == "no pad token":  # trl counts the padding too
            ours["val/num_eos_tokens"] = logged["val/num_eos_tokens"]
        assert {k: logged[k] for k in ours} == pytest.approx(ours, abs=FP64)
        untold = {k for k in logged.keys() - ours.keys() if not k.startswith("time/")}
        assert untold <= {"episode", "epoch", "eps", "step"}


@pytest.mark.parametrize(("name", "cause"), SINGLE)
def test_a_cause_alone_is_the_gap(name: str, cause: str, run: Callable[[str], Beside]) -> None:
    both = run(name)
    of_metrics, of_weights = both.gaps(both.followed(without=cause))
    assert of_metrics > SINGLE[name, cause]
    # No weight depends on how metrics are averaged, on all else it does.
    assert (of_weights <= LEGACY_STEP) == (cause == "definitions of metrics")


def test_left_padding_of_step_is_told(run: Callable[[str], Beside]) -> None:
    both = run("recorded")
    facts = both.record.facts | {"padding_side": "left"}
    (told,) = [x for x in causes(both.setup, replace(both.record, facts=facts)) if not x.follow]
    assert told.name == "left padding shifts positions"
    assert [x for x in both.causes if not x.follow] == []


def test_what_ours_has_not_is_told(run: Callable[[str], Beside]) -> None:
    record = run("plain").record
    record = replace(record, options=record.options | {"lr_scheduler_type": "polynomial"})
    setup = setup_of(record, run("plain").job.rollouts, {})
    (schedule,) = [cause for cause in causes(setup, record) if cause.name == "schedule"]
    assert schedule.follow is None
    assert schedule.says == "schedule is polynomial in trl and linear here"

    facts = record.facts | {"optimizer": {"class": "Adafactor"}}
    assert "optimizer" in [x.name for x in causes(setup, replace(record, facts=facts))]


def test_options_that_differ_are_causes(run: Callable[[str], Beside]) -> None:
    both = run("plain")
    own = {"kl_coef": 0.5, "clip": 0.1, "lam": 0.5, "epochs": 2, "adam_eps": 1e-8}
    setup = setup_of(both.record, both.job.rollouts, own)
    found = {cause.name: cause for cause in causes(setup, both.record)}
    assert found["kl_coef"].says == "kl_coef is 0.05 in trl and 0.5 here"
    assert {"kl_coef", "clip", "lam", "epochs"} <= found.keys()
    assert "Adam's epsilon" not in found
    for cause in found.values():
        assert cause.follow is not None
        setup = cause.follow(setup)
    assert replace(setup.config, adam_eps=1e-8) == replace(both.followed().config, adam_eps=1e-8)


def test_conventions_of_options_that_trl_alone_was_given_are_causes(
    run: Callable[[str], Beside],
) -> None:
    both = run("recorded")
    assert {"stop_kl", "whiten_rewards", "max_grad_norm"}.isdisjoint(c.name for c in both.causes)
    ours = {"whiten_rewards": False, "max_grad_norm": None, "stop_kl": None}
    setup = replace(both.setup, config=replace(both.setup.config, **ours))
    found = [cause.name for cause in causes(setup, both.record)]
    assert set(ours) | set(RECORDED_CAUSES) <= set(found)
    for name in ("whiten_rewards", "whitened rewards leak from padding"):  # neither does for both
        followed = setup
        for cause in causes(setup, both.record):
            followed = cause.follow(followed) if cause.follow and cause.name != name else followed
        assert both.gaps(followed)[0] > 1e-5


def test_rollouts_and_rows_are_what_was_sampled(run: Callable[[str], Beside]) -> None:
    both = run("plain")
    assert both.record.rows.keys() == set(range(16))
    assert set(both.record.rows[0]) == set(COLUMNS["ppo"])
    for step, rollout in enumerate(both.job.rollouts):
        for row, ids in enumerate(rollout.response_ids):
            assert both.record.rows[8 * step + row]["response_ids"] == ids
            assert EOS not in ids[:-1]
            assert PAD not in ids
        # Of each epoch every row once.
        used = [row for part in both.record.batches[step] for row in part]
        assert sorted(used) == sorted(4 * list(range(8 * step, 8 * step + 8)))
    lengths = {len(ids) for rollout in both.job.rollouts for ids in rollout.response_ids}
    assert len(lengths) > 3


def test_an_optimizer_step_has_the_rows_of_trls(run: Callable[[str], Beside]) -> None:
    for name, rows in [("plain", 8), (ACCUMULATED, 8), (TWO_STEPS, 4)]:
        both = run(name)
        assert both.setup.config.minibatch_size == rows
        epoch = next(both.setup.epochs(1))
        assert [len(part) for part in epoch] == [rows] * (8 // rows)
        assert sorted(row for part in epoch for row in part) == list(range(8))
        trls = [row - 8 for part in both.record.batches[1] for row in part]
        assert [row for part in epoch for row in part] == trls[:8]


def test_score_cells_are_no_tokens_in_our_metrics(run: Callable[[str], Beside]) -> None:
    both = run("plain")
    # The policy stays as it is, so that all of its metrics do.
    still = replace(both.setup, config=replace(both.setup.config, learning_rate=1e-30))
    plain, with_cells = (
        next(both.side.run(setup)) for setup in (still, replace(still, pad_id=PAD))
    )
    changed = {"value", "return", "explained_variance", "policy_loss", "value_loss", "grad_norm"}
    changed |= {"clip_fraction", "value_clip_fraction", "tokens"}
    for name in plain.keys() - changed:
        assert with_cells[name] == pytest.approx(plain[name], abs=FP64)
    assert with_cells["value_loss"] != pytest.approx(plain["value_loss"], abs=1e-3)


def test_in_float32_the_losses_agree(tmp_path: Path) -> None:
    job = job_of(tmp_path, {"learning_rate": 1e-4}, float64=False)
    theirs.run(job, tmp_path)
    both = beside(job, Record.load(tmp_path), tmp_path)
    assert both.record.facts["dtype"] == "float32"
    for ours, logged in zip(both.side.run(both.followed()), both.record.steps, strict=True):
        for name in ("policy_loss", "value_loss"):
            assert ours[name] == pytest.approx(logged[name], abs=FP32)


def test_dropout_that_trl_leaves_on_is_named(tmp_path: Path) -> None:
    job = job_of(tmp_path, {}, model=llama)
    theirs.run(job, tmp_path)
    both = beside(job, Record.load(tmp_path), tmp_path)
    (dropout,) = [cause for cause in both.causes if cause.name == "dropout"]
    assert both.gaps(both.followed())[0] > 1e-3

    job = replace(job, **dict(dropout.undo))
    theirs.run(job, tmp_path)
    both = beside(job, Record.load(tmp_path), tmp_path)
    assert "dropout" not in [cause.name for cause in both.causes]
    assert both.gaps(both.followed())[0] <= FP64


@pytest.mark.parametrize("trainer", ["PPOTrainer", STEP])
def test_our_options_come_back_from_trls(trainer: str, run: Callable[[str], Beside]) -> None:
    trl = run("recorded" if trainer == STEP else "plain").record.options
    ours = {"batch_size": 12, "minibatch_size": 4, "epochs": 3, "kl_coef": 0.3, "clip": 0.3}
    ours |= {"value_clip": 0.4, "value_coef": 0.2, "gamma": 0.9, "lam": 0.8}
    ours |= {"whiten_rewards": False, "max_grad_norm": None, "learning_rate": 1e-4, "seed": 3}
    if trainer == STEP:
        ours |= {"kl": "k2", "kl_control": "fixed", "stop_kl": 0.3, "score_clip": 2.0}
    else:
        ours |= {"kl": "k3", "eos_penalty": 2.0, "schedule": "cosine", "warmup_share": 0.5}
        ours |= {"temperature": 0.9, "weight_decay": 0.1, "max_new_tokens": 5}
    told = words.in_trl_words("ppo", ours, steps=10, trainer=trainer)
    back = words.in_our_words("ppo", trl | told, total_steps=10)
    assert {name: back[name] for name in ours} == pytest.approx(ours)
    assert back["critic"] == ("shared" if trainer == STEP else "separate")
    assert PPOConfig(**back)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            {"per_device_train_batch_size": 3},
            "a batch of trl's has per_device_train_batch_size 3 times gradient_accumulation_steps 1"
            " rows, and a rollout 8; make them equal",
        ),
        ({"cliprang": 0.1}, "unexpected keyword argument 'cliprang'"),
    ],
)
def test_what_trl_cannot_is_said_in_one_line(
    options: dict[str, Any], line: str, tmp_path: Path
) -> None:
    with pytest.raises(Refused) as refused:
        theirs.run(job_of(tmp_path, options), tmp_path)
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)


# The command


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, bool]]:
    """What the command prints of a tiny model, and whether all is explained; both run here."""

    def run(job: Job, folder: Path, _python: str) -> Record:
        theirs.run(job, folder)
        return Record.load(folder)

    monkeypatch.setattr(live.start, "run", run)
    found = {"trl": "1.12.0", "transformers": "5", "torch": "2"}
    monkeypatch.setattr(live.start, "probe", lambda _: found)

    def compared(*arguments: str, model: Callable[..., Any] = gpt2) -> tuple[str, bool]:
        job_of(tmp_path, {}, model=model)
        rows = [{"prompt": text} for text in SYLLABLES]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
        reward = (
            "def words(prompts, responses):\n    return [len(x.split()) / 3 for x in responses]"
        )
        (tmp_path / "words.py").write_text(reward, encoding="utf-8")
        told = ["--stage", "ppo", "--model", str(tmp_path / "model"), "--steps", "2", "--float64"]
        told += ["--data", str(tmp_path / "rows.jsonl"), "--max_new_tokens", "6"]
        told += ["--reward", f"{tmp_path / 'words.py'}:words", "--learning_rate", "1e-3"]
        capsys.readouterr()
        explained = live.compare(parse_options("", [*told, *arguments]), tmp_path)
        text = capsys.readouterr().out
        return text[text.index("They ") :], explained

    return compared


def test_the_command_names_every_convention(command: Callable[..., tuple[str, bool]]) -> None:
    text, explained = command()
    assert explained
    assert "nothing else differs" in text.splitlines()[1]
    for name in ("score cell", *COMMON):
        assert f"\n{name} " in text


@pytest.mark.parametrize("option", ["lam=0.5", "cliprange=0.01"])
def test_the_command_names_an_option(option: str, command: Callable[..., tuple[str, bool]]) -> None:
    name, value = option.split("=")
    ours = {"cliprange": "clip"}.get(name, name)
    default = str(getattr(PPOConfig(), ours))
    text, explained = command("--trl", option, f"--{ours}", default)
    assert explained
    assert f"{ours} is {value} in trl and {default} here" in text


def test_the_command_leaves_dropout_on_both_sides(
    command: Callable[..., tuple[str, bool]],
) -> None:
    text, explained = command(model=llama)
    assert explained
    assert "dropout of 0.2 is on in trl" in "".join(text.splitlines()[:2])
