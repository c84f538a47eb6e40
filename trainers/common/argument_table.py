"""What becomes of each argument of transformers in the trainers here: one decision for every name.

`Trainer` computes no loss and collects no predictions of its own here, so some of its arguments would be taken and
never read; these are refused. The others hold. Those that change what a run learns are kept in its checkpoints, so
that a resumed run can tell what has changed (see `resumed_arguments`).
"""

# Refused unless left at the default, and why.
_NO_PREDICTIONS = "an evaluation collects losses, no predictions"
_LIGER = "its kernels replace causal models and their losses, and the loss here is the objective's own"
REFUSED = {
    "label_smoothing_factor": "the loss is the objective's own, over the answer's tokens as they are",
    "use_liger_kernel": _LIGER,
    "liger_kernel_config": _LIGER,
    "eval_do_concat_batches": _NO_PREDICTIONS,
    "include_for_metrics": _NO_PREDICTIONS,
    "batch_eval_metrics": _NO_PREDICTIONS,
}

# Hold, and change what is learnt.
COURSE = frozenset(
    [
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "auto_find_batch_size",
        "num_train_epochs",
        "max_steps",
        "learning_rate",
        "lr_scheduler_type",
        "lr_scheduler_kwargs",
        "warmup_steps",
        "optim",
        "optim_args",
        "optim_target_modules",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "max_grad_norm",
        "neftune_noise_alpha",
        "bf16",
        "fp16",
        "seed",
        "data_seed",
        "accelerator_config",
        "dataloader_drop_last",
        "train_sampling_strategy",
    ]
)

# Hold, and change how a run is computed, watched and kept, or belong to the script that starts it.
FREE = frozenset(
    [
        "output_dir",
        "do_train",
        "do_eval",
        "do_predict",
        "resume_from_checkpoint",
        "local_rank",
        "debug",
        "skip_memory_metrics",
        "tf32",
        "use_cpu",
        "bf16_full_eval",
        "fp16_full_eval",
        "full_determinism",
        "use_cache",
        "torch_empty_cache_steps",
        "activation_checkpointing",
        "activation_checkpointing_kwargs",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "torch_compile",
        "torch_compile_backend",
        "torch_compile_mode",
        "logging_strategy",
        "logging_steps",
        "logging_first_step",
        "log_on_each_node",
        "log_level",
        "log_level_replica",
        "disable_tqdm",
        "include_num_input_tokens_seen",
        "report_to",
        "run_name",
        "project",
        "trackio_space_id",
        "trackio_bucket_id",
        "trackio_static_space_id",
        "eval_strategy",
        "eval_steps",
        "eval_delay",
        "eval_on_start",
        "per_device_eval_batch_size",
        "eval_accumulation_steps",
        "eval_use_gather_object",
        "load_best_model_at_end",
        "metric_for_best_model",
        "greater_is_better",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "save_only_model",
        "save_on_each_node",
        "enable_jit_checkpoint",
        "ignore_data_skip",
        "restore_callback_states_from_checkpoint",
        "push_to_hub",
        "hub_model_id",
        "hub_strategy",
        "hub_token",
        "hub_private_repo",
        "hub_always_push",
        "hub_revision",
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_persistent_workers",
        "dataloader_prefetch_factor",
        "dataloader_multiprocessing_context",
        "dataloader_in_order",
        "length_column_name",
        "ddp_find_unused_parameters",
        "ddp_bucket_cap_mb",
        "ddp_broadcast_buffers",
        "ddp_static_graph",
        "ddp_backend",
        "ddp_timeout",
        "fsdp",
        "fsdp_config",
        "deepspeed",
    ]
)

# Allowed some values, which say what happens anyway.
#   average_tokens_across_devices: each micro-batch's loss is a mean, over no tokens of other devices
#   logging_nan_inf_filter: a loss that is not finite ends the run
#   prediction_loss_only: always so
#   label_names: the batches have `labels` alone (PEFT's users are told to say so)
#   remove_unused_columns: refused by the configs, with the reason
#   parallelism_config: canvases are not split along their positions
LIMITED = frozenset(
    [
        "average_tokens_across_devices",
        "logging_nan_inf_filter",
        "prediction_loss_only",
        "label_names",
        "remove_unused_columns",
        "parallelism_config",
    ]
)

# Parameters of `Trainer` itself: refused, and what to do instead.
REFUSED_PARAMETERS = {
    "model_init": "mask token, adapter and canvases are read off a model. Pass `model`",
    "compute_loss_func": "the loss is the objective's own. Override `compute_loss` in a subclass",
    "compute_metrics": f"{_NO_PREDICTIONS}. Override `evaluate` in a subclass, or decode: `eval_generate_samples` of "
    "distillation does",
    "preprocess_logits_for_metrics": f"{_NO_PREDICTIONS}. Override `evaluate` in a subclass",
}
HELD_PARAMETERS = frozenset(
    [
        "model",
        "args",
        "data_collator",
        "train_dataset",
        "eval_dataset",
        "processing_class",
        "callbacks",
        "optimizers",
        "optimizer_cls_and_kwargs",
    ]
)
