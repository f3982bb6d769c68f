"""Claims that nothing here can test, with the reason; and remarks on statements that are often quoted wrongly."""

from __future__ import annotations

from postformer.study.claims.base import Claim, claim

UNTESTED = (
    Claim(
        id="T7", title="Compositional limits", statement="A transformer's accuracy on multiplication and dynamic "
        "programming falls exponentially with the depth of the computation; an exact executor does not fall.",
        source="Dziri et al. 2023, Faith and Fate", papers=("2305.18654",), from_notes=True,
        test="Accuracy by depth of the computation graph: direct, with a scratchpad, and with an executor.",
        verdict="not testable here", reason="There is neither a multiplication task nor an executor that a model may "
        "call while it writes.",
    ),
    Claim(
        id="T8", title="Calibrated models hallucinate", statement="A calibrated language model invents facts at a rate "
        "of about the share of facts that training showed exactly once.",
        source="Kalai and Vempala 2023", papers=("2311.14648",), from_notes=True,
        test="Train on facts drawn by Zipf's law, sample, and compare the rate of false ones with the share seen once.",
        verdict="not testable here", reason="It needs a corpus of synthetic facts and many samples of a trained model; "
        "a gauntlet scores given answers and samples none.",
    ),
    Claim(
        id="T15", title="No computable model is always right", statement="Whatever computable language model there is, "
        "some question it answers wrongly; and figures of what models cost in energy and money.",
        source="notes on papers of 2025", from_notes=True, test="None.", verdict="not testable here",
        reason="The first is a theorem about all models, which no experiment on some can support or refute; the "
        "figures are about machines that are not here.",
    ),
)

for _claim in UNTESTED:
    claim(_claim.id)(lambda results, quick, kept=_claim: kept)

REMARKS = (
    "The LoLCATs figures (share of parameters, share of tokens) compare with earlier methods that linearise a trained "
    "model, not with training from nothing; the trained model that it starts from had all its tokens.",
    "Scaling exponents of fits without an irreducible term are not comparable with those of fits that have one: the "
    "same data give a much smaller exponent without it.",
    "That no autoregressive model can solve the reversal task is too strong: one trained on reversed or permuted data "
    "can, and diffusion language models keep a part of the difficulty.",
    "Published comparisons of Titans, Falcon-Mamba and RWKV-7 with transformers are their makers' own, at different "
    "budgets of training tokens.",
    "Mamba does implement the lookup that recall needs, by way of its short convolution, and the delta rule is close "
    "behind attention; what a trained layer does is not what its recurrence alone can do.",
    "Savings of two to five times by growing a model in depth are the upper end; most reports are below two (notes).",
    "Ternary weights do not make matrix products free: additions and memory traffic remain. Counts of operations are "
    "no measurement of energy.",
    "The record of 48 multiplications for 4 by 4 matrices is over the complex numbers; over the field of two elements "
    "47 were known before.",
)
