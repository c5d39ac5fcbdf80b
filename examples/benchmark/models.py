"""Models and tokenizers of the benchmark: full-size vocabularies, random weights, no dropout.

Imports nothing but torch, tokenizers and transformers, of any version that a side may have.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from benchmark import settings

PAD_ID, FIRST_WORD = 0, 10  # below it only pad and, for BERT, its other special tokens
BERT_SPECIAL_TOKENS = 3  # [CLS] prompt [SEP] response [SEP]
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
NO_BERT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclass(frozen=True)
class Size:
    """Models and batch of one ``--size``; empty configs are the defaults: 124M and BERT-base."""

    gpt2: dict[str, Any]
    bert: dict[str, Any]
    prompts: int
    pairs: int
    prompt_tokens: tuple[int, int] = (16, 32)  # of PPO and sampling, from the shortest on
    response_tokens: tuple[int, int] = (16, 48)
    epochs: int = 4  # of PPO over one rollout

    @property
    def max_new_tokens(self) -> int:
        """Of the longest response."""
        return self.response_tokens[1]

    def gpt2_config(self) -> GPT2Config:
        """Of language models and classifiers; its last id is EOS, as in GPT-2's vocabulary."""
        told = {**self.gpt2, **NO_DROPOUT, "pad_token_id": PAD_ID, "num_labels": 1}
        config = GPT2Config(**told)
        config.bos_token_id = config.eos_token_id = config.vocab_size - 1
        return config

    def bert_config(self) -> BertConfig:
        """Of the reward model."""
        told = {**self.bert, **NO_BERT_DROPOUT, "pad_token_id": PAD_ID, "num_labels": 1}
        return BertConfig(**told)


TINY_GPT2 = {"vocab_size": 211, "n_embd": 32, "n_layer": 2, "n_head": 2}
TINY_BERT = {
    "vocab_size": 199,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
SIZES = {
    "tiny": Size(TINY_GPT2, TINY_BERT, prompts=8, pairs=4),
    "small": Size({}, {}, prompts=16, pairs=8),
    "medium": Size({"n_embd": 1024, "n_layer": 24, "n_head": 16}, {}, prompts=8, pairs=4),
}
# What `benchmark.scaling` changes in a size, by the name that it adds to the size's.
CHANGES: dict[str, dict[str, Any]] = {
    "": {},
    "short": {"epochs": 1},
    "128 prompts": {"epochs": 1, "prompts": 128},
    "32 tokens": {"epochs": 1, "prompt_tokens": (16, 16), "response_tokens": (16, 16)},
    "256 tokens": {"epochs": 1, "prompt_tokens": (128, 128), "response_tokens": (128, 128)},
}


def size_of(name: str) -> Size:
    """One of `SIZES`, or one with a change, like ``"small 128 prompts"``."""
    base, _, change = name.partition(" ")
    return replace(SIZES[base], **CHANGES[change])


def save_models(size: Size, folder: Path) -> None:
    """Random weights of all models, drawn once: ``lm``, ``classifier`` (a GPT-2) and ``bert``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.SEED)
        lm = GPT2LMHeadModel(size.gpt2_config())
        classifier = GPT2ForSequenceClassification(size.gpt2_config())
        bert = BertForSequenceClassification(size.bert_config())
    with torch.no_grad():  # trl knows no token types, so the two types start alike
        types = bert.bert.embeddings.token_type_embeddings.weight
        types.copy_(types[:1].expand_as(types))
    for name, model in {"lm": lm, "classifier": classifier, "bert": bert}.items():
        model.save_pretrained(folder / name)


def policy_tokenizer(size: Size) -> PreTrainedTokenizerFast:
    """GPT-2's full vocabulary as words: ``w17`` is id 17, ``<end>`` the last id."""
    vocabulary = size.gpt2_config().vocab_size
    words = {"<pad>": PAD_ID, "<end>": vocabulary - 1}
    made = _word_level(words, vocabulary, unknown="<pad>")
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<pad>")


def bert_tokenizer(size: Size) -> PreTrainedTokenizerFast:
    """The same words in BERT's vocabulary, with ``[CLS] text [SEP]`` and ``[CLS] a [SEP] b [SEP]``
    around texts and pairs."""
    words = {"[PAD]": PAD_ID, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3}
    made = _word_level(words, size.bert_config().vocab_size, unknown="[UNK]")
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


def _word_level(words: dict[str, int], vocabulary: int, *, unknown: str) -> Tokenizer:
    taken = set(words.values())
    words |= {f"w{i}": i for i in range(vocabulary) if i not in taken}
    made = Tokenizer(models.WordLevel(words, unk_token=unknown))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made
