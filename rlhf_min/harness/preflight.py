"""Checks before the first step: what goes wrong silently is measured while it costs seconds.

Each check has a number and the largest value that passes. They run from the cause to the
consequence, so the first one that fails names the fault; it ends the run. All of them work on a
few short rows and leave weights, modes and random generators as they were.
"""

import contextlib
import heapq
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlhf_min.data import Sequences, collate
from rlhf_min.errors import BadInput
from rlhf_min.harness.rows.files import GB, free_memory
from rlhf_min.harness.run import processes
from rlhf_min.logprobs import token_logprobs
from rlhf_min.optim import Optimizer
from rlhf_min.policy import Policy, evaluating
from rlhf_min.reward_model import RewardModel
from rlhf_min.speed.cache import cache_bytes
from rlhf_min.speed.forward import CHUNK_TOKENS
from rlhf_min.speed.sharding import is_split, kept_here, whole

# How far two computations of the same number may differ: a log-probability or a score.
TOLERANCE = {"float64": 1e-9, "fp32": 1e-3, "bf16": 0.2, "fp16": 0.03}
EXACT = 0.0  # the same operations on the same rows
SHARE_OF_MEMORY = 1.2  # need is an estimate: only what exceeds the room clearly is refused

ROWS = 3  # in a forward pass
PROMPT_TOKENS, RESPONSE_TOKENS = 12, 6  # of a row, at most
LOOKED_AT = 1000  # rows whose EOS is looked for
LOGITS_COPIES = 4  # of a chunk of logits: themselves, probabilities, gradient, a temporary

Row = tuple[Tensor, Tensor]  # ids of a prompt and of its response


@dataclass(frozen=True)
class Check:
    """A number, the largest value that passes, and what to say of a larger one or of NaN.

    `words` say the value, where a bare number says too little. A `warning` does not end
    the run.
    """

    name: str
    value: float
    limit: float
    cause: str
    cure: str
    words: str = ""
    warning: bool = False

    def __post_init__(self) -> None:
        if not self.words:
            object.__setattr__(self, "words", f"{self.value:.2g}, at most {self.limit:.2g}")

    @property
    def passed(self) -> bool:
        """Whether the value is within the limit; NaN is not."""
        return self.value <= self.limit

    def __str__(self) -> str:
        verdict = "ok" if self.passed else "warning" if self.warning else "FAILED"
        return f"  {verdict:<7}  {self.name:<40}  {self.words}"


# The framework


def run(stage: str, checks: Iterator[Check], optimizer: Optimizer, *models: nn.Module) -> None:
    """Make the checks until one fails, print them all, and end the run if one has failed.

    Raises:
        BadInput: with the failed check's cause and cure.
    """
    started, done = time.perf_counter(), list[Check]()
    try:
        with untouched(*models), optimizer.autocast():
            for check in checks:
                done.append(check)
                if not check.passed and not check.warning:
                    raise BadInput(
                        f"preflight of {stage}: {check.name}: {check.words}; {check.cause}; "
                        f"{check.cure} (--skip_preflight starts all the same)"
                    )
    finally:
        passed = sum(check.passed for check in done)
        seconds = time.perf_counter() - started
        print(f"preflight of {stage}: {passed} of {len(done)} checks passed in {seconds:.1f} s")
        for check in done:
            print(check)
            if check.warning and not check.passed:
                print(f"{'':11}{check.cause}; {check.cure}")


@contextlib.contextmanager
def untouched(*models: nn.Module) -> Iterator[None]:
    """Inside, modes may change and the global generators be drawn from; all is as before
    afterwards. What the reward models count as cut is not counted."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    scorers = [(model, deepcopy(model.cuts)) for model in models if isinstance(model, RewardModel)]
    devices = {p.device for model in models for p in model.parameters() if p.is_cuda}
    drawn = random.getstate(), np.random.get_state()  # by a reward function of the user's
    try:
        with torch.random.fork_rng(list(devices)):
            yield
    finally:
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])
        for module, training in modes:
            module.training = training
        for scorer, cuts in scorers:
            scorer.cuts = cuts


def tolerance(
    dtype: torch.dtype, autocast: str, *, table: Mapping[str, float] = TOLERANCE
) -> float:
    """That of the weights' precision where they are not float32, else that of autocast."""
    of_weights = {torch.float64: "float64", torch.bfloat16: "bf16", torch.float16: "fp16"}
    return table[of_weights.get(dtype, autocast)]


def largest_batch(longest: int, rows: int, max_tokens: int) -> int:
    """Padded tokens in a micro-batch of so many rows of the longest one, or of fewer."""
    return max(longest, min(max_tokens, rows * longest))


# Rows


def shortest(rows: Sequence[Row]) -> list[Row]:
    """A few short rows, cut further where they are long; longer ones last."""
    return [
        (prompt_ids[-PROMPT_TOKENS:], response_ids[:RESPONSE_TOKENS])
        for prompt_ids, response_ids in heapq.nsmallest(ROWS, rows, key=row_length)
    ]


def no_empty_row(rows: Sequence[Row], *, rows_per_example: int = 1) -> Check:
    """Every prompt and every response has a token."""
    empty = [i // rows_per_example for i, row in enumerate(rows) if not min(map(len, row))]
    return Check(
        "rows without a prompt or response token",
        len(empty),
        0,
        f"row {empty[0] if empty else 0} (the first is 0) has nothing to learn from",
        "drop such rows, or raise --max_length if all was cut away",
    )


def eos_supervised(rows: Sequence[Row], policy: Policy) -> Check:
    """EOS is among the tokens that the loss counts, as the mask has it."""
    # Every so many, an odd number: of pairs both sides are among them.
    some = rows[:: -(-len(rows) // LOOKED_AT) | 1]
    batch = collate(*zip(*some, strict=True), pad_id=policy.pad_id)
    has_eos = (batch.mask & (batch.responses == policy.tokenizer.eos_token_id)).any(1)
    share = float(has_eos.double().mean())
    return Check(
        "EOS supervised",
        1 - share,
        0,
        f"{'no' if share == 0 else 'not every'} row teaches where a response ends",
        f"end each response with the tokenizer's {policy.tokenizer.eos_token}",
        words=f"in {share:.1%} of {len(some)} rows",
        warning=share > 0,
    )


# The policy


def half_precision(precision: str, device: torch.device) -> Iterator[Check]:
    """On a CPU without instructions for it, half precision is several times slower than fp32."""
    if precision == "fp32" or device.type != "cpu":
        return
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    full, half = (product_seconds(d, device) for d in (torch.float32, dtype))
    yield Check(
        f"{precision} beside fp32",
        half / full,
        1.0,
        "this processor has no instructions for it",
        "--precision fp32 is faster here",
        words=f"a matrix product takes {half / full:.1f} times as long",
        warning=True,
    )


def product_seconds(dtype: torch.dtype, device: torch.device) -> float:
    """The best of a few products of 512 x 512 matrices."""
    x, seconds = torch.ones(512, 512, dtype=dtype, device=device), []
    for _ in range(4):
        started = time.perf_counter()
        torch.mm(x, x)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def passes_agree(policy: Policy, rows: Sequence[Row]) -> Check:
    """Two passes in train mode give the same bits."""
    batch = _collated(policy, rows)
    policy.train()
    with torch.no_grad():
        first, second = policy(batch), policy(batch)
    differences = [(first.logprobs - second.logprobs).abs().max()]
    if first.values is not None:
        differences.append((first.values - second.values).abs().max())
    return Check(
        "two passes in train mode",
        float(torch.stack(differences).max()),  # unlike Python's max, keeps NaN
        EXACT,
        "dropout, or other noise, is on in train mode",
        "set it to 0 in the model's config",
    )


def head_equals_model(policy: Policy, row: Row, tolerance: float) -> Check:
    """Our chunked head gives the log-probabilities of the model's own logits."""
    batch = _collated(policy, [row])
    with evaluating(policy), whole(policy) as itself:
        ours = policy(batch).logprobs[0]
        logits = itself.lm(input_ids=batch.ids, use_cache=False).logits[0, len(row[0]) - 1 : -1]
    theirs = token_logprobs(logits, batch.responses[0])
    return Check(
        "head against the model's own logits",
        float((ours - theirs).abs().mean()),
        tolerance,
        f"{type(policy.lm).__name__} makes its logits in a way that is not known here",
        "use another model",
    )


def row_alone_equals_batch(policy: Policy, row: Row, tolerance: float) -> Check:
    """A row has the same log-probabilities alone and padded beside a longer one."""
    prompt_ids, response_ids = row
    half = prompt_ids[len(prompt_ids) // 2 :], response_ids[: (len(response_ids) + 1) // 2]
    with evaluating(policy):
        alone = policy(_collated(policy, [half])).logprobs[0]
        padded = policy(_collated(policy, [row, half])).logprobs[1, : len(alone)]
    return Check(
        "a row alone against it in a batch",
        float((alone - padded).abs().mean()),
        tolerance,
        "padding or positions change the model's output",
        "use a model that heeds attention_mask and counts positions from the first token",
    )


# Memory


def policy_memory(
    policy: Policy,
    frozen: Sequence[Policy | RewardModel],
    optimizer: Optimizer,
    row: Row,
    *,
    tokens: int,
    cached_tokens: int = 0,
) -> Iterator[Check]:
    """What training a policy needs, for each device.

    Args:
        frozen: what lies beside it: reference and reward model.
        row: for a small forward pass.
        tokens: padded tokens of the largest micro-batch.
        cached_tokens: tokens in the key-value cache while sampling.
    """
    ids = row[0][None, :PROMPT_TOKENS].to(policy.device)
    trunks = 1 if policy.critic_trunk is None else 2
    policy.train()
    with whole(policy) as itself:
        fixed, per_token = kept_bytes(
            itself,
            lambda n: itself.lm.base_model(input_ids=ids.repeat(n, 1), use_cache=False),
            ids.numel(),
        )
    at_once = tokens if policy.plain else min(CHUNK_TOKENS, tokens)
    vocabulary = len(policy.lm.get_output_embeddings().weight)
    passes = {
        "activations": trunks * (fixed + tokens * per_token),
        "logits": at_once * vocabulary * LOGITS_COPIES * 4,
    }
    sampling = cached_tokens * cache_bytes(policy.lm)
    if is_split(policy):  # of which each process samples with a whole one
        sampling += sum(p.nbytes for p in policy.lm.parameters())
    yield from memory(policy, frozen, optimizer, passes, sampling)


def memory(
    trained: Policy | RewardModel,
    frozen: Sequence[Policy | RewardModel],
    optimizer: Optimizer,
    passes: dict[str, float],
    cache: float,
) -> Iterator[Check]:
    """Need against room for each device, an estimate.

    Args:
        passes: bytes of a forward and backward pass.
        cache: bytes of the key-value cache, which is gone when a pass begins.
    """
    gradients = sum(kept_here(p).nbytes for p in optimizer.parameters)
    learning = {"gradients": gradients, **passes}
    parts: dict[torch.device, dict[str, float]] = defaultdict(lambda: {"weights": 0.0})
    parts[trained.device] |= {"Adam": 2 * gradients}
    parts[trained.device] |= learning if sum(learning.values()) > cache else {"cache": cache}
    # An adapted policy and its reference have frozen weights in common.
    for p in {p for model in [trained, *frozen] for p in model.parameters()}:
        parts[p.device]["weights"] += kept_here(p).nbytes
    for device, need in parts.items():
        total, room = sum(need.values()), available_bytes(device) + need["weights"]
        largest = max(need, key=lambda name: need[name])
        yield Check(
            f"memory of {device}",
            total / room,
            SHARE_OF_MEMORY,
            f"most goes to {largest}",
            MEMORY_CURES.get(largest, "use a smaller model"),
            words=f"needs about {total / GB:.2f} of {room / GB:.2f} GB: "
            + ", ".join(f"{name} {part / GB:.2f}" for name, part in need.items()),
        )


MEMORY_CURES = {
    "activations": "lower --max_tokens, or --max_length if single rows are longer",
    "logits": "lower --max_tokens",
    "cache": "lower --batch_size or --max_new_tokens",
}


def kept_bytes(model: nn.Module, forward: Callable[[int], Any], tokens: int) -> tuple[float, float]:
    """What autograd keeps of a forward pass beside the weights: bytes at all, and for each token.

    Measured with one row and with two: autocast's copies of the weights do not grow with the
    tokens.
    """
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def measure(rows: int) -> int:
        kept: dict[int, int] = {}

        def keep(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            output = forward(rows)  # held, so that no address is used twice
        del output
        return sum(size for address, size in kept.items() if address not in weights)

    one, two = measure(1), measure(2)
    return 2 * one - two, (two - one) / tokens


def available_bytes(device: torch.device) -> float:
    """Memory that is free for this process, one of several on a machine; infinite where nothing
    tells."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return free_memory() / processes.local_size()


def _collated(policy: Policy, rows: Sequence[Row]) -> Sequences:
    prompt_ids, response_ids = zip(*rows, strict=True)
    return collate(prompt_ids, response_ids, pad_id=policy.pad_id).to(policy.device)


def row_length(row: Row) -> int:
    """Tokens of prompt and response."""
    return len(row[0]) + len(row[1])
