"""Claims of the field, each with a test: what the literature says, what is measured here, and whether it holds.

    from postformer.study.claims import claims

    for claim in claims(quick=True):
        print(claim.id, claim.verdict, claim.reason)

Some are worked out or timed on the spot; those about trained models read the results of a gauntlet and say which
command makes the ones they lack. A claim of your own: a function of (results, quick) that returns a Claim, under
`@claim("X1")`.
"""

from postformer.study.claims import cost, duality, pairs, positions, trained, untested
from postformer.study.claims.base import Claim, Figure, claim, claims
from postformer.study.claims.untested import REMARKS

__all__ = ["REMARKS", "Claim", "Figure", "claim", "claims", "cost", "duality", "pairs", "positions", "trained",
           "untested"]
