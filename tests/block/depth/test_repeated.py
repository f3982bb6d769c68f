"""Loops and continuous depth against loops over tokens and depths, written out; what is lost, measured, saved."""

import math
from dataclasses import replace

import pytest
import torch

from postformer.contract.context import Context
from postformer.kernels import use
from postformer.verify.compare import state_error

T = 11
POSITION = torch.arange(T).expand(2, -1)
CTX = Context(position=POSITION)


def pole(sub, u, h, write=1.0):
    """One token of the test's memory: u [D], h [D] -> (y, h)."""
    m = sub.mixer
    if write:
        h = torch.sigmoid(m.a) ** write * h + write * (m.i.weight @ u)
    return m.out.weight @ (h * torch.sigmoid(m.q.weight @ u)), h


def gate(sub, h):
    return sub.depth.gate.weight[0] @ h + sub.depth.gate.bias[0]


def spread(sub, factor=2.0):
    """Gates that differ from token to token, so that every depth occurs."""
    with torch.no_grad():
        sub.depth.gate.weight.mul_(factor)
        sub.depth.gate.bias.sub_(0.5)
    return sub


@pytest.mark.parametrize("name", ["attention", "pole", "ff"])
@pytest.mark.parametrize("residual", ["add", "none"])
def test_one_step_is_the_plain_sublayer(made, name, residual):
    x = made.tokens(2, T)
    for depth in ({"kind": "loop", "most": 1}, {"kind": "loop", "most": 1, "halt": "expected"},
                  {"kind": "loop", "most": 1, "state": "first"}, {"kind": "ode", "most": 1}):
        sub = made.sublayer(name, depth, residual=residual)
        out, alone = sub(x, None, None, CTX), made.plain(sub, name)(x, None, None, CTX)
        assert torch.equal(out.y, alone.y)
        if name != "ff":
            assert state_error(out.state.of[0], alone.state) == 0
        assert torch.equal(out.published["depth"], torch.ones(2, T).double())


@pytest.mark.parametrize("least", [0, 1])
@pytest.mark.parametrize("state", ["each", "first"])
@pytest.mark.parametrize("residual", ["add", "none"])
def test_hard_halting_by_loops(made, state, residual, least):
    """Token by token, depth by depth; the forward is the same with and without gradients, and one by one."""
    x = made.tokens(2, T)
    sub = spread(made.sublayer("pole", {"kind": "loop", "most": 4, "least": least, "state": state}, residual=residual))
    expected, depth = torch.zeros_like(x), torch.zeros(2, T).double()
    last = []
    for i in range(2):
        memories = [torch.zeros(made.width).double() for _ in range(4)]
        for t in range(T):
            h, rest = x[i, t], 1.0
            if not least:
                rest = float(1 - torch.sigmoid(gate(sub, h)).detach())
            if rest <= 0.5:  # it takes nothing, but is written
                expected[i, t] = h
                _, memories[0] = pole(sub, sub.norm(h), memories[0])
                continue
            for n in range(4):
                if state == "each" or n == 0:
                    f, memories[n] = pole(sub, sub.norm(h), memories[n])
                else:
                    f, _ = pole(sub, sub.norm(h), memories[0], write=0.0)
                h = h + f if residual == "add" else f
                rest = 0.0 if n == 3 else float((rest * (1 - torch.sigmoid(gate(sub, h)))).detach())
                if rest <= 0.5:
                    break
            expected[i, t], depth[i, t] = h, n + 1
        last.append(memories)
    assert len(depth.unique()) >= 3
    outs = [sub(x, None, None, CTX)]
    with torch.no_grad():
        outs.append(sub(x, None, None, CTX))
        with use(backend="reference"):
            outs.append(sub(x, None, None, CTX))
        steps, past = [], None
        for t in range(T):
            step = sub(x[:, t : t + 1], None, past, CTX.narrow(t, t + 1, T))
            past = step.state
            steps.append(step.y)
        outs.append(step._replace(y=torch.cat(steps, 1)))
    for out in outs:
        y = x + out.y if residual == "add" else out.y
        assert (y - expected).abs().max() < 1e-12
        for i in range(2):
            for n, memory in enumerate(out.state.of):
                assert (memory[i] - last[i][n]).abs().max() < 1e-12
    for out in outs[:3]:
        assert torch.equal(out.published["depth"].detach(), depth)
        assert out.measured["steps"] == depth.sum()
        assert out.measured["tokens"] == 2 * T
        assert float(out.losses["steps"].detach()) == pytest.approx(0.01 * float(depth.mean()))


def by_hand(sub, x, most):
    """(probabilities [most, B, T], h_n [most, B, T, D]) of a sublayer around a feed-forward."""
    h, rest, ps, hs = x, torch.ones(x.shape[:2]).double(), [], []
    for n in range(most):
        h = h + sub.mixer(sub.norm(h)).y
        halting = torch.sigmoid(h @ sub.depth.gate.weight[0] + sub.depth.gate.bias)
        ps.append(rest if n == most - 1 else rest * halting)
        rest = rest * (1 - halting)
        hs.append(h)
    return torch.stack(ps), torch.stack(hs)


def test_attention_is_looped_over_the_first_applications_keys_by_loops(made):
    """Whole and in pieces, with tokens that do not exist, with gradients (all run) and without (who halts does not)."""
    x = made.tokens(2, T)
    valid = torch.ones(2, T, dtype=torch.bool)
    valid[0, 4], valid[1, -2:] = False, False
    sub = spread(made.sublayer("list", {"kind": "loop", "most": 4, "state": "first"}, residual="none"))
    m = sub.mixer
    rows, depth = [], torch.zeros(2, T, dtype=torch.long)
    for i in range(2):
        keys, values, row = [], [], []
        for t in range(T):
            if not valid[i, t]:
                row.append(torch.zeros(made.width).double())
                continue
            keys.append(m.k.weight @ sub.norm(x[i, t]))
            values.append(m.v.weight @ sub.norm(x[i, t]))
            h, rest = x[i, t], 1.0
            for n in range(4):
                u = sub.norm(h)
                q = (m.q.weight @ u).view(2, 8)
                h = m.out.weight @ ((q @ torch.stack(keys).T / 8**0.5).softmax(-1) @ torch.stack(values)).flatten()
                rest = 0.0 if n == 3 else float((rest * (1 - torch.sigmoid(gate(sub, h)))).detach())
                if rest <= 0.5:
                    break
            row.append(h)
            depth[i, t] = n + 1
        rows.append(torch.stack(row))
    expected = torch.stack(rows)
    assert len(depth.unique()) >= 4
    whole = sub(x, None, None, CTX.replace(valid=valid))
    assert (whole.y - expected).abs().max() < 1e-12
    assert torch.equal(whole.published["depth"].long()[valid], depth[valid])
    with torch.no_grad():
        assert (sub(x, None, None, CTX.replace(valid=valid)).y - expected).abs().max() < 1e-12
        state, parts = None, []
        for a, b in ((0, 4), (4, 9), (9, T)):
            out = sub(x[:, a:b], None, state, Context(valid=valid[:, a:b]))
            state, parts = out.state, [*parts, out.y]
        assert (torch.cat(parts, 1) - expected).abs().max() < 1e-12


def test_reading_a_list_again_has_the_gradients_of_taking_each_token_twice(made):
    x = made.tokens(2, T).requires_grad_()
    found = []
    for rereads in ("all", "no"):
        sub = spread(made.sublayer("attention", {"kind": "loop", "most": 3, "state": "first"}))
        assert sub.depth.able.rereads == "all"
        sub.depth.able = replace(sub.depth.able, rereads=rereads)
        out = sub(x, None, None, CTX)
        loss = (out.y * torch.arange(T)[:, None]).sum() + out.published["depth"].sum()
        found.append([out.y, *torch.autograd.grad(loss, [x, *sub.parameters()])])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_the_expected_output_and_both_losses_by_their_formulas(made):
    x = made.tokens(2, T)
    sub = spread(made.sublayer("ff", {"kind": "loop", "most": 4, "halt": "expected", "price": 0.5, "prior": 0.3,
                                      "prior_weight": 2.0}))
    valid = torch.arange(T) < torch.tensor([[T], [4]])
    out = sub(x, None, None, Context(valid=valid))
    p, h = by_hand(sub, x, 4)
    assert (p.sum(0) - 1).abs().max() < 1e-14
    mean = (p[..., None] * h).sum(0)
    assert ((x + out.y - mean) * valid[..., None]).abs().max() < 1e-13
    count = (p * torch.arange(1, 5).double()[:, None, None]).sum(0)
    assert torch.allclose(out.published["depth"] * valid, count * valid)
    assert float(out.losses["steps"].detach()) == pytest.approx(0.5 * float(count[valid].mean().detach()))
    prior = torch.tensor([0.3, 0.7 * 0.3, 0.49 * 0.3, 0.343]).double()
    assert float(prior.sum()) == pytest.approx(1)
    divergence = (torch.xlogy(p, p) - p * torch.log(prior)[:, None, None]).sum(0)
    assert float(out.losses["prior"].detach()) == pytest.approx(2 * float(divergence[valid].mean().detach()))


def test_backward_of_hard_halting_goes_through_the_mean(made):
    x = made.tokens(2, T).requires_grad_()
    sub = spread(made.sublayer("ff", {"kind": "loop", "most": 4, "price": 1.0}))
    weight = torch.randn(2, T, made.width, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    inputs = [x, *sub.parameters()]
    out = sub(x, None, None, Context())
    found = torch.autograd.grad(((x + out.y) * weight).sum() + out.losses["steps"], inputs)
    p, h = by_hand(sub, x, 4)
    count = (p * torch.arange(1, 5).double()[:, None, None]).sum(0).mean()
    truth = torch.autograd.grad(((p[..., None] * h).sum(0) * weight).sum() + count, inputs)
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(found, truth, strict=True))
    assert found[-2].abs().max() > 1e-3
    half = h.gather(0, (p.cumsum(0) < 0.5).sum(0)[None, ..., None].expand(1, -1, -1, made.width))[0]
    assert (x + out.y - half).abs().max() < 1e-13


def test_soft_halting_gates_every_depths_state(made):
    x = made.tokens(2, T)
    sub = spread(made.sublayer("pole", {"kind": "loop", "most": 3, "halt": "expected"}))
    out = sub(x, None, None, CTX)
    for i in range(2):
        memories = [torch.zeros(made.width).double() for _ in range(3)]
        for t in range(T):
            h, rest, mean = x[i, t], torch.ones(()).double(), 0
            for n in range(3):
                f, memories[n] = pole(sub, sub.norm(h), memories[n], write=rest)
                h = h + f
                p = rest if n == 2 else rest * torch.sigmoid(gate(sub, h))
                mean, rest = mean + p * h, rest - p
            assert (x[i, t] + out.y[i, t] - mean).abs().max() < 1e-12
        for n in range(3):
            assert (out.state.of[n][i] - memories[n]).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["attention", "matrix", "pole", "ff"])
@pytest.mark.parametrize("state", ["each", "first"])
def test_soft_becomes_hard_where_gates_are_sure(made, name, state):
    x = made.tokens(2, T)
    soft, hard = (made.sublayer(name, {"kind": "loop", "most": 3, "state": state, "halt": halt})
                  for halt in ("expected", "hard"))
    for sub in (soft, hard):
        with torch.no_grad():
            sub.depth.gate.weight.mul_(1e6)
            sub.depth.gate.bias.zero_()
    out, expected = soft(x, None, None, CTX), hard(x, None, None, CTX)
    assert len(expected.published["depth"].unique()) >= 2
    assert (out.y - expected.y).abs().max() < 1e-12
    assert torch.equal(out.published["depth"], expected.published["depth"])


def test_states_of_depths_see_only_the_tokens_that_reach_them(made):
    """Attention at depth n attends to the tokens that are there, at their own positions, and to no others."""
    x, position = made.tokens(1, 40), torch.arange(40)[None]
    sub = spread(made.sublayer("attention", {"kind": "loop", "most": 3}), 0.7)
    with torch.no_grad():
        out = sub(x, None, None, Context(position=position))
        depth = out.published["depth"][0]
        assert len(depth.unique()) == 3
        h = x
        for n in range(3):
            here = depth > n
            f = made.plain(sub, "attention")(h[:, here], None, None, Context(position=position[:, here]))
            assert state_error(out.state.of[n], f.state) < 1e-12
            h = h.clone()
            h[:, here] += f.y
        assert (x + out.y - h).abs().max() < 1e-12
        assert [int(part.memory.length) for part in out.state.of] == [int((depth > n).sum()) for n in range(3)]


@pytest.mark.parametrize("kind", ["loop", "ode"])
def test_decoding_ends_when_all_rows_have(made, kind):
    x, calls = made.tokens(3, 1), []
    sub = made.sublayer("pole", {"kind": kind, "most": 5})
    sub.mixer.register_forward_pre_hook(lambda m, args: calls.append(1))
    for bias, expected in ((1e3, 1), (-1e3, 5)):
        with torch.no_grad():
            sub.depth.gate.bias.fill_(bias)
            sub(x, None, None, Context(position=torch.zeros(3, 1, dtype=torch.long)))
        assert len(calls) == expected
        calls.clear()


def test_continuous_depth_by_loops(made):
    x = made.tokens(2, T)
    for residual, state in (("add", "each"), ("none", "each"), ("add", "first")):
        sub = made.sublayer("pole", {"kind": "ode", "most": 4, "state": state, "price": 0.1}, residual=residual)
        with torch.no_grad():
            sub.depth.gate.weight.mul_(3)
        counts = torch.zeros(2, T).double()
        used = torch.zeros(2, T).double()
        expected, last = torch.zeros_like(x), []
        for i in range(2):
            memories = [torch.zeros(made.width).double() for _ in range(4)]
            for t in range(T):
                h, left = x[i, t], 1.0
                for n in range(4):
                    d = float(torch.log1p(torch.exp(gate(sub, h))).detach())
                    cut = left if n == 3 else min(d, left)
                    at = n if state == "each" else 0
                    f, memory = pole(sub, sub.norm(h), memories[at], write=float(state == "each" or n == 0))
                    memories[at] = memory
                    h = h + cut * f if residual == "add" else h + cut * (f - h)
                    used[i, t] += 1
                    done = n == 3 or d >= left
                    counts[i, t] += left / max(d, 1 / 8) if done else 1
                    left -= cut
                    if done:
                        break
                expected[i, t] = h
            last.append(memories)
        out = sub(x, None, None, CTX)
        assert len(used.unique()) >= 3
        assert (out.y + (x if residual == "add" else 0) - expected).abs().max() < 1e-12
        assert (out.published["depth"] - counts).abs().max() < 1e-12
        assert out.measured["steps"] == used.sum()
        assert float(out.losses["steps"].detach()) == pytest.approx(0.1 * float(counts.mean()))
        for n, memory in enumerate(out.state.of):
            assert (memory - torch.stack([m[n] for m in last])).abs().max() < 1e-12
        with torch.no_grad():
            assert (sub(x, None, None, CTX).y - out.y).abs().max() < 1e-12


def test_steps_of_continuous_depth_sum_to_one(made):
    x = made.tokens(2, 50)
    sub = made.sublayer("one", {"kind": "ode", "most": 6}, norm="none")
    with torch.no_grad():
        sub.depth.gate.weight.mul_(4)
    out = sub(x, None, None, Context())
    assert (out.y - 1).abs().max() < 1e-15
    assert len(out.published["depth"].round().unique()) > 2


def test_a_step_of_one_is_a_plain_step(made):
    x = made.tokens(2, T)
    for residual in ("add", "none"):
        sub = made.sublayer("attention", {"kind": "ode", "most": 4}, residual=residual)
        with torch.no_grad():
            sub.depth.gate.weight.zero_()
            sub.depth.gate.bias.fill_(math.log(math.expm1(1)) + 1e-12)
        out, alone = sub(x, None, None, CTX), made.plain(sub, "attention")(x, None, None, CTX)
        assert (out.y - alone.y).abs().max() < 1e-14
        assert (out.published["depth"] - 1).abs().max() < 1e-11
        assert state_error(out.state.of[0], alone.state) == 0
        assert not any(int(part.memory.length.max()) for part in out.state.of[1:])
