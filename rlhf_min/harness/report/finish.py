"""What a run leaves to look at. Its models are saved before, so a failure here costs a picture."""

import sys
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

from rlhf_min.harness.report import findings, page, results
from rlhf_min.harness.report.results import Recorded


class Spared(AbstractContextManager[None]):
    """Inside, a file to look at is written. What fails, be it the disk or a library, is a warning.

    So is Ctrl-C, which ends this file and no more.

    Args:
        file: for the warning.
        then: what to do without it.
    """

    def __init__(self, file: Path, then: str) -> None:
        self.file, self.then = file, then

    def __exit__(
        self, _: type | None, error: BaseException | None, __: TracebackType | None
    ) -> bool:
        spared = isinstance(error, (Exception, KeyboardInterrupt))
        if spared:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
            told = ": ".join(filter(None, [type(error).__name__, reason]))
            print(
                f"warning: {self.file} was not written ({told}); {self.then}",
                file=sys.stderr,
            )
        return spared


def show(folder: Path, log: Recorded | None = None) -> list[str]:
    """Print the verdict on a run; write it as ``findings.json``, and ``report.html`` that begins
    with it, and from a log ``curves.png`` with its SVG.

    Returns:
        The names of the last two, if they are there.
    """
    files = [folder / page.REPORT, folder / results.CURVES]
    again = f"examples/make_report.py {folder} makes it again"
    with Spared(folder / findings.FINDINGS, again):
        findings.conclude(folder)
    with Spared(files[0], again):
        page.write_report(folder)
    if log is not None:
        with Spared(files[1], again):
            results.write_curves(files[1], log)
    return [file.name for file in files if file.is_file()]
