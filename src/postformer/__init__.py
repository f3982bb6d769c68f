"""postformer: a laboratory for what comes after the Transformer.

    import postformer
    run = postformer.load("gated-deltanet", width=128, layers=4).train("stdlib", tokens=500_000)
    print(run.generate("def "))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from postformer.api import Architecture, Run, load

__version__ = "0.1.0"
__all__ = ["Architecture", "Run", "load"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from postformer import api

        return getattr(api, name)
    raise AttributeError(f"module 'postformer' has no attribute '{name}'")
