"""Test-only mixers whose formula is short enough to be written again, and how a sublayer of some depth is built."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch

from postformer.contract.context import gates
from postformer.contract.mixer import Mixer, Out, Traits
from postformer.design import Design, load, register, registry
from postformer.kernels import scan
from postformer.model import build

torch.set_num_threads(1)
WIDTH = 16


class PoleDesign(Design):
    kind: Literal["test-pole"] = "test-pole"


class Pole(Mixer):
    """h_t = a^tick h_{t-1} + write i(x_t);  y_t = out(h_t * sigmoid(q(x_t))): the read sees the token."""

    def __init__(self, design: PoleDesign, site: Any) -> None:
        super().__init__()
        self.a = site.parameter("a", (site.width,), lambda p: p.uniform_(-1, 1))
        self.i, self.q = site.linear("i", site.width, site.width), site.linear("q", site.width, site.width)
        self.out = site.linear("out", site.width, site.dim_out)

    def initial(self, batch, condition=None):
        return self.a.new_zeros(batch, self.a.shape[0])

    def mix(self, x, state, ctx):
        tick, write = (1.0 if gate is None else gate[..., None] for gate in gates(ctx))
        a = torch.sigmoid(self.a).expand_as(x) ** tick
        h = scan(a, write * self.i(x), state, ctx.reset())
        return Out(self.out(h * torch.sigmoid(self.q(x))), h[:, -1])

    @classmethod
    def traits(cls, design):
        return Traits(native_emit=False)


class OneDesign(Design):
    kind: Literal["test-one"] = "test-one"


class One(Mixer):
    """y = 1, whatever x is: what a sublayer adds is the sum of its weights."""

    def __init__(self, design: OneDesign, site: Any) -> None:
        super().__init__()

    def mix(self, x, state, ctx):
        return Out(torch.ones_like(x))

    @classmethod
    def traits(cls, design):
        return Traits(stateful=False)


MIXERS: dict[str, dict[str, Any]] = {
    "pole": {"kind": "test-pole"},
    "one": {"kind": "test-one"},
    "ff": {"kind": "swiglu", "dim_hidden": 24},
    "attention": {"kind": "attention", "heads": {"query": 2, "key_value": 1, "dim": 8}},
    "list": {"kind": "attention", "position": "none", "heads": {"query": 2, "key_value": 1, "dim": 8}},
    "window": {"kind": "attention", "window": 5, "heads": {"query": 2, "dim": 8}},
    "conv": {"kind": "matrix", "loss": "l2", "features": "l2norm", "heads": {"value": 2}, "local": "conv4",
             "retention": {"per": "head", "gate": "mamba"}, "update": {"kind": "gradient", "rate": "sigmoid"}},
    "matrix": {"kind": "matrix", "loss": "l2", "features": "l2norm", "heads": {"value": 2},
               "retention": {"per": "head", "gate": "mamba"}, "update": {"kind": "gradient", "rate": "sigmoid"}},
    "vector": {"kind": "vector", "parameterisation": "rglru"},
    "deep": {"kind": "deep", "heads": {"value": 2}, "update": {"kind": "momentum", "chunk": 4}},
    "filter": {"kind": "filter", "heads": {"value": 2}},
}


@pytest.fixture(scope="module", autouse=True)
def kinds():
    register(PoleDesign)(Pole)
    register(OneDesign)(One)
    yield
    for kind in ("test-pole", "test-one"):
        registry._classes.pop(kind)


def scrambled(model):
    """In fp64, and every parameter moved off its start."""
    model = model.double()
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=draw, dtype=torch.float64))
    return model


def recipe(mixer, depth, **sublayer):
    return {"name": "d", "model": {"width": WIDTH, "mixers": {mixer: MIXERS[mixer]},
                                   "layers": {"l": [{"use": mixer, "depth": depth, **sublayer}]}, "stack": ["l"]}}


def sublayer(mixer, depth, seed=0, **options):
    """The only sublayer of a model of one layer, in fp64."""
    model = scrambled(build(load(recipe(mixer, depth, **options)).model, seed))
    return model.stack.layers[0].sublayers[0]


def plain(sub, mixer, **options):
    """The same sublayer, weights and all, of fixed depth."""
    made = sublayer(mixer, "fixed", **options)
    own = {name: value for name, value in sub.state_dict().items() if not name.startswith("depth.")}
    made.load_state_dict(own)
    return made


def tokens(batch=2, length=13, seed=0):
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def made():
    """The helpers of this file."""
    return SimpleNamespace(recipe=recipe, sublayer=sublayer, plain=plain, tokens=tokens, scrambled=scrambled,
                           mixers=MIXERS, width=WIDTH)
