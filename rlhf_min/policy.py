"""The policy: a causal language model with a value head, and its frozen reference."""

import contextlib
import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .data import Sequences
from .errors import require
from .loading.models import VALUE_FILE, Reading, load_causal_lm
from .logprobs import at_least_float32, lm_head_logits, lm_head_logprobs
from .speed.fast import can_pack, separate_trunk, speed_up
from .speed.packing import Layout, packed, padded

CHUNK_TOKENS = 1024  # rows of logits held at once
Critic = Literal["none", "shared", "separate"]


class PolicyOutput(NamedTuple):
    """`logprobs` of the response tokens, `entropy` there, and `values`; each (B, T), 0 at padding.

    `values` is None for a policy without a critic.
    """

    logprobs: Tensor
    entropy: Tensor
    values: Tensor | None


class Policy(nn.Module):
    """A causal language model, its tokenizer, and a value head on its final layer.

    Args:
        lm: any ``AutoModelForCausalLM`` of ``transformers``.
        tokenizer: the model's own.
        critic: ``"shared"`` reads values off the policy's own trunk, ``"separate"`` off a copy of
            it with weights of its own, ``"none"`` has no values (SFT, DPO, the reference).

    The value of response token t is read where that token is predicted, so it has not seen it. A
    new value head is zero: the first advantages are sums of rewards, discounted by gamma * lam.
    """

    def __init__(
        self, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, critic: Critic = "none"
    ) -> None:
        super().__init__()
        speed_up(lm)
        self.lm, self.tokenizer, self.critic = lm, tokenizer, critic
        self.critic_trunk = separate_trunk(lm) if critic == "separate" else None
        self.value_head: nn.Linear | None = None
        if critic != "none":
            weight = lm.get_output_embeddings().weight
            dtype = torch.promote_types(weight.dtype, torch.float32)
            self.value_head = nn.Linear(weight.shape[1], 1, dtype=dtype, device=weight.device)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
        self.eval()
        self._check_head()

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return self.lm.device

    @property
    def pad_id(self) -> int:
        """Fills padding, where no result depends on it; EOS serves where there is no pad token, or
        one that was added to the tokenizer alone."""
        pad = self.tokenizer.pad_token_id
        known = pad is not None and pad < self.vocabulary
        return pad if known else self.tokenizer.eos_token_id

    @property
    def positions(self) -> float:
        """How many tokens a row may have; infinite where the model does not say."""
        return positions_of(self.lm)

    @property
    def vocabulary(self) -> int:
        """How many ids the model has embeddings for."""
        embeddings: Any = self.lm.get_input_embeddings()
        return len(embeddings.weight)

    def require_room(self, rows: Iterable[Sequence[Tensor]], *, new_tokens: int = 0) -> None:
        """Raise `BadInput` unless the model has embeddings and positions for these rows.

        Beyond them it would end in an IndexError, on a GPU in the end of the process; or compute
        with positions that it was never trained on.

        Args:
            rows: the parts of each row, ``(P_b,)`` and perhaps ``(T_b,)``; none is empty.
            new_tokens: how many are to be written after each row.
        """
        name, positions, vocabulary = type(self.lm).__name__, self.positions, self.vocabulary
        rows = [tuple(parts) for parts in rows]
        if _all_fit(rows, positions - new_tokens, vocabulary):
            return
        for row, parts in enumerate(rows):
            for ids in parts:
                require(
                    ids.dim() == 1 and not ids.is_floating_point() and len(ids) > 0,
                    f"row {row}: ids of shape {tuple(ids.shape)} and {ids.dtype}; a prompt and a "
                    "response are one row of whole numbers each, with at least one token",
                )
                low, high = (int(x) for x in ids.aminmax())
                require(
                    low >= 0 and high < vocabulary,
                    f"row {row}: id {low if low < 0 else high} is none of the {vocabulary} that "
                    f"{name} has embeddings for; encode with the model's own tokenizer",
                )
            length = sum(map(len, parts))
            told = f"{length} tokens" + f" and {new_tokens} to be written" * (new_tokens > 0)
            require(
                length + new_tokens <= positions,
                f"row {row}: {told} do not fit into the {positions} positions of {name}; shorten "
                "the rows (of a Codec: max_prompt_tokens, max_response_tokens)",
            )

    def decode(self, response_ids: Tensor) -> str:
        """A response as rewards and readers see it: no special tokens, no outer white space."""
        return str(self.tokenizer.decode(response_ids, skip_special_tokens=True)).strip()

    def forward(self, batch: Sequences, *, temperature: float = 1.0) -> PolicyOutput:
        """Log-probabilities, entropy and values of the response tokens.

        Only the positions that predict a real response token reach the vocabulary, which is most
        of the work of a small model.
        """
        batch = self._on_device(batch)
        layout = self._layout(batch)
        head = lm_head(self.lm)  # before the trunk: `lm_head` says why
        hidden = _hidden_states(self.lm.base_model, layout)  # (N, H), N real response tokens
        logprobs, entropy = lm_head_logprobs(
            hidden,
            tokens=batch.responses[batch.mask],
            temperature=temperature,
            chunk_tokens=CHUNK_TOKENS,
            **head,
        )
        values = None
        if self.value_head is not None:
            if self.critic_trunk is not None:
                hidden = _hidden_states(self.critic_trunk, layout)
            with torch.autocast(self.device.type, enabled=False):
                hidden = hidden.to(self.value_head.weight.dtype)
                values = scatter_tokens(self.value_head(hidden)[:, 0], batch.mask)
        return PolicyOutput(
            scatter_tokens(logprobs, batch.mask), scatter_tokens(entropy, batch.mask), values
        )

    def token_logits(self, batch: Sequences, *, temperature: float = 1.0) -> Tensor:
        """All logits at the real response tokens, ``(N, V)``: for the exact KL only."""
        batch = self._on_device(batch)
        hidden = _hidden_states(self.lm.base_model, self._layout(batch))
        return lm_head_logits(hidden, temperature=temperature, **lm_head(self.lm))

    def reference(self, device: torch.device | None = None) -> "Policy":
        """A frozen copy of the language model as it is now, without critic and dropout.

        Args:
            device: where the copy is kept; None for the policy's own device.
        """
        reference = Policy(copy.deepcopy(self.lm), self.tokenizer)
        reference.requires_grad_(False)
        disable_dropout(reference)
        return reference.eval().to(self.device if device is None else device)

    def checkpoint_gradients(self) -> None:
        """From now on keep only the layers' inputs for backward, and compute the rest again."""
        for trunk in (self.lm, self.critic_trunk):
            if isinstance(trunk, PreTrainedModel):
                checkpoint_layers(trunk)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, critic: Critic, new_head: bool = False
    ) -> "Policy":
        """Load a causal language model with its tokenizer, and its value head if it has one.

        Args:
            name_or_path: a folder, a name that ``transformers`` knows, or a ``.gguf`` file. A
                folder may be one of trl 0.x, with its value head.
            critic: as for the class.
            new_head: whether a missing value head may start at zero; only to begin training.

        Raises:
            BadInput: if the model cannot be loaded, or its value head is missing.
        """
        with Reading(name_or_path):
            lm, tokenizer, value_head = load_causal_lm(name_or_path)
            policy = cls(lm, tokenizer, critic=critic)
            policy.decode(torch.tensor(tokenizer("What?").input_ids))
        if critic != "none" and value_head is not None:
            policy.load_critic(value_head)
        else:
            require(
                critic == "none" or new_head,
                f"{name_or_path}: no {VALUE_FILE}; only new_head=True may start from a new head",
            )
        return policy

    def critic_tensors(self) -> dict[str, Tensor]:
        """The value head's tensors and, if there is one, the separate critic's."""
        state = self.state_dict()
        return {k: v for k, v in state.items() if k.startswith(("value_head.", "critic_trunk."))}

    def load_critic(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `critic_tensors`; every name must be there, and no other."""
        expected = {name: tensor.shape for name, tensor in self.critic_tensors().items()}
        given = {name: tensor.shape for name, tensor in tensors.items()}
        differing = sorted({name for name, _ in expected.items() ^ given.items()})
        require(
            not differing,
            f"the value head does not fit critic={self.critic!r} of this model: {differing[:3]} "
            "missing, unexpected, or of another shape; give the critic that it was trained with",
        )
        self.load_state_dict(tensors, strict=False)

    @torch.no_grad()
    def _check_head(self) -> None:
        ids = torch.arange(2, device=self.device)[None]  # (1, 2), any two tokens
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        hidden = self.lm.base_model(**inputs).last_hidden_state
        ours = lm_head_logits(hidden, temperature=1.0, **lm_head(self.lm))
        theirs = at_least_float32(self.lm(**inputs).logits)
        require(
            bool(theirs.isfinite().all()),
            f"{self.lm.name_or_path or type(self.lm).__name__}: its weights are finite and its "
            "logits are not; give weights from before they went wrong",
        )
        require(
            torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2 * float(theirs.std())),
            f"{type(self.lm).__name__} makes its logits in a way that is not known here, so its "
            "log-probabilities would be wrong; use another model",
        )

    def _on_device(self, batch: Sequences) -> Sequences:
        """The batch where the model is, once it is sure that the model can take it."""
        low, high = batch.ids[batch.attention_mask.bool()].aminmax()
        if low < 0 or high >= self.vocabulary or batch.ids.shape[1] > self.positions:
            lengths = batch.attention_mask.sum(1)
            self.require_room([ids[:n]] for ids, n in zip(batch.ids, lengths, strict=True))
        return batch.to(self.device)

    def _layout(self, batch: Sequences) -> Layout:
        if not can_pack(self.lm):
            return padded(batch)
        # At a row of a third of the width of the model, attention is a twentieth of the work.
        return packed(batch, width=self.lm.config.hidden_size // 3)


def _all_fit(rows: list[Sequence[Tensor]], positions: float, vocabulary: int) -> bool:
    """Whether all ids are sound, seen at once; False too where that cannot be seen at once."""
    every = [ids for parts in rows for ids in parts]
    if not all(ids.dim() == 1 and not ids.is_floating_point() and len(ids) > 0 for ids in every):
        return False
    if len({ids.device for ids in every}) != 1 or positions < max(sum(map(len, x)) for x in rows):
        return False
    low, high = torch.cat(every).aminmax()
    return bool(low >= 0 and high < vocabulary)


def _hidden_states(trunk: nn.Module, layout: Layout) -> Tensor:
    """The states that predict the real response tokens, row after row. Shape ``(N, H)``."""
    hidden = trunk(**layout.inputs, use_cache=False).last_hidden_state  # (R, W, H)
    return hidden.flatten(0, 1)[layout.at]


def scatter_tokens(x: Tensor, mask: Tensor) -> Tensor:
    """Put one number for each real token, ``(N,)``, in its place, ``(B, T)``; 0 at padding."""
    return torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_scatter(mask, x)


def lm_head(lm: PreTrainedModel) -> dict[str, Any]:
    """The vocabulary projection as `lm_head_logits` takes it: weight, bias, softcap, scale.

    Where the embedding is the same weight, two gradients meet in it: a large one from here and a
    few rows from the embedding. Autograd adds the one that comes later in place, and works from the
    youngest node to the oldest. `expand_as` makes a node here; called before the trunk, it is older
    than the embedding's, and no third gradient is made.
    """
    head, config = lm.get_output_embeddings(), lm.config
    scale = getattr(config, "logit_scale", None) or 1.0
    return {
        "weight": head.weight.expand_as(head.weight) if torch.is_grad_enabled() else head.weight,
        "bias": getattr(head, "bias", None),
        "softcap": getattr(config, "final_logit_softcapping", None),
        "scale": scale / (getattr(config, "logits_scaling", None) or 1.0),
    }


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Inside, the models are in eval mode and record no gradient; their mode is restored after."""
    training = [module for model in models for module in model.modules() if module.training]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout to 0, in train mode too; the model's config keeps what it says."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):  # as Llama and OPT have it
                setattr(module, name, 0.0)


def checkpoint_layers(model: PreTrainedModel) -> None:
    """From now on keep only the layers' inputs for backward, and compute the rest again."""
    require(
        model.supports_gradient_checkpointing,
        f"{type(model).__name__} has no gradient checkpointing; go without",
    )
    # Renamed within version 5 of transformers; the older name goes in version 6.
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable = next(getattr(model, name) for name in names if hasattr(model, name))
    enable({"use_reentrant": False})


def positions_of(model: PreTrainedModel) -> float:
    """How many tokens the model has positions for; infinite where its config does not say.

    With rotary positions it could go on, but it was not trained for that. Where the frequencies
    change beyond a length, they do so for all rows of a batch once its longest is beyond it.
    """
    config = model.config.get_text_config()
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len")]
    embeddings = getattr(model.base_model, "embeddings", None)
    table = getattr(embeddings, "position_embeddings", None)
    if isinstance(table, nn.Embedding) and table.padding_idx is not None:
        # RoBERTa counts from behind its pad id
        limits.append(table.num_embeddings - table.padding_idx - 1)
    rope = getattr(config, "rope_parameters", None) or {}
    for part in [rope, *(x for x in rope.values() if isinstance(x, dict))]:  # or one for each kind
        if part.get("rope_type") == "longrope":
            limits.append(part.get("original_max_position_embeddings"))
    return min((n for n in limits if n is not None and n > 0), default=math.inf)  # XLNet says -1
