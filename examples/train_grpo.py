"""GRPO of a policy against a reward: each response is judged beside others to the same prompt.

Without options: on the embedded world, where a missing --model or --reward_model is trained first.
With --data give --model and --reward_model or --reward, as to train_ppo.py. The model lands in
<out>/grpo. What followed GRPO:

    DAPO         --loss_mean token --clip_high 0.28 --kl_coef 0 --mask_cut
    Dr. GRPO     --loss_mean constant --advantage_scale none --kl_coef 0
    GSPO         --ratio_level sequence --clip 3e-4 --clip_high 4e-4 --kl_coef 0

Of DAPO two parts are not here: groups of equal rewards are not sampled again, and a long response
is not charged before it is cut.
"""

from rlhf_min.config import GRPOConfig
from rlhf_min.harness.cli import OnlineOptions, check_room, command, parse
from rlhf_min.harness.inputs import load_inputs
from rlhf_min.harness.run.folder import check_out


@command
def main() -> None:
    options, config = parse(__doc__, OnlineOptions, GRPOConfig)
    check_room(config, options.max_response_tokens)
    out = check_out(options, "grpo")
    inputs = load_inputs(options, "grpo", seed=config.seed)
    # Only now, since torch takes seconds to import: what can be refused is refused at once.
    from rlhf_min.harness.report import finish
    from rlhf_min.harness.stages import grpo, rollouts

    start = rollouts.prepare(options, config, inputs, out)
    grpo.run(*start, ref_device=options.torch_device("reward_device"))
    print(f"{', '.join(['model', *finish.show(out)])} and metrics.jsonl are in {out}")


if __name__ == "__main__":
    main()
