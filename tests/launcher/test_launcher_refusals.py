"""What the launcher plugin says when something is wrong: one sentence, and no crash."""

from __future__ import annotations

import re

import pytest
from launcher_stage import FLOAT32, Stage


def test_foreign_plans(stage, fields, tmp_path):
    """Bytes that are cut short, changed or another's are refused in a sentence."""
    plan = tmp_path / "plan"
    stage.play(stage.node("n", fields["norm"]["fields"]), f"serialize n {plan}")
    whole = plan.read_bytes()
    sizes = [*range(0, 120), *range(120, len(whole), 997), len(whole) - 1]
    broken = [whole[:size] for size in sizes]
    broken += [b"\xff" * 500, whole[:29] + b"\xff" * 8 + whole[37:], whole + b"\0", b"TKL1" * 50]
    commands = []
    for i, data in enumerate(broken):
        (tmp_path / f"broken{i}").write_bytes(data)
        commands.append(f"deserialize n {tmp_path / f'broken{i}'}")
    played = stage.play(*commands)
    assert played.results == ["null"] * len(broken)
    messages = [line for line in played.said if line.startswith("log ")]
    starts = "log error: tokred launcher: node n: "
    cut, missing = starts + "the plan's kernel description is cut short", starts + "field "
    other = starts + "the plan was made by another version of this plugin: build the engine again"
    assert all(m in (cut, other) or re.fullmatch(f"{missing}[a-z_]+ is missing", m)
               for m in messages), set(messages)
    assert {cut, other} <= set(messages)
    assert messages[-4:] == [other, cut, cut, other]


KEYS = ("kernel", "target", "ptx", "entry", "grid", "block", "shared", "scratch", "input_types",
        "extras", "output_types", "output_ranks", "output_dims")


def refusals(stage: Stage, fields: dict, changes: list[dict]) -> list[str]:
    """What the plugin says to each change of the fields, all in one player."""
    commands = [stage.node(f"n{i}", fields, **change) for i, change in enumerate(changes)]
    played = stage.play(*commands)
    assert played.results == ["null"] * len(changes) and not played.asked
    logged = [line for line in played.said if line.startswith("log ")]
    return [line.removeprefix(f"log error: tokred launcher: node n{i}: ")
            for i, line in enumerate(logged)]


def test_missing_and_mistyped_fields(stage, fields):
    """Each gives its sentence and no plugin."""
    conv = fields["conv"]["fields"]
    assert refusals(stage, conv, [{key: None} for key in KEYS]) == [
        f"field {key} is missing" for key in KEYS]
    assert refusals(stage, conv, [{key: (FLOAT32, [1.0])} for key in KEYS]) == [
        f"field {key} has the wrong type, expected "
        + ("a string" if isinstance(conv[key], str) else "32-bit integers") for key in KEYS]


@pytest.mark.parametrize(("change", "says"), [
    ({"kernel": ""}, "field kernel is empty"),
    ({"ptx": ""}, "field ptx is empty"),
    ({"input_types": " "}, "field input_types is empty"),
    ({"input_types": "fp16 f32"},
     "field input_types holds 'f32', expected fp32, fp16, bf16, i32 or i1"),
    ({"extras": "12 x"}, "field extras holds 'x', expected 32-bit integers"),
    ({"extras": "2147483648"}, "field extras holds '2147483648', expected 32-bit integers"),
    ({"extras": "1.5"}, "field extras holds '1.5', expected 32-bit integers"),
    ({"extras": ""}, "entry causal_conv1d_kernel of the PTX has 7 parameters, and the fields name "
                     "6 inputs, extras, outputs and scratch memory"),
    ({"scratch": 384}, "entry causal_conv1d_kernel of the PTX has 7 parameters, and the fields "
                       "name 8 inputs, extras, outputs and scratch memory"),
    ({"scratch": -1}, "field scratch must be one number from 0 to 1048576"),
    ({"entry": "causal"}, "the PTX has no entry causal"),
    ({"target": [80, 90]}, "field target must be one number from 10 to 9999"),
    ({"target": 90}, "field target says sm_90 and the PTX is for 'sm_80'"),
    ({"target": 8}, "field target must be one number from 10 to 9999"),
    ({"ptx": "no code"}, "field target says sm_80 and the PTX is for ''"),
    ({"grid": [7]}, "field grid must be two positive numbers, the second at most 65535"),
    ({"grid": [0, 1]}, "field grid must be two positive numbers, the second at most 65535"),
    ({"grid": [1, 65536]}, "field grid must be two positive numbers, the second at most 65535"),
    ({"block": 1025}, "field block must be one number from 1 to 1024"),
    ({"block": 0}, "field block must be one number from 1 to 1024"),
    ({"shared": -1}, "field shared must be one number from 0 to 1073741824"),
    ({"output_ranks": [2]}, "output_types and output_ranks differ in number"),
    ({"output_ranks": [2, 3]}, "output_dims has fewer numbers than output_ranks says"),
    ({"output_ranks": [2, 1]}, "output_dims has more numbers than output_ranks says"),
    ({"output_ranks": [8, 2]}, "field output_ranks must have numbers from 0 to 7"),
    ({"output_ranks": [-1, 2]}, "field output_ranks must have numbers from 0 to 7"),
    ({"output_dims": [1, 2, 3, -1]}, "field output_dims has a negative size"),
])  # fmt: skip
def test_fields_that_contradict(stage, fields, change, says):
    """No plugin, and the field is named."""
    assert refusals(stage, fields["conv"]["fields"], [change]) == [says]


def test_wrong_number_of_tensors(stage, fields):
    """A node with too few inputs or outputs gets a sentence, not a launch."""
    create = stage.node("n", fields["norm"]["fields"])
    sentence = ("log error: tokred launcher: kernel add_rms_norm takes 3 inputs and makes 2 "
                "outputs, and its node has {} and {}")
    for inputs, outputs in ((4, 2), (2, 2), (3, 1)):
        played = stage.play(create, f"formats n {inputs} {outputs}")
        assert set(played.said) == {"made", "takes", sentence.format(inputs, outputs)}
    played = stage.play(create, "dims n 2")
    assert played.said == ["made", *[sentence.format(2, 2), "dims type 1",
                                     sentence.format(2, 2), "dims type 0"]]


def test_bfloat16_on_tensorrt_8(stage, fields, tmp_path):
    """There is no such type: a sentence, also where the plan of a newer release is read."""
    create = stage.node("n", fields["conv-bf16"]["fields"])
    plan = tmp_path / "plan"
    assert stage.play(create, f"serialize n {plan}").said == ["made"]
    for command in (create, f"deserialize n {plan}"):
        played = stage.play(command, major=8)
        assert played.results == ["null"]
        assert played.message == (
            "node n: this TensorRT has no bfloat16: build the engine in float16")


ON = "kernel NAME for compute capability 8.0 on Pretended GPU (8.0)"


@pytest.mark.parametrize(("fails", "log", "says"), [
    ("cuModuleLoadDataEx=222", "", ON + " has PTX 8.2, which this driver (CUDA 12.2) is too old to "
     "read: update it (CUDA error 222: error text 222)"),
    ("cuModuleLoadDataEx=218", "ptxas line 7\nfatal: x\n", ON + " does not load: ptxas line 7 "
     "fatal: x (CUDA error 218: error text 218)"),
    ("cuModuleLoadDataEx=218", "x" * 5000, ON + " does not load: " + "x" * 1023
     + " (CUDA error 218: error text 218)"),
    ("cuModuleLoadDataEx=999", "", ON + " does not load (CUDA error 999: unknown)"),
    ("cuModuleGetFunction=500", "", ON + " has no entry ENTRY "
     "(CUDA error 500: error text 500)"),
    ("cuFuncSetAttribute=1", "", ON + " does not get SHARED bytes of shared memory a block "
     "(CUDA error 1: error text 1)"),
    ("cuCtxGetCurrent=3", "", "the current CUDA context is not known (CUDA error 3: error text 3)"),
    ("cuCtxGetDevice=201", "", "the current CUDA device is not known "
     "(CUDA error 201: error text 201)"),
    ("cuDeviceGetAttribute=1", "", "Pretended GPU does not say its compute capability "
     "(CUDA error 1: error text 1)"),
])  # fmt: skip
def test_a_driver_that_refuses(stage, fields, fails, log, says):
    """One sentence, nothing left loaded, and nothing broken: it works when tried again."""
    played = stage.play(
        stage.node("n", fields["scan"]["fields"]), "initialize n", "tell CUDA_FAIL none",
        "initialize n", "enqueue n 1", "terminate n", CUDA_FAIL=fails, CUDA_JIT_LOG=log,
    )
    assert played.results == ["made", "1", "0", "0"]
    scan = fields["scan"]["fields"]
    for word in ("kernel", "entry", "shared"):
        says = says.replace("NAME" if word == "kernel" else word.upper(), str(scan[word]))
    assert played.message == says
    failed = played.asked.index("cuLaunchKernel " + played.calls("cuLaunchKernel")[0])
    got_a_module = fails.startswith(("cuModuleGetFunction", "cuFuncSetAttribute"))
    assert sum("cuModuleUnload" in line for line in played.asked[:failed]) == got_a_module
    assert len(played.calls("cuModuleUnload")) == got_a_module + 1


def test_a_launch_that_fails(stage, fields):
    """The next one may succeed."""
    played = stage.play(
        stage.node("n", fields["scan"]["fields"]), "initialize n", "enqueue n 1",
        "tell CUDA_FAIL none", "enqueue n 1", CUDA_FAIL="cuLaunchKernel=701",
    )
    assert played.results == ["made", "0", "1", "0"]
    name = fields["scan"]["fields"]["kernel"]
    assert played.message == f"kernel {name} cannot be launched (CUDA error 701: error text 701)"


@pytest.mark.parametrize(("driver", "says"), [
    ("broken", "there is no CUDA driver here: .*libcuda.so.1.*"),
    ("old", "the CUDA driver is too old, it lacks cuCtxPushCurrent_v2"),
])
def test_no_driver(stage, fields, driver, says):
    """The plugin can be made and its shapes asked for; only running needs a driver."""
    played = stage.play(stage.node("n", fields["norm"]["fields"]), "dims n 3", "initialize n",
                        driver=driver)
    assert played.results == ["made", "dims batch 2048 768 type 1", "dims batch 2048 768 type 0",
                              "1"]
    assert re.fullmatch(says, played.message)


def test_no_context(stage, fields):
    """A thread without a context gets a sentence."""
    played = stage.play(stage.node("n", fields["norm"]["fields"]), "context 0", "initialize n")
    assert played.results == ["made", "1"] and played.message == "no CUDA context is current"
