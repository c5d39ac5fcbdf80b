"""Two runs over each other: a panel for each metric, and what the numbers are if they differ."""

import io
import math
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compare.beside import Beside, Pair
from compare.logged import Series
from rlhf_min.harness.report.figures import DOTTED, INK, MOST_POINTS, PANELS, printable, style
from rlhf_min.harness.run.atomic import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 440, 150  # of a panel's axes, in points
LEFT, RIGHT, BOTTOM = 60, 24, 44  # around them
LINE = 14  # height of a line of text
HEADING = 4 * LINE  # of the whole picture
LETTERS = 95  # that fit above a panel
OURS, THEIRS = INK["c0"], INK["c1"]


def write(file: Path, beside: Beside) -> None:
    """Draw all that is compared."""
    with style():
        figure = draw(beside)
        drawn = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # letters that the font lacks
            figure.savefig(drawn, format="png")
    write_file(file, drawn.getvalue())


def draw(beside: Beside) -> "Figure":
    """The picture of it, in the style of all figures where that is set."""
    from matplotlib.figure import Figure

    pairs = beside.pairs
    columns = min(PANELS, len(pairs))
    rows = [pairs[i : i + columns] for i in range(0, len(pairs), columns)]
    texts = {id(pair): [*_definitions(pair), *_gap(pair)] for pair in pairs}
    # A row has room above it for its longest text.
    above = [(max(len(texts[id(pair)]) for pair in row) + 2) * LINE for row in rows]
    width = columns * (LEFT + WIDTH + RIGHT)
    height = HEADING + sum(above) + len(rows) * (HEIGHT + BOTTOM)
    figure = Figure(figsize=(width / 72, height / 72))
    _heading(figure, beside, width, height)
    steps = [step for pair in pairs for series in (pair.ours, pair.theirs) for step in series]
    ends = (min(steps), max(steps)) if min(steps) < max(steps) else (steps[0] - 1, steps[0] + 1)
    top = height - HEADING
    for row, room in zip(rows, above, strict=True):
        top -= room + HEIGHT + BOTTOM
        for i, pair in enumerate(row):
            left = (LEFT + i * (LEFT + WIDTH + RIGHT)) / width
            place = left, (top + BOTTOM) / height, WIDTH / width, HEIGHT / height
            axes = figure.add_axes(place)
            _panel(axes, pair, ends, beside.axis, texts[id(pair)])
    return figure


def _heading(figure: "Figure", beside: Beside, width: float, height: float) -> None:
    """Whose line is which."""
    for i, (ink, who, file) in enumerate(
        (
            (OURS, "ours", beside.run),
            (THEIRS, "theirs", beside.theirs),
        )
    ):
        y = 1 - (i + 1.5) * LINE * 1.2 / height
        told = printable(f"{who}: {_end_of(file, int(width / 7))}")
        figure.text(LEFT / width, y, told, color=ink, weight="bold", va="center", parse_math=False)


def _end_of(text: str, letters: int) -> str:
    return text if len(text) <= letters else "…" + text[1 - letters :]


def _definitions(pair: Pair) -> list[str]:
    """Lines that say what the number is, or what each is if they are not the same."""
    theirs, ours = pair.means or ("", "")
    told = [f"theirs: {theirs}", f"ours: {ours}"] if pair.means else [pair.what]
    return [line for text in told for line in textwrap.wrap(text, LETTERS)]


def _panel(
    axes: "Axes", pair: Pair, ends: tuple[int, int], axis: str, lines: Sequence[str]
) -> None:
    """Both lines, theirs broad below and ours thin above it, so that both are seen."""
    axes.patch.set_visible(False)
    margin = 0.01 * (ends[1] - ends[0])
    axes.set_xlim(ends[0] - margin, ends[1] + margin)
    _line(axes, pair.theirs, THEIRS, {"linewidth": 6, "alpha": 0.4}, dot=9)
    _line(axes, pair.ours, OURS, {"linewidth": 1.5}, dot=5)
    axes.set_ylim(_room([*pair.ours.values(), *pair.theirs.values()]))
    axes.locator_params(axis="x", nbins=6, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)
    axes.locator_params(axis="y", nbins=5, steps=[1, 2, 5, 10])
    for one in (axes.xaxis, axes.yaxis):
        one.set_major_formatter(lambda value, _: f"{round(value, 12) + 0:g}")
    _text(axes, LINE * (len(lines) + 0.6), pair.title, color=INK["text"], weight="bold")
    for i, line in enumerate(reversed(lines)):
        _text(axes, LINE * (i + 0.5), line, color=INK["muted"], size=8.5)
    _text(axes, -HEIGHT - 34, axis, x=1, color=INK["muted"], ha="right", size=8.5)


def _gap(pair: Pair) -> list[str]:
    """How far apart the two are, and what is not drawn."""
    gaps, worst = pair.gaps, pair.worst
    told = ["no common step"]
    if worst is not None:
        told = [f"largest gap {abs(gaps[worst]):.1e} at step {worst}; {len(gaps)} common steps"]
        if not gaps[worst]:
            told = [f"the same at all {len(gaps)} common steps"]
    for who, series in (("ours", pair.ours), ("theirs", pair.theirs)):
        bad = sum(not math.isfinite(value) for value in series.values())
        told += [f"{who} is not finite at {bad} of {len(series)} steps (×)"] * bool(bad)
    return told


def _line(axes: "Axes", series: Series, ink: str, look: dict[str, Any], *, dot: float) -> None:
    """A line with gaps where it is not finite; of a long one means, and the band they lie in."""
    points = _points(series)
    xs, lowest, means, highest = zip(*points, strict=True)
    if len(series) > MOST_POINTS:
        axes.fill_between(xs, lowest, highest, color=ink, alpha=0.18, linewidth=0)
    axes.plot(xs, means, color=ink, **look)
    alone = [
        (x, y)
        for i, (x, y) in enumerate(zip(xs, means, strict=True))
        if len(xs) <= DOTTED or all(math.isnan(z) for z in means[max(i - 1, 0) : i + 2 : 2])
    ]
    for x, y in alone:  # what no line would show
        axes.plot(
            [x], [y], "o", color=ink, markersize=dot, markeredgewidth=0, alpha=look.get("alpha")
        )
    bad = [step for step, value in series.items() if not math.isfinite(value)]
    at_the_edge = axes.get_xaxis_transform()
    height = 1.0 if dot < 6 else 0.97  # both may be there
    axes.plot(bad, [height] * len(bad), "x", color=ink, transform=at_the_edge, clip_on=False)


def _room(values: Sequence[float]) -> tuple[float, float]:
    """The range of what is finite, and some; never so small that it would show rounding alone."""
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    size = max(abs(low), abs(high))
    more = max(0.08 * (high - low), 1e-4 * size) if high > low else 0.1 * size or 1.0
    return low - more, high + more


def _points(series: Series) -> list[tuple[float, float, float, float]]:
    """At most `MOST_POINTS`: place, and lowest, mean and highest of the finite values there."""
    steps = sorted(series)
    n = min(len(steps), MOST_POINTS)
    points = []
    for i in range(n):
        part = steps[i * len(steps) // n : (i + 1) * len(steps) // n]
        ys = [series[step] for step in part if math.isfinite(series[step])]
        x = sum(part) / len(part)
        points.append(
            (x, min(ys), sum(ys) / len(ys), max(ys)) if ys else (x, math.nan, math.nan, math.nan)
        )
    return points


def _text(axes: "Axes", above: float, text: str, *, x: float = 0, **look: Any) -> None:
    """A text so many points above the axes; a dollar sign in it is one."""
    place = x, 1 + above / HEIGHT
    axes.text(*place, printable(text), transform=axes.transAxes, parse_math=False, **look)
