"""Checks of what a design declares: parameters, FLOPs, state bytes, dtypes of the state, saving and loading."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from postformer.block.depth import as_declared
from postformer.block.sublayer import Sublayer
from postformer.contract import state as states
from postformer.design.cost import linear
from postformer.kernels import use
from postformer.layers.local import ShortConvolution
from postformer.layers.norm import HeadNorm, RMSNorm
from postformer.model import build
from postformer.verify.check import EXACT, Found, check
from postformer.verify.subject import Subject


@check("declared params and state bytes = measured")
def sizes(s: Subject) -> Found:
    cost = s.recipe.cost()
    model = build(s.recipe.model)
    params = sum(p.numel() for p in model.parameters())
    if params != cost.params:
        return abs(params - cost.params), EXACT, f"params: declared {cost.params}, built {params}"
    with torch.no_grad(), as_declared(model):
        for context in (5, 37):
            tokens = torch.zeros(1, context, dtype=torch.long)
            measured = states.size(model(tokens).state)
            if measured != cost.state_bytes(context):
                note = f"state at {context} tokens: declared {cost.state_bytes(context)} B, measured {measured} B"
                return abs(measured - cost.state_bytes(context)), EXACT, note
    return 0.0, EXACT, f"{params} params, {cost.state_bytes(37)} B at 37 tokens"


COUNTED = 16
"""Tokens whose FLOPs are counted, one by one: as few as hold a window and some periods"""


@check("declared FLOPs = PyTorch's count on the reference path, within 5 %")
def flops(s: Subject) -> Found:
    cost = s.recipe.cost()
    # The head is the same for every design and would hide a mistake in a small one.
    declared = cost.flops(COUNTED) - linear(s.width, s.recipe.model.vocab).flops(COUNTED)
    # Without gradients: the counter's hooks stumble over a learned initial state.
    model, tokens = build(s.recipe.model).requires_grad_(False), torch.zeros(1, COUNTED, dtype=torch.long)
    with torch.no_grad(), use(backend="reference"), as_declared(model), FlopCounterMode(display=False) as counter:
        model.run(model.embed(tokens), tokens=tokens)
    counted = counter.get_total_flops()
    gap = abs(declared / counted - 1) if counted else abs(declared)
    return gap, 0.05, f"declared {declared:.0f}, counted {counted}, without the head"


@check("declared traits: a constant state is one, a stateless design has none")
def declared_traits(s: Subject) -> Found:
    model = build(s.recipe.model)
    with torch.no_grad():
        sizes = [states.size(model(torch.zeros(1, n, dtype=torch.long)).state.stack) for n in (5, 37)]
    if s.traits.streaming == "constant" and sizes[0] != sizes[1]:
        return math.inf, EXACT, f"streaming is constant, but the state grows from {sizes[0]} to {sizes[1]} B"
    if not s.traits.stateful and sizes[1]:
        return math.inf, EXACT, f"declared without state, but carries {sizes[1]} B"
    return 0.0, EXACT, ""


@check("weights and state, saved and loaded: bit-equal outputs")
def saved(s: Subject) -> Found:
    model = build(s.recipe.model, seed=1)
    tokens = torch.randint(0, s.recipe.model.vocab, (2, 21), generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        state = model(tokens[:, :12]).state
        truth = model(tokens[:, 12:], state).logits
        path = Path(folder) / "all.safetensors"
        save_file({**{k: v.contiguous() for k, v in model.state_dict().items()}, **states.flatten(state)}, path)
        loaded = load_file(path)
        other = build(s.recipe.model, seed=2)
        other.load_state_dict({k: v for k, v in loaded.items() if not k.startswith("state.")})
        again = other(tokens[:, 12:], states.unflatten(loaded, state)).logits
    return 0.0 if torch.equal(again, truth) else 1.0, EXACT, ""


@check("under bf16 autocast: finite, and accumulators stay fp32")
def low_precision(s: Subject) -> Found:
    model = build(s.recipe.model)
    tokens = torch.randint(0, s.recipe.model.vocab, (2, 37), generator=torch.Generator().manual_seed(3))
    fresh = states.leaves(model.initial(2))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(tokens)
    out.logits.float().square().mean().backward()
    if not torch.isfinite(out.logits).all():
        return math.inf, EXACT, "logits are not finite"
    low = [str(a.dtype) for a in fresh if a.dtype.is_floating_point and a.dtype.itemsize < 4]
    if low:
        return float(len(low)), EXACT, f"the initial state holds {low[0]}; a state is at least fp32"
    coarse = [i for i, (a, b) in enumerate(zip(fresh, states.leaves(out.state)))
              if b.dtype != a.dtype and a.dtype != torch.long and a.numel()]
    return float(len(coarse)), EXACT, f"state leaves that changed dtype: {coarse}" if coarse else ""


NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, RMSNorm, HeadNorm, ShortConvolution, Sublayer)


@check("every parameter is made through the site or a norm")
def owned(s: Subject) -> Found:
    known = {f"{name}.{key}" for name, module in s.model.named_modules() if isinstance(module, NORMS)
             for key, _ in module.named_parameters(recurse=False)}
    stray = [name for name, role in s.model._roles.items()
             if role is None and name not in known and not name.startswith(("embedding.", "head."))]
    remedy = "; make maps by site.linear and parameters by site.parameter" if stray else ""
    return float(len(stray)), EXACT, ", ".join(stray) + remedy
