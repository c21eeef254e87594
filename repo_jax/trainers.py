"""What recipes for other trainers may say, what those trainers take where nothing is said, and what of it is nothing to us."""

from typing import Any, NamedTuple

# Defaults, under the trainers' own names. transformers.TrainingArguments:
HUGGING_FACE = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 3.0,
    "max_steps": -1,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "warmup_ratio": 0.0,
    "optim": "adamw_torch",
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "seed": 42,
    "logging_steps": 500,
    "save_steps": 500,
    "eval_strategy": "no",
    "dataset_train_split": "train",
    "dataset_test_split": "test",
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
}
# TRL 1.16's own, which all its preference trainers share (tests/test_foreign.py reads them there).
TRL = HUGGING_FACE | {
    "optim": "adamw_torch_fused",
    "learning_rate": 1e-6,
    "logging_steps": 10,
    "gradient_checkpointing": True,
    "max_length": 1024,
}
# Those of 2024, from which alignment-handbook, SimPO and RePO were made: lengths that are not given become these.
HANDBOOK = HUGGING_FACE | {"dataset_splits": ["train", "test"]}
OF_2024 = HANDBOOK | {"max_length": 512, "max_prompt_length": 128}
PREFERENCE = {"beta": 0.1, "label_smoothing": 0.0, "loss_type": "sigmoid"}


class Trainer(NamedTuple):
    """Something that others write recipes for."""

    title: str
    defaults: dict[str, Any]
    own: tuple[str, ...]  # keys that only some trainers have, this one among them
    telling: tuple[str, ...]  # keys that no other has
    losses: tuple[str, ...]  # values of loss_type that no other has
    official: bool = False  # tokens as SimPO's and RePO's code has them


TRACKERS = ("tensorboard", "wandb", "trackio")  # of report_to, theirs and ours

HUB = {
    "hub_model_id": "hub_model_id",
    "hub_revision": "hub_revision",
    "hub_model_revision": "hub_revision",
    "hub_private_repo": "hub_private_repo",
}
OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw_torch_xla": "adamw",
    "adamw_apex_fused": "adamw",
    "paged_adamw": "adamw",
    "paged_adamw_32bit": "adamw",
    "adafactor": "adafactor",
    "lion_32bit": "lion",
    "paged_lion_32bit": "lion",
}
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"}
# TRL's DPO losses under our names; README says the same the other way round.
DPO_LOSSES = {
    "sigmoid": "dpo",
    "sigmoid_norm": "dpo_norm",
    "hinge": "hinge",
    "ipo": "ipo",
    "exo_pair": "exo_pair",
    "nca_pair": "nca_pair",
    "robust": "robust",
    "bco_pair": "bco_pair",
    "sppo_hard": "sppo_hard",
    "aot": "aot",
    "aot_pair": "aot",
    "aot_unpaired": "aot_unpaired",
    "apo_zero": "apo_zero",
    "apo_down": "apo_down",
    "discopop": "discopop",
    "sft": "sft",
}

LOSS_KEYS = {
    *("loss_type", "loss_weights", "beta", "gamma", "gamma_beta_ratio", "simpo_gamma", "cpo_alpha", "alpha"),
    *("rpo_alpha", "label_smoothing", "sft_weight", "discopop_tau", "use_weighting", "desirable_weight"),
    "undesirable_weight",
}
DPO_KEYS = (
    *("loss_weights", "discopop_tau", "rpo_alpha", "use_weighting", "ld_alpha", "f_divergence_type", "reference_free"),
    *("f_alpha_divergence_coef", "truncation_mode", "label_smoothing", "precompute_ref_log_probs", "pad_token"),
    *("precompute_ref_batch_size", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps", "loss_type"),
    *("beta", "max_prompt_length", "padding_free", "activation_offloading"),
)
CPO_KEYS = ("simpo_gamma", "cpo_alpha", "alpha", "label_smoothing", "loss_type", "beta", "max_prompt_length")
ORPO_KEYS = ("beta", "max_prompt_length", "loss_type")
KTO_KEYS = (
    *("desirable_weight", "undesirable_weight", "loss_type", "beta", "precompute_ref_log_probs", "max_prompt_length"),
    *("precompute_ref_batch_size", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
    *("activation_offloading",),
)
SFT_KEYS = (
    *("max_seq_length", "packing", "packing_strategy", "dataset_text_field", "dataset_kwargs", "completion_only_loss"),
    *("assistant_only_loss", "eval_packing", "shuffle_dataset", "chat_template_path"),
    *("loss_type", "truncation_mode", "eos_token", "pad_token", "padding_free", "activation_offloading"),
)
SIMPO_KEYS = (
    *("gamma_beta_ratio", "gamma", "sft_weight", "label_smoothing", "loss_type", "beta", "truncation_mode"),
    *("trainer_type", "ln", "alpha", "max_prompt_length", "max_target_length"),
)
SIMPO = OF_2024 | {
    "beta": 2.0,
    "gamma_beta_ratio": 0.25,
    "sft_weight": 0.0,
    "label_smoothing": 0.0,
    "loss_type": "sigmoid",
}
KTO = {"beta": 0.1, "loss_type": "kto", "desirable_weight": 1.0, "undesirable_weight": 1.0}
CPO = PREFERENCE | {"simpo_gamma": 0.5, "cpo_alpha": 1.0, "alpha": 0.0}
TRAINERS = {
    #                title                defaults                   keys        of it alone                           its losses
    "repo":  Trainer("RePO's run_repo.py", SIMPO, SIMPO_KEYS, ("trainer_type", "ln"), ("repo",), True),
    "simpo": Trainer("SimPO's run_simpo.py", SIMPO, SIMPO_KEYS, ("gamma_beta_ratio", "gamma", "sft_weight"), (), True),
    "cpo":   Trainer("TRL's CPOConfig", TRL | CPO, CPO_KEYS, ("simpo_gamma", "cpo_alpha"), ("simpo", "alphapo")),
    "kto":   Trainer("TRL's KTOConfig", TRL | KTO, KTO_KEYS, ("desirable_weight", "undesirable_weight"), ("kto", "apo_zero_unpaired")),
    "orpo":  Trainer("TRL's ORPOConfig", TRL | {"beta": 0.1}, ORPO_KEYS, (), ()),
    "sft":   Trainer(
        "TRL's SFTConfig", TRL | {"learning_rate": 2e-5, "loss_type": "nll"}, SFT_KEYS,
        ("max_seq_length", "packing", "packing_strategy", "dataset_text_field", "completion_only_loss", "assistant_only_loss"), ("nll",),
    ),
    "dpo":   Trainer(
        "TRL's DPOConfig", TRL | PREFERENCE | {"discopop_tau": 0.05}, DPO_KEYS,
        ("loss_weights", "discopop_tau", "rpo_alpha", "use_weighting", "ld_alpha", "f_divergence_type", "reference_free"),
        tuple(name for name in DPO_LOSSES if name not in ("sigmoid", "hinge", "ipo")),
    ),
}  # fmt: skip

READ = {
    *HUGGING_FACE, *HUB, "max_length", "model_name_or_path", "model_revision", "chat_template", "gradient_checkpointing", "use_peft",
    "lora_target_modules", "dataset_name", "dataset_config", "dataset_mixer", "dataset_splits", "dataset_configs", "dataset_mixture",
    "datasets", "test_split_size", "do_eval", "evaluation_strategy", "logging_strategy", "save_strategy", "eval_steps", "output_dir",
    "save_total_limit", "push_to_hub", "data_seed", "auto_insert_empty_system_msg",
}  # fmt: skip

# Keys with values that ask for nothing, what to say of any other, and the leaf of ours that is said instead, if one is.
NOT_QUANTISED = "quantised models are not trained here; leave it out for LoRA over weights as they are"
ONLY = {
    "load_in_4bit": ((False,), NOT_QUANTISED),
    "load_in_8bit": ((False,), NOT_QUANTISED),
    "use_dora": ((False,), "of adapters only plain LoRA is here; leave it out"),
    "use_rslora": ((False,), "adapters count for lora_alpha / lora_r; leave it out, and give --lora_alpha times the root of lora_r", "model.lora_alpha"),
    "lora_modules_to_save": (([],), "beside adapters nothing is trained; leave it out"),
    "lora_target_parameters": (([],), "modules have adapters, not parameters; leave it out, and give --lora_target_modules", "model.lora_target_modules"),
    "lora_task_type": (("CAUSAL_LM",), "language models are CAUSAL_LM; leave it out"),
    "label_smoothing_factor": ((0,), "the losses have it; leave it out, and give --label_smoothing", "loss.label_smoothing"),
    "neftune_noise_alpha": ((0,), "no noise is put on embeddings; leave it out"),
    "lr_scheduler_kwargs": (({},), "schedules have no more than lr_scheduler_type and warmup_ratio; leave it out"),
    "optim_args": (("",), "optimizers have no more than adam_beta1, adam_beta2 and adam_epsilon; leave it out"),
    "optim_target_modules": (([],), "every trained parameter has the same optimizer; leave it out"),
    "load_best_model_at_end": ((False,), "what is exported is the last; leave it out: `repo-jax export` takes any checkpoint"),
    "auto_find_batch_size": ((False,), "pairs per update stay what they are; leave it out: --rows_per_device decides what fits"),
    "f_divergence_type": (("reverse_kl",), "of divergences only reverse_kl is here; leave it out", "loss.loss_type"),
    "reference_free": ((False,), "losses without a reference model have names of their own; give --loss_type", "loss.loss_type"),
    "sync_ref_model": ((False,), "the reference model stays what it is; leave it out"),
    "generate_during_eval": ((False,), "`repo-jax generate` writes answers; leave it out"),
    "is_encoder_decoder": ((False,), "decoders alone are here; leave it out"),
    "hub_token": ((), "credentials are no part of a recipe; leave it out, and set HF_TOKEN in the environment"),
    "model_init_kwargs": (({},), "leave it out, and name what you want of it: --compute_dtype, --param_dtype, --attn_implementation"),
    "ref_model_init_kwargs": (({},), "the reference model is read as the model is; leave it out"),
    "model_adapter_name": (("default",), "one set of adapters is trained; leave it out"),
    "ref_adapter_name": ((), "the reference is the model under the adapters; leave it out"),
    "base_model_revision": (("main",), "leave it out, and give --model_revision of the model that is trained", "model.model_revision"),
    "tokenizer_name_or_path": ((), "a model comes with its tokenizer; leave it out, and put that one into the model's folder"),
    "use_cpu": ((False,), "leave it out, and set JAX_PLATFORMS=cpu in the environment"),
    "no_cuda": ((False,), "leave it out, and set JAX_PLATFORMS=cpu in the environment"),
    "dataset_kwargs": (({},), "there is none of it here; leave it out"),
    "env": (({},), "leave it out, and set these variables in the environment"),
    "text_column": (("text",), "texts without an answer are not trained on; leave it out"),
    "resume_from_checkpoint": ((True, False), "leave it out, and give --output_dir: a run goes on from the newest checkpoint there", "run.output_dir"),
}  # fmt: skip
PACKED = "rows are packed, and no pair sees another"
UNNEEDED = {
    "bf16": "compute_dtype auto is bfloat16 where hardware has it, and parameters stay float32",
    "fp16": "compute_dtype auto is bfloat16 where hardware has it, else float32",
    "tf32": "compute_dtype says what is computed in",
    "dtype": "param_dtype auto keeps what is trained in float32",
    "torch_dtype": "param_dtype auto keeps what is trained in float32",
    "half_precision_backend": "compute_dtype says what is computed in",
    "attn_implementation": "auto takes the form of attention that is fastest there",
    "use_flash_attention_2": "auto takes the form of attention that is fastest there",
    "use_cache": "training keeps no cache",
    "trust_remote_code": "no code of a model's is run",
    "disable_dropout": "these models have none in training; lora_dropout is its own",
    "gradient_checkpointing_kwargs": "remat says what is computed again",
    "activation_checkpointing_kwargs": "remat says what is computed again",
    "activation_checkpointing": "remat says what is computed again",
    "activation_offloading": "remat: offload does so",
    "use_liger_kernel": "the output head runs in chunks anyway",
    "use_liger_loss": "the output head runs in chunks anyway",
    "liger_kernel_config": "the output head runs in chunks anyway",
    "padding_free": PACKED,
    "packing": PACKED,
    "packing_strategy": PACKED,
    "group_by_length": PACKED,
    "length_column_name": PACKED,
    "pad_to_multiple_of": PACKED,
    "padding_value": PACKED,
    "label_pad_token_id": PACKED,
    "pad_token": PACKED,
    "train_sampling_strategy": "pairs come in the random order that seed decides",
    "shuffle_dataset": "pairs come in the random order that seed decides",
    "full_determinism": "the same seed gives the same run",
    "average_tokens_across_devices": "means are over the whole batch on any number of devices",
    "per_device_eval_batch_size": "evaluation is over pairs, whatever the batch",
    "batch_eval_metrics": "evaluation is over pairs, whatever the batch",
    "precompute_ref_log_probs": "reference log-probs are always computed once and kept",
    "precompute_ref_batch_size": "reference log-probs are always computed once and kept",
    "ref_model_mixup_alpha": "sync_ref_model is false",
    "ref_model_sync_steps": "sync_ref_model is false",
    "f_alpha_divergence_coef": "of divergences only reverse_kl is here",
    "force_use_ref_model": "adapters compare with the model under them",
    "router_aux_loss_coef": "no mixture of experts is here",
    "auto_insert_empty_system_msg": "compat: official puts them in; otherwise the template decides",
    "ln": "the released code does not read it",
    "alpha": "the released code does not read it",
    "trainer_type": "it is what it is translated by",
    "max_completion_length": "of encoder-decoders",
    "max_target_length": "of encoder-decoders",
    "remove_unused_columns": "columns that no objective asks for stay where they are",
    "dataset_text_field": "rows are recognised by their columns (schema)",
    "completion_only_loss": "answers alone are scored",
    "assistant_only_loss": "answers alone are scored",
    "eval_packing": PACKED,
    "dataset_num_proc": "the tokenizer's threads share the work",
    "preprocessing_num_workers": "the tokenizer's threads share the work",
    "dataset_streaming": "data are prepared once, into a store",
    "streaming": "data are prepared once, into a store",
    "truncation_side": "truncation says what stays",
    "ignore_bias_buffers": "of PyTorch's processes",
    "report_to": "metrics.jsonl and the report hold all; --report_to names trackers",
    "run_name": "output_dir names a run",
    "project": "WANDB_PROJECT or TRACKIO_PROJECT says it",
    "logging_dir": "output_dir holds everything",
    "logging_first_step": "every logged update has its line",
    "overwrite_output_dir": "a run goes on from the newest checkpoint; another output_dir begins anew",
    "ignore_data_skip": "a run goes on with the pairs that come next",
    "save_only_model": "a checkpoint is whole; hf/ holds the model alone",
    "hub_strategy": "the model is pushed at the end",
    "hub_always_push": "the model is pushed at the end",
    "hub_model_id": "nothing is pushed",
    "hub_revision": "the main branch",
    "hub_model_revision": "the main branch",
    "hub_private_repo": "as its owner has set",
    "push_to_hub": "nothing is pushed",
    "model_revision": "the main branch",
    **dict.fromkeys(
        ("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "dataset_splits", "dataset_configs", "datasets"),
        "data are named otherwise",
    ),
    "do_train": "the command says it",
    "do_eval": "held-out pairs are scored before and after training",
    "do_predict": "`repo-jax generate` writes answers",
    "prediction_loss_only": "all metrics are computed",
    "metric_for_best_model": "the last one is exported",
    "greater_is_better": "the last one is exported",
    "torch_empty_cache_steps": "of PyTorch's memory",
    "skip_memory_metrics": "peak memory is in metrics.jsonl",
    "label_names": "losses know their columns",
    "local_rank": "of PyTorch's processes",
    "debug": "of PyTorch's processes",
    "disable_tqdm": "a terminal gets a progress bar, a file plain lines",
    "parallelism_config": "the mesh says how",
    "accelerator_config": "the mesh says how",
    "enable_jit_checkpoint": "a run that is told to stop writes a checkpoint",
    "restore_callback_states_from_checkpoint": "there are no callbacks",
    "model_code_revision": "no code of a model's is run",
    "data_seed": "it is seed's",
    "eval_steps": "eval_strategy is not steps",
    "use_weighting": "all pairs count 1",
}  # fmt: skip
# Likewise, by how keys begin.
FAMILIES = {
    "dataloader_": "a thread reads and packs ahead",
    "ddp_": "the mesh says how",
    "fsdp": "the mesh says how",
    "deepspeed": "the mesh says how",
    "torch_compile": "XLA compiles",
    "eval_": "held-out pairs are scored whole",
    "include_": "metrics.jsonl has what there is",
    "log": "nothing of the computation",
    "save_on_": "one copy is written",
    "trackio_": "nothing is sent anywhere",
    "bf16_": "compute_dtype says what is computed in",
    "fp16_": "compute_dtype says what is computed in",
    "bnb_4bit_": "quantised models are not trained here",
    "use_bnb_": "quantised models are not trained here",
    "lora_": "without use_peft all parameters are trained",
}
OF_FAMILIES = {
    *("dataloader_drop_last", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order", "deepspeed"),
    *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend"),
    *("ddp_timeout", "fsdp", "fsdp_config", "fsdp_min_num_params", "fsdp_transformer_layer_cls_to_wrap"),
    *("torch_compile", "torch_compile_backend", "torch_compile_mode", "eval_delay", "eval_on_start"),
    *("eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps", "include_for_metrics"),
    *("include_num_input_tokens_seen", "include_tokens_per_second", "log_on_each_node", "logging_nan_inf_filter"),
    *("log_level", "log_level_replica", "save_on_each_node", "trackio_space_id", "trackio_bucket_id"),
    *("trackio_static_space_id", "bf16_full_eval", "fp16_full_eval", "fp16_opt_level", "fp16_backend"),
    *("bnb_4bit_quant_type", "bnb_4bit_quant_storage", "use_bnb_nested_quant"),
}
KNOWN = {*READ, *ONLY, *UNNEEDED, *OF_FAMILIES, *(key for trainer in TRAINERS.values() for key in trainer.own)}
