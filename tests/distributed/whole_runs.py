"""Whole runs of every stage, in float64 and small, to be repeated by several processes.

    torchrun --nproc_per_node 2 tests/distributed/whole_runs.py FOLDER

Each process writes what it found to FOLDER: the weights and the metrics of each run, and what was
sampled. Rows are ragged, no batch divides by 2 or 3, batches consist of several micro-batches, and
some of a single row, so that the other processes have nothing to do.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from small import (
    DEMONSTRATIONS,
    PREFERENCES,
    PROMPTS,
    UNPAIRED,
    WORDS,
    Metrics,
    llama,
    small_policy,
    small_reward_model,
    without_time,
    word_tokenizer,
)
from torch import Tensor, nn

from rlhf_min import distributed, dpo, grpo, kto, ppo, reward, rloo, sft
from rlhf_min.config import GRPOConfig, RLOOConfig
from rlhf_min.data import UnpairedExample
from rlhf_min.harness.run.checkpoint import Checkpoint, Snapshot, Writer
from rlhf_min.policy import Policy
from rlhf_min.reward_model import RewardModel
from rlhf_min.rollout import RolloutBuffer
from rlhf_min.speed.sharding import full, is_split, shard

DEVICE = torch.device("cpu")
STOP = 3  # the step after which a run is saved, to be taken up by others
SAMPLED = {"steps": 4, "epochs": 2, "max_new_tokens": 6, "learning_rate": 2e-3}
LEARNED = {"learning_rate": 5e-3, "max_grad_norm": 0.3, "max_tokens": 8, "eval_every": 2}
# Seven pairs: in batches of three, one is left at the end of each epoch.
PAIRS = [
    {"prompt": " ".join(WORDS[:p]), "chosen": " ".join(WORDS[-c:]), "rejected": WORDS[p]}
    for p, c in ((1, 3), (4, 1), (2, 5), (6, 2), (3, 3), (1, 6), (5, 2))
]
# Eight rows: in batches of three, two are left, which are as short as one of the others.
ROWS = [UnpairedExample(x.prompt_ids, x.response_ids[-3:], x.label) for x in UNPAIRED]


@dataclass
class Run:
    """A run before its first step.

    Args:
        module: what is trained.
        state: of the algorithm.
        steps: each yields its metrics.
        models: those that are not trained, by name.
        examples: what is trained on.
        after: what is done with the trained model, and the numbers that come of it.
        sampled: the tokens of all responses, as they are sampled.
    """

    module: nn.Module
    state: Any
    steps: Iterator[Metrics]
    models: Mapping[str, Policy | RewardModel]
    examples: Sequence[Any]
    after: Callable[[], Iterable[float]] = tuple
    sampled: list[list[int]] = field(default_factory=list)


@dataclass
class Found:
    """What came of a run."""

    metrics: list[Metrics]
    after: list[float]
    sampled: list[list[int]]
    weights: dict[str, Tensor]


def sft_run() -> Run:
    """With dropout; batches of five and of one, in micro-batches of one or two."""
    policy = shard(small_policy(dropout=0.2).to(DEVICE))
    config = sft.SFTConfig(epochs=2, batch_size=5, **LEARNED | {"max_tokens": 12})
    examples, heldout = DEMONSTRATIONS[:6], DEMONSTRATIONS[5:]
    state = sft.new_state(policy, examples, config)
    steps = sft.train(policy, config, state, heldout=heldout)
    return Run(policy, state, steps, {}, examples)


def reward_run() -> Run:
    """A BERT with dropout, whose scores are normalised at the end."""
    model = shard(small_reward_model(dropout=0.2).to(DEVICE))
    config = reward.RewardConfig(epochs=2, batch_size=3, **LEARNED | {"max_tokens": 20})
    examples, _ = reward.prepare_pairs(model, PAIRS)
    state = reward.new_state(model, examples, config)
    steps = reward.train(model, config, state, heldout=examples[4:])
    prompts, responses = [x["prompt"] for x in PAIRS], [x["chosen"] for x in PAIRS]

    def normalised() -> Iterator[float]:
        yield from reward.normalise(model, prompts, responses)
        yield from model.score(prompts, responses).tolist()

    return Run(model, state, steps, {}, examples, normalised)


def dpo_run(*, lm: nn.Module | None = None, **options: Any) -> Run:
    """Of seven pairs."""
    policy = (small_policy() if lm is None else Policy(lm, word_tokenizer())).to(DEVICE)
    ref_policy = shard(policy.reference())
    config = dpo.DPOConfig(epochs=2, batch_size=3, **LEARNED | options)
    shard(policy)
    state = dpo.new_state(policy, ref_policy, PREFERENCES[:7], config)
    steps = dpo.train(policy, ref_policy, config, state, heldout=PREFERENCES[5:])
    return Run(policy, state, steps, {"ref_policy": ref_policy}, PREFERENCES[:7])


def kto_run() -> Run:
    """The reference is asked in each step."""
    policy = small_policy().to(DEVICE)
    ref_policy = shard(policy.reference())
    shard(policy)
    config = kto.KTOConfig(epochs=2, batch_size=3, cache_reference=False, **LEARNED)
    state = kto.new_state(policy, ref_policy, ROWS, config)
    steps = kto.train(policy, ref_policy, config, state, heldout=ROWS[5:])
    return Run(policy, state, steps, {"ref_policy": ref_policy}, ROWS)


def sampling_run(algorithm: Any, config: Any, policy: Policy, *, by_texts: bool = False) -> Run:
    """Of PPO, GRPO or RLOO, by a reward model, or by a function that sees all texts."""
    ref_policy = shard(policy.to(DEVICE).reference())
    reward_model = shard(small_reward_model(seed=2).to(DEVICE))
    shard(policy)
    state = algorithm.new_state(policy, PROMPTS, config)
    sampled: list[list[int]] = []

    def keep(buffer: RolloutBuffer) -> None:
        sequences = buffer.rollout.sequences
        rows = zip(sequences.responses, sequences.mask, strict=True)
        sampled.extend(row[mask].tolist() for row, mask in rows)

    steps = algorithm.train(
        policy,
        ref_policy,
        longer_than_the_others if by_texts else reward_model.score,
        config,
        state,
        monitors={"length": longer_than_the_others},
        eval_prompts=PROMPTS[3:],
        on_rollout=keep,
    )
    models = {"ref_policy": ref_policy, "reward_model": reward_model}
    return Run(policy, state, steps, models, PROMPTS, sampled=sampled)


def longer_than_the_others(_prompts: list[str], responses: list[str]) -> list[float]:
    """A reward that depends on the whole batch."""
    lengths = [len(response) for response in responses]
    return [n - sum(lengths) / len(lengths) for n in lengths]


def ppo_run(*, lm: nn.Module | None = None, critic: Any = "shared", **options: Any) -> Run:
    """Rollouts of seven, learned from in minibatches of 3, 3 and 1."""
    if lm is None:
        policy = small_policy(critic=critic)
    else:
        policy = Policy(lm, word_tokenizer(), critic=critic)
    sizes = {"batch_size": 7, "minibatch_size": 3, "critic": critic}
    config = ppo.PPOConfig(**LEARNED | SAMPLED | sizes | options)
    return sampling_run(ppo, config, policy, by_texts=critic == "separate")


def grpo_run() -> Run:
    """Groups of three, learned from in minibatches of 4, 4 and 1."""
    sizes = {"batch_size": 9, "minibatch_size": 4, "group_size": 3}
    return sampling_run(grpo, GRPOConfig(**LEARNED | SAMPLED | sizes), small_policy())


def rloo_run() -> Run:
    """Groups of two, some with equal responses, learned from in minibatches of 3, 3, 3 and 1."""
    sizes = {"batch_size": 10, "minibatch_size": 3, "group_size": 2}
    return sampling_run(rloo, RLOOConfig(**LEARNED | SAMPLED | sizes), small_policy())


def small_llama() -> nn.Module:
    """Over the eight words; its head is not tied to its embeddings."""
    return llama(vocabulary=len(WORDS) + 2)


RUNS: dict[str, Callable[[], Run]] = {
    "sft": sft_run,
    "reward": reward_run,
    "ppo": lambda: ppo_run(kl_control="adaptive", normalise_scores=True, whiten_rewards=True),
    "ppo, separate critic": lambda: ppo_run(critic="separate", kl="full"),
    "ppo, llama": lambda: ppo_run(lm=small_llama(), stop_kl=1e-3),
    "grpo": grpo_run,
    "rloo": rloo_run,
    "dpo": dpo_run,
    "dpo, reference not cached": lambda: dpo_run(cache_reference=False, lm=small_llama()),
    "orpo": lambda: dpo_run(loss="orpo"),
    "kto": kto_run,
}


def whole(name: str) -> Found:
    """The run from its first step to its last."""
    return finished(RUNS[name]())


def saved(name: str, folder: Path) -> None:
    """The same run, saved after some steps."""
    run = RUNS[name]()
    for _ in islice(run.steps, STOP):
        pass
    with Writer(folder, snapshot(run), keep_last=1) as writer:
        writer.write(finished=False, sizes={})
    distributed.barrier()


def resumed(name: str, folder: Path) -> Found:
    """The rest of a run that was saved."""
    run = RUNS[name]()
    Checkpoint(folder / f"step-{STOP:06d}").restore(snapshot(run))
    return finished(run)


def snapshot(run: Run) -> Snapshot:
    """What is saved of it."""
    return Snapshot(
        "stage",
        run.module,
        run.state,
        lambda folder: folder.mkdir(parents=True),
        {"module": run.module, **run.models},
        ["red ball", "blue ball one", "one", "two"],
        run.examples,
        total=100,
    )


def finished(run: Run) -> Found:
    """All that comes of it."""
    assert is_split(run.module) == distributed.is_sharded()
    metrics = [without_time(metrics) for metrics in run.steps]
    after = list(run.after())
    named = run.module.named_parameters()
    weights = {name: full(p.detach()).clone().cpu().contiguous() for name, p in named}
    return Found(metrics, after, run.sampled, weights)


def write(folder: Path, found: Mapping[str, Found]) -> None:
    """What this process found."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"rank-{distributed.rank()}"
    tensors = {f"{run}: {name}": x for run, of in found.items() for name, x in of.weights.items()}
    save_file(tensors, f"{file}.safetensors")
    rest = {run: [of.metrics, of.after, of.sampled] for run, of in found.items()}
    Path(f"{file}.json").write_text(json.dumps(rest), encoding="utf-8")


def read(folder: Path) -> list[dict[str, Found]]:
    """What each process found."""
    processes = []
    for file in sorted(folder.glob("rank-*.json")):
        rest = json.loads(file.read_text(encoding="utf-8"))
        weights: dict[str, dict[str, Tensor]] = {run: {} for run in rest}
        for key, tensor in load_file(file.with_suffix(".safetensors")).items():
            run, _, name = key.partition(": ")
            weights[run][name] = tensor
        processes.append({run: Found(*rest[run], weights[run]) for run in rest})
    return processes


def all_found(*, sharded: bool, resume: Path | None = None) -> dict[str, Found]:
    """Of all runs."""
    distributed._world.sharded = sharded
    if resume is None:
        return {name: whole(name) for name in RUNS}
    return {name: resumed(name, resume / name) for name in RUNS}


def main() -> None:
    """The script."""
    global DEVICE
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sharded", action="store_true")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--device", type=torch.device, default=DEVICE)
    options = parser.parse_args()
    DEVICE = options.device
    torch.set_num_threads(1)
    distributed.start()
    kinds = {"parallel": False, "sharded": True} if options.sharded else {"parallel": False}
    for kind, sharded in kinds.items():
        write(options.out / kind, all_found(sharded=sharded))
        if options.save:
            for name in RUNS:
                saved(name, options.out / kind / "saved" / name)
        if options.resume:
            # Split weights by whole ones and the other way round, if there is a choice.
            for place in sorted(options.resume.glob("*/saved")):
                if place.parent.name == kind and len(kinds) > 1:
                    continue
                found = all_found(sharded=sharded, resume=place)
                write(options.out / kind / f"resumed-{place.parent.name}", found)
    distributed.end()


if __name__ == "__main__":
    main()
