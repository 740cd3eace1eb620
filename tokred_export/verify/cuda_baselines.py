"""The dense eager models that an engine on a GPU must beat: mamba-ssm's and ours over Triton
kernels, each as it is and captured in a CUDA graph, which is the fair comparison.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from tokred_plugins import cuda
from torch import Tensor

from tokred_export.checkpoint import Checkpoint, build_model
from tokred_export.specs import Dtype
from tokred_export.verify.baselines import Baselines
from tokred_export.verify.speed import BURST, Milliseconds

if TYPE_CHECKING:
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

TIMED_ON_GPU = (
    "One prefill call, waited for, with token ids and outputs on the GPU: from ids to the last "
    "token's logits and, for engines and our eager, the states of all layers; not loading, "
    "tokenizing or sampling. Prompts fill the bucket. All are timed in turns, each sample being "
    f"the last of {BURST} calls in a row; engines replay a CUDA graph."
)
_WHOLE = {
    "embedding.weight": "backbone.embedding.weight", "norm_f_weight": "backbone.norm_f.weight",
}
_PARTS = {  # ours -> mamba_ssm's, below a layer
    "norm_weight": "norm.weight", "in_proj.weight": "mixer.in_proj.weight",
    "in_proj.bias": "mixer.in_proj.bias", "conv_weight": "mixer.conv1d.weight",
    "conv_bias": "mixer.conv1d.bias", "dt_bias": "mixer.dt_bias", "a_log": "mixer.A_log",
    "d": "mixer.D", "gate_norm_weight": "mixer.norm.weight",
    "out_proj.weight": "mixer.out_proj.weight", "out_proj.bias": "mixer.out_proj.bias",
}


def cuda_baselines(
    checkpoint: Checkpoint, input_ids: Tensor, dtype: Dtype = "bfloat16"
) -> Baselines:
    """Every dense eager of one checkpoint on the GPU, ready to be timed.

    Args:
        checkpoint: the model.
        input_ids: prompts that fill the bucket, int32 [B, L].
        dtype: of the weights; mamba-ssm's usual one by default.

    Raises:
        ImportError: Triton is not installed.
    """
    cuda.register()
    ids = input_ids.cuda()
    lengths = torch.full((len(ids),), ids.shape[1], dtype=torch.int32, device="cuda")
    model = build_model(checkpoint, dtype=dtype).cuda()
    timed = _both("eager over Triton kernels", lambda: model(ids, lengths).logits)
    left_out = {}
    try:
        theirs = mamba_model(checkpoint, getattr(torch, dtype))
    except ImportError as error:
        left_out["mamba-ssm"] = f"it cannot be imported ({error})"
    else:
        long = ids.long()
        timed |= _both("mamba-ssm", lambda: theirs(long, num_last_tokens=1).logits)
    return Baselines(timed, left_out)


def _both(name: str, forward: Callable[[], Tensor]) -> dict[str, Callable[[], Milliseconds]]:
    eager, graph = timed_calls(forward)
    return {name: eager, f"{name} in a CUDA graph": graph}


def mamba_model(checkpoint: Checkpoint, dtype: torch.dtype) -> MambaLMHeadModel:
    """mamba-ssm's model with the checkpoint's weights, on the GPU.

    Raises:
        ImportError: no mamba-ssm, or none that has Mamba-2.
        ValueError: its parameters have other names than we know.
    """
    config_module, mixer = _mamba_modules()
    spec = checkpoint.spec
    config = config_module.MambaConfig(
        d_model=spec.d_model, n_layer=spec.n_layer, vocab_size=spec.vocab_size,
        ssm_cfg={
            "layer": "Mamba2", "d_state": spec.d_state, "headdim": spec.head_dim,
            "ngroups": spec.n_groups, "d_conv": spec.d_conv,
            "expand": spec.d_inner // spec.d_model,
        },
        rms_norm=True, residual_in_fp32=spec.residual_in_fp32, fused_add_norm=True,
        pad_vocab_size_multiple=1, tie_embeddings=spec.tie_embeddings,
    )
    with torch.device("cuda"):
        model = mixer.MambaLMHeadModel(config, dtype=dtype)
    missing, unexpected = model.load_state_dict(_their_names(checkpoint), strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"mamba-ssm has no {unexpected} and misses {missing}")
    return model.eval()


def _mamba_modules() -> tuple[ModuleType, ModuleType]:
    from mamba_ssm.models import config_mamba, mixer_seq_simple

    return config_mamba, mixer_seq_simple


def _their_names(checkpoint: Checkpoint) -> dict[str, Tensor]:
    state = {}
    for name, tensor in checkpoint.tensors.items():
        head, _, rest = name.partition(".")
        if head == "layers":
            index, _, part = rest.partition(".")
            tensor = tensor.unsqueeze(1) if part == "conv_weight" else tensor
            name = f"backbone.layers.{index}.{_PARTS[part]}"
        state[_WHOLE.get(name, name)] = tensor
    return state


def timed_calls(
    forward: Callable[[], Tensor],
) -> tuple[Callable[[], Milliseconds], Callable[[], Milliseconds]]:
    """Samples of a forward pass, as it is and replayed from a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.inference_mode(), torch.cuda.stream(stream):  # compiles and tunes its kernels
        for _ in range(3):
            forward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        forward()
    return burst(torch.inference_mode()(forward)), burst(graph.replay)


def burst(call: Callable[[], object], count: int = BURST) -> Callable[[], Milliseconds]:
    """A sample: the last of ``count`` calls in a row, each waited for."""

    def run() -> Milliseconds:
        for _ in range(count):
            torch.cuda.synchronize()
            begun = time.perf_counter_ns()
            call()
            torch.cuda.synchronize()
            taken = (time.perf_counter_ns() - begun) / 1e6
        return Milliseconds(taken)

    return run
