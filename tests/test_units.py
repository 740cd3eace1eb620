"""Tests of tokred_export.units."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokred_export.errors import InvalidRequest
from tokred_export.units import parse_share, parse_size


@pytest.mark.parametrize(
    ("text", "share"),
    [("30%", 0.3), ("30 %", 0.3), (" 0.3 ", 0.3), (".3", 0.3), ("0", 0.0), ("0%", 0.0),
     ("12.5%", 0.125), ("99.9%", 0.999), ("0.1%", 0.001)],
)
def test_share_is_read(text, share):
    """Percentages and fractions give exactly the float one would write."""
    assert parse_share(text) == share


@pytest.mark.parametrize(
    "text",
    ["-1%", "-0.3", "100%", "250%", "1", "30", "abc", "", "%", "nan", "inf", "1e-1", "30%%",
     "0,3", "٣%"],
)
def test_share_refuses(text):
    """Anything else is refused, and the message quotes it."""
    with pytest.raises(InvalidRequest) as caught:
        parse_share(text)
    assert repr(text) in str(caught.value)


def test_share_guesses_a_forgotten_percent_sign():
    """A bare 30 is not read as 30 %, but the message offers it."""
    with pytest.raises(InvalidRequest, match="write 30% if percent is meant"):
        parse_share("30")


@pytest.mark.parametrize(
    ("text", "size"),
    [("2048", 2048), ("8k", 8192), ("8K", 8192), ("8 k", 8192), ("1.5k", 1536), ("1", 1),
     ("2M", 2 * 1024**2), ("4G", 4 * 1024**3), ("1t", 1024**4)],
)
def test_size_is_read(text, size):
    """Plain counts and binary units are read, in either case."""
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["0", "0k", "-1", "1.5", "8kb", "k", "", "abc", "1e3", "8 k k"])
def test_size_refuses(text):
    """Zero, fractions of one and foreign units are refused, and the message quotes them."""
    with pytest.raises(InvalidRequest) as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)


@given(st.integers(min_value=1, max_value=10**9), st.sampled_from(["", "k", "M", "G"]))
def test_size_round_trips(number, unit):
    """A whole number with a unit is that number times the power of 1024."""
    assert parse_size(f"{number}{unit}") == number * 1024 ** ["", "k", "M", "G"].index(unit)


@given(st.integers(min_value=0, max_value=9999))
def test_share_reads_percent_and_fraction_alike(hundredths):
    """Two notations of the same share give the same float."""
    percent = f"{hundredths // 100}.{hundredths % 100:02d}%"
    assert parse_share(percent) == parse_share(f"0.{hundredths:04d}") == hundredths / 10000
