"""The options of each algorithm: default, bounds, one description, and what papers use.

The defaults suit the small models of the embedded world. What is published for pretrained models
stands beside them; the commands take it when they start from such a model.
"""

import math
import operator
import typing
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Literal

from .errors import require

Precision = Literal["fp32", "bf16", "fp16"]
Schedule = Literal["constant", "linear", "cosine"]
RolloutKL = Literal["k1", "abs", "k2", "k3", "full"]
AdvantageScale = Literal["group", "batch", "none"]
LossMean = Literal["sequence", "token", "constant"]
RatioLevel = Literal["token", "sequence"]
WithReference = Literal["sigmoid", "ipo", "hinge", "robust", "apo_zero", "apo_down"]
ReferenceFree = Literal["simpo", "orpo", "cpo"]

MAX_BATCH_SIZE = 2**20  # a rollout is held in memory whole
MAX_SEED = 2**31  # the largest that every generator accepts

BOUNDS = {
    "above": operator.gt,
    "at_least": operator.ge,
    "below": operator.lt,
    "at_most": operator.le,
}


def option(
    default: Any, help: str, *, pretrained: tuple[Any, str] | None = None, **bounds: float
) -> Any:
    """A field of a config.

    Args:
        default: for the small models of the embedded world.
        help: its one description, which ``--help`` shows too.
        pretrained: the published value for pretrained models, and who published it.
        bounds: one or two of `BOUNDS`. With one alone the value must be finite too. None as a
            value is always allowed.
    """
    metadata = {"help": help, "pretrained": pretrained, "bounds": bounds}
    return field(default=default, metadata=metadata)


def check_options(config: Any) -> None:
    """Raise `BadInput` unless each field is within its bounds and one of its choices.

    >>> check_options(PPOConfig(clip=0))
    Traceback (most recent call last):
    rlhf_min.errors.BadInput: PPOConfig: clip is 0; it must be above 0 and finite
    """
    kinds = typing.get_type_hints(type(config))
    for f in fields(config):
        value, bounds = getattr(config, f.name), f.metadata.get("bounds")
        where = f"{type(config).__name__}: {f.name} is"
        if bounds and value is not None:
            within = all(BOUNDS[name](value, bound) for name, bound in bounds.items())
            words = [
                f"{name.replace('_', ' ')} {bound}"
                for name, bound in bounds.items()
                if bound != math.inf
            ]
            if len(bounds) == 1:
                within &= math.isfinite(value)
                words.append("finite")
            require(within, f"{where} {value}; it must be {' and '.join(words)}")
        if typing.get_origin(kinds[f.name]) is Literal:
            choices = typing.get_args(kinds[f.name])
            one_of = ", ".join(map(str, choices))
            require(value in choices, f"{where} {value!r}; it must be one of {one_of}")


# Options that several algorithms have, with other defaults.
_rate = partial(option, help="AdamW's rate after warm-up.", above=0)
_schedule = partial(option, help="How the rate falls after warm-up.")
_warmup = partial(
    option, help="Share of the steps in which the rate rises from 0.", at_least=0, at_most=1
)
_decay = partial(option, help="AdamW's decay of matrices.", at_least=0)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What all algorithms share: AdamW, its schedule, memory, precision and seed."""

    learning_rate: float = _rate(1e-4)
    schedule: Schedule = _schedule("linear")
    warmup_share: float = _warmup(0.1)
    weight_decay: float = _decay(0.0)
    max_grad_norm: float | None = option(
        1.0, "Gradients longer than this are scaled down to it.", above=0
    )
    max_tokens: int = option(1024, "Padded tokens in one forward pass; memory only.", above=0)
    precision: Precision = option("fp32", "Of forward passes, by autocast; weights stay fp32.")
    seed: int = option(
        0, "Order of the data, and of all that is drawn.", at_least=0, at_most=MAX_SEED
    )

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, kw_only=True)
class SFTConfig(TrainingConfig):
    """Options of supervised fine-tuning."""

    epochs: int = option(3, "Passes over the demonstrations.", above=0)
    batch_size: int = option(32, "Demonstrations for each optimizer step.", above=0)
    learning_rate: float = _rate(1.5e-3, pretrained=(2e-5, "Alpaca, Taori et al. 2023"))
    schedule: Schedule = _schedule("cosine")
    warmup_share: float = _warmup(0.1, pretrained=(0.03, "Alpaca"))
    weight_decay: float = _decay(0.01, pretrained=(0.0, "Alpaca"))
    eval_every: int = option(100, "Steps between evaluations on held-out demonstrations.", above=0)


@dataclass(frozen=True, kw_only=True)
class RewardConfig(TrainingConfig):
    """Options of reward training."""

    epochs: int = option(
        4, "Passes over the preference pairs.", above=0, pretrained=(3, "BERT, Devlin et al. 2019")
    )
    batch_size: int = option(32, "Pairs for each optimizer step.", above=0)
    learning_rate: float = _rate(7e-4, pretrained=(2e-5, "BERT"))
    weight_decay: float = _decay(0.01)
    center_coef: float = option(
        0.01, "Pulls the scores, of which only differences count, to 0.", at_least=0
    )
    normalise: bool = option(True, "Rescale the scores to mean 0 and variance 1 afterwards.")
    eval_every: int = option(200, "Steps between evaluations on held-out pairs.", above=0)


@dataclass(frozen=True, kw_only=True)
class DPOConfig(TrainingConfig):
    """Options of DPO."""

    epochs: int = option(1, "Passes over the preference pairs.", above=0)
    batch_size: int = option(64, "Pairs for each optimizer step.", above=0)
    learning_rate: float = _rate(1e-4, pretrained=(1e-6, "Rafailov et al. 2023"))
    loss: Literal[WithReference, ReferenceFree] = option(
        "sigmoid", "What a pair teaches; sigmoid is DPO. The last three need no reference."
    )
    beta: float = option(
        None,
        "Weighs the log-probabilities in the loss; larger keeps the policy nearer the reference. "
        "Of orpo, the paper's lambda. Default: 0.3; of means per token 2, of orpo 0.1.",
        above=0,
        pretrained=(0.1, "Rafailov et al. 2023"),
    )
    length_normalised: bool = option(
        None,
        "Mean log-probability per token in place of the sum over a response. Default: of simpo and "
        "orpo, which know nothing else.",
    )
    label_smoothing: float = option(
        0.0, "Assumed share of flipped labels; of sigmoid and robust.", at_least=0, below=0.5
    )
    simpo_gamma: float = option(
        None,
        "Margin of the implicit rewards that simpo asks for; in the paper 0.3 to 1.6. Default: 1.",
        at_least=0,
    )
    sft_coef: float = option(
        None,
        "Weight of the mean loss per token of the chosen response, as in SFT. Default: of orpo and "
        "cpo 1, else 0.",
        at_least=0,
    )
    cache_reference: bool = option(True, "Score the reference once, before training.")
    eval_every: int = option(25, "Steps between evaluations on held-out pairs.", above=0)

    def __post_init__(self) -> None:
        per_token = self.loss in ("simpo", "orpo")
        self._default("length_normalised", per_token)
        self._default(
            "beta", 0.1 if self.loss == "orpo" else 2.0 if self.length_normalised else 0.3
        )
        self._default("simpo_gamma", 1.0 if self.loss == "simpo" else 0.0)
        self._default("sft_coef", 1.0 if self.loss in ("orpo", "cpo") else 0.0)
        super().__post_init__()
        self._require(
            self.length_normalised or not per_token,
            "takes means per token only; leave length_normalised out",
        )
        self._require(
            not self.label_smoothing or self.loss in ("sigmoid", "robust"),
            f"ignores label_smoothing {self.label_smoothing}; leave it out, or take loss sigmoid "
            "or robust",
        )
        self._require(
            self.label_smoothing > 0 or self.loss != "robust",
            "is sigmoid without label_smoothing; give the share of labels that you take for "
            "flipped",
        )
        self._require(
            not self.simpo_gamma or self.loss == "simpo",
            f"ignores simpo_gamma {self.simpo_gamma}; leave it out, or take loss simpo",
        )

    def _default(self, name: str, value: Any) -> None:
        # Of an option whose default depends on the loss.
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    def _require(self, condition: bool, message: str) -> None:
        require(condition, f"DPOConfig: loss {self.loss} {message}")

    @property
    def reference_free(self) -> bool:
        """Whether no reference is compared with, so that none is held or run in training."""
        return self.loss in typing.get_args(ReferenceFree)


@dataclass(frozen=True, kw_only=True)
class KTOConfig(TrainingConfig):
    """Options of KTO."""

    epochs: int = option(1, "Passes over the labelled responses.", above=0)
    batch_size: int = option(64, "Responses for each optimizer step.", at_least=2)  # for the KL
    learning_rate: float = _rate(1e-4, pretrained=(1e-6, "trl 1.16"))
    loss: Literal["kto", "apo_zero_unpaired"] = option(
        "kto", "With the KL as reference point, or apo_zero_unpaired: with 0."
    )
    beta: float = option(
        0.3,
        "As in DPO; larger keeps the policy nearer the reference.",
        above=0,
        pretrained=(0.1, "Ethayarajh et al. 2024"),
    )
    desirable_weight: float = option(1.0, "Of the loss where the label is true.", at_least=0)
    undesirable_weight: float = option(1.0, "Of the loss where the label is false.", at_least=0)
    cache_reference: bool = option(True, "Score the rows by the reference once, before training.")
    eval_every: int = option(50, "Steps between evaluations on held-out rows.", above=0)


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(TrainingConfig):
    """Options of all that learns from sampled responses: PPO, GRPO and RLOO.

    A rollout of `batch_size` responses is learned from `epochs` times in minibatches of
    `minibatch_size`; each minibatch is one optimizer step.
    """

    steps: int = option(60, "Rollouts, each followed by its update.", above=0)
    batch_size: int = option(
        128, "Responses in one rollout.", at_least=2, at_most=MAX_BATCH_SIZE
    )  # whitening needs two
    minibatch_size: int = option(32, "Responses for each optimizer step.", above=0)
    epochs: int = option(
        2, "Passes over one rollout.", above=0, pretrained=(4, "Ziegler et al. 2019")
    )
    max_new_tokens: int = option(48, "Longest response; a longer one is cut.", above=0)
    temperature: float = option(
        1.0, "Divides the logits, in sampling and in scoring alike.", above=0
    )
    learning_rate: float = _rate(3e-4, pretrained=(1.41e-5, "trl 0.11's GPT-2 runs"))
    warmup_share: float = _warmup(0.05)
    adam_eps: float = option(1e-5, "AdamW's epsilon; a larger one calms the first steps.", above=0)
    clip: float = option(0.2, "The ratio is clipped to between 1 - clip and 1 + clip.", above=0)
    kl: RolloutKL = option(
        "k1", "Estimate of the KL in the rewards; only k1 has the objective's gradient."
    )
    kl_coef: float = option(0.05, "Weight of the KL in the rewards, in score per nat.", at_least=0)
    score_clip: float | None = option(
        None, "Scores beyond this, either way, are cut to it.", above=0
    )
    eos_penalty: float = option(0.0, "Taken off the score of a response without EOS.", at_least=0)
    stop_kl: float | None = option(
        None,
        "KL(rollout policy || new policy) by k1, per token and pass, that ends an update.",
        above=0,
    )
    max_kl: float | None = option(
        None, "KL(policy || reference) by k1, per response, that ends the run.", above=0
    )
    eval_every: int = option(10, "Rollouts between evaluations on the fixed prompts.", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.minibatch_size <= self.batch_size,
            f"{type(self).__name__}: minibatch_size {self.minibatch_size} exceeds batch_size "
            f"{self.batch_size}",
        )

    @property
    def minibatches(self) -> int:
        """Optimizer steps in one epoch over a rollout; the last may be smaller."""
        return -(-self.batch_size // self.minibatch_size)


@dataclass(frozen=True, kw_only=True)
class PPOConfig(RolloutConfig):
    """Options of PPO."""

    critic: Literal["shared", "separate"] = option("shared", "Whose trunk the values are read off.")
    gamma: float = option(1.0, "Discount for each token.", at_least=0, at_most=1)
    lam: float = option(
        0.95, "GAE's lambda: 0 trusts the values, 1 the rewards.", at_least=0, at_most=1
    )
    value_clip: float = option(
        0.2,
        "A value is clipped to within this of the old one; inf: not at all.",
        above=0,
        at_most=math.inf,
    )
    value_coef: float = option(0.1, "Weight of the value loss beside the policy loss.", at_least=0)
    kl_control: Literal["fixed", "adaptive"] = option("fixed", "Whether kl_coef follows the KL.")
    kl_target: float = option(6.0, "Adaptive: the aim, in nats per response.", above=0)
    kl_horizon: float = option(
        10_000, "Adaptive: responses in which kl_coef may change by a fifth.", above=0
    )
    whiten_advantages: bool = option(True, "Advantages to mean 0, variance 1 over the rollout.")
    whiten_rewards: bool = option(False, "Rewards to variance 1 over the rollout, mean kept.")
    normalise_scores: bool = option(False, "Scores by their running mean and deviation.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.kl_control == "fixed" or self.kl_horizon > 0.2 * self.batch_size,
            f"PPOConfig: kl_horizon is {self.kl_horizon}; it must exceed a fifth of batch_size "
            f"{self.batch_size}, or the coefficient could turn negative",
        )


@dataclass(frozen=True, kw_only=True)
class GroupConfig(RolloutConfig):
    """Options of GRPO and RLOO: several responses to each prompt take the place of a critic."""

    group_size: int = option(8, "Responses to each prompt.", at_least=2)
    epochs: int = option(2, "Passes over one rollout.", above=0, pretrained=(1, "Shao et al. 2024"))
    learning_rate: float = _rate(3e-4, pretrained=(1e-6, "Shao et al. 2024"))
    clip_high: float | None = option(
        None, "The ratio's upper limit is 1 + this. Default: as --clip.", above=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.batch_size % self.group_size == 0,
            f"{type(self).__name__}: batch_size {self.batch_size} is no multiple of group_size "
            f"{self.group_size}; every prompt gets a whole group",
        )


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(GroupConfig):
    """Options of GRPO and of what followed it: DAPO, Dr. GRPO, GSPO."""

    advantage_scale: AdvantageScale = option(
        "group",
        "Advantages are divided by the scores' deviation in the group, in the whole batch, or not "
        "at all (Dr. GRPO).",
    )
    loss_mean: LossMean = option(
        "sequence",
        "The loss is a mean over each response and then over responses (GRPO), over all tokens "
        "(DAPO), or over a constant, responses times max_new_tokens (Dr. GRPO).",
    )
    ratio_level: RatioLevel = option(
        "token",
        "The ratio is of each token, or the geometric mean over a response (with loss_mean "
        "sequence: GSPO), so near 1 that the paper clips at 3e-4 and 4e-4.",
    )
    kl_in: Literal["loss", "reward"] = option(
        "loss",
        "The KL stands in the loss as k3, or in the reward as --kl says: there it alone tells "
        "equal scores apart, and advantage_scale group divides its weight out.",
    )
    kl: RolloutKL = option("k1", "Estimate of the KL that is reported, and put into the rewards.")
    kl_coef: float = option(
        0.2,
        "Weight of the KL, where kl_in says, beside advantages in deviations (advantage_scale).",
        at_least=0,
        pretrained=(0.04, "Shao et al. 2024"),
    )
    mask_cut: bool = option(False, "Leave responses that were cut out of the loss (DAPO).")


@dataclass(frozen=True, kw_only=True)
class RLOOConfig(GroupConfig):
    """Options of RLOO."""

    kl_coef: float = option(
        0.05,
        "Weight of the KL in the rewards, in score per nat.",
        at_least=0,
        pretrained=(0.03, "Ahmadian et al. 2024"),
    )
