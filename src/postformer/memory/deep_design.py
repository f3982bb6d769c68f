"""What a recipe may say about a deep memory (kernel K3): the network, its loss, what it forgets, how it learns."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from postformer.design.base import Design, Short, word
from postformer.layers.activation import Activation
from postformer.memory.shared_design import Convolved, Local, MatrixHeads, Read, Ungrouped, several


class InnerNet(Design):
    """The network whose weights are the memory."""

    kind: Literal["linear", "mlp", "gated", "convolution"] = "mlp"
    """linear: a matrix; gated: SwiGLU-like; convolution: along the channels of the key"""
    depth: int | None = Field(default=None, ge=1, le=8)
    """Maps one after another; None: 2, and 1 for linear"""
    expand: int = Field(default=4, ge=1)
    """Hidden channels per channel of the key; feature maps of a convolution"""
    activation: Activation = "gelu"
    bias: bool = False
    residual: Literal["none", "norm"] = "none"
    """norm: x + LN(f(x)), with LN's weight and bias learned outside (TTT, 2407.04620)"""
    eps: float = Field(default=1e-6, gt=0)
    """Of that norm"""
    size: int = Field(default=3, ge=2, le=15)
    """Neighbouring channels that a convolution sees"""

    @model_validator(mode="after")
    def _depth(self) -> InnerNet:
        if self.kind == "linear" and self.depth not in (None, 1):
            raise ValueError(f"a linear memory is one map; leave depth out, or use kind: mlp for {self.depth}")
        if self.kind == "gated" and self.depth not in (None, 2):
            raise ValueError(f"a gated net is two maps side by side and one after them; leave depth ({self.depth}) out")
        if self.size != 3 and self.kind != "convolution":
            raise ValueError("net.size is the width of a convolution; leave it out, or set kind: convolution")
        return self

    @property
    def maps(self) -> int:
        return self.depth or (1 if self.kind == "linear" else 2)


class InnerLoss(Design):
    name: str = "l2"
    """dot, l2, lp, huber, or the name of a function registered with postformer.memory.deep_losses.loss"""
    p: float | None = Field(default=None, ge=1)
    """Of lp: 1/p sum |r|^p; None: 3"""
    delta: float | None = Field(default=None, gt=0)
    """Of huber: where it turns linear; None: chosen by the input, per head and token"""

    @model_validator(mode="after")
    def _sense(self) -> InnerLoss:
        from postformer.memory.deep_losses import BUILT_IN, resolve  # torch

        if self.name not in BUILT_IN:
            resolve(self.name)
        if self.p is not None and self.name != "lp":
            raise ValueError(f"loss.p is the power of 'lp', not of '{self.name}'; leave it out, or set name: lp")
        if self.delta is not None and self.name != "huber":
            raise ValueError(f"loss.delta is the bound of 'huber', not of '{self.name}'; leave it out, "
                             "or set name: huber")
        return self


class DeepRetention(Design):
    """What is forgotten: A <- gamma A at every token; and what weights are made of A at chunk ends."""

    per: Literal["none", "head"] = "none"
    """head: gamma in (0, 1) per head, chosen by the input"""
    mirror: Literal["none", "lq", "kl"] = "none"
    """lq: W = A / (1 + sum |A|^q)^((q - 2) / q); kl: W = scale d_out softmax(A) over all entries of a map"""
    q: float | None = Field(default=None, gt=2)
    """Of lq; None: 4"""
    scale: float | None = Field(default=None, gt=0)
    """Of kl; None: 1"""

    @model_validator(mode="after")
    def _sense(self) -> DeepRetention:
        if self.q is not None and self.mirror != "lq":
            raise ValueError("retention.q is the norm of mirror 'lq'; leave it out, or set mirror: lq")
        if self.scale is not None and self.mirror != "kl":
            raise ValueError("retention.scale is the size of weights of mirror 'kl'; leave it out, or set mirror: kl")
        return self


class Rate(Design):
    """theta = max / over * sigmoid(W x + b), per head."""

    max: float = Field(default=1.0, gt=0)
    over: Literal["none", "chunk", "dim-key"] = "chunk"
    """chunk: a chunk of equal tokens then takes one step of at most max"""


def _rate(value: Any) -> Any:
    return {"max": value, "over": "none"} if isinstance(value, (int, float)) else value


class DeepUpdate(Design):
    """The inner optimiser. Chunk and window are part of the model: they say at which weights gradients are taken."""

    kind: Literal["gradient", "momentum", "muon"] = "gradient"
    """momentum: Z = eta Z - theta grad, eta in (0, 1) per head, chosen by the input. muon: the step is Z made
    orthogonal, at chunk ends (Newton-Schulz)"""
    rate: Annotated[Rate, Short(_rate, {"type": "number"})] = Rate()
    chunk: int = Field(default=16, ge=1, le=4096)
    """Tokens whose gradients are taken at the same weights"""
    window: int = Field(default=1, ge=1, le=4096)
    """Tokens whose losses each step lowers: this one and those before it (Omega rule, 2505.23735)"""
    visible: Literal["token", "chunk"] | None = None
    """Which weights a token reads: those after it, or those at the end of the last complete chunk. None: token where
    it can be"""
    clip: float | None = Field(default=1.0, gt=0)
    """Each token's inner gradient is softly held below this norm; null: as large as it is"""


Feature = Literal["silu", "l2norm", "polynomial"]


def _retention(value: Any) -> Any:
    short = {"none": {}, "decay": {"per": "head"}, "lq": {"per": "head", "mirror": "lq"},
             "kl": {"per": "head", "mirror": "kl"}}
    return short.get(value, {"per": value}) if isinstance(value, str) else value


class DeepDesign(Design):
    kind: Literal["deep"] = "deep"
    net: Annotated[InnerNet, word("kind")] = InnerNet()
    loss: Annotated[InnerLoss, word("name")] = InnerLoss()
    retention: Annotated[DeepRetention, Short(_retention)] = DeepRetention()
    update: Annotated[DeepUpdate, word("kind")] = DeepUpdate()
    heads: MatrixHeads = MatrixHeads()
    features: Annotated[tuple[Feature, ...], several] = ("l2norm",)
    """Feature maps of q and k, in order; polynomial adds the products of all pairs of channels"""
    local: Convolved = Local()
    read: Ungrouped = Read()
    forget_at: Literal["segment", "document", "stream"] = "document"

    @property
    def visible(self) -> str:
        return self.update.visible or ("chunk" if self._lagging else "token")

    @property
    def _lagging(self) -> str:
        """What makes weights that exist at chunk ends only; empty: nothing does."""
        if self.update.kind == "muon":
            return "update.kind 'muon' makes its steps at chunk ends"
        if self.retention.mirror != "none":
            return f"mirror '{self.retention.mirror}' makes weights at chunk ends"
        return "the gradient of a convolution is of no low rank" if self.net.kind == "convolution" else ""

    @model_validator(mode="after")
    def _sense(self) -> DeepDesign:
        if self.update.visible == "token" and (why := self._lagging):
            raise ValueError(f"update.visible is 'token', but {why}; leave it out, or set update.visible: chunk")
        if self.update.window > self.update.chunk:
            raise ValueError(f"update.window is {self.update.window} and update.chunk {self.update.chunk}: losses of "
                             "more than a chunk would be lowered at every token; set a window up to the chunk")
        if self.heads.key:
            raise ValueError("each head of a deep memory has its own keys; leave heads.key out")
        if "polynomial" in self.features[:-1]:
            raise ValueError("'polynomial' makes many channels of few; put it last in features")
        if self.loss.name == "dot" and self.net.residual == "norm":
            raise ValueError("loss 'dot' only lengthens what it points along, which the norm of net.residual takes out;"
                             " set loss: l2, or net.residual: none")
        bounded = "l2norm" in self.features or self.net.residual == "norm" or self.update.clip or \
            self.loss.name == "dot"
        if not bounded:
            raise ValueError("keys of unbounded norm make gradients of any size, and the memory diverges: set "
                             "features: l2norm, or update.clip")
        if self.loss.name == "lp" and (self.loss.p or 3) > 2 and not self.update.clip:
            raise ValueError("the gradient of loss 'lp' grows faster than the error, and the memory diverges: set "
                             "update.clip")
        return self

    def sizes(self, width: int) -> tuple[int, int, int, int]:
        """(heads, dim_key, channels of the features of a key, dim_value)"""
        h = self.heads
        dim_key, dim_value = h.dims(width)
        channels = dim_key + dim_key * (dim_key + 1) // 2 if "polynomial" in self.features else dim_key
        if channels != dim_value and (self.net.residual == "norm" or self.net.kind == "convolution"):
            what = "net.residual adds the key to the prediction" if self.net.residual == "norm" else \
                "a convolution has as many channels as the key"
            raise ValueError(f"{what}, but the key has {channels} channels and the value {dim_value}; "
                             "set heads.dim_key = heads.dim_value and leave 'polynomial' out"
                             + (", or net.residual: none" if self.net.residual == "norm" else ""))
        return h.value, dim_key, channels, dim_value
