"""Run every compiled kernel of a library built with sanitizers: python sanitized.py LIBRARY. Not a test by itself."""

import ctypes
import itertools
import sys
from pathlib import Path

import torch

from postformer.kernels import gdr, native

library = native.Native(ctypes.CDLL(str(Path(sys.argv[1]))), "sanitized")
native.native = lambda: library
torch.set_num_threads(1)
ran = 0
for T, dk, dv, R, channel, erases, adds in itertools.product(
        (1, 5, 40), (3, 16, 33), (1, 20), (1, 2, 3), (False, True), (False, True), (False, True)):
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
print("ran", ran)
