"""The reward model: a classifier that scores a prompt with its response, as texts."""

import copy
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from .data import micro_batches
from .encoding.cuts import CutReport
from .encoding.pairs import PairCodec, TextPair
from .errors import BadInput, require
from .loading.models import Reading, load_classifier, require_embeddings
from .logprobs import at_least_float32
from .policy import checkpoint_layers, evaluating, positions_of
from .speed.fast import speed_up

UNKNOWN_POSITIONS = 512  # of a reward model that does not say
SIMILAR_TOKENS = 512  # of the rows of similar length that a reward model takes at once


class RewardModel(nn.Module):
    """A one-label sequence classifier that scores text, with a tokenizer of its own.

    A text has the same score beside any others. The last layer is computed in at least float32,
    under autocast too: from 2 to 4, bfloat16 has only 128 numbers.

    Args:
        model: any ``AutoModelForSequenceClassification`` with one label, such as BERT.
        tokenizer: the model's own; the policy's may be another. It is copied, not changed.
        max_length: tokens of question and response together, special tokens included. A response
            that is too long loses its end, then a prompt its beginning.

    Raises:
        BadInput: if tokenizer or `max_length` do not fit, or padding changes the scores.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        positions = positions_of(model)
        positions = UNKNOWN_POSITIONS if math.isinf(positions) else int(positions)
        max_length = (
            min(positions, tokenizer.model_max_length) if max_length is None else max_length
        )
        require(tokenizer.is_fast, "the reward model's tokenizer needs a tokenizer.json")
        tokenizer = copy.deepcopy(tokenizer)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        require(
            tokenizer.pad_token is not None,
            "the reward model's tokenizer has no pad and no EOS token; set tokenizer.pad_token",
        )
        # GPT-2 and its kin read the score at the last token that is none of padding.
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        require(model.config.num_labels == 1, "a reward model needs exactly one label")
        require(
            8 <= max_length <= positions,
            f"max_length {max_length} must lie between 8 and the model's {positions} positions",
        )
        require_embeddings("the reward model", model, tokenizer)
        speed_up(model)
        self.model, self.tokenizer, self.max_length = model, tokenizer, max_length
        self.tokenizer.model_max_length = max_length  # saved with the model
        self.codec = PairCodec(tokenizer, max_length)
        self.cuts = CutReport()  # of all texts that were scored
        self.new_weights: list[str] = []  # what had to be drawn anew when it was loaded
        self.rescaled = False  # since it was loaded
        self._last_layer.register_forward_hook(_linear_in_float32)
        self._choose_padding_side()

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return self.model.device

    def forward(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """Scores with gradient. Shape ``(B,)``, in at least float32."""
        return self.forward_pairs(self.codec.encode(prompts, responses)[0])

    def forward_pairs(self, pairs: Sequence[TextPair]) -> Tensor:
        """The same for texts that are encoded already.

        Rows of similar length pass together, so that little of the work is padding.
        """
        if not pairs:
            return torch.zeros(0, dtype=torch.float32, device=self.device)
        groups = micro_batches([len(pair.ids) for pair in pairs], max_tokens=SIMILAR_TOKENS)
        parts = []
        for rows in groups:
            inputs = self.pad([pairs[i] for i in rows])
            parts.append(at_least_float32(self.model(**inputs.to(self.device)).logits[:, 0]))
        order = torch.tensor([i for rows in groups for i in rows])
        return torch.cat(parts)[order.argsort().to(self.device)]

    def encode(self, prompts: Sequence[str], responses: Sequence[str]) -> BatchEncoding:
        """Prompts and responses as one padded batch of the classifier's inputs."""
        return self.pad(self.codec.encode(prompts, responses)[0])

    def pad(self, pairs: Sequence[TextPair]) -> BatchEncoding:
        """Encoded texts as one padded batch of the classifier's inputs."""
        # Where a model has no embeddings for types, as GPT-2, it would add those of two words.
        types = getattr(self.model.config, "type_vocab_size", 0) > 1
        return self.codec.pad(pairs, side=self.tokenizer.padding_side, types=types)

    def score(
        self, prompts: Sequence[str], responses: Sequence[str], *, max_tokens: int = 16384
    ) -> Tensor:
        """Scores without gradient and dropout, on the CPU. Shape ``(B,)``.

        Args:
            prompts: texts, before any template or cut.
            responses: texts, without special tokens.
            max_tokens: padded tokens encoded at once; a matter of memory only.

        What does not fit is counted in `cuts`.
        """
        pairs, report = self.codec.encode(prompts, responses)
        self.cuts.add(report)
        scores = torch.empty(len(pairs), dtype=torch.float64)
        with evaluating(self):
            for rows in micro_batches([len(x.ids) for x in pairs], max_tokens=max_tokens):
                scores[rows] = self.forward_pairs([pairs[i] for i in rows]).cpu().double()
        return scores

    def checkpoint_gradients(self) -> None:
        """From now on keep only the layers' inputs for backward, and compute the rest again."""
        checkpoint_layers(self.model)
        self.model.config.use_cache = (
            False  # a score needs no cache, and the two exclude each other
        )

    @torch.no_grad()
    def rescale(self, *, gain: float, bias: float) -> None:
        """Replace the score s by ``gain * s + bias``, folded into the classifier's last layer."""
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
        cls, name_or_path: str | Path, *, new_head: bool = False, max_length: int | None = None
    ) -> "RewardModel":
        """Load a sequence classifier with its tokenizer.

        Args:
            name_or_path: a folder, or a name that ``transformers`` knows.
            new_head: whether a missing classifier may be drawn anew; only to begin training.
            max_length: as for the class.

        Raises:
            BadInput: if the model cannot be loaded, or its classifier is missing.
        """
        with Reading(name_or_path):
            model, tokenizer, new_weights = load_classifier(name_or_path, new_head=new_head)
            reward_model = cls(model, tokenizer, max_length=max_length).eval()
        reward_model.new_weights = new_weights
        return reward_model

    @property
    def _last_layer(self) -> nn.Linear:
        return [m for m in self.model.modules() if isinstance(m, nn.Linear)][-1]

    def _choose_padding_side(self) -> None:
        """The right, or the left as XLNet needs it: where a text's neighbours change nothing.

        What the last layer reads decides, by its direction: a new head may score all texts alike.
        The side is the tokenizer's from here on, and saved with it.
        """
        rng = torch.Generator().manual_seed(0)
        weight = torch.randn(self._last_layer.weight.shape, generator=rng, dtype=torch.float32)

        def by_direction(_layer: nn.Linear, inputs: tuple[Tensor], _output: Tensor) -> Tensor:
            return F.linear(F.normalize(inputs[0].float(), dim=-1), weight.to(self.device))

        pairs, _ = self.codec.encode(["What?"] * 2, ["This. " * 9, "This."])
        near = max(torch.finfo(dtype).eps for dtype in (self.model.dtype, torch.float32)) ** 0.5
        hook = self._last_layer.register_forward_hook(by_direction)
        try:
            for side in ("right", "left"):
                self.tokenizer.padding_side = side
                self.tokenizer.init_kwargs["padding_side"] = side  # what is saved
                with evaluating(self):
                    alone, beside = self.forward_pairs(pairs[1:])[0], self.forward_pairs(pairs)[1]
                if torch.allclose(alone, beside, rtol=near, atol=near, equal_nan=True):
                    return
        finally:
            hook.remove()
        raise BadInput(
            f"{type(self.model).__name__} scores a text otherwise alone than beside a longer one, "
            "so padding changes its scores; give a classifier that heeds attention_mask"
        )


def _linear_in_float32(layer: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """A forward hook: the layer's output, computed again if it was in half precision."""
    if output.dtype == at_least_float32(output).dtype:
        return output
    with torch.autocast(output.device.type, enabled=False):
        weight, bias = at_least_float32(layer.weight), layer.bias
        return F.linear(
            at_least_float32(inputs[0]), weight, None if bias is None else at_least_float32(bias)
        )
