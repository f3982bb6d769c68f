"""Which parameters make a residual branch silent: found by trying, since a layer may be made of mixers of any kind.

What a branch ends in is its learned scale, its post-norm, its own map, or else the maps that its mixers made as
`site.linear("out", ...)`. All of these together are set to zero in a model with random weights; then each mixer's is
put back, innermost and earliest first, and stays so where the branch is silent without it. What remains is needed: in
a chain the last map alone, since zeros behind zeros would never have a gradient; of a product one factor; of a sum, a
router or a mixture of experts every one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from postformer.block.sublayer import Reference, Sublayer
from postformer.contract.context import Context
from postformer.design import DesignError
from postformer.design.grammar import Model
from postformer.layers.linear import silent_at_zero
from postformer.model import LanguageModel, build, evaluating

NOISE = 0.02
"""Added to every weight of the model that is tried, so that what merely starts at zero does not pass for silent"""
LONG = 800
"""Tokens after which every slow clock has ticked that anybody will set"""
Silence = dict[str, float]


def silences(design: Model, layers: Sequence[int]) -> Silence:
    """Parameter's name -> the value at which the branches of these layers add nothing to the stream.

    Raises DesignError for a layer that has no such parameters of its own.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = build(design, seed=1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(NOISE * torch.randn_like(parameter))
        tokens = torch.randint(design.vocab, (4, 32))
    branches = {f"stack.layers.{i}.sublayers.{j}": _candidates(model, f"stack.layers.{i}.sublayers.{j}", sub, i)
                for i in layers for j, sub in enumerate(_sublayers(model, i)) if sub.design.residual != "next"}
    kept = {name: value.detach().clone() for name, value in model.named_parameters()}
    chosen = {path: list(range(len(groups))) for path, groups in branches.items()}
    _set(model, _union(branches, chosen), kept)
    silent = _silent(model, list(branches), tokens)
    for path, quiet in silent.items():
        if not quiet:
            raise _refused(path, design, "has no map named `out`, learned scale or post-norm of its own that could "
                           "start at zero: give the sublayer `scale: learned` or `out: width`, or use how: stack")
    for turn in range(max((len(groups) for groups in branches.values()), default=0)):
        tried = {path: [g for g in groups if g != turn] for path, groups in chosen.items() if len(groups) > 1}
        _set(model, _union(branches, chosen | tried), kept)
        silent = _silent(model, list(tried), tokens)
        chosen |= {path: groups for path, groups in tried.items() if silent[path]}
    # A memory on a slow clock says nothing for a while: what is heard late, or after a document's end, stays zero.
    _set(model, _union(branches, chosen), kept)
    silent = _silent(model, list(branches), *long_text(design))
    return _union(branches, {path: groups if silent[path] else list(range(len(branches[path])))
                             for path, groups in chosen.items()})


def long_text(design: Model) -> tuple[Tensor, Context]:
    """Tokens [1, LONG], and the ends of segments, documents and a stream among them."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(design.vocab, (1, LONG), generator=generator)
    boundary = torch.zeros(1, LONG, dtype=torch.int8)
    boundary[0, LONG // 8 :: LONG // 8] = torch.tensor([1, 2, 1, 2, 1, 3, 2])
    return tokens, Context(boundary=boundary)


def _sublayers(model: LanguageModel, layer: int) -> list[Sublayer]:
    found = model.stack.layers[layer].sublayers
    assert isinstance(found, nn.ModuleList)
    return list(found)  # type: ignore[arg-type]


def _candidates(model: LanguageModel, path: str, sub: Sublayer, layer: int) -> list[Silence]:
    """Groups of parameters that belong together, in the order in which they are put back."""
    if sub.design.residual == "none":
        raise _refused(path, model.design, "replaces the stream (residual: none), so nothing can be added to it "
                       "without effect; use how: stack or interleave")
    if sub.gain is not None:
        return [{f"{path}.gain": 0.0}]
    norm = sub.design.post_norm
    if norm.kind != "none" and norm.affine:
        zero = -1.0 if norm.kind == "zero-centred-rms" else 0.0
        return [{f"{path}.post_norm.{name}": zero if name == "weight" else 0.0
                 for name, _ in sub.post_norm.named_parameters()}]
    outs = [(site, name) for name, site in model.outs().items() if name.startswith(f"{path}.")]
    if sub.out is not None:
        outs = [(site, name) for site, name in outs if name == f"{path}.out"]
    if isinstance(sub.mixer, Reference) and not outs:
        return []
    groups: dict[str, Silence] = {}
    for site, name in outs:
        made = model.get_submodule(name)
        groups.setdefault(site, {}).update({f"{name}.{p}": 0.0 for p in silent_at_zero(made)})  # type: ignore[arg-type]
    return [groups[site] for site in sorted(groups, key=lambda site: -site.count("."))]


def _union(branches: dict[str, list[Silence]], chosen: dict[str, list[int]]) -> Silence:
    return {name: value for path, groups in chosen.items() for g in groups for name, value in branches[path][g].items()}


def _set(model: LanguageModel, values: Silence, kept: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in values:
                parameter.fill_(values[name])
            else:
                parameter.copy_(kept[name])


def _silent(model: LanguageModel, paths: list[str], tokens: Tensor, ctx: Context | None = None) -> dict[str, bool]:
    """Whether each branch adds exactly nothing to the stream."""
    found: dict[str, bool] = {}

    def look(path: str, out: Any) -> None:
        found[path] = not bool(out.y.any())

    hooks = [model.get_submodule(path).register_forward_hook(lambda _, __, out, path=path: look(path, out))
             for path in paths]
    try:
        with torch.no_grad(), evaluating(model):
            model(tokens, None, ctx)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _refused(path: str, design: Model, why: str) -> DesignError:
    _, _, layer, _, j = path.split(".")
    return DesignError(f"how: identity: this sublayer {why}", path=f"model.layers.{design.stack[int(layer)]}.{j}")
