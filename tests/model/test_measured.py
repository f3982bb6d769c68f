"""What mixers measure reaches the model's output, and its sums find their way back after a step."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch

from postformer.contract.context import DOCUMENT, Context
from postformer.contract.mixer import Mixer, Out, Traits
from postformer.design import Design, load, register
from postformer.model import build


class CountingDesign(Design):
    kind: Literal["test-counting"] = "test-counting"
    native: bool = True


@register(CountingDesign)
class Counting(Mixer):
    """Counts the valid tokens of a call and, apart from it, those whose first channel is positive."""

    def __init__(self, design: CountingDesign, site: Any) -> None:
        super().__init__()
        self.map = site.linear("map", site.width, site.dim_out)
        self.told: list[dict[str, torch.Tensor]] = []

    def mix(self, x: Any, state: Any, ctx: Context) -> Out:
        valid = torch.ones(x.shape[:2], dtype=torch.bool) if ctx.valid is None else ctx.valid
        counts = torch.stack([valid.sum(), (valid & (x[..., 0] > 0)).sum()])
        return Out(self.map(x), measured={"seen": counts}, losses={"size": x.square().mean()})

    def after_step(self, measured: Any) -> None:
        self.told.append(dict(measured))

    @classmethod
    def traits(cls, design: CountingDesign) -> Traits:
        return Traits(stateful=False, native_reset=design.native)


COUNT = {"kind": "test-counting"}


def model(mixers, stack, **more):
    return build(load({"name": "m", "model": {"width": 8, "mixers": mixers, "stack": stack, **more}}).model)


TOKENS = torch.randint(0, 256, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("composite", ["chain", "parallel"])
def test_gathered_by_place_and_handed_back_to_the_mixer_there(composite):
    mixers = {"a": COUNT, "b": {"kind": composite, "of": [{"kind": "swiglu"}, {"kind": composite, "of": [COUNT]}]}}
    made = model(mixers, ["a/b", "b"])
    out = made(TOKENS)
    assert list(out.measured) == ["0.0.seen", "0.1.of.1.of.0.seen", "1.0.of.1.of.0.seen"]
    assert [name.rsplit(".", 1)[0] for name in out.losses] == [name.rsplit(".", 1)[0] for name in out.measured]
    made.after_step(out.measured)
    first, second = made.stack.layers
    places = [first.sublayers[0].mixer, *(sub.mixer.of[1].of[0] for sub in (first.sublayers[1], second.sublayers[0]))]
    assert [m for m in made.modules() if isinstance(m, Counting)] == places
    for mixer, value in zip(places, out.measured.values()):
        assert len(mixer.told) == 1
        assert torch.equal(mixer.told[0]["seen"], value)
        assert value[0] == 14


def test_a_shared_block_is_told_once_the_sum_over_its_uses():
    made = model({"c": COUNT, "f": {"kind": "swiglu"}}, ["s", "f", "s"],
                 shared={"block": {"layer": [{"use": "c"}]}}, layers={"s": [{"use": "block"}]})
    out = made(TOKENS)
    assert list(out.measured) == ["0.0.0.seen", "2.0.0.seen"]
    made.after_step(out.measured)
    (mixer,) = [m for m in made.modules() if isinstance(m, Counting)]
    assert len(mixer.told) == 1
    assert torch.equal(mixer.told[0]["seen"], sum(out.measured.values()))


@pytest.mark.parametrize("native", [True, False])
def test_pieces_add_up(native):
    made = model({"c": {**COUNT, "native": native}}, ["c"])
    valid = torch.arange(7) < torch.tensor([[7], [4]])
    boundary = torch.zeros(2, 7, dtype=torch.int8)
    boundary[0, 3] = boundary[1, 5] = DOCUMENT
    whole, cut = made(TOKENS, ctx=Context(valid=valid)), made(TOKENS, ctx=Context(valid=valid, boundary=boundary))
    assert torch.equal(whole.measured["0.0.seen"], cut.measured["0.0.seen"])
    assert whole.measured["0.0.seen"][0] == 11


@pytest.mark.parametrize("select", [None, TOKENS > 100])
def test_hidden_measures_as_forward_does(select):
    made = model({"c": COUNT}, ["c", "c"])
    out, hidden = made(TOKENS, select=select), made.hidden(TOKENS, select=select)
    assert out.measured.keys() == hidden.measured.keys()
    assert torch.equal(made.logits(hidden.y), out.logits)


def test_the_same_with_gradient_checkpointing():
    made = model({"c": COUNT}, ["c", "c"])
    out = made(TOKENS)
    made.gradient_checkpointing = True
    again = made(TOKENS)
    again.logits.sum().backward()
    assert all(torch.equal(again.measured[name], value) for name, value in out.measured.items())
