"""KTO beside the ``KTOTrainer`` of trl 1.16.0, as recorded: batches and whole runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from recordings import NEWEST, Recording, load
from small import StubTokenizer, shuffled
from tolerances import FP64
from torch.optim import SGD
from trainer_harness import SHIMMED, Parity, largest_gap, metric_gap, weights
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_min import kto
from rlhf_min.data import Cursor, UnpairedExample
from rlhf_min.errors import BadInput
from rlhf_min.optim import Optimizer
from rlhf_min.policy import Policy

RECORDED = Recording("kto", version=NEWEST)
RUNS: dict[str, dict[str, Any]] = RECORDED.facts["runs"]
BATCHES: list[dict[str, Any]] = RECORDED.facts["batches"]
README = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
# Ours and trl's. trl's alone: entropy, logits/*, num_tokens; ours alone: accuracy.
NAMES = {
    "loss": "loss",
    "kl": "kl",
    "desirable_rewards": "rewards/chosen",
    "undesirable_rewards": "rewards/rejected",
    "desirable_logprobs": "logps/chosen",
    "undesirable_logprobs": "logps/rejected",
    "margin": "rewards/margins",
}
PER_STEP = NAMES | {"grad_norm": "grad_norm", "learning_rate": "learning_rate"}


class Ours:
    """Policy, reference, rows and config of ours with trl's options."""

    def __init__(self, told: Mapping[str, Any], *, steps: int = 2, cached: bool = False) -> None:
        self.policy, self.ref_policy = self._policy("policy"), self._policy("ref_policy")
        ids = [RECORDED.rows(name) for name in ("prompt_ids", "completion_ids")]
        labels = RECORDED.facts["labels"]
        rows = zip(*([x.long() for x in column] for column in ids), labels, strict=True)
        self.examples = [UnpairedExample(*row) for row in rows]
        batch_size = told["per_device_train_batch_size"] * told.get(
            "gradient_accumulation_steps", 1
        )
        self.config = kto.KTOConfig(
            epochs=told.get("epochs", 1),
            batch_size=batch_size,
            learning_rate=told["learning_rate"],
            schedule=told["lr_scheduler_type"],
            warmup_share=told["warmup_steps"] / steps,
            weight_decay=told["weight_decay"],
            max_grad_norm=told["max_grad_norm"],
            loss=told["loss_type"],
            beta=told["beta"],
            desirable_weight=told["desirable_weight"],
            undesirable_weight=told["undesirable_weight"],
            cache_reference=cached,
            max_tokens=20,  # one row to three in a micro-batch
            seed=RECORDED.facts["seed"],
        )

    def _policy(self, name: str) -> Policy:
        config = GPT2Config(**RECORDED.facts["model"])
        tokenizer = StubTokenizer(config.eos_token_id, config.pad_token_id)
        return Policy(load(GPT2LMHeadModel(config), RECORDED.under(name)), tokenizer)


def metric_gaps(ours: Mapping[str, float], theirs: Mapping[str, float]) -> float:
    """Of all that one of the two sides reports; the other one must do so too."""
    names = {a: b for a, b in PER_STEP.items() if a in ours or b in theirs}
    return metric_gap(ours, theirs, names)


def replay(name: str, *, cached: bool = False) -> tuple[Policy, list[dict[str, float]]]:
    """trl's run by `kto.train`: the policy at its end, and the metrics of each step."""
    told, theirs = RUNS[name]["config"], RUNS[name]["steps"]
    ours = Ours(told, steps=len(theirs), cached=cached)
    n, seed = told["rows"], ours.config.seed
    # trl was given the rows in the order in which ours takes them.
    epochs = range(ours.config.epochs)
    assert RUNS[name]["order"] == [row for epoch in epochs for row in shuffled(n, seed + epoch)]
    state = kto.new_state(ours.policy, ours.ref_policy, ours.examples[:n], ours.config)
    return ours.policy, list(kto.train(ours.policy, ours.ref_policy, ours.config, state))


def run_gap(name: str, found: Sequence[Mapping[str, float]]) -> float:
    """The largest of any metric of any step."""
    pairs = zip(found, RUNS[name]["steps"], strict=True)
    return max(metric_gaps(ours, theirs) for ours, theirs in pairs)


def weights_gap(name: str, policy: Policy) -> float:
    return largest_gap(weights(policy.lm), RECORDED.under(f"after/{name}"))


def test_what_is_recorded_is_worth_comparing() -> None:
    kls = [step["kl"] for step in RUNS["kto"]["steps"]]
    assert min(kls) == 0
    assert sorted(kls)[2] > 0.05
    norms = [step["grad_norm"] for step in RUNS["kto"]["steps"]]
    assert min(norms) < RUNS["kto"]["config"]["max_grad_norm"] < max(norms)
    assert {"rewards/chosen" in batch for batch in BATCHES} == {True, False}
    assert {"rewards/rejected" in batch for batch in BATCHES} == {True, False}


@pytest.mark.eq("kto")
@pytest.mark.eq("kto_kl")
@pytest.mark.parity(
    *("kto.means", "KTOTrainer.compute_loss", NEWEST), cases=12, of="batches", dtype=SHIMMED
)
def test_loss_gradient_and_metrics_of_batches(parity: Parity) -> None:
    assert len(BATCHES) == 12
    for number, theirs in enumerate(BATCHES):
        ours = Ours(RECORDED.facts["default"] | {"loss_type": theirs["loss_type"]})
        rows = [ours.examples[i] for i in theirs["rows"]]
        optimizer = Optimizer(SGD(ours.policy.parameters()))
        found = kto.means(ours.policy, ours.ref_policy, rows, ours.config, optimizer)
        parity(metric_gaps(found, theirs))
        gradient = {name: p.grad for name, p in ours.policy.lm.named_parameters()}
        assert largest_gap(weights(ours.policy.lm), RECORDED.under("policy")) == 0
        parity(largest_gap(gradient, RECORDED.under(f"batch/{number}")))


@pytest.mark.eq("kto")
@pytest.mark.eq("kto_kl")
@pytest.mark.parity(*("kto.train", "KTOTrainer.train", NEWEST), cases=1, of="runs", dtype=SHIMMED)
@pytest.mark.parametrize("cached", [False, True], ids=["live", "cached"])
@pytest.mark.parametrize("name", ["kto", "a smaller last batch", "apo_zero_unpaired"])
def test_a_whole_run_ends_at_the_weights_of_trl(name: str, cached: bool, parity: Parity) -> None:
    policy, found = replay(name, cached=cached)
    parity(run_gap(name, found))
    parity(weights_gap(name, policy))
    assert (
        largest_gap(weights(policy.lm), RECORDED.under("policy"))
        > RUNS[name]["config"]["learning_rate"]
    )


@pytest.mark.parity(
    *("kto.train", "KTOTrainer.train", NEWEST),
    **{"cases": 1, "of": "runs", "dtype": SHIMMED, "convention": "a KL of each micro-batch"},
)
def test_trl_has_a_reference_point_for_each_micro_batch(parity: Parity) -> None:
    name, means = "two micro-batches", kto.means
    policy, plain = replay(name)
    ours, theirs = plain[0]["kl"], RUNS[name]["steps"][0]["kl"]
    assert f"first KL {ours:.2f}" in README
    assert f"{theirs:.2f} of two micro-batches" in README
    assert weights_gap(name, policy) > 1e-6

    def two_halves(
        policy: Policy, ref_policy: Policy, rows: Any, config: Any, optimizer: Any
    ) -> Any:
        found: dict[str, list[float]] = {}
        for part in (rows[:2], rows[2:]):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(optimizer, "backward", lambda loss: (loss / 2).backward())
                for key, x in means(policy, ref_policy, part, config, optimizer).items():
                    found.setdefault(key, []).append(x)
        return {key: sum(values) / len(values) for key, values in found.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kto, "means", two_halves)
        policy, found = replay(name)
    parity(run_gap(name, found))
    parity(weights_gap(name, policy))


def test_a_row_that_is_left_over_is_its_own_reference_point_in_trl() -> None:
    # The KL of the last batch is the implied reward of its one row, so that its margin is 0.
    run = RUNS["one row left"]
    last = run["steps"][-1]
    (reward,) = (last[name] for name in ("rewards/chosen", "rewards/rejected") if name in last)
    assert last["kl"] > 0.5
    assert last["kl"] * run["config"]["beta"] == pytest.approx(reward, abs=FP64)
    with pytest.raises(BadInput, match="9 rows in batches of 4 leave a batch of one"):
        replay("one row left")
    assert f"KL {last['kl']:.2f}, its own log-ratio" in README


def test_pairs_in_their_order_make_batches_of_one_label_in_trl() -> None:
    # Six pairs are six desirable rows, then six undesirable ones; and trl does not shuffle.
    theirs = [sum(labels) for labels in RECORDED.facts["pairs"]]
    rows = [i % 2 == 0 for i in range(12)]  # ours: the two of a pair follow one another
    cursor = Cursor(rows, seed=RECORDED.facts["seed"])
    ours = [sum(cursor.take(4)) for _ in range(3)]
    assert f"{', '.join(map(str, ours))} of 4 desirable" in README
    assert f"{', '.join(map(str, theirs))} of 4" in README
