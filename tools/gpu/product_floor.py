"""How long the projections of a model take alone: what no engine on 16-bit products beats."""

from __future__ import annotations

import statistics

import torch

from tokred_export.verify.cuda_baselines import burst


def product_floor(shapes: list[tuple[int, int, int]], dtype: torch.dtype) -> float:
    """Median milliseconds of matrix products [m, k] x [k, n] alone, in a CUDA graph."""
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
