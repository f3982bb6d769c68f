"""Run every compiled kernel of a library built with sanitizers: python sanitized.py LIBRARY. Not a test by itself."""

import ctypes
import itertools
import sys
from pathlib import Path

import torch

import postformer
from postformer.kernels import attend, gdr, max_plus_scan, native, scan, selective_scan
from postformer.kernels.convolution import short_convolution
from postformer.kernels.rows import gated, norm, turned
from postformer.kernels.tape import record
from postformer.sampling.stepper import Stepper

library = native.Native(ctypes.CDLL(str(Path(sys.argv[1]))), "sanitized")
native.native = lambda: library
torch.set_num_threads(1)
ran = 0
for T, dk, dv, R, channel, erases, adds in itertools.product(
        (1, 40), (3, 33), (20,), (1, 3), (False, True), (False, True), (False, True)):
    if not erases and not adds:
        continue
    for early in (False, True):
        x = {"q": torch.randn(1, 2, T, dk), "g": -torch.rand(1, 2, T, dk if channel else 1)}
        if erases:
            x |= {"w": torch.randn(1, 2, T * R, dk) / 9, "e": torch.randn(1, 2, T * R, dk) / 9,
                  "u": torch.randn(1, 2, T * R, dv)}
        if adds:
            x |= {"k_add": torch.randn(1, 2, T * R, dk), "v_add": torch.randn(1, 2, T * R, dv)}
        for y in x.values():
            y.requires_grad_()
        found = gdr(**x, backend="native", erase_before_decay=early, read_before_update=early, emit=8)
        sum(y.sum() for y in found).backward()
        ran += 1


def tensors(*shapes, dtype=torch.float32):
    return [torch.rand(shape, dtype=dtype).requires_grad_() for shape in shapes]


def backward(found):
    sum(y.sum() for y in found if y is not None).backward()
    return 1


for B, T, D, N, dtype in itertools.product((2,), (1, 2, 35), (1, 17, 130), (1, 5),
                                           (torch.float32, torch.float64)):
    reset = torch.rand(B, T) < 0.2
    x, dt, A, Bt, C, h, skip = tensors((B, T, D), (B, T, D), (D, N), (B, T, N), (B, T, N), (B, D, N), (D,), dtype=dtype)
    ran += backward(selective_scan(x, dt, -A, Bt, C, h0=h, reset=reset, emit=8, backend="native", skip=skip))
    a, b, h = tensors((B, T, D), (B, T, D), (B, D), dtype=dtype)
    ran += backward([scan(a, b, h, reset, backend="native")])
    max_plus_scan(a, b, h, reset, backend="native")
    if N > 1:
        x, w, bias, past = tensors((B, T, D), (D, N), (D,), (B, N - 1, D), dtype=dtype)
        ran += backward([short_convolution(x, w, bias, past, reset, "silu", backend="native")])
    x, y, w, bias = tensors((B, T, D), (B, T, D), (D,), (D,), dtype=dtype)
    ran += backward([gated(x, y, backend="native"), gated(x, backend="native")])
    for kind in ("rms", "layer", "l2"):
        ran += backward([norm(x, kind, w, bias if kind == "layer" else None, y, eps=1e-5, activation="silu",
                              backend="native")])
    if D > 1:
        x, = tensors((B, 2, T, D), dtype=dtype)
        angles = torch.rand(1, 1, T, D // 2, dtype=dtype)
        ran += backward([turned(x, angles, angles, interleaved, backend="native") for interleaved in (False, True)])


with torch.inference_mode():
    for name in ("transformer", "sliding-window", "mamba", "gated-deltanet", "rwkv7", "lstm"):
        model = postformer.load(name, ["model.vocab=40"], width=32, layers=2).build().eval()
        stepper = Stepper(model, model(torch.randint(0, 40, (2, 3))).state)
        for _ in range(40):  # the room runs out once
            stepper.step(torch.randint(0, 40, (2,)))
        assert stepper.tape is not None, stepper.reason
        ran += 1
    for heads, group, d, room in itertools.product((1, 2), (1, 3), (1, 20, 33), (1, 17, 600)):
        given = [torch.randn(2, heads * group, d), torch.randn(2, 2, heads, d), torch.randn(2, room, 2, heads, d),
                 torch.tensor([0, room + 3])]
        _, _, tape = record(lambda given=given: ([*attend(*given, 0.3)], []), given, [])
        tape.run()
        ran += 1
print("ran", ran)
