"""Small tokenizers made on the spot, the same in every process."""

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import BertTokenizer, GPT2Tokenizer

from rlhf_min.errors import require

END, PAD = "<|endoftext|>", "<|pad|>"
BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def train_bpe(texts: Iterable[str], vocab_size: int) -> GPT2Tokenizer:
    """Train a byte-level BPE. All 256 bytes are in it, so no text is ever unknown.

    Args:
        texts: any texts.
        vocab_size: at most so many tokens, at least 258; fewer if the texts have no more merges.

    Returns:
        A GPT-2 tokenizer with eos `<|endoftext|>` (id 0) and pad `<|pad|>` (id 1).
    """
    require(
        vocab_size >= 258, f"vocab_size is {vocab_size}: 256 bytes and 2 special tokens need 258"
    )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    model = json.loads(bpe.to_str())["model"]
    merges: list[Any] = [tuple(merge) for merge in model["merges"]]
    return GPT2Tokenizer(
        vocab=model["vocab"], merges=merges, eos_token=END, bos_token=END, pad_token=PAD
    )


def build_wordpiece(texts: Iterable[str], vocab_size: int) -> BertTokenizer:
    """Build a WordPiece vocabulary by rule: `WordPieceTrainer` gives another one in every process.

    The order is: special tokens, characters, their `##` forms, then words by falling count and
    then alphabetically, all cut at `vocab_size`. Text is lower-cased.

    Args:
        texts: any texts.
        vocab_size: at most so many tokens; room for the characters matters most, as a word with a
            character that is not in the vocabulary becomes `[UNK]`.
    """
    require(vocab_size > len(BERT_SPECIALS), f"vocab_size is {vocab_size}: too small for any word")
    splitter = BertTokenizer().backend_tokenizer
    counts: Counter[str] = Counter()
    for text in texts:
        plain = splitter.normalizer.normalize_str(text)
        counts.update(word for word, _ in splitter.pre_tokenizer.pre_tokenize_str(plain))
    characters: Counter[str] = Counter()
    for word, n in counts.items():
        characters.update({c: n * word.count(c) for c in set(word)})
    ranked = _by_count(characters)
    tokens = [*BERT_SPECIALS, *ranked, *(f"##{c}" for c in ranked), *_by_count(counts)]
    vocab = {token: i for i, token in enumerate(list(dict.fromkeys(tokens))[:vocab_size])}
    return BertTokenizer(vocab=vocab)


def _by_count(counts: Counter[str]) -> list[str]:
    return sorted(counts, key=lambda item: (-counts[item], item))
