"""Growth in depth: the design that comes out, which tensors are copied, and that identity changes no logit."""

import pytest
import torch
import torch.nn.functional as F

from postformer.contract.context import Context
from postformer.design import DesignError, load, names
from postformer.model import build
from postformer.objective import Batch, NextToken
from postformer.surgery import Grow, grow
from postformer.surgery.silence import silences

DELTA = {"kind": "matrix", "loss": "l2", "features": "l2norm", "heads": {"value": 2}}
NO_OUT = {"gru", "lstm", "slstm", "xlstm"}
"""Recipes with a cell that ends in no map"""
SHARED_ROWS = {"hgrn2"}
"""Recipes whose layers share one parameter"""
REPLACED = {"palimpsest", "palimpsest-windowed"}
"""Recipes with a sublayer whose output takes the place of the stream"""
REFUSED = {name: words for found, words in ((NO_OUT, "scale: learned"), (SHARED_ROWS, "lower_bounds"),
                                            (REPLACED, "residual: none")) for name in found}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def design(mixers, stack, width=16, **more):
    return load({"name": "x", "model": {"width": width, "vocab": 32, "mixers": mixers, "stack": stack, **more}})


def trained(recipe, seed=0):
    """As after training: no tensor is at its initial value, none is equal in two layers."""
    model = build(recipe.model, seed).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.05 * noise.to(parameter))
    return model


def tokens(model, length=40):
    generator = torch.Generator().manual_seed(5)
    return torch.randint(model.design.vocab, (3, length), generator=generator)


def logits(model):
    with torch.no_grad():
        return model.eval()(tokens(model)).logits


def small(name):
    return load(name, width=32, layers=max(2, len(set(load(name).model.stack))))


def expected(how, length, single, tile, factor):
    """Sources of the layers, `single` of them in front; written apart from the surgery."""
    body = list(range(length - single))
    if how == "stack":
        body = body * factor
    else:
        body = [i for at in range(0, len(body), tile) for _ in range(factor) for i in body[at : at + tile]]
    return [*range(single), *(single + i for i in body)]


TILES = {"four-learners": 4, "jamba": 3, "nemotron-h-style": 3, "griffin": 2, "deepseek-moe": 2, "qwen3-next": 2,
         "blackmamba": 2, "xlstm": 2, "palimpsest": 3, "palimpsest-windowed": 3}


@pytest.mark.parametrize("how", ["stack", "interleave", "identity"])
@pytest.mark.parametrize("name", names())
def test_every_recipe(name, how):
    recipe = small(name)
    model = trained(recipe)
    if how == "identity" and name in REFUSED:
        with pytest.raises(DesignError, match=REFUSED[name]):
            grow(model, factor=2, how=how)
        return
    before = {key: value.clone() for key, value in model.state_dict().items()}
    large = grow(model, factor=2, how=how)

    depth, single = len(model.design.stack), int(name == "rwkv7")
    source = expected(how, depth, single, TILES.get(name, 1), 2)
    assert large.design.stack == tuple(model.design.stack[i] for i in source)
    assert large.design == Grow(how=how, factor=2).recipe(recipe).model
    assert sum(p.numel() for p in large.parameters()) == Grow(how=how, factor=2).recipe(recipe).cost().params
    assert all(value.dtype == before["embedding.weight"].dtype for value in large.parameters())
    assert logits(large).shape == (3, 40, large.design.vocab)

    zeroed = set(silences(large.design, [k for k, i in enumerate(source) if source.index(i) != k])) \
        if how == "identity" else set()
    after = large.state_dict()
    layers = [key for key in after if key.startswith("stack.layers.")]
    assert len(layers) > len([key for key in before if key.startswith("stack.layers.")])
    for key in layers:
        index, _, rest = key.removeprefix("stack.layers.").partition(".")
        if key not in zeroed:
            assert torch.equal(after[key], before[f"stack.layers.{source[int(index)]}.{rest}"]), key
    for key in after.keys() - layers:
        if not key.startswith("stack.tied."):
            assert torch.equal(after[key], before[key]), key
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())  # left as it was
    changed = float((logits(large) - logits(model)).abs().max())
    assert changed < 1e-12 if how == "identity" else changed > 1e-3


@pytest.mark.parametrize("name", sorted(set(names()) - REFUSED.keys()))
def test_identity_learns(name):
    """The first step moves every new branch, from the second on a copy learns whatever its source learns."""
    model = trained(small(name))
    large = grow(model, factor=2, how="identity")
    source = expected("identity", len(model.design.stack), int(name == "rwkv7"), TILES.get(name, 1), 2)
    new = [k for k, i in enumerate(source) if source.index(i) != k]
    text = tokens(model)
    optimiser = torch.optim.SGD(large.parameters(), 0.1)
    for _ in range(2):
        optimiser.zero_grad()
        F.cross_entropy(large(text).logits[:, :-1].flatten(0, 1), text[:, 1:].flatten()).backward()
        moving = {key for key, p in large.named_parameters() if p.grad is not None and bool(p.grad.any())}
        for k in new:
            for j in range(len(large.stack.layers[k].sublayers)):
                branch = f"stack.layers.{k}.sublayers.{j}."
                assert any(key.startswith(branch) for key in moving), branch
        optimiser.step()
    for k in new:
        old = f"stack.layers.{source.index(source[k])}."
        still = {key.removeprefix(old) for key in moving if key.startswith(old)}
        learns = {key.removeprefix(f"stack.layers.{k}.") for key in moving if key.startswith(f"stack.layers.{k}.")}
        assert still <= learns, still - learns


def test_the_grown_design_is_the_recipe_with_more_layers():
    for how in ("stack", "interleave", "identity"):
        assert Grow(how=how, factor=4).recipe(load("gated-deltanet", width=32, layers=2)).id == \
            load("gated-deltanet", width=32, layers=8).id
    griffin = Grow(layers=12).recipe(load("griffin", width=32, layers=6))
    assert griffin.id == load("griffin", width=32, layers=12).id
    assert [len(griffin.model.stack), griffin.model.stack[:3] == griffin.model.stack[3:6]] == [12, True]


def test_layers_need_not_be_a_multiple():
    model = trained(load("transformer", width=16, layers=2))
    one = {key.split(".", 3)[3]: key for key in model.state_dict() if key.startswith("stack.layers.0.")}
    name = "stack.layers.{}." + next(iter(one))
    first, second = (model.state_dict()[name.format(i)] for i in (0, 1))
    for how, order in (("stack", [0, 1, 0, 1, 0]), ("interleave", [0, 0, 0, 1, 1])):
        large = grow(model, 5, how=how)
        for k, i in enumerate(order):
            assert torch.equal(large.state_dict()[name.format(k)], (first, second)[i])
    assert float((logits(grow(model, 5, how="identity")) - logits(model)).abs().max()) == 0.0


def test_float32_is_bit_equal():
    model = build(load("gated-deltanet", width=32, layers=2).model, 1)
    assert torch.equal(logits(grow(model, factor=3, how="identity")), logits(model))


@pytest.mark.parametrize(("recipe", "how", "words"), [
    ("griffin", Grow(factor=2), ["8 layers from layer 0 on", "tile of 3", "--layers 6 or 9"]),
    ("transformer", Grow(layers=8), ["layers is 8 and the model has 8", "surgery.layers"]),
    ("four-learners", Grow(layers=18), ["18 layers are not tiles of 4", "16, 24, 32"]),
    ("rwkv7", Grow(layers=8), ["layers is 8"]),
])
def test_what_does_not_fit_is_refused(recipe, how, words):
    with pytest.raises(DesignError) as error:
        how.recipe(load(recipe))
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("wrong", [{}, {"factor": 2, "layers": 4}])
def test_factor_or_layers(wrong):
    with pytest.raises(ValueError, match="either factor or layers"):
        grow(build(load("transformer", width=16, layers=1).model), **wrong)


def test_nothing_can_be_repeated_where_every_layer_publishes():
    mixers = {"a": {"kind": "filter", "heads": {"value": 2, "dim_key": 8, "dim_value": 8}}}
    recipe = design(mixers, ["p"], layers={"p": [{"use": "a", "publish": {"doubt": "variance"}}]})
    with pytest.raises(DesignError, match="nothing to repeat"):
        Grow(factor=2).recipe(recipe)


ATTENTION = {"kind": "attention", "heads": {"query": 2, "key_value": 2, "dim": 8}}
MATRIX = {"kind": "matrix", "loss": "l2", "heads": {"value": 2, "dim_key": 8, "dim_value": 8}, "features": "l2norm"}


def zamba(scale):
    return design({"m": MATRIX, "a": ATTENTION, "f": {"kind": "swiglu"}}, ["m", "h", "h"],
                  shared={"block": {"layer": [{"use": "a"}, {"use": "f"}]}},
                  layers={"m": [{"use": "m"}], "h": [{"use": "block", "scale": scale}, {"use": "m"}]})


@pytest.mark.parametrize("how", ["stack", "interleave", "identity"])
def test_shared_blocks_stay_shared(how):
    model = trained(design({"m": MATRIX, "a": ATTENTION, "f": {"kind": "swiglu"}}, [{"repeat": 4, "of": ["h"]}],
                           shared={"block": {"copies": 2, "layer": [{"use": "a"}, {"use": "f"}]}},
                           layers={"h": [{"use": "block", "residual": "next"}, {"use": "m"}]}))
    large = grow(model, factor=2, how=how)
    shared = {key for key in model.state_dict() if key.startswith("stack.shared.")}
    assert len(shared) > 10
    assert shared == {key for key in large.state_dict() if key.startswith("stack.shared.")}
    assert all(torch.equal(large.state_dict()[key], model.state_dict()[key]) for key in shared)
    order = [0, 1, 2, 3] * 2 if how == "stack" else [0, 1, 0, 1, 2, 3, 2, 3]  # in pairs, one for each copy
    for k, i in enumerate(order):
        norm = "stack.layers.{}.sublayers.0.norm.weight"
        assert torch.equal(large.state_dict()[norm.format(k)], model.state_dict()[norm.format(i)])
    if how == "identity":
        assert float((logits(large) - logits(model)).abs().max()) < 1e-12


def test_copies_that_would_move_are_refused():
    recipe = design({"m": MATRIX, "a": ATTENTION}, [{"repeat": 3, "of": ["h"]}],
                    shared={"block": {"copies": 2, "layer": [{"use": "a"}]}},
                    layers={"h": [{"use": "block", "residual": "next"}, {"use": "m"}]})
    for how in ("stack", "interleave"):
        with pytest.raises(DesignError, match="another copy of a shared block"):
            Grow(factor=2, how=how).recipe(recipe)


def test_a_shared_branch_needs_something_of_its_own():
    with pytest.raises(DesignError, match="scale: learned"):
        grow(trained(zamba(1.0)), factor=2, how="identity")
    model = trained(zamba("learned"))
    large = grow(model, factor=2, how="identity")
    assert float((logits(large) - logits(model)).abs().max()) < 1e-12
    assert large.design.stack == ("m", "h", "h", "m", "h", "h")
    assert [bool(large.stack.layers[k].sublayers[0].gain.any()) for k in (1, 2, 4, 5)] == [True, True, False, False]


def ends(mixer, **sub):
    """The parameters that start at zero in a new layer of this one mixer."""
    recipe = design({"m": mixer}, ["m", "m"], layers={"m": [{"use": "m", **sub}]})
    prefix = "stack.layers.1.sublayers.0."
    return {name.removeprefix(prefix): value for name, value in silences(recipe.model, [1]).items()}


def test_what_ends_a_branch():
    mlp = {"kind": "mlp"}
    assert ends(mlp) == {"mixer.out.weight": 0.0}
    assert ends(mlp, scale="learned") == {"gain": 0.0}
    assert ends(mlp, out="width") == {"out.weight": 0.0}
    assert ends(mlp, post_norm="rms") == {"post_norm.weight": 0.0}
    assert ends(mlp, post_norm="layer") == {"post_norm.weight": 0.0, "post_norm.bias": 0.0}
    assert ends(mlp, post_norm="zero-centred-rms") == {"post_norm.weight": -1.0}
    # Zeros behind zeros would never have a gradient: of a chain only the last, of a product one.
    assert ends({"kind": "chain", "of": [ATTENTION, mlp]}) == {"mixer.of.1.out.weight": 0.0}
    assert len(ends({"kind": "parallel", "merge": "product", "of": [ATTENTION, mlp]})) == 1
    assert set(ends({"kind": "parallel", "of": [ATTENTION, MATRIX]})) == \
        {"mixer.of.0.out.weight", "mixer.of.1.out.weight"}
    experts = ends({"kind": "moe", "experts": 4, "top": 1, "normalise": False, "shared": 1})
    assert sum("experts" in name for name in experts) == 4
    assert len(experts) == 5  # with the shared one, whether or not a token chose them


@pytest.mark.parametrize("depth", ["mod", "loop", "ode"])
def test_a_depth_of_its_own_is_no_hindrance(depth):
    layer = [{"use": "m"}, {"use": "f", "depth": depth}]
    model = trained(design({"m": MATRIX, "f": {"kind": "swiglu"}}, ["a", "a"], layers={"a": layer}))
    large = grow(model, factor=2, how="identity")
    assert float((logits(large) - logits(model)).abs().max()) == 0.0
    inner = model.state_dict()
    copied = [key for key in large.state_dict() if key.startswith("stack.layers.3.sublayers.1.depth.")]
    assert copied
    assert all(torch.equal(large.state_dict()[key], inner[key.replace("layers.3", "layers.1")]) for key in copied)


def test_what_replaces_the_stream_is_refused():
    block = {"use": "b", "norm": "none", "residual": "none", "depth": "loop"}
    recipe = design({"m": MATRIX, "f": {"kind": "swiglu"}}, ["a", "a"], layers={"a": [block]},
                    shared={"b": {"layer": [{"use": "m"}, {"use": "f"}]}})
    with pytest.raises(DesignError, match="replaces the stream"):
        grow(trained(recipe), factor=2, how="identity")
    assert len(grow(trained(recipe), factor=2).design.stack) == 4


def test_timescales():
    levels = [{"of": MATRIX}, {"of": MATRIX, "every": 8}]
    clock = {"kind": "timescales", "arrangement": "parallel", "levels": levels}
    model = trained(design({"c": clock, "f": {"kind": "swiglu"}}, ["c/f", "c/f"]))
    large = grow(model, factor=2, how="identity")
    assert float((logits(large) - logits(model)).abs().max()) < 1e-12


def test_low_rank_maps_keep_a_gradient():
    recipe = load("transformer", ["model.linear.projection=lora"], width=16, layers=1)
    large = grow(trained(recipe), factor=2, how="identity")
    out = large.stack.layers[1].sublayers[1].mixer.out
    assert [bool(p.any()) for p in (out.weight, out.lora_b, out.lora_a)] == [False, False, True]
    assert not out.weight.requires_grad
    large(tokens(large)).logits.square().mean().backward()
    assert bool(out.lora_b.grad.any())


@pytest.mark.parametrize("how", ["stack", "interleave"])
def test_rows_of_a_tied_parameter_follow_their_layers(how):
    model = trained(load("hgrn2", width=32, layers=3))
    (old,) = (p for key, p in model.named_parameters() if key.startswith("stack.tied."))
    (new,) = (p for key, p in grow(model, factor=2, how=how).named_parameters() if key.startswith("stack.tied."))
    assert old.shape[0] == 3
    assert torch.equal(new, old[[0, 1, 2, 0, 1, 2] if how == "stack" else [0, 0, 1, 1, 2, 2]])


def test_buffers_frozen_parameters_and_modes_are_kept():
    model = trained(load("deepseek-moe", width=32, layers=3))
    model.train()
    (bias,) = [b for key, b in model.named_buffers() if key.startswith("stack.layers.2.")]
    bias.copy_(torch.arange(len(bias)))
    frozen = "stack.layers.1.sublayers.0.norm.weight"
    model.get_parameter(frozen).requires_grad_(False)
    large = grow(model, factor=2)
    assert large.training
    copied = [b for key, b in large.named_buffers() if key.startswith("stack.layers.5.")]
    assert torch.equal(copied[0], bias)
    held = {key for key, p in large.named_parameters() if not p.requires_grad}
    assert held == {frozen, "stack.layers.4.sublayers.0.norm.weight"}


@pytest.mark.slow
def test_growth_is_worth_something():
    """After as many steps of the large model, the grown one is far below the fresh one."""
    recipe = load("transformer", width=32, layers=1)

    def run(model, steps):
        optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
        for step in range(steps):
            generator = torch.Generator().manual_seed(step)
            text = (torch.randint(3, (8, 33), generator=generator).cumsum(1) + step) % 24
            loss, _ = NextToken().loss(model, Batch.windows(text))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return loss.item()

    one = build(recipe.model)
    run(one, 150)
    scratch = run(build(Grow(factor=3).recipe(recipe).model), 40)
    found = {how: run(grow(one, factor=3, how=how), 40) for how in ("stack", "interleave", "identity")}
    assert all(loss < scratch - 0.2 for loss in found.values()), (scratch, found)


@pytest.mark.parametrize("level", [
    {"every": 64, "of": DELTA}, {"every": "document", "of": {**DELTA, "forget_at": "stream"}},
])
def test_a_slow_level_is_silent_for_ever_and_not_for_a_while(level):
    raw = {"name": "slow", "model": {"width": 16, "vocab": 40, "stack": ["m", "m"], "mixers": {
        "m": {"kind": "timescales", "levels": [{"of": DELTA}, level]}}}}
    small = build(load(raw).model).double()
    with torch.no_grad():
        for p in small.parameters():
            p.add_(0.3 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(p.numel())))
    large = grow(small, factor=2, how="identity")
    tokens = torch.randint(40, (2, 300), generator=torch.Generator().manual_seed(1))
    boundary = torch.zeros(2, 300, dtype=torch.int8)
    boundary[:, 120] = boundary[:, 200] = 2
    for ctx in (None, Context(boundary=boundary)):
        assert (large(tokens, None, ctx).logits - small(tokens, None, ctx).logits).abs().max() < 1e-12
