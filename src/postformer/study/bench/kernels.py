"""Single kernels, forward and backward: ours, the same in PyTorch operations, and other people's code, by turns.

Values lie as projections leave them, [B, T, H, d]. Before a time counts, outputs and gradients are compared with the
PyTorch form's and with every peer's that computes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from postformer.contract.context import Context
from postformer.kernels import gdr, scan, selective_scan
from postformer.layers.local import ShortConvolution
from postformer.study.bench import peers
from postformer.study.bench.backend import Fallback, observe, ours
from postformer.study.bench.clock import Machine, clocked, summary, threads
from postformer.study.bench.config import BenchConfig, KernelSizes

Inputs = dict[str, Tensor]
CHUNK = 64
"""Of the algorithm whose multiply-adds make the floor, whatever chunks a kernel takes; and of transformers' Mamba-2."""
BACKWARD = 3
"""A forward and a backward pass together, in forward passes."""
STATES = 16
"""Of a channel of the selective scan"""
SHORT = 128
"""Tokens at which transformers' selective scan, a Python loop whose gradients take T^2 memory traffic, is measured"""
BOTH = ("cpu", "cuda")
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Case:
    """One kernel. inputs: leaves by name; ours and peers: inputs -> output, all of one layout.

    multiply_adds: of the forward pass. same: the peers that compute the same function, so that numbers must agree.
    """

    title: str
    inputs: Callable[[KernelSizes, Callable[..., Tensor]], Inputs]
    ours: Callable[[Inputs], Tensor]
    multiply_adds: Callable[[KernelSizes], float]
    peers: Mapping[str, Callable[[Inputs, str], Tensor]] = field(default_factory=dict)
    same: tuple[str, ...] = ()
    compiled: tuple[str, ...] = ("cpu",)
    """Devices for which there is compiled code"""
    length: int | None = None
    """Tokens, where they are not those of the settings"""


def _heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _delta_inputs(n: KernelSizes, draw: Callable[..., Tensor], decays: tuple[int, ...]) -> Inputs:
    shape = (n.batch, n.length, n.heads, n.dim)
    return {"q": draw(*shape), "k": F.normalize(draw(*shape), dim=-1), "v": draw(*shape),
            "g": F.logsigmoid(draw(*shape[:3], *decays) + 2), "beta": draw(*shape[:3]).sigmoid()}


def _delta(x: Inputs) -> Tensor:
    q, k, v, beta = _heads(x["q"]), _heads(x["k"]), _heads(x["v"]), _heads(x["beta"][..., None])
    g = _heads(x["g"] if x["g"].ndim == 4 else x["g"][..., None]).float()
    return _heads(gdr(q * q.shape[-1] ** -0.5, g, w=beta * k, e=k, u=v)[0])


def _attention(x: Inputs, _: str) -> Tensor:
    return peers.sdpa(x["q"], x["k"], x["v"])


def _flash(x: Inputs, device: str) -> Tensor:
    run = peers.function(peers.FLASH, "flash_attn", "flash_attn_func", device)
    if x["q"].dtype == torch.float32:
        raise peers.Absent("takes no float32; -s dtype=bfloat16")
    return run(x["q"], x["k"], x["v"], causal=True)


def _theirs(peer: str, module: str, name: str) -> Callable[[Inputs, str], Tensor]:
    """A chunked delta rule with the signature that flash-linear-attention gave it."""
    def run(x: Inputs, device: str) -> Tensor:
        return peers.function(peer, module, name, device)(x["q"], x["k"], x["v"], g=x["g"], beta=x["beta"])[0]
    return run


def _delta_work(n: KernelSizes) -> float:
    """A chunk's two triangles, their reads, the solve for both right-hand sides, and three products with the state."""
    return n.batch * n.heads * n.length * n.dim * (5 * CHUNK + 3 * n.dim)


def _add_inputs(n: KernelSizes, draw: Callable[..., Tensor]) -> Inputs:
    shape = (n.batch, n.length, n.heads, n.dim)
    return {"q": draw(*shape), "k": draw(*shape) * n.dim**-0.5, "v": draw(*shape),
            "dt": F.softplus(draw(*shape[:3]) - 2), "A": -1 - draw(n.heads).abs()}


def _add(x: Inputs) -> Tensor:
    dt = _heads(x["dt"][..., None])
    g = (dt * x["A"][:, None, None]).float()
    return _heads(gdr(_heads(x["q"]), g, k_add=_heads(x["k"]), v_add=dt * _heads(x["v"]))[0])


def _mamba2(x: Inputs, device: str) -> Tensor:
    found = peers.function(peers.TRANSFORMERS, "transformers.models.mamba2.modeling_mamba2", "mamba2_chunk_scan")(
        x["v"], x["dt"], x["A"], x["k"], x["q"], CHUNK)
    return found[0] if isinstance(found, tuple) else found


def _simple_gla(x: Inputs, device: str) -> Tensor:
    run = peers.function(peers.FLA, "fla.ops.simple_gla", "chunk_simple_gla", device)
    return run(x["q"], x["k"], x["dt"][..., None] * x["v"], g=x["dt"] * x["A"], scale=1.0)[0]


def _dplr_inputs(n: KernelSizes, draw: Callable[..., Tensor]) -> Inputs:
    shape = (n.batch, n.length, n.heads, n.dim)
    e = F.normalize(draw(*shape), dim=-1)
    return {"q": draw(*shape), "g": -0.6 * draw(*shape).sigmoid(), "e": e, "w": e * draw(*shape).sigmoid(),
            "k": draw(*shape) * n.dim**-0.5, "v": draw(*shape)}


def _dplr(x: Inputs) -> Tensor:
    q, g, e, w, k, v = (_heads(x[name]) for name in ("q", "g", "e", "w", "k", "v"))
    return _heads(gdr(q, g.float(), w=w, e=e, k_add=k, v_add=v, erase_before_decay=True)[0])


def _fla_dplr(x: Inputs, device: str) -> Tensor:
    run = peers.function(peers.FLA, "fla.ops.generalized_delta_rule", "chunk_dplr_delta_rule", device)
    return run(x["q"], x["k"], x["v"], -x["e"], x["w"], x["g"], scale=1.0)[0]


def _selective_inputs(n: KernelSizes, draw: Callable[..., Tensor]) -> Inputs:
    channels = 2 * n.heads * n.dim
    return {"x": draw(n.batch, n.length, channels), "dt": F.softplus(draw(n.batch, n.length, channels) - 3),
            "A": -1 - draw(channels, STATES).abs(), "B": draw(n.batch, n.length, STATES),
            "C": draw(n.batch, n.length, STATES)}


def _selective(x: Inputs) -> Tensor:
    return selective_scan(x["x"], x["dt"], x["A"], x["B"], x["C"])[0]


def _mamba(x: Inputs, device: str) -> Tensor:
    run = peers.function(peers.TRANSFORMERS, "transformers.models.mamba.modeling_mamba", "mamba_selective_scan")
    return run(x["x"].mT, x["dt"].mT, x["A"], x["B"].mT, x["C"].mT).mT


def _wide(n: KernelSizes, draw: Callable[..., Tensor]) -> Tensor:
    return draw(n.batch, n.length, n.heads * n.dim)


def _convolution(x: Inputs) -> Tensor:
    layer = ShortConvolution(x["x"].shape[-1], x["weight"].shape[-1]).to(x["x"].device, x["x"].dtype)
    past = layer.initial(len(x["x"]))
    return torch.func.functional_call(layer, {"weight": x["weight"]}, (x["x"], past, Context()))[0]


def _causal_conv1d(x: Inputs, device: str) -> Tensor:
    run = peers.function(peers.TRANSFORMERS, "transformers.models.mamba.modeling_mamba", "causal_conv1d_fn")
    return run(x["x"].mT, x["weight"], None, activation="silu").mT


def _selective_work(n: KernelSizes) -> float:
    """Decay, write and read of every state: elementwise work, for which the rate of a matrix product is generous."""
    return n.batch * n.length * 2 * n.heads * n.dim * STATES * 3


_T, _ATTENTION, _QWEN, _KIMI = peers.TRANSFORMERS, "attention", "qwen3_next", "kimi_linear"
_BESIDE = {_ATTENTION: _attention, peers.FLASH: _flash}
CASES: dict[str, Case] = {
    "delta-head": Case(
        "Gated delta rule, decay per head", lambda n, draw: _delta_inputs(n, draw, ()), _delta, _delta_work,
        {_T: _theirs(_T, f"transformers.models.{_QWEN}.modeling_{_QWEN}", "torch_chunk_gated_delta_rule"),
         peers.FLA: _theirs(peers.FLA, "fla.ops.gated_delta_rule", "chunk_gated_delta_rule"), **_BESIDE},
        (_T, peers.FLA), BOTH),
    "delta-channel": Case(
        "Gated delta rule, decay per channel", lambda n, draw: _delta_inputs(n, draw, (n.dim,)), _delta, _delta_work,
        {_T: _theirs(_T, f"transformers.models.{_KIMI}.modeling_{_KIMI}", "chunk_kimi_delta_attention"),
         peers.FLA: _theirs(peers.FLA, "fla.ops.kda", "chunk_kda"), **_BESIDE}, (_T, peers.FLA), BOTH),
    "add": Case(
        "Additive writes, decay per head", _add_inputs, _add,
        lambda n: n.batch * n.heads * n.length * n.dim * (2 * CHUNK + 2 * n.dim),
        {_T: _mamba2, peers.FLA: _simple_gla, **_BESIDE}, (_T, peers.FLA), BOTH),
    "dplr": Case(
        "Diagonal plus low rank (RWKV-7)", _dplr_inputs, _dplr,
        lambda n: n.batch * n.heads * n.length * n.dim * (9 * CHUNK + 4 * n.dim),
        {peers.FLA: _fla_dplr, **_BESIDE}, (peers.FLA,), BOTH),
    "selective": Case("Selective scan", _selective_inputs, _selective, _selective_work),
    "selective-short": Case(f"Selective scan, {SHORT} tokens", _selective_inputs, _selective, _selective_work,
                            {_T: _mamba}, (_T,), length=SHORT),
    "scan": Case(
        "Elementwise scan", lambda n, draw: {"a": _wide(n, draw).sigmoid(), "b": _wide(n, draw)},
        lambda x: scan(x["a"], x["b"]), lambda n: n.batch * n.length * n.heads * n.dim),
    "convolution": Case(
        "Short convolution, 4 taps", lambda n, draw: {"x": _wide(n, draw), "weight": draw(n.heads * n.dim, 4) / 2},
        _convolution, lambda n: 4 * n.batch * n.length * n.heads * n.dim, {_T: _causal_conv1d}, (_T,)),
}  # fmt: skip


def measure(config: BenchConfig, machine: Machine, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """One row per case and number of threads: see `row`. Raises ValueError for a case that does not exist."""
    names = config.kernels.cases or tuple(CASES)
    if unknown := set(names) - set(CASES):
        raise ValueError(f"kernels.cases: no {min(unknown)!r}; there are {', '.join(CASES)}")
    found = []
    for number in config.counts():
        with threads(number):
            for name in names:
                tell(f"kernel {name}, {number} thread{'s' * (number > 1)}")
                found.append({"case": name, "title": CASES[name].title, "threads": number,
                              **row(CASES[name], config, machine)})
    return found


def row(case: Case, config: BenchConfig, machine: Machine) -> dict[str, Any]:
    """`sides`: by name {min, median, rounds, backend} or {absent: why}; `floor`, `share` of it, `ratios` (how many
    times as long as ours), `agrees` (largest relative difference of outputs and gradients); or `failed`: why."""
    sizes = config.kernels if case.length is None else config.kernels.model_copy(update={"length": case.length})
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, config.dtype)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(config.device)

    inputs = {name: x.detach().to(dtype).requires_grad_() for name, x in case.inputs(sizes, draw).items()}
    grad: list[Tensor] = []

    def work(forward: Callable[[], Tensor]) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            y = forward()
            if not grad:
                grad.append(torch.randn(y.shape, generator=generator).to(y))
            return [y.detach(), *torch.autograd.grad(y, list(inputs.values()), grad[0], allow_unused=True)]
        return run

    out: dict[str, Any] = {"length": sizes.length, "sides": {}}
    sides: dict[str, dict[str, Any]] = out["sides"]
    try:
        mine = work(lambda: case.ours(inputs))
        answer, backend = observe(mine, config.backend, compiled=config.device in case.compiled)
        runs: dict[str, Callable[[], Any]] = {"ours": ours(mine, config.backend)}
        sides["ours"], results = {"backend": backend}, {}
        if config.backend != "parallel":
            results["PyTorch"], sides["PyTorch"] = observe(mine, "parallel")[0], {"backend": "PyTorch operations"}
            runs["PyTorch"] = ours(mine, "parallel")
        for peer, forward in case.peers.items():
            theirs = work(lambda forward=forward: forward(inputs, config.device))
            try:
                found = theirs()
            except Exception as error:  # a peer's own failure is told, and is none of ours
                sides[peer] = {"absent": peers.failure(error)}
                continue
            runs[peer], sides[peer] = theirs, {"backend": _backend(peer)}
            if peer in case.same:
                results[peer] = found
        out["agrees"] = {name: difference(answer, theirs) for name, theirs in results.items()}
        if off := {n: e for n, e in out["agrees"].items() if not e <= TOLERANCE[config.dtype]}:
            raise Fallback("; ".join(f"differs from {name} by {error:.1e} of the largest value"
                                     for name, error in off.items()))
    except Fallback as error:
        return out | {"failed": str(error)}
    del results, answer
    timed = machine.measure({name: clocked(run, config.device) for name, run in runs.items()}, config.kernels.rounds,
                            config.seconds)
    for name, times in timed.items():
        sides[name] |= summary(times)
    values = sum(x.numel() for x in inputs.values())
    moved = (3 * values + 3 * grad[0].numel()) * dtype.itemsize  # inputs twice and their gradients, three outputs
    out["work"] = {"multiply_adds": BACKWARD * case.multiply_adds(sizes), "bytes": moved}
    mine_min = sides["ours"]["min"]
    out["ratios"] = {name: side["min"] / mine_min for name, side in sides.items() if name != "ours" and "min" in side}
    return out


def _backend(peer: str) -> str:
    return "scaled_dot_product_attention" if peer == _ATTENTION else peers.backend(peer)


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest difference of two lists of tensors, relative to the largest value of each tensor; NaN counts."""
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        found = ((x.float() - y.float()).abs().max() / y.float().abs().max().clamp_min(1e-30)).item()
        worst = found if not found <= worst else worst
    return worst
