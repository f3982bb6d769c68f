"""The stack and the language model."""

from __future__ import annotations

import torch

from postformer.design.grammar import Model
from postformer.model.language import LanguageModel, LMOutput, LMState, evaluating

__all__ = ["LMOutput", "LMState", "LanguageModel", "build", "evaluating"]


def build(design: Model, seed: int = 0) -> LanguageModel:
    """A freshly initialised model; the same seed gives the same weights and leaves the global generator alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LanguageModel(design)
