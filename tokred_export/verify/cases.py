"""The prompts a prefill graph is verified on: full, padded to every kind of length, and text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tokred_export.errors import InvalidRequest
from tokred_export.specs import ReductionSchedule, Site

SHORT = 7  # shorter than most models' convolution window and chunk taken together


class PromptCase(NamedTuple):
    """One batch of prompts: input_ids int32 [B, L], right-aligned, and prompt_len int32 [B]."""

    description: str
    input_ids: np.ndarray
    prompt_len: np.ndarray


def prompt_cases(
    schedule: ReductionSchedule,
    vocab_size: int,
    batch: int = 1,
    thorough: bool = False,
    texts: Sequence[Sequence[int]] = (),
    seed: int = 0,
) -> list[PromptCase]:
    """Prompts for one prefill graph.

    Args:
        schedule: of the graph; it names the length and where padding runs out.
        vocab_size: V; ids are drawn evenly from all of it, those of padding too.
        batch: rows of every case.
        thorough: every length of :func:`padded_lengths`; else a full prompt, one whose padding
            runs out inside a site, and a short one.
        texts: token ids of prompts to add; of a longer one the last L are taken.
        seed: the same seed gives the same prompts.

    Raises:
        InvalidRequest: a text is empty or holds an id beyond the vocabulary.
    """
    random = np.random.default_rng(seed)
    length = schedule.length
    padded = padded_lengths(schedule) if thorough else _few_lengths(schedule)
    cases = [_case("random ids", [length] * batch, [], length, vocab_size, random)]
    for group in _groups([n for n in padded if n < length], batch):
        cases.append(_case("random ids", group, [], length, vocab_size, random))
    for number, text in enumerate(texts):
        _check_text(number, text, vocab_size)
    cut = [list(text)[-length:] for text in texts]
    for group in _groups(cut, batch):
        lengths = [len(text) for text in group]
        cases.append(_case("text", lengths, group, length, vocab_size, random))
    return cases


def padded_lengths(schedule: ReductionSchedule) -> tuple[int, ...]:
    """Prompt lengths at which padding does something new, ascending, 0 to L.

    No token, one, a few; around L_out, where reduction starts to touch prompt tokens at all; for
    every site one at which it takes the last padding and some prompt tokens; and almost full.
    """
    length, out = schedule.length, schedule.length_out
    wanted = {0, 1, SHORT, 100, out - 1, out, out + 1, length - 1, length}
    wanted |= {inside for site in schedule.sites if (inside := _inside(site)) is not None}
    return tuple(sorted(n for n in wanted if 0 <= n <= length))


def _inside(site: Site) -> int | None:
    """A prompt length whose padding runs out inside a site: 0 < pads entering < r."""
    # Earlier sites remove as much padding as tokens, so tokens_in - prompt_len pads enter.
    middle = (site.tokens_in + site.tokens_out) // 2
    return middle if site.tokens_out < middle < site.tokens_in else None


def _few_lengths(schedule: ReductionSchedule) -> list[int]:
    inside = [n for n in map(_inside, schedule.sites) if n is not None]
    middle = inside[len(inside) // 2] if inside else schedule.length // 2
    return sorted({middle, min(SHORT, schedule.length)})


def _groups(items: list, size: int) -> Iterator[list]:
    """Pieces of ``size`` items; the last one is filled up from its start."""
    for start in range(0, len(items), size):
        group = items[start : start + size]
        yield [group[i % len(group)] for i in range(size)]


def _case(
    kind: str,
    lengths: list[int],
    texts: list[list[int]],
    length: int,
    vocab_size: int,
    random: np.random.Generator,
) -> PromptCase:
    ids = random.integers(0, vocab_size, (len(lengths), length), dtype=np.int32)
    for row, text in zip(ids, texts, strict=False):
        row[length - len(text) :] = text
    tokens = ", ".join(str(n) for n in lengths)
    description = f"{kind}, {tokens} of {length} tokens"
    return PromptCase(description, ids, np.asarray(lengths, dtype=np.int32))


def _check_text(number: int, text: Sequence[int], vocab_size: int) -> None:
    if not len(text):
        raise InvalidRequest(f"text {number} has no tokens, expected at least one: leave it out")
    wrong = [token for token in text if not 0 <= token < vocab_size]
    if wrong:
        raise InvalidRequest(
            f"text {number} holds the token id {wrong[0]}, expected 0 to {vocab_size - 1}: use the "
            "tokenizer of this model"
        )
