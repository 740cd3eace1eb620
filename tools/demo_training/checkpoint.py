"""The demo's folder in the layout of transformers' Mamba2ForCausalLM, written and read back."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from demo_training.corpus import END, END_ID
from demo_training.model import DemoConfig, DemoModel

MAX_WEIGHT_BYTES = 13_000_000


def config_json(config: DemoConfig) -> dict[str, object]:
    """config.json as transformers 5 writes it for this model."""
    return {
        "architectures": ["Mamba2ForCausalLM"],
        "bos_token_id": END_ID,
        "chunk_size": config.chunk_size,
        "conv_kernel": config.d_conv,
        "dtype": "float16",
        "eos_token_id": END_ID,
        "expand": config.expand,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.d_model,
        "initializer_range": 0.1,
        "layer_norm_epsilon": config.norm_eps,
        "model_type": "mamba2",
        "n_groups": 1,
        "num_heads": config.n_heads,
        "num_hidden_layers": config.n_layer,
        "pad_token_id": END_ID,
        "rescale_prenorm_residual": False,
        "residual_in_fp32": True,
        "state_size": config.d_state,
        "tie_word_embeddings": True,
        "time_step_floor": 0.0001,
        "time_step_limit": [0.0, {"__float__": "Infinity"}],
        "time_step_max": 0.1,
        "time_step_min": 0.001,
        "time_step_rank": -(-config.d_model // 16),
        "use_bias": False,
        "use_cache": True,
        "use_conv_bias": True,
        "vocab_size": config.vocab_size,
    }


def write_json(path: Path, value: object) -> None:
    """Write indented JSON, replacing the file at once or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)


def write_texts(folder: Path, config: DemoConfig, tokenizer: Tokenizer) -> None:
    """Write everything but the weights: config, generation config, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config_json(config))
    ids = {"bos_token_id": END_ID, "eos_token_id": END_ID, "pad_token_id": END_ID}
    write_json(folder / "generation_config.json", ids)
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "bos_token": END,
            "clean_up_tokenization_spaces": False,
            "eos_token": END,
            "pad_token": END,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def write_weights(folder: Path, model: DemoModel) -> int:
    """Write model.safetensors in float16, replacing it at once; returns its size in bytes.

    Raises:
        SystemExit: the file is larger than the package may carry.
    """
    tensors = {name: t.detach().to("cpu", torch.float16) for name, t in model.state_dict().items()}
    part = folder / "model.safetensors.part"
    save_file(tensors, part, metadata={"format": "pt"})
    size = part.stat().st_size
    if size > MAX_WEIGHT_BYTES:
        raise SystemExit(f"the weights take {size} bytes, expected at most {MAX_WEIGHT_BYTES}")
    part.chmod(0o644)  # save_file leaves it readable by its owner alone
    os.replace(part, folder / "model.safetensors")
    return size


def read_config(folder: Path) -> DemoConfig:
    """Sizes from a demo folder's config.json."""
    found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return DemoConfig(
        vocab_size=found["vocab_size"],
        d_model=found["hidden_size"],
        n_layer=found["num_hidden_layers"],
        expand=found["expand"],
        d_state=found["state_size"],
        head_dim=found["head_dim"],
        d_conv=found["conv_kernel"],
        norm_eps=found["layer_norm_epsilon"],
        chunk_size=found["chunk_size"],
    )


def read_model(folder: Path, device: torch.device) -> DemoModel:
    """The model as written to the folder: float16 weights, computed in float32."""
    model = DemoModel(read_config(folder))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.float().eval().requires_grad_(False).to(device)
