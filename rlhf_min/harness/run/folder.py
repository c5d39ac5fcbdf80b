"""The run's folder: where it is, what it records, and how a run is taken up again."""

import errno
import json
import math
import random
import shlex
import shutil
import sys
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rlhf_min.errors import BadInput, require
from rlhf_min.harness.run import processes
from rlhf_min.harness.run.atomic import write_file
from rlhf_min.harness.run.layout import (
    BEST,
    CHECKPOINTS,
    LAST_GOOD,
    RUN,
    clear,
    discard,
    left_over,
    stage_modules,
)
from rlhf_min.harness.run.signals import started_by, to_resume
from rlhf_min.loading.sources import split_label

if typing.TYPE_CHECKING:
    from rlhf_min.harness.run.log import MetricsLog

try:
    import fcntl
except ImportError:  # Windows has none, so nothing keeps a second process from a run there
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
PACKAGES = ("rlhf_min", "torch", "transformers")
# What a run may be continued with otherwise: none of it changes what is computed.
FREE = frozenset(
    "resume allow_config_change out overwrite save_every keep_last keep_best skip_preflight "
    "report_to device policy_device reward_device threads shard".split()
)
OF_THE_START = frozenset({"out", "overwrite", "resume", "allow_config_change"})
# What JSON that is damaged, or is not what was written, raises.
_UNREADABLE = (AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError)
_NEW = f".{RUN}"  # until it is complete
_held: dict[Path, Any] = {}  # the run that this process is at, and its file, locked


def check_out(options: Any, default: str) -> Path:
    """The run's folder: ``--resume``, ``--out``, or ``runs/<default>`` with the next free number.

    Nothing is created yet, so that an error in the data or a model leaves nothing behind.

    Raises:
        BadInput: if ``--out`` exists without ``--overwrite``, or holds something else than a run.
    """
    return processes.on_main(lambda: _folder_for(options, default))


def _folder_for(options: Any, default: str) -> Path:
    if options.resume is not None:
        return Path(options.resume)
    if options.out is None:
        first = Path("runs") / default
        later = (first.with_name(f"{default}-{i}") for i in range(2, 10_000))
        return first if not first.exists() else next(path for path in later if not path.exists())
    out = Path(options.out)
    require(
        not any("\ud800" <= letter <= "\udfff" for letter in options.out),
        f"--out {options.out}: this name is not UTF-8, so no tokenizer can be saved there; give "
        "another folder",
    )
    try:
        exists = out.exists()
    except OSError as error:
        message = f"--out {options.out[:60]}: {error.strerror}; give another folder"
        raise BadInput(message) from error
    is_new = out.is_dir() and {path.name for path in out.iterdir()} <= {_NEW, LOCK}
    if exists and not is_new:
        require(
            options.overwrite,
            f"--out {out} exists; give another folder, --overwrite, or --resume to go on with it",
        )
        for used in _files_used(options):
            require(
                not Path(used).resolve().is_relative_to(out.resolve()),
                f"--out {out} would be emptied, and {used} lies in it; give another folder",
            )
        require(
            (out / RUN).is_file(),
            f"--out {out} holds no {RUN}, so it is not a run and is not overwritten",
        )
    return out


def _files_used(options: Any) -> list[str]:
    names = ("model", "reward_model", "data", "heldout_data")
    rewards = [spec.rpartition("*")[2].partition(":")[0] for spec in getattr(options, "reward", [])]
    rewards = [split_label(name)[0] for name in rewards]
    return [path for path in (*(getattr(options, name, None) for name in names), *rewards) if path]


def start_log(out: Path, options: Any, *configs: Any, monitors: Iterable[str] = ()) -> "MetricsLog":
    """The log of a new run, or of one that is resumed.

    Args:
        configs: of the stages. Those that only train what is not given have none.
        monitors: the names of the rewards that PPO reports beside its own.

    Raises:
        BadInput: if it is resumed with another configuration, without ``--allow_config_change``,
            or no stage measures what ``--keep_best`` names.
    """
    from rlhf_min.harness.run.log import MetricsLog
    from rlhf_min.harness.run.saving import Saving, require_measured

    require_measured(options.keep_best, _stages(options, configs), monitors)
    changed = None if options.resume is None else _check_same(out, options, configs)
    processes.barrier()  # all have read what the first one is going to change
    seed_all((options, *configs))
    return MetricsLog(
        lambda: reopen_run(out) if options.resume is not None else open_run(out, options, *configs),
        report_to=options.report_to,
        saving=Saving(options.save_every, options.keep_last, options.keep_best),
        resumed=options.resume is not None,
        on_resume=None if changed is None else lambda: _write_record(out, changed),
        preflight=not options.skip_preflight,
    )


def _stages(options: Any, configs: Sequence[Any]) -> set[str]:
    """The stages that a command trains."""
    classes = {type(config) for config in configs}
    modules = [module for module in stage_modules().values() if module.CONFIG in classes]
    before = [x.trained_before(options) for x in modules if hasattr(x, "trained_before")]
    return {x.STAGE for x in modules}.union(*before)


def seed_all(configs: Sequence[Any]) -> None:
    """Seed the global generators by the first config that has a seed.

    We draw from generators of our own; a reward function of the user's may draw from these.
    """
    import numpy as np
    import torch

    seed = next((config.seed for config in configs if hasattr(config, "seed")), None)
    if isinstance(seed, int):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)


def open_run(out: Path, *configs: Any) -> Path:
    """Create the run's folder with `run.json`: when and how it began, configuration, versions.

    Raises:
        BadInput: if the folder cannot be made, or another process does not see it.
    """
    return _seen_by_all("--out", processes.on_main(lambda: _open(out, configs)))


def _open(out: Path, configs: Sequence[Any]) -> Path:
    try:
        if (out / RUN).is_file():
            require(
                any(getattr(config, "overwrite", False) for config in configs),
                f"--out {out}: another run has begun there; give another folder, or --overwrite",
            )
            require(not out.is_symlink(), f"--out {out} is a link to a run; give its own folder")
            _lock(out)
            if left := [path for path in clear(out) if path.name != LOCK]:
                print(f"left in {out}, since no run wrote it: {', '.join(map(str, left))}")
        out.mkdir(parents=True, exist_ok=True)
        _lock(out)
        begun = {
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": shlex.join([*started_by(), *sys.argv]),
        }
        _write_record(out, {**begun, "config": _config_values(configs), **_circumstances()})
    except OSError as error:
        reason = error.strerror or str(error)  # the latter where Python itself refuses
        raise BadInput(f"--out {out}: cannot be written: {reason}") from error
    return out


def reopen_run(out: Path) -> Path:
    """Remove what a killed process left half written, and say what differs from then.

    Raises:
        BadInput: if the folder cannot be written, another process is at this run, or one of those
            that are to go on with it does not see it.
    """
    return _seen_by_all("--resume", processes.on_main(lambda: _reopen(out)))


def _reopen(out: Path) -> Path:
    try:
        _lock(out)
        places = ("", f"{BEST}/", f"{LAST_GOOD}/", f"{CHECKPOINTS}/*/")
        for path in [path for place in places for path in out.glob(f"{place}.*")]:
            if not path.is_dir() or (left := left_over(path)) is None:
                continue
            whole, was_replaced = path.with_name(left[1]), left[2]
            if was_replaced and not whole.exists():  # killed between two renames
                print(f"put back, since what should have replaced it is not complete: {path}")
                path.rename(whole)
                continue
            print(f"removed, since it was only half written: {path}")
            discard(path, whole) if was_replaced else shutil.rmtree(path)
        record, now = {"processes": 1, **read_record(out)}, _circumstances()
        for name in now:
            if record.get(name) != now[name]:
                print(f"{name} was {record.get(name)}, now {now[name]}: the bits may differ")
    except OSError as error:
        raise BadInput(f"--resume {out}: cannot be written: {error.strerror}") from error
    return out


def _seen_by_all(option: str, out: Path) -> Path:
    """The folder, which processes on other machines must share."""
    _held.setdefault(out.resolve(), None)  # the lock is that of the first process
    require(
        (out / RUN).is_file(),
        f"{option} {out} is not there for all processes; give a folder that all machines share",
    )
    return out


def read_record(run: Path) -> dict[str, Any]:
    """What `run.json` says.

    Raises:
        BadInput: if there is none, it is not what `open_run` wrote, or links lead out of the run.
    """
    file = run / RUN
    require(file.is_file(), f"--resume {run} holds no {RUN}, so it is not a run")
    for path in run.rglob("*"):
        require(
            not path.is_symlink() or "wandb" in path.parts,
            f"--resume {run}: {path} is a link, and no run writes any; remove it",
        )
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        require(
            all(isinstance(values, dict) for values in record["config"].values()),
            f"{file} cannot be read: config holds no options",
        )
        return dict(record)
    except BadInput:
        raise
    except _UNREADABLE as error:
        raise BadInput(f"{file} cannot be read; put it back as the run wrote it") from error


def recorded(config_class: type, given: Collection[str], run: Path) -> dict[str, Any]:
    """What a run was started with of this class, but for what the command line gives.

    Raises:
        BadInput: if another command made the run, or its record has a value that no option takes.
    """
    of_all, name = read_record(run)["config"], config_class.__name__
    require(
        name in of_all,
        f"--resume {run} was started by another command: it has no {name} but {', '.join(of_all)}",
    )
    hints, values = typing.get_type_hints(config_class), {}
    for field in fields(config_class):
        if field.name in of_all[name].keys() - set(given) - OF_THE_START:
            value = _from_json(of_all[name][field.name], hints[field.name])
            require(
                _fits(value, hints[field.name]),
                f"{run / RUN}: {name}.{field.name} cannot be {value!r}",
            )
            values[field.name] = value
    return values


def run_seed(run: Path) -> int:
    """The seed of a run, from its `run.json`; 0 if this folder holds no run.

    Raises:
        BadInput: if `run.json` is not what `open_run` wrote.
    """
    if not (run / RUN).is_file():
        return 0
    try:
        configs = json.loads((run / RUN).read_text(encoding="utf-8"))["config"].values()
        seed = next(config["seed"] for config in configs if "seed" in config)
        require(type(seed) is int and 0 <= seed <= 2**31, f"{seed!r} is no seed")
        return int(seed)
    except (*_UNREADABLE, StopIteration) as error:
        raise BadInput(f"{run / RUN} cannot be read; give --seed") from error


def how_to_go_on() -> str:
    """How the run that this process is at is taken up again, if it has a checkpoint; else ""."""
    for out in _held:
        try:
            has_checkpoint = any(out.glob("checkpoints/*/step-*"))
        except OSError:  # then nobody knows
            has_checkpoint = True
        if has_checkpoint:
            return f"; go on with: {to_resume(out)}"
    return ""


def _lock(out: Path) -> None:
    """Keep other processes from this run until this one ends, however it ends."""
    if out.resolve() in _held:
        return
    file = (out / LOCK).open("w")
    try:
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.close()
            raise BadInput(f"{out}: another process is at this run; wait until it ends") from error
        # else a file system without locks
    _held.clear()
    _held[out.resolve()] = file


def _check_same(out: Path, options: Any, configs: tuple[Any, ...]) -> dict[str, Any] | None:
    """The run's record with what has changed, if anything has; by permission only."""
    record, now = read_record(out), _config_values((options, *configs))
    changed = {}
    for config in (options, *configs):
        name = type(config).__name__
        values, recorded = now[name], record["config"].get(name, {})
        # An option that did not exist when the run was started had what is now its default.
        was = {**_json_values(_defaults(config)), **recorded}
        for key in values:
            if key not in FREE and was.get(key) != values[key]:
                changed[f"{name}.{key}"] = [was.get(key), values[key]]
    if not changed:
        return None
    differences = ", ".join(f"{name} {was} -> {is_now}" for name, (was, is_now) in changed.items())
    require(
        options.allow_config_change,
        f"--resume {out}: another configuration than it was started with: {differences}; leave "
        "these out, or give --allow_config_change",
    )
    print(f"configuration changed: {differences}")
    record["changes"] = [*record.get("changes", []), changed]
    record["config"] = {**record["config"], **now}
    return record


def _write_record(out: Path, record: Mapping[str, Any]) -> None:
    write_file(out / RUN, json.dumps(record, indent=2) + "\n")


def _circumstances() -> dict[str, Any]:
    import torch

    return {
        "versions": {name: version(name) for name in PACKAGES},
        "processes": processes.size(),
        "threads": torch.get_num_threads(),
    }


def _config_values(configs: Sequence[Any]) -> dict[str, dict[str, Any]]:
    return {type(config).__name__: _json_values(asdict(config)) for config in configs}


def _defaults(config: Any) -> dict[str, Any]:
    """Of its fields; all of them together may not make a config, where some must be given."""
    return {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(config)
        if (field.default, field.default_factory) != (MISSING, MISSING)
    }


def _json_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON, which has no infinity: it becomes the word that the command line understands."""
    return {k: str(v) if v in (math.inf, -math.inf) else v for k, v in values.items()}


def _from_json(value: Any, hint: Any) -> Any:
    is_number = isinstance(value, str) and value in ("inf", "-inf") and _fits(1.0, hint)
    return float(value) if is_number else value


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a config field's type."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return value in inner
    if origin is list:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if inner:  # a union
        return any(_fits(value, one) for one in inner)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is hint
