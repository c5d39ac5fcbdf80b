"""Type a prompt and see what each model says to it, with the reward model's score.

In the embedded world, try: What is 3 plus 4?
"""

import io
import sys
from dataclasses import dataclass, replace

from rlhf_min.config import MAX_SEED, option
from rlhf_min.harness.cli import OF_TRAINING, RunOptions, command, parse, require_one_process
from rlhf_min.harness.inputs import model_folders, reward_model_folder
from rlhf_min.harness.run.terminal import is_read

UNUSED = (
    *("data", "columns", "split", "limit", "heldout_data", "heldout_split"),
    *("out", "overwrite", "resume", *OF_TRAINING),
)
INSTEAD = {"model": "give the models to talk to with --models a,b,c, not --model"}


@dataclass(frozen=True)
class ChatOptions(RunOptions):
    """Which models answer, and how freely."""

    run: str = option("runs/quickstart", "Folder of a run, where the models are looked for first.")
    models: str = option("sft,ppo,dpo,rloo", "Names in --run, or folders, between commas.")
    temperature: float = option(1.0, "Lower is safer, higher is bolder.", above=0)
    seed: int = option(0, "Of all samples of this conversation.", at_least=0, at_most=MAX_SEED)


@command
def main() -> None:
    require_one_process("a conversation is with one process")
    options = parse(__doc__, ChatOptions, without=UNUSED, instead=INSTEAD)
    folders = model_folders(options.models, options.run)
    # Only now, since torch takes seconds to import: what can be refused is refused at once.
    import torch

    from rlhf_min.encoding.cuts import CutReport
    from rlhf_min.harness.models import make_codec, start_policy
    from rlhf_min.reward_model import RewardModel
    from rlhf_min.sampling import sample

    policies = {
        name: start_policy(replace(options, model=folder), [], critic="none", seed=options.seed)
        for name, folder in folders.items()
    }
    reward_model = None
    if reward_folder := reward_model_folder(options.reward_model, options.run):
        reward_model = RewardModel.from_pretrained(reward_folder, plain=options.plain)
        reward_model.to(options.torch_device("reward_device"))
    rng = torch.Generator().manual_seed(options.seed)
    if reward_model is None:
        print(f"no reward model in {options.run}, so no scores; --reward_model gives one")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # whatever is typed, it is text
    print("Type a prompt; an empty line ends.")
    while prompt := _read():
        for name, policy in policies.items():
            report = CutReport()
            ids = make_codec(policy, options).encode_prompt(prompt, report)
            if report.prompts_cut:
                print(f"(the first {report.prompt_tokens_cut} tokens of the prompt were cut off)")
            (response_ids,) = sample(
                policy,
                [ids],
                max_new_tokens=options.max_response_tokens,
                temperature=options.temperature,
                rng=rng,
            )
            response = policy.decode(response_ids)
            score = ""
            if reward_model is not None:
                score = f" ({float(reward_model.score([prompt], [response])):+.2f})"
            print(f"{name:>6}{score}: {response}")


def _read() -> str:
    try:
        typed = input("> ").strip()
    except EOFError:
        typed = ""
    return typed if is_read() else ""  # nobody would see the answer


if __name__ == "__main__":
    main()
