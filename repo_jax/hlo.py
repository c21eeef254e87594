"""What the text of a compiled program says: its collectives by kind and mesh axis, and the products that its matrix units compute.

Loops count as often as they turn. A device's part is meant throughout: the text is that of one device.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

INSTRUCTION = re.compile(r"^\s+(ROOT )?%(\S+) = (.+?) ([a-z][\w\-]*)\((.*)$")
ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
CALLED = re.compile(
    r"(?:body|condition|calls|to_apply|called_computations|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)"
)
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
LOOPS = ("layers", "head", "outside")


class Array(NamedTuple):
    dtype: str
    sizes: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.sizes)

    @property
    def bytes(self) -> int:
        return self.elements * max(1, int(re.search(r"\d+|$", self.dtype)[0] or 8) // 8)

    def __str__(self):
        return f"{self.dtype}{list(self.sizes)}".replace(" ", "")


class Instruction(NamedTuple):
    name: str
    opcode: str
    type: str
    rest: str  # operands and attributes
    is_root: bool

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.split(")")[0])

    @property
    def source(self) -> str:
        """The line of jax's program that it comes from."""
        match = re.search(r'op_name="([^"]*)"', self.rest)
        return match[1] if match else ""

    def attribute(self, name: str) -> str:
        match = re.search(rf"\b{name}=%?([^\s,{{]+|\{{[^}}]*\}})", self.rest)
        return match[1].strip("{}") if match else ""

    def numbers(self, name: str) -> list[int]:
        return [int(n) for n in re.findall(r"\d+", self.attribute(name))]


class Collective(NamedTuple):
    kind: str
    loop: str  # one of LOOPS
    backward: bool
    arrays: tuple[Array, ...]  # whole: what all-gather makes, what reduce-scatter takes
    source: str
    axes: str  # of the mesh, between which it goes: "fsdp", "data+fsdp"; "" where it stays on its device
    ways: int  # devices that take part together
    times: float  # how often it runs in one call of the program

    @property
    def sent(self) -> float:
        """Bytes that leave each device in one call, by the usual ring."""
        size, n = sum(array.bytes for array in self.arrays), self.ways
        share = {"collective-permute": 1.0, "all-reduce": 2 * (n - 1) / n}.get(self.kind, (n - 1) / n)
        return self.times * size * share if self.axes else 0.0

    @property
    def brought(self) -> float:
        """Bytes that it writes to each device's memory in one call."""
        size = sum(array.bytes for array in self.arrays)
        return self.times * (size / self.ways if self.kind == "reduce-scatter" else size)


class Work(NamedTuple):
    """What one call of a program takes of one device."""

    collectives: list[Collective]
    matmul_flops: float  # of the products that the text has
    kernel_flops: float  # of attention kernels, which it does not show: by their shapes, whole causal halves
    assumed: dict[
        str, float
    ]  # how often loops turn of which only the data decides it: layers, head, inner (inside others)


def arrays_in(text: str) -> list[Array]:
    return [Array(dtype, tuple(int(n) for n in sizes.split(",") if n)) for dtype, sizes in ARRAY.findall(text)]


def computations(text: str) -> dict[str, list[Instruction]]:
    """The instructions of each computation; that of the program itself is under ENTRY."""
    found, current = {}, None
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            name = "ENTRY" if line.startswith("ENTRY ") else line.split(" ")[0].lstrip("%")
            current = found.setdefault(name, [])
        elif current is not None and (match := INSTRUCTION.match(line)):
            current.append(Instruction(match[2], match[4], match[3], match[5], bool(match[1])))
    return found


def loop_of(source: str) -> str:
    """What a loop of the program itself goes over. Others (windowed products, searches) count as where they stand."""
    if "Decoder._run/while" in source or "kept_layers/while" in source:
        return "layers"
    return "outside" if "Decoder" in source or not source.endswith("/while") else "head"


def work_of(text: str, mesh: Mapping[str, int], turns: Mapping[str, int] | None = None) -> Work:
    """What a compiled program does, read off its text. `mesh` has the sizes of the axes over the program's devices, in their order.

    `turns` says for a loop (layers, head) how often it turns where only the data decides. Any other such loop is taken to run
    over half of what the loop around it runs over, as one over the blocks that a causal mask leaves does.
    """
    program, found, turns = computations(text), {}, turns or {}
    flops, assumed = {"matmul": 0.0, "kernel": 0.0}, {}

    def walk(name: str, loop: str, source: str, times: float, around: int) -> None:
        instructions = program.get(name, ())
        types = {one.name: one.type for one in instructions}
        for one in instructions:
            here = one.source or source
            kind = one.opcode.removesuffix("-start")
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):  # a TPU's name for what slices the sum
                kind = "reduce-scatter"
            if kind in KINDS:
                _add(found, one, kind, loop, here, times, mesh)
            elif one.opcode == "send" and "_xla_megascale_transfer_type" in one.rest:
                _add_between_slices(found, one, loop, here, times, mesh)
            elif one.opcode in ("dot", "convolution"):
                flops["matmul"] += times * product_flops(one, types)
            elif one.opcode == "custom-call":
                flops["kernel"] += times * kernel_flops(one)
            inner, inside, turning = loop, times, around
            if one.opcode == "while":
                inner = loop_of(here) if loop == "outside" else loop
                count = trips(one, program)
                if count is None:
                    what = inner if loop == "outside" and inner in turns else "inner"
                    count = assumed[what] = turns.get(what, (around + 1) / 2)
                inside, turning = times * count, count
            for group in CALLED.findall(one.rest):
                for called in group.split(", "):
                    walk(called.lstrip("%"), inner, here, inside, turning)

    walk("ENTRY", "outside", "", 1.0, 1)
    return Work(list(found.values()), flops["matmul"], flops["kernel"], assumed)


def _add(found: dict, one: Instruction, kind: str, loop: str, source: str, times: float, mesh) -> None:
    # Fusions that overlap with a collective hold copies of it, under the same channel.
    key = kind, loop, one.attribute("channel_id") or one.name
    if key in found:
        return
    axes, ways = axes_of(one.rest, mesh)
    arrays = whole(one.opcode, one.type)
    if one.opcode == "reduce-scatter":  # shows its result alone
        arrays = tuple(Array(array.dtype, (ways, *array.sizes)) for array in arrays)
    found[key] = Collective(kind, loop, "transpose(" in source, arrays, source, axes, ways, times)


def _add_between_slices(found: dict, one: Instruction, loop: str, source: str, times: float, mesh) -> None:
    """What leaves a slice of TPUs by its hosts' network, which slices do along the first axis that is longer than 1."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', one.rest)[1].lower().replace("_", "-")
    slices = re.search(r'_xla_megascale_target="\{([\d,:]+)\}', one.rest)
    first = next((name for name, size in mesh.items() if size > 1), "")
    ways = _count(slices[1]) if slices else mesh.get(first, 1)
    arrays = tuple(arrays_in(one.type)[:1])
    found["between slices", loop, one.name] = Collective(
        kind, loop, "transpose(" in source, arrays, source, first, ways, times
    )


def _count(text: str) -> int:
    """How many numbers '1,2' or '0:3' stands for."""
    ends = [list(map(int, part.split(":"))) for part in text.split(",")]
    return sum(part[-1] - part[0] + 1 for part in ends)


def whole(opcode: str, shape: str) -> tuple[Array, ...]:
    """A collective's arrays in the form in which they are largest."""
    arrays = [array for array in arrays_in(shape) if array != Array("u32", ())]
    if opcode.endswith("-start") and opcode != "all-reduce-start":  # (inputs, outputs)
        half = len(arrays) // 2
        arrays = max(arrays[:half], arrays[half:], key=lambda part: sum(array.bytes for array in part))
    return tuple(arrays)


# Which axes of the mesh


def axes_of(attributes: str, mesh: Mapping[str, int]) -> tuple[str, int]:
    """The axes along which the devices of a group differ, and how many devices a group has."""
    groups = list(groups_in(attributes, math.prod(mesh.values())))
    sizes, crossed = tuple(mesh.values()), set()
    for group in groups:
        places = [_place(device, sizes) for device in group]
        crossed |= {i for i in range(len(sizes)) if len({place[i] for place in places}) > 1}
    return "+".join(name for i, name in enumerate(mesh) if i in crossed), max(map(len, groups), default=1)


def _place(device: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    place = []
    for size in reversed(sizes):
        device, at = divmod(device, size)
        place.append(at)
    return tuple(reversed(place))


def groups_in(attributes: str, devices: int) -> Iterator[tuple[int, ...]]:
    """The groups of devices, or pairs (source, target), that a collective goes between, in any of XLA's ways to write them."""
    if match := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes):
        yield from ((int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", match[1]))
    elif match := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", attributes):
        listed = [tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", match[1])]
        yield from listed or [tuple(range(devices))]
    elif match := re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
    ):  # a transposed iota, reshaped
        shape, sizes = _ints(match[1]), _ints(match[2])
        ids = _transposed(sizes, _ints(match[3]) if match[3] else list(range(len(sizes))))
        ways = math.prod(shape[1:])
        yield from (tuple(ids[at : at + ways]) for at in range(0, len(ids), ways))
    elif match := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}",
        attributes,
    ):
        yield from _mesh_groups(match)
    else:
        yield tuple(range(devices))


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _transposed(sizes: list[int], order: list[int]) -> list[int]:
    """0, 1, ... in an array of these sizes, its axes put in that order, flat."""
    strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    places = itertools.product(*(range(sizes[i]) for i in order))
    return [sum(at * strides[i] for at, i in zip(place, order, strict=True)) for place in places]


def _mesh_groups(match: re.Match) -> Iterator[tuple[int, ...]]:
    """Groups written as axes of a mesh of the compiler's own: mesh['a'=2,'b'=4] {'b'}, or a part of an axis as 'b':(2)2."""
    axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
    wanted = {
        name: (int(before or 1), int(size or axes[name]))
        for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", match[5])
    }
    sizes, grouped = [], []  # an axis of which only a part is wanted becomes up to three
    for name, size in axes.items():
        before, part = wanted.get(name, (1, 1))
        sizes += [before, part, size // (before * part)]
        grouped += [False, name in wanted, False]
    ids = list(range(math.prod(sizes)))
    if match[2] and match[4]:
        shape = _ints(match[3] or match[2])
        ids = _transposed(shape, _ints(match[4]))
    strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    inner = [i for i, there in enumerate(grouped) if there]
    outer = [i for i, there in enumerate(grouped) if not there]

    def offsets(which: list[int]) -> list[int]:
        places = itertools.product(*(range(sizes[i]) for i in which))
        return [sum(at * strides[i] for at, i in zip(place, which, strict=True)) for place in places]

    for start in offsets(outer):
        yield tuple(ids[start + at] for at in offsets(inner))


# How often a loop turns


def trips(loop: Instruction, program: Mapping[str, list[Instruction]]) -> int | None:
    """How often a loop turns, from what the compiler noted or from a counter that starts at 0; None where only the data says."""
    if match := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(match[1])
    condition, body = (program.get(loop.attribute(name), []) for name in ("condition", "body"))
    named = {one.name: one for one in condition}
    compare = next((one for one in condition if one.is_root and one.opcode == "compare"), None)
    if compare is None or compare.attribute("direction") != "LT":
        return None
    counter, bound = (named.get(name) for name in compare.operands)
    limit = _constant(bound)
    if limit is None or counter is None or counter.opcode != "get-tuple-element":
        return None
    return math.ceil(limit / _step(body, counter.numbers("index")[0]))


def _step(body: list[Instruction], index: int) -> int:
    """By how much the body moves on the counter at this place of what it carries."""
    named = {one.name: one for one in body}
    root = next((one for one in body if one.is_root), None)
    if root is None or root.opcode != "tuple" or index >= len(root.operands):
        return 1
    moved = named.get(root.operands[index])
    while moved is not None and moved.opcode in ("copy", "bitcast"):
        moved = named.get(moved.operands[0])
    if moved is None or moved.opcode != "add":
        return 1
    steps = [_constant(named.get(name)) for name in moved.operands]
    return next((step for step in steps if step), 1)


def _constant(one: Instruction | None) -> int | None:
    if one is None or one.opcode != "constant" or not (match := re.match(r"(\d+)\)", one.rest)):
        return None
    return int(match[1])


# Products


def product_flops(one: Instruction, types: Mapping[str, str]) -> float:
    """2 per multiply-add of a dot or a convolution; what a convolution would multiply with padding is not counted."""
    left, right = (arrays_in(types.get(name, ""))[:1] for name in one.operands[:2])
    if not left or not right:
        return 0.0
    out = arrays_in(one.type)[0]
    if one.opcode == "dot":
        return 2.0 * out.elements * math.prod(left[0].sizes[i] for i in one.numbers("lhs_contracting_dims"))
    return _convolution_flops(one, left[0], right[0], out)


def _convolution_flops(one: Instruction, left: Array, right: Array, out: Array) -> float:
    match = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
    labels = [
        dict(zip(text, array.sizes, strict=True))
        for text, array in zip(match.groups(), (left, right, out), strict=True)
    ]
    window = _window(one)
    spatial = [label for label in match[2] if label.isdigit()]
    total = 2.0 * labels[2]["b"] * labels[2]["f"] * labels[1]["i"]
    groups = one.numbers("batch_group_count")
    for axis in sorted(spatial):
        total *= _meetings(labels[0][axis], labels[1][axis], labels[2][axis], int(axis), window)
    return total / (groups[0] if groups else 1)


def _window(one: Instruction) -> dict[str, list[str]]:
    match = re.search(r"window=\{([^}]*)\}", one.rest)
    return dict((name, value.split("x")) for name, value in re.findall(r"(\w+)=([\dx_\-]+)", match[1] if match else ""))


def _meetings(size: int, kernel: int, out: int, axis: int, window: Mapping[str, list[str]]) -> int:
    """How many (output, entry of the window) there are along an axis that meet an entry of the input."""

    def said(name: str, default: int) -> int:
        return int(window[name][axis]) if name in window else default

    low = int(window["pad"][axis].split("_")[0]) if "pad" in window else 0
    stride, spread, base = said("stride", 1), said("rhs_dilate", 1), said("lhs_dilate", 1)
    places = (o * stride + k * spread - low for o in range(out) for k in range(kernel))
    return sum(0 <= at < (size - 1) * base + 1 and at % base == 0 for at in places)


# The products of each splash kernel: queries by keys and probabilities by values; and backward both ones' other factors.
SPLASH = {"splash_mha_fwd": 2, "splash_mha_dkv": 4, "splash_mha_dq": 3}


def kernel_flops(one: Instruction) -> float:
    """Of a splash attention kernel: its products over the blocks that a causal mask leaves; 0 for what is none."""
    products = next((count for name, count in SPLASH.items() if one.name.startswith(name)), 0)
    heads = [array for array in arrays_in(one.rest) if len(array.sizes) == 4]
    if not products or not heads:
        return 0.0
    V, N, Y, H = heads[0].sizes  # views, heads, entries, head size
    return products * 2.0 * V * N * H * Y * (Y + 1) / 2


def by_kind_and_axes(
    collectives: list[Collective], size: Callable[[Collective], float]
) -> dict[tuple[str, str], float]:
    """The sum of `size` over the collectives of each kind between devices along the same axes."""
    found = {}
    for one in collectives:
        if one.axes:
            found[one.kind, one.axes] = found.get((one.kind, one.axes), 0.0) + size(one)
    return found
