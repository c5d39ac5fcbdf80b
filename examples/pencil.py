"""A step of PPO and a pair of DPO in numbers that a pencil can check. No model, no weights.

Two prompts; one response has four tokens, the other two. Each table has its equation's tag.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_min import dpo_loss, gae, kl_estimate, response_mask, shape_rewards
from rlhf_min.harness.cli import command, parse
from rlhf_min.losses import ppo_policy_loss, ppo_value_loss
from rlhf_min.masking import masked_mean, masked_var, masked_whiten

KL_COEF, GAMMA, LAM, CLIP, VALUE_CLIP, BETA = 0.1, 1.0, 0.5, 0.2, 0.2, 0.5

RESPONSES = {"What is 2 plus 2?": ["It", "is", "four", "EOS"], "When is lunch?": ["Noon", "EOS"]}
WORDS = [word for words in RESPONSES.values() for word in words]
MASK = response_mask(torch.tensor([4, 2]), 4)  # (B, T)


def numbers(*rows: list[float]) -> Tensor:
    """One for each token, ``(B, T)``; the 99s in the padding must not matter."""
    return torch.tensor([row + [99.0] * (4 - len(row)) for row in rows], dtype=torch.float64)


LOGPROBS = numbers([-1.0, -1.5, -2.0, -1.0], [-1.5, -0.5])  # of the policy that sampled
REF_LOGPROBS = numbers([-2.0, -0.5, -3.0, -2.0], [-2.5, -0.5])
NEW_LOGPROBS = numbers([-1.5, -1.5, -2.5, -0.5], [-1.0, -0.5])  # of the policy in training
VALUES = numbers([0.5, 0.4, 0.4, 0.5], [-0.5, -0.5])
NEW_VALUES = numbers([0.5, 0.9, 0.5, 0.8], [-0.9, -0.5])
SCORES = torch.tensor([1.0, -0.5]).double()
# Log-probabilities of a chosen and a rejected response, summed over tokens.
PAIR, REF_PAIR = torch.tensor([[-2.0, -3.0], [-3.0, -2.0]]).double()


def show(title: str, names: str, *lines: Tensor, columns: list[str] = WORDS) -> None:
    """A table with a line for each name; one number for all tokens stands behind a "="."""
    print(f"\n{title}\n{'':14}" + "".join(f"{word:>9}" for word in columns))
    for name, x in zip(names.split(), lines, strict=True):
        cells = x[MASK] if x.shape == MASK.shape else x.flatten()
        shown = "".join(f"{round(v, 4) + 0:9g}" for v in cells.tolist())
        print(f"{name:14}{shown}" if x.dim() else f"{name:14} = {shown.strip()}")


def of_each(loss: Callable[..., Any], *tensors: Tensor, clip: float) -> Tensor:
    """The loss of each token alone, padding left out."""
    cells = zip(*(x[MASK] for x in (*tensors, MASK)), strict=True)
    return torch.stack([loss(*(x.reshape(1, 1) for x in cell), clip=clip).loss for cell in cells])


@command
def main() -> None:
    parse(__doc__)
    print(*(f"{prompt} -> {' '.join(words)}" for prompt, words in RESPONSES.items()), sep="\n")
    kl = kl_estimate(LOGPROBS, REF_LOGPROBS, kind="k1")
    show("[eq:kl] k1", "logprobs ref_logprobs kl", LOGPROBS, REF_LOGPROBS, kl)

    rewards = shape_rewards(SCORES, kl, MASK, kl_coef=KL_COEF)
    title = f"[eq:shape_rewards] kl_coef {KL_COEF}, scores {SCORES[0]} and {SCORES[1]}"
    show(title, "kl rewards", kl, rewards)

    advantages, returns = gae(rewards, VALUES, MASK, gamma=GAMMA, lam=LAM)
    title, names = f"[eq:gae] gamma {GAMMA}, lam {LAM}", "rewards values advantages returns"
    show(title, names, rewards, VALUES, advantages, returns)

    mean, var = masked_mean(advantages, MASK), masked_var(advantages, MASK)
    whitened = masked_whiten(advantages, MASK)
    title = "[eq:masked_mean] [eq:masked_var] [eq:whiten]"
    show(title, "advantages mean variance whitened", advantages, mean, var, whitened)

    new = NEW_LOGPROBS.clone().requires_grad_()
    policy = ppo_policy_loss(new, LOGPROBS, whitened, MASK, clip=CLIP)
    each = of_each(ppo_policy_loss, NEW_LOGPROBS, LOGPROBS, whitened, clip=CLIP)
    lines = [LOGPROBS, new, (new - LOGPROBS).exp(), whitened, each]
    lines += [policy.loss, policy.clip_fraction, *torch.autograd.grad(policy.loss, new)]
    names = "logprobs new_logprobs ratio whitened loss_of_each loss clip_fraction gradient"
    show(f"[eq:ppo_policy] clip {CLIP}", names, *lines)

    value = ppo_value_loss(NEW_VALUES, VALUES, returns, MASK, clip=VALUE_CLIP)
    each = of_each(ppo_value_loss, NEW_VALUES, VALUES, returns, clip=VALUE_CLIP)
    lines = [VALUES, NEW_VALUES, returns, each, value.loss, value.clip_fraction]
    names = "values new_values returns loss_of_each loss clip_fraction"
    show(f"[eq:ppo_value] clip {VALUE_CLIP}", names, *lines)

    pair = PAIR.clone().requires_grad_()
    dpo = dpo_loss(*pair.split(1), *REF_PAIR.split(1), beta=BETA, label_smoothing=0.0)
    (gradient,) = torch.autograd.grad(dpo.loss, pair)
    rewards = torch.cat([dpo.chosen_rewards, dpo.rejected_rewards])
    margin = rewards[0] - rewards[1]
    lines = [pair, REF_PAIR, rewards, margin, dpo.loss, (-margin).sigmoid(), gradient]
    names = "logprobs ref_logprobs rewards margin loss weight gradient"
    show(f"[eq:dpo] beta {BETA}", names, *lines, columns=["chosen", "rejected"])


if __name__ == "__main__":
    main()
