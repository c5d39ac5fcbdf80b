"""One side in a process of its own. It waits for "run", works one round, answers, and waits again.

    python -m benchmark.worker SIDE TASK

A word on stdin and a line of JSON on stdout for each round; what libraries print goes to stderr.
"""

import importlib
import json
import os
import sys

import torch

from benchmark.commands import Commands
from benchmark.workloads import Task


def main() -> None:
    side, task = sys.argv[1], Task(**json.loads(sys.argv[2]))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    module = importlib.import_module(f"benchmark.{side}")
    work = module.gauge if side == "gauge" else getattr(module, task.workload)
    work(task, Commands())


if __name__ == "__main__":
    main()
