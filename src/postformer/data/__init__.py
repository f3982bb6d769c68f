"""Data: bytes as tokens, named corpora, batches that depend on the step only, document packing.

from postformer import data

corpus = data.load_corpus("stdlib")
batches = data.Batches(corpus.train, length=256, batch_size=32, seed=0)
tokens = batches.at(step)                       # [32, 257]: inputs [:, :-1], targets [:, 1:]
for tokens, scored in data.Batches(corpus.validation, 256, 32).sequential(): ...
"""

from postformer.data.batches import Batches, pack
from postformer.data.cache import cache_dir
from postformer.data.codec import VOCAB, decode, encode
from postformer.data.corpus import Corpus, load_corpus
from postformer.data.errors import CorpusError, CorpusWarning

__all__ = [
    "VOCAB",
    "Batches",
    "Corpus",
    "CorpusError",
    "CorpusWarning",
    "cache_dir",
    "decode",
    "encode",
    "load_corpus",
    "pack",
]
