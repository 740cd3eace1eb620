"""Compile mamba-ssm's kernels ahead of time: python tools/gpu/compile_baseline.py 130m:1 2.7b:8

Its kernels are tuned at their first call, which compiles their variants one after another. Here
those of all cases are compiled side by side, by one layer of each model, into Triton's cache on
disk, which bench_engines.py then finds.
Nothing else should be timed at the same time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "plugins"), str(ROOT)]

from random_checkpoint import SIZES, VOCABULARY, write_random  # noqa: E402


def case(text: str) -> tuple[str, int]:
    """``SIZE:BATCH`` of a command line.

    Raises:
        ArgumentTypeError: a size that is not published, or a batch that is no number above 0.
    """
    size, _, batch = text.partition(":")
    if size not in SIZES or not batch.isdecimal() or int(batch) < 1:
        raise argparse.ArgumentTypeError(
            f"{text} is no size and batch, expected for example 130m:1; sizes are "
            f"{', '.join(SIZES)}"
        )
    return size, int(batch)


def compile_one(size: str, batch: int, length: int) -> float:
    """Run one layer of a model twice; the seconds that took."""
    import torch

    from tokred_export.checkpoint import load_checkpoint
    from tokred_export.verify.cuda_baselines import mamba_model

    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        write_random(Path(folder), size, dtype="float16", device="cuda", layers=1)
        model = mamba_model(load_checkpoint(folder), torch.bfloat16)
    ids = torch.randint(VOCABULARY, (batch, length), device="cuda")
    with torch.inference_mode():
        for _ in range(2):
            model(ids, num_last_tokens=1)
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="+", type=case, metavar="SIZE:BATCH")
    parser.add_argument("--length", type=int, default=2048)
    options = parser.parse_args()
    with ProcessPoolExecutor(len(options.cases), get_context("spawn")) as pool:
        running = {c: pool.submit(compile_one, *c, options.length) for c in options.cases}
        for (size, batch), made in running.items():
            print(f"{size} batch {batch}: {made.result():.0f} s", flush=True)


if __name__ == "__main__":
    main()
