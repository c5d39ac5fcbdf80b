"""Run our functions and whole training runs beside trl's, and print how far apart they come.

The comparisons are the tests in tests/parity that carry the mark "parity": trl 1.12.0 runs live,
trl 0.11.3 and 1.16.0 as they were recorded. Needs the extra: pip install -e '.[test]'
"""

import contextlib
import io
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the next lines are imported

from rlhf_min.errors import BadInput, require
from rlhf_min.harness.cli import Parser, command

TESTS = Path(__file__).parents[1] / "parity"
ORDER = "functions ppo grpo rloo dpo preference kto reward sft lora".split()
HEADER = ("function", "trl", "dtype", "cases", "largest difference", "convention removed")


@dataclass
class Row:
    """One line of the table."""

    function: str
    trl: str
    dtype: str
    cases: int
    of: str
    convention: str
    gaps: list[float] = field(default_factory=list)
    failed: bool = False

    def cells(self) -> tuple[str, ...]:
        """What is printed. The gap is "-" if nothing was run."""
        gap = f"{max(self.gaps):.0e}" if any(self.gaps) else "0" if self.gaps else "-"
        gap = f"failed ({gap})" if self.failed else gap
        cases = f"{self.cases:,} {self.of}"
        return (f"`{self.function}`", self.trl, self.dtype, cases, gap, self.convention)


class Table:
    """A pytest plugin that turns marks and gaps into rows."""

    def __init__(self, only: str) -> None:
        self.only = only
        self.rows: dict[tuple[str, ...], Row] = {}
        self.tests: dict[str, dict[str, Row]] = {}

    def pytest_collection_modifyitems(self, items) -> None:
        """Keep the comparisons asked for and make their rows."""
        wanted = []
        for item in items:
            marks = [m for m in item.iter_markers("parity") if self.only in m.args[0]]
            if marks:
                wanted.append(item)
            for mark in marks:
                self._add(item.nodeid, *mark.args, **mark.kwargs)
        items[:] = wanted

    def pytest_runtest_logreport(self, report) -> None:
        """Enter what a test has found."""
        gaps = report.user_properties if report.when == "call" else []
        for row in self.tests.get(report.nodeid, {}).values():
            row.failed |= report.failed
            row.gaps += [gap for function, gap in gaps if function == row.function]

    def _add(
        self, test, function, symbol, version, *, cases, of, dtype="float64", convention=""
    ) -> None:
        trl = f"`{symbol}` {version}"
        row = Row(function, trl, dtype, 0, of, convention)
        row = self.rows.setdefault((function, trl, dtype, of, convention), row)
        row.cases += cases
        self.tests.setdefault(test, {})[function] = row


@command
def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--only", default="", help="Only functions whose name holds this.")
    parser.add_argument("--list", action="store_true", help="List the comparisons without running.")
    options = parser.parse_args()
    try:
        import pytest
        import trl
    except ImportError as error:
        raise BadInput(f"{error}: pip install -e '.[test]'") from error
    require(
        trl.__version__ == "1.12.0",
        f"needs trl 1.12.0, found {trl.__version__}: pip install -e '.[test]'",
    )

    table = Table(options.only)
    files = [str(file) for kind in ORDER for file in sorted(TESTS.glob(f"test_{kind}*.py"))]
    quiet = [*files, "-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", "-W", "ignore"]
    if options.list:
        with contextlib.redirect_stdout(io.StringIO()):
            code = pytest.main([*quiet, "--collect-only"], plugins=[table])
    else:
        code = pytest.main(quiet, plugins=[table])
    require(bool(table.rows), f"no comparison holds {options.only!r} in its name; see --list")
    print()
    for cells in (HEADER, ("---",) * len(HEADER), *(r.cells() for r in table.rows.values())):
        print("| " + " | ".join(cells) + " |")
    sys.exit(1 if code else 0)


if __name__ == "__main__":
    main()
