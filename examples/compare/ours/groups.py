"""GRPO and RLOO: `judge` and `minibatch_step` as they are shipped, on given responses.

What follows trl in something is a field of `Setup`; as they are by default, all is ours.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from statistics import fmean
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn, tensor

from compare.job import Job, Rollout
from compare.theirs.float64 import float64
from rlhf_min import grpo, online, rloo
from rlhf_min.advantages import rloo_advantages
from rlhf_min.config import GroupConfig
from rlhf_min.data import PromptExample, Sequences
from rlhf_min.kl import kl_estimate
from rlhf_min.losses import GroupLoss, grpo_loss
from rlhf_min.optim import Optimizer
from rlhf_min.policy import Policy
from rlhf_min.rollout import RolloutBuffer, score_rollout

ALGORITHMS: dict[str, ModuleType] = {"grpo": grpo, "rloo": rloo}
Metrics = dict[str, float]
Rows = list[int]  # of one rollout, by their places in it


@dataclass(frozen=True)
class Setup:
    """All that a run of ours depends on, beside the models it starts from.

    Args:
        config: its `minibatch_size` is that of trl's optimizer steps.
        rollouts: responses and scores, which both sides take as given.
        batches: trl's micro-batches of each rollout, as `Record` has them.
        accumulated: how many of them trl makes one optimizer step of.
        betas: of AdamW.
        micro_batch_means: each micro-batch weighs alike in its step, not each token.
        kl_times_ratio: GRPO's KL in the loss is multiplied by the ratio.
        tokens_of_rollout: a loss over tokens divides by the mean number of all minibatches.
        whitened: advantages have mean 0 and deviation 1 over the rollout.
        padded_positions: a prompt begins where the padding on its left would end.
    """

    config: GroupConfig
    rollouts: Sequence[Rollout]
    batches: Sequence[Sequence[Sequence[int]]]
    accumulated: int = 1
    betas: tuple[float, float] = (0.9, 0.999)
    micro_batch_means: bool = False
    kl_times_ratio: bool = False
    tokens_of_rollout: bool = False
    whitened: bool = False
    padded_positions: bool = False

    def passes(self, number: int) -> Iterator[list[list[Rows]]]:
        """Of each pass over a rollout its optimizer steps, each the rows of its backward passes:
        trl's, and beyond them the last pass again."""
        first = sum(len(rollout.scores) for rollout in self.rollouts[:number])
        micros = [[row - first for row in part] for part in self.batches[number]]
        size = len(self.rollouts[number].scores)
        per_pass = size // len(micros[0])
        steps = [micros[i : i + self.accumulated] for i in range(0, len(micros), self.accumulated)]
        if not self.micro_batch_means:
            steps = [[[row for part in step for row in part]] for step in steps]
        per_pass //= self.accumulated
        passes = [steps[i : i + per_pass] for i in range(0, len(steps), per_pass)]
        yield from passes
        while True:
            yield passes[-1]


@dataclass
class Side:
    """Start models, and as many runs from them as are asked for.

    Args:
        algorithm: `grpo` or `rloo`.
        policy: is trained in place.
        ref_policy: frozen; has the policy's start weights.
    """

    algorithm: ModuleType
    policy: Policy
    ref_policy: Policy

    @classmethod
    def load(cls, job: Job) -> "Side":
        """The models of a job.

        Raises:
            BadInput: if the model cannot be loaded.
        """
        policy = Policy.from_pretrained(job.model, critic="none", plain=True)
        policy = policy.double() if job.float64 else policy
        return cls(ALGORITHMS[job.stage], policy, policy.reference())

    @property
    def module(self) -> nn.Module:
        """What is trained: its parameters' names are those of trl's weights in the file."""
        return self.policy

    def run(self, setup: Setup) -> Iterator[Metrics]:
        """Metrics of each rollout, from the start weights on; the policy is trained in place."""
        double = self.policy.lm.dtype == torch.float64
        with float64() if double else nullcontext():
            yield from self._run(setup)

    def _run(self, setup: Setup) -> Iterator[Metrics]:
        with torch.no_grad():
            for p, start in zip(
                self.policy.parameters(), self.ref_policy.parameters(), strict=True
            ):
                p.copy_(start)
        config = setup.config
        state = self.algorithm.new_state(self.policy, [PromptExample("", tensor([0]))], config)
        for group in state.optimizer.optimizer.param_groups:
            group["betas"] = setup.betas
        for number, given in enumerate(setup.rollouts):
            with self._conventions(setup, given):
                rollout = score_rollout(
                    *(self.policy, self.ref_policy),
                    *([tensor(ids) for ids in given.prompt_ids],),
                    *([tensor(ids) for ids in given.response_ids],),
                    tensor(given.scores, dtype=torch.float64),
                    temperature=config.temperature,
                    kl=config.kl,
                    max_tokens=config.max_tokens,
                )
                buffer = self.algorithm.judge(rollout, config)
                metrics = {"learning_rate": state.optimizer.learning_rate, **online.report(buffer)}
                metrics["equal_groups"] = online.equal_groups(buffer, config.group_size)
                self.policy.train()
                steps = [
                    self._step(setup, state.optimizer, buffer, step)
                    for epoch in islice(setup.passes(number), config.epochs)
                    for step in epoch
                ]
            yield metrics | online.mean_stats(steps)

    def _step(
        self, setup: Setup, optimizer: Optimizer, buffer: RolloutBuffer, parts: list[Rows]
    ) -> Metrics:
        """One optimizer step, of one backward pass or, as in trl, of one for each micro-batch."""
        step, backward = optimizer.step, optimizer.backward
        tokens = buffer.rollout.lengths
        found: list[Metrics] = []
        for i, rows in enumerate(parts):
            share = 1 / len(parts)
            if setup.tokens_of_rollout:
                share = int(tokens[rows].sum()) * setup.config.minibatches / int(tokens.sum())
            with ExitStack() as stack:
                patched = patch.object(optimizer, "backward", lambda x, s=share: backward(x * s))
                stack.enter_context(patched)
                if i + 1 < len(parts):  # gradients are added up until the last
                    stack.enter_context(patch.object(optimizer, "step", lambda *_: 0.0))
                config = setup.config
                one = self.algorithm.minibatch_step(self.policy, optimizer, buffer, rows, config)
            if setup.tokens_of_rollout:
                one["loss"] *= share
            found.append(one)
        assert (optimizer.step, optimizer.backward) == (step, backward)
        means = {name: fmean(x[name] for x in found) for name in found[0]}
        return means | {"grad_norm": found[-1]["grad_norm"]}

    @contextmanager
    def _conventions(self, setup: Setup, given: Rollout) -> Iterator[None]:
        """What of trl's takes the place of functions of ours."""
        with ExitStack() as stack:
            if setup.kl_times_ratio:
                stack.enter_context(patch.object(grpo, "grpo_loss", loss_with_kl_times_ratio))
            if setup.whitened:
                stack.enter_context(patch.object(rloo, "rloo_advantages", whitened))
            if setup.padded_positions:
                width = max(map(len, given.prompt_ids))
                for policy in (self.policy, self.ref_policy):
                    stack.enter_context(shifted(policy, width))
            yield


def loss_with_kl_times_ratio(
    new_logprobs: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    **options: Any,
) -> GroupLoss:
    """`grpo_loss`, but that k3 is multiplied by the ratio, which carries gradient."""
    inputs = (new_logprobs, logprobs, ref_logprobs, advantages, mask)
    found = grpo_loss(*inputs, kl_coef=0.0, **options)
    lengths = mask.sum(1)
    log_ratio = torch.where(mask, new_logprobs - logprobs, 0)
    if options["ratio_level"] == "sequence":
        log_ratio = (log_ratio.sum(1) / lengths.clamp(min=1))[:, None]
    new, ref = (torch.where(mask, x, 0) for x in (new_logprobs, ref_logprobs))
    k3 = torch.where(mask, kl_estimate(new, ref, kind="k3") * log_ratio.exp(), 0).sum(1)  # (B,)
    if options["loss_mean"] == "sequence":
        kl = (k3 / lengths.clamp(min=1)).mean()
    elif options["loss_mean"] == "token":
        kl = k3.sum() / lengths.sum().clamp(min=1)
    else:
        kl = k3.mean() / options["max_new_tokens"]
    return found._replace(loss=found.loss + kl_coef * kl)


def whitened(rewards: Tensor, *, group_size: int) -> Tensor:
    """`rloo_advantages` with mean 0 and deviation 1."""
    advantages = rloo_advantages(rewards, group_size=group_size)
    return (advantages - advantages.mean()) / (advantages.std() + 1e-4)


@contextmanager
def shifted(policy: Policy, width: int) -> Iterator[None]:
    """Positions as they are in rows whose prompts are padded on the left to this width."""
    first: list[Tensor] = []

    def see(_module: nn.Module, inputs: tuple[Sequences, ...]) -> None:
        first[:] = [width - inputs[0].prompt_lengths]

    def shift(_module: nn.Module, inputs: Any, named: dict[str, Any]) -> Any:
        length = named["input_ids"].shape[1]
        positions = torch.arange(length, device=named["input_ids"].device) + first[0][:, None]
        # Behind a row is padding, which needs no position of its own.
        return inputs, named | {"position_ids": positions.clamp(max=int(policy.positions) - 1)}

    hooks = [
        policy.register_forward_pre_hook(see),
        policy.lm.base_model.register_forward_pre_hook(shift, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def counts_positions(policy: Policy) -> bool:
    """Whether a model adds an embedding for each position, as GPT-2 does: then a shift is seen."""
    return hasattr(policy.lm.base_model, "wpe")
