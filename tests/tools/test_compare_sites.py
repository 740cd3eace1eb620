"""The comparison of sites says nothing of the default ones but zero, and names what it compared."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import compare_sites  # noqa: E402


def test_differences_are_from_the_default_sites(monkeypatch, capsys):
    """Four prompts, two schedules: the default is zero from itself, another one is not."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4096, (4, 65), generator=generator)
    monkeypatch.setattr(compare_sites, "prompts", lambda *_: (ids[:, :-1].int(), ids[:, -1]))
    monkeypatch.setattr(
        sys, "argv", ["compare_sites.py", "--sites", "2,5", "--length", "64", "--prompts", "4"]
    )
    compare_sites.main()
    dense, default, asked = capsys.readouterr().out.splitlines()
    assert dense.startswith("4 prompts; dense: nll +")
    same = re.escape("(+0.000 +- 0.000)")
    assert re.fullmatch(rf"0.3 at 2,3,4,5,6,7,8: nll .* {same}, divergence \+.* {same}", default)
    assert asked.startswith("0.3 at 2,5: nll ") and "(+0.000 +- 0.000)" not in asked
