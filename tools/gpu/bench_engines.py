"""Build, verify and time TensorRT engines of random models, beside mamba-ssm on the same weights.

    python tools/gpu/bench_engines.py --models 130m --batches 1 8 --out FILE --work FOLDER

One line of JSON a case goes to --out: a model, a batch and a share of FLOPs to save (0 is the
dense engine). Parity is measured first, against eager PyTorch in float32 made of plain functions,
on the engine's own choices, and is in the record: an engine outside its gate has no speed to
speak of, and the README's table says so. Then eager mamba-ssm, mamba-ssm
in a CUDA graph and all engines of one batch are timed in turns. A timed sample is the last of
three calls in a row, each waited for, with inputs and outputs on the GPU; the engines replay a
CUDA graph too, whose outputs must be those of a run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from product_floor import product_floor  # noqa: E402
from random_checkpoint import write_random  # noqa: E402
from tokred_plugins.opset import PLAIN  # noqa: E402

from tokred_export import pipeline  # noqa: E402
from tokred_export.backends import tensorrt  # noqa: E402
from tokred_export.backends.common import EngineInfo  # noqa: E402
from tokred_export.pipeline import Line  # noqa: E402
from tokred_export.prove import gpu_call  # noqa: E402
from tokred_export.reduction.flops import achieved_reduction  # noqa: E402
from tokred_export.runtime import tensorrt_python as python  # noqa: E402
from tokred_export.runtime.remote import RemoteRunner  # noqa: E402
from tokred_export.runtime.tensorrt_python import LAUNCHER_FILE  # noqa: E402
from tokred_export.specs import BuildSpec, ReductionSpec  # noqa: E402
from tokred_export.verify.cuda_baselines import mamba_model, timed_calls  # noqa: E402
from tokred_export.verify.judge import judge_case, tolerance_for  # noqa: E402
from tokred_export.verify.parity import measure_case  # noqa: E402
from tokred_export.verify.records import Latency, ParityCase  # noqa: E402
from tokred_export.verify.speed import interleave  # noqa: E402


def say(what: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {what}", flush=True)


Sites = tuple[int, ...] | None


def line_of(
    options: argparse.Namespace, model: str, batch: int, share: float, sites: Sites = None
) -> Line:
    """The line of one case, its checkpoint loaded."""
    folder = None if model == "demo" else options.work / model
    if folder is not None and not (folder / "config.json").is_file():
        write_random(folder, model, dtype="float16", device="cuda")
    spec = BuildSpec(
        model=None if folder is None else str(folder), seq_lens=(options.length,),
        reduction=ReductionSpec(
            target=share, method=options.method if share else "none", round_to=options.round_to,
            sites=sites if share else None,
        ),
        max_batch=batch, dtype="float16", backends=(),
    )
    return Line(spec, pipeline.load_checkpoint(spec.model), pipeline.Cache())


class Engine:
    """One engine of a case, open and verified; ``sites`` are the default ones if not named."""

    def __init__(
        self, options: argparse.Namespace, model: str, batch: int, share: float,
        sites: Sites = None,
    ) -> None:
        self.share, self.batch, self.sites = share, batch, sites
        at = f" at {','.join(map(str, sites))}" if sites else ""
        self.name = f"engine {share:g}{at}"
        begun = time.perf_counter()
        self.line = line_of(options, model, batch, share, sites)
        self.schedule = pipeline.schedules(self.line)[options.length]
        self.folder = options.work / f"{model}-{batch}-{share:g}{at.replace(' ', '-')}"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        onnx = self._export()
        exported = time.perf_counter() - begun
        self.info: EngineInfo = tensorrt.build(
            onnx, self.folder, max_batch=batch, level=options.level,
            timing_cache=options.timing_cache,
        )
        self.built_s = self.info.seconds
        say(f"{model} batch {batch} {self.name}: exported in {exported:.0f} s, built in "
            f"{self.built_s:.0f} s (builder {self.info.options['builder_seconds']:.0f}), "
            f"{self.info.options['plugins']} plugins")
        shutil.rmtree(onnx.parent)
        launcher = self.folder / LAUNCHER_FILE
        self.runner = RemoteRunner(
            self.folder / self.info.file, launcher if launcher.is_file() else None,
            python.interpreter(), python.environment(),
        )

    def _export(self) -> Path:
        folder = self.folder / "onnx"
        folder.mkdir()
        name = pipeline.component_name(self.schedule.length)
        model = pipeline.eager(self.line, self.schedule)
        pipeline.export_prefill(
            model, self.schedule.length, self.batch, folder / f"{name}.onnx"
        )
        return folder / f"{name}.onnx"

    def feeds(self) -> dict[str, np.ndarray]:
        """Prompts that fill the bucket."""
        random = np.random.default_rng(0)
        vocabulary = self.line.checkpoint.spec.vocab_size
        ids = random.integers(0, vocabulary, (self.batch, self.schedule.length), dtype=np.int32)
        return {
            "input_ids": ids, "prompt_len": np.full(self.batch, self.schedule.length, np.int32)
        }

    def parity(self) -> ParityCase:
        """Against float32 eager on the GPU; the last row of a batch is two thirds padding."""
        feeds = self.feeds()
        if self.batch > 1:
            feeds["prompt_len"][-1] //= 3
        schedule = self.schedule if self.schedule.sites else None
        model = pipeline.eager(self.line, schedule, "float32", PLAIN).cuda()
        return measure_case(
            model, self.runner.run, self.info.component, feeds["input_ids"], feeds["prompt_len"],
            "random ids", "float16",
        )


def parity_summary(case: ParityCase) -> dict:
    """What speed.jsonl keeps of a parity case."""
    logits = next(t for t in case.tensors if t.name == "logits")
    states = [t for t in case.tensors if t.name.startswith("present.")]
    worst = max(states, key=lambda t: t.rel_l2)
    return {
        "logits_rel_l2": logits.rel_l2, "noise_floor": logits.noise_rel_l2,
        "kept_agreement": case.kept_jaccard, "states_max_rel": worst.rel_l2,
        "states_noise_floor": worst.noise_rel_l2,
        "same_source": [round(s.same_source, 4) for s in case.sites],
        "flips": sum(len(s.flips) for s in case.sites),
        "wrong": list(judge_case(case, tolerance_for("float16")))[:5],
    }


def product_shapes(engine: Engine) -> list[tuple[int, int, int]]:
    """(rows, inner, columns) of every projection; the last out_proj sees one token a row."""
    spec = engine.line.checkpoint.spec
    shapes = []
    counts = engine.schedule.tokens_entering(spec.n_layer)
    for layer, tokens in enumerate(counts):
        rows = engine.batch * tokens
        shapes.append((rows, spec.d_model, spec.in_proj_dim))
        last = engine.batch if layer == spec.n_layer - 1 else rows
        shapes.append((last, spec.d_inner, spec.d_model))
    return shapes


def run_batch(options: argparse.Namespace, model: str, batch: int) -> Iterator[dict]:
    """All cases of one model and batch."""
    engines: list[Engine] = []
    calls, parities = {}, {}
    cases = [(x, sites) for x in options.shares for sites in (options.sites if x else [None])]
    for share, sites in cases:
        engine = Engine(options, model, batch, share, sites)
        engines.append(engine)
        case = engine.parity()
        torch.cuda.empty_cache()
        name = engine.name
        parities[name] = parity_summary(case)
        say(f"parity {name}: {parities[name]}")
        calls[name] = gpu_call(engine.runner, engine.feeds())
        # No result, but something to know if the machine is taken away before there is one.
        (alone,) = interleave({name: calls[name]}, 3, 3, 1.0)
        say(f"{name} alone: {alone.median_ms:.3f} ms")
    memory, floors = {}, {}
    for engine in engines:
        floors[engine.name] = floor_of(product_shapes(engine))
    if options.baseline and model != "demo":
        memory["mamba_ssm"] = add_baseline(calls, engines[0])
    latencies = {x.name: x for x in interleave(calls, options.samples, 3, options.seconds)}
    for engine in engines:
        found = record(options, model, engine, latencies, parities[engine.name],
                       floors[engine.name], memory)
        kinds = profile(options, model, engine)
        found["profile_ms"] = sum(kinds.values())
        found["sites_ms"] = sum(ms for kind, ms in kinds.items() if kind.startswith("token_"))
        yield found
        engine.runner.close()


def floor_of(shapes: list[tuple[int, int, int]]) -> float:
    """The projections alone, in milliseconds."""
    found = product_floor(shapes, torch.float16)
    torch.cuda.empty_cache()
    return found


def add_baseline(calls: dict, engine: Engine) -> float:
    """mamba-ssm eager and in a graph among the calls; its peak memory in GB."""
    torch.cuda.reset_peak_memory_stats()
    model = mamba_model(engine.line.checkpoint, torch.bfloat16)
    ids = torch.from_numpy(engine.feeds()["input_ids"]).long().cuda()
    with torch.inference_mode():
        model(ids, num_last_tokens=1)
    peak = torch.cuda.max_memory_allocated() / 1e9
    calls["eager"], calls["graph"] = timed_calls(lambda: model(ids, num_last_tokens=1).logits)
    return peak


def record(
    options: argparse.Namespace, model: str, engine: Engine, latencies: dict[str, Latency],
    parity: dict, floor: float, memory: dict[str, float],
) -> dict:
    """One line of speed.jsonl."""
    mine = latencies[engine.name]
    eager, graph = latencies.get("eager"), latencies.get("graph")
    info = engine.info
    plugins = {k.removeprefix("plugins."): n for k, n in info.options.items() if "plugins." in k}
    found = {
        "model": model, "batch": engine.batch, "length": engine.schedule.length,
        "length_out": engine.schedule.length_out, "flops_reduction": engine.share,
        "flops_saved": round(achieved_reduction(engine.line.checkpoint.spec, engine.schedule), 5),
        "round_to": options.round_to if engine.schedule.sites else 1,
        **({"sites": engine.sites} if engine.sites else {}),
        "method": engine.schedule.method, "runtime": f"TensorRT {info.version}",
        "dtype": "float16", "plugins": {"count": info.options["plugins"], **plugins},
        "median_ms": mine.median_ms, "p95_ms": mine.p95_ms, "drift": mine.drift,
        "samples": len(mine.samples_ms),
        "eager_ms": eager and eager.median_ms, "graph_ms": graph and graph.median_ms,
        "gemm_floor_ms": floor, "peak_gb": engine.runner.memory_bytes() / 1e9,
        "mamba_ssm_peak_gb": memory.get("mamba_ssm"), "build_s": info.seconds,
        "builder_s": info.options["builder_seconds"], "level": options.level,
        "plan_mb": info.bytes / 1e6, "parity": parity, "gpu": torch.cuda.get_device_name(),
        "versions": versions(), "commit": options.commit,
    }
    ratios = "" if eager is None else (
        f", {eager.median_ms / mine.median_ms:.2f}x eager, "
        f"{graph.median_ms / mine.median_ms:.2f}x graph ({graph.median_ms:.3f})"
    )
    say(f"{model} batch {engine.batch} {engine.name}: {mine.median_ms:.3f} ms{ratios}, "
        f"products {floor:.3f} ms, {found['peak_gb']:.2f} GB")
    return found


def profile(options: argparse.Namespace, model: str, engine: Engine) -> dict[str, float]:
    """Milliseconds by kind of layer, in a file and the largest on the screen.

    Layers run one by one here, not under the timing's steady load: their sum is not a run.
    """
    times: dict[str, float] = {}
    for name, ms in engine.runner.profile(5).items():
        kind = name.rpartition("/")[2] if "/" in name else name
        times[kind] = times.get(kind, 0.0) + ms
    kinds = sorted(times.items(), key=lambda item: -item[1])
    file = options.out.with_suffix(".profile.json")
    known = json.loads(file.read_text()) if file.is_file() else {}
    by = f" by {options.round_to}" if engine.schedule.sites and options.round_to > 1 else ""
    case = engine.name.removeprefix("engine ")
    known[f"{model} batch {engine.batch} {case}{by}"] = dict(kinds)
    file.write_text(json.dumps(known, indent=1))
    say("  " + ", ".join(f"{name[:40]} {ms:.3f}" for name, ms in kinds[:14]))
    return dict(kinds)


def versions() -> dict[str, str]:
    """Of what decides the times."""
    import triton

    found = {"torch": torch.__version__, "triton": triton.__version__,
             "cuda": str(torch.version.cuda), "tensorrt": python.installed_version()}
    with contextlib.suppress(ImportError):
        from mamba_ssm import __version__

        found["mamba_ssm"] = __version__
    return found


def sites_of(text: str) -> Sites:
    """Layers after which to reduce, or None for the default ones."""
    return None if text == "default" else tuple(int(layer) for layer in text.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["130m"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.0, 0.3])
    parser.add_argument("--sites", nargs="+", type=sites_of, default=[None],
                        help="layers such as 5,11,16, or default; one engine for each")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--method", default="utrc")
    parser.add_argument("--round-to", type=int, default=1)
    parser.add_argument("--level", type=int, help="TensorRT's builder optimisation level")
    parser.add_argument("--timing-cache", type=Path)
    parser.add_argument("--samples", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--no-baseline", dest="baseline", action="store_false")
    parser.add_argument("--commit", default=os.environ.get("TOKRED_COMMIT", "unknown"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    failed = False
    for model in options.models:
        for batch in options.batches:
            for found in run_batch(options, model, batch):
                failed |= bool(found["parity"]["wrong"])
                with options.out.open("a") as out:
                    out.write(json.dumps(found) + "\n")
            torch.cuda.empty_cache()
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
