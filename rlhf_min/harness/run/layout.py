"""What lies where in a run's folder, what of it is the run's own, and which stages there are."""

import os
import pkgutil
import re
import shutil
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

from rlhf_min.harness import stages

RUN, METRICS, RESULTS, NOTES = "run.json", "metrics.jsonl", "results.json", "notes.json"
SAMPLES, TOKENS, REWARD_MODEL = "samples.jsonl", "tokens.jsonl", "reward_model.json"
CHECKPOINTS, BEST, LAST_GOOD = "checkpoints", "best", "last_good"  # with a folder for each stage

OLD = "-old"  # what a folder is called while another takes its name
STEP = r"step-\d{6,}"
# In the folder of a model or a checkpoint: weights, configs, tokenizers, and what a desktop adds.
_INSIDE = (
    r"(?:[^/]+\.(?:json|safetensors|pt|model|jinja)|vocab\.txt|merges\.txt"
    r"|additional_chat_templates(?:/.*)?|\.DS_Store|Thumbs\.db|desktop\.ini)"
)
_HALF = rf"(?:-\d+(?:{OLD})?)?"
_IN_A_RUN = (
    r"\.?(?:run|results|reward_model|notes|findings|wandb)\.json",
    r"\.?(?:frontier|overoptimization|arithmetic)\.json",
    r"\.?(?:metrics|samples|tokens)\.jsonl|\.?samples\.md|\.?report\.html",
    r"\.?(?:curves|frontier|overoptimization)\.(?:png|svg)",
    r"\.?nonfinite-step-\d+\.(?:json|safetensors)(?:-\d+)?",
    r"tensorboard/.*tfevents.*|wandb/.*",
    rf"(?:(?:{BEST}|{LAST_GOOD})/)?\.?STAGE{_HALF}/{_INSIDE}",
    rf"\.?(?:best|random)_of_n{_HALF}/{_INSIDE}",
    rf"{CHECKPOINTS}/STAGE/\.?{STEP}{_HALF}/{_INSIDE}",
)


@cache
def stage_modules() -> dict[str, ModuleType]:
    """The files of `rlhf_min.harness.stages` that hold a stage, by the stage's name in a run.

    They are found in their folder, so that another one is known everywhere when it is put there.
    What such a file says of its stage stands in the folder's ``__init__``.
    """
    names = [module.name for module in pkgutil.iter_modules(stages.__path__)]
    modules = [import_module(f"{stages.__name__}.{name}") for name in names]
    return {module.STAGE: module for module in modules if hasattr(module, "STAGE")}


def _with_stages(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern.replace("STAGE", f"(?:{'|'.join(stage_modules())})"))


def left_over(folder: Path) -> re.Match[str] | None:
    """Whether a process that was killed has left this: group 1 is what it should have become, and
    group 2 is set where it is what another took the name of."""
    return _with_stages(rf"\.(STAGE|{STEP})-\d+({OLD})?").fullmatch(folder.name)


def users_files(folder: Path) -> list[Path]:
    """What lies in the folder of a model or of a checkpoint and is none of their files."""
    return [path for path in sorted(folder.iterdir()) if not re.fullmatch(_INSIDE, path.name)]


def users_paths_below(checkpoints: Path) -> list[Path]:
    """What lies below ``checkpoints/`` and is no checkpoint, and no part of one."""
    paths = []
    for stage in sorted(checkpoints.glob("*")):
        if stage.name not in stage_modules() or not stage.is_dir():
            paths.append(stage)
            continue
        for step in sorted(stage.iterdir()):
            own = step.is_dir() and re.fullmatch(STEP, step.name)
            paths += users_files(step) if own else [step]
    return paths


def remove(folder: Path) -> bool:
    """Delete the folder of a model or of a checkpoint, unless something of the user's is in it."""
    if users_files(folder):
        return False
    shutil.rmtree(folder)
    return True


def discard(old: Path, folder: Path) -> None:
    """Delete what `folder` was before; what the user has put there moves on into the new one."""
    try:
        for path in users_files(old):
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
    pattern = _with_stages("|".join(_IN_A_RUN))
    own = [path for path in files if pattern.fullmatch(path.relative_to(run).as_posix())]
    for path in sorted(own, key=lambda path: path == run / RUN):
        path.unlink()
    folders = {parent for path in own for parent in path.parents if run in parent.parents}
    for folder in sorted(folders, reverse=True):  # the inner ones first
        if not os.listdir(folder):
            folder.rmdir()
    return sorted(set(files) - set(own))
