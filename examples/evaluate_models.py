"""Compare trained policies on the same prompts: scores, win rates, KL, BLEU, ROUGE, diversity.

The models are the folders sft, ppo, dpo, rloo and reward_model of --run, or any folders or names.
The first of --models is the baseline of the win rates and the reference of the KL. A file given by
--data is used whole: give rows that the models were not trained on.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from rlhf_min.config import MAX_SEED, option
from rlhf_min.errors import BadInput, require
from rlhf_min.harness.cli import OF_TRAINING, RunOptions, command, parse
from rlhf_min.harness.inputs import load_inputs, model_folders, reward_model_folder
from rlhf_min.harness.run.folder import check_out, open_run, run_seed

UNUSED = ("heldout_split", *OF_TRAINING)
INSTEAD = {
    "model": "give the models to compare with --models a,b,c, not --model",
    "resume": "an evaluation has nothing to resume; start it again",
    "heldout_data": "--data is evaluated on as a whole",
}


@dataclass(frozen=True)
class EvaluateOptions(RunOptions):
    """Which models to compare, and on how many prompts."""

    run: str = option("runs/quickstart", "Folder of a run, where the models are looked for first.")
    models: str = option("sft,ppo,dpo,rloo", "Names in --run, or folders, between commas.")
    test_prompts: int = option(1000, "Test prompts, at most.", above=0)
    seed: int | None = option(
        None, "Of all that is drawn. Default: the run's.", at_least=0, at_most=MAX_SEED
    )


@command
def main() -> None:
    options = parse(__doc__, EvaluateOptions, without=UNUSED, instead=INSTEAD)
    out = check_out(options, "evaluation")
    require(
        not Path(options.run).resolve().is_relative_to(out.resolve()),
        f"--out {out} would overwrite the models of --run {options.run}; give another folder",
    )
    folders = model_folders(options.models, options.run)
    seed = run_seed(Path(options.run)) if options.seed is None else options.seed
    inputs = load_inputs(options, "evaluation", seed=seed)
    reward_folder = reward_model_folder(options.reward_model, options.run)
    if reward_folder is None:
        raise BadInput(f"no reward model in {options.run}; give --reward_model")
    # Only now, since torch takes seconds to import: what can be refused is refused at once.
    from rlhf_min.evaluation import evaluate_policies
    from rlhf_min.harness.models import make_codec, start_policy
    from rlhf_min.harness.report import finish, results
    from rlhf_min.harness.rows.encoding_report import describe
    from rlhf_min.reward_model import RewardModel

    policies = {
        name: start_policy(replace(options, model=folder), [], critic="none", seed=seed)
        for name, folder in folders.items()
    }
    baseline, first = next(iter(policies.items()))
    reward_model = RewardModel.from_pretrained(reward_folder, plain=options.plain)
    reward_model.to(options.torch_device("reward_device"))
    codecs = {name: make_codec(policy, options) for name, policy in policies.items()}
    for name, codec in codecs.items():
        require(
            codec.template == codecs[baseline].template,
            f"{name} reads the template {codec.template!r}, {baseline} reads "
            f"{codecs[baseline].template!r}; --template gives all of them one",
        )
    prompts, cut = codecs[baseline].encode_prompts(inputs.test[: options.test_prompts])
    told = describe(cut, codecs[baseline])
    print(f"{len(prompts)} prompts from {options.data or 'the world'}; {told}")

    open_run(out, options)
    evaluations = evaluate_policies(
        policies,
        first.reference(reward_model.device),
        reward_model.score,
        prompts,
        [prompt.columns["references"] for prompt in prompts],
        baseline=baseline,
        monitors=inputs.monitors,
        max_new_tokens=options.max_response_tokens,
        max_tokens=8192,
        seed=seed,
    )
    found = results.results_json(evaluations, reward_model={}, seed=seed)
    print(results.results_table(evaluations, baseline=baseline))
    results.write_json(out / "results.json", found)
    results.write_samples(out / "samples.md", evaluations, [prompt.text for prompt in prompts])
    shown = finish.show(out)
    print(f"{', '.join([*shown, 'results.json'])} and samples.md are in {out}")


if __name__ == "__main__":
    main()
