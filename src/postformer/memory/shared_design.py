"""What recipes of several kinds of memory say alike: the heads, the mixing of neighbours, and the read."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from postformer.design.base import Design, Short


class MatrixHeads(Design):
    value: int = Field(default=4, ge=1)
    """Heads: each has its own state"""
    key: int | None = Field(default=None, ge=1)
    """Heads of q and k, each shared by value / key heads; None: one per value head"""
    dim_key: int | None = Field(default=None, ge=1)
    """None: width / value"""
    dim_value: int | None = Field(default=None, ge=1)
    """None: width / value"""

    def scaled(self, ratio: float) -> MatrixHeads:
        value = max(1, round(self.value * ratio))
        grouped = self.key and self.value // self.key
        key = max(1, value // grouped) if grouped else None
        if key:
            value = max(value // key, 1) * key
        rest = self.value * ratio / value
        changes: dict[str, Any] = {"value": value, "key": key}
        for name in ("dim_key", "dim_value"):
            dim = getattr(self, name)
            changes[name] = dim and (dim if abs(rest - 1) < 1e-9 else max(2, round(dim * rest / 2) * 2))
        return self.model_copy(update={k: v for k, v in changes.items() if k in self.model_fields_set})

    def narrowed(self, dim: int, width: int) -> MatrixHeads:
        dim_key, dim_value = self.dims(width)
        more = dim_value // dim
        if more < 2:
            return self
        changes: dict[str, Any] = {"value": self.value * more, "dim_value": self.dim_value and dim}
        if self.key is None or self.key > 1:
            # Keys that all heads share are a state's size, not a head's.
            changes |= {"key": self.key and self.key * more, "dim_key": self.dim_key and max(1, dim_key // more)}
        return self.model_copy(update=changes)

    def dims(self, width: int) -> tuple[int, int]:
        """(dim_key, dim_value) in a layer of this width"""
        if (self.dim_key is None or self.dim_value is None) and width % self.value:
            raise ValueError(f"width {width} is not a multiple of heads.value ({self.value}); "
                             "set heads.dim_key and heads.dim_value")
        return self.dim_key or width // self.value, self.dim_value or width // self.value


class Local(Design):
    """Mixing of neighbouring tokens before the memory."""

    kind: Literal["none", "conv", "shift"] = "none"
    size: int = Field(default=4, ge=2)
    bias: bool = False
    activation: Literal["silu", "none"] = "silu"


class Read(Design):
    """What happens to o_t = S_t^T q_t."""

    norm: Literal["none", "rms", "layer"] = "rms"
    per: Literal["head", "group", "all"] = "head"
    """Channels normed together: a head, the heads of a key group, or all"""
    weight: Literal["shared", "full", "none"] = "shared"
    """shared: the same for all heads"""
    bias: bool = False
    gate: Literal["none", "silu", "sigmoid"] = "none"
    gate_rank: int | Literal["dim-value"] | None = None
    order: Literal["norm-gate", "gate-norm"] = "norm-gate"
    out: bool = True
    """A linear map at the end; without one all heads' channels are the width"""
    eps: float = Field(default=1e-5, gt=0)


def _local(value: Any) -> Any:
    if isinstance(value, str):
        if value.startswith("conv"):
            return {"kind": "conv", **({"size": int(value[4:])} if value[4:].isdigit() else {})}
        return {"kind": value}
    return value


def _convolved(value: Local) -> Local:
    if value.kind == "shift":
        raise ValueError("this memory mixes neighbours by a convolution, not by shift; set local: conv4 or none")
    return value


def _read(value: Any) -> Any:
    short = {"none": {"norm": "none"}, "norm": {}, "gated-norm": {"gate": "silu"},
             "group-norm-bonus-gate": {"norm": "layer", "weight": "full", "bias": True, "eps": 64e-5}}
    return short.get(value, {"norm": value}) if isinstance(value, str) else value


def _ungrouped(value: Read) -> Read:
    if value.per == "group":
        raise ValueError("read.per 'group' norms the heads of a shared key; set per: head or all")
    return value


AnyLocal = Annotated[Local, Short(_local)]
"""Also as a word: none, shift, conv or conv4"""
Convolved = Annotated[AnyLocal, AfterValidator(_convolved)]
"""Without shift"""
AnyRead = Annotated[Read, Short(_read)]
"""Also as a word: none, norm, gated-norm, ..."""
Ungrouped = Annotated[AnyRead, AfterValidator(_ungrouped)]
"""Of memories whose heads have keys of their own"""

several = Short(lambda value: () if value == "none" else (value,) if isinstance(value, str) else value)
"""One word for a tuple of one; none for an empty one"""
