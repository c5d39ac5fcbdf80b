"""Real models beside several trls: how far apart each comparison ends, its time and its memory.

    python tests/tools/beside_trl.py --pairs pairs.jsonl --smollm DIR --minilm DIR --gpt2 DIR \\
        --trl_python trl-1.12/bin/python trl-1.16/bin/python trl-0.11/bin/python

One command after the other, in float32 and in float64, in every trl that has the stage; nothing
else should run. What they found is written to examples/results/beside_trl.json. The rewards of PPO
are the lengths of the responses.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from compare.explain import largest
from compare.theirs.start import probe

from rlhf_min.errors import BadInput

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "examples/results/beside_trl.json"
REWARD = "def length(prompts, responses):\n    return [len(r) / 100 for r in responses]\n"
EPOCHS = ["--epochs", "1", "--minibatch_size", "4"]  # two optimizer steps in each rollout
# What is compared: the stage, which of the folders, and further options.
CASES = {
    "dpo": ("smollm", ["--limit", "20", "--batch_size", "5", "--max_length", "64"]),
    "sft": ("smollm", ["--limit", "20", "--batch_size", "5", "--max_length", "64"]),
    "reward": ("minilm", ["--limit", "40", "--batch_size", "10", "--max_length", "512"]),
    "ppo": ("gpt2", ["--limit", "16", "--batch_size", "8", "--max_new_tokens", "32", *EPOCHS]),
}
STEPS = {"ppo": 2}  # of the others 4
LOSSES = ("loss", "policy_loss", "value_loss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("pairs", "smollm", "minilm", "gpt2"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--trl_python", nargs="+", required=True)
    parser.add_argument("--only", nargs="*", default=list(CASES))
    parser.add_argument("--precision", nargs="*", default=["float32", "float64"])
    options = parser.parse_args()
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for stage in options.only:
        for python in options.trl_python:
            trl = str(probe(python)["trl"])
            for precision in options.precision:
                name = f"{stage}, trl {trl}, {precision}"
                result = compare(stage, python, precision, options)
                if result is not None:
                    found[name] = result
                    print(name, json.dumps(result), flush=True)
                    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def compare(stage: str, python: str, precision: str, options: Any) -> dict[str, Any] | None:
    """One comparison; None if this trl does not have the stage."""
    folder, more = CASES[stage]
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        (out / "reward.py").write_text(REWARD, encoding="utf-8")
        given = ["--stage", stage, "--model", getattr(options, folder), "--data", options.pairs]
        given += ["--steps", str(STEPS.get(stage, 4)), "--trl_python", python, "--out", str(out)]
        given += ["--float64"] * (precision == "float64")
        given += ["--reward", f"{out / 'reward.py'}:length"] * (stage == "ppo")
        started = time.monotonic()
        command = [sys.executable, str(ROOT / "examples/compare_with_trl.py"), *given, *more]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        said, errors = process.communicate()
        seconds = time.monotonic() - started
        if process.returncode == 2:
            line = errors.decode().splitlines()[-1]
            if "has no" in line:
                return None
            raise BadInput(line)
        told = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    return {
        "options": " ".join(more),
        "explained": process.returncode == 0,
        "seconds": round(seconds),
        "gigabytes": {
            "ours": round(told["peak_bytes"] / 2**30, 1),
            "trl": round(told["trl"]["peak_bytes"] / 2**30, 1),
        },
        "loss": max(largest(told["followed"], told["trl"]["steps"], name) for name in LOSSES),
        "weights": told["weights"]["size"],
        "causes": [cause["name"] for cause in told["explanation"]["followed"]],
        "headline": said.decode().splitlines()[:2],
        "threads": os.cpu_count(),
    }


if __name__ == "__main__":
    main()
