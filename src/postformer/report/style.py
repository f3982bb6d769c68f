"""Colours, dashes and markers shared by the figures, the legend and the page's style sheet.

Figures are drawn in stand-in colours, one per role, which the SVG writer replaces by CSS variables; so one figure
follows the reader's light or dark mode. The series hues are Okabe and Ito's, darkened or lightened until text in them
reads at 4.5:1 on either background; dash and marker tell them apart without colour.
"""

from __future__ import annotations

from dataclasses import dataclass

# Any colours do that no figure uses for anything else.
STAND_IN = {
    "#000001": "var(--ink)",
    "#000002": "var(--muted)",
    "#000003": "var(--rule)",
    "#000004": "var(--paper)",
    "#000005": "var(--shade)",
}
INK, MUTED, RULE, PAPER, SHADE = STAND_IN

HUES = (  # light mode, dark mode
    ("#44474c", "#c3c7cf"),  # grey
    ("#b84a00", "#ff9a5c"),  # vermilion
    ("#0068a8", "#62b8f0"),  # blue
    ("#00734f", "#3cc79b"),  # bluish green
    ("#9a3f7d", "#e6a0cb"),  # reddish purple
    ("#806000", "#e2bb3f"),  # yellow
    ("#5b4bb5", "#ada3f5"),  # violet
    ("#a6303f", "#f59199"),  # red
)
DASHES = ((), (6, 2.5), (1.6, 1.8), (8, 2, 1.6, 2), (4, 1.5))
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "p")


@dataclass(frozen=True)
class Look:
    """How one series is drawn everywhere on the page."""

    index: int

    @property
    def color(self) -> str:
        """The stand-in colour of this series."""
        return f"#0001{self.index % len(HUES):02x}"

    @property
    def dash(self) -> tuple[float, ...]:
        """On and off lengths in points; empty for a solid line."""
        # Once the hues are used up, the dashes shift against them, so that no two of 40 series look alike.
        return DASHES[(self.index + self.index // len(HUES)) % len(DASHES)]

    @property
    def marker(self) -> str:
        """A matplotlib marker."""
        return MARKERS[self.index % len(MARKERS)]

    @property
    def variable(self) -> str:
        """The CSS variable of this series' colour."""
        return f"var(--series-{self.index % len(HUES)})"


def stand_ins() -> dict[str, str]:
    """Every stand-in colour with the CSS variable that replaces it."""
    return STAND_IN | {Look(i).color: Look(i).variable for i in range(len(HUES))}


def css_variables(dark: bool) -> str:
    """The series' custom properties for one of the two modes."""
    return " ".join(f"--series-{i}: {hue[dark]};" for i, hue in enumerate(HUES))


_SHAPES = {
    "o": '<circle cx="22" cy="8" r="4.2"/>',
    "s": '<rect x="18.2" y="4.2" width="7.6" height="7.6"/>',
    "D": '<path d="M22 2.6 27.4 8 22 13.4 16.6 8Z"/>',
    "^": '<path d="M22 3 27 12H17Z"/>',
    "v": '<path d="M22 13 27 4H17Z"/>',
    "P": '<path d="M20.4 3h3.2v3.4H27v3.2h-3.4V13h-3.2V9.6H17V6.4h3.4Z"/>',
    "X": '<path d="M18 4 22 6.6 26 4 27 5.6 24 8l3 2.4-1 1.6-4-2.6-4 2.6-1-1.6L20 8l-3-2.4Z"/>',
    "p": '<path d="M22 3 27 6.8 25 12.6H19L17 6.8Z"/>',
}


def swatch(look: Look) -> str:
    """The line sample with marker that stands before a name in legends and tables, as a decorative inline SVG."""
    dash = f' stroke-dasharray="{" ".join(map(str, look.dash))}"' if look.dash else ""
    return (
        f'<svg class="swatch" viewBox="0 0 44 16" aria-hidden="true" style="color: {look.variable}">'
        f'<path d="M1 8H43" fill="none" stroke="currentColor" stroke-width="2"{dash}/>'
        f'<g fill="currentColor">{_SHAPES[look.marker]}</g></svg>'
    )
