"""Every kernel by name, and a Call as text: what a kernel-level ONNX node carries.

Imports Triton, as kernels do.
"""

from __future__ import annotations

import json

from tokred_plugins.add_rms_norm.kernel import ADD_RMS_NORM
from tokred_plugins.causal_conv1d.kernel import CAUSAL_CONV1D
from tokred_plugins.embed_rms_norm.kernel import EMBED_RMS_NORM
from tokred_plugins.gated_rms_norm.kernel import GATED_RMS_NORM, GATED_RMS_NORM_SCORES
from tokred_plugins.kernels import Call, Kernel, Spec, Tactic
from tokred_plugins.linear.kernel import LINEAR, LINEAR_FEW
from tokred_plugins.ssd_scan.launches import (
    SSD_CHUNK_SCAN,
    SSD_CHUNK_STATE,
    SSD_PASS,
    SSD_SCAN,
    SSD_SCAN_HOPPER,
    SSD_SCAN_HOPPER_GATED,
    SSD_SCAN_HOPPER_SCORED,
    SSD_STEPS,
)
from tokred_plugins.token_importance.kernel import TOKEN_IMPORTANCE
from tokred_plugins.token_link.kernel import TOKEN_LINK, TOKEN_LINK_RANK
from tokred_plugins.token_match.kernel import TOKEN_MATCH, TOKEN_MATCH_BEST, TOKEN_NORM
from tokred_plugins.token_reduce.kernel import TOKEN_REDUCE, TOKEN_REDUCE_NORM
from tokred_plugins.token_split.kernel import (
    TOKEN_SPLIT,
    TOKEN_SPLIT_NORM,
    TOKEN_SPLIT_RANK,
    TOKEN_SPLIT_SEARCH,
    TOKEN_SPLIT_SEARCH_NORM,
)

KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        ADD_RMS_NORM, EMBED_RMS_NORM, GATED_RMS_NORM, GATED_RMS_NORM_SCORES, CAUSAL_CONV1D,
        SSD_STEPS, SSD_SCAN, SSD_SCAN_HOPPER, SSD_SCAN_HOPPER_GATED, SSD_SCAN_HOPPER_SCORED,
        SSD_CHUNK_STATE, SSD_PASS, SSD_CHUNK_SCAN, TOKEN_IMPORTANCE,
        TOKEN_SPLIT_RANK, TOKEN_SPLIT, TOKEN_SPLIT_NORM, TOKEN_SPLIT_SEARCH,
        TOKEN_SPLIT_SEARCH_NORM, TOKEN_NORM, TOKEN_MATCH, TOKEN_MATCH_BEST, TOKEN_LINK_RANK,
        TOKEN_LINK, TOKEN_REDUCE, TOKEN_REDUCE_NORM,
        LINEAR, LINEAR_FEW,
    )
}


def variant_name(call: Call) -> str:
    """The kernel's name, and which of its optional inputs this call has not.

    Two calls of one name take the same inputs, so one plugin can serve both.
    """
    absent = [name for name in call.kernel.inputs if name not in call.inputs]
    return "_without_".join([call.kernel.name, *absent])


def call_to_json(call: Call) -> str:
    """One line that :func:`call_from_json` reads; equal calls give equal lines."""
    fields = {
        "kernel": call.kernel.name,
        "inputs": dict(call.inputs),
        "extras": dict(call.extras),
        "outputs": {name: [list(spec.shape), spec.dtype] for name, spec in call.outputs.items()},
        "constants": dict(call.constants),
        "tactic": [
            dict(call.tactic.blocks), call.tactic.num_warps, call.tactic.num_stages,
            call.tactic.since, call.tactic.until, call.tactic.ptx,
        ],
        "grid": list(call.grid),
    }
    return json.dumps(fields, separators=(",", ":"))


def call_from_json(text: str) -> Call:
    """The call that :func:`call_to_json` wrote.

    Raises:
        KeyError: a kernel that this version does not have.
    """
    fields = json.loads(text)
    return Call(
        kernel=KERNELS[fields["kernel"]],
        inputs=fields["inputs"],
        extras=fields["extras"],
        outputs={
            name: Spec(tuple(shape), dtype) for name, (shape, dtype) in fields["outputs"].items()
        },
        constants=fields["constants"],
        tactic=Tactic(*fields["tactic"]),
        grid=tuple(fields["grid"]),
    )
