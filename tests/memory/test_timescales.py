"""Memories on slower clocks, in all arrangements, against loops that write one summary after another."""

import pytest
import torch

from postformer.contract.context import DOCUMENT, FED, SEGMENT, STREAM, Context
from postformer.contract.mixer import Mixer
from postformer.design import DesignError, load
from postformer.model import build
from postformer.sampling.stepper import Stepper
from postformer.verify import verify

DELTA = {"kind": "matrix", "loss": "l2", "features": ["silu", "l2norm"], "heads": {"value": 2},
         "retention": {"per": "head", "gate": "mamba"}}
LOCAL = {**DELTA, "local": "conv3"}
STEPS = {**DELTA, "update": {"kind": "gradient", "rate": "double-sigmoid", "steps": 2}}
FORGETS = {**DELTA, "forget_at": "segment"}
KEEPS = {**DELTA, "forget_at": "stream"}
MAMBA = {"kind": "vector", "dim_inner": 16, "dim_state": 4}
FILTER = {"kind": "filter", "heads": {"value": 2, "dim_key": 8}, "retention": {"per": "head", "gate": "mamba"}}
DEEP = {"kind": "deep", "heads": {"value": 1}, "net": {"kind": "mlp", "expand": 1}, "retention": "decay",
        "update": {"kind": "momentum", "chunk": 4, "clip": 1.0}, "features": "l2norm"}
LEARNED = {"boundary": "learned", "target": 4}


def recipe(mixer, layers=1):
    return {"name": "composite", "model": {"width": 16, "mixers": {"m": mixer}, "stack": ["m"] * layers}}


def slow(of=DELTA, every=3, **more):
    return {"kind": "slow", "of": of, "every": every, **more}


def scales(*levels, **more):
    return {"kind": "timescales", "levels": list(levels), **more}


def mixer_of(design, seed=0):
    made = build(load(recipe(design)).model, seed).double().stack.layers[0].sublayers[0].mixer
    assert isinstance(made, Mixer)
    return made


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_segments(made, x, ends, weigh=None, document=None):
    """y [T, D] of one sequence x [T, D]: a loop that writes a segment's mean before the first token after it, and reads
    each token without writing. ends: after which tokens a segment ends; document: where everything is forgotten."""
    state, held, ys, over = made.of.initial(1), [], [], False
    for t, token in enumerate(x):
        if t == document:
            state, held, over = made.of.initial(1), [], False
        if over and held:
            weight = torch.stack([weigh(u) if weigh else u.new_ones(()) for u in held])
            s = (torch.stack(held) * weight[:, None]).sum(0) / weight.sum()
            token_as = s if not made.apart else token
            shared = {f"{FED}key": s[None, None], f"{FED}value": s[None, None]} if made.apart else {}
            out = made.of(token_as[None, None], state, Context(shared=shared))
            state, held = out.state, []
            ys.append(out.y[0, 0])
        else:
            none = torch.zeros(1, 1, dtype=x.dtype)
            ys.append(made.of(token[None, None], state, Context(tick=none, write=none)).y[0, 0])
        held.append(token)
        over = t in ends
    return torch.stack(ys)


class TestSlow:
    @pytest.mark.parametrize(("of", "every", "summary"), [
        (DELTA, 3, "mean"), (MAMBA, 4, "weighted"), (DEEP, 3, "mean"), (STEPS, LEARNED, "weighted"),
        (FILTER, {"after": [7, 9]}, "mean"), (KEEPS, "document", "mean"), (DELTA, "word", "weighted"),
        (DELTA, "segment", "mean"),
    ])
    def test_it_keeps_the_contract(self, of, every, summary):
        found = verify(recipe(slow(of, every, summary=summary)))
        assert [(r.name, r.value, r.note) for r in found.results if r.passed is False] == []

    @pytest.mark.parametrize("of", [DELTA, MAMBA, STEPS, FILTER])
    @pytest.mark.parametrize("summary", ["mean", "weighted"])
    def test_every_few_tokens_is_a_loop_over_segments(self, of, summary):
        made, x = mixer_of(slow(of, 4, summary=summary)), random(1, 18, 16)
        weigh = None if summary == "mean" else lambda u: torch.sigmoid(made.score(u)[0])
        expected = by_segments(made, x[0], {3, 7, 11, 15}, weigh)
        assert (made(x).y[0] - expected).abs().max() < 1e-12
        assert (expected[4] - expected[3]).abs().max() > 1e-3  # something is remembered from the first segment on

    def test_a_document_begins_anew_and_its_segments_are_counted_from_its_start(self):
        made, x = mixer_of(slow(DELTA, 4)), random(1, 18, 16)
        boundary = torch.zeros(1, 18, dtype=torch.int8)
        boundary[0, 6] = DOCUMENT
        expected = by_segments(made, x[0], {3, 9, 13}, document=6)
        assert (made(x, None, Context(boundary=boundary)).y[0] - expected).abs().max() < 1e-12

    def test_ends_are_after_the_tokens_that_are_named(self):
        made, x = mixer_of(slow(DELTA, {"after": [5]})), random(1, 12, 16)
        tokens = torch.tensor([[5, 1, 1, 5, 5, 2, 3, 5, 0, 0, 0, 5]])
        expected = by_segments(made, x[0], {0, 3, 4, 7, 11})
        assert (made(x, None, Context(shared={"tokens": tokens})).y[0] - expected).abs().max() < 1e-12
        with pytest.raises(ValueError, match=r"put them into ctx.shared as 'tokens'"):
            made(x)

    def test_words_and_sentences_of_text_end_where_they_do(self):
        text = b"One two.\nA!"
        for every, ends in (("word", {3, 8}), ("sentence", {7, 8, 10}), ("line", {8})):
            made, x = mixer_of(slow(DELTA, every)), random(1, len(text), 16)
            expected = by_segments(made, x[0], ends)
            found = made(x, None, Context(shared={"tokens": torch.tensor([list(text)])})).y[0]
            assert (found - expected).abs().max() < 1e-12

    def test_documents_are_told_to_a_memory_that_keeps_them_and_only_when_they_are_over(self):
        made, x = mixer_of(slow(KEEPS, "document")), random(1, 12, 16)
        boundary = torch.zeros(1, 12, dtype=torch.int8)
        boundary[0, 4] = boundary[0, 9] = DOCUMENT
        y = made(x, None, Context(boundary=boundary)).y[0]
        assert (y - by_segments(made, x[0], {3, 8})).abs().max() < 1e-12
        assert not y[:4].any()
        boundary[0, 9] = STREAM
        y = made(x, None, Context(boundary=boundary)).y[0]
        assert not y[9:].any()

    def test_a_learned_end_that_is_certain_is_an_end(self):
        made, x = mixer_of(slow(DELTA, LEARNED)), random(1, 12, 16)
        with torch.no_grad():
            made.ends.score.weight.copy_(300 * random(1, 16, seed=3))
        over = torch.sigmoid(made.ends.score(x))[0, :, 0]
        sure = over.round()
        assert (over - sure).abs().max() < 1e-12
        assert 2 < sure.sum() < 10
        expected = by_segments(made, x[0], set(torch.nonzero(sure)[:, 0].tolist()))
        assert (made(x).y[0] - expected).abs().max() < 1e-11

    def test_the_rate_of_learned_ends_is_learned(self):
        made, x = mixer_of(slow(DELTA, LEARNED)), random(4, 64, 16)
        best = torch.optim.Adam(made.ends.parameters(), lr=0.05)
        with torch.no_grad():
            made.ends.score.bias.fill_(2.0)
        first = made(x).losses["rate"].item()
        for _ in range(600):
            best.zero_grad()
            made(x).losses["rate"].backward()
            best.step()
        share = torch.sigmoid(made.ends.score(x)).mean().item()
        assert first > 0.1
        assert abs(share - 0.25) < 0.01

    def test_a_token_that_is_read_only_leaves_an_end_before_it_for_the_next(self):
        made, x = mixer_of(slow(DELTA, 3)), random(1, 9, 16)
        write = torch.ones(1, 9, dtype=torch.float64)
        write[0, 3] = write[0, 4] = 0
        found = made(x, None, Context(tick=write, write=write))
        keep = write[0] > 0
        expected = made(x[:, keep])
        assert (found.y[:, keep] - expected.y).abs().max() < 1e-12
        assert found.y[0, 3].abs().max() == 0  # nothing was written yet
        assert torch.equal(found.state.ends.count, expected.state.ends.count)

    @pytest.mark.parametrize(("design", "words"), [
        (slow(LOCAL), "set local: none"), (slow(every=1), "no slower clock"),
        (slow({"kind": "attention", "window": 4, "heads": {"query": 2}}), "constant size"),
        (slow({"kind": "swiglu"}), "keeps nothing"),
        (slow(every={"after": []}), "at least 1"), (slow(every="words"), "Did you mean 'word'"),
    ])
    def test_what_cannot_be_is_refused_with_a_remedy(self, design, words):
        with pytest.raises(DesignError, match=words):
            load(recipe(design))


class TestTimescales:
    @pytest.mark.parametrize("design", [
        scales({"of": LOCAL}, {"of": DELTA, "every": 3}, {"of": MAMBA, "every": 6}),
        scales({"of": DELTA}, {"of": MAMBA}, merge="sum"),
        scales({"of": FILTER}, {"of": DELTA, "every": 3, "summary": "doubt"}, doubt=True),
        scales({"of": LOCAL}, {"of": DELTA, "every": 3}, {"of": DELTA, "every": LEARNED}, arrangement="chain"),
        scales({"of": {**LOCAL, "forget_at": "segment"}}, {"of": DELTA, "every": 5}, arrangement="nested"),
        scales({"of": FORGETS}, {"of": FORGETS, "every": 3}, {"of": KEEPS, "every": "document"}, arrangement="nested"),
    ])
    def test_it_keeps_the_contract(self, design):
        found = verify(recipe(design))
        assert [(r.name, r.value, r.note) for r in found.results if r.passed is False] == []

    def test_parallel_levels_are_weighed_and_summed(self):
        made, x = mixer_of(scales({"of": DELTA}, {"of": MAMBA, "every": 4})), random(2, 13, 16)
        fast, late = (level(x).y for level in made.levels)
        a = 2 * made.gate(x).softmax(-1)
        assert (made(x).y - (a[..., :1] * fast + a[..., 1:] * late)).abs().max() < 1e-13
        summed = mixer_of(scales({"of": DELTA}, {"of": MAMBA, "every": 4}, merge="sum"))
        assert (summed(x).y - sum(level(x).y for level in summed.levels)).abs().max() < 1e-13

    def test_in_a_chain_slow_reads_what_fast_gives(self):
        made, x = mixer_of(scales({"of": DELTA}, {"of": MAMBA, "every": 4}, {"of": DELTA, "every": 6},
                                  arrangement="chain")), random(2, 13, 16)
        h = made.levels[0](x).y
        for level in made.levels[1:]:
            h = h + level(h).y
        assert (made(x).y - h).abs().max() < 1e-13

    def test_nested_fast_starts_afresh_at_each_slow_segment_and_sees_what_slow_knows(self):
        made, x = mixer_of(scales({"of": FORGETS}, {"of": DELTA, "every": 5}, arrangement="nested")), random(2, 13, 16)
        late = made.levels[1](x).y
        told = x + made.condition[0](late)
        fast = torch.cat([made.levels[0](told[:, a : a + 5]).y for a in (0, 5, 10)], 1)
        assert (made(x).y - late - fast).abs().max() < 1e-12

    def test_doubt_shifts_the_weights_by_the_log_of_the_variance(self):
        made, x = mixer_of(scales({"of": FILTER}, {"of": DELTA, "every": 4}, doubt=True)), random(2, 13, 16)
        plain = made(x).y
        with torch.no_grad():
            made.doubt.copy_(torch.tensor([-2.0, 1.0]))
        fast, late = made.levels[0](x), made.levels[1](x).y
        log = (fast.published["variance"].mean(-1, keepdim=True) + 1e-6).log()
        a = 2 * (made.gate(x) + log * torch.tensor([-2.0, 1.0])).softmax(-1)
        expected = a[..., :1] * fast.y + a[..., 1:] * late
        assert (made(x).y - expected).abs().max() < 1e-13
        assert (plain - expected).abs().max() > 1e-2

    def test_doubt_weighs_the_tokens_of_a_summary(self):
        made = mixer_of(scales({"of": FILTER}, {"of": DELTA, "every": 4, "summary": "doubt"}, merge="sum"))
        x, level = random(1, 13, 16), made.levels[1]
        fast = made.levels[0](x)
        log = (fast.published["variance"].mean(-1) + 1e-6).log()[0]
        weights = iter(torch.sigmoid(level.score(x[0])[:, 0] + level.doubt * log).tolist() * 2)
        by_token = {tuple(u.tolist()): torch.tensor(next(weights), dtype=torch.float64) for u in x[0]}
        late = by_segments(level, x[0], {3, 7, 11}, lambda u: by_token[tuple(u.tolist())])
        assert (made(x).y[0] - fast.y[0] - late).abs().max() < 1e-12

    def test_the_variance_of_the_first_level_can_be_published(self):
        design = recipe(scales({"of": FILTER}, {"of": DELTA, "every": 4}))
        design["model"]["layers"] = {"l": [{"use": "m", "publish": {"doubt": "variance"}}]}
        design["model"]["stack"] = ["l"]
        model = build(load(design).model)
        found = model(torch.arange(10)[None]).published["doubt"]
        assert found.shape == (1, 10, 2)
        assert (found > 0).all()

    @pytest.mark.parametrize(("design", "words"), [
        (scales({"of": DELTA, "every": 2}, {"of": DELTA}), "first level sees every token"),
        (scales({"of": DELTA}, {"of": DELTA, "every": 2}, doubt=True), "use kind: filter"),
        (scales({"of": FILTER}, {"of": DELTA, "every": 2}, doubt=True, merge="sum"), "merge: gate"),
        (scales({"of": DELTA}, {"of": DELTA, "every": 2}, arrangement="nested"), "forget_at: segment"),
        (scales({"of": FORGETS}, {"of": DELTA, "every": LEARNED}, arrangement="nested"), "learned ends"),
        (scales({"of": FORGETS}, {"of": DELTA}, arrangement="nested"), "an `every`"),
        (scales({"of": DELTA, "summary": "weighted"}), "set every"),
    ])
    def test_what_cannot_be_is_refused_with_a_remedy(self, design, words):
        with pytest.raises(DesignError, match=words):
            load(recipe(design))


def test_a_segment_boundary_of_the_data_ends_a_segment():
    made, x = mixer_of(slow(DELTA, "segment")), random(1, 12, 16)
    boundary = torch.zeros(1, 12, dtype=torch.int8)
    boundary[0, 4] = boundary[0, 9] = SEGMENT
    expected = by_segments(made, x[0], {3, 8})
    assert (made(x, None, Context(boundary=boundary)).y[0] - expected).abs().max() < 1e-12


@pytest.mark.parametrize("design", [
    scales({"of": FILTER}, {"of": DELTA, "every": 5, "summary": "doubt"}, doubt=True),
    scales({"of": LOCAL}, {"of": DELTA, "every": 5}, arrangement="chain"),
    scales({"of": FORGETS}, {"of": DELTA, "every": 5}, arrangement="nested"),
    slow(DELTA, {"after": [3, 5, 8]}), slow(DELTA, LEARNED),
    {"kind": "consolidated", "of": LOCAL},
])
def test_generating_by_recorded_steps_is_a_whole_pass(design):
    raw = recipe(design, layers=2)
    raw["model"]["vocab"] = 70
    tokens = torch.randint(0, 70, (3, 60), generator=torch.Generator().manual_seed(1))
    for seed in range(4):
        model = build(load(raw).model, seed).eval()
        with torch.inference_mode():
            whole = model(tokens).logits
            stepper = Stepper(model, model(tokens[:, :1]).state)
            for t in range(1, 60):
                assert (stepper.step(tokens[:, t]) - whole[:, t]).abs().max() < 1e-3 * whole.abs().max(), (seed, t)
        assert stepper.tape is not None, stepper.reason


def test_a_soft_token_starts_the_fast_memory_afresh_once_per_segment():
    made, x = mixer_of(scales({"of": FORGETS}, {"of": DELTA, "every": 5}, arrangement="nested")), random(1, 23, 16)
    seen = []
    made.levels[0].register_forward_hook(lambda _, args, __: seen.append(args[2].boundary))
    nearly = torch.full((1, 23), 1 - 1e-9, dtype=torch.float64)
    y = made(x, None, Context(tick=nearly, write=nearly)).y
    assert (y - made(x).y).abs().max() < 1e-6
    assert seen[0][0].nonzero().flatten().tolist() == [5, 10, 15, 20]
    made(x, None, Context(tick=nearly - 0.5, write=nearly - 0.5))
    assert seen[2][0].nonzero().flatten().tolist() == [5, 10, 15, 20]


def test_what_would_never_be_written_is_refused():
    for design in (slow(DELTA, "document"), slow(FORGETS, "segment"), slow(scales({"of": DELTA}), "document")):
        with pytest.raises(DesignError, match="would never be written"):
            load(recipe(design))
    load(recipe(slow({"kind": "consolidated", "of": DELTA}, "document")))
    for design in (slow(summary="doubt"), scales({"of": DELTA}, {"of": slow(summary="doubt")})):
        with pytest.raises(DesignError, match="fed by what stands around"):
            load(recipe(design))
