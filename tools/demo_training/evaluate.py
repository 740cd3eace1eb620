"""Bits per byte of a model on whole files, every token counted once."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from demo_training.corpus import END_ID
from demo_training.model import DemoModel

WINDOW = 2048
STRIDE = 1024
IGNORED = -100


class Window(NamedTuple):
    """Inputs start to stop of one file; targets before ``scored_from`` are context only."""

    start: int
    stop: int
    scored_from: int


def windows(length: int, window: int, stride: int) -> list[Window]:
    """Windows over ``length`` inputs whose scored parts cover each input once.

    The first window scores all it holds; each later one moves on by ``stride`` and scores what
    is new, with at least ``window - stride`` tokens of context. No state is carried over.
    """
    found = [Window(0, min(window, length), 0)]
    while found[-1].stop < length:
        stop = min(found[-1].stop + stride, length)
        found.append(Window(max(0, stop - window), stop, found[-1].stop))
    return found


def window_batch(
    files: list[np.ndarray], window: int, stride: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """All windows of all files: inputs and targets, int64 [W, window].

    A file is the end token, its tokens, the end token: the first is only read and the last only
    predicted. Targets that are context or padding are IGNORED.
    """
    rows = [(ids, part) for ids in files for part in windows(len(ids) + 1, window, stride)]
    inputs = np.full((len(rows), window), END_ID, dtype=np.int64)
    targets = np.full((len(rows), window), IGNORED, dtype=np.int64)
    for row, (ids, (start, stop, scored_from)) in enumerate(rows):
        stream = np.concatenate([[END_ID], ids, [END_ID]])
        inputs[row, : stop - start] = stream[start:stop]
        targets[row, scored_from - start : stop - start] = stream[scored_from + 1 : stop + 1]
    return torch.from_numpy(inputs), torch.from_numpy(targets)


@torch.no_grad()
def total_bits(
    model: DemoModel,
    files: list[np.ndarray],
    window: int = WINDOW,
    stride: int = STRIDE,
    tokens_per_batch: int = 32768,
) -> float:
    """Bits to code every token of every file and every file's end, in the model's own dtype.

    Args:
        model: in evaluation mode, on any device.
        files: token ids of each file, int [n].
        window: inputs the model sees at most.
        stride: how far each window moves on; ``window`` means no shared context.
        tokens_per_batch: how much runs at once.
    """
    device = model.backbone.norm_f.weight.device
    inputs, targets = window_batch(files, window, stride)
    nats = torch.zeros((), dtype=torch.float64, device=device)
    rows = max(1, tokens_per_batch // window)
    for start in range(0, len(inputs), rows):
        logits = model(inputs[start : start + rows].to(device)).float()
        wanted = targets[start : start + rows].to(device).flatten()
        losses = F.cross_entropy(
            logits.flatten(0, 1), wanted, ignore_index=IGNORED, reduction="none"
        )
        nats += losses.double().sum()
    return nats.item() / math.log(2)
