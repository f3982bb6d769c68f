"""Tables of the page: raw values in, formatted cells and the same numbers as CSV out."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from postformer.report.numbers import MISSING


@dataclass(frozen=True)
class Column:
    """One column: the field it shows, its heading, how a value is written, and whether it is a number."""

    key: str
    title: str
    write: Callable[[Any], str] = str
    numeric: bool = True


@dataclass(frozen=True)
class Table:
    """A caption, columns, and rows as mappings. `swatches` maps the first column's values to their line samples."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]
    swatches: Mapping[str, str] = field(default_factory=dict)

    @property
    def cells(self) -> list[list[dict[str, Any]]]:
        """Rows of {text, numeric, head, swatch} for the template."""
        return [
            [
                {
                    "text": MISSING if row.get(c.key) is None else c.write(row[c.key]),
                    "numeric": c.numeric,
                    "head": i == 0,
                    "swatch": self.swatches.get(str(row.get(c.key)), "") if i == 0 else "",
                }
                for i, c in enumerate(self.columns)
            ]
            for row in self.rows
        ]

    @property
    def slug(self) -> str:
        """The caption as an id and a file name: lower-case words joined by hyphens."""
        return "-".join(re.findall(r"[a-z0-9]+", self.caption.lower())[:9])

    @property
    def csv(self) -> str:
        """The unrounded values as CSV."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow([c.key for c in self.columns])
        writer.writerows(["" if row.get(c.key) is None else row[c.key] for c in self.columns] for row in self.rows)
        return buffer.getvalue()

    @property
    def link(self) -> str:
        """The CSV as a data address, for a download link that needs no second file."""
        return csv_link(self.csv)


def csv_link(text: str) -> str:
    """CSV as a data address."""
    return "data:text/csv;charset=utf-8," + quote(text)
