"""Kill training runs by SIGKILL, resume them, and compare with the run that was never killed.

    python tests/tools/torture.py --kills 100

Half of the kills come at random moments, half at named points of saving. Each resumed run must have
the same bits as the uninterrupted one in its weights, its optimizer and random states, its metrics
but for times, and its samples. Small models; every run is a process of its own, or with
--processes several, of which one is killed, or their launcher.
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import find_helpers  # noqa: F401
import torch
from small import small_policy, small_reward_model
from tqdm.auto import tqdm

from rlhf_min.harness import models  # noqa: F401 (what a command imports late, each fork has)
from rlhf_min.harness.report import finish  # noqa: F401
from rlhf_min.harness.run import atomic, checkpoint
from rlhf_min.harness.run.saved_models import save_policy, save_reward_model
from rlhf_min.harness.stages import dpo, grpo, kto, ppo, reward, rloo, sft  # noqa: F401

EXAMPLES = Path(__file__).parents[2] / "examples"
ALGORITHMS = {"sft": "train_sft", "reward_model": "train_reward_model"}
ALGORITHMS |= {"ppo": "train_ppo", "grpo": "train_grpo", "rloo": "train_rloo"}
ALGORITHMS |= {"dpo": "train_dpo", "kto": "train_kto"}
COMMON = ["--max_length", "16", "--max_response_tokens", "6"]
COMMON += ["--threads", "1", "--save_every", "2", "--eval_every", "3"]
OPTIONS = {
    "sft": ["--epochs", "2", "--batch_size", "4"],
    "reward_model": ["--epochs", "2", "--batch_size", "4"],
    "ppo": ["--steps", "10", "--batch_size", "8", "--minibatch_size", "4", "--max_new_tokens", "4"],
    "dpo": ["--epochs", "2", "--batch_size", "4"],
    "kto": ["--epochs", "2", "--batch_size", "8"],  # of each pair two rows
}
OPTIONS["grpo"] = [*OPTIONS["ppo"], "--group_size", "2"]
OPTIONS["rloo"] = OPTIONS["grpo"]
OPTIONS["ppo"] = [*OPTIONS["ppo"], "--kl_control", "adaptive", "--normalise_scores"]
AFTER = 10.0  # seconds in which all processes are gone when one was killed
SAMPLING = {"ppo", "grpo", "rloo"}


def die() -> NoReturn:
    """As a power cut: nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


# Named points: each replaces a function of saving, in the process that is to die at its n-th call.


def at_call(module: Any, name: str, n: int, death: Callable[..., Any]) -> None:
    """At the n-th call, `death` gets the function and its arguments."""
    function, calls = getattr(module, name), itertools.count(1)

    def patched(*args: Any, **kwargs: Any) -> Any:
        dies = next(calls) == n
        return death(function, *args, **kwargs) if dies else function(*args, **kwargs)

    setattr(module, name, patched)


def before(*_: Any, **__: Any) -> None:
    """Die when the function is called."""
    die()


def after(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Die when the function has done its work."""
    function(*args, **kwargs)
    die()


def half_a_file(save: Callable[..., Any], tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Die when half of a file is written."""
    save(tensors, file)
    os.truncate(file, file.stat().st_size // 2)
    die()


def half_deleted(_: Callable[..., Any], checkpoint: Path) -> None:
    """Die when an old checkpoint has lost a file and still has others."""
    next(checkpoint.glob("*.safetensors")).unlink()
    die()


POINTS: dict[str, Callable[[int], None]] = {
    "before writing": lambda n: at_call(checkpoint, "begin", n, before),
    "in the middle of a file": lambda n: at_call(checkpoint, "save_file", n, half_a_file),
    "before fsync": lambda n: at_call(atomic, "flush", 2 * n, before),
    "before the rename": lambda n: at_call(atomic.os, "rename", n, before),
    "after the rename": lambda n: at_call(atomic.os, "rename", n, after),
    "before deleting the old": lambda n: at_call(checkpoint, "keep", n, before),
    "while deleting the old": lambda n: at_call(checkpoint, "remove", n, half_deleted),
}


# Runs


def command_line(algorithm: str, work: Path) -> list[str]:
    """The options of a run, but for its folder."""
    options = [*COMMON, *OPTIONS[algorithm], "--data", str(work / "rows.jsonl")]
    if algorithm != "reward_model":
        options += ["--model", str(work / "sft")]
    if algorithm == "reward_model" or algorithm in SAMPLING:
        options += ["--reward_model", str(work / "reward_model")]
    return options


def start(
    command: str,
    arguments: list[str],
    log: Path,
    point: Callable[[], None],
    environment: Mapping[str, str] | None = None,
) -> int:
    """Start a command in a fork, which has everything imported; its process id.

    Args:
        command: the name of its file, or of the algorithm that it trains.
        point: called before it.
    """
    process = os.fork()
    if process:
        return process
    os.environ |= environment or {}
    with log.open("a", encoding="utf-8") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        for number, name in enumerate(("stdout", "stderr"), start=1):
            stream = os.fdopen(number, "w", buffering=1, encoding="utf-8", closefd=False)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        # Bars share a lock between forks, and whoever is killed may hold it.
        tqdm.set_lock(threading.RLock())
        point()
        sys.argv = [f"{ALGORITHMS.get(command, command)}.py", *arguments]
        code: Any = 0
        try:
            (MODULES.get(command) or load(command)).main()
        except SystemExit as error:
            code = error.code
        except BaseException:
            traceback.print_exc()
            code = 99
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(int(code or 0))


def environments(n: int) -> list[dict[str, str]]:
    """What ``torchrun`` tells each of n processes on one machine."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # free a moment later
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": n}
    common["LOCAL_WORLD_SIZE"] = n
    ranks = [{**common, "RANK": rank, "LOCAL_RANK": rank} for rank in range(n)]
    return [{name: str(value) for name, value in of_rank.items()} for of_rank in ranks]


def launch(
    algorithm: str,
    arguments: list[str],
    log: Path,
    n: int,
    point: Callable[[], None] = lambda: None,
) -> tuple[int, list[int]]:
    """Start a command in n processes, below one that does what ``torchrun`` does: if one of them
    fails it stops the others.

    Args:
        point: called before it in the first process, which alone writes.

    Returns:
        The process id of the launcher, which ends with 0 if all do, and those of the others.
    """
    if n == 1:
        process = start(algorithm, arguments, log, point)
        return process, [process]
    reader, writer = os.pipe()
    launcher = os.fork()
    if launcher:
        os.close(writer)
        with os.fdopen(reader, encoding="utf-8") as lines:
            return launcher, [int(line) for line in lines]
    os.close(reader)
    processes = [
        start(
            algorithm,
            arguments,
            log,
            partial(first_of_all, writer, point if own["RANK"] == "0" else None),
            {**own, "TORCHELASTIC_RUN_ID": "none"},
        )
        for own in environments(n)
    ]
    with os.fdopen(writer, "w", encoding="utf-8") as lines:
        lines.writelines(f"{process}\n" for process in processes)
    failed, running = False, set(processes)
    while running:
        process, status = os.wait()
        running.remove(process)
        if status and not failed:
            failed = True
            for other in running:
                os.kill(other, signal.SIGTERM)
    os._exit(int(failed))


def first_of_all(writer: int, point: Callable[[], None] | None) -> None:
    """What a process does before its command: let go of the pipe that its launcher writes to."""
    os.close(writer)
    if point:
        point()


def wait_until_gone(processes: list[int], seconds: float) -> None:
    """Wait for processes, which may be nobody's children any more, at most so long."""
    until = time.monotonic() + seconds
    while left := [process for process in processes if is_alive(process)]:
        assert time.monotonic() < until, f"still there: {left}"
        time.sleep(0.05)


def is_alive(process: int) -> bool:
    """Whether it runs; one that has ended and that nobody has asked for does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return state.rpartition(")")[2].split()[0] != "Z"


def wait(process: int) -> int:
    """How it ended: the exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def arguments_for(algorithm: str, work: Path, run: Path) -> list[str]:
    """To start the run, or to go on with it."""
    started = (run / "run.json").exists()
    return (
        ["--resume", str(run)] if started else [*command_line(algorithm, work), "--out", str(run)]
    )


def result(run: Path) -> dict[str, Any]:
    """All that must be equal: tensors by the bytes of their files, records and rows as values."""
    found: dict[str, Any] = {
        str(file.relative_to(run)): file.read_bytes() for file in run.rglob("*.safetensors")
    }
    for file in run.glob("checkpoints/*/*/checkpoint.json"):
        record = json.loads(file.read_text(encoding="utf-8"))
        for name in ("sizes", "crc32"):  # the lines hold times, which are longer or shorter
            del record[name]
        found[str(file.relative_to(run))] = record
    for file in run.glob("*.jsonl"):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        found[file.name] = [
            {k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in rows
        ]
    for stage in {row["stage"] for row in found["metrics.jsonl"]}:
        steps = [row["step"] for row in found["metrics.jsonl"] if row["stage"] == stage]
        assert steps == list(range(1, len(steps) + 1)), f"rows of {stage}: {steps}"
    return found


@dataclass(frozen=True)
class Kill:
    """Where a run is killed.

    Args:
        name: of a point, or any other for a moment.
        where: from 0 to 1, from the first to the last one.
        victim: of several processes the number of the one that is killed at a moment, where the
            last one is the launcher. At a point it is the first, which alone writes.
    """

    name: str
    where: float
    victim: int


def kill_once(
    algorithm: str, work: Path, run: Path, log: Path, kill: Kill, seconds: float, n: int
) -> bool:
    """Start or resume a run of n processes and kill it; whether it was killed before its end."""
    point, lines = POINTS.get(kill.name), fault_lines(log)
    nth = 1 + int(4 * kill.where)  # of the few checkpoints that a run writes
    arguments = arguments_for(algorithm, work, run)
    launcher, processes = launch(
        algorithm, arguments, log, n, (lambda: point(nth)) if point else lambda: None
    )
    if not point:
        time.sleep(max(kill.where * seconds, 0.2 * (n > 1)))  # until they know their launcher
        with contextlib.suppress(ProcessLookupError):  # it has ended before
            os.kill([*processes, launcher][kill.victim], signal.SIGKILL)
    wait_until_gone([launcher, *processes], AFTER + 3 * seconds * bool(point))
    code = wait(launcher)
    assert code in (0, -signal.SIGKILL, n > 1), f"{kill}: exit code {code}, see {log}"
    assert fault_lines(log) - lines <= 1, f"{kill}: more than one line, see {log}"
    return code != 0


def fault_lines(log: Path) -> int:
    """How often it is said what was killed, or what else has failed."""
    return log.read_text(encoding="utf-8").count("error: ") if log.exists() else 0


def torture(kills: int, seed: int, work: Path, algorithms: list[str], n: int = 1) -> Counter[str]:
    """Kill and resume runs of n processes until there were so many kills; what happened how
    often."""
    rng, counts = random.Random(seed), Counter[str]()
    wanted: dict[str, dict[str, Any]] = {}
    seconds: dict[str, float] = {}
    prepare(work)
    for algorithm in algorithms:
        run, started = work / f"whole-{algorithm}", time.perf_counter()
        log = work / f"whole-{algorithm}.log"
        code = wait(launch(algorithm, arguments_for(algorithm, work, run), log, n)[0])
        assert code == 0, log.read_text(encoding="utf-8")
        seconds[algorithm] = time.perf_counter() - started
        wanted[algorithm] = result(run)
    names, number = list(POINTS), 0
    while counts["kills"] < kills:
        algorithm = algorithms[number % len(algorithms)]
        run, log = work / f"run-{number}", work / f"run-{number}.log"
        for again in range(2 if rng.random() < 0.2 else 1):  # now and then the resumed run too
            named = (number // len(algorithms) + again) % 2 == 0
            name = names[(number // (2 * len(algorithms))) % len(names)] if named else "any moment"
            victim = rng.randrange(n + 1) if n > 1 else 0
            kill = Kill(name, rng.random(), victim)
            if kill_once(algorithm, work, run, log, kill, seconds[algorithm], n):
                counts.update(["kills", f"kills of {algorithm}", f"kills {name}"])
                if n > 1:
                    killed = 0 if named else victim
                    whom = "the launcher" if killed == n else f"process {killed}"
                    counts[f"kills of {whom}"] += 1
        code = wait(launch(algorithm, arguments_for(algorithm, work, run), log, n)[0])
        found = result(run) if code == 0 else {}
        wrong = sorted(
            key
            for key in found.keys() | wanted[algorithm].keys()
            if found.get(key) != wanted[algorithm].get(key)
        )
        if wrong:
            counts["different"] += 1
            print(f"run {number}, {algorithm}: exit code {code}, different: {', '.join(wrong)}")
            print(log.read_text(encoding="utf-8"))
        number += 1
    counts["resumed runs"] = number
    return counts


def prepare(work: Path) -> None:
    """Rows and small models, once for all."""
    words = ["red", "blue", "green", "big", "small", "ball", "one", "two"]
    rows = [
        {
            "prompt": f"{words[i % 8]} {words[i // 8]}",
            "chosen": f"{words[i % 8]} ball",
            "rejected": "two two",
        }
        for i in range(28)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (work / "rows.jsonl").write_text(text, encoding="utf-8")
    save_policy(small_policy(dropout=0.1, dtype=torch.float32), work / "sft")
    save_reward_model(small_reward_model(dropout=0.1, dtype=torch.float32), work / "reward_model")


def load(name: str) -> Any:
    """The module of an example, without running it."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


MODULES = {algorithm: load(name) for algorithm, name in ALGORITHMS.items()}


def main(arguments: list[str] | None = None) -> int:
    """The script; 0 if no resumed run differed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="Of each run; one is killed.")
    parser.add_argument("--only", nargs="+", choices=list(ALGORITHMS), default=list(ALGORITHMS))
    parser.add_argument("--shard", action="store_true", help="Split what they train.")
    options = parser.parse_args(arguments)
    COMMON.extend(["--shard"] * options.shard)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        counts = torture(options.kills, options.seed, Path(work), options.only, options.processes)
    for what, count in sorted(counts.items()):
        print(f"{count:5} {what}")
    print(
        f"{counts['kills']} kills in {time.perf_counter() - started:.0f} s; "
        f"{counts['different']} of {counts['resumed runs']} resumed runs differ from the "
        "uninterrupted one"
    )
    return int(counts["different"] > 0)


if __name__ == "__main__":
    sys.exit(main())
