import dataclasses
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import small_policy, small_reward_model

from rlhf_min.config import (
    DPOConfig,
    GRPOConfig,
    KTOConfig,
    PPOConfig,
    RewardConfig,
    SFTConfig,
)
from rlhf_min.errors import BadInput
from rlhf_min.harness.cli import OnlineOptions, RunOptions, command, parse
from rlhf_min.harness.models import make_codec, start_policy
from rlhf_min.harness.rewards import given_reward
from rlhf_min.harness.run.folder import check_out, open_run
from rlhf_min.harness.run.saved_models import save_policy, save_reward_model
from rlhf_min.policy import Policy

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name):
    """The module of an example, without running it."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


# What the options of each command are declared in.
COMMANDS = {
    "train_sft": [RunOptions, SFTConfig],
    "train_reward_model": [RunOptions, RewardConfig],
    "train_ppo": [OnlineOptions, PPOConfig],
    "train_dpo": [RunOptions, DPOConfig],
    "train_kto": [RunOptions, KTOConfig],
    "quickstart": [example("quickstart").QuickstartOptions],
    "evaluate_models": [example("evaluate_models").EvaluateOptions],
    "chat": [example("chat").ChatOptions],
    "overoptimization": [example("overoptimization").OveroptimizationOptions],
    "frontier": [example("frontier").FrontierOptions],
    "arithmetic": [example("arithmetic").ArithmeticOptions, GRPOConfig],
    "rejection_sampling": [
        example("rejection_sampling").RejectionOptions,
        example("rejection_sampling").RoundConfig,
    ],
    "preference_losses": [example("preference_losses").PreferenceOptions],
}
# What a command has no use for, and so does not know.
OF_TRAINING = "allow_config_change save_every keep_last keep_best heldout_share "
OF_LARGE = "lora_rank lora_alpha lora_targets lora_merge shard "
OF_TRAINING += f"gradient_checkpointing skip_preflight report_to {OF_LARGE}"
OF_OWN_ROWS = "data columns split limit heldout_data heldout_split "
UNKNOWN = {
    "train_sft": "reward_model reward_device",
    "train_dpo": "reward_model",
    "train_kto": "reward_model",
    "arithmetic": "reward_model",
    "evaluate_models": f"{OF_TRAINING} model resume heldout_data heldout_split",
    "chat": f"{OF_TRAINING} {OF_OWN_ROWS} model out overwrite resume",
    "overoptimization": f"{OF_OWN_ROWS} {OF_LARGE} heldout_share",
    "frontier": f"{OF_OWN_ROWS} {OF_LARGE} heldout_share",
    "preference_losses": f"{OF_OWN_ROWS} {OF_LARGE} heldout_share reward_model reward_device",
}


def our_line(err):
    """What a command said in the end, in one line; a library may have said something before it."""
    *before, line = err.splitlines()
    assert line.startswith("error: "), err
    assert not any(x.startswith(("error: ", "Traceback ")) for x in before), err
    return line.removeprefix("error: ")


@pytest.mark.parametrize(
    ("err", "line"),
    [
        ("error: --x is 3\n", "--x is 3"),
        ("a.py:3: FutureWarning: y goes\n  y()\n 50%|##\nerror: --x is 3\n", "--x is 3"),
        ("error: --x is 3\nand 4\n", None),
        ("error: --x is 3\nerror: --y is 4\n", None),
        ("error: --x is 3\nFutureWarning: y goes\n", None),
        ("Traceback (most recent call last):\n  f()\nerror: --x is 3\n", None),
        ("--x is 3\n", None),
    ],
)
def test_our_line_is_the_last_and_the_only_one_of_ours(err, line):
    if line is None:
        with pytest.raises(AssertionError):
            our_line(err)
    else:
        assert our_line(err) == line


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs an example in an empty folder and returns its exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "10000")  # nothing is wrapped
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    threads = torch.get_num_threads()

    def start(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        try:
            example(name).main()
        except SystemExit as error:
            return error.code
        return 0

    yield start
    torch.set_num_threads(threads)


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def pairs(n):
    """Rows that are demonstrations, preferences and prompts alike."""
    words = ["red", "blue", "green", "big", "small", "ball", "one", "two"]
    return [
        {
            "prompt": f"{words[i % 8]} {words[i // 8]}",
            "chosen": f"{words[i % 8]} ball",
            "rejected": "two two",
        }
        for i in range(n)
    ]


@pytest.fixture
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_policy(small_policy(dtype=torch.float32), folder / "sft")
    save_reward_model(small_reward_model(dtype=torch.float32), folder / "reward_model")
    return folder


# Values out of range

POSITIVE = ([0, -1, math.nan, math.inf], [1])
AT_LEAST_0 = ([-1, math.nan, math.inf], [0])
SHARE = ([-0.1, 1.1, math.nan], [0, 1])
OPTIMIZER = {
    "batch_size": POSITIVE,
    "learning_rate": POSITIVE,
    "warmup_share": SHARE,
    "weight_decay": AT_LEAST_0,
    "max_grad_norm": POSITIVE,
    "eval_every": POSITIVE,
    "epochs": POSITIVE,
    "seed": AT_LEAST_0,
}
RUN = {
    "heldout_share": ([0, 1, -0.1, math.nan], [0.01, 0.99]),
    "max_response_tokens": POSITIVE,
    "max_length": POSITIVE,
    "threads": ([0, -1, 1025, 99999999999], [1, 1024]),
    "limit": POSITIVE,
    "save_every": ([-1], [0]),
    "keep_last": POSITIVE,
    "lora_rank": POSITIVE,
    "lora_alpha": POSITIVE,
}
# Every number of every config: what it must not be, and what it may just be.
BOUNDS = {
    SFTConfig: OPTIMIZER | {"max_tokens": POSITIVE},
    RewardConfig: OPTIMIZER | {"max_tokens": POSITIVE, "center_coef": AT_LEAST_0},
    DPOConfig: OPTIMIZER
    | {
        "max_tokens": POSITIVE,
        "beta": POSITIVE,
        "label_smoothing": ([-0.1, 0.5, math.nan], [0, 0.49]),
        "simpo_gamma": AT_LEAST_0,
        "sft_coef": AT_LEAST_0,
    },
    KTOConfig: OPTIMIZER
    | {
        "batch_size": ([0, -1, 1], [2]),
        "max_tokens": POSITIVE,
        "beta": POSITIVE,
        "desirable_weight": AT_LEAST_0,
        "undesirable_weight": AT_LEAST_0,
    },
    PPOConfig: OPTIMIZER
    | {
        "steps": POSITIVE,
        "batch_size": ([0, -1, 2**20 + 1], [32, 2**20]),
        "minibatch_size": ([0, -1, 129], [1, 128]),  # no more than batch_size
        "max_new_tokens": POSITIVE,
        "temperature": POSITIVE,
        "adam_eps": POSITIVE,
        "gamma": SHARE,
        "lam": SHARE,
        "clip": POSITIVE,
        "value_clip": ([0, -1, math.nan], [0.1, math.inf]),
        "value_coef": AT_LEAST_0,
        "kl_coef": AT_LEAST_0,
        "kl_target": POSITIVE,
        "kl_horizon": POSITIVE,
        "score_clip": POSITIVE,
        "eos_penalty": AT_LEAST_0,
        "stop_kl": POSITIVE,
        "max_kl": POSITIVE,
        "max_tokens": POSITIVE,
    },
    RunOptions: RUN | {"max_response_tokens": ([0, -1, 128, 200], [1, 127])},
    OnlineOptions: RUN
    | {"max_response_tokens": ([0, -1, 128, 200], [1, 127]), "reward_timeout": AT_LEAST_0},
    example("quickstart").QuickstartOptions: RUN
    | {
        "seed": AT_LEAST_0,
        "sft_epochs": POSITIVE,
        "reward_epochs": POSITIVE,
        "ppo_steps": POSITIVE,
        "ppo_batch_size": POSITIVE,
        "dpo_epochs": POSITIVE,
        "rloo_steps": POSITIVE,
        "test_prompts": POSITIVE,
    },
    example("evaluate_models").EvaluateOptions: RUN
    | {"seed": AT_LEAST_0, "test_prompts": POSITIVE},
    example("chat").ChatOptions: RUN | {"seed": AT_LEAST_0, "temperature": POSITIVE},
    example("arithmetic").ArithmeticOptions: RUN
    | {
        "max_response_tokens": ([0, -1, 128, 200], [1, 127]),
        "samples": ([1, 0, -1], [2, 8]),
        "test_prompts": ([1, 0, -1], [2, 8]),
    },
    example("rejection_sampling").RejectionOptions: RUN
    | {
        "max_response_tokens": ([0, -1, 128, 200], [1, 127]),
        "reward_timeout": AT_LEAST_0,
        "rounds": POSITIVE,
        "n": ([1, 0, -1], [2, 8]),
        "prompts": POSITIVE,
        "test_prompts": POSITIVE,
    },
}


@pytest.mark.parametrize("config", BOUNDS, ids=lambda config: config.__name__)
def test_every_number_of_a_config_has_a_bound(config):
    numbers = {f.name: f for f in dataclasses.fields(config) if {"int", "float"} & words_of(f.type)}
    assert set(BOUNDS[config]) == set(numbers)
    for name, (bad, fine) in BOUNDS[config].items():
        for value in bad:
            with pytest.raises(BadInput) as caught:
                config(**{name: value})
            message = str(caught.value)
            assert name in message
            assert str(value) in message
            assert "\n" not in message
        # One token of response is all that fits beside a prompt of one token.
        room = {"max_length": {"max_response_tokens": 1}, "simpo_gamma": {"loss": "simpo"}}
        room = room.get(name, {})
        for value in [2] if name == "max_length" else fine:
            assert getattr(config(**{name: value} | room), name) == value
        if "None" in words_of(numbers[name].type):
            assert getattr(config(**{name: None}), name) is None


def words_of(annotation):
    return set(getattr(annotation, "__name__", str(annotation)).replace("|", " ").split())


# Options


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_option(run, capsys, name):
    assert run(name, "--help") == 0
    shown = capsys.readouterr().out
    assert example(name).__doc__.strip() in shown  # with its line ends
    assert "(default" not in shown
    assert all(line.count("Default:") <= 1 for line in shown.splitlines())
    for config in COMMANDS[name]:
        for field in dataclasses.fields(config):
            known = field.name not in UNKNOWN.get(name, "").split()
            assert (f"--{field.name} " in shown) == known
            assert (field.metadata["help"] in shown) or not known


def test_the_help_says_each_default_once(run, capsys):
    assert run("train_ppo", "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "for one batch; 0: no limit. Default: 600.0. --" in shown
    assert "of --data, drawn by the seed. --" in shown  # of which there is none
    assert "of the run; must not exist. Default: the next free one. --" in shown


@pytest.mark.parametrize("value", ["-1e-3", "-.5", "-1E9", "-inf", "-Infinity", "-nan", "-1_0."])
def test_a_negative_number_is_a_value_however_it_is_spelled(run, capsys, value):
    assert run("train_sft", "--learning_rate", value) == 2
    told = f"error: SFTConfig: learning_rate is {float(value)}; it must be above 0 and finite\n"
    assert capsys.readouterr().err == told


def test_how_a_value_is_given_that_looks_like_an_option(run, capsys):
    assert run("train_sft", "--template", "-{prompt}") == 2
    told = "; a value that begins with - is written --option=-VALUE; --help explains all options\n"
    assert capsys.readouterr().err.endswith(told)


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_option_that_would_do_nothing_is_refused(run, capsys, name):
    for option in UNKNOWN[name].split():
        assert run(name, f"--{option}", "1") == 2
        instead = getattr(example(name), "INSTEAD", {}).get(option)
        told = f"error: unknown option --{option}" + (f"; {instead}" if instead else "")
        assert capsys.readouterr().err == f"{told}; --help explains all options\n"


def test_a_command_without_options_says_so(run, capsys):
    assert run("pencil", "--nonsense") == 2
    assert capsys.readouterr().err == "error: unknown option --nonsense; this command has none\n"


# What is imported for an answer

NOT_FOR_AN_ANSWER = "torch transformers datasets pandas pyarrow matplotlib numpy".split()
PROGRAM = """
import contextlib, io, json, runpy, sys
path, cases, heavy = json.loads(sys.argv[1])
sys.path.insert(0, path.rpartition("/")[0])
told = []
for arguments in cases:
    sys.argv = [path, *arguments]
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as end:
            told.append([end.code, err.getvalue(), [x for x in heavy if x in sys.modules]])
print(json.dumps(told))
"""
REFUSED = {  # by what it says
    "No such file or directory": ["--data", "missing.csv"],
    "the format is unknown": ["--data", "rows.txt"],
    "the file is empty": ["--data", "empty.csv"],
    "broken JSON": ["--data", "broken.jsonl"],
    "is not valid CSV": ["--data", "broken.csv"],
    "needs the columns prompt,": ["--data", "columns.csv"],
    "no such folder": ["--model", "/nowhere/at/all"],
    "must be above 0": ["--max_length", "0"],
    "--out mine exists": ["--out", "mine"],
}
OTHERS = {
    "train_ppo": {
        "give --model": ["--data", "rows.csv"],
        "no such folder": ["--reward_model", "/nowhere/at/all"],
        "max_new_tokens 9 exceeds": ["--max_new_tokens", "9", "--max_response_tokens", "8"],
    },
    "evaluate_models": {"no model 'sft' in runs/quickstart": [], "": ["--test_prompts", "0"]},
    "chat": {"no model 'sft' in runs/quickstart": [], "temperature is 0": ["--temperature", "0"]},
    "make_report": {"holds no run.json": ["mine"], ".html": ["mine", "--out", "report.txt"]},
    "overoptimization": {"seeds is 0": ["--seeds", "0"]},
    "arithmetic": {
        "give --model": ["--data", "rows.csv"],
        "max_new_tokens 9 exceeds": ["--max_new_tokens", "9", "--max_response_tokens", "8"],
    },
    "rejection_sampling": {
        "give --model": ["--data", "rows.csv"],
        "n is 1": ["--n", "1"],
    },
}


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "friendly_words")
)
def test_what_can_be_refused_is_refused_before_torch_is_imported(name, tmp_path):
    (tmp_path / "empty.csv").touch()
    (tmp_path / "columns.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    (tmp_path / "broken.csv").write_text('a,b\n"1,2\n', encoding="utf-8")
    (tmp_path / "broken.jsonl").write_text('{"prompt\n', encoding="utf-8")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").touch()
    of_all = {"unknown option --nonsense": ["--nonsense", "1"]}
    of_training = name.startswith(
        ("train_sft", "train_reward", "train_dpo", "train_kto", "quickstart")
    )
    cases = of_all | (REFUSED if of_training else {}) | OTHERS.get(name, {})
    if name == "train_reward_model":
        cases["no such folder"] = ["--reward_model", "/nowhere/at/all"]
    given = json.dumps(
        [str(EXAMPLES / f"{name}.py"), [["--help"], *cases.values()], NOT_FOR_AN_ANSWER]
    )
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, given],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=True,
    )
    of_help, *of_cases = json.loads(run.stdout)
    assert of_help == [0, "", []]
    for says, (code, err, imported) in zip(cases, of_cases, strict=True):
        assert (code, imported) == (2, []), err
        assert says in our_line(err)


def test_ctrl_c_during_the_imports_is_one_line(tmp_path, monkeypatch, capsys):
    code = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nimport torch\n"
    (tmp_path / "imported_slowly.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)

    @command
    def main():
        importlib.import_module("imported_slowly")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    try:
        with pytest.raises(SystemExit) as stop:
            main()
    finally:
        signal.signal(signal.SIGINT, before)
    assert stop.value.code == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("stopped at once; what was saved before is as it was")


def test_options_reach_their_configs(monkeypatch):
    arguments = "--epochs 7 --learning_rate 1e-5 --overwrite --max_grad_norm 2 --threads 1"
    monkeypatch.setattr(sys, "argv", ["train_sft.py", *arguments.split()])
    options, config = parse("", RunOptions, SFTConfig)
    assert options == RunOptions(overwrite=True, threads=1)
    assert config == SFTConfig(epochs=7, learning_rate=1e-5, max_grad_norm=2.0)


# Pretrained models


def made_here(folder):
    folder.mkdir()
    (folder / "config.json").write_text('{"small_world": true}', encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize("config", [SFTConfig, RewardConfig, PPOConfig, DPOConfig, KTOConfig])
def test_a_pretrained_model_gets_the_published_settings(monkeypatch, tmp_path, config):
    name = "reward_model" if config is RewardConfig else "model"
    option = f"--{name}"

    def parsed(*arguments):
        monkeypatch.setattr(sys, "argv", ["x.py", *arguments])
        return parse("", RunOptions, config, started_from=name)[1]

    found = {field.name: field.metadata["pretrained"] for field in dataclasses.fields(config)}
    published = {name: told[0] for name, told in found.items() if told}
    assert published
    assert parsed() == parsed(option, made_here(tmp_path / "small")) == config()
    assert parsed(option, "gpt2-medium") == dataclasses.replace(config(), **published)
    # What is given stands, however it is spelled.
    given = parsed(option, "gpt2-medium", "--learning-rate", "0.5")
    assert given == dataclasses.replace(config(), **(published | {"learning_rate": 0.5}))


@pytest.mark.parametrize(("given", "beta"), [("ipo", 0.1), ("simpo", 2.0), ("orpo", 0.1)])
def test_a_loss_of_another_scale_has_its_own_setting(monkeypatch, given, beta):
    line = ["x", "--model", "gpt2-medium", "--loss", given]
    monkeypatch.setattr(sys, "argv", line)
    _, config = parse("", RunOptions, DPOConfig)
    assert (config.beta, config.learning_rate) == (beta, 1e-6)
    monkeypatch.setattr(sys, "argv", [*line, "--beta", "5"])
    _, config = parse("", RunOptions, DPOConfig)
    assert config.beta == 5


def test_the_help_says_who_published_a_setting(run, capsys):
    assert run("train_dpo", "--help") == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.strip().startswith("--beta")]
    assert "Pretrained models: 0.1 (Rafailov et al. 2023)." in line


@pytest.mark.parametrize(
    ("argv", "processes", "told"), [("--shard", 1, 1), ("--shard", 2, 0), ("", 1, 0)]
)
def test_shard_says_where_it_changes_nothing(argv, processes, told, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", *argv.split()])
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    parse("", RunOptions)
    assert capsys.readouterr().out.count("--shard changes nothing") == told


def test_threads_are_set(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["x", "--threads", "2"])
    try:
        start_policy(parse("", RunOptions), ["red ball"], critic="none", seed=0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_the_global_generators_are_seeded_before_a_users_module_is_imported(tmp_path):
    code = "import random, numpy, torch\n"
    code += "DRAWN = [random.random(), numpy.random.rand(), float(torch.rand(()))]\n"
    code += "def f(prompts, responses): return DRAWN\n"

    def drawn(name, seed):
        file = tmp_path / f"{name}.py"
        file.write_text(code, encoding="utf-8")
        options = OnlineOptions(reward=[f"{file}:f"])
        given = given_reward(options, PPOConfig(seed=seed))
        return given([""] * 3, [""] * 3).tolist()

    first = drawn("a", 3)
    assert drawn("b", 3) == first
    assert not set(first) & set(drawn("c", 4))


def test_an_option_is_not_guessed_from_its_beginning(run, capsys):
    assert run("train_sft", "--epoch", "3") == 2
    assert "unknown option --epoch; --help explains all options" in capsys.readouterr().err


def test_room_for_the_prompt():
    assert RunOptions(max_response_tokens=40, max_length=100).max_prompt_tokens == 60


# The run's folder


def test_the_default_folder_is_the_next_free_one(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for expected in ("runs/sft", "runs/sft-2", "runs/sft-3"):
        out = check_out(RunOptions(), "sft")
        assert out == Path(expected)
        assert not out.exists()
        open_run(out, RunOptions())
    assert check_out(RunOptions(), "ppo") == Path("runs/ppo")


def test_an_empty_folder_may_be_given(tmp_path):
    (tmp_path / "new").mkdir()
    out = check_out(RunOptions(out=str(tmp_path / "new")), "sft")
    assert open_run(out, RunOptions()) == tmp_path / "new"


def test_overwrite_leaves_nothing_of_the_old_run(tmp_path):
    out = open_run(tmp_path / "run", RunOptions())
    (out / "sft").mkdir()
    (out / "sft" / "model.pt").write_text("old", encoding="utf-8")
    options = RunOptions(out=str(out), overwrite=True)
    assert check_out(options, "sft") == out
    assert (out / "sft" / "model.pt").exists()  # until the new run begins
    open_run(out, options)
    assert {p.name for p in out.iterdir()} == {"run.json", ".lock"}


def test_run_json_says_what_was_run(tmp_path):
    options, config = RunOptions(template="Say: {prompt}\\n"), SFTConfig(learning_rate=0.25)
    out = open_run(tmp_path / "a" / "b", options, config)
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert record["config"]["SFTConfig"] == dataclasses.asdict(config)
    assert record["config"]["RunOptions"] == dataclasses.asdict(options)
    assert record["versions"]["torch"] == torch.__version__
    assert record["threads"] == torch.get_num_threads()


def test_run_json_is_json_whatever_the_values(tmp_path):
    """The one number that may be infinite, too."""
    out = open_run(tmp_path / "run", PPOConfig(value_clip=math.inf))
    text = (out / "run.json").read_text(encoding="utf-8")
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_each_trainer_leaves_a_model_and_curves(run, capsys, tmp_path, models):
    data = write_rows(tmp_path / "pairs.jsonl", pairs(12))
    room = ("--data", data, "--max_length", "16", "--max_response_tokens", "8")
    sft = ("--model", models / "sft")
    reward_model = ("--reward_model", models / "reward_model")
    small = ("--epochs", "1", "--batch_size", "8")
    assert run("train_sft", *room, *sft, *small) == 0
    assert run("train_dpo", *room, *sft, *small) == 0
    assert run("train_kto", *room, *sft, *small) == 0
    assert run("train_reward_model", *room, *sft, *reward_model, *small) == 0
    ppo = ("--steps", "2", "--minibatch_size", "4", "--max_new_tokens", "8")
    assert run("train_ppo", *room, *sft, *reward_model, *small, *ppo) == 0
    assert run("train_sft", *room, *sft, *small) == 0
    assert "runs/sft-2" in capsys.readouterr().out
    for folder, name, steps in (
        ("sft", "sft", 2),
        ("sft-2", "sft", 2),
        ("dpo", "dpo", 2),
        ("kto", "kto", 3),
        ("reward_model", "reward_model", 2),
        ("ppo", "ppo", 2),
    ):
        out = tmp_path / "runs" / folder
        rows = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(row)["step"] for row in rows] == list(range(1, steps + 1))
        assert {json.loads(row)["stage"] for row in rows} == {name}
        assert (out / name / "model.safetensors").is_file()
        assert (out / "curves.png").stat().st_size > 5000
    trained = (
        "--models",
        "runs/sft/sft,runs/ppo/ppo",
        "--reward_model",
        "runs/reward_model/reward_model",
    )
    assert run("evaluate_models", *room, *trained) == 0
    results = json.loads((tmp_path / "runs/evaluation/results.json").read_text(encoding="utf-8"))
    assert results["runs/sft/sft"]["win_rate"]["mean"] == 0.5  # over itself
    assert results["runs/ppo/ppo"]["score"]["n"] == 12


def test_the_template_stays_with_the_model(tmp_path):
    policy = small_policy()
    assert make_codec(policy, RunOptions()).template == "{prompt}\n"
    make_codec(policy, RunOptions(template="Q: {prompt}\\nA:"))
    save_policy(policy, tmp_path / "sft")
    loaded = Policy.from_pretrained(tmp_path / "sft", critic="none")
    assert make_codec(loaded, RunOptions()).template == "Q: {prompt}\nA:"
    assert make_codec(loaded, RunOptions(template="{prompt}")).template == "{prompt}"


@pytest.mark.parametrize(
    ("config", "given"),
    [
        (DPOConfig(loss="simpo"), {"simpo_gamma": 0.5}),
        (DPOConfig(loss="robust", label_smoothing=0.1), {"loss": "sigmoid"}),
        (GRPOConfig(batch_size=14, minibatch_size=14, group_size=2), {"group_size": 7}),
        (PPOConfig(batch_size=512, minibatch_size=128), {"minibatch_size": 256}),
    ],
    ids=["margin", "loss", "groups", "minibatches"],
)
def test_an_option_given_on_resuming_stands_beside_those_of_the_run(
    config, given, tmp_path, monkeypatch
):
    name = type(config).__name__
    record = {"config": {"RunOptions": {}, name: dataclasses.asdict(config)}}
    (tmp_path / "run.json").write_text(json.dumps(record), encoding="utf-8")
    options = [x for option, value in given.items() for x in (f"--{option}", str(value))]
    monkeypatch.setattr(sys, "argv", ["train", "--resume", str(tmp_path), *options])
    assert parse("", RunOptions, type(config))[1] == dataclasses.replace(config, **given)
