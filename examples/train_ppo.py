"""PPO of a policy against a reward model, any Python function, or a weighted sum of both.

Without options: on the embedded world, where a missing --model or --reward_model is trained first.
With --data give --model and --reward_model or --reward. The model and its value head land in
<out>/ppo.

    --reward my_rewards.py:brevity                 def brevity(prompts, responses) -> list of floats
    --reward '0.7*runs/reward_model' '-0.3*my_rewards:length'
    --reward runs/sentiment@POSITIVE               the log-probability of a classifier's label
"""

from rlhf_min.config import PPOConfig
from rlhf_min.harness.cli import OnlineOptions, check_room, command, parse
from rlhf_min.harness.inputs import load_inputs
from rlhf_min.harness.run.folder import check_out


@command
def main() -> None:
    options, config = parse(__doc__, OnlineOptions, PPOConfig)
    check_room(config, options.max_response_tokens)
    out = check_out(options, "ppo")
    inputs = load_inputs(options, "ppo", seed=config.seed)
    # Only now, since torch takes seconds to import: what can be refused is refused at once.
    from rlhf_min.harness.report import finish
    from rlhf_min.harness.stages import ppo, rollouts

    start = rollouts.prepare(options, config, inputs, out)
    ppo.run(*start, ref_device=options.torch_device("reward_device"))
    print(f"{', '.join(['model', *finish.show(out)])} and metrics.jsonl are in {out}")


if __name__ == "__main__":
    main()
