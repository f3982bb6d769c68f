"""The convolution of a fixed diagonal system against its recurrence, started from a state, in any pieces."""

import pytest
import torch

from postformer.kernels import diagonal_system, use


def case(length, seed=0):
    torch.manual_seed(seed)
    real = dict(dtype=torch.float64)
    complex_ = dict(dtype=torch.complex128)
    log_a = torch.complex(-torch.rand(3, 4, **real), torch.randn(3, 4, **real))
    return [t.requires_grad_() for t in (torch.randn(2, length, 3, **real), log_a, torch.randn(3, 4, **complex_),
                                         torch.randn(3, 4, **complex_), torch.randn(2, 3, 4, **complex_))]


def loop(u, log_a, b, c, h):
    ys = []
    for t in range(u.shape[1]):
        h = log_a.exp() * h + b * u[:, t, :, None]
        ys.append(2 * (c * h).sum(-1).real)
    return torch.stack(ys, 1), h


@pytest.mark.parametrize("length", [1, 2, 37])
@pytest.mark.parametrize("backend", ["auto", "reference", "parallel"])
def test_equals_the_recurrence_gradients_included(length, backend):
    args = case(length)
    y, h = diagonal_system(*args, backend=backend)
    y_loop, h_loop = loop(*args)
    assert torch.allclose(y, y_loop, rtol=0, atol=1e-11)
    assert torch.allclose(h, h_loop, rtol=0, atol=1e-11)
    found = torch.autograd.grad(y.square().sum() + h.abs().square().sum(), args)
    truth = torch.autograd.grad(y_loop.square().sum() + h_loop.abs().square().sum(), args)
    for a, b in zip(found, truth, strict=True):
        assert (a - b).abs().max() <= 1e-9 * b.abs().max()


def test_pieces_equal_whole():
    u, *rest, h = (t.detach() for t in case(29))
    whole, last = diagonal_system(u, *rest, h)
    parts = []
    for piece in u.split([1, 13, 1, 14], 1):
        y, h = diagonal_system(piece, *rest, h)
        parts.append(y)
    assert torch.allclose(torch.cat(parts, 1), whole, rtol=0, atol=1e-11)
    assert torch.allclose(h, last, rtol=0, atol=1e-11)


def test_the_decay_can_be_scaled():
    args = [t.detach() for t in case(11)]
    with use(decay_scale=5.0):
        y, _ = diagonal_system(*args)
    args[1] = args[1] * 5
    assert torch.allclose(y, loop(*args)[0], rtol=0, atol=1e-11)
