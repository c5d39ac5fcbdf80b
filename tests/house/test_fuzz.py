"""A few hundred of the inputs of ``tests/tools/fuzz.py``, the same each time."""

import pytest
from fuzz import TARGETS, fuzz

EXAMPLES = 300  # of all targets together


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_but_bad_input_comes_out(name):
    target = TARGETS[name]
    counts = fuzz(target, max(10, round(EXAMPLES * target.share)))
    # a reader that refuses all, or nothing, would be fuzzed in vain
    assert counts["accepted"] > 0
    assert counts["refused"] > 0
