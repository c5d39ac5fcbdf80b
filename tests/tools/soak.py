"""A long PPO run in which memory must not grow: 300 steps on the embedded world.

    python tests/tools/soak.py --steps 300

Checkpoints are written on the way. Prints the resident memory every 30 steps, and exits non-zero if
it grew by more than 3% from the first of them to the last.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from rlhf_min.harness.cli import RunOptions
from rlhf_min.harness.inputs import load_inputs
from rlhf_min.harness.models import make_codec, start_policy, start_reward_model
from rlhf_min.harness.run.folder import start_log
from rlhf_min.harness.stages import ppo
from rlhf_min.ppo import PPOConfig

FIRST, GROWTH = 30, 0.03


def resident() -> int:
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> int:
    """The script; 0 if memory stayed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    memory: dict[int, int] = {}

    def watch(prompts: list[str], _responses: list[str]) -> list[float]:
        """A monitor, called once after each step's update."""
        memory[len(memory) + 1] = resident()
        return [0.0] * len(prompts)

    with tempfile.TemporaryDirectory() as folder:
        options = RunOptions(out=f"{folder}/run", save_every=20, skip_preflight=True)
        config = PPOConfig(steps=steps, eval_every=steps + 1, schedule="constant")
        inputs = load_inputs(options, "ppo", seed=config.seed)
        inputs.monitors["watch"] = watch
        inputs.eval_prompts = []
        policy = start_policy(options, inputs.texts, critic="none", seed=config.seed)
        codec = make_codec(policy, options)
        reward_model = start_reward_model(options, inputs.texts, seed=config.seed)
        log = start_log(Path(folder) / "run", options, config)
        ppo.run(policy, codec, reward_model, inputs, config, log)
    growth = memory[steps] / memory[FIRST] - 1
    for step in range(FIRST, steps + 1, FIRST):
        print(f"after step {step}: {memory[step] / 1e6:.1f} MB resident")
    print(f"growth {growth:+.2%}, at most {GROWTH:.0%}")
    return int(growth > GROWTH)


if __name__ == "__main__":
    sys.exit(main())
