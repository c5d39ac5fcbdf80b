"""Rejection sampling: which response is learned from, and what a round begins with."""

import copy
from itertools import pairwise

import torch
from small import small_policy

from rlhf_min import rejection
from rlhf_min.config import SFTConfig
from rlhf_min.data import PromptExample


def prompts(n):
    return [PromptExample(f"p{i}", torch.tensor([i + 2]), {"wanted": i}) for i in range(n)]


def test_the_best_is_the_first_of_the_highest():
    assert rejection.best([0.5, 3.0, -1.0, 3.0]) == 1
    assert rejection.best([-2.0, -1.0]) == 1


def test_a_random_choice_does_not_know_the_scores():
    first, again, other = (rejection.random_choice(seed) for seed in (0, 0, 1))
    draws = [first([0.0, 5.0, 0.0, 0.0]) for _ in range(400)]
    assert draws == [again([9.0, 5.0, 9.0, 9.0]) for _ in range(400)]
    assert draws != [other([0.0, 5.0, 0.0, 0.0]) for _ in range(400)]
    assert all(60 < draws.count(i) < 140 for i in range(4))  # 100 each, within 4.6 deviations


def test_each_prompt_keeps_the_response_that_is_chosen():
    policy, seen = small_policy(), []

    def reward(prompts, responses, wanted):
        seen.extend(zip(prompts, responses, wanted, strict=True))
        return [float(len(text)) for text in responses]

    examples, metrics = rejection.choose_responses(
        policy, prompts(4), reward, rejection.best, n=3, max_new_tokens=5, seed=1
    )
    assert [wanted for *_, wanted in seen] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    lengths = torch.tensor([len(text) for _, text, _ in seen], dtype=torch.float64).view(4, 3)
    assert (lengths.amax(1) > lengths.amin(1)).any()  # there is something to choose
    for prompt, example, group in zip(prompts(4), examples, lengths, strict=True):
        assert torch.equal(example.prompt_ids, prompt.ids)
        assert len(policy.decode(example.response_ids)) == group.max()
    assert metrics["score"] == float(lengths.mean())
    assert metrics["chosen_score"] == float(lengths.amax(1).mean())


def test_a_round_goes_on_from_the_round_before(monkeypatch):
    sampled_from, drawn, real = [], [], rejection.choose_responses

    def choose_responses(policy, prompts, *rest, **options):
        sampled_from.append(copy.deepcopy(policy.lm.state_dict()))
        drawn.append([prompt.text for prompt in prompts])
        return real(policy, prompts, *rest, **options)

    monkeypatch.setattr(rejection, "choose_responses", choose_responses)
    policy, config = small_policy(), SFTConfig(epochs=2, batch_size=2)
    before = copy.deepcopy(policy.lm.state_dict())
    rounds = rejection.train(
        policy,
        prompts(6),
        lambda _, responses: [float(len(text)) for text in responses],
        rejection.best,
        config,
        rounds=3,
        n=2,
        prompts_of_round=4,
        max_new_tokens=5,
    )
    assert [metrics["steps"] for metrics in rounds] == [4, 4, 4]
    states = [before, *sampled_from, policy.lm.state_dict()]
    changed = [any(not torch.equal(a[k], b[k]) for k in a) for a, b in pairwise(states)]
    assert changed == [False, True, True, True]
    assert all(len(set(texts)) == 4 for texts in drawn)
    assert len(set(map(tuple, drawn))) > 1
