"""Next-token prediction: the mean cross-entropy of the scored positions.

    loss = -(1/N) sum_{i: target_i != -100} log softmax(logits_i)[target_i]  +  sum_name weight_name * auxiliary_name
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from postformer.objective.batch import IGNORE, Batch


class NextToken:
    """Cross-entropy of given targets, in nats per scored token, plus the model's auxiliary losses.

    `auxiliary` weighs the auxiliary losses: one number for all, or a number by name, e.g. "router" for the sum over all
    layers or "3.router" for layer 3 (names not given: 1).
    `chunk_elements` bounds the logits that exist at once: where rows * vocabulary is larger, the logits are made,
    scored and dropped chunk by chunk, and made again in the backward pass.
    """

    def __init__(self, auxiliary: float | Mapping[str, float] = 1.0, chunk_elements: int = 1 << 25) -> None:
        if chunk_elements < 1:
            raise ValueError(f"chunk_elements must be at least 1, not {chunk_elements}")
        self.auxiliary = auxiliary
        self.chunk_elements = chunk_elements

    def weight(self, batch: Batch | tuple) -> int:
        """How much this batch counts in a mean over several: its scored positions."""
        return Batch.of(batch).scored

    def loss(
        self, model: Any, batch: Batch | tuple, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """-> (scalar to minimise, metrics).

        metrics: `loss` (nats per scored token, without auxiliary losses), `bits_per_token` (bits per byte where a token
        is a byte), `tokens` (scored), `accuracy` of the most likely token, `auxiliary` if the model has any, and what
        it `measured` (sums by name) if it did: all detached tensors except `tokens`. A batch without scored positions
        has loss 0. The generator is not used.
        """
        tokens, targets, ctx = Batch.of(batch)
        scored = targets != IGNORE
        count = int(scored.sum())
        # The head is most of the work of a small model: where little is scored, only that is computed.
        sparse = 2 * count < targets.numel()
        select = scored if sparse else None
        wanted = targets[scored] if sparse else targets.flatten()

        if self._chunks(model, wanted.numel()):
            out = model.hidden(tokens, ctx, select=select)
            total, correct = self._in_chunks(model, out.y.flatten(0, -2), wanted)
        else:
            out = model(tokens, None, ctx, select=select)
            total, correct = _score(out.logits.flatten(0, -2), wanted)
        cross_entropy = total / max(count, 1)
        metrics: dict[str, Any] = {
            "loss": cross_entropy.detach(),
            "bits_per_token": cross_entropy.detach() / math.log(2),
            "tokens": count,
            "accuracy": correct / max(count, 1),
        }
        if out.measured:
            metrics["measured"] = out.measured
        if not out.losses:
            return cross_entropy, metrics
        extra = sum(self._weight_of(name) * value for name, value in out.losses.items())
        metrics["auxiliary"] = torch.as_tensor(extra).detach()
        return cross_entropy + extra, metrics

    def _weight_of(self, name: str) -> float:
        if not isinstance(self.auxiliary, Mapping):
            return self.auxiliary
        return self.auxiliary.get(name, self.auxiliary.get(name.rsplit(".", 1)[-1], 1.0))

    def _chunks(self, model: Any, rows: int) -> bool:
        if not (hasattr(model, "hidden") and hasattr(model, "logits")):
            return False
        return rows * model.design.vocab > self.chunk_elements

    def _in_chunks(self, model: Any, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        rows = max(1, self.chunk_elements // model.design.vocab)

        def part(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            return _score(model.logits(x), t)

        pairs = zip(hidden.split(rows), targets.split(rows))
        parts = [checkpoint(part, x, t, use_reentrant=False, preserve_rng_state=False) for x, t in pairs]
        return torch.stack([p[0] for p in parts]).sum(), torch.stack([p[1] for p in parts]).sum()


def _score(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """logits [N, V], targets [N] -> (summed cross-entropy in fp32 or better, number of right argmaxes)."""
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    total = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    with torch.no_grad():
        correct = (logits.argmax(-1) == targets).sum()
    return total, correct
