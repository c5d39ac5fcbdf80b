"""The reward model: a classifier that scores a prompt with its response, as texts."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from . import distributed
from .data import micro_batches
from .encoding.cuts import CutReport
from .encoding.pairs import PairCodec, TextPair
from .errors import require
from .loading import checks
from .loading.adapters import LoRA
from .loading.models import Reading, label_number, load_classifier
from .logprobs import at_least_float32, label_logprob
from .policy import evaluating
from .speed.fast import checkpoint_layers, speed_up
from .speed.sharding import missing_passes

SCORED_TOKENS = 16384  # padded tokens of scores that are computed at once; memory only
SIMILAR_TOKENS = 512  # of the rows of similar length that a reward model takes at once


class RewardModel(nn.Module):
    """A sequence classifier that scores text, with a tokenizer of its own.

    The score is what a classifier of one label gives. Of one with several it is the log-probability
    of the `label`, as `label_logprob` has it: (2) if the config's ``problem_type`` is
    ``multi_label_classification``, else (1). Such a classifier judges one text, so prompt and
    response are one there, see `PairCodec`.

    The score of a text does not depend on the others in its batch. The last layer is computed in at
    least float32, also under autocast: between 2 and 4, bfloat16 has only 128 numbers.

    Args:
        model: any ``AutoModelForSequenceClassification``, such as BERT.
        tokenizer: the model's own; the policy's may be another. It is copied, not changed.
        max_length: tokens of prompt and response together, special tokens included. If they are too
            long, the response loses its end, and then the prompt its beginning.
        label: the name of the label whose log-probability is the score.
        plain: compute as a textbook does, and slower. The scores are the same up to rounding.

    Raises:
        BadInput: if label, tokenizer or `max_length` do not fit, or padding changes the scores.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None = None,
        label: str | None = None,
        plain: bool = False,
    ) -> None:
        super().__init__()
        if label is None:
            require(model.config.num_labels == 1, "a reward model needs one label, or its name")
            self.label = None
        else:
            self.label = label_number(model.config, label, type(model).__name__)
        tokenizer = checks.scoring_tokenizer(model, tokenizer, max_length)
        if not plain:
            speed_up(model)
        self.model, self.tokenizer, self.plain = model, tokenizer, plain
        self.max_length = tokenizer.model_max_length
        self.codec = PairCodec(tokenizer, self.max_length, one_text=label is not None)
        self.cuts = CutReport()  # of all texts that were scored
        self.new_weights: list[str] = []  # drawn at random when it was loaded
        self.rescaled = False  # since it was loaded
        self._last_layer.register_forward_hook(_linear_in_float32)
        with evaluating(self):
            texts = self.codec.encode(["What?"] * 2, ["This. " * 9, "This."])[0]
            checks.choose_padding_side(
                model, tokenizer, self._last_layer, lambda part: self.forward_pairs(texts[part])
            )

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return self.model.device

    def forward(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """Scores with gradient. Shape ``(B,)``, in at least float32."""
        return self.forward_pairs(self.codec.encode(prompts, responses)[0])

    def forward_pairs(self, pairs: Sequence[TextPair]) -> Tensor:
        """The same for texts that are encoded already."""
        if not pairs:
            return torch.zeros(0, dtype=torch.float32, device=self.device)
        if self.plain:
            return self._scores(pairs)
        # Rows of similar length pass together, so that little of the work is padding.
        groups = micro_batches([len(pair.ids) for pair in pairs], max_tokens=SIMILAR_TOKENS)
        missing = missing_passes(self, len(groups))
        parts = [self._scores([pairs[i] for i in rows]) for rows in groups]
        for _ in range(missing):
            parts[0] = parts[0] + 0 * self._scores(pairs[:1])
        order = torch.tensor([i for rows in groups for i in rows])
        return torch.cat(parts)[order.argsort().to(self.device)]

    def _scores(self, pairs: Sequence[TextPair]) -> Tensor:
        inputs = self.pad(pairs).to(self.device)
        logits = at_least_float32(self.model(**inputs).logits)  # (B, K)
        if self.label is None:
            return logits[:, 0]
        several = self.model.config.problem_type == "multi_label_classification"
        return label_logprob(logits, self.label, one_of_them=not several)

    def encode(self, prompts: Sequence[str], responses: Sequence[str]) -> BatchEncoding:
        """Prompts and responses as one padded batch of the classifier's inputs."""
        return self.pad(self.codec.encode(prompts, responses)[0])

    def pad(self, pairs: Sequence[TextPair]) -> BatchEncoding:
        """Encoded texts as one padded batch of the classifier's inputs."""
        # Where a model has no embeddings for types, as GPT-2, it would add those of two words.
        types = getattr(self.model.config, "type_vocab_size", 0) > 1
        return self.codec.pad(pairs, side=self.tokenizer.padding_side, types=types)

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """Scores without gradient and dropout, on the CPU. Shape ``(B,)``.

        Args:
            prompts: texts, before any template or cut.
            responses: texts, without special tokens.

        What does not fit is counted in `cuts`.
        """
        pairs, report = self.codec.encode(prompts, responses)
        self.cuts.add(report)
        scores = torch.empty(len(pairs), dtype=torch.float64)
        lengths = [len(pair.ids) for pair in pairs]
        groups = micro_batches(lengths, max_tokens=SCORED_TOKENS, among=distributed.size())
        with evaluating(self):
            found = distributed.deal(
                lambda rows: self.forward_pairs([pairs[i] for i in rows]), groups
            )
        for rows, part in zip(groups, found, strict=True):
            scores[rows] = part.cpu().double()
        return scores

    score.everywhere = True  # type: ignore[attr-defined]  # see `call_reward`

    def checkpoint_gradients(self) -> None:
        """Keep only the layers' inputs for backward, and compute the rest again there."""
        checkpoint_layers(self.model)
        self.model.config.use_cache = False  # which excludes it, and a score needs none

    @torch.no_grad()
    def rescale(self, *, gain: float, bias: float) -> None:
        """Replace the score s by ``gain * s + bias``, folded into the classifier's last layer."""
        require(self.label is None, "a log-probability of a label cannot be rescaled")
        require(
            bias == 0 or self._last_layer.bias is not None,
            f"the last layer of {type(self.model).__name__} has no bias to fold {bias:.3g} into",
        )
        self.rescaled = True
        self._last_layer.weight.mul_(gain)
        if self._last_layer.bias is not None:
            self._last_layer.bias.mul_(gain).add_(bias)

    @property
    def has_bias(self) -> bool:
        """Whether the scores' mean can be folded into the last layer: BERT's yes, GPT-2's no."""
        return self._last_layer.bias is not None

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        new_head: bool = False,
        max_length: int | None = None,
        label: str | None = None,
        plain: bool = False,
        lora: LoRA | None = None,
    ) -> "RewardModel":
        """Load a sequence classifier with its tokenizer.

        Args:
            name_or_path: a folder, or a name that ``transformers`` knows. The folder of an adapter
                is merged into its base.
            new_head: whether a missing classifier may be drawn anew; only to begin training.
            max_length: as for the class, like `label` and `plain`.
            lora: train an adapter and the head only: a new one, or the one whose folder is given.

        Raises:
            BadInput: if the model cannot be loaded, or its classifier or label is missing.
        """
        with Reading(name_or_path):
            found = load_classifier(name_or_path, new_head=new_head, label=label, lora=lora)
            model, tokenizer, new_weights = found
            reward_model = cls(model, tokenizer, max_length=max_length, label=label, plain=plain)
        reward_model.eval()
        reward_model.new_weights = new_weights
        return reward_model

    @property
    def _last_layer(self) -> nn.Linear:
        return [m for m in self.model.modules() if isinstance(m, nn.Linear)][-1]


def _linear_in_float32(layer: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """A forward hook: the layer's output, computed again if it was in half precision."""
    if output.dtype == at_least_float32(output).dtype:
        return output
    with torch.autocast(output.device.type, enabled=False):
        weight, bias = at_least_float32(layer.weight), layer.bias
        return F.linear(
            at_least_float32(inputs[0]), weight, None if bias is None else at_least_float32(bias)
        )
