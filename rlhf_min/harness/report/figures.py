"""Figures as SVG that a page holds within itself, drawn in the page's own colours."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from rlhf_min.estimates import Estimate
from rlhf_min.harness.report.markup import Html, join, tag

WIDTH, HEIGHT = 492, 200
LEFT, RIGHT, TOP, BOTTOM = 48, 94, 18, 34  # margins; at the right stand the names of the lines
MOST_POINTS = 80  # of a line; a longer one becomes means with the band that they lie in
INKS = 6  # colours that the page has for lines

STYLE = """
svg { display: block; max-width: 100%; height: auto; font: 12px var(--sans); }
svg text { fill: var(--muted); }
.axis { stroke: var(--rule); fill: none; }
.c0 { --ink: var(--c0); } .c1 { --ink: var(--c1); } .c2 { --ink: var(--c2); }
.c3 { --ink: var(--c3); } .c4 { --ink: var(--c4); } .c5 { --ink: var(--c5); }
.line { stroke: var(--ink); fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.dashed { stroke-dasharray: 5 3; }
.band, .bar { fill: var(--ink); } .band { opacity: .18; } .bar { opacity: .75; }
.dot { fill: var(--ink); }
svg text.name { fill: var(--ink); }
.outside { fill: var(--alarm); opacity: .1; }
.limit, .mark { stroke: var(--alarm); fill: none; }
.limit { stroke-dasharray: 2 3; }
.mark { stroke-width: 1.6; }
svg text.marked { fill: var(--alarm); font-weight: 600; }
"""


@dataclass(frozen=True)
class Line:
    """A curve: its name, its colour's number, and its points."""

    name: str
    ink: int
    xs: Sequence[float]
    ys: Sequence[float]
    dashed: bool = False


@dataclass(frozen=True)
class Mark:
    """A place to look at, and what is written there."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Frame:
    """Where numbers lie in a figure, between the margins."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        """From the left, in pixels."""
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """From the top, in pixels."""
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        """Straight lines from point to point."""
        return "M" + "L".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)

    def axes(self, x_label: str, y_label: str = "", *, x_step: float = 0) -> Html:
        """Both axes with their round numbers, on the lower one at least `x_step` apart."""
        bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
        parts = [tag("path", d=f"M{LEFT},{bottom}H{right}", class_="axis")]
        for value in ticks(self.y_low, self.y_high):
            at = f"{self.y(value):.1f}"
            parts.append(tag("path", d=f"M{LEFT},{at}H{right}", class_="axis"))
            style = {"text_anchor": "end", "dominant_baseline": "middle"}
            parts.append(tag("text", f"{value:g}", x=LEFT - 6, y=at, **style))
        for value in ticks(self.x_low, self.x_high, x_step):
            at = f"{self.x(value):.1f}"
            parts.append(tag("text", f"{value:g}", x=at, y=bottom + 15, text_anchor="middle"))
        style = {"text_anchor": "end"}
        parts.append(tag("text", x_label, x=right, y=HEIGHT - 4, **style))
        parts.append(tag("text", y_label, x=LEFT, y=11))
        return join(*parts)


def line_figure(
    key: str,
    title: str,
    description: str,
    lines: Sequence[Line],
    *,
    y_label: str = "",
    limits: tuple[float, float] | None = None,
    marks: Sequence[Mark] = (),
) -> Html:
    """Curves over the steps, with what lies outside the limits shaded, and marks.

    Args:
        key: a name for the figure that no other one of the page has.
        title, description: for those who do not see it.
        lines: at least one, each with at least one point.
        y_label: what is measured.
        limits: of the healthy range; shown where the curves come near them.
        marks: places to point out.
    """
    thin = [_thinned(line) for line in lines]
    x_low, x_high = _room([x for line in lines for x in line.xs], 0.0)
    lows, highs = ([point[i] for points in thin for point in points] for i in (1, 3))
    y_low, y_high = _room([*lows, *highs], 0.06)
    reach = (y_high - y_low) / 2  # a limit further off would only flatten the curves
    near = [limit for limit in limits or () if y_low - reach < limit < y_high + reach]
    frame = Frame(x_low, x_high, *_room([y_low, y_high, *near], 0.0))

    drawn = [_outside(frame, limits), frame.axes("step", y_label, x_step=1)]
    for line, points in zip(lines, thin, strict=True):
        drawn.append(_curve(frame, line, points))
    drawn.append(_names(frame, lines, thin))
    for mark in marks:
        x, y = frame.x(mark.x), frame.y(mark.y)
        at_end = x > LEFT + 0.6 * (WIDTH - LEFT - RIGHT)
        drawn += [
            tag("path", d=f"M{x:.1f},{TOP}V{HEIGHT - BOTTOM}", class_="limit"),
            tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=5, class_="mark"),
            tag(
                "text",
                mark.text,
                x=f"{x + (-5 if at_end else 5):.1f}",
                y=TOP + 8,
                text_anchor="end" if at_end else "start",
                class_="marked",
            ),
        ]
    return _svg(key, title, description, drawn)


def histogram(key: str, title: str, description: str, values: Sequence[float]) -> Html:
    """How often values are how large, in equal bins, those below 0 in another colour."""
    low, high = _room([*values, 0.0], 0.0)
    # One edge is 0, so that no bin holds both signs.
    width = (high - low) / 24
    counts: dict[int, int] = {}
    for value in values:
        place = math.floor(value / width)
        counts[place] = counts.get(place, 0) + 1
    frame = Frame(min(counts) * width, (max(counts) + 1) * width, 0, 1.05 * max(counts.values()))
    bars = [
        tag(
            "rect",
            x=f"{frame.x(place * width) + 0.5:.1f}",
            y=f"{frame.y(count):.1f}",
            width=f"{frame.x(width) - frame.x(0) - 1:.1f}",
            height=f"{frame.y(0) - frame.y(count):.1f}",
            class_=f"bar c{int(place < 0)}",
        )
        for place, count in sorted(counts.items())
    ]
    zero = tag("path", d=f"M{frame.x(0):.1f},{TOP}V{HEIGHT - BOTTOM}", class_="limit")
    return _svg(key, title, description, [frame.axes("margin", "pairs"), *bars, zero])


def calibration_figure(
    key: str, title: str, description: str, bins: Sequence[tuple[float, Estimate]]
) -> Html:
    """Predicted shares against observed ones with their intervals, and the line where both agree.

    Args:
        bins: the mean prediction and the observed share of each.
    """
    frame = Frame(0.5, 1, min(0.5, *(share.lo for _, share in bins)), 1)
    drawn = [
        frame.axes("predicted", "observed"),
        tag("path", d=frame.path([(0.5, 0.5), (1, 1)]), class_="line dashed c1"),
    ]
    for predicted, share in bins:
        whisker = frame.path([(predicted, share.lo), (predicted, share.hi)])
        drawn.append(tag("path", d=whisker, class_="line c0"))
        x, y = frame.x(predicted), frame.y(share.mean)
        drawn.append(tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=3.5, class_="dot c0"))
    return _svg(key, title, description, drawn)


def interval_figure(
    key: str, title: str, description: str, estimates: Sequence[tuple[int, float, float, float]]
) -> Html:
    """A line for each estimate, its interval, with a dot at its mean.

    Args:
        estimates: (ink, mean, low, high) of each.
    """
    width, pitch = 150, 9
    low, high = _room([x for estimate in estimates for x in estimate[1:]], 0.0)
    drawn = []
    for i, (ink, *estimate) in enumerate(estimates):
        mean, left, right = (6 + (x - low) / (high - low) * (width - 12) for x in estimate)
        y = (i + 0.5) * pitch
        drawn.append(tag("path", d=f"M{left:.1f},{y}H{right:.1f}", class_=f"line c{ink % INKS}"))
        drawn.append(tag("circle", cx=f"{mean:.1f}", cy=y, r=3, class_=f"dot c{ink % INKS}"))
    return _svg(key, title, description, drawn, width=width, height=pitch * len(estimates))


def ticks(low: float, high: float, least: float = 0) -> list[float]:
    """At most six round numbers within a range, at least so far apart.

    >>> ticks(0, 1.1)
    [0.0, 0.5, 1.0]
    """
    raw = max((high - low) / 5, least)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _svg(
    key: str,
    title: str,
    description: str,
    drawn: Sequence[Html],
    *,
    width: int = WIDTH,
    height: int = HEIGHT,
) -> Html:
    return tag(
        "svg",
        tag("title", title, id=f"{key}-title"),
        tag("desc", description, id=f"{key}-desc"),
        *drawn,
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
        role="img",
        aria_labelledby=f"{key}-title {key}-desc",
    )


def _room(values: Sequence[float], margin: float) -> tuple[float, float]:
    """The range of the values, never empty, with a share of it added at both ends."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) / 2 or 1), high + (abs(high) / 2 or 1)
    return low - margin * (high - low), high + margin * (high - low)


def _thinned(line: Line) -> list[tuple[float, float, float, float]]:
    """At most `MOST_POINTS` points: place, and lowest, mean and highest value of those there."""
    n = len(line.xs)
    edges = [i * n // min(n, MOST_POINTS) for i in range(min(n, MOST_POINTS) + 1)]
    points = []
    for first, end in pairwise(edges):
        xs, ys = line.xs[first:end], line.ys[first:end]
        points.append((sum(xs) / len(xs), min(ys), sum(ys) / len(ys), max(ys)))
    return points


def _curve(frame: Frame, line: Line, points: Sequence[tuple[float, float, float, float]]) -> Html:
    ink = f"c{line.ink % INKS}"
    drawn = []
    if len(line.xs) > MOST_POINTS:
        around = [(x, high) for x, _, _, high in points]
        around += [(x, low) for x, low, _, _ in reversed(points)]
        drawn.append(tag("path", d=frame.path(around) + "Z", class_=f"band {ink}"))
    means = [(x, mean) for x, _, mean, _ in points]
    dashed = " dashed" if line.dashed else ""
    drawn.append(tag("path", d=frame.path(means), class_=f"line {ink}{dashed}"))
    if len(line.xs) <= 12:
        for x, y in means:
            at = {"cx": f"{frame.x(x):.1f}", "cy": f"{frame.y(y):.1f}"}
            drawn.append(tag("circle", **at, r=2.6, class_=f"dot {ink}"))
    return join(*drawn)


def _names(
    frame: Frame, lines: Sequence[Line], thin: Sequence[list[tuple[float, float, float, float]]]
) -> Html:
    """The name of each line at its end, moved apart where they would cover each other."""
    if len(lines) == 1:
        return Html()
    wanted = sorted((frame.y(points[-1][2]), i) for i, points in enumerate(thin))
    drawn, lowest = [], -math.inf
    spare = HEIGHT - BOTTOM - 13 * (len(wanted) - 1)
    for place, (y, i) in enumerate(wanted):
        y = max(min(y, spare + 13 * place), lowest + 13)
        lowest = y
        drawn.append(
            tag(
                "text",
                lines[i].name if len(lines[i].name) <= 13 else lines[i].name[:12] + "…",
                x=WIDTH - RIGHT + 5,
                y=f"{y:.1f}",
                dominant_baseline="middle",
                class_=f"name c{lines[i].ink % INKS}",
            )
        )
    return join(*drawn)


def _outside(frame: Frame, limits: tuple[float, float] | None) -> Html:
    """What lies outside the limits, as far as the figure shows it."""
    low, high = limits or (-math.inf, math.inf)
    drawn = []
    for edge, limit in ((frame.y_low, low), (frame.y_high, high)):
        if frame.y_low <= limit <= frame.y_high:
            top, bottom = sorted((frame.y(edge), frame.y(limit)))
            box = {"x": LEFT, "y": f"{top:.1f}", "width": WIDTH - LEFT - RIGHT}
            drawn.append(tag("rect", **box, height=f"{bottom - top:.1f}", class_="outside"))
            line = f"M{LEFT},{frame.y(limit):.1f}H{WIDTH - RIGHT}"
            drawn.append(tag("path", d=line, class_="limit"))
    return join(*drawn)
