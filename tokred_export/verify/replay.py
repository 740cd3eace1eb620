"""Eager runs of the engine's choices, in one precision at a time, and what each site saw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from tokred_plugins._common import accumulate
from tokred_plugins.token_match.op import SMALLEST_NORM
from torch import Tensor

from tokred_export.checkpoint.load import KEPT_FLOAT32
from tokred_export.model import Mamba2, Observe
from tokred_export.reduction.methods import METHODS, Choice


class SiteView(NamedTuple):
    """One site of one run, seen before anything is removed there.

    Attributes:
        pads: int32 [B].
        choice: what the model would do here.
        score: [B, L], what the split ranks by; None where positions alone decide.
        lower: bool [B, L], the lower part of the split; None as above.
        unit: [B, L, D], ``hidden`` at length 1, in the accumulation dtype; None for a method
            without links.
    """

    pads: np.ndarray
    choice: Choice
    score: np.ndarray | None
    lower: np.ndarray | None
    unit: Tensor | None


class Replay(NamedTuple):
    """One run: outputs by the graph's names, but for the choices, and one view a site."""

    outputs: dict[str, np.ndarray]
    sites: list[SiteView]


def in_dtype(model: Mamba2, dtype: torch.dtype) -> Mamba2:
    """A copy of ``model`` in another precision.

    As in ``build_model``, dt_bias, a_log and d stay float32 in 16 bit and go along to float64.
    """
    with torch.device("meta"):
        twin = Mamba2(model.spec, model.schedule, model.ops, model.logits)
    state = {}
    for name, tensor in model.state_dict().items():
        kept = dtype != torch.float64 and name.endswith(KEPT_FLOAT32)
        state[name] = tensor if kept else tensor.to(dtype)
    twin.load_state_dict(state, strict=True, assign=True)
    if not model.spec.conv_bias:  # a buffer of zeros then, which is in no state dict
        for block in twin.layers:
            block.conv_bias = torch.zeros(
                model.spec.conv_dim, dtype=dtype, device=model.embedding.weight.device
            )
    return twin.eval().requires_grad_(False)


@torch.no_grad()
def replay(
    model: Mamba2, input_ids: Tensor, prompt_len: Tensor, choices: list[Choice]
) -> Replay:
    """Run ``model`` on given choices, and ask it at every site what it would have chosen.

    So each site is asked about the very tokens that the engine saw there, and one different
    choice does not make all later ones incomparable.

    Args:
        model: in any precision, on any device.
        input_ids: int32 [B, L].
        prompt_len: int32 [B].
        choices: one a site.
    """
    sites: list[SiteView] = []
    device = model.embedding.weight.device
    given = [Choice(*(tensor.to(device) for tensor in choice)) for choice in choices]
    out = model(input_ids.to(device), prompt_len.to(device), given, _watch(model, sites))
    outputs = {"logits": to_numpy(out.logits), "kept_positions": to_numpy(out.kept_positions)}
    for i, (conv, ssm) in enumerate(zip(out.conv_states, out.ssm_states, strict=True)):
        outputs[f"present.conv_state.{i}"] = to_numpy(conv)
        outputs[f"present.ssm_state.{i}"] = to_numpy(ssm)
    return Replay(outputs, sites)


def _watch(model: Mamba2, sites: list[SiteView]) -> Observe:
    """An observer that appends one view a site to ``sites``."""
    schedule, ops = model.schedule, model.ops

    def observe(index: int, y: Tensor, hidden: Tensor, pads: Tensor) -> None:
        site, method = schedule.sites[index], METHODS[schedule.method]
        tail = schedule.protect_tail
        choice, _ = method.select(y, hidden, pads, site, schedule.prune_permille, tail, ops)
        score = lower = unit = None
        if method.score is not None:
            score = method.score(y, pads, ops)
            low, _ = ops.token_split(score, pads, method.lower_count(site), tail)
            lower = torch.zeros(score.shape, dtype=torch.bool, device=score.device)
            lower = lower.scatter(1, low.long(), True).cpu().numpy()
            score = score.cpu().numpy()
        if method.links:
            unit = hidden.to(accumulate(hidden.dtype))
            unit = (unit / unit.norm(dim=2, keepdim=True).clamp(min=SMALLEST_NORM)).cpu()
        on_host = Choice(*(tensor.cpu() for tensor in choice))
        sites.append(SiteView(pads.cpu().numpy(), on_host, score, lower, unit))

    return observe


def to_numpy(tensor: Tensor) -> np.ndarray:
    """The same values; 16-bit floats as float32, since numpy has no bfloat16."""
    wide = tensor.dtype in (torch.float16, torch.bfloat16)
    return (tensor.float() if wide else tensor).cpu().numpy()


def choices_of(found: Mapping[str, np.ndarray], n_sites: int) -> list[Choice]:
    """The engine's ``choice.*`` outputs as tensors to replay."""
    return [
        Choice(*(torch.from_numpy(found[f"choice.{part}.{s}"].copy()) for part in Choice._fields))
        for s in range(n_sites)
    ]
