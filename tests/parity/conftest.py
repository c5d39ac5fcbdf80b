"""A comparison with trl is a test with a mark that says what is compared, and a gap that it found.

The marks and the gaps together are the table that ``tests/tools/parity_table.py`` prints.
"""

from collections.abc import Callable, Iterator, Sequence

import pytest
from tolerances import FP64


@pytest.fixture
def parity(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """``parity(gap)`` asserts that gaps are within the tolerance and enters them in the table.

    A test with several marks names the function too: ``parity(gap, "gae")``. A test that compares
    nothing at all fails.
    """
    functions = [mark.args[0] for mark in request.node.iter_markers("parity")]

    def check(
        gaps: float | Sequence[float], function: str | None = None, *, tolerance: float = FP64
    ) -> None:
        if function is None:
            (function,) = functions
        assert function in functions
        for gap in gaps if isinstance(gaps, Sequence) else [gaps]:
            request.node.user_properties.append((function, gap))
            assert gap <= tolerance  # NaN is not

    yield check
    compared = {function for function, _ in request.node.user_properties}
    assert compared == set(functions)
