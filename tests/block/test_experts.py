"""Experts against their formula, one token at a time; what is counted, what is learned, what is refused."""

import pytest
import torch

from postformer.contract.context import Context
from postformer.design import DesignError, load
from postformer.kernels import use
from postformer.model import build

torch.set_num_threads(1)
X = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0)).double()


def experts(**design):
    data = {"name": "e", "model": {"width": 16, "mixers": {"f": {"kind": "moe", **design}}, "stack": ["f"]}}
    mixer = build(load(data).model).double().stack.layers[0].sublayers[0].mixer
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in mixer.state_dict().values():
            value.add_(0.3 * torch.randn(value.shape, generator=draw).double())
    return mixer


def silu(x):
    return x / (1 + torch.exp(-x))


def feedforward(ffn, u):
    up = ffn.up.weight @ u
    hidden = torch.relu(up) ** 2 if ffn.gate is None else silu(ffn.gate.weight @ u) * up
    return ffn.out.weight @ hidden


def by_hand(m, u, top, score, normalise=True, scale=1.0):
    """One token u [D]."""
    logits = m.router.weight @ u + (0 if m.router.bias is None else m.router.bias)
    s = 1 / (1 + torch.exp(-logits)) if score == "sigmoid" else torch.exp(logits) / torch.exp(logits).sum()
    preferred = (s if m.bias is None else s + m.bias).tolist()
    chosen = sorted(range(len(preferred)), key=lambda i: -preferred[i])[:top]
    total = sum(s[i] for i in chosen) if normalise else 1
    y = sum(scale * s[i] / total * feedforward(m.experts[i], u) for i in chosen)
    if m.shared is not None:
        gate = 1 if m.shared_gate is None else 1 / (1 + torch.exp(-m.shared_gate.weight @ u))
        y = y + gate * feedforward(m.shared, u)
    return y, chosen


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("design", "formula"), [
    ({"expert": {"dim_hidden": 6}}, {"top": 2, "score": "sigmoid"}),
    ({"experts": 5, "top": 3, "shared": 2, "scale": 2.5, "expert": {"kind": "mlp", "activation": "relu2", "expand": 1}},
     {"top": 3, "score": "sigmoid", "scale": 2.5}),
    ({"shared": 0, "balance": "none", "score": "softmax", "normalise": False},
     {"top": 2, "score": "softmax", "normalise": False}),
    ({"top": 4, "balance": "loss", "score": "softmax", "shared_gate": True}, {"top": 4, "score": "softmax"}),
    ({"experts": 3, "top": 1, "normalise": False, "router_bias": True},
     {"top": 1, "score": "sigmoid", "normalise": False}),
])
def test_every_token_by_hand(design, formula, backend):
    m, counts = experts(**design), [0] * design.get("experts", 8)
    with use(backend=backend):
        out = m(X)
    for row in range(2):
        for t in range(7):
            y, chosen = by_hand(m, X[row, t], **formula)
            assert (out.y[row, t] - y).abs().max() < 1e-13
            for i in chosen:
                counts[i] += 1
    assert out.measured["load"].tolist() == counts
    assert set(out.losses) == ({"router"} if design.get("balance") == "loss" else set())
    if (n := design.get("shared", 1)) != 1 and n:
        assert m.shared.up.weight.shape[0] == n * m.experts[0].up.weight.shape[0]


def test_the_bias_chooses_and_does_not_weigh():
    m = experts(normalise=False, shared=0)
    with torch.no_grad():
        m.bias.zero_()
        m.bias[5] = 10
    assert m(X).measured["load"][5] == 14
    out, (y, chosen) = m(X).y[0, 0], by_hand(m, X[0, 0], 2, "sigmoid", normalise=False)
    assert 5 in chosen
    assert (out - y).abs().max() < 1e-13


def test_a_step_moves_each_bias_by_the_rate_against_its_load():
    m = experts(experts=4, rate=0.05)
    before = m.bias.clone()
    m.after_step({"load": torch.tensor([9, 3, 6, 6])})
    torch.testing.assert_close(m.bias - before, torch.tensor([-0.05, 0.05, 0, 0]).double())
    unbalanced = experts(experts=4, balance="none")
    unbalanced.after_step({"load": torch.tensor([9, 3, 6, 6])})
    assert "bias" not in unbalanced.state_dict()


def test_the_balance_loss_by_hand():
    m = experts(experts=4, balance="loss", rate=0.1)
    out = m(X)
    s = torch.sigmoid(m.router(X)).flatten(0, 1)
    share = out.measured["load"] / 28
    mean = (s / s.sum(1, keepdim=True)).mean(0)
    assert float(out.losses["router"].detach()) == pytest.approx(float(0.1 * 4 * (share * mean).sum().detach()))
    (g,) = torch.autograd.grad(out.losses["router"], m.router.weight)
    assert g.abs().max() > 1e-6


def test_tokens_that_do_not_exist_are_neither_routed_nor_counted():
    m = experts(balance="loss")
    valid = torch.arange(7) < torch.tensor([[7], [3]])
    garbage = torch.where(valid[..., None], X, 1e3)
    out, alone = m(garbage, None, Context(valid=valid)), m(X[1:, :3])
    assert torch.allclose(out.y[1, :3], alone.y[0], atol=1e-14)
    assert not out.y[1, 3:].any()
    assert out.measured["load"].sum() == 20
    assert torch.allclose(out.losses["router"], m(garbage[valid][None]).losses["router"], atol=1e-14)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            none = m(X, None, Context(valid=torch.zeros(2, 7, dtype=torch.bool)))
        assert not none.y.any()
        assert not none.measured["load"].any()
        assert none.losses["router"] == 0


def test_an_idle_experts_gradient_is_zero_and_not_missing():
    m = experts(balance="bias")
    with torch.no_grad():
        m.bias[3] = -100
    out = m(X)
    out.y.sum().backward()
    assert out.measured["load"][3] == 0
    assert m.experts[3].up.weight.grad.abs().max() == 0
    assert all(p.grad is not None for p in m.parameters())
    assert m.router.weight.grad.abs().max() > 0


def test_scores_are_fp32_under_autocast():
    m = experts().float()
    x = X.float()
    with torch.autocast("cpu", torch.bfloat16):
        low = m.scores(x.flatten(0, 1).bfloat16())
        out = m(x)
    assert low.dtype == torch.float32
    assert torch.equal(out.measured["load"], m(x).measured["load"])
    assert (out.y.float() - m(x).y).abs().max() < 0.05 * m(x).y.abs().max()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("design", [{}, {"balance": "loss", "shared": 0}, {"shared_gate": True, "router_bias": True}])
def test_a_model_of_bf16_stays_of_bf16(design, backend):
    m = experts(**design).bfloat16()
    with use(backend=backend):
        out = m(X.bfloat16(), None, Context(valid=torch.rand(2, 7) > 0.3))
    assert out.y.dtype == torch.bfloat16
    (out.y.float().square().sum() + sum(out.losses.values())).backward()
    assert all(torch.isfinite(p.grad).all() for p in m.parameters() if p.grad is not None)


def test_the_balance_loss_of_a_token_that_no_expert_wants_is_finite():
    m = experts(balance="loss", router_bias=True).float()
    with torch.no_grad():
        m.router.bias.fill_(-200)
    loss = m(X.float()).losses["router"]
    loss.backward()
    assert loss == 0
    assert torch.isfinite(m.router.weight.grad).all()


@pytest.mark.parametrize(("design", "text"), [
    ({"top": 9}, "top is 9 of 8 experts; give top at most"),
    ({"top": 1}, "set normalise: false"),
    ({"shared": 0, "shared_gate": True}, "set shared: 1, or leave shared_gate out"),
    ({"balance": "none", "rate": 0.1}, "leave it out, or set balance"),
    ({"capacity_factor": 1.25}, "'capacity_factor': experts have no capacity and drop no tokens.*leave it out"),
    ({"expert": {"expand": 2, "dim_hidden": 8}}, "give dim_hidden or expand"),
    ({"exprts": 4}, "unknown field 'exprts'.*Did you mean 'experts'"),
])
def test_designs_that_cannot_be(design, text):
    with pytest.raises(DesignError, match=text):
        experts(**design)


@pytest.mark.parametrize("kind", ["ternary", "lora"])
def test_experts_are_made_of_the_map_of_their_role(kind):
    data = {"name": "e", "model": {"width": 16, "linear": {"expert": {"kind": kind}},
                                   "mixers": {"f": {"kind": "moe"}}, "stack": ["f"]}}
    model = build(load(data).model)
    mixer = model.stack.layers[0].sublayers[0].mixer
    maps = {type(m) for part in (mixer.shared, *mixer.experts) for m in (part.gate, part.up, part.out)}
    assert [m.__name__ for m in maps] == [f"{kind.capitalize()}Linear"]
    assert type(mixer.router) is torch.nn.Linear
    assert model.roles()["stack.layers.0.sublayers.0.mixer.router.weight"].kind == "gate"
    assert model.roles()["stack.layers.0.sublayers.0.mixer.experts.3.up.weight"].kind == "matrix"
    assert load(data).cost().params == sum(p.numel() for p in model.parameters())
    mixer.bias.copy_(torch.tensor([-9.0] + 7 * [0.0]))  # the first is idle, and runs on nothing
    model(torch.randint(0, 256, (1, 5))).logits.sum().backward()
    assert mixer.experts[1].up.weight.isfinite().all()


def test_sizes_follow_the_width_and_the_number_of_experts_does_not():
    data = {"name": "e", "model": {"width": 64, "mixers": {"f": {"kind": "moe", "expert": {"dim_hidden": 32}}},
                                   "stack": ["f"]}}
    small = load(data, width=16).model.mixers["f"]
    assert (small.experts, small.expert.dim_hidden, small.expert.hidden(16)) == (8, 8, 8)
    assert load(data).cost().params > load(data, width=16).cost().params
