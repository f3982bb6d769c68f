"""T11: Mamba-2's memory as a recurrence, as one masked matrix product, and in chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from postformer.contract.affine import GDR
from postformer.contract.context import Context
from postformer.design import load
from postformer.kernels import gdr
from postformer.memory.rules.mamba2 import Mamba2
from postformer.model import build
from postformer.study.claims.base import Claim, Figure, claim
from postformer.study.claims.results import Results

BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-10}


def quadratic(rule: GDR) -> Tensor:
    """[B, H, T, dv]: (L * (C B^T)) V with L_ts = exp(g_{s+1} + ... + g_t) for s <= t, the form without a state."""
    assert rule.g is not None
    assert rule.k_add is not None
    assert rule.v_add is not None
    total = rule.g[..., 0].cumsum(-1)
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(
        torch.ones(total.shape[-1], total.shape[-1], dtype=torch.bool).triu(1), -torch.inf).exp()
    return (decay * (rule.q @ rule.k_add.mT)) @ rule.v_add


def memory(dtype: torch.dtype, length: int) -> GDR:
    """What an untrained Mamba-2 layer asks of its memory for random inputs."""
    model = build(load("mamba2", width=64, layers=1).model).to(dtype)
    layer = next(module for module in model.modules() if isinstance(module, Mamba2))
    x = torch.randn(2, length, 64, dtype=dtype, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return layer(x, layer.initial(2), Context())[0]


@claim("T11")
def duality(results: Results, quick: bool) -> Claim:
    """The largest differences between the three forms, relative to the largest output."""
    figures, kept = [], []
    for dtype, bound in BOUNDS.items():
        rule = memory(dtype, 256 if quick else 1024)
        forms = {"quadratic": quadratic(rule)}
        for name, backend in (("recurrent", "reference"), ("chunked", "parallel")):
            forms[name] = gdr(rule.q, rule.g, k_add=rule.k_add, v_add=rule.v_add, backend=backend)[0]
        largest = forms["recurrent"].abs().max()
        for name in ("quadratic", "chunked"):
            gap = float((forms[name] - forms["recurrent"]).abs().max() / largest)
            figures.append(Figure(name=f"{name} against recurrent, {str(dtype).removeprefix('torch.')}", value=gap))
            kept.append(gap <= bound)
    return Claim(
        id="T11", title="State space duality",
        statement="A state-space memory with one decay per head, written as a recurrence, as attention with a decaying "
        "mask, and in chunks, is one function.",
        source="Dao and Gu 2024", papers=("2405.21060",),
        test="Outputs of Mamba-2's memory by the token-by-token kernel, by the chunked kernel and by a masked matrix "
        "product written separately; differences relative to the largest output, at most 1e-5 in float32 and 1e-10 in "
        "float64.",
        figures=tuple(figures), verdict="holds" if all(kept) else "does not hold",
        reason=f"{sum(kept)} of {len(kept)} differences are within their bounds.",
    )
