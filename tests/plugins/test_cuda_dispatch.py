"""The whole model on a GPU: the custom ops dispatch to the Triton kernels."""

from __future__ import annotations

import pytest
import torch
from tokred_plugins import cuda

from tokred_export.checkpoint import build_model, load_checkpoint
from tokred_export.reduction.methods import Choice
from tokred_export.reduction.schedule import solve_schedule
from tokred_export.specs import ReductionSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels run on a GPU"),
]


def rel(found, expected):
    found, expected = found.cpu().double(), expected.double()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("method", ["utrc", "evit", "pumer"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_demo_model(method, dtype):
    """On the replay of the GPU's choices: float32 to rounding, 16 bit within 3 x its noise."""
    cuda.register()
    checkpoint = load_checkpoint(None)
    schedule = solve_schedule(checkpoint.spec, ReductionSpec(method=method, target=0.3), 2048)
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 4096, (2, 2048), dtype=torch.int32, generator=random)
    lengths = torch.tensor([2048, 1500], dtype=torch.int32)
    exact = build_model(checkpoint, schedule)
    with torch.no_grad():
        found = build_model(checkpoint, schedule, dtype=dtype).cuda()(ids.cuda(), lengths.cuda())
        choices = [Choice(*(tensor.cpu() for tensor in choice)) for choice in found.choices]
        expected = exact(ids, lengths, choices)
        if dtype == "float32":
            limit = 1e-5
        else:
            rounded = build_model(checkpoint, schedule, dtype=dtype)(ids, lengths, choices)
            limit = 3 * rel(rounded.logits, expected.logits)
    assert torch.equal(found.kept_positions.cpu(), expected.kept_positions)
    assert rel(found.logits, expected.logits) < limit
    if dtype == "float32":
        for a, b in zip(found.ssm_states, expected.ssm_states, strict=True):
            assert rel(a, b) < limit
