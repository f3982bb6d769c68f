"""Decoding with real recipes: the recorded step, prefixes forked and saved, rows that come and go, stop strings."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import postformer
from postformer import design
from postformer.contract import state as states
from postformer.kernels import native, use
from postformer.model import build
from postformer.sampling import Batch, Policy, Prefix, StopText, generate, prefill
from postformer.sampling.policy import seen_in
from postformer.sampling.stepper import Stepper
from postformer.study.entry import fitted

GREEDY = Policy(temperature=0)
SMALL = ["mamba", "mamba2", "gated-deltanet", "transformer", "sliding-window", "griffin", "rwkv7", "lstm", "ttt-mlp",
         "titans-lmm", "atlas", "memora"]
compiled = pytest.mark.skipif(native.native().library is None, reason="no C compiler")


@pytest.fixture(scope="module")
def models():
    torch.set_num_threads(1)
    made = {}

    def get(name):
        if name not in made:
            made[name] = build(fitted(name, 32, 2, ["model.vocab=40"]).model).eval()
        return made[name]
    return get


def prompt(rows=1, length=7, seed=0):
    return torch.randint(0, 40, (rows, length), generator=torch.Generator().manual_seed(seed))


@compiled
@pytest.mark.parametrize("name", design.names())
def test_every_recipes_step_is_recorded_and_is_the_models_step(models, name):
    model = models(name)
    with torch.inference_mode():
        state = model(prompt(2)).state
        plain = states.map_state(torch.clone, state)
        stepper = Stepper(model, states.map_state(torch.clone, state))
        for i in range(80 if name in SMALL else 24):  # in 80 tokens the room runs out once
            tokens = prompt(2, 1, seed=i)[:, 0]
            out = model(tokens[:, None], plain)
            plain = out.state
            torch.testing.assert_close(stepper.step(tokens), out.logits[:, -1], atol=2e-5, rtol=2e-4)
        assert stepper.tape is not None, stepper.reason


@compiled
def test_a_step_in_double_precision(models):
    model = postformer.load("gated-deltanet", ["model.vocab=40"], width=32, layers=2).build().double().eval()
    tokens, trace = generate(model, prompt(), GREEDY, 20)
    with torch.inference_mode():
        wanted = model(tokens).logits[:, 6:-1].log_softmax(-1).gather(-1, tokens[:, 7:, None]).squeeze(-1)
    torch.testing.assert_close(trace.log_probability, wanted.float(), atol=1e-6, rtol=1e-6)


def test_what_cannot_be_recorded_runs_as_it_is(models):
    skips = "model.layers={skip: [{use: memory, depth: {kind: mod, capacity: 0.5}}, {use: feedforward}]}"
    model = postformer.load("gated-deltanet", ["model.vocab=40", "model.mixers.memory.local=none", skips,
                                               "model.stack=[skip]"], width=32).build().eval()
    with torch.inference_mode():
        stepper = Stepper(model, model(prompt()).state)
        for i in range(6):
            stepper.step(prompt(1, 1, seed=i)[:, 0])
    assert stepper.tape is None
    assert stepper.reason


def test_the_reference_backend_is_not_replaced(models):
    with torch.inference_mode(), use(backend="reference"):
        stepper = Stepper(models("mamba"), models("mamba")(prompt()).state)
        for i in range(6):
            stepper.step(prompt(1, 1, seed=i)[:, 0])
    assert stepper.tape is None
    assert "reference" in stepper.reason


@compiled
def test_a_token_out_of_range_is_refused(models):
    with torch.inference_mode():
        stepper = Stepper(models("mamba"), models("mamba")(prompt()).state)
        for _ in range(6):
            stepper.step(torch.tensor([1]))
        with pytest.raises(IndexError, match="vocabulary"):
            stepper.step(torch.tensor([40]))


def test_parameters_changed_between_calls_are_seen(models):
    model = postformer.load("mamba", ["model.vocab=40"], width=32, layers=2).build(3).eval()
    generate(model, prompt(), GREEDY, 12)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.3)
    tokens, trace = generate(model, prompt(), GREEDY, 12)
    with torch.inference_mode():
        wanted = model(tokens).logits[:, 6:-1].log_softmax(-1).gather(-1, tokens[:, 7:, None]).squeeze(-1)
    torch.testing.assert_close(trace.log_probability, wanted, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("name", ["gated-deltanet", "transformer", "sliding-window"])
def test_going_on_from_a_file_gives_the_same_tokens(models, name, tmp_path):
    model = models(name)
    whole, _ = generate(model, prompt(2), GREEDY, 20)
    first, trace = generate(model, prompt(2), GREEDY, 9)
    trace.after.save(tmp_path / "prefix.safetensors")
    loaded = Prefix.load(tmp_path / "prefix.safetensors", model)
    assert torch.equal(loaded.tokens, first)
    for _ in range(2):  # going on leaves the prefix as it is
        assert torch.equal(generate(model, loaded, GREEDY, 11).tokens, whole)


def test_a_prefix_of_another_model_is_refused(models, tmp_path):
    prefill(models("mamba"), prompt()).save(tmp_path / "prefix")
    with pytest.raises(ValueError, match="another model"):
        Prefix.load(tmp_path / "prefix", models("transformer"))
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(ValueError, match="no saved prefix"):
        Prefix.load(tmp_path / "empty", models("mamba"))


def test_rows_that_stopped_go_on_where_they_stopped(models):
    model = models("transformer")
    free, _ = generate(model, prompt(3), GREEDY, 24)
    end = free[0, 10].item()
    stopped, trace = generate(model, prompt(3), GREEDY, 12, stop=end)
    row, length = trace.after.select([0]), trace.length[0].item()
    assert stopped[0, 7 + length - 1] == end
    assert torch.equal(generate(model, row, GREEDY, 4).tokens[0, -4:], free[0, 7 + length:11 + length])


def test_a_fork_draws_for_itself(models):
    model = models("mamba2")
    fork = prefill(model, prompt()).select([0] * 4)
    drawn = generate(model, fork, Policy(), 8, generator=torch.Generator().manual_seed(1)).tokens
    assert len({tuple(row) for row in drawn[:, 7:].tolist()}) == 4
    alone = generate(model, prompt(), GREEDY, 8).tokens
    assert torch.equal(generate(model, fork, GREEDY, 8).tokens, alone.expand(4, -1))


@pytest.mark.parametrize("name", ["gated-deltanet", "transformer", "sliding-window", "mamba", "deepseek-moe"])
def test_rows_of_a_batch_are_as_alone(models, name):
    model = models(name)
    asked = [(prompt(1, 3 + 5 * i, seed=i)[0], 4 + 7 * (i % 3)) for i in range(6)]
    batch, rows = Batch(model, places=3), []
    for ids, count in asked:
        rows += batch.submit(ids, GREEDY, count)
        batch.step()  # others are at work already
    batch.run()
    for (ids, count), row in zip(asked, rows):
        tokens, trace = generate(model, ids[None], GREEDY, count)
        assert row.tokens == tokens[0, len(ids):].tolist()
        torch.testing.assert_close(torch.tensor(row.log_probability), trace.log_probability[0], atol=1e-4, rtol=1e-4)
        assert row.ended == "length"
    assert not batch.busy


def test_requests_have_their_own_seed_policy_and_end(models):
    model = models("mamba")

    def drawn(others):
        batch = Batch(model, places=4, decode=lambda ids: bytes(ids))
        rows = batch.submit(prompt()[0], Policy(0.9, min_p=0.01), 9, seed=5, copies=2)
        for i in range(others):
            batch.submit(prompt(seed=i)[0], GREEDY, 3 + i)
        batch.run()
        return [row.tokens for row in rows]

    alone = drawn(0)
    assert alone == drawn(3)
    assert alone[0] != alone[1]
    batch = Batch(model, places=2, decode=lambda ids: bytes(ids))
    free = batch.submit(prompt()[0], GREEDY, 12)[0]
    batch.run()
    text = bytes(free.tokens[3:5])
    row = batch.submit(prompt()[0], GREEDY, 12, stop_text=[text])[0]
    stopped = batch.submit(prompt()[0], GREEDY, 12, stop=free.tokens[2])[0]
    cancelled = batch.submit(prompt()[0], GREEDY, 12)[0]
    batch.step()
    batch.cancel(cancelled)
    batch.run()
    assert bytes(row.tokens).endswith(text)
    assert bytes(row.tokens).count(text) == 1
    assert (row.ended, stopped.ended, cancelled.ended) == ("stop", "stop", "cancelled")
    assert stopped.tokens == free.tokens[:free.tokens.index(free.tokens[2]) + 1]


def test_impossible_requests(models):
    batch = Batch(models("mamba"))
    for arguments, words in (({"stop_text": ["x"]}, "decode"), ({"copies": 0}, "copies"), ({"prompt": []}, "length"),
                             ({"prompt": prefill(models("mamba"), prompt(2))}, "select")):
        arguments = {"prompt": [1], **arguments}
        with pytest.raises(ValueError, match=words):
            batch.submit(arguments.pop("prompt"), GREEDY, 3, **arguments)
    with pytest.raises(ValueError, match="places"):
        Batch(models("mamba"), 0)


def test_min_p_and_the_repetition_penalty():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    drawn = Policy(min_p=0.2).draw(logits.expand(4000, 4), torch.Generator().manual_seed(0))
    # relative to the first: 1, 0.37, 0.14, 0.05
    assert sorted(set(drawn.tolist())) == [0, 1]
    seen = seen_in(torch.tensor([[0, 3]]), torch.tensor([[True, True]]), 4)
    penal = Policy(0, repetition_penalty=4.0)
    assert penal.draw(logits, seen=seen).item() == 1
    assert penal.draw(torch.tensor([[-1.0, -2.0, -9.0, -3.0]]), seen=seen).item() == 1  # -1 became -4
    assert not seen_in(torch.tensor([[0, 3]]), torch.tensor([[False, True]]), 4)[0, 0]
    for fields in ({"min_p": 2}, {"repetition_penalty": 0}):
        with pytest.raises(ValueError, match="must be"):
            Policy(**fields)


def test_repeated_tokens_are_avoided(models):
    tokens, _ = generate(models("mamba"), prompt(), Policy(0, repetition_penalty=1e6), 15)
    new = tokens[0, 7:].tolist()
    assert len(set(new)) == 15
    assert not set(new) & set(prompt()[0].tolist())


@settings(max_examples=60, deadline=None)
@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
       st.lists(st.integers(1, 4), min_size=20, max_size=20))
def test_a_stop_string_is_found_however_the_text_is_cut(text, stops, sizes):
    raw, pieces = text.encode(), []
    while raw:
        size = sizes[len(pieces)]
        pieces.append(raw[:size])
        raw = raw[size:]
    ends = [text.index(s) + len(s) for s in stops if s in text]
    made = b"".join(StopText(stops).cut(pieces)).decode()
    if not ends:
        assert made == text
    else:
        assert text.startswith(made)
        assert not any(s in made for s in stops)
        assert len(made) in {text.index(s) for s in stops if s in text}


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="empty stop"):
        StopText([""])
