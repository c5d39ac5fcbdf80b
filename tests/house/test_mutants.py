"""The list of mutants against the source and the tests, without running any."""

import importlib.util
import re

import mutants
import pytest
import torch
from mutants import MUTANTS, Finder, Mutant, gaps, misfits

from rlhf_min.masking import masked_var

ANY = Mutant(
    "biased variance",
    "masking.masked_var",
    "/ (n - 1)",
    "/ n",
    "unit/test_masking.py::test_masked_var_closed",
)


def test_the_list_fits_the_source():
    assert misfits(MUTANTS) == []
    assert gaps(MUTANTS) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"old": "/ (n - 2)"}, "stands there 0 times"),
        ({"old": "mask"}, r"stands there \d+ times"),
        ({"new": "/ (n - 1)"}, "stays as it is"),
        ({"new": "/ (n"}, "never closed"),
        ({"where": "masking.masked_median"}, "has no masked_median"),
        (
            {"test": "unit/test_masking.py::test_nothing"},
            "no test unit/test_masking.py::test_nothing",
        ),
        ({"test": "test_nothing.py::test_masked_var_closed"}, "no test test_nothing.py"),
    ],
)
def test_a_mutant_that_does_not_fit_is_named(changes, problem):
    wrong = ANY._replace(**changes)
    (found,) = misfits([wrong])
    assert re.match(rf"{wrong.where}: biased variance: .*{problem}", found)


def test_a_mutant_stands_once():
    assert misfits([ANY]) == []
    assert misfits([ANY, ANY]) == ["masking.masked_var: biased variance: stands twice"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("- values[:, t]  # (1)", r"advantages\.py:\d+: equation \(1\) of gae, and no mutant"),
        ("coef *= 1 + error", r"kl\.py:\d+: equation \(2\) of AdaptiveKL, and no mutant"),
        ("self.mean += ", r"ppo\.py:\d+: equation \(2\) of RunningMoments, and no mutant"),
        ("last = mask.sum(1)", r"kl\.py:\d+: mask is read, and no mutant"),
        ("ratio[mask].max()", r"losses\.py:\d+: mask is read, and no mutant"),
        ("going], attention_mask[going]", r"sampling\.py:\d+: attention_mask is read, and no"),
    ],
)
def test_an_equation_or_a_mask_without_a_mutant_is_named(line, problem):
    def changes(mutant):
        return line in mutant.path.read_text(encoding="utf-8").splitlines()[mutant.line - 1]

    assert any(map(changes, MUTANTS))
    (found,) = gaps([mutant for mutant in MUTANTS if not changes(mutant)])
    assert re.search(problem, found)


def test_a_mutation_is_in_memory_only():
    before = ANY.path.read_text(encoding="utf-8")
    assert before.splitlines()[ANY.line - 1].endswith("/ (n - 1)  # (1)")
    finder = Finder(ANY)
    assert finder.find_spec("rlhf_min.losses", None) is None
    spec = finder.find_spec("rlhf_min.masking", None)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    x, mask = torch.tensor([[1.0, 3.0]]), torch.tensor([[True, True]])
    assert (module.masked_var(x, mask), masked_var(x, mask)) == (1.0, 2.0)
    assert ANY.path.read_text(encoding="utf-8") == before


def test_rows_of_the_table_are_wrapped_in_their_columns():
    lines = mutants.row("a" * 40, "b", "c d", "e", "0.1").splitlines()
    assert len(lines) == 2
    assert [line.index("|") for line in lines] == [31, 31]
    assert lines[0].split() == ["a" * 30, "|", "b", "|", "c", "d", "|", "e", "|", "0.1"]
