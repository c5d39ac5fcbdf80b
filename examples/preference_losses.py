"""What each preference loss does to chosen and rejected responses, from one SFT model.

Each loss learns from the same pairs of the embedded world with its own defaults, KTO from the same
responses one by one. The SFT model is trained first, unless --model gives it.
"""

import time
from dataclasses import dataclass, field
from typing import Any, get_args

from rlhf_min.config import DPOConfig, KTOConfig, ReferenceFree, SFTConfig, WithReference, option
from rlhf_min.harness.cli import OF_LARGE_MODELS, OF_OWN_ROWS, RunOptions, command, parse
from rlhf_min.harness.run.folder import check_out, start_log

LOSSES = [*get_args(WithReference), *get_args(ReferenceFree), "kto"]
OWN = {"robust": {"label_smoothing": 0.1}}  # what has to be said of the pairs
UNUSED = (*OF_OWN_ROWS, *OF_LARGE_MODELS, "reward_model", "reward_device", "heldout_share")
INSTEAD = {"data": "--data has no true reward; the embedded world has"}


@dataclass(frozen=True)
class PreferenceOptions(RunOptions):
    """Options of the comparison."""

    losses: list[str] = field(
        default_factory=lambda: LOSSES, metadata={"help": "Which are compared."}
    )
    pairs: int = option(2560, "Preference pairs that are learned from.", above=0)
    looks: int = option(5, "How often each run is measured, the last time at its end.", above=0)
    test_prompts: int = option(200, "Test prompts that are answered at the end.", at_least=2)


@command
def main() -> None:
    options = parse(__doc__, PreferenceOptions, without=UNUSED, instead=INSTEAD)
    configs = {name: config_of(name) for name in options.losses}
    started, out = time.perf_counter(), check_out(options, "preference_losses")
    # Only now, since torch takes seconds to import: what can be refused is refused at once.
    from rlhf_min.harness import preference_runs
    from rlhf_min.harness.inputs import load_inputs
    from rlhf_min.harness.models import make_codec, start_policy
    from rlhf_min.harness.stages import sft

    inputs = load_inputs(options, None, seed=0)
    start = start_policy(options, inputs.texts, critic="none", seed=0)
    codec, log = make_codec(start, options), start_log(out, options, SFTConfig())
    if options.model is None:
        sft.run(start, codec, inputs, SFTConfig(), log)
    points = {}
    for name, config in configs.items():
        points[name] = preference_runs.run(start, codec, inputs, config, options)
        print(f"  {preference_runs.in_words(name, points[name])}", flush=True)
    seconds = time.perf_counter() - started
    preference_runs.save(log.folder, points, seconds)
    print(f"{seconds:.0f} s; preference_losses.json, .png and .svg are in {out}")


def config_of(name: str) -> Any:
    """A loss with its own defaults; in a batch of KTO are the responses of as many pairs."""
    if name == "kto":
        return KTOConfig(batch_size=2 * DPOConfig().batch_size)
    return DPOConfig(loss=name, **OWN.get(name, {}))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
