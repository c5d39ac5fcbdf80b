"""What is imported when: torch takes seconds, and the libraries of the harness take more."""

import subprocess
import sys

import pytest
from test_house import ALGORITHMS

import rlhf_min

HEAVY = "torch transformers datasets evaluate pandas pyarrow nltk rouge_score matplotlib".split()


def imported_by(code: str) -> set[str]:
    """Which of the heavy libraries a fresh Python has imported after this code."""
    code += f"\nimport sys; print('imported:', *{set(HEAVY)} & sys.modules.keys())"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True, timeout=120
    )
    return set(run.stdout.rpartition("imported:")[2].split())


def test_each_public_name_is_there():
    for name in rlhf_min.__all__:
        assert getattr(rlhf_min, name) is not None
    assert set(rlhf_min.__all__) <= set(dir(rlhf_min))
    assert sorted(rlhf_min._MODULE_OF.keys() | {*ALGORITHMS, "evaluation"}) == (
        sorted(rlhf_min.__all__)
    )
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        rlhf_min.nonsense  # noqa: B018


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import rlhf_min.config, rlhf_min.errors", set()),
        ("from rlhf_min import gae", {"torch"}),
        ("import rlhf_min.ppo", {"torch", "transformers"}),
    ],
)
def test_no_more_is_imported_than_is_used(code, expected):
    assert imported_by(code) == expected
