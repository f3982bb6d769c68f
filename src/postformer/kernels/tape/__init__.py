"""A function of tensors, recorded once and run again as compiled code: same operations, same memory, no allocation.

While it is recorded the function runs as it is; every PyTorch operation is noted with the memory it read and wrote.
What does not depend on the inputs is kept as a constant, views cost nothing, and the rest becomes a list of
instructions for native/tape.h that writes into memory laid out once. A function that asks for a value (`.item()`), or
uses an operation that the tape does not have, cannot be recorded: `NotRecordable` says why, and the caller goes on
running it as it is.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from .. import native as compiled
from .. import settings
from .lowering import FUSED, Instruction, NotRecordable, lower, pack, when_any

_recorder: ContextVar[_Recorder | None] = ContextVar("postformer_tape", default=None)


@dataclass
class Operation:
    """One operation: inputs and outputs share memory with what was computed while recording."""

    name: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    reads: list[Tensor]
    writes: list[Tensor]
    start: Tensor | None = None
    """What an operation without inputs made, before anything else wrote there"""


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, (tuple, list)):
        return [t for v in values for t in _tensors(v)]
    return []


def _home(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():  # in inference mode composite operations arrive whole
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        reads, writes = _tensors(args) + _tensors(list(kwargs.values())), _tensors(out)
        mutable = func._schema.is_mutable
        if not mutable and writes and any(_home(writes[0]) == _home(r) for r in reads):
            return out  # a view
        name = func._schema.name.removeprefix("aten::")
        if name.startswith(("new_", "empty")) or name.endswith("_like"):
            reads = []  # of a tensor's kind, not of its values
        start = None if reads or "empty" in name else _tensors(out)[0].clone()
        name = name.removesuffix("_") if mutable else name
        self.operations.append(Operation(name, args, kwargs, reads, writes, start))
        return out


class _Values(TorchFunctionMode):
    """Notes what hands a tensor's values to Python without an operation."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__):
            self.recorder.operations.append(Operation(func.__name__, args, {}, _tensors(args), []))
        return func(*args, **(kwargs or {}))


def recording() -> bool:
    """Whether what happens now is being recorded, so that a shortcut that asks a tensor's value must not be taken."""
    return not torch.compiler.is_compiling() and _recorder.get() is not None


def fused(function: Callable[..., Tensor | tuple[Tensor, ...]]) -> Callable[..., Any]:
    """A function of tensors that a tape runs as one instruction of its own (see lowering.FUSED); arguments by
    position. What it overwrites must be among its results."""
    name = function.__name__

    def run(*args: Any) -> Any:
        recorder = _recorder.get()
        if recorder is None:
            return function(*args)
        # Suspended: the parts are not recorded as well.
        token = _recorder.set(None)
        try:
            with _disable_current_modes():
                out = function(*args)
        finally:
            _recorder.reset(token)
        recorder.operations.append(Operation(name, args, {}, _tensors(args), _tensors(out)))
        return out

    assert name in FUSED
    return run


def when(needed: Tensor, function: Callable[[], None]) -> None:
    """Run `function` if any of `needed` (bool) is true; a tape asks each time.

    What the function makes is not to be used after it, but for what it writes, in place, into tensors that were there
    before. While recording it runs in any case.
    """
    recorder = _recorder.get()
    if recorder is None:
        if bool(needed.any()):
            function()
        return
    recorder.operations.append(Operation(BEGIN, (), {}, [needed], []))
    function()
    recorder.operations.append(Operation(END, (), {}, [], []))


def overwrite(rows: Tensor, new: Callable[[], Sequence[Tensor]], old: Sequence[Tensor]) -> None:
    """Each of `old` [B, ...] becomes its `new`, which is made only then, in place, where `rows` [B] bool is set."""
    def write() -> None:
        for value, held in zip(new(), old, strict=True):
            if value is not held:
                held.copy_(torch.where(rows.view(-1, *(1,) * (held.ndim - 1)), value.to(held.dtype), held))

    when(rows, write)


BEGIN, END = "begin", "end"


class Tape:
    """Instructions on memory that it owns or was given; `run` computes the outputs again from what the inputs hold."""

    def __init__(self, instructions: list[Instruction], outputs: list[Tensor], kept: list[Tensor],
                 moved: dict[int, int], dtype: torch.dtype) -> None:
        self.outputs, self._kept = outputs, kept
        self._program = pack(instructions, moved)
        self._run = getattr(compiled.native().library, f"tape_run_{compiled.SUFFIX[dtype]}")
        self._arguments = ctypes.c_void_p(self._program.data_ptr()), ctypes.c_int64(len(self._program))

    def __len__(self) -> int:
        return len(self._program)

    def run(self) -> list[Tensor]:
        """The outputs, always in the same memory. Raises IndexError for an index out of range."""
        failed = self._run(*self._arguments, torch.get_num_threads())
        if failed:
            raise IndexError("an index is out of range (a token id beyond the vocabulary?)") if failed == 2 else \
                MemoryError("no memory for a working space")
        return self.outputs


def record(function: Callable[[], tuple[list[Tensor], list[Tensor]]], inputs: Sequence[Tensor],
           state: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], Tape | NotRecordable]:
    """Run `function() -> (outputs, new state)`, which reads `inputs` and `state`, and record it.

    No two tensors of `inputs` and `state` may share memory. Returns (outputs, new state, tape), or why there is none in
    the tape's place. Each `tape.run()` computes the outputs from what is in `inputs` and `state` at that moment, and
    leaves the new state in `state`; the parameters that the function reads must stay as they are.
    """
    recorder = _Recorder()
    token = _recorder.set(recorder)
    try:
        # The forms for one token: compiled code would not be seen.
        with settings.use(backend="reference"), _Values(recorder), recorder:
            outputs, new = function()
    finally:
        _recorder.reset(token)
    dtype = outputs[0].dtype
    try:
        if not compiled.available(outputs[0]):
            raise NotRecordable(f"no compiled code: {compiled.native().reason}")
        if [t.shape for t in new] != [t.shape for t in state]:
            raise NotRecordable("the state changes its size")
        return outputs, new, _assemble(recorder.operations, list(inputs), list(state), outputs, new, dtype)
    except NotRecordable as why:
        return outputs, new, why


def _assemble(operations: list[Operation], inputs: list[Tensor], state: list[Tensor], outputs: list[Tensor],
              new: list[Tensor], dtype: torch.dtype) -> Tape:
    given = {_home(t) for t in inputs + state}
    live, before = set(given), -1
    while len(live) != before:  # what an operation writes is live where anything it reads, or wrote to before, is
        before = len(live)
        for op in operations:
            if any(_home(t) in live for t in op.reads + op.writes if t.numel()):
                live |= {_home(t) for t in op.writes if t.numel()}
    instructions: list[Instruction] = []
    written = set(given)
    made = {_home(t) for op in operations for t in op.writes}
    begun: list[tuple[Instruction, int]] = []
    bodies: list[tuple[Instruction, list[Instruction]]] = []
    for op in operations:
        if op.name == BEGIN:
            instructions.append(when_any(op.reads[0]))
            begun.append((instructions[-1], len(instructions)))
            continue
        if op.name == END:
            condition, start = begun.pop()
            bodies.append((condition, instructions[start:]))
            continue
        if not any(_home(t) in live for t in op.reads + op.writes if t.numel()):
            continue
        own = {_home(t) for t in op.writes}
        for t in op.reads:
            if t.numel() and _home(t) in live - written - own:
                raise NotRecordable(f"{op.name} reads memory that nothing recorded has written")
        if op.start is not None:
            instructions += lower("copy", (op.writes[0], op.start), {}, op.writes, dtype)
        elif op.reads:
            instructions += lower(op.name, op.arguments, op.options, op.writes, dtype)
        else:
            continue  # memory that others fill
        written |= own
    fixed = given | {_home(t) for t in outputs}
    free = {home for home in made & live if home not in fixed}
    moved = _in_place(instructions, state, new, free)
    instructions += _carried(state, new, {_home(t) for t in state}, moved, dtype)
    there, arena = _laid_out(instructions, free - set(moved))
    moved |= there
    instructions = [i for i in instructions if not i.idle(moved)]
    for condition, body in bodies:
        condition.alpha = float(sum(not i.idle(moved) for i in body))
    kept = [*inputs, *state, *outputs, arena]
    kept += [t for i in instructions for t in i.tensors() if _home(t) not in free]
    return Tape(instructions, outputs, kept, moved, dtype)


def _in_place(instructions: list[Instruction], state: list[Tensor], new: list[Tensor], free: set[int]
              ) -> dict[int, int]:
    """New leaves that may be made where the old ones are, since nobody reads those later: home -> address."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for i, instruction in enumerate(instructions):
        for t in instruction.tensors():
            first.setdefault(_home(t), i)
            last[_home(t)] = i
    found: dict[int, int] = {}
    for old, value in zip(state, new):
        home = _home(value)
        if home not in free or home in found or not (old.is_contiguous() and value.is_contiguous()) or \
                value.untyped_storage().nbytes() != value.nbytes or old.dtype != value.dtype:
            continue
        begin, end = first.get(home, 0), last.get(_home(old), -1)
        if end < begin or (end == begin and instructions[end].same_place(old)):
            found[home] = old.data_ptr()
    return found


def _carried(state: list[Tensor], new: list[Tensor], homes: set[int], moved: dict[int, int],
             dtype: torch.dtype) -> list[Instruction]:
    """The new state written over the old; what another leaf still holds is set aside first."""
    aside: list[Instruction] = []
    last: list[Instruction] = []
    for old, value in zip(state, new):
        if _home(value) in moved or (value.data_ptr() == old.data_ptr() and value.stride() == old.stride()):
            continue
        if _home(value) in homes:
            held = value.clone()
            aside += lower("copy", (held, value), {}, [held], dtype)
            value = held
        last += lower("copy", (old, value), {}, [old], dtype)
    return aside + last


def _laid_out(instructions: list[Instruction], free: set[int]) -> tuple[dict[int, int], Tensor]:
    """Working memory, each place used by several whose lives do not meet: (old home -> new address, the memory)."""
    size: dict[int, int] = {}
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for i, instruction in enumerate(instructions):
        for t in instruction.tensors():
            home = _home(t)
            if home in free:
                size[home] = (t.untyped_storage().nbytes() + 127) // 64 * 64
                first.setdefault(home, i)
                last[home] = i
    offset: dict[int, int] = {}
    active: list[tuple[int, int, int]] = []  # (offset, end, home)
    total = 0
    for home in sorted(first, key=first.__getitem__):
        active = sorted(a for a in active if last[a[2]] >= first[home])
        at = 0
        for start, end, _ in active:
            if start - at >= size[home]:
                break
            at = max(at, end)
        offset[home] = at
        active.append((at, at + size[home], home))
        total = max(total, at + size[home])
    arena = torch.zeros(total // 8 + 8, dtype=torch.int64)
    base = (arena.data_ptr() + 63) // 64 * 64
    return {home: base + at for home, at in offset.items()}, arena
