"""The diagonal + rank-one recurrence: chunks against tokens, extreme decays, documents, pieces, emitted states."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from postformer.kernels import gdr, native, use
from postformer.kernels.gdr import channel as gdr_channel
from postformer.kernels.gdr import head as gdr_head

torch.set_num_threads(1)
FAST = ["parallel"] + ["native"] * (native.native().library is not None)
FLAGS = list(itertools.product([False, True], repeat=2))
profile = settings(derandomize=True, deadline=None, max_examples=300, database=None)


def inputs(B=2, H=2, T=9, dk=4, dv=3, R=1, decay="head", family="delta", scale=1.0, dtype=torch.float64, seed=0,
           state=True, resets=False):  # fmt: skip
    """Random arguments of gdr by name; unit erase keys with rates in (0, 1), as a stable delta rule has them."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    args = {"q": draw(B, H, T, dk), "g": None}
    if decay != "none":
        args["g"] = -scale * draw(B, H, T, 1 if decay == "head" else dk).abs()
    if family != "add":
        e = draw(B, H, T * R, dk)
        args["e"] = e / e.norm(dim=-1, keepdim=True)
        args["w"] = args["e"] * torch.rand(B, H, T * R, 1, generator=rng, dtype=torch.float64).to(dtype)
    if family in ("delta", "both"):
        args["u"] = draw(B, H, T * R, dv)
    if family in ("add", "both"):
        args["k_add"], args["v_add"] = draw(B, H, T * R, dk), draw(B, H, T * R, dv)
    if state or family == "erase":
        args["state"] = draw(B, H, dk, dv)
    if resets:
        args["reset"] = torch.rand(B, T, generator=rng) < 0.2
    return args


def run(args, **options):
    """Outputs and the gradients of a random projection of them with respect to every floating argument."""
    args = {k: x.clone().requires_grad_() if x is not None and x.is_floating_point() else x for k, x in args.items()}
    outputs = gdr(**args, **options)
    rng = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=rng, dtype=torch.float64).to(x)).sum() for x in outputs)
    loss.backward()
    found = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    return found | {f"grad {k}": x.grad for k, x in args.items() if x is not None and x.requires_grad}


def assert_close(found, expected, relative, floor):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].shape == x.shape
        # A memory that was erased to nearly nothing keeps the rounding of what it was.
        error = (found[name] - x).norm() / x.norm().clamp_min(100 * floor if name.startswith("output") else floor)
        assert error <= relative, f"{name}: {error.item():.2e}"


@profile
@given(
    T=st.integers(1, 45),
    R=st.integers(1, 3),
    decay=st.sampled_from(["none", "head", "channel"]),
    family=st.sampled_from(["delta", "add", "both", "erase"]),
    scale=st.sampled_from([0.1, 5.0, 60.0]),
    flags=st.sampled_from(FLAGS),
    state=st.booleans(),
    resets=st.booleans(),
    chunk=st.sampled_from([1, 4, 16, 64]),
    emit=st.sampled_from([None, 1, 5, 8, 16, 100]),
    piece=st.sampled_from([None, 1, 512]),
    backend=st.sampled_from(FAST),
    seed=st.integers(0, 1000),
)
def test_chunks_equal_tokens(T, R, decay, family, scale, flags, state, resets, chunk, emit, piece, backend, seed):
    options = {"erase_before_decay": flags[0], "read_before_update": flags[1], "emit": emit}
    shape = dict(T=T, R=R, decay=decay, family=family, scale=scale, seed=seed, state=state, resets=resets)
    with pytest.MonkeyPatch.context() as patch:
        for module in (gdr_head, gdr_channel) if piece else ():  # a few chunks at a time, the last time fewer
            patch.setattr(module, "WORKING_SET", piece)
        for dtype, relative, floor in ((torch.float64, 1e-9, 1e-12), (torch.float32, 1e-5, 1e-2)):
            args = inputs(**shape, dtype=dtype)
            found = run(args, backend=backend, chunk=chunk, **options)
            assert_close(found, run(args, backend="reference", **options), relative, floor)


@pytest.mark.parametrize("decay", ["none", "head", "channel"])
@pytest.mark.parametrize("family", ["delta", "add", "both"])
@pytest.mark.parametrize("backend", FAST)
def test_gradients_by_finite_differences(decay, family, backend):
    args = inputs(B=1, H=1, T=6, dk=3, dv=2, R=2, decay=decay, family=family, seed=3, resets=True)
    names = [k for k, x in args.items() if x is not None and x.is_floating_point()]

    def call(*values):
        return gdr(**(args | dict(zip(names, values))), backend=backend, chunk=4, erase_before_decay=True)

    assert torch.autograd.gradcheck(call, [args[k].clone().requires_grad_() for k in names])


@pytest.mark.parametrize("value", [-60.0, -2000.0])
@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("zero", [False, True])
def test_extreme_decay_is_finite(value, decay, flags, zero):
    args = inputs(T=70, R=1, decay=decay, family="both", dtype=torch.float32, resets=True)
    args["g"] = torch.full_like(args["g"], value)
    if zero:
        args = {k: torch.zeros_like(x) if x.is_floating_point() and k != "g" else x for k, x in args.items()}
    for backend in (*FAST, "reference"):
        found = run(args, backend=backend, erase_before_decay=flags[0], read_before_update=flags[1])
        assert all(x.isfinite().all() for x in found.values())


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("decay", ["none", "head", "channel"])
@pytest.mark.parametrize("backend", [*FAST, "reference"])
@pytest.mark.parametrize("R", [1, 2])
def test_documents_are_separate(flags, decay, backend, R):
    first, T = 11, 37
    options = {"backend": backend, "chunk": 16, "erase_before_decay": flags[0], "read_before_update": flags[1]}
    args = inputs(T=T, R=R, decay=decay, family="both", seed=5)
    args["reset"] = torch.zeros(2, T, dtype=torch.bool)
    args["reset"][:, first] = True
    leaves = {k: x.clone().requires_grad_() for k, x in args.items() if x is not None and x.is_floating_point()}
    o, S = gdr(**(args | leaves), **options)
    (o[:, :, first:].sum() + S.sum()).backward()
    for name, x in leaves.items():
        rows = first * (R if x.shape[2] == R * T and name not in "qg" else 1)
        before = x.grad if name == "state" else x.grad[:, :, :rows]
        assert (before == 0).all(), name

    # Another first document leaves the second one's outputs bit for bit as they were.
    other = inputs(T=T, R=R, decay=decay, family="both", seed=6)
    mixed = dict(args)
    for name, x in args.items():
        if x is not None and x.is_floating_point():
            rows = T if name == "state" else first * (x.shape[2] // T)
            mixed[name] = other[name] if name == "state" else torch.cat([other[name][:, :, :rows], x[:, :, rows:]], 2)
    o2, S2 = gdr(**mixed, **options)
    assert torch.equal(o2[:, :, first:], o[:, :, first:])
    assert torch.equal(S2, S)

    # And they are the outputs of the document on its own.
    alone = {k: x[:, :, first * (x.shape[2] // T) :] for k, x in args.items() if k in leaves and k != "state"}
    o3, S3 = gdr(**({"g": None} | alone), **options)
    torch.testing.assert_close(o3, o[:, :, first:], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(S3, S, rtol=1e-10, atol=1e-12)


@profile
@given(
    cuts=st.lists(st.integers(1, 39), min_size=1, max_size=3, unique=True),
    decay=st.sampled_from(["none", "head", "channel"]),
    flags=st.sampled_from(FLAGS),
    R=st.integers(1, 2),
    backend=st.sampled_from(FAST),
)
def test_pieces_equal_whole(cuts, decay, flags, R, backend):
    T, options = 40, {"backend": backend, "erase_before_decay": flags[0], "read_before_update": flags[1]}
    args = inputs(T=T, R=R, decay=decay, family="both", resets=True)
    whole, S = gdr(**args, **options)
    state, reset, parts = args.pop("state"), args.pop("reset"), []
    edges = [0, *sorted(cuts), T]
    for a, b in itertools.pairwise(edges):
        rows = {k: x.shape[2] // T for k, x in args.items() if x is not None}
        cut = {k: x if x is None else x[:, :, a * rows[k] : b * rows[k]] for k, x in args.items()}
        o, state = gdr(**cut, state=state, reset=reset[:, a:b], **options)
        parts.append(o)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(state, S, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("backend", FAST)
def test_identity_tokens_change_nothing(decay, backend):
    args = inputs(T=20, decay=decay, family="both")
    for name in ("g", "w", "k_add"):
        args[name][:, :, 7:12] = 0
    _, with_idle = gdr(**args, backend=backend)
    keep = [t for t in range(20) if not 7 <= t < 12]
    _, S = gdr(**{k: x if k == "state" else x[:, :, keep] for k, x in args.items()}, backend=backend)
    torch.testing.assert_close(with_idle, S, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", FAST)
def test_emitted_states_are_those_of_prefixes(backend):
    args = inputs(T=23, family="both", resets=True)
    for n in (1, 4, 7, 16, 50):
        *_, emitted = gdr(**args, emit=n, backend=backend)
        assert emitted.shape == (2, -(-23 // n), 2, 4, 3)
        torch.testing.assert_close(emitted[:, 0], args["state"])
        for i in range(1, emitted.shape[1]):
            t = i * n
            prefix = {k: x if k == "state" else x[:, :t] if k == "reset" else x[:, :, :t] for k, x in args.items()}
            torch.testing.assert_close(emitted[:, i], gdr(**prefix)[1], rtol=1e-10, atol=1e-11)


def test_setting_overrides_auto_only_and_scales_decay():
    args = inputs(T=30, scale=0.1)
    with FlopCounterMode(display=False) as counter, use(backend="reference"):
        gdr(**args)
    assert counter.get_total_flops() == 2 * 2 * 30 * 3 * (2 * 4 * 3)  # B, H, T; probe, outer product, read
    with use(backend="reference"):
        torch.testing.assert_close(gdr(**args, backend="parallel")[0], gdr(**args)[0])
    scaled, _ = gdr(**(args | {"g": 60 * args["g"]}))
    with use(decay_scale=60.0):
        torch.testing.assert_close(gdr(**args)[0], scaled)
    with pytest.raises(ValueError, match="does not exist"), use(backend="fast"):
        pass


def test_low_precision_and_autocast_keep_a_float32_state():
    args = inputs(T=20, dtype=torch.float32)
    want, _ = gdr(**args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same, S = gdr(**args)
    assert torch.equal(same, want)
    half = {k: x.bfloat16() if k not in ("g", "state") else x for k, x in args.items()}
    o, S = gdr(**half)
    assert o.dtype == torch.bfloat16
    assert S.dtype == torch.float32
    assert (o.float() - want).norm() < 0.02 * want.norm()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("layout", ["tokens first", "channels last", "broadcast"])
def test_strided_inputs(backend, layout):
    args = inputs(T=40, R=2, decay="channel")
    if layout == "tokens first":
        strided = {k: x.transpose(1, 2).contiguous().transpose(1, 2) for k, x in args.items()}
    elif layout == "channels last":
        strided = {k: x.mT.contiguous().mT for k, x in args.items()}
    else:
        strided = {k: x[:, :1].expand(x.shape) for k, x in args.items()}
        args = {k: x.contiguous() for k, x in strided.items()}
    torch.testing.assert_close(run(strided, backend=backend), run(args, backend=backend))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"e": None}, "w and e come together"),
        ({"w": None, "e": None}, "nothing is ever written"),
        ({"w": None, "e": None, "k_add": torch.zeros(2, 2, 9, 4)}, "u is the target"),
        ({"k_add": torch.zeros(2, 2, 9, 4)}, "k_add and v_add come together"),
        ({"g": torch.zeros(2, 2, 9, 3)}, "per channel"),
        ({"g": torch.zeros(2, 2, 9, 1, dtype=torch.bfloat16)}, "too coarse"),
        ({"w": torch.zeros(2, 2, 10, 4)}, r"R\*T"),
        ({"u": torch.zeros(2, 2, 18, 3)}, "like the other writes"),
        ({"state": torch.zeros(2, 2, 3, 4)}, "state has shape"),
        ({"reset": torch.zeros(2, 9)}, "give bool"),
        ({"chunk": 48}, "power of two"),
        ({"emit": 0}, "emit=0"),
        ({"backend": "fast"}, "does not exist"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        gdr(**(inputs() | change))
