"""Entries of a tier: designs brought to their size."""

from postformer.design import registry
from postformer.study.entry import tier


def test_without_local_mixing_reaches_mixers_inside_others():
    entry = tier("sprint")["s3"]
    assert not entry.local
    memories = entry.sized("palimpsest").model.mixers["memories"]
    inner = dict(registry.inside(memories, "memories"))
    found = {where: mixer.local.kind for where, mixer in inner.items() if hasattr(mixer, "local")}
    assert found == {"memories.levels.0.of.of": "none", "memories.levels.1.of": "none"}
