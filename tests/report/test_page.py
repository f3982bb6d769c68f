"""The page: it parses, loads nothing, shows the numbers of its source and no others, and survives missing runs."""

import json
import re

import pytest

from postformer.report import render

ARXIV = re.compile(r"https://arxiv\.org/abs/\d{4}\.\d{4,5}")


def test_a_demo_page_parses_and_loads_nothing(demo_directory, page_of):
    path = render(demo_directory)
    assert path == demo_directory / "report.html"
    text, page = page_of(path)
    assert len(page.ids) == len(set(page.ids))
    assert all(r.startswith("#") and r[1:] in page.ids for r in page.references)
    assert all(ARXIV.fullmatch(a) or a.startswith("data:text/csv") for a in page.links)
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) == {a for a in page.links if a.startswith("https")}
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert not [tag for tag, values in page.tags if tag == "script" and values.get("type") != "application/json"]
    assert len(text) < 400_000


def test_charts_are_described_and_tables_have_headers(demo_directory, page_of):
    _, page = page_of(render(demo_directory))
    charts = [values for tag, values in page.tags if tag == "svg" and values.get("class") == "chart"]
    assert len(charts) == 6  # S3; recall twice; text; memory and time
    for chart in charts:
        assert chart["role"] == "img"
        assert all(name in page.ids for name in chart["aria-labelledby"].split())
    assert sum(tag == "figcaption" for tag, _ in page.tags) == 6
    tables = sum(tag == "table" for tag, _ in page.tags)
    assert tables == 6
    assert sum(tag == "thead" for tag, _ in page.tags) == tables
    assert all(v.get("scope") in ("row", "col") for tag, v in page.tags if tag == "th")


def test_every_number_in_the_tables_comes_from_the_data(demo_directory, page_of):
    """Each figure in a cell must be one of the source's numbers, rounded to what the cell shows."""
    _, page = page_of(render(demo_directory))
    demo = json.loads((demo_directory / "demo.json").read_text())
    known: list[float] = []

    def collect(value):
        if isinstance(value, dict):
            for key, item in value.items():
                collect(item)
                known.extend(float(n) for n in re.findall(r"\d+", key))
        elif isinstance(value, list):
            for item in value:
                collect(item)
        elif isinstance(value, (int, float)):
            known.append(float(value))
        elif isinstance(value, str):
            known.extend(float(n) for n in re.findall(r"\d+(?:\.\d+)?", value))

    collect(demo)
    units = {"k": 1e3, "M": 1e6, "KiB": 2**10, "MiB": 2**20, "µs": 1e-6, "ms": 1e-3, "min": 60}
    numbers = [m for cell in page.cells if (m := re.fullmatch(r"([\d,.]+)(?: (\S+))?", cell.strip()))]
    assert len(numbers) > 150
    for found in numbers:
        shown, unit = found[1].replace(",", ""), units.get(found[2] or "", 1)
        digits = len(shown.partition(".")[2])
        tolerance = 0.5000001 * 10**-digits * unit
        if float(shown) >= 100 and unit != 1:
            tolerance = max(tolerance, 0.5 * unit)
        assert any(abs(float(shown) * unit - k) <= tolerance for k in known), found[0]


def test_the_numbers_are_embedded_and_cannot_end_their_element(demo_directory, page_of):
    demo = json.loads((demo_directory / "demo.json").read_text())
    demo["command"] = "postformer demo </script><b>&"
    demo["tasks"][0]["runs"][0]["points"][0]["accuracy"] = 0.123456789
    (demo_directory / "demo.json").write_text(json.dumps(demo))
    text, page = page_of(render(demo_directory))
    embedded = re.search(r'<script type="application/json" id="numbers">(.*?)</script>', text, re.DOTALL)
    assert json.loads(embedded[1])["command"] == demo["command"]
    assert json.loads(embedded[1])["tasks"][0]["runs"][0]["points"][0]["accuracy"] == 0.123456789
    assert "0.123456789" in next(a for a in page.links if "0.123456789" in a)
    assert "<b>&" not in text


def test_missing_and_broken_runs_are_listed_as_failed(demo_directory, page_of):
    demo = json.loads((demo_directory / "demo.json").read_text())
    by_key = {task["key"]: task for task in demo["tasks"]}
    by_key["s3"]["runs"][3] = {
        "architecture": "deltaproduct", "directory": "runs/gone", "status": "failed", "reason": "not finite",
    }  # fmt: skip
    by_key["mqar"]["runs"][1].pop("points")
    (demo_directory / "demo.json").write_text(json.dumps(demo))
    (demo_directory / by_key["text"]["runs"][0]["directory"] / "metrics.jsonl").unlink()
    _, page = page_of(render(demo_directory))
    assert "3 of 19 did not finish" in page.text
    assert "not finite" in page.text
    assert "no result was recorded" in page.text
    assert "metrics.jsonl holds no line" in page.text
    assert "cannot be checked: deltaproduct gave no number at 64 tokens" in page.text


@pytest.mark.parametrize("keep", ["tasks", "decode", "nothing"])
def test_a_demo_with_almost_nothing_in_it_still_renders(demo_directory, keep, page_of):
    demo = json.loads((demo_directory / "demo.json").read_text())
    if keep != "tasks":
        demo["tasks"] = []
    if keep != "decode":
        demo["decode"] = None
    (demo_directory / "demo.json").write_text(json.dumps(demo))
    _, page = page_of(render(demo_directory, demo_directory / "other.html"))
    assert "transformer" in page.text


def test_when_every_run_failed_the_page_says_so(demo_directory, page_of):
    demo = json.loads((demo_directory / "demo.json").read_text())
    for task in demo["tasks"]:
        task["runs"] = [{"architecture": r["architecture"], "status": "failed"} for r in task["runs"]]
    demo["decode"]["runs"] = []
    (demo_directory / "demo.json").write_text(json.dumps(demo))
    _, page = page_of(render(demo_directory))
    assert "14 of 14 did not finish" in page.text
    assert "nothing to see" in page.text


def test_any_runs_can_be_reported(run_directories, tmp_path, page_of):
    missing = tmp_path / "nowhere"
    (run_directories[2] / "result.json").unlink()
    with (run_directories[2] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 400, "tok')  # a run killed while it wrote
    path = render([*run_directories, missing], tmp_path / "pages" / "all.html")
    text, page = page_of(path)
    assert "2 of 4 did not finish" in page.text
    assert "the run directory does not exist" in page.text
    assert "result.json is missing: the run did not finish" in page.text
    assert {"design-0", "design-1", "design-2", "nowhere"} <= set(page.cells)
    assert sum(tag == "svg" and v.get("class") == "chart" for tag, v in page.tags) == 1
    assert not re.findall(r"https?://(?!arxiv\.org/abs/)", text)


def test_task_scores_of_runs_are_tabulated(run_directories, tmp_path, page_of):
    result = json.loads((run_directories[0] / "result.json").read_text())
    result["validation"] = {"token_accuracy": 0.9, "16/token_accuracy": 0.9321, "32/token_accuracy": 0.4567}
    (run_directories[0] / "result.json").write_text(json.dumps(result))
    _, page = page_of(render(run_directories, tmp_path / "tasks.html"))
    assert {"0.932", "0.457"} <= set(page.cells)


def test_runs_of_one_name_are_told_apart(run_directories, page_of):
    for directory in run_directories:
        run = json.loads((directory / "run.json").read_text())
        (directory / "run.json").write_text(json.dumps(run | {"name": "same"}))
    _, page = page_of(render(run_directories))
    assert {"same (run-0)", "same (run-1)", "same (run-2)"} <= set(page.cells)


def test_many_runs_get_a_legend_instead_of_labels(tmp_path, make_run, page_of):
    runs = [make_run(tmp_path / f"run-{i}", f"design-{i}", 2.0 + 0.05 * i) for i in range(18)]
    text, _ = page_of(render(runs, tmp_path))
    chart = re.search(r'<svg class="chart".*?</svg>', text, re.DOTALL)[0]
    assert "design-3" not in re.sub(r"<desc.*?</desc>", "", chart)


def test_nothing_to_report_on_is_an_error_with_a_remedy(tmp_path):
    with pytest.raises(ValueError, match="at least one run directory"):
        render([])
    with pytest.raises(ValueError, match="A run directory holds"):
        render(tmp_path)
    (tmp_path / "demo.json").write_text("{}")
    with pytest.raises(ValueError, match="does not describe a demo"):
        render(tmp_path)
