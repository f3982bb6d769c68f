"""The documentation site: every page of docs/ stands in its navigation, and it builds without a warning.

Building needs the extra `docs`, which the extra `test` leaves out: it is some 40 MB to fetch.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def pages(nav):
    for item in nav:
        for value in item.values():
            if isinstance(value, str):
                yield value
            else:
                yield from pages(value)


def test_every_page_stands_in_the_navigation():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert site["strict"] is True
    assert sorted(pages(site["nav"])) == sorted(p.name for p in DOCS.iterdir() if p.suffix in (".md", ".ipynb"))


def test_the_notebook_has_its_outputs_and_nothing_of_the_machine_that_made_them():
    text = (DOCS / "from-recipe-to-gauntlet.ipynb").read_text(encoding="utf-8")
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    counts = [cell["execution_count"] for cell in cells]
    assert counts == list(range(1, len(cells) + 1)), "run python benchmarks/notebook.py"
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert all(output["output_type"] in ("stream", "execute_result") for output in outputs)
    assert all(output.get("name") != "stderr" for output in outputs)
    assert any("<svg" in "".join(output.get("data", {}).get("text/html", "")) for output in outputs)
    assert not re.search(r'[" ](/home|/root|/tmp|/usr|/opt|C:\\)', text)


def test_it_builds_strictly(tmp_path):
    for package in ("mkdocs", "material", "mkdocs_jupyter"):
        pytest.importorskip(package, reason=f"{package} is missing: pip install -e '.[docs]'", exc_type=ImportError)
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(build, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "WARNING" not in done.stderr
    for page in ("index.html", "tasks/index.html", "from-recipe-to-gauntlet/index.html"):
        assert "<h1" in (tmp_path / "site" / page).read_text(encoding="utf-8")
