"""The whole of RLHF in one command: SFT, reward model, PPO, DPO, and what they are worth.

Without options it runs on the embedded question-answer world, offline, in a few minutes.
"""

import time
from dataclasses import dataclass
from typing import Any, TypeVar

from rlhf_min import dpo, ppo, reward, sft
from rlhf_min.config import option, require_positive, require_seed
from rlhf_min.evaluation import evaluate_policies
from rlhf_min.harness import report, stages
from rlhf_min.harness.checkpoint import save_policy, save_reward_model
from rlhf_min.harness.cli import RunOptions, command, parse, recipe_for
from rlhf_min.harness.inputs import load_inputs, make_codec, start_policy, start_reward_model
from rlhf_min.harness.run import check_out, start_log

Config = TypeVar("Config", bound=Any)
MINIBATCH = ppo.PPOConfig.minibatch_size


@dataclass(frozen=True)
class QuickstartOptions(RunOptions):
    """Options of the quickstart; the commands for single stages have all others."""

    seed: int = option(0, "Of the world, the models, the data's order and all sampling.")
    sft_epochs: int | None = option(None, "Passes of SFT. Default: SFTConfig's.")
    reward_epochs: int | None = option(None, "Passes of the reward model. Default: RewardConfig's.")
    ppo_steps: int | None = option(None, "Rollouts of PPO. Default: PPOConfig's.")
    ppo_batch_size: int | None = option(None, "Prompts in one rollout. Default: PPOConfig's.")
    dpo_epochs: int | None = option(None, "Passes of DPO. Default: DPOConfig's.")
    test_prompts: int = option(600, "Test prompts that the models are compared on.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "sft_epochs", "reward_epochs", "ppo_steps", "dpo_epochs")
        require_positive(self, "test_prompts", "ppo_batch_size")
        require_seed(self, "seed")


@command
def main() -> None:
    options = parse(__doc__, QuickstartOptions)
    started = time.perf_counter()
    out = check_out(options, "quickstart")
    inputs = load_inputs(options, None, seed=options.seed)
    sft_policy = start_policy(options, inputs.texts, critic="none", seed=options.seed)
    reward_model = start_reward_model(options, inputs.texts, seed=options.seed)
    codec = make_codec(sft_policy, options)
    sft_config = configured(sft.SFTConfig, options, epochs=options.sft_epochs)
    reward_config = configured(reward.RewardConfig, options, epochs=options.reward_epochs)
    ppo_config = configured(
        ppo.PPOConfig,
        options,
        steps=options.ppo_steps,
        batch_size=options.ppo_batch_size,
        minibatch_size=min(options.ppo_batch_size or ppo.PPOConfig.batch_size, MINIBATCH),
        max_new_tokens=options.max_response_tokens,
    )
    dpo_config = configured(dpo.DPOConfig, options, epochs=options.dpo_epochs)
    configs = (options, sft_config, reward_config, ppo_config, dpo_config)
    log = start_log(out, *configs)

    stages.run_sft(sft_policy, codec, inputs, sft_config, log)
    save_policy(sft_policy, out / "sft")

    reward_report = stages.run_reward(
        reward_model, inputs, reward_config, log, sft_policy=sft_policy, codec=codec
    )
    save_reward_model(reward_model, out / "reward_model")
    print(reward_report)

    ppo_policy = stages.run_ppo(
        sft_policy, codec, reward_model, inputs, ppo_config, log, ref_device=reward_model.device
    )
    save_policy(ppo_policy, out / "ppo")

    dpo_policy = stages.run_dpo(
        sft_policy, codec, inputs, dpo_config, log, ref_device=reward_model.device
    )
    save_policy(dpo_policy, out / "dpo")

    test = inputs.test[: options.test_prompts]
    prompts, cut = codec.encode_prompts(test)
    print(f"evaluation on {len(prompts)} prompts that no stage was trained on; {cut}")
    evaluations = evaluate_policies(
        {"sft": sft_policy, "ppo": ppo_policy, "dpo": dpo_policy},
        sft_policy.reference(reward_model.device),
        reward_model.score,
        prompts,
        [row["references"] for row in test],
        baseline="sft",
        monitors=inputs.monitors,
        max_new_tokens=options.max_response_tokens,
        max_tokens=ppo_config.max_tokens,
        seed=options.seed,
    )
    results = report.results_json(
        evaluations, reward_model=reward_report.estimates, seed=options.seed
    )
    report.write_json(out / "results.json", results)
    report.write_samples(out / "samples.md", evaluations, [row["prompt"] for row in test])
    report.write_curves(out / "curves.png", log)
    print(report.results_table(evaluations, baseline="sft"))
    print(
        f"\n{time.perf_counter() - started:.0f} s; curves.png, samples.md, metrics.jsonl, "
        f"results.json and the models are in {out}"
    )


def configured(
    config_class: type[Config], options: QuickstartOptions, **given: int | None
) -> Config:
    """The stage's own defaults, or a pretrained model's, with what the command line gives."""
    values = recipe_for(config_class, options) | {k: v for k, v in given.items() if v is not None}
    return config_class(seed=options.seed, **values)


if __name__ == "__main__":
    main()
