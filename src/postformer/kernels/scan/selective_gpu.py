"""Mamba's selective scan as Triton kernels, for GPUs, as operators that `torch.compile` and fake tensors know."""

# Kernels are launched by subscript, which the checker does not follow.
# pyright: reportIndexIssue=false, reportCallIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..gpu import device as triton_device
from ..native import rows

Maybe = Tensor | None

L = 32
"""Tokens of a chunk: between two states that are kept while the operator runs."""
BLOCK = 256


def _sizes(x: Tensor, A: Tensor, reset: Maybe) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """(grid, tiles): about 4096 entries of a chunk's states at a time."""
    (batch, T, D), N = x.shape, A.shape[1]
    BN = 1 << (N - 1).bit_length()
    BD = max(1, min(128 // BN, 1 << (D - 1).bit_length()))
    tiles = {"L": L, "BD": BD, "BN": BN, "RESETS": reset is not None, "num_warps": 4, "enable_fp_fusion": True}
    return (-(-T // L), batch, -(-D // BD)), tiles


def _chain(passed: Tensor, end: Tensor, first: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    """(states before each chunk [chunks, Bt, D, N], the last) or, backward, gradients of states after each."""
    from . import selective_gpu_kernels as kernels

    kept, last = torch.empty_like(end), torch.empty_like(first)
    chunks, size = len(end), first.numel()
    kernels.chain[(-(-size // BLOCK),)](passed, end, first, kept, last, chunks, size, BACK=backward, BLOCK=BLOCK,
                                        enable_fp_fusion=True)
    return kept, last


def _pair(*tensors: Tensor) -> list[Any]:
    """Each tensor and its strides of batch and token."""
    return [y for x in tensors for y in (x, x.stride()[:2])]


@torch.library.custom_op("postformer::selective_triton", mutates_args=())
def selective_triton(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor,
                     reset: Maybe) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Shapes as in `selective_scan`; x, dt, B and C in half or single precision, A and h0 fp32 -> (y, h)."""
    from . import selective_gpu_kernels as kernels

    x, dt, B, C = map(rows, (x, dt, B, C))
    A, h0, reset = A.contiguous(), h0.contiguous(), None if reset is None else reset.contiguous()
    kept, h = _chain(*_ends(x, dt, A, B, reset), h0, False)
    (grid, tiles), (_, T, D), N = _sizes(x, A, reset), x.shape, A.shape[1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    kernels.outputs[grid](*_pair(x, dt), A, *_pair(B, C), reset, kept, y, T, D, N, **tiles)
    return y, h


def _ends(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, reset: Maybe) -> tuple[Tensor, Tensor]:
    """(what of the state before each chunk is left after it, what is added), [chunks, Bt, D, N]."""
    from . import selective_gpu_kernels as kernels

    (grid, tiles), (batch, T, D), N = _sizes(x, A, reset), x.shape, A.shape[1]
    passed, end = A.new_empty(2, grid[0], batch, D, N).unbind()
    kernels.ends[grid](*_pair(x, dt), A, *_pair(B), reset, passed, end, T, D, N, **tiles)
    return passed, end


@selective_triton.register_fake
def _(x, dt, A, B, C, h0, reset):
    return x.new_empty(x.shape), h0.new_empty(h0.shape)


@torch.library.custom_op("postformer::selective_triton_backward", mutates_args=())
def selective_triton_backward(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor, reset: Maybe,
                              grad_y: Maybe, grad_h: Maybe) -> list[Tensor]:  # fmt: skip
    """Gradients of x, dt, A, B, C and h0."""
    from . import selective_gpu_kernels as kernels

    x, dt, B, C = map(rows, (x, dt, B, C))
    A, h0, reset = A.contiguous(), h0.contiguous(), None if reset is None else reset.contiguous()
    (grid, tiles), (batch, T, D), N = _sizes(x, A, reset), x.shape, A.shape[1]
    gy = rows(x.new_zeros(()).expand(x.shape) if grad_y is None else grad_y)
    after = torch.zeros_like(h0) if grad_h is None else grad_h.contiguous()
    passed, end = _ends(x, dt, A, B, reset)
    start, _ = _chain(passed, end, h0, False)
    gx, gdt = (A.new_empty(batch, T, D) for _ in range(2))
    gB, gC = (A.new_empty(grid[2], batch, T, N) for _ in range(2))
    gA = torch.empty_like(start)
    given = (*_pair(x, dt), A, *_pair(B, C), reset, *_pair(gy))
    grads = (end, gx, gdt, gA, gB, gC, T, D, N)
    kernels.back[grid](*given, start, None, *grads, **tiles, GRADIENTS=False)
    later, gh0 = _chain(passed, end, after, True)
    kernels.back[grid](*given, start, later, *grads, **tiles, GRADIENTS=True)
    found = (gx, gdt, gA.sum((0, 1)), gB.sum(0), gC.sum(0))
    return [*(g.to(z.dtype) for g, z in zip(found, (x, dt, A, B, C))), gh0]


@selective_triton_backward.register_fake
def _(x, dt, A, B, C, h0, *_):
    return [z.new_empty(z.shape) for z in (x, dt, A, B, C, h0)]


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Maybe, grad_h: Maybe) -> tuple:
    return (*selective_triton_backward(*ctx.saved_tensors, grad_y, grad_h), None)


selective_triton.register_autograd(_backward, setup_context=_save)


WIDEST = 64
"""States per channel that fit a tile."""


def runs(backend: str, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, reset: Maybe) -> bool:
    """Whether the kernels take this call: a GPU, no double precision, and they have been found right for its sizes."""
    if backend not in ("auto", "native") or not (x.is_cuda or triton_device.interpreted()) or A.shape[1] > WIDEST:
        return False
    kinds = tuple(str(z.dtype)[6:] for z in (x, dt, B, C))
    if any(kind not in ("float32", "bfloat16", "float16") for kind in kinds):
        return False
    tiles = _sizes(x, A, reset)[1]
    return triton_device.trusted("selective_scan", str(x.device), kinds, tiles["BD"], A.shape[1], reset is not None)


def self_test(device: torch.device, kinds: tuple[str, ...], D: int, N: int, resets: bool) -> None:
    """Raise ArithmeticError where results or gradients differ from a walk over the tokens in double precision."""
    batch, T = 2, L + 5
    generator = torch.Generator().manual_seed(0)

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    values = (new(batch, T, D), new(batch, T, D).abs(), -new(D, N).abs(), new(batch, T, N), new(batch, T, N))
    types = [getattr(torch, kind) for kind in (*kinds[:2], "float32", *kinds[2:], "float32")]
    given = [z.to(device, kind).requires_grad_() for z, kind in zip((*values, new(batch, D, N)), types)]
    reset = None
    if resets:
        reset = (torch.arange(T) == T // 2).repeat(batch, 1).to(device)
    x, dt, A, B, C, h = exact = [z.detach().double().requires_grad_() for z in given]
    lines = []
    for t in range(T):
        h = h if reset is None else h.masked_fill(reset[:, t, None, None], 0.0)
        h = (dt[:, t, :, None] * A).exp() * h + (dt[:, t] * x[:, t]).unsqueeze(-1) * B[:, t, None]
        lines.append((h * C[:, t, None]).sum(-1))
    found, expected = selective_triton(*given, reset), (torch.stack(lines, 1), h)
    weights = [new(*z.shape).to(device) for z in found]
    for outputs in (found, expected):
        sum(((z * w).sum() for z, w in zip(outputs, weights)), torch.zeros((), device=device)).backward()
    tolerance = 1e-4 if set(kinds) == {"float32"} else 2e-2
    for name, z, w in zip(("y", "h"), found, expected):
        triton_device.agree(z, w, tolerance, name)
    for name, z, w in zip(("x", "dt", "A", "B", "C", "h0"), given, exact):
        if z.grad is not None and w.grad is not None:
            triton_device.agree(z.grad, w.grad, tolerance, f"the gradient of {name}")


triton_device.CHECKS["selective_scan"] = self_test
