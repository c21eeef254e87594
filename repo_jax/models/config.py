"""What distinguishes one checkpoint from another, read from its config.json."""

import dataclasses
import json
import pathlib

# Only what config.json does not say: how a family differs from Llama. Every number comes from the checkpoint itself.
FAMILIES = {
    "llama": {},
}
NEEDED = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")


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
    rope_theta: float = 10_000.0  # Llama 3: 500_000
    norm_eps: float = 1e-6  # Llama 3: 1e-5
    tie_embeddings: bool = False  # the output head is embed_VD

    @classmethod
    def from_hf(cls, folder: str | pathlib.Path) -> "DecoderConfig":
        """Reads FOLDER/config.json, in the form of transformers 4 or 5.

        Raises FileNotFoundError without one, and ValueError for what this decoder does not compute.
        """
        path = pathlib.Path(folder) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"model_name_or_path='{folder}' is not a folder with a config.json; "
                f"give the folder of a Hugging Face model (hf download ORG/NAME --local-dir FOLDER makes one)"
            )
        try:
            hf = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON ({error}); fetch it again") from None
        family = hf.get("model_type")
        if family not in FAMILIES:
            raise ValueError(f"model_type {family!r} of {path} is not supported; supported: {', '.join(FAMILIES)}")
        # transformers 5 writes rope_parameters; 4 wrote rope_theta beside an optional rope_scaling.
        rope = (
            {"rope_theta": hf.get("rope_theta", 10_000.0)}
            | (hf.get("rope_scaling") or {})
            | (hf.get("rope_parameters") or {})
        )
        if missing := [name for name in NEEDED if name not in hf]:
            raise ValueError(f"{path} does not say {', '.join(missing)}; give the model's own config.json")
        only = {
            "hidden_act": (hf.get("hidden_act", "silu"), "silu"),
            "rope type": (rope.get("rope_type", rope.get("type", "default")), "default"),
            "attention_bias": (bool(hf.get("attention_bias")), False),
            "mlp_bias": (bool(hf.get("mlp_bias")), False),
        }
        for what, (given, wanted) in only.items():
            if given != wanted:
                raise ValueError(f"{what} {given!r} of {path} is not supported; supported: {wanted!r}")
        heads = hf["num_attention_heads"]
        return cls(
            D=hf["hidden_size"],
            F=hf["intermediate_size"],
            N=heads,
            K=hf.get("num_key_value_heads") or heads,
            H=hf.get("head_dim") or hf["hidden_size"] // heads,
            V=hf["vocab_size"],
            L=hf["num_hidden_layers"],
            max_positions=hf.get("max_position_embeddings", 2048),
            rope_theta=float(rope["rope_theta"]),
            norm_eps=hf.get("rms_norm_eps", 1e-6),
            tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
            **FAMILIES[family],
        )
