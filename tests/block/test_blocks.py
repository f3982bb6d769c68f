"""Feed-forwards and channel mixing against their formulas; every option of the residual sublayer."""

import pytest
import torch
import torch.nn.functional as F

from postformer.contract.context import DOCUMENT, Context
from postformer.design import load
from postformer.model import build

torch.set_num_threads(1)


def layer_of(sublayers, mixers, **model):
    data = {"name": "b", "model": {"width": 16, "mixers": mixers, "layers": {"l": sublayers}, "stack": ["l"], **model}}
    made = build(load(data).model).double()
    with torch.no_grad():
        for i, p in enumerate(made.parameters()):
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).double())
    return made.stack.layers[0]


X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize(("design", "hidden", "act"), [
    ({"kind": "swiglu"}, 48, F.silu), ({"kind": "geglu", "expand": 2}, 32, lambda x: F.gelu(x, approximate="tanh")),
    ({"kind": "mlp"}, 64, F.gelu), ({"kind": "mlp", "activation": "relu2", "dim_hidden": 10}, 10,
                                    lambda x: F.relu(x).square()), ({"kind": "swiglu", "bias": True}, 48, F.silu),
    ({"kind": "mlp", "gated": True, "activation": "relu2"}, 48, lambda x: F.relu(x).square()),
    ({"kind": "swiglu", "sub_norm": "rms"}, 48, F.silu), ({"kind": "mlp", "sub_norm": "rms", "eps": 0.1}, 64, F.gelu)])
def test_feedforwards(design, hidden, act):
    m = layer_of([{"use": "f"}], {"f": design}).sublayers[0].mixer
    assert m.out.weight.shape == (16, hidden)
    up = act(m.up(X)) if m.gate is None else act(m.gate(X)) * m.up(X)
    if "sub_norm" in design:
        up = up / torch.sqrt(up.square().mean(-1, keepdim=True) + design.get("eps", 1e-6)) * m.norm.weight
    assert (m(X).y - F.linear(up, m.out.weight, m.out.bias)).abs().max() < 1e-14
    assert (m.up.bias is not None) == design.get("bias", False)
    assert m(X).state is None


def test_channel_mix_by_loop():
    m = layer_of([{"use": "c"}], {"c": {"kind": "channel-mix", "expand": 2}}).sublayers[0].mixer
    boundary = torch.zeros(2, 5, dtype=torch.int8)
    boundary[0, 3] = DOCUMENT
    valid = torch.ones(2, 5, dtype=torch.bool)
    valid[1, 1] = False
    out = m(X, None, Context(boundary=boundary, valid=valid))
    for row in range(2):
        before = torch.zeros(16).double()
        for t in range(5):
            if boundary[row, t]:
                before = torch.zeros(16).double()
            if not valid[row, t]:
                assert not out.y[row, t].any()
                continue
            k = X[row, t] + (before - X[row, t]) * m.x_k
            expected = m.out.weight @ F.relu(m.k.weight @ k).square()
            assert (out.y[row, t] - expected).abs().max() < 1e-13
            before = X[row, t]
        assert torch.equal(out.state[row, 0], before)


def test_sublayer_options():
    ff = {"f": {"kind": "mlp", "expand": 1}}
    sub = [{"use": "f", "post_norm": "rms", "scale": "learned", "out": "width"}, {"use": "f", "scale": 0.25},
           {"use": "f", "norm": "none", "residual": "none"}]
    layer = layer_of(sub, ff, norm="layer")
    a, b, c = layer.sublayers
    one = X + a.post_norm(a.out(a.mixer(a.norm(X)).y)) * a.gain
    two = one + 0.25 * b.mixer(b.norm(one)).y
    assert (layer(X).y - c.mixer(two).y).abs().max() < 1e-13
    assert isinstance(a.norm, torch.nn.LayerNorm)
    assert isinstance(c.norm, torch.nn.Identity)
    assert (b.gain, b.out) == (None, None)


def test_next_is_added_to_the_next_input_only():
    ff = {"f": {"kind": "mlp", "expand": 1}, "g": {"kind": "mlp"}, "h": {"kind": "swiglu"}}
    layer = layer_of([{"use": "f", "residual": "next"}, {"use": "g"}, {"use": "h"}], ff)
    f, g, h = layer.sublayers
    one = X + g.mixer(g.norm(X + f.mixer(f.norm(X)).y)).y
    assert (layer(X).y - (one + h.mixer(h.norm(one)).y)).abs().max() < 1e-13


def test_inputs_are_joined_in_order():
    layer = layer_of([{"use": "f", "input": ["embedding", "x"]}], {"f": {"kind": "mlp"}})
    f, other = layer.sublayers[0], X.flip(1)
    assert f.mixer.up.weight.shape == (128, 32)  # expands what it reads
    y = layer(X, None, Context(shared={"embedding": other})).y
    assert (y - (X + f.mixer(f.norm(torch.cat([other, X], -1))).y)).abs().max() < 1e-13
