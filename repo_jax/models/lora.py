"""LoRA (arXiv:2106.09685): which weights get adapters, and PEFT's folders in and out.

A weight W is used as W + scale * A B: where W is q_DNH, A is a_Dr and B is b_rNH. Adapters are a tree like the parameters in which
{"a_Dr": ..., "b_rNH": ...} stands in the place of q_DNH; the decoder reads it from the collection "lora".
Axis letters: L layers, r rank; those of the weights are in hf.py.
"""

import json
import math
import pathlib
import re
from collections.abc import Iterator

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from repo_jax.models.config import DecoderConfig
from repo_jax.models.hf import Weight, expected_tensors, places_of, weights_of
from repo_jax.models.tensors import TensorFile, write_file

ALL = "all-linear"
DEFAULT = ("attn/q_DNH", "attn/v_DKH")  # PEFT adapts queries and values; Phi-3 keeps both in qkv_proj
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT puts it before every name of the model it adapts

# What adapter_config.json may say: these are read here or change nothing; whatever else it says must be off.
READ = {"base_model_name_or_path", "revision", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}
READ |= {"target_modules", "exclude_modules", "layers_to_transform"}
HARMLESS = {"auto_mapping", "peft_version", "inference_mode", "lora_dropout", "megatron_core", "qalora_group_size"}
HARMLESS |= {"runtime_config", "eva_config", "ensure_weight_tying"}
ALLOWED = {
    "peft_type": ("LORA",),
    "task_type": (None, "CAUSAL_LM"),  # adapters of other tasks bring a head of their own
    "bias": (None, "none"),
    # The other initialisations (PiSSA, OLoRA, ...) go with a base model that PEFT changes as it loads the adapter.
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}


def linear_modules(cfg: DecoderConfig) -> dict[str, list[Weight]]:
    """Every linear map inside the layers by its Hugging Face name ({i}: the layer), and the weights that make it up."""
    modules = {}
    for w in weights_of(cfg):
        if "{i}" in w.hf and len(w.groups) == 2:
            modules.setdefault(w.hf.removesuffix(".weight"), []).append(w)
    return modules


def adapted_modules(cfg: DecoderConfig, names: list[str] | str | None) -> dict[str, list[Weight]]:
    """The linear_modules of these names ("q_proj"); "all-linear" means all of them, None those that PEFT takes."""
    modules = linear_modules(cfg)
    if names is None:
        return {module: rows for module, rows in modules.items() if any(w.ours.endswith(DEFAULT) for w in rows)}
    names = [names] if isinstance(names, str) else list(names)
    if names == [ALL]:
        return modules
    wanted = {name: {module for module in modules if f".{module}".endswith(f".{name}")} for name in names}
    if not names or not all(wanted.values()):
        unknown = [name for name, found in wanted.items() if not found]
        raise ValueError(
            f"lora_target_modules={names} "
            + (f"but {', '.join(unknown)} is no linear map in this model's layers" if unknown else "adapts nothing")
            + f"; choose from {', '.join(map(_short, modules))}, or take {ALL}"
        )
    return {module: rows for module, rows in modules.items() if any(module in found for found in wanted.values())}


def _short(module: str) -> str:
    return module.rpartition(".")[2]


def targets(cfg: DecoderConfig, names: list[str] | str | None) -> dict[str, Weight]:
    """Where in the parameter tree the weights of these modules stand."""
    adapted = {w for rows in adapted_modules(cfg, names).values() for w in rows}
    return {place.path: place.weight for place in places_of(cfg) if place.weight in adapted}


def adapter_shapes(cfg: DecoderConfig, r: int, target_modules: list[str] | str | None) -> dict:
    """The tree of adapters as float32 ShapeDtypeStructs."""
    shapes = {}
    for path, w in targets(cfg, target_modules).items():
        outs, ins = w.groups
        L = cfg.stacks[path.partition("/")[0]]
        for name, axes in ((f"a_{''.join(ins)}r", [*ins, "r"]), (f"b_r{''.join(outs)}", ["r", *outs])):
            sizes = (r if axis == "r" else getattr(cfg, axis) for axis in axes)
            shapes[f"{path}/{name}"] = jax.ShapeDtypeStruct((L, *sizes), jnp.float32)
    return unflatten_dict(shapes, sep="/")


def init_adapters(key: jax.Array, shapes: dict, shardings: dict) -> dict:
    """A uniform within 1 / sqrt(inputs) of 0 as PEFT draws it, B zero: the model starts unchanged. Equal on every mesh."""

    def init():
        adapters = {}
        for i, (path, leaf) in enumerate(sorted(flatten_dict(shapes, sep="/").items())):
            if path.rpartition("/")[2].startswith("a_"):
                bound = math.prod(leaf.shape[1:-1]) ** -0.5
                adapters[path] = jax.random.uniform(jax.random.fold_in(key, i), leaf.shape, leaf.dtype, -bound, bound)
            else:
                adapters[path] = jnp.zeros(leaf.shape, leaf.dtype)
        return unflatten_dict(adapters, sep="/")

    return jax.jit(init, out_shardings=shardings)()


def save_adapter(
    adapters: dict,
    cfg: DecoderConfig,
    folder: str | pathlib.Path,
    *,
    r: int,
    alpha: float,
    dropout: float,
    target_modules: list[str] | str | None,
    base: str,
    revision: str | None = None,
) -> None:
    """Writes adapters of the model `base` into FOLDER as PEFT does; several processes call this together, the first writes.

    A module that is several weights here (Phi-3's qkv_proj) has an adapter of rank r for each of m weights. PEFT gets the one adapter
    of rank m * r that is the same map, and m * alpha, which keeps the scale.
    """
    folder, modules = pathlib.Path(folder), adapted_modules(cfg, target_modules)
    alpha = int(alpha) if alpha == int(alpha) else alpha  # PEFT declares a whole number, and takes any
    fused = {_short(module): len(rows) for module, rows in modules.items() if len(rows) > 1}
    config = {
        "peft_type": "LORA",
        "task_type": None if cfg.labels else "CAUSAL_LM",  # for SEQ_CLS PEFT wants a trained head
        "base_model_name_or_path": base,
        "revision": revision,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": sorted(map(_short, modules)),
        "rank_pattern": {name: m * r for name, m in fused.items()},
        "alpha_pattern": {name: m * alpha for name, m in fused.items()},
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
    tensors, shapes = {}, expected_tensors(cfg)
    for module, rows in modules.items():
        for i in range(cfg.L):
            a, b = _peft_names(name := module.format(i=i))
            outs, ins = shapes[f"{name}.weight"]
            tensors |= {a: ("float32", (len(rows) * r, ins)), b: ("float32", (outs, len(rows) * r))}
    parts = _peft_tensors(adapters, cfg, modules)
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / WEIGHTS, tensors, parts)
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    else:
        for _ in parts:  # all processes take part in gathering the arrays
            pass


def _peft_names(module: str) -> tuple[str, str]:
    """PEFT's names for the two tensors of a module's adapter: [r, in] and [out, r]."""
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


def _peft_tensors(adapters: dict, cfg: DecoderConfig, modules: dict) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of PEFT's file; all layers of one module at a time are on the host."""
    flat = flatten_dict(adapters, sep="/")

    def on_host(w: Weight, name: str, layout: str):
        leaves = [flat[f"{place.path}/{name}"] for place in places_of(cfg) if place.weight == w]
        return einops.rearrange(np.concatenate([_whole(leaf) for leaf in leaves]), layout)

    for module, rows in modules.items():
        a, b = [], []
        for w in rows:
            outs, ins = w.groups
            a.append(on_host(w, f"a_{''.join(ins)}r", f"L {' '.join(ins)} r -> L r ({' '.join(ins)})"))
            b.append(on_host(w, f"b_r{''.join(outs)}", f"L r {' '.join(outs)} -> L ({' '.join(outs)}) r"))
        for i in range(cfg.L):
            a_name, b_name = _peft_names(module.format(i=i))
            yield a_name, np.concatenate([part[i] for part in a])
            yield b_name, _block_diagonal([part[i] for part in b])


def _whole(leaf: jax.Array) -> np.ndarray:
    """An array on the host, also where it is spread over processes."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = jax.jit(lambda x: x, out_shardings=NamedSharding(leaf.sharding.mesh, P()))(leaf)
    return np.asarray(leaf, np.float32)


def _block_diagonal(blocks: list[np.ndarray]) -> np.ndarray:
    whole = np.zeros(np.sum([block.shape for block in blocks], axis=0), blocks[0].dtype)
    row = column = 0
    for block in blocks:
        whole[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return whole


class PeftAdapter:
    """A LoRA adapter that PEFT saved, opened but not read; hf.from_hf adds its deltas to the weights of the base model.

    Raises FileNotFoundError for what is not there and ValueError for what is more than low-rank deltas of linear maps.
    """

    def __init__(self, folder: str | pathlib.Path):
        self.folder = pathlib.Path(folder)
        self.config = _read_config(self.folder / CONFIG)
        if not (self.folder / WEIGHTS).is_file():
            pickled = (self.folder / "adapter_model.bin").is_file()
            raise FileNotFoundError(
                f"'{self.folder}' has no {WEIGHTS}{' but adapter_model.bin, which is not read' if pickled else ''}; "
                "load the adapter with PEFT and save it with save_pretrained, which writes safetensors"
            )
        self._file = TensorFile(self.folder / WEIGHTS)
        self._last = None, None  # from_hf asks for a tensor in pieces: the A that all of them share

    def check(self, cfg: DecoderConfig) -> None:
        """Every tensor has a place and every adapter its tensors of the right shape, or one ValueError that lists what differs."""
        names, expected, shapes = self._file.names(), {}, expected_tensors(cfg)
        for module in linear_modules(cfg):
            for i in range(cfg.L):
                a, b = _peft_names(name := module.format(i=i))
                if _is_target(self.config, name, i) or {a, b} & names:
                    outs, ins = shapes[f"{name}.weight"]
                    expected |= {a: (self._rank(name), ins), b: (outs, self._rank(name))}
        faults = [f"missing {name}" for name in sorted(expected.keys() - names)]
        faults += [f"unexpected {name}" for name in sorted(names - expected.keys())]
        for name in sorted(expected.keys() & names):
            if (given := self._file.shape(name)) != expected[name]:
                faults.append(f"{name} has shape {list(given)}, wanted {list(expected[name])}")
        if faults or not expected:
            more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
            raise ValueError(
                f"the adapter in '{self.folder}' does not fit its {CONFIG} and its base model: "
                f"{'; '.join(faults[:8]) or 'it adapts nothing in it'}{more}"
            )

    def delta(self, name: str, index: tuple[slice, ...]) -> np.ndarray | None:
        """scale * (B A)[index] in float32 for the weight of that Hugging Face name; None where there is no adapter.

        Raises ValueError where the file holds NaN or infinity.
        """
        module, (rows, *columns) = name.removesuffix(".weight"), index
        a_name, b_name = _peft_names(module)
        if a_name not in self._file.names():
            return None
        if self._last[0] != (a_name, columns):
            self._last = (a_name, columns), self._file.read(a_name, (slice(None), *columns)).astype(np.float32)
        b = self._file.read(b_name, (rows, slice(None))).astype(np.float32)
        return np.float32(self._scale(module)) * (b @ self._last[1])

    def _rank(self, module: str) -> int:
        return _matching(self.config.get("rank_pattern"), module, self.config["r"])

    def _scale(self, module: str) -> float:
        alpha, r = _matching(self.config.get("alpha_pattern"), module, self.config["lora_alpha"]), self._rank(module)
        return alpha / (math.sqrt(r) if self.config.get("use_rslora") else r)


def _read_config(path: pathlib.Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"'{path.parent}' has no {CONFIG}; give the folder of an adapter that PEFT saved")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch it again") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, not an adapter's configuration; fetch it again")
    if missing := [name for name in ("base_model_name_or_path", "r", "lora_alpha") if not config.get(name)]:
        raise ValueError(f"{path} does not say {', '.join(missing)}; write it there")
    odd = {name: value for name, value in config.items() if name not in READ | HARMLESS | set(ALLOWED) and value}
    odd |= {name: config.get(name) for name, allowed in ALLOWED.items() if config.get(name) not in allowed}
    if odd:
        said = ", ".join(f"{name}={value!r}" for name, value in odd.items())
        raise ValueError(
            f"{said} of {path} is not supported; merge the adapter into its base model with PEFT (merge_and_unload, "
            "then save_pretrained) and give that model"
        )
    return config


def _matching(patterns: dict | None, module: str, default):
    """The value of the first pattern that matches a module's name as PEFT matches it."""
    return next((value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _is_target(config: dict, module: str, layer: int) -> bool:
    """Whether PEFT gives that module an adapter."""

    def among(names: list[str] | str | None) -> bool:
        if isinstance(names, str):
            return names == ALL or re.fullmatch(names, module) is not None
        return any(f".{module}".endswith(f".{name}") for name in names or ())

    layers = config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    in_layers = layers in (None, []) or layer in layers
    return among(config.get("target_modules")) and not among(config.get("exclude_modules")) and in_layers
