"""The language model: embedding, stack, head, and the state that generation carries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from postformer.contract.context import EMPTY, Context, extended, placed
from postformer.contract.mixer import Mixer, Out
from postformer.contract.state import State
from postformer.design.grammar import Model
from postformer.layers.norm import make_norm
from postformer.layers.rotary import sinusoidal
from postformer.model.site import Ledger, Role
from postformer.model.stack import Stack


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode inside a `with` block, and in its own after it."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class LMState(NamedTuple):
    stack: State
    next: Tensor
    """[B] int64: position of the next token in its document"""


class LMOutput(NamedTuple):
    logits: Tensor
    """[B, T, vocab], or [N, vocab] for the selected tokens"""
    state: LMState
    losses: Mapping[str, Tensor] = EMPTY
    emitted: State = None
    published: Mapping[str, Any] = EMPTY
    measured: Mapping[str, Tensor] = EMPTY
    """By the place in the stack: "LAYER.SUBLAYER.NAME", with a composite's "of.INDEX" between"""


class LanguageModel(nn.Module):
    """Tokens [B, T] -> logits. Any split of the tokens, with the state carried, gives the same logits."""

    def __init__(self, design: Model) -> None:
        super().__init__()
        self.design = design
        ledger = Ledger()
        self.embedding = nn.Embedding(design.vocab, design.width)
        nn.init.normal_(self.embedding.weight, 0, design.width**-0.5)
        self.embedding_norm = make_norm(design.embedding.norm, design.width)
        self.stack = Stack(design, ledger)
        self.head = None if design.embedding.tie else nn.Linear(design.width, design.vocab, bias=False)
        if self.head is not None:
            nn.init.normal_(self.head.weight, 0, design.width**-0.5)
        scale = design.embedding.scale
        self.scale = float(design.width**0.5 if scale == "sqrt-width" else scale)
        self._roles = {name: ledger.roles.get(id(p)) for name, p in self.named_parameters()}
        self._outs = {name: ledger.outs[made] for name, made in self.named_modules() if made in ledger.outs}
        self._tied = {f"stack.tied.{key}": called for key, called in ledger.called.items()}

    @property
    def gradient_checkpointing(self) -> bool:
        return self.stack.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self.stack.gradient_checkpointing = value

    def roles(self) -> dict[str, Role]:
        """How an optimiser shall treat each parameter, by name."""
        found = {}
        for name, made in self._roles.items():
            fallback = Role("embedding", False) if name.startswith("embedding.") else \
                Role("head", True) if name.startswith("head.") else Role("norm", False)
            found[name] = made or fallback
        return found

    def outs(self) -> dict[str, str]:
        """The maps that sites made as `out`, in the order of the modules: module's name -> path of the site."""
        return dict(self._outs)

    def tied(self) -> dict[str, tuple[str, str]]:
        """The stack's own parameters: name -> (`identity` of the mixer whose uses share it, its name there)."""
        return dict(self._tied)

    def initial(self, batch: int) -> LMState:
        """The state before the first token."""
        device = self.embedding.weight.device
        return LMState(self.stack.initial(batch), torch.zeros(batch, dtype=torch.long, device=device))

    def forward(self, tokens: Tensor, state: LMState | None = None, ctx: Context | None = None, *,
                select: Tensor | None = None) -> LMOutput:
        """tokens [B, T] int64; select [B, T] bool: logits only there, as [N, vocab]. Positions are set here."""
        out, state = self.run(self.embed(tokens), state, ctx, tokens)
        logits = self.logits(out.y if select is None else out.y[select])
        return LMOutput(logits, state, out.losses, out.emitted, out.published, out.measured)

    def hidden(self, tokens: Tensor, ctx: Context | None = None, *, select: Tensor | None = None) -> Out:
        """Out whose y [B, T, width] or [N, width] is what `logits` takes: for logits taken in parts."""
        out, _ = self.run(self.embed(tokens), None, ctx, tokens)
        return out if select is None else out._replace(y=out.y[select])

    def mixer_at(self, path: str) -> Mixer:
        """The mixer that measured, or lost, what the model's output calls "PATH.NAME"."""
        found: Any = self.stack
        for name in path.split("."):
            found = found.part(name) if isinstance(found, Mixer) else getattr(found, name)
        return found

    @torch.no_grad()
    def after_step(self, measured: Mapping[str, Tensor]) -> None:
        """Hand every mixer the sums of what it measured in the calls of one optimiser step."""
        sums: dict[Mixer, dict[str, Tensor]] = {}
        for path, value in measured.items():
            place, _, name = path.rpartition(".")
            own = sums.setdefault(self.mixer_at(place), {})
            own[name] = own[name] + value if name in own else value
        for mixer, own in sums.items():
            mixer.after_step(own)

    def logits(self, y: Tensor) -> Tensor:
        """[..., width] -> [..., vocab]"""
        logits = y @ self.embedding.weight.T if self.head is None else self.head(y)
        cap = self.design.head.softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def embed(self, tokens: Tensor) -> Tensor:
        """[B, T] -> [B, T, width]"""
        x = self.embedding(tokens)
        return self.embedding_norm(x * self.scale if self.scale != 1 else x)

    def run(self, x: Tensor, state: LMState | None = None, ctx: Context | None = None,
            tokens: Tensor | None = None) -> tuple[Out, LMState]:
        """The stack on embedded tokens x [B, T, width], with positions counted from the state. tokens [B, T]: what
        they are, for memories that look for some of them."""
        ctx = ctx or Context()
        if tokens is not None:
            ctx = ctx.replace(shared=extended(ctx.shared, {"tokens": tokens}))
        start = torch.zeros(x.shape[0], dtype=torch.long, device=x.device) if state is None else state.next
        position, following = placed(start, x.shape[1], ctx)
        ctx = ctx.replace(position=position)
        if self.design.embedding.position == "sinusoidal":
            x = x + sinusoidal(position, self.design.width, x.dtype)
        if ctx.valid is not None:
            x = x.masked_fill(~ctx.valid[..., None], 0)
        out = self.stack(x, None if state is None else state.stack, ctx)
        return out, LMState(out.state, following)
