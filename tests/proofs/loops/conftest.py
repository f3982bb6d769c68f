"""Makes `loops_plain` importable: what the loops of this folder share."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

if "loops_plain" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("loops_plain", Path(__file__).with_name("plain.py"))
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules["loops_plain"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["loops_plain"])
