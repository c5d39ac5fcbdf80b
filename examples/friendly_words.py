"""A reward that anyone can check by hand: the share of a response's words that are on a list.

python examples/train_ppo.py --reward examples/friendly_words.py:friendliness
"""

import re
from collections.abc import Sequence

FRIENDLY = frozenset(
    "you your help happy please great thank thanks sure glad welcome love enjoy hope".split()
)


def friendliness(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Ten times the share of friendly words; 0 for a response without words.

    >>> friendliness(["Hi"], ["I am happy to help you."])  # 3 of 6
    [5.0]
    """
    shares = []
    for _, response in zip(prompts, responses, strict=True):
        words = re.findall(r"[a-z']+", response.lower())
        shares.append(10 * sum(word in FRIENDLY for word in words) / max(1, len(words)))
    return shares
