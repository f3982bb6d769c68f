"""StepMemory: a rule written token by token, run in blocks wherever it turns out to be affine in its state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from postformer.contract import state as states
from postformer.contract.context import Context, gates
from postformer.contract.mixer import Mixer, Out
from postformer.contract.state import State, mismatch
from postformer.kernels import affine, current, sequential
from postformer.kernels.affine import structure as affine_structure
from postformer.kernels.affine.structure import NotAffine

FROM = 32
"""Tokens from which blocks are faster than tokens one by one (measured: benchmarks/affine_step.py)."""
WIDEST, WIDEST_FORWARD, PER_TOKEN = 49152, 24576, 256
"""State values of a batch, times the runs over the tokens, up to which they are on a CPU: with gradients, without, and
for each token of the call. Beyond, a step is work enough by itself, and doing it three times takes longer."""
TRIAL = 11
"""Tokens of the trial run."""

Result = tuple[Tensor, State]


class StepMemory(Mixer):
    """A rule written token by token: the author writes `step`; the base does valid, boundary, write, emit, any T.

    `step(x [B, D], state) -> (y [B, D_out], state)`. A write gate between 0 and 1 interpolates the states; time that
    passes without a write (tick) is not separable from a step and is ignored.

    A step whose new state is affine in the old one (y may be any function) is recognised by trying, once for each class
    and design, and then runs in blocks side by side; `parallel` says in words which, or why not.
    """

    forget_at: str = "document"

    def step(self, x: Tensor, state: State) -> Result:
        raise NotImplementedError(f"{type(self).__name__} does not define step(x, state) -> (y, state)")

    def mix(self, x: Tensor, state: State, ctx: Context) -> Out:
        reset = ctx.reset(self.forget_at)
        given: dict[str, Any] = {
            "reset": reset, "initial": None if reset is None else self.initial(x.shape[0]),
            "write": gates(ctx)[1], "emit": ctx.emit,
        }
        found = self._in_blocks(x, state, given)
        y, state, *emitted = sequential(self._first_checked(), x, state, **given) if found is None else found
        return Out(y, state, emitted=emitted[0] if emitted else None)

    @property
    def parallel(self) -> str:
        """How many tokens at once are run: in blocks, and what its transition is; or token by token, and why."""
        found = self._recognised()
        if isinstance(found, str):
            return f"token by token: {found}"
        state = self.initial(1)
        return f"runs in blocks: {affine_structure.describe(found, state, names(state))}"

    def _in_blocks(self, x: Tensor, state: State, given: dict[str, Any]) -> Any:
        """What `sequential` would return, or None where blocks are not possible or do not pay."""
        backend = current().backend
        if backend == "reference" or x.shape[1] < (FROM if backend == "auto" else 4):
            return None
        values = sum(leaf.numel() for leaf in states.leaves(state))
        most = min(WIDEST if torch.is_grad_enabled() else WIDEST_FORWARD, PER_TOKEN * x.shape[1])
        limited = backend == "auto" and x.device.type == "cpu"
        if not values or (limited and 2 * values > most):
            return None
        plan = self._recognised(x.shape[-1])
        if isinstance(plan, str):
            return None
        leaves = states.leaves(state)
        if limited and (1 + plan.runs(leaves)) * values > most:
            return None
        parameters = read_by(self, x, state)
        if any(p._backward_hooks for p in parameters):  # they would be called twice: by the blocks, and by the caller
            return None
        result, gap = affine.in_blocks(self.step, plan, x, state, parameters=parameters, **given)
        if result is None and torch.isfinite(torch.tensor(gap)):
            self._known()[self._key()] = (
                f"a block ended {gap:.0e} times as far as rounding explains from where the next one was said to start")
        return result

    def _key(self) -> str:
        """What decides over the form of the step: the design, the sizes, the plain attributes; once for each mode."""
        mode = (self.training, torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"))
        keys = self.__dict__.setdefault("_keys", {})
        if mode not in keys:
            plain = {k: v for k, v in vars(self).items() if isinstance(v, (bool, int, float, str, tuple))}
            shapes = {k: tuple(v.shape) for k, v in (*self.named_parameters(), *self.named_buffers())}
            keys[mode] = repr((getattr(self, "design", None), plain, shapes, mode))
        return keys[mode]

    @classmethod
    def _known(cls) -> dict[str, affine.Plan | str]:
        if "_plans" not in cls.__dict__:
            cls._plans = {}
        return cls._plans

    def _recognised(self, width: int | None = None) -> affine.Plan | str:
        """The plan, or why there is none; found once. width: channels of x, where no site has told."""
        width = width or self.dim_in
        if width is None:
            return "no site has built it, so how many channels it takes shows in its first call"
        known, key = self._known(), self._key()
        if key not in known:
            try:
                known[key] = recognise(self, width)
            except NotAffine as e:
                known[key] = str(e)
        return known[key]

    def _first_checked(self) -> Callable[[Tensor, State], Result]:
        """The author's step; what the first one of a call returns is held against the contract."""
        name, checked = type(self).__name__, False

        def step(x: Tensor, state: State) -> Result:
            nonlocal checked
            if checked:
                return self.step(x, state)
            checked = True
            rows, leaves = x.shape[0], [x]
            if problem := mismatch(state, state, rows):
                raise ValueError(f"{name}.initial returned what cannot be a state: {problem}")
            leaves += states.leaves(state)
            before = [_version(leaf) for leaf in leaves]
            try:
                result = self.step(x, state)
            except TypeError as e:
                if state is not None:
                    raise
                raise TypeError(f"{name}.step was called with state None ({e}): define {name}.initial(batch) to "
                                "return the state before the first token") from e
            if before != [_version(leaf) for leaf in leaves]:
                raise ValueError(f"{name}.step changed its arguments in place (as h.mul_(a), h *= a or h[...] = v do); "
                                 "the caller may still need them: make a new tensor, h = a * h")
            if not isinstance(result, tuple) or len(result) != 2:
                raise TypeError(f"{name}.step must return (y [B, D_out], state), not {type(result).__name__}")
            y, new = result
            if not isinstance(y, Tensor) or y.ndim != 2 or y.shape[0] != rows:
                shape = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
                raise ValueError(f"{name}.step returned y of {shape} for {rows} rows; it must be [B, D_out]")
            if self.dim_out not in (None, y.shape[1]):
                raise ValueError(f"{name}.step returned y of {y.shape[1]} channels; here it must have {self.dim_out}: "
                                 "make the last map by site.linear(\"out\", ..., site.dim_out)")
            if problem := mismatch(new, state, rows):
                raise ValueError(f"{name}.step and {name}.initial disagree about the state: {problem}")
            return result

        return step


def _version(leaf: Tensor) -> int:
    """Counts the changes in place; tensors of inference mode do not."""
    return 0 if leaf.is_inference() else leaf._version


def names(state: State, at: str = "state") -> list[str]:
    """What an author calls each leaf: state, state[0], state['key'], state.field."""
    if isinstance(state, Tensor):
        return [at]
    if isinstance(state, dict):
        return [n for k, v in state.items() for n in names(v, f"{at}[{k!r}]")]
    if isinstance(state, (tuple, list)):
        fields = getattr(state, "_fields", None)
        return [n for i, v in enumerate(state) for n in names(v, f"{at}.{fields[i]}" if fields else f"{at}[{i}]")]
    return []


def recognise(memory: StepMemory, width: int, seed: int = 0) -> affine.Plan:
    """The plan by which a memory's step runs in blocks; NotAffine with the reason where it cannot.

    Tried on a copy in double precision whose parameters have been moved off their values, so that a gate which starts
    at zero hides nothing; a short run in blocks then has to equal the same run token by token, with all gradients. The
    memory itself and the random numbers of the caller are left alone. width: channels of x.
    """
    device = next((p.device for p in memory.parameters()), torch.device("cpu"))
    forked = [device] if device.type == "cuda" else []
    with torch.inference_mode(False), torch.random.fork_rng(forked), torch.autocast(device.type, enabled=False):
        try:
            trial, generator = _scrambled(memory, seed), torch.Generator().manual_seed(seed + 1)
            with torch.no_grad():
                state = states.map_state(_double, trial.initial(len(affine_structure.INPUTS)))
                plan = affine_structure.recognise(trial.step, state, width, generator, names(state))
            with torch.enable_grad():
                _tried(trial, plan, width, generator)
            return plan
        except NotAffine:
            raise
        except Exception as e:  # whatever stands in the author's class: the run token by token will tell
            raise NotAffine(f"trying it failed with {type(e).__name__}: {e}") from e


def _double(x: Tensor) -> Tensor:
    if x.is_complex():
        return x.to(torch.complex128)
    return x.double() if x.dtype.is_floating_point else x


def _scrambled(memory: StepMemory, seed: int) -> StepMemory:
    made = copy.deepcopy(memory)
    made._apply(_double)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in made.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
            p.add_(noise * (0.2 if p.ndim < 2 else 0.5 * p.shape[-1] ** -0.5))
    return made.requires_grad_()


def _tried(trial: StepMemory, plan: affine.Plan, width: int, generator: torch.Generator) -> None:
    """A short run both ways: outputs, final state, every gradient. NotAffine where they differ."""
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    device = next((leaf.device for leaf in states.leaves(trial.initial(1))), torch.device("cpu"))
    x = random(2, TRIAL, width).requires_grad_()
    start = trial.initial(2)
    state = states.map_state(
        lambda leaf: (_double(leaf.detach()) + random(*leaf.shape)).requires_grad_() if affine.smooth(leaf) else leaf,
        start)
    write = torch.rand(2, TRIAL, generator=generator, dtype=torch.float64).to(device)
    write[0, 3] = write[1, 6] = 0
    write[0, 1] = 1
    reset = torch.zeros(2, TRIAL, dtype=torch.bool, device=device)
    reset[0, 4] = reset[1, 0] = True
    inputs = [x, *(leaf for leaf in states.leaves(state) if affine.smooth(leaf)), *read_by(trial, x, state)]

    def functional(y: Tensor, after: State) -> Tensor:
        weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=device).view(y.shape)
        total = (y * weights).sum()
        for leaf in states.leaves(after):
            if affine.smooth(leaf):
                total = total + (leaf.real if leaf.is_complex() else leaf).square().sum()
        return total

    for gates_ in ({}, {"write": write.requires_grad_(), "reset": reset, "initial": trial.initial(2)}):
        given = [*inputs, *(v for v in gates_.values() if isinstance(v, Tensor) and v.requires_grad and v.is_leaf)]
        y, after = sequential(trial._first_checked(), x, state, **gates_)
        truth = torch.autograd.grad(functional(y, after), given, allow_unused=True, retain_graph=True)
        result, gap = affine.in_blocks(
            trial.step, plan, x, state, parameters=read_by(trial, x, state), block=3, **gates_)
        if result is None:
            raise NotAffine(f"in a trial run a block ended {gap:.0e} times as far as rounding explains from where the "
                            "next one was said to start")
        found = torch.autograd.grad(functional(*result), given, allow_unused=True, retain_graph=True)
        worst = max(_off(a, b) for a, b in (
            (result[0], y), *zip(states.leaves(result[1]), states.leaves(after)), *zip(found, truth)))
        if not worst <= 1e-9:
            raise NotAffine(f"in a trial run outputs, state or gradients differ by {worst:.0e} from token by token")


def _off(a: Tensor | None, b: Tensor | None) -> float:
    if a is None or b is None:
        other = b if a is None else a
        return 0.0 if other is None else other.detach().abs().amax().item()
    return (a - b).detach().abs().amax().item() / max(b.detach().abs().amax().item(), 1e-3) if a.numel() else 0.0


def read_by(memory: StepMemory, x: Tensor, state: State) -> list[Tensor]:
    """Every tensor a step's gradient reaches besides its arguments: the memory's parameters, and what others own."""
    found = {id(p): p for p in memory.parameters() if p.requires_grad}
    if torch.is_grad_enabled():
        with torch.enable_grad():
            y, after = memory.step(x[:1, 0].detach(), states.map_state(lambda leaf: leaf[:1].detach(), state))
        nodes = [t.grad_fn for t in (y, *states.leaves(after)) if t.grad_fn is not None]
        seen = set(nodes)
        while nodes:
            node = nodes.pop()
            if (leaf := getattr(node, "variable", None)) is not None:
                found[id(leaf)] = leaf
            for following, _ in node.next_functions:
                if following is not None and following not in seen:
                    seen.add(following)
                    nodes.append(following)
    return list(found.values())
