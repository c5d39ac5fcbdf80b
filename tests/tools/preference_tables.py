"""The tables of the page on preference losses, examples/results/preference_losses.md.

The formulas are those of the docstrings, the weights come from autograd, and what the losses do is
read from the JSON that ``examples/preference_losses.py`` has written.
"""

import inspect
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import find_helpers  # noqa: F401
import torch
from preference_losses import config_of
from test_house import ROOT
from trl_tables import table

from rlhf_min import dpo
from rlhf_min import preference_losses as losses
from rlhf_min.config import DPOConfig
from rlhf_min.preference_losses import kto_loss

PAGE = ROOT / "examples/results/preference_losses.md"
RESULTS = ROOT / "examples/results/preference_losses.json"

LN2 = math.log(2)


@dataclass(frozen=True)
class Told:
    """What a page says of a loss beside its formula.

    Args:
        function: that computes it.
        chosen, rejected: how hard a step pulls at the two log-probabilities where the margin is 0,
            minus the derivative of the loss: the formula and its value.
        per_token: it is given means per token by default, so that a pull is at these.
    """

    function: str
    chosen: tuple[str, Callable[[Any], float]]
    rejected: tuple[str, Callable[[Any], float]]
    per_token: bool = False


def _opposite(formula: str, value: Callable[[Any], float], **more: Any) -> dict[str, Any]:
    return {
        "chosen": (formula, value),
        "rejected": (f"-{formula}", lambda config: -value(config)),
        **more,
    }


HALF = ("beta/2", lambda config: config.beta / 2)
QUARTER = ("beta/4", lambda config: config.beta / 4)
TOLD = {
    "sigmoid": Told("dpo_loss", **_opposite(*HALF)),
    "ipo": Told("ipo_loss", **_opposite("1/beta", lambda config: 1 / config.beta)),
    "hinge": Told("hinge_loss", **_opposite("beta", lambda config: config.beta)),
    "robust": Told(
        "robust_loss",
        **_opposite(
            "beta/(2 (1 - 2 eps))", lambda config: config.beta / (2 - 4 * config.label_smoothing)
        ),
    ),
    "apo_zero": Told("apo_zero_loss", **_opposite(*QUARTER)),
    "apo_down": Told(
        "apo_down_loss", ("0", lambda _: 0.0), ("-beta/4", lambda config: -config.beta / 4)
    ),
    "simpo": Told(
        "simpo_loss",
        per_token=True,
        **_opposite(
            "beta sigmoid(gamma)",
            lambda config: config.beta / (1 + math.exp(-config.simpo_gamma)),
        ),
    ),
    "orpo": Told(
        "orpo_loss",
        per_token=True,
        **_opposite("beta/(2 (1 - P)), at P = 1/2", lambda config: config.beta),
    ),
    "cpo": Told("cpo_loss", **_opposite(*HALF)),
    "kto": Told("kto_loss", **_opposite("weight beta/4", QUARTER[1])),
}


def pulls(name: str) -> tuple[float, float]:
    """Minus the derivatives of a loss by both log-probabilities, where policy and reference are the
    same and chosen and rejected equally probable; by autograd."""
    config = config_of(name)
    pair = [torch.tensor([-LN2], dtype=torch.float64, requires_grad=True) for _ in range(2)]
    ref = [x.detach() for x in pair]
    if isinstance(config, DPOConfig):
        free = config.reference_free
        loss = dpo.preference_loss(config, *pair, *([] if free else ref)).loss
    else:
        loss = sum(
            kto_loss(
                *(mine, its_ref, torch.tensor([label]), torch.zeros((), dtype=torch.float64)),
                beta=config.beta,
                desirable_weight=config.desirable_weight,
                undesirable_weight=config.undesirable_weight,
            ).loss
            for mine, its_ref, label in zip(pair, ref, (True, False), strict=True)
        )
    chosen, rejected = torch.autograd.grad(loss, pair)
    return -float(chosen), -float(rejected)


def formula(function: str) -> str:
    """The numbered lines of a docstring, as one cell."""
    text = inspect.getdoc(getattr(losses, function)) or ""
    lines = re.findall(r"^ {4}(\S.*?) {2,}\(\d\)$", text, re.MULTILINE)
    assert lines, function
    return "<br>".join(f"`{line}`".replace("|", "\\|") for line in lines)


def formulas() -> str:
    """Each loss with its formula, and how hard it pulls at the start."""
    rows = []
    for name in TOLD:
        told, found = TOLD[name], pulls(name)
        config = config_of(name)
        cells = []
        for (words, value), pull in zip((told.chosen, told.rejected), found, strict=True):
            assert math.isclose(value(config), pull, abs_tol=1e-12), (name, words, pull)
            cells.append(f"{pull + 0.0:.3g}" + ("" if words == "0" else f" = {words}"))
        line = inspect.getsourcelines(getattr(losses, told.function))[1]
        link = f"[`{name}`](../../rlhf_min/preference_losses.py#L{line})"
        takes = "means per token" if told.per_token else "sums"
        rows.append((link, formula(told.function), takes, f"{config.beta:g}", *cells))
    head = ("loss", "formula", "of", "beta", "pull at chosen", "pull at rejected")
    return table(head, rows)


def moves() -> str:
    """What each has done to held-out pairs and to responses, at the end of its run."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))["points"]
    assert found.keys() == TOLD.keys()
    rows = []
    for name, points in found.items():
        last = points[-1]
        rows.append(
            (
                f"`{name}`",
                *(f"{last[side]:+.2f}" for side in ("chosen", "rejected")),
                f"{last['chosen'] - last['rejected']:.2f}",
                f"{last['ranked']:.1%}",
                *(f"{last[x]:.2f}" for x in ("kl", "gold_reward")),
                f"{last['tokens']:.1f}",
            )
        )
    head = (
        "loss",
        "chosen",
        "rejected",
        "difference",
        "ranked right",
        "KL",
        "gold reward",
        "tokens",
    )
    return table(head, rows)


MADE = {"preference-formulas": formulas, "preference-moves": moves}
