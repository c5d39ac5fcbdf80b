"""How much memory DPO takes with adapters, beside DPO of all weights.

    python tests/tools/lora_memory.py

Both are whole runs of ``examples/train_dpo.py`` in a process of their own, on the embedded world's
pairs and a model of GPT2-medium's shape with random weights. Compared are the peaks of resident
memory: all that the system has given the process, Python and torch too, and the model's file while
it is read. Fails if the adapters take more than `SHARE` of the other.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_min.world import make_world, train_bpe

TRAIN_DPO = Path(__file__).parents[2] / "examples" / "train_dpo.py"
MEDIUM = {"n_embd": 1024, "n_head": 16, "n_layer": 24}  # where GPT-2's config differs
RANK, SHARE = 16, 0.45
PAIRS, HELDOUT = 24, 4
OPTIONS = ["--max_length", "128", "--max_response_tokens", "48", "--batch_size", "8"]
OPTIONS += ["--max_tokens", "512", "--save_every", "0", "--threads", "1", "--device", "cpu"]
GB = 2**30


def write_model(folder: Path) -> int:
    """A model with random weights and a small tokenizer; how many parameters it has."""
    tokenizer = train_bpe([pair["chosen"] for pair in make_world(0, n_pairs=200).pairs], 300)
    eos = tokenizer.eos_token_id
    torch.manual_seed(0)
    lm = GPT2LMHeadModel(GPT2Config(**MEDIUM, bos_token_id=eos, eos_token_id=eos))
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(p.numel() for p in lm.parameters())


def write_pairs(folder: Path) -> tuple[Path, Path]:
    """Rows to train on, and rows that are held out."""
    world = make_world(0, n_pairs=PAIRS, n_heldout_pairs=HELDOUT)
    files = folder / "pairs.jsonl", folder / "heldout.jsonl"
    for file, rows in zip(files, (world.pairs, world.heldout_pairs), strict=True):
        lines = [json.dumps(dict(row)) for row in rows]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return files


def peak(folder: Path, name: str, *options: str) -> float:
    """The peak of resident memory of a run, in GB."""
    pairs, heldout = write_pairs(folder)
    command = [sys.executable, str(TRAIN_DPO), "--model", str(folder / "base"), *OPTIONS]
    command += ["--data", str(pairs), "--heldout_data", str(heldout)]
    process = subprocess.Popen(
        [*command, "--out", str(folder / name), *options], stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"train_dpo {' '.join(options)} ended with status {status}")
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return usage.ru_maxrss * unit / GB


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="Where the figures are written, too.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found: dict[str, Any] = {"parameters": write_model(folder / "base"), "rank": RANK}
        found["lora_gb"] = round(peak(folder, "lora", "--lora_rank", str(RANK)), 2)
        found["full_gb"] = round(peak(folder, "full"), 2)
        notes = json.loads((folder / "lora" / "notes.json").read_text(encoding="utf-8"))
        found["trained"] = notes["dpo"]["trained"]
    found["share"] = round(found["lora_gb"] / found["full_gb"], 3)
    print(
        f"DPO of {found['parameters']:,} parameters: {found['full_gb']:.2f} GB at the peak, with "
        f"adapters of rank {RANK} ({found['trained']:,} parameters) {found['lora_gb']:.2f} GB: "
        f"{found['share']:.2f} of it, at most {SHARE}"
    )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if found["share"] <= SHARE else 1


if __name__ == "__main__":
    sys.exit(main())
