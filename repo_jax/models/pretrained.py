"""A model as it is found: checked before any device work, then read straight to where its parameters live."""

from typing import NamedTuple

import jax
from jax.sharding import Mesh

from repo_jax.models.config import DecoderConfig
from repo_jax.models.decoder import param_shapes
from repo_jax.models.hf import check_tensors, from_hf
from repo_jax.models.hub import ModelFiles
from repo_jax.models.lora import PeftAdapter
from repo_jax.models.tensors import TensorFiles
from repo_jax.sharding import param_shardings


class Pretrained(NamedTuple):
    files: ModelFiles
    cfg: DecoderConfig
    adapter: PeftAdapter | None  # added to the weights as they are read

    def shapes(self, mesh: Mesh, dtype: str) -> dict:
        """The parameters as ShapeDtypeStructs that know where on the mesh they live."""
        shapes = param_shapes(self.cfg, dtype)
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            *(shapes, param_shardings(shapes, mesh)),
        )

    def params(self, mesh: Mesh, dtype: str) -> dict:
        """The parameters in float32 or bfloat16, spread over the mesh."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.shapes(mesh, dtype))
        return from_hf(self.files.weights, self.cfg, shardings, dtype=dtype, deltas=self.adapter)


def open_model(files: ModelFiles) -> Pretrained:
    """Raises ValueError or FileNotFoundError for a configuration, weights or an adapter that are not whole or do not fit."""
    cfg = DecoderConfig.from_hf(files.weights)
    check_tensors(TensorFiles(files.weights), cfg)
    adapter = None if files.adapter is None else PeftAdapter(files.adapter)
    if adapter is not None:
        adapter.check(cfg)
    return Pretrained(files, cfg, adapter)
