"""In-context recall of MAD (arXiv 2403.17844), plain, noisy and fuzzy: every row binds keys to values of its own.

    k3 v3 k1 v1 n n k3 v3 k2 v2 k1 v1 ... k2 v2       target v3 at the second k3, v1 at the second k1, and so on

A row has so many keys, each with a value; its pairs are drawn from them with replacement, and the value is asked
wherever a key has been shown before. The last pair asks one of the keys shown, uniformly. Noise puts tokens of their
own, which mean nothing, in the place of a pair; at least one pair before the last is real. In the fuzzy task keys and
values are motifs: 1 to so many tokens, all different, the number uniform; pairs then have several lengths, so that
rows are padded on their left, and every token of a value is asked, given those before it.

Departures: MAD trains on all next tokens and we on the values asked alone; a row of MAD uses all keys (set `keys` to
as many as there are), and fuzzy keys come from all motifs, so that only short ones come twice, and its test asks the
longest only. MAD's accuracy is averaged over classes (macro); ours is over tokens. MAD has one token fewer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from postformer.task.base import IGNORE, Setting, Task, TaskBatch, TaskError, is_count, protocol
from postformer.task.draw import distinct, integers
from postformer.task.registry import register

MOST_MOTIFS = 20_000


@register
class InContextRecall(Task):
    """In-context recall. A setting is (T, keys): sequence length and number of different keys of a row.

    Args:
        vocab: V, all ids: keys (half of what the others leave), values, noise, and one to pad with if motif > 1.
        noise: how many ids are noise.
        fraction: the probability that a pair is noise.
        motif: the most tokens of a key or a value; above 1 the task is the fuzzy one.
        train: the training setting or settings (a mixture, one setting a batch).
        evaluate: the evaluation settings; those with more keys or tokens than any training setting count as outside.
            None: the training settings, and twice their longest.

    Raises:
        TaskError: options that leave no keys or values or allow no noise, more than 20,000 motifs, or a setting whose
            keys are more than there are or whose length is too short (4 * motif) or odd (where nothing is padded).
    """

    name = "in-context-recall"
    unit = "keys"

    def __init__(
        self,
        vocab: int = 16,
        noise: int = 0,
        fraction: float = 0.0,
        motif: int = 1,
        train: Setting | Sequence[Setting] = ((64, 4), (64, 8)),
        evaluate: Setting | Sequence[Setting] | None = None,
    ) -> None:
        self.name = "fuzzy-recall" if motif != 1 else "noisy-recall" if fraction else "in-context-recall"
        if not is_count(motif):
            raise TaskError(f"task {self.name}: motif is {motif!r}; give the most tokens of a key, 3 as published")
        if not (is_count(noise) or noise == 0) or not 0 <= fraction < 1 or bool(noise) != bool(fraction):
            raise TaskError(
                f"task {self.name}: noise is {noise!r} and fraction {fraction!r}; give a number of noise tokens and a "
                "fraction of noise below 1, for instance 16 and 0.2, or 0 and 0 for none"
            )
        least = noise + 2 * motif + (motif > 1)
        if not is_count(vocab) or vocab < least:
            raise TaskError(
                f"task {self.name}: vocab is {vocab!r}; at least {least} are needed with noise={noise} and "
                f"motif={motif}"
            )
        self.vocab, self.noise, self.fraction, self.motif = vocab, noise, fraction, motif
        meaning = vocab - noise - (motif > 1)
        self.answers = (meaning // 2, meaning)
        number = sum(math.perm(meaning // 2, size) for size in range(1, motif + 1))
        if number > MOST_MOTIFS:
            raise TaskError(
                f"task {self.name}: {meaning // 2} key tokens make {number} motifs of up to {motif}, more than "
                f"{MOST_MOTIFS}; use a smaller vocabulary or shorter motifs"
            )
        motifs = [m for size in range(1, motif + 1) for m in itertools.permutations(range(meaning // 2), size)]
        self._size = torch.tensor([len(m) for m in motifs])
        self._motifs = torch.tensor([m + (0,) * (motif - len(m)) for m in motifs])
        # Sizes are alike, and then the motifs of one size.
        self._weights = 1 / self._size.bincount()[self._size].double()
        self.difficulties = protocol(self, train, evaluate, lambda length, keys: [(2 * length, keys)], (64, 4))

    def describe(self) -> str:
        fuzzy = f", which have 1 to {self.motif} tokens" if self.motif > 1 else ""
        noisy = f", with noise in {self.fraction:.0%} of the places" if self.fraction else ""
        return f"Recall the values of keys shown before in the row{fuzzy}{noisy} (MAD, arXiv 2403.17844)."

    def chance(self, setting: Setting) -> float:
        """A uniform guess among the value tokens."""
        low, high = self.answers  # type: ignore[misc]
        return 1 / (high - low)

    def shortcut(self, setting: Setting) -> float:
        """The value of a key drawn uniformly from the row's: remembers what was there, not what was bound to what."""
        self.check(setting)
        keys: int = setting[1]  # type: ignore[index]
        return 1 / keys + (1 - 1 / keys) * self.chance(setting)

    def check(self, setting: Setting) -> None:
        if not (isinstance(setting, tuple) and len(setting) == 2 and all(map(is_count, setting))):
            raise TaskError(
                f"task {self.name}: a setting is (length, keys), two integers of at least 1, for instance (64, 4); "
                f"got {setting!r}"
            )
        length, keys = setting
        if length < 4 * self.motif or (self.motif == 1 and length % 2):
            even = "even and " if self.motif == 1 else ""
            raise TaskError(
                f"task {self.name}: a pair and its question do not fit a length of {length}; the length must be {even}"
                f"at least {4 * self.motif}"
            )
        if keys > len(self._motifs):
            raise TaskError(
                f"task {self.name}: {keys} keys are more than the {len(self._motifs)} of a vocabulary of {self.vocab}; "
                "use a larger vocab or fewer keys"
            )

    def generate(self, setting: Setting, batch_size: int, generator: torch.Generator) -> TaskBatch:
        length, keys = setting  # type: ignore[misc]
        device = generator.device
        text, key_size, size = self._pairs(keys, batch_size, generator)

        # Pieces: as many pairs as could fit, which of the row's pairs each is, and which are noise.
        number = length // 2 - 1
        which = integers(0, keys, (batch_size, number), generator)
        real = torch.rand(batch_size, number, generator=generator, device=device) >= self.fraction
        surely = (length - 2 * self.motif) // (2 * self.motif)  # so many pieces fit, whatever their sizes
        real.scatter_(1, integers(0, surely, (batch_size, 1), generator), True)
        fits = size.gather(1, which).cumsum(1) <= length - 2 * self.motif
        real &= fits
        order = torch.arange(number, device=device).expand(batch_size, -1)
        first = torch.full((batch_size, keys), number, device=device)
        first = first.scatter_reduce(1, which, torch.where(real, order, number), "amin")
        asked = real & (order > first.gather(1, which))
        # The last piece asks one of those shown.
        last = torch.multinomial((first < number).double(), 1, generator=generator)
        which, fits, real, asked = (
            torch.cat([body, end], 1)
            for body, end in ((which, last), *((mask, torch.ones_like(last, dtype=torch.bool))
                                               for mask in (fits, real, asked)))
        )

        # Where each token of each piece goes; what does not fit goes to a place that is cut off.
        sizes = size.gather(1, which) * fits
        end = sizes.cumsum(1)
        start = length - end[:, -1:] + end - sizes
        index = torch.arange(2 * self.motif, device=device)
        place = torch.where(index < sizes[..., None], start[..., None] + index, length).flatten(1)
        tokens = text.gather(1, which[..., None].expand(-1, -1, 2 * self.motif))
        if self.noise:
            low = self.answers[1]  # type: ignore[index]
            tokens = torch.where(real[..., None], tokens, integers(low, low + self.noise, tokens.shape, generator))
        value = index >= key_size.gather(1, which)[..., None]
        targets = torch.where(asked[..., None] & value, tokens, IGNORE)

        def laid(pieces: Tensor, blank: int, shift: int) -> Tensor:
            row = torch.full((batch_size, length + 1), blank, device=device)
            row.scatter_(1, place, pieces.flatten(1))
            return row[:, :-1].roll(-shift, 1)

        # A token is asked at the one before it; the first of a row is never asked, so that none goes round.
        return TaskBatch(laid(tokens, self.vocab - 1, 0), laid(targets, IGNORE, 1))

    def _pairs(self, keys: int, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """The pairs of each row: tokens [rows, keys, 2 * motif] with the key first, and the sizes [rows, keys] of the
        key and of both together; what lies beyond them means nothing."""
        device, (low, high) = generator.device, self.answers  # type: ignore[misc]
        drawn = distinct(self._weights, rows, keys, generator)
        key, key_size = self._motifs.to(device)[drawn], self._size.to(device)[drawn]
        value_size = integers(1, self.motif + 1, (rows, keys), generator)
        value = low + distinct(high - low, rows * keys, self.motif, generator).view(rows, keys, self.motif)
        index = torch.arange(2 * self.motif, device=device)
        after = (index - key_size[..., None]).clamp(0, self.motif - 1)
        key = key.gather(2, index.clamp(max=self.motif - 1).expand(rows, keys, -1))
        return torch.where(index < key_size[..., None], key, value.gather(2, after)), key_size, key_size + value_size


register("noisy-recall")(partial(InContextRecall, vocab=32, noise=16, fraction=0.2))
register("fuzzy-recall")(partial(InContextRecall, motif=3, train=((64, 2), (64, 4))))
