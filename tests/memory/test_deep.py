"""Deep memories as layers: the delta rule, a slow autograd learner, users' losses, refusals, stability."""

import pytest
import torch

from postformer.contract.context import Context
from postformer.contract.state import leaves
from postformer.design import DesignError, load, names
from postformer.memory import deep_losses
from postformer.memory.deep import polynomial, simplex
from postformer.model import build
from postformer.verify import verify
from postformer.verify.subject import subject

torch.set_num_threads(1)
DEEP = [name for name in names() if any(m.kind == "deep" for m in load(name).model.mixers.values())]


def recipe(memory, width=16):
    mixers = {"memory": {"kind": "deep", "heads": {"value": 2}, **memory}}
    return {"version": 1, "name": "test", "model": {"width": width, "vocab": 17, "mixers": mixers,
                                                    "layers": {"m": [{"use": "memory"}]}, "stack": ["m"]}}


def mixer(memory, width=16, seed=0):
    model = build(load(recipe(memory, width)).model, seed).double()
    return model.stack.layers[0].sublayers[0].mixer


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_matrix_without_momentum_decay_and_chunk_is_deltanet():
    deep = mixer({"net": "linear", "update": {"chunk": 1, "clip": None}, "local": "conv4", "read": "norm"})
    delta = mixer({"kind": "matrix", "loss": "l2", "features": "l2norm", "local": "conv4", "read": "norm"})
    with torch.no_grad():
        for name in "qkv":
            getattr(deep, name).weight.copy_(getattr(delta.params, name).weight)
        deep.gates["rate"].weight.copy_(delta.params.rate.weight)
        deep.conv.weight.copy_(delta.params.conv.weight)
        deep.out.weight.copy_(delta.out.weight)
        deep.start["map1_weight"].zero_()
        x = draw(2, 41, 16)
        # DeltaNet scales its queries by 1 / sqrt(dim_key), which the norm takes out again but for its epsilon.
        deep.norm.eps, delta.norm.eps = 1e-14, 1e-14
        ours, theirs = deep(x), delta(x)
    torch.testing.assert_close(ours.y, theirs.y, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(ours.state.memory.running[0], theirs.state.memory, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_momentum_and_decay_over_chunks_are_those_of_a_slow_learner(kind):
    """2501.00663 with one head, every gradient by autograd: chunks of 16, momentum, decay."""
    deep = mixer({"net": kind, "update": {"kind": "momentum", "clip": None}, "retention": "decay",
                  "heads": {"value": 1}, "read": "none"}, 6)
    x = draw(1, 40, 6)
    with torch.no_grad():
        for p in deep.parameters():
            p.add_(draw(*p.shape, seed=p.ndim) / 3)
        out = deep(x)
        q, k, v = (getattr(deep, n)(x)[0] for n in "qkv")
        gate = {n: torch.sigmoid(g(x)[0, :, 0] + deep.biases[n]) for n, g in deep.gates.items()}
    q, k = (u / (u.square().sum(-1, keepdim=True) + 1e-6).sqrt() for u in (q, k))
    W = [p.detach()[0] for p in deep.start.values()]
    Z = [torch.zeros_like(w) for w in W]

    def net(weights, u):
        for i, w in enumerate(weights):
            u = (torch.nn.functional.gelu(u) if i else u) @ w
        return u

    for t in range(40):
        if t % 16 == 0:
            frozen = [w.clone().requires_grad_() for w in W]
        grads = torch.autograd.grad((net(frozen, k[t]) - v[t]).square().sum() / 2, frozen)
        Z = [gate["momentum"][t] * z - gate["rate"][t] / 16 * g for z, g in zip(Z, grads)]
        W = [(1 - gate["decay"][t]) * w + z for w, z in zip(W, Z)]
        torch.testing.assert_close(deep.out(net(W, q[t])), out.y[0, t], rtol=1e-9, atol=1e-11)


def test_polynomial_features_are_a_kernel():
    x, y = draw(5, 4), draw(5, 4, seed=1)
    dot = (x * y).sum(-1)
    torch.testing.assert_close((polynomial(x) * polynomial(y)).sum(-1), dot + dot.square() / 2)


def test_mirror_maps_make_what_they_say():
    w = simplex(draw(2, 3, 4, 5), 2.0)
    assert w.min() > 0
    torch.testing.assert_close(w.sum((-2, -1)), torch.full((2, 3), 10.0, dtype=torch.float64))


@pytest.fixture
def log_cosh():
    @deep_losses.loss("test-log-cosh")
    def function(prediction, target):
        return torch.log(torch.cosh(prediction - target)).sum(-1)

    yield function
    deep_losses._functions.pop("test-log-cosh")


def test_a_users_loss_learns_whatever_mode_it_is_in(log_cosh):
    deep, x = mixer({"loss": "test-log-cosh"}), draw(2, 37, 16).requires_grad_()
    y = deep(x).y
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in deep.parameters())
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert torch.equal(deep(x.detach()).y, y.detach())
    assert torch.equal(deep.eval()(x).y, y)
    assert not torch.allclose(y, mixer({"loss": "l2"})(x).y)
    assert verify(recipe({"loss": "test-log-cosh"}), only=["token by token, fp64", "finite differences"]).passed


def test_a_users_loss_is_known_by_its_name(log_cosh):
    assert "test-log-cosh" in deep_losses.losses()
    with pytest.raises(ValueError, match="there is a loss 'l2' already; give again a name of its own"):
        @deep_losses.loss("l2")
        def again(prediction, target):
            return prediction

    with pytest.raises(DesignError, match=r"unknown loss 'test-log-cos'\. Did you mean 'test-log-cosh'"):
        load(recipe({"loss": "test-log-cos"}))


def test_a_loss_that_returns_something_else_is_named():
    deep_losses.loss("test-scalar")(lambda prediction, target: (prediction - target).square().mean())
    try:
        with pytest.raises(ValueError, match=r"loss 'test-scalar' returned \(\) .* sum over the last dimension only"):
            mixer({"loss": "test-scalar"})(draw(1, 3, 16))
    finally:
        deep_losses._functions.pop("test-scalar")


@pytest.mark.parametrize("memory", [
    {"net": {"kind": "gated", "activation": "silu", "bias": True}, "loss": "lp"},
    {"net": {"kind": "convolution", "expand": 2}, "update": {"kind": "momentum", "chunk": 4, "clip": 1.0}},
    {"net": {"kind": "mlp", "depth": 3, "residual": "norm"}, "loss": {"name": "huber", "delta": 0.5},
     "update": {"kind": "momentum", "window": 3}, "retention": "decay"},
    {"net": "linear", "loss": "dot", "retention": "decay", "read": "gated-norm"},
    {"features": ["silu", "l2norm", "polynomial"], "heads": {"value": 2, "dim_key": 3},
     "update": {"kind": "muon", "chunk": 4, "window": 2}, "retention": "decay"},
    {"retention": "lq", "update": {"visible": "chunk"}, "forget_at": "segment"},
], ids=lambda m: "-".join(map(str, m.get("net", m).values() if isinstance(m.get("net"), dict) else m)))
def test_sensible_combinations_verify(memory):
    result = verify(recipe(memory))
    assert result.passed, [r for r in result.results if r.passed is False]


@pytest.mark.parametrize(("memory", "message"), [
    ({"update": {"kind": "muon", "visible": "token"}}, "makes its steps at chunk ends; leave it out, or set"),
    ({"retention": "kl", "update": {"visible": "token"}}, "makes weights at chunk ends"),
    ({"net": "convolution", "update": {"visible": "token"}}, "of no low rank"),
    ({"update": {"window": 32}}, "set a window up to the chunk"),
    ({"net": {"kind": "linear", "depth": 2}}, "use kind: mlp for 2"),
    ({"net": {"kind": "gated", "depth": 3}}, r"leave depth \(3\) out"),
    ({"net": {"kind": "mlp", "size": 5}}, "set kind: convolution"),
    ({"loss": {"name": "l2", "p": 3}}, "set name: lp"),
    ({"loss": {"name": "l2", "delta": 1.0}}, "set name: huber"),
    ({"loss": "dot", "net": {"residual": "norm"}}, "set loss: l2"),
    ({"retention": {"q": 3.0}}, "set mirror: lq"),
    ({"retention": {"scale": 3.0}}, "set mirror: kl"),
    ({"features": "none", "update": {"clip": None}}, "set features: l2norm, or update.clip"),
    ({"loss": "lp", "update": {"clip": None}}, "grows faster than the error"),
    ({"features": ["polynomial", "l2norm"]}, "put it last"),
    ({"heads": {"value": 2, "key": 1}}, "leave heads.key out"),
    ({"local": "shift"}, "set local: conv4 or none"),
    ({"read": {"per": "group"}}, "set per: head or all"),
    ({"heads": {"value": 3}}, "width 16 is not a multiple"),
    ({"net": {"residual": "norm"}, "heads": {"value": 2, "dim_key": 4}}, "set heads.dim_key = heads.dim_value"),
    ({"read": {"out": False}, "heads": {"value": 2, "dim_key": 4, "dim_value": 4}}, "set read.out: true"),
])
def test_senseless_combinations_are_refused_with_a_remedy(memory, message):
    with pytest.raises(ValueError, match=message):
        build(load(recipe(memory)).model)


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("scrambled", [False, True])
def test_4096_tokens_stay_bounded(name, scrambled):
    small = load(name, width=32, layers=len(set(load(name).model.stack)))
    model = subject(small, torch.float32).model if scrambled else build(small.model)
    tokens = torch.randint(0, 256, (1, 4096), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        begin = max(leaf.abs().max() for leaf in leaves(model.initial(1)) if leaf.is_floating_point())
        out = model(tokens)
    assert torch.isfinite(out.logits).all()
    # Weights of a few times their start: what diverges is at 1e4 and more after as many tokens.
    assert max(leaf.abs().max() for leaf in leaves(out.state) if leaf.is_floating_point()) < 30 * begin


def test_a_state_is_no_view_of_the_parameters():
    deep = mixer({})
    state = deep.initial(2)
    kept = [leaf.clone() for leaf in leaves(state)]
    with torch.no_grad():
        for p in deep.parameters():
            p.add_(1)
    assert all(torch.equal(a, b) for a, b in zip(kept, leaves(state)))


def test_read_only_tokens_read_what_was_learned_and_take_no_place_in_the_chunk():
    deep, x = mixer({"update": {"kind": "momentum", "chunk": 4}}), draw(1, 12, 16)
    gate = torch.ones(1, 12, dtype=torch.float64)
    gate[0, 3:9] = 0
    with torch.no_grad():
        out = deep(x, None, Context(tick=gate, write=gate))
        before = deep(x[:, :3])
        for t in range(3, 9):
            # A written token reads its own step as well; a read-only one does not.
            y = deep(x[:, t : t + 1], before.state, Context(tick=gate[:, 3:4], write=gate[:, 3:4])).y
            torch.testing.assert_close(out.y[:, t : t + 1], y)
        rest = deep(x[:, 9:], before.state)
    torch.testing.assert_close(out.y[:, 9:], rest.y)
    assert torch.equal(out.state.memory.phase, torch.tensor([2]))
