"""What is said of encoded rows: cuts, lengths, dropped rows, and what may not be meant."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlhf_min.encoding.chat import surprises
from rlhf_min.encoding.conversation import Place
from rlhf_min.encoding.cuts import CutReport
from rlhf_min.encoding.template import AS_IS, CHAT
from rlhf_min.errors import require

if TYPE_CHECKING:
    from rlhf_min.encoding.codec import Codec
    from rlhf_min.reward_model import RewardModel

MANY_CUT = 0.2  # of the responses: a warning is due
MANY_UNKNOWN = 0.05  # of the tokens: a warning is due
MOST_NAMED = 5  # of rows, reasons and special tokens


def describe(cut: CutReport, codec: "Codec") -> str:
    """What was cut, how long prompts and responses are, and how many end with EOS; a warning if
    much is lost.

    Raises:
        BadInput: if no response ends with EOS, so that none could be learned to end.
    """
    cure = f"raise --max_response_tokens, now {codec.max_response_tokens}, and --max_length with it"
    require_rows(cut)
    if not cut.responses:
        return _with_lengths(cut, "", cure, notes(cut, codec))
    share = cut.responses_with_eos / cut.responses
    cure_of_eos = f"end them with the tokenizer's {codec.tokenizer.eos_token}"
    if codec.template == AS_IS:
        cure_of_eos += f" (--template {AS_IS} adds none), or let what they end with be its EOS"
    require(
        share > 0,
        f"none of the {cut.responses} responses ends with EOS, so the policy would not learn to "
        f"stop; {cure_of_eos}",
    )
    supervised = f"; EOS is supervised in {share:.1%} of the responses"
    return _with_lengths(cut, supervised, cure, notes(cut, codec))


def describe_heldout(cut: CutReport, left: int) -> str:
    """A line on the held-out rows if some are dropped, else nothing; a warning if none is left."""
    lines = ""
    if cut.dropped:
        lines = f"\n  held out: {len(cut.dropped)} rows dropped: {reasons(cut)}"
    if equal := cut.equal_after_cut + cut.equal_tokens:
        lines += f"\n  held out: {equal} pairs dropped: equal to the model"
    if lines and not left:
        lines += "\n  warning: no held-out row is left, so nothing is measured on such rows"
    return lines


def require_rows(cut: CutReport) -> None:
    """Raise `BadInput` if no row is left.

    A row that is dropped was counted nowhere else.
    """
    require(
        cut.prompts > 0 or not cut.dropped,
        f"no row is left: {reasons(cut)}; change these rows, or look at --template",
    )


def describe_pairs(cut: CutReport, reward_model: "RewardModel") -> str:
    """The same for the reward model, which has no EOS to learn."""
    cure = (
        f"the reward model reads {reward_model.max_length} tokens of prompt and response; give a "
        "--reward_model with more positions (a small new one: raise --max_length)"
    )
    told = _with_lengths(cut, "", cure, [])
    if cut.unknown_tokens > MANY_UNKNOWN * cut.tokens:
        unknown = reward_model.tokenizer.unk_token
        told += (
            f"\n  warning: the reward model reads all that its tokenizer does not know as {unknown}"
            ", so texts that differ in that only score the same; give a --reward_model that knows "
            "this language and these signs"
        )
    return told


def _with_lengths(cut: CutReport, supervised: str, cure: str, notes: Sequence[str]) -> str:
    lines = [summary(cut)]
    if known := lengths(cut):
        lines.append(f"  tokens before the cut (median, p95, max): {known}{supervised}")
    if cut.responses_cut > MANY_CUT * cut.responses:
        share = cut.responses_cut / cut.responses
        lines.append(f"  warning: {share:.0%} of the responses lose their end; {cure}")
    return "\n".join([*lines, *(f"  {note}" for note in notes)])


def summary(cut: CutReport) -> str:
    """How many prompts and responses were cut, and how many rows were dropped and why."""
    parts = []
    for name in ("prompt", "response"):
        if total := getattr(cut, f"{name}s"):
            too_long, tokens = getattr(cut, f"{name}s_cut"), getattr(cut, f"{name}_tokens_cut")
            parts.append(f"{too_long} of {total} {name}s cut ({tokens} tokens lost)")
    if cut.equal_after_cut:
        parts.append(f"{cut.equal_after_cut} pairs dropped: equal after the cut")
    if cut.equal_tokens:
        parts.append(
            f"{cut.equal_tokens} pairs dropped: the tokenizer makes the same tokens of both "
            "responses (case, accents, white space, unknown signs)"
        )
    if cut.unknown_tokens:
        parts.append(f"{cut.unknown_tokens / cut.tokens:.1%} of the tokens are unknown")
    if cut.dropped:
        parts.append(f"{len(cut.dropped)} rows dropped: {reasons(cut)}")
    if cut.read_in_part:
        parts.append(
            f"{cut.read_in_part} texts were read only as far as they may fit, so they lose "
            "more than is counted"
        )
    if cut.eos_in_text:
        parts.append(
            f"{cut.eos_in_text} of {cut.responses} responses hold an EOS that their text "
            "spells; this tokenizer cannot read it as text"
        )
    return "; ".join(parts)


def reasons(cut: CutReport) -> str:
    """Why rows were dropped, with the number of the rows for each reason and the first places.

    >>> reasons(CutReport(dropped=[("too long", 2), ("empty", 4), ("too long", 7)]))
    'too long (2: rows 2, 7), empty (1: row 4)'
    """
    places: dict[str, list[Place]] = {}
    for reason, place in cut.dropped:
        places.setdefault(reason, []).append(place)
    parts = [f"{reason} ({len(at)}: {_rows(at)})" for reason, at in places.items()]
    return ", ".join(parts[:MOST_NAMED]) + ", ..." * (len(parts) > MOST_NAMED)


def lengths(cut: CutReport) -> str:
    """The median, the 95th percentile and the maximum of the lengths; "" if none are known.

    >>> lengths(CutReport(prompt_lengths=[3, 1, 2]))
    'prompts 2, 3, 3'
    """
    parts = []
    for name, found in (("prompts", cut.prompt_lengths), ("responses", cut.response_lengths)):
        if ranked := sorted(found):
            p50, p95 = (ranked[math.ceil(q * len(ranked)) - 1] for q in (0.5, 0.95))
            parts.append(f"{name} {p50}, {p95}, {ranked[-1]}")
    return "; ".join(parts)


def notes(cut: CutReport, codec: "Codec") -> list[str]:
    """What the template and the tokenizer make of texts that may not be meant so, by the line.

    Those that are so in a tenth of the texts or more begin with ``warning:``.
    """
    found = surprises(codec.tokenizer) if codec.template == CHAT else []
    if cut.changed:
        found.append(
            f"{_share(cut.changed, cut.prompts)}the chat template leaves out or changes "
            f"a message of {len(cut.changed)} of {cut.prompts} prompts "
            f"({_rows(cut.changed)})"
        )
    for what, total in (("prompts", cut.prompts), ("responses", cut.responses)):
        for known in (True, False):
            spelled = [s for s in cut.spelled if (s.what, s.known) == (what, known)]
            if spelled and not (known and codec.template == AS_IS):
                marks = list(dict.fromkeys(mark for s in spelled for mark in s.marks))
                named = ", ".join(marks[:MOST_NAMED]) + ", ..." * (len(marks) > MOST_NAMED)
                found.append(
                    f"{_share(spelled, total)}{len(spelled)} of {total} {what} spell "
                    f"{'special tokens' if known else 'marks of another chat template'} "
                    f"({named}; {_rows([s.place for s in spelled])}), "
                    f"{_reading(what, codec, known=known)}"
                )
    if codec.template == AS_IS:
        found += _notes_as_is(cut, codec)
    return found


def _reading(what: str, codec: "Codec", *, known: bool) -> str:
    if not known:
        other = f", or --template {AS_IS}, which adds no second one"
        return (
            "letters to this tokenizer; if they come from a template, give the model that has "
            f"it{other * (codec.template != AS_IS)}"
        )
    if what == "prompts" and codec.template == CHAT:
        told = "and go through the chat template once more"
    else:
        told = "which are read as text"
    return f"{told}; --template {AS_IS} reads rows that went through a template before"


def _notes_as_is(cut: CutReport, codec: "Codec") -> list[str]:
    found = []
    if not any(spelled.known for spelled in cut.spelled):
        found.append(
            f"warning: --template {AS_IS} adds nothing, and no text spells a special token"
        )
    if cut.without_bos:
        found.append(
            f"warning: {cut.without_bos} of {cut.prompts} prompts do not begin with "
            f"{codec.tokenizer.bos_token}, as this tokenizer's texts do; {AS_IS} adds none"
        )
    if endless := cut.responses - cut.responses_with_eos:
        found.append(
            f"warning: {endless} of {cut.responses} responses do not end with "
            f"{codec.tokenizer.eos_token}, so they teach no end; {AS_IS} adds none"
        )
    return found


def _rows(places: Sequence[Place]) -> str:
    places = list(dict.fromkeys(places))  # a row may have two responses
    first = ", ".join(map(str, places[:MOST_NAMED])) + ", ..." * (len(places) > MOST_NAMED)
    return f"row{'s' * (len(places) > 1)} {first}"


def _share(places: Sequence[Any], total: int) -> str:
    return "warning: " if len(places) * 10 >= total else ""
