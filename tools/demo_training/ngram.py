"""An interpolated, modified Kneser-Ney n-gram model over tokens, counted with sorted arrays.

Source: Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling"
(1998), section 3. The highest order uses counts, the others continuation counts (in how many
distinct ways an n-gram was preceded), and below unigrams lies the uniform distribution, so every
token has a probability above zero and every context's distribution sums to one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Order(NamedTuple):
    """One order n: sorted n-gram keys with counts, and its sorted contexts."""

    keys: np.ndarray  # int64 [k]: the n tokens as digits in base V, the last one lowest
    counts: np.ndarray  # int64 [k]
    discounts: np.ndarray  # float64 [4]: by min(count, 3)
    contexts: np.ndarray  # int64 [c]: the first n - 1 tokens
    totals: np.ndarray  # int64 [c]: sum of counts after the context
    backoff: np.ndarray  # float64 [c]: the share left for the order below


class NGram(NamedTuple):
    """Orders 1 to n of one model over tokens 0 to V - 1."""

    vocab_size: int
    end: int
    orders: list[Order]


def ngram_keys(files: list[np.ndarray], order: int, vocab_size: int, end: int) -> np.ndarray:
    """One n-gram key for each token of each file and for the file's end, int64 [total + files].

    A file starts with ``order - 1`` end tokens, so that its first token has a context too.

    Raises:
        ValueError: a key would not fit in 63 bits.
    """
    if vocab_size**order >= 2**63:
        raise ValueError(f"{order}-grams over {vocab_size} tokens do not fit in 63 bits")
    lead = np.full(order - 1, end, dtype=np.int64)
    stream = np.concatenate([part for ids in files for part in (lead, ids, [end])])
    is_target = np.concatenate([np.arange(len(ids) + order) >= order - 1 for ids in files])
    keys = np.zeros(len(stream) - order + 1, dtype=np.int64)
    for offset in range(order):
        keys = keys * vocab_size + stream[offset : offset + len(keys)].astype(np.int64)
    return keys[is_target[order - 1 :]]


def chen_goodman_discounts(counts: np.ndarray) -> np.ndarray:
    """Discounts [0, D1, D2, D3+] estimated from how many n-grams occur 1, 2, 3 and 4 times.

    A text too small for the estimate (one of the four numbers is zero, or a discount is outside
    0 to its count) gets 0.75 for all three, the usual constant of absolute discounting.
    """
    n1, n2, n3, n4 = (int((counts == times).sum()) for times in (1, 2, 3, 4))
    if min(n1, n2, n3, n4) > 0:
        y = n1 / (n1 + 2 * n2)
        found = np.array([0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        if all(0 < found[times] < times for times in (1, 2, 3)):
            return found
    return np.array([0, 0.75, 0.75, 0.75])


def make_order(keys: np.ndarray, counts: np.ndarray, vocab_size: int) -> Order:
    """Discounts, and totals and left-over share of every context."""
    discounts = chen_goodman_discounts(counts)
    contexts, starts = np.unique(keys // vocab_size, return_index=True)
    totals = np.add.reduceat(counts, starts)
    taken = np.add.reduceat(discounts[np.minimum(counts, 3)], starts)
    return Order(keys, counts, discounts, contexts, totals, taken / totals)


def fit(files: list[np.ndarray], order: int, vocab_size: int, end: int) -> NGram:
    """Count the files' n-grams, the end of each file included.

    Args:
        files: token ids of each file, int [n].
        order: the longest n-gram; ``vocab_size ** order`` must stay below 2**63.
        vocab_size: V.
        end: the token that starts and ends a file.
    """
    keys, counts = np.unique(ngram_keys(files, order, vocab_size, end), return_counts=True)
    orders = [make_order(keys, counts, vocab_size)]
    for n in range(order - 1, 0, -1):
        keys, counts = np.unique(keys % vocab_size**n, return_counts=True)
        orders.insert(0, make_order(keys, counts, vocab_size))
    return NGram(vocab_size, end, orders)


def lookup(table: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of each wanted value in a sorted table, and whether it is there."""
    index = np.minimum(np.searchsorted(table, wanted), len(table) - 1)
    return index, table[index] == wanted


def probabilities(model: NGram, keys: np.ndarray) -> np.ndarray:
    """Probability of each n-gram's last token after the others, float64 [n].

    Args:
        model: the fitted model.
        keys: n-grams of the model's highest order, int64 [n].
    """
    p = np.full(len(keys), 1 / model.vocab_size)
    for n, order in enumerate(model.orders, start=1):
        suffix = keys % model.vocab_size**n
        index, seen = lookup(order.keys, suffix)
        counts = np.where(seen, order.counts[index], 0)
        kept = counts - order.discounts[np.minimum(counts, 3)]
        context, known = lookup(order.contexts, suffix // model.vocab_size)
        p = np.where(known, kept / order.totals[context] + order.backoff[context] * p, p)
    return p


def total_bits(model: NGram, files: list[np.ndarray]) -> float:
    """Bits to code every token of every file and every file's end."""
    keys = ngram_keys(files, len(model.orders), model.vocab_size, model.end)
    return float(-np.log2(probabilities(model, keys)).sum())
