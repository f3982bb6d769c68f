"""Any step function: against a plain loop, with documents, partial writes, checkpoints and emitted states."""

from typing import NamedTuple

import pytest
import torch

from postformer.kernels import sequential

torch.set_num_threads(1)


class Cell(NamedTuple):
    h: torch.Tensor
    count: torch.Tensor
    nothing: None = None


W = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def make_step(weight):
    def step(x, state):
        h = torch.tanh(x + state["cell"].h @ weight)
        return 2 * h, {"cell": Cell(h, state["cell"].count + 1)}

    return step


def start():
    return {"cell": Cell(torch.ones(2, 4, dtype=torch.float64), torch.zeros(2, dtype=torch.long))}


def tokens(T=11):
    return torch.randn(2, T, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_plain_loop():
    x, state, out = tokens(), start(), []
    for t in range(11):
        y, state = make_step(W)(x[:, t], state)
        out.append(y)
    y, last = sequential(make_step(W), x, start())
    assert torch.equal(y, torch.stack(out, 1))
    assert torch.equal(last["cell"].h, state["cell"].h)
    assert torch.equal(last["cell"].count, torch.full((2,), 11))
    assert last["cell"].nothing is None


def test_reset_starts_from_initial_and_nothing_passes():
    x = tokens().requires_grad_()
    reset = torch.zeros(2, 11, dtype=torch.bool)
    reset[0, 5] = True
    initial = {"cell": Cell(torch.full((4,), 0.3, dtype=torch.float64), torch.zeros((), dtype=torch.long))}
    y, _ = sequential(make_step(W), x, start(), reset=reset, initial=initial)
    alone = {"cell": Cell(torch.full((1, 4), 0.3, dtype=torch.float64), torch.zeros(1, dtype=torch.long))}
    torch.testing.assert_close(y[:1, 5:], sequential(make_step(W), x[:1, 5:], alone)[0])
    y[0, 5:].sum().backward()
    assert (x.grad[0, :5] == 0).all()
    _, state = sequential(lambda x, s: (x, s), x, start(), reset=reset)
    assert (state["cell"].h[0] == 0).all()
    assert (state["cell"].h[1] == 1).all()


def test_write_gates():
    x, write = tokens(), torch.tensor([[0.0] * 11, [1.0] * 11], dtype=torch.float64)
    _, state = sequential(make_step(W), x, start(), write=write)
    _, full = sequential(make_step(W), x, start())
    assert torch.equal(state["cell"].h[0], start()["cell"].h[0])
    assert torch.equal(state["cell"].h[1], full["cell"].h[1])
    assert state["cell"].count.tolist() == [0, 11]
    _, half = sequential(lambda x, s: (x, s + 1), x, torch.zeros(2, 4, dtype=torch.float64), write=0 * write + 0.25)
    torch.testing.assert_close(half, torch.full((2, 4), 11 * 0.25, dtype=torch.float64))


def test_what_is_not_written_may_be_nan():
    x = tokens(3)
    x[:, 1] = float("nan")
    gate = torch.tensor([[1.0, 0.0, 1.0]] * 2, dtype=torch.float64).requires_grad_()
    old = torch.full((2, 4), 0.5, dtype=torch.float64).requires_grad_()
    _, state = sequential(lambda x, s: (x, s + x), x, old, write=gate)
    state.sum().backward()
    assert torch.equal(state, old + x[:, 0] + x[:, 2])
    assert torch.equal(old.grad, torch.ones_like(old))
    assert gate.grad.isfinite().all()


@pytest.mark.parametrize("length", [1, 3, 20])
def test_checkpoints_change_nothing(length):
    found = []
    for n in (0, length):
        x, weight = tokens().requires_grad_(), W.clone().requires_grad_()
        y, state, seen = sequential(make_step(weight), x, start(), checkpoint=n, emit=4)
        (y.sum() + state["cell"].h.sum() + seen["cell"].h.pow(2).sum()).backward()
        found.append([y.detach(), seen["cell"].h.detach(), x.grad, weight.grad])
    assert found[0][1].shape == (2, 3, 4)
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_trees_of_inputs_and_outputs():
    x = tokens()
    y, state = sequential(lambda x, s: ({"sum": x["a"] + x["b"]}, s), {"a": x, "b": x}, None)
    torch.testing.assert_close(y["sum"], 2 * x)
    assert state is None


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="T >= 1"):
        sequential(make_step(W), tokens()[:, :0], start())
    with pytest.raises(ValueError, match="write has shape"):
        sequential(make_step(W), tokens(), start(), write=torch.ones(2))
    with pytest.raises(ValueError, match="emit >= 1"):
        sequential(make_step(W), tokens(), start(), emit=0)
    with pytest.raises(TypeError, match="tensors in tuples"):
        sequential(make_step(W), tokens(), 3, reset=torch.ones(2, 11, dtype=torch.bool))
