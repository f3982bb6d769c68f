"""Citations of the papers that recipes come from."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

import yaml


@cache
def _papers() -> dict[str, dict[str, Any]]:
    return yaml.safe_load(files("postformer.design").joinpath("papers.yaml").read_text(encoding="utf-8"))


def title(arxiv: str) -> str | None:
    """Title of a paper, if it is known here."""
    return _papers().get(arxiv, {}).get("title")


def bibtex(arxiv: str) -> str:
    """A BibTeX entry for an arXiv id; only the id where nothing else is known."""
    paper = _papers().get(arxiv)
    if paper is None:
        return f"@misc{{arxiv{arxiv.replace('.', '')},\n  eprint = {{{arxiv}}},\n  archivePrefix = {{arXiv}}\n}}"
    last = paper["authors"].split(",")[0].strip("{}").split()[0].lower()
    word = next((w for w in paper["title"].lower().replace(":", "").split() if len(w) > 3), "paper")
    return (f"@article{{{last}{paper['year']}{word},\n  title = {{{paper['title']}}},\n"
            f"  author = {{{paper['authors']}}},\n  year = {{{paper['year']}}},\n"
            f"  eprint = {{{arxiv}}},\n  archivePrefix = {{arXiv}}\n}}")
