"""Memories over 65,536 tokens: do they stay finite and bounded, and what do they still know? Draws the variance of a
Kalman memory too. Writes the table and the figure of docs/kalman.md.

    python benchmarks/long_filters.py [--tokens 65536] [--page docs/kalman.md]

One head of 32 x 32, fp32, fed in pieces of 1024 tokens with the state carried. What is to be learned drifts,
S_t = a S_{t-1} + sqrt(1 - a^2) change, v_t = S_t^T k_t + noise of variance r. Keys are correlated (the square of their
i-th direction falls as 1 / i); "unit" keys have length one, "raw" keys are left as drawn, with a mean square of 3.
Kalman memories are told a and r. Queries are drawn like keys; the error is that of o against S_t^T q_t.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from postformer.design import load
from postformer.kernels import gdr, kalman_gains, precision
from postformer.kernels.deep import Rule, deep, start
from postformer.memory.deep_losses import slope
from postformer.memory.deep_nets import Inner, Mlp
from postformer.memory.filter import Filter
from postformer.model import build
from postformer.probe import variance

D, KEEP, NOISE, PIECE = 32, 0.9995, 0.1, 1024
MARKS = (1024, 4096, 16384, 65536)
ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- measured -->", "<!-- /measured -->"
Step = Callable[[Tensor, Tensor, Tensor, Any], tuple[Tensor, Any, Tensor]]
"""(q, k, v [1, 1, T, D], state) -> (o, state, norm of the memory)"""


def stream(tokens: int, unit: bool, seed: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(q, k, v, S^T q) in pieces, [1, 1, PIECE, D]"""
    draw = torch.Generator().manual_seed(seed)
    spread = (1.0 / torch.arange(1, D + 1)).sqrt()
    spread = spread * (3 / spread.square().sum()).sqrt()
    S = torch.randn(D, D, generator=draw)

    def keys() -> Tensor:
        k = torch.randn(PIECE, D, generator=draw) * spread
        return k / k.norm(dim=-1, keepdim=True) if unit else k

    for _ in range(tokens // PIECE):
        q, k, v, truth = keys(), keys(), [], []
        for t in range(PIECE):
            S = KEEP * S + (1 - KEEP**2) ** 0.5 * torch.randn(D, D, generator=draw)
            v.append(S.T @ k[t] + NOISE**0.5 * torch.randn(D, generator=draw))
            truth.append(S.T @ q[t])
        yield tuple(x[None, None] for x in (q, k, torch.stack(v), torch.stack(truth)))  # type: ignore[misc]


def decay(k: Tensor, keep: float = KEEP) -> Tensor:
    return torch.full_like(k[..., :1], keep).log()


def kalman(form: str) -> Step:
    def step(q: Tensor, k: Tensor, v: Tensor, state: Any) -> tuple[Tensor, Any, Tensor]:
        g, r = decay(k), torch.full_like(k[..., 0], NOISE)
        change = {"factor": 2 * g, "drift": -torch.expm1(2 * g)}
        if form == "full":
            P, M = state or (torch.eye(D)[None, None], None)
            gain, _, P = kalman_gains(k, r, state=P, start=torch.ones(1),
                                      **{name: x.squeeze(-1) for name, x in change.items()})
        else:
            square = k.square() if form == "diagonal" else k.square().mean(-1, keepdim=True)
            P, M = state or (torch.ones(1, 1, square.shape[-1]), None)
            before, after = precision(square / NOISE, state=P, start=torch.ones(1), **change)
            P, spread = after[:, :, -1], k / before
            gain = spread / ((k * spread).sum(-1, keepdim=True) + NOISE)
        o, M = gdr(q, g, w=gain, e=k, u=v, state=M)
        return o, (P, M), M.norm()

    return step


def delta(rate: float, keep: float) -> Step:
    def step(q: Tensor, k: Tensor, v: Tensor, state: Any) -> tuple[Tensor, Any, Tensor]:
        o, M = gdr(q, decay(k, keep), w=rate * k, e=k, u=v, state=state)
        return o, M, M.norm()

    return step


def titans(rate: float, keep: float, momentum: float, clip: float | None) -> Step:
    """A network of two layers, 32 -> 128 -> 32, gradients at the weights of the chunk's start (16 tokens)."""
    net, rule = Mlp(D, D, 2, 4 * D, "gelu", False), Rule(16, clip=clip)
    inner = Inner(net, slope("l2", 2.0))

    def step(q: Tensor, k: Tensor, v: Tensor, state: Any) -> tuple[Tensor, Any, Tensor]:
        if state is None:
            draw = torch.Generator().manual_seed(1)
            first = tuple(torch.randn(1, 1, a, b, generator=draw) * a**-0.5 for a, b in net.maps.values())
            state = start(first, rule, momentum=True, dims=(D, D))
        per = torch.ones_like(k[..., 0])
        o, state = deep(inner, q, k, v, rate * per, state=state, rule=rule, log_gamma=(keep * per).log(),
                        log_eta=(momentum * per).log())
        return o, state, torch.stack([w.norm() for w in state.running]).norm()

    return step


CONTENDERS: dict[str, Step] = {
    "kalman, full covariance": kalman("full"),
    "kalman, diagonal precision": kalman("diagonal"),
    "kalman, one variance": kalman("isotropic"),
    "gated delta rule, rate 0.1": delta(0.1, KEEP),
    "gated delta rule, rate 0.5": delta(0.5, KEEP),
    "delta rule, rate 0.5": delta(0.5, 1.0),
    "delta rule, rate 1.9": delta(1.9, 1.0),
    "titans, as its recipe starts": titans(1 / 32, 0.982, 0.5, 1.0),
    "titans, neither clipped nor forgetting": titans(1 / 32, 1.0, 0.5, None),
}


@torch.no_grad()
def run(step: Step, tokens: int, unit: bool) -> list[dict[str, float | bool]]:
    """At each mark: norm of the memory, largest |o| so far, error over the last piece, finite."""
    state, seen, most, rows = None, 0, 0.0, []
    for q, k, v, truth in stream(tokens, unit):
        o, state, norm = step(q, k, v, state)
        seen, most = seen + PIECE, max(most, float(o.abs().max()))
        fine = bool(torch.isfinite(o).all() and torch.isfinite(norm))
        if seen in MARKS or not fine:
            error = float((o - truth).square().mean() / truth.square().mean())
            rows.append({"tokens": seen, "norm": float(norm), "most": most, "error": error, "finite": fine})
        if not fine:
            break
    return rows


def number(x: float) -> str:
    return f"{x:.3g}" if x < 1e4 else f"{x:.0e}".replace("e+0", "e").replace("e+", "e")


def table(tokens: int) -> list[str]:
    lines = []
    marks = [m for m in MARKS if m <= tokens]
    for unit in (True, False):
        name = "unit" if unit else "raw"
        lines += ["", f"Keys: {name}.", "",
                  f"| memory | {' | '.join(f'{m:,} tokens' for m in marks)} | largest \\|o\\| | error at the end |",
                  "| --- |" + " ---: |" * (len(marks) + 2)]
        for label, step in CONTENDERS.items():
            rows = run(step, tokens, unit)
            at = {row["tokens"]: row for row in rows if row["finite"]}
            last = rows[-1]
            cells = [number(at[m]["norm"]) if m in at else "not finite" for m in marks]
            end = [number(last["most"]), f"{last['error']:.3f}" if last["error"] < 10 else number(last["error"])]
            lines.append(f"| {label} | " + " | ".join(cells + (end if last["finite"] else ["-", "-"])) + " |")
            print(lines[-1], flush=True)
    return lines


def figure(path: Path) -> None:
    """Variance over time of four keys, and of what a model reads, as the probe finds it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    T, keep, noise = 600, 0.995, 0.3
    draw = torch.Generator().manual_seed(3)
    names = ("seen in tokens 1 to 200", "seen in tokens 200 to 400", "seen now and then", "never seen")
    keys = torch.linalg.qr(torch.randn(16, 16, generator=draw))[0]
    k = torch.zeros(T, 16)
    for t in range(T):
        one = 0 if t < 200 else 1 if t < 400 else None
        if t % 50 == 25:
            one = 2
        if one is not None:
            k[t] = keys[one]
    write = (k.norm(dim=-1) > 0).float()[None, None]
    g = torch.full((1, 1, T), keep).log()
    colours = ("#0068a8", "#b84a00", "#00734f", "#6b7078")
    fig, axes = plt.subplots(1, 3, figsize=(12, 3.6), sharey=True, layout="constrained")
    for i, (name, colour) in enumerate(zip(names, colours)):
        q = keys[i].expand(1, 1, T, 16)
        _, full, _ = kalman_gains(k[None, None], torch.full((1, 1, T), noise), state=torch.eye(16)[None, None],
                                  start=torch.ones(1), factor=2 * g, drift=-torch.expm1(2 * g), write=write, query=q)
        _, after = precision(k[None, None].square().mean(-1, keepdim=True) / noise, state=torch.ones(1, 1, 1),
                             start=torch.ones(1), factor=2 * g[..., None], drift=-torch.expm1(2 * g[..., None]))
        assert full is not None
        axes[0].plot(full[0, 0], color=colour, label=name, lw=1.6)
        if i == 0:  # the others' would be the same line
            axes[1].plot((q.square() / after).sum(-1)[0, 0], color="#1d2025", lw=1.6)
            axes[1].annotate("any key", (300, 0.22), fontsize=9, ha="center", va="bottom")
    axes[0].set_title("full covariance: each key has its own", fontsize=10)
    axes[1].set_title("one variance: all keys share it", fontsize=10)
    axes[0].set_ylabel("variance of a read / prior")
    known, found = read_by_a_model()
    for i, colour, label in ((True, colours[0], "symbol seen before"), (False, colours[1], "new symbol")):
        at = torch.nonzero(known == i).flatten()
        axes[2].plot(at, found[at], "o" if i else "D", ms=3.5, color=colour, label=label)
    axes[2].legend(frameon=False, fontsize=9, loc="upper right")
    axes[2].set_title("probe: eight symbols repeated, new ones between", fontsize=10)
    for ax in axes:
        ax.set_xlabel("token")
        ax.set_ylim(0, 1.08)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[:2]:
        ax.axvline(200, color="#c8cbd0", lw=0.8, zorder=0)
        ax.axvline(400, color="#c8cbd0", lw=0.8, zorder=0)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    fig.savefig(path, dpi=110)


def read_by_a_model() -> tuple[Tensor, Tensor]:
    """(whether each token's symbol was seen before [T] bool, variance of its read over the prior's [T]) of an untrained
    model whose queries are its keys."""
    model = build(load({"name": "probed", "model": {"width": 64, "mixers": {"memory": {
        "kind": "filter", "heads": {"value": 1}, "noise": "head"}}, "stack": ["memory"]}}).model)
    (memory,) = (m for m in model.modules() if isinstance(m, Filter))
    memory.params.q.load_state_dict(memory.params.k.state_dict())
    tokens = [t % 8 for t in range(160)]
    for i, t in enumerate(range(44, 160, 16)):
        tokens[t : t + 4] = range(100 + 4 * i, 104 + 4 * i)
    known = torch.tensor([symbol in tokens[:t] for t, symbol in enumerate(tokens)])
    (found,) = variance(model, (torch.tensor([tokens]),)).values()
    before = memory.prior_variance() / memory.shape[1]  # queries are unit vectors over sqrt(dim_key)
    return known, found[0, :, 0] / before.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=MARKS[-1])
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "kalman.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    figure(args.page.with_name("kalman-variance.png"))
    found = "\n".join(table(args.tokens))
    text = args.page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    args.page.write_text(f"{before}{BEGIN}\n{found}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
