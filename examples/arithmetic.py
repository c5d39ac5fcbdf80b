"""GRPO with a verifiable reward: 1 if the last number of a response is the answer, else 0.

There is no reward model to please: the reward is a function of the responses and of the column
`answer`. It is measured on held-out questions before and after by pass@1, how often a response is
right, and by pass@k, how often at least one of k is (Chen et al. 2021, arXiv:2107.03374).

Without options: on the sums, differences and counts of the embedded world. SFT learns first from
its demonstrations, of which four in ten are wrong. With --data give --model, and rows with prompt
and answer. The model lands in <out>/grpo.
"""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_min.config import GRPOConfig, SFTConfig, option
from rlhf_min.errors import require
from rlhf_min.harness.cli import RunOptions, check_room, command, parse
from rlhf_min.harness.inputs import load_inputs
from rlhf_min.harness.run.folder import check_out, start_log

KINDS = ("sum", "difference", "count")
NUMBER = re.compile(r"(?:(?<!\d)-)?\d+(?:[.,]\d+)*")  # in 10-7 there is no -7


@dataclass(frozen=True)
class ArithmeticOptions(RunOptions):
    """Options beside those of GRPO itself."""

    samples: int = option(
        16, "Responses to each held-out question; k goes up to half of them.", at_least=2
    )
    test_prompts: int = option(450, "Held-out questions that it is measured on.", at_least=2)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.data is None or self.model is not None,
            "your own questions need a model that can answer some of them: give --model",
        )


def exact_match(
    prompts: Sequence[str], responses: Sequence[str], answer: Sequence[Any]
) -> list[float]:
    """The reward: 1 for each response whose last number is that of its answer, else 0.

    >>> exact_match(["3 plus 4?"] * 2, ["It is 7.", "It is 7, or 8."], ["7", "7"])
    [1.0, 0.0]
    """
    rewards = []
    for _, response, right in zip(prompts, responses, answer, strict=True):
        named, wanted = (NUMBER.findall(text.replace(",", "")) for text in (response, str(right)))
        rewards.append(float(bool(named) and named[-1:] == wanted[-1:]))
    return rewards


@command
def main() -> None:
    options, config = parse(__doc__, ArithmeticOptions, GRPOConfig, without=["reward_model"])
    check_room(config, options.max_response_tokens)
    out, started = check_out(options, "arithmetic"), time.perf_counter()
    inputs = load_inputs(options, "grpo", seed=config.seed)
    require("answer" in inputs.prompts[0], f"{options.data}: there is no column answer")
    inputs.test = inputs.test or inputs.eval_prompts
    # Only now, since torch takes seconds to import: what can be refused is refused at once.
    from rlhf_min.harness import experiments
    from rlhf_min.harness.models import make_codec, start_policy
    from rlhf_min.harness.report import finish
    from rlhf_min.harness.stages import grpo, sft

    if options.data is None:
        experiments.only_kinds(inputs, KINDS)
    policy = start_policy(options, inputs.texts, critic="none", seed=config.seed)
    codec = make_codec(policy, options)
    log = start_log(out, options, config, monitors=inputs.monitors)
    if options.model is None:
        sft.run(policy, codec, inputs, SFTConfig(seed=config.seed), log)
    device = options.torch_device("reward_device")
    trained = grpo.run(policy, codec, exact_match, inputs, config, log, ref_device=device)

    found = experiments.passes(
        {"before": policy, "after": trained},
        codec,
        inputs.test[: options.test_prompts],
        exact_match,
        samples=options.samples,
        seed=config.seed,
    )
    shown, seconds = finish.show(out), time.perf_counter() - started
    print(experiments.pass_table(found))
    experiments.save_passes(out, "arithmetic", found, seconds=seconds)
    print(f"{seconds:.0f} s; {', '.join(['model', *shown])} and arithmetic.json are in {out}")


if __name__ == "__main__":
    main()
