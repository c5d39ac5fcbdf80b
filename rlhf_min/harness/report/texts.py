"""The texts of a report: samples side by side, and responses token by token."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from rlhf_min.harness.report.curves import title
from rlhf_min.harness.run.layout import TOKENS
from rlhf_min.harness.run.reading import Record, Run

STEPS_SHOWN = 5  # in the token view, evenly spread, first and last among them
RESPONSES_SHOWN, TOKENS_SHOWN = 4, 600  # of each step, at most; the file has more
# What the token view has of each token, with the heads of its columns.
COLUMNS = {
    "logprob": "log p",
    "ref_logprob": "ref",
    "kl": "KL",
    "reward": "reward",
    "value": "value",
    "advantage": "advantage",
    "return": "return",
    "ratio": "ratio",
}
Pieces = list[tuple[str, str]]  # of a text: "del", "ins" or "", and what is written there


# Samples


def samples(run: Run) -> Iterator[Record]:
    """The same prompts before and after, side by side, with what has changed marked."""
    tested = [row for row in run.samples if "model" in row]
    far = [row for row in run.samples if "kl" in row]
    trained = [row for row in run.samples if "model" not in row and "kl" not in row]
    same = "Drawn with the same random numbers."
    if tested:
        yield {
            "title": "Samples of the test",
            "note": f"Beside {tested[0]['model']}, what is new is underlined. {same}",
            "prompts": _side_by_side([(row["model"], row) for row in tested]),
        }
    for stage in dict.fromkeys(row["stage"] for row in trained):
        rows = [row for row in trained if row["stage"] == stage]
        first, last = rows[0]["step"], rows[-1]["step"]
        names = {first: f"step {first}" if first else "before", last: f"step {last}"}
        yield {
            "title": f"Samples of {title(stage)}",
            "note": f"What was left out is dotted underneath, what is new underlined. {same}",
            "prompts": _side_by_side(
                [(names[row["step"]], row) for row in rows if row["step"] in names]
            ),
        }
    if far:
        yield {
            "title": "Furthest from the reference",
            "note": "The run was ended because its KL exceeded max_kl; these are the largest.",
            "prompts": _side_by_side([(f"step {row['step']}", row) for row in far]),
        }


def _side_by_side(rows: Sequence[tuple[str, Record]]) -> list[Record]:
    """For each prompt its responses; the first one is what the others are compared with."""
    prompts: dict[str, dict[str, Record]] = {}
    for name, row in rows:
        prompts.setdefault(row["prompt"], {})[name] = row
    return [{"prompt": prompt, "responses": _compared(found)} for prompt, found in prompts.items()]


def _compared(found: Mapping[str, Record]) -> list[tuple[str, Record, Pieces]]:
    """Each response with its name, and its text with what has changed."""
    responses = [row["response"] for row in found.values()]
    first, last = responses[0], responses[-1]
    pieces = [changed(first, response)[1] for response in responses]
    pieces[0] = changed(first, last)[0] if len(found) == 2 else [("", first)]
    return list(zip(found, found.values(), pieces, strict=True))


def changed(before: str, after: str) -> tuple[Pieces, Pieces]:
    """Both texts in pieces: ``del`` what only the first one has, ``ins`` what only the second one.

    >>> changed("5.", "6, sir.")
    ([('del', '5.')], [('ins', '6, sir.')])
    """
    old, new = (re.findall(r"\s*\S+|\s+$", text) for text in (before, after))
    old_pieces, new_pieces = Pieces(), Pieces()
    for kind, i, j, k, m in difflib.SequenceMatcher(None, old, new, False).get_opcodes():
        old_pieces += _marked("del" if kind != "equal" else "", "".join(old[i:j]))
        new_pieces += _marked("ins" if kind != "equal" else "", "".join(new[k:m]))
    return old_pieces, new_pieces


def _marked(mark: str, text: str) -> Pieces:
    """The text as a piece, its mark not on the space before it."""
    words = text.lstrip() if mark else text
    pieces = [("", text[: len(text) - len(words)]), (mark, words)]
    return [piece for piece in pieces if piece[1]]


# Tokens


def tokens(run: Run) -> Record | None:
    """A few responses token by token, and how their numbers come about."""
    steps: dict[int, list[Record]] = {}
    for record in run.tokens:
        if record["stage"] != run.tokens[0]["stage"]:
            continue
        steps.setdefault(record["step"], []).append(record)
    if not steps:
        return None
    places = sorted(steps)
    apart = (len(places) - 1) / (STEPS_SHOWN - 1)
    spread = places if apart <= 1 else [places[round(i * apart)] for i in range(STEPS_SHOWN)]
    last, *earlier = [
        (step, [_response(record) for record in _few(steps[step])]) for step in reversed(spread)
    ]
    records = steps[last[0]]
    return {
        "columns": COLUMNS,
        "last": last,
        "earlier": earlier,
        "first": records[0],
        "by_hand": _by_hand(records[0]),
        "file": TOKENS,
        "n": len(records),
        "means": _means(run, records),
    }


def _few(records: Sequence[Record]) -> Sequence[Record]:
    """The first ones, as many as a page has room for."""
    ends = accumulate(len(record["tokens"]) for record in records[:RESPONSES_SHOWN])
    return records[: max(1, sum(end <= TOKENS_SHOWN for end in ends))]


def _response(record: Record) -> Record:
    """A response with the colour of each token: its advantage's sign, as strong as its size."""
    largest = max(abs(token["advantage"] or 0) for token in record["tokens"]) or 1
    shades = []
    for advantage in (token["advantage"] for token in record["tokens"]):
        if advantage is None:
            shades.append({"class": "token"})
            continue
        strength = f"--a:{0.5 * abs(advantage) / largest:.2f}"
        sign = "plus" if advantage >= 0 else "minus"
        shades.append({"class": f"token {sign}", "style": strength})
    return record | {"tokens": list(zip(record["tokens"], shades, strict=True))}


def _by_hand(record: Record) -> Record | None:
    """What PPO's advantage of one token is made of, so that anyone can compute it by hand."""
    if "gamma" not in record:
        return None
    found = record["tokens"]
    place = max(len(found) - 2, 0)
    token, after = [*found, {"value": 0.0, "return": 0.0}][place : place + 2]
    if None in (*token.values(), *after.values()):
        return None
    delta = token["reward"] + record["gamma"] * after["value"] - token["value"]
    following = after["return"] - after["value"]
    return {
        "place": place + 1,
        "token": token,
        "next": after,
        "delta": delta,
        "following": following,
        "advantage": delta + record["gamma"] * record["lam"] * following,
    }


def _means(run: Run, records: Sequence[Record]) -> list[tuple[str, str, str]] | None:
    """The metrics of a step, computed again from its tokens, if all of them are there."""
    stage, step, total = (records[0][key] for key in ("stage", "step", "rows"))
    row = next((r for r in run.rows if (r["stage"], r["step"]) == (stage, step)), None)
    found = [token for record in records for token in record["tokens"]]
    if len(records) < total or row is None or any(None in token.values() for token in found):
        return None
    sums = {
        name: sum(token[name] for token in found) for name in ("kl", "reward", "value", "return")
    }
    again = {
        "score": sum(record["score"] for record in records) / total,
        "kl": sums["kl"] / total,
        "reward": sums["reward"] / total,
        "value": sums["value"] / len(found),
        "return": sums["return"] / len(found),
        "response_length": len(found) / total,
    }
    return [
        (name, f"{mean:.6f}", f"{row[name]:.6f}") for name, mean in again.items() if name in row
    ]
