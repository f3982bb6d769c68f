"""Compiled kernels: built or not, on any vector width, with any number of threads, and under the sanitizers."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from postformer.kernels import gdr, native, use
from postformer.kernels.gdr import operators as gdr_native

COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
compiled = pytest.mark.skipif(native.native().library is None, reason=native.native().reason)
torch.set_num_threads(1)


def delta(B=2, H=2, T=67, dk=24, dv=40, R=1, channel=False, seed=0, dtype=torch.float64, both=True):
    """Arguments of gdr with unit keys; more than one chunk, sizes that fill no vector."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    e = torch.nn.functional.normalize(draw(B, H, T * R, dk), dim=-1)
    args = {
        "q": draw(B, H, T, dk), "g": -draw(B, H, T, dk if channel else 1).abs(), "e": e, "w": 0.7 * e,
        "u": draw(B, H, T * R, dv), "state": draw(B, H, dk, dv),
    }
    if both:
        args |= {"k_add": draw(B, H, T * R, dk), "v_add": draw(B, H, T * R, dv)}
    return args


def everything(args, **options):
    args = {k: x.clone().requires_grad_() for k, x in args.items()}
    o, S = gdr(**args, **options)
    (o.sin().sum() + S.cos().sum()).backward()
    return [o.detach(), S.detach(), *(x.grad for x in args.values())]


@compiled
@settings(derandomize=True, deadline=None, max_examples=60, database=None)
@given(
    T=st.integers(1, 150), dk=st.integers(1, 70), dv=st.integers(1, 70), R=st.integers(1, 3), channel=st.booleans(),
    both=st.booleans(), early=st.tuples(st.booleans(), st.booleans()), seed=st.integers(0, 99),
)
def test_any_shape_equals_token_by_token(T, dk, dv, R, channel, both, early, seed):
    flags = {"erase_before_decay": early[0], "read_before_update": early[1]}
    for dtype, relative in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        args = delta(1, 2, T, dk, dv, R, channel, seed, both=both)
        found = everything({k: x.to(dtype) for k, x in args.items()}, backend="native", **flags)
        for x, y in zip(found, everything(args, backend="reference", **flags)):
            assert (x - y).norm() <= relative * y.norm().clamp_min(1e-2)


@compiled
@pytest.mark.parametrize("channel", [False, True])
def test_threads_do_not_change_a_bit(channel):
    args = delta(B=3, T=200, channel=channel, dtype=torch.float32)
    one = everything(args, backend="native")
    try:
        torch.set_num_threads(2)
        two = everything(args, backend="native")
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(x, y) for x, y in zip(one, two))


@compiled
@pytest.mark.parametrize("channel", [False, True])
def test_nan_is_not_hidden(channel):
    args = delta(B=1, H=1, channel=channel)
    args["g"][0, 0, 5] = float("nan")
    o, S = gdr(**args, backend="native")
    assert o[:, :, 5:].isnan().all()
    assert S.isnan().all()


VARIANTS = {"AVX2": ("-mno-avx512f",), "SSE2": ("-mno-avx512f", "-mno-avx")}


@compiled
@pytest.mark.skipif("x86" not in os.uname().machine, reason="x86 only")
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_narrower_vectors(variant, monkeypatch):
    path = native.build(COMPILER, native.folder(), (*native.FLAGS, *VARIANTS[variant]))
    other = native.Native(ctypes.CDLL(str(path)), variant)
    monkeypatch.setattr(native, "native", lambda: other)
    for channel in (False, True):
        args = delta(T=100, dk=33, channel=channel)
        for x, y in zip(everything(args, backend="native"), everything(args, backend="reference")):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)
        single = {k: x.float() for k, x in args.items()}
        for x, y in zip(everything(single, backend="native"), everything(args, backend="reference")):
            assert (x - y).norm() < 1e-5 * y.norm()


@compiled
@pytest.mark.slow
def test_clean_under_the_sanitizers():
    """Every kernel on small and odd sizes, in a process that address and undefined-behaviour sanitizers watch."""
    runtime = subprocess.run([COMPILER, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("the compiler has no address sanitizer")
    flags = (*native.FLAGS, "-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    path = native.build(COMPILER, native.folder(), flags)
    program = Path(__file__).with_name("sanitized.py")
    environment = {**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(program), str(path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ran" in done.stdout


def test_without_a_compiler_pytorch_does_it(monkeypatch):
    native.native.cache_clear()
    try:
        monkeypatch.setenv("PATH", "/nowhere")
        monkeypatch.delenv("CC", raising=False)
        found = native.native()
        assert found.library is None
        assert "install one" in found.reason
        args = delta()
        torch.testing.assert_close(gdr(**args), gdr(**args, backend="parallel"))
        with pytest.raises(RuntimeError, match="no compiled code: no C compiler"):
            gdr(**args, backend="native")
    finally:
        native.native.cache_clear()


def test_it_can_be_turned_off(monkeypatch):
    native.native.cache_clear()
    try:
        monkeypatch.setenv("POSTFORMER_NATIVE", "0")
        assert native.native() == native.Native(None, "turned off by POSTFORMER_NATIVE=0")
    finally:
        native.native.cache_clear()


@pytest.mark.skipif(COMPILER is None, reason="no C compiler")
def test_a_compiler_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="no-such-option"):
        native.build(COMPILER, tmp_path, (*native.FLAGS, "--no-such-option"))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(COMPILER is None or os.environ.get("POSTFORMER_NATIVE") == "0", reason="no C compiler")
def test_where_there_is_a_compiler_it_builds():
    """Else every test of compiled code would be left out, in silence."""
    assert native.native().library is not None, native.native().reason


@pytest.mark.skipif(COMPILER is None, reason="no C compiler")
def test_it_is_built_once(tmp_path):
    flags = ("-O0", *native.FLAGS[:1], "-march=native", "-shared", "-fPIC")
    path = native.build(COMPILER, tmp_path, flags)
    written = path.stat().st_mtime_ns
    assert native.build(COMPILER, tmp_path, flags) == path
    assert path.stat().st_mtime_ns == written
    assert list(tmp_path.iterdir()) == [path]


@compiled
@pytest.mark.parametrize("channel", [False, True])
def test_it_compiles_into_one_graph(channel):
    """As PyTorch operators with shapes and gradients of their own."""
    args = delta(dtype=torch.float32, channel=channel)
    torch.compiler.reset()
    whole = torch.compile(lambda **x: gdr(**x), fullgraph=True, backend="aot_eager")
    leaves = {k: x.clone().requires_grad_() for k, x in args.items()}
    o, S = whole(**leaves)
    (o.sin().sum() + S.cos().sum()).backward()
    found = [o.detach(), S.detach(), *(x.grad for x in leaves.values())]
    torch.testing.assert_close(found, everything(args))


@compiled
def test_the_operators_keep_their_promises():
    args = delta(B=1, T=20, both=True)
    inputs = [args[k].requires_grad_() for k in ("q", "g", "w", "e", "u", "k_add", "v_add", "state")]
    torch.library.opcheck(gdr_native.gdr_chunks, (*inputs, 16, 1, False, False, True))
    torch.library.opcheck(gdr_native.gdr_chunks, (*inputs[:2], *[None] * 3, *inputs[5:], 16, 1, False, False, True))


@compiled
def test_the_setting_asks_for_it_by_name():
    args = delta(dtype=torch.float32)
    with use(backend="native"):
        named = gdr(**args)
    assert all(torch.equal(x, y) for x, y in zip(named, gdr(**args, backend="native")))


@pytest.mark.skipif(native.native().library is None, reason="no compiled kernels here")
def test_what_runs_is_seen_by_those_who_watch():
    x = torch.randn(1, 1, 8, 4, requires_grad=True)
    with native.watched() as outer:
        with native.watched() as inner:
            o, _ = gdr(x, None, k_add=x, v_add=x)
        o.sum().backward()
        with use(backend="parallel"), native.watched() as none:
            gdr(x, None, k_add=x, v_add=x)[0].sum().backward()
    assert (inner, outer, none) == ({"gdr_forward"}, {"gdr_forward", "gdr_backward"}, set())
