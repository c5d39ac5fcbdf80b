"""Tiny models for a new start: a GPT-2 policy and a BERT reward model, the same for a seed."""

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerBase,
)

# So narrow a model hardly starts to learn from the usual 0.02; of the values tried these were best.
GPT2_INIT = 0.06
BERT_INIT = 0.11
QUIET = 1 / 6  # of BERT's first position and token type embeddings; without it, it learns late


def small_gpt2(tokenizer: PreTrainedTokenizerBase, *, positions: int, seed: int) -> GPT2LMHeadModel:
    """A new GPT-2 with 2 layers of width 128.

    Args:
        tokenizer: gives the vocabulary and the ids of the special tokens.
        positions: longest prompt plus response, in tokens.
        seed: of the weights; the global generators are left as they were.
    """
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=positions,
        n_layer=2,
        n_embd=128,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=GPT2_INIT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config.small_world = True  # trained with rates that would ruin a pretrained model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


def small_bert(
    tokenizer: PreTrainedTokenizerBase, *, positions: int, seed: int
) -> BertForSequenceClassification:
    """A new BERT with 2 layers of width 128 and one output, the score; arguments as above.

    `positions` counts the tokens of prompt and response together with [CLS] and two [SEP].
    """
    config = BertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=positions,
        num_hidden_layers=2,
        hidden_size=128,
        num_attention_heads=4,
        intermediate_size=512,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=BERT_INIT,
        pad_token_id=tokenizer.pad_token_id,
    )
    config.num_labels = 1
    config.small_world = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertForSequenceClassification(config)
    with torch.no_grad():
        model.bert.embeddings.position_embeddings.weight.mul_(QUIET)
        model.bert.embeddings.token_type_embeddings.weight.mul_(QUIET)
    return model
