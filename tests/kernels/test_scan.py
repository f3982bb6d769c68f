"""Elementwise recurrences: blocks against tokens, derivatives, documents; convolution by FFT against the sum."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from postformer.kernels import fft_convolution, max_plus_scan, scan, selective_scan, use
from postformer.kernels.scan import selective

torch.set_num_threads(1)
scan_module = importlib.import_module("postformer.kernels.scan")  # the package's own `scan` is the function
profile = settings(derandomize=True, deadline=None, max_examples=100, database=None)


def gradients(fn, *args):
    args = [x.clone().requires_grad_() for x in args]
    outputs = fn(*args)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    rng = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=rng, dtype=x.dtype)).sum() for x in outputs)
    (loss.real if loss.is_complex() else loss).backward()
    return [x.detach() for x in outputs] + [x.grad for x in args]


def assert_close(found, expected, relative):
    for x, y in zip(found, expected, strict=True):
        assert (x - y).norm() <= relative * y.norm().clamp_min(1e-12)


@profile
@given(T=st.integers(1, 90), dtype=st.sampled_from([torch.float64, torch.complex128, torch.float32]),
       resets=st.booleans(), shared=st.booleans(), seed=st.integers(0, 99), walk=st.booleans())  # fmt: skip
def test_scan_equals_tokens(T, dtype, resets, shared, seed, walk):
    rng = torch.Generator().manual_seed(seed)
    shape = (2, T, 1 if shared else 3, 2)
    if dtype.is_complex:
        size, angle = (torch.rand(shape, generator=rng, dtype=torch.float64) for _ in range(2))
        a = torch.polar(size, 6 * angle)
    else:
        a = torch.rand(shape, generator=rng, dtype=dtype) * 2 - 1
    b, h0 = (torch.randn(2, *n, 3, 2, generator=rng, dtype=dtype) for n in ((T,), ()))
    reset = torch.rand(2, T, generator=rng) < 0.2 if resets else None
    with pytest.MonkeyPatch.context() as patch:
        if walk:
            patch.setattr(scan_module, "WIDE", 1)
        found = gradients(lambda a, b, h: scan(a, b, h, reset, "parallel"), a, b, h0)
    expected = gradients(lambda a, b, h: scan(a, b, h, reset, "reference"), a, b, h0)
    assert_close(found, expected, 1e-5 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_scan_by_finite_differences(dtype):
    torch.manual_seed(0)
    a, b, h = (torch.randn(1, *n, 2, dtype=dtype).requires_grad_() for n in ((11,), (11,), ()))
    reset = torch.tensor([[i in (0, 6) for i in range(11)]])
    assert torch.autograd.gradcheck(lambda a, b, h: scan(a, b, h, reset, "parallel"), (a, b, h))


def test_scan_documents_and_pieces():
    torch.manual_seed(0)
    a, b = torch.rand(1, 50, 4, dtype=torch.float64), torch.randn(1, 50, 4, dtype=torch.float64)
    reset = torch.zeros(1, 50, dtype=torch.bool)
    reset[:, 20] = True
    h = scan(a, b, reset=reset)
    torch.testing.assert_close(h[:, 20:], scan(a[:, 20:], b[:, 20:]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(h[:, :20], scan(a[:, :20], b[:, :20]), rtol=1e-12, atol=1e-12)
    rest = scan(a[:, 33:], b[:, 33:], h[:, 32])
    torch.testing.assert_close(rest, h[:, 33:], rtol=1e-12, atol=1e-12)


def test_scan_keeps_at_least_float32_and_names_wrong_shapes():
    assert scan(torch.ones(1, 5, 2).bfloat16(), torch.ones(1, 5, 2).bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match="5 tokens and b 6"):
        scan(torch.ones(1, 5, 2), torch.ones(1, 6, 2))
    with pytest.raises(ValueError, match="broadcast"):
        scan(torch.ones(1, 5, 2), torch.ones(1, 5, 3))
    with pytest.raises(ValueError, match="start has shape"):
        scan(torch.ones(1, 5, 2), torch.ones(1, 5, 2), torch.ones(2))
    with pytest.raises(ValueError, match="reset has shape"):
        scan(torch.ones(1, 5, 2), torch.ones(1, 5, 2), reset=torch.ones(5, dtype=torch.bool))


@pytest.mark.parametrize("T", [1, 2, 17, 50])
def test_max_plus(T):
    torch.manual_seed(T)
    a, b, reset = -torch.rand(2, T, 3), torch.randn(2, T, 3), torch.rand(2, T) < 0.2
    m = torch.full((2, 3), -1e30)
    found = max_plus_scan(a, b, reset=reset)
    for t in range(T):
        m = torch.maximum(a[:, t] + m.masked_fill(reset[:, t, None], -1e30), b[:, t])
        torch.testing.assert_close(found[:, t], m)


def selective_inputs(T, dtype=torch.float64, seed=0, D=3, N=2):
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    A, h0 = -draw(D, N).abs(), draw(2, D, N)
    return draw(2, T, D), draw(2, T, D).abs(), A, draw(2, T, N), draw(2, T, N), h0


@profile
@given(T=st.integers(1, 60), resets=st.booleans(), emit=st.sampled_from([None, 1, 5, 16, 99]), small=st.booleans(),
       walk=st.booleans(), scale=st.sampled_from([0.1, 5.0, 60.0]))  # fmt: skip
def test_selective_scan_equals_tokens(T, resets, emit, small, walk, scale):
    reset = torch.rand(2, T, generator=torch.Generator().manual_seed(T)) < 0.2 if resets else None
    with pytest.MonkeyPatch.context() as patch, use(decay_scale=scale):
        if small:  # several pieces
            patch.setattr(selective, "BUDGET", 1)
        if walk:
            patch.setattr(selective, "WALK", 1)
        for dtype, relative in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
            args = selective_inputs(T, dtype, T)
            found = gradients(lambda *z: selective_scan(*z, reset, emit, "parallel", skip=z[1][0, 0]), *args)
            expected = gradients(lambda *z: selective_scan(*z, reset, emit, "reference", skip=z[1][0, 0]), *args)
            assert_close(found, expected, relative)


@pytest.mark.parametrize("walk", [1, 1000])
def test_selective_scan_by_finite_differences(monkeypatch, walk):
    monkeypatch.setattr(selective, "WALK", walk)
    monkeypatch.setattr(selective, "BUDGET", 1)
    args = [x.requires_grad_() for x in selective_inputs(19)]
    reset = torch.tensor([[i == 8 for i in range(19)]] * 2)
    assert torch.autograd.gradcheck(lambda *z: selective_scan(*z, reset, 5, "parallel"), args)


def test_selective_scan_documents_and_identity_tokens():
    x, dt, A, B, C, h0 = selective_inputs(40)
    reset = torch.zeros(2, 40, dtype=torch.bool)
    reset[:, 21] = True
    y, h = selective_scan(x, dt, A, B, C, h0, reset)
    y2, h2 = selective_scan(*(z[:, 21:] for z in (x, dt)), A, *(z[:, 21:] for z in (B, C)))
    torch.testing.assert_close(y[:, 21:], y2, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(h, h2, rtol=1e-11, atol=1e-12)
    _, h = selective_scan(x, torch.zeros_like(dt), A, B, C, h0)
    assert torch.equal(h, h0)


def test_selective_scan_names_wrong_shapes():
    x, dt, A, B, C, _ = selective_inputs(5)
    with pytest.raises(ValueError, match="give both"):
        selective_scan(x, dt[:, :4], A, B, C)
    with pytest.raises(ValueError, match="B has shape"):
        selective_scan(x, dt, A, B[..., :1], C)
    with pytest.raises(ValueError, match="A has shape"):
        selective_scan(x, dt, A.mT, B, C)
    with pytest.raises(ValueError, match="emit=0"):
        selective_scan(x, dt, A, B, C, emit=0)


@pytest.mark.parametrize(("T", "K"), [(1, 1), (7, 3), (20, 20), (9, 33)])
def test_fft_convolution_equals_the_sum(T, K):
    torch.manual_seed(0)
    u, k = torch.randn(2, T, 3, dtype=torch.float64), torch.randn(3, K, dtype=torch.float64)
    y = torch.zeros_like(u)
    for t in range(T):
        for s in range(min(t + 1, K)):
            y[:, t] += k[:, s] * u[:, t - s]
    torch.testing.assert_close(fft_convolution(u, k), y, rtol=1e-11, atol=1e-12)
    assert fft_convolution(u.bfloat16(), k.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="give"):
        fft_convolution(u, k[:2])
