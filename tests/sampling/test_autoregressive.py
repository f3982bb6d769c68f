import pytest
import torch
from fake import FakeModel

from postformer.sampling import Policy, generate, left_pad, stream

GREEDY = Policy(temperature=0)


@pytest.fixture
def model():
    torch.set_num_threads(1)
    made = FakeModel(vocab=12)
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(3)  # so that the most likely token varies
    made.eval()
    return made


def prompt(rows=3, length=5, seed=0):
    return torch.randint(0, 12, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_greedy_is_the_argmax_of_the_full_forward_pass(model):
    tokens, trace = generate(model, prompt(), GREEDY, 9)
    with torch.no_grad():
        logits = model(tokens).logits[:, 4:-1]
    assert torch.equal(tokens[:, 5:], logits.argmax(-1))
    assert len(set(tokens[:, 5:].flatten().tolist())) > 2
    wanted = logits.log_softmax(-1).gather(-1, tokens[:, 5:, None]).squeeze(-1)
    torch.testing.assert_close(trace.log_probability, wanted)
    assert trace.length.tolist() == [9, 9, 9]


def test_one_prefill_then_single_steps(model):
    model.calls.clear()
    generate(model, prompt(), GREEDY, 4)
    assert model.calls == [(3, 5), (3, 1), (3, 1), (3, 1)]


def test_left_padded_rows_equal_rows_alone(model):
    rows = [[1, 2, 3, 4, 5], [7], [8, 9, 10]]
    tokens, valid = left_pad(rows, pad=11)
    assert tokens[1].tolist() == [11, 11, 11, 11, 7]
    together, _ = generate(model, tokens, GREEDY, 8, valid=valid)
    for i, row in enumerate(rows):
        alone, _ = generate(model, torch.tensor([row]), GREEDY, 8)
        assert torch.equal(together[i, 5:], alone[0, len(row):])


def test_forced_tokens_are_inserted_and_seen(model):
    def interpose(tokens):
        return [1, 2, 3] if tokens.shape[1] == 6 else None

    tokens, trace = generate(model, prompt(), GREEDY, 7, interpose=interpose)
    assert (tokens[:, 6:9] == torch.tensor([1, 2, 3])).all()
    assert trace.forced.tolist() == [[False, True, True, True, False, False, False]] * 3
    with torch.no_grad():
        logits = model(tokens).logits
    free = ~trace.forced
    assert torch.equal(tokens[:, 5:][free], logits[:, 4:-1].argmax(-1)[free])
    wanted = logits[:, 4:-1].log_softmax(-1).gather(-1, tokens[:, 5:, None]).squeeze(-1)
    torch.testing.assert_close(trace.log_probability, wanted)


def test_rows_may_be_forced_differently(model):
    plain, _ = generate(model, prompt(), GREEDY, 1)
    tokens, trace = generate(model, prompt(), GREEDY, 1, interpose=lambda t: torch.tensor([[4], [-1], [6]]))
    assert tokens[:, 5].tolist() == [4, plain[1, 5].item(), 6]
    assert trace.forced[:, 0].tolist() == [True, False, True]
    with pytest.raises(ValueError, match="interpose returned"):
        generate(model, prompt(), GREEDY, 1, interpose=lambda t: torch.zeros(2, 1, dtype=torch.long))


def test_stopped_rows_are_idle(model):
    free, _ = generate(model, prompt(), GREEDY, 10)
    end = free[0, 6].item()
    tokens, trace = generate(model, prompt(), GREEDY, 10, stop=end)
    for row in range(3):
        continued = free[row, 5:].tolist()
        length = continued.index(end) + 1 if end in continued else 10
        assert trace.length[row] == length
        assert tokens[row, 5:5 + length].tolist() == continued[:length]
        assert not tokens[row, 5 + length:].any()
        assert not trace.log_probability[row, length:].any()
    both, _ = generate(model, prompt(), GREEDY, 10, stop=lambda t: torch.full((3,), t.shape[1] >= 7))
    assert both.shape == (3, 7)


def test_sampling_is_reproducible_and_follows_the_distribution(model):
    draws = [generate(model, prompt(), Policy(), 6, generator=torch.Generator().manual_seed(s)).tokens
             for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(20000, 4)
    generator = torch.Generator().manual_seed(0)

    def frequencies(policy):
        return torch.bincount(policy.draw(logits, generator), minlength=4) / 20000

    p = logits[0].softmax(0)
    torch.testing.assert_close(frequencies(Policy()), p, atol=0.015, rtol=0)
    torch.testing.assert_close(frequencies(Policy(2.0)), (logits[0] / 2).softmax(0), atol=0.015, rtol=0)
    torch.testing.assert_close(frequencies(Policy(top_k=2))[:2], logits[0, :2].softmax(0), atol=0.015, rtol=0)
    assert frequencies(Policy(top_k=2))[2:].tolist() == [0, 0]
    # 0.644 + 0.237 = 0.881: two tokens reach 0.8, three are needed for 0.9
    assert (frequencies(Policy(top_p=0.8)) > 0).tolist() == [True, True, False, False]
    assert (frequencies(Policy(top_p=0.9)) > 0).tolist() == [True, True, True, False]
    assert (frequencies(Policy(top_p=0.01)) > 0).tolist() == [True, False, False, False]


def test_stream_gives_the_same_and_can_be_left_early(model):
    model.train()
    wanted, _ = generate(model, prompt(), GREEDY, 5)
    pieces = stream(model, prompt(), GREEDY, 5)
    assert torch.equal(next(pieces).token, wanted[:, 5])
    assert not torch.is_inference_mode_enabled()  # the mode does not leak to the reader of the stream
    pieces.close()
    assert model.training
    assert [p.token.tolist() for p in stream(model, prompt(), GREEDY, 5)] == wanted[:, 5:].T.tolist()


def test_what_was_generated_can_be_trained_on(model):
    tokens, trace = generate(model, prompt(), GREEDY, 3)
    logits = model(tokens[:, :-1]).logits
    (logits.gather(-1, tokens[:, 1:, None]).squeeze(-1)[:, -3:] * trace.log_probability).sum().backward()
    assert model.inner.weight.grad.abs().sum() > 0


def test_no_new_tokens(model):
    tokens, trace = generate(model, prompt(), GREEDY, 0)
    assert torch.equal(tokens, prompt())
    assert trace.log_probability.shape == (3, 0)


@pytest.mark.parametrize("fields", [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0},
                                    {"top_p": 1.5}])
def test_impossible_policies(fields):
    with pytest.raises(ValueError, match="must be"):
        Policy(**fields)


def test_impossible_prompts(model):
    with pytest.raises(ValueError, match="length >= 1"):
        generate(model, torch.zeros(1, 0, dtype=torch.long), GREEDY, 1)
    with pytest.raises(ValueError, match="left"):
        generate(model, prompt(1, 2), GREEDY, 1, valid=torch.tensor([[True, False]]))
    with pytest.raises(ValueError, match="at least one token"):
        left_pad([[1], []])
