"""Several processes at one run: they end together, with one line, and the first alone writes."""

import errno
import itertools
import json
import os
import re
import signal
import sys
import time
from functools import partial

import pytest
import torch
import torture
from torture import at_call, before, command_line, die, environments, prepare, wait

from rlhf_min.errors import BadInput
from rlhf_min.harness import preflight
from rlhf_min.harness.cli import RunOptions
from rlhf_min.harness.rows.files import free_memory
from rlhf_min.harness.run import atomic, faults, folder, saving
from rlhf_min.harness.run.log import MetricsLog

NUMBERS = itertools.count()
LIMIT = 10.0  # seconds after a fault, until all processes are gone
REWARDS = """
import os

def broken(prompts, responses):
    raise ValueError("no such word")

def nan(prompts, responses):
    return [float("nan")] * len(prompts)
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    prepare(folder)
    (folder / "rewards.py").write_text(REWARDS, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def one(work):
    """A run of PPO by one process: what it printed, and its folder."""
    code, told = together(work, "ppo", 1, *command_line("ppo", work), "--out", work / "one")
    assert code == [0]
    return told, work / "one"


def together(work, command, n, *arguments, points=None, different=None):
    """Start a command in n processes, and wait for them.

    Args:
        points: what is done in a process, by its number, before the command.
        different: arguments that a process has in the place of all, by its number.

    Returns:
        The exit code of each, or minus the signal that killed it, and all that they printed.
    """
    log = work / f"log-{next(NUMBERS)}"
    processes = [
        torture.start(
            command,
            [str(x) for x in (different or {}).get(rank, arguments)],
            log,
            (points or {}).get(rank, lambda: None),
            environment,
        )
        for rank, environment in enumerate(environments(n))
    ]
    started = time.monotonic()
    codes = [wait(process) for process in processes]
    assert time.monotonic() - started < LIMIT + 10  # the steps before it are quick
    return codes, log.read_text(encoding="utf-8")


def errors_in(told):
    """The lines of errors; a bar may stand before one."""
    return re.findall(r"(?:process \d+: )?error: .*|Traceback|(?:process \d+: )?stopped .*", told)


def at_step(step, action):
    """Do this in a process when it has written a step."""
    at_call(MetricsLog, "_write", step, lambda write, *given: (write(*given), action()))


def rows_of(out):
    return [json.loads(row) for row in (out / "metrics.jsonl").read_text("utf-8").splitlines()]


def same_metrics(one, other):
    rows, others = rows_of(one), rows_of(other)
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, its in zip(rows, others, strict=True):
        assert row.keys() == its.keys()
        for name, value in row.items():
            if not name.startswith(("time/", "memory/")):
                assert its[name] == (value if value is None else pytest.approx(value, abs=1e-4))


def files_in(out):
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())


def test_two_leave_what_one_leaves(one, work, tmp_path):
    out = tmp_path / "two"
    codes, told = together(work, "ppo", 2, *command_line("ppo", work), "--out", out)
    assert codes == [0, 0]
    same_metrics(one[1], out)
    assert files_in(out) == files_in(one[1])
    for name in ("samples.jsonl", "tokens.jsonl"):
        lines = [len((run / name).read_text("utf-8").splitlines()) for run in (out, one[1])]
        assert lines[0] == lines[1]
    record = json.loads((out / "run.json").read_text("utf-8"))
    assert record["processes"] == 2
    assert record["command"].startswith("torchrun --nproc_per_node 2 train_ppo.py --max_length")
    # Each line is there once, and no other.
    plain = [re.sub(r"[\d.e+-]+|\S*/\S*", "#", text.splitlines()[-1]) for text in (told, one[0])]
    assert plain[0] == plain[1]
    assert told.count("\n") == one[0].count("\n")


def test_the_next_free_folder_is_one_for_all(work, tmp_path):
    """The first process looks for it; another one might look when the first has made it."""

    def never_looks():
        os.chdir(tmp_path)
        at_call(folder, "_folder_for", 1, before)

    points = {0: partial(os.chdir, tmp_path), 1: never_looks}
    for name in ("sft", "sft-2"):
        codes, told = together(work, "sft", 2, *command_line("sft", work), points=points)
        assert codes == [0, 0], told
        assert (tmp_path / "runs" / name / "metrics.jsonl").is_file()
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["sft", "sft-2"]


def in_folders(*folders):
    return {rank: partial(os.chdir, folder) for rank, folder in enumerate(folders)}


def test_a_folder_that_another_process_does_not_see(work, tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    folders = in_folders(tmp_path / "here", tmp_path / "there")
    codes, told = together(work, "sft", 2, *command_line("sft", work), points=folders)
    assert codes == [2, 2]
    assert errors_in(told) == [
        "process 1: error: --out runs/sft is not there for all processes; give a folder that all "
        "machines share"
    ]
    assert list((tmp_path / "there").iterdir()) == []


# Refused, or failed in all


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--learning_rate", "-1"], "error: SFTConfig: learning_rate is -1.0"),
        (["--device", "cuda:1"], "error: --device cuda:1 is one GPU for several processes"),
        (["--keep_best", "eval/taste"], "error: --keep_best eval/taste is measured by no stage"),
    ],
)
def test_what_is_refused_is_one_line(options, line, work, tmp_path):
    codes, told = together(
        work, "sft", 2, *command_line("sft", work), *options, "--out", tmp_path / "run"
    )
    assert codes == [2, 2]
    assert [error.startswith(line) for error in errors_in(told)] == [True], told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["broken", "nan"])
def test_a_reward_that_fails_fails_as_with_one_process(name, work, tmp_path):
    told = {}
    for n in (1, 2):
        arguments = [*command_line("ppo", work)[:-2], "--reward", f"{work}/rewards.py:{name}"]
        out = tmp_path / f"run-{n}"
        codes, text = together(work, "ppo", n, *arguments, "--skip_preflight", "--out", out)
        assert codes == [2] * n
        told[n] = [line.replace(str(out), "run") for line in errors_in(text)]
    assert len(told[1]) == 1
    assert told[2] == told[1]


def test_numbers_that_go_wrong_are_saved_before_all_end(work, tmp_path):
    """The first process writes the batch and the model while the others wait."""

    def slow_write():
        at_call(faults, "save_nonfinite", 1, lambda save, *given: (time.sleep(2), save(*given))[1])

    arguments = [*command_line("sft", work), "--learning_rate", "1e30", "--out", tmp_path / "run"]
    codes, told = together(work, "sft", 2, *arguments, points={0: slow_write})
    assert codes == [1, 1]
    (line,) = errors_in(told)
    assert "is not finite" in line
    assert not line.startswith("process")


# Failed in one


def failing(error):
    def action():
        raise error

    return action


@pytest.mark.parametrize("rank", [0, 1])
def test_a_file_that_one_process_lacks(rank, work, tmp_path):
    arguments = [*command_line("sft", work), "--out", str(tmp_path / "run")]
    other = [x.replace("rows.jsonl", "missing.jsonl") for x in arguments]
    codes, told = together(work, "sft", 2, *arguments, different={rank: other})
    assert codes == [2, 2]
    (line,) = errors_in(told)
    assert f"{'process 1: ' * rank}error: " in line
    assert "missing.jsonl" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_the_program_is_one_traceback(rank, work, tmp_path):
    error = failing(RuntimeError("out of tune"))
    codes, told = together(
        work,
        "sft",
        2,
        *command_line("sft", work),
        "--out",
        tmp_path / "run",
        points={rank: lambda: at_step(3, error)},
    )
    assert codes == [1, 1]
    assert errors_in(told) == ["Traceback"]
    assert "RuntimeError: out of tune" in told


def test_too_little_memory_in_one_process(work, tmp_path):
    point = {1: lambda: at_step(3, failing(MemoryError("42 GB")))}
    arguments = [*command_line("sft", work), "--out", tmp_path / "run"]
    codes, told = together(work, "sft", 2, *arguments, points=point)
    assert codes == [1, 1]
    (line,) = errors_in(told)
    assert line.startswith("process 1: error: out of memory (42 GB)")
    assert f"go on with: torchrun --nproc_per_node 2 train_sft.py --resume {tmp_path}" in line


def test_a_full_disk_of_the_first_ends_all(work, tmp_path):
    full = failing(OSError(errno.ENOSPC, "No space left on device"))
    point = {0: lambda: at_call(atomic.os, "rename", 2, lambda *_: full())}
    arguments = [*command_line("sft", work), "--out", tmp_path / "run"]
    codes, told = together(work, "sft", 2, *arguments, points=point)
    assert codes == [2, 2]
    (line,) = errors_in(told)
    assert "could not be saved: No space left on device" in line


# Killed


@pytest.mark.parametrize(("rank", "more"), [(0, []), (1, ["--shard"]), (2, [])])
def test_a_killed_process_ends_all_with_one_line(rank, more, work, tmp_path):
    arguments = [*command_line("ppo", work), *more, "--out", tmp_path / "run"]
    codes, told = together(work, "ppo", 3, *arguments, points={rank: lambda: at_step(5, die)})
    assert codes == [-signal.SIGKILL if rank == x else 1 for x in range(3)]
    assert errors_in(told) == [
        f"error: process {rank} was killed, perhaps for want of memory; go on with: "
        f"torchrun --nproc_per_node 3 train_ppo.py --resume {tmp_path / 'run'}"
    ]


def test_a_killed_launcher_ends_all(work, tmp_path):
    log = work / "launched"
    arguments = [*command_line("ppo", work), "--steps", "100000", "--out", str(tmp_path / "run")]
    launcher, processes = torture.launch("ppo", arguments, log, 2)
    while not (tmp_path / "run" / "checkpoints" / "ppo" / "step-000002").is_dir():
        time.sleep(0.05)
    os.kill(launcher, signal.SIGKILL)
    wait(launcher)
    torture.wait_until_gone(processes, LIMIT)
    (line,) = errors_in(log.read_text("utf-8"))
    assert line.startswith("error: the launcher was killed; go on with: torchrun")


# Stopped


@pytest.mark.parametrize(("rank", "number"), [(0, signal.SIGINT), (1, signal.SIGTERM)])
def test_a_signal_to_one_stops_all_after_the_same_step(rank, number, one, work, tmp_path):
    out = tmp_path / "run"
    point = {rank: lambda: at_step(3, lambda: os.kill(os.getpid(), number))}
    codes, told = together(work, "ppo", 2, *command_line("ppo", work), "--out", out, points=point)
    assert codes == [128 + number] * 2
    assert errors_in(told) == [
        "stopped by a signal after step 3 of 10 of ppo; saved; go on with: torchrun "
        f"--nproc_per_node 2 train_ppo.py --resume {out}"
    ]
    assert [row["step"] for row in rows_of(out)] == [1, 2, 3]
    assert (out / "report.html").is_file()
    codes, told = together(work, "ppo", 1, "--resume", out)
    assert codes == [0], told
    assert "processes was 2, now 1: the bits may differ" in told
    same_metrics(one[1], out)
    assert files_in(out) == files_in(one[1])


def test_a_run_goes_on_with_more_processes(one, work, tmp_path):
    out, arguments = tmp_path / "run", command_line("ppo", work)
    point = {0: lambda: at_step(5, lambda: os.kill(os.getpid(), signal.SIGTERM))}
    assert together(work, "ppo", 1, *arguments, "--out", out, points=point)[0] == [143]
    codes, told = together(work, "ppo", 3, "--resume", out)
    assert codes == [0, 0, 0], told
    assert "processes was 1, now 3: the bits may differ" in told
    same_metrics(one[1], out)


@pytest.mark.parametrize("ranks", [[0], [1], [0, 1]])
def test_a_signal_beside_the_steps_stops_all_at_once(ranks, work, tmp_path):
    def point():
        at_call(preflight, "run", 1, lambda *_: os.kill(os.getpid(), signal.SIGTERM))

    arguments = [*command_line("sft", work), "--out", tmp_path / "run"]
    codes, told = together(work, "sft", 2, *arguments, points=dict.fromkeys(ranks, point))
    assert codes == [143, 143]
    (line,) = errors_in(told)
    assert line.endswith("stopped at once; what was saved before is as it was")


def test_the_clock_of_one_process_has_all_save(work, tmp_path):
    arguments = command_line("sft", work)
    every = arguments.index("--save_every")
    del arguments[every : every + 2]

    def quick():
        saving.SAVE_SECONDS = 0.0

    out = tmp_path / "run"
    arguments += ["--keep_last", "99", "--out", out]
    codes, told = together(work, "sft", 2, *arguments, points={1: quick})
    assert codes == [0, 0], told
    assert len(list((out / "checkpoints" / "sft").iterdir())) == len(rows_of(out))


# Where they are, and what there is none for


def test_each_process_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in environments(2)[1].items():
        monkeypatch.setenv(name, value)
    for name in ("auto", "cuda"):
        assert RunOptions(device=name).torch_device("policy_device") == torch.device("cuda:1")
    apart = RunOptions(device="auto", reward_device="cpu")
    assert apart.torch_device("reward_device") == torch.device("cpu")
    with pytest.raises(BadInput, match="--reward_device cuda:0 is one GPU for several processes"):
        RunOptions(reward_device="cuda:0").torch_device("reward_device")


def test_processes_share_the_memory_of_their_machine(monkeypatch):
    for name, value in environments(4)[1].items():
        monkeypatch.setenv(name, value)
    share = preflight.available_bytes(torch.device("cpu")) / free_memory()
    assert share == pytest.approx(0.25, rel=0.1)


@pytest.mark.parametrize(
    "command",
    ["chat", "compare_with_trl", "benchmark_vs_trl", "frontier", "overoptimization", "make_report"],
)
def test_a_command_for_one_process_says_so(command, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{command}.py"])
    for name, value in environments(2)[0].items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match="; start it with python, not with torchrun"):
        torture.load(command).main.__wrapped__()
