"""Ternary and low-rank maps: the values they round to, their gradients, and that they reach every map of a model."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from postformer.contract.context import DOCUMENT, Context
from postformer.design import load, names
from postformer.design.linear import Dense, Lora, Ternary
from postformer.kernels import use
from postformer.layers.linear import LoraLinear, TernaryLinear, integer_tokens, make_linear, ternary_weight
from postformer.model import build


def made(design, d_in=24, d_out=10, bias=False, dtype=torch.float64) -> Any:
    torch.manual_seed(0)
    return make_linear(design, d_in, d_out, bias).to(dtype)


def test_weights_become_minus_one_zero_or_one_times_their_mean():
    w = torch.tensor([[0.4, -0.1, 1.0], [-0.3, 0.14, -2.0]], dtype=torch.float64)
    q, beta = ternary_weight(w)
    assert beta.item() == pytest.approx(w.abs().mean().item(), rel=1e-15)  # 0.6567
    assert torch.equal(q, torch.tensor([[1.0, 0, 1], [0, 0, -1]], dtype=torch.float64))
    q, beta = ternary_weight(torch.zeros(2, 3))
    assert not q.any()
    assert beta > 0


def test_a_token_becomes_integers_of_its_largest_value():
    x = torch.tensor([[1.27, 0.5, -0.02, 0.004], [-6.35, 0.06, 3.3, 0.0]], dtype=torch.float64)
    q, unit = integer_tokens(x)
    assert torch.equal(q, torch.tensor([[127.0, 50, -2, 0], [-127, 1, 66, 0]], dtype=torch.float64))
    torch.testing.assert_close(unit, torch.tensor([[0.01], [0.05]], dtype=torch.float64))
    assert torch.equal(integer_tokens(x, 2)[0], torch.tensor([[1.0, 0, 0, 0], [-1, 0, 1, 0]], dtype=torch.float64))
    q, unit = integer_tokens(torch.zeros(1, 4))
    assert not q.any()
    assert torch.isfinite(unit).all()


def test_halves_fall_towards_zero_whatever_their_last_bit():
    """127 x / gamma is a half exactly wherever two channels are in a ratio such as 1 to 2."""
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([2.0, 1.0, -1.0], dtype=dtype)
        for at in (x, torch.nextafter(x, 3 * x), torch.nextafter(x, 0 * x)):
            at = torch.cat([x[:1], at[1:]])
            assert integer_tokens(at)[0].tolist() == [127, 63, -63]


@pytest.mark.parametrize(("activations", "norm"), [(8, "rms"), (8, "none"), (4, "rms"), ("none", "none")])
def test_output_and_gradients_are_those_of_rounded_factors(activations, norm):
    layer = made(Ternary(activations=activations, norm=norm), bias=True)
    with torch.no_grad():
        layer.bias.normal_()
    x = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    u = x.detach().clone().requires_grad_()
    normed = u / torch.sqrt((u * u).mean(-1, keepdim=True) + 1e-6) if norm == "rms" else u
    gamma, levels = normed.detach().abs().amax(-1, keepdim=True), 2 ** (activations - 1) - 1 if activations != "none" \
        else None
    x_q = torch.round(levels * normed.detach() / gamma) * gamma / levels if levels else normed.detach()
    beta = layer.weight.detach().abs().mean()
    w_q = torch.round(layer.weight.detach() / beta).clamp(-1, 1) * beta
    assert w_q.unique().numel() == 3

    y, taste = layer(x), torch.randn(5, 10, dtype=torch.float64)
    torch.testing.assert_close(y, x_q @ w_q.T + layer.bias, rtol=1e-12, atol=1e-12)
    (y * taste).sum().backward()
    torch.testing.assert_close(layer.weight.grad, taste.T @ x_q, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.bias.grad, taste.sum(0))
    (expected,) = torch.autograd.grad(normed, u, taste @ w_q)
    torch.testing.assert_close(x.grad, expected, rtol=1e-12, atol=1e-12)


def test_unrounded_it_is_a_dense_map_of_the_normed_input():
    layer, x = made(Ternary()), torch.randn(5, 24, dtype=torch.float64)
    dense = F.linear(F.rms_norm(x, (24,), None, 1e-6), layer.weight)
    with use(rounding=False):
        torch.testing.assert_close(layer(x), dense, rtol=1e-13, atol=1e-13)
    assert (layer(x) - dense).abs().max() > 1e-3


def test_its_products_are_exact_in_any_order_and_under_autocast():
    layer = made(Ternary(norm="none"), 512, 8, dtype=torch.float32)
    x, turn = torch.randn(7, 512), torch.randperm(512)
    turned = made(Ternary(norm="none"), 512, 8, dtype=torch.float32)
    with torch.no_grad():
        turned.weight.copy_(layer.weight[:, turn])
        beta = ternary_weight(layer.weight)[1] / ternary_weight(turned.weight)[1]  # a mean of other order
        torch.testing.assert_close(turned(x[:, turn]) * beta, layer(x), rtol=3e-7, atol=0)
        with torch.autocast("cpu", torch.bfloat16):
            low = layer(x)
        assert low.dtype == torch.bfloat16
        torch.testing.assert_close(low.float(), layer(x), rtol=1e-2, atol=0)


def test_a_dense_checkpoint_fits_a_ternary_map():
    assert made(Ternary()).state_dict().keys() == made(Dense()).state_dict().keys()
    assert torch.equal(made(Ternary()).weight, made(Dense()).weight)


def test_low_rank_update_starts_at_zero_and_merges():
    dense, lora = made(Dense(), bias=True), made(Lora(rank=3, alpha=6), bias=True)
    lora.load_state_dict(dense.state_dict(), strict=False)
    x = torch.randn(5, 24, dtype=torch.float64)
    assert torch.equal(lora(x), dense(x))
    with torch.no_grad():
        lora.lora_b.normal_()
        torch.testing.assert_close(lora(x), F.linear(x, lora.merged(), lora.bias), rtol=1e-13, atol=1e-13)
        expected = lora.weight + 2 * lora.lora_b @ lora.lora_a  # alpha / rank = 2
        torch.testing.assert_close(lora.merged(), expected)
    assert torch.linalg.matrix_rank(lora.merged() - lora.weight) == 3


def test_only_the_update_learns_unless_the_base_is_asked_to():
    for train_base in (False, True):
        layer = made(Lora(rank=2, train_base=train_base), bias=True)
        layer(torch.randn(5, 24, dtype=torch.float64)).sum().backward()
        learns = {name for name, p in layer.named_parameters() if p.grad is not None}
        assert learns == ({"lora_a", "lora_b", "weight", "bias"} if train_base else {"lora_a", "lora_b"})


def test_rank_is_at_most_the_smaller_side_with_the_factor_of_the_design():
    layer = made(Lora(rank=16, alpha=8), 4, 40)
    assert layer.lora_a.shape == (4, 4)
    assert layer.scale == 0.5
    assert made(Lora(rank=5)).scale == 1


UNITS = ("mamba1", "rglru", "hgrn", "mingru", "s4d", "s5")


def small(name, kind):
    linear = f"model.linear={{projection: {kind}, gate: {kind}, expert: {kind}}}"
    if name in UNITS:
        data = {"name": name, "model": {"width": 32, "memory": {"kind": "vector", "parameterisation": name},
                                        "num_layers": 2}}
        return load(data, [linear])
    return load(name, [linear], width=32, layers=max(2, len(set(load(name).model.stack))))


@pytest.mark.parametrize("name", [*names(), *UNITS])
@pytest.mark.parametrize(("kind", "cls"), [("ternary", TernaryLinear), ("lora", LoraLinear)])
def test_every_map_of_every_mixer_is_reached(name, kind, cls):
    """None is left dense, and none is read behind its back: each runs, and changes the outputs when it changes."""
    model = build(small(name, kind).model)
    maps = {path: m for path, m in model.stack.named_modules() if isinstance(m, nn.Linear)}
    assert maps
    assert {type(m) for m in maps.values()} == {cls}
    called: set[str] = set()
    for path, module in maps.items():
        module.register_forward_hook(lambda *_, path=path: called.add(path))
    two = torch.zeros(2, 40, dtype=torch.int8).index_fill(1, torch.tensor([25]), DOCUMENT)
    with torch.no_grad():
        model(torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0)), ctx=Context(boundary=two))
    assert called == set(maps)


def test_low_rank_models_train_only_their_updates_gates_and_norms():
    model = build(small("gated-deltanet", "lora").model)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen
    assert all(name.endswith(".weight") for name in frozen)
    model(torch.randint(0, 256, (2, 20))).logits.square().mean().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert {model.roles()[n].kind for n in model.roles() if "lora" in n} == {"matrix", "gate"}
