"""The command line: the options that commands share, and errors of one line.

Nothing here imports torch: it takes seconds, and what a command refuses is refused before.
"""

import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from rlhf_min.config import MAX_SEED, PPOConfig, RLOOConfig, check_options, option
from rlhf_min.encoding.template import require_template
from rlhf_min.errors import BadInput, Diverged, NonFinite, require
from rlhf_min.harness.parser import Parser, fail
from rlhf_min.harness.rows.columns import parse_columns
from rlhf_min.harness.run import lifeline, processes, system_errors
from rlhf_min.harness.run.atomic import NotWritten
from rlhf_min.harness.run.folder import how_to_go_on, recorded
from rlhf_min.harness.run.signals import Stopped, raising_signals
from rlhf_min.harness.run.terminal import outlive_terminal
from rlhf_min.harness.trackers import check_trackers
from rlhf_min.loading.sources import base_of, require_source

if TYPE_CHECKING:
    import torch

Config = TypeVar("Config", bound=Any)

MAX_LENGTH, MAX_THREADS = 2**20, 1024
KEPT = "what was saved before is as it was"
# What means nothing where no model is trained.
OF_TRAINING = (
    *("allow_config_change", "save_every", "keep_last", "keep_best"),
    *("heldout_share", "gradient_checkpointing", "skip_preflight", "report_to"),
    *("lora_rank", "lora_alpha", "lora_targets", "lora_merge", "shard"),
)
# What an experiment, which trains small models beside each other, has no use for.
OF_LARGE_MODELS = ("lora_rank", "lora_alpha", "lora_targets", "lora_merge", "shard")
# What means nothing on the embedded world.
OF_OWN_ROWS = ("columns", "split", "limit", "heldout_data", "heldout_split", "heldout_share")


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
    lora_rank: int | None = option(
        None,
        "Train adapters of this rank beside frozen weights (LoRA; needs peft, and about ten times "
        "the learning rate). Where the model is an adapter, that one is trained further; without "
        "this option it is merged and all of it is trained.",
        above=0,
    )
    lora_alpha: int | None = option(
        None, "The adapters are scaled by alpha / rank. Default: twice the rank.", above=0
    )
    lora_targets: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Names of the layers that get one, like q_proj v_proj. Default: every linear "
            "layer but the head."
        },
    )
    lora_merge: bool = option(
        False, "Save the finished model whole, its adapters added to its weights."
    )
    shard: bool = option(
        False,
        "Split what is trained among the processes of torchrun, for models too large for one "
        "(FSDP2). Changes nothing where there is one process.",
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

    def torch_device(self, role: Literal["policy_device", "reward_device"]) -> "torch.device":
        """Where the policy is, or where the reward model and the reference are.

        Raises:
            BadInput: if there is no such device; the message names those that there are.
        """
        import torch

        given = "device" if getattr(self, role) is None else role
        name = getattr(self, given)
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if processes.several():
            name = _own_device(given, name)
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        there += ["mps"] if torch.backends.mps.is_available() else []
        require(
            name in there or (name == "cuda" and torch.cuda.is_available()),
            f"--{given} {name} cannot be used here; there are: {', '.join(there)}",
        )
        return torch.device(name)

    def check_models(self) -> None:
        """Raise `BadInput` for a model that cannot be one, as far as names of files tell."""
        for name in (self.model, self.reward_model):
            try:
                if name is not None:
                    require_source(name)
            except OSError:
                pass  # loading says what the system refuses


def _own_device(given: str, name: str) -> str:
    """Which of the GPUs of its machine is the one of this process, if it is to have one."""
    require(
        not name.startswith("cuda:"),
        f"--{given} {name} is one GPU for several processes; give cuda, so that each has its own",
    )
    return f"cuda:{processes.local_rank()}" if name == "cuda" else name


@dataclass(frozen=True)
class OnlineOptions(RunOptions):
    """Options of the commands in which responses are sampled and rewarded."""

    reward: list[str] = field(
        default_factory=list,
        metadata={
            "help": "[WEIGHT*]module:function, file.py:function, model or classifier@LABEL; "
            "several add up."
        },
    )
    reward_timeout: float = option(
        600.0, "Seconds that a function may take for one batch; 0: no limit.", at_least=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not (self.reward and self.reward_model),
            "give --reward_model or --reward, not both; --reward takes reward models too",
        )
        require(
            self.data is None
            or (self.model is not None and (self.reward_model is not None or bool(self.reward))),
            "your own prompts need trained models: give --model (see train_sft.py) and "
            "--reward_model (see train_reward_model.py) or --reward",
        )


@dataclass(frozen=True)
class ExperimentOptions(RunOptions):
    """Options of both experiments. As many runs go on at once as there are threads."""

    seed: int = option(
        0,
        "Of the world, of what is trained once, and of the intervals.",
        at_least=0,
        at_most=MAX_SEED,
    )
    seeds: int = option(3, "Runs with each setting, with the seeds 0, 1, ...", above=0)
    kl_coefs: list[float] = field(
        default_factory=lambda: [0.3, 0.1, 0.03], metadata={"help": "Of PPO, a curve for each."}
    )
    pairs: int | None = option(
        None, "Preference pairs that are learned from. Default: all.", above=0
    )
    ppo_steps: int = option(60, "Rollouts of each PPO run.", above=0)
    looks: int = option(6, "How often each run is measured, the last time at its end.", above=0)
    test_prompts: int = option(600, "Test prompts that it is measured on.", at_least=2)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_process("this command starts processes of its own")


def check_room(config: PPOConfig, max_response_tokens: int) -> None:
    """Raise `BadInput` if PPO could write more than there is room for beside the prompt."""
    require(
        config.max_new_tokens <= max_response_tokens,
        f"max_new_tokens {config.max_new_tokens} exceeds max_response_tokens "
        f"{max_response_tokens}; lower the first or raise the second",
    )


def parse(
    description: str | None,
    *config_classes: Any,
    without: Sequence[str] = (),
    instead: Mapping[str, str] | None = None,
    started_from: str = "model",
) -> Any:
    """Read the command line into one object for each config class.

    Args:
        config_classes: `RunOptions`, or what extends it, then the configs of what is trained; or
            none, for a command without options.
        without: options of theirs that this command has no use for, so it does not know them.
        instead: further ones, and what to say of each that is given.
        started_from: the option of `RunOptions` that names the model which is trained. If it is a
            pretrained one, the configs take what is published for those.

    Raises:
        SystemExit: with code 2 for an unknown option or a value that cannot be read.
        BadInput: for a value out of its range.
    """
    parser = Parser(description, instead=instead)
    for config_class in config_classes:
        parser.add_fields(config_class, without)
    given = vars(parser.parse_args())
    configs: list[Any] = []
    for config_class in config_classes:
        values = {f.name: given[f.name] for f in fields(config_class) if f.name in given}
        if configs and configs[0].resume is not None:
            # At once, since what is given may only be right beside what the run started with.
            values |= recorded(config_class, given, Path(configs[0].resume))
        elif configs:
            values = published(config_class, getattr(configs[0], started_from), values) | values
        configs.append(config_class(**values))
    if configs and configs[0].resume is not None:
        run = Path(configs[0].resume)
        configs[0] = replace(configs[0], **recorded(type(configs[0]), given, run))
    if configs:
        configs[0].check_models()
        _check_lora(configs, started_from)
        if configs[0].shard and not processes.several():
            print("--shard changes nothing, since there is one process; torchrun starts several")
    return configs[0] if len(configs) == 1 else tuple(configs)


def _check_lora(configs: Sequence[Any], started_from: str) -> None:
    """Raise `BadInput` for adapters that cannot be trained here."""
    options = configs[0]
    if options.lora_rank is None:
        require(
            not (options.lora_alpha or options.lora_targets or options.lora_merge),
            "--lora_alpha, --lora_targets and --lora_merge are of adapters; give --lora_rank too",
        )
        return
    require(
        not options.shard,
        "--shard splits models that are trained whole; of an adapter there is little to split: "
        "leave out --shard or --lora_rank",
    )
    require(find_spec("peft") is not None, "--lora_rank needs one more package: pip install peft")
    require(
        getattr(options, started_from) is not None,
        f"--lora_rank trains adapters of a model that there is; give one with --{started_from}",
    )
    base = Path(getattr(options, started_from))
    require(
        not (
            options.overwrite
            and options.out
            and base.resolve().is_relative_to(Path(options.out).resolve())
        ),
        f"--overwrite would remove {base}, of which the adapters are a part; give another --out",
    )
    require(
        all(getattr(config, "critic", None) != "separate" for config in configs),
        "--critic separate is a second trunk, all of it trained, which --lora_rank does without; "
        "give --critic shared",
    )


def published(config_class: Any, model: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """What papers use for a pretrained model; nothing for a small one that was made here, nor for
    an option whose default has become another by the given ones, as a loss has its own scale."""
    if model is None:
        return {}
    file = Path(base_of(model) or model) / "config.json"
    try:
        made_here = "small_world" in json.loads(file.read_text(encoding="utf-8"))
    except (OSError, RecursionError, TypeError, ValueError):
        made_here = False  # a name, or a folder that loading will complain of
    found = {f.name: f.metadata.get("pretrained") for f in fields(config_class)}
    if made_here:
        return {}
    plain, own = config_class(), config_class(**given)
    same = {name for name in found if getattr(plain, name) == getattr(own, name)}
    return {name: value[0] for name, value in found.items() if value and name in same}


def configured(
    config_class: type[Config], options: Any, *, started_from: str = "model", **given: int | None
) -> Config:
    """A stage's own defaults, or those for a pretrained model, with what the command line gives."""
    values = {name: value for name, value in given.items() if value is not None}
    values = published(config_class, getattr(options, started_from), values) | values
    return config_class(seed=options.seed, **values)


def in_groups(ppo_config: PPOConfig, options: Any, *, steps: int | None) -> RLOOConfig:
    """RLOO's own defaults, or those for a pretrained model, with PPO's rollouts in whole groups."""
    group_size = RLOOConfig.group_size
    batch_size = max(group_size, ppo_config.batch_size // group_size * group_size)
    return configured(
        RLOOConfig,
        options,
        steps=steps or ppo_config.steps,
        batch_size=batch_size,
        minibatch_size=min(batch_size, ppo_config.minibatch_size),
        max_new_tokens=ppo_config.max_new_tokens,
    )


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Run a command's main function; turn its errors into one line and an exit code.

    It goes on when nobody reads what it prints. Exit code 2 for bad input and for what the system
    refuses, 1 for numbers that went wrong, for too little memory and for a process that was killed,
    130 for Ctrl-C, 143 for SIGTERM, 129 for a closed terminal (SIGHUP). Of several processes all
    have the same.
    """

    @functools.wraps(main)
    def wrapped() -> None:
        outlive_terminal()
        with lifeline.Joined(how_to_go_on):
            _run(main)

    return wrapped


def _run(main: Callable[[], None]) -> None:
    try:
        with raising_signals():
            main()
    except NotWritten as error:
        fail(f"{error}; {system_errors.cure(error.__cause__)}; {KEPT}{how_to_go_on()}", 2)
    except BadInput as error:
        fail(str(error), 2)
    except (Diverged, NonFinite) as error:
        fail(str(error), 1)
    except OSError as error:
        fail(f"{system_errors.refused(error)}; {KEPT}{how_to_go_on()}", 2)
    except (MemoryError, RuntimeError) as error:
        message = system_errors.out_of_memory(error) or system_errors.out_of_threads(error)
        if message is None:
            raise
        fail(f"{message}{how_to_go_on()}", 1)
    except Stopped as stop:  # on request, so it is no error
        from rlhf_min.harness.report import finish

        lifeline.ignore_signals()
        print(stop, file=sys.stderr)  # first, in case that no page can be made
        finish.show(stop.folder)
        lifeline.end()
        sys.exit(stop.exit_code)
    except KeyboardInterrupt as stop:
        line, code = f"stopped at once; {KEPT}{how_to_go_on()}", getattr(stop, "exit_code", 130)
        lifeline.fail(line, code)
        print(line, file=sys.stderr)
        sys.exit(code)


def require_one_process(reason: str) -> None:
    """Raise `BadInput` if there are several, which this command has no use for."""
    require(not processes.several(), f"{reason}; start it with python, not with torchrun")
