"""What the proofs by loop share: weights by name, the residual stream one token at a time, and the comparison.

A loop is written from a paper, for one token of one sequence, in plain tensor arithmetic; it takes nothing from
postformer but the numbers in the parameters. `prove` gives every parameter a random value, runs both, compares the
logits of 29 and of 150 tokens (more than two chunks) and the gradient of every parameter, all in float64. A parameter
that the loop did not read fails the proof.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from postformer.design import load
from postformer.model import build

TOLERANCE = 1e-9
VOCAB = 17


class Weights:
    """A model's parameters by name below a prefix; remembers which were read."""

    def __init__(self, values: dict[str, Tensor], prefix: str = "", read: set[str] | None = None) -> None:
        self.values, self.prefix, self.read = values, prefix, set() if read is None else read

    def at(self, name: str) -> Weights:
        return Weights(self.values, f"{self.prefix}{name}.", self.read)

    def has(self, name: str) -> bool:
        return self.prefix + name in self.values

    def __call__(self, name: str) -> Tensor:
        self.read.add(self.prefix + name)
        return self.values[self.prefix + name]

    def map(self, name: str, x: Tensor) -> Tensor:
        """The linear map of this name, with its bias if there is one."""
        y = self(f"{name}.weight") @ x
        return y + self(f"{name}.bias") if self.has(f"{name}.bias") else y


@dataclass
class Here:
    """Where a branch runs: position t, layer, the branch's own memory, and what this token's earlier branches left."""

    t: int
    layer: int
    memory: dict[Any, Tensor]
    token: dict[str, Tensor] = field(default_factory=dict)


Branch = Callable[[Weights, Tensor, Here], Tensor]
"""(parameters, input after the norm [D], where) -> what is added to the stream [D]"""
NormOf = Callable[[Weights, Tensor], Tensor]


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def softplus(x: Tensor) -> Tensor:
    return torch.log(1 + torch.exp(x))


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def gelu_tanh(x: Tensor) -> Tensor:
    return x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def rms(x: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean() + eps)


def standard(x: Tensor, eps: float) -> Tensor:
    """Mean 0, variance 1: a layer norm without weights, or one group of a group norm."""
    centred = x - x.mean()
    return centred / torch.sqrt((centred * centred).mean() + eps)


def unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / ||x||"""
    return x / torch.sqrt((x * x).sum() + eps)


def rms_norm(eps: float = 1e-6, offset: float = 0.0) -> NormOf:
    return lambda w, x: rms(x, eps) * (offset + w("weight"))


def layer_norm(eps: float = 1e-6) -> NormOf:
    return lambda w, x: standard(x, eps) * w("weight") + w("bias")


def convolve(here: Here, name: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A causal depthwise convolution: sum_j weight[:, j] x_{t - (n - 1) + j}."""
    n = weight.shape[1]
    here.memory[name, here.t] = x
    y = torch.zeros_like(x) if bias is None else bias
    for j in range(n):
        s = here.t - (n - 1) + j
        if (name, s) in here.memory:
            y = y + weight[:, j] * here.memory[name, s]
    return y


def projected(w: Weights, x: Tensor, here: Here, sizes: Sequence[int]) -> list[Tensor]:
    """q, k and v of these sizes: a linear map each, a convolution each, SiLU."""
    out, start = [], 0
    for name, size in zip("qkv", sizes, strict=True):
        taps = w("conv.weight")[start : start + size]
        out.append(silu(convolve(here, name, w.map(name, x), taps)))
        start += size
    return out


def swiglu(w: Weights, x: Tensor, here: Here) -> Tensor:
    return w.map("out", silu(w.map("gate", x)) * w.map("up", x))


def model_loop(w: Weights, tokens: Sequence[int], layers: Sequence[Sequence[Branch]], norm: NormOf, *,
               embed: Callable[[Tensor], Tensor] = lambda x: x, added: Callable[[int], Tensor | float] = lambda t: 0.0,
               logits: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """Logits [T, vocab]: every token through every layer before the next token is looked at."""
    memories = [[{} for _ in branches] for branches in layers]
    head = "head.weight" if w.has("head.weight") else "embedding.weight"
    rows = []
    for t, token in enumerate(tokens):
        x, left = embed(w("embedding.weight")[token]) + added(t), {}
        for i, branches in enumerate(layers):
            for j, branch in enumerate(branches):
                s = w.at(f"stack.layers.{i}.sublayers.{j}")
                x = x + branch(s.at("mixer"), norm(s.at("norm"), x), Here(t, i, memories[i][j], left))
        rows.append(logits(w(head) @ norm(w.at("stack.norm"), x)))
    return torch.stack(rows)


def model_of(recipe: Any, overrides: Iterable[str] = (), layers: int = 2) -> torch.nn.Module:
    """A small float64 model of a shipped recipe or a mapping, every parameter at a random value."""
    if isinstance(recipe, str):
        made = load(recipe, overrides=["model.vocab=17", *overrides], width=32, layers=layers)
    else:
        made = load(recipe)
    model = build(made.model, seed=0).double()
    scramble(model)
    return model


def scramble(model: torch.nn.Module, seed: int = 1) -> None:
    """Nothing stays where it began: norms, biases, decays, mixes and bounds included."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=draw, dtype=p.dtype)
            last = name.rsplit(".", 2)
            if last[-1] == "A_log":
                p.copy_(0.6 * noise - 0.3)
            elif "norm" in name and name.endswith("weight"):
                p.copy_(1 + 0.4 * noise)
            elif last[-1].startswith("x_") or last[-1] in ("k_k", "k_a"):
                p.copy_(0.6 + 0.4 * noise)
            elif last[-1] == "log_dt":
                p.copy_(-1.5 + 0.7 * noise)
            elif last[-1] == "turn":
                p.copy_(3 * noise)
            elif last[-2] == "conv" and last[-1] == "weight":
                p.copy_(0.6 * noise)
            elif name == "embedding.weight" or last[-1] in ("weight", "B", "C") or last[-1].endswith("_weight"):
                p.copy_(1.3 * noise if name == "embedding.weight" else 1.2 * noise * p.shape[1] ** -0.5)
            else:
                p.copy_(0.7 * noise)


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest value."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())


def prove(record: Callable[..., None], recipe: str, paper: str, model: torch.nn.Module,
          loop: Callable[[Weights, Sequence[int]], Tensor], *, by: str = "token loop",
          call: Callable[[Tensor], Tensor] | None = None) -> None:
    """Compare, and record what was measured. call: tokens [B, T] -> the model's logits, where tokens are not enough."""
    call = call or (lambda tokens: model(tokens).logits)
    torch.set_num_threads(1)
    by = f"{by} from arXiv {paper}"
    draw = torch.Generator().manual_seed(2)
    params = dict(model.named_parameters())
    copies = {n: p.detach().clone().requires_grad_() for n, p in params.items()}

    short = torch.randint(VOCAB, (2, 29), generator=draw)
    w = Weights(copies)
    ours, theirs = call(short), torch.stack([loop(w, row.tolist()) for row in short])
    assert theirs.detach().std() > 0.1
    record(recipe, by, "logits, 29 tokens", relative(ours, theirs), dtype="float64", tolerance=TOLERANCE)
    assert w.read == set(params), f"not in the loop: {sorted(set(params) - w.read)}"

    taste = torch.randn(ours.shape, generator=draw, dtype=ours.dtype)
    (ours * taste).sum().backward()
    (theirs * taste).sum().backward()
    errors = {}
    for n, p in params.items():
        assert p.grad is not None, n
        assert copies[n].grad is not None, n
        assert float(copies[n].grad.abs().max()) > 0, f"no gradient reaches {n}"
        errors[n] = relative(p.grad, copies[n].grad)
    record(recipe, by, "gradient of every parameter, 29 tokens", max(errors.values()), dtype="float64",
           tolerance=TOLERANCE)

    long = torch.randint(VOCAB, (1, 150), generator=draw)
    with torch.no_grad():
        error = relative(call(long)[0], loop(w, long[0].tolist()))
    record(recipe, by, "logits, 150 tokens", error, dtype="float64", tolerance=TOLERANCE)
