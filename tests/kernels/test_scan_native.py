"""Compiled elementwise recurrences against token by token in double precision, of any shape, stride, gate and reset."""

import ctypes
import os
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from postformer.kernels import max_plus_scan, native, scan, selective_scan, use
from postformer.kernels.scan import operators as scan_native

torch.set_num_threads(1)
compiled = pytest.mark.skipif(native.native().library is None, reason=native.native().reason)
profile = settings(derandomize=True, deadline=None, max_examples=60, database=None)
PRECISIONS = ((torch.float64, 1e-10), (torch.float32, 1e-5))


def drawing(seed):
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    return draw


def scattered(x):
    """The same numbers, no dimension dense in memory."""
    wide = x.new_zeros(*(2 * n for n in x.shape))
    view = wide[tuple(slice(None, None, 2) for _ in x.shape)]
    view.copy_(x)
    return view


def everything(fn, args, dtype=torch.float64, layout=lambda x: x):
    """Outputs and the gradients of a random projection of them."""
    args = [layout(x.to(dtype)).detach().requires_grad_() for x in args]
    outputs = fn(*args)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    draw = drawing(1)
    sum((x * draw(*x.shape).to(dtype)).sum() for x in outputs).backward()
    return [x.detach() for x in outputs] + [x.grad for x in args]


def assert_close(found, expected, relative):
    for x, y in zip(found, expected, strict=True):
        assert x.shape == y.shape
        assert (x - y).norm() <= relative * y.norm().clamp_min(1e-3)


def selective_arguments(B=2, T=9, D=5, N=3, seed=0):
    draw = drawing(seed)
    return [draw(B, T, D), draw(B, T, D).abs(), -draw(D, N).abs(), draw(B, T, N), draw(B, T, N), draw(B, D, N)]


def resets(B, T, seed):
    return torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < 0.15


@compiled
@profile
@given(
    B=st.integers(1, 3), T=st.integers(1, 80), D=st.sampled_from([1, 3, 16, 33, 130, 257]), N=st.integers(1, 20),
    scale=st.sampled_from([0.01, 1.0, 60.0]), emit=st.sampled_from([None, 1, 7, 32, 48, 99]), cut=st.booleans(),
    skips=st.booleans(), strided=st.booleans(), seed=st.integers(0, 99),
)
def test_selective_scan_equals_tokens(B, T, D, N, scale, emit, cut, skips, strided, seed):
    args, reset = selective_arguments(B, T, D, N, seed), resets(B, T, seed) if cut else None
    args += [drawing(seed + 1)(D)] * skips

    def run(backend, *z):
        return selective_scan(*z[:6], reset, emit, backend, *z[6:])

    with use(decay_scale=scale):
        expected = everything(lambda *z: run("reference", *z), args)
        for dtype, relative in PRECISIONS:
            found = everything(lambda *z: run("native", *z), args, dtype,
                               scattered if strided else torch.clone)
            assert_close(found, expected, relative)


@compiled
@profile
@given(
    B=st.integers(1, 3), T=st.integers(1, 40), F=st.sampled_from([(), (1,), (3,), (16,), (37,), (3, 5), (200,)]),
    shared=st.booleans(), cut=st.booleans(), strided=st.booleans(), seed=st.integers(0, 99),
)
def test_scan_equals_tokens(B, T, F, shared, cut, strided, seed):
    draw, reset = drawing(seed), resets(B, T, seed) if cut else None
    args = [draw(B, T, *((1,) * len(F) if shared else F)).tanh(), draw(B, T, *F), draw(B, *F)]
    expected = everything(lambda a, b, h: scan(a, b, h, reset, "reference"), args)
    for dtype, relative in PRECISIONS:
        found = everything(lambda a, b, h: scan(a, b, h, reset, "native"), args, dtype,
                           scattered if strided else torch.clone)
        assert_close(found, expected, relative)
    a, b, m = (x.clone() for x in args)
    a[0, 0] = -float("inf")
    torch.testing.assert_close(max_plus_scan(a, b, m, reset, "native"), max_plus_scan(a, b, m, reset, "parallel"),
                               rtol=1e-13, atol=1e-13)


@compiled
def test_gradients_of_one_output_only():
    args = selective_arguments(T=40)
    for part in (0, 1):  # a reference that does not reach C gives it no gradient, compiled code gives zeros
        found, expected = (everything(lambda *z, b=b, p=part: selective_scan(*z, backend=b)[p], args)
                           for b in ("native", "reference"))
        assert_close(found, [y if y is not None else torch.zeros_like(x) for x, y in zip(found, expected)], 1e-10)
    x, dt, A, B, C, _ = args
    assert_close(everything(lambda *z: selective_scan(*z, backend="native"), (x, dt, A, B, C)),
                 everything(lambda *z: selective_scan(*z, backend="reference"), (x, dt, A, B, C)), 1e-10)
    b = args[0].requires_grad_()
    scan(torch.full_like(dt, 0.5), b, backend="native").sum().backward()  # a wants no gradient
    assert b.grad[0, 0, 0] == pytest.approx(2, abs=1e-10)


@compiled
def test_threads_do_not_change_a_bit():
    args, reset = selective_arguments(3, 100, 300, 7), resets(3, 100, 0)
    pair = args[:2]

    def both():
        return everything(lambda *z: selective_scan(*z, reset, 16, "native"), args, torch.float32) + \
            everything(lambda a, b: scan(a, b, None, reset, "native"), pair, torch.float32)

    one = both()
    try:
        torch.set_num_threads(3)
        three = both()
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(x, y) for x, y in zip(one, three, strict=True))


@compiled
def test_nan_is_not_hidden_but_ends_where_a_document_ends():
    args, reset = selective_arguments(B=1, T=50), torch.zeros(1, 50, dtype=torch.bool)
    reset[:, 40] = True
    args[1][0, 9] = float("nan")
    y, h = selective_scan(*args, reset, backend="native")
    assert y[:, 9:40].isnan().all()
    assert y[:, :9].isfinite().all()
    assert y[:, 40:].isfinite().all()
    assert h.isfinite().all()
    a, b = torch.rand(1, 50, 20), torch.randn(1, 50, 20)
    b[0, 9] = float("nan")
    for found in (scan(a, b, reset=reset, backend="native"), max_plus_scan(a, b, backend="native")):
        assert found[:, 9:40].isnan().all()
        assert found[:, :9].isfinite().all()
    assert scan(a, b, reset=reset, backend="native")[:, 40:].isfinite().all()


@compiled
def test_states_are_kept_only_between_blocks():
    B, T, D, N = 1, 1024, 64, 16
    args = [x.float().requires_grad_() for x in selective_arguments(B, T, D, N)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        selective_scan(*args, backend="native")
    inputs = {x.data_ptr() for x in args}
    assert sum(x.numel() for x in kept if x.data_ptr() not in inputs) == B * T * D * N // scan_native.BLOCK
    kept.clear()
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        selective_scan(*args, backend="native")
    assert not kept


@compiled
def test_complex_numbers_have_no_compiled_form():
    a, b = torch.full((1, 9, 2), 0.5j), torch.ones(1, 9, 2, dtype=torch.complex64)
    with pytest.raises(RuntimeError, match="no compiled code: not for"):
        scan(a, b, backend="native")
    with use(backend="native"):
        torch.testing.assert_close(scan(a, b), scan(a, b, backend="reference"))


@compiled
@pytest.mark.skipif("x86" not in os.uname().machine, reason="x86 only")
@pytest.mark.parametrize("flags", [("-mno-avx512f",), ("-mno-avx512f", "-mno-avx")], ids=["AVX2", "SSE2"])
def test_narrower_vectors(flags, monkeypatch):
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    assert compiler
    path = native.build(compiler, native.folder(), (*native.FLAGS, *flags))
    other = native.Native(ctypes.CDLL(str(path)), "other")
    monkeypatch.setattr(native, "native", lambda: other)
    args, reset = selective_arguments(2, 70, 37, 5), resets(2, 70, 1)
    pair = args[:2]
    for dtype, relative in PRECISIONS:
        found, expected = (
            everything(lambda *z, b=b: selective_scan(*z, reset, 9, b), args, d)
            + everything(lambda *z, b=b: scan(*z, None, reset, b), pair, d)
            + [max_plus_scan(*(x.to(d) for x in pair), None, reset, "native" if b == "native" else "parallel")]
            for b, d in (("native", dtype), ("reference", torch.float64)))
        assert_close(found, expected, relative)
