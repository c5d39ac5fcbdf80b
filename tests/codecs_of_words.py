"""Codecs of small tokenizers, with and without a chat template, for tests of encoding."""

from small import syllables
from tokenizers.processors import TemplateProcessing

from rlhf_min.encoding.codec import Codec


def word_codec(prompt: int = 8, response: int = 8, template: str = "{prompt}\n") -> Codec:
    return Codec(
        syllables(), max_prompt_tokens=prompt, max_response_tokens=response, template=template
    )


TALK = [
    {"role": "user", "content": "ba be"},
    {"role": "assistant", "content": "bi"},
    {"role": "user", "content": "bo"},
]

CHATML = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
# <pad> 0, <eos> 1, <unk> 2, ba 3, be 4, bi 5, bo 6, bu 7, the special tokens of the chat from 28
SPECIALS = ["<user>", "<assistant>", "<system>", "<end>", "<s>"]
USER, ASSISTANT, SYSTEM, END, BOS = range(28, 33)


def chat_words(*, bos: bool = False, template: str | None = CHATML):
    """`words` with a chat template; with `bos` it starts every text with <s>, as Llama's does."""
    tokenizer = syllables()
    tokenizer.add_special_tokens({"extra_special_tokens": SPECIALS})
    tokenizer.bos_token = "<s>"
    if bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    tokenizer.chat_template = template
    assert tokenizer("ba").input_ids == ([BOS, 3] if bos else [3])
    return tokenizer


def chat_codec(
    prompt: int = 20, template: str = "chat", chat_template: str = CHATML, **how
) -> Codec:
    return Codec(chat_words(template=chat_template, **how), prompt, 8, template)
