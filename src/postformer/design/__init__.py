"""Architecture as data, without torch: the grammar, the open registry of kinds, recipe loading, identity, cost."""

from postformer.design.base import Design, DesignError
from postformer.design.cost import Cost
from postformer.design.grammar import Model, Recipe
from postformer.design.loading import load, names
from postformer.design.registry import kinds, register

__all__ = ["Cost", "Design", "DesignError", "Model", "Recipe", "kinds", "load", "names", "register"]
