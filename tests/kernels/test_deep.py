"""Deep memories: chunks against tokens under all gates, pieces, documents, and closed forms against autograd."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from postformer.kernels import use
from postformer.kernels.deep import Rule, deep, orthogonal, start
from postformer.memory.deep_losses import slope
from postformer.memory.deep_nets import SLOPES, Convolution, Gated, Inner, Mlp

torch.set_num_threads(1)
profile = settings(derandomize=True, deadline=None, max_examples=60, database=None)
D = 3
NETS = {"linear": Mlp(D, D, 1, 0, "none", True), "mlp": Mlp(D, D, 2, 5, "gelu", False),
        "three": Mlp(D, D, 3, 4, "silu", True), "gated": Gated(D, D, 4, "silu", True),
        "convolution": Convolution(D, 2, 3, 3, "gelu-tanh", True)}


def unit_norm(running):
    return tuple(a / (1 + a.square().sum((-2, -1), keepdim=True)).sqrt() for a in running)


RULES = {
    "token": Rule(5), "exact": Rule(1), "window": Rule(5, 3), "clipped": Rule(4, 2, clip=0.7),
    "lagged": Rule(5, visible="chunk"), "mirror": Rule(4, 3, "chunk", mirror=unit_norm),
    "muon": Rule(4, 1, "chunk", orthogonal=True), "muon-window": Rule(5, 3, "chunk", orthogonal=True, clip=2.0),
}


def arguments(net, rule, T, gates, momentum, decay, norm, seed, B=2, H=2, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    def coin(p):
        return torch.rand(B, T, generator=rng) < p

    momentum = momentum or rule.orthogonal
    args = {"q": draw(B, H, T, D), "k": draw(B, H, T, D) / 2, "v": draw(B, H, T, D),
            "theta": 0.2 * draw(B, H, T).sigmoid()}
    if decay:
        args["log_gamma"] = -0.3 * draw(B, H, T).abs()
    if momentum:
        args["log_eta"] = -draw(B, H, T).abs()
    if rule.window > 1:
        args["weight"] = draw(B, H, T).sigmoid()
    weights = [draw(B, H, *shape) / 2 for _ in range(2) for shape in net.maps.values()]
    half = len(weights) // 2
    if gates in ("soft", "all"):
        args |= {"tick": torch.rand(B, T, generator=rng).to(dtype), "write": torch.rand(B, T, generator=rng).to(dtype)}
    if gates in ("read-only", "all"):
        keep = coin(0.6).to(dtype)
        args |= {"tick": keep * args.get("tick", keep), "write": keep * args.get("write", keep)}
    if gates in ("packed", "all"):
        args["reset"] = coin(0.15)
    if gates in ("padded", "all"):
        args["valid"] = coin(0.7)
    inner = (draw(H, 1, D), draw(H, 1, D)) if norm else None
    return args, weights[:half], weights[half:], inner, momentum


def run(net, rule, args, first, fresh, norm, momentum, loss="l2", extra=None, **options):
    """Outputs, state and the gradients of a random projection of them with respect to everything that floats."""
    floats = [x.detach().clone().requires_grad_() for x in (*args.values(), *first, *fresh, *(norm or ()))
              if x.is_floating_point()]
    taken = iter(floats)
    args = {k: next(taken) if x.is_floating_point() else x for k, x in args.items()}
    first, fresh = tuple(next(taken) for _ in first), tuple(next(taken) for _ in fresh)
    norm = norm and (next(taken), next(taken))
    begin, initial = (start(w, rule, momentum=momentum, dims=(D, D)) for w in (first, fresh))
    begin = begin._replace(phase=torch.tensor([3, 1]) % rule.chunk)
    learner = Inner(net, slope(loss, 3.0), norm)
    o, state = deep(learner, **args, state=begin, rule=rule, initial=initial, **options)
    found = [o, *state.frozen, *state.running, *(state.momentum or ()), *(() if state.step is None else (state.step,)),
             *(() if state.window is None else state.window[:3])]
    rng = torch.Generator().manual_seed(1)
    total = sum((x * torch.randn(x.shape, generator=rng, dtype=torch.float64).to(x)).sum() for x in found)
    grads = torch.autograd.grad(total, floats, allow_unused=True)
    zeros = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, floats)]
    return [x.detach() for x in found], zeros, state.phase


@profile
@given(
    name=st.sampled_from(sorted(NETS)), kind=st.sampled_from(sorted(RULES)), T=st.integers(1, 19),
    gates=st.sampled_from(["none", "soft", "read-only", "packed", "padded", "all"]), momentum=st.booleans(),
    decay=st.booleans(), norm=st.booleans(), seed=st.integers(0, 1000), loss=st.sampled_from(["l2", "lp", "dot"]),
    scale=st.sampled_from([0.1, 5.0, 60.0]),
)
def test_chunks_equal_tokens(name, kind, T, gates, momentum, decay, norm, seed, loss, scale):
    net, rule = NETS[name], RULES[kind]
    if name == "convolution":
        rule = rule._replace(visible="chunk")
    args, first, fresh, inner, momentum = arguments(net, rule, T, gates, momentum, decay, norm, seed)
    with use(decay_scale=scale):
        o, grads, phase = run(net, rule, args, first, fresh, inner, momentum, loss)
        o_ref, grads_ref, phase_ref = run(net, rule, args, first, fresh, inner, momentum, loss, backend="reference")
    assert torch.equal(phase, phase_ref)
    for x, y in zip(o, o_ref, strict=True):
        assert (x - y).abs().max() <= 1e-9 * y.abs().max().clamp_min(1e-3)
    # A gradient through a norm or an orthogonal step of nearly nothing keeps the rounding of what it divides by.
    largest = max(g.abs().max() for g in grads_ref)
    for x, y in zip(grads, grads_ref, strict=True):
        assert (x - y).abs().max() <= 1e-9 * torch.maximum(y.abs().max(), 0.1 * largest).clamp_min(1e-3)


@pytest.mark.parametrize("kind", sorted(RULES))
@pytest.mark.parametrize("sizes", [[1] * 21, [8, 13], [3, 1, 17]])
def test_any_pieces_are_the_whole(kind, sizes):
    net, rule = NETS["mlp"], RULES[kind]
    args, first, fresh, norm, momentum = arguments(net, rule, 21, "all", True, True, True, 3)
    learner = Inner(net, slope("l2"), norm)
    state, initial = (start(tuple(w), rule, momentum=momentum, dims=(D, D)) for w in (first, fresh))
    whole, after = deep(learner, **args, state=state, rule=rule, initial=initial)
    out, at = [], 0
    for n in sizes:
        part = {k: x[:, :, at : at + n] if x.ndim > 2 else x[:, at : at + n] for k, x in args.items()}
        o, state = deep(learner, **part, state=state, rule=rule, initial=initial)
        out.append(o)
        at += n
    torch.testing.assert_close(torch.cat(out, 2), whole, rtol=1e-9, atol=1e-11)
    assert torch.equal(state.phase, after.phase)
    for a, b in zip((*state.frozen, *state.running), (*after.frozen, *after.running)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("name", "norm"), list(itertools.product(sorted(NETS), [False, True])))
def test_written_out_gradients_are_autograds(name, norm):
    net, rng = NETS[name], torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    weights = tuple(draw(1, 1, *shape).requires_grad_() for shape in net.maps.values())
    k, v = draw(1, 1, 1, D), draw(1, 1, 1, D)
    learner = Inner(net, slope("l2"), (draw(1, 1, D), draw(1, 1, D)) if norm else None)
    loss = (learner.predict(k, lambda i, x: x @ weights[i]) - v).square().sum() / 2
    expected = torch.autograd.grad(loss, weights)
    for (a, r), g in zip(learner.gradients(k, v, weights, None), expected, strict=True):
        torch.testing.assert_close(a.mT @ r, g, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", sorted(SLOPES))
def test_slopes_are_the_activations(name):
    from postformer.layers.activation import ACTIVATIONS

    x = torch.linspace(-3, 3, 13, dtype=torch.float64).requires_grad_()
    g = torch.linspace(1, 2, 13, dtype=torch.float64)
    (expected,) = torch.autograd.grad(ACTIVATIONS[name](x), x, g)
    torch.testing.assert_close(SLOPES[name](g, x), expected)


def test_without_momentum_decay_and_chunk_a_matrix_learns_by_the_delta_rule():
    rule, rng = Rule(1), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 6, D, generator=rng, dtype=torch.float64) for _ in range(3))
    theta = torch.rand(1, 1, 6, generator=rng, dtype=torch.float64)
    state = start((torch.zeros(1, 1, D, D, dtype=torch.float64),), rule, momentum=False, dims=(D, D))
    o, state = deep(Inner(Mlp(D, D, 1, 0, "none", False), slope("l2")), q, k, v, theta, state=state, rule=rule)
    S = torch.zeros(D, D, dtype=torch.float64)
    for t in range(6):
        S = S + theta[0, 0, t] * torch.outer(k[0, 0, t], v[0, 0, t] - S.T @ k[0, 0, t])
        torch.testing.assert_close(o[0, 0, t], S.T @ q[0, 0, t])
    torch.testing.assert_close(state.running[0][0, 0], S)


def test_orthogonal_steps_have_singular_values_near_one():
    # 2505.23735 and Muon's five iterations bring singular values down to 1/200 of the norm into (0.6, 1.3).
    u, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    z = u[:, :4] * torch.tensor([3.0, 1.0, 0.3, 0.1], dtype=torch.float64) @ u[:4, :4]
    for x in (z, z.mT, 1e-3 * z):
        values = torch.linalg.svdvals(orthogonal(x))
        assert values.min() > 0.6
        assert values.max() < 1.3
    assert not orthogonal(torch.zeros(3, 2)).any()


def test_halves_are_computed_in_float32():
    net, rule = NETS["mlp"], RULES["token"]
    args, first, _, norm, momentum = arguments(net, rule, 9, "none", True, True, True, 0, dtype=torch.bfloat16)
    first, norm = [w.float() for w in first], [n.float() for n in norm]
    state = start(tuple(first), rule, momentum=momentum, dims=(D, D))
    o, after = deep(Inner(net, slope("l2"), norm), **args, state=state, rule=rule)
    assert o.dtype == torch.bfloat16
    assert all(w.dtype == torch.float32 for w in (*after.frozen, *after.running, *after.momentum))


def test_says_what_does_not_fit():
    net, rule = NETS["mlp"], RULES["token"]
    args, first, *_ = arguments(net, rule, 4, "packed", False, True, False, 0)
    state = start(tuple(first), rule, momentum=False, dims=(D, D))
    learner = Inner(net, slope("l2"))

    def refused(match, **changes):
        call = {**args, "state": state, "rule": rule, "initial": state, **changes}
        with pytest.raises(ValueError, match=match):
            deep(learner, call.pop("q"), call.pop("k"), call.pop("v"), call.pop("theta"), **call)

    refused(r"give \[B, H, T, dk\] with T >= 1", q=args["q"][:, :, :0])
    refused("v has shape .* like q's", v=args["v"][:, :1])
    refused(r"theta has shape .*; give \(2, 2, 4\)", theta=args["theta"][..., None])
    refused(r"valid has shape .*; give \(2, 4\)", valid=torch.ones(2, 3, dtype=torch.bool))
    refused("log_eta and the state's momentum come together", log_eta=args["log_gamma"])
    refused("give initial", initial=None)
    refused("use visible='chunk'", rule=Rule(4, mirror=unit_norm))
    refused("made of the momentum; give log_eta", rule=Rule(4, visible="chunk", orthogonal=True))
    refused("make it with start", rule=Rule(5, 3))
    refused("both must be >= 1", rule=Rule(0))


def test_a_call_that_only_reads_leaves_the_state():
    net, rule = NETS["mlp"], RULES["token"]
    args, first, _, norm, _ = arguments(net, rule, 4, "none", False, True, True, 0)
    state, silent = start(tuple(first), rule, momentum=False, dims=(D, D)), torch.zeros(2, 4, dtype=torch.float64)
    learner = Inner(net, slope("l2"), norm)
    o, after = deep(learner, **args, state=state, rule=rule, tick=silent, write=silent)
    o_ref, _ = deep(learner, **args, state=state, rule=rule, tick=silent, write=silent, backend="reference")
    torch.testing.assert_close(o, o_ref)
    assert all(torch.equal(a, b) for a, b in zip(after.running, state.running))
    assert torch.equal(after.phase, state.phase)
