"""Train a reward model on preference pairs, and see whether it knows more than the lengths.

Without options: a small new BERT on the embedded world. With --model its scores are normalised on
samples of that policy, otherwise on the training responses. The model lands in <out>/reward_model.
"""

from rlhf_min.config import RewardConfig
from rlhf_min.harness.cli import RunOptions, command, parse
from rlhf_min.harness.inputs import load_inputs
from rlhf_min.harness.run.folder import check_out, start_log


@command
def main() -> None:
    options, config = parse(__doc__, RunOptions, RewardConfig, started_from="reward_model")
    out = check_out(options, "reward_model")
    inputs = load_inputs(options, "reward", seed=config.seed)
    # Only now, since torch takes seconds to import: what can be refused is refused at once.
    from rlhf_min.harness.models import make_codec, start_policy, start_reward_model
    from rlhf_min.harness.report import finish, results
    from rlhf_min.harness.stages import reward

    reward_model = start_reward_model(options, inputs.texts, seed=config.seed)
    policy = codec = None
    if options.model is not None:
        policy = start_policy(options, inputs.texts, critic="none", seed=config.seed, trained=False)
        codec = make_codec(policy, options)

    log = start_log(out, options, config)
    found = reward.run(reward_model, inputs, config, log, sft_policy=policy, codec=codec)
    print(found)

    estimates = {name: estimate.as_json() for name, estimate in found.estimates.items()}
    results.write_json(out / "results.json", {"seed": config.seed, "reward_model": estimates})
    shown = finish.show(out)
    print(f"{', '.join(['model', *shown])}, results.json and metrics.jsonl are in {out}")


if __name__ == "__main__":
    main()
