"""What the stages that sample responses share: PPO, GRPO and RLOO as the commands run them."""

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rlhf_min import online
from rlhf_min.config import RewardConfig, RLOOConfig, RolloutConfig, SFTConfig
from rlhf_min.data import PromptExample
from rlhf_min.encoding.codec import Codec
from rlhf_min.harness import preflight
from rlhf_min.harness.cli import OnlineOptions, RunOptions, check_room
from rlhf_min.harness.inputs import Inputs, print_report
from rlhf_min.harness.models import make_codec, start_policy, start_reward_model
from rlhf_min.harness.preflight import Check, Row
from rlhf_min.harness.report.curves import Curve, Range
from rlhf_min.harness.report.findings import Finding, last_fifth
from rlhf_min.harness.report.tokens import token_records
from rlhf_min.harness.rewards import WeightedSum, given_reward, models_in, sources, unserved
from rlhf_min.harness.rows.encoding_report import describe, describe_heldout, summary
from rlhf_min.harness.run import layout
from rlhf_min.harness.run.checkpoint import Snapshot
from rlhf_min.harness.run.folder import start_log
from rlhf_min.harness.run.log import MetricsLog, note
from rlhf_min.harness.run.reading import Run
from rlhf_min.harness.run.saved_models import save_policy
from rlhf_min.harness.stages import reward, sft
from rlhf_min.harness.stages.run_stage import policy_and_reference, run_stage, sample_responses
from rlhf_min.loading.reward_function import RewardFunction, call_reward
from rlhf_min.masking import masked_mean
from rlhf_min.policy import Critic, Policy
from rlhf_min.reward_model import RewardModel
from rlhf_min.rollout import Rollout, RolloutBuffer, score_rollout
from rlhf_min.sampling import sample
from rlhf_min.speed.cache import rows_at_once

MEASURED = {
    "score": "higher",
    "k1": "lower",
    "response_length": "higher",
    "distinct_2": "higher",
    "repeated_4": "lower",
}
WRITES = (layout.SAMPLES, layout.TOKENS)
EVAL_PROMPTS = 128  # fixed prompts that are answered now and then
SAMPLES = 8  # of these, written down as texts each time
ROLLOUT_PARTS = ("scores", "logprobs", "ref_logprobs", "kl", "values")
TOO_FAR = 3  # shown where the KL is too large


def trained_before(options: RunOptions) -> list[str]:
    """The policy and the reward model, unless they are given."""
    given = options.reward_model is not None or bool(getattr(options, "reward", ()))
    return ["sft"] * (options.model is None) + ["reward_model"] * (not given)


# What their preflight checks


def checks(
    policy: Policy,
    ref_policy: Policy,
    reward_model: RewardModel | RewardFunction,
    config: RolloutConfig,
    state: online.State,
) -> Iterator[Check]:
    """What they rely on, on a rollout of a few tokens with a generator of its own.

    Raises:
        BadInput: what the reward itself raises.
    """
    examples: Sequence[PromptExample] = state.cursor.examples
    prompts = heapq.nsmallest(preflight.ROWS, examples, key=lambda x: len(x.ids))
    # Of unequal lengths, so that there is padding on the left while they are sampled from.
    prompt_ids = [x.ids[-(preflight.PROMPT_TOKENS - i) :] for i, x in enumerate(prompts)]
    yield preflight.no_empty_row([(x.ids, x.ids) for x in examples])
    yield eos_is_known(policy)
    yield from preflight.half_precision(config.precision, policy.device)
    longest = max(len(x.ids) for x in examples) + config.max_new_tokens
    yield from preflight.policy_memory(
        policy,
        [ref_policy, *models_in(reward_model)],
        state.optimizer,
        (prompt_ids[0], prompt_ids[0][:1]),
        tokens=preflight.largest_batch(longest, config.minibatch_size, config.max_tokens),
        cached_tokens=min(config.batch_size, rows_at_once(policy.lm, longest)) * longest,
    )
    response_ids = sample(
        policy,
        prompt_ids,
        max_new_tokens=min(config.max_new_tokens, preflight.RESPONSE_TOKENS),
        temperature=config.temperature,
        rng=torch.Generator().manual_seed(config.seed),
    )
    rows = list(zip(prompt_ids, response_ids, strict=True))
    yield not_all_empty(response_ids, policy.tokenizer.eos_token_id)
    yield preflight.passes_agree(policy, rows)
    tolerance = preflight.tolerance(policy.lm.dtype, config.precision)
    longest_row = max(rows, key=preflight.row_length)
    yield preflight.head_equals_model(policy, longest_row, tolerance)
    yield preflight.row_alone_equals_batch(policy, longest_row, tolerance)
    rollout = scored(policy, ref_policy, rows, config)
    yield ref_policy_equals_policy(rollout, tolerance)
    yield ratio_is_one(policy, rollout, config, tolerance)
    reward = reward_model.score if isinstance(reward_model, RewardModel) else reward_model
    texts, columns = [x.text for x in prompts], [x.columns for x in prompts]
    responses = [policy.decode(ids) for ids in response_ids]
    yield reward_varies(call_reward(reward, texts, responses, columns), responses)


def eos_is_known(policy: Policy) -> Check:
    """The policy can sample its end."""
    eos_id, vocabulary = policy.tokenizer.eos_token_id, policy.lm.get_output_embeddings().weight
    known = eos_id is not None and 0 <= eos_id < len(vocabulary)
    return Check(
        "EOS outside the vocabulary",
        0 if known else 1,
        0,
        f"EOS is id {eos_id}, and the model has {len(vocabulary)} tokens, so no response could end",
        "give the model's own tokenizer, with an EOS token",
        words=f"EOS is id {eos_id} of {len(vocabulary)}",
    )


def not_all_empty(response_ids: Sequence[Tensor], eos_id: int) -> Check:
    """The policy writes something before it ends."""
    empty = sum(int(ids[0]) == eos_id for ids in response_ids)
    return Check(
        "sampled responses that end at once",
        empty,
        len(response_ids) - 1,
        "the policy writes nothing that a reward could score",
        "fine-tune it on demonstrations first, or look at --template",
        words=f"{empty} of {len(response_ids)}",
    )


def scored(
    policy: Policy, ref_policy: Policy, rows: Sequence[Row], config: RolloutConfig
) -> Rollout:
    """The rows as they would be scored, with the absolute difference as KL."""
    prompt_ids, response_ids = zip(*rows, strict=True)
    return score_rollout(
        policy,
        ref_policy,
        prompt_ids,
        response_ids,
        torch.zeros(len(rows)),
        temperature=config.temperature,
        kl="abs",
        max_tokens=config.max_tokens,
    )


def ref_policy_equals_policy(rollout: Rollout, tolerance: float) -> Check:
    """The KL to the reference, token by token, before training."""
    return Check(
        "KL to the reference, per token",
        float(masked_mean(rollout.kl, rollout.mask)),
        tolerance,
        "policy and reference differ before training",
        "start both from the same weights",
    )


def ratio_is_one(
    policy: Policy, rollout: Rollout, config: RolloutConfig, tolerance: float
) -> Check:
    """The learning pass gives the probabilities of the scoring pass."""
    policy.train()
    with torch.no_grad():
        new = policy(rollout.sequences, temperature=config.temperature)
    off = ((new.logprobs - rollout.logprobs).exp() - 1).abs()
    return Check(
        "ratio against 1, in train mode",
        float(masked_mean(off, rollout.mask)),
        tolerance,
        "the model computes something else in train mode than in eval mode",
        "use a model without batch normalisation or other layers that know the mode",
    )


def reward_varies(scores: Tensor, responses: Sequence[str]) -> Check:
    """Different responses do not all get the same score."""
    constant = len(set(responses)) > 1 and float(scores.max() - scores.min()) == 0
    return Check(
        "constant reward",
        int(constant),
        0,
        f"{len(set(responses))} different responses all score {float(scores[0]):.4g}",
        "if that stays so, there is nothing to learn: look at the reward",
        words=f"{float(scores.min()):.3g} to {float(scores.max()):.3g} on {len(scores)} responses",
        warning=True,
    )


# How they are run


def prepare(
    options: OnlineOptions,
    config: RolloutConfig,
    inputs: Inputs,
    out: Path,
) -> tuple[Policy, Codec, RewardModel | RewardFunction, Inputs, RolloutConfig, MetricsLog]:
    """What such a command gives to `run`: the policy, its codec, the reward, rows, config, and log.

    A policy and a reward model that are not given are trained first.
    """
    critic = critic_of(config) if options.model else "none"
    policy = start_policy(options, inputs.texts, critic=critic, seed=config.seed)
    codec = make_codec(policy, options)
    given = given_reward(options, config)
    if isinstance(given, WeightedSum) and len(given.parts) > 1:
        inputs.monitors |= given.monitors
    log = start_log(out, options, config, monitors=inputs.monitors)
    if options.model is None:
        sft.run(policy, codec, inputs, SFTConfig(seed=config.seed), log)
    if given is None:
        given = start_reward_model(options, inputs.texts, seed=config.seed)
        reward_config = RewardConfig(seed=config.seed)
        print(reward.run(given, inputs, reward_config, log, sft_policy=policy, codec=codec))
    return policy, codec, given, inputs, config, log


def run(
    algorithm: ModuleType,
    stage: str,
    title: str,
    start: Policy,
    codec: Codec,
    reward_model: RewardModel | RewardFunction,
    inputs: Inputs,
    config: Any,
    log: MetricsLog,
    *,
    ref_device: torch.device | None = None,
) -> Policy:
    """Train a copy of the policy against the reward; the start stays as its reference.

    The trained model is saved in the run's folder before it is measured.

    Args:
        algorithm: its ``new_state`` and ``train`` are called; `config` is of its class.
        stage, title: its names, as the stage's file has them.
        ref_device: where the reference is. Default: beside the reward model, if there is one.
    """
    reward = reward_model.score if isinstance(reward_model, RewardModel) else reward_model
    ref_device = ref_device or getattr(reward_model, "device", None)
    check_room(config, codec.max_response_tokens)
    unused = unserved(reward_model, list(inputs.prompts[0]))
    prompts, eval_prompts, encoding = _encoded(codec, inputs)
    report = print_report(*unused, f"{title} on {len(prompts)} prompts; {encoding}")
    policy, ref_policy = policy_and_reference(start, critic_of(config), ref_device)
    state = algorithm.new_state(policy, prompts, config)
    scorers = {f"reward_model_{i}": x for i, x in enumerate(models_in(reward_model))}
    snapshot = Snapshot(
        stage,
        policy,
        state,
        partial(save_policy, policy),
        models={"policy": policy, "ref_policy": ref_policy, **scorers},
        texts=[row["prompt"] for row in inputs.prompts],
        examples=prompts,
        heldout=eval_prompts,
        sources=sources(reward_model),
        total=config.steps,
        alone=partial(alone, policy, config),
    )
    gold = inputs.monitors.get("gold_reward")
    samples = _Samples(stage, start, policy, reward, eval_prompts, config, gold)
    steps = algorithm.train(
        policy,
        ref_policy,
        reward,
        config,
        state,
        monitors=inputs.monitors,
        eval_prompts=eval_prompts,
        on_rollout=samples.keep,
    )
    run_stage(
        snapshot,
        checks(policy, ref_policy, reward_model, config, state),
        samples.write_down(steps, log, state),
        inputs,
        log,
        title=title,
        report=report,
        show=("score", "kl", "gold_reward"),
    )
    snapshot.save_model(log.folder / stage)
    _conclude(title, samples, state, log, reward_model, unused)
    return policy


def _encoded(codec: Codec, inputs: Inputs) -> tuple[list[PromptExample], list[PromptExample], str]:
    """Prompts to train on, fixed ones, and what is to be said of their cuts."""
    prompts, cut = codec.encode_prompts(inputs.prompts)
    fixed, fixed_cut = codec.encode_prompts(inputs.eval_prompts[:EVAL_PROMPTS])
    return prompts, fixed, describe(cut, codec) + describe_heldout(fixed_cut, len(fixed))


def critic_of(config: RolloutConfig) -> Critic:
    """PPO's configs name one, the others have none."""
    return getattr(config, "critic", "none")


def alone(
    policy: Policy, config: RolloutConfig, buffer: RolloutBuffer
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """What a rollout holds of each row, and then what the losses of each row are made of."""
    rollout, rows = buffer.rollout, range(len(buffer.rollout.scores))
    for row in rows:
        yield row, {name: getattr(rollout, name)[row] for name in ROLLOUT_PARTS}
    for row in rows:
        sequences = rollout.sequences.select([row])
        width = sequences.mask.shape[1]
        new = policy(sequences, temperature=config.temperature)
        parts = {"logprobs": new.logprobs}
        if new.values is not None:
            parts["values"] = new.values
        yield (
            row,
            {
                **parts,
                "ratio": _ratio(new.logprobs - rollout.logprobs[[row], :width], config),
                "advantages": buffer.advantages[[row], :width],
                "returns": buffer.returns[[row], :width],
            },
        )


def _ratio(log_ratio: Tensor, config: RolloutConfig) -> Tensor:
    """Of each token, or, in RLOO, of the whole response, which overflows where no token's does."""
    return (log_ratio.sum(1) if isinstance(config, RLOOConfig) else log_ratio).exp()


def too_far(
    state: online.State, buffer: RolloutBuffer | None, max_kl: float | None
) -> tuple[str, list[dict[str, Any]]] | None:
    """Why the KL has ended a run: what to print, and the responses that show it.

    Returns:
        The text, and `TOO_FAR` rows with ``prompt``, ``response``, ``kl`` in nats and ``score``;
        None if it has not ended the run.
    """
    if not state.too_far or buffer is None:
        return None
    rollout = buffer.rollout
    k1 = torch.where(rollout.mask, rollout.logprobs - rollout.ref_logprobs, 0).sum(1)  # (B,)
    samples = [
        {
            "prompt": rollout.prompts[row],
            "response": rollout.responses[row],
            "kl": float(k1[row]),
            "score": float(rollout.scores[row]),
        }
        for row in k1.argsort(descending=True)[:TOO_FAR].tolist()
    ]
    lines = [
        f"ended after step {state.step}: the KL to the reference is {float(k1.mean()):.3f} nats "
        f"per response, above --max_kl {max_kl}; its largest:"
    ]
    for x in samples:
        lines.append(
            f"  KL {x['kl']:.2f}, score {x['score']:.3f}: {x['prompt']!r} -> {x['response']!r}"
        )
    return "\n".join(lines), samples


def _conclude(
    title: str,
    samples: "_Samples",
    state: online.State,
    log: MetricsLog,
    reward_model: RewardModel | RewardFunction,
    unserved: Sequence[str],
) -> None:
    """What has changed, what ended the run before its last step, and what there is to tell of the
    reward."""
    if samples.prompts:
        after = samples.respond(samples.policy)[0]
        note(log.folder, samples.stage, change=change(samples.before[0], after))
    if far := too_far(state, samples.last, samples.config.max_kl):
        print(far[0])
    if state.too_far and samples.last is None and state.step < samples.config.steps:
        print(f"{title} was ended by --max_kl before; another one does not take it up again")
    notes = reward_model.notes if isinstance(reward_model, WeightedSum) else ()
    note(log.folder, samples.stage, reward_notes=[*unserved, *notes])
    for scorer in models_in(reward_model):
        print(f"scored by the reward model; {summary(scorer.cuts)}")


@dataclass
class _Samples:
    """The responses that are written down: to fixed prompts, sampled with the same random numbers
    each time, and of the last rollout."""

    stage: str
    start: Policy
    policy: Policy
    reward: RewardFunction
    prompts: Sequence[PromptExample]
    config: RolloutConfig
    gold: RewardFunction | None
    last: RolloutBuffer | None = None  # what was learned from last

    def keep(self, buffer: RolloutBuffer) -> None:
        """Called with each rollout when it has been learned from."""
        self.last = buffer

    def respond(self, policy: Policy, n: int | None = None) -> tuple[Tensor, list[str]]:
        """Scores, ``(n,)``, and texts of responses to the first n prompts, or to all."""
        prompts, config = self.prompts[:n], self.config
        responses = sample_responses(
            policy,
            prompts,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            seed=config.seed,
        )
        texts, columns = [p.text for p in prompts], [p.columns for p in prompts]
        return call_reward(self.reward, texts, responses, columns), responses

    @cached_property
    def before(self) -> tuple[Tensor, list[str]]:
        """The same before training."""
        return self.respond(self.start) if self.prompts else (torch.empty(0), [])

    def rows(self, scores: Tensor, responses: Sequence[str]) -> list[dict[str, Any]]:
        """Rows for ``samples.jsonl``, one for each response."""
        prompts = [prompt.text for prompt in self.prompts[: len(responses)]]
        rows = [
            {"prompt": prompt, "response": response, "score": score}
            for prompt, response, score in zip(prompts, responses, scores.tolist(), strict=True)
        ]
        if self.gold is not None and rows:
            for row, truth in zip(rows, call_reward(self.gold, prompts, responses), strict=True):
                row["gold_reward"] = float(truth)
        return rows

    def write_down(
        self, steps: Iterator[dict[str, float]], log: MetricsLog, state: online.State
    ) -> Iterator[dict[str, float]]:
        """The steps as they are; whenever they were evaluated, a few samples are written down, and
        a few responses of the rollout token by token (of the last rollout: all)."""
        if state.step == 0:
            scores, responses = self.before
            log.add_samples(self.stage, 0, self.rows(scores[:SAMPLES], responses[:SAMPLES]))
        for metrics in steps:
            if self.prompts and "eval/score" in metrics:
                rows = self.rows(*self.respond(self.policy, SAMPLES))
                log.add_samples(self.stage, state.step, rows)
            if far := too_far(state, self.last, self.config.max_kl):
                log.add_samples(self.stage, state.step, far[1])
            over = state.step == self.config.steps or state.too_far
            if self.last is not None and (over or "eval/score" in metrics):
                with state.optimizer.autocast():
                    records = token_records(
                        self.policy,
                        self.last,
                        self.config,
                        step=state.step,
                        kl_coef=metrics.get("kl_coef", self.config.kl_coef),
                        rows=None if over else SAMPLES,
                        gold=self.gold,
                    )
                log.append(layout.TOKENS, [{"stage": self.stage, **record} for record in records])
            yield metrics


def change(before: Tensor, after: Tensor) -> dict[str, float]:
    """What training did to the scores of the same prompts, ``(N,)`` each.

    Returns:
        Both means, their difference ``mean``, its standard error, and ``n``.
    """
    difference, n = after - before, len(before)
    return {
        "n": n,
        "before": float(before.mean()),
        "after": float(after.mean()),
        "mean": float(difference.mean()),
        "error": float(difference.std()) / n**0.5 if n > 1 else 0.0,
    }


# What a report shows of them

RATIO_LIMIT = 10.0  # a policy so far from the one that sampled learns little from its samples
SURE = 2.0  # standard errors
FEW_ENDED = 0.9  # of the responses: what is cut was not meant to end there
STEPS_NAMED = 5  # of those that something happened in
KL = Range(-1, 15)  # of the KL to the reference


def curves(
    stage: str, *own: Curve, kl: Range | Callable[[Mapping[str, Any]], Range] = KL
) -> tuple[Curve, ...]:
    """The curves that all of them have.

    Args:
        own: what this one has beside them.
        kl: the healthy KL to the reference, in nats per response.
    """
    return (
        Curve(
            stage,
            "Score",
            "",
            (("score", "rollout"), ("eval/score", "eval")),
            "It rises, fast at first, and then flattens; a fall after that is a run that came "
            "apart.",
            Range(low=-3, of="steps"),
            "lower --learning_rate or raise --kl_coef; --keep_best eval/score keeps the best model",
        ),
        Curve(
            stage,
            "Gold reward",
            "",
            (("gold_reward", "rollout"), ("eval/gold_reward", "eval")),
            "It rises with the score; where it falls while the score goes on rising, the policy "
            "exploits the reward model.",
            Range(low=-3, of="steps"),
            "raise --kl_coef, take fewer --steps, or train the reward model on more pairs",
        ),
        Curve(
            stage,
            "KL to the reference",
            "nats per response",
            (("k1", "k1"), ("k3", "k3")),
            "It grows from 0 and levels off, with both estimates together; far above 0 the scores "
            "are of texts that the reward model has never seen, below 0 sampling and scoring "
            "disagree.",
            kl,
            "raise --kl_coef or lower --learning_rate",
        ),
        Curve(
            stage,
            "Entropy",
            "nats per token",
            (("rollout_entropy", "rollout"),),
            "It sinks slowly as the policy makes up its mind; near 0 all responses are the same, "
            "and nothing more is explored.",
            Range(0.1, 2, of="starts"),
            "raise --kl_coef or take fewer --steps",
        ),
        *own,
        Curve(
            stage,
            "Response length",
            "tokens",
            (("response_length", "rollout"), ("eval/response_length", "eval")),
            "It moves only as far as the task asks; running off to the longest or the shortest "
            "response is a cheap trick that the reward pays for.",
            Range(0.5, 2, of="starts"),
            "look at the samples, and let the reward not pay for length",
        ),
    )


def clipped_range(config: Mapping[str, Any]) -> Range:
    """Of the clipped share: GSPO's clip is narrow on purpose, and holds back half of all."""
    return Range(high=0.9 if config.get("ratio_level") == "sequence" else 0.3)


def group_curves(stage: str) -> tuple[Curve, ...]:
    """What groups of responses have beside them."""
    return (
        Curve(
            stage,
            "Clipped",
            "share of the update",
            (("clip_fraction", "policy"),),
            "A few in a hundred; many mean that an update goes far from the rollout it learns "
            "from, or that the clip is as narrow as GSPO's.",
            clipped_range,
            "lower --learning_rate or take fewer --epochs",
        ),
        Curve(
            stage,
            "Groups of equal rewards",
            "share",
            (("equal_groups", "groups"),),
            "A few; nothing is learned from them, and where all are equal nothing is learned at "
            "all.",
            Range(high=0.5),
            "give a reward that tells responses apart, prompts that are neither too easy nor too "
            "hard, or a larger --group_size",
        ),
    )


def headline(stage: str, title: str, run: Run) -> str | None:
    """How the score on fixed prompts changed."""
    change = run.noted(stage, "change")
    return change and f"{title}: score {change_in_words(change)}."


def findings(stage: str, run: Run) -> Iterator[Finding]:
    """What went wrong in its steps, and whether the score rose."""
    yield from (Finding(stage, note) for note in run.noted(stage, "reward_notes") or [])
    if too_far := run.too_far(stage):
        yield Finding(
            stage,
            "was ended by --max_kl",
            f"after step {too_far[0]}",
            f"the KL of {too_far[1]:.3g} nats per response exceeds {run.config(stage)['max_kl']}",
            "raise --kl_coef, lower --learning_rate, or allow more",
        )
    yield from improvement(stage, run.noted(stage, "change"))
    steps, ratios = run.series(stage, "ratio_max")
    spikes = [step for step, ratio in zip(steps, ratios, strict=True) if ratio > RATIO_LIMIT]
    if spikes:
        named = ", ".join(map(str, spikes[:STEPS_NAMED])) + ", ..." * (len(spikes) > STEPS_NAMED)
        yield Finding(
            stage,
            f"ratios above {RATIO_LIMIT:g}",
            f"in {len(spikes)} of {len(steps)} steps ({named})",
            f"up to {max(ratios):.3g} in step {steps[ratios.index(max(ratios))]}",
            "a lower --learning_rate, fewer --epochs or --stop_kl keep them near 1",
        )
    spreads = run.series(stage, "score_std")[1]
    if spreads and 2 * sum(spread == 0 for spread in spreads) >= len(spreads):
        yield Finding(
            stage,
            "all responses of a rollout had the same score",
            f"in {sum(spread == 0 for spread in spreads)} of {len(spreads)} steps",
            to_do="give a reward that tells them apart, or a larger --batch_size",
        )
    ended = last_fifth(run.series(stage, "eos_rate")[1])
    if ended is not None and ended < FEW_ENDED:
        yield Finding(
            stage,
            "responses were cut",
            "in the last fifth of its steps",
            f"{1 - ended:.0%} of them did not end by themselves",
            "raise --max_new_tokens, or charge it with --eos_penalty",
        )


def improvement(stage: str, change: Mapping[str, Any] | None) -> Iterator[Finding]:
    """A score on fixed prompts that did not rise by two standard errors."""
    if change is None or change["n"] < 2 or change["mean"] > SURE * change["error"]:
        return
    fell = change["mean"] < -SURE * change["error"]
    yield Finding(
        stage,
        "the score fell" if fell else "the score is not shown to have risen",
        figure=change_in_words(change),
        to_do="lower --learning_rate or raise --kl_coef, and look at the samples"
        if fell
        else "take more --steps, a higher --learning_rate or a lower --kl_coef",
    )


def change_in_words(change: Mapping[str, Any]) -> str:
    """The score before and after."""
    errors = ""
    if change["error"] > 0:
        times = change["mean"] / change["error"]
        errors = f", {times:.1f} standard errors of {change['error']:.3f}"
    return (
        f"{change['before']:.3f} before, {change['after']:.3f} after, on {change['n']} fixed "
        f"prompts ({change['mean']:+.3f}{errors})"
    )
