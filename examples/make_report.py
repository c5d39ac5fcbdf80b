"""Make the report of a run again, or lay several runs over each other in one.

    python examples/make_report.py runs/quickstart
    python examples/make_report.py runs/ppo runs/ppo-2 --out comparison.html

All is read from the runs' folders, so a run may still be under way, or have been killed. Without
--out the report of one run is its own report.html, and one of several is report.html here.
"""

from pathlib import Path

from rlhf_min.errors import BadInput, require
from rlhf_min.harness.cli import Parser, command, require_one_process
from rlhf_min.harness.run.atomic import write_file
from rlhf_min.harness.run.reading import read_run


@command
def main() -> None:
    require_one_process("a report is made by one process")
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="Folder of a run.")
    parser.add_argument("--out", type=Path, help="The report, a file that ends in .html.")
    options = parser.parse_args()

    require(
        options.out is None or options.out.suffix == ".html",
        f"--out {options.out} must end in .html, so that browsers open it",
    )
    runs = [read_run(folder) for folder in options.runs]
    # Only now, since it takes seconds to import: what can be refused is refused at once.
    from rlhf_min.harness.report import figures, page
    from rlhf_min.harness.report.findings import FINDINGS, summary, write_findings
    from rlhf_min.harness.report.finish import WarnOnly

    alone = len(runs) == 1
    out = options.out or (runs[0].folder if alone else Path()) / page.REPORT
    try:
        write_file(out, page.page(runs))
    except OSError as error:
        raise BadInput(f"--out {out}: cannot be written: {error.strerror}") from error
    if alone and runs[0].rows:
        curves = out.with_name(figures.CURVES)
        with WarnOnly(curves, f"{out} has its own"):
            figures.write_curves(curves, runs[0])
    if alone and options.out is None:
        with WarnOnly(runs[0].folder / FINDINGS, f"{out} begins with them"):
            write_findings(runs[0])
    print(f"{', '.join(str(run.folder) for run in runs)}: {out}")
    for run in runs:
        sentences, found = summary(run)
        for line in [*sentences, *map(str, found), *run.left_out]:
            print(f"  {run.name}: {line}")


if __name__ == "__main__":
    main()
