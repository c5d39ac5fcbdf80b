"""Models compared on the same prompts: scores, win rates, KL, BLEU, ROUGE and diversity."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from . import text_metrics
from .config import PPOConfig
from .data import PromptExample
from .errors import require
from .estimates import Estimate, bleu_estimate, mean_estimate, win_rate
from .loading.reward_function import RewardFunction, call_reward
from .policy import Policy
from .rollout import Rollout, collect

PROMPTS_AT_ONCE = 256


@dataclass(frozen=True)
class Evaluation:
    """One model's responses to the test prompts, and what they are worth.

    `estimates` holds ``score``, one entry for each monitor, ``win_rate`` and
    ``<monitor>_win_rate`` against the baseline, ``kl`` (nats per response to the reference),
    ``bleu``, ``rouge1``, ``rouge2``, ``rougeL``, ``response_length`` (tokens, EOS included) and
    ``eos_rate``. `shares` holds the share of ties of each win rate, ``distinct_1``, ``distinct_2``
    and ``repeated_4``. `signatures` says how BLEU and ROUGE were computed. What could not be
    measured is not there, and `notes` says why, by measure.
    """

    responses: list[str]
    scores: list[float]
    estimates: dict[str, Estimate]
    shares: dict[str, float]
    signatures: dict[str, str]
    notes: dict[str, str] = field(default_factory=dict)


def evaluate_policies(
    policies: Mapping[str, Policy],
    ref_policy: Policy,
    reward: RewardFunction,
    prompts: Sequence[PromptExample],
    references: Sequence[Sequence[str]],
    *,
    baseline: str,
    monitors: Mapping[str, RewardFunction],
    max_new_tokens: int,
    max_tokens: int,
    seed: int,
) -> dict[str, Evaluation]:
    """Sample every model on the same prompts with the same random numbers, and compare them.

    Args:
        policies: by name.
        ref_policy: what the KL is measured to.
        reward: gives the scores.
        prompts: test prompts; sampled at temperature 1.
        references: one or more reference responses for each prompt; empty for none at all.
        baseline: name of the policy that the others must beat.
        monitors: further rewards by name, such as a known true reward.
        max_new_tokens: longest response.
        max_tokens: padded tokens in one forward pass; a matter of memory only.
        seed: of the samples and of the bootstrap.

    Raises:
        BadInput: no prompts, other than one row of references for each, a baseline that is not
            among the policies, a policy with another vocabulary or no room for a prompt and the
            longest response, or what `bleu_statistics` refuses.
    """
    require(baseline in policies, f"the baseline {baseline!r} is none of {list(policies)}")
    require(len(prompts) > 0, "there is no prompt to evaluate on; give at least one")
    if references:
        text_metrics.check_texts([prompt.text for prompt in prompts], references)
    for policy in (*policies.values(), ref_policy):
        policy.require_room(([prompt.ids] for prompt in prompts), new_tokens=max_new_tokens)
    config = PPOConfig(
        max_new_tokens=max_new_tokens, temperature=1.0, kl="k1", max_tokens=max_tokens
    )
    samples = {}
    for name, policy in policies.items():
        require(
            policy.tokenizer.get_vocab() == ref_policy.tokenizer.get_vocab(),
            f"model {name!r} has another vocabulary than the reference, so their KL means nothing; "
            "compare models that were trained from the same one",
        )
        rng = torch.Generator().manual_seed(seed)
        samples[name] = [
            collect(
                policy,
                ref_policy,
                reward,
                prompts[start : start + PROMPTS_AT_ONCE],
                config,
                rng=rng,
            )
            for start in range(0, len(prompts), PROMPTS_AT_ONCE)
        ]
    measured = {name: _measure(rollouts, monitors) for name, rollouts in samples.items()}
    return {
        name: _compare(columns, measured[baseline], references, list(monitors), samples[name], seed)
        for name, columns in measured.items()
    }


def _measure(
    rollouts: Sequence[Rollout], monitors: Mapping[str, RewardFunction]
) -> dict[str, np.ndarray]:
    """One column of N numbers for each quantity that a single response has."""
    columns: dict[str, list[np.ndarray]] = {}
    for rollout in rollouts:
        found = {
            "score": rollout.scores,
            "kl": rollout.kl.sum(1),
            "response_length": rollout.lengths,
            "eos_rate": rollout.ended,
        }
        for name, monitor in monitors.items():
            found[name] = call_reward(monitor, rollout.prompts, rollout.responses, rollout.columns)
        for name, column in found.items():
            columns.setdefault(name, []).append(column.cpu().double().numpy())
    return {name: np.concatenate(parts) for name, parts in columns.items()}


def _compare(
    columns: dict[str, np.ndarray],
    baseline: dict[str, np.ndarray],
    references: Sequence[Sequence[str]],
    monitors: Sequence[str],
    rollouts: Sequence[Rollout],
    seed: int,
) -> Evaluation:
    responses = [text for rollout in rollouts for text in rollout.responses]
    estimates = {name: mean_estimate(column, seed=seed) for name, column in columns.items()}
    shares: dict[str, float] = {}
    for name in ("score", *monitors):
        prefix = "" if name == "score" else f"{name}_"
        rate, shares[f"{prefix}ties"] = win_rate(columns[name], baseline[name], seed=seed)
        estimates[f"{prefix}win_rate"] = rate
    signatures, notes = {}, {}
    if references:
        signatures = text_metrics.signatures(references)
        statistics = text_metrics.bleu_statistics(responses, references)
        estimates["bleu"] = bleu_estimate(statistics, seed=seed)
        for name, column in text_metrics.rouge_scores(responses, references).items():
            estimates[name] = mean_estimate(column, seed=seed)
        for name, blind in text_metrics.blind_spots(responses, references).items():
            notes[name] = blind.reason
            if blind.wholly:
                del estimates[name]
                if name == "rouge1":
                    del estimates["rougeL"]
    for name, measure, n in (
        ("distinct_1", text_metrics.distinct_n, 1),
        ("distinct_2", text_metrics.distinct_n, 2),
        ("repeated_4", text_metrics.repeated_ngrams, 4),
    ):
        if any(text_metrics.ngrams_of_each(responses, n)):
            shares[name] = measure(responses, n)
        else:
            title = name.replace("_", "-")
            notes[name] = f"{title}: no response has a run of {n} words; not measured"
    return Evaluation(responses, columns["score"].tolist(), estimates, shares, signatures, notes)
