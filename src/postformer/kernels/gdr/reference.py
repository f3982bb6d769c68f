"""The general diagonal + rank-one recurrence token by token: what chunks are checked against, and how decoding runs."""

from __future__ import annotations

import torch
from torch import Tensor


def gdr_recurrent(
    q: Tensor,
    g: Tensor | None,
    w: Tensor | None,
    e: Tensor | None,
    u: Tensor | None,
    k_add: Tensor | None,
    v_add: Tensor | None,
    state: Tensor,
    reset: Tensor | None,
    micro: int,
    erase_before_decay: bool,
    read_before_update: bool,
    emit: int | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Shapes as in `gdr`, all floating tensors already in the state's dtype; returns (o, state, emitted or None).

    Every product is a matmul, so that a FLOP counter sees 2 dk dv for each read, probe and outer product.
    """
    S = state
    q_t = q.unsqueeze(-2).unbind(2)
    alpha_t = None if g is None else g.exp().unsqueeze(-1).unbind(2)
    w_t = None if w is None else w.unsqueeze(-1).unbind(2)
    e_t = None if e is None else e.unsqueeze(-2).unbind(2)
    u_t = None if u is None else u.unsqueeze(-2).unbind(2)
    k_t = None if k_add is None else k_add.unsqueeze(-1).unbind(2)
    v_t = None if v_add is None else v_add.unsqueeze(-2).unbind(2)
    out, emitted = [], []
    for t, q_row in enumerate(q_t):
        if emit is not None and t % emit == 0:
            emitted.append(S)
        if reset is not None:
            S = S.masked_fill(reset[:, t, None, None, None], 0.0)
        before = S
        decayed = S if alpha_t is None else alpha_t[t] * S
        for m in range(t * micro, (t + 1) * micro):
            # Only the first micro-step of a token has a decay, so only there do "before" and "after" differ.
            probed = S if erase_before_decay else decayed
            S = decayed
            if w_t is not None and e_t is not None:
                error = -(e_t[m] @ probed) if u_t is None else u_t[m] - e_t[m] @ probed
                S = S + w_t[m] @ error
            if k_t is not None and v_t is not None:
                S = S + k_t[m] @ v_t[m]
            decayed = S
        out.append(q_row @ (before if read_before_update else S))
    o = torch.cat(out, 2) if out else q.new_zeros(*q.shape[:3], state.shape[-1])
    return o, S, None if emit is None else torch.stack(emitted, 1)
