"""A gauntlet's page: it parses and loads nothing at any moment of a study, and shows its figures and no others."""

import csv
import io
import json
import re
import statistics
from urllib.parse import unquote

import pytest
from typer.testing import CliRunner

from postformer.report import render

ALLOWED = re.compile(r"https://arxiv\.org/abs/\d{4}\.\d{4,5}|data:text/csv;|#")


def sound(text, page):
    assert len(page.ids) == len(set(page.ids))
    assert all(r.startswith("#") and r[1:] in page.ids for r in page.references)
    assert all(ALLOWED.match(a) for a in page.links)
    assert all(a[1:] in page.ids for a in page.links if a.startswith("#"))
    assert not [tag for tag, v in page.tags if tag == "script" and v.get("type") != "application/json"]
    assert not re.search(r"url\((?!#)|@import", text)
    shown = re.sub(r"<script.*?</script>|step 31 &lt;nan&gt;", "", text, flags=re.DOTALL)
    assert not re.search(r"\b(nan|NaN|Infinity)\b", shown)


@pytest.mark.parametrize(("designs", "tasks"), [(2, 1), (1, 1), (3, 4)])
def test_a_page_of_any_size_is_sound(tmp_path, make, save, page_of, designs, tasks):
    path = render(save(tmp_path / "study", make(designs, tasks)))
    assert path == tmp_path / "study" / "report.html"
    text, page = page_of(path)
    sound(text, page)
    charts = [v for tag, v in page.tags if tag == "svg" and v.get("class") == "chart"]
    recall = sum(t["unit"] == "pairs" for t in make(designs, tasks)["tasks"])
    assert recall > 0
    assert len(charts) == tasks + 2 * recall + 3
    assert all(set(v["aria-labelledby"].split()) <= set(page.ids) for v in charts)


def test_the_heat_map_shows_means_inside_and_outside_apart(tmp_path, make, save, page_of):
    study = make(3, 2)
    study["tasks"][0]["settings"][0]["chance"] = 0.5
    text, _ = page_of(render(save(tmp_path, study)))
    cells = {(c["design"], c["task"]): c for c in study["cells"]}
    task = study["tasks"][0]
    for inside, word in ((True, "inside"), (False, "outside")):
        names = [s["name"] for s in task["settings"] if s["inside"] is inside]
        for design in ("transformer", "sliding-window"):
            by_seed = [
                statistics.fmean(s["test"][n]["token_accuracy"] for n in names) for s in cells[design, "mqar"]["seeds"]
            ]
            mean, spread = statistics.fmean(by_seed), statistics.stdev(by_seed)
            name = f'title="{design}, MQAR, {word}: ([^"]*)"'
            title = re.search(rf'<td class="value[^>]*{name}[^>]*><b>([^<]*)</b> <small>([^<]*)', text)
            assert title is not None
            assert title[1].startswith(f"{mean:.3f} ± {spread:.3f}, {min(by_seed):.3f} to")
            assert float(title[2]) == pytest.approx(mean, abs=0.0051)
            assert float(title[3][1:]) == pytest.approx(spread, abs=0.0051)


def test_every_figure_of_the_test_split_is_in_the_csv_beside_the_page(tmp_path, make, save):
    study = make(3, 4)
    study["cells"][0]["seeds"][0]["test"]["16x4"]["token_accuracy"] = 0.123456789
    render(save(tmp_path / "study", study), tmp_path / "elsewhere" / "page.html")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "elsewhere" / "gauntlet.csv").read_text())))
    columns = "design task setting inside seed metric value params flops state_bytes"
    assert list(rows[0]) == columns.split()
    found = {(r["design"], r["task"], r["setting"], r["seed"], r["metric"]): float(r["value"]) for r in rows}
    expected = {
        (c["design"], c["task"], setting, str(s["seed"]), metric): value
        for c in study["cells"] for s in c["seeds"] for setting, at in s["test"].items() for metric, value in at.items()
    }  # fmt: skip
    assert found == expected
    inside = {(t["key"], s["name"]): str(int(s["inside"])) for t in study["tasks"] for s in t["settings"]}
    assert all(r["inside"] == inside[r["task"], r["setting"]] for r in rows)
    assert json.loads((tmp_path / "elsewhere" / "gauntlet.json").read_text()) == study


def test_rendering_leaves_the_study_itself_alone(tmp_path, make, save):
    path = save(tmp_path, make(2, 1)) / "gauntlet.json"
    path.write_text(path.read_text() + "\n\n")
    before = path.read_bytes()
    render(tmp_path)
    assert path.read_bytes() == before
    assert (tmp_path / "gauntlet.csv").is_file()


def test_a_study_in_progress_says_what_is_missing(tmp_path, make, save, interrupt, page_of):
    study = interrupt(make(5, 6))
    text, page = page_of(render(save(tmp_path, study)))
    sound(text, page)
    have = {(c["design"], c["task"]): len(c["seeds"]) for c in study["cells"]}
    failed = sum(bool(c["failures"]) and not c["seeds"] for c in study["cells"])
    done, partial = sum(n == 3 for n in have.values()), sum(0 < n < 3 for n in have.values())
    assert min(failed, done, partial) > 0
    assert f"in progress. {done} of 30 cells have all their seeds, {partial} with fewer seeds than " in page.text
    regimes = {t["key"]: len({s["inside"] for s in t["settings"]}) for t in study["tasks"]}
    pairs = [(d["key"], t["key"]) for d in study["designs"] for t in study["tasks"]]
    bad = {(c["design"], c["task"]) for c in study["cells"] if c["failures"] and not c["seeds"]}
    gone = [p for p in pairs if not have.get(p) and p not in bad]
    assert text.count('<td class="failed-cell"') == sum(regimes[t] for _, t in bad)
    assert text.count('<td class="missing-cell"') == sum(regimes[t] for _, t in gone)
    shown = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    for words in ("not finite at step 31 &lt;nan&gt;", "out of memory"):
        reasons = [f["why"].replace("<", "&lt;").replace(">", "&gt;") for c in study["cells"] for f in c["failures"]]
        assert shown.count(words) == reasons.count(words) > 0
    assert "runs/" in page.text


@pytest.mark.parametrize("key", ["cells", "tasks", "designs"])
def test_a_study_that_has_only_begun_renders(tmp_path, make, save, page_of, key):
    study = make(2, 2) | {key: [], "costs": [], "ended": None}
    if key != "cells":
        study["cells"] = []
    _, page = page_of(render(save(tmp_path, study)))
    assert "Nothing can be compared yet" in page.text


def test_one_seed_has_no_spread(tmp_path, make, save, page_of):
    text, page = page_of(render(save(tmp_path, make(2, 1, seeds=1))))
    assert "One seed per design and task" in page.text
    assert "±" not in re.search(r'<table class="grid heat.*?</table>', text, re.DOTALL)[0]


def test_scores_that_are_not_accuracies_are_not_rescaled(tmp_path, make, save, page_of):
    text, page = page_of(render(save(tmp_path, make(3, 2))))
    cells = re.findall(r"--fill: var\(--(\w+)-(\d+)\)[^>]*title=\"(\S+), Text bytes, inside: ([\d.]+)([^\"]*)", text)
    assert len(cells) == 3
    assert {c[0] for c in cells} == {"own"}
    best = min(cells, key=lambda c: float(c[3]))
    assert best[1] == "10"
    assert all("rescaled" not in c[4] for c in cells)
    assert "less is better" in page.text


def test_what_others_wrote_cannot_become_markup(tmp_path, make, save, page_of):
    study = make(15, 1)
    study["title"] = "</title><script>alert(1)</script>"
    study["command"] = "postformer gauntlet '</script><i>'"
    study["tasks"][0] |= {"title": "<u>$x^2$ & more", "about": "<u>"}
    study["designs"][0]["name"] = "$a_b$ <u>"
    study["cells"][0]["failures"] = [{"stage": "final", "why": "<u>", "log": "<u>"}]
    study["published"][0] |= {"scale": "<u>", "source": "javascript:alert(1)"}
    study["claims"][0] |= {"statement": "<u>", "source": "<u>", "papers": ["<u>", "2402.01032"]}
    text, page = page_of(render(save(tmp_path, study)))
    sound(text, page)
    assert "u" not in {tag for tag, _ in page.tags}
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert "$a_b$ &lt;u&gt;" in re.search(r'<svg class="chart".*?</svg>', text, re.DOTALL)[0]
    embedded = re.search(r'<script type="application/json" id="numbers">(.*?)</script>', text, re.DOTALL)
    assert json.loads(embedded[1]) == study


def test_published_figures_stay_in_their_own_table(tmp_path, make, save, page_of):
    study = make(2, 1)
    study["published"][0]["value"] = 0.98765
    text, _ = page_of(render(save(tmp_path, study)))
    text = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    section = re.search(r'<section id="published".*?</section>', text, re.DOTALL)[0]
    assert "0.98765" in section
    assert "100k examples" in section
    assert "0.98765" not in text.replace(section, "")
    assert "not measured" not in page_of(render(save(tmp_path, study | {"published": []})))[1].text


def test_the_matched_quantity_is_marked_and_what_is_off_is_counted(tmp_path, make, save, page_of):
    study = make(6, 2)  # the sixth design has 4,000 parameters more
    text, page = page_of(render(save(tmp_path, study)))
    assert "within 5%; 2 pairs of design and task are further off" in page.text
    assert text.count('class="far"') == 2
    assert text.count('<tr class="matched"') == 2
    _, page = page_of(render(save(tmp_path, study | {"match": None})))
    assert "Designs are matched on nothing but" in page.text


def test_each_figure_carries_its_command_and_its_data(tmp_path, make, save, page_of):
    study = make(3, 1)
    text, page = page_of(render(save(tmp_path / "study", study)))
    charts = sum(tag == "svg" and v.get("class") == "chart" for tag, v in page.tags)
    figures = re.findall(r"<figure>.*?</figure>", text, re.DOTALL)
    assert len(figures) == charts
    for figure in figures:
        assert "postformer report study" in figure
        rows = list(csv.DictReader(io.StringIO(unquote(re.search(r'href="data:text/csv[^,]*,([^"]*)"', figure)[1]))))
        assert len(rows) >= 3
    task = next(f for f in figures if "task-mqar" in f)
    rows = list(csv.DictReader(io.StringIO(unquote(re.search(r'href="data:text/csv[^,]*,([^"]*)"', task)[1]))))
    values = [s["test"]["16x4"]["token_accuracy"] for s in study["cells"][0]["seeds"]]
    assert float(rows[0]["mean"]) == pytest.approx(statistics.fmean(values))
    assert float(rows[0]["deviation"]) == pytest.approx(statistics.stdev(values))
    assert (float(rows[0]["low"]), float(rows[0]["high"])) == (min(values), max(values))


def test_the_verb_finds_a_gauntlet(tmp_path, make, save):
    from postformer.cli.main import app

    result = CliRunner().invoke(app, ["report", str(save(tmp_path, make(2, 1)))])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "report.html").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"schema": 2}, "schema 2, and this version reads 1"), ({"kind": "demo"}, "does not describe a gauntlet"),
     ({"cells": None}, "has no list of cells")],
)  # fmt: skip
def test_a_file_of_another_kind_is_refused_with_a_remedy(tmp_path, make, save, change, message):
    with pytest.raises(ValueError, match=message):
        render(save(tmp_path, make(2, 1) | change))
    (tmp_path / "gauntlet.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        render(tmp_path)
