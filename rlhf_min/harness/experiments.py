"""What the experiments share: runs measured on the way, several at once; best-of-n and pass@k."""

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformers.utils import logging as transformers_logging

from rlhf_min import distributed, dpo, estimates, grpo, ppo, rloo
from rlhf_min.config import DPOConfig, GRPOConfig, PPOConfig, RLOOConfig, RolloutConfig
from rlhf_min.encoding.codec import Codec
from rlhf_min.errors import BadInput, NonFinite
from rlhf_min.estimates import Estimate, mean_estimate
from rlhf_min.harness.cli import ExperimentOptions
from rlhf_min.harness.inputs import Inputs, load_inputs
from rlhf_min.harness.models import make_codec, start_policy, start_reward_model
from rlhf_min.harness.report import results
from rlhf_min.harness.run.folder import read_record, start_log
from rlhf_min.harness.run.saved_models import save_policy, save_reward_model
from rlhf_min.harness.run.terminal import outlive_terminal
from rlhf_min.harness.stages import reward, sft
from rlhf_min.harness.stages.rollouts import critic_of
from rlhf_min.harness.stages.run_stage import copy_policy, sample_texts
from rlhf_min.loading.reward_function import RewardFunction, call_reward
from rlhf_min.policy import Policy
from rlhf_min.reward import RewardConfig
from rlhf_min.reward_model import RewardModel
from rlhf_min.rollout import collect
from rlhf_min.sft import SFTConfig

LOOK_TOKENS = 8192  # padded tokens in one forward pass of a look; memory only
Columns = dict[str, np.ndarray]  # kl, score, gold_reward, ...: (N,) each, for N test prompts
Looks = dict[str, list[dict[int, Columns]]]  # by setting, seed and steps so far
Point = dict[str, Any]  # seed, step and what the columns' means are then, as JSON values
Config = RolloutConfig | DPOConfig
SAMPLING: dict[type, ModuleType] = {PPOConfig: ppo, GRPOConfig: grpo, RLOOConfig: rloo}
Job = TypeVar("Job")
Result = TypeVar("Result")


def load_world(options: ExperimentOptions) -> Inputs:
    """The rows of the embedded world, with as many pairs as are asked for."""
    inputs = load_inputs(options, None, seed=options.seed)
    inputs.pairs = inputs.pairs[: options.pairs]
    return inputs


def sampling_runs(
    options: ExperimentOptions,
    title: str,
    config_class: type[RolloutConfig],
    kl_coefs: Sequence[float],
    **settings: Any,
) -> dict[str, Sequence[Config]]:
    """The runs of PPO, or of what samples as many responses: a config for each KL coefficient and
    seed."""
    return {
        f"{title}, kl_coef {kl_coef:g}": [
            config_class(
                steps=options.ppo_steps,
                max_new_tokens=options.max_response_tokens,
                kl_coef=kl_coef,
                seed=seed,
                **settings,
            )
            for seed in range(options.seeds)
        ]
        for kl_coef in kl_coefs
    }


def prepare(
    options: ExperimentOptions, out: Path, inputs: Inputs
) -> tuple[Policy, RewardModel, Codec]:
    """The SFT model and the reward model that all runs share: as given, or trained now.

    They are left in `out`, where `run` finds them.
    """
    policy = start_policy(options, inputs.texts, critic="none", seed=options.seed)
    reward_model = start_reward_model(options, inputs.texts, seed=options.seed)
    codec = make_codec(policy, options)
    sft_config, config = SFTConfig(seed=options.seed), RewardConfig(seed=options.seed)
    log = start_log(out, options, sft_config, config)
    if options.model is None:
        sft.run(policy, codec, inputs, sft_config, log)
    else:
        save_policy(policy, log.folder / "sft")
    if options.reward_model is None:
        print(reward.run(reward_model, inputs, config, log, sft_policy=policy, codec=codec))
    else:
        save_reward_model(reward_model, log.folder / "reward_model")
    log.note_changes()
    return policy, reward_model, codec


def run_all(options: ExperimentOptions, out: Path, runs: Mapping[str, Sequence[Config]]) -> Looks:
    """What `run` returns for the configs of each setting, one for each seed."""
    jobs = [(name, config) for name, configs in runs.items() for config in configs]
    processes = min(torch.get_num_threads(), len(jobs))
    print(f"{len(jobs)} runs, {processes} at once", flush=True)
    configs = [config for _, config in jobs]
    done: Looks = {name: [] for name in runs}
    results = at_once(partial(run, options, out), configs, processes=processes)
    for (name, config), looks in zip(jobs, results, strict=True):
        done[name].append(looks)
        kl, gold = (looks[max(looks)][key].mean() for key in ("kl", "gold_reward"))
        print(f"  {name}, seed {config.seed}: KL {kl:.2f}, gold reward {gold:.2f}", flush=True)
    return done


def run(options: ExperimentOptions, out: Path, config: Config) -> dict[int, Columns]:
    """Train a copy of the SFT model on rollouts or by DPO; look at it now and then.

    A look samples the test prompts, with the same random numbers each time, and measures the
    responses. ``kl`` adds up the exact KL at each token: as unbiased as adding the log-ratios, but
    less noisy and never negative.

    Returns:
        The looks, by the number of steps before each (of DPO: optimizer steps, else rollouts).
    """
    inputs = load_world(options)
    sft_options = replace(options, model=str(out / "sft"), threads=None)  # each job has one
    start = start_policy(sft_options, [], critic="none", seed=options.seed)
    reward_model = RewardModel.from_pretrained(out / "reward_model", plain=options.plain)
    reward_model.to(options.torch_device("reward_device"))
    codec, ref_policy = make_codec(start, options), start.reference(reward_model.device)
    if isinstance(config, RolloutConfig):
        algorithm = SAMPLING[type(config)]
        policy = copy_policy(start, critic=critic_of(config))
        rollouts = algorithm.new_state(policy, codec.encode_prompts(inputs.prompts)[0], config)
        steps = algorithm.train(policy, ref_policy, reward_model.score, config, rollouts)
        total = config.steps
    else:
        policy = copy_policy(start, critic="none")
        state = dpo.new_state(policy, ref_policy, codec.encode_preferences(inputs.pairs)[0], config)
        steps = dpo.train(policy, ref_policy, config, state)
        total = dpo.total(state.cursor, config)
    prompts = codec.encode_prompts(inputs.test[: options.test_prompts])[0]
    exact = PPOConfig(max_new_tokens=options.max_response_tokens, kl="full", max_tokens=LOOK_TOKENS)

    def look() -> Columns:
        rng = torch.Generator().manual_seed(config.seed)
        rollout = collect(policy, ref_policy, reward_model.score, prompts, exact, rng=rng)
        columns = {"kl": rollout.kl.sum(1), "score": rollout.scores}
        for name, monitor in inputs.monitors.items():
            columns[name] = call_reward(monitor, rollout.prompts, rollout.responses)
        return {name: column.cpu().double().numpy() for name, column in columns.items()}

    at = {round(total * i / options.looks) for i in range(1, options.looks + 1)}
    looks = {0: look()}
    for step, _ in enumerate(steps, start=1):
        if step in at:
            looks[step] = look()
    return looks


def best_of_n(
    policy: Policy,
    reward_model: RewardModel,
    codec: Codec,
    inputs: Inputs,
    options: ExperimentOptions,
    *,
    samples: int,
) -> dict[int, Columns]:
    """What the best-scored of n responses to each test prompt is worth, for n = 1, 2, 4, ...

    Args:
        samples: responses to each prompt; n goes up to half of them.
    """
    rows = [row for row in inputs.test[: options.test_prompts] for _ in range(samples)]
    texts = list(zip(*sample_texts(policy, codec, rows, seed=options.seed), strict=True))
    prompts, responses = zip(*dict.fromkeys(texts), strict=True)  # equal texts are scored once
    values = {}  # (N, samples) each
    for name, reward_function in ({"score": reward_model.score} | inputs.monitors).items():
        once = call_reward(reward_function, prompts, responses).tolist()
        of_text = dict(zip(zip(prompts, responses, strict=True), once, strict=True))
        values[name] = np.array([of_text[text] for text in texts]).reshape(-1, samples)
    scores = values["score"]
    return {
        n: {
            "kl": estimates.best_of_n_kl(scores, n),
            "kl_bound": np.full(len(scores), estimates.best_of_n_bound(n)),
            **{name: estimates.best_of_n_mean(scores, x, n) for name, x in values.items()},
        }
        for n in [2**i for i in range(samples.bit_length() - 1)]
    }


# pass@k ---------------------------------------------------------------------------------------


def only_kinds(inputs: Inputs, kinds: Sequence[str]) -> None:
    """Leave of the embedded world's prompts and demonstrations only those of these kinds."""
    inputs.prompts, inputs.eval_prompts, inputs.test = (
        [row for row in rows if row["kind"] in kinds]
        for rows in (inputs.prompts, inputs.eval_prompts, inputs.test)
    )
    asked = {row["prompt"] for row in (*inputs.prompts, *inputs.eval_prompts)}
    inputs.demonstrations, inputs.heldout_demonstrations = (
        [row for row in rows if row["prompt"] in asked]
        for rows in (inputs.demonstrations, inputs.heldout_demonstrations)
    )


def passes(
    policies: Mapping[str, Policy],
    codec: Codec,
    rows: Sequence[dict[str, Any]],
    reward: RewardFunction,
    *,
    samples: int,
    seed: int,
) -> dict[str, dict[str, Estimate]]:
    """pass@k of each policy for k = 1, 2, 4, ..., and what the last gained over the first.

    Args:
        rows: with a prompt, and the columns that the reward names.
        reward: 1 for a response that is right.
        samples: responses to each prompt at temperature 1; k goes up to half of them.
        seed: of the samples, the same for all, and of the bootstrap over prompts.
    """
    each = [row for row in rows for _ in range(samples)]
    right = {}  # (P, samples) each
    for name, policy in policies.items():
        prompts, responses = sample_texts(policy, codec, each, seed=seed)
        rewards = call_reward(reward, prompts, responses, each).numpy()
        right[name] = rewards.reshape(-1, samples) == 1
    return pass_estimates(right, seed=seed)


def pass_estimates(right: Mapping[str, np.ndarray], *, seed: int) -> dict[str, dict[str, Estimate]]:
    """The same of what is known to be right, ``(P, N)`` each. The gain is that of each prompt."""
    first, *_, last = right
    found: dict[str, dict[str, Estimate]] = {name: {} for name in (*right, "gain")}
    for k in [2**i for i in range(right[first].shape[1].bit_length() - 1)]:
        columns = {name: estimates.pass_at_k(correct, k) for name, correct in right.items()}
        columns["gain"] = columns[last] - columns[first]
        for name, column in columns.items():
            found[name][f"pass@{k}"] = mean_estimate(column, seed=seed)
    return found


def pass_table(found: Mapping[str, Mapping[str, Estimate]]) -> str:
    """A line for each k, a column for each policy and one for the gain."""
    lines = [" " * 8 + "".join(f"{name:>25}" for name in found)]
    rows = next(iter(found.values()))
    for name in rows:
        lines.append(f"{name:<8}" + "".join(f"{of[name]!s:>25}" for of in found.values()))
    told = "held-out questions, temperature 1; 95% bootstrap intervals over them"
    return "\n".join([*lines, f"{rows['pass@1'].n} {told}"])


def save_passes(
    out: Path, name: str, found: Mapping[str, Mapping[str, Estimate]], *, seconds: float
) -> None:
    """Write the table as JSON, after the run's configuration."""
    values = {of: {k: x.as_json() for k, x in column.items()} for of, column in found.items()}
    results.write_json(out / f"{name}.json", read_record(out) | values | {"seconds": seconds})


# Several at once -------------------------------------------------------------------------------


def at_once(
    function: Callable[[Job], Result], jobs: Sequence[Job], *, processes: int
) -> Iterator[Result]:
    """What the function returns for each job, in their order.

    Every job has one thread, so that its numbers do not depend on how many run at once.

    Raises:
        BadInput: if a job raises it or `NonFinite`, or if its process is killed.
    """
    call = partial(_call, function)
    if processes == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield from map(call, jobs)
        finally:
            torch.set_num_threads(threads)
        return
    # Not forked, which the threads of PyTorch would not survive.
    with ProcessPoolExecutor(processes, get_context("spawn"), _start_process) as pool:
        try:
            yield from pool.map(call, jobs)
        except BrokenProcessPool as error:
            raise BadInput(
                f"one of {processes} processes was killed, perhaps for want of memory; "
                "lower --threads for fewer at once"
            ) from error


def _start_process() -> None:
    outlive_terminal()
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _call(function: Callable[[Job], Result], job: Job) -> Result:
    try:
        return function(job)
    except (BadInput, NonFinite) as error:  # which may hold what no process can send to another
        raise BadInput(str(error)) from None


# What was found --------------------------------------------------------------------------------


def verdict(runs: Sequence[Mapping[int, Columns]], *, seed: int) -> str:
    """Whether the gold reward turns down on the way, by how much, and what the score does then.

    Cross-fitted, since a peak is too high on the prompts that it is found on: it is found on one
    half of the prompts and the fall is measured on the other half, and the other way round.
    Intervals are over prompts.

    Args:
        runs: the looks of each seed, in order.
        seed: of the bootstrap.
    """
    gold, score, kl = (
        np.mean([[columns[key] for columns in looks.values()] for looks in runs], axis=0)
        for key in ("gold_reward", "score", "kl")
    )  # (looks, N) each
    of_other_half = [gold[:, 1::2].mean(1).argmax(), gold[:, ::2].mean(1).argmax()]
    prompts = np.arange(gold.shape[1])
    peaks = np.array(of_other_half)[prompts % 2]  # (N,)
    fall = mean_estimate(gold[peaks, prompts] - gold[-1], seed=seed)
    climb = mean_estimate(score[-1] - score[peaks, prompts], seed=seed)
    nats, peak = kl.mean(1), gold.mean(1).argmax()
    if fall.lo <= 0:
        return f"gold does not turn down within KL {nats.max():.1f} nats"
    meanwhile = f"climbs by {_short(climb)}" if climb.lo > 0 else "does not climb"
    return (
        f"gold peaks at KL {nats[peak]:.1f} nats and falls by {_short(fall)} until KL "
        f"{nats[-1]:.1f}, while the score {meanwhile}"
    )


def _short(estimate: Estimate) -> str:
    return f"{estimate.mean:.2f} [{estimate.lo:.2f}, {estimate.hi:.2f}]"


def points_of(found: Looks, *, seed: int) -> dict[str, list[Point]]:
    """A point for each look: the means of its columns with their bootstrap intervals."""
    return {
        name: [
            {"seed": number, "step": step}
            | {key: mean_estimate(column, seed=seed).as_json() for key, column in columns.items()}
            for number, looks in enumerate(runs)
            for step, columns in looks.items()
        ]
        for name, runs in found.items()
    }


def table(points: Mapping[str, Sequence[Point]], shown: Mapping[str, str]) -> str:
    """Where the runs of each setting end: the mean over the seeds, and the lowest and the highest.

    Args:
        points: by setting.
        shown: columns and their titles.
    """
    width = max(len(name) for name in points)
    lines = [" " * width + "".join(f"{title:>21}" for title in shown.values())]
    for name, group in points.items():
        cells = [spread(_by_step(group, key)[-1]) for key in shown]
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>21}" for cell in cells))
    return "\n".join(lines)


def spread(values: np.ndarray) -> str:
    """Mean, lowest and highest.

    >>> spread(np.array([2.0, 3.0, 7.0]))
    '4.00 (2.00-7.00)'
    """
    return f"{values.mean():.2f} ({values.min():.2f}-{values.max():.2f})"


def draw_curve(axes: Axes, points: Sequence[Point], x: str, y: str, **style: Any) -> None:
    """The means over the seeds, step by step, with bars from the lowest to the highest seed."""
    xs, ys = _by_step(points, x), _by_step(points, y)
    style |= {"marker": "o", "markersize": 3, "elinewidth": 0.7}
    axes.errorbar(xs.mean(1), ys.mean(1), xerr=_reach(xs), yerr=_reach(ys), **style)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _by_step(points: Sequence[Point], key: str) -> np.ndarray:  # (steps, seeds)
    steps = sorted({point["step"] for point in points})
    return np.array([[p[key]["mean"] for p in points if p["step"] == step] for step in steps])


def _reach(values: np.ndarray) -> np.ndarray:  # (steps, seeds) -> (2, steps), down and up
    mean = values.mean(1)
    return np.array([mean - values.min(1), values.max(1) - mean])


def save(out: Path, name: str, figure: Figure, **found: Any) -> None:
    """Write the results, after the run's configuration, as JSON, and the figure as PNG and SVG."""
    if not distributed.is_main():
        return
    results.write_json(out / f"{name}.json", read_record(out) | found)
    for suffix in ("png", "svg"):
        figure.savefig(out / f"{name}.{suffix}", dpi=110)
