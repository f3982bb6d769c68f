"""The colours of a heat map: eleven steps of one lightness ramp per mode, each with the ink that reads on it."""

from __future__ import annotations

STEPS = 11
"""From the worst (chance) to the best (perfect)."""


def step(fraction: float) -> int:
    """0 at chance or below, 10 only when perfect."""
    return max(0, min(STEPS - 1, int(fraction * (STEPS - 1) + 1e-9)))


def variables(dark: bool) -> str:
    """`--heat-N` and `--heat-ink-N` of accuracy, `--own-N` and `--own-ink-N` of scores with a scale of their own.

    Lightness changes evenly along both ramps, so they keep their order in grey and for every kind of colour vision.
    """
    out = []
    for name, ends in (("heat", _ACCURACY[dark]), ("own", _OWN[dark])):
        for i in range(STEPS):
            colour = _between(ends, i / (STEPS - 1))
            out.append(f"--{name}-{i}: {_hex(colour)}; --{name}-ink-{i}: {_ink(colour)};")
    return " ".join(out)


Colour = tuple[float, float, float]
_ACCURACY = (  # OKLab: light mode, dark mode; a pale yellow over teal to a deep blue, and the reverse over a dark page
    ((0.975, -0.006, 0.018), (0.79, -0.075, 0.0), (0.58, -0.06, -0.075), (0.34, 0.0, -0.12)),
    ((0.24, -0.002, -0.02), (0.42, -0.02, -0.085), (0.66, -0.07, -0.045), (0.93, -0.03, 0.09)),
)
_OWN = (
    ((0.97, 0.004, 0.0), (0.72, 0.05, -0.05), (0.42, 0.06, -0.09)),
    ((0.26, 0.01, -0.02), (0.5, 0.05, -0.07), (0.86, 0.04, -0.04)),
)


def _between(ends: tuple[Colour, ...], at: float) -> Colour:
    place = at * (len(ends) - 1)
    i = min(int(place), len(ends) - 2)
    a, b = ends[i], ends[i + 1]
    return tuple(x + (y - x) * (place - i) for x, y in zip(a, b))  # type: ignore[return-value]


def _linear(colour: Colour) -> Colour:
    light, a, b = colour
    long = (light + 0.3963377774 * a + 0.2158037573 * b) ** 3
    middle = (light - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (light - 0.0894841775 * a - 1.2914855480 * b) ** 3
    return tuple(  # type: ignore[return-value]
        min(1.0, max(0.0, v))
        for v in (
            4.0767416621 * long - 3.3077115913 * middle + 0.2309699292 * short,
            -1.2684380046 * long + 2.6097574011 * middle - 0.3413193965 * short,
            -0.0041960863 * long - 0.7034186147 * middle + 1.7076147010 * short,
        )
    )


def _hex(colour: Colour) -> str:
    curve = [12.92 * v if v <= 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055 for v in _linear(colour)]
    return "#" + "".join(f"{round(255 * v):02x}" for v in curve)


def luminance(colour: Colour) -> float:
    """Relative luminance, as contrast ratios are defined by."""
    red, green, blue = _linear(colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _ink(colour: Colour) -> str:
    light = luminance(colour)
    return "#fff" if 1.05 / (light + 0.05) > (light + 0.05) / 0.055 else "#101418"
