"""Narrower heads: more of them, everything else as it was."""

import pytest

from postformer.design import load, names
from postformer.design.loading import narrow_heads


@pytest.mark.parametrize("name", names())
def test_narrow_heads_keep_the_value_channels(name):
    """Heads times their size stay, keys shared by all heads stay, and the recipe still builds small."""
    before, after = load(name).model.mixers, narrow_heads(load(name), 16).model.mixers
    for key, mixer in before.items():
        old, new = getattr(mixer, "heads", None), getattr(after[key], "heads", None)
        if hasattr(old, "value") and old.dim_value:
            assert new.value * new.dim_value == old.value * old.dim_value
            assert new.dim_value == min(16, old.dim_value)
            if old.key == 1:
                assert (new.key, new.dim_key) == (1, old.dim_key)
        if hasattr(old, "query") and old.dim:
            assert (new.query * new.dim, new.dim) == (old.query * old.dim, min(16, old.dim))


def test_a_narrow_recipe_scales_to_several_heads():
    small = load(narrow_heads(load("gated-deltanet"), 16), width=32, layers=2)
    assert (small.model.mixers["memory"].heads.value, small.model.mixers["memory"].heads.dim_key) == (2, 16)
    assert load(narrow_heads(load("gated-deltanet"), 64)).id == load("gated-deltanet").id
