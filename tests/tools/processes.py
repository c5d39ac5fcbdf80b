"""How much faster two processes are than one, of one thread each, and how much memory each takes.

    python tests/tools/processes.py --out processes.json

DPO, and PPO with a separate critic, on GPT-2 small in fp32 with random weights. Runs of one
process and of two alternate, each by ``torchrun``, and there is one of two among which the weights
are split. A step ends when the slowest process is there.
"""

import argparse
import json
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import find_helpers  # noqa: F401
import torch
from benchmark import settings
from benchmark.models import SIZES, Size, policy_tokenizer
from benchmark.workloads import Rollouts, dpo_pairs
from launch import torchrun
from transformers import GPT2LMHeadModel

from rlhf_min import distributed, dpo, ppo
from rlhf_min.data import PreferenceExample, PromptExample
from rlhf_min.policy import Policy
from rlhf_min.speed.sharding import shard

FASTER, SMALLER = 1.75, 0.62  # what two processes promise: of the speed, and of PPO's memory
KINDS = {"one": (1, []), "two": (2, []), "two, sharded": (2, ["--sharded"])}
SECONDS = 3600.0  # the most that one run may take


def policy_of(size: Size, critic: Any) -> Policy:
    """GPT-2 without dropout, the same in each process."""
    torch.manual_seed(settings.SEED)
    return Policy(GPT2LMHeadModel(size.gpt2_config()), policy_tokenizer(size), critic=critic)


def dpo_steps(size: Size) -> Iterator[Any]:
    """Each of the size's pairs, in several micro-batches; the reference is asked each time."""
    policy = policy_of(size, "none")
    ref_policy = shard(policy.reference())
    shard(policy)
    ids = torch.tensor
    pairs = [
        PreferenceExample(ids(p.prompt), ids([*p.chosen, 0]), ids([*p.rejected, 0]))
        for p in dpo_pairs(size)
    ]
    config = dpo.DPOConfig(
        epochs=1000, batch_size=size.pairs, max_tokens=320, cache_reference=False
    )
    state = dpo.new_state(policy, ref_policy, pairs, config)
    return dpo.train(policy, ref_policy, config, state)


def ppo_steps(size: Size) -> Iterator[Any]:
    """A rollout of 64 prompts, learned from in two minibatches."""
    size = replace(size, prompts=64)
    policy = policy_of(size, "separate")
    ref_policy = shard(policy.reference())
    shard(policy)
    prompts = [
        PromptExample(f"p{i}", torch.tensor(ids))
        for i, ids in enumerate(Rollouts.draw(size).prompts)
    ]
    config = ppo.PPOConfig(
        steps=1000,
        batch_size=size.prompts,
        minibatch_size=size.prompts // 2,
        epochs=1,
        critic="separate",
        max_new_tokens=size.max_new_tokens // 2,  # random weights never end
        max_tokens=160,
        learning_rate=settings.LEARNING_RATE,
    )
    state = ppo.new_state(policy, prompts, config)
    return ppo.train(policy, ref_policy, noise, config, state)


def noise(_prompts: list[str], responses: list[str]) -> list[float]:
    """A reward that costs nothing."""
    return [random.Random(response).gauss(0, 1) for response in responses]


STEPS = {"dpo": dpo_steps, "ppo": ppo_steps}
STEPS_OF_A_RUN = {"dpo": 3, "ppo": 1}


def work(options: argparse.Namespace) -> None:
    """What each process does; the first writes what it took."""
    torch.set_num_threads(1)
    distributed.start()
    distributed._world.sharded = options.sharded
    steps = STEPS[options.work](SIZES[options.size])
    seconds = []
    for _ in range(options.steps):
        distributed.barrier()
        started = time.perf_counter()
        next(steps)
        distributed.barrier()
        seconds.append(time.perf_counter() - started)
    kilobytes = distributed.largest(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    if distributed.is_main():
        found = {"seconds": seconds, "bytes": 1024 * kilobytes}
        Path(options.out).write_text(json.dumps(found), encoding="utf-8")
    distributed.end()


def measure(algorithm: str, options: argparse.Namespace) -> dict[str, Any]:
    """All kinds in turn, so many times: seconds of the steps, and the most bytes of a process."""
    found: dict[str, Any] = {kind: {"seconds": [], "bytes": []} for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "found.json")
        common = ["--work", algorithm, "--size", options.size, "--steps", STEPS_OF_A_RUN[algorithm]]
        for i in range(options.rounds):
            for kind, (n, more) in KINDS.items():
                if i > 0 and "--sharded" in more:
                    continue  # it is there for its memory
                torchrun(n, Path(__file__), *common, *more, "--out", out, seconds=SECONDS)
                run = json.loads(out.read_text(encoding="utf-8"))
                found[kind]["seconds"] += run["seconds"]
                found[kind]["bytes"].append(run["bytes"])
    return found | {
        "speed": {kind: ratio(found["one"], of, "seconds") for kind, of in found.items()},
        "memory": ratio(found["two, sharded"], found["two"], "bytes"),
    }


def ratio(one: dict[str, list[float]], other: dict[str, list[float]], what: str) -> float:
    """Of their medians."""
    return statistics.median(one[what]) / statistics.median(other[what])


def told(algorithm: str, found: dict[str, Any]) -> str:
    """The figures of an algorithm, a line for each kind."""
    lines = []
    for kind in KINDS:
        seconds, gigabytes = found[kind]["seconds"], max(found[kind]["bytes"]) / 1e9
        lines.append(
            f"{algorithm}, {kind}: a step {statistics.median(seconds):.2f} s "
            f"({min(seconds):.2f}-{max(seconds):.2f}), {found['speed'][kind]:.2f} times as fast as "
            f"one; {gigabytes:.2f} GB a process"
        )
    return "\n".join(lines)


def main() -> int:
    """The script; 0 if what is promised holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="Only for the processes themselves.")
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--out", help="JSON file to write.")
    parser.add_argument("--work", choices=list(STEPS), help="The same.")
    parser.add_argument("--sharded", action="store_true", help="The same.")
    options = parser.parse_args()
    if options.work:
        work(options)
        return 0
    found = {}
    for algorithm in STEPS:
        found[algorithm] = measure(algorithm, options)
        print(told(algorithm, found[algorithm]), flush=True)
    if options.out:
        Path(options.out).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    slow = any(of["speed"]["two"] < FASTER for of in found.values())
    return int(slow or found["ppo"]["memory"] > SMALLER)


if __name__ == "__main__":
    sys.exit(main())
