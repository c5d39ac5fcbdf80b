"""The policy: a causal language model with a value head, and its frozen reference."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .data import Sequences
from .errors import require
from .loading import adapters, checks
from .loading.adapters import LoRA
from .loading.models import VALUE_FILE, Reading, load_causal_lm
from .logprobs import entropy, lm_head_logits, token_logprobs
from .speed.fast import checkpoint_layers, separate_trunk, speed_up
from .speed.forward import hidden_states, layout_of, logprobs_and_states
from .speed.packing import padded
from .speed.sharding import full

Critic = Literal["none", "shared", "separate"]


class PolicyOutput(NamedTuple):
    """`logprobs` of the response tokens, `entropy` there, and `values`; each (B, T), 0 at padding.

    `values` is None for a policy without a critic. `logits` are those of the N real response
    tokens, row after row, (N, V); None unless they are asked for.
    """

    logprobs: Tensor
    entropy: Tensor
    values: Tensor | None
    logits: Tensor | None = None


class Policy(nn.Module):
    """A causal language model, its tokenizer, and a value head on its final layer.

    Args:
        lm: any ``AutoModelForCausalLM`` of ``transformers``.
        tokenizer: the model's own.
        critic: ``"shared"`` reads values off the policy's own trunk, which the value loss then
            moves too, ``"separate"`` off a copy of it with weights of its own, ``"none"`` has no
            values (SFT, DPO, the reference).
        plain: compute as a textbook does, and slower. The numbers are the same up to rounding.
            For an `lm` that no other policy has sped up, which happens in place.

    The value of response token t is read where that token is predicted, so it has not seen it. A
    new value head is zero: the first advantages are sums of rewards, discounted by gamma * lam.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        critic: Critic = "none",
        plain: bool = False,
    ) -> None:
        super().__init__()
        require(
            critic != "separate" or not adapters.is_adapted(lm),
            "a separate critic is a second trunk, all of it trained, and this model only trains an "
            "adapter; take critic='shared'",
        )
        if not plain:
            speed_up(lm)
        self.lm, self.tokenizer, self.critic, self.plain = lm, tokenizer, critic, plain
        self.critic_trunk = separate_trunk(lm) if critic == "separate" else None
        self.value_head: nn.Linear | None = None
        if critic != "none":
            weight = lm.get_output_embeddings().weight
            dtype = torch.promote_types(weight.dtype, torch.float32)
            self.value_head = nn.Linear(weight.shape[1], 1, dtype=dtype, device=weight.device)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
        self.eval()
        checks.require_known_head(lm, self.head)

    def forward(
        self, batch: Sequences, *, temperature: float = 1.0, with_logits: bool = False
    ) -> PolicyOutput:
        """Log-probabilities, entropy and values of the response tokens, and perhaps all logits."""
        batch = self._on_device(batch)
        if self.plain:
            logprobs, entropies, hidden = self._plain(batch, temperature)
        else:  # the same, faster
            logprobs, entropies, hidden = logprobs_and_states(
                self.lm, self.head, self.critic_trunk, batch, temperature=temperature
            )
        values = None
        if self.value_head is not None:
            with torch.autocast(self.device.type, enabled=False):
                # The states that predict the tokens: V_t has not seen token t.
                hidden = hidden.to(self.value_head.weight.dtype)  # (N, H)
                values = scatter_tokens(self.value_head(hidden)[:, 0], batch.mask)
        return PolicyOutput(
            scatter_tokens(logprobs, batch.mask),
            scatter_tokens(entropies, batch.mask),
            values,
            self._logits(batch, temperature) if with_logits else None,
        )

    def _plain(self, batch: Sequences, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities and entropy, ``(N,)``, and what the value head reads, ``(N, H)``."""
        inputs = {"input_ids": batch.ids, "attention_mask": batch.attention_mask}
        rows, at = batch.predicting()  # (N,) each: the row, and index P - 1 + t in it
        hidden = self.lm.base_model(**inputs, use_cache=False).last_hidden_state  # (B, L, H)
        logits = lm_head_logits(hidden, temperature=temperature, **self.head)  # (B, L, V)
        logits = logits[rows, at]  # (N, V), where a token of a response is predicted
        logprobs = token_logprobs(logits, batch.responses[batch.mask])
        if self.critic_trunk is not None:
            hidden = self.critic_trunk(**inputs, use_cache=False).last_hidden_state
        return logprobs, entropy(logits.detach()), hidden[rows, at]

    def _logits(self, batch: Sequences, temperature: float) -> Tensor:
        """The logits at the real response tokens, ``(N, V)``: for the exact KL only. Runs the trunk
        once more."""
        layout = padded(batch) if self.plain else layout_of(self.lm, batch)
        hidden = hidden_states(self.lm.base_model, layout)
        return lm_head_logits(hidden, temperature=temperature, **self.head)

    @property
    def head(self) -> dict[str, Any]:
        """The vocabulary projection as `lm_head_logits` takes it: weight, bias, softcap, scale."""
        head, config = self.lm.get_output_embeddings(), self.lm.config
        scale = getattr(config, "logit_scale", None) or 1.0
        return {
            "weight": head.weight,
            "bias": getattr(head, "bias", None),
            "softcap": getattr(config, "final_logit_softcapping", None),
            "scale": scale / (getattr(config, "logits_scaling", None) or 1.0),
        }

    def _on_device(self, batch: Sequences) -> Sequences:
        """The batch on the model's device; refused if the model has no room for it."""
        low, high = batch.ids[batch.attention_mask.bool()].aminmax()
        if low < 0 or high >= self.vocabulary or batch.ids.shape[1] > self.positions:
            lengths = batch.attention_mask.sum(1)
            self.require_room([ids[:n]] for ids, n in zip(batch.ids, lengths, strict=True))
        return batch.to(self.device)

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return self.lm.device

    @property
    def pad_id(self) -> int:
        """Fills padding; no result depends on it. EOS where the model knows no pad token."""
        pad = self.tokenizer.pad_token_id
        known = pad is not None and pad < self.vocabulary
        return pad if known else self.tokenizer.eos_token_id

    @property
    def positions(self) -> float:
        """How many tokens a row may have; infinite where the model does not say."""
        return checks.positions_of(self.lm)

    @property
    def vocabulary(self) -> int:
        """How many ids the model has embeddings for."""
        return checks.vocabulary_of(self.lm)

    def require_room(self, rows: Iterable[Sequence[Tensor]], *, new_tokens: int = 0) -> None:
        """Raise `BadInput` unless the model has embeddings and positions for these rows.

        Without this check an id too large is an IndexError, on a GPU the end of the process, and a
        row too long may be computed with positions that the model was never trained on.

        Args:
            rows: the parts of each row, ``(P_b,)`` and perhaps ``(T_b,)``; none is empty.
            new_tokens: how many are to be written after each row.
        """
        checks.require_room(self.lm, rows, new_tokens=new_tokens)

    def decode(self, response_ids: Tensor) -> str:
        """A response as rewards and readers see it: no special tokens, no outer white space."""
        return str(self.tokenizer.decode(response_ids, skip_special_tokens=True)).strip()

    def reference(self, device: torch.device | None = None) -> "Policy":
        """A frozen copy of the language model as it is now, without critic and dropout.

        Where only an adapter is trained, all that is copied is the adapter.

        Args:
            device: where the copy is kept; None for the policy's own device.
        """
        lm = adapters.copied(self.lm, device)
        reference = Policy(lm, self.tokenizer, plain=self.plain)
        reference.requires_grad_(False)
        disable_dropout(reference)
        return reference.eval().to(self.device if device is None else device)

    def checkpoint_gradients(self) -> None:
        """Keep only the layers' inputs for backward, and compute the rest again there."""
        for trunk in (self.lm, self.critic_trunk):
            if isinstance(trunk, PreTrainedModel):
                checkpoint_layers(trunk)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        critic: Critic,
        new_head: bool = False,
        plain: bool = False,
        lora: LoRA | None = None,
    ) -> "Policy":
        """Load a causal language model with its tokenizer, and its value head if it has one.

        Args:
            name_or_path: a folder, a name that ``transformers`` knows, or a ``.gguf`` file. A
                folder may be one of trl 0.x, with its value head, or that of an adapter, which is
                merged into its base.
            critic: as for the class, like `plain`.
            new_head: whether a missing value head may start at zero; only to begin training.
            lora: train an adapter only: a new one, or the one whose folder is given.

        Raises:
            BadInput: if the model cannot be loaded, or its value head is missing.
        """
        with Reading(name_or_path):
            lm, tokenizer, value_head = load_causal_lm(name_or_path, lora=lora)
            policy = cls(lm, tokenizer, critic=critic, plain=plain)
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
        names = [k for k in state if k.startswith(("value_head.", "critic_trunk."))]
        return {name: full(state[name]) for name in names}

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


def scatter_tokens(x: Tensor, mask: Tensor) -> Tensor:
    """Put one number for each real token, ``(N,)``, in its place, ``(B, T)``; 0 at padding."""
    return torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_scatter(mask, x)


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode without gradients for these models; afterwards each has its mode again."""
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
