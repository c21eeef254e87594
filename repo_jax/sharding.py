"""The device mesh, and one table that says where every array lives on it."""

import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")

STACKS = ("layers_L/", "rest_L/")  # below these every parameter has one more axis, L, in front
# A parameter's name ends in its axes (q_DNH, down_FD). This table places each axis;
# an axis that is absent stays whole on every device.
PLACEMENT = {"D": "fsdp", "F": "tensor", "N": "tensor", "K": "tensor", "V": "tensor"}
BATCH = P(("data", "fsdp"))  # the leading axis of every batch and activation


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh with axes data, fsdp and tensor; one of them may be -1 and takes the devices that are left.

    Slices of a multi-slice TPU lie side by side along data, so that nothing else leaves a slice; data 1 becomes their number. Raises ValueError when the axes do not
    multiply to the number of devices, or data not to that of the slices.
    """
    devices = jax.devices() if devices is None else devices
    slices = {}
    for device in devices if devices[0].platform == "tpu" else ():
        slices.setdefault(getattr(device, "slice_index", 0), []).append(device)
    data = max(1, len(slices)) if data == 1 else data
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    said = " ".join(f"{axis}={size}" for axis, size in sizes.items())
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if -1 in sizes.values():
        if len(devices) % fixed:
            raise ValueError(
                f"mesh {said} leaves {len(devices)} / {fixed} devices for the axis that is -1; "
                f"make the other axes multiply to a divisor of {len(devices)}"
            )
        sizes = {axis: len(devices) // fixed if size == -1 else size for axis, size in sizes.items()}
    elif fixed != len(devices):
        raise ValueError(
            f"mesh {said} needs {fixed} devices but {len(devices)} are present; "
            f"make the axes multiply to {len(devices)}, or set one of them to -1"
        )
    if len(slices) <= 1:
        return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    if sizes["data"] % len(slices):
        raise ValueError(
            f"mesh {said} is for {len(slices)} slices, which only data spans: the links between them are slow; make data a multiple of "
            f"{len(slices)}, as in --mesh.data {len(slices)}"
        )
    parts = [
        make_mesh(sizes["data"] // len(slices), sizes["fsdp"], sizes["tensor"], slices[i]).devices
        for i in sorted(slices)
    ]
    return Mesh(np.concatenate(parts), AXES, axis_types=(AxisType.Auto,) * 3)


def batch_ways(mesh: Mesh) -> int:
    """Over how many devices the rows of a batch are spread."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def param_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """param_spec('layers_L/attn/q_DNH', ...) -> P(None, 'fsdp', 'tensor', None)."""
    stacked = "L" if path.startswith(STACKS) else ""
    axes = stacked + path.rsplit("_", 1)[-1]
    if len(axes) != len(shape):
        raise ValueError(f"parameter '{path}' names axes {axes} but has shape {shape}")
    places = []
    for axis, size in zip(axes, shape, strict=True):
        place = PLACEMENT.get(axis)
        ways = mesh.shape.get(place, 1)
        if size % ways:
            if axis == "K":  # fewer key/value heads than tensor shards: every shard keeps them all
                place = None
            else:
                raise ValueError(
                    f"axis {axis} of '{path}' has size {size}, which mesh.{place}={ways} does not divide; "
                    f"lower mesh.{place} to a divisor of {size}"
                )
        places.append(place)
    return P(*places)


def param_shardings(shapes: dict, mesh: Mesh) -> dict:
    """The NamedSharding of every parameter, in a tree like `shapes` (arrays or ShapeDtypeStructs)."""

    def place(path, leaf):
        name = "/".join(key.key for key in path)
        return NamedSharding(mesh, param_spec(name, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, shapes)


def constrain(x, spec: P):
    """Pins x to spec on the mesh in context; without a mesh, x as it is, so that unit tests need none."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec)
