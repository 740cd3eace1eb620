"""tokred-export: Mamba-2 with token reduction, from checkpoint to proven engines."""

__version__ = "0.1.0"
