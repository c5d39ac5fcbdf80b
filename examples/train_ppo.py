"""PPO of a policy against a reward model.

Without options: on the embedded world, where a missing --model or --reward_model is trained first.
With --data both must be given. The model and its value head land in <out>/ppo.
"""

from rlhf_min import reward, sft
from rlhf_min.errors import require
from rlhf_min.harness import report, stages
from rlhf_min.harness.checkpoint import save_policy
from rlhf_min.harness.cli import RunOptions, check_out, command, open_run, parse
from rlhf_min.harness.inputs import load_inputs, make_codec, start_policy, start_reward_model
from rlhf_min.harness.metrics import MetricsLog
from rlhf_min.models import Critic, RewardModel
from rlhf_min.ppo import PPOConfig


@command
def main() -> None:
    options, config = parse(__doc__, RunOptions, PPOConfig)
    require(
        options.data is None or (options.model is not None and options.reward_model is not None),
        "PPO on your own prompts starts from trained models: give --model (see train_sft.py) and "
        "--reward_model (see train_reward_model.py)",
    )
    stages.check_room(config, options.max_response_tokens)
    out = check_out(options, "ppo")
    inputs = load_inputs(options, "ppo", seed=config.seed)
    critic: Critic = "none" if options.model is None else config.critic
    policy = start_policy(options, inputs.texts, critic=critic, seed=config.seed)
    codec = make_codec(policy, options)
    if options.reward_model is not None:
        reward_model = RewardModel.from_pretrained(options.reward_model).to(policy.device)
    else:
        reward_model = start_reward_model(options, inputs.texts, seed=config.seed)

    log = MetricsLog(lambda: open_run(out, options, config))
    if options.model is None:
        stages.run_sft(policy, codec, inputs, sft.SFTConfig(seed=config.seed), log)
    if options.reward_model is None:
        reward_config = reward.RewardConfig(seed=config.seed)
        print(
            stages.run_reward(
                reward_model, inputs, reward_config, log, sft_policy=policy, codec=codec
            )
        )
    policy = stages.run_ppo(policy, codec, reward_model, inputs, config, log)

    save_policy(policy, out / "ppo")
    report.write_curves(out / "curves.png", log)
    print(f"model, curves.png and metrics.jsonl are in {out}")


if __name__ == "__main__":
    main()
