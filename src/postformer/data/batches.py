"""Batches of byte windows that depend on (seed, step) only, evaluation without overlap, and document packing.

Since no generator is carried along, a run resumed at any step sees exactly the bytes that it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from postformer.contract.context import DOCUMENT, NONE
from postformer.data.codec import encode
from postformer.data.errors import CorpusError


class Batches:
    """Windows of one split of a corpus.

    Args:
        data: [N] uint8, for instance `corpus.train`.
        length: T, how many tokens are predicted in each row; windows hold one more.
        batch_size: B, rows.
        seed: of the random windows; windows of different seeds have nothing to do with each other.
        documents: offsets in `data` at which documents begin, for instance `corpus.documents["train"]`; needed for
            `packed` only.

    Raises:
        CorpusError: the split is shorter than one window.
        ValueError: a length, batch size or seed out of range.
    """

    def __init__(
        self, data: np.ndarray, length: int, batch_size: int, seed: int = 0, documents: np.ndarray | None = None
    ) -> None:
        if length < 1 or batch_size < 1:
            raise ValueError(f"length is {length} and batch_size {batch_size}; both must be at least 1")
        if not 0 <= seed < 2**128:
            raise ValueError(f"seed is {seed}; give one of 0..2**128 - 1")
        if data.ndim != 1 or data.dtype != np.uint8:
            raise ValueError(f"data is {data.dtype} {data.shape}; pass one split of a corpus, a flat uint8 array")
        if len(data) < length + 1:
            raise CorpusError(
                f"this split has {len(data):,} bytes and one sequence of length {length:,} needs {length + 1:,}; "
                f"use a length of at most {max(len(data) - 1, 0):,}, or a larger corpus"
            )
        self.data, self.length, self.batch_size, self.seed = data, length, batch_size, seed
        self.documents = None if documents is None else np.asarray(documents, dtype=np.int64)

    def at(self, step: int) -> Tensor:
        """[B, T + 1] int64 tokens of training step `step` (from 0): uniformly random windows.

        Inputs are `[:, :-1]`, targets `[:, 1:]`. The same (data, length, batch_size, seed, step) gives the same
        tokens in any process, in any order of calls.
        """
        return self._gather(self._positions(step))

    def packed(self, step: int) -> tuple[Tensor, Tensor]:
        """The tokens of `at(step)` and their boundary [B, T + 1] int8: DOCUMENT before a document's first byte."""
        if self.documents is None:
            raise ValueError("packed() needs to know where documents begin; pass documents=corpus.documents['train']")
        positions = self._positions(step)
        nearest = np.searchsorted(self.documents, positions, side="right") - 1
        begins = (nearest >= 0) & (self.documents[np.maximum(nearest, 0)] == positions)
        return self._gather(positions), torch.from_numpy(np.where(begins, DOCUMENT, NONE).astype(np.int8))

    def __iter__(self) -> Iterator[Tensor]:
        """Training batches from step 0, without end."""
        step = 0
        while True:
            yield self.at(step)
            step += 1

    @property
    def scored(self) -> int:
        """How many bytes `sequential` scores: all but the first."""
        return len(self.data) - 1

    def sequential(self) -> Iterator[tuple[Tensor, int]]:
        """The whole split in order, for evaluation: (tokens [b, t + 1], number of bytes scored = b * t).

        Each byte but the first is a target exactly once: windows overlap in the one byte that is the last target of
        one and the first input of the next. b is the batch size but in the last full batch, t is the length but in the
        very last batch, one row with what remains. The counts add up to `scored`; bits per byte is the total loss in
        nats over (`scored` * ln 2).
        """
        rows, rest = divmod(self.scored, self.length)
        window = np.arange(self.length + 1)
        for row in range(0, rows, self.batch_size):
            starts = np.arange(row, min(row + self.batch_size, rows)) * self.length
            yield self._gather(starts[:, None] + window), len(starts) * self.length
        if rest:
            yield self._gather(np.arange(rows * self.length, len(self.data))[None]), rest

    def _positions(self, step: int) -> np.ndarray:
        if step < 0:
            raise ValueError(f"step is {step}; steps count from 0")
        # A counter-based bit generator is a function of key and counter; raw bits, unlike numpy's distributions, are
        # the same in every version. The remainder favours no window by more than N / 2**64.
        bits = np.random.Philox(key=self.seed, counter=step << 128).random_raw(self.batch_size)
        starts = (bits % np.uint64(len(self.data) - self.length)).astype(np.int64)
        return starts[:, None] + np.arange(self.length + 1)

    def _gather(self, positions: np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(self.data[positions]).astype(np.int64))


def pack(documents: Sequence[Tensor | bytes | str], length: int) -> tuple[Tensor, Tensor]:
    """Documents laid end to end and cut into rows, with the places where they begin.

    Args:
        documents: tokens [n] each, or bytes or text, which are encoded; empty ones are left out.
        length: tokens in a row; give one more than the model's length to have targets for every input.

    Returns:
        tokens [rows, length] int64 and boundary [rows, length] int8, DOCUMENT before a document's first token and NONE
        elsewhere. A document that does not end with its row goes on in the next one, which then begins with NONE. What
        does not fill the last row is left out (fewer than `length` tokens).

    Raises:
        CorpusError: the documents do not fill one row.
    """
    if length < 1:
        raise ValueError(f"length is {length}; it must be at least 1")
    parts = [encode(document) if isinstance(document, str | bytes) else document for document in documents]
    for part in parts:
        if part.ndim != 1:
            raise ValueError(f"a document has the shape {tuple(part.shape)}; each must be one row of tokens [n]")
    parts = [part.long() for part in parts if len(part)]
    total = sum(map(len, parts))
    if total < length:
        raise CorpusError(
            f"the documents have {total:,} tokens and one row needs {length:,}; use a shorter length or more documents"
        )
    boundary = torch.full((total,), NONE, dtype=torch.int8)
    starts = np.cumsum([0] + [len(part) for part in parts])[:-1]
    boundary[torch.from_numpy(starts)] = DOCUMENT
    rows = total // length
    return torch.cat(parts)[: rows * length].view(rows, length), boundary[: rows * length].view(rows, length)
