"""What the page computes and draws: spreads, leaders, fronts, colours, and labels that never cover each other."""

import random
import re
import statistics
from itertools import pairwise

import pytest

from postformer.report.gauntlet import heat
from postformer.report.gauntlet.data import Stat, Study, Trial
from postformer.report.gauntlet.figures import Line, Point, Reference, by_design, by_setting, front, pareto
from postformer.report.gauntlet.findings import lead, leaders, more
from postformer.report.gauntlet.sections import axis
from postformer.report.labels import collisions
from postformer.report.style import Look

NAMES = ["preconditioned-deltanet", "transformer", "a name that is much too long for any figure", "gla", "$x$ <b>"]


def lines(number, places, draw, ends):
    out = []
    for i in range(number):
        means = [draw.choice(ends) for _ in places]
        spread = draw.choice([0.0, 0.02, 0.2])
        points = [Point(x, m, max(0.0, m - spread), min(1.0, m + spread)) for x, m in zip(places, means)]
        out.append(Line(f"{NAMES[i % len(NAMES)]}"[: 30 - i], Look(i), points))
    return out


@pytest.mark.parametrize("number", [1, 2, 6, 15])
@pytest.mark.parametrize("ends", [(1.0,), (0.0, 0.01), (0.0, 0.2, 0.5, 0.97, 1.0)])
def test_no_label_covers_another(number, ends):
    draw = random.Random(number)
    places, names = [8.0, 16.0, 32.0, 64.0, 128.0], ["8", "16", "32", "64", "128"]
    references = [Reference("chance", (1, 2), [0.02] * 5), Reference("shortcut", (5, 2), [0.1, 0.1, 0.2, 0.2, 0.3])]
    drawn = lines(number, places, draw, ends)
    for inside in (1, 2, 4):
        figure = by_setting(drawn, places, names, inside, "Sequence length", "Token accuracy", references)
        assert collisions(figure) == []
    rows = lines(number, [0.0], draw, ends)
    one = [Reference("chance", (1, 2), [0.02]), Reference("shortcut", (5, 2), [0.03])]
    assert collisions(by_design(rows, "Token accuracy", lambda v: f"{v:.3f}", one, accuracy=True)) == []
    sizes = [Line(r.name, r.look, [Point(2.0 ** draw.uniform(9, 15), *(r.points[0].mean,) * 3)]) for r in rows]
    assert collisions(pareto(sizes)) == []


def test_the_front_holds_what_nothing_beats():
    draw = random.Random(0)
    for _ in range(200):
        points = [(draw.randint(1, 5), draw.randint(1, 5) / 5) for _ in range(draw.randint(1, 12))]
        found = front(points)
        assert [points[i] for i in found] == sorted({
            p for p in points if not any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points)
        })  # fmt: skip


@pytest.mark.parametrize("dark", [False, True])
def test_heat_is_ordered_in_grey_and_readable(dark):
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{3,6});", heat.variables(dark)))

    def light(name):
        value = colours[name].lstrip("#")
        value = "".join(c * 2 for c in value) if len(value) == 3 else value
        parts = [int(value[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        red, green, blue = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for name in ("heat", "own"):
        ramp = [light(f"{name}-{i}") for i in range(heat.STEPS)]
        assert ramp == sorted(ramp, reverse=not dark)
        assert min(abs(a - b) for a, b in pairwise(ramp)) > 0.005
        for i in range(heat.STEPS):
            low, high = sorted((ramp[i], light(f"{name}-ink-{i}")))
            assert (high + 0.05) / (low + 0.05) >= 4.5


def test_only_chance_or_less_has_the_first_step_and_only_perfect_the_last():
    assert [heat.step(v) for v in (-0.5, 0.0, 0.05, 0.1, 0.55, 0.999, 1.0)] == [0, 0, 0, 1, 5, 9, 10]
    trial = Trial({"key": "t", "metric": "token_accuracy"})
    assert trial.rescaled(0.5, {"chance": 0.5}) == 0
    assert trial.rescaled(1.0, {"chance": 0.5}) == 1
    assert trial.rescaled(0.25, {"chance": 0.5}) == -0.5


def test_a_spread_is_of_the_sample_and_one_seed_has_none():
    stat = Stat((0.2, 0.4, 0.9))
    assert (stat.mean, stat.low, stat.high) == (pytest.approx(0.5), 0.2, 0.9)
    assert stat.deviation == pytest.approx(statistics.stdev([0.2, 0.4, 0.9]))
    assert Stat((0.3,)).deviation is None


def study_of(tmp_path, save, make, values):
    """A study of one task with given test values: {design: (inside per seed, outside per seed)}."""
    study = make(len(values), 1)
    for cell in study["cells"]:
        inside, outside = values[cell["design"]]
        for i, seed in enumerate(cell["seeds"]):
            for s in study["tasks"][0]["settings"]:
                seed["test"][s["name"]]["token_accuracy"] = (inside if s["inside"] else outside)[i]
    return Study(save(tmp_path, study))


def test_leaders_are_those_that_seeds_cannot_tell_apart(tmp_path, save, make):
    study = study_of(tmp_path, save, make, {
        "transformer": ((0.9, 0.95, 1.0), (0.1, 0.1, 0.1)),
        "sliding-window": ((0.8, 0.85, 0.91), (0.5, 0.6, 0.7)),
        "linear-attention": ((0.7, 0.8, 0.89), (0.3, 0.3, 0.3)),
    })  # fmt: skip
    trial = study.trials[0]
    assert leaders(study, trial, True) == ["transformer", "sliding-window"]
    assert leaders(study, trial, False) == ["sliding-window"]
    assert lead(study) == (
        "Inside the training distribution, transformer and sliding-window are best and cannot be told apart; "
        "outside it, sliding-window is best."
    )
    assert more(study) == "The deepest fall from inside to outside is transformer's on MQAR, from 0.950 to 0.100."


def test_what_nobody_learned_is_said(tmp_path, save, make):
    low = ((0.02, 0.02, 0.03), (0.02, 0.02, 0.02))
    study = study_of(tmp_path, save, make, {"transformer": low, "sliding-window": low})
    assert "No design gets a tenth of the way from chance to perfect on MQAR" in more(study)
    assert "no design stands out" in lead(study)


def test_a_seed_without_all_settings_does_not_enter_the_mean_over_them(tmp_path, save, make):
    study = make(1, 1)
    values = [1.0, 0.6, float("nan")]
    for seed, value in zip(study["cells"][0]["seeds"], values):
        for name in ("16x4", "32x8"):
            seed["test"][name]["token_accuracy"] = 0.8
        seed["test"]["32x8"]["token_accuracy"] = value
    del study["cells"][0]["seeds"][1]["test"]["16x4"]
    read = Study(save(tmp_path, study))
    assert read.regime("transformer", read.trials[0], True) == Stat((0.9,))


def test_settings_that_a_number_cannot_order_are_spaced_evenly():
    def trial(*settings, unit="pairs"):
        return Trial({"key": "t", "metric": "m", "unit": unit,
                      "settings": [{"setting": s, "name": str(s), "inside": True} for s in settings]})  # fmt: skip

    assert axis(trial([16, 4], [64, 8])) == ([4, 8], ["4", "8"], "Number of pairs")
    assert axis(trial(16, 32, unit="length")) == ([16, 32], ["16", "32"], "Sequence length")
    assert axis(trial([16, 4], [64, 4]))[::2] == ([0, 1], "Setting")
