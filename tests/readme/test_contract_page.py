"""docs/contract.md: its memory keeps the contract, its mistake is found, and it names every check."""

import re
from pathlib import Path

import pytest

from postformer.contract.context import Context
from postformer.contract.mixer import Out, Traits
from postformer.design import registry
from postformer.verify import verify
from postformer.verify.check import CHECKS

PAGE = (Path(__file__).parents[2] / "docs" / "contract.md").read_text(encoding="utf-8")
CLASS, BY_HAND, MISTAKE = re.findall(r"```python\n(.*?)```", PAGE, re.S)
RECIPE = {"version": 1, "name": "mean", "model": {
    "width": 64, "memory": {"kind": "mean"}, "feedforward": {"kind": "swiglu"}, "num_layers": 2}}


@pytest.fixture(autouse=True)
def _forgotten():
    yield
    registry._classes.pop("mean", None)


def test_the_example_keeps_the_contract():
    exec(CLASS + BY_HAND, {})
    results = verify(RECIPE).results
    assert len(results) == len(CHECKS)
    assert all(r.passed for r in results), [r for r in results if not r.passed]


def test_the_mistake_is_found_by_the_checks_that_the_page_names():
    right = re.search(r"^ +(write = .*)$", CLASS, re.M)[1]
    exec(CLASS.replace(right, MISTAKE.strip()), {})
    (shown,) = re.findall(r"```text\n(FAIL.*?)```", PAGE, re.S)
    assert shown.splitlines() == [f"FAIL {r.name}" for r in verify(RECIPE).results if r.passed is False]


def test_it_names_everything():
    for item in CHECKS:
        assert f"| {item.name} |" in PAGE
    for names in (Traits.__dataclass_fields__, Out._fields, set(Context.__dataclass_fields__)):
        for name in names:
            assert re.search(rf"^\| .*`{name}`", PAGE, re.M), name
