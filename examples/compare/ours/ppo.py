"""PPO: `score_rollout`, `judge` and `ppo_epoch` as they are shipped, on given responses.

What follows trl in something is a field of `Setup`; as they are by default, all is ours.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn, tensor
from transformers import get_scheduler

from compare.job import Job, Rollout
from compare.names import in_our_names
from compare.ours import ppo_conventions as conventions
from compare.theirs.float64 import float64
from rlhf_min import ppo
from rlhf_min.config import PPOConfig, RolloutConfig
from rlhf_min.data import Cursor, PromptExample
from rlhf_min.encoding.codec import Codec
from rlhf_min.harness.rows.encoding_report import describe
from rlhf_min.loading.reward_function import RewardFunction, call_reward
from rlhf_min.optim import Optimizer
from rlhf_min.policy import Critic, Policy
from rlhf_min.rollout import Rollout as Scored
from rlhf_min.rollout import RolloutBuffer, score_rollout
from rlhf_min.sampling import sample

HEAD_SEED = 10**6  # of the new value head, far from the other seeds
Metrics = dict[str, float]
Rows = list[int]  # of one rollout, by their places in it


@dataclass(frozen=True)
class Setup:
    """All that a run of ours depends on, beside the models it starts from.

    Args:
        config: its `minibatch_size` is that of trl's optimizer steps.
        rollouts: responses and scores, which both sides take as given.
        batches: trl's micro-batches of each rollout, as `Record` has them; None: drawn here.
        accumulated: how many of them trl makes one optimizer step of.
        micro_batch_means: each micro-batch weighs alike in its step, not each token.
        pad_id: tokens end before this id, as trl's of 1.12 do, and the score is in the next cell.
        pad_in_prompts: whether prompts keep that id; trl of 1.12 hides it from the models.
        betas: of AdamW.
        head_bias: whether the value head has one.
        only_first_clipped: gradients after the first are not clipped.
        schedule_by_rollout: the learning rate stays as it is during a rollout's update.
        leaking_rewards: whitened rewards reach tokens from the padding behind them.
        stop_by_last: `stop_kl` is compared with the last micro-batch of an epoch, not with all.
        ratio_threshold: a step whose mean ratio is larger has losses and a gradient of 0.
        metrics_of: report as this trainer of trl does, where it means something else.
        filled: share of the numbers that trl of 1.12 has for its averages; the others are 0.
    """

    config: PPOConfig
    rollouts: Sequence[Rollout]
    batches: Sequence[Sequence[Sequence[int]]] | None = None
    accumulated: int = 1
    micro_batch_means: bool = False
    pad_id: int | None = None
    pad_in_prompts: int | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    head_bias: bool = True
    only_first_clipped: bool = False
    schedule_by_rollout: bool = False
    leaking_rewards: bool = False
    stop_by_last: bool = False
    ratio_threshold: float | None = None
    metrics_of: str = ""
    filled: float = 1.0

    def epochs(self, number: int) -> Iterator[list[Rows]]:
        """The rows of each backward pass, epoch by epoch: trl's, and drawn here beyond them."""
        size = len(self.rollouts[number].scores)
        first = sum(len(rollout.scores) for rollout in self.rollouts[:number])
        epoch: list[Rows] = []
        for part in self.batches[number] if self.batches is not None else []:
            epoch.append([row - first for row in part])
            if sum(map(len, epoch)) == size:
                yield epoch if self.micro_batch_means else _merged(epoch, self.accumulated)
                epoch = []
        rng = torch.Generator().manual_seed(self.config.seed + 2 * 10**6 + number)
        while True:
            order = torch.randperm(size, generator=rng)
            yield [part.tolist() for part in order.split(self.config.minibatch_size)]


def _merged(epoch: list[Rows], parts: int) -> list[Rows]:
    groups = [epoch[i : i + parts] for i in range(0, len(epoch), parts)]
    return [[row for part in group for row in part] for group in groups]


@dataclass
class Side:
    """Start models, and as many runs from them as are asked for.

    Args:
        policy: is trained in place.
        ref_policy: frozen.
        start: the policy's parameters before the first step.
        in_words_of_trl: with `Setup.metrics_of`, all metrics of the latest run under its names.
    """

    policy: Policy
    ref_policy: Policy
    start: Mapping[str, Tensor]
    in_words_of_trl: list[Metrics] = field(default_factory=list)
    _first: dict[Any, Scored] = field(default_factory=dict)  # by what it depends on

    @classmethod
    def load(cls, job: Job, critic: Critic) -> "Side":
        """The models of a job. A separate critic starts as a copy of the policy's trunk.

        Raises:
            BadInput: if the model cannot be loaded.
        """
        policy = Policy.from_pretrained(job.model, critic=critic, new_head=True)
        policy = policy.double() if job.float64 else policy
        ref_policy = policy.reference()
        # The weights of the reference are the start's: no copy of them is needed.
        start: dict[str, Tensor] = dict(ref_policy.named_parameters())
        for name, p in ref_policy.lm.base_model.named_parameters():
            start[f"critic_trunk.{name}"] = p
        start["value_head.weight"] = tensor([job.value_head])
        start["value_head.bias"] = torch.zeros(1)
        return cls(policy, ref_policy, start)

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
        self._restart(setup)
        config = setup.config
        state = ppo.new_state(self.policy, [PromptExample("", tensor([0]))], config)
        optimizer = FollowingOptimizer(state.optimizer, setup)
        for group in optimizer.optimizer.param_groups:
            group["betas"] = setup.betas
        schedule = _schedule(optimizer, config) if setup.schedule_by_rollout else None
        self.in_words_of_trl = []
        for number, given in enumerate(setup.rollouts):
            buffer = self._judged(setup, given, state.kl_control.coef)
            metrics: Metrics = {"kl_coef": state.kl_control.coef}
            metrics["learning_rate"] = optimizer.learning_rate
            update, watched = self._update(setup, optimizer, buffer, number)
            metrics |= conventions.report(buffer) | update
            if setup.metrics_of:
                told = conventions.trl_metrics(setup.metrics_of, setup, buffer, metrics, watched)
                self.in_words_of_trl.append(told)
                metrics |= in_our_names("ppo", setup.metrics_of, told)
            state.kl_control.update(metrics["kl"], len(given.scores))
            if schedule is not None:
                schedule.step()
            yield metrics

    @torch.no_grad()
    def _restart(self, setup: Setup) -> None:
        head = self.policy.value_head
        assert head is not None
        if setup.head_bias and head.bias is None:
            head.bias = nn.Parameter(torch.zeros_like(head.weight[:, 0]))
        elif not setup.head_bias:
            head.bias = None  # type: ignore[assignment]
        for name, p in self.policy.named_parameters():
            p.copy_(self.start[name])

    def _judged(self, setup: Setup, given: Rollout, kl_coef: float) -> RolloutBuffer:
        config = setup.config
        # Before the first step all runs have the same weights: one scores for all.
        first = given is setup.rollouts[0]
        key = (setup.pad_id, setup.pad_in_prompts, config.temperature, config.kl)
        rollout = self._first.get(key) if first else None
        if rollout is None:
            rollout = self._rollout(setup, given)
        if first:
            self._first[key] = rollout
        if setup.leaking_rewards and config.whiten_rewards:
            return conventions.judge_leaking(rollout, config, kl_coef=kl_coef)
        return conventions.judge_marked(rollout, config, kl_coef=kl_coef)

    def _rollout(self, setup: Setup, given: Rollout) -> Scored:
        """The given responses, scored, with score cells if they are followed."""
        prompts, responses = (
            [tensor(ids) for ids in rows] for rows in (given.prompt_ids, given.response_ids)
        )
        if setup.pad_in_prompts is not None:
            prompts = [ids[ids != setup.pad_in_prompts] for ids in prompts]
        if setup.pad_id is None:
            return self._scored(setup, prompts, responses, given.scores)
        tokens = [conventions.before(ids, setup.pad_id) for ids in responses]
        cells = conventions.with_score_cell(tokens, filler=self.policy.pad_id)
        rollout = self._scored(setup, prompts, cells, given.scores)
        eos_id = self.policy.tokenizer.eos_token_id
        ended = tensor([bool((ids == eos_id).any()) for ids in responses])
        return conventions.marked(replace(rollout, ended=ended), tokens)

    def _scored(
        self,
        setup: Setup,
        prompts: Sequence[Tensor],
        responses: Sequence[Tensor],
        scores: Sequence[float],
    ) -> Scored:
        return score_rollout(
            *(self.policy, self.ref_policy),
            *(prompts, responses),
            tensor(scores, dtype=torch.float64),
            temperature=setup.config.temperature,
            kl=setup.config.kl,
            max_tokens=setup.config.max_tokens,
        )

    def _update(
        self, setup: Setup, optimizer: Optimizer, buffer: RolloutBuffer, number: int
    ) -> tuple[Metrics, list[Metrics]]:
        """All epochs over one rollout: means of their steps, and what was watched before each."""
        epochs, config = setup.epochs(number), setup.config
        steps: list[Metrics] = []
        watched: list[Metrics] = []
        made = 0
        for epoch in islice(epochs, config.epochs):
            made, first = made + 1, len(steps)
            for rows in epoch:
                step, averaged = self._step(setup, optimizer, buffer, rows)
                if counts_nothing(setup, step):
                    step |= {"policy_loss": 0.0, "value_loss": 0.0}
                steps.append(step)
                watched.append(averaged)
            passed = [x["update_k1"] for x in steps[first:]]
            moved = passed[-1] if setup.stop_by_last else math.fsum(passed) / len(passed)
            if config.stop_kl is not None and moved > config.stop_kl:
                break
        means = {name: math.fsum(x[name] for x in steps) / len(steps) for name in steps[0]}
        means["ratio_max"] = max(x["ratio_max"] for x in steps)
        return means | {"epochs": made}, watched

    def _step(
        self, setup: Setup, optimizer: Optimizer, buffer: RolloutBuffer, rows: Rows
    ) -> tuple[Metrics, Metrics]:
        """One backward pass: its metrics, and with `metrics_of` what trl averages beside them."""
        config = replace(setup.config, minibatch_size=len(rows))
        arguments = (self.policy, optimizer, buffer, tensor(rows), config)
        over_tokens = conventions.policy_loss_over_tokens(buffer, rows)
        with over_tokens if setup.pad_id is not None else nullcontext():
            if not setup.metrics_of:
                return ppo.ppo_epoch(*arguments), {}
            of_train = setup.metrics_of == "PPOTrainer"
            given = (self.policy, buffer.rollout, rows, config)
            behind = conventions.entropy_of_padding(*given) if of_train else tensor(0.0)
            with conventions.watched(*given) as learned:
                found = ppo.ppo_epoch(*arguments)
        if of_train:
            return found, conventions.over_cells(buffer.rollout, rows, learned, behind)
        return found, conventions.over_tokens(buffer, rows, learned)


class FollowingOptimizer(Optimizer):
    """An optimizer that follows trl in what the setup says."""

    def __init__(self, plain: Optimizer, setup: Setup) -> None:
        scheduler = None if setup.schedule_by_rollout else plain.scheduler
        super().__init__(
            plain.optimizer,
            scheduler,
            max_grad_norm=plain.max_grad_norm,
            precision=plain.precision,
        )
        self.setup, self.seen = setup, 0
        self.parts = setup.accumulated if setup.micro_batch_means else 1

    def backward(self, loss: Tensor) -> None:
        """Each of the micro-batches that are accumulated has an equal share."""
        super().backward(loss / self.parts)

    def step(self, batch: Any = None, metrics: Mapping[str, float] | None = None) -> float:
        """A step if enough micro-batches were seen; the norm is 0 if not."""
        self.seen += 1
        if counts_nothing(self.setup, metrics or {}):
            for p in self.parameters:
                p.grad = None if p.grad is None else torch.zeros_like(p)
        if self.seen % self.parts:
            return 0.0
        norm = super().step(batch, metrics)
        if self.setup.only_first_clipped:
            self.max_grad_norm = None
        return norm


def counts_nothing(setup: Setup, metrics: Mapping[str, float]) -> bool:
    """Whether trl would multiply the losses of this step by 0."""
    return setup.ratio_threshold is not None and metrics.get("ratio", 0.0) > setup.ratio_threshold


def _schedule(optimizer: Optimizer, config: PPOConfig) -> Any:
    return get_scheduler(
        "constant_with_warmup" if config.schedule == "constant" else config.schedule,
        optimizer.optimizer,
        num_warmup_steps=round(config.warmup_share * config.steps),
        num_training_steps=config.steps,
    )


@dataclass
class Given:
    """What both sides are given: rollouts, the weights of the value head, and what is to be said of
    the encoded prompts."""

    rollouts: list[Rollout]
    value_head: list[float]
    report: str


def make_rollouts(
    folder: str | Path,
    rows: Sequence[Mapping[str, Any]],
    reward: RewardFunction,
    config: RolloutConfig,
    *,
    steps: int,
    template: str,
) -> Given:
    """Sample `steps` rollouts from the start policy, and score them.

    A response ends before a pad token that the policy has drawn, as it does for trl of 1.12.

    Args:
        folder: of the start policy.
        rows: with ``prompt`` and any further columns; drawn in the order of the config's seed.
        reward: any callable of texts; of a `RewardModel` its ``score``.
        config: says batch size, longest response, temperature and seed.
        template: for the prompts.

    Raises:
        BadInput: if model, rows or reward cannot be used.
    """
    policy = Policy.from_pretrained(folder, critic="none")
    room = min(policy.positions, 2**20) - config.max_new_tokens
    codec = Codec(policy.tokenizer, int(room), config.max_new_tokens, template=template)
    prompts, report = codec.encode_prompts(rows)
    cursor = Cursor(prompts, seed=config.seed)
    rng = torch.Generator().manual_seed(config.seed + 10**6)
    rollouts = []
    for _ in range(steps):
        group = getattr(config, "group_size", 1)
        batch = [
            prompt
            for prompt in cursor.take_across(config.batch_size // group)
            for _ in range(group)
        ]
        prompt_ids = [prompt.ids for prompt in batch]
        response_ids = sample(
            policy,
            prompt_ids,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            rng=rng,
        )
        response_ids = [_without_pad(ids, policy.tokenizer) for ids in response_ids]
        texts = [policy.decode(ids) for ids in response_ids]
        scores = call_reward(reward, [x.text for x in batch], texts, [x.columns for x in batch])
        rollouts.append(
            Rollout(
                [ids.tolist() for ids in prompt_ids],
                [ids.tolist() for ids in response_ids],
                scores.tolist(),
            )
        )
    width = policy.lm.get_output_embeddings().weight.shape[1]
    rng = torch.Generator().manual_seed(config.seed + HEAD_SEED)
    head = torch.randn(width, generator=rng) / width**0.5
    return Given(rollouts, head.tolist(), describe(report, codec))


def _without_pad(ids: Tensor, tokenizer: Any) -> Tensor:
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        return ids
    kept = conventions.before(ids, tokenizer.pad_token_id)
    return kept if len(kept) else tensor([tokenizer.eos_token_id])
