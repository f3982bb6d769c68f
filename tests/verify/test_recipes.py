"""Every shipped recipe keeps the contract, within six seconds."""

import time

import pytest
import torch

from postformer.design import load, names
from postformer.verify import verify
from postformer.verify.subject import reduced

SECONDS = 6.0
QUIET = 0.0285
"""Seconds that `_work` took, at best, on the idle machine that the six seconds were asked of"""


def _work() -> float:
    """Processor seconds of ten thousand small operations, at best: how fast this machine is at present."""
    x, w = torch.full((2, 8, 32), 0.5, dtype=torch.float64), torch.full((32, 32), 1 / 32, dtype=torch.float64)
    spent = []
    for _ in range(5):
        start, y = time.process_time(), x
        for _ in range(5000):
            y = torch.nn.functional.silu(y @ w) + x
        spent.append(time.process_time() - start)
    return min(spent)


@pytest.mark.parametrize("name", names())
def test_recipe_passes_in_six_seconds(name):
    found = verify(name)
    assert [(r.name, r.value, r.tolerance, r.note) for r in found.results if r.passed is False] == []
    left_out = [r.note for r in found.results if r.passed is None]
    assert set(left_out) <= {"local mixing stands before a memory: read-only tokens would enter its taps",
                             "the design declares gradients that are no derivatives"}
    spent = [found.seconds]
    while min(spent) > SECONDS and len(spent) < 4:
        # The machine may be shared, or slower: more tries count only the time in which it worked for this process,
        # against what work of the same kind takes beside it.
        slower = max(1.0, _work() / QUIET)
        start = time.process_time()
        verify(name)
        spent.append((time.process_time() - start) / slower)
    assert min(spent) <= SECONDS


def test_verification_size_keeps_each_kind_of_layer_and_shortens_windows():
    small = reduced(load("griffin"))
    assert small.model.width == 32
    assert set(small.model.stack) == set(load("griffin").model.stack)
    assert small.model.mixers["attention"].window == 8
    assert verify("griffin", only=["bit-equal"]).size == "width 32, 2 layers"


def test_only_runs_the_checks_that_are_named_and_refuses_what_names_none():
    found = verify("transformer", only=["packed", "bit-equal"])
    assert [r.name.split(" ")[0] for r in found.results] == ["packed", "weights"]
    with pytest.raises(ValueError, match="no check's name has any of \\['pakced'\\]; they are: causal"):
        verify("transformer", only=["pakced"])


def test_verify_leaves_the_global_generator_and_thread_count_alone():
    torch.manual_seed(3)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    verify("linear-attention", only=["finite", "saved", "pieces"])
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_full_size_is_the_designs_own():
    assert verify(load("linear-attention", width=64, layers=3), only=["packed"], full=True).size == "width 64, 3 layers"
