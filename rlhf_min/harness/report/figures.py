"""The figures of a run, drawn by matplotlib in one palette: ``curves.png``, SVG for the page."""

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from rlhf_min.estimates import Estimate
from rlhf_min.harness.report.curves import Curve, modules_of, title
from rlhf_min.harness.run.atomic import write_file
from rlhf_min.harness.run.reading import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES = "curves.png"
# Each colour on light paper and on dark. The page has them as variables of these names.
PALETTE = {
    "paper": ("#fdfcf8", "#16181b"),
    "text": ("#23262a", "#e6e3dc"),
    "muted": ("#5d636b", "#a3a8ae"),
    "rule": ("#ddd9cf", "#373b40"),
    "alarm": ("#a8123c", "#ff92a8"),
    "c0": ("#0b62a4", "#74b5f0"),
    "c1": ("#b6520a", "#ed9e5d"),
    "c2": ("#0a7558", "#54c49a"),
    "c3": ("#6c2378", "#9583ed"),
    "c4": ("#444500", "#f0e68c"),
    "c5": ("#1f2b46", "#f7bcd6"),
}
INKS = 6  # of these colours, for lines
INK = {name: light for name, (light, _) in PALETTE.items()}
WIDTH, HEIGHT = 492, 200  # of a figure, in points, which are pixels on the page
LEFT, RIGHT, TOP, BOTTOM = 48, 94, 18, 34  # margins; at the right stand the names of the lines
HEADING = 26  # above each panel of the picture
PANELS = 3  # in a row of it
MOST_POINTS = 80  # of a line; a longer one becomes means with the band that they lie in
EDGE = 8  # points by which the outside of a range is shaded; more would hide what is healthy
DOTTED = 12  # a line of so few points has a dot at each

# A model may draw any byte, and a folder may have any name.
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def printable(text: str) -> str:
    r"""Text in which what neither HTML nor SVG allows is shown as an escape.

    >>> printable("1 < 2\0")
    '1 < 2\\x00'
    """
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


# What is drawn


def curve(drawn: Curve, runs: Sequence[Run], description: str) -> Markup:
    """One curve of a run, or of several over each other."""
    figure = _figure()
    _draw(_axes(figure), drawn, runs)
    return _svg(figure, drawn.key, f"{title(drawn.stage)}: {drawn.name}", description)


def write_curves(file: Path, run: Run) -> None:
    """All curves of a run in one picture, and beside it the same as SVG; or nothing."""
    curves = [c for module in modules_of(run) for c in module.CURVES if c.checked(run)[0]]
    if curves:
        with style():
            figure = _picture(curves, run)
            write_file(file, _bytes(figure, "png"))
            write_file(file.with_suffix(".svg"), _bytes(figure, "svg"))


def _picture(curves: Sequence[Curve], run: Run) -> "Figure":
    """A panel for each curve."""
    columns, height = min(PANELS, len(curves)), HEIGHT + HEADING
    rows = -(-len(curves) // columns)
    figure = _figure(columns * WIDTH, rows * height)
    for i, curve in enumerate(curves):
        axes = _axes(figure, i % columns * WIDTH, (rows - 1 - i // columns) * height)
        _draw(axes, curve, [run])
        heading, top = f"{title(curve.stage)}: {curve.name}", 1 + (TOP + 4) / _INNER[1]
        _text(axes, 0, top, heading, color=INK["text"], weight="bold")
    return figure


def histogram(key: str, title: str, description: str, values: Sequence[float]) -> Markup:
    """How often values are how large, in equal bins, those below 0 in another colour."""
    low, high = _room([*values, 0.0])
    width = (high - low) / 24
    counts: dict[int, int] = {}
    for value in values:  # one edge is 0, so that no bin holds both signs
        counts[math.floor(value / width)] = counts.get(math.floor(value / width), 0) + 1
    figure = _figure()
    axes = _axes(figure)
    for place, count in sorted(counts.items()):
        (bar,) = axes.bar(
            (place + 0.05) * width, count, 0.9 * width, align="edge", alpha=0.75, zorder=2,
            color=_ink(int(place < 0)),
        )  # fmt: skip
        bar.set_gid("bar")
    ends = min(counts) * width, (max(counts) + 1) * width, 0, 1.05 * max(counts.values())
    _scale(axes, ends, "margin", "pairs")
    axes.axvline(0, **_LIMIT)
    return _svg(figure, key, title, description)


def calibration(
    key: str, title: str, description: str, bins: Sequence[tuple[float, Estimate]]
) -> Markup:
    """Predicted shares against observed ones with their intervals, and the line where both agree.

    Args:
        bins: the mean prediction and the observed share of each.
    """
    figure = _figure()
    axes = _axes(figure)
    _scale(axes, (0.5, 1, min(0.5, *(share.lo for _, share in bins)), 1), "predicted", "observed")
    _line(axes, [0.5, 1], [0.5, 1], ink=1, dashed=True)
    for predicted, share in bins:
        _line(axes, [predicted, predicted], [share.lo, share.hi], ink=0)
        _line(axes, [predicted], [share.mean], ink=0, dot=7)
    return _svg(figure, key, title, description)


def intervals(
    key: str, title: str, description: str, estimates: Sequence[tuple[int, float, float, float]]
) -> Markup:
    """A line for each estimate, its interval, with a dot at its mean.

    Args:
        estimates: (ink, mean, low, high) of each.
    """
    from matplotlib.lines import Line2D

    figure = _figure(150, 9 * len(estimates))
    low, high = _room([x for estimate in estimates for x in estimate[1:]])
    for i, (ink, *estimate) in enumerate(estimates):
        mean, left, right = (0.04 + 0.92 * (x - low) / (high - low) for x in estimate)
        y = 1 - (i + 0.5) / len(estimates)
        figure.add_artist(Line2D([left, right], [y, y], color=_ink(ink), gid="line", **_LINE))
        figure.add_artist(Line2D([mean], [y], color=_ink(ink), gid="dot", **_DOT, markersize=6))
    return _svg(figure, key, title, description)


# A curve


@dataclass(frozen=True)
class _Line:
    name: str
    ink: int
    xs: Sequence[float]
    ys: Sequence[float]
    dashed: bool = False


def _lines(curve: Curve, runs: Sequence[Run]) -> Iterator[_Line]:
    """All that was measured of a run; of several, one line each."""
    if len(runs) > 1:
        yield from (_Line(run.name, i, *curve.checked(run)) for i, run in enumerate(runs))
        return
    for i, (metric, label) in enumerate(curve.lines):
        yield _Line(label, i % 2, *runs[0].series(curve.stage, metric), dashed=i > 1)


def _draw(axes: "Axes", curve: Curve, runs: Sequence[Run]) -> None:
    """Lines over the steps, the edges of the range, shaded outside, and where it was left."""
    lines = [line for line in _lines(curve, runs) if line.xs]
    points = [_thinned(line) for line in lines]
    x_low, x_high = _room([x for line in lines for x in line.xs])
    lows, highs = ([point[i] for line in points for point in line] for i in (1, 3))
    y_low, y_high = _room([*lows, *highs], 0.06)
    limits = curve.limits(runs[0]) if len(runs) == 1 else (-math.inf, math.inf)
    reach = (y_high - y_low) / 2  # a limit further off would only flatten the curves
    near = [limit for limit in limits if y_low - reach < limit < y_high + reach]
    y_low, y_high = min([y_low, *near]), max([y_high, *near])
    _scale(axes, (x_low, x_high, y_low, y_high), "step", curve.unit)

    for limit, depth in zip(limits, (-EDGE, EDGE), strict=True):
        if limit in near:
            first = curve.checked(runs[0])[0][0]  # before, there was nothing to check
            since = (first - x_low) / (x_high - x_low)
            end = limit + depth / _INNER[1] * (y_high - y_low)
            end = min(max(end, y_low), y_high)
            box = axes.axhspan(limit, end, since, color=INK["alarm"], alpha=0.15, linewidth=0)
            box.set_gid("outside")
            axes.axhline(limit, since, **_LIMIT)
    for line, thin in zip(lines, points, strict=True):
        xs, lowest, means, highest = zip(*thin, strict=True)
        if len(line.xs) > MOST_POINTS:
            around = [*xs, *reversed(xs)], [*highest, *reversed(lowest)]
            (band,) = axes.fill(*around, color=_ink(line.ink), alpha=0.18, linewidth=0)
            band.set_gid("band")
        _line(axes, xs, means, ink=line.ink, dashed=line.dashed)
        if len(xs) <= DOTTED:
            _line(axes, xs, means, ink=line.ink, dot=5)
    if len(lines) > 1:
        _names(axes, [(line, thin[-1][2]) for line, thin in zip(lines, points, strict=True)])
    for run in runs:
        status = curve.status(run)
        if status is not None and status.left is not None:
            _mark(axes, *status.left)


def _names(axes: "Axes", ends: Sequence[tuple[_Line, float]]) -> None:
    """The name of each line at its end, moved apart where they would cover each other."""
    low, high = axes.get_ylim()
    above = -13.0
    for i, (line, end) in enumerate(sorted(ends, key=lambda x: x[1])):
        room = _INNER[1] - 13 * (len(ends) - 1 - i)
        above = max(min((end - low) / (high - low) * _INNER[1], room), above + 13)
        name = line.name if len(line.name) <= 13 else line.name[:12] + "…"
        ink = _ink(line.ink)
        _text(axes, 1 + 5 / _INNER[0], above / _INNER[1], name, color=ink, va="center")


def _mark(axes: "Axes", step: float, value: float) -> None:
    """A ring around a place, and its step."""
    axes.axvline(step, **_LIMIT)
    (ring,) = axes.plot([step], [value], "o", markersize=10, fillstyle="none", clip_on=False)
    ring.set(gid="mark", color=INK["alarm"], markeredgewidth=1.6)
    low, high = axes.get_xlim()
    at_end = step > low + 0.6 * (high - low)
    share = (step - low) / (high - low) + (-5 if at_end else 5) / _INNER[0]
    style = {"color": INK["alarm"], "ha": "right" if at_end else "left", "weight": "bold"}
    top = value < sum(axes.get_ylim()) / 2  # where the ring is not
    _text(axes, share, 1 if top else 0.02, f"step {step}", va="top" if top else "bottom", **style)


def _thinned(line: _Line) -> list[tuple[float, float, float, float]]:
    """At most `MOST_POINTS` points: place, and lowest, mean and highest value of those there."""
    n = len(line.xs)
    edges = [i * n // min(n, MOST_POINTS) for i in range(min(n, MOST_POINTS) + 1)]
    points = []
    for first, end in pairwise(edges):
        xs, ys = line.xs[first:end], line.ys[first:end]
        points.append((sum(xs) / len(xs), min(ys), sum(ys) / len(ys), max(ys)))
    return points


# With matplotlib

_INNER = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
_STYLE = {
    **{f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")},
    **{"axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True},
    **{"grid.color": INK["rule"], "grid.linewidth": 1, "figure.facecolor": INK["paper"]},
    **{"xtick.bottom": False, "ytick.left": False, "xtick.major.pad": 6, "ytick.major.pad": 9},
    **{"xtick.labelcolor": INK["muted"], "ytick.labelcolor": INK["muted"]},
    **{"svg.fonttype": "none", "savefig.dpi": 96},
}
_LINE: dict[str, Any] = {"linewidth": 1.8}
_DOT: dict[str, Any] = {"linestyle": "", "marker": "o", "markeredgewidth": 0}
_LIMIT: dict[str, Any] = {
    "color": INK["alarm"], "linewidth": 1, "linestyle": (0, (2, 3)), "clip_on": False
}  # fmt: skip


def style() -> AbstractContextManager[None]:
    """The style of all figures, whatever the user's own settings of matplotlib are."""
    # Not before: a run that has no working matplotlib lacks its figures, and no more.
    from matplotlib.style import context

    return context(_STYLE, after_reset=True)


def _figure(width: int = WIDTH, height: int = HEIGHT) -> "Figure":
    """A figure of this size in points."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 72, height / 72))


def _axes(figure: "Figure", left: int = 0, bottom: int = 0) -> "Axes":
    """Axes for one curve, from there on, between the margins."""
    width, height = figure.get_size_inches() * 72
    place = (left + LEFT) / width, (bottom + BOTTOM) / height, _INNER[0] / width, _INNER[1] / height
    axes = figure.add_axes(place)
    axes.patch.set_visible(False)
    return axes


def _scale(
    axes: "Axes", ends: tuple[float, float, float, float], x_label: str, y_label: str
) -> None:
    """What the axes span, with a few round numbers, and what they measure."""
    axes.set(xlim=ends[:2], ylim=ends[2:])
    axes.axhline(ends[2], color=INK["rule"], linewidth=1)
    whole: dict[str, Any] = {"integer": True, "min_n_ticks": 1} if x_label == "step" else {}
    axes.locator_params(axis="x", nbins=5, steps=[1, 2, 5, 10], **whole)
    axes.locator_params(axis="y", nbins=5, steps=[1, 2, 5, 10])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{round(value, 12) + 0:g}")
    _text(axes, 1, -30 / _INNER[1], x_label, color=INK["muted"], ha="right")
    _text(axes, 0, 1 + 7 / _INNER[1], y_label, color=INK["muted"])


def _text(axes: "Axes", x: float, y: float, text: str, **style: Any) -> None:
    """A text at a share of the axes; a dollar sign in it is one."""
    axes.text(x, y, printable(text), transform=axes.transAxes, parse_math=False, **style)


def _line(
    axes: "Axes",
    xs: Sequence[float],
    ys: Sequence[float],
    *,
    ink: int,
    dashed: bool = False,
    dot: float = 0,
) -> None:
    """A line through points, or a dot of this size at each."""
    style = _LINE | ({"linestyle": (0, (3, 2))} if dashed else {})
    if dot:
        style = _DOT | {"markersize": dot}
    (line,) = axes.plot(xs, ys, color=_ink(ink), clip_on=False, zorder=3, **style)
    line.set_gid("dot" if dot else "line")


def _ink(i: int) -> str:
    return INK[f"c{i % INKS}"]


def _room(values: Sequence[float], margin: float = 0.0) -> tuple[float, float]:
    """The range of the values, never empty, with a share of it added at both ends."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) / 2 or 1), high + (abs(high) / 2 or 1)
    return low - margin * (high - low), high + margin * (high - low)


def _bytes(figure: "Figure", form: str, salt: str = "curves") -> bytes:
    """The figure as a file: without the date and with texts as texts, so always the same."""
    import matplotlib

    file = io.BytesIO()
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": salt}):
        warnings.simplefilter("ignore")  # letters that its own font lacks; the page's may have them
        figure.savefig(file, format=form, metadata={"Date": None} if form == "svg" else None)
    return file.getvalue()


# As part of a page

_VARIABLES = {light: f"var(--{name})" for name, light in INK.items()}
# Within a tag: names that each figure has, other than our own, colours, letters, and defaults.
_CHANGES = (
    (r' id="(line|band|dot|bar|mark|outside)"', r' class="\1"'),
    (r' id="[\w.]+_\d+"| clip-path="[^"]*"| transform="rotate\(-0[^"]*"', ""),
    (r'font[^;"]*;? ?|; stroke-linecap: square|stroke-dashoffset: 0; ', ""),
    (r"#[0-9a-f]{6}", lambda ink: _VARIABLES.get(ink[0], ink[0])),
    (r"-?\d+\.\d{3,}", lambda number: f"{round(float(number[0]), 1):g}"),
    ("xlink:href", "href"),
    (r"\s+", " "),
)


def _svg(figure: "Figure", key: str, title: str, description: str) -> Markup:
    """A figure in the page's colours and letters, to a tenth of a pixel, with words for who cannot
    see it.

    The key is a name that no other figure of the page has.
    """
    figure.patch.set_visible(False)
    text = _bytes(figure, "svg", key).decode()
    drawn = text[text.index('<g id="figure_1">') : text.rindex("</svg>")]
    drawn = re.sub("<[^>]+>", _adapted, re.sub(r"(?s)<defs>\s*<clipPath.*?</defs>", "", drawn))
    drawn = re.sub(
        r"<g>(<(?:path|text)[^<]*(?:</text>)?)</g>", r"\1", re.sub(r">\s+<", "><", drawn)
    )
    width, height = figure.get_size_inches() * 72
    head = Markup(
        '<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}" '
        'role="img" aria-labelledby="{key}-title {key}-desc">'
        '<title id="{key}-title">{title}</title><desc id="{key}-desc">{description}</desc>'
    ).format(width=width, height=height, key=key, title=title, description=description)
    return head + Markup(drawn) + Markup("</svg>")


def _adapted(tag: re.Match[str]) -> str:
    text = tag[0]
    for pattern, new in _CHANGES:
        text = re.sub(pattern, new, text)
    return text
