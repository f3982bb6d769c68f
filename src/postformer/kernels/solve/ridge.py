"""x_t = (H_t + Lambda_t)^{-1} q_t for every token, by conjugate gradients or Chebyshev iteration.

H_t = exp(g_t) H_{t-1} + w_t k_t^T is the memory of linear attention with keys for values, so that a product with all
H_t at once is one read of it. What the solver needs of it is computed once (the memory at chunk starts, and the
masked products of queries and keys inside chunks); an iteration is then three matrix products.

The model is `iterations` steps from x = 0, in both forms. Gradients are those of the solution, by solving the adjoint
system with the same solver: with q's gradient z = (H + Lambda)^{-1} x', those of H and Lambda come from -z^T (dH +
dLambda) x. They are the derivatives of what is returned as far as the solver has converged.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import settings
from ..gdr import gdr
from ..scan import scan
from .kalman import RESET, segment_sums, symmetric

Product = Callable[[Tensor], Tensor]
"""p [..., d] -> (H + Lambda) p, for all tokens"""
Solver = Callable[[Product, Tensor, Tensor, Tensor, int, bool], Tensor]
"""(product, right side, bounds of the spectrum, iterations, may it stop early where no step would change anything)"""


def conjugate_gradient(product: Product, q: Tensor, low: Tensor, high: Tensor, iterations: int, early: bool) -> Tensor:
    """A token whose residual has shrunk to rounding stays where it is: its steps would be noise over noise."""
    # Squares of what is small (a gradient is a right side, too) would be lost in fp32.
    unit = q.abs().amax(-1, keepdim=True)
    unit = torch.where(unit > 0, unit, 1.0)
    x, r = torch.zeros_like(q), q / unit
    p, size = r, (r * r).sum(-1, keepdim=True)
    enough = size * torch.finfo(q.dtype).eps ** 2
    for _ in range(iterations):
        moving = size > enough
        if early and not bool(moving.any()):
            break
        ap = product(p)
        step = torch.where(moving, size / torch.where(moving, (p * ap).sum(-1, keepdim=True), 1.0), 0.0)
        x, r = torch.addcmul(x, step, p), torch.addcmul(r, step, ap, value=-1)
        new = (r * r).sum(-1, keepdim=True)
        p = torch.addcmul(r, torch.where(moving, new / torch.where(moving, size, 1.0), 0.0), p)
        size = torch.where(moving, new, 0.0)
    return x * unit


def chebyshev(product: Product, q: Tensor, low: Tensor, high: Tensor, iterations: int, early: bool) -> Tensor:
    """The polynomial in H + Lambda of this degree that is smallest on [low, high], which must hold its spectrum."""
    middle = (high + low) / 2
    reach = (high - low) / (high + low)
    step, shrink = q / middle, reach
    x = step
    for _ in range(iterations):
        grow = 2 / (2 - reach * shrink)
        before, shrink = shrink, reach * grow / 2
        step = shrink * before * step + grow / middle * (q - product(x))
        x = x + step
    return x


SOLVERS: dict[str, Solver] = {"conjugate-gradient": conjugate_gradient, "chebyshev": chebyshev}


class _Adjoint(torch.autograd.Function):
    """x, found elsewhere; the gradient of its residual is the solution of the adjoint system."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, x: Tensor, solve: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.solve = solve
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        with torch.no_grad():
            return ctx.solve(grad), None, None


def implicit(q: Tensor, product: Product, plain: Product, low: Tensor, high: Tensor, solver: Solver, iterations: int,
             early: bool) -> Tensor:
    """x with its implicit gradients: `product` carries a graph to what it is made of, `plain` is the same without."""
    def solve(b: Tensor) -> Tensor:
        return solver(plain, b, low, high, iterations, early)

    with torch.no_grad():
        x = solve(q)
    if not torch.is_grad_enabled():
        return x
    return _Adjoint.apply(q - product(x), x, solve)  # type: ignore[return-value]


def solve_recurrent(q: Tensor, k: Tensor, w: Tensor, g: Tensor | None, ridge: Tensor, ratio: Tensor | None, H: Tensor,
                    reset: Tensor | None, solver: Solver, iterations: int) -> tuple[Tensor, Tensor]:
    """With every H_t written out, token by token; shapes as in ridge_solve, all in one dtype."""
    H, seen = symmetric(H), []
    decay_t = None if g is None else g.exp().unsqueeze(-1).unbind(2)
    for t, (w_t, k_t) in enumerate(zip(w.unsqueeze(-1).unbind(2), k.unsqueeze(-2).unbind(2), strict=True)):
        if reset is not None:
            H = H.masked_fill(reset[:, t, None, None, None], 0.0)
        if decay_t is not None:
            H = decay_t[t] * H
        H = H + w_t @ k_t
        seen.append(H)
    each = torch.stack(seen, 2)
    norm = each.square().sum((-1, -2)).clamp_min(tiny(H))[..., None].sqrt()
    diagonal = ridge if ratio is None else ridge + ratio * norm
    fixed, at, size = each.detach(), diagonal.detach(), norm.detach()

    def product(p: Tensor) -> Tensor:
        return (p[..., None, :] @ each).squeeze(-2) + diagonal * p

    def plain(p: Tensor) -> Tensor:
        return (p[..., None, :] @ fixed).squeeze(-2) + at * p

    low, high = at.amin(-1, keepdim=True).expand_as(size), at.amax(-1, keepdim=True) + size
    return implicit(q, product, plain, low, high, solver, iterations, False), H


def tiny(x: Tensor) -> float:
    """Far below any square that matters, and with a finite square root's derivative."""
    return 1e-30 if x.dtype == torch.float64 else 1e-20


def solve_chunked(q: Tensor, k: Tensor, w: Tensor, g: Tensor | None, ridge: Tensor, ratio: Tensor | None, H: Tensor,
                  reset: Tensor | None, solver: Solver, iterations: int, C: int) -> tuple[Tensor, Tensor]:
    """As solve_recurrent, with reads of the memory for products."""
    H = symmetric(H)
    with nullcontext() if settings.current().decay_scale == 1 else settings.use(decay_scale=1.0):
        def read(p: Tensor, **options: Any) -> Any:
            return gdr(p, g, k_add=w, v_add=k, state=H, reset=reset, **options)

        # Reads come as p^T H: rows of H hold what w writes, columns what k is.
        norm = _norms(read(k, read_before_update=True)[0], k, w, g, H, reset)
        diagonal = ridge if ratio is None else ridge + ratio * norm
        with torch.no_grad():
            _, end, starts = read(k, emit=C)
            fast = _Products(k, w, g, starts, reset, C, diagonal)
            size = norm.detach()
            # To look costs nothing here; on an accelerator it would wait for it.
            early = q.device.type == "cpu"
            low = diagonal.amin(-1, keepdim=True).expand_as(size)
            high = diagonal.amax(-1, keepdim=True) + size
        if not torch.is_grad_enabled():
            return implicit(q, fast, fast, low, high, solver, iterations, early), end
        memory: list[Tensor] = []

        def product(x: Tensor) -> Tensor:
            y, last = read(x)
            memory.append(last)
            return y + diagonal * x

        return implicit(q, product, fast, low, high, solver, iterations, early), memory[0]


def _norms(seen: Tensor, k: Tensor, w: Tensor, g: Tensor | None, H: Tensor, reset: Tensor | None) -> Tensor:
    """||H_t||_F [B, H, T, 1] by a recursion of its square, all terms >= 0. seen_t = H_{t-1}^T k_t; w_t is a multiple of
    k_t."""
    decay = torch.zeros_like(k[..., :1]) if g is None else g
    cross = 2 * decay.exp() * (seen * w).sum(-1, keepdim=True)
    added = (w * w).sum(-1, keepdim=True) * (k * k).sum(-1, keepdim=True)
    held = H.square().sum((-1, -2))[..., None]
    squares = scan((2 * decay).exp().transpose(1, 2), (cross + added).transpose(1, 2), held, reset=reset)
    return squares.transpose(1, 2).clamp_min(tiny(k)).sqrt()


class _Products:
    """p -> (H + Lambda) p for all tokens [B, H, T, d], from the memory at chunk starts."""

    def __init__(self, k: Tensor, w: Tensor, g: Tensor | None, starts: Tensor, reset: Tensor | None, C: int,
                 diagonal: Tensor) -> None:
        self.T, self.C, self.diagonal = k.shape[2], C, diagonal
        decay = torch.zeros_like(k[..., 0]) if g is None else g.squeeze(-1)
        if reset is not None:
            decay = torch.where(reset[:, None], RESET, decay)
        decay = F.pad(decay, (0, -self.T % C)).unflatten(2, (-1, C))
        self.mask = segment_sums(decay).exp()
        self.fall = decay.cumsum(-1).exp()[..., None]
        self.k, self.w = self.chunks(k), self.chunks(w).mT
        self.starts = starts.transpose(1, 2)

    def chunks(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, -self.T % self.C)).unflatten(2, (-1, self.C))

    def __call__(self, p: Tensor) -> Tensor:
        rows = self.chunks(p)
        y = (self.fall * rows) @ self.starts + ((rows @ self.w) * self.mask) @ self.k
        return y.flatten(2, 3)[:, :, : self.T] + self.diagonal * p
