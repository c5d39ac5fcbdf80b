"""From texts to tensors: padding, encoding, cutting, grouping, and the order of the examples."""

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import EOS, PAD, gpt2, policy_of, token_rows
from strategies import assert_close
from tolerances import EXACT

from rlhf_min.data import (
    Cursor,
    Sequences,
    collate,
    in_groups,
    micro_batches,
)
from rlhf_min.losses import sft_loss

# collate


def test_collate_as_drawn():
    # the drawing: p p p | r0 r1 EOS pad, P = 3, T = 4; the second row is longer on the right
    batch = collate(
        [torch.tensor([11, 12, 13]), torch.tensor([14])],
        [torch.tensor([21, 22, EOS]), torch.tensor([23, 24, 25, EOS])],
        pad_id=9,
    )
    assert batch.ids.tolist() == [[11, 12, 13, 21, 22, EOS], [14, 23, 24, 25, EOS, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]
    assert batch.prompt_lengths.tolist() == [3, 1]
    assert batch.responses.tolist() == [[21, 22, EOS, 9], [23, 24, 25, EOS]]
    assert batch.mask.tolist() == [[True, True, True, False], [True, True, True, True]]
    assert batch.mask.dtype == torch.bool
    assert len(batch) == 2


def test_collate_masks_do_not_look_at_ids():
    # PAD and EOS in the middle of prompts and responses are real tokens
    batch = collate(
        [torch.tensor([PAD, 5]), torch.tensor([EOS])],
        [torch.tensor([PAD, EOS, PAD]), torch.tensor([PAD])],
        pad_id=PAD,
    )
    assert batch.attention_mask.sum(1).tolist() == [5, 2]
    assert batch.mask.tolist() == [[True, True, True], [True, False, False]]


def test_pad_equal_to_eos_changes_nothing():
    model = policy_of(gpt2(), critic="shared")
    prompts, responses = (
        token_rows([3, 1, 4], seed=0),
        token_rows([2, 5, 1], seed=1, eos=True),
    )
    results = []
    for pad_id in (PAD, EOS, 17):
        batch = collate(prompts, responses, pad_id=pad_id)
        found = model(batch)
        loss = sft_loss(found.logprobs, batch.mask).loss
        gradients = torch.autograd.grad(loss, list(model.lm.parameters()))
        results.append([*found[:3], loss, *gradients])
    for other in results[1:]:
        for now, first in zip(other, results[0], strict=True):
            assert_close(now, first, EXACT)


@pytest.mark.parametrize(
    ("prompts", "responses"),
    [([[1], []], [[1], [1]]), ([[1], [1]], [[], [1]]), ([[1]], [[1], [1]])],
)
def test_collate_refuses_rows_that_predict_nothing(prompts, responses):
    with pytest.raises(ValueError, match=r"at least one|shorter|longer"):
        collate(
            [torch.tensor(p, dtype=torch.long) for p in prompts],
            [torch.tensor(r, dtype=torch.long) for r in responses],
            pad_id=0,
        )


lengths = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=6)


@given(lengths, st.data())
def test_select_is_collate_of_those_rows(lengths, data):
    prompts = token_rows([p for p, _ in lengths], seed=0)
    responses = token_rows([r for _, r in lengths], seed=1)
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, unique=True))
    part = collate(prompts, responses, pad_id=7).select(rows)
    alone = collate([prompts[i] for i in rows], [responses[i] for i in rows], pad_id=7)
    for name in Sequences.__dataclass_fields__:
        assert_close(getattr(part, name), getattr(alone, name), EXACT)


def test_to_moves_every_tensor():
    moved = collate([torch.tensor([3])], [torch.tensor([4])], pad_id=0).to("meta")
    assert {getattr(moved, n).device.type for n in Sequences.__dataclass_fields__} == {"meta"}


# micro_batches


@given(st.lists(st.integers(1, 30), max_size=20), st.integers(1, 80))
def test_micro_batches_are_a_partition_within_the_limit(lengths, max_tokens):
    groups = micro_batches(lengths, max_tokens=max_tokens)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        assert group
        padded = len(group) * max(lengths[row] for row in group)
        assert padded <= max_tokens or len(group) == 1


@given(st.lists(st.integers(1, 9), max_size=12), st.integers(9, 40))
def test_micro_batches_of_sorted_rows_are_full(lengths, max_tokens):
    # longest first, and no group could have taken one more of the rows that follow
    groups = micro_batches(lengths, max_tokens=max_tokens)
    order = [lengths[row] for group in groups for row in group]
    assert order == sorted(lengths, reverse=True)
    for group in groups[:-1]:
        assert (len(group) + 1) * max(lengths[row] for row in group) > max_tokens


def test_micro_batches_of_equal_rows_keep_their_order():
    assert micro_batches([2, 2, 2], max_tokens=4) == [[0, 1], [2]]
    assert micro_batches([5], max_tokens=1) == [[0]]
    assert micro_batches([], max_tokens=1) == []


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 40), st.integers(2, 4))
def test_shared_micro_batches_take_as_many_turns_and_the_largest_is_the_least(
    lengths, max_tokens, among
):
    def size(rows):
        return len(rows) * max(lengths[row] for row in rows)

    whole = micro_batches(lengths, max_tokens=max_tokens)
    groups = micro_batches(lengths, max_tokens=max_tokens, among=among)
    turns = -(-len(whole) // among)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    assert len(groups) <= turns * among
    # of all ways to cut the sorted rows so often
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    cuts = [
        [0, *inner, len(order)]
        for n in range(min(turns * among, len(order)))
        for inner in combinations(range(1, len(order)), n)
    ]
    least = min(max(size(order[a:b]) for a, b in pairwise(cut)) for cut in cuts)
    assert max(map(size, groups)) == least


def test_in_groups():
    found = list(in_groups(["aa", "b", "cc", "d"], len, max_tokens=4))
    assert found == [["aa", "cc"], ["b", "d"]]


# Cursor


def expected_order(n: int, seed: int, epochs: int) -> list[int]:
    order = []
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(seed + epoch)
        order += torch.randperm(n, generator=generator).tolist()
    return order


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 99))
def test_take_goes_through_each_epoch_once(n, size, seed):
    cursor, taken = Cursor(range(n), seed), []
    for epoch in range(3):
        batches = [cursor.take(size) for _ in range(cursor.batches_per_epoch(size))]
        assert (cursor.epoch, cursor.position) == (epoch, n)
        assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
        one_epoch = [x for batch in batches for x in batch]
        assert sorted(one_epoch) == list(range(n))
        taken += one_epoch
    assert taken == expected_order(n, seed, 3)


@given(st.integers(1, 12), st.lists(st.integers(0, 30), max_size=6), st.integers(0, 99))
def test_take_across_is_exact_and_leaves_out_nothing(n, sizes, seed):
    cursor, taken = Cursor(range(n), seed), []
    for size in sizes:
        batch = cursor.take_across(size)
        assert len(batch) == size
        taken += batch
    assert taken == expected_order(n, seed, sum(sizes) // n + 1)[: sum(sizes)]


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 9), st.integers(0, 9))
def test_a_restored_cursor_continues(n, size, before, after):
    cursor = Cursor("abcdefghijkl"[:n], seed=3)
    for _ in range(before):
        cursor.take(size)
    restored = Cursor("abcdefghijkl"[:n], seed=3, epoch=cursor.epoch, position=cursor.position)
    for _ in range(after):
        assert restored.take(size) == cursor.take(size)
        assert restored.take_across(size) == cursor.take_across(size)
        assert (restored.epoch, restored.position) == (cursor.epoch, cursor.position)


def test_seeds_give_other_orders():
    one, other = (Cursor(range(50), seed).take(50) for seed in (0, 100))
    assert one != other


def test_batches_per_epoch():
    assert [Cursor(range(7), 0).batches_per_epoch(n) for n in (1, 3, 7, 8)] == [7, 3, 1, 1]
