"""Figures: labels never cover each other, and what becomes of colours, ids and fonts in the SVG."""

import random
import re

import pytest

from postformer.report.figures import Series, accuracy_curve, growth, loss_curves, state_scatter, svg
from postformer.report.labels import collisions, spread
from postformer.report.style import HUES, Look

NAMES = ["transformer", "mamba2 (state 4)", "gated-deltanet", "deltaproduct", "hybrid"]


def test_spread_keeps_distance_order_and_range():
    placed = spread([10, 10, 10.5, 40], 5, 0, 50)
    assert placed == pytest.approx([5.1667, 10.1667, 15.1667, 40], abs=1e-3)
    crowded = spread([1.0] * 8, 10, 0, 35)
    assert crowded == pytest.approx([5.0 * i for i in range(8)])
    assert spread([99, -99], 5, 0, 50) == [50, 0]
    assert spread([], 5, 0, 50) == []


@pytest.mark.parametrize("seed", range(12))
def test_no_label_covers_another(seed):
    """Curves that end in one point, far apart, and anything between."""
    draw = random.Random(seed)
    ends = [1.0 - draw.choice([0, 0.001, 0.3, 0.9]) * draw.random() for _ in NAMES]
    looks = [Look(i) for i in range(len(NAMES))]
    accuracy = [Series(n, k, (8, 16, 32, 64), (1, 0.9, e, e)) for n, k, e in zip(NAMES, looks, ends)]
    assert collisions(accuracy_curve(accuracy, "Sequence length", 16, draw.choice([1 / 6, 1 / 64, 0.5]))) == []
    x = list(range(1000, 100_000, 1000))
    losses = [
        Series(n, k, x, [2 + e / 9 + 5 / (1 + t / 5000) for t in x], [(x[-1], 2.2)])
        for n, k, e in zip(NAMES, looks, ends)
    ]
    assert collisions(loss_curves(losses)) == []
    contexts = (128, 512, 2048, 8192, 16384)
    slopes = [draw.choice([0, 0, 64, 256]) for _ in NAMES]
    bytes_ = [
        Series(n, k, contexts, [4000 + s * c for c in contexts], [(128, 4000 + s * 128)])
        for n, k, s in zip(NAMES, looks, slopes)
    ]
    assert collisions(growth(bytes_, "bytes", "Bytes of state")) == []
    times = [Series(n, k, contexts, [1e-4 * (1 + e + s * 1e-8 * c) for c in contexts]) for n, k, e, s in
             zip(NAMES, looks, ends, slopes)]  # fmt: skip
    assert collisions(growth(times, "seconds", "Time per token")) == []
    points = [(n, k, (2000 + s * 32, 1.0), (2000 + s * 64, e)) for n, k, s, e in zip(NAMES, looks, slopes, ends)]
    assert collisions(state_scatter(points, "8 pairs", "16 pairs")) == []


def test_collisions_finds_what_it_looks_for():
    figure = accuracy_curve([Series("a", Look(0), (8, 16), (1, 0.5))], "Length", 16, None)
    axes = figure.axes[0]
    axes.text(12, 0.5, "one upon")
    axes.text(12, 0.5, "another")
    axes.text(16, 0.1, "much too long for the little room that is left here")
    found = collisions(figure)
    assert "'one upon' and 'another' cover each other" in found
    assert any("leaves the canvas" in f for f in found)


def test_the_svg_has_no_colour_font_or_address_of_its_own():
    series = [Series(n, Look(i), (8, 16, 32), (1, 0.9, 0.8)) for i, n in enumerate(NAMES)]
    text = svg(accuracy_curve(series, "Length", 16, 0.25), "some-chart", "A <title>", "x & y")
    assert text.startswith('<svg class="chart" viewBox="0 0 400 292" role="img"')
    assert '<title id="some-chart-title">A &lt;title&gt;</title>' in text
    assert "x &amp; y" in text
    assert "font-family" not in text
    assert "<style" not in text
    assert "http" not in text
    assert not re.findall(r"#[0-9a-fA-F]{6}\b", text)
    assert all(i.startswith("some-chart-") for i in re.findall(r'\bid="([^"]+)"', text))
    assert {f"var(--series-{i})" for i in range(5)} <= set(re.findall(r"var\(--[\w-]+\)", text))
    assert sorted(set(map(float, re.findall(r"font-size: ([\d.]+)px", text)))) == [12.5]


def test_the_same_figure_twice_is_the_same_text():
    def draw():
        return svg(loss_curves([Series("a", Look(0), (1, 2, 3), (3, 2, 1))]), "c", "t", "d")

    assert draw() == draw()


def luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(("mode", "paper"), [(0, "#fdfdfc"), (1, "#15181c")])
def test_labels_in_the_series_colours_are_legible(mode, paper):
    for hue in HUES:
        light, dark = sorted((luminance(hue[mode]), luminance(paper)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, hue[mode]


def test_forty_series_all_look_different():
    looks = {(Look(i).color, Look(i).dash) for i in range(40)}
    assert len(looks) == 40
