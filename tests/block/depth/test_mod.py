"""Mixture-of-Depths: a skipped token against its absence, against loops token by token, and what decides."""

import math

import pytest
import torch
import torch.nn.functional as F

from postformer.contract import state as states
from postformer.contract.context import DOCUMENT, Context
from postformer.design import load
from postformer.model import build
from postformer.verify.compare import state_error

T = 13
POSITION = torch.arange(T).expand(2, -1)


def rule(sub, x):
    """(score, chosen) of a sublayer that scores by itself, [B, T]."""
    score = x @ sub.depth.score.weight[0]
    return score, score > sub.depth.threshold


def test_everyone_chosen_is_the_plain_sublayer_times_the_score(made):
    x = made.tokens()
    for residual in ("add", "none"):
        sub = made.sublayer("pole", {"kind": "mod", "capacity": 1.0}, residual=residual)
        weight = torch.sigmoid(rule(sub, x)[0])[..., None]
        out, alone = sub(x, None, None, Context()), made.plain(sub, "pole")(x, None, None, Context())
        expected = x + weight * (alone.y - x) if residual == "none" else weight * alone.y
        assert (out.y - expected).abs().max() < 1e-14
        assert torch.equal(out.state.of, alone.state)
        assert out.measured["steps"] == out.measured["tokens"] == 2 * T


@pytest.mark.parametrize("name", ["conv", "attention", "window", "vector", "deep", "filter", "pole"])
@pytest.mark.parametrize("grad", [True, False])
def test_freezing_is_compaction_by_hand(made, name, grad):
    x = made.tokens()
    sub = made.sublayer(name, "mod")
    alone = made.plain(sub, name)
    score, chosen = rule(sub, x)
    assert 0 < chosen[0].sum() < T
    assert 0 < chosen[1].sum() != chosen[0].sum()
    with torch.set_grad_enabled(grad):
        out = sub(x, None, None, Context(position=POSITION))
    for i in range(2):
        keep = chosen[i]
        one = alone(x[i : i + 1, keep], None, None, Context(position=POSITION[i : i + 1, keep]))
        assert (out.y[i, keep] - torch.sigmoid(score[i, keep])[:, None] * one.y[0]).abs().max() < 1e-12
        assert not out.y[i, ~keep].any()
        assert state_error(states.select(out.state.of, [i]), one.state) < 1e-12
    if not grad:
        again, state = [], None
        for t in range(T):
            step = sub(x[:, t : t + 1], None, state, Context(position=POSITION[:, t : t + 1]))
            state = step.state
            again.append(step.y)
        assert (torch.cat(again, 1) - out.y).abs().max() < 1e-12
        assert state_error(state, out.state) < 1e-12


def test_a_document_that_starts_at_a_skipped_token_starts(made):
    x = made.tokens()
    for name in ("conv", "attention", "pole"):
        sub = made.sublayer(name, "mod")
        _, chosen = rule(sub, x)
        cut = [int((~chosen[i]).nonzero()[1]) for i in range(2)]
        boundary = torch.zeros(2, T, dtype=torch.int8)
        position = POSITION.clone()
        for i in range(2):
            boundary[i, cut[i]] = DOCUMENT
            position[i, cut[i] :] -= cut[i]
        out = sub(x, None, None, Context(position=position, boundary=boundary))
        for i in range(2):
            rest = x[i : i + 1, cut[i] :]
            one = sub(rest, None, None, Context(position=torch.arange(rest.shape[1])[None]))
            assert (out.y[i, cut[i] :] - one.y[0]).abs().max() < 1e-12
            assert state_error(states.select(out.state, [i]), one.state) < 1e-12
        # behind the last token that runs, and in a call in which none does
        sub.depth.threshold.fill_(1e9)
        with torch.no_grad():
            ended = sub(x, None, out.state, Context(position=position, boundary=boundary)).state
        assert state_error(ended.of, sub.inner.initial(2)) == 0
        sub.depth.threshold.zero_()


@pytest.mark.parametrize("skip", ["freeze", "clock", "write"])
def test_the_policies_by_a_loop_over_tokens(made, skip):
    x = made.tokens()
    sub = made.sublayer("pole", {"kind": "mod", "skip": skip})
    score, chosen = rule(sub, x)
    out, m = sub(x, None, None, Context(position=POSITION)), sub.mixer
    for i in range(2):
        h = torch.zeros(made.width).double()
        for t in range(T):
            u = sub.norm(x[i, t])
            if skip == "write" or chosen[i, t]:
                h = torch.sigmoid(m.a) * h + m.i.weight @ u
            elif skip == "clock":
                h = torch.sigmoid(m.a) * h
            y = m.out.weight @ (h * torch.sigmoid(m.q.weight @ u))
            expected = torch.sigmoid(score[i, t]) * y if chosen[i, t] else torch.zeros_like(y)
            assert (out.y[i, t] - expected).abs().max() < 1e-13
        assert ((out.state.of if skip == "freeze" else out.state)[i] - h).abs().max() < 1e-13


def test_a_mixer_without_state_gets_only_the_tokens_that_run(made):
    x, seen = made.tokens(), []
    sub = made.sublayer("ff", {"kind": "mod", "skip": "write"})
    score, chosen = rule(sub, x)
    sub.mixer.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape))
    valid = torch.arange(T) < torch.tensor([[T], [6]])
    with torch.no_grad():
        out = sub(torch.where(valid[..., None], x, 1e3), None, None, Context(valid=valid))
    ran = chosen & valid
    assert seen == [(1, int(ran.sum()), made.width)]
    every = made.plain(sub, "ff")(x, None, None, Context()).y
    expected = torch.where(ran[..., None], torch.sigmoid(score)[..., None] * every, 0)
    assert (out.y - expected).abs().max() < 1e-14
    assert out.measured["steps"] == ran.sum()
    assert out.measured["tokens"] == valid.sum()


def test_nobody_chosen_costs_nothing_and_keeps_every_gradient(made):
    x, calls = made.tokens(), []
    for name in ("attention", "ff"):
        sub = made.sublayer(name, "mod")
        sub.depth.threshold.fill_(1e9)
        sub.mixer.register_forward_pre_hook(lambda m, args: calls.append(args[0].shape))
        with torch.no_grad():
            out = sub(x, None, None, Context(position=POSITION))
        assert not calls
        assert not out.y.any()
        out = sub(x, None, None, Context(position=POSITION))
        out.y.sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in sub.mixer.parameters())
        calls.clear()


def test_routing_does_not_see_later_tokens(made):
    x = made.tokens()
    sub = made.sublayer("attention", "mod")
    with torch.no_grad():
        whole = sub(x, None, None, Context(position=POSITION)).published["depth"]
        assert torch.equal(whole, rule(sub, x)[1].double())
        for n in (1, 7):
            part = sub(x[:, :n], None, None, Context(position=POSITION[:, :n])).published["depth"]
            assert torch.equal(part, whole[:, :n])


@pytest.mark.parametrize(("capacity", "scale"), [(0.5, 1.0), (0.25, 1.0), (0.125, 300.0), (0.9, 0.01)])
def test_the_threshold_finds_its_capacity(made, capacity, scale):
    model = build(load(made.recipe("ff", {"kind": "mod", "capacity": capacity})).model)
    shares = []
    for step in range(80):
        x = scale * made.tokens(8, 64, step).float() + scale
        out = model.run(x)[0]
        shares.append(float(out.measured["0.0.steps"] / out.measured["0.0.tokens"]))
        model.after_step(out.measured)
    assert abs(sum(shares[-20:]) / 20 - capacity) < 0.02
    assert abs(shares[0] - capacity) > 0.02  # it had something to find


def test_a_step_of_the_threshold_by_hand(made):
    sub = made.sublayer("ff", {"kind": "mod", "capacity": 0.25, "rate": 0.5})
    score = torch.tensor([1.0, 2.0, 4.0, 7.0]).double()
    sub.depth.after_step({"steps": torch.tensor(3), "tokens": torch.tensor(4), "score": score.sum(),
                          "square": score.square().sum()})
    assert float(sub.depth.threshold) == pytest.approx(0.5 * float(score.std(correction=0)) * (0.75 - 0.25))


def test_top_is_the_papers_in_training_and_a_predictor_in_evaluation(made):
    x = made.tokens().requires_grad_()
    sub = made.sublayer("pole", {"kind": "mod", "choose": "top", "capacity": 0.3})
    valid = torch.arange(T) < torch.tensor([[T], [6]])
    score = x @ sub.depth.score.weight[0]
    chosen = torch.zeros(2, T, dtype=torch.bool)
    for i, n in enumerate((T, 6)):
        chosen[i, score[i, :n].topk(math.ceil(0.3 * n)).indices] = True
    out = sub(x, None, None, Context(valid=valid, position=POSITION))
    assert torch.equal(out.published["depth"] > 0, chosen)
    logit = x @ sub.depth.predictor.weight[0] + sub.depth.predictor.bias
    wrong = F.binary_cross_entropy(torch.sigmoid(logit[valid]), chosen[valid].double())
    assert float(out.losses["predictor"].detach()) == pytest.approx(float(wrong.detach()), abs=1e-13)
    assert out.measured["agreed"] == (((logit > 0) == chosen) & valid).sum()
    g, weight = torch.autograd.grad(out.losses["predictor"], [x, sub.depth.predictor.weight], allow_unused=True)
    assert g is None
    assert weight.abs().max() > 1e-4
    sub.eval()
    out = sub(x, None, None, Context(valid=valid, position=POSITION))
    assert torch.equal(out.published["depth"] > 0, (logit > 0) & valid)
    assert not out.losses


def test_a_publication_as_the_score(made):
    data = {"name": "d", "model": {"width": 16, "mixers": {"f": made.mixers["filter"], "ff": made.mixers["ff"]},
            "layers": {"l": [{"use": "f", "publish": {"doubt": "variance"}},
                             {"use": "ff", "depth": {"kind": "mod", "score": "doubt"}}]}, "stack": ["l"]}}
    sub = made.scrambled(build(load(data).model)).stack.layers[0].sublayers[1]
    doubt = torch.rand(2, T, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    doubt[0, 0] = 0
    score = sub.depth.slope * sum(torch.log(1e-6 + doubt[..., h]) for h in range(3)) / 3 + sub.depth.offset
    middle = score.detach().flatten().sort().values[T - 1 : T + 1].mean()  # between two: no score stands on it
    sub.depth.threshold.copy_(middle)
    x = made.tokens().requires_grad_()
    doubt.requires_grad_()
    out = sub(x, None, None, Context(shared={"doubt": doubt}))
    y = made.plain(sub, "ff")(x, None, None, Context()).y
    expected = torch.where((score > middle)[..., None], torch.sigmoid(score)[..., None] * y, 0)
    assert (out.y - expected).abs().max() < 1e-13
    (g,) = torch.autograd.grad(out.y.sum(), doubt)
    assert g.abs().max() > 1e-3
    flat = sub(x, None, None, Context(shared={"doubt": doubt[..., 0]})).y
    assert torch.isfinite(flat).all()
    with pytest.raises(ValueError, match=r"must be \[B, T\] or \[B, T, H\]"):
        sub(x, None, None, Context(shared={"doubt": doubt[:, 1:]}))


def test_skipped_tokens_save_flops(made):
    from torch.utils.flop_counter import FlopCounterMode

    x = made.tokens(2, 64)
    sub, count = made.sublayer("attention", "mod"), {}
    scores = rule(sub, x)[0].sort(1).values
    for kept in (64, 32, 16):
        sub.depth.threshold.copy_(scores[:, 64 - kept].min() - 1e-9)
        chosen = int(rule(sub, x)[1].sum())
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            sub(x, None, None, Context(position=torch.arange(64).expand(2, -1)))
        count[kept] = counter.get_total_flops(), chosen
    assert count[16][0] < count[32][0] < count[64][0]
