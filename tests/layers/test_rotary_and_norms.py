"""Rotary positions as complex numbers; norms as their formulas."""

import pytest
import torch

from postformer.design.grammar import Norm
from postformer.layers.activation import ACTIVATIONS
from postformer.layers.norm import HeadNorm, RMSNorm, l2norm, make_norm
from postformer.layers.rotary import angles, rotary

torch.set_num_threads(1)
G = torch.Generator().manual_seed(0)
X = torch.randn(2, 3, 5, 8, generator=G, dtype=torch.float64)
POSITION = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 100, 101, 5000]])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [8, 4])
def test_rotary_multiplies_by_unit_complex_numbers(interleaved, dim):
    got = rotary(X, angles(POSITION, dim, X.dtype, 100.0), interleaved)
    for j in range(dim // 2):
        a, b = (2 * j, 2 * j + 1) if interleaved else (j, j + dim // 2)
        angle = POSITION.double()[:, None] * 100.0 ** (-2 * j / dim)
        turned = torch.complex(X[..., a], X[..., b]) * torch.exp(1j * angle)
        assert (got[..., a] - turned.real).abs().max() < 1e-12
        assert (got[..., b] - turned.imag).abs().max() < 1e-12
    assert torch.equal(got[..., dim:], X[..., dim:])


def test_rotary_scores_depend_on_distance_only():
    def turned(x, at):
        return rotary(x, angles(torch.tensor([[at]]), 8, x.dtype))

    q, k = X[:1, :, :1], X[1:, :, :1]
    scores = [(turned(q, i + 9) * turned(k, i)).sum() for i in (0, 5, 1000)]
    assert max(abs(s - scores[0]) for s in scores) < 1e-11
    assert rotary(X.bfloat16(), angles(POSITION, X.shape[-1], torch.bfloat16)).dtype == torch.bfloat16


def test_rms_norms():
    weight = torch.randn(8, generator=G, dtype=torch.float64)
    unit = X / (X.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    for norm, factor in ((RMSNorm(8, 1e-3), weight), (RMSNorm(8, 1e-3, zero_centred=True), 1 + weight)):
        norm = norm.double()
        norm.weight.data.copy_(weight)
        assert (norm(X) - unit * factor).abs().max() < 1e-14
    assert (RMSNorm(8, 1e-3, affine=False)(X) - unit).abs().max() < 1e-14
    assert RMSNorm(8)(X.bfloat16()).dtype == torch.bfloat16
    tiny = RMSNorm(8)(torch.full((1, 8), 1e-30))
    assert torch.isfinite(tiny).all()


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("shared", [False, True])
def test_head_norms(kind, shared):
    norm = HeadNorm(2, 4, kind, 1e-3, bias=True, shared=shared).double()
    for p in norm.parameters():
        torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(1))
    for head in range(2):
        part = X[..., 4 * head : 4 * head + 4]
        centred = part - part.mean(-1, keepdim=True) if kind == "layer" else part
        unit = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt()
        own = slice(0, 4) if shared else slice(4 * head, 4 * head + 4)
        expected = unit * norm.weight[own] + norm.bias[own]
        assert (norm(X)[..., 4 * head : 4 * head + 4] - expected).abs().max() < 1e-14


def test_make_norm_gives_what_the_design_names():
    assert isinstance(make_norm(Norm(kind="none"), 8), torch.nn.Identity)
    layer = make_norm(Norm(kind="layer", eps=1e-3, bias=False), 8).double()
    centred = X - X.mean(-1, keepdim=True)
    assert (layer(X) - centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt()).abs().max() < 1e-14
    assert layer.bias is None
    assert make_norm(Norm(kind="zero-centred-rms"), 8).weight.abs().max() == 0
    assert make_norm(Norm(affine=False), 8).weight is None


def test_l2norm_is_smooth_at_zero():
    x = torch.zeros(2, 3, requires_grad=True)
    y = l2norm(x)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(2, 3))
    assert (x.grad - 1e3).abs().max() < 1e-3
    assert (l2norm(X).norm(dim=-1) - 1).abs().max() < 1e-5


def test_activations():
    x = torch.tensor([-2.0, 0.0, 3.0])
    assert ACTIVATIONS["relu2"](x).tolist() == [0, 0, 9]
    assert (ACTIVATIONS["silu"](x) - x * torch.sigmoid(x)).abs().max() < 1e-6
    assert torch.equal(ACTIVATIONS["none"](x), x)
