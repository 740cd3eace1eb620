"""The text: Python's own standard library, split by file, and its byte-level BPE vocabulary."""

from __future__ import annotations

import hashlib
import lzma
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"  # separates files, starts each one; id 0
END_ID = 0
HELD_OUT_SHARE = 0.05
VALIDATION_SHARE = 0.02
# Not the library's own code: installed packages, build output with the machine's own paths, and
# pydoc_data, which is the language manual dumped into string literals: one generated file that
# would be about as long as all other held-out files together.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "pydoc_data"}
SKIPPED_PREFIXES = ("_sysconfigdata", "sitecustomize", "usercustomize")
# A word, up to two digits or a run of signs, each with the space before it; a line's end with the
# blank lines and the indentation after it; other white space.
PIECES = r" ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s*\n[^\S\n]*|[^\S\n]+(?!\S)|\s+"


class Corpus(NamedTuple):
    """Texts by split, each sorted by path, and how many files were not used."""

    train: list[str]
    validation: list[str]
    held_out: list[str]
    not_utf8: int
    duplicates: int
    test_files: int  # files used that lie in a folder named test or tests


def split_of(path: str) -> str:
    """Which split a file belongs to, from a hash of its path relative to the library.

    The same file is in the same split in every Python version and on every machine.

    Args:
        path: relative path with forward slashes.
    """
    digest = hashlib.sha256(path.encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    if share < HELD_OUT_SHARE:
        return "held_out"
    return "validation" if share < HELD_OUT_SHARE + VALIDATION_SHARE else "train"


def library_files(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Relative path and content of every Python file of the library, sorted by path."""
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).parts
        skipped = SKIPPED_FOLDERS.intersection(parts) or parts[-1].startswith(SKIPPED_PREFIXES)
        if not skipped and path.is_file():
            yield "/".join(parts), path.read_bytes()


def read_corpus(folder: Path, max_files: int | None = None) -> Corpus:
    """Read the library and split it by file.

    Files that are not UTF-8 (a few of the library's own tests) are left out. So are empty files
    and exact copies of an earlier file, which could put one text on both sides of the split.

    Args:
        folder: the standard library's folder.
        max_files: stop after that many files; None reads all of them.

    Raises:
        SystemExit: a split is empty.
    """
    splits: dict[str, list[str]] = {"train": [], "validation": [], "held_out": []}
    seen: set[bytes] = set()
    not_utf8 = duplicates = test_files = 0
    for path, content in library_files(folder):
        if max_files is not None and len(seen) == max_files:
            break
        digest = hashlib.sha256(content).digest()
        if not content.strip() or digest in seen:
            duplicates += bool(content.strip())
            continue
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            not_utf8 += 1
            continue
        seen.add(digest)
        test_files += bool({"test", "tests"}.intersection(path.split("/")[:-1]))
        splits[split_of(path)].append(text)
    for name, texts in splits.items():
        if not texts:
            raise SystemExit(f"no {name} files among {len(seen)} files found; expected a Python "
                             "standard library: give its folder with --stdlib")
    return Corpus(**splits, not_utf8=not_utf8, duplicates=duplicates, test_files=test_files)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: every text can be encoded, and decoding gives it back unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=32,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str], group: int = 64) -> list[np.ndarray]:
    """Token ids of each text, int32 [n], without separators.

    Groups keep memory low: an Encoding holds far more than its ids.
    """
    ids: list[np.ndarray] = []
    for start in range(0, len(texts), group):
        batch = tokenizer.encode_batch_fast(texts[start : start + group])
        ids += [np.array(encoding.ids, dtype=np.int32) for encoding in batch]
    return ids


def utf8_bytes(texts: Iterable[str]) -> int:
    """Total length in UTF-8 bytes."""
    return sum(len(text.encode()) for text in texts)


def xz_size(texts: Iterable[str]) -> int:
    """Bytes of the concatenated texts after ``xz -9e`` (64 MiB dictionary, container included)."""
    return len(lzma.compress("".join(texts).encode(), preset=9 | lzma.PRESET_EXTREME))
