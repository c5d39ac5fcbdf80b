"""Every metric of trl's and what it is here: the table that live and finished runs are read by.

Like `job.py` it needs the standard library alone.
"""

from typing import NamedTuple


class Metric(NamedTuple):
    """A metric that both sides have, or one of trl's that has no counterpart.

    Args:
        trl: as trl logs it.
        ours: as we yield it, or "" where there is none.
        what: the number is.
        means: where the two are not one number: what trl's is, and then what ours is.
        factor: what trl's is multiplied by to be ours.
    """

    trl: str
    ours: str = ""
    what: str = ""
    means: tuple[str, str] | None = None
    factor: float = 1.0


# What the Trainer of transformers logs, whatever it trains.
_OF_A_STEP = [
    Metric("grad_norm", "grad_norm", "length of the gradient before it is clipped"),
    Metric("learning_rate", "learning_rate", "the rate that the step used"),
    Metric("epoch", what="passes over the data, counted in batches"),
    Metric("step", what="optimizer steps so far"),
    Metric("num_tokens", what="tokens so far, without padding"),
]
_OF_THE_RUN = [
    Metric("train_loss", what="mean of `loss` over all steps, once, at the end"),
    Metric("total_flos", what="an estimate of the operations so far"),
    *(
        Metric(f"{mode}_{what}", what="time of the whole, and what it comes to")
        for mode in ("train", "eval")
        for what in ("runtime", "samples_per_second", "steps_per_second")
    ),
]
_OF_TOKENS = [
    Metric("entropy", what="of the next token, mean over the tokens that are trained on"),
    Metric(
        "mean_token_accuracy",
        what="share of these tokens that are the most likely one",
    ),
    Metric("aux_loss", what="of mixtures of experts only: what balances their load"),
]

# What our metrics of PPO are, for both of trl's trainers.
_PPO = {
    "kl": "by `kl`'s estimate, sum over a response, mean over responses",
    "kl_coef": "weight of the KL in this step",
    "score": "as the reward gave it, mean over responses",
    "score_std": "standard deviation of the scores",
    "reward": "scores and penalties, sum over a response, mean over responses",
    "policy_loss": "mean over the tokens of a minibatch, then over minibatches",
    "value_loss": "mean over the tokens of a minibatch, then over minibatches",
    "clip_fraction": "share of tokens whose ratio is beyond the clip",
    "value_clip_fraction": "share of tokens whose value is beyond the clip",
    "entropy": "exact, per token, during the update",
    "update_k1": "k1 of the rollout policy against the one in the update, per token",
    "ratio": "new by old probability, mean over tokens",
    "value": "of the rollout, mean over tokens",
    "return": "advantage and value of the rollout, mean over tokens",
    "explained_variance": "1 - var(R - V) / var(R), of the rollout",
    "response_length": "tokens, EOS included",
    "learning_rate": "with which the update begins",
}
_APPROXKL = "half the mean squared log-ratio; 1.12 includes padding"
_SAMPLED = "`-rollout.logprobs.sum(1).mean()`"


def _ppo(trl: str, ours: str, theirs: str = "", here: str = "") -> Metric:
    return Metric(trl, ours, _PPO[ours], (theirs, here) if theirs else None)


def _of_responses(of_equal: tuple[str, str] | None) -> list[Metric]:
    """What GRPO and RLOO log of a rollout, in the first optimizer step on it."""
    return [
        Metric("reward", "score", "as the reward gave it, mean over responses"),
        Metric("reward_std", "score_std", "standard deviation of the scores"),
        Metric(
            "frac_reward_zero_std",
            "equal_groups",
            "share of groups whose rewards are all equal",
            of_equal,
        ),
        Metric("rewards/reward/mean", what="of each reward by its name: mean of its scores"),
        Metric("rewards/reward/std", what="their standard deviation"),
        Metric("completions/mean_length", "response_length", "tokens, EOS included"),
        Metric("completions/min_length", what="of the shortest response"),
        Metric("completions/max_length", what="of the longest"),
        Metric("completions/clipped_ratio", what="`1 - eos_rate`"),
        *(
            Metric(f"completions/{which}_terminated_length", what="of responses that end by EOS")
            for which in ("mean", "min", "max")
        ),
    ]


def _of_clips(what: str, means: tuple[str, str] | None) -> list[Metric]:
    """What GRPO and RLOO log of each optimizer step."""
    return [
        Metric("clip_ratio/region_mean", "clip_fraction", what, means),
        Metric("clip_ratio/low_mean", what="the same, of ratios below the clip alone"),
        Metric("clip_ratio/high_mean", what="the same, of ratios above the clip alone"),
        Metric("clip_ratio/low_min", what="smallest share below the clip of a response"),
        Metric("clip_ratio/high_max", what="largest share above the clip of a response"),
        Metric("entropy", what="exact, per token, during the update"),
        Metric("step_time", what="seconds of an optimizer step"),
    ]


_GRPO_LOSS = "what is minimised; each rollout's is the mean over its optimizer steps"
_MICRO = ("mean of micro-batches' means over tokens", "weighed as in the loss")

# By stage and by which of trl's trainers wrote it. In an evaluation both sides put a word before
# the names: `eval_loss`, `eval/loss`.
METRICS: dict[tuple[str, str], list[Metric]] = {
    ("sft", "SFTTrainer"): [
        Metric("loss", "loss", "-log p of a token of the response or EOS, mean over the batch"),
        *_OF_TOKENS,
        *_OF_A_STEP,
        *_OF_THE_RUN,
    ],
    ("reward", "RewardTrainer"): [
        Metric(
            "loss",
            "loss",
            "-log sigmoid(chosen - rejected - margin) + centring * (chosen + rejected)^2, mean "
            "over pairs",
        ),
        Metric("accuracy", "accuracy", "share of pairs with chosen > rejected; a tie is wrong"),
        Metric("margin", "margin", "chosen - rejected, mean over pairs"),
        Metric("min_reward", what="lowest score of a micro-batch"),
        Metric("mean_reward", what="mean score"),
        Metric("max_reward", what="highest score of a micro-batch"),
        *_OF_A_STEP,
        *_OF_THE_RUN,
    ],
    ("dpo", "DPOTrainer"): [
        Metric("loss", "loss", "-log sigmoid of `margin`, mean over pairs"),
        Metric(
            "logps/chosen",
            "chosen_logprobs",
            "log p of the whole chosen response, EOS included, mean over pairs",
        ),
        Metric(
            "logps/rejected",
            "rejected_logprobs",
            "log p of the whole rejected response, EOS included, mean over pairs",
        ),
        Metric(
            "rewards/chosen",
            "chosen_rewards",
            "beta * (log p - log p of the reference) of the chosen response, mean over pairs",
        ),
        Metric(
            "rewards/rejected",
            "rejected_rewards",
            "beta * (log p - log p of the reference) of the rejected response, mean over pairs",
        ),
        Metric("rewards/margins", "margin", "`chosen_rewards` - `rejected_rewards`"),
        Metric("rewards/accuracies", "accuracy", "share of pairs with a margin above 0"),
        Metric("logits/chosen", what="mean of all logits where the chosen response is predicted"),
        Metric("logits/rejected", what="the same of the rejected response"),
        *(
            metric._replace(
                what=metric.what.replace("these tokens", "the chosen response's tokens")
            )
            for metric in _OF_TOKENS
        ),
        *_OF_A_STEP,
        *_OF_THE_RUN,
    ],
    ("grpo", "GRPOTrainer"): [
        Metric("loss", "loss", _GRPO_LOSS),
        *_of_responses(('with `scale_rewards="batch"` of the batch: 0 or 1', "of groups")),
        Metric(
            "kl",
            what="k3 per token, times the ratio unless `use_bias_correction_kl=False`; at ratio 1, "
            "in one micro-batch, `k3 / response_length`",
        ),
        *_of_clips("share of tokens, or of responses, whose ratio is beyond the clip", _MICRO),
        *_OF_A_STEP,
        *_OF_THE_RUN,
    ],
    ("rloo", "RLOOTrainer"): [
        Metric("loss", "loss", _GRPO_LOSS),
        *_of_responses(None),
        Metric("kl", what="k1 per token of the rollout: `k1 / response_length`"),
        *_of_clips("share of responses whose ratio is beyond the clip", None),
        *_OF_A_STEP,
        *_OF_THE_RUN,
    ],
    ("ppo", "PPOTrainer"): [
        _ppo("objective/kl", "kl"),
        Metric("objective/entropy", what=_SAMPLED),
        _ppo("objective/scores", "score", "after the EOS penalty", "before it"),
        _ppo("objective/rlhf_reward", "reward"),
        Metric("objective/non_score_reward", what="`-kl_coef * kl`"),
        _ppo("loss/policy_avg", "policy_loss"),
        _ppo("loss/value_avg", "value_loss"),
        _ppo("policy/clipfrac_avg", "clip_fraction"),
        _ppo("val/clipfrac_avg", "value_clip_fraction"),
        _ppo("policy/entropy_avg", "entropy", "over padding too", "over tokens"),
        Metric("policy/approxkl_avg", what=_APPROXKL),
        _ppo("val/ratio", "ratio", "over padding too", "over tokens"),
        Metric("val/ratio_var", what="variance of `val/ratio` between minibatches"),
        Metric(
            "val/num_eos_tokens",
            what="every EOS in the raw responses: `eos_rate * batch_size` only with a stop token "
            "and a pad that is not EOS",
        ),
        _ppo("lr", "learning_rate"),
        Metric("episode", what="responses so far: `state.step * batch_size`"),
        Metric("epoch", what="passes over the prompts, counted in responses"),
        Metric("eps", what="responses in a second"),
    ],
    ("ppo", "PPOTrainer.step"): [
        _ppo("objective/kl", "kl"),
        _ppo("objective/kl_coef", "kl_coef"),
        Metric("objective/entropy", what=_SAMPLED),
        Metric("objective/kl_dist", what="`rollout.kl.sum(1)`"),
        Metric("objective/logprobs", what="`rollout.logprobs`, prompt and padding included"),
        Metric("objective/ref_logprobs", what="`rollout.ref_logprobs`, likewise"),
        Metric("ppo/mean_non_score_reward", what="`-kl_coef * kl`, but per token"),
        _ppo("ppo/mean_scores", "score", "clipped", "before the clip"),
        _ppo("ppo/std_scores", "score_std", "clipped", "before the clip"),
        _ppo("env/reward_mean", "score"),
        _ppo("env/reward_std", "score_std"),
        Metric("env/reward_dist", what="`rollout.scores`"),
        _ppo("ppo/loss/policy", "policy_loss"),
        _ppo("ppo/loss/value", "value_loss"),
        Metric("ppo/loss/total", what="`policy_loss + value_coef * value_loss`"),
        _ppo("ppo/policy/entropy", "entropy"),
        Metric("ppo/policy/approxkl", what=_APPROXKL),
        _ppo("ppo/policy/policykl", "update_k1"),
        _ppo("ppo/policy/clipfrac", "clip_fraction"),
        Metric(
            "ppo/policy/ratio",
            what="`ratio` one by one, prompt, padding and every epoch included",
        ),
        Metric("ppo/policy/advantages", what="`buffer.advantages`, likewise"),
        Metric("ppo/policy/advantages_mean", what="mean of these"),
        _ppo("ppo/returns/mean", "return", "mean over minibatches", "mean over tokens"),
        Metric("ppo/returns/var", what="variance of the returns in a minibatch"),
        _ppo("ppo/val/mean", "value", "mean over minibatches", "mean over tokens"),
        Metric("ppo/val/var", what="variance of the values in a minibatch"),
        Metric("ppo/val/vpred", what="values during the update"),
        Metric("ppo/val/error", what="mean squared error of these"),
        _ppo("ppo/val/clipfrac", "value_clip_fraction"),
        _ppo(
            "ppo/val/var_explained",
            "explained_variance",
            "1 - mean((R - V)^2) / var(R), V as it learns",
            "1 - var(R - V) / var(R)",
        ),
        _ppo("ppo/learning_rate", "learning_rate"),
        _ppo("tokens/responses_len_mean", "response_length"),
        *(
            Metric(f"tokens/{name}", what="of the lengths of responses and prompts")
            for name in (
                *("responses_len_std", "responses_dist"),
                *("queries_len_mean", "queries_len_std", "queries_dist"),
            )
        ),
        *(
            Metric(f"time/ppo/{part}", what="seconds of each part of a step")
            for part in (
                *("forward_pass", "compute_rewards", "compute_advantages"),
                *("optimize_step", "calc_stats", "total"),
            )
        ),
    ],
}
# Metrics of ours that trl has not, and what they are. A run writes the times in place of `tokens`.
_OF_OURS = {
    "epoch": "passes over the data, counted in rows",
    "tokens": "tokens of the step, prompts included",
    "time/seconds": "of the step, an evaluation included",
    "time/tokens_per_second": "`tokens` by these seconds",
    "skipped": "steps so far that fp16 has left out, since a gradient was not finite",
}
_OF_GROUPS = {
    "kl": "by `kl`'s estimate, sum over a response, mean over responses",
    "k1": "KL to the reference, whatever `kl` is",
    "k3": "likewise",
    "reward": "scores, penalties and what of the KL is in them, mean over responses",
    "rollout_entropy": "exact, per token, of the rollout",
    "update_k1": "k1 of the rollout policy against the one in the update, per token",
    "update_k3": "likewise by k3",
    "ratio": "new by old probability, mean as in the loss",
    "ratio_max": "the largest",
    "eos_rate": "share of responses that end by EOS",
    "epochs": "passes made over the rollout",
    "tokens": _OF_OURS["tokens"],
    "time/sample": "seconds",
    "time/score": "seconds",
    "time/update": "seconds",
    "time/tokens_per_second": _OF_OURS["time/tokens_per_second"],
    "skipped": _OF_OURS["skipped"],
    "eval/distinct_2": "share of different pairs of words, on fixed prompts",
    "eval/repeated_4": "share of repeated runs of four words, on fixed prompts",
}
OURS_ALONE: dict[str, dict[str, str]] = {
    "sft": {"eval/perplexity": "exp of `eval/loss`", **_OF_OURS},
    "reward": {"ties": "share of pairs with equal scores", **_OF_OURS},
    "dpo": {
        "chosen_logprobs_change": "log p - log p of the reference: `chosen_rewards` / beta",
        "rejected_logprobs_change": "the same of the rejected response",
        "sft_loss": "-log p of the chosen response, per token, mean over pairs",
        **_OF_OURS,
    },
    "grpo": _OF_GROUPS,
    "rloo": _OF_GROUPS,
    "ppo": {
        "rollout_entropy": "exact, per token, of the rollout",
        "k1": "KL to the reference, whatever `kl` is",
        "k3": "likewise",
        "update_k3": "like `update_k1`",
        "ratio_max": "the largest",
        "eos_rate": "share of responses that end by EOS",
        "grad_norm": "before the clip, mean over the optimizer steps",
        "epochs": "passes made over the rollout",
        "tokens": _OF_OURS["tokens"],
        "time/sample": "seconds",
        "time/score": "seconds",
        "time/update": "seconds",
        "time/tokens_per_second": _OF_OURS["time/tokens_per_second"],
        "skipped": _OF_OURS["skipped"],
        "eval/distinct_2": "share of different pairs of words, on fixed prompts",
        "eval/repeated_4": "share of repeated runs of four words, on fixed prompts",
    },
}


def in_our_names(stage: str, trainer: str, logged: dict[str, float]) -> dict[str, float]:
    """What trl logged of one step, under our names; what we have no counterpart of is left out.

    >>> in_our_names("dpo", "DPOTrainer", {"rewards/margins": 0.5, "entropy": 1.0})
    {'margin': 0.5}
    """
    return {
        metric.ours: metric.factor * logged[metric.trl]
        for metric in METRICS[stage, trainer]
        if metric.ours and metric.trl in logged
    }
