"""The figures of a gauntlet's page: the headline by setting, by design and by bytes of state, each with its spread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from postformer.report import numbers
from postformer.report.figures import (
    HEIGHT,
    LARGE,
    TEXT,
    WIDTH,
    byte_ticks,
    canvas,
    fit,
    fraction,
    frame,
    round_steps,
    set_ticks,
)
from postformer.report.labels import end_labels, point_labels
from postformer.report.style import INK, MUTED, PAPER, RULE, SHADE, Look

BANDS = 4
"""Up to so many lines, the spread is drawn as a band; more bands would hide each other, so there it is bars."""


@dataclass(frozen=True)
class Point:
    """A mean over seeds with the smallest and the largest of them, at one place of the horizontal axis."""

    x: float
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Line:
    """One design: its name, its look, and its points from left to right; never empty."""

    name: str
    look: Look
    points: Sequence[Point]


@dataclass(frozen=True)
class Reference:
    """What a model must beat: a name, its dashes, and its value at every setting."""

    name: str
    dashes: tuple[float, float]
    values: Sequence[float | None]


def by_setting(
    lines: Sequence[Line],
    places: Sequence[float],
    names: Sequence[str],
    inside: int,
    xlabel: str,
    ylabel: str,
    references: Sequence[Reference] = (),
    accuracy: bool = True,
) -> Any:
    """A score against the setting, what training covers shaded up to a border.

    places, names: where each setting stands on the axis, ascending, and what it is called. inside: how many of them
    training covers. accuracy: whether the vertical axis runs from 0 to 1; otherwise it is the data's own.
    """
    shown = [r for r in references if any(v is not None for v in r.values)]
    figure, axes = canvas([line.name for line in lines] + [r.name for r in shown])
    logarithmic = places[0] > 0 and list(places) != list(range(len(places)))
    if logarithmic:
        axes.set_xscale("log", base=2)
    low, high, border = _limits(places, inside, logarithmic)
    axes.set_xlim(low, high)
    if accuracy:
        axes.set_ylim(0, 1.03)
        set_ticks(axes.yaxis, [0, 0.25, 0.5, 0.75, 1], ["0", ".25", ".50", ".75", "1"])
    else:
        _own_scale(axes, [v for line in lines for p in line.points for v in (p.low, p.high)]
                   + [v for r in shown for v in r.values if v is not None])  # fmt: skip
    set_ticks(axes.xaxis, places, names)
    frame(axes, xlabel, ylabel)
    _border(axes, low, border, inside, len(places))
    ends = [_line(axes, line, i, len(lines)) for i, line in enumerate(lines)]
    for r in shown:
        known = [(x, v) for x, v in zip(places, r.values) if v is not None]
        if len({v for _, v in known}) == 1:
            known = [(low, known[0][1]), (high, known[0][1])]
        axes.plot(*zip(*known), color=MUTED, linewidth=1.1, dashes=r.dashes, zorder=2)
        ends.append((r.name, *known[-1], MUTED))
    end_labels(axes, ends, TEXT, column=12)
    return figure


def by_design(
    rows: Sequence[Line], label: str, write: Any, references: Sequence[Reference] = (), accuracy: bool = False
) -> Any:
    """One row per design: mean as a marker, smallest to largest as a bar; for what has a single setting.

    write: how a value is written at the right of its row.
    """
    height = 82.0 + 20.0 * max(len(rows), 2)
    names = [fit(r.name) for r in rows]
    left = 18.0 + _widest(names)
    right = 20.0 + _widest([write(r.points[0].mean) for r in rows])
    figure, axes = canvas([], right, (LARGE[0] if len(rows) > 9 else WIDTH, height), left)
    values = [v for r in rows for v in (r.points[0].low, r.points[0].high)]
    shown = [(r, r.values[0]) for r in references if r.values and r.values[0] is not None]
    low, high = (0.0, 1.0) if accuracy else _range(values + [v for _, v in shown], from_zero=not references)
    axes.set_xlim(low, high)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    ticks = round_steps(low, high, 5)
    set_ticks(axes.xaxis, ticks, [fraction(t) if accuracy else numbers.short(t) for t in ticks])
    frame(axes, label, "")
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=RULE, linewidth=0.8)
    set_ticks(axes.yaxis, range(len(rows)), names)
    for text, row in zip(axes.get_yticklabels(), rows):
        text.set_color(row.look.color)
    for place, row in enumerate(rows):
        p = row.points[0]
        axes.plot([low, p.mean], [place, place], color=row.look.color, linewidth=0.9, alpha=0.45, zorder=2)
        axes.plot([p.low, p.high], [place, place], color=row.look.color, linewidth=4, alpha=0.4, zorder=2,
                  solid_capstyle="butt", clip_on=False)  # fmt: skip
        axes.plot(p.mean, place, marker=row.look.marker, markersize=7, color=row.look.color, markeredgecolor=PAPER,
                  markeredgewidth=0.8, linestyle="none", clip_on=False, zorder=4)  # fmt: skip
        axes.annotate(write(p.mean), (1, place), xycoords=("axes fraction", "data"), xytext=(10, 0),
                      textcoords="offset points", color=INK, fontsize=TEXT, va="center_baseline")  # fmt: skip
    taken: list[float] = []
    for r, v in shown:
        axes.axvline(v, color=MUTED, linewidth=1.1, dashes=r.dashes, zorder=1)
        place = axes.transData.transform((v, 0))[0]
        above = 12.0 * sum(abs(place - other) < 66 for other in taken)
        taken.append(place)
        axes.annotate(r.name, (v, 1), xycoords=("data", "axes fraction"), xytext=(0, 3 + above), color=MUTED,
                      textcoords="offset points", fontsize=TEXT - 1.5, ha="center", va="bottom")  # fmt: skip
    return figure


def pareto(lines: Sequence[Line], ylabel: str = "Accuracy") -> Any:
    """Accuracy against bytes of state, one labelled point per design (`Point.x` is bytes), with the front drawn.

    On the front, filled: no design reaches as much with as few bytes. The others are open.
    """
    figure, axes = canvas([], 14, LARGE if len(lines) > 5 else (WIDTH, HEIGHT))
    points = [line.points[0] for line in lines]
    low, high = min(p.x for p in points) / 2.2, max(p.x for p in points) * 3.2
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    worst = min(p.low for p in points)
    floor = max(0.0, math.floor((worst - 0.12) * 10) / 10)
    axes.set_ylim(floor, 1 + 0.13 * (1 - floor))  # room for a name above what is perfect
    byte_ticks(axes.xaxis, low, high)
    step = 0.1 if 1 - floor <= 0.55 else 0.25
    grid = [t for t in (round(1 - i * step, 3) for i in range(11)) if t >= floor - 1e-9]
    set_ticks(axes.yaxis, grid, [fraction(t) for t in grid])
    frame(axes, "Bytes of state", ylabel)
    best = front([(p.x, p.mean) for p in points])
    corners = [(points[i].x, points[i].mean) for i in best]
    axes.step(*zip(*corners, (high, corners[-1][1])), where="post", color=MUTED, linewidth=1.3, zorder=2)
    labels: list[tuple[str, float, float, str]] = []
    obstacles = _along(axes, [
        q for a, b in zip(corners, [*corners[1:], (high, corners[-1][1])]) for q in (a, (b[0], a[1]))
    ])  # fmt: skip
    for i, (line, p) in enumerate(zip(lines, points)):
        color, on = line.look.color, i in best
        axes.plot([p.x, p.x], [p.low, p.high], color=color, linewidth=1.4, alpha=0.7, zorder=3)
        axes.plot(p.x, p.mean, marker=line.look.marker, markersize=7.5, linestyle="none", zorder=4, clip_on=False,
                  color=color if on else PAPER, markeredgecolor=color, markeredgewidth=1.5)  # fmt: skip
        labels.append((fit(line.name), p.x, p.mean, color))
        obstacles += _along(axes, [(p.x, p.low), (p.x, p.high)])
    point_labels(axes, labels, obstacles, TEXT if len(lines) <= 9 else TEXT - 1.5)
    return figure


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Of points (cost, score), the indices of those that no other equals or beats in both, by ascending cost."""
    out: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not out or points[i][1] > points[out[-1]][1]:
            out.append(i)
    return out


def _along(axes: Any, corners: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points about every eight points of the canvas along a line, so that labels can keep off it."""
    out = []
    for start, stop in zip(axes.transData.transform(corners), axes.transData.transform(corners)[1:]):
        steps = max(1, round(math.dist(start, stop) / 8))
        out += [tuple(start + (stop - start) * i / steps) for i in range(steps + 1)]
    return [tuple(p) for p in axes.transData.inverted().transform(out)]


def _line(axes: Any, line: Line, index: int, number: int) -> tuple[str, float, float, str]:
    from matplotlib.transforms import ScaledTranslation

    color, look = line.look.color, line.look
    x, y = [p.x for p in line.points], [p.mean for p in line.points]
    style: dict[str, Any] = {"dashes": look.dash} if look.dash else {}
    shift = 0.0
    if number <= BANDS:
        axes.fill_between(x, [p.low for p in line.points], [p.high for p in line.points], color=color, alpha=0.16,
                          linewidth=0, zorder=2)  # fmt: skip
    else:
        # Side by side, so that equal values and their bars do not hide each other.
        shift = (index - (number - 1) / 2) * min(2.4, 15 / number)
    move = axes.transData + ScaledTranslation(shift / 72, 0, axes.figure.dpi_scale_trans)
    if number > BANDS or len(x) == 1:
        for p in line.points:
            axes.plot([p.x, p.x], [p.low, p.high], color=color, linewidth=1.3, alpha=0.55, transform=move, zorder=2,
                      clip_on=False)  # fmt: skip
    axes.plot(x, y, color=color, linewidth=1.7, clip_on=False, zorder=3, transform=move, **style)
    axes.plot(x, y, color=color, linestyle="none", marker=look.marker, markersize=6.2, markeredgecolor=PAPER,
              markeredgewidth=0.7, clip_on=False, zorder=4, transform=move)  # fmt: skip
    return fit(line.name), x[-1], y[-1], color


def _limits(places: Sequence[float], inside: int, logarithmic: bool) -> tuple[float, float, float | None]:
    if logarithmic:
        low, high = places[0] / 1.18, places[-1] * 1.12
        middle = math.sqrt(places[inside - 1] * places[inside]) if 0 < inside < len(places) else None
    else:
        low, high = places[0] - 0.35, places[-1] + 0.25
        middle = (places[inside - 1] + places[inside]) / 2 if 0 < inside < len(places) else None
    return low, high, middle


def _border(axes: Any, low: float, border: float | None, inside: int, number: int) -> None:
    if inside == 0:
        return
    edge = border if border is not None else axes.get_xlim()[1]
    axes.axvspan(low, edge, color=SHADE, linewidth=0, zorder=0)
    if border is None:
        return
    axes.axvline(border, color=MUTED, linewidth=0.8, zorder=1)
    room = axes.get_window_extent().x1 - axes.transData.transform((border, 0))[0]
    words = [("◂ inside", -3, "right"), ("outside ▸", 3, "left")]
    # Right of the axes begin the names.
    for word, shift, ha in words if room > _widest(["outside ▸"]) else words[:1]:
        axes.annotate(word, (border, 1), xycoords=("data", "axes fraction"), xytext=(shift, 1.5), color=MUTED,
                      textcoords="offset points", fontsize=TEXT - 1.5, ha=ha, va="bottom")  # fmt: skip


def _own_scale(axes: Any, values: Sequence[float]) -> None:
    low, high = _range(values)
    axes.set_ylim(low, high)
    ticks = round_steps(low, high, 5)
    set_ticks(axes.yaxis, ticks, [f"{t:.3g}" for t in ticks])


def _range(values: Sequence[float], from_zero: bool = False) -> tuple[float, float]:
    low, high = min(values), max(values)
    span = max(high - low, abs(high) * 0.02, 1e-3)
    return 0.0 if from_zero else low - 0.08 * span, high + 0.08 * span


def _widest(texts: Sequence[str]) -> float:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties

    renderer = FigureCanvasAgg(Figure(dpi=72)).get_renderer()
    font = FontProperties(size=TEXT)
    return max((renderer.get_text_width_height_descent(t, font, False)[0] for t in texts), default=0.0)
