"""The whole of RLHF in one command: SFT, reward model, PPO, DPO, RLOO, and what they are worth.

Without options it runs on the embedded question-answer world, offline, in a few minutes.
"""

import time
from dataclasses import dataclass

from rlhf_min.config import MAX_SEED, DPOConfig, PPOConfig, RewardConfig, SFTConfig, option
from rlhf_min.harness.cli import RunOptions, command, configured, in_groups, parse
from rlhf_min.harness.inputs import load_inputs
from rlhf_min.harness.run.folder import check_out, start_log

MINIBATCH = PPOConfig.minibatch_size


@dataclass(frozen=True)
class QuickstartOptions(RunOptions):
    """Options of the quickstart; the commands for single stages have all others."""

    seed: int = option(0, "Of all that is drawn.", at_least=0, at_most=MAX_SEED)
    sft_epochs: int | None = option(None, "Passes of SFT. Default: SFTConfig's.", above=0)
    reward_epochs: int | None = option(
        None, "Passes of the reward model. Default: RewardConfig's.", above=0
    )
    ppo_steps: int | None = option(None, "Rollouts of PPO. Default: PPOConfig's.", above=0)
    ppo_batch_size: int | None = option(
        None, "Prompts in one rollout. Default: PPOConfig's.", above=0
    )
    dpo_epochs: int | None = option(None, "Passes of DPO. Default: DPOConfig's.", above=0)
    rloo_steps: int | None = option(None, "Rollouts of RLOO. Default: as PPO.", above=0)
    test_prompts: int = option(600, "Test prompts that the models are compared on.", above=0)


@command
def main() -> None:
    options = parse(__doc__, QuickstartOptions)
    started = time.perf_counter()
    out = check_out(options, "quickstart")
    inputs = load_inputs(options, None, seed=options.seed)
    sft_config = configured(SFTConfig, options, epochs=options.sft_epochs)
    reward_config = configured(
        RewardConfig, options, started_from="reward_model", epochs=options.reward_epochs
    )
    ppo_config = configured(
        PPOConfig,
        options,
        steps=options.ppo_steps,
        batch_size=options.ppo_batch_size,
        minibatch_size=min(options.ppo_batch_size or PPOConfig.batch_size, MINIBATCH),
        max_new_tokens=options.max_response_tokens,
    )
    dpo_config = configured(DPOConfig, options, epochs=options.dpo_epochs)
    rloo_config = in_groups(ppo_config, options, steps=options.rloo_steps)
    # Only now, since torch takes seconds to import: what can be refused is refused at once.
    from rlhf_min.harness.models import make_codec, start_policy, start_reward_model
    from rlhf_min.harness.report import finish
    from rlhf_min.harness.stages import dpo, evaluation, ppo, reward, rloo, sft

    sft_policy = start_policy(options, inputs.texts, critic="none", seed=options.seed)
    reward_model = start_reward_model(options, inputs.texts, seed=options.seed)
    codec = make_codec(sft_policy, options)
    configs = (sft_config, reward_config, ppo_config, dpo_config, rloo_config)
    log = start_log(out, options, *configs, monitors=inputs.monitors)

    sft.run(sft_policy, codec, inputs, sft_config, log)

    learned = reward.run(
        reward_model, inputs, reward_config, log, sft_policy=sft_policy, codec=codec
    )
    print(learned)

    ppo_policy = ppo.run(sft_policy, codec, reward_model, inputs, ppo_config, log)

    device = reward_model.device
    dpo_policy = dpo.run(sft_policy, codec, inputs, dpo_config, log, ref_device=device)

    rloo_policy = rloo.run(sft_policy, codec, reward_model, inputs, rloo_config, log)

    evaluation.run(
        {"sft": sft_policy, "ppo": ppo_policy, "dpo": dpo_policy, "rloo": rloo_policy},
        reward_model,
        codec,
        inputs,
        log,
        pairs=learned.estimates,
        n=options.test_prompts,
        max_tokens=ppo_config.max_tokens,
        seed=options.seed,
    )
    shown = finish.show(out)
    seconds = time.perf_counter() - started
    print(f"\n{seconds:.0f} s; {', '.join([*shown, 'models'])} are in {out}")


if __name__ == "__main__":
    main()
