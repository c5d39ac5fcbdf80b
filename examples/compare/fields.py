"""Every option of trl's and what takes its place here: the tables of "Coming from trl".

The defaults are read from both sides' configs. A further stage is an entry of `STAGES` or
`SAMPLED`, one of ``METRICS`` in `names.py` and one in ``tests/tools/record_trl_fields.py``, and its
headings on the page. Like `names.py` this needs the standard library alone.
"""

from typing import NamedTuple


class Field(NamedTuple):
    """Options that do the same, or one side's that has no counterpart.

    Args:
        ours: names of our options, separated by spaces, or "".
        trl: names of trl's, likewise.
        note: in what they differ, or what happens where there is no counterpart.
    """

    ours: str
    trl: str
    note: str = ""


class Stage(NamedTuple):
    """What is told of a stage.

    Args:
        title: in headings.
        config: the name of its config, which is the same on both sides.
        trainer: trl's.
        fields: what its config adds to the shared options, `TRAINER`.
    """

    title: str
    config: str
    trainer: str
    fields: list[Field]


# What several stages share.
_MODEL = [
    Field(
        "model",
        "model_init_kwargs",
        "weights are read in float32 at least, as by trl; no quantisation",
    ),
    Field("", "trust_remote_code", "never: code in a model's folder is not run"),
]
_NO_EXPERTS = Field(
    "",
    "router_aux_loss_coef",
    "no loss balances the experts of a mixture; trl adds it where the model's config says so",
)
_CUT = Field(
    "max_length max_response_tokens",
    "max_length truncation_mode",
    "trl keeps the first `max_length` tokens, and EOS goes with the end; here a prompt loses its "
    "beginning (beyond `max_length` less `max_response_tokens`), a response its end, EOS stays",
)
_EOS = Field("", "eos_token", "that of the tokenizer; set it there")
_TEMPLATE = Field(
    "template",
    "chat_template_path",
    "the tokenizer's own chat template if it has one, else `{prompt}` and a new line; trl takes "
    "texts as they are",
)
_PAD = Field(
    "",
    "pad_token pad_to_multiple_of",
    "the tokenizer's, else EOS; masks come from lengths, so no result depends on padding",
)
_PACKING = (
    "rows lie end to end without padding where the model allows it; no number changes but by "
    "rounding"
)
_TOKENISE = Field("", "dataset_num_proc", "one process tokenises, once, before the first step")
_OFFLOAD = Field(
    "gradient_checkpointing max_tokens",
    "activation_offloading",
    "nothing is moved to the CPU; these two save memory",
)

STAGES = {
    "dpo": Stage(
        "DPO",
        "DPOConfig",
        "DPOTrainer",
        [
            Field("beta", "beta"),
            Field(
                "label_smoothing",
                "label_smoothing",
                "trl's `sigmoid` ignores it; here the loss heeds it, as cDPO",
            ),
            Field(
                "loss length_normalised",
                "loss_type",
                "six of trl's have the same names, three have trainers of their own there; trl's "
                "`ipo` is of means per token, and its `sigmoid_norm` is `sigmoid` so; "
                "[another one](../../rlhf_min/README.md#adding-a-loss) is a function",
            ),
            Field("sft_coef", "loss_weights", 'of `"sft"` beside another loss in trl\'s list'),
            Field("simpo_gamma", "", "in trl of its experimental `CPOTrainer`"),
            Field(
                "",
                "f_divergence_type f_alpha_divergence_coef discopop_tau use_weighting ld_alpha",
                "the reverse KL alone, and no weights of pairs or tokens",
            ),
            Field(
                "cache_reference",
                "precompute_ref_log_probs precompute_ref_batch_size",
                "on: the reference scores all pairs before the first step, by `max_tokens`",
            ),
            Field(
                "",
                "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps",
                "the reference never changes: it is the policy at the start",
            ),
            Field("", "disable_dropout", "dropout is always off in DPO, in attention too"),
            _TEMPLATE._replace(trl=""),
            _CUT,
            Field("", "padding_free", f"automatic: {_PACKING}"),
            _PAD,
            *_MODEL,
            _NO_EXPERTS,
            _TOKENISE,
            _OFFLOAD,
        ],
    ),
    "sft": Stage(
        "SFT",
        "SFTConfig",
        "SFTTrainer",
        [
            Field(
                "",
                "completion_only_loss assistant_only_loss",
                "the loss is always that of the response and EOS; of a conversation, of its last "
                "assistant message",
            ),
            Field("", "loss_type", "one loss, `nll`"),
            _CUT,
            Field(
                "", "packing packing_strategy eval_packing padding_free", f"automatic: {_PACKING}"
            ),
            _PAD,
            _TEMPLATE,
            _EOS,
            Field(
                "columns",
                "dataset_text_field dataset_kwargs",
                "rows are `prompt` and `response` (or `completion`, or `messages`); a single "
                "column of text, without a prompt, is not read",
            ),
            Field("", "shuffle_dataset", "each epoch has a new order anyway, on both sides"),
            *_MODEL,
            _NO_EXPERTS,
            _TOKENISE,
            _OFFLOAD,
        ],
    ),
    "reward": Stage(
        "reward model",
        "RewardConfig",
        "RewardTrainer",
        [
            Field("center_coef", "center_rewards_coefficient"),
            Field("normalise", "", "trl leaves the scores as they were trained"),
            Field(
                "",
                "disable_dropout",
                "dropout is as the model's config says, so on for BERT; trl switches it off",
            ),
            Field(
                "",
                "max_length",
                "as many tokens as the model has positions for, or its tokenizer allows; longer "
                "texts are cut and counted, where trl drops the pair. From Python: "
                "`RewardModel(max_length=...)`",
            ),
            Field(
                "",
                "chat_template_path",
                "prompt and response are joined as the tokenizer joins two texts, messages as "
                "their text; no template",
            ),
            _EOS,
            _PAD,
            Field("reward_model", "model_init_kwargs", _MODEL[0].note),
            _MODEL[1],
            _TOKENISE,
            _OFFLOAD,
        ],
    ),
}

# What GRPO and RLOO share.
_OF_GROUPS = [
    Field("group_size", "num_generations num_generations_eval", "evaluated is one response each"),
    Field(
        "batch_size steps",
        "generation_batch_size steps_per_generation",
        "responses in a rollout, and rollouts; trl's rollout has `per_device_train_batch_size` "
        "times `steps_per_generation` responses, by default those of one optimizer step",
    ),
    Field(
        "minibatch_size",
        "",
        "responses of an optimizer step; trl's are its batch size times accumulation",
    ),
    Field(
        "epochs",
        "num_iterations",
        "passes over a rollout, each in another order; trl's are in one order",
    ),
    Field("clip clip_high", "epsilon epsilon_high"),
    Field("max_new_tokens", "max_completion_length"),
    Field("temperature", "temperature", "of sampling and of all probabilities, on both sides"),
    Field(
        "",
        "top_p top_k min_p repetition_penalty generation_kwargs cache_implementation",
        "drawn is from all of the distribution: its probabilities are those that are learned from",
    ),
    Field("eos_penalty", "", "trl has none; a reward function sees where EOS is missing"),
    Field("stop_kl max_kl", "", "trl ends neither an update nor a run by how far it has moved"),
    Field("adam_eps", "", "the Trainer's `adam_epsilon` is 1e-8"),
    Field(
        "",
        "reward_weights",
        "`--reward` takes several, with weights, and adds them up",
    ),
    Field(
        "",
        "use_vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex "
        "vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout "
        "vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length "
        "vllm_tensor_parallel_size use_transformers_continuous_batching "
        "transformers_continuous_batching_config use_transformers_paged ds3_gather_for_generation",
        "the policy itself samples, with a cache of keys and values",
    ),
    Field(
        "",
        "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps",
        "the reference never changes: it is the policy at the start",
    ),
    Field(
        "",
        "disable_dropout",
        "dropout is always off, in attention too; trl leaves it on, so that a token has another "
        "probability in each pass",
    ),
    Field(
        "template",
        "chat_template_kwargs",
        "texts end as the template says; trl takes them as they are, and messages by the "
        "tokenizer's template",
    ),
    Field("", "shuffle_dataset", "prompts have a new order in each epoch"),
    Field(
        "",
        "log_completions log_multimodal num_completions_to_print log_unique_prompts",
        "samples of each evaluation are in the run's report and in `samples.jsonl`",
    ),
    _PAD._replace(trl="pad_to_multiple_of"),
    *_MODEL,
    _NO_EXPERTS,
]
# Whose runs have no number in common with trl's, since each side samples by itself.
SAMPLED = {
    "grpo": Stage(
        "GRPO",
        "GRPOConfig",
        "GRPOTrainer",
        [
            Field(
                "loss_mean",
                "loss_type",
                "`sequence` is `grpo`, `constant` is `dr_grpo`, `token` is `dapo` (of one rollout "
                "in one step) and `bnpo` (of one micro-batch); no `cispo`, `sapo`, `vespo`, "
                "`luspo`",
            ),
            Field("advantage_scale", "scale_rewards"),
            Field("ratio_level", "importance_sampling_level"),
            Field(
                "kl_coef kl_in kl",
                "beta use_bias_correction_kl",
                "k3 in the loss; trl multiplies it by the ratio unless the latter is off. `kl_in` "
                "and `kl` put another estimate into the reward",
            ),
            Field("mask_cut", "mask_truncated_completions"),
            Field(
                "",
                "delta off_policy_mask_threshold top_entropy_quantile entropy_coef "
                "use_adaptive_entropy entropy_coef_min entropy_coef_max entropy_coef_delta "
                "entropy_target sapo_temperature_neg sapo_temperature_pos vespo_k_pos "
                "vespo_lambda_pos vespo_k_neg vespo_lambda_neg",
                "no second limit of the ratio, no choice of tokens by entropy, no entropy bonus",
            ),
            Field("score_clip", "multi_objective_aggregation", "rewards are summed, then clipped"),
            *_OF_GROUPS,
            Field(
                "",
                "vllm_importance_sampling_correction vllm_importance_sampling_mode "
                "vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min "
                "vllm_importance_sampling_cap cast_lm_head_to_fp32",
                "what samples is what is scored; losses are in float32 at least",
            ),
            Field("", "max_tool_calling_iterations log_completions_hub_repo", "no tools, no Hub"),
        ],
    ),
    "rloo": Stage(
        "RLOO",
        "RLOOConfig",
        "RLOOTrainer",
        [
            Field("kl_coef kl", "beta", "in the reward, as k1 unless `kl` says otherwise"),
            Field(
                "score_clip",
                "reward_clip_range",
                "either way by the same; clipped before the KL is taken off, on both sides",
            ),
            Field("", "normalize_advantages", "advantages are not whitened"),
            Field("", "mask_truncated_completions", "a response that was cut is learned from"),
            *_OF_GROUPS,
        ],
    ),
}

# Those of transformers' Trainer, which all of trl's configs have.
TRAINER = [
    Field(
        "epochs",
        "num_train_epochs max_steps",
        "a run ends after its epochs; for fewer steps take fewer rows (`limit`)",
    ),
    Field(
        "batch_size max_tokens",
        "per_device_train_batch_size gradient_accumulation_steps auto_find_batch_size",
        "`batch_size` rows are one step; `max_tokens` makes micro-batches of them, which change "
        "no number",
    ),
    Field("learning_rate", "learning_rate"),
    Field(
        "schedule",
        "lr_scheduler_type lr_scheduler_kwargs",
        "`constant`, `linear` or `cosine`; trl's `constant` has no warm-up, ours is its "
        "`constant_with_warmup`",
    ),
    Field(
        "warmup_share",
        "warmup_steps",
        "a share of the steps, rounded to the nearest; trl takes a number of steps, or a share "
        "below 1, which it rounds up",
    ),
    Field("weight_decay", "weight_decay", "of matrices, embeddings included, on both sides"),
    Field("max_grad_norm", "max_grad_norm"),
    Field(
        "",
        "optim optim_args optim_target_modules adam_beta1 adam_beta2 adam_epsilon",
        "always torch's AdamW, fused on CPU and CUDA, with betas of 0.9 and 0.999, epsilon 1e-8",
    ),
    Field("", "label_smoothing_factor neftune_noise_alpha", "none of both"),
    Field(
        "seed",
        "seed data_seed full_determinism train_sampling_strategy",
        "the same seed gives the order of trl's default, `random`, in each epoch; the same seed, "
        "machine and threads give the same bits",
    ),
    Field(
        "precision",
        "bf16 fp16 bf16_full_eval fp16_full_eval tf32",
        "trl's `bf16` of None is True unless `fp16` is: autocast, on the CPU too",
    ),
    Field(
        "gradient_checkpointing",
        "gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing "
        "activation_checkpointing_kwargs",
    ),
    Field("device policy_device reward_device threads", "use_cpu"),
    Field(
        "out overwrite",
        "output_dir run_name do_train do_eval do_predict",
        "an existing folder is refused, unless `overwrite`; the last three are for scripts",
    ),
    Field(
        "eval_every heldout_data heldout_share",
        "eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size "
        "eval_accumulation_steps",
        "a tenth of the prompts is held out unless you give other rows; evaluated every so many "
        "steps and after the last",
    ),
    Field(
        "",
        "prediction_loss_only include_for_metrics batch_eval_metrics eval_do_concat_batches "
        "eval_use_gather_object label_names",
        "there is no `compute_metrics`; losses and metrics of held-out rows are those of training",
    ),
    Field(
        "save_every keep_last",
        "save_strategy save_steps save_total_limit save_only_model enable_jit_checkpoint",
        "a checkpoint every five minutes, at the end, and when a signal comes",
    ),
    Field(
        "resume allow_config_change",
        "resume_from_checkpoint ignore_data_skip restore_callback_states_from_checkpoint",
        "a resumed run goes on to the bit",
    ),
    Field("keep_best", "load_best_model_at_end metric_for_best_model greater_is_better"),
    Field(
        "report_to",
        "report_to project trackio_space_id trackio_bucket_id trackio_static_space_id",
        "`tensorboard`, `wandb`, besides the run's own `metrics.jsonl` and `report.html`",
    ),
    Field(
        "",
        "logging_strategy logging_steps logging_first_step logging_nan_inf_filter "
        "include_num_input_tokens_seen log_level log_level_replica disable_tqdm "
        "skip_memory_metrics debug",
        "every step is logged, none averaged with others; a number that is not finite stops the "
        "run",
    ),
    Field(
        "",
        "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push "
        "hub_revision",
        "nothing is uploaded; a saved model is a folder that transformers loads",
    ),
    Field(
        "data split columns limit heldout_split",
        "remove_unused_columns length_column_name",
        "a file, a folder or a name on the Hub, where trl is handed datasets; columns that a stage "
        "has no use for are named in its report",
    ),
    Field(
        "lora_rank lora_alpha lora_targets lora_merge",
        "",
        "trl takes a `peft_config`; adapters are peft's on both sides",
    ),
    Field(
        "skip_preflight",
        "",
        "before its first step a run measures what it relies on: the first loss, dropout, padding, "
        "EOS, memory",
    ),
    Field(
        "",
        "dataloader_drop_last dataloader_num_workers dataloader_pin_memory "
        "dataloader_persistent_workers dataloader_prefetch_factor "
        "dataloader_multiprocessing_context dataloader_in_order",
        "rows are ids in memory, and no process loads them; the last, smaller batch of an epoch is "
        "a step, as in trl",
    ),
    Field(
        "plain",
        "torch_compile torch_compile_backend torch_compile_mode use_liger_kernel "
        "liger_kernel_config use_cache torch_empty_cache_steps",
        "nothing is compiled; what is fast is in `speed/`, and `plain` leaves it out",
    ),
    Field(
        "shard",
        "local_rank average_tokens_across_devices accelerator_config parallelism_config deepspeed "
        "fsdp fsdp_config ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers "
        "ddp_static_graph ddp_backend ddp_timeout log_on_each_node save_on_each_node",
        "`torchrun` shares the work, `shard` splits the model",
    ),
]
