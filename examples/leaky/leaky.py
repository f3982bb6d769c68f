"""Your own memory in 20 lines: a leaky average. The entry point in pyproject.toml makes it a kind like any other:

pip install -e examples/leaky && postformer verify examples/leaky/leaky.yaml
"""

from typing import Literal

from postformer.contract.mixer import StepMemory
from postformer.design import Cost, Design, register


class LeakyDesign(Design):
    kind: Literal["leaky"] = "leaky"
    rate: float = 0.9


@register(LeakyDesign)
class Leaky(StepMemory):
    def __init__(self, design, site):
        super().__init__()
        self.rate, self.width = design.rate, site.width
        self.inp, self.out = site.linear("in", site.width, site.width), site.linear("out", site.width, site.dim_out)

    def initial(self, batch, condition=None):
        return self.inp.weight.new_zeros(batch, self.width)

    def step(self, x, h):
        h = self.rate * h + (1 - self.rate) * self.inp(x)
        return self.out(h), h

    @classmethod
    def cost(cls, design, site):  # optional: what `explain` and matched comparisons compute without building
        maps = site.linear_cost(site.width, site.width) + site.linear_cost(site.width, site.dim_out)
        return maps + Cost(state=4 * site.width)
