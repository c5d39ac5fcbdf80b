"""Several processes that work together: forks of this one, or what ``torchrun`` starts."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_min import distributed

SECONDS = 60.0  # the most that processes may take; whoever waits for another one waits for ever


def in_processes(n: int, work: Callable[[], Any], *, seconds: float = SECONDS) -> list[Any]:
    """What `work` returns, without tensors, in each of n processes that have joined each other.

    They are forks: they have all that is imported, and patched, in this one. What one of them
    raises fails the test, and so does waiting longer than `seconds`.
    """
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(n)]
    port = free_port()
    processes = [
        context.Process(target=_join, args=(rank, n, port, work, pipes[rank][1]))
        for rank in range(n)
    ]
    for process in processes:
        process.start()
    try:
        return _received([receiver for receiver, _ in pipes], processes, seconds)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _received(receivers: list[Connection], processes: list[Any], seconds: float) -> list[Any]:
    found: dict[int, Any] = {}
    until = time.monotonic() + seconds
    while len(found) < len(receivers):
        waiting = [rank for rank in range(len(receivers)) if rank not in found]
        ends = [end for rank in waiting for end in (receivers[rank], processes[rank].sentinel)]
        wait(ends, max(0.0, until - time.monotonic()))
        for rank in waiting:
            code = processes[rank].exitcode
            if receivers[rank].poll():
                error, found[rank] = receivers[rank].recv()
                if error is not None:
                    pytest.fail(f"process {rank} of {len(receivers)}:\n{error}", pytrace=False)
            elif code is not None:
                pytest.fail(f"process {rank} of {len(receivers)} ended with {code}")
        if time.monotonic() > until and len(found) < len(receivers):
            pytest.fail(f"processes {waiting} are not done after {seconds:g} s")
    return [found[rank] for rank in range(len(receivers))]


def _join(rank: int, n: int, port: int, work: Callable[[], Any], sender: Connection) -> None:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in places.items()}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(1)
    torch.cuda.is_available = lambda: False  # a fork could not use what this process has begun
    try:
        distributed.start()
        result = work()
        distributed.end()
    except BaseException:
        sender.send((traceback.format_exc(), None))
    else:
        sender.send((None, result))


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def torchrun(
    n: int, script: Path, *arguments: Any, seconds: float = SECONDS, gpus: bool = False
) -> str:
    """Run a script in n processes, of one thread each, on the CPU or on a GPU each; what they say.

    It fails the test if a process fails, or if they take longer than `seconds`.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(n), str(script), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    if not gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    late = False
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        late = True
        process.send_signal(signal.SIGTERM)  # which torchrun hands on
        said, _ = process.communicate()
    if late or process.returncode:
        how = f"not done after {seconds:g} s" if late else f"exit code {process.returncode}"
        pytest.fail(f"{' '.join(command[1:])}: {how}\n{said[-6000:]}", pytrace=False)
    return said
