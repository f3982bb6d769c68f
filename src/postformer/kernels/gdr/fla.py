"""flash-linear-attention's kernels (extra `kernels`) behind `gdr`: an optional backend on GPUs.

Its functions take some of K1's forms. Which of them: `form`. One is used where it has been found right for a call's
sizes and, unless asked for by name, faster than our own kernels there; both are tried once in a process.
"""

# The kernels of flash-linear-attention are not installed where types are checked.
# pyright: reportMissingImports=false

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import settings
from ..gpu import device as triton_device
from .reference import gdr_recurrent

PACKAGE = "flash-linear-attention"
Maybe = Tensor | None
LEAST = 64
"""Tokens below which its chunks are not worth trying"""


class Call(NamedTuple):
    """K1's arguments, [B, H, T, d], one step a token; `rate` times `e` is the write."""

    q: Tensor
    g: Maybe
    rate: Maybe
    w: Maybe
    e: Maybe
    u: Maybe
    k: Maybe
    v: Maybe


class Sizes(NamedTuple):
    """What a form is tried at: sequences times heads, tokens (both powers of two), channels, dtype, with gradients."""

    heads: int
    tokens: int
    dk: int
    dv: int
    dtype: str
    trains: bool


FUNCTIONS = {
    "delta": ("delta_rule", "chunk_delta_rule"), "delta-head": ("gated_delta_rule", "chunk_gated_delta_rule"),
    "delta-channel": ("kda", "chunk_kda"), "add": ("simple_gla", "chunk_simple_gla"),
    "add-head": ("simple_gla", "chunk_simple_gla"), "add-channel": ("gla", "chunk_gla"),
    "dplr": ("generalized_delta_rule", "chunk_dplr_delta_rule"),
}  # fmt: skip
"""form -> where its function is in fla.ops"""


def form(x: Call, early_erase: bool) -> str | None:
    """Which of FUNCTIONS computes a call, or None: delta rules whose write is `rate` times the erased key, additive
    writes, and the two together as in RWKV-7 (channel decays, erases before the decay, a target of zero)."""
    decay = "" if x.g is None else "-head" if x.g.shape[-1] == 1 else "-channel"
    if decay == "" and x.e is not None and x.q.dtype == torch.float32:
        return None  # which its function refuses
    if x.e is None:
        return "add" + decay
    if x.k is None and x.rate is not None and x.u is not None and not early_erase:
        return "delta" + decay
    if x.k is not None and x.u is None and x.w is not None and early_erase and decay == "-channel":
        return "dplr"
    return None


@cache
def why_not(name: str) -> str:
    """Why the function of a form cannot be called, or "" where it can."""
    module, function = FUNCTIONS[name]
    if importlib.util.find_spec("fla") is None:
        return f"{PACKAGE} is not installed; pip install 'postformer[kernels]'"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            getattr(importlib.import_module(f"fla.ops.{module}"), function)
    except Exception as error:  # of another package's import: none may stop a training run
        return f"{PACKAGE} has no {function} here: {type(error).__name__}: {str(error)[:200]}"
    return ""


def run(name: str, x: Call, start: Tensor) -> tuple[Tensor, Tensor]:
    """(o [B, H, T, dv], state [B, H, dk, dv] fp32) by the form's function."""
    module, function = FUNCTIONS[name]
    call: Callable[..., Any] = getattr(importlib.import_module(f"fla.ops.{module}"), function)
    q, g, rate, w, e, u, k, v = (None if z is None else z.transpose(1, 2) for z in x)
    if g is not None and g.shape[-1] == 1:
        g = g[..., 0]
    more = {"scale": 1.0, "initial_state": start, "output_final_state": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of float32, which was tried
        if name == "dplr":
            assert e is not None
            o, last = call(q, k, v, -e, w, g, **more)
        elif rate is not None:
            o, last = call(q, e, u, **({} if g is None else {"g": g}), beta=rate[..., 0].to(x.q.dtype), **more)
        else:
            o, last = call(q, k, v, **({} if g is None else {"g": g}), **more)
    return o.transpose(1, 2), last


def chosen(backend: str, x: Call, start: Maybe, steps: int, early_erase: bool, early_read: bool,
           reset: Maybe) -> str | None:  # fmt: skip
    """The form by which a call is to run; None: not by flash-linear-attention.

    Raises RuntimeError where it was asked for by name and cannot.
    """
    there = x.q.is_cuda or triton_device.interpreted()
    if backend != "fla" and not (backend == "auto" and there and settings.current().borrows):
        return None
    T, dk = x.q.shape[2:]
    given = [z for z in (x.q, x.w, x.e, x.u, x.k, x.v) if z is not None]
    name = None
    if not there:
        why = "it needs a GPU"
    elif torch.compiler.is_compiling():
        why = "its functions break graphs"
    elif steps > 1 or early_read or reset is not None:
        why = "it takes one step a token, reads after the write and no resets"
    elif x.q.dtype == torch.float64 or any(z.dtype != x.q.dtype for z in given) or dk > 256:
        why = "it takes one dtype, of at most 32 bits, and keys of at most 256 channels"
    else:
        name = form(x, early_erase)
        why = why_not(name) if name else "it has no such rule"
    if why or name is None:
        if backend == "fla":
            raise RuntimeError(f"gdr by {PACKAGE}: {why}")
        return None
    if backend == "fla":
        return name
    if T < LEAST:
        return None
    sizes = Sizes(_power(x.q.shape[0] * x.q.shape[1], 1024), _power(T, 8192), dk, _values(x).shape[-1],
                  str(x.q.dtype)[6:], settings.recorded(*x, start))
    return name if faster(name, str(x.q.device), sizes) else None


def _values(x: Call) -> Tensor:
    found = x.v if x.u is None else x.u
    assert found is not None
    return found


def _power(n: int, most: int) -> int:
    return min(most, 1 << (n - 1).bit_length())


def faster(name: str, device: str, sizes: Sizes) -> bool:
    """Whether the form's function is right and faster than ours at these sizes: tried once in a process."""
    if not triton_device.trusted(PACKAGE, device, name, sizes.dtype, sizes.dk, sizes.dv):
        return False
    ours, theirs = times(name, device, sizes)
    return theirs < ours


@cache
def times(name: str, device: str, sizes: Sizes) -> tuple[float, float]:
    """(ours, theirs) in seconds: of a forward and, where there are gradients, a backward pass."""
    from . import gdr

    def once(backend: str) -> Callable[[], Any]:
        leaves, start = _draw(name, device, sizes, sizes.heads, sizes.tokens)
        x = leaves._asdict()
        k, v = x.pop("k"), x.pop("v")

        def work() -> None:
            with torch.set_grad_enabled(sizes.trains), settings.use(borrows=False):
                o, _ = gdr(**x, k_add=k, v_add=v, state=start, erase_before_decay=name == "dplr", backend=backend)
                if sizes.trains:
                    torch.autograd.grad(o, [z for z in leaves if z is not None], torch.ones_like(o), allow_unused=True)
        return work

    return triton_device.seconds(once("auto"), device), triton_device.seconds(once("fla"), device)


def _draw(name: str, device: str, sizes: Sizes, H: int, T: int) -> tuple[Call, Tensor]:
    """Random arguments of a form, as leaves, and a state."""
    generator, dtype = torch.Generator().manual_seed(0), getattr(torch, sizes.dtype)

    def new(*shape: int, of: torch.dtype = dtype) -> Tensor:
        x = torch.randn(1, T, H, *shape, generator=generator)  # tokens before heads, as layers have them
        return x.to(device, of).transpose(1, 2).requires_grad_(sizes.trains)

    def unit(*shape: int) -> Tensor:
        return torch.nn.functional.normalize(new(*shape).detach(), dim=-1).requires_grad_(sizes.trains)

    def share() -> Tensor:
        return new(1).detach().sigmoid().requires_grad_(sizes.trains)

    q, writes = (new(sizes.dk).detach() / sizes.dk**0.5).requires_grad_(sizes.trains), name.startswith(("add", "dplr"))
    erases = not name.startswith("add")
    g = None
    if not name.endswith(("delta", "add")):
        g = -new(1 if name.endswith("head") else sizes.dk, of=torch.float32).detach().abs()
        g[:, :, 2] = -60.0 if name != "dplr" else -1.0  # forgets; RWKV-7's decays are bounded
        g.requires_grad_(sizes.trains)
    e = unit(sizes.dk) if erases else None
    x = Call(q, g, share() if erases and not writes else None, unit(sizes.dk) if erases and writes else None, e,
             new(sizes.dv) if erases and not writes else None, unit(sizes.dk) if writes else None,
             new(sizes.dv) if writes else None)
    if x.w is not None:  # a step that does not overshoot
        assert e is not None
        x = x._replace(w=(0.5 * e.detach()).requires_grad_(sizes.trains))
    start = torch.randn(1, H, sizes.dk, sizes.dv, generator=generator).to(device).requires_grad_(sizes.trains)
    return x, start


def self_test(device: torch.device, name: str, dtype: str, dk: int, dv: int) -> None:
    """Raise ArithmeticError where results or gradients differ from the recurrence's in double precision."""
    x, start = _draw(name, str(device), Sizes(2, 70, dk, dv, dtype, True), 2, 70)
    exact = Call(*(None if z is None else z.detach().double().requires_grad_() for z in x))  # type: ignore[arg-type]
    start_ = start.detach().double().requires_grad_()
    o, last = run(name, x, start)
    w = exact.w if exact.rate is None or exact.e is None else exact.rate * exact.e
    o_, last_, _ = gdr_recurrent(exact.q, exact.g, w, exact.e, exact.u, exact.k, exact.v, start_, None, 1,
                                 name == "dplr", False, None)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(z.shape, generator=generator).to(device) for z in (o, last)]
    for outputs in ((o, last), (o_, last_)):
        sum(((z * y).sum() for z, y in zip(outputs, weights)), torch.zeros((), device=device)).backward()
    tolerance = 1e-3 if dtype == "float32" else 2e-2
    pairs = [("o", o, o_), ("state", last, last_), ("the gradient of the state", start.grad, start_.grad)]
    pairs += [(f"the gradient of {field}", z.grad, y.grad) for field, z, y in zip(Call._fields, x, exact)
              if z is not None and y is not None]
    for what, z, y in pairs:
        assert z is not None
        assert y is not None
        triton_device.agree(z, y, tolerance, what)


triton_device.CHECKS[PACKAGE] = self_test
