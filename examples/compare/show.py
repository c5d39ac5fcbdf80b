"""A comparison as text: the reason first, then what it rests on."""

from collections.abc import Mapping, Sequence
from typing import Any

from compare.command import Options
from compare.explain import Explanation, Gap, largest
from compare.job import Record
from compare.result import Result

LOSSES = ("loss", "policy_loss", "value_loss")  # what a run has of them
CAUSES = 3  # that the first line names
TOLD = "What brings both together is told under these names in examples/compare/coming_from_trl.md."


def python(found: Mapping[str, Any]) -> str:
    """What an environment has."""
    return ", ".join(f"{name} {found[name]}" for name in ("trl", "transformers", "torch"))


def page(result: Result, options: Options) -> str:
    """The whole comparison."""
    record, explanation = result.record, result.explanation
    # What transformers will rename is nothing that the user's script could help.
    warned = [line for line in record.warnings if "deprecated" not in line]
    blocks = [
        "\n".join(headline(result)),
        _what(record, options),
        _causes(explanation),
        _others(_silent(explanation), explanation.without_effect),
        _others("Nothing here follows trl in these:", explanation.cannot),
        steps(record.steps, explanation),
        "\n  ".join(["trl warned:", *warned]) if warned else "",
    ]
    return "\n\n".join(block for block in blocks if block)


def headline(result: Result) -> list[str]:
    """Two lines: whether and why the two differ, and what is left."""
    record, found, weights = result.record, result.explanation, result.weights
    n = len(record.steps)
    apart = f"the weights after step {n} are at most {weights.size:.0e} apart"
    loss = max(largest(found.best, record.steps, name) for name in LOSSES)
    if found.first is None and result.explained:
        return [f"They agree: the loss of {n} steps to {loss:.0e}; {apart}.", _unseen(found)]
    why = [followed.cause.says for followed in found.followed]
    cannot = [cause.says for cause in found.cannot]
    told = "; ".join((why or cannot or ["no known cause"])[:CAUSES])
    more = f"; and {len(why) - CAUSES} more" if len(why) > CAUSES else ""
    rest = "; ".join(cannot) if why and cannot else "no known cause is left to try"
    if found.first is None:
        first = f"They agree in all metrics of {n} steps, and {apart}, most in {weights.name}."
    else:
        first = f"They differ from step {found.first.step} on ({_gap(found.first)}): {told}{more}."
    if found.left is not None:
        return [first, f"Not explained: {_gap(found.left)} in step {found.left.step}; {rest}."]
    if not result.explained:
        return [first, f"Not explained: {apart}, most in {weights.name}; {rest}."]
    return [first, f"Explained to {loss:.0e} in loss, {apart}; nothing else differs."]


def steps(theirs: Sequence[Mapping[str, float]], found: Explanation[Any]) -> str:
    """Every metric of every step: trl's, ours up to the step that differs, and ours with all
    followed."""
    changed = bool(found.followed)
    head = ["step", "metric", "trl", "here", "difference"]
    rows = [head + ["followed", "difference"] * changed]
    for i, (other, best) in enumerate(zip(theirs, found.best, strict=False)):
        mine = found.base[i] if i < len(found.base) else {}
        for name in (name for name in best if name in other):
            cells = _beside(mine.get(name), other[name])
            if changed:
                cells += _beside(best[name], other[name])
            rows.append([str(i + 1), name, f"{other[name]:.8g}", *cells])
    told = "\nhere: by our own conventions, up to the first step that differs" * changed
    return _table(rows) + told


def _beside(ours: float | None, theirs: float) -> list[str]:
    return ["", ""] if ours is None else [f"{ours:.8g}", f"{abs(ours - theirs):.0e}"]


def _gap(gap: Gap) -> str:
    digits = 6 if f"{gap.theirs:.6g}" != f"{gap.ours:.6g}" else 15
    return f"{gap.metric} {gap.theirs:.{digits}g} in trl, {gap.ours:.{digits}g} here"


def _unseen(found: Explanation[Any]) -> str:
    if found.in_weights:
        told = "; ".join(cause.says for cause in found.in_weights)
        return f"Only the weights differ, until this is followed: {told}."
    others = [cause.says for cause in (*found.without_effect, *found.cannot)]
    return f"Without effect: {'; '.join(others)}." if others else "Nothing differs."


def _what(record: Record, options: Options) -> str:
    rows = sum(len(part) for micros in record.batches for part in micros)
    source = options.trl_script or f"{options.model}, {options.data}"
    why = record.facts.get("raw_rows")
    told = [
        f"\ntrl's {n}: {record.facts[n]}."
        for n in ("rows", "config", "tokenizer")
        if n in record.facts
    ]
    ids = f"\nBoth sides have trl's ids, and texts are not compared: {why}." if why else ""
    return (
        f"{record.trainer} of {python(record.versions)}; {record.facts['dtype']}; {rows} rows in "
        f"{len(record.steps)} steps; {source}{ids}{''.join(told)}"
    )


def _causes(found: Explanation[Any]) -> str:
    if not found.followed:
        return ""
    rows = [["cause", "difference while it is not followed", "once it is"]]
    for followed in found.followed:
        gap = followed.before
        before = f"{gap.size:.1e} in {gap.metric} of step {gap.step}"
        rows.append([followed.cause.name, before, f"{followed.after:.0e}"])
    told = [f"  {followed.cause.name}: {followed.cause.says}." for followed in found.followed]
    return "\n".join([_table(rows), *told, TOLD])


def _silent(found: Explanation[Any]) -> str:
    behind = "of these steps" if found.left is None else f"up to step {found.left.step}"
    return f"These differ too, and change no metric {behind}:"


def _others(title: str, causes: Sequence[Any]) -> str:
    return "\n".join([title, *(f"  {cause.says}." for cause in causes)]) if causes else ""


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
