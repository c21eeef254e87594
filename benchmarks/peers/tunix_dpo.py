"""Times DPO updates of Tunix's DPOTrainer on the inputs that make_inputs.py wrote. Tunix has no SimPO.

python3.11 -m venv VENV && VENV/bin/pip install google-tunix==0.1.7
VENV/bin/python benchmarks/peers/tunix_dpo.py FOLDER [--per_device_train_batch_size 1] [--steps 2] [--warmup 1] [--remat decoder]

Prompts are padded to max_prompt_length and answers to max_response_length, as Tunix does; what is longer is cut, and counted. The
model has the shape of FOLDER/model and random weights. DPO also runs the reference model forward, which is timed: it is what an
update of Tunix costs. The last line is JSON.
"""

import jax
import numpy as np
import optax
import timing
from flax import nnx
from tunix.models.llama3.model import Llama3, ModelConfig, RematConfig
from tunix.sft.dpo.dpo_trainer import DPOTrainer, DPOTrainingConfig, TrainingInput


def main() -> None:
    parser = timing.parser(__doc__)
    parser.add_argument("--max_prompt_length", type=int, help="left out: half of max_length")
    parser.add_argument("--max_response_length", type=int, help="left out: the other half")
    parser.add_argument("--remat", choices=("none", "block", "decoder"), default="decoder")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of parameters and products"
    )
    parser.add_argument(
        "--no_reference",
        action="store_true",
        help="without the reference model: no loss that is in use, but SimPO's work",
    )
    arguments = parser.parse_args()
    inputs = timing.Inputs(arguments)
    lengths = {
        "prompt": arguments.max_prompt_length or inputs.max_length // 2,
        "response": arguments.max_response_length or inputs.max_length // 2,
    }
    mesh = jax.make_mesh((len(jax.devices()), 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    clock = timing.Clock()
    with mesh:  # deprecated in jax, but it is this mesh that tunix 0.1.7 looks for
        model, reference = (llama(inputs.config, arguments) for _ in range(2))
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6, b2=0.999, weight_decay=0.0))
        config = DPOTrainingConfig(
            eval_every_n_steps=10**9,
            beta=0.1,
            gradient_accumulation_steps=inputs.accumulation,
            max_inflight_computations=1,
        )
        trainer = DPOTrainer(model, None if arguments.no_reference else reference, optimizer, config)

        micro_batches = [
            padded(inputs.rows[start : start + inputs.micro], **lengths)
            for start in range(0, len(inputs.rows), inputs.micro)
        ]

        def clocked():
            """The micro-batches; an update's clock stops once the parameters it made are there."""
            for number, batch in enumerate(micro_batches):
                if number % inputs.accumulation == 0:
                    clock.start()
                yield batch
                if (number + 1) % inputs.accumulation == 0:
                    jax.block_until_ready(nnx.state(model))
                    clock.stop()

        trainer.train(clocked())
    whole = sum(tokens_of(row, inputs.max_length, inputs.max_length) for row in inputs.timed(inputs.rows))
    timing.report(
        inputs,
        clock.seconds,
        packages=("google-tunix", "jax", "flax", "optax"),
        tokens=sum(tokens_of(row, **lengths) for row in inputs.timed(inputs.rows)),
        tokens_uncut=whole,
        padded_tokens=2 * sum(lengths.values()) * len(inputs.timed(inputs.rows)),
        loss="DPO without its reference" if arguments.no_reference else "DPO",
        remat=arguments.remat,
        dtype=arguments.dtype,
        device=f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
    )


def llama(config: dict, arguments) -> Llama3:
    made = Llama3(
        ModelConfig(
            num_layers=config["num_hidden_layers"],
            vocab_size=config["vocab_size"],
            embed_dim=config["hidden_size"],
            hidden_dim=config["intermediate_size"],
            num_heads=config["num_attention_heads"],
            head_dim=config["head_dim"],
            num_kv_heads=config["num_key_value_heads"],
            rope_theta=int(config["rope_theta"]),
            norm_eps=config["rms_norm_eps"],
            weight_tying=config["tie_word_embeddings"],
            remat_config=RematConfig[arguments.remat.upper()],
        ),
        rngs=nnx.Rngs(0),
    )
    nnx.update(made, jax.tree.map(lambda leaf: leaf.astype(arguments.dtype), nnx.state(made, nnx.Param)))
    return made


def padded(rows: list[dict], *, prompt: int, response: int) -> TrainingInput:
    def side(name: str, length: int, *, left: bool) -> tuple[np.ndarray, np.ndarray]:
        ids, mask = np.zeros((2, len(rows), length), np.int32)
        for i, row in enumerate(rows):
            kept = row[name][:length]
            place = slice(length - len(kept), None) if left else slice(len(kept))
            ids[i, place], mask[i, place] = kept, 1
        return ids, mask

    fields = {}
    for name, length in (("prompt", prompt), ("chosen", response), ("rejected", response)):
        fields[f"{name}_ids"], fields[f"{name}_mask"] = side(f"{name}_ids", length, left=name == "prompt")
    return TrainingInput(**fields)


def tokens_of(row: dict, prompt: int, response: int) -> int:
    """Tokens of both sequences, as many as are kept."""
    answers = (row["chosen_ids"], row["rejected_ids"])
    return 2 * min(len(row["prompt_ids"]), prompt) + sum(min(len(ids), response) for ids in answers)


if __name__ == "__main__":
    main()
