"""How often the demo model's TensorRT engine picks eager's next token, on held-out prompts.

    python tools/gpu/demo_agreement.py --out demo.json --work FOLDER

Prompts are pieces of the held-out files of this Python's library, of lengths between 16 and the
bucket, at least half of them longer than the reduced length, so that real tokens are removed.
Three runs on the same prompts: the engine, eager float32 (plain functions), and eager float16.
The last one says how many choices 16-bit rounding alone turns.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import sysconfig
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from bench_engines import Engine, parity_summary, versions  # noqa: E402
from demo_training.corpus import encode, read_corpus  # noqa: E402
from tokred_plugins.opset import PLAIN  # noqa: E402

from tokred_export import pipeline  # noqa: E402
from tokred_export.checkpoint import load_checkpoint  # noqa: E402

END = 0


def held_out_prompts(
    count: int, length: int, length_out: int, seed: int = 0
) -> list[np.ndarray]:
    """Token ids of ``count`` prompts; the first half are longer than ``length_out``."""
    library = Path(sysconfig.get_paths()["stdlib"])
    path = load_checkpoint(None).files["tokenizer.json"]
    files = encode(Tokenizer.from_file(str(path)), read_corpus(library).held_out)
    random = np.random.default_rng(seed)
    prompts = []
    for index in range(count):
        low = length_out + 1 if index < (count + 1) // 2 else 16
        size = int(random.integers(low, length + 1))
        fitting = [ids for ids in files if len(ids) >= size]
        ids = fitting[random.integers(len(fitting))]
        start = int(random.integers(len(ids) - size + 1))
        prompts.append(ids[start : start + size])
    return prompts


def packed(prompts: list[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Left-padded ids int32 [B, L] and lengths int32 [B]."""
    ids = np.full((len(prompts), length), END, np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[length - len(prompt) :] = prompt
    return ids, np.array([len(p) for p in prompts], np.int32)


@torch.no_grad()
def eager_logits(model: torch.nn.Module, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Last-token logits, float32."""
    given = (torch.from_numpy(x).cuda() for x in (ids, lengths))
    return model(*given).logits.float().cpu().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--share", type=float, default=0.3)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--method", default="utrc")
    parser.add_argument("--round-to", type=int, default=1)
    parser.add_argument("--level", type=int)
    parser.add_argument("--timing-cache", type=Path)
    parser.add_argument("--commit", default=os.environ.get("TOKRED_COMMIT", "unknown"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    engine = Engine(options, "demo", options.batch, options.share)
    parity = parity_summary(engine.parity())
    schedule = engine.schedule
    exact = pipeline.eager(engine.line, schedule, "float32", PLAIN).cuda()
    rounded = pipeline.eager(engine.line, schedule, "float16", PLAIN).cuda()
    prompts = held_out_prompts(options.prompts, options.length, schedule.length_out)
    picks: dict[str, list[int]] = {"engine": [], "float32": [], "float16": []}
    for start in range(0, len(prompts), options.batch):
        ids, lengths = packed(prompts[start : start + options.batch], options.length)
        found = {
            "engine": engine.runner.run({"input_ids": ids, "prompt_len": lengths})["logits"],
            "float32": eager_logits(exact, ids, lengths),
            "float16": eager_logits(rounded, ids, lengths),
        }
        for name, logits in found.items():
            picks[name] += logits.argmax(axis=1).tolist()
    engine.runner.close()
    same = np.array(picks["engine"]) == picks["float32"]
    noise = np.array(picks["float16"]) == picks["float32"]
    long = np.array([len(p) > schedule.length_out for p in prompts])
    report = {
        "prompts": len(prompts), "longer_than_length_out": int(long.sum()),
        "length": options.length, "length_out": schedule.length_out, "method": options.method,
        "flops_reduction": options.share,
        "engine_equals_eager": int(same.sum()), "engine_equals_eager_long": int(same[long].sum()),
        "eager_float16_equals_float32": int(noise.sum()),
        "eager_float16_equals_float32_long": int(noise[long].sum()),
        "parity": parity, "gpu": torch.cuda.get_device_name(), "versions": versions(),
        "commit": options.commit,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
    sys.exit(1 if parity["wrong"] or same.sum() < noise.sum() else 0)


if __name__ == "__main__":
    main()
