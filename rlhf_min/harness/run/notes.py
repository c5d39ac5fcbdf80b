"""What a run notes of itself beside its metrics: for its page and for what it says in the end."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NOTES = "notes.json"


def note(folder: Path, stage: str, **facts: Any) -> None:
    """Keep facts of a stage in the run's folder; those of the same name are replaced.

    What cannot be written is a warning: the page will lack it, and the run goes on.

    Args:
        folder: of the run.
        stage: or ``data``, for what holds for all of them.
        facts: JSON values.
    """
    file = folder / NOTES
    before = read_notes(file)
    of_stage = before.get(stage)
    now = {**before, stage: {**(of_stage if isinstance(of_stage, Mapping) else {}), **facts}}
    if now == before:
        return
    try:
        new = file.with_name(f".{NOTES}")
        new.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
        new.replace(file)
    except OSError as error:
        print(f"warning: {file} was not written ({error.strerror})", file=sys.stderr)


def read_notes(file: Path) -> dict[str, Any]:
    """The facts by stage; none where there is no such file, or it is damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
