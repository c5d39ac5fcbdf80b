"""Starts trl's side from ours: in any Python that has trl, and with errors of one line."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from compare.job import ERROR, JOB, RECORD, Job, Record
from rlhf_min.errors import BadInput, require

LOG = "trl.log"  # in the folder: what trl printed
EXAMPLES = Path(__file__).parents[2]
TRAINERS = {
    "sft": "SFTTrainer",
    "reward": "RewardTrainer",
    "dpo": "DPOTrainer",
    "ppo": "PPOTrainer",
    "grpo": "GRPOTrainer",
    "rloo": "RLOOTrainer",
}
# The versions that have a stage in a form that is known here.
STAGES = {
    "sft": "1.0 or newer",
    "reward": "0.11.3, or 1.0 or newer",
    "dpo": "0.11.3, or 1.0 or newer",
    "ppo": "0.11.3, or 1.0 to 1.12.0",
    "grpo": "1.12.0 or newer",
    "rloo": "1.12.0 or newer",
}


def probe(python: str = sys.executable) -> dict[str, Any]:
    """The versions that a Python has, and trl's `trainers`; `trl` is None if it is not there.

    Args:
        python: path, or a name that the shell finds.
    """
    try:
        done = subprocess.run(
            [python, "-m", "compare.theirs", "--probe"],
            capture_output=True,
            text=True,
            env=_environment(),
            check=False,
        )
    except OSError as error:
        raise BadInput(f"{python}: no such Python ({error.strerror})") from None
    try:
        return dict(json.loads(done.stdout))
    except ValueError:
        said = (done.stderr.strip() or "it says nothing").splitlines()[-1]
        raise BadInput(f"{python}: is not a Python of 3.10 or newer: {said}") from None


def run(job: Job, folder: Path, python: str = sys.executable) -> Record:
    """trl's side of a comparison, in a process of its own.

    Args:
        job: what it is told.
        folder: for its files; what trl prints is in ``trl.log`` there.
        python: which Python runs it.
    """
    found = probe(python)
    require(found["trl"] is not None, f"no trl in {python}: {python} -m pip install trl")
    require(
        has(job.stage, found),
        f"trl {found['trl']} in {python} has no {job.stage} that is known here: "
        f"it needs {STAGES[job.stage]}",
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name in (RECORD, ERROR):  # of a run before
        (folder / name).unlink(missing_ok=True)
    job.save(folder / JOB)
    with (folder / LOG).open("wb") as log:
        code = subprocess.run(
            [python, "-m", "compare.theirs", str(folder)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(),
            check=False,
        ).returncode
    if code == 0 and (folder / RECORD).exists():
        return Record.load(folder)
    raise BadInput(_failure(code, folder))


def has(stage: str, found: dict[str, Any]) -> bool:
    """Whether the trl of a `probe` has the stage in a form that is known here."""
    major, minor = (int(part) for part in found["trl"].split(".")[:2])
    known = major > 0 or (minor == 11 and stage != "sft")
    if stage in ("grpo", "rloo"):
        known = (major, minor) >= (1, 12)
    return known and TRAINERS[stage] in found["trainers"]


def _environment() -> dict[str, str]:
    """Ours, with what the process imports; nothing is reported to anyone."""
    paths = [str(EXAMPLES), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "disabled",
        "TRL_EXPERIMENTAL_SILENCE": "1",  # no warning of what the user chose
    }


def _failure(code: int, folder: Path) -> str:
    error = folder / ERROR
    if error.exists():
        return error.read_text(encoding="utf-8").strip()
    if code < 0:
        name = signal.Signals(-code).name
        memory = ", as when memory runs out" if -code == signal.SIGKILL else ""
        return f"trl's process was ended by {name}{memory}; see {folder / LOG}"
    lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"trl's process left nothing (exit code {code}): {lines[-1] if lines else 'no output'}"
