"""Straight lines of PTX on 32-bit integers, executed: which addresses and tiles code computes."""

from __future__ import annotations

import re
from collections.abc import Iterable

WORD = 1 << 32
OPERATIONS = {
    "mov": lambda a: a,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "mad": lambda a, b, c: a * b + c,
    "div": lambda a, b: a // b,
    "rem": lambda a, b: a % b,
    "min": min,
    "shl": lambda a, b: a << b,
    "shr": lambda a, b: a >> b,
    "and": lambda a, b: a & b,
    "xor": lambda a, b: a ^ b,
    "bfe": lambda a, b, c: a >> b & (1 << c) - 1,
}
LINE = re.compile(r"(\w+)(?:\.lo)?\.[ub]32 (\w+), (.*);")


def execute(lines: Iterable[str], registers: dict[str, int]) -> dict[str, int]:
    """The registers after the lines; lines on others than 32-bit integers are an error."""
    known = dict(registers)
    for line in lines:
        name, target, sources = LINE.fullmatch(line).groups()
        values = [known[s] if s in known else int(s) for s in sources.split(", ")]
        known[target] = OPERATIONS[name](*values) % WORD
    return known
