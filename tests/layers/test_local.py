"""Local mixing against a loop over the tokens that exist in each document."""

import pytest
import torch

from postformer.contract.context import Context
from postformer.layers.local import ShortConvolution, Taps, shift_mixes


def past_of(x, past, valid, reset, row, t, k):
    """The token k valid tokens before t in its document (zero where there is none), by walking back."""
    seen = [past[row, i] for i in range(past.shape[1])]
    for s in range(t + 1):
        if reset[row, s]:
            seen = [torch.zeros_like(x[0, 0])] * past.shape[1]
        if valid[row, s] and s < t:
            seen = [*seen, x[row, s]]
    return x[row, t] if k == 0 else seen[-k]


def case(seed, with_valid, with_reset, length=14):
    g = torch.Generator().manual_seed(seed)
    x, past = torch.randn(3, length, 2, generator=g).double(), torch.randn(3, 3, 2, generator=g).double()
    valid = torch.rand(3, length, generator=g) > 0.4 if with_valid else torch.ones(3, length, dtype=torch.bool)
    reset = torch.rand(3, length, generator=g) > 0.8 if with_reset else torch.zeros(3, length, dtype=torch.bool)
    ctx = Context(valid=valid if with_valid else None, boundary=2 * reset.to(torch.int8) if with_reset else None)
    return x.masked_fill(~valid[..., None], 0), past, valid, reset, ctx


@pytest.mark.parametrize("with_valid", [False, True])
@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize(("seed", "length"), [(0, 14), (1, 14), (2, 1), (3, 2)])
def test_taps_are_the_valid_tokens_before_in_the_same_document(seed, length, with_valid, with_reset):
    x, past, valid, reset, ctx = case(seed, with_valid, with_reset, length)
    taps = Taps(x, past, ctx)
    for k in range(4):
        got = taps.scatter(taps.delayed(k))
        for row, t in valid.nonzero().tolist():
            assert torch.equal(got[row, t], past_of(x, past, valid, reset, row, t, k)), (row, t, k)
    for row in range(3):  # what is carried on: the last three tokens of the last document
        more = torch.cat([x, torch.zeros(3, 1, 2).double()], 1)
        still = [torch.cat([flags, flags.new_zeros(3, 1)], 1) for flags in (valid, reset)]
        for k in (1, 2, 3):
            assert torch.equal(taps.past[row, 3 - k], past_of(more, past, *still, row, length, k)), (row, k)


@pytest.mark.parametrize("bias", [False, True])
def test_short_convolution_is_the_sum_over_its_taps(bias):
    x, past, valid, reset, ctx = case(4, True, True)
    conv = ShortConvolution(2, 4, bias=bias).double()
    if bias:
        torch.nn.init.normal_(conv.bias)
    y, _ = conv(x, past, ctx)
    for row, t in valid.nonzero().tolist():
        total = sum(conv.weight[:, 3 - k] * past_of(x, past, valid, reset, row, t, k) for k in range(4))
        total = total + (conv.bias if bias else 0)
        assert (y[row, t] - total * torch.sigmoid(total)).abs().max() < 1e-14


def test_short_convolution_is_torchs_on_plain_tokens():
    conv = ShortConvolution(5, 3, activation=None).double()
    x = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0)).double()
    y, past = conv(x, conv.initial(2), Context())
    other = torch.nn.functional.conv1d(x.mT, conv.weight[:, None], padding=2, groups=5)[..., :9].mT
    assert (y - other).abs().max() < 1e-14
    assert torch.equal(past, x[:, -2:])


@pytest.mark.parametrize("length", [1, 14])
def test_parts_of_a_short_convolution_are_the_whole(length):
    x, past, _, _, ctx = case(5, True, True, length)
    conv = ShortConvolution(2, 4, bias=True).double()
    y, after = conv(x, past, ctx)
    parts, after_parts = conv.parts([x[..., :1], x[..., 1:]], past, ctx)
    assert torch.equal(torch.cat(parts, -1), y)
    assert torch.equal(after_parts, after)


def test_shift_mixes_are_between_a_token_and_the_one_before():
    x, past, valid, reset, ctx = case(6, True, True)
    shares = [torch.tensor([0.0, 0.25], dtype=torch.float64), torch.tensor([1.0, 0.5], dtype=torch.float64)]
    mixed, _ = shift_mixes(x, past[:, 2:], shares, ctx)
    for row, t in valid.nonzero().tolist():
        before = past_of(x, past[:, 2:], valid, reset, row, t, 1)
        for y, share in zip(mixed, shares):
            assert (y[row, t] - torch.lerp(x[row, t], before, share)).abs().max() < 1e-15


def test_shift_mixes_keep_the_dtype_of_their_past():
    x, past = torch.randn(1, 3, 2).bfloat16(), torch.zeros(1, 1, 2)
    (y,), after = shift_mixes(x, past, [torch.ones(2)], Context())
    assert torch.equal(y[:, 1:], x[:, :-1])
    assert not y[:, 0].any()
    assert (after.dtype, y.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(after, x[:, -1:].float())
