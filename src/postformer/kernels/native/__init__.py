"""Compiled kernels for CPUs: C sources of this folder, built by the system's compiler at first use, called by ctypes.

The result is kept in a cache folder, named after the sources, the compiler and the processor, so that a change of any
builds it anew. Where there is no compiler, or POSTFORMER_NATIVE=0, the PyTorch forms run; `native` says which and why.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCES = Path(__file__).parent
FLAGS = ("-std=c11", "-O2", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-shared",
         "-fPIC")
"""Standard C alone would forbid the compiler to fuse a product with a sum."""
SUFFIX = {torch.float32: "f32", torch.float64: "f64"}


@dataclass(frozen=True)
class Native:
    """The compiled library, or why there is none."""

    library: ctypes.CDLL | None
    reason: str


def folder() -> Path:
    """Where built libraries are kept: in the user's cache folder, wherever corpora are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "postformer" / "native"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        found = ""
    return f"{platform.system()} {platform.machine()} {platform.processor()} {found}"


def _key(compiler: str, flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for source in sorted(SOURCES.glob("*.[ch]")):
        digest.update(source.name.encode() + source.read_bytes())
    about = Path(compiler).resolve()
    program = about.stat()  # asking it for its version would start a process in every process that uses kernels
    digest.update("\n".join([f"{about} {program.st_size} {program.st_mtime_ns}", *flags, _processor()]).encode())
    return digest.hexdigest()[:16]


def build(compiler: str, into: Path, flags: tuple[str, ...] = FLAGS) -> Path:
    """The library built with these flags, from the folder `into` if it has been built there before.

    OpenMP is used where the compiler has it. Raises OSError where nothing can be written, RuntimeError with the
    compiler's own words where it fails.
    """
    result = into / f"kernels-{_key(compiler, flags)}.so"
    if result.exists():
        return result
    into.mkdir(parents=True, exist_ok=True)
    said = ""
    for threads in (("-fopenmp",), ()):
        with tempfile.TemporaryDirectory(dir=into) as scratch:
            said = _compile([compiler, *flags, *threads, "-w"], Path(scratch))
            if not said:
                (Path(scratch) / "all.so").replace(result)  # others may build it too: whoever is last wins
                return result
    raise RuntimeError(f"{compiler} failed: {said[-400:]}")


def _compile(command: list[str], scratch: Path) -> str:
    """All sources at the same time, then linked into all.so; what a failing compiler said."""
    objects = {source: str(scratch / f"{source.stem}.o") for source in sorted(SOURCES.glob("*.c"))}
    running = [subprocess.Popen([*command, "-c", str(source), "-o", object], stderr=subprocess.PIPE, text=True)
               for source, object in objects.items()]
    ends = [(process.communicate(timeout=300)[1], process.returncode) for process in running]
    if all(code == 0 for _, code in ends):
        linker = [*command, "-o", str(scratch / "all.so"), *objects.values(), "-lm"]
        done = subprocess.run(linker, capture_output=True, text=True, timeout=300)
        ends = [(done.stderr, done.returncode)]
    return "\n".join(said.strip() or "no reason given" for said, code in ends if code)


@cache
def native() -> Native:
    """The compiled library, built at the first call in a process unless it is cached."""
    if os.environ.get("POSTFORMER_NATIVE") == "0":
        return Native(None, "turned off by POSTFORMER_NATIVE=0")
    named = os.environ.get("CC")
    compiler = next((path for name in (named, "cc", "gcc", "clang") if name and (path := shutil.which(name))), None)
    if compiler is None:
        return Native(None, "no C compiler (cc, gcc or clang) was found; install one, or name it by CC")
    failure = ""
    for into in (folder(), Path(tempfile.gettempdir()) / f"postformer-{os.getuid() if hasattr(os, 'getuid') else ''}"):
        try:
            path = build(compiler, into)
            return Native(ctypes.CDLL(str(path)), f"{Path(compiler).name}, {path}")
        except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
            failure = str(error)
    return Native(None, failure)


@torch.compiler.assume_constant_result
def _built() -> bool:
    return native().library is not None


def available(x: Tensor) -> bool:
    """Whether compiled kernels take such a tensor."""
    return x.device.type == "cpu" and x.dtype in SUFFIX and _built()


def pointers(*tensors: Tensor | None) -> list[int]:
    """Where they lie, which holds as long as they are kept; 0 for None."""
    return [0 if x is None else x.data_ptr() for x in tensors]


def strides(dims: int, *tensors: Tensor | None) -> list[int]:
    """Of the first dimensions of each; zeros for None."""
    return [n for x in tensors for n in ((0,) * dims if x is None else x.stride()[:dims])]


def rows(x: Any) -> Any:
    """The tensor in a layout whose last dimension is dense."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


_watchers: list[set[str]] = []


@contextmanager
def watched() -> Iterator[set[str]]:
    """The names of the compiled kernels that `call` runs inside a `with` block, backward passes included."""
    seen: set[str] = set()
    _watchers.append(seen)
    try:
        yield seen
    finally:
        _watchers[:] = [other for other in _watchers if other is not seen]


def call(name: str, dtype: torch.dtype, sizes: list[int], pointers: list[int], strides: list[int]) -> None:
    """Run a kernel with as many threads as PyTorch uses. Raises MemoryError where it finds no memory."""
    library = native().library
    assert library is not None
    for seen in _watchers:
        seen.add(name)
    function = getattr(library, f"{name}_{SUFFIX[dtype]}")
    failed = function(
        (c_int64 * len(sizes))(*sizes), (c_void_p * len(pointers))(*pointers), (c_int64 * len(strides))(*strides),
        ctypes.c_int(torch.get_num_threads()),
    )
    if failed:
        raise MemoryError(f"{name}: no memory for its working space")
