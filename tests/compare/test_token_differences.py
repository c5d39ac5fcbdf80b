"""What kind of difference there is between the ids of a row on both sides."""

import pytest
from compare.tokens import differences, rows_named

BOS, EOS = 1, 2


SPELLED = -1  # text that reads like EOS


class Letters:
    """A tokenizer whose ids 3 to 28 are letters, and 29 on two letters each: "aa", "ab", ..."""

    bos_token_id, eos_token_id = BOS, EOS
    all_special_ids = (BOS, EOS)

    def decode(self, token_ids):
        names = {BOS: "<s>", EOS: "</s>", 0: "\n", SPELLED: "</s>"}
        return "".join(names.get(i) or self._text(i) for i in token_ids)

    @staticmethod
    def _text(i):
        if i < 29:
            return chr(94 + i)
        first, second = divmod(i - 29, 26)
        return chr(97 + first) + chr(97 + second)


A, B, C, D = 3, 4, 5, 6
AB = 30  # "ab" as one token
DPO = {"prompt_ids": [A], "chosen_ids": [B, EOS], "rejected_ids": [C, EOS]}
SFT = {"prompt_ids": [A, B], "response_ids": [C, D, EOS]}
REWARD = {"chosen_ids": [A, B, EOS], "rejected_ids": [A, C, EOS]}


def kinds(ours, theirs, **more):
    found = differences({7: ours}, {7: ours | theirs}, Letters(), **more)
    return {difference.kind: difference.columns[7] for difference in found}


@pytest.mark.parametrize(
    ("ours", "theirs", "kind", "columns"),
    [
        (
            *(DPO, {"chosen_ids": [C, EOS], "rejected_ids": [B, EOS]}),
            *("swapped pair", ("chosen_ids", "rejected_ids")),
        ),
        (DPO, {"chosen_ids": [C], "rejected_ids": [B]}, "swapped pair", None),
        (REWARD, {"chosen_ids": [A, C, EOS], "rejected_ids": [A, B, EOS]}, "swapped pair", None),
        (DPO, {"chosen_ids": [B]}, "EOS", ("chosen_ids",)),
        (DPO, {"chosen_ids": [B], "rejected_ids": [C]}, "EOS", ("chosen_ids", "rejected_ids")),
        (REWARD, {"chosen_ids": [A, B]}, "EOS", ("chosen_ids",)),
        (SFT, {"response_ids": [C]}, "cut", ("response_ids",)),
        (SFT, {"response_ids": [C, D, EOS, 0]}, "tail", ("response_ids",)),
        (SFT, {"response_ids": [C, B, EOS]}, "text", ("response_ids",)),
        (SFT, {"prompt_ids": [BOS, A, B]}, "BOS", ("prompt_ids",)),
        (SFT, {"prompt_ids": [B]}, "template", ("prompt_ids",)),
        (SFT, {"prompt_ids": [C, A, D]}, "template", ("prompt_ids",)),
        (SFT, {"prompt_ids": [AB]}, "joined text", ("prompt_ids",)),
        (
            *(
                {"prompt_ids": [A], "response_ids": [B, EOS]},
                {"prompt_ids": [], "response_ids": [AB, EOS]},
            ),
            *("prompt trained on", ("prompt_ids", "response_ids")),
        ),
    ],
)
def test_each_kind(ours, theirs, kind, columns):
    found = kinds(ours, theirs)
    assert list(found) == [kind]
    assert columns is None or found[kind] == columns


def test_special_tokens_that_a_text_spells():
    name = "special tokens in a text"
    ours = {"prompt_ids": [A, SPELLED, B], "response_ids": [C, SPELLED, EOS]}
    assert kinds(ours, {"prompt_ids": [A, EOS, B]}) == {name: ("prompt_ids",)}
    assert kinds(ours, {"response_ids": [C, EOS]}) == {name: ("response_ids",)}


def test_a_row_that_fills_the_room_is_cut_even_if_only_eos_is_gone():
    assert kinds(DPO, {"chosen_ids": [B]}, max_length=2) == {"cut": ("chosen_ids",)}
    assert kinds(DPO, {"chosen_ids": [B]}, max_length=3) == {"EOS": ("chosen_ids",)}


def test_a_prompt_is_cut_only_where_the_row_is_too_long():
    assert kinds(SFT, {"prompt_ids": [B]}, max_length=5) == {"template": ("prompt_ids",)}
    assert kinds(SFT, {"prompt_ids": [B]}, max_length=4) == {"cut prompt": ("prompt_ids",)}
    with_bos = {"prompt_ids": [BOS, A, B], "response_ids": [C, D, EOS]}
    assert kinds(with_bos, {"prompt_ids": [BOS, D, A, B]}, max_length=7) == {
        "cut prompt": ("prompt_ids",)
    }


@pytest.mark.parametrize("response", [[D, B, C, EOS], [B, C, EOS], [D, D, B, C, EOS]])
def test_a_response_whose_first_tokens_alone_differ_was_joined_with_its_prompt(response):
    ours = {"prompt_ids": [A], "response_ids": [A, B, C, EOS]}
    assert kinds(ours, {"response_ids": response}) == {"joined text": ("response_ids",)}


def test_a_row_may_differ_in_two_ways():
    found = kinds(SFT, {"prompt_ids": [C, C], "response_ids": [C, D]})
    assert found == {"template": ("prompt_ids",), "EOS": ("response_ids",)}


def test_rows_are_gathered_by_kind_the_most_frequent_first():
    ours = dict.fromkeys(range(4), SFT)
    theirs = {n: SFT | {"response_ids": [C, D]} for n in (1, 3)} | {2: SFT | {"prompt_ids": [B]}}
    found = differences(ours, theirs, Letters())
    assert [(d.kind, list(d.columns)) for d in found] == [("EOS", [1, 3]), ("template", [2])]


def test_equal_rows_and_rows_of_one_side_are_no_difference():
    assert differences({0: SFT, 1: DPO}, {0: SFT}, Letters()) == []


def test_texts_are_shown_from_where_they_part():
    [found] = differences({0: SFT}, {0: SFT | {"response_ids": [C, B, EOS]}}, Letters())
    assert found.says == "the text reads 'cb</s>' in trl and 'cd</s>' here, from token 0 on"


def test_rows_are_named_by_their_places():
    assert rows_named([2], {2: "part.jsonl:5"}) == "row part.jsonl:5"
    assert rows_named([0, 1], {0: 1, 1: 2}) == "rows 1, 2"
