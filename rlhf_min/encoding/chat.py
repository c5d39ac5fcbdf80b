"""Chat templates: the text that a tokenizer's own makes of messages, and whether that is sound.

A template is a program that comes with the model. We check what it writes: first for messages of
our own, then for those of each row.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from ..errors import require
from .conversation import Conversation
from .cuts import Unencodable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, str]]

# What a template can raise.
_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TemplateError,
    TypeError,
    ValueError,
)

_USER = {"role": "user", "content": "Which river is 7 km long?"}
_ASSISTANT = {"role": "assistant", "content": "None that is known, it seems."}


class Refused(ValueError):
    """A chat template raised; the message is its reason."""


def render_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> tuple[str, bool]:
    """What the chat template makes of a prompt, and whether each message stands in it as it is.

    Raises:
        Unencodable: if the template does not take the prompt.
    """
    messages: Messages = [{"role": "user", "content": prompt}]
    if isinstance(prompt, Conversation):
        messages = prompt.messages
    try:
        rendered = render(tokenizer, messages)
    except Refused as refusal:
        raise Unencodable(
            "the tokenizer's chat template does not take the prompt",
            prompt,
            "change this prompt, or give a template with {prompt}",
            why=str(refusal),
        ) from refusal
    return rendered, contains(rendered, messages)


def render(tokenizer: "PreTrainedTokenizerBase", messages: Messages) -> str:
    """The text of the messages, up to where the response begins.

    If the last message is the assistant's, the response continues it.

    Raises:
        Refused: if the template does not take these messages.
    """
    begun = messages[-1]["role"] == "assistant"
    return _render(tokenizer, messages, add_generation_prompt=not begun, continue_last=begun)


def _render(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Messages,
    *,
    add_generation_prompt: bool,
    continue_last: bool = False,
) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_last,
            )
        )
    except _ERRORS as error:
        raise Refused(" ".join(str(error).split())) from error


def contains(rendered: str, messages: Messages) -> bool:
    """Whether each message stands in the text as it is, outer white space aside.

    >>> contains("<user> Hi <end>", [{"role": "system", "content": "Be brief."}])
    False
    """
    return all(message["content"].strip() in rendered for message in messages)


def require_content(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise `BadInput` if the chat template does not write what the user says.

    Changed case and white space pass here; `contains` finds them in the rows.
    """
    try:
        rendered = render(tokenizer, [_USER])
    except Refused:
        return  # it may still take the rows
    require(
        _letters(_USER["content"]) in _letters(rendered),
        f"the tokenizer's chat template leaves out what the user says: of {_USER['content']!r} it "
        f"makes {rendered[:80]!r}; correct the template, or give --template with {{prompt}}",
    )


def surprises(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """What may surprise somebody who trains with this chat template, a line for each."""
    found = []
    if "strftime_now" in tokenizer.get_chat_template():
        found.append(
            "the chat template writes today's date: on another day the prompts are others, and a "
            "run cannot be resumed; put a fixed date into the template"
        )
    try:
        begun = render(tokenizer, [_USER])
        whole = _render(tokenizer, [_USER, _ASSISTANT], add_generation_prompt=False)
    except Refused:
        return found
    before, said, after = whole.partition(_ASSISTANT["content"])
    if said and before.rstrip() != begun.rstrip():
        found.append(
            f"the chat template begins a response with {_end(begun)!r}, but an assistant's turn in "
            f"a conversation with {_end(before)!r}; responses are trained and sampled after the "
            "first"
        )
    if said and not after.strip().startswith(str(tokenizer.eos_token)):
        found.append(
            f"the chat template ends an assistant's turn with {after[:20]!r}, but a response ends "
            f"with EOS, {tokenizer.eos_token!r}"
        )
    return found


def _letters(text: str) -> str:
    return "".join(text.split()).casefold()


def _end(text: str) -> str:
    return text.partition(_USER["content"])[2][-40:]
