"""mamba-ssm as the baseline: the same weights, eager and in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

from tokred_export.checkpoint import Checkpoint
from tokred_export.verify.speed import Milliseconds

OURS = {
    "embedding.weight": "backbone.embedding.weight", "norm_f_weight": "backbone.norm_f.weight",
}
PARTS = {
    "norm_weight": "norm.weight", "in_proj.weight": "mixer.in_proj.weight",
    "conv_weight": "mixer.conv1d.weight", "conv_bias": "mixer.conv1d.bias",
    "dt_bias": "mixer.dt_bias", "a_log": "mixer.A_log", "d": "mixer.D",
    "gate_norm_weight": "mixer.norm.weight", "out_proj.weight": "mixer.out_proj.weight",
}


def mamba_model(checkpoint: Checkpoint, dtype: torch.dtype) -> MambaLMHeadModel:
    """mamba-ssm's model with the checkpoint's weights, on the GPU."""
    spec = checkpoint.spec
    config = MambaConfig(
        d_model=spec.d_model, n_layer=spec.n_layer, vocab_size=spec.vocab_size,
        ssm_cfg={"layer": "Mamba2"}, rms_norm=True, residual_in_fp32=spec.residual_in_fp32,
        fused_add_norm=True, pad_vocab_size_multiple=1, tie_embeddings=spec.tie_embeddings,
    )
    with torch.device("cuda"):
        model = MambaLMHeadModel(config, dtype=dtype)
    state = {}
    for name, tensor in checkpoint.tensors.items():
        head, _, rest = name.partition(".")
        if head == "layers":
            index, _, part = rest.partition(".")
            tensor = tensor.unsqueeze(1) if part == "conv_weight" else tensor
            name = f"backbone.layers.{index}.{PARTS[part]}"
        state[OURS.get(name, name)] = tensor
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"mamba-ssm lacks {unexpected} and misses {missing}")
    return model.eval()


def timed_calls(
    model: MambaLMHeadModel, ids: torch.Tensor
) -> tuple[Callable[[], Milliseconds], Callable[[], Milliseconds], torch.Tensor]:
    """One eager call and one replay of a CUDA graph, both waited for; and the logits."""

    @torch.inference_mode()
    def forward() -> torch.Tensor:
        return model(ids, num_last_tokens=1).logits

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compiles and tunes its kernels
        for _ in range(3):
            logits = forward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        model(ids, num_last_tokens=1)
    return burst(forward), burst(graph.replay), logits


def burst(call: Callable[[], object], count: int = 3) -> Callable[[], Milliseconds]:
    """The last of ``count`` waited-for calls in a row, so that no one pays for the pause before."""
    import time

    def run() -> Milliseconds:
        for _ in range(count):
            torch.cuda.synchronize()
            begun = time.perf_counter_ns()
            call()
            torch.cuda.synchronize()
            taken = (time.perf_counter_ns() - begun) / 1e6
        return Milliseconds(taken)

    return run


def product_floor(shapes: list[tuple[int, int, int]], dtype: torch.dtype) -> float:
    """Median milliseconds of matrix products [m, k] x [k, n] alone, in a CUDA graph."""
    import statistics

    weights: dict[tuple[int, int], list[torch.Tensor]] = {}
    pairs = []
    for m, k, n in shapes:
        held = weights.setdefault((k, n), [])
        if len(held) < 8:  # enough of them that the cache does not hold the next one
            held.append(torch.randn(k, n, device="cuda", dtype=dtype) / k**0.5)
        pairs.append((m, held[len(pairs) % len(held)]))
    x = {(m, k): torch.randn(m, k, device="cuda", dtype=dtype) for m, k, _ in shapes}
    out = {(m, n): torch.empty(m, n, device="cuda", dtype=dtype) for m, _, n in shapes}

    def run() -> None:
        for m, weight in pairs:
            torch.mm(x[m, weight.shape[0]], weight, out=out[m, weight.shape[1]])

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    timed = burst(graph.replay)
    return statistics.median(timed() for _ in range(15))
