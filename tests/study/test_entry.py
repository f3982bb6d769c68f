"""Entries of a tier: designs brought to their size."""

from postformer.design import registry
from postformer.study.entry import tier


def test_without_local_mixing_reaches_mixers_inside_others():
    entry = tier("sprint")["s3"]
    assert not entry.local
    remember = entry.sized("palimpsest").model.mixers["remember"]
    found = {where: mixer.local.kind for where, mixer in registry.inside(remember, "remember")}
    assert found == {"remember.of": "none"}
