"""Triton kernels in Triton's interpreter, against the recurrence token by token in double precision."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings

import pytest
import torch

from postformer.kernels import gdr, selective_scan
from postformer.kernels.gdr import gpu as gdr_triton
from postformer.kernels.gdr.reference import gdr_recurrent
from postformer.kernels.gpu import device as triton_device
from postformer.kernels.scan import selective_gpu as selective_triton

INTERPRETED = triton_device.interpreted()
installed = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
inside = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter, with TRITON_INTERPRET=1")
NAMES = ("q", "g", "w", "e", "u", "k_add", "v_add", "state")


@installed
@pytest.mark.skipif(INTERPRETED, reason="is the interpreter")
def test_in_the_interpreter():
    """The other tests of this file: Triton decides when it is imported whether it interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


def _inputs(erases, adds, head, T, dk, dv, R=1, strength=1.0, dtype=torch.float32, H=2, dense=True):
    generator = torch.Generator().manual_seed(T * dk + dv + R)

    def new(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def unit(x):
        return torch.nn.functional.normalize(x, dim=-1)

    q, start = 0.3 * new(1, H, T, dk), new(1, H, dk, dv)
    g = None if head is None else -strength * new(1, H, T, 1 if head else dk).abs()
    w = e = u = k = v = None
    if erases:
        e, u = unit(new(1, H, T * R, dk)), new(1, H, T * R, dv)
        w = e * torch.rand(1, H, T * R, 1, generator=generator, dtype=torch.float64) * 1.5
    if adds:
        k, v = unit(new(1, H, T * R, dk)), new(1, H, T * R, dv)
    found = [None if x is None else x.to(torch.float32 if i in (1, 7) else dtype)
             for i, x in enumerate((q, g, w, e, u, k, v, start))]
    if not dense:  # channels apart, or tokens before heads
        found = [None if x is None else x.mT.contiguous().mT for x in found[:4]] + [
            None if x is None else x.transpose(1, 2).contiguous().transpose(1, 2) for x in found[4:7]] + found[7:]
    return [None if x is None else x.requires_grad_() for x in found]


def _compare(given, C, R=1, early_erase=False, early_read=False, tolerance=3e-6, emits=True):
    exact = [None if x is None else x.detach().double().requires_grad_() for x in given]
    o, last, S = gdr_triton.gdr_triton(*given, C, R, early_erase, early_read, emits)
    S = S.transpose(0, 1)
    expected = gdr_recurrent(*exact, None, R, early_erase, early_read, C)
    outputs = (o, last, S) if emits else (o, last)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in outputs]
    for name, x, y in zip(("o", "state", "emitted"), outputs, expected):
        triton_device.agree(x, y, tolerance, name)
    for side in (outputs, expected):
        sum((x * y).sum() for x, y in zip(side, weights)).backward()
    for name, x, y in zip(NAMES, given, exact):
        if x is not None:
            assert x.grad.dtype == x.dtype
            triton_device.agree(x.grad, y.grad, tolerance, f"the gradient of {name}")


@inside
@pytest.mark.parametrize(("erases", "adds"), [(0, 1), (1, 0), (1, 1)], ids=["additive", "delta", "both"])
@pytest.mark.parametrize("early", [0, 1], ids=["late", "early"])
def test_one_decay_per_head(erases, adds, early):
    _compare(_inputs(erases, adds, True, 35, 20, 12), 32, early_erase=bool(early), early_read=bool(early))


@inside
@pytest.mark.parametrize(
    ("erases", "adds", "early_erase", "early_read"),
    [(0, 1, 0, 1), (1, 0, 0, 0), (1, 1, 1, 0)],
    ids=["rwkv6", "kda", "rwkv7"],
)
def test_one_decay_per_channel(erases, adds, early_erase, early_read):
    given = _inputs(erases, adds, False, 35, 20, 12, H=1)
    _compare(given, 32, early_erase=bool(early_erase), early_read=bool(early_read))


@inside
@pytest.mark.parametrize("head", [True, False], ids=["head", "channel"])
@pytest.mark.parametrize("strength", [1e-3, 5.0, 60.0, 2000.0])
def test_extreme_decays(head, strength):
    # Where everything is forgotten, gradients of decays are as small as what is left: compared where they are not.
    given = _inputs(1, 0, head, 20, 8, 8, strength=strength, H=1)
    given[1].data[:, :, ::5] *= 1e-3
    _compare(given, 32, early_erase=strength == 5.0, early_read=strength == 60.0)


@inside
@pytest.mark.parametrize("head", [True, False], ids=["head", "channel"])
def test_micro_steps(head):
    _compare(_inputs(1, 1, head, 5, 8, 8, R=3, H=1), 4, R=3, early_erase=True)


@inside
def test_widths_beyond_a_tile_no_decay_and_odd_layouts():
    _compare(_inputs(1, 1, None, 17, 70, 66, H=1), 16)
    _compare(_inputs(1, 0, True, 19, 17, 5, dense=False), 16)
    _compare(_inputs(0, 1, False, 17, 3, 1, dense=False, H=1), 16)
    _compare(_inputs(1, 0, True, 1, 4, 4), 1, emits=False)


@inside
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_fp32_state(dtype):
    # What comes in is exact, so only what goes out is rounded: states are as good as ever.
    given = _inputs(1, 1, True, 18, 16, 16, dtype=dtype)
    with torch.no_grad():
        _, last, _ = gdr_triton.gdr_triton(*given, 16, 1, False, False, False)
        exact = [None if x is None else x.double() for x in given]
        triton_device.agree(last, gdr_recurrent(*exact, None, 1, False, False, None)[1], 3e-6, "state")
    _compare(given, 16, tolerance=8e-3 if dtype == torch.bfloat16 else 1e-3)


@inside
def test_operators_are_what_they_say():
    given = [None if x is None else x.detach().requires_grad_() for x in _inputs(1, 0, True, 5, 4, 4, H=1)]
    torch.library.opcheck(gdr_triton.gdr_triton, (*given, 4, 1, False, False, True))


@inside
def test_gdr_takes_the_kernels_where_they_are_trusted():
    q, g, w, e, u, _, _, state = _inputs(1, 0, True, 40, 16, 8)
    reset = torch.zeros(1, 40, dtype=torch.bool)
    reset[0, 11] = True
    flags = dict(w=w, e=e, u=u, state=state, reset=reset, emit=16, erase_before_decay=True, read_before_update=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a fallback warns
        found = gdr(q, g, backend="native", **flags)
    for x, y in zip(found, gdr(q, g, backend="reference", **flags)):
        triton_device.agree(x, y, 1e-5, "gdr")
    half = [x.detach().bfloat16() for x in (q, w, e, u)]
    o, last = gdr(half[0], g, w=half[1], e=half[2], u=half[3])
    assert (o.dtype, last.dtype) == (torch.bfloat16, torch.float32)


@inside
@pytest.mark.parametrize(
    ("batch", "T", "D", "N", "strength", "resets"),
    [(2, 33, 5, 4, 1.0, True), (1, 33, 3, 16, 60.0, False), (1, 4, 1, 1, 1.0, True)],
)
def test_selective_scan(batch, T, D, N, strength, resets):
    generator = torch.Generator().manual_seed(T)

    def new(*shape):
        return torch.randn(shape, generator=generator)

    x, B, C = new(D, batch, T).permute(1, 2, 0), new(batch, T, N), new(batch, 2 * T, N)[:, ::2]
    given = [x, new(batch, T, D).abs(), -strength * new(D, N).abs(), B, C, new(batch, D, N)]
    exact = [z.detach().double().requires_grad_() for z in given]
    given = [z.requires_grad_() for z in given]
    reset = new(batch, T) > 1.5 if resets else None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a fallback warns
        found = selective_scan(*given, reset, backend="native")
    expected = selective_scan(*exact, reset, backend="reference")
    weights = [new(*z.shape) for z in found]
    for side in (found, expected):
        sum((z * w).sum() for z, w in zip(side, weights)).backward()
    for name, z, w in zip(("y", "h"), found, expected):
        triton_device.agree(z, w, 3e-6, name)
    for name, z, w in zip(("x", "dt", "A", "B", "C", "h0"), given, exact):
        triton_device.agree(z.grad, w.grad, 3e-6, f"the gradient of {name}")


@inside
def test_selective_scan_in_half_precision():
    x, dt, B, C = (torch.rand(1, 9, n).bfloat16() for n in (4, 4, 2, 2))
    A = -torch.ones(4, 2)
    y, h = selective_scan(x, dt, A, B, C)
    expected, state = selective_scan(*(z.double() for z in (x, dt, A, B, C)), backend="reference")
    assert (y.dtype, h.dtype) == (torch.bfloat16, torch.float32)
    triton_device.agree(y, expected, 8e-3, "y")
    triton_device.agree(h, state, 3e-6, "h")
    operator = (x, dt, A, B, C, torch.zeros(1, 4, 2), None)
    torch.library.opcheck(selective_triton.selective_triton, operator)


def test_a_kernel_that_disagrees_is_not_used(monkeypatch):
    """One warning that says why; the next call is quiet."""

    def wrong(device, size):
        triton_device.agree(torch.ones(2), torch.tensor([1.0, 2.0]), 1e-3, "o")

    monkeypatch.setitem(triton_device.CHECKS, "wrong", wrong)
    monkeypatch.setattr(triton_device, "importable", lambda: "")
    triton_device._why_not.cache_clear()
    with pytest.warns(RuntimeWarning, match="wrong is not trusted on cpu, it runs as PyTorch op.*o is off by 1.00e.00"):
        assert not triton_device.trusted("wrong", "cpu", 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not triton_device.trusted("wrong", "cpu", 3)
    monkeypatch.setitem(triton_device.CHECKS, "right", lambda device: None)
    assert triton_device.trusted("right", "cpu")
    monkeypatch.setattr(triton_device, "importable", lambda: "Triton is not installed")
    with pytest.warns(RuntimeWarning, match="Triton is not installed"):
        assert not triton_device.trusted("right", "cpu", 1)
    triton_device._why_not.cache_clear()


def test_disagreement_is_seen():
    with pytest.raises(ArithmeticError, match="x is off"):
        triton_device.agree(torch.tensor([float("nan")]), torch.ones(1), 1.0, "x")
    triton_device.agree(torch.ones(3), torch.ones(3) + 1e-7, 1e-5, "x")


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs kernels on a CPU")
def test_a_cpu_needs_no_triton():
    q, g, w, e, u, *_ = _inputs(1, 0, True, 8, 4, 4)
    assert not gdr_triton.runs("auto", q, g, (w, e, u, None, None), 4, 64, 1, False, False)
    code = "import sys, postformer.kernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_chunks_fit_tiles():
    assert gdr_triton.tokens_per_chunk(1, 64, 64) == 64
    assert gdr_triton.tokens_per_chunk(3, 64, 64) == 16
    assert gdr_triton.tokens_per_chunk(1, 64, 256) == 32
    assert gdr_triton.tokens_per_chunk(100, 64, 64) == 1
