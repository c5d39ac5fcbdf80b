"""The models that a command starts from: those that its options name, or small new ones."""

from collections.abc import Sequence

import torch
from transformers.utils import logging as transformers_logging

from rlhf_min import distributed
from rlhf_min.encoding.codec import Codec
from rlhf_min.encoding.template import CHAT
from rlhf_min.errors import require
from rlhf_min.harness.cli import RunOptions
from rlhf_min.loading.adapters import LoRA
from rlhf_min.policy import Critic, Policy
from rlhf_min.reward_model import RewardModel
from rlhf_min.world import build_wordpiece, small_bert, small_gpt2, train_bpe

VOCABULARY = 4000  # at most; of the tokenizers of small new models


def make_codec(policy: Policy, options: RunOptions) -> Codec:
    """The codec of a policy, within the room that the options give.

    The template is written into the model's config, so that whoever loads the model later uses the
    one that it was trained with.
    """
    has_chat = getattr(policy.tokenizer, "chat_template", None)
    template = getattr(policy.lm.config, "prompt_template", CHAT if has_chat else "{prompt}\n")
    if options.template is not None:
        template = options.template.replace("\\n", "\n")
    policy.lm.config.prompt_template = template
    return Codec(
        policy.tokenizer,
        max_prompt_tokens=options.max_prompt_tokens,
        max_response_tokens=options.max_response_tokens,
        template=template,
    )


def start_policy(
    options: RunOptions, texts: Sequence[str], *, critic: Critic, seed: int, trained: bool = True
) -> Policy:
    """The policy that ``--model`` names, or a small new GPT-2 with a tokenizer for these texts.

    Args:
        trained: if it is not, it needs no adapter.

    Raises:
        BadInput: if the model cannot be loaded or has too few positions.
    """
    _prepare(options)
    if options.model is None:
        tokenizer = train_bpe(texts, VOCABULARY)
        lm = small_gpt2(tokenizer, positions=options.max_length, seed=seed)
        policy = Policy(lm, tokenizer, critic=critic, plain=options.plain)
    else:
        policy = Policy.from_pretrained(
            options.model,
            critic=critic,
            new_head=True,
            plain=options.plain,
            lora=_lora(options, seed) if trained else None,
        )
        if policy.value_head is not None and not policy.value_head.weight.any():
            print(f"{options.model} has no value head; a new one starts at zero")
        require(
            options.max_length <= policy.positions,
            f"--model {options.model} has {policy.positions} positions; --max_length "
            f"{options.max_length} does not fit, lower it",
        )
    if options.gradient_checkpointing:
        policy.checkpoint_gradients()
    return policy.to(options.torch_device("policy_device"))


def start_reward_model(options: RunOptions, texts: Sequence[str], *, seed: int) -> RewardModel:
    """The classifier that ``--reward_model`` names, or a small new BERT for these texts.

    Its head may be new, so this is for training only.
    """
    _prepare(options)
    if options.reward_model is None:
        tokenizer = build_wordpiece(texts, VOCABULARY)
        # Its own tokens may be shorter than the policy's, so it gets more of them.
        positions = 2 * options.max_length
        model = small_bert(tokenizer, positions=positions, seed=seed)
        reward_model = RewardModel(model, tokenizer, plain=options.plain)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            reward_model = RewardModel.from_pretrained(
                options.reward_model,
                new_head=True,
                plain=options.plain,
                lora=_lora(options, seed),
            )
        if reward_model.new_weights:
            print(f"{options.reward_model} has no trained head; {reward_model.new_weights} are new")
    if options.gradient_checkpointing:
        reward_model.checkpoint_gradients()
    return reward_model.to(options.torch_device("reward_device"))


def _lora(options: RunOptions, seed: int) -> LoRA | None:
    if options.lora_rank is None:
        return None
    return LoRA(
        options.lora_rank,
        alpha=options.lora_alpha,
        targets=options.lora_targets,
        merge=options.lora_merge,
        seed=seed,
    )


def _prepare(options: RunOptions) -> None:
    """What must be so before a model is read: threads, devices that are there, a quiet library,
    and whether what is trained will be split.

    Raises:
        BadInput: if a device is not there.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    options.torch_device("policy_device")
    options.torch_device("reward_device")
    if options.shard:
        distributed.shard_models()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
