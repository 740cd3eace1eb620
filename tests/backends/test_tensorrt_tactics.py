"""Which tactics sum in float16, by the names that TensorRT 8's log gives them."""

from __future__ import annotations

import json
import types

import pytest

from tokred_export.backends.tensorrt_tactics import (
    Tactics,
    accumulates_in_half,
    float32_sums,
    half_sums,
    listening_logger,
)

HALF = [
    "sm90_xmma_gemm_f16f16_f16f16_f16_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute",
    "sm80_xmma_gemm_f16f16_f16f16_f16_tn_n_tilesize64x128x64_stage3_warpsize2x2x1_tensor16x8x16",
    "sm80_xmma_fprop_implicit_gemm_f16f16_f16f16_f16_nhwckrsc_nhwc_tilesize128x64x64",
    "sm90_xmma_gemm_f16f16_f16f16_f16",
    "ampere_h16816gemm_128x64_ldg8_stages_64x3_tn",
    "ampere_h1688gemm_128x128_ldg8_stages_32x1_nn",
    "turing_h1688gemm_256x64_ldg8_tn",
    "volta_h884gemm_64x128_ldg8_nn",
    "cutlass_80_tensorop_h16816gemm_128x64_64x3_tn_align8",
    "maxwell_hgemm_128x64_nn",
    "hgemm_32x32_nn",
]
FLOAT = [
    "sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute",
    "sm80_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize64x128x64_stage3_warpsize2x2x1_tensor16x8x16",
    "sm80_xmma_gemm_f32f32_tf32f32_f32_nn_n_tilesize128x64x16_stage4_warpsize2x2x1_tensor16x8x8",
    "sm80_xmma_gemm_f32f32_f32f32_f32_tn_n_tilesize64x64x8",
    "ampere_s16816gemm_fp16_128x64_ldg8_stages_64x3_tn",
    "ampere_fp16_s16816gemm_fp16_128x128_ldg8_f2f_stages_32x5_tn",
    "turing_fp16_s1688gemm_fp16_256x64_ldg8_f2f_tn",
    "volta_sgemm_128x64_nn",
    "KernelLaunch",
    "",
]
UNSIGNED = 0xF9A3C1E2D4B50617
SIGNED = UNSIGNED - 2**64  # the same bits as TensorRT's Python hands them over


@pytest.mark.parametrize("name", HALF)
def test_names_that_sum_in_half(name):
    """The type of the sum comes last, or is the letter before the instruction's shape."""
    assert accumulates_in_half(name)


@pytest.mark.parametrize("name", FLOAT)
def test_names_that_do_not(name):
    """float16 operands and results say nothing about the sum."""
    assert not accumulates_in_half(name)


def line(name, number):
    return f"/layers.0/in_proj Tactic Name: {name} Tactic: {number:#018x} Time: 0.0123"


def test_numbers_are_signed(tmp_path):
    """The log writes a tactic's number without a sign, the selector is given it with one."""
    tactics = Tactics(None)
    tactics.read(line(HALF[0], UNSIGNED))
    tactics.read(line(FLOAT[0], 7))
    tactics.read("Autotuning format combination: Half(1) -> Half(1)")
    assert tactics.is_half(SIGNED) and tactics.is_half(UNSIGNED)
    assert not tactics.is_half(7) and not tactics.is_half(-7)
    tactics.save()  # nowhere


def test_names_are_kept_in_a_file(tmp_path):
    """What one build learns, the next one knows; it adds to that."""
    file = tmp_path / "timing.tactics.json"
    first = Tactics(file)
    first.read(line(HALF[0], UNSIGNED))
    first.save()
    second = Tactics(file)
    assert second.names == {UNSIGNED: HALF[0]} and second.is_half(SIGNED)
    second.read(line(FLOAT[0], 7))
    second.save()
    assert json.loads(file.read_text()) == {"0x7": FLOAT[0], hex(UNSIGNED): HALF[0]}
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


class Base:
    """Stands for a class that TensorRT has users derive from."""


SEVERITY = types.SimpleNamespace(ERROR=1, WARNING=2, VERBOSE=4)
FAKE = types.SimpleNamespace(
    ILogger=type("ILogger", (Base,), {"Severity": SEVERITY}), IAlgorithmSelector=Base
)


def test_logger_prints_what_matters_and_reads_the_rest(capsys):
    """Warnings and errors are for people, names of tactics for the selector."""
    tactics = Tactics(None)
    logger = listening_logger(FAKE, tactics)
    logger.log(SEVERITY.VERBOSE, line(HALF[0], UNSIGNED))
    logger.log(SEVERITY.WARNING, "a weight is subnormal")
    logger.log(SEVERITY.ERROR, "no memory")
    assert capsys.readouterr().out == "[TRT] a weight is subnormal\n[TRT] no memory\n"
    assert tactics.names == {UNSIGNED: HALF[0]}


def test_selector_leaves_out_sums_in_half():
    """By index among the choices; a tactic without a known name stays."""
    tactics = Tactics(None)
    tactics.read(line(HALF[0], UNSIGNED))
    tactics.read(line(FLOAT[0], 7))
    variant = types.SimpleNamespace
    choices = [variant(algorithm_variant=variant(tactic=n)) for n in (SIGNED, 7, SIGNED, 99)]
    selector = float32_sums(FAKE, tactics)
    assert selector.select_algorithms(None, choices) == [1, 3]
    assert selector.report_algorithms([], []) is None


def test_layers_of_an_engine_that_sum_in_half():
    """Layers without a tactic, as of plugins, do not count."""
    layers = [
        {"Name": "in_proj", "TacticName": HALF[0]}, {"Name": "out_proj", "TacticName": FLOAT[0]},
        {"Name": "scan", "LayerType": "PluginV2"},
    ]  # fmt: skip
    assert half_sums(layers) == [f"in_proj ({HALF[0]})"]
