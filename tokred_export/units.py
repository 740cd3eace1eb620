"""Reads what people type for a share (``30%``) or a size (``8k``)."""

from __future__ import annotations

import re
from fractions import Fraction

from tokred_export.errors import InvalidRequest

_SHARE = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(%?)")
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)", re.IGNORECASE)
_FACTORS = {"": 1, "k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4}


def parse_share(text: str) -> float:
    """Reads a share of a whole: ``"30%"``, ``"30 %"`` and ``"0.3"`` are all 0.3.

    Args:
        text: a percentage from 0% to below 100%, or a fraction from 0 to below 1.

    Returns:
        The share, at least 0 and below 1.

    Raises:
        InvalidRequest: not a number, negative, or a whole and more.
    """
    found = _SHARE.fullmatch(text.strip())
    if not found:
        raise InvalidRequest(
            f"{text!r} is not a share; expected a percentage from 0% to below 100%, "
            "or a fraction from 0 to below 1; write for example 30% or 0.3"
        )
    share = Fraction(found[1]) / (100 if found[2] else 1)
    if share >= 1:
        remedy = "stay below the whole" if found[2] else f"write {found[1]}% if percent is meant"
        raise InvalidRequest(
            f"{text!r} is the whole or more; expected a share below 100%; {remedy}"
        )
    return float(share)


def parse_size(text: str) -> int:
    """Reads a count or a size in binary units: ``"2048"``, ``"8k"`` (8192), ``"4G"`` (4 * 2**30).

    Args:
        text: a positive number and perhaps one of k, M, G, T in either case (powers of 1024).

    Returns:
        The whole number meant, at least 1.

    Raises:
        InvalidRequest: not such a number, zero, or not whole (``1.5`` is not, ``1.5k`` is 1536).
    """
    found = _SIZE.fullmatch(text.strip())
    size = Fraction(found[1]) * _FACTORS[found[2].lower()] if found else Fraction(0)
    if size < 1 or size.denominator != 1:
        raise InvalidRequest(
            f"{text!r} is not a size; expected a positive whole number, perhaps with k, M, G or T "
            "for powers of 1024; write for example 2048, 8k or 4G"
        )
    return int(size)
