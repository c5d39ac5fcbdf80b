"""PPO of a policy against a reward model, any Python function, or a weighted sum of both.

Without options: on the embedded world, where a missing --model or --reward_model is trained first.
With --data give --model and --reward_model or --reward. The model and its value head land in
<out>/ppo.

    --reward my_rewards.py:brevity                 def brevity(prompts, responses) -> list of floats
    --reward '0.7*runs/reward_model' '-0.3*my_rewards:length'
    --reward runs/sentiment@POSITIVE               the log-probability of a classifier's label
"""

from rlhf_min.config import PPOConfig, RewardConfig, SFTConfig
from rlhf_min.harness.cli import OnlineOptions, check_room, command, parse
from rlhf_min.harness.inputs import load_inputs
from rlhf_min.harness.run.folder import check_out, start_log


@command
def main() -> None:
    options, config = parse(__doc__, OnlineOptions, PPOConfig)
    check_room(config, options.max_response_tokens)
    out = check_out(options, "ppo")
    inputs = load_inputs(options, "ppo", seed=config.seed)
    # Only now, since torch takes seconds to import: what can be refused is refused at once.
    from rlhf_min.harness.models import make_codec, start_policy, start_reward_model
    from rlhf_min.harness.report import finish
    from rlhf_min.harness.rewards import WeightedSum, given_reward
    from rlhf_min.harness.stages import ppo, reward, sft

    policy = start_policy(
        options, inputs.texts, critic=config.critic if options.model else "none", seed=config.seed
    )
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
    device = options.torch_device("reward_device")
    ppo.run(policy, codec, given, inputs, config, log, ref_device=device)
    print(f"{', '.join(['model', *finish.show(out)])} and metrics.jsonl are in {out}")


if __name__ == "__main__":
    main()
