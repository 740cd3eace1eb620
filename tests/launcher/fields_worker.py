"""Prints the launcher's fields of real kernels, one line of JSON each.

``test_launcher.py`` runs this in a process of its own, since a process that imported Triton to
interpret kernels cannot compile them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "gpu"))

from kernel_shapes import MODELS, cases
from tokred_plugins.aot import compile_call
from tokred_plugins.kernels import Spec
from tokred_plugins.linear import kernel as linear

from tokred_export.export.lower import launch_attributes

# name -> op (its last kernel is taken), tokens, dtype, compute capability times ten
ASKED = {
    "norm": ("add_rms_norm", 2048, "fp16", 80),
    "conv": ("causal_conv1d", 2048, "fp16", 80),
    "conv-1707": ("causal_conv1d", 1707, "fp16", 80),
    "conv-bf16": ("causal_conv1d", 2048, "bf16", 80),
    "conv-100": ("causal_conv1d", 2048, "fp16", 100),
    "scan": ("ssd_scan", 2048, "fp16", 80),
    "scan-90": ("ssd_scan", 2048, "fp16", 90),
    "link": ("token_link", 2048, "fp16", 87),
}


def main() -> None:
    asked = {}
    for name, (op, tokens, dtype, target) in ASKED.items():
        case = next(iter(cases(MODELS["130m"], 1, tokens, dtype, {op})))
        asked[name] = case.launches()[-1], target
    for name, cluster in (("linear-90", 0), ("linear-hopper", 2)):
        tactic = next(
            t for t in linear.LINEAR.tactics
            if t.blocks["PROGRAMS"] and t.blocks["CLUSTER"] == cluster
        )
        (product,) = linear.calls(
            Spec((2, 700, 768), "fp16"), Spec((3352, 768), "fp16"), turned=True,
            tactics={"linear": tactic},
        )
        asked[name] = product, 90
    walk = next(iter(cases(MODELS["130m"], 1, 2048, "fp16", {"ssd_scan"})))
    asked["walk-hopper"] = walk.launches(segments=1, target=90, scratch=True)[-1], 90
    for name, (call, target) in asked.items():
        compiled = compile_call(call, target)
        print(json.dumps({
            "name": name,
            "fields": launch_attributes(compiled, call),
            "inputs": list(call.inputs.values()),
            "extras": [call.extras[n] for n in call.kernel.extras],
            "outputs": [[spec.dtype, *spec.shape[1:]] for spec in call.outputs.values()],
            "grid": list(call.grid),
            "threads": 32 * call.tactic.num_warps,
        }))


if __name__ == "__main__":
    main()
