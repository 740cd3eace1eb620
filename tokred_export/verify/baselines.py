"""The dense eager models that an engine must beat: ours and transformers', at several chunk sizes.

They share one set of weights, run in inference mode, return the last token's logits and every
layer's states as the engines do, and are given memory as a long-running server would have it.
"""

from __future__ import annotations

import copy
import ctypes
import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import torch
from tokred_plugins.opset import CUSTOM, PLAIN
from torch import Tensor

from tokred_export.checkpoint import Checkpoint, build_model
from tokred_export.errors import EnvironmentUnable, InvalidRequest
from tokred_export.model import Mamba2
from tokred_export.specs import Dtype, ModelSpec

if TYPE_CHECKING:
    from transformers import Mamba2ForCausalLM

EAGER_CHUNKS = (32, 64, 128, 256)
TRANSFORMERS_CHUNKS = (64, 128, 256)
# transformers computes the same model in another order; more than this is another model.
TRANSFORMERS_REL_L2 = 1e-3

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_LARGEST_INT = 2**31 - 1


class Baselines(NamedTuple):
    """Candidates for the fastest honest dense eager.

    ``timed`` are calls by name, ready to be timed; ``left_out`` says of others why not.
    """

    timed: dict[str, Callable[[], object]]
    left_out: dict[str, str]


def eager_baselines(
    checkpoint: Checkpoint,
    input_ids: Tensor,
    threads: int,
    dtype: Dtype = "float32",
    device: str = "cpu",
) -> Baselines:
    """Make every dense eager of one checkpoint, without copying its weights for each.

    Sets torch's number of threads, which is the whole process's.

    Args:
        checkpoint: the model.
        input_ids: prompts that fill the bucket, int32 [B, L].
        threads: of torch on the CPU, as many as the engine gets.
        dtype: of the weights.
        device: where to run.

    Raises:
        InvalidRequest: no tokens to run.
        EnvironmentUnable: the installed transformers computes another model.
    """
    batch, length = input_ids.shape
    if batch == 0 or length == 0:
        raise InvalidRequest(
            f"prompts of shape {list(input_ids.shape)} were given to time, expected at least one "
            "token: name a longer --seq-len"
        )
    torch.set_num_threads(threads)
    # On the CPU the plain functions save the dispatcher's time; on CUDA it finds the kernels.
    model = build_model(checkpoint, dtype=dtype, ops=PLAIN if device == "cpu" else CUSTOM)
    model = model.to(device)
    input_ids = input_ids.to(device)
    prompt_len = torch.full((batch,), length, dtype=torch.int32, device=device)
    timed = {
        f"eager chunk {chunk}": _call(with_chunk(model, chunk), input_ids, prompt_len)
        for chunk in EAGER_CHUNKS
    }
    others, left_out = _transformers_calls(model, input_ids, prompt_len)
    return Baselines(timed | others, left_out)


def with_chunk(model: Mamba2, chunk: int) -> Mamba2:
    """The same model, parameters shared, with another chunk size for the scan."""
    # A shallow copy of a module shares its dicts of parameters and submodules.
    twin = copy.copy(model)
    twin.spec = msgspec.structs.replace(model.spec, chunk_size=chunk)
    return twin


def transformers_misfit(spec: ModelSpec) -> str | None:
    """Why transformers' Mamba-2 cannot be this model, as a clause, or None if it can."""
    if spec.norm_before_gate:
        return "transformers always gates before the norm, this model after it"
    if spec.d_inner % spec.d_model:
        return f"transformers' expand is whole, this model's is {spec.d_inner / spec.d_model:g}"
    return None


def transformers_model(model: Mamba2, chunk: int) -> Mamba2ForCausalLM:
    """transformers' model with the parameters of ours, shared.

    Args:
        model: one that :func:`transformers_misfit` has nothing against.
        chunk: its chunk size.

    Raises:
        ImportError: no transformers with Mamba-2.
    """
    from transformers import Mamba2Config, Mamba2ForCausalLM
    from transformers.utils import logging

    # On the CPU its PyTorch code is all it has; that CUDA kernels are missing is no news there.
    logging.get_logger("transformers").setLevel("ERROR")

    spec = model.spec
    config = Mamba2Config(
        vocab_size=spec.vocab_size,
        hidden_size=spec.d_model,
        num_hidden_layers=spec.n_layer,
        expand=spec.d_inner // spec.d_model,
        num_heads=spec.n_heads,
        head_dim=spec.head_dim,
        state_size=spec.d_state,
        n_groups=spec.n_groups,
        conv_kernel=spec.d_conv,
        chunk_size=chunk,
        layer_norm_epsilon=spec.norm_eps,
        residual_in_fp32=spec.residual_in_fp32,
        tie_word_embeddings=spec.tie_embeddings,
        use_conv_bias=spec.conv_bias,
        use_bias=spec.proj_bias,
        time_step_limit=(spec.dt_min, math.inf if spec.dt_max is None else spec.dt_max),
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    # Nothing is allocated or initialised, only to be overwritten.
    with torch.device("meta"):
        twin = Mamba2ForCausalLM(config)
    twin.load_state_dict(_their_names(model), strict=True, assign=True)
    return twin.eval().requires_grad_(False)


def steady_allocator() -> bool:
    """Let glibc's malloc keep freed memory in this process, for good.

    By default it maps every large block afresh and returns it when freed, so that eager PyTorch
    takes a page fault for each 4 KiB of each large temporary, every time: several times the cost
    of the arithmetic. ONNX Runtime has an arena of its own and does not pay for this. A speed-up
    over page faults would be no merit of the engine, so the baseline is spared them too.

    Returns:
        Whether it worked: this is glibc, and it accepted the settings.
    """
    try:
        is_glibc = (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError):  # Windows has no confstr; musl does not know this name
        return False
    if not is_glibc:
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Some versions refuse a threshold above 32 MiB, but let mapping be switched off.
    kept = mallopt(_M_MMAP_THRESHOLD, _LARGEST_INT) == 1 or mallopt(_M_MMAP_MAX, 0) == 1
    return mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT) == 1 and kept


def describe_timed(steady: bool) -> str:
    """What is inside the timed region on the CPU, for a record's ``timed``."""
    memory = (
        "glibc's malloc was told to keep freed memory (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD), so "
        "that eager PyTorch does not pay page faults for its temporaries"
        if steady
        else "malloc has its default settings, under which eager PyTorch may pay page faults for "
        "its temporaries"
    )
    return (
        "One prefill call, from token ids in memory to the last token's logits and the states of "
        "all layers in memory; not loading, tokenizing or sampling. Prompts fill the bucket. All "
        "are timed in turns in one process, with a pause before each so that no thread pool still "
        f"spins, and with Python's garbage collection off; {memory}."
    )


def _call(model: Mamba2, input_ids: Tensor, prompt_len: Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.inference_mode():
            return model(input_ids, prompt_len)

    return run


def _transformers_calls(
    model: Mamba2, input_ids: Tensor, prompt_len: Tensor
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """Calls of transformers' model by name, checked against ours, or the reason for none."""
    if misfit := transformers_misfit(model.spec):
        return {}, {"transformers": misfit}
    try:
        twins = {chunk: transformers_model(model, chunk) for chunk in TRANSFORMERS_CHUNKS}
    except ImportError as error:
        return {}, {"transformers": f"transformers cannot be imported ({error})"}
    if misfit := _norm_misfit(model.spec, twins[TRANSFORMERS_CHUNKS[0]]):
        return {}, {"transformers": misfit}
    ids = input_ids.long()  # what it takes; converted outside the timed region

    def call(twin: Mamba2ForCausalLM) -> Callable[[], object]:
        def run() -> object:
            with torch.inference_mode():
                return twin(input_ids=ids, use_cache=True, logits_to_keep=1)

        return run

    calls = {f"transformers chunk {chunk}": call(twin) for chunk, twin in twins.items()}
    with torch.inference_mode():
        expected = model(input_ids, prompt_len).logits
    # One of them is enough: they differ in nothing but the chunk size.
    _require_equal(next(iter(calls.values()))().logits[:, -1], expected)
    return calls, {}


def _norm_misfit(spec: ModelSpec, twin: Mamba2ForCausalLM) -> str | None:
    """Old transformers normalise all of E at once, newer ones each of G groups."""
    theirs = getattr(twin.backbone.layers[0].mixer.norm, "group_size", spec.d_inner)
    if theirs == spec.norm_group_size:
        return None
    return (
        f"this transformers normalises groups of {theirs} channels in the gated norm, this model "
        f"groups of {spec.norm_group_size}"
    )


def _require_equal(found: Tensor, expected: Tensor) -> None:
    error = float((found.double() - expected.double()).norm() / expected.double().norm())
    if not error <= TRANSFORMERS_REL_L2:  # NaN is refused too
        import transformers

        raise EnvironmentUnable(
            f"transformers {transformers.__version__} gives other logits than our dense eager on "
            f"the same weights (relative L2 {error:.2e}, expected at most "
            f"{TRANSFORMERS_REL_L2:.0e}), so it is no baseline: install another version of it"
        )


def _their_names(model: Mamba2) -> dict[str, Tensor]:
    """Our state dict under transformers' names; the convolution gets its middle axis back."""
    state = {}
    for name, tensor in model.state_dict().items():
        head, _, rest = name.partition(".")
        if head == "layers":
            index, _, part = rest.partition(".")
            tensor = tensor.unsqueeze(1) if part == "conv_weight" else tensor
            name = f"backbone.layers.{index}.{_PARTS.get(part, f'mixer.{part}')}"
        state[_WHOLE.get(name, name)] = tensor
    if model.spec.tie_embeddings:
        state["lm_head.weight"] = state["backbone.embeddings.weight"]
    return state


_WHOLE = {
    "embedding.weight": "backbone.embeddings.weight",
    "norm_f_weight": "backbone.norm_f.weight",
}
_PARTS = {  # those of a layer whose name is not the same below "mixer"
    "norm_weight": "norm.weight",
    "conv_weight": "mixer.conv1d.weight",
    "conv_bias": "mixer.conv1d.bias",
    "a_log": "mixer.A_log",
    "d": "mixer.D",
    "gate_norm_weight": "mixer.norm.weight",
}
