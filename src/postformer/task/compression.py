"""Compression of MAD (arXiv 2403.17844): the state after a row must hold every token of it.

    x1 x2 ... x(T-1) >          targets x1 x2 ... x(T-1), all from the hidden state at ">"

The model reads T - 1 random tokens and a compression token. Its hidden state at the last position is all that is kept;
a decoder of two layers, not wider than the model, sees that and the sines and cosines of a position (1706.03762), and
names the token that stood there. The model stays causal; it is an encoder here, not a predictor.

Departures: the decoder's output is named by the model's own head (MAD has one for this task alone), and the
compression token is not asked. MAD's accuracy is averaged over classes (macro); ours is over tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from postformer.contract.context import EMPTY, Context
from postformer.layers.norm import RMSNorm
from postformer.layers.rotary import sinusoidal
from postformer.model.site import Role
from postformer.task.base import IGNORE, Setting, Task, TaskBatch, TaskError, is_count, protocol, seeded
from postformer.task.draw import expected_mode, integers
from postformer.task.registry import register


@register
class Compression(Task):
    """Compression. A setting is T: the number of tokens, of which the last is the compression token.

    Args:
        vocab: all ids, at least 3; the last is the compression token.
        train: the training length or lengths (a mixture, one length a batch).
        evaluate: the evaluation lengths; those longer than every training length count as outside. None: the training
            lengths, and twice the longest.

    A model is trained inside `Reader` (see `around`). Raises TaskError for a length below 2.
    """

    name = "compression"
    unit = "tokens"

    def __init__(
        self, vocab: int = 16, train: int | Sequence[int] = (8, 16), evaluate: int | Sequence[int] | None = None
    ) -> None:
        if not is_count(vocab) or vocab < 3:
            raise TaskError(f"task {self.name}: vocab is {vocab!r}; at least 3 ids are needed, two of them to compress")
        self.vocab = vocab
        self.answers = (0, vocab - 1)
        self.difficulties = protocol(self, train, evaluate, lambda length: [2 * length], 16)

    def describe(self) -> str:
        return (
            f"Name all tokens of a row ({self.vocab - 1} kinds) from the last hidden state alone (compression of MAD, "
            "arXiv 2403.17844)."
        )

    def chance(self, setting: Setting) -> float:
        """A uniform guess among the tokens to compress."""
        return 1 / (self.vocab - 1)

    def shortcut(self, setting: Setting) -> float:
        """The row's most frequent token everywhere: remembers what was there, but not where."""
        self.check(setting)
        return expected_mode(setting - 1, self.vocab - 1)  # type: ignore[operator]

    def check(self, setting: Setting) -> None:
        if not is_count(setting) or setting == 1:
            raise TaskError(f"task {self.name}: a setting is a length of at least 2, for instance 16; got {setting!r}")

    def around(self, model: nn.Module) -> Reader:
        """The model inside a `Reader`. Raises TaskError for a model without hidden states to read."""
        return Reader(model)

    def generate(self, setting: Setting, batch_size: int, generator: torch.Generator) -> TaskBatch:
        length: int = setting  # type: ignore[assignment]
        tokens = integers(0, self.vocab - 1, (batch_size, length), generator)
        targets = tokens.clone()
        tokens[:, -1], targets[:, -1] = self.vocab - 1, IGNORE
        return TaskBatch(tokens, targets)


class Reading(NamedTuple):
    logits: Tensor
    """[B, T, vocab], or [N, vocab] for the selected positions"""
    losses: Mapping[str, Tensor] = EMPTY
    measured: Mapping[str, Tensor] = EMPTY


class Reader(nn.Module):
    """A language model of which only the last hidden state is read: tokens [B, T] -> logits of every position.

    Its own weights are drawn from the model's, so that the same seed gives the same reader. Raises TaskError for a
    model that has no `hidden`, `logits` and `design`, as `postformer.model.LanguageModel` has.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        missing = [name for name in ("hidden", "logits", "design") if not hasattr(model, name)]
        if missing:
            raise TaskError(f"compression reads a model's hidden state, and this {type(model).__name__} has no "
                            f"{' and no '.join(missing)}; give a model that postformer.model.build made")
        self.model: Any = model
        width: int = self.model.design.width
        first = next(model.parameters())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeded("decoder", *first.detach().flatten()[:8].tolist()).initial_seed())
            self.decoder = nn.Sequential(
                RMSNorm(width), nn.Linear(width, width), nn.GELU(),
                RMSNorm(width), nn.Linear(width, width), nn.GELU(), RMSNorm(width),
            ).to(first)

    @property
    def gradient_checkpointing(self) -> bool:
        return self.model.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self.model.gradient_checkpointing = value

    def roles(self) -> dict[str, Role]:
        """How an optimiser shall treat each parameter, by name."""
        inner = self.model.roles() if hasattr(self.model, "roles") else {}
        own = {f"decoder.{name}": Role("matrix", True) if parameter.ndim == 2 else
               Role("bias" if name.endswith("bias") else "norm", False)
               for name, parameter in self.decoder.named_parameters()}
        return {f"model.{name}": role for name, role in inner.items()} | own

    def after_step(self, measured: Mapping[str, Tensor]) -> None:
        """See `LanguageModel.after_step`."""
        self.model.after_step(measured)

    def forward(self, tokens: Tensor, state: None = None, ctx: Context | None = None, *,
                select: Tensor | None = None) -> Reading:
        """tokens [B, T] int64; select [B, T] bool: logits only there, as [N, vocab].

        Raises TaskError for a state: a row is read from its last token, and has no continuation.
        """
        if state is not None:
            raise TaskError("compression reads whole rows; pass all tokens at once, and no state")
        out = self.model.hidden(tokens, ctx)
        kept = out.y[:, -1:]
        position = torch.arange(tokens.shape[1], device=tokens.device)
        x = kept + sinusoidal(position[None], kept.shape[-1], kept.dtype)
        logits = self.model.logits(self.decoder(x if select is None else x[select]))
        return Reading(logits, out.losses, out.measured)
