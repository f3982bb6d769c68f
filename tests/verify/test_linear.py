"""Designs whose maps round, or hold frozen weights, are verified like any other: no check is left out for it."""

import pytest

from postformer.design import load
from postformer.verify import verify
from postformer.verify.check import CHECKS


@pytest.mark.parametrize(("name", "linear"), [
    ("transformer", "{projection: ternary}"), ("transformer", "{projection: lora}"),
    # whose maps often read whole numbers of one unit, so that halves are to be rounded
    ("rwkv7", "{projection: ternary, gate: ternary}"), ("kda", "{projection: ternary, gate: ternary}"),
])
def test_ternary_and_low_rank_designs_keep_the_contract(name, linear):
    found = verify(load(name, [f"model.linear={linear}"]))
    assert [(r.name, r.value, r.note) for r in found.results if r.passed is False] == []
    assert [r.name for r in found.results if r.passed is None] == [
        r.name for r in verify(name).results if r.passed is None]
    assert len(found.results) == len(CHECKS)
    said = [r.name.split(":")[0] for r in found.results if "maps unrounded" in r.note]
    assert len(said) == (2 if "ternary" in linear else 0)
