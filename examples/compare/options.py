"""What trl's options are in our words, and ours in trl's.

trl's options here are those of ``record.options``: the whole config as it took effect.
"""

import math
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
SCHEDULES = {"constant_with_warmup": "constant"}  # the others that we have are called alike


def in_our_words(stage: str, trl: dict[str, Any], *, total_steps: int) -> dict[str, Any]:
    """Our config's fields as trl's options say, but for `epochs` and what is memory only.

    Args:
        stage: sft, reward or dpo.
        trl: its effective options.
        total_steps: what its schedule counts to.
    """
    names = SHARED | SAME[stage]
    ours = {name: trl[theirs] for name, theirs in names.items() if theirs in trl}
    ours["batch_size"] = trl["per_device_train_batch_size"] * trl["gradient_accumulation_steps"]
    schedule = str(trl["lr_scheduler_type"])
    ours["schedule"] = SCHEDULES.get(schedule, schedule)
    warmup = trl.get("warmup_steps") or 0
    if warmup < 1:  # a share; older ones have another field for it
        warmup = math.ceil((warmup or trl.get("warmup_ratio") or 0) * total_steps)
    ours["warmup_share"] = 0.0 if schedule == "constant" else warmup / total_steps
    ours["max_grad_norm"] = ours["max_grad_norm"] or None  # 0: not at all
    if stage == "reward":
        ours["center_coef"] = ours["center_coef"] or 0.0
    return ours


def ignores_label_smoothing(record: Any) -> bool:
    """Whether trl's loss takes no notice of that option: 'sigmoid' does so from 1.0 on."""
    new = not record.versions["trl"].startswith("0.")
    return new and record.options.get("loss_type") in ("sigmoid", ["sigmoid"])


def in_trl_words(stage: str, ours: dict[str, Any], *, steps: int) -> dict[str, Any]:
    """Fields of trl's config that say what the given ones of ours do.

    Args:
        stage: sft, reward or dpo.
        ours: those that were given; the others are left to trl.
        steps: of the whole run.
    """
    names = SHARED | SAME[stage]
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
    return trl
