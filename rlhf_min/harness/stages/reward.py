"""The reward model's training as the commands run it."""

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rlhf_min import reward
from rlhf_min.encoding.codec import Codec
from rlhf_min.errors import BadInput, require
from rlhf_min.estimates import Estimate, mean_estimate, proportion_estimate
from rlhf_min.harness import preflight
from rlhf_min.harness.inputs import HELDOUT_ROWS, Inputs, print_report
from rlhf_min.harness.preflight import Check
from rlhf_min.harness.report import results
from rlhf_min.harness.report.curves import Curve, Range
from rlhf_min.harness.report.findings import (
    Estimated,
    Finding,
    by_heart,
    interval,
    last_fifth,
)
from rlhf_min.harness.report.finish import WarnOnly
from rlhf_min.harness.rows.encoding_report import describe_pairs
from rlhf_min.harness.run import faults, layout
from rlhf_min.harness.run.checkpoint import Snapshot
from rlhf_min.harness.run.log import MetricsLog, note
from rlhf_min.harness.run.reading import Run
from rlhf_min.harness.run.saved_models import save_reward_model
from rlhf_min.harness.stages.run_stage import run_stage, sample_texts
from rlhf_min.loading.reward_function import RewardFunction, call_reward
from rlhf_min.optim import Optimizer, State
from rlhf_min.policy import Policy, evaluating
from rlhf_min.reward_model import RewardModel
from rlhf_min.speed.sharding import put_together, shard, whole

STAGE = "reward_model"
TITLE, ROWS = "Reward model", "pairs"
CONFIG = reward.RewardConfig
MEASURED = {"loss": "lower", "accuracy": "higher", "ties": "lower", "margin": "higher"}
MONITORS = False
WRITES = (layout.REWARD_MODEL,)
NORMALISE_ON = 512  # responses that the scores' mean and variance are taken from


# What its preflight checks


def checks(reward_model: RewardModel, config: reward.RewardConfig, state: State) -> Iterator[Check]:
    """What reward training relies on."""
    examples: Sequence[reward.RewardExample] = state.cursor.examples
    yield from preflight.half_precision(config.precision, reward_model.device)
    longest = max(x.length for x in examples)
    tokens = preflight.largest_batch(longest, config.batch_size, config.max_tokens)
    short = heapq.nsmallest(preflight.ROWS, examples, key=lambda x: x.length)
    yield from memory(reward_model, state.optimizer, short[0], tokens=tokens)
    pairs = [x.chosen_pair for x in short] + [x.rejected_pair for x in short]
    with evaluating(reward_model):
        scores = reward_model.forward_pairs(pairs)
    yield scores_are_finite(scores)
    yield scores_differ(*scores.split(len(short)))
    tolerance = preflight.tolerance(reward_model.model.dtype, config.precision)
    yield score_alone_equals_batch(reward_model, short, tolerance)
    yield head_is_trainable(reward_model, short, config)


def scores_are_finite(scores: Tensor) -> Check:
    """No score is infinite or NaN."""
    return Check(
        "scores that are not finite",
        int((~scores.isfinite()).sum()),
        0,
        "the reward model's weights or its precision overflow",
        "look at its weights, or use --precision fp32",
    )


def scores_differ(chosen: Tensor, rejected: Tensor) -> Check:
    """The reward model tells at least one chosen text from its rejected one."""
    equal, margin = int((chosen == rejected).sum()), float((chosen - rejected).abs().max())
    return Check(
        "pairs with the same score on both sides",
        equal,
        len(chosen) - 1,
        "the score does not depend on the response, so nothing can be learned",
        "look at where the score is read: pad token, max_length, classifier",
        words=f"{equal} of {len(chosen)}, largest margin {margin:.2g}",
    )


def score_alone_equals_batch(
    reward_model: RewardModel, examples: Sequence[reward.RewardExample], tolerance: float
) -> Check:
    """A text has the same score alone and padded beside a longer one."""
    row, longer = examples[0], examples[-1]
    with evaluating(reward_model):
        alone = reward_model([row.prompt], [row.chosen])[0]
        padded = reward_model(
            [row.prompt, longer.prompt], [row.chosen, f"{longer.chosen} {longer.rejected}"]
        )[0]
    return Check(
        "a score alone against it in a batch",
        float((alone - padded).abs()),
        tolerance,
        "padding changes the score",
        "look at the tokenizer's pad token and padding side",
    )


def head_is_trainable(
    reward_model: RewardModel,
    examples: Sequence[reward.RewardExample],
    config: reward.RewardConfig,
) -> Check:
    """The loss has a gradient in the classifier's last layer."""
    norm = 0.0
    with whole(reward_model) as model:
        weight = model._last_layer.weight
        if weight.requires_grad:
            loss = reward.batch_loss(model.eval(), examples, center_coef=config.center_coef).loss
            norm = float(torch.autograd.grad(loss, weight)[0].norm())
    return Check(
        "classifier without gradient",
        0 if 0 < norm < math.inf else 1,
        0,
        "the loss cannot change the reward model's last layer",
        "let it require a gradient",
        words=f"gradient of length {norm:.2g}",
    )


def memory(
    reward_model: RewardModel, optimizer: Optimizer, row: reward.RewardExample, *, tokens: int
) -> Iterator[Check]:
    """What training a reward model needs; `tokens` as in `preflight.policy_memory`."""
    reward_model.train()
    with whole(reward_model) as model:
        fixed, per_token = preflight.kept_bytes(
            model,
            lambda n: model.forward_pairs([row.chosen_pair] * n),
            len(row.chosen_pair.ids),
        )
    yield from preflight.memory(
        reward_model, [], optimizer, {"activations": fixed + tokens * per_token}, 0
    )


# How it is run


@dataclass(frozen=True)
class RewardReport:
    """How well a reward model ranks held-out pairs, beside two rules that only look at length."""

    estimates: dict[str, Estimate]
    normalised_on: str

    def __str__(self) -> str:
        lines = [f"  {name:<14} {estimate}" for name, estimate in self.estimates.items()]
        return "\n".join(["reward model on held-out pairs:", *lines, f"  {self.normalised_on}"])


def run(
    reward_model: RewardModel,
    inputs: Inputs,
    config: reward.RewardConfig,
    log: MetricsLog,
    *,
    sft_policy: Policy | None = None,
    codec: Codec | None = None,
) -> RewardReport:
    """Train the reward model, normalise its scores, save it in the run's folder, and measure it.

    Args:
        sft_policy, codec: if given, the scores are normalised on samples of this policy, else on
            the training responses.
    """
    responses = [p["chosen"] for p in inputs.pairs] + [p["rejected"] for p in inputs.pairs]
    examples, heldout, report = _prepared(reward_model, inputs)
    state = reward.new_state(shard(reward_model), examples, config)
    snapshot = Snapshot(
        STAGE,
        reward_model,
        state,
        partial(save_reward_model, reward_model),
        models={"reward_model": reward_model},
        texts=responses,
        examples=examples,
        heldout=heldout,
        total=reward.total(state.cursor, config),
        alone=partial(alone, reward_model, config),
    )
    run_stage(
        snapshot,
        checks(reward_model, config, state),
        reward.train(reward_model, config, state, heldout=heldout[:HELDOUT_ROWS]),
        inputs,
        log,
        title="the reward model",
        report=report,
        show=("loss", "eval/accuracy"),
    )
    put_together(reward_model)  # to score as often as there are texts
    pairs = [{"prompt": x.prompt, "chosen": x.chosen, "rejected": x.rejected} for x in heldout]
    chosen, rejected = reward.pair_scores(reward_model, pairs)
    faults.require_finite(STAGE, {"a held-out score": float((chosen + rejected).sum())})
    with WarnOnly(log.folder / layout.REWARD_MODEL, "the page will lack calibration and margins"):
        results.write_json(log.folder / layout.REWARD_MODEL, results.pairs_json(chosen, rejected))
    scale = "scores as trained, not normalised"
    if config.normalise and sft_policy is not None and codec is not None:
        rows = inputs.prompts[:NORMALISE_ON]
        texts = sample_texts(sft_policy, codec, rows, seed=config.seed)
        scale = _normalised(reward_model, *texts, "samples of the SFT model")
    elif config.normalise:
        prompts = [pair["prompt"] for pair in inputs.pairs] * 2
        scale = _normalised(reward_model, prompts, responses, "training responses")
    snapshot.save_model(log.folder / STAGE)
    gold = inputs.monitors.get("gold_reward")
    estimates = measure_reward(chosen, rejected, pairs, gold=gold, seed=config.seed)
    values = {name: estimate.as_json() for name, estimate in estimates.items()}
    note(log.folder, STAGE, estimates=values, scale=scale)
    return RewardReport(estimates, scale)


def alone(
    reward_model: RewardModel,
    config: reward.RewardConfig,
    pairs: Sequence[reward.RewardExample],
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """What the loss of each pair is made of, to find the ones at fault where it is not finite."""
    for row, pair in enumerate(pairs):
        loss = reward.batch_loss(reward_model, [pair], center_coef=config.center_coef)
        yield row, loss._asdict()


def _prepared(
    reward_model: RewardModel, inputs: Inputs
) -> tuple[list[reward.RewardExample], list[reward.RewardExample], list[str]]:
    """The pairs to train on and those held out, without those that are equal to the model, and
    what was said of them."""
    examples, cut = reward.prepare_pairs(reward_model, inputs.pairs)
    heldout, heldout_cut = reward.prepare_pairs(reward_model, inputs.heldout_pairs)
    report = print_report(
        f"reward model on {len(examples)} pairs; {describe_pairs(cut, reward_model)}"
    )
    if equal := heldout_cut.equal_after_cut + heldout_cut.equal_tokens:
        n = len(inputs.heldout_pairs)
        report += print_report(f"  {equal} of {n} held-out pairs are left out likewise")
    alike = "after the cut or because its tokenizer tells them not apart"
    require(
        len(examples) > 0,
        "no pair is left to train on: the reward model reads the same on both sides of all, "
        f"{alike}; give pairs that differ earlier or in more than signs, or a --reward_model with "
        "more positions or tokens",
    )
    require(
        len(heldout) > 0,
        "no pair is left to measure on: the reward model reads the same on both sides of all "
        f"{len(inputs.heldout_pairs)} held out, {alike}; give another --seed, a larger "
        "--heldout_share, or other pairs as --heldout_data",
    )
    return examples, heldout, report


def _normalised(
    reward_model: RewardModel, prompts: Sequence[str], responses: Sequence[str], source: str
) -> str:
    try:
        mean, std = reward.normalise(reward_model, prompts, responses)
    except BadInput as error:  # the trained model is worth more than its scale
        return f"scores as trained, not normalised: {error}"
    scale = f"normalised on {len(prompts)} {source} (was {mean:.3f} +- {std:.3f})"
    if not reward_model.has_bias:
        scale += "; the mean stays, since the last layer has no bias"
    return scale


def measure_reward(
    chosen: Tensor,
    rejected: Tensor,
    pairs: Sequence[reward.Pair],
    *,
    gold: RewardFunction | None,
    seed: int,
) -> dict[str, Estimate]:
    """Accuracy, ties, margin, the two length rules, and what the gold reward itself reaches.

    Args:
        chosen, rejected: scores of the pairs, ``(N,)`` each.
    """
    longer, shorter = reward.length_rules(pairs)
    estimates = {
        "accuracy": proportion_estimate(int((chosen > rejected).sum()), len(pairs)),
        "ties": proportion_estimate(int((chosen == rejected).sum()), len(pairs)),
        "margin": mean_estimate((chosen - rejected).numpy(), seed=seed),
        "longer_wins": mean_estimate(longer.numpy(), seed=seed),
        "shorter_wins": mean_estimate(shorter.numpy(), seed=seed),
    }
    if gold is not None:
        prompts = [pair["prompt"] for pair in pairs]
        gold_chosen = call_reward(gold, prompts, [pair["chosen"] for pair in pairs])
        gold_rejected = call_reward(gold, prompts, [pair["rejected"] for pair in pairs])
        right = int((gold_chosen > gold_rejected).sum())
        estimates["gold_accuracy"] = proportion_estimate(right, len(pairs))
    return estimates


# What a report shows

CURVES = (
    Curve(
        STAGE,
        "Pairs ranked right",
        "share",
        (("eval/accuracy", "held out"), ("accuracy", "training")),
        "It climbs from a half and levels off below 1, since people disagree too; training far "
        "above held-out pairs is learning by heart.",
        Range(low=0.5),
        "look whether chosen and rejected are the right way round, or lower --learning_rate",
    ),
)


def headline(run: Run) -> str | None:
    """How many pairs it ranks right."""
    if not (found := heldout_estimates(run)):
        return None
    accuracy = found["accuracy"]
    return (
        f"{TITLE}: ranks {interval(accuracy)} of {accuracy['n']} held-out pairs right, the better "
        f"length rule {length_rule(found):.3f}."
    )


def findings(run: Run) -> Iterator[Finding]:
    """Whether it knows more than a guess, than the lengths, and than its own pairs."""
    if (scale := run.noted(STAGE, "scale")) and "not normalised: " in scale:
        yield Finding(STAGE, scale, to_do="its scores mean what they happen to mean")
    found = heldout_estimates(run)
    if not found:
        return
    accuracy, of_pairs = found["accuracy"], f"on {found['accuracy']['n']} held-out pairs"
    rule = length_rule(found)
    if accuracy["ci95"][0] <= 0.5:
        yield Finding(
            STAGE,
            "is not shown to know more than a guess",
            of_pairs,
            f"{interval(accuracy)} ranked right",
            "take more pairs or more --epochs, and look at the labels",
        )
    elif accuracy["ci95"][0] <= rule:
        yield Finding(
            STAGE,
            "is not shown to know more than the lengths",
            of_pairs,
            f"{interval(accuracy)} ranked right, the better length rule {rule:.3f}",
            "take pairs of similar length, or more of them",
        )
    trained = last_fifth(run.series(STAGE, "accuracy")[1])
    if trained is not None and trained > accuracy["ci95"][1] and by_heart(trained, accuracy):
        yield Finding(
            STAGE,
            "learns its pairs by heart",
            "in the last fifth of its steps",
            f"{trained:.3f} of the pairs it is trained on ranked right, {interval(accuracy)} of "
            "those held out",
            "take fewer --epochs, a lower --learning_rate, or more pairs",
        )


def heldout_estimates(run: Run) -> Mapping[str, Estimated]:
    """What was measured on held-out pairs; nothing if it was not trained."""
    found = run.noted(STAGE, "estimates") or run.results.get(STAGE) or {}
    return found if {"accuracy", "longer_wins", "shorter_wins"} <= set(found) else {}


def length_rule(found: Mapping[str, Estimated]) -> float:
    """How many pairs the better one of two rules ranks right: longer wins, or shorter wins."""
    return float(max(found["longer_wins"]["mean"], found["shorter_wins"]["mean"]))
