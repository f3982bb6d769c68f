"""The page: one HTML file with everything in it, from a demo's directory or from any run directories."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from postformer.report.numbers import figure


def render(source: str | Path | Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write one self-contained HTML page about finished runs and return its path.

    Args:
        source: a directory that holds `demo.json`, `gauntlet.json` or `bench.json`, or one or several run directories.
        output: the file to write, or a directory for `report.html`; by default `report.html` beside the first source.

    The page loads nothing: figures are inline SVG, the numbers are embedded as JSON and CSV. Runs that are missing or
    did not finish are listed as failed. A gauntlet's figures are also written as `gauntlet.csv` beside the page, with
    its `gauntlet.json` where that is elsewhere. Raises ValueError where there is nothing to show at all.
    """
    sources = [Path(source)] if isinstance(source, (str, Path)) else [Path(s) for s in source]
    if not sources:
        raise ValueError("nothing to report on: give a demo's or a gauntlet's directory, or at least one run directory")
    if len(sources) == 1 and (sources[0] / "demo.json").is_file():
        from postformer.report.demo import demo_page

        content = demo_page(sources[0])
    elif len(sources) == 1 and (sources[0] / "gauntlet.json").is_file():
        from postformer.report.gauntlet.page import gauntlet_page

        content = gauntlet_page(sources[0])
    elif len(sources) == 1 and (sources[0] / "bench.json").is_file():
        from postformer.report.bench import bench_page

        content = bench_page(sources[0])
    else:
        from postformer.report.runs import runs_page

        content = runs_page(sources)
    path = Path(output) if output is not None else sources[0]
    if output is None or path.is_dir() or not path.suffix:
        path = path / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, text in content.pop("beside", {}).items():
        # The source itself is not rewritten: a study may be adding to it at this moment.
        if name.endswith(".csv") or path.parent.resolve() != sources[0].resolve():
            _write(path.parent / name, text)
    _write(path, compose(content, content.pop("template", "page.html.j2")))
    return path


def compose(content: dict[str, Any], template: str = "page.html.j2") -> str:
    """The HTML of what `demo_page`, `runs_page` or `gauntlet_page` return."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from postformer.report.style import css_variables

    environment = Environment(
        loader=PackageLoader("postformer.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["paper"] = paper_link
    environment.filters["papers"] = papers
    environment.filters["figure"] = figure
    page = environment.get_template(template).render(
        **content,
        light=css_variables(dark=False),
        dark=css_variables(dark=True),
        data=embedded(content["numbers"]),
    )
    return re.sub(r"\n\s*\n+", "\n", page)


def paper_link(identifier: str | None) -> str:
    """An arXiv id as a link to its abstract; anything else as it is."""
    from markupsafe import Markup, escape

    if not identifier:
        return ""
    match = re.fullmatch(r"(?:arxiv:)?(\d{4}\.\d{4,5})(v\d+)?", str(identifier).strip(), flags=re.IGNORECASE)
    if not match:
        return escape(identifier)
    return Markup(f'<a href="https://arxiv.org/abs/{match[1]}">arXiv:{match[1]}</a>')


def papers(identifiers: str | Sequence[str] | None) -> str:
    """Links to one or several papers, joined by commas."""
    from markupsafe import Markup

    several = [identifiers] if isinstance(identifiers, str) else identifiers or []
    return Markup(", ").join(paper_link(i) for i in several)


def embedded(value: Any) -> str:
    """JSON that is safe inside a script element; what is not finite becomes null."""
    from markupsafe import Markup

    text = json.dumps(_plain(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _write(path: Path, text: str) -> None:
    # Renaming is atomic: a reader of a page that is being rewritten sees the old one or the new one.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".report-", suffix=".html")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
