"""What trl's options are in our words, and ours in trl's.

trl's options here are those of ``record.options``: the whole config as it took effect.
"""

import math
from collections.abc import Iterable
from typing import Any

# Ours and trl's, where nothing but the name differs.
SAME: dict[str, dict[str, str]] = {
    "sft": {},
    "reward": {"center_coef": "center_rewards_coefficient"},
    "dpo": {"beta": "beta", "label_smoothing": "label_smoothing"},
}
SHARED = {
    "learning_rate": "learning_rate",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "seed": "seed",
}
PPO_SHARED = {
    "clip": "cliprange",
    "value_clip": "cliprange_value",
    "value_coef": "vf_coef",
    "gamma": "gamma",
    "lam": "lam",
    "whiten_rewards": "whiten_rewards",
}
# PPO's, by which of trl's trainers has the config: `train` of 1.12 or `step` of 0.11.
PPO_OPTIONS: dict[str, dict[str, str]] = {
    "PPOTrainer": {
        "epochs": "num_ppo_epochs",
        "max_new_tokens": "response_length",
        "temperature": "temperature",
        "adam_eps": "adam_epsilon",
        "kl": "kl_estimator",
        "kl_coef": "kl_coef",
        **PPO_SHARED,
        **SHARED,
    },
    "PPOTrainer.step": {
        "epochs": "ppo_epochs",
        "batch_size": "batch_size",
        "kl_coef": "init_kl_coef",
        "kl_target": "target",
        "kl_horizon": "horizon",
        **PPO_SHARED,
        "score_clip": "score_clip",
        "learning_rate": "learning_rate",
        "max_grad_norm": "max_grad_norm",
        "seed": "seed",
    },
}
# Of GRPO and RLOO.
GROUPS = {
    "epochs": "num_iterations",
    "group_size": "num_generations",
    "max_new_tokens": "max_completion_length",
    "temperature": "temperature",
    "clip": "epsilon",
    "clip_high": "epsilon_high",
    "kl_coef": "beta",
    "adam_eps": "adam_epsilon",
    **SHARED,
}
OF_GRPO = {
    "advantage_scale": "scale_rewards",
    "ratio_level": "importance_sampling_level",
    "mask_cut": "mask_truncated_completions",
}
LOSS_MEANS = {"grpo": "sequence", "dr_grpo": "constant", "bnpo": "token", "dapo": "token"}
KL_PENALTIES = {"kl": "k1", "abs": "abs", "mse": "k2", "full": "full"}  # of 0.11
STOP_KL = 1.5  # 0.11 stops at so many times `target_kl`
# trl's losses of pairs that are followed. Not those of means per token, whose rewards are sums in
# trl all the same.
LOSSES = ("sigmoid", "hinge", "robust", "apo_zero", "apo_down")
SCHEDULES = {"constant_with_warmup": "constant"}  # the others that we have are called alike


def in_our_words(stage: str, trl: dict[str, Any], *, total_steps: int) -> dict[str, Any]:
    """Our config's fields as trl's options say, but for `epochs` and what is memory only.

    Args:
        stage: of the run.
        trl: its effective options.
        total_steps: what its schedule counts to.
    """
    if stage == "ppo":
        return _ppo_in_our_words(trl, total_steps)
    if stage in ("grpo", "rloo"):
        return _groups_in_our_words(stage, trl, total_steps)
    names = SHARED | SAME[stage]
    ours = {name: trl[theirs] for name, theirs in names.items() if theirs in trl}
    ours["batch_size"] = trl["per_device_train_batch_size"] * trl["gradient_accumulation_steps"]
    ours |= _schedule(trl, total_steps)
    ours["max_grad_norm"] = ours["max_grad_norm"] or None  # 0: not at all
    if stage == "reward":
        ours["center_coef"] = ours["center_coef"] or 0.0
    if (loss := loss_of_pairs(trl)) in LOSSES:
        same = loss == "robust" and not ours["label_smoothing"]
        ours["loss"] = "sigmoid" if same else loss
    return ours


def _groups_in_our_words(stage: str, trl: dict[str, Any], total_steps: int) -> dict[str, Any]:
    names = GROUPS | (OF_GRPO if stage == "grpo" else {})
    ours = {name: trl[theirs] for name, theirs in names.items() if theirs in trl}
    ours.pop("adam_eps")
    micro, steps = trl["per_device_train_batch_size"], trl["steps_per_generation"]
    rollouts = total_steps * trl["gradient_accumulation_steps"] // (steps * trl["num_iterations"])
    ours |= {
        "steps": rollouts,
        "batch_size": micro * steps,
        "minibatch_size": micro * trl["gradient_accumulation_steps"],
        "max_grad_norm": ours["max_grad_norm"] or None,
        "eos_penalty": 0.0,
        "score_clip": (trl.get("reward_clip_range") or (None, None))[1],
        "clip_high": None if ours.get("clip_high") == ours["clip"] else ours.get("clip_high"),
        **_schedule(trl, total_steps),
    }
    if stage == "grpo":
        ours |= {"kl_in": "loss", "advantage_scale": str(ours["advantage_scale"]).lower()}
        if trl["loss_type"] in LOSS_MEANS:  # else it stays among the causes
            ours["loss_mean"] = LOSS_MEANS[trl["loss_type"]]
    return ours


def _schedule(trl: dict[str, Any], total_steps: int) -> dict[str, Any]:
    schedule = str(trl["lr_scheduler_type"])
    warmup = trl.get("warmup_steps") or 0
    if warmup < 1:  # a share; older ones have another field for it
        warmup = math.ceil((warmup or trl.get("warmup_ratio") or 0) * total_steps)
    return {
        "schedule": SCHEDULES.get(schedule, schedule),
        "warmup_share": 0.0 if schedule == "constant" else warmup / total_steps,
    }


def _ppo_in_our_words(trl: dict[str, Any], total_steps: int) -> dict[str, Any]:
    """Adam's epsilon, which no option of `step` says, is left to the caller for both trainers."""
    step = "ppo_epochs" in trl
    names = PPO_OPTIONS["PPOTrainer.step" if step else "PPOTrainer"]
    ours = {name: trl[theirs] for name, theirs in names.items() if theirs in trl}
    ours.pop("adam_eps", None)
    ours |= {"steps": total_steps, "max_grad_norm": ours["max_grad_norm"] or None}
    if step:
        return ours | {
            "critic": "shared",
            "minibatch_size": trl["mini_batch_size"] * trl["gradient_accumulation_steps"],
            "kl": KL_PENALTIES[trl["kl_penalty"]],
            "kl_control": "adaptive" if trl["adap_kl_ctrl"] else "fixed",
            "stop_kl": STOP_KL * trl["target_kl"] if trl["early_stopping"] else None,
            "schedule": "constant",  # unless a scheduler of one's own is given
            "warmup_share": 0.0,
            "weight_decay": 0.0,
        }
    size, accumulated = trl["per_device_train_batch_size"], trl["gradient_accumulation_steps"]
    batch = size * accumulated
    # An optimizer step has as many micro-batches as are accumulated, however many minibatches.
    micro = min(size, batch // trl["num_mini_batches"])
    return ours | {
        "critic": "separate",
        "batch_size": batch,
        "minibatch_size": min(batch, micro * accumulated),
        "eos_penalty": trl["missing_eos_penalty"] or 0.0,
        **_schedule(trl, total_steps),
    }


def without(trl: dict[str, Any], defaults: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """trl's options as they would be without these, which were given to trl alone.

    Args:
        trl: its effective options.
        defaults: of those that were given.
        names: of those that were given to trl alone.
    """
    return trl | {name: defaults[name] for name in names if name in defaults}


def loss_of_pairs(trl: dict[str, Any]) -> str:
    """The name of DPO's loss by trl's options; empty if it is none or several."""
    loss = trl.get("loss_type")
    one = loss[0] if isinstance(loss, list) and len(loss) == 1 else loss
    return one if isinstance(one, str) else ""


def ignores_label_smoothing(record: Any) -> bool:
    """Whether trl's loss takes no notice of that option: 'sigmoid' does so from 1.0 on."""
    loss, new = loss_of_pairs(record.options), not record.versions["trl"].startswith("0.")
    return loss in LOSSES and loss != "robust" and (new or loss != "sigmoid")


def in_trl_words(
    stage: str, ours: dict[str, Any], *, steps: int, trainer: str = "PPOTrainer"
) -> dict[str, Any]:
    """Fields of trl's config that say what the given ones of ours do.

    Args:
        stage: of the run.
        ours: those that were given; the others are left to trl.
        steps: of the whole run.
        trainer: which of `PPO_OPTIONS`, if the stage is ppo.
    """
    if stage == "ppo" and trainer == "PPOTrainer.step":
        return _in_words_of_step(ours)
    if stage in ("grpo", "rloo"):
        return _in_words_of_groups(stage, ours, steps)
    names = PPO_OPTIONS[trainer] if stage == "ppo" else SHARED | SAME[stage]
    trl = {theirs: ours[name] for name, theirs in names.items() if name in ours}
    if "max_grad_norm" in ours:
        trl["max_grad_norm"] = ours["max_grad_norm"] or 0.0
    if "batch_size" in ours:
        trl |= {
            "per_device_train_batch_size": ours["batch_size"],
            "gradient_accumulation_steps": 1,
        }
    if "schedule" in ours:
        back = {mine: theirs for theirs, mine in SCHEDULES.items()}
        trl["lr_scheduler_type"] = back.get(ours["schedule"], ours["schedule"])
    if "warmup_share" in ours:
        trl["warmup_steps"] = round(ours["warmup_share"] * steps)
    if ours.get("loss") in LOSSES:
        trl["loss_type"] = [ours["loss"]]
    if ours.get("eos_penalty"):
        trl["missing_eos_penalty"] = ours["eos_penalty"]
    if "minibatch_size" in ours:
        trl["num_mini_batches"] = ours["batch_size"] // ours["minibatch_size"]
    return trl


def _in_words_of_groups(stage: str, ours: dict[str, Any], steps: int) -> dict[str, Any]:
    """Those of GRPO and RLOO, of which `batch_size` and `minibatch_size` are always given."""
    names = GROUPS | (OF_GRPO if stage == "grpo" else {})
    trl = {theirs: ours[name] for name, theirs in names.items() if name in ours}
    minibatches = ours["batch_size"] // ours["minibatch_size"]
    trl |= {
        "per_device_train_batch_size": ours["minibatch_size"],
        "gradient_accumulation_steps": 1,
        "steps_per_generation": minibatches,
    }
    if "max_grad_norm" in ours:
        trl["max_grad_norm"] = ours["max_grad_norm"] or 0.0
    if "schedule" in ours:
        back = {mine: theirs for theirs, mine in SCHEDULES.items()}
        trl["lr_scheduler_type"] = back.get(ours["schedule"], ours["schedule"])
    if "warmup_share" in ours:
        total = steps * ours.get("epochs", 1) * minibatches
        trl["warmup_steps"] = round(ours["warmup_share"] * total)
    if "loss_mean" in ours:
        back = {"sequence": "grpo", "constant": "dr_grpo", "token": "dapo"}
        trl["loss_type"] = back[ours["loss_mean"]]
    if stage == "rloo" and ours.get("score_clip"):
        trl["reward_clip_range"] = (-ours["score_clip"], ours["score_clip"])
    return trl


def _in_words_of_step(ours: dict[str, Any]) -> dict[str, Any]:
    trl = {
        theirs: ours[name]
        for name, theirs in PPO_OPTIONS["PPOTrainer.step"].items()
        if name in ours
    }
    if "minibatch_size" in ours:
        trl |= {"mini_batch_size": ours["minibatch_size"], "gradient_accumulation_steps": 1}
    if "kl" in ours:
        trl["kl_penalty"] = {mine: theirs for theirs, mine in KL_PENALTIES.items()}[ours["kl"]]
    if "kl_control" in ours:
        trl["adap_kl_ctrl"] = ours["kl_control"] == "adaptive"
    if ours.get("stop_kl") is not None:
        trl |= {"early_stopping": True, "target_kl": ours["stop_kl"] / STOP_KL}
    return trl
