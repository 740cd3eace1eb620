"""Mamba-2 checkpoints, in either public layout, as one ModelSpec and one set of named tensors.

files.py      from a folder or a hub id to config and weights, whatever may be broken on the way
layouts.py    from a config to a ModelSpec, and the tensors that this spec asks for
load.py       both together: checked tensors under our own names, and the model made of them
"""

from tokred_export.checkpoint.load import (
    DEMO_SOURCE,
    Checkpoint,
    build_model,
    load_checkpoint,
    read_spec,
)

__all__ = ["DEMO_SOURCE", "Checkpoint", "build_model", "load_checkpoint", "read_spec"]
