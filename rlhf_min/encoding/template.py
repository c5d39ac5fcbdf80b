"""What a template of prompts may be: a text with {prompt} in it, or the word chat or as_is."""

import re

from ..errors import require

CHAT = "chat"  # the chat template of the tokenizer
AS_IS = "as_is"  # nothing is added: for texts that went through a template before

SURROGATE = re.compile("[\ud800-\udfff]")  # half of a pair, which alone is no text


def require_template(template: str) -> None:
    """Raise `BadInput` unless a `Codec` could take this template."""
    require(
        template in (CHAT, AS_IS) or str(template).count("{prompt}") == 1,
        f"template {template!r} must hold {{prompt}} exactly once",
    )
    require(
        not SURROGATE.search(template),
        f"template {template!r} holds half of a surrogate pair, which is no text; write it anew",
    )
