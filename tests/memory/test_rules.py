"""Parameterisations of the matrix memory: what they refuse, and which of them become which others."""

from __future__ import annotations

import math

import pytest
import torch

from postformer.contract.context import Context
from postformer.design import DesignError, load, registry
from postformer.kernels import gdr
from postformer.memory.rules.preconditioned import SPREAD
from postformer.model import build
from postformer.verify import verify
from postformer.verify.compare import error, state_error

MEMORY = "model.mixers.memory."


@pytest.mark.parametrize(("recipe", "override", "text", "remedy"), [
    ("longhorn", "loss=dot", "an implicit step is a gradient step", "or loss: l2"),
    ("longhorn", "update.rate=double-sigmoid", "never goes past its target", "use rate: sigmoid"),
    ("longhorn", "update.kind=gradient", "keys of bounded norm", "set features: l2norm, or update: implicit"),
    ("comba", "loss=dot", "'comba' says how to erase", "set loss: l2"),
    ("comba", "update.steps=2", "takes one gradient step a token", "use parameterisation: qkv"),
    ("comba", "update.kind=implicit", "takes one gradient step a token", "leave update.kind"),
    ("comba", "update.rate=double-sigmoid", "can make the state of parameterisation 'comba' grow", "use sigmoid"),
    ("comba", "retention.per=channel", "can turn into growth", "set retention.per: head"),
    ("comba", "features=none", "keys of bounded norm", "set features: l2norm"),
    ("comba", "read.correction=1", "unknown field 'correction'", "Allowed: "),
    ("gated-deltanet-2", "update={rate: one}", "'update' is fixed by parameterisation 'gated-deltanet-2'",
     "leave it out"),
    ("gated-deltanet-2", "normaliser=sum", "which loss l2 does not have", "set normaliser: none"),
    ("preconditioned-deltanet", "update.rate=double-sigmoid", "'preconditioned' grow", "use sigmoid"),
    ("preconditioned-deltanet", "parameterisation=precond", "unknown parameterisation 'precond'",
     "Did you mean 'preconditioned'?"),
    ("mamba2", "loss=l2", "'loss' is fixed by parameterisation 'mamba2'", "leave it out"),
])
def test_what_makes_no_sense_is_refused_with_a_remedy(recipe, override, text, remedy):
    name = "mamba" if recipe == "mamba2" else "memory"
    name = name if name in load(recipe).model.mixers else "memory"
    with pytest.raises(DesignError) as caught:
        load(recipe, [f"model.mixers.{name}.{override}"])
    assert text in str(caught.value)
    assert remedy in str(caught.value)


def scrambled(recipe: str, more: tuple[str, ...] = ()) -> torch.nn.Module:
    made = load(recipe, [MEMORY + m for m in more], width=32, layers=2)
    model = build(made.model).double()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=draw, dtype=torch.float64)
            p.add_(noise * (0.3 if p.ndim < 2 else 0.5 * p.shape[-1] ** -0.5))
    return model


def run(model, length: int = 83):
    x = torch.randn(2, length, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        return model.run(x)


def become(special, plain, edit) -> tuple[float, float]:
    """(difference of outputs once `edit(special rule, plain rule)` has been applied, and before): every parameter the
    two have in common is copied first."""
    theirs = dict(plain.named_parameters())
    with torch.no_grad():
        for name, p in special.named_parameters():
            if name in theirs:
                p.copy_(theirs[name])
    truth = run(plain)[0].y
    before = error(run(special)[0].y, truth)
    rules = [[m.params for m in model.modules() if hasattr(m, "params")] for model in (special, plain)]
    assert len(rules[0]) == len(rules[1]) == 2
    with torch.no_grad():
        for ours, other in zip(*rules):
            edit(ours, other)
    return error(run(special)[0].y, truth), before


def test_gated_deltanet_2_with_one_number_for_both_gates_is_kda():
    def edit(ours, kda):
        for gate, size in ((ours.erase, ours.dim_key), (ours.write, ours.dim_value)):
            gate.weight.copy_(kda.rate.weight.repeat_interleave(size, 0))

    after, before = become(scrambled("gated-deltanet-2"), scrambled("kda"), edit)
    assert after < 1e-12
    assert before > 1e-3


def test_comba_without_feedback_or_decay_is_deltanet():
    def edit(ours, other):
        ours.feedback.fill_(100)
        ours.correction.zero_()

    none = ("retention={per: none}", "read=norm")
    after, before = become(scrambled("comba", none), scrambled("deltanet"), edit)
    assert after < 1e-12
    assert before > 1e-3


def test_comba_erases_before_it_decays_which_gated_deltanet_does_not():
    """With b = 1 and D = 0: alpha - beta k k^T against alpha (1 - beta k k^T); equal where p = alpha k."""
    draw = torch.Generator().manual_seed(3)
    q, k, v = torch.randn(3, 2, 2, 40, 8, generator=draw, dtype=torch.float64)
    k = k / k.norm(dim=-1, keepdim=True)
    g = -torch.rand(2, 2, 40, 1, generator=draw, dtype=torch.float64)
    w = k * torch.rand(2, 2, 40, 1, generator=draw, dtype=torch.float64)
    truth = gdr(q, g, w=w, e=k, u=v)
    assert error(gdr(q, g, w=w, e=k, u=v, erase_before_decay=True)[0], truth[0]) > 1e-2
    same = gdr(q, g, w=w, e=g.exp() * k, u=v, erase_before_decay=True)
    assert max(error(same[0], truth[0]), error(same[1], truth[1])) < 1e-12


def test_preconditioning_by_a_constant_is_gated_deltanet_with_larger_steps():
    """A centre far above any curvature makes every gain x = 3/2."""
    special, plain = scrambled("preconditioned-deltanet"), scrambled("gated-deltanet")
    for rule in (m.params for m in plain.modules() if hasattr(m, "params")):
        rule.size = lambda x, k, size=rule.size: SPREAD * size(x, k)
    after, before = become(special, plain, lambda ours, other: ours.centre.fill_(1e12))
    assert after < 1e-9
    assert before > 1e-3


def test_one_gated_delta_product_step_is_gated_deltanet():
    one = ("update={rate: double-sigmoid, steps: 1}",)
    plain = ("update={rate: double-sigmoid}",)
    assert load("gated-deltaproduct", [MEMORY + one[0]]).id == load("gated-deltanet", [MEMORY + plain[0]]).id
    two, single = run(scrambled("gated-deltaproduct"))[0].y, run(scrambled("gated-deltaproduct", one))[0].y
    assert error(two, single) > 1e-3


def test_stretched_rates_reach_both_ends_and_reflect_exactly():
    """Where a rate is 2 the state's component along the key changes its sign and keeps its size, however often."""
    recipe = load("gated-deltaproduct", [MEMORY + "update={rate: stretched, steps: 1}", MEMORY + "retention=none",
                                         MEMORY + "local=none"], width=32, layers=2)
    rule = next(m.params for m in build(recipe.model).double().modules() if hasattr(m, "params"))
    x = torch.randn(1, 400, 32, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    with torch.no_grad():
        rule.rate.weight.mul_(20)
        made, _ = rule(x, rule.initial(1), Context())
        plain = 2 * torch.sigmoid(rule.rate(x)).transpose(1, 2)
    beta = made.rate[..., 0]
    assert error(beta, (1.1 * plain - 0.1).clamp(0, 2)) < 1e-12
    assert (beta == 0).any()
    ends = (beta - 2).abs() < 1e-5
    assert ends.any()
    head, at = ends[0].nonzero()[0].tolist()
    e = made.e[0, head, at]
    s = torch.randn(len(e), 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    after = s
    for _ in range(256):
        after = after - torch.outer(beta[0, head, at] * e, e @ after)
    assert error(after, s) < 1e-3


@pytest.mark.parametrize("per", ["head", "channel"])
def test_a_stretched_gate_forgets_nothing_at_some_tokens(per):
    recipe = load("gated-deltanet", [MEMORY + f"retention={{per: {per}, gate: stretched}}"], width=32, layers=2)
    rule = next(m.params for m in build(recipe.model).double().modules() if hasattr(m, "params"))
    x = torch.randn(1, 400, 32, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    with torch.no_grad():
        made = rule.decay(x)
        assert made.exp().mean().item() == pytest.approx(1.05 / (1 + math.exp(-2.5)), abs=0.03)
        rule.decay.map.weight.mul_(10)
        made = rule.decay(x)
        raw = rule.decay.map(x).unflatten(-1, (made.shape[1], -1)).transpose(1, 2)
    assert error(made.exp(), (1.05 * torch.sigmoid(raw)).clamp(max=1)) < 1e-12
    assert (made == 0).any()
    assert (made < -1).any()


def test_an_implicit_step_is_where_its_objective_is_stationary():
    """The gradient by autograd of |S - S_{t-1}|^2 + beta |S^T k - v|^2 vanishes at K1's new state."""
    model = scrambled("longhorn")
    rule = next(m.params for m in model.modules() if hasattr(m, "params"))
    x = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 3
    with torch.no_grad():
        made, _ = rule(x, rule.initial(1), Context())
        beta = torch.sigmoid(rule.rate(x)).transpose(1, 2)
        assert made.e.norm(dim=-1).max() > 1.5  # keys far from unit norm
        states = [gdr(made.q[:, :, :t], None, rate=made.rate[:, :, :t], e=made.e[:, :, :t], u=made.u[:, :, :t])[1]
                  for t in (6, 7)]
    before, after = states[0], states[1].requires_grad_()
    miss = torch.einsum("bhkv,bhk->bhv", after, made.e[:, :, 6]) - made.u[:, :, 6]
    total = (after - before).square().sum() + (beta[:, :, 6, None] * miss.square()).sum()
    (gradient,) = torch.autograd.grad(total, after)
    assert float(gradient.abs().max()) < 1e-12
    assert float((after.detach() - before).abs().max()) > 1e-2


def test_an_implicit_step_does_not_overshoot_where_a_gradient_step_diverges():
    draw = torch.Generator().manual_seed(5)
    k, v = 3 * torch.randn(2, 1, 1, 2000, 8, generator=draw)
    beta = torch.tensor(0.9)
    size = beta / (1 + beta * k.square().sum(-1, keepdim=True))
    assert gdr(k, None, w=k * size, e=k, u=v)[1].abs().max() < 20
    assert not torch.isfinite(gdr(k, None, w=k * beta, e=k, u=v)[1]).all()


@pytest.mark.parametrize("recipe", ["comba", "gated-deltanet-2", "preconditioned-deltanet", "longhorn"])
def test_without_local_mixing_gates_are_honoured(recipe):
    found = verify(load(recipe, [MEMORY + "local=none"], layers=2), only=("read-only", "emitted", "garbage", "params"))
    assert [r.name for r in found.results if not r.passed] == []
    assert len(found.results) == 4


def test_the_curvature_is_part_of_the_state_and_starts_again_with_a_document():
    model = scrambled("preconditioned-deltanet")
    x = torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    boundary = torch.zeros(1, 20, dtype=torch.int8)
    boundary[:, 12] = 2
    with torch.no_grad():
        whole, apart = model.run(x)[1], model.run(x[:, 12:])[1]
        joined = model.run(x, None, Context(boundary=boundary))[1]
    curvature = [s.stack[0][0].local[1] for s in (whole, apart, joined)]
    assert [tuple(c.shape) for c in curvature] == 3 * [(1, 1, 32)]
    assert all(bool((c >= 0).all()) for c in curvature)
    assert state_error(curvature[1], curvature[2]) < 1e-12
    assert state_error(curvature[0], curvature[2]) > 1e-3


@pytest.mark.parametrize(("recipe", "update", "equation"), [
    ("longhorn", "one implicit step of rate in (0, 1)", "c_t = b_t / (1 + b_t |k_t|^2)"),
    ("gated-deltaproduct", "2 gradient steps of size in (0, 2)", "(2 times per token, decayed once)"),
    ("comba", "scaled by a learned c per head", "S_t = (a_t - b_t c k_t k_t^T) S_{t-1} + b_t k_t v_t^T"),
    ("gated-deltanet-2", "a gate for every channel", "(I - k_t (b_t .* k_t)^T) Diag(a_t) S_{t-1} + k_t (w_t .* v_t)^T"),
    ("preconditioned-deltanet", "preconditioned by a bounded power M", "A_t = a'_t A_{t-1} + b'_t k_t^2"),
])
def test_the_four_choices_in_words(recipe, update, equation):
    design = load(recipe).model.mixers["memory"]
    told = registry.resolve(design.kind).choices(design)
    assert told.loss == "l2"
    assert update in told.update
    assert equation in told.equation
