"""What the stages share: how one is run, and how policies are copied and sampled from."""

import copy
from collections.abc import Sequence
from typing import Any

import torch

from rlhf_min.data import PromptExample
from rlhf_min.encoding.codec import Codec
from rlhf_min.harness.inputs import Inputs
from rlhf_min.harness.run.checkpoint import Snapshot
from rlhf_min.harness.run.log import MetricsLog, note
from rlhf_min.policy import Critic, Policy
from rlhf_min.reward_model import RewardModel
from rlhf_min.sampling import sample


def tell(*texts: str) -> list[str]:
    """Print texts; return their lines."""
    print(*texts, sep="\n")
    return [line for text in texts for line in text.splitlines()]


def note_start(
    log: MetricsLog, snapshot: Snapshot, inputs: Inputs, told: Sequence[str], *, held_out: int
) -> None:
    """Note what a stage begins with: its rows, and its model.

    Args:
        told: of the rows, when they were encoded.
        held_out: rows, of those that are looked at during training.
    """
    network = snapshot.module.lm if isinstance(snapshot.module, Policy) else snapshot.module.model
    note(log.folder, "data", report=inputs.report)
    note(
        log.folder,
        snapshot.stage,
        report=told,
        rows=len(snapshot.examples),
        held_out=held_out,
        model=type(network).__name__,
        parameters=sum(p.numel() for p in snapshot.module.parameters()),
    )


def named(
    policy: Policy, ref_policy: Policy, reward_models: Sequence[RewardModel] = ()
) -> dict[str, Policy | RewardModel]:
    """The models that a stage depends on, by the names that checkpoints know them by."""
    models: dict[str, Policy | RewardModel] = {"policy": policy, "ref_policy": ref_policy}
    return models | {f"reward_model_{i}": model for i, model in enumerate(reward_models)}


def copy_policy(policy: Policy, *, critic: Critic) -> Policy:
    """A copy of the language model to train; a value head is kept if it fits, else it is new."""
    copied = Policy(copy.deepcopy(policy.lm), policy.tokenizer, critic=critic, plain=policy.plain)
    if critic == policy.critic:
        copied.load_critic(policy.critic_tensors())
    return copied


def sample_texts(
    policy: Policy, codec: Codec, rows: Sequence[dict[str, Any]], *, seed: int
) -> tuple[list[str], list[str]]:
    """Prompts and sampled responses as texts."""
    prompts: list[PromptExample] = codec.encode_prompts(rows)[0]
    responses = sampled_responses(policy, prompts, codec.max_response_tokens, 1.0, seed)
    return [prompt.text for prompt in prompts], responses


def sampled_responses(
    policy: Policy,
    prompts: Sequence[PromptExample],
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> list[str]:
    """A response to each prompt as a text, with the random numbers of this seed."""
    response_ids = sample(
        policy,
        [prompt.ids for prompt in prompts],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        rng=torch.Generator().manual_seed(seed),
    )
    return [policy.decode(ids) for ids in response_ids]
