"""Times SimPO updates of EasyDeL's CPOTrainer on the inputs that make_inputs.py wrote.

python3.11 -m venv VENV && VENV/bin/pip install easydel==0.3.0 pillow torch==2.13.0
VENV/bin/python benchmarks/peers/easydel_simpo.py FOLDER [--per_device_train_batch_size 1] [--steps 2] [--warmup 1]

(EasyDeL imports pillow and torch without asking for them.) Prompts are padded to max_prompt_length and answers to
max_completion_length, as EasyDeL does; what is longer is cut, and counted. The model has the shape of FOLDER/model and random
weights. The last line is JSON.
"""

import os
import tempfile

os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false"}

import easydel as ed
import jax
import jax.numpy as jnp
import timing
import transformers
from datasets import Dataset
from flax import nnx


def main() -> None:
    parser = timing.parser(__doc__)
    parser.add_argument("--max_prompt_length", type=int, help="left out: half of max_length")
    parser.add_argument("--max_completion_length", type=int, help="left out: the other half")
    parser.add_argument("--remat", choices=("none", "full"), default="full")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="what the model computes in"
    )
    parser.add_argument("--param_dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--attn_mechanism", default="auto", help="of EasyDeL's: auto, vanilla, sdpa, flash_attn2, ...")
    arguments = parser.parse_args()
    inputs = timing.Inputs(arguments)
    prompt = arguments.max_prompt_length or inputs.max_length // 2
    completion = arguments.max_completion_length or inputs.max_length // 2
    rows = [cut(row, prompt, completion) for row in inputs.rows]
    clock = timing.Clock()

    class Clocked(ed.CPOTrainer):
        def on_step_start(self, state, step):
            clock.start()
            return state

        def on_step_end(self, state, metrics, step):  # EasyDeL has waited for the state
            clock.stop()
            return state, metrics

    with tempfile.TemporaryDirectory() as folder:
        options = ed.CPOConfig(
            loss_type="simpo",
            cpo_alpha=0.0,
            beta=2.0,
            simpo_gamma=0.5,
            max_length=prompt + completion,
            max_prompt_length=prompt,
            max_completion_length=completion,
            max_training_steps=inputs.total,
            num_train_epochs=1,
            total_batch_size=inputs.micro,  # times gradient_accumulation_steps
            gradient_accumulation_steps=inputs.accumulation,
            shuffle_train_dataset=False,
            learning_rate=1e-6,
            clip_grad=1.0,
            do_last_save=False,
            save_tpu_preemption_checkpoints=False,
            use_wandb=False,
            verbose=False,
            save_directory=folder,
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(inputs.model)
        tokenizer.pad_token = tokenizer.bos_token
        model = llama(inputs.config, prompt + completion, arguments)
        trainer = Clocked(options, model, tokenizer, train_dataset=Dataset.from_list(rows))
        trainer.train()
    timed = inputs.timed(rows)
    timing.report(
        inputs,
        clock.seconds,
        packages=("easydel", "jax", "flax"),
        loss="SimPO",
        tokens=sum(
            2 * len(r["prompt_input_ids"]) + len(r["chosen_input_ids"]) + len(r["rejected_input_ids"]) for r in timed
        ),
        padded_tokens=2 * (prompt + completion) * len(timed),
        remat=arguments.remat,
        dtype=arguments.dtype,
        param_dtype=arguments.param_dtype,
        device=f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
    )


def llama(config: dict, length: int, arguments):
    shape = {name: config[name] for name in config if name not in ("architectures", "model_type", "dtype")}
    policies = ed.EasyDeLGradientCheckPointers
    return ed.LlamaForCausalLM(
        config=ed.LlamaConfig(
            **shape | {"max_position_embeddings": length},
            gradient_checkpointing=policies.NOTHING_SAVEABLE if arguments.remat == "full" else policies.NONE,
            attn_mechanism=arguments.attn_mechanism,
        ),
        dtype=jnp.dtype(arguments.dtype),
        param_dtype=jnp.dtype(arguments.param_dtype),
        rngs=nnx.Rngs(0),
    )


def cut(row: dict, prompt: int, completion: int) -> dict:
    """A row of token ids as EasyDeL's collator wants it; it would take what is longer for a whole sequence."""
    made = {}
    for name, length in (("prompt", prompt), ("chosen", completion), ("rejected", completion)):
        ids = row[f"{name}_ids"][:length]
        made |= {f"{name}_input_ids": ids, f"{name}_attention_mask": [1] * len(ids)}
    return made


if __name__ == "__main__":
    main()
