"""What a tape's instructions are made of: PyTorch operations by name -> instructions of native/tape.h."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

UNARY = ["copy", "neg", "exp", "log", "log1p", "expm1", "sqrt", "rsqrt", "abs", "sigmoid", "silu", "tanh", "softplus",
         "log_sigmoid_forward", "relu", "gelu", "gelu-tanh", "reciprocal", "cos", "sin", "sign", "round", "floor",
         "logical_not", "elu"]
BINARY = ["add", "mul", "div", "maximum", "minimum", "pow", "remainder", "lt", "le", "gt", "ge", "eq", "ne",
          "logical_and", "logical_or", "gelu_backward", "gelu_backward-tanh"]
TERNARY = ["addcmul", "where", "lerp"]
REDUCED = ["sum", "mean", "amax", "amin", "linalg_vector_norm", "argmax"]
KINDS = [*UNARY, "clamp", *BINARY, *TERNARY, "end", *REDUCED, "cumsum", "_softmax", "_log_softmax", "layer_norm",
         "matmul", "gather", "attend", "scan_step", "when"]
"""In the order of the kinds in native/tape.h"""
KIND = {name: i for i, name in enumerate(KINDS)}
RANK = 5
FUSED = {"attend", "recall", "scan_step"}
SAME = {"clone": "copy", "_to_copy": "copy", "multiply": "mul", "true_divide": "div", "_unsafe_view": "copy",
        "bitwise_and": "logical_and", "bitwise_or": "logical_or", "bitwise_not": "logical_not", "negative": "neg",
        "any": "amax", "all": "amin"}


class NotRecordable(Exception):
    """Why a function cannot become a tape."""


@dataclass
class Operand:
    tensor: Tensor
    strides: Sequence[int]


@dataclass
class Instruction:
    kind: str
    sizes: Sequence[int]
    operands: Sequence[Operand | None]
    """y, a, b, c, d"""
    alpha: float = 1.0
    beta: float = 0.0

    def same_place(self, old: Tensor) -> bool:
        """Whether it reads each value of `old` just where it writes the new one."""
        y, *inputs = self.operands
        home = old.untyped_storage().data_ptr()
        return KIND[self.kind] < KIND["end"] and y is not None and not y.tensor.storage_offset() and all(
            o is None or o.tensor.untyped_storage().data_ptr() != home
            or (o.tensor.data_ptr() == old.data_ptr() and [*o.strides] == [*y.strides]) for o in inputs)

    def tensors(self) -> list[Tensor]:
        return [o.tensor for o in self.operands if o is not None]

    def idle(self, moved: dict[int, int]) -> bool:
        """A copy onto itself"""
        y, a = (*self.operands, None)[:2]
        return self.kind == "copy" and y is not None and a is not None and y.tensor.dtype == a.tensor.dtype and \
            [*y.strides] == [*a.strides] and address(y.tensor, moved) == address(a.tensor, moved)


def address(x: Tensor, moved: dict[int, int]) -> int:
    home = x.untyped_storage().data_ptr()
    return x.data_ptr() + moved.get(home, home) - home


def lower(name: str, args: tuple[Any, ...], options: dict[str, Any], writes: list[Tensor],
          dtype: torch.dtype) -> list[Instruction]:
    """One operation's instructions. Raises NotRecordable for what the tape does not have."""
    if not writes:
        raise NotRecordable(f"a value is asked for ({name})")
    if not writes[0].numel():
        return []
    name = SAME.get(name, name)
    for t in (*writes, *(a for a in args if isinstance(a, Tensor))):
        if t.device.type != "cpu" or t.dtype not in (dtype, torch.int64, torch.bool):
            raise NotRecordable(f"{name} on {t.dtype} in a tape of {dtype}")
    made = LOWER.get(name)
    if made is None:
        if name not in ELEMENTWISE:
            raise NotRecordable(f"no instruction for {name}")
        made = _elementwise
    return made(name, args, options, writes, dtype)


def pack(instructions: list[Instruction], moved: dict[int, int]) -> Tensor:
    """[n, 44] int64, as native/tape.h reads them; `moved`: memory that lies elsewhere than while recording."""
    rows = []
    types = {torch.int64: 1, torch.bool: 2}
    for i in instructions:
        row = [KIND[i.kind], len(i.sizes), *i.sizes, *[1] * (RANK - len(i.sizes))]
        for o in (*i.operands, *[None] * (5 - len(i.operands))):
            if o is None:
                row += [0] * (2 + RANK)
                continue
            row += [address(o.tensor, moved), types.get(o.tensor.dtype, 0), *o.strides, *[0] * (RANK - len(o.strides))]
        row += struct.unpack("qq", struct.pack("dd", i.alpha, i.beta))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.int64)


def _tensor(value: Any, dtype: torch.dtype) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.tensor(value, dtype=torch.bool if isinstance(value, bool) else
                        torch.int64 if isinstance(value, int) and dtype in (torch.int64, torch.bool) else dtype)


def pointwise(kind: str, out: Tensor, values: Sequence[Tensor], alpha: float = 1.0, beta: float = 0.0) -> Instruction:
    """out = kind(values), all of them of out's shape after broadcasting; neighbouring dimensions are joined."""
    if kind not in KIND:
        raise NotRecordable(f"no instruction for {kind}")
    tensors = [out, *(v.expand(out.shape) for v in values)]
    sizes: list[int] = []
    strides: list[list[int]] = []
    for d, n in enumerate(out.shape):
        if n == 1:
            continue
        here = [t.stride(d) for t in tensors]
        if sizes and all(s == h * n for s, h in zip(strides[-1], here)):
            sizes[-1] *= n
            strides[-1] = here
        else:
            sizes.append(n)
            strides.append(here)
    if not sizes:
        sizes, strides = [1], [[1] * len(tensors)]
    if len(sizes) > RANK:
        raise NotRecordable(f"{kind} over {len(sizes)} dimensions")
    operands = [Operand(t, [s[k] for s in strides]) for k, t in enumerate((out, *values))]
    return Instruction(kind, sizes, operands, alpha, beta)


def _elementwise(name: str, args: Any, options: Any, writes: list[Tensor], dtype: torch.dtype) -> list[Instruction]:
    out, count = writes[0], ELEMENTWISE[name]
    near = next((a.dtype for a in args if isinstance(a, Tensor)), dtype)
    if name in ("lt", "le", "gt", "ge", "eq", "ne") and any(isinstance(a, float) for a in args):
        near = dtype
    values = [_tensor(a, near) for a in args[:count]]
    alpha, beta = float(options.get("alpha", options.get("value", 1))), 0.0
    if name == "softplus" and tuple(args[1:]) not in ((), (1,), (1, 20), (1.0, 20.0)):
        raise NotRecordable("softplus with its own slope")
    if name == "elu" and tuple(args[1:]) not in ((), (1,), (1.0,), (1, 1, 1), (1.0, 1.0, 1.0)):
        raise NotRecordable("elu with its own slope")
    if name == "div" and options.get("rounding_mode"):
        raise NotRecordable("a division that rounds")
    return [pointwise(name, out, values, alpha, beta)]


ELEMENTWISE = {name: i for i, names in enumerate((UNARY, BINARY, TERNARY), 1) for name in names}


def _copy(name: str, args: Any, options: Any, writes: list[Tensor], dtype: torch.dtype) -> list[Instruction]:
    source = args[1] if len(args) > 1 and isinstance(args[1], Tensor) else args[0]
    return [pointwise("copy", writes[0], [source])]


def _subtract(name: str, args: Any, options: Any, writes: list[Tensor], dtype: torch.dtype) -> list[Instruction]:
    a, b = (_tensor(v, dtype if isinstance(v, float) else writes[0].dtype) for v in args[:2])
    if name == "rsub":
        a, b = b, a
    return [pointwise("add", writes[0], [a, b], -float(options.get("alpha", args[2] if len(args) > 2 else 1)))]


def _power(name: str, args: Any, options: Any, writes: list[Tensor], dtype: torch.dtype) -> list[Instruction]:
    a, b = args[:2]
    if not isinstance(b, Tensor) and b in (1, 2, -1, 0.5, -0.5):
        kind = {1: "copy", 2: "mul", -1: "reciprocal", 0.5: "sqrt", -0.5: "rsqrt"}[b]
        return [pointwise(kind, writes[0], [a, a] if b == 2 else [a])]
    return [pointwise("pow", writes[0], [_tensor(a, dtype), _tensor(b, dtype)])]


def _clamp(name: str, args: Any, options: Any, writes: list[Tensor], dtype: torch.dtype) -> list[Instruction]:
    low, high = (*args, None, None)[1:3]
    low, high = options.get("min", low), options.get("max", high)
    if name == "clamp_max":
        low, high = None, low if low is not None else high
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        raise NotRecordable("clamp to a tensor")
    limits = -math.inf if low is None else float(low), math.inf if high is None else float(high)
    return [pointwise("clamp", writes[0], [args[0]], *limits)]


def _filled(name: str, args: Any, options: Any, writes: list[Tensor], dtype: torch.dtype) -> list[Instruction]:
    if name == "masked_fill":
        return [pointwise("where", writes[0], [args[1], _tensor(args[2], writes[0].dtype), args[0]])]
    value = args[1] if name == "fill" else 0
    return [pointwise("copy", writes[0], [_tensor(value, writes[0].dtype)])]


def _gelu(name: str, args: Any, options: Any, writes: list[Tensor], dtype: torch.dtype) -> list[Instruction]:
    kind = name + ("-tanh" if options.get("approximate") == "tanh" else "")
    return [pointwise(kind, writes[0], args[:2] if name == "gelu_backward" else args[:1])]


def _padded(name: str, args: Any, options: Any, writes: list[Tensor], dtype: torch.dtype) -> list[Instruction]:
    a, pads, out = args[0], list(args[1]), writes[0]
    value = args[2] if len(args) > 2 else options.get("value", 0)
    inner = out
    for d, (before, after) in enumerate(zip(pads[::2], pads[1::2])):
        if before < 0 or after < 0:
            raise NotRecordable("a negative pad")
        inner = inner.narrow(out.ndim - 1 - d, before, a.shape[out.ndim - 1 - d])
    made = [pointwise("copy", out, [_tensor(value, out.dtype)])]
    return made + ([pointwise("copy", inner, [a])] if a.numel() else [])


def _joined(name: str, args: Any, options: Any, writes: list[Tensor], dtype: torch.dtype) -> list[Instruction]:
    out, dim = writes[0], options.get("dim", args[1] if len(args) > 1 else 0)
    dim, at, made = dim % out.ndim, 0, []
    for part in args[0]:
        if part.ndim == 1 and out.ndim > 1 and not part.numel():
            continue
        part = part.unsqueeze(dim) if name == "stack" else part
        into = out.narrow(dim, at, part.shape[dim])
        at += part.shape[dim]
        if part.numel():
            made.append(pointwise("copy", into, [part]))
    return made


def _reduced(name: str, args: Any, options: Any, writes: list[Tensor], dtype: torch.dtype) -> list[Instruction]:
    """The reduced dimensions last and, where they lie together, as one."""
    a, out = args[0], writes[0]
    place = 2 if name == "linalg_vector_norm" else 1
    dims = options.get("dim", args[place] if len(args) > place else None)
    if name == "linalg_vector_norm" and (args[1] if len(args) > 1 else 2) != 2:
        raise NotRecordable("a norm that is not Euclidean")
    if a.dtype != out.dtype and (name != "argmax" and a.is_floating_point() != out.is_floating_point()):
        raise NotRecordable(f"{name} into another type")
    dims = list(range(a.ndim)) if dims in (None, []) else [dims] if isinstance(dims, int) else list(dims)
    dims = sorted(d % a.ndim for d in dims)
    rest = [d for d in range(a.ndim) if d not in dims]
    if len(writes) > 1:
        raise NotRecordable(f"{name} with indices")
    kept = out.squeeze(dims) if out.ndim == a.ndim else out
    sizes, strides = [a.shape[d] for d in rest], [a.stride(d) for d in rest]
    size, stride = 1, 0
    for d in reversed(dims):
        if a.shape[d] > 1:
            if size > 1 and a.stride(d) != stride * size:
                raise NotRecordable(f"{name} over dimensions that lie apart")
            stride = a.stride(d) if size == 1 else stride
            size *= a.shape[d]
    if len(sizes) + 1 > RANK:
        raise NotRecordable(f"{name} of {a.ndim} dimensions")
    each = [Operand(out, [*kept.stride(), 0]), Operand(a, [*strides, stride if size > 1 else 1])]
    return [Instruction(name, [*sizes, size], each)]


def _mapped(name: str, args: Any, options: Any, writes: list[Tensor], dtype: torch.dtype) -> list[Instruction]:
    a, out, dim = args[0], writes[0], args[1] % args[0].ndim
    order = [d for d in range(a.ndim) if d != dim] + [dim]
    if a.ndim > RANK or (a.dtype != out.dtype and name != "cumsum"):
        raise NotRecordable(f"{name} of {a.ndim} dimensions, {a.dtype} to {out.dtype}")
    each = [Operand(t, [t.stride(d) for d in order]) for t in (out, a)]
    return [Instruction(name, [a.shape[d] for d in order], each)]


def _layer_norm(name: str, args: Any, options: Any, writes: list[Tensor], dtype: torch.dtype) -> list[Instruction]:
    a, shape, weight, bias, eps = args
    if len(shape) != 1 or a.ndim > RANK:
        raise NotRecordable("a layer norm over several dimensions")
    each = [None if t is None else Operand(t, [0] * (a.ndim - 1) + [t.stride(0)]) for t in (weight, bias)]
    return [Instruction("layer_norm", a.shape, [Operand(t, t.stride()) for t in (writes[0], a)] + each, eps)]


def _matmul(name: str, args: Any, options: Any, writes: list[Tensor], dtype: torch.dtype) -> list[Instruction]:
    out = writes[0]
    if options.get("alpha", 1) != 1 or options.get("beta", 1) != 1 or not out.is_floating_point():
        raise NotRecordable(f"{name} with factors")
    a, b = args[-2:]
    c = args[0] if name.startswith(("add", "badd")) else None
    if name in ("mv", "addmv", "dot"):
        b, out = b.unsqueeze(-1), out.unsqueeze(-1)
        c = None if c is None else c.unsqueeze(-1)
        a, out = (a[None], out[None]) if name == "dot" else (a, out)
    if a.ndim == 2:
        a, b, out = a[None], b[None], out[None]
    c = None if c is None else c.expand(out.shape)
    each = [Operand(t, t.stride()) for t in (out, a, b)] + ([] if c is None else [Operand(c, c.stride())])
    return [Instruction("matmul", [*out.shape, a.shape[2]], each)]


def _gathered(name: str, args: Any, options: Any, writes: list[Tensor], dtype: torch.dtype) -> list[Instruction]:
    out = writes[0]
    if name == "embedding":
        a, dim, index = args[0], 0, args[1].reshape(-1)
        flat, strides = out.reshape(-1, a.shape[1]), [0, a.stride(1)]
        index = index[:, None].expand(flat.shape)
    elif name == "index":
        a, named = args[0], [(d, i) for d, i in enumerate(args[1]) if i is not None]
        if len(named) != 1 or named[0][1].dtype != torch.int64 or named[0][1].ndim != 1:
            raise NotRecordable("an index of several dimensions")
        dim, index = named[0]
    else:
        a, dim, index = args[0], args[1] % args[0].ndim, args[2]
    if name != "embedding":
        if name in ("index", "index_select"):
            index = index.view(*(-1 if d == dim else 1 for d in range(out.ndim))).expand(out.shape)
        flat, strides = out, [0 if d == dim else s for d, s in enumerate(a.stride())]
    if flat.ndim > RANK or index.dtype != torch.int64:
        raise NotRecordable(f"{name} of {flat.ndim} dimensions")
    return [Instruction("gather", flat.shape, [Operand(flat, flat.stride()), Operand(a, strides),
                                               Operand(index, index.stride())], a.stride(dim), a.shape[dim])]


def _dense(*tensors: Tensor) -> None:
    if not all(t.is_contiguous() for t in tensors):
        raise NotRecordable("an operand is not contiguous")


def _attend(name: str, args: Any, options: Any, writes: list[Tensor], dtype: torch.dtype) -> list[Instruction]:
    q, new, data, count, scale = args
    _dense(q, new, data[0], count)
    sizes = [q.shape[0], q.shape[1], data.shape[3], q.shape[2], data.shape[1]]
    each = [Operand(t, t.stride()) for t in (writes[0], q, new, data, count)]
    return [Instruction("attend", sizes, each, scale)]


def _recall(name: str, args: Any, options: Any, writes: list[Tensor], dtype: torch.dtype) -> list[Instruction]:
    q, data, count, scale = args
    _dense(q, data[0], count)
    sizes = [q.shape[0], q.shape[1], data.shape[3], q.shape[2], data.shape[1]]
    each = [Operand(writes[0], writes[0].stride()), Operand(q, q.stride()), None,
            Operand(data, data.stride()), Operand(count, count.stride())]
    return [Instruction("attend", sizes, each, scale)]


def _topk(name: str, args: Any, options: Any, writes: list[Tensor], dtype: torch.dtype) -> list[Instruction]:
    """The largest, then the largest of the others, and so on."""
    a, (values, indices) = args[0], writes
    dim = args[2] if len(args) > 2 else options.get("dim", -1)
    largest = args[3] if len(args) > 3 else options.get("largest", True)
    if dim % a.ndim != a.ndim - 1 or a.ndim > RANK or not largest:
        raise NotRecordable("topk that is not of the largest of the last dimension")
    left, here = a.contiguous().clone(), torch.empty(a.shape, dtype=torch.bool)
    each = torch.arange(a.shape[-1]).expand(a.shape)
    made = [pointwise("copy", left, [a])]
    for j in range(count := indices.shape[-1]):
        value, index = values[..., j], indices[..., j]
        rows = [Operand(left, left.stride())]
        made += [Instruction("argmax", left.shape, [Operand(index, [*index.stride(), 0]), *rows]),
                 Instruction("amax", left.shape, [Operand(value, [*value.stride(), 0]), *rows])]
        if j + 1 < count:
            made += [pointwise("eq", here, [each, index[..., None]]),
                     pointwise("where", left, [here, _tensor(-math.inf, left.dtype), left])]
    return made


def when_any(needed: Tensor) -> Instruction:
    """Whether the next instructions run; `alpha`, how many those are, is filled in when it is known."""
    if needed.dtype != torch.bool or needed.ndim > RANK:
        raise NotRecordable(f"a condition of {needed.dtype} in {needed.ndim} dimensions")
    sizes, strides = ([1], [1]) if not needed.ndim else (list(needed.shape), list(needed.stride()))
    return Instruction("when", sizes, [None, Operand(needed, strides)])


def _scan_step(name: str, args: Any, options: Any, writes: list[Tensor], dtype: torch.dtype) -> list[Instruction]:
    x, dt, A, B, C, h = args
    y, after = writes
    _dense(A, y, after, B[0], C[0])
    made = []
    for i, t in enumerate((x, dt)):
        if not t.is_contiguous():
            dense = torch.empty(t.shape, dtype=t.dtype)
            made.append(pointwise("copy", dense, [t]))
            x, dt = (dense, dt) if i == 0 else (x, dense)
    each = [Operand(t, t.stride()) for t in (y, x, dt, B, after)]
    second = [None, Operand(A, A.stride()), Operand(C, C.stride())]
    sizes = [*x.shape, A.shape[1]]
    return [*made, pointwise("copy", after, [h]), Instruction("scan_step", sizes, each),
            Instruction("scan_step", sizes, second)]


LOWER: dict[str, Callable[..., list[Instruction]]] = {
    "copy": _copy, "sub": _subtract, "rsub": _subtract, "subtract": _subtract, "pow": _power, "clamp": _clamp,
    "clamp_min": _clamp, "clamp_max": _clamp, "masked_fill": _filled, "fill": _filled, "zero": _filled, "gelu": _gelu,
    "gelu_backward": _gelu, "constant_pad_nd": _padded,
    "cat": _joined, "stack": _joined, "_softmax": _mapped, "_log_softmax": _mapped, "cumsum": _mapped,
    "native_layer_norm": _layer_norm, "attend": _attend, "recall": _recall, "topk": _topk, "scan_step": _scan_step,
    **dict.fromkeys(REDUCED, _reduced),
    **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot"), _matmul),
    **dict.fromkeys(("embedding", "index", "index_select", "gather"), _gathered),
}
