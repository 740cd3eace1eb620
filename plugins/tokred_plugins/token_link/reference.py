"""Which links act, by explicit ranking."""

from __future__ import annotations

import torch
from torch import Tensor


def token_link_reference(
    similarity: Tensor,
    target: Tensor,
    lower: Tensor,
    upper: Tensor,
    pads: Tensor,
    removed: int,
    prune_permille: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`tokred_plugins.token_link.op.token_link`."""
    out: tuple[list, list, list, list] = ([], [], [], [])
    for row, padding in enumerate(pads.tolist()):
        places = lower[row].tolist()
        padded = [i for i, a in enumerate(places) if a < padding][:removed]
        others = [i for i, a in enumerate(places) if a >= padding]
        others.sort(key=lambda i: (-float(similarity[row, i]), places[i]))
        links = others[: removed - len(padded)]
        prune = set(links[: len(links) * prune_permille // 1000])
        chosen = sorted(padded + links)
        src = [places[i] for i in chosen]
        out[0].append(src)
        out[1].append([-1 if i in padded else int(target[row, i]) for i in chosen])
        out[2].append([i not in padded and i not in prune for i in chosen])
        out[3].append(sorted((set(places) | set(upper[row].tolist())) - set(src)))
    src, dst, merge, keep = (torch.tensor(rows) for rows in out)
    return src.int(), dst.int(), merge, keep.int()
