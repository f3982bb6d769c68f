"""What a recipe may say about a matrix memory (kernel K1): the four choices and the projections around them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from postformer.design.base import Design


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


class Retention(Design):
    """What is forgotten: S <- Diag(exp g) S, g <= 0."""

    per: Literal["none", "head", "channel"] = "none"
    gate: Literal["mamba", "gla", "sigmoid", "fixed"] | None = None
    """mamba: g = -exp(A) softplus(W x + b); gla: logsigmoid(W x + b) / 16; sigmoid: logsigmoid(W x + b);
    fixed: g_h = log(1 - 2^(-5-h)) (RetNet)"""
    rank: int | Literal["dim-value"] | None = None
    """Of W, for a gate per channel; None: full"""

    @model_validator(mode="after")
    def _gate(self) -> Retention:
        if self.per == "none" and self.gate is not None:
            raise ValueError(f"retention.gate is '{self.gate}' but nothing is forgotten: set per: head or channel")
        if self.per != "none" and self.gate is None:
            raise ValueError("retention needs a gate: mamba, gla, sigmoid or fixed")
        if self.gate == "fixed" and self.per == "channel":
            raise ValueError("retention gate 'fixed' is one number per head: set per: head, or gate: mamba")
        if self.rank is not None and self.per != "channel":
            raise ValueError("retention.rank is only for a gate per channel")
        return self


class Update(Design):
    """The inner optimiser: one or several steps on the inner loss per token."""

    kind: Literal["gradient", "implicit"] = "gradient"
    """gradient: a step along the gradient at the state before it. implicit: the exact minimum of
    |S - S_{t-1}|^2 + rate |S^T k - v|^2, stable for keys of any norm (Longhorn, 2407.14207)"""
    rate: Literal["one", "sigmoid", "double-sigmoid"] | None = None
    """one: 1; sigmoid: in (0, 1); double-sigmoid: in (0, 2). None: sigmoid for l2, one for dot"""
    steps: int = Field(default=1, ge=1, le=8)
    """Steps per token, each with its own key, value and rate (DeltaProduct)"""


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


def _read(value: Any) -> Any:
    short = {"none": {"norm": "none"}, "norm": {}, "gated-norm": {"gate": "silu"},
             "group-norm-bonus-gate": {"norm": "layer", "weight": "full", "bias": True, "eps": 64e-5}}
    return short.get(value, {"norm": value}) if isinstance(value, str) else value


def _features(value: Any) -> Any:
    return () if value == "none" else (value,) if isinstance(value, str) else value


def _update(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


def _retention(value: Any) -> Any:
    return {"per": value} if isinstance(value, str) else value


Feature = Literal["silu", "elu1", "relu", "softmax", "l2norm"]


class MatrixDesign(Design):
    kind: Literal["matrix"] = "matrix"
    parameterisation: str = "qkv"
    """How x becomes the kernel's arguments: qkv, or a paper's own (mamba2, rwkv7, hgrn2, mlstm; comba,
    gated-deltanet-2 and preconditioned, which go by the choices below as qkv does)"""
    heads: MatrixHeads = MatrixHeads()
    loss: Literal["dot", "l2"] = "dot"
    retention: Annotated[Retention, BeforeValidator(_retention)] = Retention()
    update: Annotated[Update, BeforeValidator(_update)] = Update()
    features: Annotated[tuple[Feature, ...], BeforeValidator(_features)] = ()
    """Feature maps of q and k, in order; elu1 is elu(x) + 1"""
    position: Literal["none", "rope"] = "none"
    """rope: q and k rotated by position, neighbours paired (RetNet's xPos without its decay)"""
    normaliser: Literal["none", "sum"] = "none"
    """sum: o divided by the sum of the weights (a ones column of v)"""
    local: Annotated[Local, BeforeValidator(_local)] = Local()
    read: Annotated[Read, BeforeValidator(_read)] = Read()
    value_residual: str | None = None
    """Name of a published value that v is interpolated with (RWKV-7)"""
    forget_at: Literal["segment", "document", "stream"] = "document"

    @model_validator(mode="after")
    def _sense(self) -> MatrixDesign:
        from postformer.memory.rules import resolve  # its files import this one

        rule = resolve(self.parameterisation)
        if self.local.kind not in rule.local:
            raise ValueError(f"parameterisation '{self.parameterisation}' has no local mixing '{self.local.kind}'; "
                             f"set local: {' or '.join(rule.local)}")
        if self.heads.key and not rule.grouped:
            raise ValueError(f"parameterisation '{self.parameterisation}' has one key head per value head; "
                             "leave heads.key out")
        if self.value_residual and self.parameterisation != "rwkv7":
            raise ValueError("value_residual belongs to parameterisation: rwkv7")
        fields = type(self).model_fields
        fixed = {name for name in rule.fixed if getattr(self, name) != fields[name].default}
        if fixed:
            raise ValueError(f"'{min(fixed)}' is fixed by parameterisation '{self.parameterisation}'; "
                             "leave it out, or use parameterisation: qkv")
        rule.check(self)
        return self

    @property
    def rate(self) -> str:
        return self.update.rate or ("sigmoid" if self.loss == "l2" else "one")

    def sizes(self, width: int) -> tuple[int, int, int, int]:
        """(value heads, key heads, dim_key, dim_value)"""
        h = self.heads
        key = h.key or h.value
        if h.value % key:
            raise ValueError(f"heads.value is {h.value}; it must be a multiple of heads.key ({key})")
        if (h.dim_key is None or h.dim_value is None) and width % h.value:
            raise ValueError(f"width {width} is not a multiple of heads.value ({h.value}); "
                             "set heads.dim_key and heads.dim_value")
        if self.position == "rope" and (h.dim_key or width // h.value) % 2:
            raise ValueError(f"position: rope turns pairs of channels; dim_key is {h.dim_key or width // h.value}, "
                             "make it even")
        return h.value, key, h.dim_key or width // h.value, h.dim_value or width // h.value
