"""What a recipe may say about a filter memory (kernel K4): its covariance, noises and solver, and the projections that
it shares with a matrix memory."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from postformer.design.base import Design, word
from postformer.memory.matrix_design import Feature, MatrixDesign, Retention, Update
from postformer.memory.shared_design import AnyLocal, AnyRead, Local, MatrixHeads, Read, several

Process = Literal["none", "stationary", "fading"]


class FilterRetention(Retention):
    """How the mean decays, S <- Diag(a) S, and what the filter believes about change in the meantime."""

    process: Process | None = None
    """stationary: P <- a^2 P + (1 - a^2) p_0, what forgets also becomes uncertain. fading: P <- c P + (1 - c) p_0, c
    chosen by the input whatever a is. none: nothing changes. None: stationary where there is a decay"""

    @model_validator(mode="after")
    def _paired(self) -> FilterRetention:
        if self.per != "none" and self.process == "none":
            raise ValueError("a mean that decays while nothing is said to change makes the filter surer of what it "
                             "forgets: set process: stationary or fading, or per: none")
        if self.per == "none" and self.process == "stationary":
            raise ValueError("process: stationary takes its rate from the decay of the mean: set per: head and a "
                             "gate, or process: fading")
        return self


class Noise(Design):
    """Variance r of the observation v = S^T k + noise, one number per head: floor + softplus(...)."""

    per: Literal["input", "head"] = "input"
    """input: chosen by each token; head: one learned number"""
    floor: float = Field(default=0.01, gt=0)


class Ridge(Design):
    """Lambda in (H + Lambda)^-1, covariance: information."""

    kind: Literal["learned", "norm"] = "learned"
    """learned: floor + softplus of a parameter per key channel; norm: floor + ratio |H_t|"""
    floor: float = Field(default=0.25, gt=0)
    ratio: float = Field(default=0.02, gt=0, le=1)


class Solver(Design):
    kind: Literal["conjugate-gradient", "chebyshev"] = "conjugate-gradient"
    iterations: int = Field(default=30, ge=1, le=200)


class FilterDesign(Design):
    kind: Literal["filter"] = "filter"
    covariance: Literal["isotropic", "diagonal", "full", "mean-field", "information"] = "full"
    """What is kept of the covariance over keys: p I, a diagonal (of its inverse), all of it; mean-field: a diagonal,
    each key channel as if alone; information: the inverse as a sum of k k^T, solved with a ridge at every read"""
    heads: MatrixHeads = MatrixHeads()
    retention: Annotated[FilterRetention, word("per")] = FilterRetention()
    noise: Annotated[Noise, word("per")] = Noise()
    initial: float = Field(default=1.0, gt=0)
    """Where the prior variance p_0 of a head starts; learned, within a factor of 55"""
    rate: Literal["one", "sigmoid"] = "one"
    """Weight of a token, covariance: information"""
    ridge: Annotated[Ridge, word("kind")] = Ridge()
    solver: Annotated[Solver, word("kind")] = Solver()
    query: Literal["solved", "gated"] = "solved"
    """covariance: information reads with x = (H + Lambda)^-1 q, or with q + a (x - q), a chosen by the input"""
    features: Annotated[tuple[Feature, ...], several] = ("l2norm",)
    """Feature maps of q and k, in order"""
    local: AnyLocal = Local()
    read: AnyRead = Read()
    forget_at: Literal["segment", "document", "stream"] = "document"

    @model_validator(mode="after")
    def _sense(self) -> FilterDesign:
        if not {"l2norm", "softmax"} & set(self.features):
            raise ValueError("a filter needs keys of bounded norm, or its noise is lost to rounding beside them: set "
                             "features: l2norm")
        if self.retention.per == "channel" and self.covariance in ("isotropic", "full", "information"):
            raise ValueError(f"covariance '{self.covariance}' has one decay per head: set retention.per: head, or "
                             "covariance: diagonal")
        information = self.covariance == "information"
        fields = type(self).model_fields
        foreign = ("noise", "initial") if information else ("rate", "ridge", "solver", "query")
        said = {name for name in foreign if getattr(self, name) != fields[name].get_default()}
        if said:
            raise ValueError(f"'{min(said)}' {'does not belong' if information else 'belongs'} to covariance: "
                             f"information; leave it out" + ("" if information else ", or use that covariance"))
        if information and self.retention.process is not None:
            raise ValueError("covariance: information forgets by the decay of its sums, which its ridge bounds; leave "
                             "retention.process out")
        return self

    @property
    def process(self) -> str:
        return self.retention.process or ("stationary" if self.retention.per != "none" else "none")

    @property
    def normaliser(self) -> str:
        """A filter's reads are means, and divided by nothing."""
        return "none"

    @property
    def matrix(self) -> MatrixDesign:
        """The matrix memory that holds the mean: projections, decay and read are its."""
        r = self.retention
        return MatrixDesign(
            heads=self.heads, loss="dot" if self.covariance in ("mean-field", "information") else "l2",
            retention=Retention(per=r.per, gate=r.gate, rank=r.rank), update=Update(rate=self.rate),
            features=self.features, local=self.local, read=self.read, forget_at=self.forget_at,
        )

    @property
    def fading(self) -> MatrixDesign:
        """A matrix memory whose decay per head is the rate at which the covariance returns to its prior."""
        return self.matrix.model_copy(update={"retention": Retention(per="head", gate="mamba")})

    @property
    def converged(self) -> bool:
        """The solver is exact, but for rounding, with as many iterations as it has."""
        if self.solver.kind == "conjugate-gradient":
            return self.heads.dim_key is not None and self.solver.iterations >= self.heads.dim_key
        if self.ridge.kind != "norm":
            return False
        root = (1 + 1 / self.ridge.ratio) ** 0.5
        return 2 * ((root - 1) / (root + 1)) ** self.solver.iterations < 1e-6
