"""Train the demo model that ships with the package, or evaluate one.

    python3 tools/train_demo.py --minutes 5
    python3 tools/train_demo.py --evaluate tokred_export/data/demo

The model is a Mamba-2 of 6.2 million parameters with a byte-level BPE vocabulary of 4096. It is
trained on the text of a Python standard library (the running Python's own unless --stdlib names
another), split by file through a hash of the path: 5 % held out, 2 % for choosing the weights to
keep, the rest for training and for the vocabulary. Held-out bits per byte are measured on the
float16 file as written and reported beside ``xz -9e`` and a modified Kneser-Ney 5-gram model over
the same tokens. Needs torch, numpy, safetensors and tokenizers, not the package.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import platform
import re
import sys
import sysconfig
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from demo_training import checkpoint, corpus, evaluate, ngram, train
from demo_training.corpus import Corpus
from demo_training.model import DemoConfig, DemoModel
from tokenizers import Tokenizer

DEFAULT_OUT = Path(__file__).parents[1] / "tokred_export" / "data" / "demo"
NGRAM_ORDER = 5
TO_BEAT = ("xz -9e", "5-gram")  # the other reference, xz after the training text, is reported
REFERENCE_SECONDS = 600
BEGAN = time.perf_counter()
Tokens = dict[str, list[np.ndarray]]


def log(line: str) -> None:
    """One line of progress on stderr, at once."""
    print(f"[{time.perf_counter() - BEGAN:6.1f} s] {line}", file=sys.stderr, flush=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = train.TrainOptions()
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder to write")
    parser.add_argument("--evaluate", type=Path, metavar="FOLDER", help="only evaluate this model")
    parser.add_argument("--stdlib", type=Path, help="a standard library's folder")
    parser.add_argument("--max-files", type=int, help="use only that many files (for a trial)")
    parser.add_argument("--minutes", type=float, help="stop training after that long")
    parser.add_argument("--steps", type=int, help="stop after that many steps")
    parser.add_argument("--epochs", type=float, default=40, help="stop after that many epochs")
    parser.add_argument("--window", type=int, default=default.window, help="tokens a sequence")
    parser.add_argument("--batch-tokens", type=int, default=default.batch_tokens)
    parser.add_argument("--lr", type=float, default=default.lr, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=default.weight_decay)
    parser.add_argument("--dropout", type=float, default=default.dropout)
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--stride", type=int, default=evaluate.STRIDE, help="of evaluation")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="torch.compile; default: on cuda"
    )
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.compile is None:
        options.compile = options.device == "cuda"
    return options


def library(options: argparse.Namespace) -> tuple[Path, str]:
    """The library's folder and its Python version, as far as known."""
    if options.stdlib is None:
        return Path(sysconfig.get_paths()["stdlib"]), platform.python_version()
    named = re.search(r"\d+(\.\d+)+", options.stdlib.name)
    return options.stdlib, named.group() if named else "unknown"


def corpus_facts(texts: Corpus, tokens: Tokens, version: str) -> dict[str, object]:
    """What was used, for training.json: counts and no text."""
    splits = {name: getattr(texts, name) for name in ("train", "validation", "held_out")}
    held_out = "\n".join(hashlib.sha256(t.encode()).hexdigest() for t in texts.held_out)
    return {
        "library": f"Python {version} standard library",
        "files": {name: len(found) for name, found in splits.items()},
        "bytes": {name: corpus.utf8_bytes(found) for name, found in splits.items()},
        "tokens": {name: sum(map(len, ids)) for name, ids in tokens.items()},
        "files_in_test_folders": texts.test_files,
        "left_out": {"not_utf8": texts.not_utf8, "duplicates": texts.duplicates},
        "held_out_sha256": hashlib.sha256(held_out.encode()).hexdigest(),
    }


def start_references(
    pool: ThreadPoolExecutor, texts: Corpus, tokens: Tokens, vocab_size: int
) -> dict[str, Future[float]]:
    """Total bits of xz and of the 5-gram on the held-out files, in threads.

    Compression, sorting and array arithmetic run outside the interpreter's lock.
    """
    def xz() -> float:
        return 8 * corpus.xz_size(texts.held_out)

    def xz_after_training() -> float:
        with_it = pool.submit(corpus.xz_size, texts.train + texts.held_out)
        return 8 * (-corpus.xz_size(texts.train) + with_it.result(REFERENCE_SECONDS))

    def five_gram() -> float:
        model = ngram.fit(tokens["train"], NGRAM_ORDER, vocab_size, corpus.END_ID)
        return ngram.total_bits(model, tokens["held_out"])

    return {
        "5-gram": pool.submit(five_gram),
        "xz -9e": pool.submit(xz),
        "xz -9e after the training text": pool.submit(xz_after_training),
    }


def measure(
    model: DemoModel, tokens: Tokens, held_out_bytes: int, stride: int,
    references: dict[str, Future[float]],
) -> dict[str, object]:
    """Held-out bits per byte, and whether the model's are below those of xz and the 5-gram."""
    bits = {"model": evaluate.total_bits(model, tokens["held_out"], stride=stride)}
    log(f"model: {bits['model'] / held_out_bytes:.4f} bits per byte held out")
    for name, future in references.items():
        bits[name] = future.result(REFERENCE_SECONDS)
        log(f"{name}: {bits[name] / held_out_bytes:.4f} bits per byte held out")
    found = {name: round(total / held_out_bytes, 4) for name, total in bits.items()}
    return {
        "bits_per_byte": found,
        "beats_xz_and_5gram": all(found["model"] < found[name] for name in TO_BEAT),
        "evaluation": {
            "window": evaluate.WINDOW,
            "stride": stride,
            "note": "each file by itself, from an end token to its end token; every token counted "
            "once; later windows of a file see window - stride tokens of context at least",
        },
    }


def encode_splits(texts: Corpus, tokenizer: Tokenizer) -> Tokens:
    """Token ids of every file, by split."""
    names = ("train", "validation", "held_out")
    tokens = {name: corpus.encode(tokenizer, getattr(texts, name)) for name in names}
    log("tokens: " + ", ".join(f"{sum(map(len, ids))} {name}" for name, ids in tokens.items()))
    return tokens


def run_training(options: argparse.Namespace, config: DemoConfig) -> dict[str, object]:
    """Train, write the folder, measure it as written; returns training.json's content."""
    device = torch.device(options.device)
    folder, version = library(options)
    texts = corpus.read_corpus(folder, options.max_files)
    log(f"Python {version}: {len(texts.train)} training files, {len(texts.validation)} "
        f"validation, {len(texts.held_out)} held out, {texts.test_files} of them tests; "
        f"left out {texts.not_utf8} not UTF-8, {texts.duplicates} duplicates")
    tokenizer = corpus.train_tokenizer(texts.train, config.vocab_size)
    log(f"vocabulary of {tokenizer.get_vocab_size()} tokens")
    tokens = encode_splits(texts, tokenizer)
    checkpoint.write_texts(options.out, config, tokenizer)
    validation_bytes = corpus.utf8_bytes(texts.validation)

    def validate(model: DemoModel) -> float:
        return evaluate.total_bits(model, tokens["validation"]) / validation_bytes

    with ThreadPoolExecutor(4) as pool:
        references = start_references(pool, texts, tokens, config.vocab_size)
        names = {field.name for field in dataclasses.fields(train.TrainOptions)}
        chosen = {name: value for name, value in vars(options).items() if name in names}
        trainer = train.Trainer(config, tokens["train"], train.TrainOptions(**chosen), device)
        result = train.train(
            trainer, validate, lambda model: checkpoint.write_weights(options.out, model), log
        )
        facts: dict[str, object] = {
            "corpus": corpus_facts(texts, tokens, version),
            "parameters": train.parameter_count(config),
            "weight_bytes": (options.out / "model.safetensors").stat().st_size,
            "training": {
                "command": command(options),
                "options": chosen,
                **dataclasses.asdict(result),
                "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
                "python": platform.python_version(),
                "torch": torch.__version__,
            },
        }
        # Written first without the measurements: nothing that follows can lose the run.
        checkpoint.write_json(options.out / "training.json", facts)
        model = checkpoint.read_model(options.out, device)
        held_out_bytes = corpus.utf8_bytes(texts.held_out)
        facts = {**measure(model, tokens, held_out_bytes, options.stride, references), **facts}
    facts["seconds"] = round(time.perf_counter() - BEGAN, 1)
    checkpoint.write_json(options.out / "training.json", facts)
    return facts


def command(options: argparse.Namespace) -> str:
    """The command that repeats the training, without this machine's folders."""
    words = ["python3 tools/train_demo.py"]
    for name in ("minutes", "steps", "epochs", "window", "batch_tokens", "lr", "weight_decay",
                 "dropout", "seed", "max_files"):
        if (value := getattr(options, name)) is not None:
            words.append(f"--{name.replace('_', '-')} {value:g}")
    return " ".join([*words, "--stdlib FOLDER"] if options.stdlib else words)


def run_evaluation(options: argparse.Namespace) -> dict[str, object]:
    """Measure an existing folder on the library's held-out files."""
    folder, version = library(options)
    texts = corpus.read_corpus(folder, options.max_files)
    tokenizer = Tokenizer.from_file(str(options.evaluate / "tokenizer.json"))
    tokens = encode_splits(texts, tokenizer)
    model = checkpoint.read_model(options.evaluate, torch.device(options.device))
    with ThreadPoolExecutor(4) as pool:
        references = start_references(pool, texts, tokens, model.config.vocab_size)
        held_out_bytes = corpus.utf8_bytes(texts.held_out)
        facts = measure(model, tokens, held_out_bytes, options.stride, references)
    return {**facts, "corpus": corpus_facts(texts, tokens, version)}


def main(arguments: list[str] | None = None, config: DemoConfig | None = None) -> int:
    """Returns 0 if the model beats xz and the 5-gram on the held-out files, else 1."""
    options = parse(arguments)
    if options.evaluate is not None:
        facts = run_evaluation(options)
    else:
        facts = run_training(options, config or DemoConfig())
    print(json.dumps(facts, indent=2))
    if not facts["beats_xz_and_5gram"]:
        log("the model does not beat xz and the 5-gram: train longer")
    return 0 if facts["beats_xz_and_5gram"] else 1


if __name__ == "__main__":
    sys.exit(main())
