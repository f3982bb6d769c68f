"""Gated activations, norms with gates and short convolutions: compiled code against PyTorch's operations in fp64."""

from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from postformer.kernels import native
from postformer.kernels.convolution import short_convolution
from postformer.kernels.rows import ACTIVATIONS, KINDS, MODES, NORMS, gated, norm, turned

compiled = pytest.mark.skipif(native.native().library is None, reason=native.native().reason)
profile = settings(derandomize=True, deadline=None, max_examples=150, database=None)
torch.set_num_threads(1)


def draw(seed, *shapes, apart=False):
    """Random tensors; apart: a part of larger ones, so that rows do not touch."""
    rng = torch.Generator().manual_seed(seed)
    cut = 3 if apart else 0
    drawn = [None if s is None else torch.randn(*s[:-1], s[-1] + cut, generator=rng).double() for s in shapes]
    return [None if x is None else x[..., : x.shape[-1] - cut] for x in drawn]


def everything(f, inputs, dtype, backend):
    """Outputs and the gradients of a random projection of them."""
    own = [None if x is None else x.to(dtype).detach().requires_grad_() for x in inputs]
    out = f(*own, backend=backend)
    out = out if isinstance(out, tuple) else (out,)
    rng = torch.Generator().manual_seed(9)
    loss = sum((y * torch.randn(y.shape, generator=rng).to(y)).sum() for y in out)
    wanted = [x for x in own if x is not None and x.numel()]
    return [y.detach() for y in out] + list(torch.autograd.grad(loss, wanted))


def agree(f, *inputs, conditioned=1.0):
    """conditioned: how much rounding may grow."""
    expected = everything(f, inputs, torch.float64, "parallel")
    for dtype, relative in ((torch.float64, 1e-13), (torch.float32, 3e-6)):
        for x, y in zip(everything(f, inputs, dtype, "native"), expected):
            assert x.shape == y.shape
            assert (x - y).norm() <= relative * conditioned * max(y.norm(), y.numel() ** 0.5), dtype


@compiled
@profile
@given(leading=st.lists(st.integers(1, 4), max_size=4), d=st.integers(1, 70), kind=st.sampled_from(sorted(KINDS)),
       alone=st.booleans(), apart=st.booleans(), seed=st.integers(0, 99))
def test_gated(leading, d, kind, alone, apart, seed):
    shape = (*leading, d)
    agree(lambda x, by, backend: gated(x, by, kind, backend=backend),
          *draw(seed, shape, None if alone else shape, apart=apart))


@compiled
@profile
@given(leading=st.lists(st.integers(1, 5), max_size=4), groups=st.integers(1, 4), d=st.integers(1, 70),
       kind=st.sampled_from(NORMS), weight=st.sampled_from(["none", "shared", "own"]), bias=st.booleans(),
       gate=st.sampled_from([None, "none", "silu", "sigmoid", "gelu-tanh"]), order=st.sampled_from(sorted(MODES)),
       apart=st.booleans(), turned=st.booleans(), seed=st.integers(0, 99))
def test_norm(leading, groups, d, kind, weight, bias, gate, order, apart, turned, seed):
    shape, of = (*leading, groups, d), (groups, d) if weight == "own" else (d,)
    x, w, b, m = draw(seed, shape, None if weight == "none" else of, of if bias else None, shape if gate else None,
                      apart=apart)
    if turned and leading:  # as heads stand before tokens
        x, m = (None if p is None else p.transpose(0, -2).contiguous().transpose(0, -2) for p in (x, m))
    # eps of the size of x^2, so that rows of one or two numbers do not multiply their rounding
    agree(lambda x, w, b, m, backend: norm(x, kind, w, b, m, eps=0.3, activation=gate or "none", order=order, scale=0.7,
                                           backend=backend), x, w, b, m)


@compiled
@profile
@given(B=st.integers(1, 3), T=st.integers(1, 20), D=st.integers(1, 70), K=st.integers(1, 9), n=st.integers(0, 3),
       bias=st.booleans(), past=st.booleans(), kind=st.sampled_from(["none", "silu", "relu2"]), resets=st.booleans(),
       apart=st.booleans(), long=st.booleans(), seed=st.integers(0, 99))
def test_short_convolution(B, T, D, K, n, bias, past, kind, resets, apart, long, seed):
    if long and D < 20:  # several pieces
        T += 250
    inputs = draw(seed, (B, T, D), (n, D, K) if n else (D, K), (D,) if bias and not n else None,
                  (B, K - 1, D) if past and K > 1 else None, apart=apart)
    reset = torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < 0.2 if resets else None
    agree(lambda x, w, b, p, backend: short_convolution(x, w, b, p, reset, kind, backend=backend), *inputs)


@compiled
@profile
@given(shape=st.tuples(*[st.integers(1, 4)] * 3, st.integers(2, 70)), n=st.integers(1, 35), interleaved=st.booleans(),
       one=st.booleans(), apart=st.booleans(), seed=st.integers(0, 99))
def test_turned(shape, n, interleaved, one, apart, seed):
    n = min(n, shape[-1] // 2)
    (x, angle) = draw(seed, shape, (1 if one else shape[0], 1, shape[2], n), apart=apart)

    def f(x, backend):
        return turned(x, angle.cos().to(x), angle.sin().to(x), interleaved, backend=backend)

    agree(f, x)


def test_short_convolution_is_torchs():
    x, w = draw(0, (2, 9, 5), (5, 4))
    other = F.conv1d(x.mT, w[:, None], padding=3, groups=5)[..., :9].mT
    for backend in ("auto", "parallel", "reference"):
        assert (short_convolution(x, w, backend=backend) - other).abs().max() < 1e-14
    pieces = [short_convolution(x[:, :4], w), short_convolution(x[:, 4:], w, past=x[:, 1:4])]
    assert (torch.cat(pieces, 1) - other).abs().max() < 1e-14
    reset = torch.arange(9)[None].expand(2, 9) == 4
    pieces[1] = short_convolution(x[:, 4:], w)
    assert (torch.cat(pieces, 1) - short_convolution(x, w, reset=reset)).abs().max() < 1e-14


def test_a_filter_that_is_not_used_has_no_gradient():
    x, w = draw(0, (2, 9, 5), (3, 5, 4))
    x, w = x.requires_grad_(), w.requires_grad_()
    short_convolution(x, w)[1].sum().backward()
    assert not w.grad[[0, 2]].any()
    assert w.grad[1].all()


@compiled
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_extremes(kind):
    """Neither overflow nor a hidden NaN, where PyTorch has none."""
    x = torch.tensor([-1e30, -200.0, -88.0, -0.0, 0.0, 88.0, 200.0, float("nan")])
    big = kind in ("relu2", "gelu-tanh")  # x^2 and x^3 overflow in PyTorch, too
    x = x[1:] if big else x
    own, other = x.clone().requires_grad_(), x.double().requires_grad_()
    gated(own, None, kind, backend="native").sum().backward()
    ACTIVATIONS[kind](other).sum().backward()
    torch.testing.assert_close(gated(x, None, kind, backend="native"), ACTIVATIONS[kind](x.double()).float(),
                               equal_nan=True, rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(own.grad, other.grad.float(), equal_nan=True, rtol=1e-5, atol=1e-30)
    row = norm(torch.tensor([1.0, float("nan")]), eps=1e-6, backend="native")
    assert row.isnan().all()
    assert norm(torch.zeros(3, 5), "l2", eps=1e-6, backend="native").eq(0).all()


@contextmanager
def threads(n):
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(1)


@compiled
def test_threads_do_not_change_a_bit():
    x, w, m, taps = draw(0, (3, 400, 2, 40), (2, 40), (3, 400, 2, 40), (80, 4))

    def all_of(x, w, m, taps, backend):
        y = norm(x, "rms", w, None, m, eps=1e-6, activation="silu", backend=backend)
        return y, short_convolution(gated(x, m, backend=backend).flatten(-2), taps, None, None, None, "silu",
                                    backend=backend)

    one = everything(all_of, (x, w, m, taps), torch.float32, "native")
    with threads(2):
        two = everything(all_of, (x, w, m, taps), torch.float32, "native")
    assert all(torch.equal(a, b) for a, b in zip(one, two))


X, W, M, TAPS = draw(0, (2, 3, 4), (1, 4), (2, 3, 4), (4, 3))


@pytest.mark.parametrize(("f", "inputs"), [
    (lambda x, w, m: norm(x, "rms", w, None, m, eps=1e-3, activation="silu"), (X, W, M)),
    (lambda x, m: norm(x, "l2", eps=1e-3) + gated(x * m, m), (X, M)),
    (lambda x, w: turned(x[None] * w, w[None, None].cos()[..., :2], w[None, None].sin()[..., :2])[0], (X, W)),
    (lambda x: turned(x[None], W[None, None].cos()[..., :2], W[None, None].sin()[..., :2])[0] ** 2, (X,)),
    (lambda x, w, m, taps: short_convolution(x * m, taps, w[0], activation="silu"), (X, W, M, TAPS)),
])
def test_gradients_of_gradients_and_transforms(f, inputs):
    x, *rest = inputs = [p.clone().requires_grad_() for p in inputs]
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)
    (expected,) = torch.autograd.grad(f(*inputs).sum(), x)
    assert (torch.func.grad(lambda x: f(x, *rest).sum())(x) - expected).abs().max() < 1e-13
    one = [p[:1] if p.ndim == 3 else p for p in inputs]
    batched = torch.func.vmap(lambda x: f(x[None], *one[1:])[0])(x)
    assert (batched[0] - f(*one)[0]).abs().max() < 1e-14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_by_pytorch(dtype):
    x, m = (p.to(dtype) for p in draw(0, (2, 3, 8), (2, 3, 8)))
    y = gated(x, m)
    assert torch.equal(y, F.silu(x) * m)
    assert short_convolution(x, torch.ones(8, 4, dtype=dtype)).dtype == dtype


def test_without_compiled_code(monkeypatch):
    x, w, m, taps = draw(0, (2, 6, 4), (4,), (2, 6, 4), (4, 3))
    expected = gated(x, m), norm(x, "rms", w, None, m, eps=1e-3), short_convolution(x, taps)
    monkeypatch.setattr(native, "native", lambda: native.Native(None, "there is none"))
    for y, z in zip((gated(x, m), norm(x, "rms", w, None, m, eps=1e-3), short_convolution(x, taps)), expected):
        assert (y - z).abs().max() < 1e-14


def test_bad_input_is_told():
    x, w = draw(0, (2, 3, 4), (5,))
    for wrong, words in (
        (lambda: gated(x, w), "by has shape"), (lambda: gated(x, x, "tanh"), "no activation 'tanh'"),
        (lambda: norm(x, weight=w, eps=1.0), "weight has shape"), (lambda: norm(x, gate=w, eps=1.0), "the gate has"),
        (lambda: norm(x, weight=w[:4], bias=x[0, :, :4], eps=1.0), "of one shape"),
        (lambda: norm(x, "batch", eps=1.0), "kind 'batch'"),
        (lambda: turned(x[None], x[None], x[None]), "do not fit"),
        (lambda: short_convolution(x, w[None]), "weight has shape"),
        (lambda: short_convolution(x, x[0].mT, w), "bias has shape"),
        (lambda: short_convolution(x, x[0].mT, past=x), "past has shape"),
        (lambda: short_convolution(x, x[0].mT, reset=x[..., 0]), "reset is"),
        (lambda: short_convolution(x, x[0].mT, activation="tanh"), "no activation"),
    ):
        with pytest.raises(ValueError, match=words):
            wrong()
