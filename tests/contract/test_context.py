"""The context: frozen, cut by tokens, boundary levels."""

from dataclasses import FrozenInstanceError

import pytest
import torch

from postformer.contract.context import DOCUMENT, EMPTY, SEGMENT, STREAM, Context, gates
from postformer.contract.fallback import stack_emitted
from postformer.contract.state import Growing

BOUNDARY = torch.tensor([[0, SEGMENT, 0, DOCUMENT, 0], [STREAM, 0, 0, 0, SEGMENT]], dtype=torch.int8)


def test_a_context_is_frozen_and_so_are_its_mappings():
    ctx = Context(causal=False)
    with pytest.raises(FrozenInstanceError):
        ctx.causal = True
    for name in ("shared", "stores", "inputs"):
        with pytest.raises(TypeError):
            getattr(ctx, name)["a"] = 1
    other = ctx.replace(emit=3)
    assert (ctx.emit, other.emit, other.causal) == (None, 3, False)


@pytest.mark.parametrize(("level", "rows"), [
    ("segment", [[0, 1, 0, 1, 0], [1, 0, 0, 0, 1]]), ("document", [[0, 0, 0, 1, 0], [1, 0, 0, 0, 0]]),
    ("stream", [[0, 0, 0, 0, 0], [1, 0, 0, 0, 0]])])
def test_a_boundary_ends_everything_of_its_level_and_below(level, rows):
    ctx = Context(boundary=BOUNDARY)
    assert torch.equal(ctx.reset(level), torch.tensor(rows).bool())
    assert torch.equal(ctx.segments(level), torch.tensor(rows).cumsum(1))
    assert Context().reset(level) is None
    assert Context().segments(level) is None


def test_narrow_cuts_tokens_and_publications_and_drops_emit():
    token = torch.arange(10).view(2, 5)
    listed = Growing(torch.zeros(2, 7, 3), torch.tensor([7, 7]))
    shared = {"v": torch.randn(2, 5, 3), "row": torch.randn(2, 5), "kv": listed}
    ctx = Context(position=token, valid=token > 3, boundary=BOUNDARY, tick=token / 10, emit=2, consume=True,
                  causal=False, shared=shared)
    cut = ctx.narrow(1, 4, ctx.position.shape[1])
    assert torch.equal(cut.position, token[:, 1:4])
    assert torch.equal(cut.boundary, BOUNDARY[:, 1:4])
    assert torch.equal(cut.valid, (token > 3)[:, 1:4])
    assert torch.equal(cut.tick, token[:, 1:4] / 10)
    assert cut.write is None
    assert (cut.emit, cut.consume, cut.causal) == (None, True, False)
    assert torch.equal(cut.shared["v"], shared["v"][:, 1:4])
    assert cut.shared["kv"] is listed
    assert torch.equal(cut.shared["row"], shared["row"][:, 1:4])
    assert ctx.emit == 2


def test_gates_fold_in_tokens_that_do_not_exist():
    valid = torch.tensor([[True, False, True]])
    half = torch.full((1, 3), 0.5, dtype=torch.float64)
    assert gates(Context()) == (None, None)
    tick, write = gates(Context(valid=valid))
    assert tick.tolist() == write.tolist() == [[1.0, 0.0, 1.0]]
    tick, write = gates(Context(valid=valid, tick=half))
    assert tick.tolist() == [[0.5, 0.0, 0.5]]
    assert write.tolist() == [[1.0, 0.0, 1.0]]
    tick, write = gates(Context(valid=valid, write=half))
    assert write.dtype == torch.float64
    assert write.tolist() == [[0.5, 0.0, 0.5]]


def test_emitted_states_are_stacked_behind_the_batch():
    first = (torch.zeros(2, 3), Growing(torch.zeros(2, 0, 1), torch.tensor([0, 0])))
    second = (torch.ones(2, 3), Growing(torch.ones(2, 4, 1), torch.tensor([4, 1])))
    joined = stack_emitted([first, second])
    assert joined[0].tolist() == [[[0.0] * 3, [1.0] * 3]] * 2
    assert joined[1].data.shape == (2, 2, 4, 1)
    assert joined[1].length.tolist() == [[0, 4], [0, 1]]
    assert stack_emitted([None, None]) is None
    assert dict(EMPTY) == {}
