"""Times SimPO updates of TRL's CPOTrainer on the inputs that make_inputs.py wrote.

pip install torch trl==1.16.0
python benchmarks/peers/trl_simpo.py FOLDER [--per_device_train_batch_size 8] [--steps 2] [--warmup 1]
                                            [--bf16] [--dtype float32] [--gradient_checkpointing true]

Rows are tokenized before, and micro-batches collated before each update's clock starts. The last line is JSON.
"""

import os
import tempfile

os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}

import timing
import torch
import transformers
from datasets import Dataset
from trl.experimental.cpo import CPOConfig, CPOTrainer


class StepClock(transformers.TrainerCallback):
    def __init__(self):
        self.clock = timing.Clock()

    def on_step_begin(self, *_, **__):
        self._wait()
        self.clock.start()

    def on_step_end(self, *_, **__):
        self._wait()
        self.clock.stop()

    @staticmethod
    def _wait():
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def main() -> None:
    parser = timing.parser(__doc__)
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16; else float32 throughout")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="what parameters are kept in"
    )
    parser.add_argument("--gradient_checkpointing", choices=("true", "false"), help="left out: TRL's default")
    parser.add_argument("--attn_implementation", default="sdpa")
    parser.add_argument("--cpu", action="store_true", help="no GPU even where there is one")
    arguments = parser.parse_args()
    inputs = timing.Inputs(arguments)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    more = {}
    if arguments.gradient_checkpointing is not None:
        more["gradient_checkpointing"] = arguments.gradient_checkpointing == "true"
    on_gpu = torch.cuda.is_available() and not arguments.cpu
    with tempfile.TemporaryDirectory() as folder:
        options = CPOConfig(
            loss_type="simpo",
            cpo_alpha=0.0,
            beta=2.0,
            simpo_gamma=0.5,  # 0.25 nats per token: TRL divides it by beta
            max_length=inputs.max_length,
            max_steps=inputs.total,
            per_device_train_batch_size=inputs.micro,
            gradient_accumulation_steps=inputs.accumulation,
            train_sampling_strategy="sequential",
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            use_cpu=not on_gpu,
            bf16=arguments.bf16,
            tf32=None if not on_gpu else True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            output_dir=folder,
            **more,
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(inputs.model)
        tokenizer.pad_token = tokenizer.bos_token  # what padding holds is masked
        model = transformers.AutoModelForCausalLM.from_pretrained(
            inputs.model, dtype=getattr(torch, arguments.dtype), attn_implementation=arguments.attn_implementation
        )
        columns = ("prompt", "chosen", "rejected")
        rows = Dataset.from_list([{name: row[name] for name in columns} for row in inputs.rows])
        clock = StepClock()
        trainer = CPOTrainer(model, options, train_dataset=rows, processing_class=tokenizer, callbacks=[clock])
        trainer.train()
    lengths = [len(row["chosen_input_ids"]) + len(row["rejected_input_ids"]) for row in trainer.train_dataset]
    timing.report(
        inputs,
        clock.clock.seconds,
        packages=("trl", "transformers", "torch"),
        loss="SimPO",
        tokens=sum(inputs.timed(lengths)),
        losses=[line["loss"] for line in trainer.state.log_history if "loss" in line],
        gradient_checkpointing=options.gradient_checkpointing,
        bf16=arguments.bf16,
        dtype=arguments.dtype,
        device=torch.cuda.get_device_name() if on_gpu else f"cpu, {torch.get_num_threads()} threads",
        **({"gpu_memory_gib": torch.cuda.max_memory_allocated() / 2**30} if on_gpu else {}),
    )


if __name__ == "__main__":
    main()
