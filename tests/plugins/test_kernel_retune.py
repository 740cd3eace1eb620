"""A kernel gives the same with every tactic that can take its call's place in a graph."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import DEVICE, ON_GPU, TOLERANCE, close, make, require_kernels

require_kernels()

from tokred_plugins import opset  # noqa: E402
from tokred_plugins.kernel_faces import FACES  # noqa: E402
from tokred_plugins.kernels import launch, run, spec_of  # noqa: E402
from tokred_plugins.retune import candidates  # noqa: E402
from tokred_plugins.token_split import kernel as split  # noqa: E402

# Long enough for two segments of the scan, and for several blocks of each size that is tried.
LENGTH, SHORT, ROWS, HEADS, HEAD_DIM, STATES, WIDTH = 260, 150, 20, 4, 16, 12, 40
INNER = HEADS * HEAD_DIM
CHANNELS = INNER + 2 * STATES
NO_LIMIT = 3.4e38
DTYPE = torch.float16 if ON_GPU else torch.float32  # the interpreter multiplies these quickly


def layer_tensors() -> dict[str, dict[str, torch.Tensor]]:
    """Inputs of the ops of a layer."""
    columns = INNER + CHANNELS + HEADS
    pads = torch.tensor([0, 70], dtype=torch.int32, device=DEVICE)
    return {
        "add_rms_norm": {
            "hidden": make(1, 2, ROWS, WIDTH, dtype=DTYPE), "residual": make(2, 2, ROWS, WIDTH),
            "weight": make(3, WIDTH, dtype=DTYPE),
        },
        "embed_rms_norm": {
            "input_ids": torch.arange(2 * ROWS, dtype=torch.int32, device=DEVICE).view(2, -1) % 13,
            "table": make(16, 13, WIDTH, dtype=DTYPE), "weight": make(3, WIDTH, dtype=DTYPE),
        },
        "gated_rms_norm": {
            "y": make(4, 2, ROWS, INNER, dtype=DTYPE),
            "zxbcdt": make(0, 2, ROWS, columns, dtype=DTYPE),
            "weight": make(5, INNER, dtype=DTYPE),
        },
        "causal_conv1d": {
            "zxbcdt": make(0, 2, SHORT, columns, dtype=DTYPE),
            "weight": make(6, CHANNELS, 4, dtype=DTYPE),
            "bias": make(7, CHANNELS, dtype=DTYPE), "pads": pads,
        },
        "ssd_scan": {
            "xbc": make(8, 2, LENGTH, CHANNELS, dtype=DTYPE),
            "zxbcdt": make(15, 2, LENGTH, columns, dtype=DTYPE),
            "dt_bias": make(9, HEADS), "a_log": make(10, HEADS), "d": make(11, HEADS),
            "pads": pads,
        },
    }


def site_tensors() -> dict[str, dict[str, torch.Tensor]]:
    """Inputs of the ops of a reduction site, each from the ops before it."""
    half, plain = SHORT // 2, opset.PLAIN
    y, hidden = make(12, 2, SHORT, INNER, dtype=DTYPE), make(13, 2, SHORT, WIDTH, dtype=DTYPE)
    pads = torch.tensor([0, 9], dtype=torch.int32, device=DEVICE)
    scores = plain.token_importance(y)
    lower, upper = plain.token_split(scores, pads, half, 1)
    similarity, target = plain.token_match(hidden, lower, upper)
    src, dst, merge, keep = plain.token_link(
        similarity, target, lower, upper, pads, *ATTRIBUTES["token_link"].values()
    )
    return {
        "token_importance": {"y": y},
        "token_split": {"scores": scores, "pads": pads},
        "token_split with norms": {"scores": scores, "pads": pads, "hidden": hidden},
        "token_match": {"hidden": hidden, "lower": lower, "upper": upper},
        "token_link": {
            "similarity": similarity, "target": target, "lower": lower, "upper": upper,
            "pads": pads,
        },
        "token_reduce": {
            "hidden": hidden, "residual": make(14, 2, SHORT, WIDTH), "keep": keep, "src": src,
            "dst": dst, "merge": merge,
        },
    }


ATTRIBUTES = {
    "add_rms_norm": {"eps": 1e-5},
    "embed_rms_norm": {"eps": 1e-5, "residual_in_fp32": True},
    "gated_rms_norm": {"group_size": INNER // 2, "eps": 1e-5, "norm_before_gate": False},
    "causal_conv1d": {"offset": INNER},
    "ssd_scan": {"n_groups": 1, "d_state": STATES, "dt_min": 0.0, "dt_max": NO_LIMIT},
    "token_split": {"count": SHORT // 2, "protect": 1},
    "token_link": {"removed": SHORT // 3, "prune_permille": 500},
}


@pytest.mark.parametrize("op", [*FACES, "token_split with norms"])
def test_every_candidate_gives_the_same(op):
    """Every output of every kernel of the op, on the same inputs."""
    tensors = (layer_tensors() | site_tensors())[op]
    specs = {name: spec_of(x) for name, x in tensors.items()}
    name = op.removesuffix(" with norms")
    calls = FACES[name].calls(specs, ATTRIBUTES.get(name, {}))
    if "hidden" in tensors and name == "token_split":  # both ways
        count, protect = ATTRIBUTES[name].values()
        calls += split.calls(
            specs["scores"], specs["pads"], count, protect, search=True, hidden=specs["hidden"]
        )
    values = tensors | run(calls, tensors)
    tried = 0
    for call in calls:
        for other in candidates(call)[1:]:
            tried += 1
            for name, got in launch(other, values).items():
                what = f"{call.kernel.name} {name} with {other.tactic}"
                if got.is_floating_point():
                    close(got, values[name].cpu(), TOLERANCE[DTYPE], what)
                else:
                    assert torch.equal(got, values[name]), what
    assert tried > 0
