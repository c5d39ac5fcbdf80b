"""What the command refuses before any model is read: one line each that says what to do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from compare.command import given_to_trl, parse_options

from rlhf_min.errors import BadInput


@pytest.fixture
def files(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    for name in ("rows.jsonl", "script.py"):
        (tmp_path / name).write_text("", encoding="utf-8")
    monkeypatch.chdir(tmp_path)


DPO = "--stage dpo --model model --data rows.jsonl"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "give --stage sft, reward, dpo, ppo, grpo or rloo with --model and --data; or --trl"),
        ("--stage foo", "give --model"),
        ("--stage foo --model model --data rows.jsonl", "--stage foo is not known; there are sft"),
        ("--stage dpo --data rows.jsonl", "give --model, the folder that both sides start from"),
        ("--stage dpo --model model", "give --data, the rows that both sides train on"),
        (DPO.replace("rows", "none"), "--data none.jsonl: no such file"),
        (DPO.replace("model model", "model /none"), "/none: no model could be loaded from there"),
        (f"{DPO} --trl_data none.jsonl", "--trl_data none.jsonl: no such file"),
        (f"{DPO} --trl beta", "--trl beta: write an option as name=value"),
        (f"{DPO} --steps 0", "Options: steps is 0; it must be above 0 and finite"),
        (f"{DPO} --max_length 0", "Options: max_length is 0; it must be above 0 and finite"),
        (f"{DPO} --beta 0", "DPOConfig: beta is 0.0; it must be above 0 and finite"),
        (f"{DPO} --value_clip 0.3", "--value_clip is an option of ppo; give --stage ppo with it"),
        (f"{DPO} --columns prompt", "prompt"),
        (f"{DPO} --trl_python none/python", "--trl_python none/python: no such Python"),
        (f"{DPO} --script_args x", "--script_args is for a --trl_script; leave it out"),
        (f"{DPO} --run runs/dpo", "--run is the run beside a --trl_run; give that too"),
        ("--trl_script none.py", "--trl_script none.py: no file"),
        ("--trl_script script.py --beta 0.3", "a script has its options in itself; leave it out"),
        ("--trl_script script.py --trl beta=1", "a script has its options in itself; leave --trl"),
        ("--trl_script script.py --data rows.jsonl", "brings its own model and rows; leave --data"),
        ("--trl_run runs/trl", "--trl_run needs a run of ours beside it: --run DIR"),
        ("--trl_run a --run b --steps 3", "leave --steps out"),
    ],
)
@pytest.mark.usefixtures("files")
def test_what_cannot_be_compared_is_refused(line, says):
    with pytest.raises(BadInput) as raised:
        parse_options("", line.split())
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("files")
def test_an_open_quote_of_the_scripts_arguments_is_refused():
    with pytest.raises(BadInput, match="--script_args --beta '1: No closing quotation; close it"):
        parse_options("", ["--trl_script", "script.py", "--script_args", "--beta '1"])


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(("given", "theirs"), [("hinge", ["hinge"]), ("simpo", None)])
def test_a_loss_that_trl_has_goes_to_trl(given, theirs):
    options = parse_options("", [*DPO.split(), "--loss", given])
    assert given_to_trl(options, "dpo").get("loss_type") == theirs


@pytest.mark.usefixtures("files")
def test_what_is_given_here_goes_to_trl_in_its_words_and_its_own_go_before():
    line = f"{DPO} --beta 0.2 --batch_size 6 --warmup_share 0.5 --max_length 9 --steps 4"
    theirs = ["beta=0.3", "loss_type=['ipo']", "bf16=True", "ld_alpha=null", "pad_token=<pad>"]
    options = parse_options("", [*line.split(), "--trl", *theirs])
    assert given_to_trl(options, "dpo") == {
        "beta": 0.3,
        "per_device_train_batch_size": 6,
        "gradient_accumulation_steps": 1,
        "warmup_steps": 2,
        "max_length": 9,
        "loss_type": ["ipo"],
        "bf16": True,
        "ld_alpha": None,
        "pad_token": "<pad>",
    }
    assert options.ours == {"beta": 0.2, "batch_size": 6, "warmup_share": 0.5}


def test_nothing_that_a_typo_needs_imports_torch():
    code = "import sys, compare.command; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=_with_path()
    )
    assert done.stdout == "False\n", done.stderr


def _with_path():
    examples = Path(__file__).parents[2] / "examples"
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(examples), *sys.path])}


@pytest.mark.usefixtures("files")
def test_a_batch_of_ppo_is_one_minibatch_unless_it_is_told():
    given = [*DPO.replace("dpo", "ppo").split(), "--reward", "script.py:f", "--batch_size", "4"]
    assert parse_options("", given).ours == {"batch_size": 4}
    with pytest.raises(BadInput, match="minibatch_size 8 exceeds batch_size 4"):
        parse_options("", [*given, "--minibatch_size", "8"])
