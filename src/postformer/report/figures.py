"""The figures of the page: matplotlib draws them, `svg` turns them into inline SVG that follows the page's colours.

A canvas is 400 points wide, so that on a phone, where it shrinks to about 330 pixels, the 12.5-point text still
measures 10. Every function takes plain numbers and returns a matplotlib Figure.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from postformer.report import numbers
from postformer.report.labels import end_labels, point_labels
from postformer.report.style import INK, MUTED, PAPER, RULE, SHADE, Look, stand_ins

WIDTH, HEIGHT, TEXT = 400.0, 292.0, 12.5
LARGE = (460.0, 360.0)
"""Width and height of a canvas with more than `FEW` series: room for as many names at the lines."""
FEW, MOST_LABELS = 9, 17
"""With more series than `MOST_LABELS`, names stand in the page's legend instead of at the lines."""


@dataclass(frozen=True)
class Series:
    """One line: its name, its look, and its points; `marks` are further points (x, y) drawn as open markers."""

    name: str
    look: Look
    x: Sequence[float]
    y: Sequence[float]
    marks: Sequence[tuple[float, float]] = field(default_factory=tuple)


def accuracy_curve(
    series: Sequence[Series], label: str, trained: float, floor: float | None, floor_name: str = "chance"
) -> Any:
    """Accuracy against difficulty on a base-2 axis, the range covered by training shaded."""
    figure, axes = canvas([s.name for s in series])
    ticks = sorted({x for s in series for x in s.x} | {trained})
    low, high = ticks[0] / 1.12, ticks[-1] * 1.06
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    axes.set_ylim(0, 1.03)
    axes.axvspan(low, trained * 1.03, color=SHADE, linewidth=0, zorder=0)
    near_zero = floor is not None and floor < 0.11  # no room for a word between the line and the axis
    axes.text(
        low * 1.05,
        (floor or 0) + 0.02 if near_zero else 0.02,
        "trained",
        color=MUTED,
        fontsize=TEXT,
        ha="left",
        va="bottom",
    )
    if floor is not None:
        axes.axhline(floor, color=MUTED, linewidth=0.9, dashes=(2, 2), zorder=1)
        axes.text(
            high / 1.02,
            floor - 0.02,
            "" if near_zero else floor_name,
            color=MUTED,
            fontsize=TEXT,
            ha="right",
            va="top",
        )
    set_ticks(axes.xaxis, ticks, [f"{t:g}" for t in ticks])
    set_ticks(axes.yaxis, [0, 0.25, 0.5, 0.75, 1], ["0", ".25", ".50", ".75", "1"])
    _lines(axes, series, markers=True)
    return finish(figure, axes, label, "Accuracy", series)


def state_scatter(
    points: Sequence[tuple[str, Look, tuple[float, float], tuple[float, float]]], first: str, second: str
) -> Any:
    """Accuracy against bytes of state: for each series (name, look, (bytes, accuracy) at two difficulties).

    first, second: what the two difficulties are called; the first is drawn as an open marker, the second filled.
    """
    figure, axes = canvas([], right=14)
    sizes = [p[0] for _, _, a, b in points for p in (a, b)]
    low, high = min(sizes) / 2.0, max(sizes) * 2.6
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    worst = min(p[1] for _, _, a, b in points for p in (a, b))
    floor = max(0.0, math.floor((worst - 0.12) * 10) / 10)
    axes.set_ylim(floor, 1.05)
    byte_ticks(axes.xaxis, low, high)
    step = 0.1 if 1 - floor <= 0.55 else 0.25
    grid = [t for t in (round(1 - i * step, 3) for i in range(11)) if t >= floor - 1e-9]
    set_ticks(axes.yaxis, grid, [fraction(t) for t in grid])
    for _, look, a, b in points:
        axes.plot([a[0], b[0]], [a[1], b[1]], color=look.color, linewidth=1.2, alpha=0.6, zorder=2)
        axes.plot(
            *a,
            marker=look.marker,
            markersize=7.5,
            color=PAPER,
            markeredgecolor=look.color,
            markeredgewidth=1.6,
            linestyle="none",
            zorder=3,
        )
        axes.plot(*b, marker=look.marker, markersize=7.5, color=look.color, linestyle="none", zorder=4)
    frame(axes, "Bytes of state", "Accuracy")
    axes.text(
        1,
        1.06,
        f"○ {first}   ● {second}",
        transform=axes.transAxes,
        color=MUTED,
        fontsize=TEXT,
        ha="right",
        va="bottom",
    )
    names = [(name, b[0], b[1], look.color) for name, look, _, b in points]
    between = [
        (2 ** (math.log2(a[0]) * (1 - w) + math.log2(b[0]) * w), a[1] * (1 - w) + b[1] * w)
        for _, _, a, b in points
        for w in (0.0, 0.25, 0.5, 0.75)
    ]
    point_labels(axes, names, between, TEXT)
    return figure


def loss_curves(series: Sequence[Series], label: str = "Bits per byte") -> Any:
    """Loss against training tokens; `marks` are validation readings. The first steep fall may leave the top."""
    figure, axes = canvas([s.name for s in series])
    smooth = [_smooth(s) for s in series]
    last = max(max(s.x) for s in smooth)
    values = [v for s in smooth for v in s.y] + [m[1] for s in smooth for m in s.marks]
    # Training spends its first tenth falling from the uniform guess; drawn whole, the rest would be one flat band.
    early = [y for s in smooth for x, y in zip(s.x, s.y) if x >= 0.1 * last]
    low, high = min(values), max(early or values)
    span = max(high - low, 1e-3)
    axes.set_xlim(0, last)
    axes.set_ylim(low - 0.06 * span, high + 0.04 * span)
    ticks = round_steps(0, last, 4)
    set_ticks(axes.xaxis, ticks, [numbers.short(t) for t in ticks])
    bottom, top = axes.get_ylim()
    grid = round_steps(bottom, top, 5)
    set_ticks(axes.yaxis, grid, [f"{t:.3g}" for t in grid])
    _lines(axes, smooth, markers=False, clip=True)
    for s in smooth:
        if s.marks:
            axes.plot(
                *zip(*s.marks),
                linestyle="none",
                marker=s.look.marker,
                markersize=5.5,
                color=PAPER,
                markeredgecolor=s.look.color,
                markeredgewidth=1.3,
                zorder=4,
            )
    return finish(figure, axes, "Training tokens", label, smooth)


def growth(series: Sequence[Series], unit: str, label: str, xlabel: str = "Tokens of context") -> Any:
    """A cost against the context or the length, both axes logarithmic; `marks` are measured beside declared values.

    unit: "bytes", "seconds" or "rate", which sets the ticks of the vertical axis.
    """
    figure, axes = canvas([s.name for s in series])
    xs = [x for s in series for x in s.x]
    ys = [y for s in series for y in s.y] + [m[1] for s in series for m in s.marks]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlim(min(xs) / 1.15, max(xs) * 1.08)
    # At least a factor of eight, so that a flat line of noisy timings looks flat.
    middle, reach = math.sqrt(min(ys) * max(ys)), max(math.sqrt(max(ys) / min(ys)) * 1.5, 2.83)
    axes.set_ylim(middle / reach, middle * reach)
    ticks = sorted(set(xs))
    while len(ticks) > 5:
        ticks = ticks[::2] if len(ticks) % 2 else [ticks[0], *ticks[2::2]]
    set_ticks(axes.xaxis, ticks, [_tokens(t) for t in ticks])
    if unit == "bytes":
        byte_ticks(axes.yaxis, *axes.get_ylim())
    else:
        low, high = axes.get_ylim()
        round_ticks(axes.yaxis, low, high, numbers.duration if unit == "seconds" else numbers.short)
    _lines(axes, series, markers=not any(s.marks for s in series))
    for s in series:
        if s.marks:
            axes.plot(
                *zip(*s.marks),
                linestyle="none",
                marker=s.look.marker,
                markersize=6.5,
                color=PAPER,
                markeredgecolor=s.look.color,
                markeredgewidth=1.5,
                zorder=4,
            )
    return finish(figure, axes, xlabel, label, series)


def svg(figure: Any, name: str, title: str, description: str) -> str:
    """The figure as inline SVG: no font, no colour and no address of its own, and ids that are unique on the page.

    name: letters, digits and hyphens; becomes part of every id. title, description: for readers who cannot see it.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "path.simplify": True}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = text.replace("xlink:href", "href")
    text = re.sub(r"\bid=\"([^\"]+)\"", rf'id="{name}-\1"', text)
    text = re.sub(r"href=\"#([^\"]+)\"", rf'href="#{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r" font-family: [^;\"]*;", "", text)
    # A style element inside a page's SVG would govern the whole page; the page's own sheet says the same.
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    for color, variable in stand_ins().items():
        text = text.replace(color, variable)
    box = re.search(r'viewBox="([^"]+)"', text)
    assert box is not None
    head = (
        f'<svg class="chart" viewBox="{box[1]}" role="img" aria-labelledby="{name}-title {name}-desc">'
        f'<title id="{name}-title">{html.escape(title)}</title><desc id="{name}-desc">{html.escape(description)}</desc>'
    )
    return head + text[text.index(">") + 1 :].strip()


def canvas(names: Sequence[str], right: float | None = None, size: tuple[float, float] | None = None,
           left: float = 46.0) -> tuple[Any, Any]:
    """A figure and its axes, with room for `names` right of them, or as many points as `right` says.

    size: width and height in points; by default what the number of names needs.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties

    width, height = size or (LARGE if len(names) > FEW else (WIDTH, HEIGHT))
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    drawing = FigureCanvasAgg(figure)
    if right is None:
        font = FontProperties(size=TEXT)
        labelled = [fit(n) for n in names] if len(names) <= MOST_LABELS else []
        widths = [drawing.get_renderer().get_text_width_height_descent(n, font, False)[0] for n in labelled]
        right = max(widths, default=-4.0) + 18
    bottom, top = 48.0, 34.0
    rect = (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
    return figure, figure.add_axes(rect)


def fit(name: str) -> str:
    """A name as it stands in a figure: at most 22 characters."""
    # A dollar sign would begin a formula.
    return (name if len(name) <= 22 else name[:12] + "…" + name[-9:]).replace("$", r"\$")


def _lines(axes: Any, series: Sequence[Series], markers: bool, clip: bool = False) -> None:
    for s in series:
        style: dict[str, Any] = {"dashes": s.look.dash} if s.look.dash else {}
        axes.plot(
            s.x,
            s.y,
            color=s.look.color,
            linewidth=1.9,
            clip_on=clip,
            zorder=3,
            solid_capstyle="round",
            solid_joinstyle="round",
            **style,
        )
        if markers:
            axes.plot(
                s.x,
                s.y,
                color=s.look.color,
                linestyle="none",
                marker=s.look.marker,
                markersize=6.5,
                markeredgecolor=PAPER,
                markeredgewidth=0.8,
                clip_on=False,
                zorder=4,
            )


def finish(figure: Any, axes: Any, xlabel: str, ylabel: str, series: Sequence[Series]) -> Any:
    """Frame the axes and write each series' name at its end."""
    frame(axes, xlabel, ylabel)
    if len(series) <= MOST_LABELS:
        end_labels(axes, [(fit(s.name), s.x[-1], s.y[-1], s.look.color) for s in series], TEXT, column=12)
    return figure


def frame(axes: Any, xlabel: str, ylabel: str) -> None:
    """Axis, grid and labels in the house's look; the vertical label stands above its axis."""
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.spines["bottom"].set_linewidth(0.8)
    axes.patch.set_visible(False)
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.minorticks_off()
    axes.tick_params(axis="both", labelsize=TEXT, labelcolor=MUTED, color=MUTED, width=0.8, length=3.5, pad=4)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(xlabel, color=INK, fontsize=TEXT, labelpad=5)
    box = axes.get_window_extent()
    axes.text(
        -box.x0 / box.width,
        1 + 14 / box.height,
        ylabel,
        transform=axes.transAxes,
        color=INK,
        fontsize=TEXT,
        ha="left",
        va="bottom",
    )


def set_ticks(axis: Any, places: Sequence[float], names: Sequence[str]) -> None:
    """Fixed places and names of an axis."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    axis.set_major_locator(FixedLocator(list(places)))
    axis.set_major_formatter(FixedFormatter(list(names)))
    axis.set_minor_locator(NullLocator())


def byte_ticks(axis: Any, low: float, high: float) -> None:
    """Ticks at powers of two; K is 1,024."""
    powers = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
    step = next(s for s in (1, 2, 4, 5, 10) if len([p for p in powers if p % s == 0]) <= 5 or s == 10)
    places = [2.0**p for p in powers if p % step == 0]
    # "KiB" does not fit the narrow margin left of the axis; K is 1024 here, as the axis label says.
    set_ticks(axis, places, [re.sub(r" (.)iB$", r"\1", numbers.size(p)).replace(" B", "") for p in places])


def round_ticks(axis: Any, low: float, high: float, write: Callable[[float], str]) -> None:
    """Ticks at 1, 2 and 5 times powers of ten, or at the powers alone where those are many."""
    places = [m * 10.0**e for e in range(-7, 10) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    if len(places) > 6:
        places = [p for p in places if round(p / 10 ** math.floor(math.log10(p) + 1e-9)) == 1]
    set_ticks(axis, places, [write(p).replace(" ", "") for p in places])


def _tokens(value: float) -> str:
    return f"{value / 1024:g}k" if value >= 1024 and value % 512 == 0 else f"{value:g}"


def fraction(value: float) -> str:
    """A tick of an accuracy axis: 0.25 -> '.25'."""
    return f"{value:.2f}".lstrip("0") if 0 < value < 1 else f"{value:g}"


def round_steps(low: float, high: float, most: int) -> list[float]:
    """At most so many round places from low to high."""
    span = max(high - low, 1e-12)
    for exponent in range(math.floor(math.log10(span)) - 1, math.floor(math.log10(span)) + 2):
        for lead in (1, 2, 2.5, 5):
            step = lead * 10.0**exponent
            places = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
            if len(places) <= most:
                return [round(i * step, 10) for i in places]
    return [low, high]


def _smooth(series: Series) -> Series:
    x, y = _binned(series.x, series.y)
    return Series(series.name, series.look, x, y, series.marks)


def _binned(x: Sequence[float], y: Sequence[float], most: int = 36) -> tuple[list[float], list[float]]:
    """Means over at most `most` equal stretches of the curve: training loss is noise on top of a trend."""
    size = max(1, math.ceil(len(x) / most))
    out_x, out_y = [], []
    pieces = max(1, len(x) // size)
    for index in range(pieces):
        # The last piece takes the remainder too: a mean of fewer would end the curve in a jump.
        start, stop = index * size, len(x) if index == pieces - 1 else (index + 1) * size
        piece = y[start:stop]
        out_x.append(x[stop - 1])
        out_y.append(sum(piece) / len(piece))
    return out_x, out_y
