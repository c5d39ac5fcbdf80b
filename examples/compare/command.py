"""The options of the command. Nothing here imports torch, so that a typo is answered at once."""

import ast
import contextlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from compare import options as words
from rlhf_min.config import (
    DPOConfig,
    GRPOConfig,
    PPOConfig,
    RewardConfig,
    RLOOConfig,
    SFTConfig,
    check_options,
    option,
)
from rlhf_min.encoding.template import require_template
from rlhf_min.errors import BadInput, require
from rlhf_min.harness.parser import Parser
from rlhf_min.harness.rows.columns import parse_columns
from rlhf_min.harness.rows.load import is_hub_name
from rlhf_min.loading.sources import require_source

CONFIGS: dict[str, Any] = {
    "sft": SFTConfig,
    "reward": RewardConfig,
    "dpo": DPOConfig,
    "ppo": PPOConfig,
    "grpo": GRPOConfig,
    "rloo": RLOOConfig,
}
SAMPLED = ("ppo", "grpo", "rloo")  # whose responses our side samples for both
# What a run of a few steps has no use for; how long it is follows from --steps.
UNUSED = ("steps", "eval_every", "normalise", "cache_reference")
PASSES = ("epochs",)  # over all data; those of the sampled are over one rollout
LIMITS = ("stop_kl", "max_kl")  # which trl's GRPO and RLOO have not


@dataclass(frozen=True)
class Options:
    """What is compared, where and how. `ours` holds the options of the stage that were given."""

    stage: str | None = option(None, "sft, reward, dpo, ppo, grpo or rloo; a script tells it.")
    model: str | None = option(None, "Folder or name of the model that both start from.")
    data: str | None = option(None, "Your rows: a file, or a dataset on the Hub.")
    columns: str | None = option(None, "Your names of columns, like prompt=question,chosen=good.")
    limit: int | None = option(None, "At most so many of the usable rows.", above=0)
    template: str | None = option(
        None, "What the model reads, with {prompt} in it, or chat. Default: the prompt alone."
    )
    max_length: int | None = option(None, "Longest row in tokens. Default: trl's.", above=0)
    steps: int = option(4, "Optimizer steps to compare; of PPO rollouts.", above=0)
    float64: bool = option(False, "Compute in float64: the proof, at twice the memory.")
    trl_python: str | None = option(None, "A Python that has trl. Default: this one.")
    trl: list[str] = field(
        default_factory=list, metadata={"help": "Options of trl's config, like beta=0.2 seed=1."}
    )
    trl_data: str | None = option(None, "Rows for trl, if they are to be others.")
    trl_script: str | None = option(None, "A script of yours that trains with trl.")
    script_args: str | None = option(None, "Its command line, in quotes.")
    reward: str | None = option(
        None, "Of PPO, GRPO, RLOO: FILE.py:FUNCTION, or a classifier's folder."
    )
    trl_run: str | None = option(None, "A finished run of trl's: folder, CSV or JSONL.")
    run: str | None = option(None, "The finished run of ours beside it.")
    out: str | None = option(None, "Folder to write the comparison to.")
    threads: int | None = option(None, "CPU threads of PyTorch on both sides.", above=0)
    ours: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def script_arguments(self) -> list[str]:
        """The command line of the script."""
        try:
            return shlex.split(self.script_args or "")
        except ValueError as error:
            raise BadInput(f"--script_args {self.script_args}: {error}; close it") from None

    @property
    def parsed_columns(self) -> dict[str, str] | None:
        """Our column -> the user's."""
        return None if self.columns is None else parse_columns(self.columns)

    @property
    def trl_options(self) -> dict[str, Any]:
        """Those behind ``--trl``, as values."""
        given = {}
        for text in self.trl:
            name, sign, value = text.partition("=")
            require(bool(name and sign), f"--trl {text}: write an option as name=value")
            given[name] = _value(value)
        return given


def parse_options(description: str | None, arguments: Sequence[str] | None = None) -> Options:
    """Read the command line.

    Raises:
        BadInput: for what cannot be compared.
        SystemExit: with code 2, for an unknown option or a value that cannot be read.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = Parser(description)
    parser.add_fields(Options, without=("ours",))
    stage = _stage(arguments)
    if stage in CONFIGS:
        unused = {"ppo": UNUSED, "grpo": UNUSED + LIMITS, "rloo": UNUSED + LIMITS}.get(
            stage, UNUSED + PASSES
        )
        parser.add_fields(CONFIGS[stage], without=(*unused, *map(_name, fields(Options))))
    _require_stage(arguments, stage)
    given = vars(parser.parse_args(arguments))
    names = {f.name for f in fields(Options)}
    ours = {name: value for name, value in given.items() if name not in names}
    options = Options(ours=ours, **{n: value for n, value in given.items() if n in names})
    if stage in CONFIGS:
        CONFIGS[stage](
            **(of_rollouts(ours, stage) if stage in SAMPLED else ours)
        )  # says what is out of bounds
    _check(options, set(given))
    return options


def of_rollouts(ours: dict[str, Any], stage: str) -> dict[str, Any]:
    """Options of a stage that samples: those given, and what a rollout of a comparison is without
    them."""
    given = {"batch_size": 8, "max_new_tokens": 32, "temperature": 1.0} | ours
    if stage != "ppo":
        given = {"group_size": 4} | given
    return {"minibatch_size": given["batch_size"]} | given


def _check(options: Options, given: set[str]) -> None:
    if options.trl_run is not None:
        require(options.run is not None, "--trl_run needs a run of ours beside it: --run DIR")
        others = sorted(given - {"trl_run", "run", "stage", "out"})
        require(
            not others,
            f"--trl_run reads what two runs have logged; leave --{''.join(others[:1])} out",
        )
        return
    require(options.run is None, "--run is the run beside a --trl_run; give that too")
    if options.trl_script is not None:
        for name in ("model", "data", "columns", "trl_data", "limit"):
            require(
                getattr(options, name) is None,
                f"a script brings its own model and rows; leave --{name} out",
            )
        require(not options.trl, "a script has its options in itself; leave --trl out")
        require(os.path.isfile(options.trl_script), f"--trl_script {options.trl_script}: no file")
        options.script_arguments  # noqa: B018  # raises for an open quote
    else:
        require(
            options.stage is not None,
            "give --stage sft, reward, dpo, ppo, grpo or rloo with --model and --data; or "
            "--trl_script FILE; or --trl_run DIR with --run DIR",
        )
        require(options.model is not None, "give --model, the folder that both sides start from")
        require(options.data is not None, "give --data, the rows that both sides train on")
        require(options.script_args is None, "--script_args is for a --trl_script; leave it out")
        require_source(str(options.model))
        for name in ("data", "trl_data"):
            data = getattr(options, name)
            known = data is None or os.path.exists(data) or is_hub_name(data) or ":" in data
            require(known, f"--{name} {data}: no such file")
    require(
        options.stage is None or options.stage in CONFIGS,
        f"--stage {options.stage} is not known; there are {', '.join(CONFIGS)}",
    )
    if options.trl_python is not None:
        found = shutil.which(options.trl_python)
        require(found is not None, f"--trl_python {options.trl_python}: no such Python")
    options.parsed_columns  # noqa: B018  # raises for what is none
    if options.template is not None:
        require_template(options.template.replace("\\n", "\n"))
    options.trl_options  # noqa: B018  # the same


def given_to_trl(options: Options, stage: Any) -> dict[str, Any]:
    """Options of trl's config that were given, in our words or in its own."""
    given = words.in_trl_words(stage, options.ours, steps=options.steps)
    if options.max_length is not None:
        given["max_length"] = options.max_length
    return given | options.trl_options


def _require_stage(arguments: Sequence[str], stage: str | None) -> None:
    """Raise `BadInput` for an option of a stage that is not the one that is compared."""
    own = {f.name for f in fields(CONFIGS[stage])} if stage in CONFIGS else set()
    own |= {f.name for f in fields(Options)}
    script = any(argument.startswith("--trl_script") for argument in arguments)
    for argument in arguments:
        name = argument.partition("=")[0].removeprefix("--").replace("-", "_")
        of = [s for s, config in CONFIGS.items() if name in {f.name for f in fields(config)}]
        if argument.startswith("--") and name not in own and of:
            cure = f"give --stage {' or '.join(of)} with it"
            if script:
                cure = "a script has its options in itself; leave it out"
            raise BadInput(f"--{name} is an option of {', '.join(of)}; {cure}")


def _stage(arguments: Sequence[str]) -> str | None:
    for i, argument in enumerate(arguments):
        name, sign, value = argument.partition("=")
        if name == "--stage":
            return value if sign else next(iter(arguments[i + 1 : i + 2]), None)
    return None


def _value(text: str) -> Any:
    """As JSON or Python would read it: true, True, null, None, 0.1, ["ipo"]; else the text."""
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError):
            return read(text)
    return text


def _name(of: Any) -> str:
    return of.name
