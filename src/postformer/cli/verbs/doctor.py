"""postformer doctor: what is installed, which backends are active, and why."""

from __future__ import annotations

from postformer.cli.console import Json, finish

PACKAGES = ("torch", "numpy", "pydantic", "pyyaml", "typer", "rich", "safetensors", "jinja2", "matplotlib")
EXTRAS = {"transformers": "hf: weights of transformers' classes", "triton": "gpu: our kernels for GPUs",
          "flash-linear-attention": "kernels: used on a GPU where it is right and faster"}


def doctor(json: Json = False) -> None:
    """Tell versions, devices, the backend of every kernel, and check that they give right numbers here."""
    import os
    import platform
    import shutil
    import sys
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from postformer.data.cache import cache_dir
    from postformer.kernels.native import native
    from postformer.verify import verify

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    about: dict = {
        "postformer": installed("postformer"), "python": platform.python_version(), "platform": platform.platform(),
        "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "packages": {name: installed(name) for name in PACKAGES}, "extras": {name: installed(name) for name in EXTRAS},
        "devices": {
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "cuda": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
            "mps": torch.backends.mps.is_available(),
        },
        "compiler": shutil.which("c++") or shutil.which("g++") or shutil.which("cl"),
        "cache": str(cache_dir()),
    }
    print(f"postformer {about['postformer']}, Python {about['python']}, {about['platform']}")
    print(f"cpu: {about['cores']} cores, {about['devices']['cpu']}, {about['threads']} threads")
    print(f"cuda: {about['devices']['cuda'] or 'none (everything runs on the CPU)'};  "
          f"mps: {'yes' if about['devices']['mps'] else 'no'}")
    for name, found in about["packages"].items():
        print(f"  {name:<14} {found or 'MISSING: pip install ' + name}")
    for name, found in about["extras"].items():
        print(f"  {name:<14} {found or 'not installed'}  (optional; {EXTRAS[name]})")
    print("\nbackends")
    built = native()
    about["native"] = {"library": built.library is not None, "reason": built.reason}
    how = "compiled" if built.library else "in PyTorch operations"
    print(f"  gdr, scan, selective_scan, short convolution, norms, gates: {how} on a CPU")
    print("  gdr, selective_scan on a GPU: Triton where it is installed and agrees with PyTorch there; gdr also by "
          "flash-linear-attention, where that is installed, agrees and is faster")
    print("  attention: scaled_dot_product_attention of PyTorch; sequential: token by token (no other form exists)")
    print(f"  compiled kernels: {'' if built.library else 'none, '}{built.reason}")
    print(f"\ncorpora are cached in {about['cache']} (POSTFORMER_CACHE changes it)")
    checks = [verify(name, only=("fp32", "finite")) for name in ("transformer", "gated-deltanet", "mamba")]
    about["self_test"] = all(c.passed for c in checks)
    print("self-test of the kernels on this machine: " + ("ok" if about["self_test"] else "FAILED - run postformer "
          "verify --all and report it"))
    finish(about, json)
    if not about["self_test"]:
        sys.exit(7)
