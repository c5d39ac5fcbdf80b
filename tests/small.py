"""Small random models and tokenizers, made on the spot and the same for a seed, and what the tests
of the trainers share.

There are two families. Models over 25 syllables, one for each architecture, show that the code fits
any model: their weights are large, biases and norms too, so that distributions are far from uniform
and nothing is equal by being zero. Models over eight words, which `small_policy` and
`small_reward_model` make, are trained.
"""

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tolerances import FP64
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from rlhf_min.data import PreferenceExample, PromptExample, SFTExample, UnpairedExample
from rlhf_min.policy import Critic, Policy
from rlhf_min.reward_model import RewardModel
from rlhf_min.world import build_wordpiece

torch.set_num_threads(1)  # models so small only wait for a second thread

# Models over syllables.

WIDTH, VOCABULARY, POSITIONS = 16, 32, 64
EOS, PAD = 1, 0
SYLLABLES = [a + b for a, b in product("bdfgk", "aeiou")]  # 25 of them: "ba be bi bo bu da ..."


@dataclass
class StubTokenizer:
    """For tests in which only the ids of the special tokens matter."""

    eos_token_id: int = EOS
    pad_token_id: int | None = PAD


def seeded(make: Callable[[], PreTrainedModel], seed: int = 0) -> PreTrainedModel:
    """A new float64 model in eval mode; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make().double().eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.2 * torch.randn_like(p))
    return model


def gpt2(seed: int = 0, *, vocabulary: int = VOCABULARY, dropout: float = 0.0) -> PreTrainedModel:
    """Learned positions, and a vocabulary projection tied to the embeddings."""
    return seeded(lambda: GPT2LMHeadModel(gpt2_config(vocabulary, dropout)), seed)


def gpt2_config(vocabulary: int, dropout: float = 0.0) -> GPT2Config:
    return GPT2Config(
        vocab_size=vocabulary,
        n_positions=POSITIONS,
        n_layer=2,
        n_embd=WIDTH,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=EOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


def llama(seed: int = 0, *, vocabulary: int = VOCABULARY, dropout: float = 0.0) -> PreTrainedModel:
    """Rotary positions, grouped keys, and a vocabulary projection of its own."""
    return seeded(
        lambda: LlamaForCausalLM(LlamaConfig(**llama_like(vocabulary), attention_dropout=dropout)),
        seed,
    )


def gemma2(seed: int = 0) -> PreTrainedModel:
    """Caps its logits, here at 3, which its logits really reach."""
    config = Gemma2Config(**llama_like(), head_dim=8, final_logit_softcapping=3.0)
    return seeded(lambda: Gemma2ForCausalLM(config), seed)


def cohere(seed: int = 0) -> PreTrainedModel:
    """Multiplies its logits by 0.25."""
    config = CohereConfig(**llama_like(), logit_scale=0.25)
    return seeded(lambda: CohereForCausalLM(config), seed)


def granite(seed: int = 0) -> PreTrainedModel:
    """Divides its logits by 5."""
    config = GraniteConfig(**llama_like(), logits_scaling=5.0)
    return seeded(lambda: GraniteForCausalLM(config), seed)


CAUSAL = pytest.mark.parametrize("make", [gpt2, llama], ids=lambda make: make.__name__)


def llama_like(vocabulary: int = VOCABULARY) -> dict[str, int]:
    return {
        "vocab_size": vocabulary,
        "max_position_embeddings": POSITIONS,
        "num_hidden_layers": 2,
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "bos_token_id": EOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }


def bert(seed: int = 0, *, dropout: float = 0.0, labels: int = 1) -> PreTrainedModel:
    """A sequence classifier for `bert_syllables`."""
    return seeded(lambda: BertForSequenceClassification(bert_config(dropout, labels)), seed)


def bert_config(dropout: float = 0.0, labels: int = 1) -> BertConfig:
    config = BertConfig(
        vocab_size=5 + len(SYLLABLES),
        max_position_embeddings=POSITIONS,
        num_hidden_layers=2,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_attention_heads=2,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        pad_token_id=0,
    )
    config.num_labels = labels
    return config


def gpt2_classifier(seed: int = 0) -> PreTrainedModel:
    """A sequence classifier for `syllables`, without bias in its last layer."""
    config = gpt2_config(3 + len(SYLLABLES))
    config.num_labels = 1
    return seeded(lambda: GPT2ForSequenceClassification(config), seed)


def syllables(*, pad: str | None = "<pad>") -> PreTrainedTokenizerFast:
    """One id for each word: <pad> 0, <eos> 1, <unk> 2, then `SYLLABLES` from 3."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *SYLLABLES])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>", pad_token=pad
    )


def bert_syllables() -> BertTokenizer:
    """One id each: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4, then `SYLLABLES` from 5."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *SYLLABLES]
    return BertTokenizer(vocab={token: i for i, token in enumerate(tokens)})


def text(indices: Sequence[int]) -> str:
    """`SYLLABLES` by their numbers, joined to a text."""
    return " ".join(SYLLABLES[i] for i in indices)


def policy_of(lm: PreTrainedModel, *, critic: str = "none", seed: int = 1) -> Policy:
    """A policy with a stub tokenizer whose critic is random, a separate trunk not a copy."""
    made = Policy(lm, StubTokenizer(), critic=critic)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in made.critic_tensors().values():
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=rng, dtype=tensor.dtype))
    return made


def token_rows(
    lengths: Sequence[int], *, seed: int, vocabulary: int = VOCABULARY, eos: bool = False
) -> list[Tensor]:
    """Rows of random ids without special tokens, or with EOS as their last."""
    rng = torch.Generator().manual_seed(seed)
    rows = [torch.randint(2, vocabulary, (n,), generator=rng) for n in lengths]
    if eos:
        for row in rows:
            row[-1] = EOS
    return rows


# Models over words, and how they are trained.

WORDS = ["red", "blue", "green", "big", "small", "ball", "one", "two"]
END, WORD_PAD = 0, 1  # their ids; the words follow
RED, BLUE, GREEN, BIG, SMALL, BALL, ONE, TWO = range(2, 10)

Metrics = dict[str, float]
# The module that is trained, its State, and what starts its generator.
Run = tuple[nn.Module, Any, Callable[[], Iterator[Metrics]]]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word, an end and a pad."""
    vocab = {word: i for i, word in enumerate(["<end>", "<pad>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<pad>")


def small_policy(
    *,
    critic: Critic = "none",
    seed: int = 0,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float64,
    plain: bool = False,
) -> Policy:
    """A GPT-2 of one layer of width 16 whose value head, if any, is not zero."""
    config = GPT2Config(
        vocab_size=len(WORDS) + 2,
        n_positions=16,
        n_layer=1,
        n_embd=16,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        initializer_range=0.2,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=WORD_PAD,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm = GPT2LMHeadModel(config).to(dtype)
        policy = Policy(lm, word_tokenizer(), critic=critic, plain=plain)
        if policy.value_head is not None:
            nn.init.normal_(policy.value_head.weight, std=0.2)
    return policy


def small_reward_model(
    *, seed: int = 0, dropout: float = 0.0, dtype: torch.dtype = torch.float64
) -> RewardModel:
    """A BERT of one layer of width 16."""
    tokenizer = build_wordpiece([" ".join(WORDS)], 100)
    config = BertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=32,
        num_hidden_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
    )
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RewardModel(BertForSequenceClassification(config).to(dtype), tokenizer)


def ids(*tokens: int) -> Tensor:
    return torch.tensor(tokens)


# Rows of unequal lengths, on both sides.
DEMONSTRATIONS = [
    SFTExample(ids(RED, BALL), ids(ONE, END)),
    SFTExample(ids(BIG), ids(TWO, TWO, SMALL, BALL, END)),
    SFTExample(ids(BLUE, BIG, BALL, BALL), ids(END)),
    SFTExample(ids(GREEN, ONE, SMALL), ids(RED, BLUE, END)),
    SFTExample(ids(TWO, SMALL), ids(BIG, ONE, BIG, END)),
    SFTExample(ids(ONE, RED, ONE, RED, ONE), ids(GREEN, END)),
    SFTExample(ids(SMALL), ids(SMALL, RED, END)),
    SFTExample(ids(BALL, BLUE, TWO), ids(BLUE, END)),
]

PREFERENCES = [
    PreferenceExample(ids(RED, BALL), ids(ONE, END), ids(TWO, TWO, TWO, END)),
    PreferenceExample(ids(BIG), ids(TWO, TWO, SMALL, BALL, END), ids(END)),
    PreferenceExample(ids(BLUE, BIG, BALL, BALL), ids(END), ids(RED, END)),
    PreferenceExample(ids(GREEN, ONE, SMALL), ids(RED, BLUE, END), ids(BLUE, RED, END)),
    PreferenceExample(ids(TWO, SMALL), ids(BIG, ONE, BIG, END), ids(SMALL, END)),
    PreferenceExample(ids(ONE, RED, ONE, RED, ONE), ids(GREEN, END), ids(BIG, BIG, BIG, END)),
    PreferenceExample(ids(SMALL), ids(SMALL, RED, END), ids(RED)),
    PreferenceExample(ids(BALL, BLUE, TWO), ids(BLUE, END), ids(BALL, END)),
]

# Of eight prompts; five are desirable.
UNPAIRED = [
    UnpairedExample(x.prompt_ids, x.response_ids, i not in (1, 4, 6))
    for i, x in enumerate(DEMONSTRATIONS)
]

PROMPTS = [
    PromptExample(" ".join(WORDS[i - 2] for i in x.prompt_ids), x.prompt_ids)
    for x in DEMONSTRATIONS
]


TEXT_PAIRS = [
    {"prompt": "red ball", "chosen": "one big", "rejected": "two"},
    {"prompt": "big", "chosen": "small ball", "rejected": "green one two"},
]


def lengths(_prompts: list[str], responses: list[str]) -> list[float]:
    """A reward: the characters of each response."""
    return [float(len(response)) for response in responses]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stacked(rows: Iterable[Tensor]) -> Tensor:
    """Rows as (B, T) with zeros at padding."""
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def shuffled(n: int, seed: int) -> list[int]:
    """The order of the data in an epoch is a permutation drawn from the seed plus the epoch."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()


def row_logprobs(
    policy: Policy, prompt_ids: Tensor, response_ids: Tensor, temperature: float = 1.0
) -> Any:
    """Log-probabilities of all tokens at the places of the response, ``(T, V)``, from the plain
    logits of the row alone."""
    logits = policy.lm(torch.cat([prompt_ids, response_ids])[None]).logits[0] / temperature
    return logits[len(prompt_ids) - 1 : -1].log_softmax(-1)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def largest_difference(module: nn.Module, other: nn.Module | dict[str, Tensor]) -> float:
    """Of any weight."""
    theirs = weights(other) if isinstance(other, nn.Module) else other
    ours = weights(module)
    assert ours.keys() == theirs.keys()
    # torch's max, unlike Python's, does not overlook a NaN
    return float(torch.stack([(ours[name] - theirs[name]).abs().max() for name in ours]).max())


def decayed(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: what has rows and columns decays."""
    parameters = list(module.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]


def clip_by_hand(module: nn.Module, limit: float) -> float:
    """Scale a gradient that is longer than the limit down to it; torch's 1e-6 is part of it."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    norm = sum(float(g.square().sum()) for g in gradients) ** 0.5
    for gradient in gradients:
        gradient.mul_(min(1.0, limit / (norm + 1e-6)))
    return norm


def assert_is_the_plain_loop(
    found: list[Metrics],
    plain: nn.Module,
    loss_of: Callable[[list[int]], tuple[Tensor, Metrics]],
    *,
    order: list[int],
    rate: float,
) -> None:
    """Three steps of three rows, written out: one of warm-up, then down to 0 at step 3.

    Args:
        found: the metrics of the run.
        plain: a module as it was at the start of that run; it is trained.
        loss_of: the loss of the rows of these numbers, and what else is reported of them.
        order: of the rows.
        rate: the learning rate.
    """
    optimizer = torch.optim.AdamW(decayed(plain, 0.1), lr=rate, eps=1e-8)
    rows = (order[:3], order[3:6], order[6:])
    for metrics, now, batch in zip(found, [0.0, rate, rate / 2], rows, strict=True):
        loss, reported = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        norm = clip_by_hand(plain, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = now
        optimizer.step()
        expected = {"loss": loss.item(), "grad_norm": norm, "learning_rate": now, **reported}
        assert {k: metrics[k] for k in expected} == pytest.approx(expected, abs=FP64)


def without_time(metrics: Metrics) -> Metrics:
    return {k: v for k, v in metrics.items() if not k.startswith(("time/", "memory/"))}


def real_copy(state: Any) -> Any:
    """Through the bytes of a file that holds tensors and plain values only."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_deterministic(build: Callable[[], Run]) -> None:
    """The same seed gives the same metrics and the same weights, to the bit."""
    (module, _, train), (again, _, train_again) = build(), build()
    first, second = [[without_time(m) for m in f()] for f in (train, train_again)]
    assert len(first) > 1
    assert first == second
    assert largest_difference(module, again) == 0


def assert_resumes(build: Callable[[], Run], *, steps: int) -> None:
    """A run that is stopped and goes on in new objects has the bits of a whole run."""
    module, _, train = build()
    whole = [without_time(m) for m in train()]
    assert len(whole) == steps

    for stop in (1, steps - 2):  # within the first epoch, and within a later one
        stopped, state, train = build()
        before = [without_time(m) for m in islice(train(), stop)]
        saved = real_copy({"model": stopped.state_dict(), "state": state.state_dict()})

        resumed, state, train = build()
        resumed.load_state_dict(saved["model"])
        state.restore(saved["state"])
        after = [without_time(m) for m in train()]
        assert before + after == whole
        assert largest_difference(resumed, module) == 0
        assert largest_difference(resumed, stopped) > 0
