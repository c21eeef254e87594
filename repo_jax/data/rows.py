"""Pairs packed into rows: a pair stays in one row, its prompt is stored once.

Axis letters: R rows, T token slots in a row, S scored tokens in a row, Y entries of a view, B pairs; 2 is (chosen, rejected).

A kernel that knows only causal masks and segment ids sees a row as two views: the prompts with the chosen answers, and the prompts with
the rejected ones. What stands in a view has the segment of its prompt (`prompts_RT`), which makes causal attention the rule of visibility.
"""

import math
from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from repo_jax.data.schema import PairTokens

# Room for scored tokens and views beyond their share of a full row, so that slots decide how pairs are packed. Less room for scored tokens
# would save the head some work but take more rows; room in a view costs only attention.
SPARE_SCORED, SPARE_VIEW = 1.08, 1.15
BUDGET = 8192  # slots that keep the matrix units of an accelerator busy
SHAPES = 5  # of a run at most; each that is used is compiled
GAIN = 0.02  # the share of the slots that one more shape must save
NEAR = 0.01  # row shapes whose cost differs by less count as equal
ATTENTION = 32_768  # the row length at which attention costs as much as the rest of a decoder of billions
PARTS = (1.0, 0.5, 0.25)  # of an update's pairs: second passes have only some answers left


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
    views_R2Y: np.ndarray | None = None  # the slots of one side's answers and their prompts, in order; T where unused
    known: "Known | None" = None  # the same in all row batches of a global batch
    starts_B3: np.ndarray | None = (
        None  # the slots, rows end to end, where prompt, chosen and rejected begin; -1: not here
    )


class Known(NamedTuple):
    """What is known of all B pairs of a global batch before any is scored; 0 where there is none."""

    lengths_B2: np.ndarray  # float32: how many tokens are scored
    reference_B2: np.ndarray | None = None  # float32: log-probs under the reference model
    columns: Mapping[str, np.ndarray] = {}  # float32, [B], or [B, 2] with one number for each answer


class RowShape(NamedTuple):
    """A shape of row batches; a run has few."""

    R: int  # over all devices
    T: int
    S: int
    Y: int = 0  # 0: there are no views


class Sizes(NamedTuple):
    """What pairs take of a row; also the length table of a data set."""

    slots_B: np.ndarray
    scored_B: np.ndarray
    views_B2: np.ndarray  # prompt and answer; 0 for an answer that is not there

    def of(self, chosen) -> "Sizes":
        return Sizes(*(sizes[chosen] for sizes in self))

    def fit(self, shape: RowShape) -> bool:
        slots, scored, view = (sizes.max(initial=0) for sizes in self)
        return slots <= shape.T and scored <= shape.S and (not shape.Y or view <= shape.Y)


def sizes_of(stores: Sequence) -> Sizes:
    """The length table of all pairs of these TokenStores, end to end."""
    return Sizes(
        np.concatenate([store.slots for store in stores]),
        np.concatenate([store.scored.sum(axis=1) for store in stores]),
        np.concatenate(
            [(store.lengths[:, :1] + store.lengths[:, 1:]) * (store.lengths[:, 1:] > 0) for store in stores]
        ),
    )


def round_up(n: float, multiple: int) -> int:
    return math.ceil(n / multiple) * multiple


# How pairs share rows


def pack(
    slots: Sequence[int],
    scored: Sequence[int],
    T: int,
    S: int,
    *,
    views: Sequence[Sequence[int]] | None = None,
    Y: int = 0,
) -> list[list[int]]:
    """Which items share a row: best fit, longest first. Every item lands whole in exactly one row."""
    items, room = _capacities(slots, scored, S, views, Y)
    rows, left = [], []  # left: scored tokens and entries of the views still open in each row
    free = []  # (slots still open, row), least first
    for i in sorted(range(len(slots)), key=lambda i: -slots[i]):
        at = bisect_left(free, (slots[i],))
        while at < len(free) and not _fits(items[i], left[free[at][1]]):
            at += 1
        if at == len(free):
            free.append((T, len(rows)))
            rows.append([])
            left.append(room)
        _put(i, slots, items, rows, left, free, at)
    return rows


def spread(
    slots: Sequence[int],
    scored: Sequence[int],
    T: int,
    S: int,
    *,
    rows: int,
    views: Sequence[Sequence[int]] | None = None,
    Y: int = 0,
) -> list[list[int]] | None:
    """The items over this many rows with the work about even: longest first, to the emptiest row. None where one finds no room."""
    items, room = _capacities(slots, scored, S, views, Y)
    rows, left, free = [[] for _ in range(rows)], [room] * rows, [(T, row) for row in range(rows)]
    for i in sorted(range(len(slots)), key=lambda i: -slots[i]):
        at = len(free) - 1
        while at >= 0 and free[at][0] >= slots[i] and not _fits(items[i], left[free[at][1]]):
            at -= 1
        if at < 0 or free[at][0] < slots[i]:
            return None
        _put(i, slots, items, rows, left, free, at)
    return rows


def _capacities(slots, scored, S, views, Y) -> tuple[list[tuple], tuple]:
    """What each item takes besides slots, and how much of that a row has."""
    if not Y:
        return [(n, 0, 0) for n in scored], (S, 0, 0)
    return [(n, *view) for n, view in zip(scored, views, strict=True)], (S, Y, Y)


def _fits(item: tuple, left: tuple) -> bool:
    return item[0] <= left[0] and item[1] <= left[1] and item[2] <= left[2]


def _put(i: int, slots, items, rows, left, free, at: int) -> None:
    open_slots, row = free.pop(at)
    rows[row].append(i)
    left[row] = tuple(have - takes for have, takes in zip(left[row], items[i], strict=True))
    insort(free, (open_slots - slots[i], row))


def packed(sizes: Sizes, shapes: Sequence[RowShape]) -> tuple[RowShape, list[list[int]]]:
    """The shape in which the pairs take the fewest slots, and which of them share a row: as many rows as whole row batches have.

    The first of equals is taken; shapes that do not hold every pair are not.
    """
    slots, scored, views = (part.tolist() for part in sizes)
    found = None
    for shape in shapes:
        if sizes.fit(shape):
            _, T, S, Y = shape
            rows = pack(slots, scored, T, S, views=views, Y=Y)
            n = math.ceil(len(rows) / shape.R)
            if found is None or n * shape.R * T < found[0]:
                found = n * shape.R * T, n, shape, rows
    _, n, shape, rows = found
    R, T, S, Y = shape
    if R > 1:
        # Every row of a row batch is computed whole, so that even work costs nothing and spares the devices waiting.
        rows = spread(slots, scored, T, S, rows=n * R, views=views, Y=Y) or rows + [[]] * (n * R - len(rows))
        rows = _laid_out(rows, [sum(slots[i] for i in row) for row in rows], R)
    return shape, rows


def _laid_out(rows: list[list[int]], work: list[int], R: int) -> list[list[int]]:
    """The rows in row batches of about even rows, heavy beside light: each device has a few consecutive ones."""
    order = sorted(range(len(rows)), key=lambda row: -work[row])
    zigzag = [row // 2 if row % 2 == 0 else R - 1 - row // 2 for row in range(R)]
    return [rows[order[start + row]] for start in range(0, len(rows), R) for row in zigzag]


def row_batches(
    pairs: Sequence[PairTokens],
    shapes: RowShape | Sequence[RowShape],
    *,
    B: int | None = None,
    wanted_B2: np.ndarray | None = None,
) -> list[RowBatch]:
    """The pairs of one global batch as row batches of the one shape in which they take the fewest slots; pair i keeps its number i in all
    of them.

    wanted_B2 leaves out answers (and, where both are left out, pairs), as an unpaired row leaves out the answer it has not; B
    makes room for more pairs than there are, so that a short batch keeps its shapes. Raises ValueError for a pair that no row
    can hold.
    """
    shapes = [shapes] if isinstance(shapes, RowShape) else shapes
    B = len(pairs) if B is None else B
    present_B2 = np.array([[len(ids) > 0 for ids in pair.branches] for pair in pairs], bool).reshape(-1, 2)
    wanted_B2 = present_B2 if wanted_B2 is None else wanted_B2[: len(pairs)] & present_B2
    chosen = np.flatnonzero(wanted_B2.any(axis=1))
    if not len(chosen):
        return []
    sizes = _sizes([pairs[i] for i in chosen], wanted_B2[chosen])
    if not any(sizes.fit(shape) for shape in shapes):
        largest = max(shapes, key=lambda shape: shape.T)
        refused = next(i for k, i in enumerate(chosen) if not sizes.of([k]).fit(largest))
        raise too_long(pairs[refused], largest.T, largest.S, largest.Y)
    shape, rows = packed(sizes, shapes)
    rows = [[int(chosen[k]) for k in row] for row in rows]
    known = known_of(pairs, B)
    return [
        _fill(pairs, rows[start : start + shape.R], shape, B, wanted_B2)._replace(known=known)
        for start in range(0, len(rows), shape.R)
    ]


def known_of(pairs: Sequence[PairTokens], B: int) -> Known:
    """Of pairs with room for B. All of them have a reference, or none does."""
    known = Known(
        np.zeros((B, 2), np.float32),
        np.zeros((B, 2), np.float32) if any(pair.reference_2 is not None for pair in pairs) else None,
        {
            name: np.zeros((B, *np.shape(value)), np.float32)
            for name, value in sorted({k: v for pair in pairs for k, v in pair.columns.items()}.items())
        },
    )
    for i, pair in enumerate(pairs):
        known.lengths_B2[i] = [np.count_nonzero(mask) for mask in pair.masks]
        if known.reference_B2 is not None:
            known.reference_B2[i] = 0 if pair.reference_2 is None else pair.reference_2
        for name, value in pair.columns.items():
            known.columns[name][i] = value
    return known


def _sizes(pairs: Sequence[PairTokens], wanted_B2: np.ndarray) -> Sizes:
    """Of the wanted answers and their prompts."""
    lengths_B3 = np.array([pair.lengths for pair in pairs])
    scored_B2 = np.array([[np.count_nonzero(mask) for mask in pair.masks] for pair in pairs])
    return Sizes(
        lengths_B3[:, 0] + (lengths_B3[:, 1:] * wanted_B2).sum(axis=1),
        (scored_B2 * wanted_B2).sum(axis=1),
        (lengths_B3[:, :1] + lengths_B3[:, 1:]) * wanted_B2,
    )


def too_long(pair: PairTokens, T: int, S: int, Y: int = 0) -> ValueError:
    """What to say of a pair that fits no row."""
    p, c, r = pair.lengths
    if pair.slots > T:
        return ValueError(
            f"pair '{pair.id}' ({pair.where}) takes {pair.slots} slots (prompt {p} + chosen {c} + rejected {r}) but row_length is {T}; "
            f"raise row_length to {round_up(pair.slots, 128)}, or lower max_length below {p + max(c, r)} to drop or cut such pairs"
        )
    if pair.scored > S:
        return ValueError(
            f"pair '{pair.id}' ({pair.where}) has {pair.scored} scored tokens but scored_length is {S}; raise scored_length to {round_up(pair.scored, 64)}"
        )
    answer, length = ("chosen", c) if c >= r else ("rejected", r)
    return ValueError(
        f"pair '{pair.id}' ({pair.where}) takes {p + length} entries of a view (prompt {p} + {answer} {length}) but view_length is {Y}; "
        f"lower max_length below {p + length} to drop or cut such pairs"
    )


def _fill(pairs, rows: list[list[int]], shape: RowShape, B: int, wanted_B2: np.ndarray) -> RowBatch:
    R, T, S, Y = shape
    batch = RowBatch(
        *(np.zeros((R, T), np.int32) for _ in range(4)),
        *(np.zeros((R, S), np.int32) for _ in range(2)),
        answers_RS=np.full((R, S), 2 * B, np.int32),
        filled_B=np.zeros(B, bool),
        weights_RS=np.zeros((R, S), np.float32) if any(pair.weights is not None for pair in pairs) else None,
        views_R2Y=np.full((R, 2, Y), T, np.int32) if Y else None,
        starts_B3=np.full((B, 3), -1, np.int32),
    )
    for row, numbers in enumerate(rows):
        slot, scored, segment, seen = 0, 0, 0, [0, 0]
        for number in numbers:
            pair = pairs[number]
            batch.filled_B[number] = True
            prompt_segment, prompt = segment + 1, np.arange(slot, slot + len(pair.prompt))

            def put(ids, first_position, segment, prompt_segment=prompt_segment, row=row):
                nonlocal slot
                here = slice(slot, slot + len(ids))
                batch.tokens_RT[row, here] = ids
                batch.positions_RT[row, here] = first_position + np.arange(len(ids))
                batch.segments_RT[row, here] = segment
                batch.prompts_RT[row, here] = prompt_segment
                slot += len(ids)

            batch.starts_B3[number, 0] = row * T + slot
            put(pair.prompt, 0, prompt_segment)
            segment = prompt_segment
            for side in np.flatnonzero(wanted_B2[number]):
                ids, mask = pair.branches[side], pair.masks[side]
                segment += 1
                batch.starts_B3[number, 1 + side] = row * T + slot
                answer = np.arange(slot, slot + len(ids))
                # Each token is predicted by the one before it; a branch's first token by the prompt's last. Answers cut by rules that give
                # them no common prompt begin with one of their own, which is not scored.
                sources = np.concatenate([prompt[-1:] if len(prompt) else answer[:1], answer[:-1]])
                put(ids, len(pair.prompt), segment)
                targets = ids[mask]
                here = slice(scored, scored + len(targets))
                batch.targets_RS[row, here] = targets
                batch.sources_RS[row, here] = sources[mask]
                batch.answers_RS[row, here] = 2 * number + side
                if batch.weights_RS is not None:
                    batch.weights_RS[row, here] = 1 if pair.weights is None else pair.weights[side]
                scored += len(targets)
                if Y:
                    entries = np.concatenate([prompt, answer])
                    batch.views_R2Y[row, side, seen[side] : seen[side] + len(entries)] = entries
                    seen[side] += len(entries)
    return batch


def slots_before(pairs: Sequence[PairTokens], before: Sequence[RowBatch], batch: RowBatch) -> np.ndarray:
    """slots_RT: which slot of the batches `before`, all of one shape and end to end, holds the token that a slot of `batch` has. Padding
    slots get the first."""
    slots_RT = np.zeros(batch.tokens_RT.shape, np.int32)
    flat, size = slots_RT.reshape(-1), before[0].tokens_RT.size
    starts_NB3 = np.stack([one.starts_B3 for one in before])
    places_NB3 = np.where(starts_NB3 >= 0, starts_NB3 + size * np.arange(len(before))[:, None, None], -1)
    places_B3 = places_NB3.max(axis=0)  # a pair is in one of them
    for number, part in zip(*np.nonzero(batch.starts_B3 >= 0), strict=True):
        start, n = batch.starts_B3[number, part], pairs[number].lengths[part]
        flat[start : start + n] = places_B3[number, part] + np.arange(n)
    return slots_RT


# How long rows should be


def suggest_row_length(slots: np.ndarray) -> int:
    """Holds the longest pair, in a multiple of 128 slots (the width of a TPU register)."""
    return round_up(slots.max(), 128)


def suggest_scored_length(slots: np.ndarray, scored: np.ndarray, row_length: int) -> int:
    """Room for the scored share of a full row, with 8 % to spare so that S seldom decides how pairs are packed."""
    return _share(slots, scored, row_length, SPARE_SCORED, 64)


def suggest_shapes(
    slots: np.ndarray,
    scored: np.ndarray,
    views: np.ndarray,
    *,
    B: int,
    ways: int,
    row_length: int | None = None,
    scored_length: int | None = None,
    rows_per_device: int | None = None,
    view_length: bool = False,
    budget: int = BUDGET,
) -> tuple[RowShape, ...]:
    """The few shapes in which updates of B pairs, and parts of them, take the fewest slots; the first is the largest and holds every pair.

    slots, scored and views (prompt and answer together, chosen and rejected) are the lengths of all pairs, `ways` is how many devices rows
    are spread over, `budget` how many slots a device should work on at a time. What is given is obeyed: a row_length or scored_length
    that is too small for a pair is the caller's to refuse, and where rows are fixed both ways there is one shape.
    """
    table = Sizes(slots, scored, views)
    longest = row_length or suggest_row_length(slots)
    shortest = suggest_row_length(np.median(slots))

    def shape(R: int, T: int) -> RowShape:
        fit = table.of(slots <= max(T, slots.min()))
        S = suggest_scored_length(fit.slots_B, fit.scored_B, T)
        if scored_length:
            S = scored_length if longest <= T else min(S, scored_length)
        Y = max(_share(fit.slots_B, view_B, T, SPARE_VIEW, 128) for view_B in fit.views_B2.T) if view_length else 0
        return RowShape(R, T, S, Y)

    if (row_length and rows_per_device) or not table.fit(RowShape(1, longest, scored_length or longest)):
        return (shape(ways * (rows_per_device or 1), longest),)
    most = row_length or max(longest, min(2 * longest, budget // (rows_per_device or 1)))
    # Some 50 lengths are tried, however far those of the pairs lie apart.
    step = round_up(max(1, most - shortest) / 48, 128)
    largest = [row_length] if row_length else range(longest, most + 1, step)
    trials = _trials(table, B)
    costs = {}  # (R, T) -> slots taken for each real one, in each trial
    for T in sorted({*largest, *range(shortest, most, step)}):
        rows = trials.rows_needed(shape(1, T))
        for k in [rows_per_device] if rows_per_device else _powers_of_two(budget // T):
            costs[k * ways, T] = np.ceil(rows / (k * ways)) * k * ways * T / trials.slots
    found = []
    for R, T in costs:
        if T in largest:
            few = _few(R, T, costs)
            cost = np.min([costs[one] for one in few], axis=0).mean() * (1 + T / ATTENTION)
            batches = (costs[R, T] * trials.slots)[trials.whole].mean() / (R * T)
            found.append((cost, round(batches), T, R, few))
    least = min(found)[0]
    # Of equals those with fewer row batches: fewer programs are started, and weights gathered less often.
    *_, few = min((one for one in found if one[0] < least * (1 + NEAR)), key=lambda one: one[1:4])
    return tuple(shape(R, T) for R, T in few)


def _share(slots: np.ndarray, part: np.ndarray, T: int, spare: float, multiple: int) -> int:
    """Room in a row of T slots for what takes `part` of these slots."""
    return min(T, round_up(max(part.max(), spare * part.sum() / slots.sum() * T), multiple))


class _Trials(NamedTuple):
    """Random updates, and parts of the same ones, to be packed for trial."""

    parts: list[Sizes]
    times: float  # they stand for updates so many times their size
    whole: slice  # those that are not parts

    @property
    def slots(self) -> np.ndarray:
        return self.times * np.array([part.slots_B.sum() for part in self.parts])

    def rows_needed(self, shape: RowShape) -> np.ndarray:
        """How many rows of this shape each takes; inf where a row does not hold one of its pairs."""
        _, T, S, Y = shape
        rows = np.full(len(self.parts), np.inf)
        for i, part in enumerate(self.parts):
            if part.fit(shape):
                slots, scored, views = (sizes.tolist() for sizes in part)
                rows[i] = len(pack(slots, scored, T, S, views=views, Y=Y))
        return self.times * rows


def _trials(table: Sizes, B: int) -> _Trials:
    """The same each time."""
    rng, B = np.random.default_rng(0), min(B, len(table.slots_B))
    pairs = min(B, 512)
    updates = [rng.choice(len(table.slots_B), pairs, replace=False) for _ in range(int(np.clip(1536 // pairs, 3, 12)))]
    parts = [table.of(update[: math.ceil(part * pairs)]) for part in PARTS for update in updates]
    return _Trials(parts, B / pairs, slice(len(updates)))


def _powers_of_two(most: int) -> list[int]:
    return [2**i for i in range(max(1, most).bit_length())]


def _few(R: int, T: int, costs: dict[tuple[int, int], np.ndarray]) -> list[tuple[int, int]]:
    """R rows of T slots, and beside them the smaller shapes that save the most, largest first."""
    few, least = [(R, T)], costs[R, T]
    others = {one: cost for one, cost in costs.items() if one != (R, T) and one[0] <= R and one[1] <= T}
    while others and len(few) < SHAPES:
        means = {one: np.minimum(least, cost).mean() for one, cost in others.items()}
        best = min(means, key=means.get)
        if means[best] > least.mean() * (1 - GAIN):
            break
        few.append(best)
        least = np.minimum(least, others.pop(best))
    return sorted(few, key=lambda one: (one[1], one[0]), reverse=True)
