"""Every metric of trl's and what it is here: the table that live and finished runs are read by.

Like `job.py` it needs the standard library alone.
"""

from typing import NamedTuple


class Metric(NamedTuple):
    """A metric that both sides have, or one of trl's that has no counterpart.

    Args:
        trl: as trl logs it.
        ours: as we yield it, or "" where there is none.
        means: where the two are not one number: what trl's is, and then what ours is.
        factor: what trl's is multiplied by to be ours.
    """

    trl: str
    ours: str = ""
    means: tuple[str, str] | None = None
    factor: float = 1.0


# By stage and by which of trl's trainers wrote it.
METRICS: dict[tuple[str, str], list[Metric]] = {
    ("sft", "SFTTrainer"): [
        Metric("loss", "loss"),
        Metric("grad_norm", "grad_norm"),
        Metric("learning_rate", "learning_rate"),
        Metric("epoch"),
        Metric("entropy"),
        Metric("mean_token_accuracy"),
        Metric("num_tokens"),
    ],
    ("reward", "RewardTrainer"): [
        Metric("loss", "loss"),
        Metric("accuracy", "accuracy"),
        Metric("margin", "margin"),
        Metric("grad_norm", "grad_norm"),
        Metric("learning_rate", "learning_rate"),
        Metric("epoch"),
        Metric("min_reward"),
        Metric("mean_reward"),
        Metric("max_reward"),
        Metric("num_tokens"),
    ],
    ("dpo", "DPOTrainer"): [
        Metric("loss", "loss"),
        Metric("logps/chosen", "chosen_logprobs"),
        Metric("logps/rejected", "rejected_logprobs"),
        Metric("rewards/chosen", "chosen_rewards"),
        Metric("rewards/rejected", "rejected_rewards"),
        Metric("rewards/margins", "margin"),
        Metric("rewards/accuracies", "accuracy"),
        Metric("grad_norm", "grad_norm"),
        Metric("learning_rate", "learning_rate"),
        Metric("epoch"),
        Metric("entropy"),
        Metric("mean_token_accuracy"),
        Metric("num_tokens"),
        Metric("logits/chosen"),
        Metric("logits/rejected"),
    ],
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
