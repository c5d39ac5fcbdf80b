"""The example for a pencil. rlhf_min/README.md shows what the script prints, and every figure there
follows from those above it: by plain arithmetic here, without torch and without the package."""

import doctest
import math
import re
import runpy
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from rlhf_min.advantages import gae
from rlhf_min.kl import kl_estimate, shape_rewards
from rlhf_min.losses import ppo_policy_loss, ppo_value_loss
from rlhf_min.masking import masked_whiten
from rlhf_min.preference_losses import dpo_loss

ROOT = Path(__file__).parents[2]
README = (ROOT / "rlhf_min/README.md").read_text(encoding="utf-8")
(SHOWN,) = re.findall(r"^```\n(What is 2 plus 2\?.*?)^```", README, re.DOTALL | re.MULTILINE)
LENGTHS = (4, 2)
N = sum(LENGTHS)
STEP = 1e-6  # of a difference quotient; its error is about the square of it

Figures = dict[str, list[Fraction]]


def read_tables(text: str) -> dict[str, Figures]:
    """By tag and name the figures of each table, those in its title among them."""
    found = {}
    for block in text.split("\n\n")[1:]:
        title, _, *lines = block.splitlines()
        figures = dict(re.findall(r"(\w+) (-?\d[\d. -]*)", re.sub(r" and ", " ", title)))
        figures |= {line.split()[0]: line[14:].strip(" =") for line in lines}
        table = {name: [Fraction(x) for x in row.split()] for name, row in figures.items()}
        found |= dict.fromkeys(re.findall(r"\[eq:(\w+)\]", title), table)
    return found


TABLES = read_tables(SHOWN)


def of_responses(row: list[Fraction]) -> list[list[Fraction]]:
    return [row[: LENGTHS[0]], row[LENGTHS[0] :]]


def assert_written(row: list[Fraction], expected: list) -> None:
    """Each figure is the number, rounded to four digits behind the point."""
    assert len(row) == len(expected)
    for figure, number in zip(row, expected, strict=True):
        assert abs(figure - Fraction(number)) <= Fraction(1, 20_000), (figure, float(number))


def test_the_readme_shows_what_the_script_prints(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pencil.py"])
    runpy.run_path(str(ROOT / "examples" / "pencil.py"), run_name="__main__")
    assert capsys.readouterr().out == SHOWN


@pytest.mark.parametrize(
    ("tag", "name", "before", "name_there"),
    [
        ("shape_rewards", "kl", "kl", "kl"),
        ("gae", "rewards", "shape_rewards", "rewards"),
        ("whiten", "advantages", "gae", "advantages"),
        ("ppo_policy", "whitened", "whiten", "whitened"),
        ("ppo_policy", "logprobs", "kl", "logprobs"),
        ("ppo_value", "values", "gae", "values"),
        ("ppo_value", "returns", "gae", "returns"),
    ],
)
def test_each_table_goes_on_from_one_above(tag, name, before, name_there):
    assert TABLES[tag][name] == TABLES[before][name_there]


@pytest.mark.eq("kl")
def test_kl_by_hand():
    given = TABLES["kl"]
    assert given["kl"] == [
        ours - theirs for ours, theirs in zip(given["logprobs"], given["ref_logprobs"], strict=True)
    ]


@pytest.mark.eq("shape_rewards")
def test_rewards_by_hand():
    given = TABLES["shape_rewards"]
    (coef,) = given["kl_coef"]
    expected = [-coef * kl for kl in given["kl"]]
    expected[3] += given["scores"][0]  # the first response's EOS
    expected[5] += given["scores"][1]
    assert given["rewards"] == expected


@pytest.mark.eq("gae")
def test_advantages_by_hand():
    # A_t = delta_t + gamma lam delta_{t+1} + (gamma lam)^2 delta_{t+2} + ...
    given = TABLES["gae"]
    (gamma,), (lam,) = given["gamma"], given["lam"]
    expected = []
    for r, v in zip(of_responses(given["rewards"]), of_responses(given["values"]), strict=True):
        delta = [r[t] + gamma * after - v[t] for t, after in enumerate([*v[1:], Fraction(0)])]
        expected += [
            sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, len(r)))
            for t in range(len(r))
        ]
    assert given["advantages"] == expected
    assert given["returns"] == [a + v for a, v in zip(expected, given["values"], strict=True)]


@pytest.mark.eq("masked_mean")
@pytest.mark.eq("masked_var")
@pytest.mark.eq("whiten")
def test_whitening_by_hand():
    given = TABLES["whiten"]
    mean = sum(given["advantages"]) / N
    variance = sum((a - mean) ** 2 for a in given["advantages"]) / (N - 1)
    assert (given["mean"], given["variance"]) == ([mean], [variance])
    deviation = Fraction(math.sqrt(variance)).limit_denominator(100)
    assert deviation**2 == variance
    assert given["whitened"] == [(a - mean) / deviation for a in given["advantages"]]


def policy_loss(new: float, old: float, advantage: float, clip: float) -> float:
    """Minus what the token gains, the less hopeful of two."""
    ratio = math.exp(new - old)
    return -min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage)


@pytest.mark.eq("ppo_policy")
def test_policy_loss_by_hand():
    given = TABLES["ppo_policy"]
    (clip,) = map(float, given["clip"])
    names = ("new_logprobs", "logprobs", "whitened")
    rows = [tuple(map(float, row)) for row in zip(*(given[name] for name in names), strict=True)]
    losses = [policy_loss(*row, clip) for row in rows]
    ratios = [math.exp(new - old) for new, old, _ in rows]
    assert_written(given["ratio"], ratios)
    assert_written(given["loss_of_each"], losses)
    assert_written(given["loss"], [sum(losses) / N])
    # where the clip is what is felt
    clipped = [
        loss != -a * ratio for loss, (*_, a), ratio in zip(losses, rows, ratios, strict=True)
    ]
    assert_written(given["clip_fraction"], [Fraction(sum(clipped), N)])
    slopes = [
        (policy_loss(new + STEP, old, a, clip) - policy_loss(new - STEP, old, a, clip)) / (2 * STEP)
        for new, old, a in rows
    ]
    assert_written(given["gradient"], [slope / N for slope in slopes])
    # all six cases: up, down and unmoved, each for a better and for a worse token
    assert {(new > old, new < old, a > 0) for new, old, a in rows} == {
        (up, down, good) for up, down in ((1, 0), (0, 1), (0, 0)) for good in (1, 0)
    }


@pytest.mark.eq("ppo_value")
def test_value_loss_by_hand():
    given = TABLES["ppo_value"]
    (clip,) = given["clip"]
    losses, clipped = [], 0
    for v, new, r in zip(*(given[n] for n in ("values", "new_values", "returns")), strict=True):
        near = v + min(max(new - v, -clip), clip)
        losses.append(max((new - r) ** 2, (near - r) ** 2) / 2)
        clipped += (near - r) ** 2 > (new - r) ** 2
    assert given["loss_of_each"] == losses
    assert given["loss"] == [sum(losses) / N]
    assert_written(given["clip_fraction"], [Fraction(clipped, N)])


@pytest.mark.eq("dpo")
def test_dpo_by_hand():
    given = TABLES["dpo"]
    (beta,) = given["beta"]
    logratios = [a - b for a, b in zip(given["logprobs"], given["ref_logprobs"], strict=True)]
    margin = beta * (logratios[0] - logratios[1])
    assert given["rewards"] == [beta * x for x in logratios]
    assert given["margin"] == [margin]
    assert_written(given["loss"], [math.log(1 + math.exp(-margin))])
    weight = 1 / (1 + math.exp(margin))  # sigmoid(-margin): how wrong the pair is ranked
    assert_written(given["weight"], [weight])
    assert_written(given["gradient"], [-float(beta) * weight, float(beta) * weight])


@pytest.mark.parametrize(
    ("function", "tag", "name"),
    [
        (kl_estimate, "kl", "kl"),
        (shape_rewards, "shape_rewards", "rewards"),
        (gae, "gae", "advantages"),
        (masked_whiten, "whiten", "whitened"),
        (ppo_policy_loss, "ppo_policy", "loss_of_each"),
        (ppo_value_loss, "ppo_value", "loss_of_each"),
        (dpo_loss, "dpo", "loss"),
    ],
)
def test_the_docstrings_have_the_same_digits(function, tag, name):
    figures = TABLES[tag][name]
    told = [
        [Fraction(x) for x in re.findall(r"-?\d+\.\d*", example.want)]
        for example in doctest.DocTestParser().get_examples(function.__doc__)
        if example.want
    ]
    # the first response, or one number of it
    assert any(x[:4] == figures[:4] or (len(x) == 1 and x[0] in figures) for x in told)
