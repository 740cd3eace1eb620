"""Check and time every kernel on this GPU: python tools/gpu/bench_kernels.py --out FILE

Each op is first compared with its plain PyTorch function in float64; a kernel that is wrong is
reported and not timed. Times come from a CUDA graph that runs the op once on each of several
input sets, more data than the L2 cache holds, divided by the number of sets: the gap between
two kernels of a graph is in them. Median of the replays. Floors use this GPU's own copy
bandwidth and matrix rate, measured first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "plugins"), str(ROOT)]

from kernel_shapes import MODELS, PRODUCTS, SCANS, Case, cases, tensors, this_gpu  # noqa: E402
from tokred_plugins.kernels import Tactic, launch_into, torch_dtypes  # noqa: E402

from tokred_export.backends.tune import Tuner  # noqa: E402

ROTATED_BYTES = 300e6  # of inputs and outputs together; the L2 cache of an H200 holds 50 MB
TOLERANCE = {"fp32": 2e-5, "fp16": 2e-3, "bf16": 1.5e-2}
# Others' kernels for the same, and what their time is called in docs/results/kernels.jsonl.
OTHERS = {"mamba_chunk_scan_combined": "mamba_ssm_us", "torch.matmul": "torch_us"}
EXACT = {"lower", "upper", "src", "dst", "merge", "keep"}


def copy_bandwidth() -> float:
    """Bytes a second of a large device copy, read plus written."""
    a = torch.randn(1 << 29, device="cuda")
    b = torch.empty_like(a)
    # An arithmetic kernel: a graph would turn copy_ into a slower memory-copy node.
    seconds = time_graph(lambda: torch.neg(a, out=b), 1)
    return 2 * a.numel() * 4 / seconds


def matrix_rate() -> float:
    """Floating-point operations a second of a large bfloat16 product of random matrices."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    seconds = time_graph(lambda: torch.mm(a, b, out=out), 1)
    return 2 * n**3 / seconds


def time_graph(run: Callable[[], object], count: int, replays: int = 25) -> float:
    """Median seconds of one of ``count`` executions inside ``run``, captured in a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(3):
        graph.replay()
    samples = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / 1e3 / count)
    return statistics.median(samples)


class Prepared:
    """Input sets of a case, more than the cache holds, and the launches over them."""

    def __init__(self, case: Case) -> None:
        self.case = case
        wanted = int(ROTATED_BYTES / max(case.bytes(), 1)) + 1
        distinct = max(1, min(wanted, 64))
        self.sets = [tensors(case, seed) for seed in range(distinct)]
        self.count = max(distinct, 8)

    def allocate(self, calls: tuple) -> list[dict]:
        """One set of outputs for each set of inputs, poisoned."""
        dtypes = torch_dtypes()
        made = []
        for _ in self.sets:
            values = {}
            for call in calls:
                for name, spec in call.outputs.items():
                    values[name] = torch.empty(spec.shape, dtype=dtypes[spec.dtype], device="cuda")
                    values[name].fill_(torch.nan if values[name].is_floating_point() else 1)
            made.append(values)
        return made

    def time(self, calls: tuple, only: str | None = None) -> float:
        """Seconds of all calls, or of one of them; intermediate values are computed first."""
        outputs = self.allocate(calls)

        def run(chosen: tuple) -> None:
            for i in range(self.count):
                given, made = self.sets[i % len(self.sets)], outputs[i % len(self.sets)]
                for call in chosen:
                    launch_into(call, {**given, **made}, made)

        run(calls)
        chosen = tuple(c for c in calls if only is None or c.kernel.name == only)
        return time_graph(lambda: run(chosen), self.count)

    def outputs(self, calls: tuple) -> dict:
        """What the calls write for the first set of inputs."""
        made = self.allocate(calls)[0]
        for call in calls:
            launch_into(call, {**self.sets[0], **made}, made)
        return made


class Expected:
    """The op's results in float64, one batch item at a time to bound memory."""

    def __init__(self, prepared: Prepared) -> None:
        case, given = prepared.case, prepared.sets[0]
        batch = next(iter(case.inputs.values())).shape[0]
        self.items = sorted({0, batch - 1})
        self.values = []
        for item in self.items:
            one = {}
            for name, x in given.items():
                if x is not None and case.inputs[name].shape[:1] == (batch,) and x.dim() > 0:
                    x = x[item : item + 1] if name not in ("weight", "bias") else x
                one[name] = x.double() if x is not None and x.is_floating_point() else x
            if case.op in SCANS:  # [H] parameters are no batch, even where H == B
                one |= {k: given[k].double() for k in ("dt_bias", "a_log", "d")}
            self.values.append(case.eager(one))

    def error(self, prepared: Prepared, made: dict) -> tuple[float, str]:
        """Largest relative L2 error over the outputs, and what is wrong, if anything is."""
        case, worst, wrong = prepared.case, 0.0, ""
        dtype = next(s.dtype for s in case.inputs.values() if s is not None)
        for item, values in zip(self.items, self.values, strict=True):
            for name, want in zip(case.outputs, values, strict=True):
                got = made[name][item : item + 1]
                if name in EXACT:
                    if not torch.equal(got, want):
                        wrong = f"{name} differs"
                    continue
                if name == "target":
                    continue  # a near tie may go either way; the similarity is compared
                error = ((got.double() - want).norm() / want.norm()).item()
                worst = max(worst, error if error == error else float("inf"))
                if not error <= TOLERANCE[dtype]:
                    wrong = f"{name}: relative error {error:.1e}"
        return worst, wrong


def measure(case: Case, label: dict, rates: dict, all_tactics: bool) -> list[dict]:
    """Records of one case: the whole op, each kernel, each tactic."""
    prepared = Prepared(case)
    expected = Expected(prepared)
    floor = max(case.bytes() / rates["bytes_per_s"], case.operations / rates["flops"])
    records = []

    def record(calls: tuple, kernel: str, tactic: str, only: str | None, **more: int) -> None:
        entry = {**label, "op": case.op, "kernel": kernel, "tactic": tactic, **more,
                 "floor_us": floor * 1e6, "bytes": case.bytes(), "operations": case.operations}
        try:
            entry["error"], entry["wrong"] = expected.error(prepared, prepared.outputs(calls))
            if not entry["wrong"]:
                entry["us"] = prepared.time(calls, only) * 1e6
                entry["ratio"] = entry["us"] / entry["floor_us"]
        except Exception as problem:  # noqa: BLE001  one tactic must not end the run
            entry["wrong"] = f"{type(problem).__name__}: {problem}"[:300]
        records.append(entry)
        show(entry)

    calls = launches(case)
    record(calls, "*", "; ".join(f"{c.kernel.name} {c.tactic}" for c in calls), None)
    if len(calls) > 1:
        for call in calls:
            record(calls, call.kernel.name, str(call.tactic), call.kernel.name)
    if all_tactics:
        for kernel, tactic, options in variants(case):
            calls = launches(case, {kernel: tactic}, **options)
            # Its chunk decides the others.
            whole = kernel.startswith(("ssd_scan", "ssd_chunk_scan"))
            record(calls, kernel, str(tactic), None if whole else kernel, **options)
    if case.op == "ssd_scan":
        records += mamba_scan(case, prepared, label, floor)
    if case.op in PRODUCTS and "squares" not in case.inputs:
        records += torch_product(case, prepared, label, floor)
    return records


def launches(case: Case, tactics: dict | None = None, **options: int) -> tuple:
    """The calls as engines have them: kernels that want scratch memory among them, products with
    the fastest tactic where none is asked for."""
    if case.op in PRODUCTS and tactics is None:
        return tuple(tuner().best(call) for call in case.launches())
    scratch = {"scratch": True} if case.op == "ssd_scan" else {}
    return case.launches(tactics, **{**scratch, **options})


@cache
def tuner() -> Tuner:
    """Of this GPU; nothing is kept for another run."""
    gpu = this_gpu()
    return Tuner(gpu["target"], None, gpu["multiprocessors"])


def variants(case: Case) -> list[tuple[str, Tactic, dict[str, int]]]:
    """Every kernel with every tactic, and what else to ask for; the scan all ways."""
    if case.op != "ssd_scan":
        return [(c.kernel.name, t, {}) for c in case.launches() for t in c.kernel.tactics]
    ways = ({"segments": 1}, {"segments": 1, "scratch": False}, {"segments": 2, "scratch": False})
    found = [
        (call.kernel.name, tactic, options)
        for options in ways
        for call in launches(case, **options)
        for tactic in call.kernel.tactics
    ]
    return [one for i, one in enumerate(found) if one not in found[:i]]


def torch_product(case: Case, prepared: Prepared, label: dict, floor: float) -> list[dict]:
    """torch's product, cuBLAS, of the same operands."""
    x, weight = prepared.sets[0]["x"], prepared.sets[0]["weight"]
    y = torch.empty(*x.shape[:2], weight.shape[0], device="cuda", dtype=x.dtype)

    def run() -> None:
        for i in range(prepared.count):
            given = prepared.sets[i % len(prepared.sets)]
            torch.matmul(given["x"], given["weight"].T, out=y)

    us = time_graph(run, prepared.count) * 1e6
    entry = {**label, "op": case.op, "kernel": "torch.matmul", "tactic": "cuBLAS's own choice",
             "us": us, "floor_us": floor * 1e6, "ratio": us / floor / 1e6, "wrong": ""}
    show(entry)
    return [entry]


def mamba_scan(case: Case, prepared: Prepared, label: dict, floor: float) -> list[dict]:
    """mamba_ssm's scan on the same inputs, where it is installed."""
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ImportError as missing:
        print(f"mamba_ssm is not here ({missing}): no comparison")
        return []
    heads = case.inputs["dt_bias"].shape[0]
    inner = case.inputs["xbc"].shape[2] - 2 * case.attributes[1]

    def run() -> None:
        for i in range(prepared.count):
            g = prepared.sets[i % len(prepared.sets)]
            x, b, c = g["xbc"].split([inner, case.attributes[1], case.attributes[1]], dim=2)
            mamba_chunk_scan_combined(
                x.unflatten(2, (heads, -1)), g["zxbcdt"][:, :, -heads:], -torch.exp(g["a_log"]),
                b.unsqueeze(2), c.unsqueeze(2), chunk_size=256, D=g["d"], dt_bias=g["dt_bias"],
                dt_softplus=True, return_final_states=True,
            )

    with torch.no_grad():
        us = time_graph(run, prepared.count) * 1e6
    entry = {**label, "op": "ssd_scan", "kernel": "mamba_chunk_scan_combined",
             "tactic": "mamba_ssm autotuned", "us": us, "floor_us": floor * 1e6,
             "ratio": us / floor / 1e6, "wrong": ""}
    show(entry)
    return [entry]


def show(entry: dict) -> None:
    """One line of the table."""
    name = f"{entry['model']} B{entry['batch']} L{entry['length']} {entry['dtype']}"
    what = f"{entry['op']}" if entry["kernel"] in ("*", entry["op"]) else entry["kernel"]
    result = entry["wrong"] or (
        f"{entry['us']:9.2f} us  floor {entry['floor_us']:8.2f}  x{entry['ratio']:.2f}"
        f"  err {entry.get('error', 0):.1e}"
    )
    segments = f" segments={entry['segments']}" if "segments" in entry else ""
    tactic = "default" if entry["kernel"] == "*" else entry["tactic"]
    print(f"{name:22} {what:26} {tactic + segments:58} {result}", flush=True)


def result_lines(report: dict) -> list[str]:
    """One line of JSON for each op with its default tactics, as docs/results keeps them."""
    lines = []
    for r in report["records"]:
        if r["kernel"] != "*" or r["wrong"]:
            continue
        sizes = {k: r[k] for k in ("op", "model", "batch", "length", "dtype")}
        beside = {m["kernel"]: round(m["us"], 2) for m in report["records"]
                  if m["kernel"] in OTHERS and all(m[k] == v for k, v in sizes.items())}
        line = {**sizes, "tactic": r["tactic"], "median_us": round(r["us"], 2),
                "floor_us": round(r["floor_us"], 2), "ratio_to_floor": round(r["ratio"], 2),
                "error": float(f"{r['error']:.1e}")}
        line |= {OTHERS[kernel]: us for kernel, us in beside.items()}
        lines.append(json.dumps({**line, "gpu": report["gpu"], "versions": report["versions"]}))
    return lines


def versions() -> dict[str, str]:
    """Of what decides the times."""
    import triton

    found = {"torch": torch.__version__, "triton": triton.__version__,
             "cuda": str(torch.version.cuda)}
    with contextlib.suppress(ImportError):
        from mamba_ssm import __version__

        found["mamba_ssm"] = __version__
    return found


def compile_one(job: tuple) -> None:
    """Compile one variant into Triton's cache, in a process of its own."""
    model, batch, length, dtype, op, index = job
    case = next(iter(cases(MODELS[model], batch, length, dtype, {op})))
    given = torch_dtypes()
    if index is None:  # a product's tactic is found later
        calls = case.launches() if case.op in PRODUCTS else launches(case)
    else:
        kernel, tactic, options = variants(case)[index]
        calls = launches(case, {kernel: tactic}, **options)
    for call in calls:
        if call.tactic.ptx:
            continue
        k = call.kernel
        pointers = [given[call.inputs[n]] if n in call.inputs else None for n in k.inputs]
        made = [given[call.outputs[n].dtype] for n in k.outputs]
        constants = {n: v for n, v in call.constexprs.items() if v is not None}
        k.fn.warmup(
            *pointers, *(call.extras[n] for n in k.extras), *made, **constants,
            grid=(1,), num_warps=call.tactic.num_warps, num_stages=call.tactic.num_stages,
        )


def precompile(chosen: list[tuple[str, int, int, str]], ops: set, all_tactics: bool) -> None:
    """Compile everything that will run, on all cores."""
    jobs = []
    for model, batch, length, dtype in chosen:
        for case in cases(MODELS[model], batch, length, dtype, ops):
            jobs.append((model, batch, length, dtype, case.op, None))
            if all_tactics:
                count = len(variants(case))
                jobs += [(model, batch, length, dtype, case.op, i) for i in range(count)]
    start = time.time()
    workers = max(1, min(14, (os.cpu_count() or 2) - 1))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        failures = [f"{job}: {e}" for job, e in zip(
            jobs, pool.map(guarded_compile, jobs, chunksize=4), strict=True) if e]
    print(f"compiled {len(jobs)} variants in {time.time() - start:.0f} s", flush=True)
    for line in failures:
        print("did not compile:", line[:400], flush=True)


def guarded_compile(job: tuple) -> str:
    """The error of a compilation, or nothing: the benchmark reports it again where it runs."""
    try:
        compile_one(job)
    except Exception as problem:  # noqa: BLE001
        return f"{type(problem).__name__}: {problem}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--lines", type=Path, help="write docs/results/kernels.jsonl here too")
    parser.add_argument("--models", nargs="+", default=["130m", "2.7b"], choices=MODELS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048])
    parser.add_argument("--dtype", default="bf16", choices=["fp16", "bf16", "fp32"])
    parser.add_argument("--ops", nargs="*", default=[],
                        help=f"only these ops; {', '.join(PRODUCTS)} only where named")
    parser.add_argument("--tactics", action="store_true", help="time every candidate tactic")
    options = parser.parse_args()

    chosen = [(m, b, n, options.dtype) for m in options.models for b in options.batches
              for n in options.lengths]
    precompile(chosen, set(options.ops), options.tactics)
    rates = {"bytes_per_s": copy_bandwidth(), "flops": matrix_rate()}
    print(f"{torch.cuda.get_device_name()}: copy {rates['bytes_per_s'] / 1e12:.2f} TB/s, "
          f"bf16 {rates['flops'] / 1e12:.0f} TFLOP/s", flush=True)
    records: list[dict] = []
    for model, batch, length, dtype in chosen:
        label = {"model": model, "batch": batch, "length": length, "dtype": dtype}
        for case in cases(MODELS[model], batch, length, dtype, set(options.ops)):
            records += measure(case, label, rates, options.tactics)
            torch.cuda.empty_cache()
            report = {"gpu": torch.cuda.get_device_name(), "rates": rates,
                      "versions": versions(), "records": records}
            options.out.write_text(json.dumps(report, indent=1))
            if options.lines:
                options.lines.write_text("\n".join(result_lines(report)) + "\n")
    wrong = [r for r in records if r["wrong"]]
    print(f"{len(records)} measurements, {len(wrong)} wrong; written to {options.out}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
