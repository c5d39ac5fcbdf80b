"""The parts of a report that show texts: samples side by side, and responses token by token."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from rlhf_min.harness.report.markup import Html, join, table, tag
from rlhf_min.harness.run.layout import TOKENS
from rlhf_min.harness.run.reading import Record, Run

SAMPLES_SHOWN = 8  # prompts that are not folded away
STEPS_SHOWN = 5  # in the token view, evenly spread, first and last among them
RESPONSES_SHOWN, TOKENS_SHOWN = 4, 600  # of each step, at most; the file has more
SAME = "Drawn with the same random numbers."

STYLE = """
.sample { border-top: 1px solid var(--rule); padding: .8rem 0; }
.prompt { white-space: pre-wrap; font-weight: 600; }
.side { display: grid; gap: .6rem 1.6rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); }
.response { white-space: pre-wrap; margin: .15rem 0; }
.sample .quiet { margin: 0; }
ins, del { text-decoration-thickness: 2px; text-underline-offset: 3px; border-radius: 3px; }
ins { background: rgb(var(--plus) / .16); text-decoration-line: underline; }
del { background: rgb(var(--minus) / .16); text-decoration: underline dotted; }
.tokens { line-height: 2; margin: .3rem 0; }
.token { white-space: pre-wrap; border-radius: 3px; }
span.token { padding: .15rem 0; }
.plus { background: rgb(var(--plus) / var(--a)); }
.minus { background: rgb(var(--minus) / var(--a)); }
.sample td, .sample thead th + th { text-align: right; }
"""


def samples(run: Run) -> Iterator[Html]:
    """The same prompts before and after, side by side, with what has changed marked."""
    tested = [row for row in run.samples if "model" in row]
    far = [row for row in run.samples if "kl" in row]
    looks = [row for row in run.samples if "model" not in row and "kl" not in row]
    if tested:
        yield tag("h2", "Samples of the test")
        yield _quiet(f"Beside {tested[0]['model'].upper()}, what is new is underlined. {SAME}")
        yield from _side_by_side([(row["model"].upper(), row) for row in tested])
    if looks:
        first, last = looks[0]["step"], looks[-1]["step"]
        yield tag("h2", "Samples of PPO")
        yield _quiet(f"What was left out is dotted underneath, what is new underlined. {SAME}")
        names = {first: f"step {first}" if first else "before", last: f"step {last}"}
        shown = [(names[row["step"]], row) for row in looks if row["step"] in names]
        yield from _side_by_side(shown)
    if far:
        yield tag("h2", "Furthest from the reference")
        yield _quiet("The run was ended because its KL exceeded max_kl; these are the largest.")
        yield from _side_by_side([(f"step {row['step']}", row) for row in far])


def _side_by_side(rows: Sequence[tuple[str, Record]]) -> Iterator[Html]:
    """For each prompt its responses; the first one is what the others are compared with."""
    prompts: dict[str, dict[str, Record]] = {}
    for name, row in rows:
        prompts.setdefault(row["prompt"], {})[name] = row
    shown = [_sample(prompt, found) for prompt, found in prompts.items()]
    yield from shown[:SAMPLES_SHOWN]
    if more := shown[SAMPLES_SHOWN:]:
        yield tag("details", tag("summary", f"{len(more)} more"), *more)


def _sample(prompt: str, found: Mapping[str, Record]) -> Html:
    responses = [row["response"] for row in found.values()]
    first, last = responses[0], responses[-1]
    texts: list[object] = [changed(first, response)[1] for response in responses]
    texts[0] = changed(first, last)[0] if len(found) == 2 else first
    cells = [
        tag("div", _quiet(f"{name}: {_worth(row)}"), tag("div", text, class_="response"))
        for (name, row), text in zip(found.items(), texts, strict=True)
    ]
    head, side = tag("div", prompt, class_="prompt"), tag("div", *cells, class_="side")
    return tag("div", head, side, class_="sample")


def _quiet(text: str) -> Html:
    return tag("p", text, class_="quiet")


def _worth(row: Record) -> str:
    gold = f", gold {row['gold_reward']:.2f}" if "gold_reward" in row else ""
    kl = f", KL {row['kl']:.2f} nats" if "kl" in row else ""
    return f"score {row['score']:+.2f}{gold}{kl}"


def changed(before: str, after: str) -> tuple[Html, Html]:
    """Both texts, the words that only the first one has in ``del``, the second one's in ``ins``.

    >>> print(*changed("It is 5.", "It is 6, sir."), sep="; ")
    It is <del>5.</del>; It is <ins>6, sir.</ins>
    """
    ours, theirs = (re.findall(r"\s*\S+|\s+$", text) for text in (before, after))
    gone, new = [], []
    for kind, i, j, k, m in difflib.SequenceMatcher(None, ours, theirs, False).get_opcodes():
        equal = kind == "equal"
        gone.append(_marked("del", "".join(ours[i:j]), equal))
        new.append(_marked("ins", "".join(theirs[k:m]), equal))
    return join(*gone), join(*new)


def _marked(name: str, text: str, equal: bool) -> Html | None:
    """The text within an element, if it is no equal one, but for the space before it."""
    word = text.lstrip()
    return join(text) if equal or not word else join(text[: -len(word)], tag(name, word))


# Tokens


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


def tokens(run: Run) -> Iterator[Html]:
    """A few responses token by token, and how their numbers come about."""
    steps: dict[int, list[Record]] = {}
    for record in run.tokens:
        steps.setdefault(record["step"], []).append(record)
    if not steps:
        return
    last = max(steps)
    yield tag("h2", "Token by token")
    yield tag(
        "p",
        "A blue token turned out better than the values expected, an orange one worse: that is the "
        "advantage, by which the update makes it more or less likely. In the tables, log p and ref "
        "are log-probabilities under policy and reference when the response was sampled, ratio is "
        "the policy's probability after the update over that before it, and a clipped ratio has "
        "gone as far as it pays.",
    )
    places = sorted(steps)
    apart = (len(places) - 1) / (STEPS_SHOWN - 1)
    spread = places if apart <= 1 else [places[round(i * apart)] for i in range(STEPS_SHOWN)]
    for step in reversed(spread):
        parts = [_response(record, opened=record is steps[last][0]) for record in _few(steps[step])]
        if step == last:
            yield tag("h3", f"Step {step}")
            yield from parts
            yield from _by_hand(steps[last][0])
            yield from _means(run, steps[last])
        else:
            yield tag("details", tag("summary", f"Step {step}"), *parts)


def _few(records: Sequence[Record]) -> Sequence[Record]:
    """The first ones, as many as a page has room for."""
    ends = accumulate(len(record["tokens"]) for record in records[:RESPONSES_SHOWN])
    return records[: max(1, sum(end <= TOKENS_SHOWN for end in ends))]


def _response(record: Record, *, opened: bool) -> Html:
    """A response with its tokens coloured, and their table."""
    found = record["tokens"]
    largest = max(abs(token["advantage"] or 0) for token in found) or 1

    def shade(token: Record) -> dict[str, str]:
        """The sign of the advantage is the colour, its size the strength."""
        if token["advantage"] is None:
            return {"class_": "token"}
        sign = "plus" if token["advantage"] >= 0 else "minus"
        strength = f"--a:{0.5 * abs(token['advantage']) / largest:.2f}"
        return {"class_": f"token {sign}", "style": strength}

    names = [token["token"].replace("\n", "↵\n") for token in found]
    ribbon = [tag("span", name, **shade(token)) for name, token in zip(names, found, strict=True)]
    lines = [
        [
            tag("th", tag("span", name, class_="token"), scope="row"),
            *[
                tag("td", _signed(key, token[key]), **(shade(token) if key == "advantage" else {}))
                for key in COLUMNS
            ],
            "clipped" if token["clipped"] else "",
        ]
        for name, token in zip(names, found, strict=True)
    ]
    return tag(
        "div",
        tag("div", record["prompt"], class_="prompt"),
        tag("div", *ribbon, class_="tokens"),
        _quiet(_worth(record)),
        tag(
            "details",
            tag("summary", f"its {len(found)} tokens"),
            table(["token", *COLUMNS.values(), ""], lines),
            open="" if opened else None,
        ),
        class_="sample",
    )


def _signed(key: str, value: float | None) -> str:
    if value is None:
        return "not finite"
    return f"{value:+.3f}" if key in ("advantage", "reward", "kl") else f"{value:.3f}"


def _by_hand(record: Record) -> Iterator[Html]:
    """The advantage of one token as anyone can compute it from the table."""
    found = record["tokens"]
    place = max(len(found) - 2, 0)
    token, after = [*found, {"value": 0.0, "return": 0.0}][place : place + 2]
    if None in (*token.values(), *after.values()):
        return
    gamma, lam = record["gamma"], record["lam"]
    delta = token["reward"] + gamma * after["value"] - token["value"]
    next_advantage = after["return"] - after["value"]
    advantage = delta + gamma * lam * next_advantage
    yield tag(
        "p",
        f"By hand, token {place + 1} of the first response, with gamma {gamma:g} and lambda "
        f"{lam:g}; A of the next token is its return less its value:",
    )
    equations = (
        f"delta = reward + gamma * next value - value = {token['reward']:.4f} + {gamma:g} * "
        f"{after['value']:.4f} - {token['value']:.4f} = {delta:.4f}",
        f"A = delta + gamma * lambda * next A = {delta:.4f} + {gamma * lam:g} * "
        f"{next_advantage:.4f} = {advantage:.4f}",
        f"return = A + value = {advantage + token['value']:.4f}; the table has "
        f"{token['return']:.4f}",
        "advantage = (A - mean of all A of the rollout) / their standard deviation"
        if record["whitened"]
        else f"advantage = A; the table has {token['advantage']:.4f}",
    )
    yield tag("ul", *[tag("li", tag("code", equation)) for equation in equations])


def _means(run: Run, records: Sequence[Record]) -> Iterator[Html]:
    """The metrics of a step, computed again from its tokens, where all of them are there."""
    step, total = records[0]["step"], records[0]["rows"]
    row = next((r for r in run.rows if r["stage"] == "ppo" and r["step"] == step), {})
    found = [token for record in records for token in record["tokens"]]
    if len(records) < total or not row or any(None in token.values() for token in found):
        yield tag("p", f"{TOKENS} has {len(records)} of the {total} responses of step {step}.")
        return
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
    yield tag(
        "p",
        f"{TOKENS} has all {total} responses of step {step}, so that the step's metrics can be "
        "computed from it: score, KL and reward are means over responses, value and return over "
        "tokens.",
    )
    lines = [[name, f"{mean:.6f}", f"{row[name]:.6f}"] for name, mean in again.items()]
    yield table(["", f"from {TOKENS}", "in metrics.jsonl"], lines)
