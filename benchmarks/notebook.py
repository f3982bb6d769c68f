"""Runs docs/from-recipe-to-gauntlet.ipynb from top to bottom and stores what came out in it.

    pip install -e ".[docs]"
    python benchmarks/notebook.py

A few minutes on one core. An error in a cell ends it, and the file stays as it was.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

PAGE = Path(__file__).resolve().parents[1] / "docs" / "from-recipe-to-gauntlet.ipynb"


def main() -> None:
    """Execute in an empty directory and write back, without what differs from machine to machine for no reason."""
    notebook = nbformat.read(PAGE, as_version=4)
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": folder}},
                       record_timing=False, coalesce_streams=True).execute()
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                         "language_info": {"name": "python"}}
    nbformat.write(notebook, PAGE)


if __name__ == "__main__":
    main()
