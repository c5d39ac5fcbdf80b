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
        Metric("logps/rejected", "rejected_logprobs", "the same of the rejected response"),
        Metric(
            "rewards/chosen",
            "chosen_rewards",
            "beta * (log p - log p of the reference) of the chosen response, mean over pairs",
        ),
        Metric("rewards/rejected", "rejected_rewards", "the same of the rejected response"),
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
    ("ppo", "PPOTrainer"): [
        Metric("objective/kl", "kl"),
        Metric("objective/scores", "score", means=("after the EOS penalty", "before it")),
        Metric("objective/rlhf_reward", "reward"),
        Metric("objective/non_score_reward"),
        Metric("objective/entropy"),
        Metric("loss/policy_avg", "policy_loss"),
        Metric("loss/value_avg", "value_loss"),
        Metric("policy/clipfrac_avg", "clip_fraction"),
        Metric("val/clipfrac_avg", "value_clip_fraction"),
        Metric("policy/entropy_avg", "entropy", means=("over padding too", "over tokens")),
        Metric("policy/approxkl_avg"),
        Metric("val/ratio", "ratio", means=("over padding too", "over tokens")),
        Metric("val/ratio_var"),
        Metric("val/num_eos_tokens"),
        Metric("lr", "learning_rate"),
        Metric("episode"),
        Metric("epoch"),
        Metric("eps"),
    ],
    ("ppo", "PPOTrainer.step"): [
        Metric("objective/kl", "kl"),
        Metric("objective/kl_coef", "kl_coef"),
        Metric("objective/entropy"),
        Metric("ppo/mean_non_score_reward"),
        Metric("ppo/mean_scores", "score", means=("clipped", "before the clip")),
        Metric("ppo/std_scores", "score_std", means=("clipped", "before the clip")),
        Metric("env/reward_mean", "score"),
        Metric("env/reward_std", "score_std"),
        Metric("ppo/loss/policy", "policy_loss"),
        Metric("ppo/loss/value", "value_loss"),
        Metric("ppo/loss/total"),
        Metric("ppo/policy/entropy", "entropy"),
        Metric("ppo/policy/approxkl"),
        Metric("ppo/policy/policykl", "update_k1"),
        Metric("ppo/policy/clipfrac", "clip_fraction"),
        Metric("ppo/policy/advantages_mean"),
        Metric(
            "ppo/returns/mean",
            "return",
            means=("mean over minibatches", "mean over tokens"),
        ),
        Metric("ppo/returns/var"),
        Metric("ppo/val/mean", "value", means=("mean over minibatches", "mean over tokens")),
        Metric("ppo/val/var"),
        Metric("ppo/val/vpred"),
        Metric("ppo/val/error"),
        Metric("ppo/val/clipfrac", "value_clip_fraction"),
        Metric(
            "ppo/val/var_explained",
            "explained_variance",
            means=("1 - mean((R - V)^2) / var(R), V as it learns", "1 - var(R - V) / var(R)"),
        ),
        Metric("ppo/learning_rate", "learning_rate"),
        Metric("tokens/responses_len_mean", "response_length"),
        Metric("tokens/responses_len_std"),
        Metric("tokens/queries_len_mean"),
        Metric("tokens/queries_len_std"),
        *(  # one number for each row or token
            Metric(name)
            for name in (
                *("objective/kl_dist", "objective/logprobs", "objective/ref_logprobs"),
                *("ppo/policy/advantages", "ppo/policy/ratio", "env/reward_dist"),
                *("tokens/queries_dist", "tokens/responses_dist"),
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
OURS_ALONE: dict[str, dict[str, str]] = {
    "sft": {"eval/perplexity": "exp of `eval/loss`", **_OF_OURS},
    "reward": {"ties": "share of pairs with equal scores", **_OF_OURS},
    "dpo": {
        "chosen_logprobs_change": "log p - log p of the reference: `chosen_rewards` / beta",
        "rejected_logprobs_change": "the same of the rejected response",
        **_OF_OURS,
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
