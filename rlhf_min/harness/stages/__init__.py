"""The stages as the commands run them: encode and report, train with a bar, measure.

Each function takes models and rows, and leaves the trained model; nothing here is an algorithm.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_min import dpo, ppo, reward, sft
from rlhf_min.data import PromptExample
from rlhf_min.encoding.codec import Codec
from rlhf_min.errors import BadInput, require
from rlhf_min.estimates import Estimate, mean_estimate, proportion_estimate
from rlhf_min.evaluation import Evaluation, evaluate_policies
from rlhf_min.harness.inputs import (
    HELDOUT_ROWS,
    Inputs,
)
from rlhf_min.harness.preflight import check_dpo, check_ppo, check_reward, check_sft
from rlhf_min.harness.report import results
from rlhf_min.harness.report.finish import Spared
from rlhf_min.harness.report.tokens import token_records
from rlhf_min.harness.rewards import WeightedSum, models_in, sources, unserved
from rlhf_min.harness.rows.encoding_report import (
    encoded,
    encoded_heldout,
    encoded_pairs,
    require_some,
    summary,
)
from rlhf_min.harness.run import faults, layout
from rlhf_min.harness.run.checkpoint import Snapshot
from rlhf_min.harness.run.log import MetricsLog, note
from rlhf_min.harness.run.saved_models import save_policy, save_reward_model
from rlhf_min.policy import Critic, Policy
from rlhf_min.reward_model import RewardModel
from rlhf_min.rollout import RewardFunction, call_reward
from rlhf_min.sampling import sample

NORMALISE_ON = 512  # responses that the scores' mean and variance are taken from
EVAL_PROMPTS = 128  # fixed prompts that PPO looks at now and then
SAMPLES = 8  # of these, written down as texts each time


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


def run_sft(
    policy: Policy,
    codec: Codec,
    inputs: Inputs,
    config: sft.SFTConfig,
    log: MetricsLog,
) -> None:
    """Fine-tune the policy on the demonstrations, and save it in the run's folder."""
    examples, cut = codec.encode_demonstrations(inputs.demonstrations)
    heldout, heldout_cut = codec.encode_demonstrations(inputs.heldout_demonstrations)
    encoding = encoded(cut, codec) + encoded_heldout(heldout_cut, len(heldout))
    told = tell(f"SFT on {len(examples)} demonstrations; {encoding}")
    state = sft.new_state(policy, examples, config)
    total = sft.total(state.cursor, config)
    snapshot = Snapshot(
        "sft",
        policy,
        state,
        partial(save_policy, policy),
        models={"policy": policy},
        texts=[row["prompt"] for row in inputs.demonstrations],
        examples=examples,
        heldout=heldout,
        total=total,
    )
    if log.preflight and not log.has_checkpoint("sft"):
        check_sft(policy, config, state)
    log.resume(snapshot)
    note_start(log, snapshot, inputs, told, held_out=len(heldout))
    steps = sft.train(policy, config, state, heldout=heldout)
    log.follow("sft", steps, total=total, show=("loss", "eval/perplexity"), snapshot=snapshot)
    save_policy(policy, log.folder / "sft")


@dataclass(frozen=True)
class RewardReport:
    """How well a reward model ranks held-out pairs, beside two rules that only look at length."""

    estimates: dict[str, Estimate]
    normalised_on: str

    def __str__(self) -> str:
        lines = [f"  {name:<14} {estimate}" for name, estimate in self.estimates.items()]
        return "\n".join(["reward model on held-out pairs:", *lines, f"  {self.normalised_on}"])


def run_reward(
    reward_model: RewardModel,
    inputs: Inputs,
    config: reward.RewardConfig,
    log: MetricsLog,
    *,
    sft_policy: Policy | None = None,
    codec: Codec | None = None,
) -> RewardReport:
    """Train the reward model, normalise its scores, save it in the run's folder, and measure it.

    Args:
        sft_policy, codec: if given, the scores are normalised on samples of this policy, else on
            the training responses.
    """
    responses = [p["chosen"] for p in inputs.pairs] + [p["rejected"] for p in inputs.pairs]
    examples, heldout, told = _prepared(reward_model, inputs)
    state = reward.new_state(reward_model, examples, config)
    total = reward.total(state.cursor, config)
    snapshot = Snapshot(
        "reward_model",
        reward_model,
        state,
        partial(save_reward_model, reward_model),
        models={"reward_model": reward_model},
        texts=responses,
        examples=examples,
        heldout=heldout,
        total=total,
    )
    if log.preflight and not log.has_checkpoint("reward_model"):
        check_reward(reward_model, config, state)
    log.resume(snapshot)
    note_start(log, snapshot, inputs, told, held_out=len(heldout))
    steps = reward.train(reward_model, config, state, heldout=heldout[:HELDOUT_ROWS])
    log.follow(
        "reward_model", steps, total=total, show=("loss", "eval/accuracy"), snapshot=snapshot
    )
    pairs = [{"prompt": x.prompt, "chosen": x.chosen, "rejected": x.rejected} for x in heldout]
    chosen, rejected = reward.pair_scores(reward_model, pairs)
    faults.require_finite("reward_model", {"a held-out score": float((chosen + rejected).sum())})
    with Spared(log.folder / layout.REWARD_MODEL, "the page will lack calibration and margins"):
        results.write_json(log.folder / layout.REWARD_MODEL, results.pairs_json(chosen, rejected))
    scale = "scores as trained, not normalised"
    if config.normalise and sft_policy is not None and codec is not None:
        rows = inputs.prompts[:NORMALISE_ON]
        texts = sample_texts(sft_policy, codec, rows, seed=config.seed)
        scale = _normalised(reward_model, *texts, "samples of the SFT model")
    elif config.normalise:
        prompts = [pair["prompt"] for pair in inputs.pairs] * 2
        scale = _normalised(reward_model, prompts, responses, "training responses")
    save_reward_model(reward_model, log.folder / "reward_model")
    gold = inputs.monitors.get("gold_reward")
    estimates = measure_reward(chosen, rejected, pairs, gold=gold, seed=config.seed)
    found = {name: estimate.as_json() for name, estimate in estimates.items()}
    note(log.folder, "reward_model", estimates=found, scale=scale)
    return RewardReport(estimates, scale)


def _prepared(
    reward_model: RewardModel, inputs: Inputs
) -> tuple[list[reward.RewardExample], list[reward.RewardExample], list[str]]:
    """The pairs to train on and those held out, without those that are equal to the model, and
    what was said of them."""
    examples, cut = reward.prepare_pairs(reward_model, inputs.pairs)
    heldout, heldout_cut = reward.prepare_pairs(reward_model, inputs.heldout_pairs)
    told = tell(f"reward model on {len(examples)} pairs; {encoded_pairs(cut, reward_model)}")
    if equal := heldout_cut.equal_after_cut + heldout_cut.equal_tokens:
        n = len(inputs.heldout_pairs)
        told += tell(f"  {equal} of {n} held-out pairs are left out likewise")
    alike = "after the cut or because its tokenizer tells them not apart"
    require(
        len(examples) > 0,
        "no pair is left to train on: the reward model reads the same on both sides of all, "
        f"{alike}; give pairs that differ earlier or in more than signs, or a --reward_model with "
        "more positions or tokens",
    )
    require(
        len(heldout) > 0,
        "no pair is left to measure on: the reward model reads the same on both sides of all "
        f"{len(inputs.heldout_pairs)} held out, {alike}; give another --seed, a larger "
        "--heldout_share, or other pairs as --heldout_data",
    )
    return examples, heldout, told


def _normalised(
    reward_model: RewardModel, prompts: Sequence[str], responses: Sequence[str], source: str
) -> str:
    try:
        mean, std = reward.normalise(reward_model, prompts, responses)
    except BadInput as error:  # the trained model is worth more than its scale
        return f"scores as trained, not normalised: {error}"
    told = f"normalised on {len(prompts)} {source} (was {mean:.3f} +- {std:.3f})"
    if not reward_model.has_bias:
        told += "; the mean stays, since the last layer has no bias"
    return told


def measure_reward(
    chosen: Tensor,
    rejected: Tensor,
    pairs: Sequence[reward.Pair],
    *,
    gold: RewardFunction | None,
    seed: int,
) -> dict[str, Estimate]:
    """Accuracy, ties, margin, the two length rules, and what the gold reward itself reaches.

    Args:
        chosen, rejected: scores of the pairs, ``(N,)`` each.
    """
    longer, shorter = reward.length_rules(pairs)
    estimates = {
        "accuracy": proportion_estimate(int((chosen > rejected).sum()), len(pairs)),
        "ties": proportion_estimate(int((chosen == rejected).sum()), len(pairs)),
        "margin": mean_estimate((chosen - rejected).numpy(), seed=seed),
        "longer_wins": mean_estimate(longer.numpy(), seed=seed),
        "shorter_wins": mean_estimate(shorter.numpy(), seed=seed),
    }
    if gold is not None:
        prompts = [pair["prompt"] for pair in pairs]
        gold_chosen = call_reward(gold, prompts, [pair["chosen"] for pair in pairs])
        gold_rejected = call_reward(gold, prompts, [pair["rejected"] for pair in pairs])
        right = int((gold_chosen > gold_rejected).sum())
        estimates["gold_accuracy"] = proportion_estimate(right, len(pairs))
    return estimates


def run_ppo(
    start: Policy,
    codec: Codec,
    reward_model: RewardModel | RewardFunction,
    inputs: Inputs,
    config: ppo.PPOConfig,
    log: MetricsLog,
    *,
    ref_device: torch.device | None = None,
) -> Policy:
    """Train a copy of the policy against the reward; the start stays as its reference.

    The trained model is saved in the run's folder before it is measured.

    Args:
        ref_device: where the reference is. Default: beside the reward model, if there is one.
    """
    if ref_device is None and isinstance(reward_model, RewardModel):
        ref_device = reward_model.device
    reward_function = reward_model.score if isinstance(reward_model, RewardModel) else reward_model
    check_room(config, codec.max_response_tokens)
    unused = unserved(reward_model, list(inputs.prompts[0]))
    prompts, cut = codec.encode_prompts(inputs.prompts)
    eval_prompts, eval_cut = codec.encode_prompts(inputs.eval_prompts[:EVAL_PROMPTS])
    encoding = encoded(cut, codec) + encoded_heldout(eval_cut, len(eval_prompts))
    told = tell(*unused, f"PPO on {len(prompts)} prompts; {encoding}")
    policy, ref_policy = copy_policy(start, critic=config.critic), start.reference(ref_device)
    state = ppo.new_state(policy, prompts, config)
    if log.preflight and not log.has_checkpoint("ppo"):
        check_ppo(policy, ref_policy, reward_model, config, state)
    gold = inputs.monitors.get("gold_reward")
    looks = _Looks(policy, reward_function, eval_prompts, config, gold)
    before, responses = looks.look() if eval_prompts else (torch.empty(0), [])
    snapshot = Snapshot(
        "ppo",
        policy,
        state,
        partial(save_policy, policy),
        models=_named(policy, ref_policy, models_in(reward_model)),
        texts=[row["prompt"] for row in inputs.prompts],
        examples=prompts,
        heldout=eval_prompts,
        sources=sources(reward_model),
        total=config.steps,
    )
    log.resume(snapshot)
    note_start(log, snapshot, inputs, told, held_out=len(eval_prompts))
    if state.step == 0:
        log.add_samples("ppo", 0, looks.samples(before[:SAMPLES], responses[:SAMPLES]))
    steps = ppo.train(
        policy,
        ref_policy,
        reward_function,
        config,
        state,
        monitors=inputs.monitors,
        eval_prompts=eval_prompts,
    )
    steps = looks.write_down(steps, log, state)
    log.follow(
        "ppo", steps, total=config.steps, show=("score", "kl", "gold_reward"), snapshot=snapshot
    )
    save_policy(policy, log.folder / "ppo")
    if eval_prompts:
        note(log.folder, "ppo", change=change(before, looks.look()[0]))
    _tell_rest(state, config, log, reward_model, unused)
    return policy


def _tell_rest(
    state: ppo.State,
    config: ppo.PPOConfig,
    log: MetricsLog,
    reward_model: RewardModel | RewardFunction,
    unserved: Sequence[str],
) -> None:
    """What ended the run before its last step, and what there is to tell of the reward."""
    if far := faults.too_far(state, config.max_kl):
        print(far[0])
    if state.too_far and state.last is None and state.step < config.steps:
        print("PPO was ended by --max_kl before; another one does not take it up again")
    notes = reward_model.notes if isinstance(reward_model, WeightedSum) else ()
    note(log.folder, "ppo", reward_notes=[*unserved, *notes])
    for scorer in models_in(reward_model):
        print(f"scored by the reward model; {summary(scorer.cuts)}")


@dataclass
class _Looks:
    """Looks at fixed prompts, with the same random numbers each time."""

    policy: Policy
    reward_function: RewardFunction
    prompts: Sequence[PromptExample]
    config: ppo.PPOConfig
    gold: RewardFunction | None

    def look(self, n: int | None = None) -> tuple[Tensor, list[str]]:
        """Scores, ``(n,)``, and texts of responses to the first n prompts, or to all."""
        prompts, config = self.prompts[:n], self.config
        responses = _responses(
            self.policy, prompts, config.max_new_tokens, config.temperature, config.seed
        )
        texts, columns = [p.text for p in prompts], [p.columns for p in prompts]
        return call_reward(self.reward_function, texts, responses, columns), responses

    def samples(self, scores: Tensor, responses: Sequence[str]) -> list[dict[str, Any]]:
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
        self, steps: Iterator[dict[str, float]], log: MetricsLog, state: ppo.State
    ) -> Iterator[dict[str, float]]:
        """The steps as they are; whenever they were evaluated, a few samples are written down, and
        a few responses of the rollout token by token (of the last rollout: all)."""
        for metrics in steps:
            if self.prompts and "eval/score" in metrics:
                log.add_samples("ppo", state.step, self.samples(*self.look(SAMPLES)))
            if far := faults.too_far(state, self.config.max_kl):
                log.add_samples("ppo", state.step, far[1])
            over = state.step == self.config.steps or state.too_far
            if (
                state.last is not None
                and "kl_coef" in metrics
                and (over or "eval/score" in metrics)
            ):
                with state.optimizer.autocast():
                    records = token_records(
                        self.policy,
                        state.last,
                        self.config,
                        step=state.step,
                        kl_coef=metrics["kl_coef"],
                        rows=None if over else SAMPLES,
                        gold=self.gold,
                    )
                log.append(layout.TOKENS, records)
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


def check_room(config: ppo.PPOConfig, max_response_tokens: int) -> None:
    """Raise `BadInput` if PPO could write more than there is room for beside the prompt."""
    require(
        config.max_new_tokens <= max_response_tokens,
        f"max_new_tokens {config.max_new_tokens} exceeds max_response_tokens "
        f"{max_response_tokens}; lower the first or raise the second",
    )


def run_dpo(
    start: Policy,
    codec: Codec,
    inputs: Inputs,
    config: dpo.DPOConfig,
    log: MetricsLog,
    *,
    ref_device: torch.device | None = None,
) -> Policy:
    """Train a copy of the policy on the preference pairs; the start stays as its reference.

    The trained model is saved in the run's folder when its measures are finite.
    """
    examples, cut = codec.encode_preferences(inputs.pairs)
    heldout, heldout_cut = codec.encode_preferences(inputs.heldout_pairs[:HELDOUT_ROWS])
    encoding = encoded(cut, codec) + encoded_heldout(heldout_cut, len(heldout))
    told = tell(f"DPO on {len(examples)} pairs; {encoding}")
    require(
        len(examples) > 0,
        "no pair is left to train on: all are equal as tokens or equal after the cut; raise "
        "--max_response_tokens, and --max_length with it, or give other pairs",
    )
    policy, ref_policy = copy_policy(start, critic="none"), start.reference(ref_device)
    state = dpo.new_state(policy, ref_policy, examples, config)
    total = dpo.total(state.cursor, config)
    snapshot = Snapshot(
        "dpo",
        policy,
        state,
        partial(save_policy, policy),
        models=_named(policy, ref_policy),
        texts=[pair["prompt"] for pair in inputs.pairs],
        examples=examples,
        heldout=heldout,
        total=total,
    )
    if log.preflight and not log.has_checkpoint("dpo"):
        check_dpo(policy, ref_policy, config, state)
    log.resume(snapshot)
    note_start(log, snapshot, inputs, told, held_out=len(heldout))
    steps = dpo.train(policy, ref_policy, config, state, heldout=heldout)
    log.follow("dpo", steps, total=total, show=("loss", "eval/accuracy"), snapshot=snapshot)
    found = {}
    for name, pairs in [("trained on", state.cursor.examples), ("held out", heldout)]:
        if pairs:
            shown = pairs[:HELDOUT_ROWS]
            with state.optimizer.autocast():
                measured = dpo.evaluate(policy, ref_policy, shown, config)
            faults.require_finite("dpo", measured)
            right = round(measured["eval/accuracy"] * len(shown))
            found[name] = proportion_estimate(right, len(shown)).as_json()
    save_policy(policy, log.folder / "dpo")
    note(log.folder, "dpo", accuracy=found)
    return policy


def run_evaluation(
    policies: Mapping[str, Policy],
    reward_model: RewardModel,
    codec: Codec,
    inputs: Inputs,
    log: MetricsLog,
    *,
    n: int,
    max_tokens: int,
    seed: int,
) -> dict[str, Evaluation]:
    """Compare models on the first n test prompts; the first model is baseline and reference.

    Some responses of each are written into the run's folder.
    """
    log.note_changes()
    prompts, cut = codec.encode_prompts(inputs.test[:n])
    require_some(cut)
    print(f"evaluation on {len(prompts)} prompts that no stage was trained on; {summary(cut)}")
    baseline, first = next(iter(policies.items()))
    evaluations = evaluate_policies(
        policies,
        first.reference(reward_model.device),
        reward_model.score,
        prompts,
        [prompt.columns["references"] for prompt in prompts],
        baseline=baseline,
        monitors=inputs.monitors,
        max_new_tokens=codec.max_response_tokens,
        max_tokens=max_tokens,
        seed=seed,
    )
    texts = [prompt.text for prompt in prompts]
    with Spared(log.folder / "samples.md", "evaluate_models.py writes one too"):
        results.write_samples(log.folder / "samples.md", evaluations, texts)
    gold = inputs.monitors.get("gold_reward")
    with Spared(log.folder / layout.SAMPLES, "the page will lack the samples of the test"):
        log.add_samples("test", 0, results.sample_rows(evaluations, texts, gold=gold), anew=True)
    return evaluations


def _named(
    policy: Policy, ref_policy: Policy, reward_models: Sequence[RewardModel] = ()
) -> dict[str, Policy | RewardModel]:
    models: dict[str, Policy | RewardModel] = {"policy": policy, "ref_policy": ref_policy}
    return models | {f"reward_model_{i}": model for i, model in enumerate(reward_models)}


def copy_policy(policy: Policy, *, critic: Critic) -> Policy:
    """A copy of the language model to train; a value head is kept if it fits, else it is new."""
    copied = Policy(copy.deepcopy(policy.lm), policy.tokenizer, critic=critic)
    if critic == policy.critic:
        copied.load_critic(policy.critic_tensors())
    return copied


def sample_texts(
    policy: Policy, codec: Codec, rows: Sequence[dict[str, Any]], *, seed: int
) -> tuple[list[str], list[str]]:
    """Prompts and sampled responses as texts."""
    prompts: list[PromptExample] = codec.encode_prompts(rows)[0]
    responses = _responses(policy, prompts, codec.max_response_tokens, 1.0, seed)
    return [prompt.text for prompt in prompts], responses


def _responses(
    policy: Policy,
    prompts: Sequence[PromptExample],
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> list[str]:
    response_ids = sample(
        policy,
        [prompt.ids for prompt in prompts],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        rng=torch.Generator().manual_seed(seed),
    )
    return [policy.decode(ids) for ids in response_ids]
