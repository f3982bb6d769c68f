"""A recorded function of tensors does again, on other numbers, what the function does."""

import time

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from postformer.kernels import attend, native, recall
from postformer.kernels.scan.selective import scan_step
from postformer.kernels.tape import NotRecordable, Tape, record, when

pytestmark = pytest.mark.skipif(native.native().library is None, reason="no compiled kernels here")

LAYOUTS = [lambda x: x, lambda x: x.mT, lambda x: x[:, ::2], lambda x: x[1:], lambda x: x[:1].expand(3, -1),
           lambda x: x[:, :1].expand(-1, 3)]
OPERATIONS = [
    torch.sigmoid, F.silu, F.softplus, torch.tanh, F.gelu, F.logsigmoid, lambda x: x * 0.7 - x.mean(1, keepdim=True),
    lambda x: x.abs().add(1).log(), lambda x: (-x.square()).exp(), lambda x: x.softmax(-1), lambda x: x.cumsum(0),
    lambda x: F.rms_norm(x, x.shape[-1:], eps=1e-6), lambda x: F.layer_norm(x, x.shape[-1:]),
    lambda x: x.sum(0, keepdim=True) + x, lambda x: x / x.amax(1, keepdim=True).abs().add(1), lambda x: x @ x.mT @ x,
    lambda x: torch.where(x > 0.1, x, -x), lambda x: torch.cat([x, x[:1] * 2]), lambda x: x.clamp(-1, 0.5),
    lambda x: x.masked_fill(x < 0, 0.3), lambda x: torch.minimum(x, x[:, :1]), lambda x: x.clone().mul_(1.5),
    lambda x: torch.stack([x, 2 * x], -1).flatten(1), lambda x: torch.lerp(x, x[:1], 0.25),
]


def repeated(function, inputs, tolerance):
    """Recorded on other numbers, run on these."""
    held = [torch.randn_like(x) if x.is_floating_point() else torch.zeros_like(x) for x in inputs]
    _, _, tape = record(lambda: ([*function(*held)], []), held, [])
    assert isinstance(tape, Tape), tape
    for x, y in zip(held, inputs):
        x.copy_(y)
    for found, expected in zip(tape.run(), function(*(x.clone() for x in inputs)), strict=True):
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance, equal_nan=True)
    return tape


@settings(max_examples=80, deadline=None)
@given(rows=st.integers(2, 6), columns=st.integers(1, 37), seed=st.integers(0, 2**20),
       program=st.lists(st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(OPERATIONS)), min_size=1, max_size=6))
def test_any_program_of_known_operations(rows, columns, seed, program):
    torch.manual_seed(seed)

    def run(x):
        for layout, operation in program:
            x = operation(layout(x) if min(layout(x).shape) else x)
        return (x.contiguous(),)

    with torch.no_grad():
        repeated(run, [torch.randn(rows, columns, dtype=torch.float64)], 1e-11)


@settings(max_examples=60, deadline=None)
@given(B=st.integers(1, 3), heads=st.integers(1, 3), group=st.integers(1, 3), d=st.integers(1, 70),
       room=st.sampled_from([1, 5, 17, 255, 256, 257, 600]), seed=st.integers(0, 2**20), double=st.booleans())
def test_one_token_of_attention(B, heads, group, d, room, seed, double):
    """Lists that are empty, part full, full and gone round; blocks of places and what is left over."""
    torch.manual_seed(seed)
    dtype = torch.float64 if double else torch.float32
    q, new = torch.randn(B, heads * group, d, dtype=dtype), torch.randn(B, 2, heads, d, dtype=dtype)
    data, count = torch.randn(B, room, 2, heads, d, dtype=dtype), torch.randint(0, 2 * room + 1, (B,))
    with torch.no_grad():
        repeated(lambda q, new, data, count: attend(q, new, data, count, d**-0.5), [q, new, data, count],
                 1e-11 if double else 1e-5)


@settings(max_examples=30, deadline=None)
@given(B=st.integers(1, 3), heads=st.integers(1, 3), group=st.integers(1, 3), d=st.integers(1, 40),
       room=st.sampled_from([1, 5, 17, 300]), seed=st.integers(0, 2**20))
def test_a_list_that_is_only_read(B, heads, group, d, room, seed):
    torch.manual_seed(seed)
    q, data = torch.randn(B, heads * group, d), torch.randn(B, room, 2, heads, d)
    count = torch.randint(1, 2 * room + 1, (B,))
    with torch.no_grad():
        repeated(lambda q, data, count: (recall(q, data, count, d**-0.5),), [q, data, count], 1e-5)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(2, 9), seed=st.integers(0, 2**20), data=st.data())
def test_the_largest_of_each_row(rows, columns, seed, data):
    count = data.draw(st.integers(1, columns))
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    repeated(lambda x: x.topk(count, -1), [x], 0)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**20), parts=st.lists(st.integers(0, 2), min_size=1, max_size=5), nested=st.booleans())
def test_what_nobody_needs_is_left_out(seed, parts, nested):
    """Programs that add to what was there, each part under a condition of its own; some within others."""
    torch.manual_seed(seed)

    def run(x, needed):
        y, hidden = x * 2, torch.zeros_like(x)
        for i, kind in enumerate(parts):
            def add(i=i, kind=kind):
                z = (x @ x.mT @ x).sigmoid() if kind == 0 else F.softplus(x).cumsum(0) if kind == 1 else x.abs()
                y.add_(z * (i + 1))
                if nested:
                    when(needed[:, -1], lambda: hidden.copy_(torch.where(z > 0.5, z, hidden)))

            when(needed[:, i], add)
        return y, hidden.clone() + y

    with torch.no_grad():
        inputs = [torch.randn(3, 4, dtype=torch.float64), torch.rand(2, len(parts) + 1) > 0.6]
        held = [torch.randn_like(inputs[0]), torch.ones_like(inputs[1])]
        _, _, tape = record(lambda: ([*run(*held)], []), held, [])
        assert isinstance(tape, Tape), tape
        for _ in range(3):
            held[0].copy_(torch.randn_like(held[0]))
            held[1].copy_(torch.rand(2, len(parts) + 1) > 0.6)
            for found, expected in zip(tape.run(), run(*(x.clone() for x in held)), strict=True):
                torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-11)


def test_what_is_left_out_takes_no_time():
    """The point of a condition: a large product that nobody needs costs nothing."""
    x, W, needed = torch.randn(64, 512), torch.randn(512, 512), torch.ones(1, dtype=torch.bool)

    def run():
        y = torch.zeros(64, 512)
        when(needed, lambda: y.add_(x @ W))
        return [y + x[:1]], []

    _, _, tape = record(run, [x, needed], [])
    assert isinstance(tape, Tape)

    def least():
        times = []
        for _ in range(20):
            start = time.perf_counter()
            tape.run()
            times.append(time.perf_counter() - start)
        return min(times)

    all_of_it = least()
    needed.fill_(False)
    assert least() < all_of_it / 3
    torch.testing.assert_close(tape.run()[0], x[:1].expand(64, -1))


def test_a_condition_that_is_no_truth_value_is_not_recorded():
    x = torch.randn(3)
    _, _, found = record(lambda: (when(x, lambda: None), ([x + 1], []))[1], [x], [])
    assert isinstance(found, NotRecordable)
    assert "condition" in str(found)


def long_attention(threads, change=lambda *_: None):
    torch.manual_seed(0)
    held = [torch.randn(2, 4, 32), torch.randn(2, 2, 2, 32), torch.randn(2, 900, 2, 2, 32), torch.tensor([850, 300])]
    change(*held)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            _, _, tape = record(lambda: ([*attend(*held, 0.2)], []), held, [])
            assert isinstance(tape, Tape)
            return tape.run()[0].clone()
    finally:
        torch.set_num_threads(before)


def test_threads_do_not_change_attention():
    assert torch.equal(long_attention(1), long_attention(2))


def test_what_is_not_a_number_is_seen_in_attention():
    def spoil(q, new, data, count):
        data[0, 400, 0, 1, 3] = float("nan")  # a key of the second half of the heads

    found = long_attention(2, spoil)
    assert found[0, 2:].isnan().all()
    assert not found[0, :2].isnan().any()
    assert not found[1].isnan().any()


@settings(max_examples=30, deadline=None)
@given(B=st.integers(1, 3), D=st.integers(1, 9), N=st.integers(1, 35), seed=st.integers(0, 2**20))
def test_one_token_of_the_selective_scan(B, D, N, seed):
    torch.manual_seed(seed)
    x, dt, A = torch.randn(B, D), torch.rand(B, D), -torch.rand(D, N)
    inputs = [x, dt, A, torch.randn(B, N), torch.randn(B, N), torch.randn(B, D, N)]
    with torch.no_grad():
        repeated(lambda x, dt, A, B, C, h: scan_step(x, dt, A, B, C, h), inputs, 1e-5)
