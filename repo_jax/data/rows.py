"""Pairs packed into rows: a pair stays in one row, its prompt is stored once.

Axis letters: R rows, T token slots in a row, S scored tokens in a row, B pairs; 2 is (chosen, rejected).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from repo_jax.data.schema import PairTokens


class RowBatch(NamedTuple):
    """R packed rows with room for B pairs. A padded batch is the case of one pair per row."""

    tokens_RT: np.ndarray
    positions_RT: np.ndarray
    segments_RT: np.ndarray  # numbered within the row; 0 is padding
    prompts_RT: np.ndarray  # the segment of this token's prompt, which it sees besides its own
    targets_RS: np.ndarray  # the tokens that are scored
    sources_RS: np.ndarray  # the slot that predicts each of them
    answers_RS: np.ndarray  # 2 * pair + side, side 0 chosen, 1 rejected; 2 * B where unused
    filled_B: np.ndarray  # True for the pairs that are in these rows
    weights_RS: np.ndarray | None = None  # what each scored token counts for in its answer's sum; None: 1


class RowShape(NamedTuple):
    """The one shape of a run's row batches."""

    R: int
    T: int
    S: int


def round_up(n: float, multiple: int) -> int:
    return math.ceil(n / multiple) * multiple


def suggest_row_length(slots: np.ndarray) -> int:
    """Holds the longest pair, in a multiple of 128 slots (the width of a TPU register)."""
    return round_up(slots.max(), 128)


def suggest_scored_length(slots: np.ndarray, scored: np.ndarray, row_length: int) -> int:
    """Room for the scored share of a full row, with 15 % to spare so that S seldom decides how pairs are packed."""
    share = scored.sum() / slots.sum()
    return min(row_length, round_up(max(scored.max(), 1.15 * share * row_length), 64))


def pack(slots: Sequence[int], scored: Sequence[int], T: int, S: int) -> list[list[int]]:
    """Which items share a row: best fit, longest first. Every item lands whole in exactly one row."""
    rows, free = [], []  # free: (slots, scored tokens) still open in each row
    for i in sorted(range(len(slots)), key=lambda i: -slots[i]):
        fits = [row for row, (t, s) in enumerate(free) if slots[i] <= t and scored[i] <= s]
        if fits:
            row = min(fits, key=lambda row: free[row][0])
        else:
            row = len(rows)
            rows.append([])
            free.append((T, S))
        rows[row].append(i)
        free[row] = (free[row][0] - slots[i], free[row][1] - scored[i])
    return rows


def row_batches(
    pairs: Sequence[PairTokens], shape: RowShape, *, B: int | None = None, wanted_B2: np.ndarray | None = None
) -> list[RowBatch]:
    """The pairs of one global batch as row batches of one shape; pair i keeps its number i in all of them.

    wanted_B2 leaves out answers (and, where both are left out, pairs), as an unpaired row leaves out the answer it has not; B
    makes room for more pairs than there are, so that a short batch keeps its shapes. Raises ValueError for a pair that no row
    can hold.
    """
    B = len(pairs) if B is None else B
    present_B2 = np.array([[len(ids) > 0 for ids in pair.branches] for pair in pairs], bool).reshape(-1, 2)
    wanted_B2 = present_B2 if wanted_B2 is None else wanted_B2[: len(pairs)] & present_B2
    chosen = [i for i in range(len(pairs)) if wanted_B2[i].any()]
    slots, scored = [], []
    for i in chosen:
        sides = np.flatnonzero(wanted_B2[i])
        slots.append(len(pairs[i].prompt) + sum(len(pairs[i].branches[side]) for side in sides))
        scored.append(sum(int(pairs[i].masks[side].sum()) for side in sides))
        if slots[-1] > shape.T or scored[-1] > shape.S:
            raise too_long(pairs[i], shape.T, shape.S)
    rows = [[chosen[k] for k in row] for row in pack(slots, scored, shape.T, shape.S)]
    return [_fill(pairs, rows[start : start + shape.R], shape, B, wanted_B2) for start in range(0, len(rows), shape.R)]


def too_long(pair: PairTokens, T: int, S: int) -> ValueError:
    """What to say of a pair that fits no row."""
    p, c, r = pair.lengths
    if pair.slots > T:
        return ValueError(
            f"pair '{pair.id}' ({pair.where}) takes {pair.slots} slots (prompt {p} + chosen {c} + rejected {r}) but row_length is {T}; "
            f"raise row_length to {round_up(pair.slots, 128)}, or lower max_length below {p + max(c, r)} to drop or cut such pairs"
        )
    return ValueError(
        f"pair '{pair.id}' ({pair.where}) has {pair.scored} scored tokens but scored_length is {S}; raise scored_length to {round_up(pair.scored, 64)}"
    )


def _fill(pairs, rows: list[list[int]], shape: RowShape, B: int, wanted_B2: np.ndarray) -> RowBatch:
    R, T, S = shape
    batch = RowBatch(
        *(np.zeros((R, T), np.int32) for _ in range(4)),
        *(np.zeros((R, S), np.int32) for _ in range(2)),
        answers_RS=np.full((R, S), 2 * B, np.int32),
        filled_B=np.zeros(B, bool),
        weights_RS=np.zeros((R, S), np.float32) if any(pair.weights is not None for pair in pairs) else None,
    )
    for row, numbers in enumerate(rows):
        slot, scored, segment = 0, 0, 0
        for number in numbers:
            pair = pairs[number]
            batch.filled_B[number] = True
            prompt_segment, prompt_end = segment + 1, slot + len(pair.prompt)

            def put(ids, first_position, segment, prompt_segment=prompt_segment, row=row):
                nonlocal slot
                here = slice(slot, slot + len(ids))
                batch.tokens_RT[row, here] = ids
                batch.positions_RT[row, here] = first_position + np.arange(len(ids))
                batch.segments_RT[row, here] = segment
                batch.prompts_RT[row, here] = prompt_segment
                slot += len(ids)

            put(pair.prompt, 0, prompt_segment)
            segment = prompt_segment
            for side in np.flatnonzero(wanted_B2[number]):
                ids, mask = pair.branches[side], pair.masks[side]
                segment += 1
                # Each token is predicted by the one before it; a branch's first token by the prompt's last.
                sources = np.concatenate([[prompt_end - 1], slot + np.arange(len(ids) - 1)])
                put(ids, len(pair.prompt), segment)
                targets = ids[mask]
                here = slice(scored, scored + len(targets))
                batch.targets_RS[row, here] = targets
                batch.sources_RS[row, here] = sources[mask]
                batch.answers_RS[row, here] = 2 * number + side
                if batch.weights_RS is not None:
                    batch.weights_RS[row, here] = 1 if pair.weights is None else pair.weights[side]
                scored += len(targets)
    return batch
