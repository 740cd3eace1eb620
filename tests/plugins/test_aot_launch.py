"""The PTX that a plan would hold, launched through the driver, against Triton's own launch.

This is what TensorRT does with a kernel description: it knows the entry, the parameters in
their order, the grid and the shared memory, and nothing of Triton.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
if not torch.cuda.is_available():
    pytest.skip("launching needs a GPU", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "gpu"))

from kernel_shapes import MODELS, cases, tensors
from tokred_plugins.aot import PTX_VERSIONS, DoesNotFit, compile_call
from tokred_plugins.kernels import launch, spec_of, torch_dtypes
from tokred_plugins.linear import kernel as linear
from tokred_plugins.ssd_scan import launches as scan
from tokred_plugins.ssd_scan.reference import ssd_scan_reference

pytestmark = pytest.mark.gpu
TARGET = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
CASES = {
    f"{case.op}-{dtype}-B{batch}": case
    for dtype in ("fp16", "bf16") for batch in (1, 8)
    for case in cases(MODELS["130m"], batch, 1024 + 37, dtype)
}


def checked(status: int, what: str) -> None:
    assert status == 0, f"{what} gave CUresult {status}"


def launch_ptx(compiled, tensors_by_name):
    """Load the PTX and launch it with the described parameters; the outputs by name."""
    driver = ctypes.CDLL("libcuda.so.1")
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    checked(driver.cuModuleLoadData(ctypes.byref(module), compiled.ptx.encode()), "load")
    entry = compiled.entry.encode()
    checked(driver.cuModuleGetFunction(ctypes.byref(function), module, entry), "entry")
    checked(driver.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED, compiled.shared), "shared")
    made, values = {}, []
    for p in compiled.parameters:
        if p.role == "extra":
            values.append(ctypes.c_int32(p.value))
            continue
        if p.role == "output":
            made[p.name] = torch.empty(p.shape, dtype=torch_dtypes()[p.dtype], device="cuda")
            made[p.name].fill_(torch.nan if made[p.name].is_floating_point() else 1)
        tensor = made.get(p.name, tensors_by_name.get(p.name))
        values.append(ctypes.c_void_p(tensor.data_ptr()))
    batch = tensors_by_name[compiled.parameters[0].name].shape[0]
    if compiled.hidden:
        blocks = compiled.grid[0] * compiled.grid[1] * batch
        scratch = torch.empty(compiled.scratch * blocks, dtype=torch.int8, device="cuda")
        values.append(ctypes.c_void_p(scratch.data_ptr()))
    arguments = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
    torch.cuda.synchronize()
    checked(driver.cuLaunchKernel(function, *compiled.grid, batch, compiled.block, 1, 1,
                                  compiled.shared, None, arguments, None), "launch")
    torch.cuda.synchronize()
    checked(driver.cuModuleUnload(module), "unload")
    return made


@pytest.mark.skipif(TARGET not in PTX_VERSIONS, reason=f"sm_{TARGET} is no target of ours")
@pytest.mark.parametrize("name", CASES)
def test_ptx_gives_what_triton_gives(name):
    """Every kernel of an op in turn, on the same inputs, equal to the last bit."""
    case = CASES[name]
    values = {k: x for k, x in tensors(case, 0).items() if x is not None}
    for call in case.launches():
        expected = launch(call, values)
        made = launch_ptx(compile_call(call, TARGET), values)
        assert made.keys() == expected.keys()
        for output, want in expected.items():
            same = torch.equal(made[output].nan_to_num(7.0), want.nan_to_num(7.0))
            assert same, f"{call.kernel.name}: {output} differs"
        values |= expected


@pytest.mark.skipif(TARGET not in PTX_VERSIONS, reason=f"sm_{TARGET} is no target of ours")
@pytest.mark.parametrize("turned", [False, True], ids=["K x N", "N x K"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("parts", [0, 37, 80])
@pytest.mark.parametrize("tactic", linear.LINEAR.tactics, ids=str)
def test_products(tactic, parts, dtype, turned):
    """Against float64: descriptors are other code ahead of time than at Triton's own launch, and
    products for clusters are none of Triton's. Many tiles, none whole; one; less than one."""
    if tactic.blocks["CLUSTER"] and not turned:
        pytest.skip("clusters are for weights stored as [N, K]")
    for batch, length, inner, columns in ((3, 701, 776, 1184), (1, 64, 64, 256), (2, 17, 8, 32)):
        random = torch.Generator("cuda").manual_seed(0)
        x, weight = (
            torch.randn(shape, generator=random, device="cuda").to(dtype)
            for shape in ((batch, length, inner), (columns, inner) if turned else (inner, columns))
        )
        squares = torch.rand(batch, length, parts, generator=random, device="cuda")
        options = {"squares": spec_of(squares), "eps": 0.5} if parts else {}
        (call,) = linear.calls(
            spec_of(x), spec_of(weight), turned, tactics={"linear": tactic}, **options
        )
        try:
            compiled = compile_call(call, TARGET)
        except DoesNotFit as refused:
            pytest.skip(str(refused))
        expected = x.double() @ (weight.double().T if turned else weight.double())
        if parts:
            expected /= (squares.double().sum(2, keepdim=True) / inner + 0.5).sqrt()
        got = launch_ptx(compiled, {"x": x, "weight": weight, "squares": squares})["y"].double()
        # One rounding of the result, uniform in a binade: 2^-11 or 2^-8 over the root of 3.
        limit = 4e-4 if dtype == torch.float16 else 3.2e-3
        assert (got - expected).norm() / expected.norm() < limit


def scan_inputs(batch, length, heads, groups, pads, dtype, d_dtype):
    """Of a scan with heads of 64 and states of 128; rows of padding hold numbers too."""
    random = torch.Generator("cuda").manual_seed(0)
    columns = heads * 64 + 2 * groups * 128

    def normal(*shape):
        return torch.randn(shape, generator=random, device="cuda")

    return {
        "xbc": normal(batch, length, columns).to(dtype),
        "zxbcdt": 2 * normal(batch, length, heads * 64 + columns + heads).to(dtype),
        "dt_bias": normal(heads), "a_log": normal(heads), "d": normal(heads).to(d_dtype),
        "pads": torch.tensor(pads, dtype=torch.int32, device="cuda"),
    }


@pytest.mark.skipif(TARGET != 90, reason="the walk in PTX is for compute capability 9.0")
@pytest.mark.parametrize("tactic", scan.SSD_SCAN_HOPPER.tactics, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(
    ("length", "heads", "groups", "pads"),
    [(64, 8, 1, [0]), (200, 8, 2, [0, 37]), (130, 8, 1, [64, 130, 129, 65]),
     (515, 8, 2, [3, 300, 0]), (1, 8, 1, [0, 1])],
)
def test_the_scan_in_ptx(length, heads, groups, pads, dtype, tactic):
    """Against float64, as near as Triton's kernel for the same; padding of parts of chunks, of
    whole ones and of all."""
    for d_dtype in (torch.float32, dtype):
        given = scan_inputs(len(pads), length, heads, groups, pads, dtype, d_dtype)
        specs = [spec_of(x) for x in given.values()]
        limits = (None, groups, 128, 0.0, 1e9)
        steps, plain = scan.calls(*specs, *limits, segments=1)
        values = given | launch(steps, given)
        triton = launch(plain, values)
        (call,) = scan.calls(*specs, *limits, segments=1, target=90, scratch=True)
        grid = (scan.walk_programs(heads, groups, tactic.blocks), 1)
        assert grid[0], "a shape that the tactic is not for"
        call = replace(call, tactic=tactic, grid=grid)
        made = launch_ptx(compile_call(call, TARGET), values)
        wide = [x.double() if x.is_floating_point() else x for x in given.values()]
        expected = ssd_scan_reference(*wide, None, groups, 128, 64, 0.0, 1e9)
        for name, exact in zip(("y", "state"), expected, strict=True):
            error, other = (
                (found[name].double() - exact).norm() for found in (made, triton)
            )
            assert error <= 1.05 * other + 1e-6 * exact.norm(), (name, error, other)
        form = {"gated": True, "scored": d_dtype is dtype}
        (call,) = scan.calls(*specs, *limits, segments=1, target=90, scratch=True, **form)
        call = replace(call, tactic=tactic, grid=grid)
        made = launch_ptx(compile_call(call, TARGET), values)
        check_gated(made, triton, wide[1], expected)


def check_gated(made, triton, z, expected):
    """What a scan with a gate writes: y as before, times silu(z); the squares of each head, and
    maybe the means of what is positive of y. As near as Triton's rounded y makes them."""
    gate = torch.nn.functional.silu(z[..., : expected[0].shape[2]])

    def gated(y, state):
        heads = [x.unflatten(2, (state.shape[1], -1)) for x in (y.double() * gate, y.double())]
        return {
            "gated": heads[0].flatten(2), "squares": heads[0].square().sum(3),
            "relus": heads[1].relu().mean(3), "state": state.double(),
        }

    exact, other = gated(*expected), gated(triton["y"], triton["state"])
    for name, found in made.items():
        error, others = ((x.double() - exact[name]).norm() for x in (found, other[name]))
        assert error <= 1.2 * others + 1e-6 * exact[name].norm(), (name, error, others)
