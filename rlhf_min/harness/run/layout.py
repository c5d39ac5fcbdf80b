"""What lies where in a run's folder, and which of it the run wrote: only that is ever removed."""

import os
import re
import shutil
import sys
from pathlib import Path

RUN, METRICS, RESULTS, NOTES = "run.json", "metrics.jsonl", "results.json", "notes.json"
SAMPLES, TOKENS, REWARD_MODEL = "samples.jsonl", "tokens.jsonl", "reward_model.json"
STAGES = ("sft", "reward_model", "ppo", "dpo")
CHECKPOINTS, BEST, LAST_GOOD = "checkpoints", "best", "last_good"  # with a folder for each stage
CONFIGS = {
    "sft": "SFTConfig",
    "reward_model": "RewardConfig",
    "ppo": "PPOConfig",
    "dpo": "DPOConfig",
}

OLD = "-old"  # what a folder is called while another takes its name
STEP = r"step-\d{6,}"
_STAGE = f"(?:{'|'.join(STAGES)})"
# In the folder of a model or a checkpoint: weights, configs, tokenizers, and what a desktop adds.
_INSIDE = (
    r"(?:[^/]+\.(?:json|safetensors|pt|model|jinja)|vocab\.txt|merges\.txt"
    r"|additional_chat_templates(?:/.*)?|\.DS_Store|Thumbs\.db|desktop\.ini)"
)
LEFT_OVER = re.compile(rf"\.({_STAGE}|{STEP})-\d+({OLD})?")  # of a process that was killed
_HALF = rf"(?:-\d+(?:{OLD})?)?"
_IN_A_RUN = re.compile(
    "|".join(
        (
            r"\.?(?:run|results|reward_model|notes|findings|wandb)\.json",
            r"\.?(?:frontier|overoptimization)\.json",
            r"\.?(?:metrics|samples|tokens)\.jsonl|\.?samples\.md|\.?report\.html",
            r"\.?(?:curves|frontier|overoptimization)\.(?:png|svg)",
            r"\.?nonfinite-step-\d+\.(?:json|safetensors)(?:-\d+)?",
            r"tensorboard/.*tfevents.*|wandb/.*",
            rf"(?:(?:{BEST}|{LAST_GOOD})/)?\.?{_STAGE}{_HALF}/{_INSIDE}",
            rf"{CHECKPOINTS}/{_STAGE}/\.?{STEP}{_HALF}/{_INSIDE}",
        )
    )
)


def theirs(folder: Path) -> list[Path]:
    """What lies in the folder of a model or of a checkpoint and is none of their files."""
    return [path for path in sorted(folder.iterdir()) if not re.fullmatch(_INSIDE, path.name)]


def foreign(checkpoints: Path) -> list[Path]:
    """What lies below ``checkpoints/`` and is no checkpoint, and no part of one."""
    found = []
    for stage in sorted(checkpoints.glob("*")):
        if stage.name not in STAGES or not stage.is_dir():
            found.append(stage)
            continue
        for step in sorted(stage.iterdir()):
            own = step.is_dir() and re.fullmatch(STEP, step.name)
            found += theirs(step) if own else [step]
    return found


def remove(folder: Path) -> bool:
    """Delete the folder of a model or of a checkpoint, unless something of the user's is in it."""
    if theirs(folder):
        return False
    shutil.rmtree(folder)
    return True


def discard(old: Path, folder: Path) -> None:
    """Delete what `folder` was before; what the user has put there moves on into the new one."""
    try:
        for path in theirs(old):
            path.rename(folder / path.name)
    except OSError as error:
        print(f"warning: {old} stays, with files of yours: {error.strerror}", file=sys.stderr)
    else:
        shutil.rmtree(old, ignore_errors=True)


def clear(run: Path) -> list[Path]:
    """Delete all that a run has written; what makes it a run goes last.

    Returns:
        What stays.
    """
    files = [path for path in run.rglob("*") if path.is_symlink() or not path.is_dir()]
    own = [path for path in files if _IN_A_RUN.fullmatch(path.relative_to(run).as_posix())]
    for path in sorted(own, key=lambda path: path == run / RUN):
        path.unlink()
    folders = {parent for path in own for parent in path.parents if run in parent.parents}
    for folder in sorted(folders, reverse=True):  # the inner ones first
        if not os.listdir(folder):
            folder.rmdir()
    return sorted(set(files) - set(own))
