"""A tiny random model with reduction sites, and engines of it that are right, or wrong on purpose.

    from tiny_engines import eager_engine, ort_engine, tiny_model

    model = tiny_model("utrc")
    run = ort_engine(model)                      # ONNX Runtime, exported once a process
    run = eager_engine(model, chunk_size=5)      # another order of sums, like another engine
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper

from tokred_export.environment import environment
from tokred_export.export import export_prefill
from tokred_export.model import Mamba2
from tokred_export.specs import ModelSpec, ReductionSchedule, Site
from tokred_export.verify.records import Comparison, LogitsComparison, ParityCase, ParityRecord
from tokred_export.verify.replay import in_dtype, to_numpy

LENGTH = 37
SITES = (
    Site(layer=0, tokens_in=37, tokens_out=30),
    Site(layer=1, tokens_in=30, tokens_out=22),
)
SPEC = ModelSpec(
    layout="transformers", vocab_size=61, d_model=32, n_layer=3, d_inner=64, n_heads=8, head_dim=8,
    d_state=12, n_groups=2, norm_group_size=64, chunk_size=16,
)  # fmt: skip


def schedule_of(method="utrc", sites=SITES, **options):
    """The schedule of all models here: 37 tokens to 30 after layer 0, to 22 after layer 1."""
    return ReductionSchedule(method=method, length=LENGTH, sites=sites, **options)


def tiny_model(method="utrc", logits="last", schedule=None, **changes):
    """Float32 eager; the same arguments give the same weights."""
    spec = msgspec.structs.replace(SPEC, **changes)
    model = Mamba2(spec, schedule or schedule_of(method), logits=logits)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        wide = parameter.dim() > 1 and not name.endswith("conv_weight")
        scale = parameter.shape[-1] ** -0.5 if wide else 0.5
        parameter.data.normal_(0.0, scale, generator=generator)
    model.embedding.weight.data *= 5  # tokens of size 1, as after training
    return model.eval().requires_grad_(False)


def prompts(lengths, seed=0):
    """Random input_ids [B, 37] and prompt_len [B]."""
    ids = np.random.default_rng(seed).integers(0, SPEC.vocab_size, (len(lengths), LENGTH))
    return ids.astype(np.int32), np.asarray(lengths, np.int32)


def named(out):
    """A Prefill under the graph's names, as numpy."""
    arrays = {"logits": to_numpy(out.logits), "kept_positions": out.kept_positions.numpy()}
    for s, choice in enumerate(out.choices):
        for part, tensor in zip(choice._fields, choice, strict=True):
            arrays[f"choice.{part}.{s}"] = tensor.numpy()
    for i in range(len(out.conv_states)):
        arrays[f"present.conv_state.{i}"] = to_numpy(out.conv_states[i])
        arrays[f"present.ssm_state.{i}"] = to_numpy(out.ssm_states[i])
    return arrays


def eager_engine(model, dtype=torch.float32, chunk_size=5, choices=None, **ops):
    """Eager as an engine: other chunks round differently; ``ops`` replaces custom ops."""
    twin = in_dtype(model, dtype)
    twin.spec = msgspec.structs.replace(model.spec, chunk_size=chunk_size)
    twin.ops = dataclasses.replace(model.ops, **ops)

    def run(feeds):
        with torch.no_grad():
            tensors = (torch.from_numpy(feeds[name]) for name in ("input_ids", "prompt_len"))
            return named(twin(*tensors, choices))

    return run


@functools.cache
def exported():
    """The ONNX file of ``tiny_model()`` with a batch of up to 3."""
    folder = tempfile.TemporaryDirectory(prefix="tiny-engine-")
    path = Path(folder.name) / "prefill.onnx"
    export_prefill(tiny_model(), LENGTH, 3, path)
    return onnx.load(path)


def ort_engine(weight=None, change=None):
    """ONNX Runtime on ``exported()``, with one weight changed by ``change(array)`` in place."""
    graph = onnx.ModelProto()
    graph.CopyFrom(exported())
    if weight is not None:
        (tensor,) = (t for t in graph.graph.initializer if t.name.endswith(weight))
        array = numpy_helper.to_array(tensor).copy()
        change(array)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options)
    names = [value.name for value in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(None, feeds), strict=True))


def damaged(run, **changes):
    """``run`` with outputs replaced: name with "__" for "." -> function of all outputs, or None."""

    def wrapped(feeds):
        found = run(feeds)
        new = {}
        for key, change in changes.items():
            name = key.replace("__", ".")
            new[name] = None if change is None else change(found)
        kept = {name: array for name, array in {**found, **new}.items() if array is not None}
        return kept

    return wrapped


def comparison(name, rel_l2=1e-7, noise=1e-7, nonfinite=0):
    """A stored comparison."""
    return Comparison(
        name=name, shape=(1, 2), max_abs=rel_l2, mean_abs=rel_l2, rel_l2=rel_l2, cosine=1.0,
        nonfinite=nonfinite, noise_rel_l2=noise,
    )  # fmt: skip


def stored_case(*changed, layers=3, **fields):
    """A stored case without a fault, but for the comparisons in ``changed``."""
    names = ["logits", "kept_positions"]
    names += [f"present.{kind}.{i}" for i in range(layers) for kind in ("conv_state", "ssm_state")]
    tensors = {name: comparison(name) for name in names}
    tensors["kept_positions"] = comparison("kept_positions", 0.0, 0.0)
    tensors |= {tensor.name: tensor for tensor in changed}
    logits = LogitsComparison(kl=0.0, top1_agreement=1.0, top5_agreement=1.0)
    return ParityCase(
        **{
            "component": "prefill-37", "description": "by hand", "prompt_lengths": (37,),
            "tensors": tuple(tensors.values()), "logits": logits, "kept_exact": True,
            "kept_jaccard": 1.0, "sites": (), **fields,
        }
    )  # fmt: skip


def record_of(*cases):
    """A parity record around cases."""
    return ParityRecord(
        backend="onnxruntime", baseline="eager float32 CPU", noise="eager float64", cases=cases,
        environment=environment(), command="tokred-export verify out",
    )  # fmt: skip
