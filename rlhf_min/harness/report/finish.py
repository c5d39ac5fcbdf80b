"""What a run leaves to look at. Its models are saved before, so a failure here costs a picture."""

import sys
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

from rlhf_min.harness.run import processes


class WarnOnly(AbstractContextManager[None]):
    """Inside, a file is written that a run can do without: what fails is a warning, no error.

    Be it the disk, a library, or Ctrl-C, which ends this file and no more.

    Args:
        file: for the warning.
        then: what to do without it.
    """

    def __init__(self, file: Path, then: str) -> None:
        self.file, self.then = file, then

    def __exit__(
        self, _: type | None, error: BaseException | None, __: TracebackType | None
    ) -> bool:
        handled = isinstance(error, (Exception, KeyboardInterrupt))
        if handled:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
            kind = ": ".join(filter(None, [type(error).__name__, reason]))
            print(f"warning: {self.file} was not written ({kind}); {self.then}", file=sys.stderr)
        return handled


def show(folder: Path) -> list[str]:
    """Print a run's summary, and write it with the report and the picture of its curves.

    Returns:
        The names of the report and the picture, if they are there.
    """
    if not processes.is_main():
        return []
    # Not before: they read the stages, and these need torch, which a refused command does without.
    from rlhf_min.harness.report import figures, findings, page
    from rlhf_min.harness.run.reading import read_run

    files = [folder / page.REPORT, folder / figures.CURVES]
    again = f"examples/make_report.py {folder} makes it again"
    with WarnOnly(folder / findings.FINDINGS, again):
        findings.print_summary(folder)
    with WarnOnly(files[0], again):
        page.write_report(folder)
    with WarnOnly(files[1], again):
        figures.write_curves(files[1], read_run(folder))
    return [file.name for file in files if file.is_file()]
