"""Random Mamba-2 checkpoints at the published sizes, in mamba_ssm's layout, for benchmarks.

    python tools/random_checkpoint.py 130m FOLDER [--dtype float16] [--device cuda]

Weights have the scale of mamba_ssm's own initialisation; dt spans 0.001 to 0.1 and A 1 to 16.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

# d_model, n_layer of the state-spaces/mamba2 models
SIZES = {
    "130m": (768, 24), "370m": (1024, 48), "780m": (1536, 48), "1.3b": (2048, 48),
    "2.7b": (2560, 64),
}  # fmt: skip
STATE, HEAD, CONV, VOCABULARY = 128, 64, 4, 50288


def write_random(
    folder: Path, size: str, seed: int = 0, dtype: str = "float32", device: str = "cpu",
    layers: int | None = None,
) -> None:
    """Write ``folder`` with config.json and model.safetensors.

    Args:
        folder: made if need be.
        size: a key of ``SIZES``.
        seed: the same gives the same weights on one kind of device.
        dtype: of all weights but dt_bias, A_log and D, which are float32 as mamba_ssm keeps them.
        device: where the numbers are drawn; a GPU takes seconds where a CPU takes a minute.
        layers: in place of the published number.
    """
    width, layers = SIZES[size][0], layers or SIZES[size][1]
    inner, random = 2 * width, torch.Generator(device).manual_seed(seed)
    heads, channels = inner // HEAD, inner + 2 * STATE

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.empty(shape, device=device).uniform_(low, high, generator=random)

    def linear(rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
        bound = scale / math.sqrt(columns)
        return uniform(-bound, bound, rows, columns)

    embedding = torch.empty(VOCABULARY, width, device=device).normal_(0, 0.02, generator=random)
    tensors = {
        "backbone.embedding.weight": embedding,
        "backbone.norm_f.weight": torch.ones(width),
    }
    for i in range(layers):
        dt = torch.exp(uniform(math.log(1e-3), math.log(0.1), heads))
        parts = {
            "norm.weight": torch.ones(width),
            "mixer.in_proj.weight": linear(2 * inner + 2 * STATE + heads, width),
            "mixer.conv1d.weight": uniform(-0.5, 0.5, channels, 1, CONV),
            "mixer.conv1d.bias": uniform(-0.5, 0.5, channels),
            "mixer.dt_bias": dt + torch.log(-torch.expm1(-dt)),
            "mixer.A_log": torch.log(uniform(1, 16, heads)),
            "mixer.D": torch.ones(heads),
            "mixer.norm.weight": torch.ones(inner),
            "mixer.out_proj.weight": linear(width, inner, 1 / math.sqrt(layers)),
        }
        tensors |= {f"backbone.layers.{i}.{name}": tensor for name, tensor in parts.items()}
    wide = ("dt_bias", "A_log", "D")
    kinds = {n: torch.float32 if n.endswith(wide) else getattr(torch, dtype) for n in tensors}
    tensors = {name: tensor.to(kinds[name]).cpu() for name, tensor in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    config = {
        "d_model": width, "n_layer": layers, "vocab_size": VOCABULARY, "rms_norm": True,
        "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 16,
        "tie_embeddings": True, "ssm_cfg": {"layer": "Mamba2"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    write_random(options.folder, options.size, dtype=options.dtype, device=options.device)


if __name__ == "__main__":
    main()
