"""Triton kernels on a GPU: built, checked against the reference and timed, forward and forward + backward.

python benchmarks/gpu_kernels.py [--length 2048] [--batch 8] [--heads 8] [--repeats 10] [--quick]

Prints one JSON line for the device, one for the floors (a large product, a copy), one per check and one per timing.
Peers run where they are: PyTorch's causal attention always, flash-linear-attention and mamba_ssm if installed. Ends
with status 1 where a check fails or a kernel fell back to PyTorch operations. Without a GPU it says so and ends with
status 2; TRITON_INTERPRET=1 with --quick runs the checks on a CPU, slowly, and times nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings

import torch
import torch.nn.functional as F

from postformer.kernels import gdr, selective_scan
from postformer.kernels.gpu import device as triton_device

NAMES = {"gated delta": (1, 0, True), "kda": (1, 0, False), "mamba2": (0, 1, True), "gla": (0, 1, False),
         "rwkv7": (1, 1, False)}  # fmt: skip
"""name -> (erases, adds, one decay per head)"""


def say(**line) -> None:
    print(json.dumps({key: float(f"{x:.4g}") if isinstance(x, float) else x for key, x in line.items()}), flush=True)


def inputs(name: str, B: int, T: int, H: int, d: int, dtype: torch.dtype, device: str, decay: float) -> dict:
    """Of `gdr`, as layers give them: tokens before heads in memory."""
    erases, adds, head = NAMES[name]

    def new(width: int) -> torch.Tensor:
        return torch.randn(B, T, H, width, device=device).transpose(1, 2)

    k = F.normalize(new(d), dim=-1)
    found = {"q": (new(d) * d**-0.5).to(dtype), "g": -decay * torch.rand_like(new(1 if head else d))}
    if erases:
        found |= {"w": (torch.rand_like(new(1)) * k).to(dtype), "e": k.to(dtype), "u": new(d).to(dtype)}
    if adds:
        found |= {"k_add": F.normalize(new(d), dim=-1).to(dtype), "v_add": new(d).to(dtype)}
    if erases and adds:
        found |= {"u": torch.zeros_like(found["u"]), "erase_before_decay": True}
    return {key: x.detach().requires_grad_() if torch.is_tensor(x) else x for key, x in found.items()}


def scan_inputs(B: int, T: int, D: int, N: int, dtype: torch.dtype, device: str) -> dict:
    def new(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device)

    x, dt, b, c = new(B, T, D), F.softplus(new(B, T, D) - 3), new(B, T, N), new(B, T, N)
    found = {"x": x.to(dtype), "dt": dt.to(dtype), "A": -torch.arange(1, N + 1, device=device).repeat(D, 1).float(),
             "B": b.to(dtype), "C": c.to(dtype)}  # fmt: skip
    return {key: z.detach().requires_grad_() for key, z in found.items()}


def check(kind: str, function, given: dict, tolerance: float, **also) -> bool:
    """Outputs and gradients by kernels against the reference in double precision on the same numbers."""
    exact = {key: z.detach().double().requires_grad_() if torch.is_tensor(z) else z for key, z in given.items()}
    errors = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # a fallback
            found = function(**given, backend="native")
        expected = function(**exact, backend="reference")
        weights = [torch.randn_like(z, dtype=torch.float64) for z in expected]
        for side in (found, expected):
            torch.autograd.backward([(z * w).sum() for z, w in zip(side, weights)])
        pairs = [*zip(("o", "state"), found, expected)]
        pairs += [(f"d{key}", z.grad, exact[key].grad) for key, z in given.items() if torch.is_tensor(z)]
        for key, z, w in pairs:
            assert z is not None
            assert w is not None
            errors[key] = ((z.double() - w).abs().max() / w.abs().max().clamp_min(1e-30)).item()
        failed = [key for key, error in errors.items() if not error <= tolerance]
        say(check=kind, **also, ok=not failed, tolerance=tolerance, worst=max(errors.values()), failed=failed)
        return not failed
    except Exception as error:  # one kernel that fails must not hide how the others do
        say(check=kind, **also, ok=False, error=f"{type(error).__name__}: {str(error)[:600]}")
        return False


def seconds(call, repeats: int) -> tuple[float, float]:
    """(minimum, median) of the device's time."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return min(times), sorted(times)[len(times) // 2]


def timed(kind: str, function, given: dict, repeats: int, **also) -> None:
    tensors = [z for z in given.values() if torch.is_tensor(z)]

    def both() -> None:
        y = function(**given)
        y = y[0] if isinstance(y, tuple) else y
        torch.autograd.grad(y, tensors, torch.ones_like(y), allow_unused=True)

    def forward() -> None:
        with torch.no_grad():
            function(**given)

    for what, call in (("forward", forward), ("forward and backward", both)):
        try:
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            fastest, median = seconds(call, repeats)
            memory = (torch.cuda.max_memory_allocated() - held) / 2**20
            say(time=kind, **also, what=what, ms=fastest * 1e3, median_ms=median * 1e3, extra_mib=memory)
        except Exception as error:
            say(time=kind, **also, what=what, error=f"{type(error).__name__}: {str(error)[:300]}")


def floors(repeats: int) -> None:
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    product, copy = seconds(lambda: x @ x, repeats)[0], seconds(lambda: y.copy_(x), repeats)[0]
    say(floor="bf16 product", tflops=2 * 8192**3 / product / 1e12)
    say(floor="copy", gbytes_per_second=2 * x.numel() * 2 / copy / 1e9)


def peers(B: int, T: int, H: int, d: int, repeats: int) -> None:
    """The same sizes in bf16 by others."""
    q, k, v = (torch.randn(B, H, T, d, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    given = {"query": q, "key": k, "value": v, "is_causal": True}
    timed("causal attention", F.scaled_dot_product_attention, given, repeats, by="torch", d=d)
    q, k, v = (z.detach().transpose(1, 2).contiguous().requires_grad_() for z in (q, F.normalize(k, dim=-1), v))
    beta, g = torch.rand(B, T, H, device="cuda", dtype=torch.bfloat16), -torch.rand(B, T, H, device="cuda")
    channels = -torch.rand(B, T, H, d, device="cuda")
    for name, module, function, more in (
        ("gated delta", "gated_delta_rule", "chunk_gated_delta_rule", {"g": g, "beta": beta}),
        ("kda", "kda", "chunk_kda", {"g": channels, "beta": beta}),
        ("gla", "gla", "chunk_gla", {"g": channels}),
    ):
        try:
            there = getattr(__import__(f"fla.ops.{module}", fromlist=[function]), function)
        except (ImportError, AttributeError) as error:
            say(time=name, by="flash-linear-attention", d=d, skipped=str(error)[:200])
            continue
        more = {key: z.detach().requires_grad_() for key, z in more.items()}
        timed(name, there, {"q": q, "k": k, "v": v, **more}, repeats, by="flash-linear-attention", d=d)


def peer_scan(given: dict, repeats: int) -> None:
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # pyright: ignore
    except ImportError as error:
        say(time="selective scan", by="mamba_ssm", skipped=str(error)[:200])
        return
    turned = {{"x": "u", "dt": "delta"}.get(key, key): z if key == "A" else z.detach().mT.contiguous().requires_grad_()
              for key, z in given.items()}  # fmt: skip
    timed("selective scan", selective_scan_fn, turned, repeats, by="mamba_ssm")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("length", 2048), ("batch", 8), ("heads", 8), ("repeats", 10)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--quick", action="store_true", help="tiny checks only")
    args = parser.parse_args()
    gpu, why = torch.cuda.is_available(), triton_device.importable()
    if why or not (gpu or (triton_device.interpreted() and args.quick)):
        say(not_run=why or "there is no GPU here", command=f"python {' '.join(sys.argv)}")
        return 2
    device = "cuda" if gpu else "cpu"
    torch.manual_seed(0)
    say(device=torch.cuda.get_device_name() if gpu else "interpreter", torch=torch.__version__,
        triton=__import__("triton").__version__, at=time.strftime("%Y-%m-%d"))  # fmt: skip
    right = True
    precisions = ((torch.float32, 1e-4), (torch.bfloat16, 2e-2))
    sizes = ((1, 35, 1, 16),) if args.quick else ((2, 197, 3, 64), (1, 300, 2, 128))
    for B, T, H, d in sizes:
        for dtype, tolerance in precisions:
            for name in NAMES:
                for decay in (0.1, 60.0) if not args.quick else (1.0,):
                    given = inputs(name, B, T, H, d, dtype, device, decay)
                    right &= check(name, gdr, given, tolerance, dtype=str(dtype)[6:], d=d, decay=decay)
            given = scan_inputs(B, T, 2 * d if not args.quick else 4, 16 if not args.quick else 4, dtype, device)
            right &= check("selective scan", selective_scan, given, tolerance, dtype=str(dtype)[6:])
    if args.quick or not gpu:
        return not right
    floors(args.repeats)
    B, T, H = args.batch, args.length, args.heads
    for d in (64, 128):
        for dtype in (torch.bfloat16, torch.float32):
            for name in NAMES:
                given = inputs(name, B, T, H, d, dtype, device, 0.1)
                for by in ("native", "parallel"):
                    timed(name, gdr, {**given, "backend": by}, args.repeats, by=by, d=d, dtype=str(dtype)[6:])
        peers(B, T, H, d, args.repeats)
    for dtype in (torch.bfloat16, torch.float32):
        given = scan_inputs(B, T, H * 128, 16, dtype, device)
        for by in ("native", "parallel"):
            timed("selective scan", selective_scan, {**given, "backend": by}, args.repeats, by=by, dtype=str(dtype)[6:])
        peer_scan(given, args.repeats)
    for length in (1024, 4096, 16384, 65536):
        given = inputs("gated delta", 1, length, H, 64, torch.bfloat16, device, 0.1)
        timed("gated delta", gdr, {**given, "backend": "native"}, args.repeats, by="native", length=length)
    return not right


if __name__ == "__main__":
    sys.exit(main())
