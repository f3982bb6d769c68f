"""What the contract carries between mixers: publications, shared blocks, gates, boundary levels, emitted states."""

from itertools import pairwise

import pytest
import torch

from postformer.contract import state as states
from postformer.contract.context import DOCUMENT, SEGMENT, STREAM, Context
from postformer.design import DesignError, load
from postformer.model import build
from postformer.model.language import LMState
from postformer.verify import verify

FF = {"kind": "swiglu"}
DECAY = {"kind": "test-decay"}


def passes(data, full=False):
    found = verify(data, full=full)
    assert [(r.name, r.value, r.note) for r in found.results if r.passed is False] == []
    return found


def model_of(data, seed=0):
    return build(load(data).model, seed).double()


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestPublications:
    def whole(self, design, **changes):
        layers = {"w": [{"use": "writer", "publish": {"h": "memory"}}, {"use": "ff"}],
                  "r": [{"use": "reader"}, {"use": "join", "input": ["x", "h", "embedding"]}]}
        mixers = {"writer": DECAY, "reader": {**DECAY, "reads": "h"}, "join": FF, "ff": FF}
        return design(mixers, ["w", "r", "r"], layers={**layers, **changes})

    def test_a_reader_of_an_earlier_layer_keeps_the_contract(self, design):
        passes(self.whole(design))

    def test_the_reader_sees_what_was_published_in_this_call(self, design):
        model = model_of(self.whole(design))
        out, _ = model.run(random(2, 7, 16))
        assert set(out.published) == {"h"}
        (g,) = torch.autograd.grad(out.published["h"].sum(), model.stack.layers[0].sublayers[0].mixer.a)
        assert g.abs().max() > 1e-3
        layer, ctx = model.stack.layers[1], Context(position=torch.arange(7).expand(2, -1))
        x, seen = random(2, 7, 16, seed=1), {"embedding": random(2, 7, 16, seed=2)}
        one = layer(x, None, ctx.replace(shared={**seen, "h": out.published["h"]})).y
        two = layer(x, None, ctx.replace(shared={**seen, "h": 0 * out.published["h"]})).y
        assert (one - two).abs().max() > 1e-3

    def test_read_before_written(self, design):
        data = self.whole(design)
        data["model"]["stack"] = ["r", "w"]
        with pytest.raises(DesignError, match=r"model.layers.r.0: 'h' is read before any earlier sublayer publishes"):
            load(data)

    def test_published_twice(self, design):
        data = self.whole(design)
        data["model"]["stack"] = ["w", "w", "r"]
        with pytest.raises(DesignError, match=r"model.layers.w.0.publish.h: 'h' is published twice"):
            load(data)

    @pytest.mark.parametrize(("publish", "text"), [
        ({"h": "memori"}, "'memori' is nothing that this sublayer's mixer publishes. Did you mean 'memory'"),
        ({"embedding": "memory"}, "'embedding' is published twice"), ({"x": "memory"}, "'x' is the stream")])
    def test_what_cannot_be_published(self, design, publish, text):
        with pytest.raises(DesignError, match=text):
            load(self.whole(design, w=[{"use": "writer", "publish": publish}, {"use": "ff"}]))

    def test_unknown_publication(self, design):
        with pytest.raises(DesignError, match=r"model.layers.r.1.input.1: input 'hh' is read before.*Allowed: embed"):
            load(self.whole(design, r=[{"use": "reader"}, {"use": "join", "input": ["x", "hh"]}]))
        mixers = {"writer": DECAY, "reader": {**DECAY, "reads": "hh"}}
        with pytest.raises(DesignError, match="'hh' is read before any earlier sublayer publishes it"):
            load(design(mixers, ["writer", "reader"]))


class TestSharedBlocks:
    def whole(self, design, stack=("m", "hyb", "m", "hyb", "hyb")):
        return design(
            {"memory": {"kind": "matrix", "heads": {"value": 2}}, "attention": {"kind": "attention", "heads": {
                "query": 2, "dim": 4}}, "ff": FF}, list(stack),
            shared={"block": {"copies": 2, "layer": [
                {"use": "attention", "input": ["x", "embedding"], "residual": "none"},
                {"use": "ff", "residual": "none", "out": "width"}]}},
            layers={"m": [{"use": "memory"}],
                    "hyb": [{"use": "block", "norm": "none", "residual": "next", "out": "width"}, {"use": "memory"}]})

    def test_it_keeps_the_contract(self, design):
        assert passes(self.whole(design), full=True).size == "width 16, 5 layers"
        passes(self.whole(design))

    def test_parameters_once_per_copy_and_state_per_site(self, design):
        model = model_of(self.whole(design))
        names = list(model.state_dict())
        assert {n.split(".")[2] for n in names if n.startswith("stack.shared.")} == {"block-0", "block-1"}
        assert len({p.data_ptr() for p in model.state_dict().values()}) == len(names)
        sites = [layer.sublayers[0] for layer in model.stack.layers if len(layer.sublayers) == 2]
        assert [s.runs is model.stack.shared[f"block-{i}"] for s, i in zip(sites, (0, 1, 0))] == [True] * 3
        assert sites[0].runs.sublayers[0].mixer.q.weight.shape == (8, 32)
        _, state = model.run(random(1, 5, 16))
        lists = [state.stack[i][0][0].memory.data for i in (1, 3, 4)]
        assert all((a - b).abs().max() > 1e-3 for a, b in pairwise(lists))

    def test_only_copies_that_a_site_uses_are_built_and_counted(self, design):
        recipe = load(self.whole(design, stack=("m", "hyb")))
        model = build(recipe.model)
        assert list(model.stack.shared) == ["block-0"]
        assert sum(p.numel() for p in model.parameters()) == recipe.cost().params

    def test_residual_next_reaches_the_next_sublayer_only(self, design):
        model = model_of(self.whole(design, stack=("hyb",)))
        layer = model.stack.layers[0]
        x, position = random(2, 5, 16), torch.arange(5).expand(2, -1)
        ctx = Context(position=position, shared={"embedding": random(2, 5, 16, seed=1)})
        branch = layer.sublayers[0](x, None, layer.initial(2)[0], ctx).y
        memory = layer.sublayers[1]
        expected = x + memory.runs(memory.norm(x + branch), None, ctx).y
        torch.testing.assert_close(layer(x, None, ctx).y, expected, rtol=0, atol=1e-14)

    def test_unknown_mixers_and_publications_inside_are_refused(self, design):
        data = self.whole(design)
        data["model"]["shared"]["block"]["layer"][1]["use"] = "fff"
        with pytest.raises(DesignError, match=r"model.shared.block.layer.1.use: no mixer 'fff'. Did you mean 'ff'"):
            load(data)
        data = self.whole(design)
        data["model"]["shared"]["block"]["layer"][0]["input"] = ["x", "h"]
        with pytest.raises(DesignError, match=r"model.shared.block.layer.0.input.1: input 'h' is read before"):
            load(data)


class TestComposites:
    CHILDREN = ({"kind": "attention", "heads": {"query": 2}, "window": 4}, DECAY,
                {"kind": "matrix", "loss": "l2", "features": "l2norm", "heads": {"value": 2}})

    @pytest.mark.parametrize("merge", ["sum", "mean-norm", "gate", "concat"])
    def test_parallel(self, design, merge):
        passes(design({"both": {"kind": "parallel", "merge": merge, "of": [*self.CHILDREN]}}, ["both"]))

    def test_chain(self, design):
        passes(design({"row": {"kind": "chain", "of": [*self.CHILDREN, FF]}}, ["row"]))

    def test_nested(self, design):
        inner = {"kind": "parallel", "of": [DECAY, {"kind": "chain", "of": [FF, {"kind": "attention"}]}]}
        passes(design({"row": {"kind": "chain", "of": [inner, {"kind": "test-learned"}]}}, ["row"]))

    def test_children_with_a_parameter_of_the_stack_keep_their_own(self, design):
        hgrn = {"kind": "matrix", "parameterisation": "hgrn2", "heads": {"value": 2}}
        data = design({"both": {"kind": "parallel", "of": [hgrn, {**hgrn, "read": "none"}]}}, ["both", "both"])
        model = model_of(data)
        assert len(model.stack.tied) == 2
        passes(data)

    def test_different_mixers_with_a_parameter_of_the_stack_keep_their_own(self, design):
        hgrn = {"kind": "matrix", "parameterisation": "hgrn2", "heads": {"value": 2}}
        data = design({"a": hgrn, "b": {**hgrn, "read": "none"}}, ["a", "b"])
        assert len(model_of(data).stack.tied) == 2
        passes(data)


class TestClock:
    CHILDREN = (DECAY, {"kind": "matrix", "loss": "l2", "features": "l2norm", "heads": {"value": 2}},
                {"kind": "attention", "heads": {"query": 2}}, {"kind": "test-learned"})

    @pytest.mark.parametrize("child", CHILDREN, ids=lambda c: c["kind"])
    def test_a_wrapper_that_knows_no_kind_keeps_the_contract(self, design, child):
        found = verify(design({"slow": {"kind": "test-clock", "of": child, "every": 3}}, ["slow"]))
        failed = [(r.name, r.note) for r in found.results if r.passed is False]
        if child["kind"] == "attention":  # the list is a third as long as the child's own cost says
            failed = [name for name, _ in failed if not name.startswith("declared")]
        assert failed == []

    def test_the_child_learns_from_every_nth_token_only(self, design):
        model = model_of(design({"slow": {"kind": "test-clock", "of": DECAY, "every": 3}}, ["slow"]))
        x = random(1, 12, 16)
        _, after = model.run(x)
        other = x.clone()
        other[:, [i for i in range(12) if i % 3 != 2]] = random(1, 8, 16, seed=4)
        assert torch.equal(states.leaves(model.run(other)[1].stack)[0], states.leaves(after.stack)[0])
        other[:, 11] += 1
        assert (states.leaves(model.run(other)[1].stack)[0] - states.leaves(after.stack)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("unit", ["rglru", "mamba1", "hgrn", "mingru", "mlgru", "s4d", "s5", "lif"])
def test_a_token_that_only_reads_is_not_the_first_of_a_document(design, unit):
    memory = {"kind": "vector", "parameterisation": unit}
    if unit in ("rglru", "mamba1"):
        memory["local"] = "none"
    mixer = model_of(design({"m": memory}, ["m"])).stack.layers[0].sublayers[0].mixer
    x, gate = random(2, 9, 16), torch.ones(2, 9, dtype=torch.float64)
    boundary = torch.zeros(2, 9, dtype=torch.int8)
    gate[:, :2] = gate[1, 5] = 0
    boundary[1, 5] = DOCUMENT
    with torch.no_grad():
        y = mixer(x, None, Context(tick=gate, write=gate, boundary=boundary)).y
        assert torch.allclose(y[0, 2:], mixer(x[:1, 2:]).y[0], atol=1e-12)
        assert torch.allclose(y[1, 2:5], mixer(x[1:, 2:5]).y[0], atol=1e-12)
        assert torch.allclose(y[1, 6:], mixer(x[1:, 6:]).y[0], atol=1e-12)


class TestBoundaryLevels:
    LEVELS = ("segment", "document", "stream")

    def test_each_memory_forgets_at_its_own_level(self, design):
        model = model_of(design({level: {**DECAY, "forget_at": level} for level in self.LEVELS}, [*self.LEVELS]))
        for layer, own in zip(model.stack.layers, (SEGMENT, DOCUMENT, STREAM)):
            mixer, x = layer.sublayers[0].mixer, random(2, 9, 16)
            plain, fresh = mixer(x).y, mixer(x[:, 4:]).y
            for boundary in (SEGMENT, DOCUMENT, STREAM):
                ends = torch.zeros(2, 9, dtype=torch.int8)
                ends[0, 4] = boundary
                y = mixer(x, None, Context(boundary=ends)).y
                expected = fresh[0] if boundary >= own else plain[0, 4:]
                assert (y[0, 4:] - expected).abs().max() < 1e-14
                assert (y[1] - plain[1]).abs().max() < 1e-14

    @pytest.mark.parametrize("level", LEVELS)
    def test_a_memory_of_any_level_keeps_the_contract(self, design, level):
        passes(design({"memory": {**DECAY, "forget_at": level}}, ["memory"]))
        passes(design({"memory": {"kind": "matrix", "forget_at": level, "local": "conv3"}}, ["memory"]))

    def test_levels_may_be_mixed(self, design):
        passes(design({"fast": {**DECAY, "forget_at": "segment"}, "slow": {"kind": "matrix", "forget_at": "stream"}},
                      ["fast", "slow"]))


class TestFallbacks:
    def test_run_by_pieces_equals_native_resets_and_emitted_states(self, design):
        native, other = (model_of(design({"m": {**DECAY, "native": flag}}, ["m", "m"])) for flag in (True, False))
        other.load_state_dict(native.state_dict())
        x, boundary = random(3, 23, 16), torch.zeros(3, 23, dtype=torch.int8)
        boundary[0, 5] = boundary[1, 0] = boundary[1, 17] = boundary[2, 5] = DOCUMENT
        valid = torch.rand(3, 23, generator=torch.Generator().manual_seed(2)) > 0.3
        start = native.run(random(3, 4, 16, seed=3))[1]
        for ctx in (Context(boundary=boundary), Context(emit=4), Context(boundary=boundary, emit=7, valid=valid),
                    Context(boundary=boundary, emit=1), Context(emit=50)):
            (a, sa), (b, sb) = native.run(x, start, ctx), other.run(x, start, ctx)
            assert (a.y - b.y).abs().max() < 1e-13
            for one, two in zip(states.leaves((sa, a.emitted)), states.leaves((sb, b.emitted)), strict=True):
                assert one.shape == two.shape
                assert (one - two).abs().max() < 1e-13

    def test_a_mixer_without_either_keeps_the_contract(self, design):
        passes(design({"m": {**DECAY, "native": False}}, ["m"]))

    def test_published_pieces_are_joined(self, design):
        model = model_of(design({"m": {**DECAY, "native": False}}, ["l"], layers={
            "l": [{"use": "m", "publish": {"h": "memory"}}]}))
        boundary = torch.zeros(2, 9, dtype=torch.int8)
        boundary[0, 4] = DOCUMENT
        h = model.run(random(2, 9, 16), None, Context(boundary=boundary))[0].published["h"]
        alone = model.run(random(2, 9, 16)[:1, 4:])[0].published["h"]
        assert h.shape == (2, 9, 16)
        assert (h[:1, 4:] - alone).abs().max() < 1e-14


MEMORIES = {
    "decay": DECAY, "learned": {"kind": "test-learned"}, "attention": {"kind": "attention", "heads": {"query": 2}},
    "window": {"kind": "attention", "heads": {"query": 2}, "window": 5}, "matrix": {"kind": "matrix", "local": "conv3"},
    "vector": {"kind": "vector", "local": "conv3"},
}


@pytest.mark.parametrize("kind", MEMORIES)
def test_emitted_states_folded_into_the_batch_go_on_block_by_block(design, kind):
    model = model_of(design({"m": MEMORIES[kind], "ff": FF}, ["m/ff", "m/ff"]))
    x, start = random(2, 20, 16), model.run(random(2, 3, 16, seed=1))[1]
    out, _ = model.run(x, start, Context(emit=5))
    folded = states.map_state(lambda leaf: leaf.flatten(0, 1), out.emitted)
    position = (start.next[:, None] + torch.arange(0, 20, 5)).flatten()
    blocks, after = model.run(x.unflatten(1, (4, 5)).flatten(0, 1), LMState(folded, position))
    assert (blocks.y.unflatten(0, (2, 4)).flatten(1, 2) - out.y).abs().max() < 1e-13
    assert after.next.tolist() == [8, 13, 18, 23] * 2


def test_a_learned_start_is_where_every_document_begins(design):
    passes(design({"m": {"kind": "test-learned"}}, ["m"]))
    model = model_of(design({"m": {"kind": "test-learned"}}, ["m"]))
    mixer, x = model.stack.layers[0].sublayers[0].mixer, random(1, 6, 16)
    boundary = torch.zeros(1, 6, dtype=torch.int8)
    boundary[0, 3] = DOCUMENT
    y = mixer(x, None, Context(boundary=boundary)).y
    assert (y[:, 3:] - mixer(x[:, 3:]).y).abs().max() < 1e-14
    (g,) = torch.autograd.grad(y[:, 3:].sum(), mixer.start)
    assert g.abs().max() > 1e-2
