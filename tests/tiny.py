"""Tiny random models and tokenizers, made on the spot and the same for a seed.

The weights are large, biases and norms too, so that distributions are far from uniform and nothing
is equal by being zero.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from rlhf_min.policy import Policy

WIDTH, VOCABULARY, POSITIONS = 16, 32, 64
EOS, PAD = 1, 0
WORDS = [a + b for a, b in product("bdfgk", "aeiou")]  # 25 words: "ba be bi bo bu da ..."


@dataclass
class StubTokenizer:
    """For tests in which only the ids of the special tokens matter."""

    eos_token_id: int = EOS
    pad_token_id: int | None = PAD


def seeded(make: Callable[[], PreTrainedModel], seed: int = 0) -> PreTrainedModel:
    """A new float64 model in eval mode; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make().double().eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.2 * torch.randn_like(p))
    return model


def gpt2(seed: int = 0, *, vocabulary: int = VOCABULARY, dropout: float = 0.0) -> PreTrainedModel:
    """Learned positions, and a vocabulary projection tied to the embeddings."""
    return seeded(lambda: GPT2LMHeadModel(gpt2_config(vocabulary, dropout)), seed)


def gpt2_config(vocabulary: int, dropout: float = 0.0) -> GPT2Config:
    return GPT2Config(
        vocab_size=vocabulary,
        n_positions=POSITIONS,
        n_layer=2,
        n_embd=WIDTH,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=EOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


def llama(seed: int = 0, *, vocabulary: int = VOCABULARY, dropout: float = 0.0) -> PreTrainedModel:
    """Rotary positions, grouped keys, and a vocabulary projection of its own."""
    return seeded(
        lambda: LlamaForCausalLM(LlamaConfig(**llama_like(vocabulary), attention_dropout=dropout)),
        seed,
    )


def gemma2(seed: int = 0) -> PreTrainedModel:
    """Caps its logits, here at 3, which its logits really reach."""
    config = Gemma2Config(**llama_like(), head_dim=8, final_logit_softcapping=3.0)
    return seeded(lambda: Gemma2ForCausalLM(config), seed)


def cohere(seed: int = 0) -> PreTrainedModel:
    """Multiplies its logits by 0.25."""
    config = CohereConfig(**llama_like(), logit_scale=0.25)
    return seeded(lambda: CohereForCausalLM(config), seed)


def granite(seed: int = 0) -> PreTrainedModel:
    """Divides its logits by 5."""
    config = GraniteConfig(**llama_like(), logits_scaling=5.0)
    return seeded(lambda: GraniteForCausalLM(config), seed)


def llama_like(vocabulary: int = VOCABULARY) -> dict[str, int]:
    return {
        "vocab_size": vocabulary,
        "max_position_embeddings": POSITIONS,
        "num_hidden_layers": 2,
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "bos_token_id": EOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }


def bert(seed: int = 0, *, dropout: float = 0.0, labels: int = 1) -> PreTrainedModel:
    """A sequence classifier for `bert_words`."""
    return seeded(lambda: BertForSequenceClassification(bert_config(dropout, labels)), seed)


def bert_config(dropout: float = 0.0, labels: int = 1) -> BertConfig:
    config = BertConfig(
        vocab_size=5 + len(WORDS),
        max_position_embeddings=POSITIONS,
        num_hidden_layers=2,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_attention_heads=2,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        pad_token_id=0,
    )
    config.num_labels = labels
    return config


def gpt2_classifier(seed: int = 0) -> PreTrainedModel:
    """A sequence classifier for `words`, without bias in its last layer."""
    config = gpt2_config(3 + len(WORDS))
    config.num_labels = 1
    return seeded(lambda: GPT2ForSequenceClassification(config), seed)


def words(*, pad: str | None = "<pad>") -> PreTrainedTokenizerFast:
    """One id for each word: <pad> 0, <eos> 1, <unk> 2, then `WORDS` from 3."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>", pad_token=pad
    )


def bert_words() -> BertTokenizer:
    """One id for each word: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4, then `WORDS` from 5."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    return BertTokenizer(vocab={token: i for i, token in enumerate(tokens)})


def text(indices: Sequence[int]) -> str:
    """`WORDS` by their numbers, joined to a text."""
    return " ".join(WORDS[i] for i in indices)


def policy(lm: PreTrainedModel, *, critic: str = "none", seed: int = 1) -> Policy:
    """A policy with a stub tokenizer whose critic is random, a separate trunk not a copy."""
    made = Policy(lm, StubTokenizer(), critic=critic)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in made.critic_tensors().values():
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=rng, dtype=tensor.dtype))
    return made


def token_rows(
    lengths: Sequence[int], *, seed: int, vocabulary: int = VOCABULARY, eos: bool = False
) -> list[Tensor]:
    """Rows of random ids without special tokens, or with EOS as their last."""
    rng = torch.Generator().manual_seed(seed)
    rows = [torch.randint(2, vocabulary, (n,), generator=rng) for n in lengths]
    if eos:
        for row in rows:
            row[-1] = EOS
    return rows
