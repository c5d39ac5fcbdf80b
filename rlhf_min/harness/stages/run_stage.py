"""What the stages share: how one is run, and how policies are copied and sampled from."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from rlhf_min.data import PromptExample
from rlhf_min.encoding.codec import Codec
from rlhf_min.harness import preflight
from rlhf_min.harness.inputs import Inputs
from rlhf_min.harness.preflight import Check
from rlhf_min.harness.run.checkpoint import Snapshot
from rlhf_min.harness.run.log import MetricsLog, note
from rlhf_min.loading import adapters
from rlhf_min.policy import Critic, Policy
from rlhf_min.sampling import sample
from rlhf_min.speed.sharding import shard


def run_stage(
    snapshot: Snapshot,
    checks: Iterator[Check],
    steps: Iterator[dict[str, float]],
    inputs: Inputs,
    log: MetricsLog,
    *,
    title: str,
    report: Sequence[str],
    show: tuple[str, ...],
) -> None:
    """Make the checks, take up what a resumed run has, note the rows and the model, and train.

    Args:
        snapshot: what is trained and saved.
        checks: of the preflight; none are made where the stage goes on from a checkpoint.
        steps: of the algorithm's ``train``, or what passes them on. Begun after all else.
        title: of the stage, for the preflight.
        report: what was said of the rows when they were encoded.
        show: metrics in the bar.
    """
    stage, module = snapshot.stage, snapshot.module
    if log.preflight and not log.has_checkpoint(stage):
        preflight.run(title, checks, snapshot.state.optimizer, *snapshot.models.values())
    log.resume(snapshot)
    note(log.folder, "data", report=inputs.report)
    note(
        log.folder,
        stage,
        report=report,
        rows=len(snapshot.examples),
        held_out=len(snapshot.heldout or ()),
        model=type(module.lm if isinstance(module, Policy) else module.model).__name__,
        parameters=sum(p.numel() for p in module.parameters()),
        trained=sum(p.numel() for p in module.parameters() if p.requires_grad),
    )
    log.follow(snapshot, steps, show=show)


def copy_policy(policy: Policy, *, critic: Critic) -> Policy:
    """A copy of the language model to train; a value head is kept if it fits, else it is new."""
    copied = Policy(adapters.copied(policy.lm), policy.tokenizer, critic=critic, plain=policy.plain)
    if critic == policy.critic:
        copied.load_critic(policy.critic_tensors())
    return copied


def policy_and_reference(
    start: Policy, critic: Critic, ref_device: torch.device | None
) -> tuple[Policy, Policy]:
    """A copy of the start to train, and its frozen reference. If models are split, each of them is
    before the next one is made whole."""
    policy = shard(copy_policy(shard(start), critic=critic))
    return policy, shard(start.reference(ref_device))


def sample_texts(
    policy: Policy, codec: Codec, rows: Sequence[dict[str, Any]], *, seed: int
) -> tuple[list[str], list[str]]:
    """Prompts and sampled responses as texts."""
    prompts = codec.encode_prompts(rows)[0]
    responses = sample_responses(
        policy, prompts, max_new_tokens=codec.max_response_tokens, temperature=1.0, seed=seed
    )
    return [prompt.text for prompt in prompts], responses


def sample_responses(
    policy: Policy,
    prompts: Sequence[PromptExample],
    *,
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
