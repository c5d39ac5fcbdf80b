"""Rejection sampling: SFT on the best of n of the model's own responses, beside a random one.

The algorithm is in rlhf_min/rejection.py. Without options: on the embedded world, where a missing
--model or --reward_model is trained first. With --data give --model and --reward_model or --reward.
The models land in <out>/best_of_n and <out>/random_of_n; both and their start are compared on
prompts that none was trained on. --resume takes up the models that are trained first; the rounds
begin anew, and give the same again.
"""

import time
from dataclasses import dataclass

from rlhf_min.config import RewardConfig, SFTConfig, option
from rlhf_min.harness.cli import OnlineOptions, command, parse
from rlhf_min.harness.inputs import load_inputs
from rlhf_min.harness.run.folder import check_out, start_log


@dataclass(frozen=True)
class RejectionOptions(OnlineOptions):
    """Options beside those of the rounds' SFT."""

    rounds: int = option(2, "Of sampling, choosing and SFT.", above=0)
    n: int = option(8, "Responses to each prompt, of which one is chosen.", at_least=2)
    prompts: int = option(480, "Prompts of each round, drawn anew; at most all there are.", above=0)
    test_prompts: int = option(600, "Prompts that the models are compared on.", above=0)


@dataclass(frozen=True, kw_only=True)
class RoundConfig(SFTConfig):
    """Options of the SFT in each round. It goes on from a trained model, so it is more careful."""

    learning_rate: float = option(
        5e-4, "AdamW's rate after warm-up.", above=0, pretrained=(2e-5, "Alpaca, Taori et al. 2023")
    )


@command
def main() -> None:
    options, config = parse(__doc__, RejectionOptions, RoundConfig)
    started = time.perf_counter()
    out = check_out(options, "rejection_sampling")
    inputs = load_inputs(options, "ppo", seed=config.seed)
    # Only now, since torch takes seconds to import: what can be refused is refused at once.
    from rlhf_min import rejection
    from rlhf_min.harness.models import make_codec, start_policy, start_reward_model
    from rlhf_min.harness.report import finish
    from rlhf_min.harness.rewards import given_reward
    from rlhf_min.harness.run.saved_models import save_policy
    from rlhf_min.harness.stages import evaluation, reward, sft
    from rlhf_min.harness.stages.run_stage import copy_policy
    from rlhf_min.reward_model import RewardModel

    start = start_policy(options, inputs.texts, critic="none", seed=config.seed)
    codec = make_codec(start, options)
    given = given_reward(options, config)
    log = start_log(out, options, config, monitors=inputs.monitors)
    if options.model is None:
        sft.run(start, codec, inputs, SFTConfig(seed=config.seed), log)
    if given is None:
        given = start_reward_model(options, inputs.texts, seed=config.seed)
        reward_config = RewardConfig(seed=config.seed)
        print(reward.run(given, inputs, reward_config, log, sft_policy=start, codec=codec))
    score = given.score if isinstance(given, RewardModel) else given

    prompts, policies = codec.encode_prompts(inputs.prompts)[0], {"start": start}
    ways = {"best_of_n": rejection.best, "random_of_n": rejection.random_choice(config.seed)}
    for name, choose in ways.items():
        policies[name] = copy_policy(start, critic="none")
        for metrics in rejection.train(
            policies[name],
            prompts,
            score,
            choose,
            config,
            rounds=options.rounds,
            n=options.n,
            prompts_of_round=options.prompts,
            max_new_tokens=options.max_response_tokens,
        ):
            shown = (f"{key} {value:.4g}" for key, value in metrics.items())
            print(f"{name}: {', '.join(shown)}", flush=True)
        save_policy(policies[name], log.folder / name)
    inputs.test = inputs.test or inputs.eval_prompts
    n, seed = options.test_prompts, config.seed
    evaluation.run(policies, given, codec, inputs, log, pairs={}, n=n, max_tokens=8192, seed=seed)
    told = ", ".join(["models", *finish.show(out)])
    print(
        f"{time.perf_counter() - started:.0f} s; {told}, results.json and samples.md are in {out}"
    )


if __name__ == "__main__":
    main()
