"""Floating-point operations that a workload needs, however it is computed.

Of each row of n tokens, a layer with hidden size H and inner size F needs, in the forward pass,

    2 n (4 H H + 2 H F)    for its matrix products: 2 for each weight and token
    4 H k                  for attention, k pairs of a query and a key: n (n + 1) / 2 where a token
                           sees only those before it (GPT-2), n n otherwise (BERT)

and the vocabulary head 2 H V for each token that is predicted: the response's, no prompt's. The
backward pass needs twice as much. Padding counts nothing, nor does what a side computes more than
once. Heads with one output and BERT's pooler are left out: less than one part in a thousand.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from benchmark.models import BERT_SPECIAL_TOKENS, Size

TRAINED = 3  # forward and backward, in forward passes
Lengths = Iterable[tuple[int, int]]  # tokens of prompt and response, row by row


@dataclass(frozen=True)
class Flops:
    """Of the layers, and of the vocabulary head."""

    trunk: float = 0.0
    head: float = 0.0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.trunk + other.trunk, self.head + other.head)

    def __rmul__(self, times: float) -> "Flops":
        return Flops(times * self.trunk, times * self.head)

    def seconds(self, rates: dict[str, float]) -> float:
        """How long matrix products alone would take at these FLOP/s."""
        parts = {"trunk": self.trunk, "head": self.head}
        return sum(flops / rates[part] for part, flops in parts.items() if flops)


@dataclass(frozen=True)
class Shape:
    """What the count depends on. `vocabulary` is 0 for a model that predicts no tokens."""

    hidden: int
    layers: int
    inner: int
    vocabulary: int
    causal: bool

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """Of a GPT-2 language model or a BERT."""
        causal = config.model_type == "gpt2"
        inner = (config.n_inner or 4 * config.n_embd) if causal else config.intermediate_size
        return cls(
            config.hidden_size,
            config.num_hidden_layers,
            inner,
            config.vocab_size if causal else 0,
            causal,
        )

    def trunk(self, tokens: int) -> Flops:
        """Forward pass of the layers over one row."""
        pairs = tokens * (tokens + 1) / 2 if self.causal else tokens**2
        weights = 4 * self.hidden**2 + 2 * self.hidden * self.inner
        return Flops(trunk=self.layers * (2 * tokens * weights + 4 * self.hidden * pairs))

    def head(self, tokens: int) -> Flops:
        """Forward pass of the vocabulary head over the tokens that are predicted."""
        return Flops(head=2 * tokens * self.hidden * self.vocabulary)


def forward(shape: Shape, lengths: Lengths) -> Flops:
    """One forward pass over all rows."""
    return sum((shape.trunk(p + r) + shape.head(r) for p, r in lengths), Flops())


def useful(workload: str, size: Size, lengths: Lengths, *, own_critic: bool) -> dict[str, Flops]:
    """FLOPs of one round: of ``all``, and in PPO of the ``update`` alone.

    PPO: the tokens pass the policy once in sampling, with its log-probabilities, once through the
    reference, once through the reward model, and `Size.epochs` times through the update.

    DPO: policy and reference over both rows of each pair, the prompt in both.

    Args:
        own_critic: whether PPO's values have a GPT-2 of their own and its reward model is one too,
            as in trl 1.12; otherwise they are read off the policy, and the reward model is a BERT.
    """
    lm, bert = Shape.of(size.gpt2_config()), Shape.of(size.bert_config())
    lengths = list(lengths)
    if workload == "reward":
        return {"all": TRAINED * forward(bert, lengths)}
    once = forward(lm, lengths)
    if workload == "dpo":
        return {"all": (TRAINED + 1) * once}
    if workload == "sampling":
        return {"all": once}
    update = TRAINED * size.epochs * once
    scores = forward(bert, [(p, r + BERT_SPECIAL_TOKENS) for p, r in lengths])
    if own_critic:
        trunks = Flops(trunk=once.trunk)
        update += TRAINED * size.epochs * trunks
        scores = trunks + trunks  # of which one is the values
    return {"all": once + once + scores + update, "update": update}
