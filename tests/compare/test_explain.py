"""The search for the reason, on runs that are formulas: which causes matter, in which order."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
from compare.conventions import Cause
from compare.explain import TOLERANCES, Gap, explain, first_gap, largest

FLOAT64 = TOLERANCES["float64"]


@dataclass(frozen=True)
class Toy:
    """A "run" whose loss of step t is a + b t + c if t > 2, and d changes nothing."""

    a: float = 0.0
    b: float = 0.0
    c: float = 0.0
    d: float = 0.0


THEIRS = Toy(a=1.0, b=0.5, c=0.25, d=9.0)
STEPS = 4


def run(setup: Toy) -> Iterator[dict[str, float]]:
    for t in range(1, STEPS + 1):
        taken.append(t)
        yield {"loss": setup.a + setup.b * t + (setup.c if t > 2 else 0.0), "accuracy": 0.5}


taken: list[int] = []


def cause(name: str) -> Cause[Toy]:
    value = getattr(THEIRS, name)
    return Cause(name, f"{name} is {value}", lambda setup: replace(setup, **{name: value}))


def explained(ours: Toy, names: str):
    base = list(run(ours))
    return explain(
        *(run, ours, [cause(name) for name in names], list(run(THEIRS)), FLOAT64), base=base
    )


def test_one_cause_is_named_with_the_gap_before_and_after():
    found = explained(replace(THEIRS, b=0.0), "b")
    assert found.first == Gap(1, "loss", 1.0, 1.5)
    [followed] = found.followed
    assert (followed.cause.name, followed.before.size, followed.after) == ("b", 0.5, 0.0)
    assert found.left is None
    assert found.best == list(run(THEIRS))


def test_what_changes_no_number_is_not_blamed():
    found = explained(replace(THEIRS, b=0.0, d=0.0), "db")
    assert [f.cause.name for f in found.followed] == ["b"]
    assert [c.name for c in found.without_effect] == ["d"]


def test_of_several_causes_each_is_left_out_in_turn():
    # With the two others followed: without a each step lacks 1, without b step t lacks t / 2, and
    # without c all is well until step 3.
    found = explained(Toy(), "cba")
    assert [f.cause.name for f in found.followed] == ["a", "b", "c"]
    assert [(f.before.step, f.before.size) for f in found.followed] == [
        (1, 1.0),
        (1, 0.5),
        (3, 0.25),
    ]
    assert [f.after for f in found.followed] == [0.0, 0.0, 0.0]


def test_of_two_causes_that_do_the_same_one_is_enough():
    both = [cause("b"), replace(cause("b"), name="again")]
    ours = replace(THEIRS, b=0.0)
    found = explain(*(run, ours, both, list(run(THEIRS)), FLOAT64), base=list(run(ours)))
    assert [f.cause.name for f in found.followed] == ["again"]
    assert [c.name for c in found.without_effect] == ["b"]


def test_causes_that_cancel_at_first_are_both_needed():
    # Ours has a 0.5 less and b 0.5 more: step 1 agrees by chance, and step 2 does not.
    found = explained(replace(THEIRS, a=0.5, b=1.0), "ab")
    assert found.first is not None
    assert found.first.step == 2
    assert {f.cause.name for f in found.followed} == {"a", "b"}
    assert found.left is None


def test_what_no_cause_explains_is_left_and_told():
    found = explained(replace(THEIRS, a=0.0, c=0.0), "a")
    assert [f.cause.name for f in found.followed] == ["a"]
    assert found.left == Gap(3, "loss", 2.5, 2.75)


def test_what_matters_is_told_though_a_gap_stays_behind_it():
    # a is followed; c, of which nothing is known, stays from step 3 on. d changes nothing.
    found = explained(replace(THEIRS, a=0.0, c=0.0, d=0.0), "da")
    assert [f.cause.name for f in found.followed] == ["a"]
    assert [c.name for c in found.without_effect] == ["d"]
    assert found.left == Gap(3, "loss", 2.5, 2.75)


def test_a_cause_that_does_not_help_is_not_blamed_for_what_is_left():
    found = explained(replace(THEIRS, a=0.0, d=0.0), "d")
    assert found.followed == []
    assert found.left == found.first == Gap(1, "loss", 0.5, 1.5)


def test_a_cause_is_seen_in_one_metric_while_the_gap_of_another_stays():
    """As of a swapped pair beside another loss: in DPO's first step no loss depends on it."""

    def two(setup: Toy) -> Iterator[dict[str, float]]:
        for metrics in run(setup):
            yield {"loss": metrics["loss"], "chosen_logprobs": setup.d}

    ours = replace(THEIRS, a=0.0, d=0.0)
    base = list(two(ours))
    found = explain(*(two, ours, [cause("d")], list(two(THEIRS)), FLOAT64), base=base)
    assert [f.cause.name for f in found.followed] == ["d"]
    assert found.followed[0].before == Gap(1, "chosen_logprobs", 0.0, 9.0)
    assert found.left == Gap(1, "loss", 0.5, 1.5)


def test_a_cause_that_cannot_be_followed_is_told():
    ours = replace(THEIRS, a=0.0)
    found = explain(
        *(run, ours, [Cause("a", "a is 1.0")], list(run(THEIRS)), FLOAT64), base=list(run(ours))
    )
    assert [c.name for c in found.cannot] == ["a"]
    assert found.left == found.first is not None


def test_runs_that_agree_need_no_cause():
    found = explained(replace(THEIRS, d=0.0), "d")
    assert found.first is None
    assert found.followed == []
    assert [c.name for c in found.without_effect] == ["d"]


def test_no_step_is_taken_behind_the_first_that_differs():
    taken.clear()
    assert first_gap(run(Toy()), [{"loss": 0.0}, {"loss": 1.0}, {"loss": 0.0}], FLOAT64) == Gap(
        2, "loss", 0.0, 1.0
    )
    assert taken == [1, 2]


@pytest.mark.parametrize(
    ("name", "ours", "theirs", "differs"),
    [
        ("loss", 1.0, 1.0 + 2e-9, True),
        ("loss", 1.0, 1.0 + 5e-10, False),
        ("chosen_logprobs", -500.0, -500.0 - 2e-7, False),  # relative to 500
        ("chosen_logprobs", -500.0, -500.0 - 2e-6, True),
        ("margin", 1e-12, 2e-12, False),  # absolute below 1
        ("learning_rate", 1e-12, 2e-12, True),  # always relative
        ("accuracy", 0.0, 1.0, False),  # a tie may fall either way
        ("loss", float("nan"), float("nan"), False),
        ("loss", float("nan"), 1.0, True),
    ],
)
def test_what_counts_as_a_difference(name, ours, theirs, differs):
    assert (first_gap([{name: ours}], [{name: theirs}], FLOAT64) is not None) == differs


def test_largest_difference_of_a_metric():
    assert largest([{"loss": 1.0}, {"loss": 2.0}], [{"loss": 1.5}, {"loss": 2.25}], "loss") == 0.5
    assert largest([{"loss": 1.0}], [{"margin": 1.5}], "loss") == 0.0
