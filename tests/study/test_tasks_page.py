"""docs/tasks.md is what benchmarks/tasks_table.py writes today, and says of every entry what its task says."""

import importlib.util
import re
from pathlib import Path

import pytest

from postformer.study.entry import tier

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def table():
    spec = importlib.util.spec_from_file_location("tasks_table", ROOT / "benchmarks" / "tasks_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current(table):
    assert table.PAGE.read_text(encoding="utf-8") == table.page(), "run python benchmarks/tasks_table.py"


@pytest.mark.parametrize("key", tier("standard"))
def test_a_row_leaves_nothing_out(table, key):
    entry = tier("standard")[key]
    cells = [cell.strip() for cell in table.row(entry).replace("\\|", "/").strip("|").split("|")]
    assert len(cells) == 8
    task = entry.make()
    inside = (task.difficulties.inside or task.difficulties.evaluate)[0]
    assert float(cells[4]) == pytest.approx(task.chance(inside), rel=0.1)
    assert float(cells[5]) == pytest.approx(task.shortcut(inside), rel=0.1)
    assert cells[6] == "–" if entry.learned is None else cells[6].startswith(f"{entry.learned.recipe}, ")
    assert "arXiv" not in cells[1], "the papers have a column of their own"
    papers = re.findall(r"\[(\d{4}\.\d{5})\]\(https://arxiv.org/abs/\1\)", cells[7])
    assert papers == re.findall(r"\d{4}\.\d{5}", task.describe()) != []
