"""The parent's end of the line: each side of a comparison is a process that it wakes in turn."""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmark.workloads import Task
from rlhf_min.errors import BadInput

EXAMPLES = Path(__file__).parent.parent
LARGE_BLOCKS = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:"
    "glibc.malloc.trim_threshold=8589934592"
)
NO_MEMORY = ("can't allocate memory", "MemoryError")


@dataclass(frozen=True)
class Side:
    """One library in one precision.

    Args:
        label: of the library, with its version.
        module: what works, of ``benchmark``.
        precision: "fp32", "bf16", or another that the module knows.
        python: of the environment it runs in.
        own_critic: see `benchmark.flops.useful`.
    """

    label: str
    module: str
    precision: str
    python: str
    own_critic: bool = False

    @property
    def name(self) -> str:
        """For a row of a table."""
        return f"{self.label} {self.precision}"


@dataclass
class Played:
    """What a side answered: when it was ready, and after each round, of which one is a warm-up."""

    side: Side
    ready: dict[str, Any] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    killed: str = ""  # why, if it did not live to the end

    @property
    def counted(self) -> list[dict[str, Any]]:
        """The rounds without the warm-up."""
        return self.rounds[1:]


class Killed(Exception):
    """A side has been ended by the system, or could not get the memory that it asked for."""


def environment(*, threads: int, large_blocks: bool) -> dict[str, str]:
    """The variables of all sides."""
    same = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "PYTHONWARNINGS": "ignore",
    }
    rest = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", "PYTHONPATH")}
    return rest | same | ({"GLIBC_TUNABLES": LARGE_BLOCKS} if large_blocks else {})


class Worker:
    """A process that works a round whenever it is told to, and else sleeps.

    Args:
        side: what it runs.
        task: on what; its precision is the side's.
        variables: of its environment.

    Raises:
        Killed: if there was no memory to load the models.
        BadInput: if it ended otherwise, with the last line that it wrote.
    """

    def __init__(self, side: Side, task: Task, variables: dict[str, str]) -> None:
        task = replace(task, precision=side.precision)
        self.side = side
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        self._process = subprocess.Popen(
            [side.python, "-m", "benchmark.worker", side.module, json.dumps(asdict(task))],
            cwd=EXAMPLES,
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
        )
        self.ready = self._answer()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def round(self) -> dict[str, Any]:
        """Work one round and say what came of it."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended; the missing answer says why
            print("run", file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return dict(json.loads(line))
        code = self._process.wait()
        if code < 0:
            raise Killed(f"killed by {signal.Signals(-code).name}")
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        last = lines[-1] if lines else f"exit code {code}"
        if any(words in last for words in NO_MEMORY):
            raise Killed("out of memory")
        raise BadInput(f"{self.side.name} in {self.side.python} failed: {last}")
