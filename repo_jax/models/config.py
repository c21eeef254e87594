"""What distinguishes one checkpoint from another, read from its config.json."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

VOCABULARY_MULTIPLE = (
    128  # rows of the embedding come in this multiple: any usual mesh divides them, and TPU lanes are full
)


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions (arXiv:2104.09864) and how they are stretched beyond the length a model was first trained on."""

    theta: float = 10_000.0  # Llama 3: 500_000
    kind: str = "default"  # linear: every frequency divided by factor; llama3: only the low ones
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3: wavelengths above original_length / this are stretched in full
    high_freq_factor: float = 4.0  # llama3: wavelengths below original_length / this are left alone
    original_length: int = 8192  # llama3: positions before stretching


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder-only transformer, and nothing else."""

    D: int  # model width
    F: int  # hidden width of the MLP
    N: int  # query heads
    K: int  # key/value heads
    H: int  # head size
    V: int  # vocabulary
    L: int  # layers
    max_positions: int  # the longest sequence the checkpoint was built for
    rope: Rope = Rope()
    local_rope: Rope | None = None  # Gemma 3, on the layers that have a window
    windows: tuple[int | None, ...] = (None,)  # per layer, repeated; None attends to everything before
    norm_eps: float = 1e-6  # Llama 3: 1e-5
    query_scale: float | None = None  # Gemma 2 and 3; None means 1 / sqrt(H)
    activation: str = "silu"  # Gemma: gelu_tanh
    qkv_bias: bool = False  # Qwen 2
    o_bias: bool = False  # Llama's attention_bias sets both
    qk_norm: str | None = None  # head (Qwen 3, Gemma 3): each head by itself; whole (OLMo 2): all heads as one vector
    pre_norms: bool = True  # OLMo 2 has none
    post_norms: bool = False  # Gemma 2 and 3, OLMo 2 normalise each block's output
    unit_offset_norm: bool = False  # Gemma multiplies by 1 + scale
    scale_embeddings: bool = False  # Gemma multiplies embeddings by sqrt(D)
    tie_embeddings: bool = False  # the output head is embed_VD
    attn_softcap: float | None = None  # Gemma 2
    logit_softcap: float | None = None  # Gemma 2
    labels: int = 0  # of a classification or reward model, whose head takes the vocabulary's place; 0: a language model
    layout: str = "llama"  # a key of hf.LAYOUTS: what the family calls its tensors

    @property
    def padded_V(self) -> int:
        """Rows of the embedding and the head here. Those from V on are zero, no token and outside every softmax."""
        return -(-self.V // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    @property
    def stacks(self) -> dict[str, int]:
        """How many layers each stack of parameters holds: whole periods of the windows in layers_L, what is left in rest_L."""
        rest = self.L % len(self.windows)
        return {"layers_L": self.L - rest} | ({"rest_L": rest} if rest else {})

    @classmethod
    def from_hf(cls, folder: str | pathlib.Path) -> "DecoderConfig":
        """Reads FOLDER/config.json, in the form of transformers 4 or 5.

        Raises FileNotFoundError without one, and ValueError for what this decoder does not compute.
        """
        path = pathlib.Path(folder) / "config.json"
        hf = read_config(path)
        family = _family(hf, path)
        hf = (
            COMMON
            | family.defaults
            | {name: value for name, value in hf.items() if value is not None or name in NULLABLE}
        )
        _check(hf, family, path)
        rope, local_rope = _ropes(hf, family, path)
        heads, biased = hf["num_attention_heads"], bool(hf.get("attention_bias"))
        return cls(
            **{
                "D": hf["hidden_size"],
                "F": hf["intermediate_size"],
                "N": heads,
                "K": hf.get("num_key_value_heads") or heads,
                "H": hf.get("head_dim") or hf["hidden_size"] // heads,
                "V": hf["vocab_size"],
                "L": hf["num_hidden_layers"],
                "max_positions": hf["max_position_embeddings"],
                "rope": rope,
                "local_rope": local_rope,
                "windows": _windows(hf, family, path),
                "norm_eps": hf["rms_norm_eps"],
                "activation": _activation(hf, family, path),
                "qkv_bias": biased,
                "o_bias": biased,
                "tie_embeddings": bool(hf["tie_word_embeddings"]),
                "labels": _labels(hf, path),
                "layout": family.layout,
            }
            | {ours: hf[theirs] for ours, theirs in family.reads.items()}
            | family.facts
            | (
                {"query_scale": hf["query_pre_attn_scalar"] ** -0.5}
                if "query_pre_attn_scalar" in family.defaults
                else {}
            )
        )


NOTHING = MappingProxyType({})


class Family(NamedTuple):
    """How one model_type differs from Llama. Every number comes from the checkpoint itself."""

    layout: str = "llama"  # a key of hf.LAYOUTS
    facts: Mapping = NOTHING  # what config.json does not say
    defaults: Mapping = NOTHING  # what transformers takes where config.json is silent
    windows: str = "none"  # which layers have one: none, all, alternate, pattern (all but every n-th), upper
    reads: Mapping = NOTHING  # fields that only this family reads: ours -> theirs


GEMMA = {"unit_offset_norm": True, "scale_embeddings": True}
GEMMA_DEFAULTS = {"head_dim": 256, "max_position_embeddings": 8192, "tie_word_embeddings": True}
GEMMA_DEFAULTS |= {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
GEMMA_2_DEFAULTS = GEMMA_DEFAULTS | {"num_key_value_heads": 4, "query_pre_attn_scalar": 256, "sliding_window": 4096}
FAMILIES = {
    "llama": Family(),
    "mistral": Family(
        windows="all",
        facts={"qkv_bias": False, "o_bias": False},
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
    ),
    "qwen2": Family(
        windows="upper",
        facts={"qkv_bias": True, "o_bias": False},
        defaults={
            "num_key_value_heads": 32,
            "max_position_embeddings": 32_768,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
    ),
    "qwen3": Family(
        windows="upper",
        facts={"qk_norm": "head"},
        defaults={
            "num_key_value_heads": 32,
            "head_dim": 128,
            "max_position_embeddings": 32_768,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
    ),
    "gemma": Family(facts=GEMMA, defaults=GEMMA_DEFAULTS | {"num_key_value_heads": 16}),
    "gemma2": Family(
        layout="gemma2",
        windows="alternate",
        facts=GEMMA | {"post_norms": True},
        defaults=GEMMA_2_DEFAULTS | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        reads={"attn_softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping"},
    ),
    "gemma3_text": Family(
        layout="gemma2",
        windows="pattern",
        facts=GEMMA | {"post_norms": True, "qk_norm": "head"},
        defaults=GEMMA_2_DEFAULTS
        | {"max_position_embeddings": 131_072, "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0}
        | {"sliding_window_pattern": 6, "final_logit_softcapping": None},
        reads={"logit_softcap": "final_logit_softcapping"},
    ),
    "phi3": Family(
        layout="phi3",
        windows="all",
        facts={"qkv_bias": False, "o_bias": False},
        defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "sliding_window": None},
    ),
    "olmo2": Family(
        layout="olmo2",
        facts={"qk_norm": "whole", "pre_norms": False, "post_norms": True},
        defaults={"rms_norm_eps": 1e-5},
    ),
}
COMMON = {
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
# null says something there: as many key/value heads as heads, no window, no cap.
NULLABLE = ("num_key_value_heads", "sliding_window", *CAPS)
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")


def _is_number(value) -> bool:
    return type(value) in (int, float) and 0 < value < float("inf")


COUNTS = (*SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window", "sliding_window_pattern",
          "num_labels")  # fmt: skip
NUMBERS = ("rms_norm_eps", "rope_theta", "rope_local_base_freq", "query_pre_attn_scalar", *CAPS)
# What is read, besides layer_types and what stands in a rope, is of one of these kinds where it is given.
KINDS = {
    "a whole number from 1": (lambda value: type(value) is int and value >= 1, COUNTS),
    "a whole number from 0": (lambda value: type(value) is int and value >= 0, ("max_window_layers",)),
    "a number above 0": (_is_number, NUMBERS),
    "true or false": (
        lambda value: type(value) is bool,
        ("tie_word_embeddings", "attention_bias", "use_sliding_window"),
    ),
    "a name": (lambda value: type(value) is str, ("hidden_act", "hidden_activation")),
    "a list of names": (lambda value: type(value) is list and {*map(type, value)} <= {str}, ("architectures",)),
    "a table": (lambda value: type(value) is dict, ("rope_scaling", "rope_parameters", "id2label")),
}
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size")


def read_config(path: pathlib.Path) -> dict:
    """A model's config.json. Raises FileNotFoundError without one and ValueError for what is not JSON."""
    if not path.is_file():
        raise FileNotFoundError(
            f"model_name_or_path='{path.parent}' is not a folder with a config.json; "
            f"give the folder of a Hugging Face model (hf download ORG/NAME --local-dir FOLDER makes one)"
        )
    try:
        hf = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch it again") from None
    if not isinstance(hf, dict):
        raise ValueError(f"{path} holds a {type(hf).__name__}, not a configuration; fetch it again")
    return hf


def _family(hf: dict, path: pathlib.Path) -> Family:
    kind = hf.get("model_type")
    if kind in FAMILIES:
        return FAMILIES[kind]
    supported = f"supported: {', '.join(FAMILIES)}"
    if any(name in hf for name in ("vision_config", "audio_config", "text_config")):
        raise ValueError(f"model_type {kind!r} of {path} is multimodal, which is not supported; {supported}")
    if any(name in hf for name in EXPERTS) or "moe" in str(kind):
        raise ValueError(f"model_type {kind!r} of {path} is a mixture of experts, which is not supported; {supported}")
    raise ValueError(f"model_type {kind!r} of {path} is not supported; {supported}")


def _check(hf: dict, family: Family, path: pathlib.Path) -> None:
    """Refuses missing and impossible sizes, and what would change the function without being computed here."""
    if missing := [name for name in SIZES if name not in hf]:
        raise ValueError(f"{path} does not say {', '.join(missing)}; give the model's own config.json")
    for wanted, (fits, names) in KINDS.items():
        for name in names:
            if hf.get(name) is not None and not fits(hf[name]):
                raise ValueError(f"{name} of {path} is {hf[name]!r}; wanted {wanted}")
    head_dim = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    if head_dim % 2 or not head_dim:
        raise ValueError(f"head_dim of {path} is {head_dim}; wanted an even number: rotary positions turn pairs")
    if hf["num_attention_heads"] % (hf.get("num_key_value_heads") or 1):
        raise ValueError(
            f"{path} has {hf['num_attention_heads']} attention heads over {hf['num_key_value_heads']} key/value heads, which do not divide them"
        )
    refused = ["mlp_bias", "use_bidirectional_attention", "quantization_config"]
    if "attn_softcap" not in family.reads:
        refused.append("attn_logit_softcapping")
    for name in refused:
        if hf.get(name):
            raise ValueError(f"{name} {hf[name]!r} of {path} is not supported; supported: none")


def _activation(hf: dict, family: Family, path: pathlib.Path) -> str:
    # Gemma 2 and 3 have a name of their own for it.
    name = hf["hidden_activation" if "query_pre_attn_scalar" in family.defaults else "hidden_act"]
    if hf["model_type"] == "gemma" and name == "gelu":  # what Gemma's first configs say, and do not mean
        name = "gelu_pytorch_tanh"
    if name not in ACTIVATIONS:
        raise ValueError(f"hidden_act {name!r} of {path} is not supported; supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _labels(hf: dict, path: pathlib.Path) -> int:
    """Outputs of a *ForSequenceClassification model, as transformers counts them; 0 for a language model."""
    [architecture, *_] = hf.get("architectures") or ["ForCausalLM"]
    if architecture.endswith("ForSequenceClassification"):
        return len(hf["id2label"]) if hf.get("id2label") else hf.get("num_labels", 2)
    if not architecture.endswith("ForCausalLM"):
        raise ValueError(
            f"architecture {architecture!r} of {path} is not supported; supported: *ForCausalLM, *ForSequenceClassification"
        )
    return 0


def _windows(hf: dict, family: Family, path: pathlib.Path) -> tuple[int | None, ...]:
    """The window of each layer, as the shortest tuple that repeats."""
    L, window = hf["num_hidden_layers"], hf.get("sliding_window")
    if family.windows == "upper" and not hf.get("use_sliding_window"):
        window = None
    has_one = {
        "none": lambda i: False,
        "all": lambda i: True,
        "alternate": lambda i: i % 2 == 0,
        "pattern": lambda i: (i + 1) % hf["sliding_window_pattern"] != 0,
        "upper": lambda i: i >= hf["max_window_layers"],
    }[family.windows]
    kinds = ["sliding_attention" if has_one(i) else "full_attention" for i in range(L)]
    if family.windows not in ("none", "all") and hf.get("layer_types") is not None:
        kinds = hf["layer_types"]
        known = ("sliding_attention", "full_attention")
        if type(kinds) is not list or len(kinds) != L or not all(kind in known for kind in kinds):
            raise ValueError(
                f"layer_types {kinds} of {path} is not supported; supported: sliding_attention or full_attention for each of its {L} layers"
            )
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    period = next(p for p in range(1, L + 1) if all(windows[i] == windows[i % p] for i in range(L)))
    return windows[:period]


def _ropes(hf: dict, family: Family, path: pathlib.Path) -> tuple[Rope, Rope | None]:
    """The rotary positions of plain and of windowed layers, where these differ.

    transformers 5 writes rope_parameters, for Gemma 3 one for each kind of layer; 4 wrote rope_theta beside an optional
    rope_scaling, which for Gemma 3 concerns the plain layers alone.
    """
    base, written = {"rope_theta": hf["rope_theta"]}, hf.get("rope_parameters") or {}
    scaling = hf.get("rope_scaling") or {}
    if "rope_local_base_freq" not in family.defaults:
        if by_kind := [name for name in ("full_attention", "sliding_attention") if name in written]:
            raise ValueError(
                f"rope_parameters for {', '.join(by_kind)} of {path} are not supported; supported: one rope for all layers"
            )
        return _rope(base | scaling | written, hf, path), None
    plain, local = written.get("full_attention") or {}, written.get("sliding_attention") or {}
    if not type(plain) is type(local) is dict:
        raise ValueError(f"rope_parameters of {path} is {written!r}; wanted a table for each kind of layer")
    local_base = {"rope_theta": hf["rope_local_base_freq"]}
    return _rope(base | scaling | plain, hf, path), _rope(local_base | local, hf, path)


def _rope(given: dict, hf: dict, path: pathlib.Path) -> Rope:
    kind = given.get("rope_type") or given.get("type") or "default"
    wanted = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    if type(kind) is not str or kind not in wanted:
        raise ValueError(f"rope type {kind!r} of {path} is not supported; supported: {', '.join(wanted)}")
    share = given.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if share not in (None, 1, 1.0):
        raise ValueError(f"partial_rotary_factor {share!r} of {path} is not supported; supported: 1.0")
    if missing := [name for name in wanted[kind] if name not in given]:
        raise ValueError(
            f"rope type {kind!r} of {path} does not say {', '.join(missing)}; give the model's own config.json"
        )
    numbers = {"theta": given["rope_theta"]} | {name: given[name] for name in wanted[kind]}
    if kind == "llama3":
        numbers["original_length"] = given.get("original_max_position_embeddings", hf["max_position_embeddings"])
    for name, number in numbers.items():
        if not _is_number(number):
            raise ValueError(f"{name} of the rope in {path} is {number!r}; wanted a number above 0")
    if kind == "llama3" and numbers["low_freq_factor"] >= numbers["high_freq_factor"]:
        low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
        raise ValueError(f"low_freq_factor {low} of the rope in {path} is not below its high_freq_factor {high}")
    return Rope(kind=kind, **numbers)
