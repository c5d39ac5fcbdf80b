"""RLOO of a policy against a reward: each response is judged beside the others to its prompt.

Without options: on the embedded world, where a missing --model or --reward_model is trained first.
With --data give --model and --reward_model or --reward, as to train_ppo.py. The model lands in
<out>/rloo.
"""

from rlhf_min.config import RLOOConfig
from rlhf_min.harness.cli import OnlineOptions, check_room, command, parse
from rlhf_min.harness.inputs import load_inputs
from rlhf_min.harness.run.folder import check_out


@command
def main() -> None:
    options, config = parse(__doc__, OnlineOptions, RLOOConfig)
    check_room(config, options.max_response_tokens)
    out = check_out(options, "rloo")
    inputs = load_inputs(options, "rloo", seed=config.seed)
    # Only now, since torch takes seconds to import: what can be refused is refused at once.
    from rlhf_min.harness.report import finish
    from rlhf_min.harness.stages import rloo, rollouts

    start = rollouts.prepare(options, config, inputs, out)
    rloo.run(*start, ref_device=options.torch_device("reward_device"))
    print(f"{', '.join(['model', *finish.show(out)])} and metrics.jsonl are in {out}")


if __name__ == "__main__":
    main()
