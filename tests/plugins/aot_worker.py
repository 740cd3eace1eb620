"""Compiles every kernel for the targets given and prints one line of JSON each.

``test_aot.py`` runs this in processes of its own, since a process that imported Triton to
interpret kernels cannot compile them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "gpu"))

from kernel_shapes import MODELS, cases
from tokred_plugins.aot import DoesNotFit, compile_call
from tokred_plugins.kernels import Call, Spec
from tokred_plugins.linear import kernel as linear


def every_call() -> Iterator[Call]:
    """One call of each kernel, at the sizes of 130m with its default tactic."""
    done = set()
    for length in (2048, 1):  # products of many rows, and of few
        yield from linear.calls(Spec((1, length, 768), "fp16"), Spec((768, 3352), "fp16"))
    for cluster in (0, 1):
        described = [
            t for t in linear.LINEAR.tactics
            if t.blocks["PROGRAMS"] and t.blocks["CLUSTER"] == cluster
        ]
        tactics = {"linear": described[-1]}
        yield from linear.calls(
            Spec((1, 2048, 768), "fp16"), Spec((3352, 768), "fp16"), turned=True, tactics=tactics
        )
        yield from scaled_product(tactics)
    yield from scaled_product()
    for batch in (1, 8):  # some kernels are for few tokens, others for many
        for case in cases(MODELS["130m"], batch, 2048, "fp16"):
            calls = case.launches()
            if case.op == "ssd_scan":  # whatever GPU is here
                calls = case.launches(target=None) + case.launches(segments=1, target=None)
                for form in ({}, {"gated": True}, {"gated": True, "scored": True}):
                    calls += case.launches(segments=1, target=90, scratch=True, **form)
            if case.op == "gated_rms_norm":
                calls += case.launches(scores=True)
            for call in calls:
                if call.kernel.name not in done:
                    done.add(call.kernel.name)
                    yield call


def scaled_product(tactics: dict | None = None) -> tuple[Call, ...]:
    """The second product of a layer, whose rows come with a sum of squares for each head."""
    return linear.calls(
        Spec((1, 2048, 1536), "fp16"), Spec((768, 1536), "fp16"), turned=True, tactics=tactics,
        squares=Spec((1, 2048, 24), "fp32"), eps=1e-5,
    )


def assemble(ptx: str, target: int) -> str:
    """What ptxas says against the code; nothing where it has no objection."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        name = f"sm_{target}a" if target >= 90 else f"sm_{target}"
        command = [knobs.nvidia.ptxas.path, f"--gpu-name={name}", source, "-o", f"{source}.o"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return "" if done.returncode == 0 else done.stdout + done.stderr


def main() -> None:
    for target in map(int, sys.argv[1:]):
        for call in every_call():
            try:
                compiled = compile_call(call, target)
            except DoesNotFit:
                assert not call.tactic.since <= target <= call.tactic.until
                continue
            expected = [*call.inputs, *call.kernel.extras, *call.outputs]
            facts = {
                "compiled": compiled.to_json(), "expected": expected,
                "warps": call.tactic.num_warps,
                "ptxas": assemble(compiled.ptx, target) if target == 90 else "",
            }
            print(json.dumps(facts))


if __name__ == "__main__":
    main()
