"""Which cases are compiled; the compiling itself needs a GPU and mamba-ssm."""

from __future__ import annotations

import sys
from argparse import ArgumentTypeError
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "gpu"))

from compile_baseline import case
from random_checkpoint import write_random

from tokred_export.checkpoint import load_checkpoint


def test_cases():
    """A published size and a batch."""
    assert (case("130m:1"), case("2.7b:8")) == (("130m", 1), ("2.7b", 8))


@pytest.mark.parametrize("text", ["130m", "130m:", "3b:1", "130m:0", "130m:-1", "130m:1.5", ":1"])
def test_other_texts(text):
    """The message says what is expected."""
    with pytest.raises(ArgumentTypeError, match=f"{text} is no size and batch, expected"):
        case(text)


def test_one_layer(tmp_path):
    """Has the width of the published model, and nothing else of its size."""
    write_random(tmp_path, "130m", dtype="float16", layers=1)
    spec = load_checkpoint(str(tmp_path)).spec
    assert (spec.d_model, spec.n_layer) == (768, 1)
