"""Does one PPO iteration of ours keep its pace and its memory as the work grows?

More prompts in a rollout at the same minibatch, and longer rows. One epoch each; the update's
optimizer steps are then as many for each prompt in both.
"""

import contextlib
import statistics
import sys
from typing import Any

from benchmark.flops import useful
from benchmark.sides import Side, Worker, environment
from benchmark.workloads import Task

GROWTHS = {
    "from 16 to 128 prompts": ("short", "128 prompts"),
    "from 32 to 256 tokens": ("32 tokens", "256 tokens"),
}


def measure(size: str, folder: str, *, rounds: int, threads: int) -> dict[str, dict[str, Any]]:
    """A warm-up of the small and of the large work, then rounds of both in turn."""
    found = {}
    for name, changes in GROWTHS.items():
        tasks = [Task("ppo", f"{size} {change}", "fp32", folder) for change in changes]
        side = Side("rlhf_min", "ours", "fp32", sys.executable)
        variables = environment(threads=threads, large_blocks=False)
        with contextlib.ExitStack() as stack:
            workers = [stack.enter_context(Worker(side, task, variables)) for task in tasks]
            played = [[worker.round() for worker in workers] for _ in range(rounds + 1)][1:]
        found[name] = compare(tasks, played)
        print(told(name, found[name]), flush=True)
    return found


def compare(tasks: list[Task], played: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """How time and necessary work for each token, and peak memory, grow from the first task to the
    second; `played` are both answers of each round."""
    pace = [
        [answer["seconds"]["all"] / answer["tokens"] for answer in answers] for answers in played
    ]
    ratios = [large / small for small, large in pace]
    small_work, large_work = (flops_per_token(task) for task in tasks)
    return {
        "time_per_token": statistics.median(ratios),
        "time_per_token_min": min(ratios),
        "time_per_token_max": max(ratios),
        "work_per_token": large_work / small_work,
        "memory": played[-1][1]["peak"] / played[-1][0]["peak"],
        "peak_bytes": [answer["peak"] for answer in played[-1]],
        "seconds": [[answer["seconds"]["all"] for answer in answers] for answers in played],
    }


def flops_per_token(task: Task) -> float:
    """That a round needs, attention included."""
    expected = task.expected()
    found = useful("ppo", task.size, expected.lengths, own_critic=False)["all"]
    return (found.trunk + found.head) / expected.tokens


def told(name: str, growth: dict[str, Any]) -> str:
    """One line."""
    small, large = (peak / 1e9 for peak in growth["peak_bytes"])
    return (
        f"PPO {name}: time for each token times {growth['time_per_token']:.2f} "
        f"({growth['time_per_token_min']:.2f}-{growth['time_per_token_max']:.2f}), work for each "
        f"token times {growth['work_per_token']:.2f}, peak memory times {growth['memory']:.3f} "
        f"({small:.2f} to {large:.2f} GB)"
    )
