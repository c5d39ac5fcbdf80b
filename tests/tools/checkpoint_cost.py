"""What checkpoints cost at the sizes of the bench, and how long a resume takes.

    python tests/tools/checkpoint_cost.py

GPT-2 small in fp32 with random weights. Steps without and with a checkpoint before them alternate;
the cost is the time until the next step may go on, what that step takes longer beside the rest of
the checkpoint, and what of this is left after it, over ten steps.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from benchmark import settings
from benchmark.models import SIZES, policy_tokenizer, save_models
from benchmark.workloads import Rollouts, dpo_pairs
from transformers import AutoModelForCausalLM

from rlhf_min import dpo, ppo
from rlhf_min.data import PreferenceExample, PromptExample
from rlhf_min.harness.run import checkpoint
from rlhf_min.harness.run.checkpoint import Checkpoint, Snapshot, Writer
from rlhf_min.policy import Policy

SIZE = SIZES["small"]
EVERY, SHARE, RESUME_SECONDS = 10, 0.05, 15.0


def policy_of(folder: Path, critic: Any) -> Policy:
    """GPT-2 small, without dropout."""
    lm = AutoModelForCausalLM.from_pretrained(folder / "lm")
    return Policy(lm, policy_tokenizer(SIZE), critic=critic)


def ppo_run(folder: Path) -> tuple[Snapshot, Iterator[Any]]:
    """The bench's iteration, with responses that are sampled and not imposed."""
    policy = policy_of(folder, "shared")
    ref_policy = policy.reference()
    prompts = [
        PromptExample(f"p{i}", torch.tensor(ids))
        for i, ids in enumerate(Rollouts.draw(SIZE).prompts)
    ]
    config = ppo.PPOConfig(
        steps=1000,
        batch_size=SIZE.prompts,
        minibatch_size=settings.MINIBATCH,
        epochs=SIZE.epochs,
        critic="shared",
        max_new_tokens=SIZE.max_new_tokens // 2,  # random weights never end: as many as there
        learning_rate=settings.LEARNING_RATE,
        max_grad_norm=None,
    )
    state = ppo.new_state(policy, prompts, config)

    def noise(_prompts: list[str], responses: list[str]) -> list[float]:
        return [random.Random(response).gauss(0, 1) for response in responses]

    steps = ppo.train(policy, ref_policy, noise, config, state)
    return snapshot_of("ppo", policy, ref_policy, state, prompts), steps


def dpo_run(folder: Path) -> tuple[Snapshot, Iterator[Any]]:
    """The bench's step."""
    policy = policy_of(folder, "none")
    ref_policy = policy.reference()
    ids = torch.tensor
    pairs = [
        PreferenceExample(ids(p.prompt), ids([*p.chosen, 0]), ids([*p.rejected, 0]))
        for p in dpo_pairs(SIZE)
    ]
    config = dpo.DPOConfig(epochs=1000, batch_size=SIZE.pairs, learning_rate=settings.LEARNING_RATE)
    state = dpo.new_state(policy, ref_policy, pairs, config)
    steps = dpo.train(policy, ref_policy, config, state)
    return snapshot_of("dpo", policy, ref_policy, state, pairs), steps


def snapshot_of(stage: str, policy: Policy, ref_policy: Policy, state: Any, data: Any) -> Snapshot:
    """With a few words that the model is tried on before it is kept."""
    models = {"policy": policy, "ref_policy": ref_policy}
    texts = ["w17 w18 w19 w20", "w21 w22 w23", "w24 w25"]
    return Snapshot(stage, policy, state, lambda _: None, models, texts, data, total=1000)


def timed(function: Any) -> float:
    """Seconds."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def measure(name: str, run: Any, folder: Path, rounds: int) -> dict[str, Any]:
    """Plain steps and steps after a checkpoint in turn; then a resume."""
    snapshot, steps = run(folder)
    next(steps)
    writer = Writer(folder / name, snapshot, keep_last=1)
    plain, saves, slowed, waits = [], [], [], []
    for _ in range(rounds):
        plain.append(timed(lambda: next(steps)))
        saves.append(timed(lambda: writer.write(finished=False, sizes={})))
        slowed.append(timed(lambda: next(steps)))
        waits.append(timed(writer.wait))
    step, save = statistics.median(plain), statistics.median(saves)
    slower = max(0.0, statistics.median(slowed) + statistics.median(waits) - step)
    [place] = checkpoint.checkpoints(folder / name)
    again, _ = run(folder)
    seconds = timed(lambda: Checkpoint(place).restore(again))
    found = {
        "step_seconds": plain,
        "save_seconds": saves,
        "step_after_save_seconds": slowed,
        "left_after_that_step_seconds": waits,
        "share": (save + slower) / (EVERY * step),
        "resume_seconds": seconds,
        "bytes": sum(file.stat().st_size for file in place.iterdir()),
    }
    print(
        f"{name}: a step {step:.2f} s, a checkpoint of {found['bytes'] / 1e9:.2f} GB {save:.2f} s "
        f"({min(saves):.2f}-{max(saves):.2f}), the step beside its rest {slower:.2f} s longer: "
        f"{found['share']:.1%} of the time with one every {EVERY} steps; "
        f"resumed in {seconds:.1f} s",
        flush=True,
    )
    return found


def main() -> int:
    """The script; 0 if the cost is within its limits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", help="JSON file to write.")
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as work:
        save_models(SIZE, Path(work))
        for name, run in {"ppo": ppo_run, "dpo": dpo_run}.items():
            found[name] = measure(name, run, Path(work), options.rounds)
    if options.out:
        Path(options.out).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return int(
        any(f["share"] > SHARE or f["resume_seconds"] > RESUME_SECONDS for f in found.values())
    )


if __name__ == "__main__":
    sys.exit(main())
