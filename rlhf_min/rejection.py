"""Rejection sampling: supervised fine-tuning on the best of n of the policy's own responses.

Also called best-of-n fine-tuning, RAFT or, with its rounds, expert iteration. What is learned is
only which of its own responses the policy should write more often; nothing but SFT is needed.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from . import sft
from .config import SFTConfig
from .data import PromptExample, SFTExample
from .loading.reward_function import RewardFunction, call_reward
from .policy import Policy
from .sampling import sample

Choose = Callable[[Sequence[float]], int]  # which of n responses, by their scores


def best(scores: Sequence[float]) -> int:
    """The response with the highest score; the first of those that share it.

    >>> best([0.5, 3.0, -1.0, 3.0])
    1
    """
    return max(range(len(scores)), key=scores.__getitem__)


def random_choice(seed: int) -> Choose:
    """A control for `best`: draws one of the responses, whatever their scores are."""
    rng = random.Random(seed)
    return lambda scores: rng.randrange(len(scores))


def choose_responses(
    policy: Policy,
    prompts: Sequence[PromptExample],
    reward: RewardFunction,
    choose: Choose,
    *,
    n: int,
    max_new_tokens: int,
    seed: int,
) -> tuple[list[SFTExample], dict[str, float]]:
    """One of n sampled responses to each prompt, to learn from.

    They stay the tokens that were sampled, so a response that was cut gets no EOS.

    Returns:
        An example for each prompt, and the mean ``score`` of all responses and ``chosen_score`` of
        those that were chosen.
    """
    each = [prompt for prompt in prompts for _ in range(n)]
    response_ids = sample(
        policy,
        [prompt.ids for prompt in each],
        max_new_tokens=max_new_tokens,
        temperature=1.0,
        rng=torch.Generator().manual_seed(seed),
    )
    responses = [policy.decode(ids) for ids in response_ids]
    scores = call_reward(reward, [x.text for x in each], responses, [x.columns for x in each])
    groups = scores.reshape(-1, n)  # (prompts, n)
    chosen = torch.tensor([choose(group) for group in groups.tolist()])  # (prompts,)
    examples = [
        SFTExample(prompt.ids, response_ids[n * row + i])
        for row, (prompt, i) in enumerate(zip(prompts, chosen.tolist(), strict=True))
    ]
    means = scores.mean(), groups.gather(1, chosen[:, None]).mean()
    return examples, dict(zip(("score", "chosen_score"), map(float, means), strict=True))


def train(
    policy: Policy,
    prompts: Sequence[PromptExample],
    reward: RewardFunction,
    choose: Choose,
    config: SFTConfig,
    *,
    rounds: int,
    n: int,
    prompts_of_round: int,
    max_new_tokens: int,
) -> Iterator[dict[str, float]]:
    """One round per yield: sample, choose, and fine-tune the policy of the round before.

    Args:
        policy: is trained.
        prompts: of which each round draws its own.
        reward: any callable of texts, see `call_reward`.
        choose: `best`, or another choice by the scores.
        config: of the SFT in each round; `seed` is that of the first.
        n: responses to each prompt, sampled at temperature 1.
        prompts_of_round: at most all there are.
        max_new_tokens: longest response.

    Yields:
        ``score`` of all responses of the round and ``chosen_score`` of those that were chosen;
        ``steps`` of its SFT and the ``loss`` of the last one.

    Source: Dong et al. 2023, "RAFT", arXiv:2304.06767, algorithm 1; the rounds as in Anthony et al.
    2017, arXiv:1705.08439.
    """
    for i in range(rounds):
        of_round = replace(config, seed=config.seed + i)
        some = random.Random(of_round.seed).sample(prompts, min(prompts_of_round, len(prompts)))
        examples, metrics = choose_responses(
            policy,
            some,
            reward,
            choose,
            n=n,
            max_new_tokens=max_new_tokens,
            seed=of_round.seed,
        )
        state = sft.new_state(policy, examples, of_round)
        losses = [step["loss"] for step in sft.train(policy, of_round, state)]
        yield metrics | {"steps": len(losses), "loss": losses[-1]}
