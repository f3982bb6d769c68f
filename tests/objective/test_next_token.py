import math
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from postformer.contract.context import Context
from postformer.contract.mixer import Out
from postformer.objective import Batch, NextToken

Output = namedtuple("Output", "logits state losses measured")


class Table(nn.Module):
    """Logits of a token are a row of a table: everything can be computed by hand."""

    def __init__(self, vocab=4, losses=None):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(vocab, vocab, generator=generator))
        self.losses, self.design, self.seen = losses or {}, SimpleNamespace(vocab=vocab), []
        self.measured = {}

    def hidden(self, tokens, ctx=None, *, select=None):
        x = nn.functional.one_hot(tokens, self.design.vocab).float()
        return Out(x if select is None else x[select], losses=self.losses, measured=self.measured)

    def logits(self, x):
        self.seen.append(x.shape[0])
        return x @ self.table

    def forward(self, tokens, state=None, ctx=None, *, select=None):
        self.select = select
        logits = self.table[tokens]
        return Output(logits if select is None else logits[select], None, self.losses, self.measured)


def by_hand(model, tokens, targets):
    total, count = 0.0, 0
    for row, wanted in zip(tokens.tolist(), targets.tolist()):
        for token, target in zip(row, wanted):
            if target != -100:
                logits = model.table[token].tolist()
                total += math.log(sum(map(math.exp, logits))) - logits[target]
                count += 1
    return total / count, count


@pytest.mark.parametrize("targets", [[[1, 2, 3], [0, 1, 1]], [[1, -100, 3], [0, 1, -100]],
                                     [[-100, -100, 3], [-100, 1, -100]]])
def test_against_a_hand_computed_sum(targets):
    model, tokens, targets = Table(), torch.tensor([[0, 1, 2], [3, 0, 1]]), torch.tensor(targets)
    loss, metrics = NextToken().loss(model, (tokens, targets))
    wanted, count = by_hand(model, tokens, targets)
    assert loss.item() == pytest.approx(wanted, rel=1e-6)
    assert metrics["tokens"] == count
    assert float(metrics["bits_per_token"]) == pytest.approx(wanted / math.log(2), rel=1e-6)
    right = (model.table[tokens].argmax(-1) == targets).sum().item()
    assert float(metrics["accuracy"]) == pytest.approx(right / count)
    # Logits of unscored positions are not computed where most are unscored.
    assert (model.select is not None) == (count < 3)


@pytest.mark.parametrize("masked", [False, True])
def test_chunks_change_neither_loss_nor_gradient(masked):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 4, (3, 7), generator=generator)
    targets = torch.randint(0, 4, (3, 7), generator=generator)
    if masked:
        targets[:, ::3] = -100
        targets[1:] = -100
    results = []
    for chunk in (1 << 25, 8):
        model = Table(losses={"router": torch.tensor(2.0)})
        loss, metrics = NextToken(chunk_elements=chunk).loss(model, Batch(tokens, targets))
        loss.backward()
        results.append((loss.detach(), model.table.grad, metrics["accuracy"]))
        assert not model.seen if chunk > 8 else max(model.seen) == 2
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_auxiliary_losses_are_weighed_and_kept_out_of_the_reported_loss():
    losses = {"0.router": torch.tensor(2.0), "0.halting": torch.tensor(5.0)}
    batch = (torch.tensor([[0, 1]]), torch.tensor([[1, 1]]))
    plain, _ = NextToken().loss(Table(), batch)
    for auxiliary, extra in ((1.0, 7.0), (0.0, 0.0), ({"router": 0.1}, 5.2)):
        loss, metrics = NextToken(auxiliary).loss(Table(losses=losses), batch)
        assert loss.item() == pytest.approx(plain.item() + extra)
        assert float(metrics["loss"]) == pytest.approx(plain.item())
        assert float(metrics["auxiliary"]) == pytest.approx(extra)


@pytest.mark.parametrize("chunk", [1 << 25, 1])
def test_what_the_model_measures_is_passed_on(chunk):
    model, batch = Table(), (torch.tensor([[0, 1]]), torch.tensor([[1, 1]]))
    assert "measured" not in NextToken(chunk_elements=chunk).loss(model, batch)[1]
    model.measured = {"0.1.load": torch.tensor([3, 1])}
    assert NextToken(chunk_elements=chunk).loss(model, batch)[1]["measured"] == model.measured


def test_nothing_scored_is_no_loss():
    loss, metrics = NextToken().loss(Table(), (torch.tensor([[0, 1]]), torch.tensor([[-100, -100]])))
    assert loss.item() == 0
    assert metrics["tokens"] == 0


def test_windows_and_rows():
    batch = Batch.windows(torch.arange(12, dtype=torch.uint8).view(4, 3))
    assert batch.tokens.tolist() == [[0, 1], [3, 4], [6, 7], [9, 10]]
    assert batch.targets.tolist() == [[1, 2], [4, 5], [7, 8], [10, 11]]
    ctx = Context(boundary=torch.arange(8, dtype=torch.int8).view(4, 2))
    parts = list(batch._replace(ctx=ctx).split(3))
    assert [len(p.tokens) for p in parts] == [2, 1, 1]
    assert torch.equal(torch.cat([p.tokens for p in parts]), batch.tokens)
    assert torch.equal(torch.cat([p.ctx.boundary for p in parts]), ctx.boundary)
    assert len(list(batch.split(9))) == 4


def test_bad_batches_are_refused():
    with pytest.raises(ValueError, match="one target per position"):
        NextToken().loss(Table(), (torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 2, dtype=torch.long)))
    with pytest.raises(ValueError, match="int64"):
        NextToken().loss(Table(), (torch.zeros(1, 3), torch.zeros(1, 3)))
    with pytest.raises(ValueError, match="chunk_elements"):
        NextToken(chunk_elements=0)
