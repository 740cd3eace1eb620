"""torch custom op -> one opaque node of domain ``tokred``, with literal attributes.

The exporter's own route for custom ops (an onnxscript function in the translation table) loses
them: its version conversion inlines every function. So the table writes bare nodes by schema,
and :mod:`tokred_export.export.functions` adds the bodies afterwards.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx
import onnx_ir as ir
import torch
from onnxscript.values import Op, Opset
from tokred_plugins import onnx_ops as ops
from tokred_plugins.body import OnnxOp
from tokred_plugins.names import DOMAIN, PLUGIN_ATTRIBUTES, VERSION

_KINDS = {int: "INT", float: "FLOAT", str: "STRING"}
_KINDS_OF_TENSOR = ("float", "float16", "bfloat16", "double", "int32", "int64", "bool")
_ANY = [f"tensor({kind})" for kind in _KINDS_OF_TENSOR]


def _node(op: OnnxOp) -> Callable:
    """A writer of nodes of this op: tensors by position, attributes by name."""
    opset = onnx.defs.OpSchema
    kinds = {**op.attributes, **{name: type(v) for name, v in PLUGIN_ATTRIBUTES.items()}}
    schema = opset(
        op.name, DOMAIN, VERSION,
        inputs=[opset.FormalParameter(n, f"T_{n}") for n in op.inputs],
        outputs=[opset.FormalParameter(n, f"T_{n}") for n in op.outputs],
        type_constraints=[(f"T_{n}", _ANY, "") for n in dict.fromkeys(op.inputs + op.outputs)],
        attributes=[
            opset.Attribute(n, getattr(opset.AttrType, _KINDS[k]), "") for n, k in kinds.items()
        ],
    )
    writer = Op(Opset(DOMAIN, VERSION), op.name, schema)
    return lambda *tensors, **attributes: writer(*tensors, **attributes, **PLUGIN_ATTRIBUTES)


_causal_conv1d = _node(ops.CAUSAL_CONV1D)
_ssd_scan, _ssd_scan_from = _node(ops.SSD_SCAN), _node(ops.SSD_SCAN_FROM)
_gated_rms_norm, _add_rms_norm = _node(ops.GATED_RMS_NORM), _node(ops.ADD_RMS_NORM)
_embed_rms_norm = _node(ops.EMBED_RMS_NORM)
_importance, _split, _match = (
    _node(op) for op in (ops.TOKEN_IMPORTANCE, ops.TOKEN_SPLIT, ops.TOKEN_MATCH)
)
_link, _reduce = _node(ops.TOKEN_LINK), _node(ops.TOKEN_REDUCE)
_stride, _reduce_top = _node(ops.TOKEN_STRIDE), _node(ops.TOKEN_REDUCE_TOP)


# The functions below are called by the exporter with onnx_ir values for tensors; it reads their
# signatures, so tensors stay unannotated.
# ruff: noqa: ANN001, ANN202


def _conv(zxbcdt, weight, bias, pads, offset: int):
    channels, taps = weight.shape
    return _causal_conv1d(
        zxbcdt, weight, bias, pads, offset=offset, channels=int(channels), taps=int(taps)
    )


def _scan(
    xbc, zxbcdt, dt_bias, a_log, d, pads, initial_state,
    n_groups: int, d_state: int, chunk_size: int, dt_min: float, dt_max: float,
):
    heads = int(dt_bias.shape[0])
    inner = int(xbc.shape[2]) - 2 * n_groups * d_state
    attributes = {
        "heads": heads, "head_dim": inner // heads, "n_groups": n_groups, "d_state": d_state,
        "chunk_size": chunk_size, "dt_min": dt_min, "dt_max": dt_max,
    }
    tensors = (xbc, zxbcdt, dt_bias, a_log, d, pads)
    if initial_state is None:
        return _ssd_scan(*tensors, **attributes)
    return _ssd_scan_from(*tensors, initial_state, **attributes)


def _gated(y, zxbcdt, weight, group_size: int, eps: float, norm_before_gate: bool):
    return _gated_rms_norm(
        y, zxbcdt, weight, inner=int(weight.shape[0]), group_size=group_size, eps=eps,
        norm_before_gate=int(norm_before_gate),
    )


def _is_wide(residual) -> int:
    return int(residual.dtype == ir.DataType.FLOAT)


def _add(hidden, residual, weight, eps: float):
    return _add_rms_norm(hidden, residual, weight, eps=eps, residual_in_fp32=_is_wide(residual))


def _embed(input_ids, table, weight, eps: float, residual_in_fp32: bool):
    return _embed_rms_norm(
        input_ids, table, weight, eps=eps, residual_in_fp32=int(residual_in_fp32)
    )


def _token_importance(y):
    return _importance(y)


def _token_split(scores, pads, count: int, protect: int):
    return _split(scores, pads, count=count, protect=protect)


def _token_match(hidden, lower, upper):
    return _match(hidden, lower, upper)


def _token_link(similarity, target, lower, upper, pads, removed: int, prune_permille: int):
    return _link(
        similarity, target, lower, upper, pads, removed=removed, prune_permille=prune_permille
    )


def _token_reduce(hidden, residual, keep, src, dst, merge):
    return _reduce(
        hidden, residual, keep, src, dst, merge, residual_in_fp32=_is_wide(residual)
    )


def _token_stride(pads, length: int, removed: int):
    return _stride(pads, length=length, removed=removed)


def _token_reduce_top(hidden, residual, keep, src, dst):
    return _reduce_top(hidden, residual, keep, src, dst, residual_in_fp32=_is_wide(residual))


def translation_table() -> dict[Callable, Callable]:
    """torch op -> function writing its node, for ``torch.onnx.export``."""
    tokred = torch.ops.tokred
    return {
        tokred.causal_conv1d.default: _conv,
        tokred.ssd_scan.default: _scan,
        tokred.gated_rms_norm.default: _gated,
        tokred.add_rms_norm.default: _add,
        tokred.embed_rms_norm.default: _embed,
        tokred.token_importance.default: _token_importance,
        tokred.token_split.default: _token_split,
        tokred.token_match.default: _token_match,
        tokred.token_link.default: _token_link,
        tokred.token_reduce.default: _token_reduce,
        tokred.token_stride.default: _token_stride,
        tokred.token_reduce_top.default: _token_reduce_top,
    }
