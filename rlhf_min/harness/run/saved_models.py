"""Trained models: saved as folders that plain ``from_pretrained`` of ``transformers`` loads, if
their weights and what these give are finite."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_min import distributed
from rlhf_min.data import collate
from rlhf_min.errors import require
from rlhf_min.harness.run.atomic import complete_folder
from rlhf_min.loading import adapters
from rlhf_min.loading.models import quiet
from rlhf_min.policy import VALUE_FILE, Policy, evaluating
from rlhf_min.reward_model import RewardModel
from rlhf_min.speed.sharding import full, whole

TEXTS, TOKENS, CHARACTERS = 3, 16, 400  # that a model is tried on: few texts, and little of them


def save_policy(policy: Policy, folder: Path) -> None:
    """Write config, ``model.safetensors``, tokenizer, ``model.pt``, and the value head if any.

    Where only an adapter is trained, the folder is that of an adapter, or the two are merged first:
    as the options said.

    Raises:
        BadInput: for weights that are not finite, and for what the disk refuses. What was in the
            folder stays.
    """
    _require_finite(policy, folder)
    critic = policy.critic_tensors()
    with whole(policy, here=distributed.is_main()) as itself:
        if distributed.is_main():
            _write_policy(itself, critic, folder)


def _write_policy(policy: Policy, critic: Mapping[str, Tensor], folder: Path) -> None:
    with complete_folder(folder) as new:
        _save_model(policy.lm, new)
        policy.tokenizer.save_pretrained(new)
        if critic:
            save_file({k: v.contiguous().cpu() for k, v in critic.items()}, new / VALUE_FILE)


def save_reward_model(reward_model: RewardModel, folder: Path) -> None:
    """Write config, ``model.safetensors``, tokenizer and ``model.pt``; raises as `save_policy`."""
    _require_finite(reward_model, folder)
    with whole(reward_model, here=distributed.is_main()) as itself:
        if distributed.is_main():
            with complete_folder(folder) as new:
                _save_model(itself.model, new)
                itself.tokenizer.save_pretrained(new)


def _require_finite(model: nn.Module, folder: Path) -> None:
    name = nonfinite_weight(model)
    require(
        name is None,
        f"{folder}: not saved, since {name} is infinite or NaN; train with a lower learning rate",
    )


@quiet()
def _save_model(model: PreTrainedModel, folder: Path) -> None:
    if not adapters.is_saved_merged(model):
        adapters.save_adapter(model, folder)
        return
    if adapters.is_adapted(model):
        model = adapters.copied(model)
        adapters.merge_adapter(model)
    model.save_pretrained(folder)
    torch.save({k: v.cpu() for k, v in model.state_dict().items()}, folder / "model.pt")


def unsound(module: nn.Module, texts: Sequence[str] = ()) -> str | None:
    """What of a model is infinite or NaN: a weight by its name, or what the weights give.

    Args:
        module: a `Policy` or a `RewardModel` is also tried on the texts; of others only the
            weights are looked at.
        texts: of which a few are taken.

    Returns:
        A name for messages; None if all is finite.
    """
    if name := nonfinite_weight(module):
        return name
    given = _answers(module, [text[:CHARACTERS] for text in texts[:TEXTS]])
    for name, answer in given.items():
        if not bool(answer.isfinite().all()):
            sizes = ((float(full(p.detach()).abs().max()), k) for k, p in module.named_parameters())
            largest, weight = max(sizes)
            return f"{name} (the largest weight is {largest:.2g}, in {weight})"
    return None


def nonfinite_weight(module: nn.Module) -> str | None:
    """The name of the first parameter that holds an infinite number or NaN."""
    for name, p in module.named_parameters():
        # One pass without a copy; isfinite().all() takes sixty times as long on a CPU.
        if p.numel() and not bool(torch.stack(full(p.detach()).aminmax()).isfinite().all()):
            return name
    return None


def _answers(module: nn.Module, texts: Sequence[str]) -> dict[str, Tensor]:
    with evaluating(module):
        if isinstance(module, RewardModel) and texts:
            return {"the score": module([""] * len(texts), texts)}
        if isinstance(module, Policy):
            return _policy_answers(module, texts)
    return {}


def _policy_answers(policy: Policy, texts: Sequence[str]) -> dict[str, Tensor]:
    room = int(min(TOKENS, policy.positions)) - 1
    texts = list(texts)
    ids = (
        policy.tokenizer(texts, split_special_tokens=True, verbose=False).input_ids if texts else []
    )
    rows = [[i for i in row if i < policy.vocabulary][:room] for row in ids]
    rows = [row for row in rows if row]
    if not rows:
        return {}
    start = torch.tensor([policy.tokenizer.eos_token_id])  # stands for the prompt
    batch = collate([start] * len(rows), [torch.tensor(row) for row in rows], pad_id=policy.pad_id)
    output = policy(batch.to(policy.device))
    answers = {"the log-probability": output.logprobs, "the entropy": output.entropy}
    return answers if output.values is None else answers | {"the value": output.values}
