"""What a bench measures: sizes, recipes, rounds. Every field can be changed from the command line."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from postformer.design.base import nearest
from postformer.design.loading import override

PARTS = ("kernels", "lengths", "training", "decoding")
READ = 64
"""Tokens that are read before a state is taken to a longer context"""
LINEAR = "linear"
"""Among recipes: all that ship whose memories are matrices and vectors only, K1 and K2."""


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class KernelSizes(_Data):
    batch: int = Field(default=2, ge=1)
    length: int = Field(default=2048, ge=1)
    heads: int = Field(default=4, ge=1)
    dim: int = Field(default=64, ge=1)
    """Channels of a head; scans and convolutions have heads * dim channels, the selective scan twice as many"""
    cases: tuple[str, ...] | None = None
    """None: all"""
    rounds: int = Field(default=5, ge=1)


class LengthSizes(_Data):
    recipes: tuple[str, ...] = ("transformer", "gated-deltanet", "kda", "rwkv7", "mamba2", "mamba", "griffin")
    tokens: tuple[int, ...] = Field(default=(1024, 2048, 4096, 8192, 16384, 32768), min_length=2)
    width: int = Field(default=64, ge=8)
    layers: int = Field(default=1, ge=1)
    """Or the fewest that hold a recipe's pattern"""
    rounds: int = Field(default=3, ge=1)


class TrainingSizes(_Data):
    recipes: tuple[str, ...] = ("transformer", "mamba2", "gated-deltanet", "qwen3-next", "mamba")
    batch: int = Field(default=2, ge=1)
    length: int = Field(default=1024, ge=2)
    short: int = Field(default=128, ge=2)
    """The length for Mamba-1, whose class in transformers loops over tokens in Python"""
    width: int = Field(default=256, ge=64, multiple_of=64)
    layers: int = Field(default=4, ge=1)
    rounds: int = Field(default=3, ge=1)


class DecodingSizes(_Data):
    recipes: tuple[str, ...] = ("transformer", "mamba2", "gated-deltanet", "qwen3-next", "mamba")
    contexts: tuple[Annotated[int, Field(ge=READ)], ...] = Field(default=(100, 1000, 10_000, 100_000), min_length=1)
    peer_context: int = 1000
    """Up to this context transformers is measured too: it has to read all of it first"""
    tokens: int = Field(default=48, ge=2)
    width: int = Field(default=256, ge=64, multiple_of=64)
    layers: int = Field(default=4, ge=1)
    rounds: int = Field(default=3, ge=1)


class BenchConfig(_Data):
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of kernels' inputs; models stay in float32"""
    backend: Literal["native", "parallel"] = "native"
    """Of our kernels, which must be what runs: compiled code (the default; Triton's on a GPU) or PyTorch operations"""
    threads: tuple[int | Literal["all"], ...] = (1, "all")
    """Of kernels; the other parts use the last of them"""
    seconds: float = Field(default=1.5, gt=0)
    """What one side of one comparison may take: a slower one gets fewer rounds, but at least one"""
    kernels: KernelSizes = KernelSizes()
    lengths: LengthSizes = LengthSizes()
    training: TrainingSizes = TrainingSizes()
    decoding: DecodingSizes = DecodingSizes()

    def counts(self) -> list[int]:
        """Numbers of threads, ascending, each once."""
        return sorted({cores() if n == "all" else n for n in self.threads})


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


QUICK: dict[str, Any] = {
    "seconds": 0.5,
    "kernels": {"length": 256, "rounds": 3},
    "lengths": {"recipes": ["transformer", "gated-deltanet", "mamba"], "tokens": [512, 1024, 2048], "rounds": 2},
    "training": {"length": 128, "short": 16, "rounds": 2},
    "decoding": {"contexts": [100, 10_000], "peer_context": 100, "tokens": 6, "rounds": 2},
}
"""Enough to see that everything runs; ratios of such sizes are not those of the full run."""


def configured(changes: Sequence[str] = (), quick: bool = False, device: str = "cpu") -> BenchConfig:
    """The settings with "path=value" changes. Raises ValueError that names the field."""
    data: dict[str, Any] = {part: dict(QUICK[part]) if quick else {} for part in PARTS}
    data |= {"device": device, **({"seconds": QUICK["seconds"]} if quick else {})}
    for change in changes:
        override(data, change)
    try:
        return BenchConfig.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = [str(part) for part in first["loc"]]
        known: Any = BenchConfig.model_fields
        if first["type"] == "extra_forbidden" and len(path) > 1:
            known = BenchConfig.model_fields[path[0]].annotation.model_fields  # type: ignore[union-attr]
        hint = nearest(path[-1], known) if first["type"] == "extra_forbidden" else f" (got {first['input']!r})"
        raise ValueError(f"{'.'.join(path)}: {first['msg']}.{hint}") from None
