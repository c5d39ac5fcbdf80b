"""From what the sides did to a table, a chart, and figures in JSON."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark.flops import useful
from benchmark.rounds import Outcome
from benchmark.sides import Played

GB = 1e9
TITLES = {
    "ppo": "PPO",
    "dpo": "DPO",
    "reward": "Reward model",
    "sampling": "Sampling",
}


@dataclass(frozen=True)
class Figures:
    """Of one side: medians over the rounds, seconds and bytes."""

    seconds: list[float]
    parts: dict[str, float]
    tokens_per_second: float
    utilisation: dict[str, float]
    peak: int
    fixed: int

    @property
    def above_fixed(self) -> int:
        """What of the peak is neither interpreter, weights, gradients nor Adam's state."""
        return self.peak - self.fixed

    @classmethod
    def of(cls, outcome: Outcome, played: Played) -> "Figures":
        """Utilisation is the time that matrix products alone would take, over the time taken; for
        the update, at the speed that they have at its shapes."""
        task, side, wanted = outcome.task, played.side, outcome.task.expected()
        flops = useful(task.workload, task.size, wanted.lengths, own_critic=side.own_critic)
        rates = outcome.rates[side.precision.split()[0]]
        parts = {
            part: statistics.median(r["seconds"][part] for r in played.counted)
            for part in played.counted[0]["seconds"]
        }
        if "update" in parts:
            parts["scoring"] = parts["all"] - parts["sampling"] - parts["update"]
        sampled = sum(response for _, response in wanted.lengths)
        tokens = sampled if task.workload == "sampling" else wanted.tokens
        return cls(
            [r["seconds"]["all"] for r in played.counted],
            parts,
            tokens / parts["all"],
            {part: work.seconds(_at(part, rates)) / parts[part] for part, work in flops.items()},
            played.rounds[-1]["peak"],
            played.ready["fixed"],
        )


def _at(part: str, rates: dict[str, float]) -> dict[str, float]:
    own = {name: rates.get(f"{part} {name}", rate) for name, rate in rates.items()}
    return {name: own[name] for name in ("trunk", "head") if name in own}


def entries(outcome: Outcome) -> dict[str, dict[str, Any]]:
    """For each precision what ``benchmark.json`` holds of this comparison."""
    found: dict[str, dict[str, Any]] = {}
    for precision, pair in outcome.comparison.pairs.items():
        ours, theirs = (outcome.played[side] for side in pair)
        killed = [f"{p.side.name} {p.killed}" for p in (ours, theirs) if p.killed]
        if killed:
            empty = dict.fromkeys(("ratio", "ratio_min", "ratio_max", "memory_share"))
            found[precision] = {**empty, "killed": "; ".join(killed)}
            continue
        a, b = (Figures.of(outcome, played) for played in (ours, theirs))
        ratios = [y / x for x, y in zip(a.seconds, b.seconds, strict=True)]
        found[precision] = {
            "ratio": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "memory_share": a.peak / b.peak,
            "above_fixed_share": a.above_fixed / b.above_fixed,
            "gaps": outcome.gaps[precision],
            **{
                who: {
                    "side": played.side.name,
                    "seconds": figures.seconds,
                    "parts": figures.parts,
                    "tokens_per_second": figures.tokens_per_second,
                    "utilisation": figures.utilisation,
                    "peak_bytes": figures.peak,
                    "fixed_bytes": figures.fixed,
                    "optimizer": played.rounds[0]["optimizer"],
                    "versions": played.ready["versions"],
                }
                for who, played, figures in (("ours", ours, a), ("theirs", theirs, b))
            },
        }
    return found


def table(outcome: Outcome) -> str:
    """Plain text: a row for each side, then the ratios."""
    ppo = outcome.task.workload == "ppo"
    parts = ("sampling", "scoring", "update") if ppo else ()
    header = ["", "seconds (range)", *parts, "tokens/s", "utilisation"]
    header += [*(("of update",) if ppo else ()), "peak GB", "above fixed"]
    rows = [header, *(_row(outcome, played, parts) for played in outcome.played.values())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    comparison = outcome.comparison
    lines = [f"{TITLES[comparison.workload]} against {comparison.name}"]
    for first, *cells in rows:
        padded = (f"{c:>{w}}" for c, w in zip(cells, widths[1:], strict=True))
        lines.append("  ".join((f"{first:<{widths[0]}}", *padded)).rstrip())
    lines += _ratios(outcome)
    used = {p.side.label: p.rounds[0]["optimizer"] for p in outcome.played.values() if p.rounds}
    optimizers = [f"{label} {optimizer}" for label, optimizer in used.items() if optimizer]
    lines += [f"  optimizers: {', '.join(optimizers)}"] if optimizers else []
    rates = [
        f"{precision} " + ", ".join(f"{rate / 1e9:.0f} ({part})" for part, rate in parts.items())
        for precision, parts in outcome.rates.items()
    ]
    return "\n".join([*lines, f"  matrix products, GFLOP/s: {'; '.join(rates)}"])


def _row(outcome: Outcome, played: Played, parts: Sequence[str]) -> list[str]:
    if played.killed:
        blanks = 5 + len(parts) + bool(parts)
        return [played.side.name, played.killed, *[""] * (blanks - 1)]
    found = Figures.of(outcome, played)
    low, high = min(found.seconds), max(found.seconds)
    return [
        played.side.name,
        f"{found.parts['all']:.2f} ({low:.2f}-{high:.2f})",
        *(f"{found.parts[part]:.2f}" for part in parts),
        f"{found.tokens_per_second:.0f}",
        *(f"{share:.0%}" for share in found.utilisation.values()),
        f"{found.peak / GB:.2f}",
        f"{found.above_fixed / GB:.2f}",
    ]


def _ratios(outcome: Outcome) -> Iterator[str]:
    wanted = outcome.task.expected()
    steps = f" and {wanted.steps} optimizer steps" if wanted.steps else ""
    yield f"  each round: {wanted.tokens} tokens{steps}"
    for precision, entry in entries(outcome).items():
        if "killed" in entry:
            yield f"  {precision}: {entry['killed']}"
            continue
        yield (
            f"  {precision}: {entry['ratio']:.2f} times as fast "
            f"({entry['ratio_min']:.2f}-{entry['ratio_max']:.2f}), "
            f"{entry['memory_share']:.2f} of the memory, "
            f"{entry['above_fixed_share']:.2f} of that above the fixed part"
        )
        if gaps := entry["gaps"]:
            first, last = (max(gap[i] for gap in gaps.values()) for i in (0, 1))
            yield f"    {', '.join(gaps)}: within {first:.0e} at first, {last:.0e} in the end"


def chart(results: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    """Bars of how many times as fast ours is, with the range over the rounds."""
    from matplotlib.figure import Figure

    colours = {"fp32": "#4878a8", "bf16": "#e49444"}
    bars = [
        (f"{TITLES[workload]}, {opponent}", precision, entry)
        for workload, opponents in results.items()
        for opponent, precisions in opponents.items()
        for precision, entry in precisions.items()
        if entry["ratio"] is not None
    ]
    figure = Figure(figsize=(8, 0.9 + 0.32 * len(bars)), layout="constrained")
    axes = figure.subplots()
    for y, (_, precision, entry) in enumerate(bars):
        ratio = entry["ratio"]
        around = [[ratio - entry["ratio_min"]], [entry["ratio_max"] - ratio]]
        axes.barh(y, ratio, xerr=around, color=colours[precision], ecolor="#404040", capsize=3)
        end = (entry["ratio_max"], y)
        axes.annotate(f"{ratio:.2f}", end, (5, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(bars)), [f"{name}, {precision}" for name, precision, _ in bars])
    axes.invert_yaxis()
    axes.axvline(1, color="#404040", linewidth=1)
    axes.set_xlim(0, 1.1 * max((entry["ratio_max"] for *_, entry in bars), default=1))
    axes.set_xlabel("times as fast (median and range of the rounds)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
