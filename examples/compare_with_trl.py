"""Run trl beside the code here, on your model and your rows, and say why the two differ.

    python examples/compare_with_trl.py --stage dpo --model DIR --data pairs.jsonl --steps 4
    python examples/compare_with_trl.py --trl_script my_dpo.py --steps 4
    python examples/compare_with_trl.py --trl_run outputs/dpo --run runs/dpo

trl runs unmodified in a process of its own, with --trl_python in another environment. Both sides
get the same rows, start weights and options: trl's defaults, unless you give others. An option
given here (--beta 0.2) goes to both; one behind --trl (--trl beta=0.2) goes to trl alone. A script
is run as it is, and stopped after its first steps. A finished run of trl's (--trl_run) is compared
with a finished one of ours without trl: a table, beside_trl.png and beside_trl.json in --out, here.

The first two lines say whether the two differ and why; then follow each cause, the tokens, and
every metric of every step. The exit code is 1 if a difference stays that nothing explains.
"""

import sys
import tempfile
from pathlib import Path

from compare.command import parse_options

from rlhf_min.harness.cli import command, require_one_process


@command
def main() -> None:
    require_one_process("both sides of this comparison have one process")
    options = parse_options(__doc__)
    if options.trl_run is not None and options.run is not None:
        from compare import finished

        finished.compare(options.trl_run, options.run, options.stage, Path(options.out or ""))
        return
    with tempfile.TemporaryDirectory(prefix="beside-trl-") as folder:
        from compare.live import compare  # which imports torch

        explained = compare(options, Path(folder))
    sys.exit(0 if explained else 1)


if __name__ == "__main__":
    main()
