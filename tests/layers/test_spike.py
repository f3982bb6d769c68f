"""Spikes and their surrogate gradients."""

import math

import pytest
import torch

from postformer.layers.spike import smooth, spike

FORMULAS = {"atan": lambda x: 1 / (1 + (math.pi * x) ** 2), "fast-sigmoid": lambda x: 1 / (1 + 25 * abs(x)) ** 2}


def test_a_spike_is_above_the_threshold_only():
    x = torch.tensor([-2.0, -1e-30, 0.0, 1e-30, 3.0])
    assert spike(x).tolist() == [0, 0, 0, 1, 1]
    assert spike(x.double()).dtype == torch.float64


@pytest.mark.parametrize("surrogate", FORMULAS)
def test_the_gradient_is_the_formula(surrogate):
    x = torch.linspace(-3, 3, 31, dtype=torch.float64).requires_grad_()
    (g,) = torch.autograd.grad((spike(x, surrogate) * torch.arange(31)).sum(), x)
    expected = [i * FORMULAS[surrogate](v) for i, v in enumerate(x.tolist())]
    assert (g - torch.tensor(expected, dtype=torch.float64)).abs().max() < 1e-13


@pytest.mark.parametrize("surrogate", FORMULAS)
def test_the_smooth_form_has_that_slope(surrogate):
    x = (torch.linspace(-3, 3, 30, dtype=torch.float64)).requires_grad_()
    hard, soft = (torch.autograd.grad(spike(x, surrogate, h).sum(), x)[0] for h in (True, False))
    assert (hard - soft).abs().max() < 1e-15
    assert smooth(torch.zeros(1), surrogate).item() == 0.5
