"""Placing labels directly at their lines so that none covers another, and the check that none does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions as near to `wanted` as a mutual distance of `gap` within [low, high] allows (least squares, any order).

    Where they cannot all fit, they are spaced evenly over the range.
    """
    number = len(wanted)
    if number * gap > high - low + gap:
        gap = (high - low) / max(number - 1, 1)
    order = sorted(range(number), key=lambda i: wanted[i])
    # With z_i = p_i - i * gap the constraint is z_i <= z_{i+1}: isotonic regression by pooling neighbours.
    pools: list[list[float]] = []  # [sum, count]
    for rank, i in enumerate(order):
        pools.append([wanted[i] - rank * gap, 1])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            total, count = pools.pop()
            pools[-1][0] += total
            pools[-1][1] += count
    out, rank = [0.0] * number, 0
    for total, count in pools:
        for _ in range(int(count)):
            z = min(max(total / count, low), high - (number - 1) * gap)
            out[order[rank]] = z + rank * gap
            rank += 1
    return out


def end_labels(axes: Any, ends: Sequence[tuple[str, float, float, str]], size: float, column: float) -> None:
    """Write a name beside the last point of each line, in a column right of the axes.

    Args:
        axes: matplotlib axes whose limits and position are final.
        ends: (name, x, y, colour), x and y in data coordinates.
        size: font size in points.
        column: where the labels begin, in points right of the axes.
    """
    points = 72.0 / axes.figure.dpi
    pixels = [axes.transData.transform((x, y)) for _, x, y, _ in ends]
    box = axes.get_window_extent()
    heights = spread([p[1] * points for p in pixels], size * 1.22, box.y0 * points + 2, box.y1 * points + 4)
    to_data = axes.transData.inverted()
    for (name, x, y, color), height in zip(ends, heights):
        start = to_data.transform((box.x1 + column / points, height / points))
        elbow = to_data.transform((box.x1 + (column - 5) / points, height / points))
        axes.annotate(name, start, color=color, fontsize=size, va="center_baseline", ha="left", annotation_clip=False)
        axes.plot([x, elbow[0]], [y, elbow[1]], color=color, linewidth=0.7, alpha=0.55, clip_on=False, zorder=1)


def point_labels(
    axes: Any, names: Sequence[tuple[str, float, float, str]], obstacles: Sequence[Any], size: float
) -> None:
    """Write a name near each point (name, x, y, colour), where it covers neither a point, nor a name, nor the edge.

    obstacles: further points (x, y) in data coordinates that a label must not cover.
    """
    import numpy as np

    figure = axes.figure
    renderer = figure.canvas.get_renderer()
    scale = figure.dpi / 72.0
    marks = axes.transData.transform([(x, y) for _, x, y, _ in names] + list(obstacles))
    taken = np.concatenate([marks - 5 * scale, marks + 5 * scale], 1)
    frame = axes.get_window_extent()
    inside = np.array([[frame.x0 + 2, frame.y0 + 2, figure.bbox.x1 - 2, frame.y1 + 8]])
    written = np.zeros((0, 4))
    for name, x, y, color in names:
        text = axes.annotate(
            name,
            (x, y),
            xytext=(0, 0),
            textcoords="offset points",
            color=color,
            fontsize=size,
            ha="left",
            va="center_baseline",
            annotation_clip=False,
        )
        own = text.get_window_extent(renderer)
        boxes = np.array([(own.x0 + dx * scale - own.width * _SHIFT[ha], own.y0 + dy * scale)
                          for dx, dy, ha in _CANDIDATES])  # fmt: skip
        boxes = np.concatenate([boxes, boxes + np.array([own.width, own.height])], 1)
        cost = np.arange(len(boxes)) * 0.5 + _areas(boxes, taken).sum(1) + 20 * _areas(boxes, written).sum(1)
        cost += 4 * (own.width * own.height - _areas(boxes, inside)[:, 0])
        best = int(cost.argmin())
        dx, dy, ha = _CANDIDATES[best]
        text.set_position((dx, dy))
        text.set_ha(ha)
        x0, y0, x1, y1 = boxes[best]
        written = np.concatenate([written, boxes[best : best + 1]])
        if math.hypot(dx, dy) > 16:
            # So far from its point that a thin line must say whose name it is.
            end, middle = {"left": x0, "right": x1}.get(ha, (x0 + x1) / 2), (y0 + y1) / 2
            if ha == "center":
                middle = y1 if dy < 0 else y0
            to = axes.transData.inverted().transform((end, middle))
            axes.plot([x, to[0]], [y, to[1]], color=color, linewidth=0.7, alpha=0.55, clip_on=False, zorder=1)


_SHIFT = {"left": 0.0, "center": 0.5, "right": 1.0}
_CANDIDATES = [
    (dx * reach, dy * reach, ha)
    for reach in (1.0, 1.7, 2.6, 3.6, 4.8, 6.2)
    for dx, dy, ha in (
        (9, 0, "left"),
        (-9, 0, "right"),
        (0, 13, "center"),
        (0, -13, "center"),
        (7, 10, "left"),
        (7, -10, "left"),
        (-7, 10, "right"),
        (-7, -10, "right"),
    )
]


def _areas(boxes: Any, others: Any) -> Any:
    """What each of N boxes [N, 4] shares with each of M others [M, 4], as areas [N, M]."""
    import numpy as np

    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return np.clip(high - low, 0, None).prod(2)


def collisions(figure: Any, slack: float = 0.5) -> list[str]:
    """What is wrong with a figure's text: pairs that cover each other, and text that leaves the canvas.

    slack: how far two boxes may touch, in points. An empty list is the wanted answer.
    """
    from matplotlib.text import Text

    renderer = figure.canvas.get_renderer()
    figure.draw(renderer)
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip() and _drawn(t)]
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in texts]
    slack *= figure.dpi / 72.0
    wrong = []
    for i, (name, box) in enumerate(boxes):
        if box.x0 < -slack or box.y0 < -slack or box.x1 > figure.bbox.x1 + slack or box.y1 > figure.bbox.y1 + slack:
            wrong.append(f"{name!r} leaves the canvas")
        for other, second in boxes[:i]:
            width = min(box.x1, second.x1) - max(box.x0, second.x0)
            height = min(box.y1, second.y1) - max(box.y0, second.y0)
            if width > slack and height > slack:
                wrong.append(f"{other!r} and {name!r} cover each other")
    return wrong


def _drawn(text: Any) -> bool:
    """Whether a text is really painted: ticks outside the view keep their labels but do not draw them."""
    axes = text.axes
    if axes is None:
        return True
    for axis in (axes.xaxis, axes.yaxis):
        for tick in axis.get_major_ticks() + axis.get_minor_ticks():
            if text in (tick.label1, tick.label2):
                low, high = sorted(axis.get_view_interval())
                return text is tick.label1 and low <= tick.get_loc() <= high
    return True
