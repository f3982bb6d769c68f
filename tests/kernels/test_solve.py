"""Second-order memories: chunks and scans against the filter's equations, regressions, splits, documents, gradients."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from postformer.kernels import gdr, kalman_gains, precision, ridge_solve, use

torch.set_num_threads(1)
profile = settings(derandomize=True, deadline=None, max_examples=60, database=None)
B, H, DK = 2, 2, 6


def source(seed=0, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape, positive=False):
        made = torch.rand if positive else torch.randn
        return made(*shape, generator=rng, dtype=torch.float64).to(dtype)

    return draw, rng


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def kalman_args(T, scale=1.0, seed=0, gates=True, dtype=torch.float64, p_0=1.5):
    draw, rng = source(seed, dtype)
    factor = -scale * draw(B, H, T, positive=True)
    held = unit(draw(B, H, DK, DK))
    args = {"k": unit(draw(B, H, T, DK)), "r": 0.01 + draw(B, H, T, positive=True), "state": held @ held.mT / 4,
            "start": 0.5 + draw(H, positive=True), "factor": factor, "drift": -torch.expm1(factor) * p_0,
            "query": draw(B, H, T, DK)}
    if gates:
        args["write"] = draw(B, H, T, positive=True) * (draw(B, H, T, positive=True) > 0.2)
        args["reset"] = torch.rand(B, T, generator=rng) < 0.1
    return args


def precision_args(T, scale=1.0, seed=0, dtype=torch.float64):
    draw, rng = source(seed, dtype)
    factor = -scale * draw(B, H, T, DK, positive=True)
    return {"phi": draw(B, H, T, DK, positive=True), "state": 0.1 + draw(B, H, DK, positive=True),
            "start": 0.5 + draw(H, positive=True), "factor": factor,
            "drift": -torch.expm1(factor).amax(-1, keepdim=True), "reset": torch.rand(B, T, generator=rng) < 0.1}


def ridge_args(T, scale=1.0, seed=0, dtype=torch.float64, ratio=0.05):
    draw, rng = source(seed, dtype)
    k = unit(draw(B, H, T, DK))
    held = unit(draw(B, H, DK, DK))
    return {"q": draw(B, H, T, DK), "k": k, "beta": draw(B, H, T, 1, positive=True),
            "g": -scale * draw(B, H, T, 1, positive=True), "ridge": 0.25 + draw(B, H, T, DK, positive=True),
            "ratio": torch.full((H, 1, 1), ratio, dtype=dtype), "state": held @ held.mT,
            "reset": torch.rand(B, T, generator=rng) < 0.1}


def solve(*, k, beta, **rest):
    return ridge_solve(k=k, w=beta * k, **rest)


def run(function, args, **options):
    """Outputs and the gradients of a random projection of them."""
    leaves = {n: x.clone().requires_grad_() if x.is_floating_point() else x for n, x in args.items()}
    outputs = [x for x in function(**leaves, **options) if x is not None]
    rng = torch.Generator().manual_seed(1)
    sum((x * torch.randn(x.shape, generator=rng, dtype=torch.float64).to(x)).sum() for x in outputs).backward()
    found = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    return found | {f"grad {n}": x.grad for n, x in leaves.items() if x.is_floating_point()}


def assert_close(found, expected, relative):
    assert found.keys() == expected.keys()
    largest = max(x.abs().max().item() for n, x in expected.items() if n.startswith("grad"))
    for name, x in expected.items():
        floor = 1e-6 * largest if name.startswith("grad") else 1e-3
        error = (found[name] - x).abs().max() / x.abs().max().clamp_min(floor)
        assert error <= relative, f"{name}: {error.item():.2e}"


FORMS = {
    "kalman": (kalman_gains, kalman_args, {}),
    "precision": (precision, precision_args, {}),
    "conjugate-gradient": (solve, ridge_args, {"solver": "conjugate-gradient", "iterations": 12}),
    "few steps": (solve, ridge_args, {"solver": "conjugate-gradient", "iterations": 3}),
    "chebyshev": (solve, ridge_args, {"solver": "chebyshev", "iterations": 12}),
}


@profile
@given(form=st.sampled_from(list(FORMS)), T=st.integers(1, 50), scale=st.sampled_from([0.1, 5.0, 60.0]),
       chunk=st.sampled_from([1, 4, 16, 64]), seed=st.integers(0, 1000))
def test_parallel_equals_token_by_token(form, T, scale, chunk, seed):
    function, make, options = FORMS[form]
    knob = {} if form == "precision" else {"chunk": chunk}
    for dtype, relative in ((torch.float64, 1e-9), (torch.float32, 2e-4)):
        args = make(T, scale, seed, dtype=dtype)
        found = run(function, args, backend="parallel", **options, **knob)
        assert_close(found, run(function, args, backend="reference", **options), relative)


@pytest.mark.parametrize("form", FORMS)
def test_float32_outputs_are_those_of_float64(form):
    function, make, options = FORMS[form]
    exact = function(**make(300), **options)
    single = make(300, dtype=torch.float32)
    for x, y in zip(function(**single, **options), exact):
        assert x.dtype == torch.float32
        assert (x - y).abs().max() < 1e-5 * y.abs().max()


@pytest.mark.parametrize("form", ["kalman", "precision", "conjugate-gradient"])
def test_gradients_by_finite_differences(form):
    function, make, options = FORMS[form]
    args = make(7, seed=3)
    if "write" in args:
        args["write"] = 0.2 + 0.8 * args["write"]  # away from 0, where its derivative is taken as 0
    names = [n for n, x in args.items() if x.is_floating_point()]

    def call(*values):
        named = dict(zip(names, values))
        named["state"] = 0.5 * (named["state"] + named["state"].mT) if form != "precision" else named["state"]
        return [x for x in function(**(args | named), backend="parallel", **options) if x is not None]

    assert torch.autograd.gradcheck(call, [args[n].clone().requires_grad_() for n in names])


@pytest.mark.parametrize("form", FORMS)
def test_any_split_gives_the_same(form):
    function, make, options = FORMS[form]
    args = make(61)
    whole = function(**args, **options)
    for edges in ([0, 1, 61], [0, 33, 61], [0, 17, 18, 40, 61]):
        state, parts = args["state"], []
        for a, b in pairwise(edges):
            cut = {n: x if n in ("state", "start", "ratio") else x[:, a:b] if n == "reset" else x[:, :, a:b]
                   for n, x in args.items()}
            out = function(**(cut | {"state": state}), **options)
            state = out[-1][:, :, -1] if form == "precision" else out[-1]
            parts.append(out[:-1] if form != "precision" else out)
        for i in range(len(parts[0])):
            torch.testing.assert_close(torch.cat([p[i] for p in parts], 2), whole[i], rtol=1e-11, atol=1e-12)
        last = whole[-1][:, :, -1] if form == "precision" else whole[-1]
        torch.testing.assert_close(state, last, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_a_reset_starts_afresh_exactly(form):
    function, make, options = FORMS[form]
    args, cut = make(40), 21
    args["reset"] = torch.arange(40).expand(2, -1) == cut
    x = {n: v.clone().requires_grad_() if v.is_floating_point() else v for n, v in args.items()}
    out = function(**x, **options)
    sum(o[:, :, cut:].sum() for o in out[:2] if o is not None and o.ndim > 2 and o.shape[2] == 40).backward()
    for name in ("k", "r", "phi", "factor", "g", "beta"):
        if name in x:
            assert not x[name].grad[:, :, :cut].any(), name
    assert not x["state"].grad.any()
    fresh = args.get("start")
    eye = torch.eye(DK, dtype=torch.float64)
    state = {"kalman": lambda: (fresh[:, None, None] * eye).expand(B, -1, -1, -1),
             "precision": lambda: fresh[:, None].expand(B, -1, DK)}.get(form, lambda: 0 * args["state"])()
    alone = {n: v if n in ("start", "ratio") else v[:, :, cut:] for n, v in args.items() if n not in ("state", "reset")}
    for a, b in zip(function(**alone, state=state, **options), out):
        if a is not None and a.ndim > 2 and a.shape[2] == 40 - cut:
            torch.testing.assert_close(a, b[:, :, cut:], rtol=1e-11, atol=1e-12)


def test_tokens_that_observe_nothing_and_take_no_time_change_nothing():
    args = kalman_args(30, gates=False)
    idle = torch.zeros(30, dtype=torch.bool)
    idle[[0, 5, 6, 7, 29]] = True
    write = torch.ones(B, H, 30, dtype=torch.float64).masked_fill(idle, 0)
    args |= {"write": write, "factor": args["factor"] * write, "drift": args["drift"] * write}
    gain, variance, state = kalman_gains(**args)
    keep = {n: x if n in ("state", "start") else x[:, :, ~idle] for n, x in args.items()}
    alone, alone_variance, alone_state = kalman_gains(**keep)
    assert not gain[:, :, idle].any()
    torch.testing.assert_close(gain[:, :, ~idle], alone, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(variance[:, :, ~idle], alone_variance, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(state, alone_state, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_the_filter_is_ridge_regression_on_the_prefix(gamma):
    """Recursive least squares: weights gamma^(t - i), prior gamma^t / p_0; solved anew for every prefix."""
    draw, _ = source(4)
    T, p_0, r, dv = 70, 2.0, 0.3, 5
    k, v, q = draw(1, 1, T, DK), draw(1, 1, T, dv), draw(1, 1, T, DK)
    eye = torch.eye(DK, dtype=torch.float64)
    factor = torch.full((1, 1, T), -torch.log(torch.tensor(gamma, dtype=torch.float64)).item(), dtype=torch.float64)
    gain, variance, P = kalman_gains(k, torch.full((1, 1, T), r, dtype=torch.float64), state=p_0 * eye[None, None],
                                     start=torch.tensor([p_0], dtype=torch.float64), factor=factor, query=q, chunk=16)
    o, M = gdr(q, None, w=gain, e=k, u=v)
    for t in range(1, T + 1):
        weight = gamma ** torch.arange(t - 1, -1, -1, dtype=torch.float64)
        K, V = k[0, 0, :t], v[0, 0, :t]
        normal = (K * weight[:, None]).T @ K / r + gamma**t * eye / p_0
        exact = torch.linalg.solve(normal, (K * weight[:, None]).T @ V / r)
        assert (o[0, 0, t - 1] - exact.T @ q[0, 0, t - 1]).abs().max() < 1e-9
        assert abs(variance[0, 0, t - 1] - q[0, 0, t - 1] @ torch.linalg.solve(normal, q[0, 0, t - 1])) < 1e-9
    assert (M[0, 0] - exact).abs().max() < 1e-9
    assert (P[0, 0] @ normal - eye).abs().max() < 1e-9


def test_the_covariance_never_exceeds_the_prior():
    """No wind-up, for any keys and rates: what is not seen returns to p_0 and stays there."""
    draw, _ = source(5, torch.float32)
    T, p_0 = 20_000, 3.0
    k = unit(draw(1, 1, T, DK))
    k[..., 3:] = 0  # half of the directions are never observed
    factor = torch.full((1, 1, T), -0.05)
    args = {"r": torch.full((1, 1, T), 0.01), "state": p_0 * torch.eye(DK)[None, None], "start": torch.tensor([p_0]),
            "factor": factor}
    _, _, P = kalman_gains(k, drift=-torch.expm1(factor) * p_0, **args)
    assert torch.linalg.eigvalsh(P).max() <= p_0 * (1 + 1e-5)
    assert torch.allclose(P[0, 0, 3:, 3:], p_0 * torch.eye(3), atol=1e-4)
    assert torch.linalg.eigvalsh(P[0, 0, :3, :3]).max() < p_0 / 2
    few = {"r": args["r"][:, :, :1000], "factor": -factor[:, :, :1000], "backend": "reference"}
    _, _, P = kalman_gains(k[:, :, :1000], **(args | few))
    assert P[0, 0, 5, 5] > 1e20  # recursive least squares with forgetting does wind up


def test_gains_of_a_fixed_covariance_are_the_delta_rules():
    """With P- = p I before every token, K = beta k, beta = p / (p k.k + r): here by an infinitely fast return."""
    draw, _ = source(6)
    T, p_0 = 20, 0.7
    k, r = draw(B, H, T, DK), 0.1 + draw(B, H, T, positive=True)
    gone = torch.full((B, H, T), -1e4, dtype=torch.float64)
    eye = torch.eye(DK, dtype=torch.float64).expand(B, H, -1, -1)
    start = torch.full((H,), p_0, dtype=torch.float64)
    gain, *_ = kalman_gains(k, r, state=p_0 * eye, start=start, factor=gone, drift=torch.full_like(gone, p_0))
    beta = p_0 / (p_0 * k.square().sum(-1) + r)
    torch.testing.assert_close(gain, beta[..., None] * k, rtol=1e-12, atol=1e-13)
    other, *_ = kalman_gains(k, r, state=p_0 * eye, start=start)
    assert (other - gain)[:, :, 1:].abs().max() > 0.1


@pytest.mark.parametrize("solver", ["conjugate-gradient", "chebyshev"])
def test_solvers_converge_to_the_solution_and_its_gradients(solver):
    args = ridge_args(40, scale=0.1, ratio=0.2)

    def exact(q, k, beta, g, ridge, ratio, state, reset):
        out, S = [], state
        for t in range(q.shape[2]):
            S = torch.where(reset[:, t, None, None, None], 0.0, (S + S.mT) / 2) * g[:, :, t, :, None].exp()
            S = S + beta[:, :, t, :, None] * k[:, :, t, :, None] * k[:, :, t, None]
            L = ridge[:, :, t] + ratio[:, 0] * torch.linalg.matrix_norm(S)[..., None]
            out.append(torch.linalg.solve(S + torch.diag_embed(L), q[:, :, t]))
        return torch.stack(out, 2), S

    truth = run(exact, args)
    errors = []
    for n in (2, 4, 8, 60):
        found = run(solve, args, solver=solver, iterations=n)
        errors.append(max(((found[m] - x).abs().max() / x.abs().max()).item() for m, x in truth.items()))
    assert errors[0] > 1e-3
    assert errors[3] < 1e-9
    assert errors == sorted(errors, reverse=True)


def test_forms_run_without_gradients_and_under_inference_mode():
    for function, make, options in FORMS.values():
        args = make(40)
        want = function(**args, **options)
        for mode in (torch.no_grad(), torch.inference_mode()):
            with mode:
                for a, b in zip(function(**args, **options), want):
                    assert a is b is None or torch.equal(a, b) or (a - b).abs().max() < 1e-14


def test_extremes_are_finite():
    for name, (function, make, options) in FORMS.items():
        for scale in (0.0, 1.0, 2000.0):
            for zero in ((), ("k",), ("k", "q", "query", "phi")):
                args = make(40, scale, dtype=torch.float32)
                args |= {n: torch.zeros_like(args[n]) for n in zero if n in args}
                for backend in ("parallel", "reference"):
                    found = run(function, args, backend=backend, **options)
                    assert all(x.isfinite().all() for x in found.values()), (name, scale, zero)


@pytest.mark.parametrize("solver", ["conjugate-gradient", "chebyshev"])
@pytest.mark.parametrize("backend", ["parallel", "reference"])
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20])
def test_a_solution_is_proportional_to_its_right_side_whatever_its_size(solver, backend, size):
    """A backward pass solves for gradients, which may be tiny."""
    args = ridge_args(20, dtype=torch.float32)
    found = []
    for unit in (1.0, size):
        q = (args["q"] * unit).requires_grad_()
        x = solve(**(args | {"q": q}), solver=solver, backend=backend)[0]
        found.append((x / unit, torch.autograd.grad(x, q, torch.full_like(x, unit))[0] / unit))
    for a, b in zip(*found):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * a.abs().max().item())


def test_settings_choose_the_backend_and_scale_the_decay_of_the_ridge():
    args = ridge_args(20)
    scaled = solve(**(args | {"g": 5 * args["g"]}))
    for backend in ("auto", "reference"):
        with use(backend=backend, decay_scale=5.0):
            for a, b in zip(solve(**args), scaled):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("form", "change", "message"), [
    ("kalman", {"k": torch.zeros(2, 3)}, "T >= 1"),
    ("kalman", {"r": torch.zeros(2, 2, 5)}, "r has shape"),
    ("kalman", {"state": torch.zeros(2, 2, 3, 3)}, "state has shape"),
    ("kalman", {"start": torch.zeros(3)}, r"start has shape \(3,\); it must be \(2,\)"),
    ("kalman", {"reset": torch.zeros(2, 9)}, "give bool"),
    ("kalman", {"chunk": 48}, "power of two"),
    ("kalman", {"backend": "fast"}, "does not exist"),
    ("precision", {"phi": torch.zeros(2, 2, 9)}, "T >= 1"),
    ("precision", {"factor": torch.zeros(2, 2, 9, 2)}, "factor has shape"),
    ("precision", {"start": torch.zeros(2, 5)}, "start has shape"),
    ("precision", {"state": torch.zeros(2, 2, 5)}, "state has shape"),
    ("chebyshev", {"solver": "jacobi"}, "use one of 'conjugate-gradient', 'chebyshev'"),
    ("chebyshev", {"iterations": 0}, "iterations=0"),
    ("chebyshev", {"g": torch.zeros(2, 2, 9)}, "g has shape"),
])
def test_wrong_arguments_are_named(form, change, message):
    function, make, options = FORMS[form]
    with pytest.raises(ValueError, match=message):
        function(**(make(9) | options | change))
