"""Real text: the next byte of a corpus, and how much better a model predicts what the window has already said.

Bits per byte are the mean of -log2 p(byte). A model that has no idea has 8, one that knows how often each byte occurs
has the unigram entropy. Recall perplexity splits that mean in two (Zoology, arXiv 2312.04927; Based, 2402.18668): a
position is a *hit* if its byte, with the bytes just before it, completes a sequence that stood in the window before,
so that it could have been recalled; the rest must be known or guessed.

Limits: a window is predicted from its own bytes only, so the figures of short windows lie above those that a model has
on whole documents.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from postformer.data import VOCAB, Corpus, CorpusError, load_corpus
from postformer.task.base import Setting, Task, TaskBatch, TaskError, is_count, protocol, seeded
from postformer.task.registry import register

MAX_ORDER = 6
"""So many bytes and one more fit an int64."""


class _Stock:
    """A corpus that is read when it is first needed, and what is counted in it, for a task and all its splits."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.counted: dict[int, tuple[Tensor, Tensor]] = {}

    @cached_property
    def corpus(self) -> Corpus:
        try:
            return load_corpus(self.name)
        except CorpusError as error:
            raise TaskError(str(error)) from error

    def counts(self, length: int) -> tuple[Tensor, Tensor]:
        """(codes, counts): the sequences of so many bytes in the training split, ascending, and how often."""
        if length not in self.counted:
            codes, counts = np.unique(_codes(torch.from_numpy(np.array(self.corpus.train)), length), return_counts=True)
            self.counted[length] = torch.from_numpy(codes), torch.from_numpy(counts)
        return self.counted[length]


def _codes(tokens: Tensor, length: int) -> Tensor:
    """[..., T] bytes -> [..., T - length + 1] int64, one number for each sequence of `length` bytes."""
    last = tokens.shape[-1] - length + 1
    codes = torch.zeros_like(tokens[..., :last], dtype=torch.int64)
    for i in range(length):
        codes = codes * VOCAB + tokens[..., i : last + i]
    return codes


@register
class Bytes(Task):
    """Next-byte prediction on windows of a corpus. A setting is the window's length, in bytes predicted.

    Args:
        corpus: as for `postformer.data.load_corpus`: stdlib, enwik8, a file or a directory. It is read on first use.
        train: the training length or lengths (a mixture, one length a batch).
        evaluate: the evaluation lengths; those longer than every training length count as outside. None: those of
            training, then twice and four times the longest.

    `on(split)` draws windows from that split; a task just made draws from the training split. `measure` adds
    `bits_per_byte`.

    Raises:
        TaskError: a corpus that cannot be loaded, or a split shorter than one window.
    """

    name = "bytes"
    vocab = VOCAB
    metric = "bits_per_byte"
    better = "lower"
    unit = "bytes"

    def __init__(
        self, corpus: str = "stdlib", train: int | Sequence[int] = 128, evaluate: int | Sequence[int] | None = None
    ) -> None:
        self.stock, self.split = _Stock(corpus), "train"
        self.difficulties = protocol(self, train, evaluate, lambda longest: (2 * longest, 4 * longest), 128)

    def describe(self) -> str:
        return (
            f"Predict every next byte of windows of the corpus {self.stock.name}, in bits per byte "
            "(byte-level models: arXiv 2401.13660)."
        )

    def chance(self, setting: Setting) -> float:
        """Uniform logits over 256 bytes; drawing bytes with `guess` gives no probabilities to be scored by."""
        return math.log2(VOCAB)

    def shortcut(self, setting: Setting) -> float:
        """The entropy of single bytes in the training split: knows how often each occurs, and looks at nothing."""
        self.check(setting)
        p = self.unigram
        return float(-(p * p.clamp_min(1e-300).log2()).sum())

    @property
    def unigram(self) -> Tensor:
        """[256] float64: how often each byte occurs in the training split."""
        codes, counts = self.stock.counts(1)
        return torch.zeros(VOCAB, dtype=torch.float64).index_put((codes,), counts.double() / counts.sum())

    def on(self, split: str) -> Bytes:
        if split not in ("train", "validation", "test"):
            raise TaskError(f"task {self.name}: there is no split {split!r}; there are train, validation and test")
        other = copy.copy(self)
        other.split = split
        return other

    def check(self, setting: Setting) -> None:
        if not is_count(setting):
            raise TaskError(f"task {self.name}: a setting is a length of at least 1, for instance 128; got {setting!r}")

    def generate(self, setting: Setting, batch_size: int, generator: torch.Generator) -> TaskBatch:
        data, length = self.stock.corpus.split(self.split), int(setting)  # type: ignore[arg-type]
        if len(data) <= length:
            raise TaskError(
                f"task {self.name}: the {self.split} split of {self.stock.name} has {len(data)} bytes and a window of "
                f"{length} needs one more than that; use at most {len(data) - 1}, or a larger corpus"
            )
        starts = torch.randint(len(data) - length, (batch_size, 1), generator=generator, device=generator.device)
        places = starts.cpu().numpy() + np.arange(length + 1)
        window = torch.from_numpy(data[places].astype(np.int64)).to(generator.device)
        return TaskBatch(window[:, :-1], window[:, 1:])

    def measure(self, logits: Tensor, batch: TaskBatch) -> dict[str, float]:
        return super().measure(logits, batch) | {"bits_per_byte": self.bits(logits, batch).mean().item()}

    @staticmethod
    def bits(logits: Tensor, batch: TaskBatch) -> Tensor:
        """[N] float64: -log2 p of every scored byte, for logits [N, 256]."""
        return F.cross_entropy(logits.float(), batch.targets[batch.scored], reduction="none").double() / math.log(2)


@register
class RecallPerplexity(Bytes):
    """Next-byte prediction, scored where the byte could have been recalled from earlier in the window.

    A position is a hit if the `order` bytes before its target, and the target, stood together in the window before.
    With words as tokens one is enough, and published figures use it; nearly half of all bytes complete a pair that
    their window of 128 has shown, mostly by chance. With four, about a word's beginning, 22 % do (stdlib; 30 % in
    windows of 256, 36 % of 512).

    Args:
        corpus, train, evaluate: as for `Bytes`.
        order: how many bytes before the target must match, 1 to 6.
        rare: count as hits only sequences (context and target) that occur at most so often in the training split, so
            that they cannot just be known; None: all. Counting takes seconds, once per object.

    `measure` adds, of one batch: `hit_bits` and `rest_bits`, the bits per byte of both, their perplexities
    `hit_perplexity` and `rest_perplexity` (2 to the bits; of the mean over batches take 2 to the mean of the bits),
    and `hit_share`, the fraction of positions that are hits.

    Raises:
        TaskError: as `Bytes`; and in `measure`, a batch without a hit or with nothing else.
    """

    name = "recall-perplexity"
    metric = "hit_bits"

    def __init__(
        self, corpus: str = "stdlib", train: int | Sequence[int] = 128, evaluate: int | Sequence[int] | None = None,
        order: int = 4, rare: int | None = None,
    ) -> None:
        super().__init__(corpus, train, evaluate)
        if not is_count(order) or order > MAX_ORDER:
            raise TaskError(f"task {self.name}: order is {order!r}; give 1 to {MAX_ORDER} bytes of context")
        if rare is not None and not is_count(rare):
            raise TaskError(f"task {self.name}: rare is {rare!r}; give the largest count in training, or None for all")
        self.order, self.rare = order, rare
        self._shortcuts: dict[Setting, float] = {}

    def describe(self) -> str:
        rare = "" if self.rare is None else f", and is seen at most {self.rare} times in training"
        return (
            f"Predict the bytes of the corpus {self.stock.name} that complete a sequence of {self.order + 1} bytes "
            f"which the window has shown before{rare} (recall perplexity, arXiv 2312.04927, 2402.18668)."
        )

    def shortcut(self, setting: Setting) -> float:
        """Bits on hits of how often each byte occurs in the training split, on 256 of its windows."""
        if setting not in self._shortcuts:
            batch = self.on("train").batch(setting, 256, seeded("shortcut"))
            logits = self.unigram.clamp_min(1e-300).log().expand(batch.targets.numel(), -1)
            # Where frequent bytes are rare among the hits, the frequencies are worse than no idea.
            self._shortcuts[setting] = min(self.measure(logits, batch)[self.metric], self.chance(setting))
        return self._shortcuts[setting]

    def hits(self, batch: TaskBatch) -> Tensor:
        """[B, T] bool: which targets complete a sequence that the row has shown before."""
        window = torch.cat([batch.tokens[:, :1], batch.targets], 1)
        found = torch.zeros_like(batch.scored)
        if window.shape[1] <= self.order:
            return found
        codes = _codes(window, self.order + 1)
        ordered, index = codes.sort(dim=1, stable=True)
        again = torch.zeros_like(codes, dtype=torch.bool)
        again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
        found[:, self.order - 1 :] = torch.zeros_like(again).scatter(1, index, again)
        if self.rare is not None:
            found[:, self.order - 1 :] &= self._frequency(codes) <= self.rare
        return found

    def _frequency(self, codes: Tensor) -> Tensor:
        """How often each sequence occurs in the training split."""
        known, counts = (part.to(codes.device) for part in self.stock.counts(self.order + 1))
        place = torch.searchsorted(known, codes).clamp_max(len(known) - 1)
        return torch.where(known[place] == codes, counts[place], 0)

    def measure(self, logits: Tensor, batch: TaskBatch) -> dict[str, float]:
        hit = self.hits(batch)[batch.scored]
        share = hit.double().mean().item()
        if share in (0.0, 1.0):
            what = "no position" if share == 0 else "every position"
            raise TaskError(
                f"task {self.name}: {what} of this batch is a hit, so that there is nothing to compare; use more or "
                f"longer windows, or {'a smaller' if share == 0 else 'a larger'} order (now {self.order})"
                + ("" if self.rare is None else f", or a larger rare (now {self.rare})")
            )
        bits = self.bits(logits, batch)
        found = {"hit_bits": bits[hit].mean().item(), "rest_bits": bits[~hit].mean().item(), "hit_share": share}
        found |= {f"{part}_perplexity": 2 ** found[f"{part}_bits"] for part in ("hit", "rest")}
        return super().measure(logits, batch) | found
