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


def tokens(run: Run) -> Iterator[Record]:
    """Of each stage that samples: a few responses token by token, and how their numbers come
    about."""
    stages: dict[str, dict[int, list[Record]]] = {}
    for record in run.tokens:
        stages.setdefault(record["stage"], {}).setdefault(record["step"], []).append(record)
    for stage, steps in stages.items():
        places = sorted(steps)
        apart = (len(places) - 1) / (STEPS_SHOWN - 1)
        spread = places if apart <= 1 else [places[round(i * apart)] for i in range(STEPS_SHOWN)]
        last, *earlier = [
            (step, [_response(record) for record in _few(steps[step])]) for step in reversed(spread)
        ]
        records = steps[last[0]]
        shown = [token for record in records for token in record["tokens"]]
        yield {
            "title": title(stage),
            "columns": {k: head for k, head in COLUMNS.items() if any(k in t for t in shown)},
            "last": last,
            "earlier": earlier,
            "by_hand": _by_hand(records[0]),
            "file": TOKENS,
            "n": len(records),
            "total": records[0]["rows"],
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


def _by_hand(record: Record) -> tuple[str, list[str]] | None:
    """What an advantage of the first response is made of, so that anyone can compute it by hand:
    a sentence, and the lines of the calculation."""
    found = record["tokens"]
    if any(None in token.values() for token in found[-2:]) or None in record.get("group", ()):
        return None
    if "gamma" in record:
        return _gae_by_hand(record)
    return _group_by_hand(record) if "group" in record else None


def _gae_by_hand(record: Record) -> tuple[str, list[str]]:
    """PPO's, of the token before the last one."""
    gamma, lam, found = record["gamma"], record["lam"], record["tokens"]
    place = max(len(found) - 2, 0)
    token, after = [*found, {"value": 0.0, "return": 0.0}][place : place + 2]
    reward, value, next_value = token["reward"], token["value"], after["value"]
    delta, following = reward + gamma * next_value - value, after["return"] - next_value
    advantage = delta + gamma * lam * following
    return (
        f"By hand, token {place + 1} of the first response, with gamma {gamma:g} and lambda "
        f"{lam:g}; A of the next token is its return less its value:",
        [
            f"delta = reward + gamma * next value - value = {reward:.4f} + {gamma:g} * "
            f"{next_value:.4f} - {value:.4f} = {delta:.4f}",
            f"A = delta + gamma * lambda * next A = {delta:.4f} + {gamma * lam:g} * "
            f"{following:.4f} = {advantage:.4f}",
            f"return = A + value = {advantage + value:.4f}; the table has {token['return']:.4f}",
            "advantage = (A - mean of all A of the rollout) / their standard deviation"
            if record["whitened"]
            else f"advantage = A; the table has {token['advantage']:.4f}",
        ],
    )


def _group_by_hand(record: Record) -> tuple[str, list[str]]:
    """GRPO's and RLOO's, which all tokens of the response share."""
    group, place, scale = record["group"], record["place"], record["scale"]
    own, others = group[place], [*group[:place], *group[place + 1 :]]
    beside, named = (others, "the others") if scale == "leave_one_out" else (group, "the group")
    mean = sum(beside) / len(beside)
    summed = " + ".join(f"{reward:.4f}" for reward in beside).replace("+ -", "- ")
    lines = [f"mean of {named} = ({summed}) / {len(beside)} = {mean:.4f}"]
    table = f"the table has {record['tokens'][0]['advantage']:.4f}"
    if scale == "group":
        deviation = (sum((x - mean) ** 2 for x in group) / (len(group) - 1)) ** 0.5
        advantage = (own - mean) / (deviation + 1e-4)
        lines += [
            f"deviation = the root of the sum of (R - mean)^2 / {len(group) - 1} = {deviation:.4f}",
            f"advantage = (R - mean) / (deviation + 0.0001) = ({own:.4f} - {mean:.4f}) / "
            f"{deviation + 1e-4:.4f} = {advantage:.4f}; {table}",
        ]
    elif scale == "batch":
        lines.append(
            f"advantage = (R - mean) / (deviation of all R of the rollout + 0.0001), of "
            f"{own - mean:.4f}; {table}"
        )
    else:
        lines.append(f"advantage = R - mean = {own:.4f} - {mean:.4f} = {own - mean:.4f}; {table}")
    return (
        f"By hand, the first response, of a group of {len(group)} to the same prompt; R is the sum "
        f"of its rewards, {own:.4f}:",
        lines,
    )


def _means(run: Run, records: Sequence[Record]) -> list[tuple[str, str, str]] | None:
    """The metrics of a step, computed again from its tokens, if all of them are there."""
    stage, step, total = (records[0][key] for key in ("stage", "step", "rows"))
    row = next((r for r in run.rows if (r["stage"], r["step"]) == (stage, step)), None)
    found = [token for record in records for token in record["tokens"]]
    if len(records) < total or row is None or any(None in token.values() for token in found):
        return None
    sums = {name: sum(token.get(name, 0) for token in found) for name in COLUMNS}
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
