"""A small recurrent language model with the interface of the real one: quick to build, nothing to go wrong."""

from typing import NamedTuple

import torch
from torch import nn


class Role(NamedTuple):
    kind: str
    decay: bool


class Output(NamedTuple):
    logits: torch.Tensor
    state: torch.Tensor
    losses: dict
    measured: dict


class FakeModel(nn.Module):
    """h_t = a h_{t-1} + (1 - a) tanh(W e_t + U h_{t-1}), tied head."""

    def __init__(self, vocab=256, width=16, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(vocab, width)
            self.inner = nn.Linear(width, width)
            self.recurrent = nn.Linear(width, width, bias=False)
            self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.embedding.weight
        self.losses = {}
        self.calls = []

    def roles(self):
        return {
            "embedding.weight": Role("embedding", False), "inner.weight": Role("matrix", True),
            "inner.bias": Role("bias", False), "recurrent.weight": Role("matrix", True),
        }

    def initial(self, batch):
        return self.inner.bias.new_zeros(batch, self.inner.bias.shape[0])

    def forward(self, tokens, state=None, ctx=None, *, select=None):
        self.calls.append(tuple(tokens.shape))
        h = self.initial(tokens.shape[0]) if state is None else state
        x, outputs = self.inner(self.embedding(tokens)), []
        for t in range(tokens.shape[1]):
            new = 0.5 * h + 0.5 * torch.tanh(x[:, t] + self.recurrent(h))
            h = new if ctx is None or ctx.valid is None else torch.where(ctx.valid[:, t, None], new, h)
            outputs.append(h)
        y = torch.stack(outputs, 1)
        return Output(self.head(y if select is None else y[select]), h, self.losses, {})
