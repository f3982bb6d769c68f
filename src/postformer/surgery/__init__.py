"""Surgery: model -> model. Each says what it preserves, and is tested for it.

    from postformer import surgery

    large = surgery.grow(small, factor=4, how="stack")
"""

from postformer.surgery.base import GROUP, Surgery, load, names, register
from postformer.surgery.grow import Grow, grow

__all__ = ["GROUP", "Grow", "Surgery", "grow", "load", "names", "register"]
