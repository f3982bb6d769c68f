"""HOPE's self-modifying memory (2512.24695, section 8) in the paper's orientation; its inner gradient by autograd."""

from __future__ import annotations

import pytest
import torch
from loops_plain import Here, Weights, convolve, model_loop, model_of, prove, rms, rms_norm, sigmoid, silu, swiglu, unit
from torch import Tensor

H, D = 2, 6
HEADS = [f"model.mixers.memory.heads={{value: {H}, dim_key: {D}, dim_value: {D}}}"]
NAMES = ("k", "v", "rate", "decay", "memory")


def inner_loss(weight: Tensor, k: Tensor, target: Tensor, skip: bool) -> Tensor:
    missed = weight @ k + (k if skip else 0) - target
    return (missed * missed).sum() / 2


def self_modifying(chunk: int, residual: bool, to_start: bool):
    def step(w: Weights, x: Tensor, here: Here) -> Tensor:
        """With C the chunk and M' = M_{C floor((t - 1) / C)}, M in R^{out x D}:

            k = M'_k(x), v = M'_v(x), eta = M'_eta(x), alpha = M'_alpha(x), hat v_box = M'_box(v)
            M_box,t = M_box,t-1 (alpha I - eta k k^T) - eta nabla L(M'_box; k, hat v_box),   y = M_memory,t-1(q)

        to_start: plus (1 - alpha) M_box,0, which is not the paper's.
        """
        taps = w("conv.weight")
        u = silu(convolve(here, "x", w.map("x", x), taps[: H * D]))
        q = silu(convolve(here, "q", w.map("q", x), taps[H * D :]))
        out = []
        for h in range(H):
            u_h, q_h = unit(u[D * h : D * (h + 1)]), unit(q[D * h : D * (h + 1)])
            if here.t == 0:
                for name in NAMES:
                    here.memory[h, name] = w(f"start.{name}_weight")[h].T
            if here.t % chunk == 0:
                for name in NAMES:
                    here.memory[h, name, "frozen"] = here.memory[h, name]
            frozen = {name: here.memory[h, name, "frozen"] for name in NAMES}
            skips = {name: residual and name not in ("rate", "decay") for name in NAMES}
            k, v = (unit(frozen[name] @ u_h + (u_h if residual else 0)) for name in ("k", "v"))
            eta = sigmoid((frozen["rate"] @ u_h)[0] + w("rate")[h])
            alpha = sigmoid((frozen["decay"] @ u_h)[0] + w("decay")[h])
            y = here.memory[h, "memory"] @ q_h + (q_h if residual else 0)
            for name in NAMES:
                target = frozen[name] @ v + (v if skips[name] else 0)
                gradient = torch.func.grad(inner_loss)(frozen[name], k, target, skips[name])
                m = here.memory[h, name] @ (alpha * torch.eye(D, dtype=x.dtype) - eta * torch.outer(k, k))
                here.memory[h, name] = m - eta * gradient
                if to_start:
                    here.memory[h, name] = here.memory[h, name] + (1 - alpha) * w(f"start.{name}_weight")[h].T
            out.append(rms(y, 1e-5) * w("norm.weight"))
        return w.map("out", torch.cat(out))

    return step


@pytest.mark.parametrize(("chunk", "residual", "decay_to", "note"), [
    (16, True, "zero", ""), (5, False, "zero", " (chunks of 5, without the skip)"),
    (1, True, "zero", " (chunks of 1: equations 86 to 88)"), (7, True, "start", " (chunks of 7, decay to the start)")])
def test_hope(record_proof, chunk, residual, decay_to, note):
    more = [f"update.chunk={chunk}", f"residual={str(residual).lower()}", f"decay_to={decay_to}"]
    step = self_modifying(chunk, residual, decay_to == "start")
    model = model_of("hope", HEADS + [f"model.mixers.memory.{m}" for m in more])
    prove(record_proof, "hope", f"2512.24695{note}", model,
          lambda w, tokens: model_loop(w, tokens, [[step, swiglu]] * 2, rms_norm()),
          by="token loop, inner gradient by torch.func,")
