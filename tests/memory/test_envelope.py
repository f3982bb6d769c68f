"""The envelope: any memory inside, inputs fed apart, what is refused."""

import pytest
import torch
import torch.nn.functional as F

from postformer.contract.context import DOCUMENT, FED, Context
from postformer.design import DesignError, load
from postformer.design.registry import resolve
from postformer.model import build
from postformer.verify import verify

QKV = {"kind": "matrix", "heads": {"value": 2}, "read": {"out": False}}
XLSTM = {"kind": "matrix", "parameterisation": "xlstm", "heads": {"value": 2}, "read": {"norm": "layer", "out": False}}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixer_of(design, **fields):
    model = build(load(design({"m": {"kind": "envelope", **fields}}, ["m"])).model).double()
    return model.stack.layers[0].sublayers[0].mixer


@pytest.mark.parametrize("fields", [
    {"of": {"kind": "attention", "heads": {"query": 2}}, "expand": 1.5, "gate": "sigmoid", "skip": False},
    {"of": {"kind": "vector", "parameterisation": "hgrn"}, "conv": 0, "gate": "none"},
    {"of": {"kind": "cell", "parameterisation": "lif", "out": True}, "conv": 3, "conv_bias": False},
    {"of": {**QKV, "loss": "l2", "features": "l2norm", "forget_at": "segment"}, "conv_on": ["value"]},
    {"of": {"kind": "envelope", "of": XLSTM, "conv_on": ["query", "key"]}, "expand": 1, "conv": 2},
], ids=["attention", "hgrn", "lif", "delta", "nested"])
def test_it_keeps_the_contract_around_any_memory(design, fields):
    found = verify(design({"m": {"kind": "envelope", **fields}}, ["m", "m"]))
    assert [(r.name, r.value, r.note) for r in found.results if r.passed is False] == []


def test_without_a_convolution_it_has_the_childs_gates():
    kind = resolve("envelope")
    made = {conv: kind.Design.model_validate({"kind": "envelope", "of": {"kind": "matrix"}, "conv": conv})
            for conv in (0, 4)}
    assert [kind.traits(made[conv]).soft_gates for conv in (0, 4)] == [True, False]


@pytest.mark.parametrize("of", [QKV, XLSTM, {**XLSTM, "parameterisation": "mlstm"}],
                         ids=["qkv", "xlstm", "mlstm"])
def test_each_named_input_sees_the_convolution_and_the_others_do_not(design, of):
    every = ("query", "key", "value")
    mixer, u, c = mixer_of(design, of=of), random(2, 9, 32), random(2, 9, 32, seed=1)
    child = mixer.of
    for p in child.parameters():
        p.data.add_(0.3 * random(*p.shape, seed=2))
    plain = child(u).y
    assert torch.equal(child(u, None, Context(shared={FED + n: u for n in every})).y, plain)
    fed = {n: child(u, None, Context(shared={FED + n: c})).y for n in every}
    assert all((y - plain).abs().max() > 1e-3 for y in fed.values())
    for name, letter in zip(every, "qkv", strict=True):
        weight = getattr(child.params, f"{letter}_weight", None)
        with torch.no_grad():
            (getattr(child.params, letter).weight if weight is None else weight).zero_()
        assert torch.equal(child(u, None, Context(shared={FED + name: c})).y, child(u).y)


def test_what_the_child_is_given(design):
    mixer, x = mixer_of(design, of=QKV, conv_on=["query", "key"]), random(1, 9, 16)
    seen = []
    mixer.of.register_forward_pre_hook(lambda module, args: seen.append(args))
    mixer(x)
    u, ctx = seen[0][0], seen[0][2]
    kernel = mixer.conv.weight[:, None]
    conv = F.silu(F.conv1d(F.pad(mixer.up(x).mT, (3, 0)), kernel, mixer.conv.bias, groups=32).mT)
    assert torch.equal(u, mixer.up(x))
    assert set(ctx.shared) == {"input.query", "input.key"}
    for fed in ctx.shared.values():
        assert (fed - conv).abs().max() < 1e-14


def test_documents_do_not_see_each_other_through_the_convolution(design):
    mixer, x = mixer_of(design, of=XLSTM, conv_on=["query", "key"]), random(1, 12, 16)
    boundary = torch.zeros(1, 12, dtype=torch.int8)
    boundary[0, 5] = DOCUMENT
    assert (mixer(x, None, Context(boundary=boundary)).y[:, 5:] - mixer(x[:, 5:]).y).abs().max() < 1e-13


@pytest.mark.parametrize(("fields", "text", "remedy"), [
    ({"of": QKV, "conv": 1}, "one tap mixes nothing", "set conv: 0"),
    ({"of": QKV, "conv": 0, "conv_on": ["key"]}, "there is no convolution", "leave conv_on out"),
    ({"of": {"kind": "cell"}, "conv_on": ["key"]}, "'key' is no input of kind 'cell'", "leave conv_on out"),
    ({"of": {"kind": "chain", "of": [QKV]}, "conv_on": ["key"]}, "'key' is no input of kind 'chain'",
     "leave conv_on out"),
    ({"of": QKV, "conv_on": ["keys"]}, "'keys' is not possible", "Did you mean 'key'?"),
    ({"of": {"kind": "matrx"}}, "unknown kind 'matrx'", "Did you mean 'matrix'?"),
    ({"of": {**XLSTM, "heads": {"value": 2, "dim_key": 4}}}, "in blocks of 4", "leave heads.dim_key"),
    ({"of": {**QKV, "heads": {"value": 2, "dim_value": 4}}}, "8 channels of all heads do not fit a width of 32",
     "set read.out: true"),
])
def test_what_makes_no_sense_is_refused_with_a_remedy(design, fields, text, remedy):
    with pytest.raises(DesignError) as caught:
        load(design({"m": {"kind": "envelope", **fields}}, ["m"]))
    assert text in str(caught.value)
    assert remedy in str(caught.value)
