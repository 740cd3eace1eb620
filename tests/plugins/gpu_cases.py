"""Where kernel tests run, and what they share.

With a GPU the tests launch the compiled kernels. Without one they need Triton's interpreter,
which is chosen for a whole process before Triton is imported: ``test_interpreter.py`` runs
these files in a process of its own, and elsewhere they are skipped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"


def require_kernels() -> None:
    """Skip the calling module where its kernels cannot run in this process."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    if not ON_GPU and not INTERPRETED:
        pytest.skip(
            "no GPU, and TRITON_INTERPRET is not set: test_interpreter.py runs this file",
            allow_module_level=True,
        )
    if INTERPRETED:
        _index_of_one_element()


def _index_of_one_element() -> None:
    # numpy 2.4 no longer turns a one-element array into an int, which Triton 3.6's interpreter
    # relies on for loop bounds.
    from triton.runtime import interpreter

    def fixed(tensor: type, scope: object, patch: Callable = interpreter._patch_lang_tensor):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    if interpreter._patch_lang_tensor.__name__ != "fixed":
        interpreter._patch_lang_tensor = fixed


# bfloat16 only on the GPU: the interpreter computes it in float32 and rounds as it likes.
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if ON_GPU else ())
# Relative L2 error allowed against float64, by dtype of the tensors. 16-bit: rounding of the
# output and of matrix operands; float32: order of summation and approximate exponentials.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def make(seed: int, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Random normal values on the test device, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(DEVICE)


def exact(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The same tensors on the CPU, floats in float64."""
    return {
        name: x if x is None else x.cpu().double() if x.is_floating_point() else x.cpu()
        for name, x in tensors.items()
    }


def close(got: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    """Assert shape, finiteness and relative L2 error."""
    assert got.shape == expected.shape, f"{name}: {tuple(got.shape)} not {tuple(expected.shape)}"
    got, expected = got.cpu().double(), expected.double()
    assert torch.isfinite(got).all(), f"{name}: not finite"
    if expected.numel() == 0:
        return
    size = expected.norm()
    error = ((got - expected).norm() / size if size > 0 else got.norm()).item()
    assert error <= tolerance, f"{name}: relative error {error:.2e}, allowed {tolerance:.0e}"


def every_tactic(tactics: tuple) -> list[tuple[object, torch.dtype]]:
    """Pairs for parametrize: each tactic in bfloat16, the first in float16 too."""
    return [(t, torch.bfloat16) for t in tactics] + [(tactics[0], torch.float16)]
