"""Stage 1 of the export: a model becomes a torch.export program with static lengths."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tokred_export.errors import BuildFailed, ran_out_of_memory
from tokred_export.model import Mamba2


class Names(NamedTuple):
    """Tensor names of a prefill graph, in the order they come in and out."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def prefill_names(n_layer: int, n_sites: int) -> Names:
    """The I/O contract: logits, kept positions, choices by site, states by layer."""
    choices = [f"choice.{part}.{s}" for s in range(n_sites) for part in ("src", "dst", "merge")]
    states = [f"present.conv_state.{i}" for i in range(n_layer)]
    states += [f"present.ssm_state.{i}" for i in range(n_layer)]
    return Names(("input_ids", "prompt_len"), ("logits", "kept_positions", *choices, *states))


class _Flat(nn.Module):
    """A prefill whose outputs are one flat tuple, in the order of :func:`prefill_names`."""

    def __init__(self, model: Mamba2) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, prompt_len: Tensor) -> tuple[Tensor, ...]:
        out = self.model(input_ids, prompt_len)
        choices = [tensor for choice in out.choices for tensor in choice]
        return (out.logits, out.kept_positions, *choices, *out.conv_states, *out.ssm_states)


def capture_prefill(
    model: Mamba2, length: int, max_batch: int = 1
) -> tuple[torch.export.ExportedProgram, Names]:
    """Trace a prefill of ``length`` tokens, strictly: a graph break is an error.

    Args:
        model: in eval mode, on the custom ops.
        length: L, static.
        max_batch: 1 gives a static batch of one, more a dynamic batch up to that.

    Raises:
        BuildFailed: torch.export refused the model.
    """
    # The example batch is 2 where the batch is dynamic, since torch.export specialises on 1.
    batch = 1 if max_batch == 1 else 2
    example = (
        torch.zeros(batch, length, dtype=torch.int32),
        torch.full((batch,), length, dtype=torch.int32),
    )
    shapes = None
    if max_batch > 1:
        dim = torch.export.Dim("batch", min=1, max=max_batch)
        shapes = ({0: dim}, {0: dim})
    flat = _Flat(model)
    try:
        with torch.no_grad():
            program = torch.export.export(
                _without_weights(flat), example, dynamic_shapes=shapes, strict=True
            )
    except (torch._dynamo.exc.TorchDynamoException, RuntimeError, ValueError) as error:
        if ran_out_of_memory(error):
            raise
        raise BuildFailed(f"torch.export refused the model at length {length}: {error}") from error
    _give_weights(program, flat)
    n_sites = len(model.schedule.sites) if model.schedule else 0
    return program, prefill_names(model.spec.n_layer, n_sites)


def _without_weights(flat: _Flat) -> nn.Module:
    """The same model with fake tensors for weights: of real ones Dynamo keeps copies of its own."""
    mode, ops = FakeTensorMode(shape_env=ShapeEnv()), flat.model.ops
    known: dict[int, object] = {id(ops): ops}
    for tensor in (*flat.parameters(), *flat.buffers()):
        known[id(tensor)] = mode.from_tensor(tensor, static_shapes=True)
    return copy.deepcopy(flat, known)


def _give_weights(program: torch.export.ExportedProgram, flat: _Flat) -> None:
    """Put the weights, not copies, in the places that their fakes hold in the program."""
    program.state_dict.update(flat.state_dict(keep_vars=True))
    constants = program.constants  # buffers that are in no state dict are among them
    constants.update({name: b for name, b in flat.named_buffers() if name in constants})
