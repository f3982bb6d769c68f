"""What a proof measured, for the page that lists them: one JSON file per proof, and none without POSTFORMER_PROOFS."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path

VARIABLE = "POSTFORMER_PROOFS"
"""The environment variable that names the folder the files go to."""


def record_proof(recipe: str, by: str, what: str, error: float, *, dtype: str = "float32",
                 tolerance: float = 1e-4) -> None:
    """Fail if `error` exceeds `tolerance`; else, where the variable names a folder, write this proof there.

    recipe: the design's name. by: what it is compared with, e.g. "transformers.LlamaForCausalLM".
    what: the quantity compared, e.g. "logits". The file's name is made from these and dtype, so a rerun replaces it.
    """
    error = float(error)
    row = {"recipe": recipe, "by": by, "what": what, "dtype": dtype, "error": error, "tolerance": tolerance}
    assert math.isfinite(error), row
    assert error <= tolerance, row
    folder = os.environ.get(VARIABLE)
    if folder:
        key = hashlib.sha256("\0".join((recipe, by, what, dtype)).encode()).hexdigest()[:12]
        path = Path(folder) / f"{recipe}-{key}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(row, indent=1) + "\n")
