"""Filter memories: their own model's data, reductions to the delta rule, what their variance says, what is refused."""

import pytest
import torch

from postformer.contract.context import Context
from postformer.design import DesignError, load
from postformer.kernels import gdr, kalman_gains, precision
from postformer.memory.filter import Filter
from postformer.memory.filter_design import FilterDesign
from postformer.model import build
from postformer.verify import verify

FF = {"kind": "swiglu"}
HEADS = {"value": 2, "dim_key": 6}
MAMBA = {"per": "head", "gate": "mamba"}
FILTERS = {
    "full, stationary": {"covariance": "full", "retention": MAMBA},
    "full, fading": {"covariance": "full", "retention": {"process": "fading"}, "noise": "head", "initial": 3.0},
    "full, fading beside a decay": {"retention": {**MAMBA, "process": "fading"}},
    "full, nothing forgotten": {"covariance": "full", "features": ["silu", "l2norm"]},
    "full, shared keys": {"heads": {"value": 2, "key": 1, "dim_key": 4}, "retention": MAMBA, "local": "shift"},
    "diagonal, per channel": {"covariance": "diagonal", "retention": {**MAMBA, "per": "channel"}},
    "diagonal, fading": {"covariance": "diagonal", "retention": {"process": "fading"}},
    "isotropic": {"covariance": "isotropic", "retention": {"per": "head", "gate": "fixed"}, "features": "softmax"},
    "mean-field": {"covariance": "mean-field", "retention": {"per": "channel", "gate": "gla"}, "forget_at": "segment"},
    "information": {"covariance": "information", "retention": {"per": "head", "gate": "sigmoid"}, "rate": "sigmoid"},
    "information, few steps": {"covariance": "information", "solver": {"iterations": 3}, "query": "gated"},
    "information, chebyshev": {"covariance": "information", "ridge": {"kind": "norm", "ratio": 0.3, "floor": 0.01},
                               "solver": "chebyshev", "retention": MAMBA},
}


def design(memory, publish=False):
    layer = [{"use": "m", **({"publish": {"doubt": "variance"}} if publish else {})}, {"use": "ff"}]
    return {"version": 1, "name": "filter", "model": {
        "width": 16, "mixers": {"m": {"kind": "filter", "heads": HEADS, **memory}, "ff": FF}, "layers": {"l": layer},
        "stack": ["l"]}}


def memory_of(memory, publish=False):
    """A filter by itself, in float64."""
    return build(load(design(memory, publish)).model).double().stack.layers[0].sublayers[0].mixer


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", FILTERS)
def test_every_form_keeps_the_contract(name):
    found = verify(design(FILTERS[name]), full=True)
    assert [(r.name, r.value, r.note) for r in found.results if r.passed is False] == []
    left_out = {r.name.split(" ")[0] for r in found.results if r.passed is None}
    assert left_out == {"full, shared keys": {"read-only"}, "information, few steps": {"gradients"}}.get(name, set())


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def own_data(T, dk, dv, a, r, p_0, seed=0):
    """Keys and values drawn from the filter's model: S = a S + sqrt(1 - a^2) sqrt(p_0) change, v = S^T k + noise."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    k, S, values = unit(draw(T, dk)), p_0**0.5 * draw(dk, dv), []
    for t in range(T):
        S = a * S + ((1 - a**2) * p_0) ** 0.5 * draw(dk, dv)
        values.append(S.T @ k[t] + r**0.5 * draw(dv))
    return k[None, None], torch.stack(values)[None, None]


def surprise(k, v, a, r, p_0):
    """Normalised innovation squared [T]: |v - (a M)^T k|^2 / (dv s), s = k^T P- k + r; 1 on average if all is right."""
    T, dk = k.shape[2:]
    log_a = torch.full((1, 1, T, 1), a, dtype=torch.float64).log()
    noise = torch.full((1, 1, T), r, dtype=torch.float64)
    eye = torch.eye(dk, dtype=torch.float64)[None, None]
    gain, after, _ = kalman_gains(
        k, noise, state=p_0 * eye, start=torch.full((1,), p_0, dtype=torch.float64), query=k,
        factor=2 * log_a.squeeze(-1), drift=torch.full((1, 1, T), (1 - a**2) * p_0, dtype=torch.float64))
    s = r**2 / (r - after)  # the variance after an observation is before r / (before + r)
    before, _ = gdr(k * a, log_a, w=gain, e=k, u=v, read_before_update=True)
    return ((v - before).square().sum(-1) / (v.shape[-1] * s))[0, 0]


def test_surprise_is_one_on_data_of_its_own_model_and_not_on_others():
    a, r, p_0 = 0.995, 0.2, 1.5
    k, v = own_data(6000, 8, 4, a, r, p_0)
    assert 0.9 < surprise(k, v, a, r, p_0).mean() < 1.1
    assert 0.9 < surprise(k, v, a, r, p_0)[3000:].mean() < 1.1
    assert surprise(k, v, a, 4 * r, p_0).mean() < 0.7  # noise overstated
    assert surprise(k, v, a, r / 4, p_0).mean() > 1.5  # noise understated
    assert surprise(k, v, 1 - 1e-9, r, p_0).mean() > 1.5  # drift denied


def test_the_full_covariance_predicts_its_own_data_better_than_the_delta_rule_with_the_best_rate():
    a, r, p_0 = 0.999, 0.5, 1.0
    k, v = own_data(3000, 8, 4, a, r, p_0, seed=1)
    T = k.shape[2]
    log_a = torch.full((1, 1, T, 1), a, dtype=torch.float64).log()
    errors = {}
    for rate in (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0):
        o, _ = gdr(a * k, log_a, w=rate * k, e=k, u=v, read_before_update=True)
        errors[rate] = (v - o).square().mean().item()
    eye = torch.eye(8, dtype=torch.float64)[None, None]
    drift = torch.full((1, 1, T), (1 - a**2) * p_0, dtype=torch.float64)
    gain, *_ = kalman_gains(k, torch.full((1, 1, T), r, dtype=torch.float64), state=p_0 * eye,
                            start=torch.ones(1, dtype=torch.float64), factor=2 * log_a.squeeze(-1), drift=drift)
    o, _ = gdr(a * k, log_a, w=gain, e=k, u=v, read_before_update=True)
    assert (v - o).square().mean().item() < min(errors.values())
    assert min(errors, key=lambda rate: errors[rate]) not in (0.02, 1.0)  # the best rate is among those tried


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_variance_falls_where_keys_were_seen_and_rises_where_they_no_longer_are(covariance):
    T, a, eye = 200, 0.99, torch.eye(4, dtype=torch.float64)
    k = eye[0].expand(1, 1, T, 4).clone()
    k[:, :, 100:] = eye[1]
    factor = 2 * torch.full((1, 1, T), a, dtype=torch.float64).log()
    drift = -torch.expm1(factor)
    seen = {}
    for i in range(3):
        q = eye[i].expand(1, 1, T, 4)
        if covariance == "full":
            seen[i] = kalman_gains(k, torch.full((1, 1, T), 0.1, dtype=torch.float64), state=eye[None, None],
                                   start=torch.ones(1), factor=factor, drift=drift, query=q)[1][0, 0]
        else:
            after = precision(k.square() / 0.1, state=torch.ones(1, 1, 4, dtype=torch.float64), start=torch.ones(1),
                              factor=factor[..., None], drift=drift[..., None])[1]
            seen[i] = (q.square() / after).sum(-1)[0, 0]
    assert (seen[0][:100] < 0.1).all()
    assert (seen[0][101:].diff() > 0).all()
    assert seen[0][199] > 0.8
    assert (seen[1][:100] - 1).abs().max() < 1e-12
    assert (seen[1][100:] < 0.1).all()
    assert (seen[2] - 1).abs().max() < 1e-12


def test_a_covariance_that_returns_at_once_is_the_gated_delta_rule_of_rate_one_half():
    """P- = p_0 I before every token and r = p_0: gains are k / 2 for unit keys, whatever the decay."""
    kalman = memory_of({"retention": {**MAMBA, "process": "fading"}, "read": "gated-norm"})
    recipe = {"kind": "matrix", "loss": "l2", "heads": HEADS, "retention": MAMBA, "features": "l2norm",
              "read": "gated-norm"}
    data = design({})
    data["model"]["mixers"]["m"] = recipe
    delta = build(load(data).model, 1).double().stack.layers[0].sublayers[0].mixer
    x = random(2, 50, 16)
    with torch.no_grad():
        kalman.params.k.weight.mul_(1000)  # so that l2norm's epsilon is nothing beside a key
        delta.load_state_dict(kalman.state_dict(), strict=False)
        delta.params.rate.weight.zero_()
        kalman.noise.weight.zero_()
        kalman.noise.bias.fill_(torch.tensor(1 - 0.01, dtype=torch.float64).expm1().log())
        kalman.fading.A_log.fill_(20.0)
        y = delta(x).y
        assert (kalman(x).y - y).abs().max() < 1e-9 * y.abs().max()
        kalman.fading.A_log.fill_(-3.0)
        assert (kalman(x).y - y).abs().max() > 0.05 * y.abs().max()


@pytest.mark.parametrize("name", FILTERS)
def test_the_published_variance_is_the_same_in_pieces_and_bounded_by_the_prior(name):
    memory = memory_of(FILTERS[name], publish=True)
    x = random(2, 40, 16)
    boundary = torch.zeros(2, 40, dtype=torch.int8)
    boundary[0, 13] = 3
    ctx = Context(boundary=boundary)
    with torch.no_grad():
        whole = memory(x, None, ctx).published["variance"]
        state, parts = None, []
        for a, b in ((0, 1), (1, 18), (18, 40)):
            out = memory(x[:, a:b], state, ctx.narrow(a, b, 40))
            state, parts = out.state, [*parts, out.published["variance"]]
        fresh = memory(x[:1, 13:]).published["variance"]
    assert whole.shape == (2, 40, 2)
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-12
    assert (whole[:1, 13:] - fresh).abs().max() < 1e-12
    assert whole.min() > 0
    if memory.information:
        return
    q = memory.params.project(x, memory.params.initial(2), ctx)[1]
    prior = (q.square().sum(-1) * memory.prior_variance()[:, None]).transpose(1, 2)
    assert (whole <= prior * (1 + 1e-12)).all()
    assert (whole < 0.99 * prior).any()


def test_a_later_sublayer_can_read_the_variance():
    data = design({}, publish=True)
    model = build(load(data).model)
    out = model(torch.randint(0, 256, (2, 9)))
    doubt = out.published["doubt"]
    assert doubt.shape == (2, 9, 2)
    (g,) = torch.autograd.grad(doubt.sum(), model.stack.layers[0].sublayers[0].mixer.noise.weight)
    assert g.abs().max() > 0


def test_a_wrapper_may_feed_queries_keys_and_values():
    """An envelope whose convolution only queries and keys see: a filter is as good a child as a matrix memory."""
    data = design({})
    data["model"]["mixers"]["m"] = {"kind": "envelope", "expand": 1, "conv": 3, "conv_on": ["query", "key"],
                                    "of": {"kind": "filter", "heads": HEADS, "retention": MAMBA}}
    found = verify(data, full=True, only=["pieces", "packed", "parallel"])
    assert [(r.name, r.value, r.note) for r in found.results if r.passed is False] == []
    assert sum(r.passed is True for r in found.results) >= 4


def test_a_write_gate_is_confidence_in_the_observation():
    """Soft gates multiply precisions, so that half a write is an observation with twice the noise."""
    memory = memory_of({"noise": "head"}, publish=True)
    x, half = random(1, 20, 16), torch.full((1, 20), 0.5, dtype=torch.float64)
    with torch.no_grad():
        gated = memory(x, None, Context(write=half))
        r = torch.nn.functional.softplus(memory.noise) + 0.01
        memory.noise.copy_(torch.expm1(2 * r - 0.01).log())
        plain = memory(x)
    assert (gated.y - plain.y).abs().max() < 1e-12
    assert (gated.published["variance"] - plain.published["variance"]).abs().max() < 1e-12


@pytest.mark.parametrize(("memory", "message"), [
    ({"features": "silu"}, "bounded norm.*set features: l2norm"),
    ({"retention": {**MAMBA, "process": "none"}}, "surer of what it forgets: set process: stationary or fading"),
    ({"retention": {"process": "stationary"}}, "takes its rate from the decay.*process: fading"),
    ({"covariance": "full", "retention": {**MAMBA, "per": "channel"}}, "one decay per head.*covariance: diagonal"),
    ({"ridge": {"floor": 1.0}}, "'ridge' belongs to covariance: information; leave it out, or"),
    ({"solver": "chebyshev"}, "'solver' belongs to covariance: information"),
    ({"covariance": "information", "noise": "head"}, "'noise' does not belong to covariance: information; leave it"),
    ({"covariance": "information", "retention": {**MAMBA, "process": "stationary"}}, "leave retention.process out"),
    ({"retention": "head"}, "needs a gate"),
    ({"heads": {"value": 3}}, "not a multiple of heads.value"),
])
def test_what_makes_no_sense_is_refused_with_a_remedy(memory, message):
    with pytest.raises(DesignError, match=message):
        load(design(memory))


def test_gradients_are_declared_exact_where_the_solver_ends():
    def exact(**memory):
        return Filter.traits(FilterDesign(covariance="information", heads=HEADS, **memory)).exact_gradients

    assert exact(solver={"iterations": 6})
    assert not exact(solver={"iterations": 5})
    assert not exact(solver={"kind": "chebyshev", "iterations": 200})  # no bound on what the ridge is compared with
    norm = {"kind": "norm", "ratio": 0.02}
    assert not exact(solver="chebyshev", ridge=norm)
    assert exact(solver={"kind": "chebyshev", "iterations": 60}, ridge=norm)
