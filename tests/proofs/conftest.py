"""The fixture through which a proof states what it measured (see record.py)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("postformer_proofs_record", Path(__file__).with_name("record.py"))
assert _spec is not None
assert _spec.loader is not None
_record = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_record)


@pytest.fixture
def record_proof() -> Callable[..., None]:
    """record_proof(recipe, by, what, error, dtype="float32", tolerance=1e-4): asserts, and writes if asked to."""
    return _record.record_proof
