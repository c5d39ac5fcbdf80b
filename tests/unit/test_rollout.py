"""Rollouts: what is scored is what was sampled, whatever the batching; rewards see plain text."""

import itertools
import math
import sys
import threading
from collections import deque
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import torch
from small import (
    CAUSAL,
    EOS,
    SYLLABLES,
    bert,
    bert_syllables,
    generator,
    gpt2,
    policy_of,
    row_logprobs,
    stacked,
    syllables,
    text,
    token_rows,
)
from strategies import assert_close
from tolerances import EXACT, FP64

from rlhf_min.config import PPOConfig
from rlhf_min.data import PromptExample
from rlhf_min.encoding.codec import Codec
from rlhf_min.errors import BadInput
from rlhf_min.loading.reward_function import call_reward
from rlhf_min.logprobs import lm_head_logits
from rlhf_min.policy import Policy
from rlhf_min.reward_model import RewardModel
from rlhf_min.rollout import Rollout, RolloutBuffer, collect, score_rollout
from rlhf_min.sampling import sample

PROMPT_LENGTHS, RESPONSE_LENGTHS = [3, 1, 5, 2, 4], [2, 6, 1, 4, 6]
PROMPTS = token_rows(PROMPT_LENGTHS, seed=30)
RESPONSES = token_rows(RESPONSE_LENGTHS, seed=31)
for _row in (0, 2, 3):
    RESPONSES[_row][-1] = EOS
RESPONSES[4][2] = EOS  # in the middle: not where a response ends
SCORES = torch.tensor([1.0, -2.0, 0.5, 0.25, 3.0], dtype=torch.float64)
FIELDS = ("scores", "ended", "logprobs", "ref_logprobs", "kl", "entropy", "values")


def scored(model, ref_model, *, temperature=1.0, kl="k1", max_tokens=10_000):
    return score_rollout(
        model,
        ref_model,
        PROMPTS,
        RESPONSES,
        SCORES,
        temperature=temperature,
        kl=kl,
        max_tokens=max_tokens,
    )


def taken(logp, response):
    return torch.stack([logp[t, token] for t, token in enumerate(response.tolist())])


# score_rollout


@CAUSAL
def test_scoring_passes_are_the_plain_ones(make):
    model, ref_model = policy_of(make(), critic="shared"), policy_of(make(seed=9))
    found = scored(model, ref_model, temperature=0.7)
    logp = [row_logprobs(model, *row, 0.7) for row in zip(PROMPTS, RESPONSES, strict=True)]
    ref_logp = [row_logprobs(ref_model, *row, 0.7) for row in zip(PROMPTS, RESPONSES, strict=True)]
    logprobs = stacked(map(taken, logp, RESPONSES))
    ref_logprobs = stacked(map(taken, ref_logp, RESPONSES))
    assert_close(found.logprobs, logprobs, FP64)
    assert_close(found.ref_logprobs, ref_logprobs, FP64)
    assert_close(found.kl, logprobs - ref_logprobs, FP64)
    assert_close(found.entropy, stacked(torch.special.entr(p.exp()).sum(-1) for p in logp), FP64)
    assert_close(found.values, model(found.sequences).values.detach(), FP64)
    assert_close(found.scores, SCORES, EXACT)
    assert (found.prompts, found.responses) == ([], [])


def test_full_kl_is_the_sum_over_the_vocabulary():
    model, ref_model = policy_of(gpt2()), policy_of(gpt2(seed=9))
    found = scored(model, ref_model, temperature=0.7, kl="full", max_tokens=20)
    expected = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        p = row_logprobs(model, prompt, response, 0.7).tolist()
        r = row_logprobs(ref_model, prompt, response, 0.7).tolist()
        sums = [
            sum(math.exp(a) * (a - b) for a, b in zip(*pair, strict=True))
            for pair in zip(p, r, strict=True)
        ]
        expected.append(torch.tensor(sums, dtype=torch.float64))
    assert_close(found.kl, stacked(expected), FP64)


@pytest.mark.parametrize(
    ("kl", "of"),
    [
        ("k1", lambda d: d),
        ("abs", abs),
        ("k2", lambda d: d * d / 2),
        ("k3", lambda d: math.exp(-d) - 1 + d),
    ],
)
def test_kl_estimates(kl, of):
    found = scored(policy_of(gpt2()), policy_of(gpt2(seed=9)), kl=kl)
    for b, n in enumerate(RESPONSE_LENGTHS):
        for t in range(n):
            d = float(found.logprobs[b, t]) - float(found.ref_logprobs[b, t])
            assert float(found.kl[b, t]) == pytest.approx(of(d), abs=FP64)


@pytest.mark.parametrize("kl", ["k1", "abs", "k2", "k3", "full"])
def test_padding_is_zero_in_everything(kl):
    found = scored(policy_of(gpt2(), critic="shared"), policy_of(gpt2(seed=9)), kl=kl)
    assert found.lengths.tolist() == RESPONSE_LENGTHS
    for name in ("logprobs", "ref_logprobs", "kl", "entropy", "values"):
        assert (getattr(found, name)[~found.mask] == 0).all()
        assert (getattr(found, name)[found.mask] != 0).all()


@CAUSAL
@pytest.mark.parametrize("kl", ["k1", "full"])
@pytest.mark.parametrize("critic", ["none", "separate"])
def test_micro_batching_changes_nothing(make, kl, critic):
    model, ref_model = policy_of(make(), critic=critic), policy_of(make(seed=9))
    whole = scored(model, ref_model, kl=kl)
    for max_tokens in (1, 12, 25):
        parts = scored(model, ref_model, kl=kl, max_tokens=max_tokens)
        for name in FIELDS:
            assert_close(getattr(parts, name), getattr(whole, name), FP64)


@pytest.mark.parametrize("kl", ["k1", "abs", "k2", "k3", "full"])
def test_the_policy_is_its_own_reference(kl):
    model = policy_of(gpt2())
    found = scored(model, model.reference(), kl=kl)
    assert_close(found.kl, torch.zeros_like(found.kl), EXACT)
    assert found.logprobs.abs().max() > 1


def test_ended_says_which_rows_end_in_eos():
    found = scored(policy_of(gpt2()), policy_of(gpt2()))
    assert found.ended.tolist() == [True, False, True, True, False]


def test_a_response_of_one_token_has_ended_only_if_that_is_eos():
    prompts, responses = token_rows([2, 2], seed=3), [torch.tensor([EOS]), torch.tensor([5])]
    found = score_rollout(
        policy_of(gpt2()),
        policy_of(gpt2()),
        prompts,
        responses,
        SCORES[:2],
        temperature=1.0,
        kl="k1",
        max_tokens=100,
    )
    assert found.ended.tolist() == [True, False]


def test_float64_stays_and_half_precision_gives_float32():
    for dtype, expected in [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ]:
        model = Policy(gpt2().to(dtype), syllables(), critic="shared")
        found = scored(model, model.reference(), kl="full")
        for name in FIELDS:
            if name != "ended":
                assert getattr(found, name).dtype == expected
                assert not getattr(found, name).requires_grad


def test_without_critic_values_are_zero():
    found = scored(policy_of(gpt2()), policy_of(gpt2()))
    assert_close(found.values, torch.zeros_like(found.logprobs), EXACT)


def test_scoring_is_without_dropout_and_the_modes_come_back():
    plain = scored(policy_of(gpt2()), policy_of(gpt2(seed=9)), kl="full")
    for modes in ((True, False), (False, True)):
        model, ref_model = policy_of(gpt2(dropout=0.5)), policy_of(gpt2(seed=9, dropout=0.5))
        found = scored(model.train(modes[0]), ref_model.train(modes[1]), kl="full")
        for name in FIELDS:
            assert_close(getattr(found, name), getattr(plain, name), EXACT)
        assert (model.training, ref_model.training) == modes


# collect

ROWS = [
    {"prompt": f"{text(range(n))}!", "answer": SYLLABLES[n], "row": n} for n in (1, 4, 2, 6)
]  # "!" is unknown to the policy, yet the reward must see it


def examples():
    codec = Codec(syllables(), max_prompt_tokens=3, max_response_tokens=8, template="fi {prompt}")
    return codec.encode_prompts(ROWS)[0]


def collected(model, ref_model, reward, *, kl="k1", seed=21):
    return collect(
        model,
        ref_model,
        reward,
        examples(),
        PPOConfig(max_new_tokens=8, temperature=0.8, kl=kl, max_tokens=30),
        rng=generator(seed),
    )


def by_length(prompts, responses):
    return [float(len(p) + 100 * len(r)) for p, r in zip(prompts, responses, strict=True)]


def make_policy(seed=0, critic="shared"):
    return Policy(gpt2(seed, vocabulary=3 + len(SYLLABLES)), syllables(), critic=critic)


def test_collect_remembers_what_it_sampled():
    model, ref_model = make_policy(), make_policy(seed=9, critic="none")
    found = collected(model, ref_model, by_length)
    prompt_ids = [example.ids for example in examples()]
    response_ids = sample(model, prompt_ids, max_new_tokens=8, temperature=0.8, rng=generator(21))
    for b, (prompt, response) in enumerate(zip(prompt_ids, response_ids, strict=True)):
        n = len(response)
        assert found.sequences.responses[b, :n].tolist() == response.tolist()
        assert found.mask[b].tolist() == [t < n for t in range(found.mask.shape[1])]
        assert found.sequences.prompt_lengths[b] == len(prompt)
        assert bool(found.ended[b]) == (response[-1] == EOS)
        expected = taken(row_logprobs(model, prompt, response, 0.8), response)
        assert_close(found.logprobs[b, :n], expected, FP64)
        expected = taken(row_logprobs(ref_model, prompt, response, 0.8), response)
        assert_close(found.ref_logprobs[b, :n], expected, FP64)
    assert found.ended.tolist() == [True, False, True, True]  # the case has both
    assert set(found.seconds) == {"sample", "score"}
    assert all(seconds > 0 for seconds in found.seconds.values())


@pytest.mark.parametrize("group_size", [1, 2, 3])
def test_rows_of_a_group_follow_one_another(group_size):
    """As if each prompt had been given so many times; its columns go with it."""
    seen = {}

    def reward(prompts, responses, answer):
        seen.update(prompts=prompts, answer=answer)
        return by_length(prompts, responses)

    def found(prompts, reward, **options):
        config = PPOConfig(max_new_tokens=8, temperature=0.8, max_tokens=30)
        models = make_policy(), make_policy(seed=9, critic="none")
        return collect(*models, reward, prompts, config, rng=generator(21), **options)

    grouped = found(examples(), reward, group_size=group_size)
    assert len(grouped.responses) == 4 * group_size
    group_of = [b // group_size for b in range(4 * group_size)]
    assert seen["answer"] == [ROWS[i]["answer"] for i in group_of]
    assert seen["prompts"] == grouped.prompts == [ROWS[i]["prompt"] for i in group_of]
    one_by_one = found([examples()[i] for i in group_of], by_length)
    assert grouped.responses == one_by_one.responses
    assert grouped.columns == one_by_one.columns
    for name in ("scores", "logprobs", "ref_logprobs", "kl"):
        assert_close(getattr(grouped, name), getattr(one_by_one, name), EXACT)
    # Those of a group are drawn anew, and not copied.
    assert len(set(grouped.responses[-group_size:])) == group_size


def test_rewards_see_the_rows_own_text_and_plain_responses():
    seen = {}

    def reward(prompts, responses, answer, row):
        seen.update(prompts=prompts, responses=responses, answer=answer, row=row)
        return [0.5, 1.5, -1.0, 2.0]

    found = collected(make_policy(), make_policy(), reward)
    # neither the template "fi {prompt}" nor the cut to 3 tokens is in the texts
    assert found.prompts == seen["prompts"] == [row["prompt"] for row in ROWS]
    assert seen["answer"] == [row["answer"] for row in ROWS]
    assert seen["row"] == [1, 4, 2, 6]
    vocabulary = ["", "", "", *SYLLABLES]  # special tokens are not written
    typed = [
        " ".join(word for i in ids[mask].tolist() if (word := vocabulary[i]))
        for ids, mask in zip(found.sequences.responses, found.mask, strict=True)
    ]
    assert found.responses == seen["responses"] == typed
    assert all(typed)
    assert found.scores.tolist() == [0.5, 1.5, -1.0, 2.0]


def test_the_same_text_typed_in_gets_the_same_scores():
    reward_model = RewardModel(
        bert(), bert_syllables(), max_length=12
    )  # cuts some of the texts too
    found = collected(make_policy(), make_policy(), reward_model.score)
    for b, row in enumerate(ROWS):
        ids = found.sequences.responses[b, : found.lengths[b]].tolist()
        typed = " ".join(SYLLABLES[i - 3] for i in ids if i >= 3)
        assert_close(reward_model.score([row["prompt"]], [typed])[0], found.scores[b], FP64)
    assert found.scores.sort().values.diff().min() > 1e-3


def test_collect_of_the_reference_itself_has_no_kl():
    model = make_policy()
    for kl in ("k1", "full"):
        found = collected(model, model.reference(), by_length, kl=kl)
        assert_close(found.kl, torch.zeros_like(found.kl), EXACT)


def test_collect_takes_its_randomness_from_the_generator():
    model = make_policy()
    first, again, other = (
        collected(model, model.reference(), by_length, seed=seed).sequences.ids
        for seed in (1, 1, 2)
    )
    assert_close(first, again, EXACT)
    assert first.shape != other.shape or not torch.equal(first, other)


# RolloutBuffer


def test_minibatches_are_slices_of_the_order():
    buffer = RolloutBuffer(*[None] * 4)
    found = list(buffer.minibatches(torch.tensor([4, 0, 3, 1, 2]), 2))
    assert found == [[4, 0], [3, 1], [2]]


# call_reward


def give(result):
    def reward(_prompts, _responses):
        return result

    return reward


@pytest.mark.parametrize(
    "result",
    [
        [1, 2.5, True],
        (1.0, 2.5, 1.0),
        torch.tensor([1.0, 2.5, 1.0]),
        torch.tensor([[1.0], [2.5], [1.0]]),
        (x for x in (1.0, 2.5, 1.0)),
        np.array([1, 2.5, 1]),
        np.array([[1], [2.5], [1]], dtype=np.float16),
        pd.Series([1, 2.5, 1], index=[7, 8, 9]),
        torch.tensor([1.0, 2.5, 1.0], dtype=torch.bfloat16, requires_grad=True),
        [torch.tensor(1.0, requires_grad=True), torch.tensor([2.5]), np.float32(1)],
        [Decimal("1.0"), Fraction(5, 2), np.bool_(True)],
        {"a": 1.0, "b": 2.5, "c": True}.values(),
        deque([1.0, 2.5, 1.0]),
    ],
    ids=(
        "list tuple tensor column generator array array_column series half tensors numbers values "
        "deque"
    ).split(),
)
def test_any_sequence_of_numbers_will_do(result):
    found = call_reward(give(result), ["p"] * 3, ["r"] * 3)
    assert_close(found, torch.tensor([1.0, 2.5, 1.0], dtype=torch.float64), EXACT)


def test_columns_go_to_those_who_name_them():
    columns = [{"answer": "x", "other": 1}, {"answer": "y", "other": 2}]

    def none(_prompts, _responses):
        return [0.0, 0.0]

    def some(p, r, answer, *, weight=3.0):
        assert (p, r, answer, weight) == (["a", "b"], ["c", "d"], ["x", "y"], 3.0)
        return [1.0, 2.0]

    def both(_prompts, _responses, *, other, answer):
        return [len(answer) + o for o in other]

    class Reward:
        def __call__(self, _prompts, _responses, other):
            return other

    for reward, expected in [(none, [0, 0]), (some, [1, 2]), (both, [3, 4]), (Reward(), [1, 2])]:
        assert call_reward(reward, ("a", "b"), ("c", "d"), columns).tolist() == expected
    assert call_reward(none, ["a", "b"], ["c", "d"]).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0, 2.0], "reward reward returned 2 scores for 3 responses"),
        ([1.0] * 4, "returned 4 scores for 3 responses"),
        ([], "returned 0 scores"),
        ([1.0, math.nan, 2.0], "gave nan for the prompt 'second"),
        ([1.0, 2.0, -math.inf], "gave -inf for the prompt 'third'"),
        (["good", 1.0, 2.0], "one number per response"),
        ([None, 1.0, 2.0], "one number per response"),
        (None, "one number per response"),
        (1.0, "one number per response"),
        (torch.tensor(1.0), "one number per response"),
        (torch.zeros(3, 2), r"one number per response; it returned a Tensor of shape \(3, 2\)"),
        (pd.DataFrame({"a": [1.0] * 3}), r"a DataFrame of shape \(3, 1\), not \(3,\)"),
        ({0: 1.0, 1: 2.0, 2: 3.0}, "in their order, as a list; it returned a dict"),
        ({0: 1.0, 1: 2.0, 2: 3.0}.keys(), "as a list; it returned a dict_keys"),
        ({1.0, 2.0, 3.0}, "as a list; it returned a set"),
        ("123", "as a list; it returned a str"),
        (b"123", "as a list; it returned a bytes"),
        ([1.0, 2.0, None], "row 2 of the batch: None is a NoneType, not a number"),
        (["1", "2", "3"], "row 0 of the batch: '1' is a str, not a number"),
        ([1.0, 1j, 2.0], "row 1 of the batch: .*complex"),
        ([1.0, [2.0], 3.0], r"row 1 of the batch: \[2\.0\] is a list, not a number"),
        ([1.0, 2.0, {"score": 3.0}], "row 2 of the batch: .*dict"),
        ([1.0, 2.0, torch.zeros(2)], "row 2 of the batch: .*2 elements"),
        ([1.0, 10**400, 2.0], "row 1 of the batch: int too large"),
        ([1.0, 1e39, 2.0], "gave 1e.39 for the prompt 'second .* in row 1 of the batch; scale it"),
        ([1.0, 2.0, -1e20], "gave -1e.20 for the prompt 'third' in row 2 of the batch; scale it"),
        (itertools.count(), "returned 4 scores for 3 responses"),
    ],
)
def test_what_is_no_score_is_refused_in_one_line(result, message):
    prompts = ["first", "second" + " long" * 30, "third"]
    with pytest.raises(BadInput, match=message) as raised:
        call_reward(give(result), prompts, ["r"] * 3)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 200


def test_a_reward_works_on_copies():
    def greedy(prompts, responses, answers, prompt):
        assert prompt == prompts == ["a", "b"]
        answers[0]["right"].pop()
        for given in (prompts, responses, answers, prompt):
            given.clear()
        return [0.0, 1.0]

    prompts, responses = ["a", "b"], ["c", "d"]
    columns = [{"answers": {"right": ["x", "y"]}}, {"answers": threading.Lock()}]
    assert call_reward(greedy, prompts, responses, columns).tolist() == [0, 1]
    assert (prompts, responses) == (["a", "b"], ["c", "d"])
    assert columns[0] == {"answers": {"right": ["x", "y"]}}


def test_a_reward_that_ends_the_process_is_refused():
    def leaves(_prompts, _responses):
        sys.exit(0)

    def leaves_later(_prompts, _responses):
        yield 0.0
        sys.exit()

    for reward in (leaves, leaves_later):
        with pytest.raises(BadInput, match=rf"reward {reward.__name__} ends the process"):
            call_reward(reward, ["p"] * 2, ["r"] * 2)


def test_a_reward_cannot_turn_gradients_off():
    def scores(_prompts, responses):
        torch.set_grad_enabled(False)
        return [0.0] * len(responses)

    call_reward(scores, ["p"], ["r"])
    assert torch.is_grad_enabled()
    with torch.no_grad():
        call_reward(lambda _, r: [float(torch.is_grad_enabled())] * len(r), ["p"], ["r"])
        assert not torch.is_grad_enabled()


def test_a_reward_that_takes_responses_first_is_refused():
    for reward in (lambda answers, question: answers + question, lambda a, prompts: a + prompts):
        with pytest.raises(BadInput, match=r"takes an?\w* first; write def"):
            call_reward(reward, ["p"], ["r"])


def test_an_async_reward_is_refused(recwarn):
    async def reward(_prompts, _responses):
        return [0.0]

    class Caller:
        async def __call__(self, _prompts, _responses):
            return [0.0]

    for refused, name in [(reward, "reward"), (Caller(), "Caller")]:
        with pytest.raises(BadInput, match=f"reward {name} is async"):
            call_reward(refused, ["p"], ["r"])
    with pytest.raises(BadInput, match="as a list; it returned a coroutine"):
        call_reward(lambda p, r: reward(p, r), ["p"], ["r"])
    assert not recwarn.list


class Indexed:
    """A sequence of the old kind: a length and numbered items alone."""

    def __len__(self):
        return 3

    def __getitem__(self, i):
        return [0.5, 1.5, 2.5][i]


def test_a_sequence_of_the_old_kind_will_do():
    assert call_reward(give(Indexed()), ["p"] * 3, ["r"] * 3).tolist() == [0.5, 1.5, 2.5]
    with pytest.raises(BadInput, match="returned 3 scores for 2 responses"):
        call_reward(give(Indexed()), ["p"] * 2, ["r"] * 2)


def test_what_cannot_be_copied_is_handed_over_itself():
    class Alone:
        def __deepcopy__(self, memo):
            raise ValueError("there is only one")

    alone, seen = Alone(), []

    def reward(_prompts, responses, what):
        seen.extend(what)
        return [0.0] * len(responses)

    call_reward(reward, ["p"], ["r"], [{"what": alone}])
    assert seen == [alone]


def test_a_refused_score_stops_collect():
    def reward(prompts, _responses):
        return [0.0] * (len(prompts) - 1) + [math.nan]

    with pytest.raises(BadInput, match="gave nan for the prompt 'ba be bi bo bu da!'"):
        collected(make_policy(), make_policy(), reward)


def test_rewards_see_no_outer_white_space():
    model = make_policy()
    model.tokenizer.decode = lambda ids, **_: f"\n {len(ids)} words\t\n"
    assert model.decode(torch.tensor([3, 4])) == "2 words"


def test_a_pass_holds_the_logits_of_few_tokens(monkeypatch):
    rows = []

    def seen(hidden, *args, **kwargs):
        rows.append(len(hidden))
        return lm_head_logits(hidden, *args, **kwargs)

    monkeypatch.setattr("rlhf_min.logprobs.lm_head_logits", seen)
    monkeypatch.setattr("rlhf_min.speed.forward.CHUNK_TOKENS", 4)
    scored(policy_of(gpt2()), policy_of(gpt2(seed=9)))
    assert max(rows) == 4
    assert sum(rows) == 2 * sum(RESPONSE_LENGTHS)  # policy and reference


def test_prompt_examples_of_given_ids_need_no_text():
    found = collect(
        make_policy(),
        make_policy(),
        by_length,
        [PromptExample("", torch.tensor([3, 4]))],
        PPOConfig(max_new_tokens=2, max_tokens=8),
        rng=generator(),
    )
    assert isinstance(found, Rollout)
    assert found.scores.tolist() == [100.0 * len(found.responses[0])]
