"""The command line: options from config dataclasses, one-line errors, and the run's folder."""

import functools
import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser
from transformers.utils import logging as transformers_logging

from rlhf_min.config import option, require_positive
from rlhf_min.errors import BadInput, NonFinite, require

RUN_FILE = "run.json"


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
        None, "Your rows: CSV, JSON, JSONL or Parquet. Default: the embedded world."
    )
    out: str | None = option(None, "Folder of the run; must not exist. Default: the next free one.")
    overwrite: bool = option(False, "Replace the run in --out if there is one.")
    heldout_share: float = option(0.1, "Share of your prompts that is kept out of training.")
    max_response_tokens: int = option(48, "Longest response, EOS included; longer ones are cut.")
    max_length: int = option(128, "Longest prompt and response together, in policy tokens.")
    template: str | None = option(
        None, "What the policy reads, with {prompt} in it; \\n is a new line. Default: the model's."
    )
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto is cuda where there is one.")
    threads: int | None = option(None, "CPU threads of PyTorch. Default: PyTorch's own choice.")

    def __post_init__(self) -> None:
        require_positive(self, "max_response_tokens", "max_length", "threads")
        require(self.out != "", "--out is empty; give a folder")
        require(
            self.template is None or self.template.count("{prompt}") == 1,
            f"template {self.template!r} must hold {{prompt}} exactly once",
        )
        require(
            self.max_length <= 2**20,
            f"max_length is {self.max_length}; it must be at most {2**20}",
        )
        require(
            0 < self.heldout_share < 1,
            f"heldout_share is {self.heldout_share}; it must lie between 0 and 1",
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

    def torch_device(self) -> torch.device:
        """The device to run on."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
            if device.type in ("cpu", "cuda"):
                torch.empty(0, device=device)
                return device
        except (RuntimeError, AssertionError):
            pass
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise BadInput(f"--device {self.device} cannot be used here; there are: {', '.join(there)}")


def parse(description: str | None, *config_classes: Any) -> Any:
    """Read the command line into one object for each config class, and set the threads it asks for.

    Raises:
        SystemExit: with code 2 for an unknown option or a value that cannot be read.
        BadInput: for a value out of its range.
    """
    parser = _Parser(config_classes, description=description)
    for action in parser._actions:  # written for the option itself, it would say the opposite
        if any(name.startswith("--no_") for name in action.option_strings):
            action.help = f"Turns --{action.dest} off."
    *configs, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if unknown:
        parser.error(f"unknown option {unknown[0]}")
    for config in configs:
        if isinstance(config, RunOptions):
            config.torch_device()  # refused here, before anything is read
            if config.threads is not None:
                torch.set_num_threads(config.threads)
    return configs[0] if len(configs) == 1 else tuple(configs)


class _Parser(HfArgumentParser):
    """Says what is wrong in one line, without the usage of forty options before it."""

    def error(self, message: str) -> NoReturn:
        """Print the message and end with code 2."""
        _fail(f"{message}; --help explains all options", 2)


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Run a command's main function; turn its errors into one line and an exit code.

    Exit code 2 for bad input, 1 for numbers that went wrong, 130 for Ctrl-C.
    """

    @functools.wraps(main)
    def wrapped() -> None:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        try:
            main()
        except BadInput as error:
            _fail(str(error), 2)
        except NonFinite as error:
            _fail(str(error), 1)
        except KeyboardInterrupt:
            _fail("stopped", 130)

    return wrapped


def check_out(options: RunOptions, default: str) -> Path:
    """The run's folder: ``--out``, or ``runs/<default>``, or the next free name after it.

    Nothing is created yet, so that an error in the data or a model leaves nothing behind.

    Raises:
        BadInput: if ``--out`` exists without ``--overwrite``, or holds something else than a run.
    """
    if options.out is None:
        first = Path("runs") / default
        later = (first.with_name(f"{default}-{i}") for i in range(2, 10_000))
        return first if not first.exists() else next(path for path in later if not path.exists())
    out = Path(options.out)
    try:
        out.exists()
    except OSError as error:
        raise BadInput(
            f"--out {options.out[:60]}: {error.strerror}; give another folder"
        ) from error
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        require(
            options.overwrite,
            f"--out {out} exists; give another folder or --overwrite",
        )
        require(
            (out / RUN_FILE).is_file(),
            f"--out {out} holds no {RUN_FILE}, so it is not a run and is not overwritten",
        )
    return out


def open_run(out: Path, *configs: Any) -> Path:
    """Create the run's folder with `run.json`: the configuration and the versions.

    Raises:
        BadInput: if the folder cannot be made.
    """
    try:
        if (out / RUN_FILE).is_file():
            shutil.rmtree(out)
        out.mkdir(parents=True, exist_ok=True)
        record = {
            "config": {type(c).__name__: _json_values(asdict(c)) for c in configs},
            "versions": {name: version(name) for name in ("rlhf_min", "torch", "transformers")},
            "threads": torch.get_num_threads(),
        }
        (out / RUN_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise BadInput(f"--out {out}: cannot be written: {error.strerror}") from error
    return out


def run_seed(run: Path) -> int:
    """The seed of a run, from its `run.json`; 0 if this folder holds no run.

    Raises:
        BadInput: if `run.json` is not what `open_run` wrote.
    """
    if not (run / RUN_FILE).is_file():
        return 0
    try:
        configs = json.loads((run / RUN_FILE).read_text(encoding="utf-8"))["config"].values()
        return next(config["seed"] for config in configs if "seed" in config)
    except (OSError, ValueError, LookupError, AttributeError, TypeError, StopIteration) as error:
        raise BadInput(f"{run / RUN_FILE} cannot be read; give --seed") from error


def _json_values(options: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: it becomes the word that the command line understands."""
    return {k: str(v) if v in (math.inf, -math.inf) else v for k, v in options.items()}


def _fail(message: str, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
