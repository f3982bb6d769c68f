"""The sentences follow the numbers: the same function says the opposite about opposite data."""

import pytest

from postformer.report import findings, numbers
from postformer.report.equation import mathml


def test_tracking_names_who_holds_and_who_falls():
    points = {"a": [(16, 1.0), (64, 0.998)], "b": [(16, 0.84), (64, 0.45)]}
    assert findings.tracking(points, 16, "tokens") == (
        "At 64 tokens, 4 times the trained length, a still holds (0.998). "
        "Between 16 and 64 tokens, b goes from 0.840 to 0.450."
    )
    points = {"a": [(8, 1.0), (16, 0.9)], "b": [(8, 0.84), (16, 0.45)]}
    assert "no architecture is above 0.99; the best is a with 0.900" in findings.tracking(points, 8, "pairs")


def test_an_expectation_that_did_not_show_is_said_so():
    expected = {"holds": ["a"], "falls": ["b"], "at": 64}
    good = {"a": [(64, 0.998)], "b": [(64, 0.45)]}
    assert findings.expectation(expected, good, "tokens").startswith("This is what the paper leads one to expect")
    low = findings.expectation(expected, {"a": [(64, 0.6)], "b": [(64, 0.45)]}, "tokens")
    assert "does not show that: a reaches only 0.600" in low
    high = findings.expectation(expected, {"a": [(64, 1.0)], "b": [(64, 0.97)]}, "tokens")
    assert "does not show that: b reaches 0.970" in high
    assert "cannot be checked: b" in findings.expectation(expected, {"a": [(64, 1.0)]}, "tokens")
    assert findings.expectation(None, good, "tokens") == ""


def test_text_reports_unequal_tokens_and_ties():
    assert "did not see equally many tokens" in findings.text({"a": 2.0, "b": 2.5}, {"a": 1e6, "b": 9e5})
    tied = findings.text({"a": 2.0, "b": 2.01, "c": 2.4}, {"a": 1e6, "b": 1e6, "c": 1e6})
    assert tied.startswith("a ends lowest, at 2.000 bits per byte, and c highest, at 2.400: 0.400 apart.")
    assert "b ends within 0.03 of it, which one seed cannot rank" in tied


def test_growth_separates_constant_from_growing():
    values = {"list": [(128, 1000.0), (16384, 128000.0)], "matrix": [(128, 4096.0), (16384, 4096.0)]}
    assert findings.growth(values, "memory", 1.001) == (
        "From 128 to 16,384 tokens of context, memory grows 128× for list, and stays the same for matrix."
    )
    assert "noise" in findings.growth({"x": [(1, 4.0), (2, 1.0)]}, "time per token", 1.5)


def test_declared_bytes_that_are_not_those_measured_are_named():
    point = {"context": 1, "declared_bytes": 8, "measured_bytes": 8}
    assert "exactly" in findings.declared({"a": [point]})
    assert findings.declared({"a": [point | {"measured_bytes": 9}]}) == "Declared and measured bytes differ for a."


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (numbers.accuracy, 0.99961, "0.999"), (numbers.accuracy, 1.0, "1.000"), (numbers.accuracy, 0.5, "0.500"),
        (numbers.accuracy, None, "–"), (numbers.size, 4194304, "4 MiB"), (numbers.size, 4224, "4.12 KiB"),
        (numbers.size, 12, "12 B"), (numbers.short, 921600, "922 k"), (numbers.short, 41000.0, "41 k"),
        (numbers.duration, 0.00061, "610 µs"), (numbers.duration, 233.0, "3.9 min"), (numbers.duration, 21.0, "21 s"),
        (numbers.count, 21345, "21,345"), (numbers.bits, float("nan"), "–"), (numbers.ratio, 128.0, "128×"),
    ],
)  # fmt: skip
def test_numbers_are_written_with_few_digits(write, value, text):
    assert write(value) == text


def test_equations_become_mathml():
    text = mathml("S_t = S_{t-1}(I − β_t k_t k_t^⊤)")
    assert text.count("<msub>") == 4
    assert text.count("<msubsup>") == 1
    assert 'aria-label="S_t = S_{t-1}(I' in text
    with pytest.raises(ValueError, match="brace"):
        mathml("S_{t")
    with pytest.raises(ValueError, match="brace"):
        mathml("S}")
    with pytest.raises(ValueError, match="base"):
        mathml("_t")
