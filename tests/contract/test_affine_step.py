"""A step that is affine in its state runs in blocks and equals its own token-by-token run; any other is left alone."""

import importlib.util
import pickle
import sys
from pathlib import Path

import pytest
import torch

from postformer.contract import state as states
from postformer.contract.context import Context
from postformer.contract.step import FROM
from postformer.kernels import affine, sequential, use

spec = importlib.util.spec_from_file_location("step_rules", Path(__file__).with_name("step_rules.py"))
rules = importlib.util.module_from_spec(spec)
sys.modules["step_rules"] = rules
spec.loader.exec_module(rules)

torch.set_num_threads(1)
T = 83


def made(cls, *args, seed=0, dtype=torch.float64, **sizes):
    torch.manual_seed(seed)
    memory = cls(*args, **sizes).to(dtype)
    memory.design = None
    return memory


def tokens(memory, batch=2, length=T, seed=3):
    dtype = next(memory.parameters()).dtype
    return torch.randn(batch, length, memory.dim_in, generator=torch.Generator().manual_seed(seed),
                       dtype=torch.float64).to(dtype)


def smooth(state):
    return [leaf for leaf in states.leaves(state) if affine.smooth(leaf)]


def everything(memory, backend, ctx=None, length=T, state=None, x=None):
    """Outputs, final and emitted states, and the gradients of a functional of them all, by name."""
    x = (tokens(memory, length=length) if x is None else x).clone().requires_grad_()
    start = memory.initial(2) if state is None else state
    start = states.map_state(lambda s: (s.detach() + (0.3 if affine.smooth(s) else 2)), start)
    for leaf in smooth(start):
        leaf.requires_grad_()
    write = None if ctx is None else ctx.write
    if write is not None:
        ctx = ctx.replace(write=write.clone().requires_grad_())
    with use(backend=backend):
        out = memory(x, start, ctx)
    generator = torch.Generator().manual_seed(9)
    total = torch.zeros((), dtype=torch.float64)
    for leaf in (out.y, *smooth(out.state), *smooth(out.emitted)):
        leaf = torch.view_as_real(leaf) if leaf.is_complex() else leaf
        weight = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        total = total + (leaf.double() * weight).sum() + (leaf.double() ** 2).sum() * 0.1
    inputs = {"x": x, **dict(memory.named_parameters()), **{f"state {i}": s for i, s in enumerate(smooth(start))}}
    if write is not None:
        inputs["write"] = ctx.write
    grads = torch.autograd.grad(total, list(inputs.values()), allow_unused=True)
    values = {"y": out.y, **{f"final {i}": s for i, s in enumerate(states.leaves(out.state))},
              **{f"emitted {i}": s for i, s in enumerate(states.leaves(out.emitted))}}
    return {**{k: v.detach() for k, v in values.items()}, **{f"gradient of {k}": g for k, g in zip(inputs, grads)}}


def assert_same(found, truth, tolerance=1e-9):
    assert found.keys() == truth.keys()
    for name, b in truth.items():
        a = found[name]
        if a is None or b is None:
            assert all(v is None or not v.any() for v in (a, b)), name
            continue
        assert a.dtype == b.dtype, name
        assert a.shape == b.shape, name
        assert (a - b).abs().max() <= tolerance * max(b.abs().max().item(), 1e-3), name


def contexts():
    generator = torch.Generator().manual_seed(4)
    write = torch.rand(2, T, generator=generator, dtype=torch.float64)
    write[:, ::7], write[:, 3::7] = 0, 1
    boundary = torch.zeros(2, T, dtype=torch.int8)
    boundary[0, 5], boundary[0, 40], boundary[1, 0], boundary[1, 82] = 2, 2, 2, 2
    valid = torch.rand(2, T, generator=generator) > 0.3
    valid[1, 50:] = False
    return {"plain": None, "write": Context(write=write), "boundary": Context(boundary=boundary),
            "valid": Context(valid=valid), "emit": Context(emit=10), "one emitted": Context(emit=100),
            "all": Context(write=write, boundary=boundary, valid=valid, emit=7)}


@pytest.fixture
def in_blocks(monkeypatch):
    """How often blocks were really run, and what they found."""
    calls = []
    real = affine.in_blocks

    def counted(*args, **kwargs):
        found = real(*args, **kwargs)
        calls.append(found[1])
        return found

    monkeypatch.setattr(affine, "in_blocks", counted)
    return calls


@pytest.mark.parametrize("gates", contexts())
@pytest.mark.parametrize("rule", rules.AFFINE, ids=lambda c: c.__name__)
def test_blocks_equal_tokens_with_every_gradient(rule, gates, in_blocks):
    memory, ctx = made(rule), contexts()[gates]
    assert memory.parallel.startswith("runs in blocks: "), memory.parallel
    in_blocks.clear()
    found = everything(memory, "auto", ctx)
    assert len(in_blocks) == 1
    assert in_blocks[0] <= 1
    assert_same(found, everything(memory, "reference", ctx))
    assert len(in_blocks) == 1


@pytest.mark.parametrize(("rule", "words"), [
    (rules.GatedDelta, "state [2, 4, 6]: a 4x4 map of axis 1, 2 of them, the same for 6 columns"),
    (rules.GatedLinear, "state [2, 4, 6]: diagonal, 8 factors"),
    (rules.Rwkv7, "state.before [12]: made from the token alone; state.memory [2, 4, 6]: a 4x4 map of axis 1"),
    (rules.Odd, "state['first'] [2, 4, 6] with state['second'] [2, 4, 6]: a 8x8 map of these leaves together, 2 of"),
    (rules.Odd, "state['seen'] []: a counter"),
    (rules.Mixing, "state [2, 4, 6]: a 24x24 map of all of it, 2 of them"),
    (rules.Right, "state [2, 4, 6]: a 6x6 map of axis 2, the same for 8 columns"),
    (rules.Turning, "state [8]: diagonal, 8 factors"),
    (rules.Window, "state[0] [3, 12]: a 3x3 map of axis 0, the same for 12 columns; state[1][0] [5]: a 5x5 map of all"),
])
def test_the_form_is_found(rule, words):
    assert words in made(rule).parallel


@pytest.mark.parametrize(("fault", "reason"), [
    ("small tanh", "state is not affine (superposition off by"),
    ("tiny tanh", "state is not affine (superposition off by"),
    ("hidden by a zero", "state is not affine (superposition off by"),
    ("clamp", "at states of size 100"),
    ("clamp of the row", "at states of size 10000"),
    ("normalised", "not affine"),
    ("where", "not affine"),
    ("rounded", "not affine"),
    ("single", "computes in float32 where its state is float64"),
    ("noise", "draws random numbers"),
    ("memory of its own", "keeps something outside its state"),
    ("company", "depends on the other rows of the batch"),
    ("in place", "changes its state in place"),
    ("own gradient", "gradients differ"),
])
def test_what_is_not_affine_runs_token_by_token_and_says_why(fault, reason, in_blocks):
    memory = made(rules.Spoilt, fault)
    assert memory.parallel.startswith("token by token: ")
    assert reason in memory.parallel
    in_blocks.clear()
    memory.initial = lambda batch, condition=None: memory.start.detach().repeat(batch, 1, 1, 1)
    with torch.no_grad():
        if fault == "in place":
            with pytest.raises(ValueError, match=r"changed its arguments in place .* make a new tensor"):
                memory(tokens(memory))
        else:
            memory(tokens(memory))
    assert not in_blocks


def test_a_departure_that_no_trial_saw_is_seen_by_the_call(in_blocks):
    memory = made(rules.Spoilt, "far away")
    assert memory.parallel.startswith("runs in blocks")
    assert_same(everything(memory, "auto"), everything(memory, "reference"))
    assert len(in_blocks) > 0
    in_blocks.clear()
    far = states.map_state(lambda s: s.detach() + 1e12, memory.initial(2))
    assert_same(everything(memory, "auto", state=far), everything(memory, "reference", state=far))
    assert in_blocks[0] > 1
    assert "token by token: a block ended" in memory.parallel
    everything(memory, "auto")
    assert len(in_blocks) == 1


def test_values_that_are_not_finite_are_the_tokens_own():
    memory = made(rules.GatedDelta, seed=8)
    x = tokens(memory)
    x[0, 30] = torch.nan
    with torch.no_grad():
        y = memory(x).y
        with use(backend="reference"):
            truth = memory(x).y
    assert torch.equal(y.isnan(), truth.isnan())
    torch.testing.assert_close(y[1], truth[1], rtol=1e-9, atol=1e-12)
    assert memory.parallel.startswith("runs in blocks")


def test_a_transition_that_costs_more_than_it_saves_is_left_alone():
    memory = made(rules.Mixing, heads=1, dk=12, dv=12)
    assert memory.parallel == ("token by token: state is affine, but its transition is 144x144, the same for 1 columns "
                               "only: 144 runs over the tokens to find it, more than 64")


@pytest.mark.parametrize("rule", [rules.GatedDelta, rules.Rwkv7, rules.Odd], ids=lambda c: c.__name__)
def test_single_precision(rule):
    memory = made(rule)
    x = tokens(memory, length=300)
    with torch.no_grad():
        with use(backend="reference"):
            truth = memory(x).y
        memory.float()
        # An angle of 1e4 is known to 1e-3 in single precision, however it is computed.
        for size in (1.0,) if rule is rules.Odd else (1.0, 1e4):
            with use(backend="reference"):
                plain = memory(x.float() * size).y
            found = memory(x.float() * size).y
            assert torch.isfinite(found).all()
            assert (found - plain).abs().max() <= 2e-5 * plain.abs().max()
        assert (memory(x.float()).y - truth).abs().max() <= 1e-5 * truth.abs().max()


def test_a_growing_state_is_right():
    """Every token makes the state 3 % larger: 20,000 times in the end."""
    memory = made(rules.GatedLinear)
    memory.forgets = lambda x: torch.full((x.shape[0], rules.HEADS, rules.DK, 1), 1.03, dtype=x.dtype)
    with use(backend="parallel"):
        found = everything(memory, "auto", length=331)
    assert_same(found, everything(memory, "reference", length=331))


def test_trying_changes_nothing():
    memory = made(rules.Odd)
    before = {k: v.clone() for k, v in memory.state_dict().items()}
    torch.manual_seed(5)
    rng = torch.get_rng_state()
    assert memory.parallel.startswith("runs in blocks")
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(v, before[k]) for k, v in memory.state_dict().items())
    assert all(p.grad is None for p in memory.parameters())


def test_tried_once_for_each_class_and_design(monkeypatch):
    class Fresh(rules.GatedDelta):
        pass

    from postformer.contract import step

    tried = []
    real = step.recognise
    monkeypatch.setattr(step, "recognise", lambda *args: tried.append(args) or real(*args))
    for _ in range(3):
        memory = made(Fresh)
        memory(tokens(memory))
    assert len(tried) == 1
    memory = made(Fresh, heads=3)
    memory(tokens(memory))
    assert len(tried) == 2
    pickle.dumps(memory.parallel)


def test_short_calls_never_try():
    class Short(rules.GatedDelta):
        pass

    memory = made(Short)
    memory(tokens(memory, length=FROM - 1))
    assert not Short._known()


def test_under_inference_mode_and_checkpointing():
    from torch.utils.checkpoint import checkpoint

    class Cold(rules.Rwkv7):
        pass

    memory = made(Cold)
    x = tokens(memory)
    with torch.inference_mode():
        y = memory(x).y
    assert memory.parallel.startswith("runs in blocks")
    with use(backend="reference"):
        torch.testing.assert_close(memory(x).y, y.clone(), rtol=1e-9, atol=1e-12)
    grads = []
    for wrap in (False, True):
        memory.zero_grad()
        y = checkpoint(lambda x: memory(x).y, x, use_reentrant=False) if wrap else memory(x).y
        y.square().sum().backward()
        grads.append([p.grad.clone() for p in memory.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_memory_for_gradients_is_the_states_at_block_starts():
    """Token by token keeps every operation's values of every token; blocks keep a state and a transition a block."""
    memory = made(rules.GatedDelta, dk=16, dv=16)
    x, words = tokens(memory, length=256), memory.parallel
    assert words.startswith("runs in blocks")
    kept = {}
    for backend in ("reference", "auto"):
        sizes = {}

        def pack(t, sizes=sizes):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), use(backend=backend):
            memory(x).y.sum()
        kept[backend] = sum(sizes.values())
    assert kept["auto"] < kept["reference"] / 10


def test_a_parameter_that_others_own_gets_its_gradient():
    class Tied(rules.GatedLinear):
        def __init__(self):
            super().__init__()
            self.owner = [torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64))]

        def step(self, x, S):
            y, S = super().step(x, S * self.owner[0])
            return y, S

    memory = made(Tied)
    assert memory.parallel.startswith("runs in blocks")
    found = []
    for backend in ("auto", "reference"):
        with use(backend=backend):
            y = memory(tokens(memory)).y
        found.append(torch.autograd.grad(y.square().sum(), memory.owner[0])[0])
    torch.testing.assert_close(*found, rtol=1e-10, atol=0)


def test_hooks_of_a_parameter_are_called_once():
    memory, calls, found = made(rules.GatedLinear), [], []
    assert memory.parallel.startswith("runs in blocks")
    for hooked in (False, True):
        if hooked:
            memory.v.weight.register_hook(lambda g: calls.append(1) or 3 * g)
        y = memory(tokens(memory)).y
        found.append(torch.autograd.grad(y.square().sum(), memory.v.weight)[0])
    assert calls == [1]
    torch.testing.assert_close(found[1], 3 * found[0], rtol=1e-9, atol=1e-9)


def test_a_weight_made_before_the_call_serves_several_calls(in_blocks):
    """As under parametrize.cached(): what is made of parameters once has one graph, which every call needs."""
    class Made(rules.GatedLinear):
        ready = None

        def step(self, x, S):
            y, S = super().step(x, S)
            return y * (self.start[0, 0, 0].tanh() if self.ready is None else self.ready[0]), S

    memory, found = made(Made), []
    assert memory.parallel.startswith("runs in blocks")
    for backend in ("auto", "reference"):
        memory.ready = [memory.start[0, 0, 0].tanh()]
        with use(backend=backend):
            first = memory(tokens(memory))
            y = memory(first.y, first.state).y
        found.append(torch.autograd.grad(y.square().sum(), memory.start)[0])
    assert len(in_blocks) >= 2
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_a_gradient_after_the_parameters_have_moved_is_refused():
    memory = made(rules.GatedLinear)
    y = memory(tokens(memory)).y
    with torch.no_grad():
        memory.v.weight.add_(1)
    with pytest.raises(RuntimeError, match="before the optimiser's step"):
        y.sum().backward()


def test_settings_of_the_call_hold_in_its_backward_pass():
    from postformer.kernels import current

    class Reads(rules.GatedLinear):
        def forgets(self, x):
            return super().forgets(x) ** current().decay_scale

    memory, found = made(Reads), []
    x = tokens(memory)
    for backend in ("auto", "reference"):
        with use(backend=backend, decay_scale=0.3):
            y = memory(x).y
        found.append(torch.autograd.grad(y.square().sum(), memory.decay.weight)[0])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_one_block_is_refused():
    memory = made(rules.GatedLinear)
    plan = memory._recognised()
    with pytest.raises(ValueError, match="one block of 4; give a smaller block or use `sequential`"):
        affine.in_blocks(memory.step, plan, tokens(memory, length=4), memory.initial(2), block=4)
    for block in (1, 2, 3):
        y, gap = affine.in_blocks(memory.step, plan, tokens(memory, length=4), memory.initial(2), block=block)
        assert gap <= 1
        torch.testing.assert_close(y[0], sequential(memory.step, tokens(memory, length=4), memory.initial(2))[0])
