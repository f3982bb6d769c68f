"""Other people's code to measure against: transformers, flash-linear-attention, FlashAttention, PyTorch's attention."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

TRANSFORMERS, FLA, FLASH = "transformers", "flash-linear-attention", "FlashAttention"
PACKAGES = {TRANSFORMERS: ("transformers", "pip install 'postformer[hf]'"),
            FLA: ("flash-linear-attention", "pip install flash-linear-attention"),
            FLASH: ("flash-attn", "pip install flash-attn")}


class Absent(Exception):
    """Why a peer has no figure here; `str` says it."""


def why_absent(peer: str, device: str = "cpu") -> str | None:
    """Why a peer cannot run on a device; None: it can."""
    package, install = PACKAGES[peer]
    if peer != TRANSFORMERS and device != "cuda":
        return "not run: needs a GPU; there: postformer bench --device cuda"
    try:
        version(package)
    except PackageNotFoundError:
        return f"not installed; {install}"
    return None


def need(peer: str, device: str = "cpu") -> None:
    """Raises Absent where a peer cannot run."""
    if why := why_absent(peer, device):
        raise Absent(why)


def about(device: str) -> dict[str, str]:
    """peer -> version, or why it is absent"""
    return {peer: why_absent(peer, device) or version(PACKAGES[peer][0]) for peer in PACKAGES}


def failure(error: Exception) -> str:
    """Why a peer has no figure, from what it raised."""
    if isinstance(error, Absent):
        return str(error)
    return f"fails: {type(error).__name__}: {' '.join(str(error).split())[:160]}"


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' advice to install faster packages: what runs is in the results."""
    if why_absent(TRANSFORMERS):
        yield
        return
    logging: Any = importlib.import_module("transformers.utils.logging")
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def function(peer: str, module: str, name: str, device: str = "cpu") -> Callable[..., Any]:
    """A function of a peer's. Raises Absent."""
    need(peer, device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            raise Absent(f"{module}.{name} is not in version {version(PACKAGES[peer][0])}") from None


def backend(peer: str) -> str:
    """What runs inside a peer: transformers calls faster packages where they are installed."""
    if peer != TRANSFORMERS:
        return peer
    faster = [name for name in ("fla", "mamba_ssm", "causal_conv1d", "kernels") if importlib.util.find_spec(name)]
    return f"PyTorch operations, or {', '.join(faster)}" if faster else "PyTorch operations"


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of PyTorch's; all [B, T, H, d]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def model(name: str, width: int, layers: int) -> torch.nn.Module:
    """transformers' class of a recipe's size, freshly initialised. Raises Absent where it has none."""
    need(TRANSFORMERS)
    t: Any = importlib.import_module("transformers")
    heads, size = width // 64, {"vocab_size": 256, "hidden_size": width, "num_hidden_layers": layers}
    grouped = {"num_attention_heads": heads, "num_key_value_heads": max(1, heads // 2), "head_dim": 64,
               "intermediate_size": hidden(width)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name == "transformer":
            return t.LlamaForCausalLM(t.LlamaConfig(**size, **grouped, tie_word_embeddings=True))
        if name == "mamba2":
            return t.Mamba2ForCausalLM(t.Mamba2Config(**size, num_heads=2 * heads, head_dim=64, state_size=64,
                                                      n_groups=1, chunk_size=64, tie_word_embeddings=True))
        if name == "mamba":
            return t.MambaForCausalLM(t.MambaConfig(**size, state_size=16))
        if name in ("gated-deltanet", "qwen3-next"):
            hybrid = name == "qwen3-next"
            kinds = ["full_attention" if hybrid and i % 4 == 3 else "linear_attention" for i in range(layers)]
            return t.Qwen3NextForCausalLM(t.Qwen3NextConfig(
                **size, **grouped, linear_num_value_heads=heads, linear_key_head_dim=64, linear_value_head_dim=64,
                linear_num_key_heads=max(1, heads // 2) if hybrid else heads, layer_types=kinds,
                mlp_only_layers=list(range(layers)), tie_word_embeddings=not hybrid))
    raise Absent(f"transformers has no class like {name}")


def hidden(width: int) -> int:
    """Hidden channels of a gated feed-forward at a width, as our recipes have them."""
    from postformer.block.feedforward import FeedForwardDesign

    return FeedForwardDesign(kind="swiglu").hidden(width)
