"""``python -m compare.theirs FOLDER``: the job that is in the folder, by trl.

``--probe`` prints what this Python has instead, without loading any of it.
"""

import json
import re
import sys
import traceback
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from ..job import ERROR, JOB, Job


def main(argument: str) -> int:
    """The exit code: 2 if all that came of it is one line in ``error.txt``."""
    if argument == "--probe":
        print(json.dumps(probe()))
        return 0
    folder = Path(argument)
    from . import Refused, first_line

    try:
        run(Job.load(folder / JOB), folder)
    except Refused as error:
        (folder / ERROR).write_text(str(error), encoding="utf-8")
        return 2
    except Exception as error:
        traceback.print_exc()
        last = traceback.extract_tb(error.__traceback__)[-1]
        message = f"trl's side failed: {first_line(error)} ({last.filename}:{last.lineno})"
        (folder / ERROR).write_text(message, encoding="utf-8")
        return 2
    return 0


def run(job: Job, folder: Path) -> None:
    """By the user's script, or by the driver of the stage."""
    drivers = {"ppo": "ppo", "grpo": "groups", "rloo": "groups"}
    module = "script" if job.script is not None else drivers.get(job.stage, "trainers")
    import_module(f".{module}", __package__).run(job, folder)


def probe() -> dict[str, object]:
    """The versions, and trl's trainers by its own lists; `trl` is None where it is not there."""
    found: dict[str, object] = {"python": sys.version.split()[0]}
    for name in ("trl", "transformers", "torch"):
        try:
            found[name] = version(name) if find_spec(name) else None
        except PackageNotFoundError:
            found[name] = None
    trl = find_spec("trl")
    names: set[str] = set()
    if trl is not None and trl.origin is not None:
        source = Path(trl.origin)
        names = {*re.findall(r'"(\w+Trainer)"', source.read_text(encoding="utf-8"))}
        if (source.parent / "experimental" / "ppo").is_dir():
            names.add("PPOTrainer")
    return found | {"trainers": sorted(names)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
