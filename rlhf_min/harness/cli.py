"""The command line: options from config dataclasses, and errors of one line."""

import argparse
import atexit
import copy
import functools
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import torch
from transformers import HfArgumentParser
from transformers.utils import logging as transformers_logging

from rlhf_min.config import RewardConfig, TrainingConfig, check_options, option
from rlhf_min.encoding.template import require_template
from rlhf_min.errors import BadInput, Diverged, NonFinite, require
from rlhf_min.harness.report import finish
from rlhf_min.harness.rows.columns import parse_columns
from rlhf_min.harness.run import system_errors
from rlhf_min.harness.run.files import NotWritten
from rlhf_min.harness.run.folder import continued, how_to_go_on, seed_all
from rlhf_min.harness.run.signals import Stopped, raising_signals
from rlhf_min.harness.run.terminal import outlive_terminal
from rlhf_min.harness.trackers import check_trackers

Config = TypeVar("Config", bound=Any)

MAX_LENGTH, MAX_THREADS = 2**20, 1024
KEPT = "what was saved before is as it was"
# What means nothing where no model is trained.
OF_TRAINING = (
    *("allow_config_change", "save_every", "keep_last", "keep_best"),
    *("heldout_share", "gradient_checkpointing", "skip_preflight", "report_to"),
)


@dataclass(frozen=True)
class RunOptions:
    """What all commands share: which models, which data, where to, and where it runs."""

    model: str | None = option(
        None, "Causal LM to start from: a folder or a name. Default: a small new GPT-2."
    )
    reward_model: str | None = option(
        None, "Sequence classifier as reward: a folder or a name. Default: a small new BERT."
    )
    data: str | None = option(
        None,
        "Your rows: a file, a folder of files or owner/name[:config] on the Hub. Default: "
        "the embedded world.",
    )
    columns: str | None = option(
        None, "Your names of columns, like prompt=question,chosen=good,rejected=bad."
    )
    split: str | None = option(None, "Split of a folder or a Hub dataset. Default: train.")
    heldout_data: str | None = option(
        None, "Rows to hold out, like --data, instead of a share of that."
    )
    heldout_split: str | None = option(None, "Split of --heldout_data. Default: test.")
    limit: int | None = option(
        None, "At most so many of the usable rows of --data, drawn by the seed.", above=0
    )
    out: str | None = option(None, "Folder of the run; must not exist. Default: the next free one.")
    overwrite: bool = option(False, "Replace the run in --out if there is one.")
    resume: str | None = option(
        None, "Folder of a run to go on with, to the bit, after a stop or a kill."
    )
    allow_config_change: bool = option(False, "Resume with other options than it started with.")
    save_every: int | None = option(
        None,
        "Steps from checkpoint to checkpoint; 0: none. Default: one every five minutes.",
        at_least=0,
    )
    keep_last: int = option(1, "Checkpoints of each stage that are kept.", above=0)
    keep_best: str | None = option(
        None, "Held-out metric like eval/score; its best model is kept in <run>/best/<stage>."
    )
    heldout_share: float | None = option(
        None, "Share of your prompts that is kept out of training. Default: 0.1.", above=0, below=1
    )
    max_response_tokens: int = option(
        48, "Longest response, EOS included; longer ones are cut.", above=0
    )
    max_length: int = option(
        128,
        "Longest prompt and response together, in policy tokens.",
        above=0,
        at_most=MAX_LENGTH,
    )
    template: str | None = option(
        None,
        "What the policy reads, with {prompt} in it and \\n for a new line; chat, for the "
        "tokenizer's chat template; or as_is, for rows that went through a template before: "
        "nothing is added, not even EOS. Default: the one it was trained with, else chat if there "
        "is.",
    )
    device: str = option("auto", "cpu, cuda, cuda:1, mps, ...; auto is cuda where there is one.")
    policy_device: str | None = option(None, "Where the policy is. Default: --device.")
    reward_device: str | None = option(
        None, "Where the reward model and the reference are. Default: --device."
    )
    gradient_checkpointing: bool = option(
        False, "Compute the layers again in backward instead of keeping them: memory for time."
    )
    plain: bool = option(
        False, "Compute as a textbook does, slower: for reading along, and for breakpoints."
    )
    skip_preflight: bool = option(False, "Start without measuring what a run relies on.")
    threads: int | None = option(
        None, "CPU threads of PyTorch. Default: PyTorch's own choice.", above=0, at_most=MAX_THREADS
    )
    report_to: list[str] = field(
        default_factory=list,
        metadata={"help": "tensorboard, wandb or both get the metrics too, if installed."},
    )

    def __post_init__(self) -> None:
        check_options(self)
        require(
            self.keep_best is None or self.keep_best.startswith("eval/"),
            f"--keep_best {self.keep_best} is no held-out metric; give one like eval/loss",
        )
        require(
            self.resume is None or (self.out is None and not self.overwrite),
            "--resume goes on in its own folder; leave --out and --overwrite out",
        )
        if self.columns is not None:
            parse_columns(self.columns)
        check_trackers(self.report_to)
        require(self.out != "", "--out is empty; give a folder")
        require(self.model != "", "--model is empty; give a folder or a name")
        require(self.reward_model != "", "--reward_model is empty; give a folder or a name")
        if self.template is not None:
            require_template(self.template)
        require(
            self.heldout_data is None or self.heldout_share is None,
            "--heldout_data takes the place of --heldout_share; leave one of them out",
        )
        require(
            self.heldout_split is None or self.heldout_data is not None,
            "--heldout_split is of --heldout_data; give it too, or --split for --data",
        )
        require(
            self.max_response_tokens < self.max_length,
            f"max_response_tokens {self.max_response_tokens} leaves no room for a prompt within "
            f"max_length {self.max_length}; lower the first or raise the second",
        )

    @property
    def max_prompt_tokens(self) -> int:
        """What the longest response leaves of `max_length`."""
        return self.max_length - self.max_response_tokens

    def torch_device(self, role: Literal["policy_device", "reward_device"]) -> torch.device:
        """Where the policy is, or where the reward model and the reference are.

        Raises:
            BadInput: if there is no such device; the message names those that there are.
        """
        given = "device" if getattr(self, role) is None else role
        name = getattr(self, given)
        if name == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        there += ["mps"] if torch.backends.mps.is_available() else []
        require(
            name in there or (name == "cuda" and torch.cuda.is_available()),
            f"--{given} {name} cannot be used here; there are: {', '.join(there)}",
        )
        return torch.device(name)


def parse(description: str | None, *config_classes: Any, without: Sequence[str] = ()) -> Any:
    """Read the command line into one object for each config class, and set the threads it asks for.

    Args:
        without: options of theirs that this command has no use for, so it does not know them.

    Raises:
        SystemExit: with code 2 for an unknown option or a value that cannot be read.
        BadInput: for a value out of its range.
    """
    parser = _Parser(config_classes, description=description)
    parser.forget(without)
    for config_class in config_classes:
        parser.add_recipes(pretrained_options(config_class))
    for action in parser._actions:  # written for the option itself, it would say the opposite
        if any(name.startswith("--no_") for name in action.option_strings):
            action.help = f"Turns --{action.dest} off."
    *configs, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if unknown:
        parser.error(f"unknown option {unknown[0]}")
    given = parser.given()
    run = next((c.resume for c in configs if isinstance(c, RunOptions)), None)
    if run is not None:
        configs = continued(configs, given, Path(run))
    for i, config in enumerate(configs):
        for options in configs:
            if isinstance(options, RunOptions) and isinstance(config, TrainingConfig) and not run:
                recipe = recipe_for(type(config), options)
                new = {name: value for name, value in recipe.items() if name not in given}
                configs[i] = replace(config, **new)
        if isinstance(config, RunOptions):
            config.torch_device("policy_device")  # refused here, before anything is read
            config.torch_device("reward_device")
            if config.threads is not None:
                torch.set_num_threads(config.threads)
    seed_all(configs)  # before a module of the user's is imported
    return configs[0] if len(configs) == 1 else tuple(configs)


def recipe_for(config_class: Any, options: RunOptions) -> dict[str, Any]:
    """The published settings for a pretrained model; none for a small one that was made here."""
    name = options.reward_model if config_class is RewardConfig else options.model
    if name is None:
        return {}
    file = Path(name) / "config.json"
    try:
        made_here = "small_world" in json.loads(file.read_text(encoding="utf-8"))
    except (OSError, RecursionError, TypeError, ValueError):
        made_here = False  # a name, or a folder that loading will complain of
    return {} if made_here else {k: v for k, (v, _) in pretrained_options(config_class).items()}


def pretrained_options(config_class: Any) -> dict[str, tuple[Any, str]]:
    """The published value and its source, of each option that has one."""
    return {
        f.name: f.metadata["pretrained"]
        for f in fields(config_class)
        if f.metadata.get("pretrained")
    }


def configured(config_class: type[Config], options: Any, **given: int | None) -> Config:
    """A stage's own defaults, or those for a pretrained model, with what the command line gives."""
    values = recipe_for(config_class, options) | {k: v for k, v in given.items() if v is not None}
    return config_class(seed=options.seed, **values)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage of forty options before it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.allow_abbrev = False
        # argparse would take -1e-3, -inf and the weight in "-0.3*brevity" for options.
        self._negative_number_matcher = re.compile(r"-(\.?\d|inf|nan)", re.IGNORECASE)

    def error(self, message: str) -> NoReturn:
        """Print the message and end with code 2."""
        if message.endswith(("expected one argument", "expected at least one argument")):
            message += "; a value that begins with - is written --option=-VALUE"
        _fail(f"{message}; --help explains all options", 2)


class _Parser(Parser, HfArgumentParser):
    """Options from the fields of configs."""

    @staticmethod
    def _parse_dataclass_field(parser: Any, field: Any) -> None:
        plain = copy.copy(field)
        plain.metadata = {"help": field.metadata["help"]}  # all of it would go to argparse
        HfArgumentParser._parse_dataclass_field(parser, plain)

    def forget(self, names: Sequence[str]) -> None:
        """Take these options for unknown."""
        for action in [action for action in self._actions if action.dest in names]:
            self._optionals._remove_action(action)
            self.set_defaults(**{action.dest: action.default})
            for option_string in action.option_strings:
                del self._option_string_actions[option_string]

    def add_recipes(self, pretrained: dict[str, tuple[Any, str]]) -> None:
        """Say in the help what a field is for pretrained models, and who published it."""
        for action in self._actions:
            if action.dest in pretrained:
                value, source = pretrained[action.dest]
                action.help = f"{action.help} Pretrained models: {value} ({source})."

    def given(self) -> set[str]:
        """The options that stand on the command line."""
        bare = copy.deepcopy(self)
        for action in bare._actions:
            action.default = argparse.SUPPRESS
        return set(vars(bare.parse_known_args()[0]))


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Run a command's main function; turn its errors into one line and an exit code.

    It goes on when nobody reads what it prints. Exit code 2 for bad input and for what the system
    refuses, 1 for numbers that went wrong and for too little memory, 130 for Ctrl-C, 143 for
    SIGTERM, 129 for a closed terminal (SIGHUP).
    """

    @functools.wraps(main)
    def wrapped() -> None:
        outlive_terminal()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        try:
            with raising_signals():
                main()
        except NotWritten as error:
            _fail(f"{error}; {system_errors.cure(error.__cause__)}; {KEPT}{how_to_go_on()}", 2)
        except BadInput as error:
            _fail(str(error), 2)
        except (Diverged, NonFinite) as error:
            _fail(str(error), 1)
        except OSError as error:
            _fail(f"{system_errors.refused(error)}; {KEPT}{how_to_go_on()}", 2)
        except (MemoryError, RuntimeError) as error:
            told = system_errors.out_of_memory(error) or system_errors.out_of_threads(error)
            if told is None:
                raise
            _fail(f"{told}{how_to_go_on()}", 1)
        except Stopped as stop:  # on request, so it is no error
            print(stop, file=sys.stderr)
            finish.show(stop.folder)
            sys.exit(stop.exit_code)
        except KeyboardInterrupt as stop:
            print(f"stopped at once; {KEPT}{how_to_go_on()}", file=sys.stderr)
            sys.exit(getattr(stop, "exit_code", 130))

    return wrapped


def _fail(message: str, code: int) -> NoReturn:
    print(f"error: {BadInput(message)}", file=sys.stderr)  # on one line
    # With no room or no descriptor left, libraries fail once more while Python ends.
    atexit.register(setattr, sys, "unraisablehook", lambda _: None)
    sys.exit(code)
