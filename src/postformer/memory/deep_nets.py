"""The networks that deep memories are made of, and their backward pass written out (so that learning at test time
depends neither on autograd nor on the mode it is in).

Every map is x W with W [d_in, d_out]; a bias is one more row of W, met by a one. What a map's gradient is made of, its
input a and the cotangent r of its output, is all that kernel K3 needs: grad W = a r^T.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from postformer.layers.activation import ACTIVATIONS

Apply = Callable[[int, Tensor], Tensor]
Pairs = list[tuple[Tensor, Tensor]]

SLOPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": lambda g, x: torch.ops.aten.gelu_backward(g, x),
    "gelu-tanh": lambda g, x: torch.ops.aten.gelu_backward(g, x, approximate="tanh"),
    "silu": lambda g, x: g * (s := x.sigmoid()) * (1 + x * (1 - s)),
    "sigmoid": lambda g, x: g * (s := x.sigmoid()) * (1 - s),
    "relu": lambda g, x: g * (x > 0),
    "relu2": lambda g, x: 2 * g * x.relu(),
    "none": lambda g, x: g,
}
"""activation -> (cotangent, input) -> cotangent of the input"""


class Net:
    """f(W, x). `maps`: name -> (d_in, d_out) with the row of a bias; `shares`: uses of one map's weights per token."""

    maps: dict[str, tuple[int, int]]
    shares = 1

    @property
    def behind(self) -> list[str]:
        """The maps that a cotangent is led back through."""
        return list(self.maps)[1:]

    def __init__(self, activation: str, bias: bool) -> None:
        self.act, self.slope, self.bias = ACTIVATIONS[activation], SLOPES[activation], bias

    def forward(self, x: Tensor, apply: Apply) -> tuple[Tensor, Any]:
        """(f(x), what backward needs)"""
        raise NotImplementedError

    def backward(self, kept: Any, g: Tensor, weights: tuple[Tensor, ...]) -> Pairs:
        """g: cotangent of f(x) -> (input, cotangent of the output) of every map"""
        raise NotImplementedError

    def wide(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 1), value=1.0) if self.bias else x

    def back(self, g: Tensor, w: Tensor) -> Tensor:
        return g @ (w[..., :-1, :] if self.bias else w).mT


class Mlp(Net):
    """x W_1, activation, ..., W_depth; depth 1 is a matrix."""

    def __init__(self, d_in: int, d_out: int, depth: int, hidden: int, activation: str, bias: bool) -> None:
        super().__init__(activation, bias)
        sizes = [d_in, *[hidden] * (depth - 1), d_out]
        self.maps = {f"map{i + 1}": (a + bias, b) for i, (a, b) in enumerate(pairwise(sizes))}

    def forward(self, x: Tensor, apply: Apply) -> tuple[Tensor, Any]:
        inputs, raw = [], []
        for i in range(len(self.maps)):
            if i:
                raw.append(x)
                x = self.act(x)
            x = self.wide(x)
            inputs.append(x)
            x = apply(i, x)
        return x, (inputs, raw)

    def backward(self, kept: Any, g: Tensor, weights: tuple[Tensor, ...]) -> Pairs:
        inputs, raw = kept
        pairs = [(inputs[-1], g)]
        for i in range(len(raw), 0, -1):
            g = self.slope(self.back(g, weights[i]), raw[i - 1])
            pairs.append((inputs[i - 1], g))
        return pairs[::-1]


class Gated(Net):
    """(activation(x W_gate) * x W_up) W_down (2002.05202)"""

    @property
    def behind(self) -> list[str]:
        return ["down"]

    def __init__(self, d_in: int, d_out: int, hidden: int, activation: str, bias: bool) -> None:
        super().__init__(activation, bias)
        self.maps = {"gate": (d_in + bias, hidden), "up": (d_in + bias, hidden), "down": (hidden + bias, d_out)}

    def forward(self, x: Tensor, apply: Apply) -> tuple[Tensor, Any]:
        x = self.wide(x)
        raw, up = apply(0, x), apply(1, x)
        gate = self.act(raw)
        h = self.wide(gate * up)
        return apply(2, h), (x, raw, gate, up, h)

    def backward(self, kept: Any, g: Tensor, weights: tuple[Tensor, ...]) -> Pairs:
        x, raw, gate, up, h = kept
        inner = self.back(g, weights[2])
        return [(x, self.slope(inner * up, raw)), (x, inner * gate), (h, g)]


class Convolution(Net):
    """Convolutions along the channels of x: 1 -> hidden -> ... -> 1 feature maps, `size` neighbours, zeros outside."""

    def __init__(self, dim: int, depth: int, hidden: int, size: int, activation: str, bias: bool) -> None:
        super().__init__(activation, bias)
        maps = [1, *[hidden] * (depth - 1), 1]
        self.maps = {f"map{i + 1}": (a * size + bias, b) for i, (a, b) in enumerate(pairwise(maps))}
        self.dim, self.size, self.shares = dim, size, dim

    def patches(self, x: Tensor) -> Tensor:
        """[..., dim, c] -> [..., dim, size * c]"""
        before = (self.size - 1) // 2
        x = F.pad(x, (0, 0, before, self.size - 1 - before))
        return torch.cat([x[..., j : j + self.dim, :] for j in range(self.size)], -1)

    def unpatch(self, g: Tensor) -> Tensor:
        """The adjoint of `patches`."""
        before = (self.size - 1) // 2
        parts = [F.pad(p, (0, 0, j, self.size - 1 - j)) for j, p in enumerate(g.chunk(self.size, -1))]
        return torch.stack(parts).sum(0)[..., before : before + self.dim, :]

    def forward(self, x: Tensor, apply: Apply) -> tuple[Tensor, Any]:
        x, inputs, raw = x[..., None], [], []
        for i in range(len(self.maps)):
            if i:
                raw.append(x)
                x = self.act(x)
            a = self.wide(self.patches(x)).flatten(-3, -2)
            inputs.append(a)
            x = apply(i, a).unflatten(-2, (-1, self.dim))
        return x[..., 0], (inputs, raw)

    def backward(self, kept: Any, g: Tensor, weights: tuple[Tensor, ...]) -> Pairs:
        inputs, raw = kept
        g = g[..., None]
        pairs = [(inputs[-1], g.flatten(-3, -2))]
        for i in range(len(raw), 0, -1):
            inner = self.back(g.flatten(-3, -2), weights[i]).unflatten(-2, (-1, self.dim))
            g = self.slope(self.unpatch(inner), raw[i - 1])
            pairs.append((inputs[i - 1], g.flatten(-3, -2)))
        return pairs[::-1]


class Inner:
    """A network, what stands around it (x + LN(f(x)) of TTT, 2407.04620), and the slope of its loss: K3's learner."""

    def __init__(self, net: Net, slope: Callable[[Tensor, Tensor, Tensor | None], Tensor],
                 norm: tuple[Tensor, Tensor] | None = None, eps: float = 1e-6) -> None:
        """norm: weight and bias [H, 1, d] of the layer norm; None: no residual."""
        self.net, self.slope, self.norm, self.eps = net, slope, norm, eps

    def _standard(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(z with mean 0 and variance 1 over the last dim, 1 / standard deviation)"""
        z = z - z.mean(-1, keepdim=True)
        scale = torch.rsqrt(z.square().mean(-1, keepdim=True) + self.eps)
        return z * scale, scale

    def predict(self, x: Tensor, apply: Apply) -> Tensor:
        z, _ = self.net.forward(x, apply)
        if self.norm is None:
            return z
        return x + self._standard(z)[0] * self.norm[0] + self.norm[1]

    def gradients(self, k: Tensor, v: Tensor, weights: tuple[Tensor, ...], extra: Tensor | None) -> Pairs:
        z, kept = self.net.forward(k, lambda i, x: x @ weights[i])
        if self.norm is None:
            return self.net.backward(kept, self.slope(z, v, extra), weights)
        unit, scale = self._standard(z)
        g = self.slope(k + unit * self.norm[0] + self.norm[1], v, extra) * self.norm[0]
        g = scale * (g - g.mean(-1, keepdim=True) - unit * (g * unit).mean(-1, keepdim=True))
        return self.net.backward(kept, g, weights)
