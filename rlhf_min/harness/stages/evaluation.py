"""The comparison of the trained models as the commands run it."""

from collections.abc import Mapping

from rlhf_min.encoding.codec import Codec
from rlhf_min.estimates import Estimate
from rlhf_min.evaluation import evaluate_policies
from rlhf_min.harness.inputs import Inputs
from rlhf_min.harness.report import results
from rlhf_min.harness.report.finish import WarnOnly
from rlhf_min.harness.rows.encoding_report import require_rows, summary
from rlhf_min.harness.run import layout
from rlhf_min.harness.run.log import MetricsLog
from rlhf_min.loading.reward_function import RewardFunction
from rlhf_min.policy import Policy
from rlhf_min.reward_model import RewardModel


def run(
    policies: Mapping[str, Policy],
    reward_model: RewardModel | RewardFunction,
    codec: Codec,
    inputs: Inputs,
    log: MetricsLog,
    *,
    pairs: Mapping[str, Estimate],
    n: int,
    max_tokens: int,
    seed: int,
) -> None:
    """Compare models on the first n test prompts; the first model is baseline and reference.

    The table is printed. It, and some responses of each model, are left in the run's folder.

    Args:
        pairs: how well the reward model ranks held-out pairs.
        max_tokens: padded tokens in one forward pass.
    """
    log.note_changes()
    prompts, cut = codec.encode_prompts(inputs.test[:n])
    require_rows(cut)
    print(f"evaluation on {len(prompts)} prompts that no stage was trained on; {summary(cut)}")
    baseline, first = next(iter(policies.items()))
    score = reward_model.score if isinstance(reward_model, RewardModel) else reward_model
    device = reward_model.device if isinstance(reward_model, RewardModel) else first.device
    evaluations = evaluate_policies(
        policies,
        first.reference(device),
        score,
        prompts,
        [prompt.columns["references"] for prompt in prompts if "references" in prompt.columns],
        baseline=baseline,
        monitors=inputs.monitors,
        max_new_tokens=codec.max_response_tokens,
        max_tokens=max_tokens,
        seed=seed,
    )
    texts = [prompt.text for prompt in prompts]
    with WarnOnly(log.folder / "samples.md", "evaluate_models.py writes one too"):
        results.write_samples(log.folder / "samples.md", evaluations, texts)
    gold = inputs.monitors.get("gold_reward")
    with WarnOnly(log.folder / layout.SAMPLES, "the page will lack the samples of the test"):
        log.add_samples("test", 0, results.sample_rows(evaluations, texts, gold=gold), anew=True)
    print(results.results_table(evaluations, baseline=baseline))
    values = results.results_json(evaluations, reward_model=pairs, seed=seed)
    results.write_json(log.folder / layout.RESULTS, values)
