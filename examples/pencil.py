"""A step of PPO and a pair of DPO in numbers that a pencil can check. No model, no weights.

Two prompts; one response has four tokens, the other two. Each table has its equation's tag.
"""

from functools import partial
from typing import Any

from rlhf_min.harness.cli import command, parse

KL_COEF, GAMMA, LAM, CLIP, VALUE_CLIP, BETA = 0.1, 1.0, 0.5, 0.2, 0.2, 0.5

RESPONSES = {"What is 2 plus 2?": ["It", "is", "four", "EOS"], "When is lunch?": ["Noon", "EOS"]}
WORDS = [word for words in RESPONSES.values() for word in words]

# One number for each token, (B, T). The 99s are padding, and must not matter.
LOGPROBS = [[-1.0, -1.5, -2.0, -1.0], [-1.5, -0.5, 99, 99]]  # of the policy that sampled
REF_LOGPROBS = [[-2.0, -0.5, -3.0, -2.0], [-2.5, -0.5, 99, 99]]
NEW_LOGPROBS = [[-1.5, -1.5, -2.5, -0.5], [-1.0, -0.5, 99, 99]]  # of the policy in training
VALUES = [[0.5, 0.4, 0.4, 0.5], [-0.5, -0.5, 99, 99]]
NEW_VALUES = [[0.5, 0.9, 0.5, 0.8], [-0.9, -0.5, 99, 99]]
SCORES = [1.0, -0.5]
# Log-probabilities of a chosen and a rejected response, summed over tokens.
PAIR, REF_PAIR = [-2.0, -3.0], [-3.0, -2.0]


@command
def main() -> None:
    parse(__doc__)
    import torch  # only now: it takes a second, and an unknown option is refused at once

    from rlhf_min import dpo_loss, gae, kl_estimate, response_mask, shape_rewards
    from rlhf_min.losses import ppo_policy_loss, ppo_value_loss
    from rlhf_min.masking import masked_mean, masked_var, masked_whiten

    numbers = partial(torch.tensor, dtype=torch.float64)
    mask = response_mask(torch.tensor([4, 2]), 4)
    logprobs, ref_logprobs, new_logprobs = map(numbers, (LOGPROBS, REF_LOGPROBS, NEW_LOGPROBS))
    values, new_values, scores = map(numbers, (VALUES, NEW_VALUES, SCORES))
    print(*(f"{prompt} -> {' '.join(words)}" for prompt, words in RESPONSES.items()), sep="\n")
    kl = kl_estimate(logprobs, ref_logprobs, kind="k1")
    show("[eq:kl] k1", "logprobs ref_logprobs kl", logprobs, ref_logprobs, kl)

    rewards = shape_rewards(scores, kl, mask, kl_coef=KL_COEF)
    title = f"[eq:shape_rewards] kl_coef {KL_COEF}, scores {SCORES[0]} and {SCORES[1]}"
    show(title, "kl rewards", kl, rewards)

    advantages, returns = gae(rewards, values, mask, gamma=GAMMA, lam=LAM)
    title, names = f"[eq:gae] gamma {GAMMA}, lam {LAM}", "rewards values advantages returns"
    show(title, names, rewards, values, advantages, returns)

    mean, var = masked_mean(advantages, mask), masked_var(advantages, mask)
    whitened = masked_whiten(advantages, mask)
    title = "[eq:masked_mean] [eq:masked_var] [eq:whiten]"
    show(title, "advantages mean variance whitened", advantages, mean, var, whitened)

    each = of_each(ppo_policy_loss, mask, new_logprobs, logprobs, whitened, clip=CLIP)
    new = new_logprobs.requires_grad_()
    policy = ppo_policy_loss(new, logprobs, whitened, mask, clip=CLIP)
    lines = [logprobs, new, (new - logprobs).exp(), whitened, each]
    lines += [policy.loss, policy.clip_fraction, *torch.autograd.grad(policy.loss, new)]
    names = "logprobs new_logprobs ratio whitened loss_of_each loss clip_fraction gradient"
    show(f"[eq:ppo_policy] clip {CLIP}", names, *lines)

    value = ppo_value_loss(new_values, values, returns, mask, clip=VALUE_CLIP)
    each = of_each(ppo_value_loss, mask, new_values, values, returns, clip=VALUE_CLIP)
    lines = [values, new_values, returns, each, value.loss, value.clip_fraction]
    names = "values new_values returns loss_of_each loss clip_fraction"
    show(f"[eq:ppo_value] clip {VALUE_CLIP}", names, *lines)

    pair, ref_pair = numbers(PAIR).requires_grad_(), numbers(REF_PAIR)
    dpo = dpo_loss(*pair.split(1), *ref_pair.split(1), beta=BETA, label_smoothing=0.0)
    (gradient,) = torch.autograd.grad(dpo.loss, pair)
    rewards = torch.cat([dpo.chosen_rewards, dpo.rejected_rewards])
    margin = rewards[0] - rewards[1]
    lines = [pair, ref_pair, rewards, margin, dpo.loss, (-margin).sigmoid(), gradient]
    names = "logprobs ref_logprobs rewards margin loss weight gradient"
    show(f"[eq:dpo] beta {BETA}", names, *lines, columns=["chosen", "rejected"])


def show(title: str, names: str, *lines: Any, columns: list[str] = WORDS) -> None:
    """A table with a line for each name; one number for all tokens stands behind a "="."""
    print(f"\n{title}\n{'':14}" + "".join(f"{word:>9}" for word in columns))
    for name, x in zip(names.split(), lines, strict=True):
        cells = x.flatten().tolist()[: len(WORDS)]  # without the padding at the end
        shown = "".join(f"{round(v, 4) + 0:9g}" for v in cells)
        print(f"{name:14}{shown}" if x.dim() else f"{name:14} = {shown.strip()}")


def of_each(loss: Any, mask: Any, *tensors: Any, clip: float) -> Any:
    """The loss of each token alone, padding left out."""
    cells = zip(*(x[mask] for x in (*tensors, mask)), strict=True)
    losses = [loss(*(x.reshape(1, 1) for x in cell), clip=clip).loss for cell in cells]
    return tensors[0].new_tensor(losses)


if __name__ == "__main__":
    main()
