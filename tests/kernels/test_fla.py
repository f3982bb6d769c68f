"""flash-linear-attention behind `gdr`: which calls it takes, with which arguments, and when it is chosen.

Its kernels need a GPU. A package of its name and signatures, whose functions walk over tokens, stands in for it here;
the real ones were run in Triton's interpreter (docs/log.md).
"""

from __future__ import annotations

import sys
import textwrap

import pytest
import torch

from postformer.kernels import gdr
from postformer.kernels.gdr import fla, gpu
from postformer.kernels.gpu import device as triton_device

STANDS_IN = """
    import torch

    CALLS = []

    def walk(q, k, v, g=None, beta=None, *, a=None, b=None, gk=None, scale, initial_state, output_final_state):
        assert scale == 1.0 and output_final_state
        CALLS.append(sorted(n for n, x in dict(g=g, beta=beta, a=a, gk=gk).items() if x is not None))
        S, out = initial_state, []
        g = gk if g is None else g
        for t in range(q.shape[1]):
            before = S
            if g is not None:
                S = S * (g[:, t].exp()[..., None, None] if g.ndim == 3 else g[:, t].exp()[..., None])
            key, value = k[:, t].float(), v[:, t].float()
            if a is not None:
                seen = torch.einsum("bhkv,bhk->bhv", before, a[:, t].float())
                S = S + b[:, t].float()[..., None] * seen[..., None, :]
            if beta is not None:
                value = beta[:, t, :, None].float() * (value - torch.einsum("bhkv,bhk->bhv", S, key))
            S = S + key[..., None] * value[..., None, :]
            out.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t].float()))
        return torch.stack(out, 1).to(q.dtype), S

    def dplr(q, k, v, a, b, gk, **more):
        return walk(q, k, v, a=a, b=b, gk=gk, **more)
"""


@pytest.fixture
def stands_in(tmp_path, monkeypatch):
    """The package, importable, and a machine that seems to have a GPU -> its module with CALLS."""
    root = tmp_path / "fla" / "ops"
    root.mkdir(parents=True)
    (tmp_path / "fla" / "__init__.py").write_text("")
    (root / "__init__.py").write_text("")
    (root / "walking.py").write_text(textwrap.dedent(STANDS_IN))
    for name, (module, function) in fla.FUNCTIONS.items():
        text = f"from ..walking import walk, dplr\n{function} = {'dplr' if name == 'dplr' else 'walk'}\n"
        (root / f"{module}.py").write_text(text.replace("..walking", ".walking"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(triton_device, "interpreted", lambda: True)
    caches = (fla.why_not, fla.times, triton_device._why_not, triton_device.importable)
    for cached in caches:
        cached.cache_clear()
    monkeypatch.setattr(triton_device, "importable", lambda: "")
    from importlib import import_module

    yield import_module("fla.ops.walking")
    for name in [m for m in sys.modules if m == "fla" or m.startswith("fla.")]:
        del sys.modules[name]
    for cached in caches:
        cached.cache_clear()


def _draw(name, dtype="float32", T=9):
    return fla._draw(name, "cpu", fla.Sizes(2, T, 8, 4, dtype, True), 2, T)


def _run(name, backend, x, start, **more):
    given = x._asdict()
    given |= {"k_add": given.pop("k"), "v_add": given.pop("v")}
    o, last = gdr(**given, state=start, erase_before_decay=name == "dplr", backend=backend, **more)
    leaves = [z for z in (*x, start) if z is not None]
    return o, last, *torch.autograd.grad(o.float().square().sum() + last.sum(), leaves)


@pytest.mark.parametrize("name", [n for n in fla.FUNCTIONS if n != "delta"])
def test_arguments_mean_the_same_there(stands_in, name):
    x, start = _draw(name)
    assert fla.form(x, name == "dplr") == name
    found, expected = _run(name, "fla", x, start), _run(name, "reference", x, start)
    assert len(stands_in.CALLS) == 1
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_no_decay_and_half_precision(stands_in):
    x, start = _draw("delta", "bfloat16")
    found, expected = _run("delta", "fla", x, start), _run("delta", "reference", x, start)
    assert stands_in.CALLS == [["beta"]]
    for a, b in zip(found, expected):
        torch.testing.assert_close(a.float(), b.float(), rtol=5e-2, atol=5e-2)
    assert fla.form(_draw("delta")[0], False) is None  # its function refuses float32


def test_what_it_does_not_take_runs_on_ours_or_says_why(stands_in, monkeypatch):
    monkeypatch.setattr(fla, "faster", lambda *_: True)
    x, start = _draw("delta-head", T=70)
    reset = torch.zeros(1, 70, dtype=torch.bool)
    for more, why in (({"reset": reset}, "no resets"), ({"read_before_update": True}, "reads after the write")):
        with pytest.raises(RuntimeError, match=why):
            _run("delta-head", "fla", x, start, **more)
        assert fla.chosen("auto", x, start, 1, False, "read_before_update" in more, more.get("reset")) is None
    with pytest.raises(RuntimeError, match="no such rule"):
        gdr(x.q, x.g, w=x.e, e=x.e, u=x.u, backend="fla")  # w may be anything
    with pytest.raises(RuntimeError, match="one dtype"):
        gdr(x.q.double(), x.g, rate=x.rate, e=x.e, u=x.u, backend="fla")
    assert fla.chosen("parallel", x, start, 1, False, False, None) is None
    assert fla.chosen("auto", x, start, 1, False, False, None) == "delta-head"
    monkeypatch.setattr(triton_device, "interpreted", lambda: False)
    with pytest.raises(RuntimeError, match="needs a GPU"):
        _run("delta-head", "fla", x, start)


def test_it_is_chosen_where_it_is_right_and_faster(stands_in, monkeypatch):
    sizes = fla.Sizes(2, 64, 8, 4, "float32", True)
    times = iter([(2.0, 1.0), (1.0, 2.0), (1.0, float("inf"))])
    monkeypatch.setattr(fla, "times", lambda *_: next(times))
    assert [fla.faster("delta-head", "cpu", sizes) for _ in range(3)] == [True, False, False]


def test_both_sides_are_timed_on_the_same_work(stands_in, monkeypatch):
    calls, sizes = [], fla.Sizes(2, 64, 8, 4, "float32", True)

    def seconds(work, device):
        work()
        calls.append(len(stands_in.CALLS))
        return float(len(calls))

    monkeypatch.setattr(triton_device, "seconds", seconds)
    monkeypatch.setattr(gpu, "runs", lambda *_: False)
    assert fla.times("delta-head", "cpu", sizes) == (1.0, 2.0)
    assert calls == [0, 1]  # ours did not borrow theirs


def test_what_is_wrong_there_is_left_out(stands_in, monkeypatch):
    import importlib

    module = importlib.import_module("fla.ops.gated_delta_rule")
    monkeypatch.setattr(module, "chunk_gated_delta_rule", lambda *a, **k: [1.01 * z for z in stands_in.walk(*a, **k)])
    with pytest.warns(RuntimeWarning, match="not trusted on cpu, our own kernels run: .*o is off"):
        assert not fla.faster("delta-head", "cpu", fla.Sizes(2, 64, 8, 4, "float32", True))


def test_absent(monkeypatch):
    monkeypatch.setattr(triton_device, "interpreted", lambda: True)
    fla.why_not.cache_clear()
    x, start = _draw("add-head")
    with pytest.raises(RuntimeError, match=r"not installed; pip install 'postformer\[kernels\]'"):
        _run("add-head", "fla", x, start)


def test_a_failing_work_is_never_chosen():
    def fails():
        raise RuntimeError("out of memory")

    assert triton_device.seconds(fails, "cpu") == float("inf")
    assert 0 <= triton_device.seconds(lambda: None, "cpu") < 1
