"""A small question-answer world with a known true reward; needs no network and no download."""

from rlhf_min.world.dataset import World, make_world
from rlhf_min.world.gold import GoldParts, gold_parts
from rlhf_min.world.models import small_bert, small_gpt2
from rlhf_min.world.questions import KINDS, Question
from rlhf_min.world.responses import Rates
from rlhf_min.world.tokenizers import build_wordpiece, train_bpe

__all__ = [
    "KINDS",
    "GoldParts",
    "Question",
    "Rates",
    "World",
    "build_wordpiece",
    "gold_parts",
    "make_world",
    "small_bert",
    "small_gpt2",
    "train_bpe",
]
