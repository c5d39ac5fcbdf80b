"""DPO against the ``DPOTrainer`` of trl 0.11.3, as recorded: batches and a whole run."""

from typing import Any

import pytest
import torch
from recordings import VERSION, Recording, load
from small import StubTokenizer, shuffled
from trainer_harness import (
    DPO_METRICS,
    SHIMMED,
    Parity,
    gradients,
    largest_gap,
    metric_gap,
    weights,
)
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_min import dpo
from rlhf_min.data import PreferenceExample, collate
from rlhf_min.optim import State
from rlhf_min.policy import Policy, evaluating

RECORDED = Recording("dpo")
RUN: dict[str, Any] = RECORDED.facts["run"]
PER_STEP = DPO_METRICS | {"loss": "loss", "grad_norm": "grad_norm"}

cached = pytest.mark.parametrize("cached", [False, True], ids=["live", "cached"])


class Ours:
    """Policy, reference, pairs and state of a run of ours with trl's options."""

    def __init__(self, *, cached: bool, label_smoothing: float = 0.0) -> None:
        told = RUN["config"]
        self.policy = self._policy("policy")
        self.ref_policy = self._policy("ref_policy").reference()
        ids = [RECORDED.rows(name) for name in ("prompts", "chosen", "rejected")]
        self.pairs = [PreferenceExample(*row) for row in zip(*ids, strict=True)]
        self.config = dpo.DPOConfig(
            epochs=told["num_train_epochs"],
            batch_size=told["per_device_train_batch_size"] * told["gradient_accumulation_steps"],
            learning_rate=told["learning_rate"],
            schedule=told["lr_scheduler_type"],
            warmup_share=told["warmup_steps"] / len(RUN["steps"]),
            weight_decay=told["weight_decay"],
            max_grad_norm=told["max_grad_norm"],
            beta=told["beta"],
            label_smoothing=label_smoothing,
            cache_reference=cached,
            max_tokens=50,  # other micro-batches than trl's
            seed=RECORDED.facts["seed"],
        )
        self.state: State = dpo.new_state(self.policy, self.ref_policy, self.pairs, self.config)

    def _policy(self, name: str) -> Policy:
        config = GPT2Config(**RECORDED.facts["model"])
        tokenizer = StubTokenizer(config.eos_token_id, config.pad_token_id)
        return Policy(load(GPT2LMHeadModel(config), RECORDED.under(name)), tokenizer)

    def mean_logits(self, pairs: list[PreferenceExample]) -> dict[str, float]:
        """Over all positions and words, as trl takes them: prompt and padding included."""
        batch = collate(
            [x.prompt_ids for x in pairs] * 2,
            [x.chosen_ids for x in pairs] + [x.rejected_ids for x in pairs],
            pad_id=self.policy.pad_id,
        )
        with evaluating(self.policy):
            logits = self.policy.lm(batch.ids, attention_mask=batch.attention_mask).logits
        chosen, rejected = logits.split(len(pairs))
        return {
            "logits/chosen": float(chosen.mean()),
            "logits/rejected": float(rejected.mean()),
        }


@pytest.mark.eq("dpo")
@pytest.mark.parity(
    *("dpo.batch_loss", "DPOTrainer.get_batch_loss_metrics", VERSION),
    **{"cases": 4, "of": "batches", "dtype": SHIMMED, "convention": "mean logits recomputed"},
)
@cached
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_loss_gradient_and_metrics_of_batches(
    cached: bool, label_smoothing: float, parity: Parity
) -> None:
    ours = Ours(cached=cached, label_smoothing=label_smoothing)
    ours.policy.train()
    recorded = RECORDED.facts["metrics"][str(label_smoothing)]
    for i, (batch, theirs) in enumerate(zip(RECORDED.facts["batches"], recorded, strict=True)):
        pairs = [ours.state.cursor.examples[row] for row in batch]
        assert all((pair.ref_logprobs is not None) == cached for pair in pairs)
        found = dpo.batch_loss(ours.policy, ours.ref_policy, pairs, ours.config)
        means = {name: float(x.detach().double().mean()) for name, x in found._asdict().items()}
        logits = ours.mean_logits(pairs)
        names = DPO_METRICS | {"loss": "loss"} | {name: name for name in logits}
        assert set(names.values()) == theirs.keys()
        assert 0.05 < found.loss < 3  # far from both saturations
        parity(metric_gap(means | logits | {"loss": found.loss.item()}, theirs, names))
        gradient = RECORDED.under(f"{label_smoothing}/{i}")
        parity(largest_gap(gradients(ours.policy.lm, found.loss), gradient))


@pytest.mark.eq("dpo")
@pytest.mark.parity(
    *("dpo.train", "DPOTrainer.train", VERSION),
    **{"cases": 1, "of": "runs", "dtype": SHIMMED, "convention": "micro-batches of equal size"},
)
@cached
def test_whole_run(cached: bool, parity: Parity) -> None:
    ours, told = Ours(cached=cached), RUN["config"]
    start = weights(ours.policy.lm)
    metrics = list(dpo.train(ours.policy, ours.ref_policy, ours.config, ours.state))
    # trl rounds the loss that it logs; recorded is that of each micro-batch.
    losses = torch.tensor(RUN["micro_batch_losses"], dtype=torch.float64)
    losses = losses.view(-1, told["gradient_accumulation_steps"]).mean(1)
    steps = RUN["steps"]
    assert len(metrics) == len(steps) == len(losses) == 6
    for ours_now, theirs_now, loss in zip(metrics, steps, losses.tolist(), strict=True):
        parity(metric_gap(ours_now, theirs_now | {"loss": loss}, PER_STEP))
    # trl logs the rate that comes next.
    rates = [m["learning_rate"] for m in metrics]
    next_rates = [step["learning_rate"] for step in steps]
    parity([abs(x - y) for x, y in zip(rates[1:], next_rates[:-1], strict=True)])
    parity(largest_gap(weights(ours.policy.lm), RECORDED.under("trained")))

    # The run was worth comparing: it moved, the clip was felt and not always, the rate has risen
    # and fallen, and the two epochs have different orders.
    assert largest_gap(weights(ours.policy.lm), start) > told["learning_rate"]
    norms = [m["grad_norm"] for m in metrics]
    assert min(norms) < told["max_grad_norm"] < max(norms)
    assert rates[0] == 0
    assert rates[2] == told["learning_rate"] > rates[3] > rates[5]
    assert shuffled(12, ours.config.seed) != shuffled(12, ours.config.seed + 1)
