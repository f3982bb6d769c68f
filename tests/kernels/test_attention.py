"""Attention: both forms against an explicit softmax, bands against masks, queries that see nothing, FLOP counts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from postformer.kernels import attention, use

torch.set_num_threads(1)
profile = settings(derandomize=True, deadline=None, max_examples=200, database=None)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def explicit(q, k, v, scale=None, causal=True, window=None, key_position=None, query_position=None, key_segment=None,
             query_segment=None, key_valid=None, key_bias=None, always=0):  # fmt: skip
    """Softmax over a written-out mask, pair by pair."""
    (B, Hq, T, d), S = q.shape, k.shape[2]
    k, v = (x.repeat_interleave(Hq // k.shape[1], 1) for x in (k, v))
    seen = torch.zeros(B, T, S, dtype=torch.bool)
    for b in range(B):
        for t in range(T):
            for s in range(S):
                age = (t + S - T if query_position is None else query_position[b, t]) - (
                    s if key_position is None else key_position[b, s]
                )
                ok = ((age >= 0 and s <= t + S - T) or not causal) and (window is None or abs(age) < window)
                ok = ok and (key_segment is None or bool(query_segment[b, t] == key_segment[b, s]))
                seen[b, t, s] = (ok or s < always) and (key_valid is None or bool(key_valid[b, s]))
    logits = q @ k.mT * (d**-0.5 if scale is None else scale)
    if key_bias is not None:
        logits = logits + key_bias[:, None, None]
    weights = logits.masked_fill(~seen[:, None], -1e300).softmax(-1) * seen[:, None]
    return weights @ v


@profile
@given(
    T=st.integers(1, 12),
    past=st.sampled_from([0, 0, 1, 5]),
    groups=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    causal=st.booleans(),
    window=st.sampled_from([None, 1, 3, 8]),
    always=st.sampled_from([0, 0, 1, 4]),
    masks=st.sets(st.sampled_from(["position", "segment", "valid", "bias", "scale"])),
)
def test_both_forms_equal_explicit_softmax(T, past, groups, causal, window, always, masks):
    past += always
    (Hq, Hk), S, rng = groups, T + past, torch.Generator().manual_seed(T)
    q, k, v = draw(2, Hq, T, 4), draw(2, Hk, S, 4, seed=1), draw(2, Hk, S, 3, seed=2)
    options = {"causal": causal, "window": window, "always": always}
    if "position" in masks:
        position = torch.randint(0, 9, (2, S), generator=rng)
        options |= {"key_position": position, "query_position": position[:, past:]}
    if "segment" in masks:
        segment = (torch.rand(2, S, generator=rng) < 0.3).cumsum(1)
        options |= {"key_segment": segment, "query_segment": segment[:, past:]}
    if "valid" in masks:
        options["key_valid"] = torch.rand(2, S, generator=rng) < 0.5
    if "bias" in masks:
        options["key_bias"] = draw(2, S, seed=3)
    if "scale" in masks:
        options["scale"] = 0.3
    found = []
    for form in (explicit, lambda *z, **o: attention(*z, **o, backend="reference"), attention):
        args = [x.clone().requires_grad_() for x in (q, k, v)]
        o = form(*args, **options)
        o.pow(2).sum().backward()
        found.append([o.detach(), *(x.grad for x in args)])
    for other in found[1:]:
        for x, y in zip(other, found[0]):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("T", "window"), [(150, 3), (150, 70), (64, 64), (129, 64), (70, 200), (200, 100)])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
@pytest.mark.parametrize("always", [0, 3])
def test_banded_equals_masked(T, window, heads, always):
    S = T + always
    q, k, v = draw(2, heads[0], T, 4), draw(2, heads[1], S, 4, seed=1), draw(2, heads[1], S, 4, seed=2)
    found = []
    for masks in ({}, {"key_valid": torch.ones(2, S, dtype=torch.bool)}):
        args = [x.clone().requires_grad_() for x in (q, k, v)]
        o = attention(*args, window=window, always=always, **masks)
        o.pow(2).sum().backward()
        found.append([o.detach(), *(x.grad for x in args)])
    for x, y in zip(*found):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "parallel"])
@pytest.mark.parametrize("hide", ["valid", "bias"])
def test_a_query_that_sees_nothing_reads_zero(backend, hide):
    q, k, v = (draw(1, 2, 4, 4, seed=i, dtype=torch.float32).requires_grad_() for i in range(3))
    if hide == "valid":
        mask = {"key_valid": torch.tensor([[False, False, True, True]])}
    else:
        mask = {"key_bias": torch.tensor([[float("-inf"), float("-inf"), 0.0, -1.0]])}
    o = attention(q, k, v, **mask, backend=backend)
    assert (o[:, :, :2] == 0).all()
    o.sum().backward()
    for x in (q, k, v):
        assert x.grad.isfinite().all()
    assert (v.grad[:, :, :2] == 0).all()


def test_steps_equal_whole():
    q, k, v = (draw(2, 2, 20, 4, seed=i) for i in range(3))
    for window in (None, 5):
        whole = attention(q, k, v, window=window)
        for t in (0, 3, 19):
            step = attention(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], window=window)
            torch.testing.assert_close(step, whole[:, :, t : t + 1])
        torch.testing.assert_close(attention(q[:, :, 7:], k, v, window=window), whole[:, :, 7:])


@pytest.mark.parametrize("S", [3, 9])
def test_a_list_that_holds_other_tokens_is_seen_by_position_alone(S):
    """S less or more than T = 5, queries in no order, one of which sees nothing."""
    q, k, v = draw(2, 4, 5, 4), draw(2, 2, S, 4, seed=1), draw(2, 2, S, 3, seed=2)
    rng = torch.Generator().manual_seed(S)
    keys, queries = (torch.randint(0, 9, (2, n), generator=rng) for n in (S, 5))
    queries[0, 2] = -1
    seen = queries[:, :, None] >= keys[:, None, :]
    logits = (q @ k.repeat_interleave(2, 1).mT / 2).masked_fill(~seen[:, None], -1e300)
    expected = (logits.softmax(-1) * seen[:, None]) @ v.repeat_interleave(2, 1)
    for backend in ("auto", "reference"):
        found = attention(q, k, v, key_position=keys, query_position=queries, own=False, backend=backend)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    with pytest.raises(ValueError, match="own=False needs key_position and query_position"):
        attention(q, k, v, key_position=keys, own=False)


def test_reference_counts_visible_keys_only():
    q, k, v = (draw(2, 4, 10, 8, seed=i) for i in range(3))
    with FlopCounterMode(display=False) as counter, use(backend="reference"):
        attention(q, k[:, :2], v[:, :2], window=3)
    assert counter.get_total_flops() == 2 * 4 * (1 + 2 + 8 * 3) * (2 * 8 + 2 * 8)


def test_wrong_arguments_are_named():
    q, k, v = (draw(1, 3, 4, 8, seed=i) for i in range(3))
    with pytest.raises(ValueError, match="divide"):
        attention(q, k[:, :2], v[:, :2])
    with pytest.raises(ValueError, match="3 keys for 4 queries"):
        attention(q, k[:, :, :3], v[:, :, :3])
    with pytest.raises(ValueError, match="4 keys for 4 queries and always=1"):
        attention(q, k, v, always=1)
    with pytest.raises(ValueError, match="window=0"):
        attention(q, k, v, window=0)
    with pytest.raises(ValueError, match="come together"):
        attention(q, k, v, key_segment=torch.zeros(1, 4))
    with pytest.raises(ValueError, match="key_valid has shape"):
        attention(q, k, v, key_valid=torch.ones(4, dtype=torch.bool))
