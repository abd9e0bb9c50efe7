"""Rows for combines that pack, and what becomes of their pieces, said without the kernels.

The format: csrc/ep/normal.h, PackedPiece.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

STEP = 256  # channels with an exponent of their own as base
PART = 4 * STEP
PIECE = 4 * PART
FARTHEST = 14  # below the base
MOST_ESCAPES = 11  # of a part
LEAST_SMS = 32


def packed_pieces(rows: torch.Tensor) -> torch.Tensor:
    """int32 [N]: bit i is set where piece i of a bf16 row [N, H] packs. H: whole parts."""
    exponents = (rows.contiguous().view(torch.int16).int() >> 7) & 0xFF
    steps = exponents.view(rows.shape[0], rows.shape[1] // PART, PART // STEP, STEP)
    bases = steps.amax(dim=3, keepdim=True).clamp(min=FARTHEST)
    escapes = (bases - steps > FARTHEST).sum(dim=(2, 3))
    masks = torch.zeros(rows.shape[0], dtype=torch.int32)
    for part, fits in enumerate((escapes <= MOST_ESCAPES).unbind(dim=1)):
        first = part % (PIECE // PART) == 0
        bit = 1 << part // (PIECE // PART)
        masks = torch.where(fits, masks | bit if first else masks, masks & ~bit)
    return masks


def varied_rows(rng: torch.Generator, count: int, hidden: int) -> torch.Tensor:
    """bf16 [count, hidden], finite; rows in turn: as most are; all zero; zeros of both signs among
    others; exponents of every size; as many escapes as a part may have, or one more; a channel far
    above all others; numbers too small to be normal."""
    rows = torch.randn((count, hidden), generator=rng)
    for row, values in enumerate(rows):
        kind = row % 8
        if kind == 1:
            values[:] = 0.0
        elif kind == 2:
            values[torch.rand(hidden, generator=rng) < 0.3] *= 0.0
        elif kind == 3:
            values *= torch.exp2(torch.randint(-110, 100, (hidden,), generator=rng).float())
        elif kind in (4, 5):
            values[:] = values.sign() * (1.0 + values.abs() % 1.0)  # one exponent, or two
            part = int(torch.randint(hidden // PART, (), generator=rng))
            escapes = MOST_ESCAPES + kind - 4
            where = part * PART + torch.randperm(PART, generator=rng)[:escapes]
            values[where] *= torch.exp2(torch.randint(-100, -20, (escapes,), generator=rng).float())
        elif kind == 6:
            values[int(torch.randint(hidden, (), generator=rng))] = 3.0e5
        elif kind == 7:
            values *= 2.0**-130
    return rows.bfloat16()


def rows_home(
    rank: int, rows: Sequence[torch.Tensor], sources: Sequence[Sequence[tuple[int, int]]]
) -> torch.Tensor:
    """What other ranks send to `rank`, in the order of its inbox."""
    found = [
        rows[other][[i for i, (sender, _) in enumerate(source) if sender == rank]]
        for other, source in enumerate(sources)
        if other != rank
    ]
    return torch.cat(found) if found else rows[rank][:0]
