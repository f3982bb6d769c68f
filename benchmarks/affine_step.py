"""A rule written as one step: in blocks against token by token, forward and backward, on this machine's cores.

python benchmarks/affine_step.py [--length 1024] [--key 32] [--batch 2] [--threads 1 2] [--repeats 5] [--sweep]

Both run the same rules (those of the tests) in one process, by turns; the table gives the fastest of the repeats. On a
machine with other work, the time of the processor (--cpu) says more than the time on the wall, for one thread.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "contract"))
import step_rules as rules

from postformer.kernels import use

RULES = {"gated delta": rules.GatedDelta, "gated linear": rules.GatedLinear}


def once(memory, backend: str, batch: int, length: int, gradients: bool, clock) -> tuple[float, torch.Tensor]:
    x = torch.randn(batch, length, memory.dim_in, generator=torch.Generator().manual_seed(0))
    x.requires_grad_(gradients)
    with torch.set_grad_enabled(gradients), use(backend=backend):
        start = clock()
        out = memory(x)
        if gradients:
            (out.y.sum() + out.state.sum()).backward()
        return clock() - start, out.y.detach()


def measure(memory, batch: int, length: int, gradients: bool, repeats: int, clock) -> tuple[float, float, float]:
    """(seconds token by token, seconds in blocks, largest relative difference of the outputs)"""
    assert memory.parallel.startswith("runs in blocks"), memory.parallel
    best, ys = {}, {}
    for _ in range(repeats):
        for backend in ("reference", "parallel"):
            took, ys[backend] = once(memory, backend, batch, length, gradients, clock)
            best[backend] = min(took, best.get(backend, took))
    gap = (ys["parallel"] - ys["reference"]).abs().max() / ys["reference"].abs().max()
    return best["reference"], best["parallel"], gap.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("length", 1024), ("key", 32), ("batch", 2), ("heads", 4), ("width", 128), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cpu", action="store_true", help="time of the processor instead of the wall's")
    parser.add_argument("--sweep", action="store_true", help="over lengths and sizes of the state, one thread")
    args = parser.parse_args()
    clock = time.process_time if args.cpu else time.perf_counter

    def line(name: str, rule, batch: int, heads: int, key: int, length: int, gradients: bool) -> None:
        torch.manual_seed(0)
        memory = rule(width=args.width, heads=heads, dk=key, dv=key)
        memory.design = None
        slow, fast, gap = measure(memory, batch, length, gradients, args.repeats, clock)
        what = "forward + backward" if gradients else "forward"
        sizes = f"B{batch} H{heads} {key:>3}x{key:<3} T{length:<5} threads {torch.get_num_threads()}"
        print(f"{name:<13} {what:<19} {sizes}: "
              f"token by token {slow * 1e3:8.1f} ms, in blocks {fast * 1e3:8.1f} ms, {slow / fast:5.2f} times as fast, "
              f"outputs within {gap:.0e}", flush=True)

    if args.sweep:
        torch.set_num_threads(1)
        for length in (32, 64, 256, 1024):
            for batch, heads, key in ((1, 1, 8), (2, 2, 16), (2, 4, 16), (2, 4, 32), (8, 4, 32), (2, 8, 64)):
                for gradients in (False, True):
                    line("gated delta", rules.GatedDelta, batch, heads, key, length, gradients)
        return
    for threads in args.threads:
        torch.set_num_threads(threads)
        for name, rule in RULES.items():
            for gradients in (True, False):
                line(name, rule, args.batch, args.heads, args.key, args.length, gradients)


if __name__ == "__main__":
    main()
