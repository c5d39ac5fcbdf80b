"""Sampling responses, one uniform number for each token."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import distributed
from .errors import Diverged, require
from .logprobs import lm_head_logits
from .policy import Policy, evaluating
from .speed.cache import KeyValueCache, rows_at_once
from .speed.sharding import whole

NO_TOKEN = -1  # where the logits hold NaN, for which searchsorted would draw the last token


def sample(
    policy: Policy,
    prompt_ids: Sequence[Tensor],
    *,
    max_new_tokens: int,
    temperature: float,
    rng: torch.Generator,
) -> list[Tensor]:
    r"""Draw one response to each prompt from the policy's own distribution, unfiltered.

    Token t of row b is the first v with  p(0) + ... + p(v) > u_bt,  where u_bt is uniform. All u
    are drawn at the start, so a row's response does not depend on when other rows end. Rows that
    have ended leave the batch.

    Args:
        policy: sampled in eval mode, without dropout.
        prompt_ids: one ``(P_b,)`` tensor for each row.
        max_new_tokens: a response without EOS is cut there.
        temperature: divides the logits; the log-probabilities of a rollout use the same.
        rng: a CPU generator, the only source of randomness.

    Returns:
        For each row the sampled ids, ``(T_b,)`` on the CPU, ending in EOS if it was drawn.

    Raises:
        BadInput: if the model has no room for a prompt and the longest response.
        Diverged: if the policy gives NaN.
    """
    require(max_new_tokens >= 1, f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    require(temperature > 0, f"the temperature is {temperature}; it must be above 0")
    policy.require_room(([ids] for ids in prompt_ids), new_tokens=max_new_tokens)
    uniforms = torch.rand(len(prompt_ids), max_new_tokens, generator=rng, dtype=torch.float64)
    n = len(prompt_ids)
    longest = max(map(len, prompt_ids), default=0) + max_new_tokens
    with whole(policy) as policy, evaluating(policy):
        at_once = min(rows_at_once(policy.lm, longest), max(1, -(-n // distributed.size())))
        found = distributed.deal(
            lambda rows: _sample(
                policy, prompt_ids[rows], uniforms[rows], temperature, first_row=rows.start
            ),
            [slice(start, start + at_once) for start in range(0, n, at_once)],
        )
    return [response for responses in found for response in responses]


def _sample(
    policy: Policy,
    prompt_ids: Sequence[Tensor],
    uniforms: Tensor,  # (B, T)
    temperature: float,
    first_row: int,  # its number in the batch
) -> list[Tensor]:
    eos_id, device = policy.tokenizer.eos_token_id, policy.device
    uniforms = below_one(uniforms, device)
    ids, attention_mask = _left_padded(prompt_ids, policy.pad_id)
    ids, attention_mask = ids.to(device), attention_mask.to(device)  # (B, P)
    responses: list[list[int]] = [[] for _ in prompt_ids]
    live = torch.arange(len(prompt_ids), device=device)  # rows that have not ended, (b,)
    cache, head = KeyValueCache(policy.lm), policy.head
    for t in range(uniforms.shape[1]):
        # With padding on the left the position of a token is the number of real ones before it.
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)  # (b, L)
        if policy.plain:  # the whole sequences again
            hidden = policy.lm.base_model(
                input_ids=ids,
                attention_mask=attention_mask,
                position_ids=positions,
                use_cache=False,
            ).last_hidden_state  # (b, L, H)
        else:  # only what is new
            hidden = cache.hidden_states(ids, attention_mask, positions)
        logits = lm_head_logits(hidden[:, -1], temperature=temperature, **head)  # (b, V)
        tokens = _inverse_cdf(logits, uniforms[live, t])  # (b,)
        drawn = list(zip(live.tolist(), tokens.tolist(), strict=True))
        if bad := [first_row + row for row, token in drawn if token == NO_TOKEN]:
            raise Diverged(
                f"the policy gives NaN while sampling, first for row {bad[0]}; try "
                "--precision fp32, a lower --learning_rate or another model"
            )
        for row, token in drawn:
            responses[row].append(token)
        going = (tokens != eos_id).nonzero()[:, 0]
        if len(going) == 0:
            break
        if len(going) < len(live):
            cache.select(going)
            live, tokens = live[going], tokens[going]
            ids, attention_mask = ids[going], attention_mask[going]
        ids = torch.cat([ids, tokens[:, None]], dim=1)
        attention_mask = torch.cat([attention_mask, torch.ones_like(tokens[:, None])], dim=1)
    return [torch.tensor(response) for response in responses]


def widest_float(device: torch.device) -> torch.dtype:
    """float64, or float32 on Apple's GPUs, which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def below_one(uniforms: Tensor, device: torch.device) -> Tensor:
    """Uniform numbers on a device, none rounded up to 1, which no probability exceeds."""
    dtype = widest_float(device)
    return uniforms.to(dtype).clamp(max=1 - torch.finfo(dtype).eps / 2).to(device)


def _left_padded(rows: Sequence[Tensor], pad_id: int) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id)
    attention_mask = torch.zeros_like(ids)
    for b, row in enumerate(rows):
        ids[b, width - len(row) :] = row
        attention_mask[b, width - len(row) :] = 1
    return ids, attention_mask


def _inverse_cdf(logits: Tensor, uniforms: Tensor) -> Tensor:
    """The first token whose cumulated probability exceeds the uniform number. Shape ``(b,)``.

    `NO_TOKEN` where the logits hold NaN.
    """
    cdf = logits.to(uniforms.dtype).softmax(-1).cumsum(-1)
    # Rounding may end the cdf a little off 1; scaling by its end keeps every draw inside.
    tokens = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True)[:, 0]
    return torch.where(cdf[:, -1].isnan(), NO_TOKEN, tokens.clamp(max=logits.shape[-1] - 1))
