"""Cells and spiking neurons: what is refused, states, resets, spikes, recomputation, maps that are not dense."""

import math

import pytest
import torch
from torch import nn

from postformer.contract.context import DOCUMENT, Context
from postformer.design import DesignError, load
from postformer.kernels import use
from postformer.layers.linear import LoraLinear
from postformer.memory import cell as cells
from postformer.model import build
from postformer.verify import verify
from postformer.verify.compare import error, gradient_error, state_error


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def mixer_of(design):
    def make(seed=0, model=None, **fields):
        made = build(load(design({"m": fields}, ["m"], **(model or {}))).model, seed).double()
        with torch.no_grad():
            for i, p in enumerate(made.stack.parameters()):
                p.add_(0.4 * random(*p.shape, seed=i + 1))
        return made.stack.layers[0].sublayers[0].mixer
    return make


@pytest.mark.parametrize(("fields", "text", "remedy"), [
    ({"parameterisation": "lstn"}, "unknown parameterisation 'lstn'", "Did you mean 'lstm'?"),
    ({"parameterisation": "gru", "heads": 4}, "'heads' means nothing to parameterisation 'gru'", "leave it out"),
    ({"parameterisation": "lstm", "reset": "hard"}, "'reset' means nothing", "leave it out"),
    ({"parameterisation": "lif", "local": "conv4"}, "'local' means nothing", "leave it out"),
    ({"parameterisation": "slstm", "threshold": 2.0}, "'threshold' means nothing", "leave it out"),
    ({"parameterisation": "slstm", "local": "shift"}, "not by shift", "local: conv4"),
    ({"parameterisation": "slstm", "heads": 3}, "16 cells on 16 channels do not divide", "give a divisor"),
    ({"parameterisation": "lstm", "dim_inner": 24}, "24 cells do not fit a layer of 16 channels", "set out: true"),
    ({"parameterisation": "lif", "threshold": 0.0}, "threshold", "greater than 0"),
    ({"parameterisation": "lif", "surrogate": "atan2"}, "surrogate", "'atan'"),
    ({"kind": "vector", "parameterisation": "mamba1", "threshold": 2.0}, "'threshold' means nothing", "leave it out"),
])
def test_what_makes_no_sense_is_refused_with_a_remedy(design, fields, text, remedy):
    with pytest.raises(DesignError) as caught:
        load(design({"m": {"kind": "cell", **fields}}, ["m"]))
    assert text in str(caught.value)
    assert remedy in str(caught.value)


@pytest.mark.parametrize("fields", [
    {"parameterisation": "lstm", "dim_inner": 24, "out": True, "norm": "rms", "heads": 4, "forget_at": "stream"},
    {"parameterisation": "slstm", "heads": 2, "dim_inner": 24, "out": True, "forget_at": "segment"},
    {"parameterisation": "lif", "reset": "hard", "surrogate": "fast-sigmoid", "threshold": 0.5},
], ids=lambda f: f["parameterisation"])
def test_other_sizes_levels_and_resets_keep_the_contract(design, fields):
    found = verify(design({"m": {"kind": "cell", **fields}, "ff": {"kind": "swiglu"}}, ["m/ff"]))
    assert [(r.name, r.value, r.note) for r in found.results if r.passed is False] == []


@pytest.mark.parametrize("linear", ["ternary", {"kind": "lora", "rank": 3, "train_base": True}], ids=str)
def test_maps_that_are_not_dense_reach_the_recurrence(design, linear):
    found = verify(design({"m": {"kind": "cell", "parameterisation": "gru"}}, ["m"], linear={"gate": linear}))
    assert [(r.name, r.value, r.note) for r in found.results if r.passed is False] == []


def test_a_low_rank_update_is_its_merged_map(mixer_of):
    lora = {"linear": {"gate": {"kind": "lora", "rank": 2, "train_base": True}}}
    one, x = mixer_of(kind="cell", parameterisation="lstm", model=lora), random(2, 13, 16)
    two = mixer_of(kind="cell", parameterisation="lstm")
    with torch.no_grad():
        for name, theirs in one.named_modules():
            if isinstance(theirs, nn.Linear):
                mine = two.get_submodule(name)
                mine.weight.copy_(theirs.merged() if isinstance(theirs, LoraLinear) else theirs.weight)
                if theirs.bias is not None:
                    mine.bias.copy_(theirs.bias)
    assert isinstance(one.params.recurrent, LoraLinear)
    assert error(two(x).y, one(x).y) < 1e-13
    through = [torch.autograd.grad(m(x).y.square().sum(), m.params.recurrent.weight)[0] for m in (one, two)]
    assert error(through[1], through[0]) < 1e-12  # one token by token, one once for all tokens


NAMES = ["lstm", "gru", "slstm", "lif"]


@pytest.mark.parametrize("name", NAMES)
def test_recomputing_long_calls_changes_nothing(mixer_of, monkeypatch, name):
    mixer, x = mixer_of(kind="cell", parameterisation=name), random(2, 37, 16)
    start = mixer(random(2, 3, 16, seed=5)).state
    valid = torch.rand(2, 37, generator=torch.Generator().manual_seed(2)) > 0.2
    boundary = torch.zeros(2, 37, dtype=torch.int8)
    boundary[0, 11] = boundary[1, 12] = DOCUMENT
    ctx = Context(valid=valid, boundary=boundary)

    def found():
        out = mixer(x, start, ctx)
        named = dict(mixer.named_parameters())
        total = out.y.square().sum() + sum(s.square().sum() for s in out.state[0])
        return out, dict(zip(named, torch.autograd.grad(total, list(named.values()), retain_graph=True)))

    whole, gradients = found()
    monkeypatch.setattr(cells, "LONG", 16)
    monkeypatch.setattr(cells, "BLOCK", 5)
    again, others = found()
    assert error(again.y, whole.y) < 1e-14
    assert state_error(again.state, whole.state) < 1e-14
    assert gradient_error(others, gradients)[0] < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_a_write_gate_moves_the_state_part_of_the_way(mixer_of, name):
    mixer, x = mixer_of(kind="cell", parameterisation=name), random(2, 1, 16)
    start = mixer(random(2, 3, 16, seed=5)).state
    write = torch.tensor([[0.25], [0.0]], dtype=torch.float64)
    with torch.no_grad():
        full, part = mixer(x, start), mixer(x, start, Context(write=write))
    assert torch.equal(part.y, full.y)
    for old, new, now in zip(start[0], full.state[0], part.state[0], strict=True):
        assert (new - old).abs().max() > 1e-3
        assert (now[0] - torch.lerp(old[0], new[0], 0.25)).abs().max() < 1e-14
        assert torch.equal(now[1], old[1])


@pytest.mark.parametrize("name", ["lstm", "gru", "slstm"])
def test_gradients_through_write_gates_are_derivatives(mixer_of, name):
    mixer, x = mixer_of(kind="cell", parameterisation=name), random(2, 6, 16)
    write = torch.rand(2, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def total(x, write):
        return mixer(x, None, Context(write=write)).y.square().sum()

    assert torch.autograd.gradcheck(total, (x.requires_grad_(), write.requires_grad_()), fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
def test_states_are_at_least_fp32_in_a_model_of_bf16(mixer_of, name):
    mixer = mixer_of(kind="cell", parameterisation=name).bfloat16()
    out = mixer(random(2, 9, 16).bfloat16())
    out.y.float().square().sum().backward()
    assert out.y.dtype == torch.bfloat16
    assert {leaf.dtype for leaf in out.state[0]} == {torch.float32}
    assert all(torch.isfinite(p.grad).all() for p in mixer.parameters())


class TestSLstm:
    def test_the_normaliser_is_at_least_one_and_outputs_are_averages(self, mixer_of):
        mixer = mixer_of(kind="cell", parameterisation="slstm", heads=2)
        for factor in (0.0, 1.0, 1e4):
            out = mixer(factor * random(3, 50, 16))
            _, c, n, _ = out.state[0]
            assert (n >= 1).all()
            assert (c.abs() <= n * (1 + 1e-12)).all()
            assert (out.y.abs() <= 1).all()

    def test_heads_do_not_mix(self, mixer_of):
        mixer, x = mixer_of(kind="cell", parameterisation="slstm", heads=2), random(1, 12, 16)
        other = x.clone()
        other[..., :8] = random(1, 12, 8, seed=3)
        y, z = mixer(x).y, mixer(other).y
        assert torch.equal(y[..., 8:], z[..., 8:])
        assert (y[..., :8] - z[..., :8]).abs().max() > 1e-2


class TestSpikes:
    def neurons(self, mixer_of, fields, current, decay=40.0):
        """Neurons whose currents are `current` whatever comes in; decay 40 is a lambda of 1 in float64."""
        mixer = mixer_of(**fields)
        with torch.no_grad():
            mixer.params.input.weight.zero_()
            mixer.params.input.bias.copy_(current)
            mixer.params.decay.fill_(decay)
        return mixer

    LIF = {"kind": "cell", "parameterisation": "lif"}

    def test_outputs_are_zeros_and_ones(self, mixer_of):
        y = mixer_of(**self.LIF)(2 * random(3, 60, 16)).y
        assert set(y.unique().tolist()) == {0.0, 1.0}

    def test_neurons_without_a_leak_fire_once_per_threshold_of_charge(self, mixer_of):
        current = torch.linspace(0.03, 0.97, 16, dtype=torch.float64)
        mixer = self.neurons(mixer_of, {**self.LIF, "threshold": 1.01}, current)
        y = mixer(random(1, 100, 16)).y[0]
        expected = torch.stack([torch.ceil(current * t / 1.01) - 1 for t in range(1, 101)]).clamp_min(0)
        assert torch.equal(y.cumsum(0), expected)
        assert (y.mean(0).diff() > 0).all()

    def test_a_hard_reset_throws_the_excess_away(self, mixer_of):
        current = torch.linspace(0.13, 0.97, 16, dtype=torch.float64)
        y = self.neurons(mixer_of, {**self.LIF, "reset": "hard"}, current)(random(1, 100, 16)).y[0]
        # u = I, 2 I, ... until it is above 1; the token after a spike starts at I.
        period = torch.floor(1 / current) + 1
        assert torch.equal(y.sum(0), torch.floor(100 / period))

    def test_a_leak_that_the_current_cannot_outrun_never_fires(self, mixer_of):
        # u rises to I / (1 - lambda) = 2 I.
        y = self.neurons(mixer_of, self.LIF, torch.linspace(0.1, 0.9, 16, dtype=torch.float64), decay=0.0)(
            random(1, 100, 16)).y[0]
        assert (y.sum(0) > 0).tolist() == [2 * i > 1 for i in torch.linspace(0.1, 0.9, 16).tolist()]

    def test_no_gradient_flows_through_the_reset(self, mixer_of):
        mixer = self.neurons(mixer_of, self.LIF, torch.full((16,), 0.9, dtype=torch.float64), decay=1.0)
        start = torch.full((1, 16), 1.3, dtype=torch.float64, requires_grad=True)
        out = mixer(random(1, 2, 16), ((start,), None))
        (g,) = torch.autograd.grad(out.state[0][0].sum(), start)
        assert (g - (1 / (1 + math.exp(-1.0))) ** 2).abs().max() < 1e-15

    def test_the_scan_and_the_walk_spike_alike(self, mixer_of):
        """They round differently, by 1e-15 in float64: no potential of a million comes that close to the threshold."""
        mixer, x = mixer_of(kind="vector", parameterisation="lif", bias=True), 2 * random(32, 2000, 16)
        seen = []
        mixer.params.out.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        with torch.no_grad():
            mixer(x)
            with use(backend="reference"):
                mixer(x)
        assert seen[0].numel() > 1e6
        assert 0.05 < seen[0].mean() < 0.6
        assert torch.equal(*seen)

    def test_unrounded_gradients_are_derivatives(self, mixer_of):
        mixer, x = mixer_of(kind="vector", parameterisation="lif"), random(1, 6, 16).requires_grad_()
        with use(rounding=False):
            assert torch.autograd.gradcheck(lambda x: mixer(x).y, x, atol=1e-7)
