"""How a recipe is proven to be a transformers class: the same random weights in both, then the same numbers out.

Every parameter of their model is drawn anew (norms, decays, gates and biases too), so that nothing hides at its
starting value; every one is copied, and every one of ours is filled, or the proof fails. Compared are the logits of the
whole model at an odd length and at one longer than our kernels' chunks, the gradients of all parameters, and our logits
when the tokens come in pieces with the state carried.

In float32 their class runs as it is. Most classes cast to float32 inside, whatever the model's dtype; for the proof in
float64 their code runs unchanged under `Wide`, which reads every mention of float32 in a torch call as float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from postformer.design.grammar import Recipe
from postformer.model import LanguageModel, build

LENGTHS = (37, 150)
PIECES = (20, 1, 1, 7, 1, 7)
TOLERANCE = {torch.float32: {"logits": 1e-4, "gradients": 1e-3}, torch.float64: {"logits": 1e-9, "gradients": 1e-8}}


class Wide(TorchFunctionMode):
    """Reads float32 as float64 in every torch call."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(x: Any) -> Any:
            return torch.float64 if x is torch.float32 else x

        if func is Tensor.float:
            func = Tensor.double
        return func(*map(wide, args), **{k: wide(v) for k, v in (kwargs or {}).items()})


class Taken:
    """Tensors of their model by name, under a prefix; remembers which were asked for."""

    def __init__(self, tensors: dict[str, Tensor], prefix: str = "", seen: set[str] | None = None) -> None:
        self.tensors, self.prefix, self.seen = tensors, prefix, set() if seen is None else seen

    def __call__(self, name: str) -> Tensor:
        self.seen.add(self.prefix + name)
        return self.tensors[self.prefix + name]

    def at(self, prefix: str) -> Taken:
        return Taken(self.tensors, f"{self.prefix}{prefix}.", self.seen)


Mapping = Callable[[Taken], dict[str, Tensor]]
"""Their tensors -> ours by name; only cuts and reshapes, so that it maps gradients as well as weights."""


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Draw every parameter: maps keep the scale of their input, the others vary around where training leaves them."""
    draw = torch.Generator().manual_seed(seed)

    def uniform(p: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(p.shape, generator=draw) * (high - low) + low

    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=draw)
            last = name.rsplit(".", 1)[-1]
            if "norm" in name.lower():
                value = (0.5 if last == "bias" else 0.3) * noise + (p.float().mean().round() if last == "weight" else 0)
            elif last == "A_log":
                value = uniform(p, -3, 1)
            elif last == "dt_bias" or name.endswith("dt_proj.bias"):
                value = uniform(p, -3, 0.5)
            elif last == "recurrent_param":
                value = uniform(p, -6, -1)
            elif "embed" in name:
                value = noise
            elif name.endswith("fgate_preact.bias"):
                value = uniform(p, 0, 5)
            elif p.ndim == 1 or last.endswith("bias"):
                value = 0.5 * noise
            elif last in ("gate_up_proj", "down_proj"):  # of all experts, one after the other
                value = noise * p.shape[-1] ** -0.5
            else:
                fan = p.shape[-2] if last.endswith("gate_weight") else p.shape[1] * (p.shape[2] if p.ndim == 3 else 1)
                value = noise * fan**-0.5
            p.copy_(value)


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, as a share of their largest value."""
    assert ours.shape == theirs.shape
    assert ours.isfinite().all()
    assert theirs.abs().max() > 0
    return float((ours - theirs).abs().max() / theirs.abs().max())


def filled(ours: nn.Module, theirs: nn.Module, mapping: Mapping) -> None:
    """Copy all weights of theirs into ours; every parameter of both takes part."""
    take = Taken({n: p.detach() for n, p in theirs.named_parameters()})
    ours.load_state_dict(mapping(take), strict=True)
    assert take.seen == set(take.tensors), f"not copied: {sorted(set(take.tensors) - take.seen)}"


def gradient_error(ours: nn.Module, theirs: nn.Module, mapping: Mapping) -> float:
    """The largest difference of any parameter's gradient, as a share of that gradient's largest value."""
    expected = mapping(Taken({n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}))
    return max(apart(p.grad, expected[n]) for n, p in ours.named_parameters())  # type: ignore[arg-type]


def in_pieces(model: LanguageModel, tokens: Tensor, pieces: Iterable[int] = PIECES) -> Tensor:
    """Logits with the tokens coming in pieces and the state carried."""
    state, logits = None, []
    for piece in tokens.split([*pieces, tokens.shape[1] - sum(pieces)], 1):
        out = model(piece, state)
        state = out.state
        logits.append(out.logits)
    return torch.cat(logits, 1)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def experts() -> Callable[..., dict[str, Tensor]]:
    """experts(at, here, router=..., shared=...): their experts at `at`, stacked there, as ours."""

    def run(at: Taken, here: str, router: str, shared: str | None = None) -> dict[str, Tensor]:
        found = {f"{here}.router.weight": at(f"{router}.weight")}
        for i, (both, down) in enumerate(zip(at("experts.gate_up_proj"), at("experts.down_proj"))):
            gate, up = both.chunk(2)
            found |= {f"{here}.experts.{i}.{name}.weight": value
                      for name, value in (("gate", gate), ("up", up), ("out", down))}
        if shared:
            found |= {f"{here}.shared.{a}.weight": at(f"{shared}.{b}_proj.weight")
                      for a, b in (("gate", "gate"), ("up", "up"), ("out", "down"))}
        return found

    return run


@pytest.fixture
def prove(record_proof: Callable[..., None], dtype: torch.dtype) -> Callable[..., None]:
    """prove(recipe, Class, config, mapping): that the recipe's whole language model is the class, in `dtype`."""

    def run(recipe: Recipe, cls: Any, config: Any, mapping: Mapping, label: str = "",
            gradient_tolerance: float = 0.0, adjust: Callable[[nn.Module], Any] = lambda _: None) -> None:
        mode = Wide() if dtype == torch.float64 else nullcontext()
        config._attn_implementation = config._experts_implementation = "eager"
        with mode:
            theirs = cls(config).eval()
        randomise(theirs)
        adjust(theirs)
        theirs.to(dtype)
        ours = build(recipe.model, seed=0).to(dtype)
        filled(ours, theirs, mapping)
        allowed = TOLERANCE[dtype]
        allowed = allowed | {"gradients": max(allowed["gradients"], gradient_tolerance)}

        def record(what: str, error: float, kind: str) -> None:
            record_proof(recipe.name, f"transformers.{cls.__name__}{label}", what, error,
                         dtype=str(dtype).removeprefix("torch."), tolerance=allowed[kind])

        draw = torch.Generator().manual_seed(1)
        error = 0.0
        for length in LENGTHS:
            tokens = torch.randint(recipe.model.vocab, (2, length), generator=draw)
            with torch.no_grad(), mode:
                expected = theirs(tokens, use_cache=False).logits
            assert expected.dtype == dtype
            with torch.no_grad():
                error = max(error, apart(ours(tokens).logits, expected))
        record(f"logits, whole model, T = {' and '.join(map(str, LENGTHS))}", error, "logits")
        with torch.no_grad():
            pieces = apart(in_pieces(ours, tokens), expected)
        record(f"logits, tokens in pieces of {PIECES} and the rest", pieces, "logits")

        tokens = torch.randint(recipe.model.vocab, (2, LENGTHS[0]), generator=draw)
        weight = torch.randn(2, LENGTHS[0], recipe.model.vocab, generator=draw, dtype=torch.float64).to(dtype)
        with mode:
            (theirs(tokens, use_cache=False).logits * weight).sum().backward()
        (ours(tokens).logits * weight).sum().backward()
        record("gradients of all parameters", gradient_error(ours, theirs, mapping), "gradients")

    return run


@pytest.fixture
def prove_layer(record_proof: Callable[..., None], dtype: torch.dtype) -> Callable[..., None]:
    """prove_layer(recipe, layer, theirs, mapping): that a mixer or layer of ours is theirs, as a map x -> y."""

    def run(recipe: Recipe, ours: nn.Module, make: Callable[[], nn.Module], mapping: Mapping, what: str) -> None:
        mode = Wide() if dtype == torch.float64 else nullcontext()
        with mode:
            theirs = make().eval()
        randomise(theirs)
        theirs.to(dtype)
        ours = ours.to(dtype)
        filled(ours, theirs, mapping)
        draw = torch.Generator().manual_seed(2)
        errors = []
        for length in LENGTHS:
            x = torch.randn(2, length, recipe.model.width, generator=draw, dtype=torch.float64).to(dtype)
            a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
            weight = torch.randn(x.shape, generator=draw, dtype=torch.float64).to(dtype)
            with mode:
                expected = theirs(b)
                (expected * weight).sum().backward()
            y = ours(a).y
            (y * weight).sum().backward()
            errors.append((apart(y.detach(), expected.detach()), apart(a.grad, b.grad)))
        name = f"transformers.{type(theirs).__name__}"
        kinds = dict(zip(("logits", "gradients"), (max(e) for e in zip(*errors))))
        for kind, shown in (("logits", "outputs"), ("gradients", "gradient of the input")):
            record_proof(recipe.name, name, f"{what}: {shown}, T = {' and '.join(map(str, LENGTHS))}", kinds[kind],
                         dtype=str(dtype).removeprefix("torch."), tolerance=TOLERANCE[dtype][kind])

    return run
