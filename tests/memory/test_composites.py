"""Memories made of memories, whatever their kinds: a learned router, memory as context, gate and layer, any nesting."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from postformer.contract import state as states
from postformer.contract.context import DOCUMENT, Context
from postformer.design import DesignError, load
from postformer.kernels import use
from postformer.memory.compose.router import imbalance
from postformer.model import build
from postformer.model.language import LMState
from postformer.verify import verify
from postformer.verify.compare import state_error

FF = {"kind": "swiglu"}
DELTA = {"kind": "matrix", "loss": "l2", "features": ["silu", "l2norm"], "heads": {"value": 2},
         "retention": {"per": "head", "gate": "mamba"}}
LINEAR = {"kind": "matrix", "heads": {"value": 2}, "retention": {"per": "head", "gate": "sigmoid"}}
MAMBA = {"kind": "vector", "dim_inner": 16, "dim_state": 4}
WINDOW = {"kind": "attention", "window": 6, "heads": {"query": 2}}
FULL = {"kind": "attention", "heads": {"query": 2}}
DEEP = {"kind": "deep", "heads": {"value": 1}, "net": {"kind": "mlp", "expand": 1}, "retention": "decay",
        "update": {"kind": "momentum", "chunk": 4, "clip": 1.0}, "features": "l2norm"}
LOCAL = {**DELTA, "local": "conv3"}


CORE = ("no gradient", "packed", "do not exist", "declared", "pieces", "read-only", "emitted")


def recipe(mixer, layers=1):
    return {"name": "composite", "model": {"width": 16, "mixers": {"m": mixer}, "stack": ["m"] * layers}}


def context(memory=DELTA, attention=WINDOW, **more):
    return {"kind": "context", "memory": memory, "attention": attention, "segment": 5, **more}


def router(*of, **more):
    return {"kind": "router", "of": list(of), **more}


def passes(mixer, **more):
    found = verify(recipe(mixer), **more)
    assert [(r.name, r.value, r.note) for r in found.results if r.passed is False] == []
    return found


def mixer_of(mixer, seed=0):
    return build(load(recipe(mixer)).model, seed).double().stack.layers[0].sublayers[0].mixer


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestRouter:
    @pytest.mark.parametrize("top", [None, 1])
    @pytest.mark.parametrize("writes", ["all", "chosen"])
    def test_it_keeps_the_contract(self, top, writes):
        passes(router(WINDOW, DELTA, MAMBA, top=top, writes=writes))

    def test_soft_weights_with_all_writing_are_a_gated_merge(self):
        soft, merged = mixer_of(router(DELTA, MAMBA)), mixer_of({"kind": "parallel", "merge": "gate",
                                                                "of": [DELTA, MAMBA]})
        merged.load_state_dict({k.replace("router.", "gate."): v for k, v in soft.state_dict().items()})
        x = random(2, 9, 16)
        assert (soft(x).y - merged(x).y).abs().max() < 1e-14

    def test_a_token_reaches_the_state_of_its_own_memory_only(self):
        made = mixer_of(router(DELTA, LINEAR, top=1, writes="chosen"))
        x = random(1, 40, 16)
        own = made.router(x)[0].argmax(-1)
        assert 0 < own.sum() < 40
        after = made(x).state
        for i, child in enumerate(made.of):
            assert state_error(child(x[:, own == i]).state, after[i]) < 1e-12

    def test_the_choice_is_hard_forwards_and_soft_backwards(self):
        made = mixer_of(router(DELTA, LINEAR, top=1))
        x = random(1, 12, 16)
        y = made(x).y
        children = torch.stack([child(x).y for child in made.of], -1)
        share = made.router(x).softmax(-1)
        chosen = share.argmax(-1)[..., None, None].expand(-1, -1, 16, 1)
        assert torch.equal(y, children.gather(-1, chosen)[..., 0])
        weight = random(1, 12, 16, seed=1)
        (found,) = torch.autograd.grad((y * weight).sum(), made.router.weight)
        soft = ((children.detach() * share[..., None, :]).sum(-1) * weight).sum()
        (expected,) = torch.autograd.grad(soft, made.router.weight)
        assert (found - expected).abs().max() < 1e-12

    def test_balance_is_least_when_all_are_equally_busy_and_counts_tokens_that_exist(self):
        even = torch.eye(4).repeat(3, 1)[None]  # quarters have no rounding
        assert imbalance(even, None) == 1
        one = torch.tensor([1.0, 0, 0, 0]).expand(1, 12, 4)
        assert imbalance(one, None) == 4
        valid = torch.arange(12)[None] < 4
        assert imbalance(torch.where(valid[..., None], even, one), valid) == 1
        assert imbalance(even, torch.zeros(1, 12, dtype=torch.bool)) == 0
        made = mixer_of(router(DELTA, LINEAR, balance=0.5))
        (loss,) = made(random(2, 9, 16)).losses.values()
        loss.backward()
        assert made.router.weight.grad.abs().max() > 0
        assert not mixer_of(router(DELTA, LINEAR))(random(2, 9, 16)).losses

    def test_losses_of_routers_inside_are_named_by_where_they_stand(self):
        inner = router(DELTA, LINEAR, balance=0.1)
        out = mixer_of({"kind": "chain", "of": [DELTA, context(inner, inner)]})(random(1, 13, 16))
        assert set(out.losses) == {"of.1.attention.router", "of.1.memory.router"}


class TestContext:
    @pytest.mark.parametrize("memory", [DELTA, MAMBA, WINDOW], ids=lambda c: c["kind"])
    def test_any_memory_that_can_be_read_without_writing(self, memory):
        passes(context(memory), only=CORE)

    @pytest.mark.parametrize("attention", [LOCAL, {**WINDOW, "window": 3, "persistent": 2}],
                             ids=["matrix", "short window"])
    def test_any_attention(self, attention):
        passes(context(attention=attention), only=CORE)

    @pytest.mark.parametrize(("memory", "attention"), [("stream", "segment"), ("segment", "stream")])
    def test_children_that_forget_at_other_boundaries(self, memory, attention):
        passes(context({**DELTA, "forget_at": memory}, {**LINEAR, "forget_at": attention}),
               only=["packed", "boundary", "finished", "pieces"])

    def test_what_is_read_is_frozen_within_a_segment_and_new_in_the_next(self):
        made = mixer_of(context())
        x = random(1, 12, 16)
        first, fifth, sixth = (made(x[:, :n]).state for n in (1, 4, 5))
        assert state_error(first.start, made.initial(1).start) == 0
        assert state_error(fifth.start, first.start) == 0
        assert state_error(fifth.running, first.running) > 1e-2
        assert state_error(sixth.start, sixth.running) == 0
        assert [s.taken.tolist() for s in (first, fifth, sixth)] == [[1], [4], [0]]
        assert state_error(sixth.attention, made.attention.initial(1)) == 0

    def test_attention_sees_its_own_segment_only(self):
        made = mixer_of(context(memory={**DELTA, "forget_at": "document"}))
        made.memory.out.weight.data.zero_()  # nothing is carried over by the memory
        x = random(1, 12, 16)
        assert (made(x).y[:, 10:] - made(x[:, 10:]).y).abs().max() < 1e-14

    def test_rows_at_different_places_of_their_segments(self):
        made = mixer_of(context(DEEP))
        x = random(3, 11, 16)
        with torch.no_grad():
            begun = [made(random(1, n, 16, seed=n)).state for n in (1, 4, 7)]
            out = made(x, states.concat(begun))
            for i, state in enumerate(begun):
                alone = made(x[i : i + 1], state)
                assert (out.y[i] - alone.y[0]).abs().max() < 1e-12
                assert state_error(states.select(out.state, [i]), alone.state) < 1e-12
        assert out.state.taken.tolist() == [2, 0, 3]

    def test_a_document_begins_a_segment(self):
        made = mixer_of(context(DEEP))
        x, boundary = random(1, 12, 16), torch.zeros(1, 12, dtype=torch.int8)
        boundary[0, 7] = DOCUMENT
        out = made(x, None, Context(boundary=boundary))
        assert (out.y[:, 7:] - made(x[:, 7:]).y).abs().max() < 1e-12
        assert out.state.taken.tolist() == [0]

    def test_a_token_that_only_reads_takes_no_place(self):
        made = mixer_of(context())
        x, gate = random(1, 12, 16), torch.ones(1, 12, dtype=torch.float64)
        gate[0, [2, 3, 8]] = 0
        out = made(x, None, Context(tick=gate, write=gate))
        kept = made(x[:, gate[0] > 0])
        assert (out.y[:, gate[0] > 0] - kept.y).abs().max() < 1e-12
        assert out.state.taken.tolist() == kept.state.taken.tolist() == [4]
        assert out.y[:, 2].abs().max() > 1e-3

    @settings(derandomize=True, deadline=None, max_examples=15, database=None)
    @given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 7), st.integers(0, 1 << 16))
    def test_any_split_with_documents_padding_and_gates(self, sizes, segment, seed):
        draw, length = torch.Generator().manual_seed(seed), sum(sizes)
        made = mixer_of(context(segment=segment), seed=seed % 3)
        x = torch.randn(2, length, 16, generator=draw, dtype=torch.float64)
        valid, write = (torch.rand(2, length, generator=draw) > 0.25 for _ in range(2))
        ctx = Context(valid=valid, write=write.double(), tick=write.double(),
                      boundary=(torch.rand(2, length, generator=draw) < 0.15).to(torch.int8) * DOCUMENT)
        with torch.no_grad():
            whole, state, ys, at = made(x, None, ctx), None, [], 0
            for n in sizes:
                out = made(x[:, at : at + n], state, ctx.narrow(at, at + n, length))
                state, at = out.state, at + n
                ys.append(out.y)
        assert (torch.cat(ys, 1) - whole.y).abs().max() < 1e-11
        assert state_error(state, whole.state) < 1e-11


class TestReadingAlone:
    @pytest.mark.parametrize("visible", ["token", "chunk"])
    def test_a_deep_memory_that_is_only_read_gives_what_token_by_token_gives(self, visible):
        made = mixer_of({**DEEP, "update": {**DEEP["update"], "visible": visible}})
        x, nothing = random(2, 7, 16), torch.zeros(2, 7)
        valid = torch.ones(2, 7, dtype=torch.bool)
        valid[0, 3] = False
        state = made(random(2, 6, 16, seed=1)).state
        ctx = Context(tick=nothing, write=nothing, valid=valid)
        out = made(x, state, ctx)
        with use(backend="reference"):
            expected = made(x, state, ctx)
        assert (out.y - expected.y).abs().max() < 1e-13
        assert state_error(out.state, state) == 0
        assert not out.y[0, 3].any()


class TestNesting:
    CASES = {
        "router in parallel in chain": {"kind": "chain", "of": [
            {"kind": "parallel", "merge": "product", "of": [router(DELTA, WINDOW, top=1, writes="chosen"), MAMBA]},
            LOCAL]},
        "context in router": router(context(), DELTA, writes="chosen"),
        "context of a chain and a parallel": context({"kind": "chain", "of": [DELTA, FF]}, {
            "kind": "parallel", "merge": "mean-norm", "of": [WINDOW, LINEAR]}),
        "context in a context": context(context(segment=3)),
    }

    @pytest.mark.parametrize("name", CASES)
    def test_it_keeps_the_contract(self, name):
        passes(self.CASES[name], only=CORE)

    def test_product_gates_the_first_by_the_others(self):
        made = mixer_of({"kind": "parallel", "merge": "product", "of": [FF, FF, FF]})
        x = random(2, 5, 16)
        ys = [child(x).y for child in made.of]
        unit = [y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() for y in ys]
        assert (made(x).y - unit[0] * unit[1].sigmoid() * unit[2].sigmoid()).abs().max() < 1e-12
        passes({"kind": "parallel", "merge": "product", "of": [WINDOW, LOCAL]}, only=CORE)


LEAVES = st.sampled_from([DELTA, LINEAR, MAMBA, WINDOW, FF, DEEP])


def grown(children):
    pair = st.lists(children, min_size=2, max_size=2)
    return st.one_of(
        st.builds(lambda of: {"kind": "chain", "of": of}, pair),
        st.builds(lambda of, merge: {"kind": "parallel", "merge": merge, "of": of}, pair,
                  st.sampled_from(["sum", "mean-norm", "gate", "concat", "product"])),
        st.builds(lambda of, top, writes: router(*of, top=top, writes=writes), pair, st.sampled_from([None, 1]),
                  st.sampled_from(["all", "chosen"])),
        st.builds(lambda of, n: context({"kind": "chain", "of": [of[0], DELTA]}, of[1], segment=n), pair,
                  st.integers(2, 6)),
    )


@settings(derandomize=True, deadline=None, max_examples=20, database=None)
@given(st.recursive(LEAVES, grown, max_leaves=3), st.integers(1, 15), st.integers(0, 99))
def test_random_nestings_split_pack_pad_and_are_counted_right(mixer, cut, seed):
    made = load(recipe(copy.deepcopy(mixer)))
    model = build(made.model, seed).double()
    assert sum(p.numel() for p in model.parameters()) == made.cost().params
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 16, 16, generator=draw, dtype=torch.float64)
    ctx = Context(valid=torch.rand(2, 16, generator=draw) > 0.2,
                  boundary=(torch.rand(2, 16, generator=draw) < 0.1).to(torch.int8) * DOCUMENT)
    with torch.no_grad():
        start = model.run(torch.randn(2, 3, 16, generator=draw, dtype=torch.float64))[1]
        whole, after = model.run(x, start, ctx)
        one, middle = model.run(x[:, :cut], start, ctx.narrow(0, cut, 16))
        two, end = model.run(x[:, cut:], middle, ctx.narrow(cut, 16, 16))
        assert (torch.cat([one.y, two.y], 1) - whole.y).abs().max() < 1e-10
        assert state_error(end, after) < 1e-10
        with use(backend="reference"):
            slow, slow_after = model.run(x, start, ctx)
        assert (slow.y - whole.y).abs().max() < 1e-10
        assert state_error(slow_after, after) < 1e-10
        row = LMState(states.select(start.stack, [1]), start.next[1:])
        alone = model.run(x[1:], row, Context(valid=ctx.valid[1:], boundary=ctx.boundary[1:]))[0]
        assert (alone.y - whole.y[1:]).abs().max() < 1e-10


@pytest.mark.parametrize(("mixer", "text"), [
    (router(DELTA), "at least 2|too_short|least"),
    (router(DELTA, LOCAL, writes="chosen"), r"of\.1 \('matrix'\) mixes neighbouring tokens .*set local: none there, or "
                                            "writes: all"),
    (router(DELTA, FULL, writes="chosen"), "growing list of of.1.*give it a window, or set writes: all"),
    (router(DELTA, MAMBA, top=2), "top"),
    (context(LOCAL), "memory 'matrix' mixes neighbouring tokens .*set local: none in it"),
    (context(FF), "memory 'swiglu' keeps nothing; give a memory, e.g. kind: deep or matrix"),
    (context(FULL), "memory 'attention' keeps a list that grows; give it a window"),
    (context(attention=FULL, segment=9), "attention 'attention' keeps a list that grows; give it a window .*18 for a"),
    (context(segment=0), "segment"),
    ({"kind": "parallel", "of": [context(LOCAL)]}, "mixes neighbouring tokens"),
])
def test_what_cannot_be_is_refused_with_a_remedy(mixer, text):
    with pytest.raises(DesignError, match=text):
        load(recipe(mixer))


def test_a_context_over_joined_inputs_is_refused():
    data = recipe(context())
    data["model"]["layers"] = {"l": [{"use": "m", "input": ["x", "embedding"]}]}
    data["model"]["stack"] = ["l"]
    with pytest.raises(DesignError, match=r"reads x \(32 channels\).*leave `input` at \[x\]"):
        load(data)


SWAPS = {
    "matrix": "{kind: matrix, parameterisation: rwkv7, heads: {value: 4, dim_key: 8, dim_value: 8}, local: shift, "
              "read: group-norm-bonus-gate}",
    "vector": "{kind: vector, parameterisation: rglru, dim_inner: 32, local: conv4}",
    "window": "{kind: attention, heads: {query: 4}}",
    "deep": "{kind: filter, covariance: full, heads: {value: 2, dim_key: 8, dim_value: 16}, local: conv4}",
}


@pytest.mark.parametrize("place", SWAPS)
def test_one_override_swaps_one_of_the_four_learners_and_the_result_verifies(place):
    before = load("four-learners", width=32, layers=4)
    swapped = load("four-learners", width=32, layers=4, overrides=[f"model.mixers.{place}={SWAPS[place]}"])
    changed = [name for name in before.model.mixers if before.model.mixers[name] != swapped.model.mixers[name]]
    assert changed == [place]
    assert swapped.id != before.id
    found = verify(swapped, only=["pieces", "packed", "do not exist", "declared", "no gradient"])
    assert [(r.name, r.note) for r in found.results if r.passed is False] == []
    assert len(found.results) >= 7
