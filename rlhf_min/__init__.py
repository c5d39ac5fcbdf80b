"""RLHF written by hand: SFT, a BERT reward model, PPO, DPO, KTO, and their evaluation.

The public names. Each algorithm is a module with a config, a state and ``train``, a generator of
metrics: `sft`, `reward`, `ppo`, `grpo`, `rloo`, `dpo`, `kto`. A name is imported when it is first
used, so that a command can answer before torch, which takes seconds, is there.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import dpo, evaluation, grpo, kto, ppo, reward, rloo, sft
    from .advantages import gae, grpo_advantages, rloo_advantages
    from .data import (
        PreferenceExample,
        PromptExample,
        Sequences,
        SFTExample,
        UnpairedExample,
        collate,
    )
    from .encoding.codec import Codec
    from .errors import BadInput, Diverged, NonFinite
    from .harness.run.saved_models import save_policy, save_reward_model
    from .kl import AdaptiveKL, FixedKL, exact_kl, kl_estimate, shape_rewards
    from .loading.adapters import LoRA
    from .logprobs import entropy, lm_head_logits, lm_head_logprobs, token_logprobs
    from .losses import (
        grpo_loss,
        pairwise_reward_loss,
        ppo_policy_loss,
        ppo_value_loss,
        rloo_loss,
        sft_loss,
    )
    from .masking import masked_mean, masked_scale, masked_var, masked_whiten, response_mask
    from .policy import Policy
    from .ppo import judge, ppo_epoch, ppo_update
    from .preference_losses import (
        apo_down_loss,
        apo_zero_loss,
        cpo_loss,
        dpo_loss,
        hinge_loss,
        implicit_rewards,
        ipo_loss,
        kto_kl,
        kto_loss,
        orpo_loss,
        robust_loss,
        sft_term,
        simpo_loss,
    )
    from .reward_model import RewardModel
    from .rollout import Rollout, RolloutBuffer, collect, score_rollout
    from .sampling import sample

__all__ = [
    "AdaptiveKL",
    "BadInput",
    "Codec",
    "Diverged",
    "FixedKL",
    "LoRA",
    "NonFinite",
    "Policy",
    "PreferenceExample",
    "PromptExample",
    "RewardModel",
    "Rollout",
    "RolloutBuffer",
    "SFTExample",
    "Sequences",
    "UnpairedExample",
    "apo_down_loss",
    "apo_zero_loss",
    "collate",
    "collect",
    "cpo_loss",
    "dpo",
    "dpo_loss",
    "entropy",
    "evaluation",
    "exact_kl",
    "gae",
    "grpo",
    "grpo_advantages",
    "grpo_loss",
    "hinge_loss",
    "implicit_rewards",
    "ipo_loss",
    "judge",
    "kl_estimate",
    "kto",
    "kto_kl",
    "kto_loss",
    "lm_head_logits",
    "lm_head_logprobs",
    "masked_mean",
    "masked_scale",
    "masked_var",
    "masked_whiten",
    "orpo_loss",
    "pairwise_reward_loss",
    "ppo",
    "ppo_epoch",
    "ppo_policy_loss",
    "ppo_update",
    "ppo_value_loss",
    "response_mask",
    "reward",
    "rloo",
    "rloo_advantages",
    "rloo_loss",
    "robust_loss",
    "sample",
    "save_policy",
    "save_reward_model",
    "score_rollout",
    "sft",
    "sft_loss",
    "sft_term",
    "shape_rewards",
    "simpo_loss",
    "token_logprobs",
]

# The same once more, for Python itself: where each name that is no module stands.
_NAMES = {
    "advantages": "gae grpo_advantages rloo_advantages",
    "data": "PreferenceExample PromptExample Sequences SFTExample UnpairedExample collate",
    "encoding.codec": "Codec",
    "errors": "BadInput Diverged NonFinite",
    "harness.run.saved_models": "save_policy save_reward_model",
    "kl": "AdaptiveKL FixedKL exact_kl kl_estimate shape_rewards",
    "loading.adapters": "LoRA",
    "logprobs": "entropy lm_head_logits lm_head_logprobs token_logprobs",
    "losses": "grpo_loss pairwise_reward_loss ppo_policy_loss ppo_value_loss rloo_loss sft_loss",
    "masking": "masked_mean masked_scale masked_var masked_whiten response_mask",
    "policy": "Policy",
    "ppo": "judge ppo_epoch ppo_update",
    "preference_losses": "apo_down_loss apo_zero_loss cpo_loss dpo_loss hinge_loss "
    "implicit_rewards ipo_loss kto_kl kto_loss orpo_loss robust_loss sft_term simpo_loss",
    "reward_model": "RewardModel",
    "rollout": "Rollout RolloutBuffer collect score_rollout",
    "sampling": "sample",
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}

if not TYPE_CHECKING:  # to a type checker every name would be there

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = importlib.import_module(f".{_MODULE_OF.get(name, name)}", __name__)
        return getattr(module, name) if name in _MODULE_OF else module


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
