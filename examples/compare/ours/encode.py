"""The ids that our side makes of the rows, by number of the row, and the rows it leaves out."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from compare.job import Ids, Row, Stage
from rlhf_min.encoding.codec import Codec
from rlhf_min.encoding.cuts import CutReport
from rlhf_min.reward import prepare_pairs
from rlhf_min.reward_model import RewardModel


@dataclass(frozen=True)
class Encoded:
    """Ids by number of the row; `left_out` says of the other rows why they have none."""

    rows: dict[int, Ids]
    left_out: dict[int, str]


def encode(
    stage: Stage,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str,
    max_length: int,
) -> Encoded:
    """Rows of SFT and DPO, as `Codec` encodes them.

    A row that fits is not cut. Of one longer than `max_length` the prompt may keep half of the
    room, and the response the other half; the commands' options part it otherwise.
    """
    whole = Codec(tokenizer, max_length, max_length, template=template)
    halves = Codec(tokenizer, max_length - max_length // 2, max_length // 2, template=template)
    encoded = Encoded({}, {})
    for number, row in enumerate(rows):
        ids, report = _encode(stage, whole, row)
        if ids is not None and _length(ids) > max_length:
            ids, report = _encode(stage, halves, row)
        if ids is not None:
            encoded.rows[number] = ids
        else:
            encoded.left_out[number] = _reason(report)
    return encoded


def encode_pairs(rows: Sequence[Row], reward_model: RewardModel) -> Encoded:
    """Rows of reward training, as `prepare_pairs` encodes them."""
    encoded = Encoded({}, {})
    for number, row in enumerate(rows):
        examples, report = prepare_pairs(reward_model, [row])
        for x in examples:
            encoded.rows[number] = {
                "chosen_ids": x.chosen_pair.ids.tolist(),
                "rejected_ids": x.rejected_pair.ids.tolist(),
            }
        if not examples:
            encoded.left_out[number] = _reason(report)
    return encoded


def _encode(stage: Stage, codec: Codec, row: Row) -> tuple[Ids | None, CutReport]:
    if stage == "sft":
        examples, report = codec.encode_demonstrations([row])
        names: tuple[str, ...] = ("prompt_ids", "response_ids")
    else:
        examples, report = codec.encode_preferences([row])  # type: ignore[assignment]
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
    if not examples:
        return None, report
    return {name: getattr(examples[0], name).tolist() for name in names}, report


def _length(ids: Ids) -> int:
    prompt, *responses = ids.values()
    return len(prompt) + max(map(len, responses))


def _reason(report: CutReport) -> str:
    if report.dropped:
        return report.dropped[0][0]
    return "its two responses are equal" + " once cut" * bool(report.equal_after_cut)
