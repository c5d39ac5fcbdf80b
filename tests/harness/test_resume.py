"""Runs that are stopped and resumed end with the bits of the run that never stopped."""

import errno
import json
import math
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
from concurrent.futures import wait
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torture
from counting import counted, counting_stage, log_in
from small import llama, small_policy, small_reward_model, word_tokenizer
from torture import ALGORITHMS, MODULES, SAMPLING, command_line, prepare, result

from rlhf_min.data import PreferenceExample, PromptExample
from rlhf_min.dpo import DPOConfig
from rlhf_min.encoding.pairs import TextPair
from rlhf_min.errors import BadInput, Diverged, NonFinite
from rlhf_min.harness.cli import OnlineOptions, RunOptions, command
from rlhf_min.harness.run import checkpoint, faults, folder
from rlhf_min.harness.run.atomic import NotWritten
from rlhf_min.harness.run.checkpoint import (
    RECORD,
    STATES,
    WEIGHTS,
    Checkpoint,
    Writer,
    begin,
    checkpoints,
    crc32_of,
    keep,
    latest,
)
from rlhf_min.harness.run.folder import read_record, reopen_run
from rlhf_min.harness.run.identity import fingerprint, weight_digests
from rlhf_min.harness.run.layout import clear, stage_modules
from rlhf_min.harness.run.log import MetricsLog
from rlhf_min.harness.run.saving import Saving
from rlhf_min.harness.run.signals import Stopped, catching_signals, to_resume
from rlhf_min.policy import Policy
from rlhf_min.ppo import PPOConfig
from rlhf_min.reward import RewardConfig, RewardExample
from rlhf_min.sft import SFTConfig


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    prepare(folder)
    return folder


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(command, *arguments, stop_at=None, stage=None, number=signal.SIGTERM, times=1):
    """The exit code of a command that is called in this process.

    A signal comes while its step `stop_at` is written, of this stage or of any.
    """
    write_row = MetricsLog._write

    def write(self, name, step, metrics):
        write_row(self, name, step, metrics)
        for _ in range(times if step == stop_at and stage in (None, name) else 0):
            os.kill(os.getpid(), number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(sys, "argv", [f"{command}.py", *map(str, arguments)])
        patch.setattr(MetricsLog, "_write", write)
        try:
            (MODULES.get(command) or torture.load(command)).main()
        except SystemExit as error:
            return error.code
    return 0


def start(algorithm, work, out, *options, **signals):
    return run(algorithm, *command_line(algorithm, work), *options, "--out", out, **signals)


def resume(command, out, *options, **signals):
    return run(command, "--resume", out, *options, **signals)


@pytest.fixture(scope="module")
def whole(work):
    """The uninterrupted run of each algorithm."""
    for algorithm in ALGORITHMS:
        assert start(algorithm, work, work / f"whole-{algorithm}") == 0
    return {algorithm: work / f"whole-{algorithm}" for algorithm in ALGORITHMS}


@pytest.fixture
def finished(whole, tmp_path):
    """A finished run of SFT."""
    return shutil.copytree(whole["sft"], tmp_path / "run")


@pytest.fixture
def stopped(work, tmp_path):
    """A run of SFT that was stopped after its fifth step, with two checkpoints."""
    assert start("sft", work, tmp_path / "run", "--keep_last", "2", stop_at=5) == 143
    return tmp_path / "run"


def rows_of(out):
    return [json.loads(row) for row in (out / "metrics.jsonl").read_text("utf-8").splitlines()]


# To the bit


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_stopped_run_ends_like_the_whole_one(algorithm, work, whole, tmp_path, capsys):
    out = tmp_path / "run"
    assert start(algorithm, work, out, stop_at=5) == 143
    assert f"stopped by a signal after step 5 of {10 if algorithm in SAMPLING else 14} of " in (
        told := capsys.readouterr().err
    )
    assert f"--resume {out}" in told
    assert not (out / algorithm).exists()
    assert "is unfinished" in (out / "report.html").read_text(encoding="utf-8")
    assert resume(algorithm, out) == 0
    assert f"{algorithm}: continued after step 5" in capsys.readouterr().out
    assert result(out) == result(whole[algorithm])


@pytest.mark.parametrize("loss", ["ipo", "simpo", "orpo"])
def test_a_stopped_run_of_another_loss_ends_like_the_whole_one(loss, work, tmp_path):
    """Without a reference the policy is trained where it stands, and its start is cached."""
    one, other = tmp_path / "one", tmp_path / "other"
    assert start("dpo", work, one, "--loss", loss) == 0
    assert start("dpo", work, other, "--loss", loss, stop_at=5) == 143
    assert resume("dpo", other) == 0
    assert result(other) == result(one)
    row = rows_of(one)[-1]
    assert "eval/chosen_logprobs_change" in row
    assert read_record(one)["config"]["DPOConfig"]["beta"] == (2.0 if loss == "simpo" else 0.1)


def test_a_few_kills(capsys):
    few = ["sft", "reward_model", "ppo", "dpo"]
    assert torture.main(["--kills", "5", "--seed", "1", "--only", *few]) == 0
    assert "0 of " in capsys.readouterr().out


def test_a_finished_run_resumed_does_nothing_new(finished, whole):
    assert resume("sft", finished) == 0
    assert result(finished) == result(whole["sft"])


def test_more_steps_by_permission(whole, tmp_path, capsys):
    out = shutil.copytree(whole["ppo"], tmp_path / "run")
    more = ["--steps", 12, "--seed", 0]
    assert resume("ppo", out, *more) == 2
    assert "PPOConfig.steps 10 -> 12; leave these out, or give --allow_config_change" in (
        capsys.readouterr().err
    )
    assert resume("ppo", out, *more, "--allow_config_change") == 0
    assert [row["step"] for row in rows_of(out)] == list(range(1, 13))
    record = read_record(out)
    assert record["config"]["PPOConfig"]["steps"] == 12
    assert record["changes"] == [{"PPOConfig.steps": [10, 12]}]
    assert resume("ppo", out) == 0


def quick(work, sft_epochs, *options):
    """Options of a small quickstart."""
    given = f"--sft_epochs {sft_epochs} --reward_epochs 1 --ppo_steps 4 --ppo_batch_size 8 "
    given += "--dpo_epochs 1 --max_length 16 --max_response_tokens 6 --test_prompts 3 --threads 1 "
    given += f"--skip_preflight --data {work}/rows.jsonl --model {work}/sft "
    return [*given.split(), "--reward_model", work / "reward_model", *options]


def test_a_quickstart_stopped_in_its_third_stage(work, tmp_path, capsys):
    one, other = tmp_path / "one", tmp_path / "other"
    options = quick(work, 1, "--save_every", 2)
    assert run("quickstart", *options, "--out", one) == 0
    assert run("quickstart", *options, "--out", other, stop_at=3, stage="ppo") == 143
    assert not (other / "ppo").exists()
    capsys.readouterr()
    assert resume("quickstart", other) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^sft: continued after step (\d+) of \1$", printed, flags=re.MULTILINE)
    assert "ppo: continued after step 3 of 4" in printed
    assert resume("quickstart", other) == 0  # and a finished one stays as it is
    assert result(other) == result(one)
    for name in ("results.json", "reward_model.json"):
        assert (other / name).read_bytes() == (one / name).read_bytes()


# Signals


@pytest.fixture
def interruptible():
    """As from a terminal, also where the tests run in the background, which ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_second_ctrl_c_stops_at_once_and_says_how_to_go_on(work, tmp_path, capsys):
    out = tmp_path / "a run"
    ctrl_c = {"stop_at": 5, "number": signal.SIGINT, "times": 2}
    assert start("sft", work, out, "--save_every", 2, **ctrl_c) == 130
    told = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        "stopped at once; what was saved before is as it was; go on with: python "
        rf"\S+ --resume '{re.escape(str(out.resolve()))}'",
        told,
    )


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)]
)
@pytest.mark.usefixtures("interruptible")
def test_a_signal_beside_the_steps_stops_at_once_and_says_so(
    number, code, monkeypatch, capsys, tmp_path
):
    (tmp_path / "checkpoints/sft/step-000004").mkdir(parents=True)
    monkeypatch.setattr(folder, "_held", {tmp_path: None})
    monkeypatch.setattr(sys, "argv", ["a b.py"])
    before = signal.signal(number, signal.getsignal(number))
    if number != signal.SIGINT:
        signal.signal(number, signal.SIG_DFL)

    @command
    def main():
        os.kill(os.getpid(), number)

    with pytest.raises(SystemExit, match=str(code)):
        main()
    told = "stopped at once; what was saved before is as it was; go on with: python 'a b.py'"
    assert capsys.readouterr().err == f"{told} --resume {tmp_path}\n"
    signal.signal(number, before)


def test_a_folder_that_is_no_text_can_be_typed():
    assert to_resume(Path("b\udcff c")).endswith(r" --resume $'\x62\xff\x20\x63'")


@pytest.mark.usefixtures("interruptible")
def test_the_first_signal_is_noted_and_the_second_stops():
    with catching_signals() as request:
        os.kill(os.getpid(), signal.SIGINT)
        assert request.exit_code == 130
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_each_signal_is_noted_and_ignored_ones_stay_so(number, code):
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with catching_signals() as request:
            os.kill(os.getpid(), number)
        assert request.exit_code == code
        assert signal.getsignal(number) == signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN)
        with catching_signals() as request:
            assert signal.getsignal(number) == signal.SIG_IGN
            for _ in range(2):
                os.kill(os.getpid(), number)
        assert request.signal is None
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


@pytest.mark.usefixtures("interruptible")
def test_a_stop_at_the_last_step_is_a_stop_too(tmp_path):
    def steps():
        yield {"loss": 1.0}
        os.kill(os.getpid(), signal.SIGINT)
        yield {"loss": 2.0}

    log = log_in(tmp_path)
    with pytest.raises(Stopped, match="after step 2 of 2 of sft; not saved") as raised:
        log.follow(counting_stage("sft", total=2), steps(), show=())
    assert raised.value.exit_code == 130
    assert len(log.rows) == 2


# One checkpoint


def saved(folder, step=4, shot=None, **models):
    path, shot = folder / f"step-{step:06d}", shot or counting_stage(step=step, **models)
    begin(path, shot, finished=False, sizes={"metrics.jsonl": 7})()
    return path


def write(writer, *steps):
    for step in steps:
        writer._snapshot.state.step = step
        writer.write(finished=False, sizes={})


def test_all_comes_back(tmp_path):
    random.seed(3)
    np.random.seed(4)
    torch.manual_seed(5)
    path = saved(tmp_path)
    drawn = (random.random(), np.random.rand(), float(torch.rand(())))
    random.random(), np.random.rand(), torch.rand(9)
    other = counting_stage(
        policy=small_policy(critic="shared", seed=9, dtype=torch.float32), step=0
    )
    other.state.extra = None
    Checkpoint(path).restore(other)
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == drawn
    assert other.state.step == 4
    assert other.state.extra[1].tolist() == [0, 1, 2]
    assert other.state.extra["x"] == (1, [math.inf], None)
    for a, b in zip(counting_stage().module.parameters(), other.module.parameters(), strict=True):
        assert torch.equal(a, b)
    assert Checkpoint(path).sizes == {"metrics.jsonl": 7}


def with_changed_bit(content, place, bit):
    return content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]


def with_changed_digit(content):
    """A step that would be believed."""
    place = content.index(b'"step": 6') + 8 if b'"step"' in content else len(content) - 1
    return with_changed_bit(content, place, 1)


def with_changed_letter(content):
    place = content.index(b'"step"') if b'"step"' in content else len(content) // 2
    return with_changed_bit(content, place + 1, 4)


DAMAGES = {
    "missing": lambda _: None,
    "cut": lambda content: content[:-9],
    "empty": lambda _: b"",
    "a digit": with_changed_digit,
    "a changed bit": with_changed_letter,
}


@pytest.mark.parametrize("name", [RECORD, WEIGHTS, *STATES])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(name, damage, tmp_path, capsys):
    older, newer = saved(tmp_path, 4), saved(tmp_path, 6)
    assert latest(tmp_path).folder == newer
    content = DAMAGES[damage]((newer / name).read_bytes())
    (newer / name).unlink()
    if content is not None:
        (newer / name).write_bytes(content)
    with pytest.raises(BadInput, match=str(newer)):
        Checkpoint(newer)
    assert latest(tmp_path).folder == older
    assert f"passed over: {newer}" in capsys.readouterr().out


NEVER = [math.inf, "1e999", None, [[]], -1, 10**400]
PLACES = ("step", "total", "sizes", "random", "files", "models")


@pytest.mark.parametrize("value", NEVER, ids=lambda value: str(value)[:5])
@pytest.mark.parametrize("place", PLACES)
def test_a_record_that_says_what_cannot_be_is_refused(place, value, tmp_path):
    if (place, value) in [("total", 10**400), ("sizes", 10**400)]:
        value = -value  # not impossible, but there is less on the disk
    path = saved(tmp_path)
    record = json.loads((path / RECORD).read_text(encoding="utf-8"))
    holder = record if place in ("step", "total") else record[place]
    holder[place if holder is record else next(iter(holder))] = value
    del record["crc32"]
    record["crc32"] = crc32_of(record)
    (path / RECORD).write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(BadInput, match=str(path)):
        Checkpoint(path).restore(counting_stage())


# Beside the steps


def test_the_step_after_it_need_not_wait(tmp_path, monkeypatch):
    shot, go = counting_stage(step=2), threading.Event()
    identity = checkpoint._identity
    monkeypatch.setattr(checkpoint, "_identity", lambda file: go.wait(9) and identity(file))
    with Writer(tmp_path, shot, keep_last=1) as writer:
        writer.write(finished=False, sizes={})
        assert not checkpoints(tmp_path)
        with torch.no_grad():
            before = [p.clone() for p in shot.module.parameters()]
            [p.add_(1) for p in shot.module.parameters()]  # the next step
        go.set()
    [path] = checkpoints(tmp_path)
    Checkpoint(path).restore(shot)
    assert all(map(torch.equal, before, shot.module.parameters()))


def test_the_one_before_stays_until_the_next_is_complete(tmp_path, monkeypatch):
    rename, seen = os.rename, []

    def watched(old, new):
        seen.append([path.name for path in checkpoints(tmp_path)])
        rename(old, new)

    monkeypatch.setattr(os, "rename", watched)
    with Writer(tmp_path, counting_stage(), keep_last=1) as writer:
        write(writer, 2, 4, 6)
    assert seen == [[], ["step-000002"], ["step-000004"]]
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000006"]


NOTICED = {
    "check": lambda writer: wait([writer._underway]) and writer.check(),
    "wait": Writer.wait,
    "write": lambda writer: writer.write(finished=False, sizes={}),
    "leaving": lambda writer: writer.__exit__(None, None, None),
    "being stopped": lambda writer: writer.__exit__(Stopped, Stopped("", Path(), 130), None),
}


def test_without_a_further_thread_it_is_written_in_the_same_one(tmp_path, monkeypatch):
    def none(_):
        raise RuntimeError("can't start new thread")

    shot = counting_stage()
    with Writer(tmp_path / "one", shot, keep_last=1) as writer:
        writer.write(finished=False, sizes={})
    with Writer(tmp_path / "other", shot, keep_last=1) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", none)
            writer.write(finished=False, sizes={})
        (found,) = (tmp_path / "other").iterdir()  # complete when `write` returns
        writer.write(finished=False, sizes={})  # and the next has a thread again
    for file in (tmp_path / "one" / found.name).iterdir():
        assert (found / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("noticed", NOTICED)
def test_what_its_thread_cannot_write_is_told_and_the_one_before_stays(
    noticed, tmp_path, monkeypatch
):
    writer = Writer(tmp_path, counting_stage(), keep_last=1)
    write(writer, 2)
    writer.wait()

    def full(file):
        raise OSError(28, f"no room for {file.name}")

    monkeypatch.setattr(checkpoint, "_identity", full)
    write(writer, 4)
    with pytest.raises(BadInput, match=f"{tmp_path}/step-000004: could not be saved: no room for"):
        NOTICED[noticed](writer)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]


def test_a_stage_whose_last_checkpoint_does_not_fit_ends_as_usual(tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise NotWritten("step-000005: could not be saved: No space left on device")

    monkeypatch.setattr(checkpoint, "begin", full)
    log = MetricsLog(lambda: tmp_path, preflight=False)
    log.follow(counting_stage("sft", step=4, total=5), [{"loss": 1.0}], show=())
    told = capsys.readouterr().err
    assert "warning: step-000005: could not be saved: No space left on device; the model" in told


def test_what_its_thread_cannot_write_does_not_hide_what_ended_the_stage(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(checkpoint, "_identity", lambda _: (tmp_path / "nowhere").stat())
    writer = Writer(tmp_path, counting_stage(), keep_last=1)
    write(writer, 4)
    writer.__exit__(NonFinite, NonFinite(4, "loss"), None)  # does not raise another
    assert "warning: " in (told := capsys.readouterr().err)
    assert "step-000004: could not be saved: No such file" in told


def test_an_old_one_that_cannot_be_removed_harms_nobody(tmp_path, monkeypatch, capsys):
    rmtree = shutil.rmtree

    def busy(path, **options):
        if path.name == "step-000002":
            raise OSError(39, "Directory not empty")
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", busy)
    with Writer(tmp_path, counting_stage(), keep_last=1) as writer:
        write(writer, 2, 4)
    assert latest(tmp_path).step == 4
    assert "step-000002 could not be removed: Directory not empty" in capsys.readouterr().err


def test_restored_tensors_do_not_hold_the_files(tmp_path):
    path = saved(tmp_path)
    other = counting_stage(step=0)
    Checkpoint(path).restore(other)
    maps = Path("/proc/self/maps")
    assert str(path) not in (maps.read_text(encoding="utf-8") if maps.exists() else "")


def test_nothing_to_go_on_from(tmp_path):
    assert latest(tmp_path / "no folder") is None


def test_none_that_can_be_used_is_not_none_at_all(tmp_path, capsys):
    (saved(tmp_path) / RECORD).unlink()
    with pytest.raises(BadInput, match="none of its checkpoints can be used; put one back"):
        latest(tmp_path)
    assert "passed over" in capsys.readouterr().out


def test_steps_are_numbers_and_files_are_no_checkpoints(tmp_path):
    for name in ("step-1000000", "step-999999", "step-000003"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-000004").touch()
    (tmp_path / ".DS_Store").touch()
    found = [path.name for path in checkpoints(tmp_path)]
    assert found == ["step-000003", "step-999999", "step-1000000"]


def test_old_ones_go_and_later_ones_too(tmp_path):
    for step in (2, 4, 6, 8):
        saved(tmp_path, step)
    keep(tmp_path, tmp_path / "step-000006", 2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000004", "step-000006"]


def test_of_another_model(tmp_path):
    path = saved(tmp_path)
    with pytest.raises(BadInput, match="weights of another model; 2 names differ, such as value_"):
        Checkpoint(path).restore(counting_stage(policy=small_policy(dtype=torch.float32)))
    with pytest.raises(BadInput, match=r"torch.float32, the model's is .* torch.float64"):
        Checkpoint(path).restore(counting_stage(policy=small_policy(critic="shared")))


def test_of_other_data(tmp_path):
    path = saved(tmp_path)
    other = replace(counting_stage(), examples=[PromptExample("red", torch.tensor([2]))])
    with pytest.raises(BadInput, match="had other data; give the same --data"):
        Checkpoint(path).restore(other)


def test_the_data_is_all_that_was_given():
    read = TextPair(torch.tensor([2, 3]), 1, 1, False)
    pair = RewardExample("red", "one", "two", 0.5, read, read)
    prompt = PromptExample("red", torch.tensor([2]), {"answer": 3})
    reference = PreferenceExample(torch.tensor([2]), torch.tensor([3]), torch.tensor([4]))
    for example, change in [
        (pair, {"margin": 0.6}),
        (pair, {"chosen": "won"}),
        (prompt, {"columns": {"answer": 4}}),
        (prompt, {"ids": torch.tensor([3])}),
        (reference, {"chosen_ids": torch.tensor([5])}),
    ]:
        assert fingerprint([example]) != fingerprint([replace(example, **change)])
    computed = replace(reference, ref_logprobs=(-1.0, -2.0))
    assert fingerprint([reference]) == fingerprint([computed])


# The same models


def frozen(**others):
    """A reference and a reward model, or others in their place."""
    models = {"ref_policy": small_policy(seed=1), "reward_model": small_reward_model(seed=1)}
    return models | others


def rare_row(reward_model):
    """A bit of a token that no text holds."""
    embeddings = reward_model.model.bert.embeddings.word_embeddings.weight
    embeddings[reward_model.tokenizer.convert_tokens_to_ids("[MASK]"), 3] *= 1 + 2**-20


CHANGES = {
    "another seed": (
        "ref_policy",
        lambda policy: policy.load_state_dict(small_policy(seed=2).state_dict()),
        "6 of its 16 weights differ",
    ),
    "another head, by a ten-thousandth": (
        "reward_model",
        lambda model: model.model.classifier.weight.mul_(1.0001),
        "1 of its 25 weights differ, such as model.classifier.weight",
    ),
    "a rare token": (
        "reward_model",
        rare_row,
        "1 of its 25 weights differ, such as model.bert.embeddings.word_embeddings.weight",
    ),
    "more heads of the same shape": (
        "ref_policy",
        lambda policy: setattr(policy.lm.config, "n_head", 4),
        "n_head in its config was 2, now 4",
    ),
    "fewer tokens": (
        "reward_model",
        lambda model: setattr(model, "max_length", 9),
        "max_length in its config was 32, now 9",
    ),
    "another chat template": (
        "ref_policy",
        lambda policy: setattr(policy.tokenizer, "chat_template", "x"),
        "its tokenizer or chat template is another",
    ),
    "a token more": (
        "reward_model",
        lambda model: model.tokenizer.add_tokens(["red ball"]),
        "its tokenizer or chat template is another",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_frozen_model_that_is_another_is_refused(case, tmp_path):
    name, change, what = CHANGES[case]
    path = saved(tmp_path, **frozen())
    models = frozen()
    models["reward_model"].score(["red"], ["one"])  # its tokenizer notes how it was called
    Checkpoint(path).restore(counting_stage(**models))
    with torch.no_grad():
        change(models[name])
    with pytest.raises(BadInput, match=f"{path}: {name} is not what this was saved with: {what}"):
        Checkpoint(path).restore(counting_stage(**models))


def rescaled(gain, seed=1):
    model = small_reward_model(seed=seed)
    model.rescale(gain=gain, bias=-gain)
    return model


def test_a_scale_that_was_measured_here_may_be_rounded_otherwise(tmp_path):
    path = saved(tmp_path, **frozen(reward_model=rescaled(3.0)))
    Checkpoint(path).restore(counting_stage(**frozen(reward_model=rescaled(3.0 * (1 + 1e-6)))))
    for other, what in [
        (rescaled(3.0 * 1.01), "2 of its 25 weights differ, such as model.classifier.bias"),
        (rescaled(-3.0), "2 of its 25 weights differ, such as model.classifier.bias"),
        (rescaled(3.0, seed=2), "11 of its 25 weights differ"),
    ]:
        with pytest.raises(BadInput, match=f"reward_model is not what .*: {what}"):
            Checkpoint(path).restore(counting_stage(**frozen(reward_model=other)))


def test_another_tokenizer_of_the_trained_model_is_refused(tmp_path):
    path = saved(tmp_path)
    other = counting_stage()
    other.module.tokenizer.add_tokens(["ball on"])
    with pytest.raises(BadInput, match="policy is not what this was saved with: its tokenizer"):
        Checkpoint(path).restore(other)


def test_weights_of_nan_are_not_gone_on_with(tmp_path):
    shot = counting_stage()
    torch.nn.init.constant_(shot.module.value_head.bias, math.nan)
    path = saved(tmp_path, shot=shot)
    with pytest.raises(BadInput, match=r"step-000004: value_head.bias is not finite; start a new"):
        Checkpoint(path).restore(counting_stage())


def test_digests_need_no_thread(monkeypatch):
    def refuse(*_):
        raise RuntimeError("can't start new thread")

    policy = small_policy()
    usual = weight_digests(policy)
    monkeypatch.setattr("threading.Thread.start", refuse)
    assert weight_digests(policy) == usual


def test_digests_hold_each_weight_once_and_no_buffer_that_is_computed():
    policy = Policy(llama(vocabulary=10), word_tokenizer(), critic="shared")
    names = weight_digests(policy).keys()
    assert names == dict(policy.named_parameters()).keys()
    tied = weight_digests(small_policy())  # its head is the embedding
    assert not any("lm_head" in name for name in tied)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.bool])
def test_a_digest_is_of_all_bytes_of_any_type(dtype):
    class Module(torch.nn.Module):
        def __init__(self, x):
            super().__init__()
            self.register_buffer("x", x)

    x = torch.arange(6).reshape(2, 3).to(dtype)
    other = x.clone()
    other[1, 2] = 0
    digests = [weight_digests(Module(y))["x"] for y in (x, x.T.contiguous().T, other, x.T)]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    assert weight_digests(Module(torch.tensor(1.0)))  # without a dimension


# Diverged


HUGE = ["--learning_rate", "1e38", "--warmup_share", "0", "--skip_preflight"]
ONE_STEP = {name: ["--epochs", "1", "--batch_size", "64"] for name in ALGORITHMS}
ONE_STEP |= {x: ["--steps", "1", "--epochs", "1", "--minibatch_size", "8"] for x in SAMPLING}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_model_that_the_last_step_breaks_is_not_published(algorithm, work, tmp_path, capsys):
    options = [*ONE_STEP[algorithm], *HUGE]
    options += ["--keep_best", "eval/score" if algorithm in SAMPLING else "eval/loss"]
    out = tmp_path / "run"
    assert start(algorithm, work, out, *options) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert f"error: {algorithm}, step 1 of 1: " in told
    assert "weight is not finite after the update" in told
    assert "; this model is not kept; nothing was kept before it; start anew with a lower" in told
    assert not list(out.rglob("*.safetensors"))


@pytest.mark.parametrize("name", ["eval/accuracy", "eval/ties"])
def test_an_accuracy_of_0_of_a_broken_model_is_not_the_best(name, work, tmp_path, capsys):
    out = tmp_path / "run"
    assert start("reward_model", work, out, *HUGE, "--eval_every", 1, "--keep_best", name) == 1
    assert "reward_model, step 1 of 14: " in capsys.readouterr().err
    assert not (out / "best").exists()


def test_what_was_good_before_stays_and_is_named(stopped, capsys):
    before = bytes_of(stopped)
    other = ["--allow_config_change", *HUGE, "--keep_best", "eval/loss"]
    assert resume("sft", stopped, *other) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    place = stopped / "checkpoints/sft/step-000005"
    assert f"what was good before is in {place}; go on from there with a lower learning" in told
    assert "step 6 of 14: the log-probability (the largest weight is 7.2e+37, in lm" in told
    kept = [name for name in before if "checkpoints" in name.parts]
    assert len(kept) == 8
    assert all((stopped / name).read_bytes() == before[name] for name in kept)
    assert not (stopped / "last_good").exists()  # it is not good
    assert latest(place.parent).step == 5


@pytest.mark.parametrize("last", [math.nan, math.inf])
def test_final_metrics_are_finite(last, tmp_path):
    rows = [{"loss": 1.0, "eval/loss": x, "learning_rate": 0.5} for x in (last, 1.0, last)]
    shot = counting_stage(total=3)
    log = MetricsLog(lambda: tmp_path, saving=Saving(every=2))
    with pytest.raises(Diverged) as caught:
        log.follow(shot, counted(shot, rows), show=())
    assert str(caught.value) == (
        "ppo, step 3 of 3: eval/loss is not finite after the update (learning rate 0.5); this "
        f"model is not kept; what was good before is in {tmp_path}/checkpoints/ppo/step-000002; go "
        f"on from there with a lower learning rate (--resume {tmp_path} --allow_config_change)"
    )


def test_a_fault_whose_cause_lies_in_the_step_before_names_the_weights(tmp_path):
    kept = []
    shot = replace(counting_stage(step=3), save_model=kept.append)
    torch.nn.init.constant_(shot.module.value_head.bias, math.nan)
    with (
        pytest.raises(Diverged, match=r"step 3 of 10: value_head.bias, and so loss of step 4"),
        faults.explained(tmp_path, [{"learning_rate": 2.0}], shot),
    ):
        raise NonFinite(9, "loss")
    assert kept == []
    assert (tmp_path / "nonfinite-step-9.json").exists()


# The run's folder


def bytes_of(run):
    """Everything in a run, but the lock and the report."""
    files = [path for path in run.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(run): path.read_bytes() for path in files}


def edited(pattern, change):
    def edit(out, _):
        for file in out.glob(pattern):
            file.write_bytes(change(file.read_bytes()))

    return edit


def with_damaged_end_of_sft(out, _):
    file = checkpoints(out / "checkpoints/sft")[-1] / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1])


def with_a_link(out, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (out / "best").symlink_to(tmp_path / "elsewhere")


ANOTHER_VERSION = (b'"format": 4', b'"format": 2')
REFUSED = {
    "of another version": (
        "stopped",
        edited("checkpoints/*/*/checkpoint.json", lambda x: x.replace(*ANOTHER_VERSION)),
        "checkpoints/sft: none of its checkpoints can be used",
    ),
    "no checkpoint of its end": (
        "stopped",
        lambda out, _: (out / "checkpoints/sft").rename(out / "checkpoints/ppo"),
        "sft has no checkpoint of its end, but there are some of ppo, which would be lost",
    ),
    "finished, without checkpoints": (
        "finished",
        lambda out, _: shutil.rmtree(out / "checkpoints"),
        "sft was finished and has no checkpoint",
    ),
    "cut metrics": (
        "stopped",
        edited("metrics.jsonl", lambda lines: lines[:-5]),
        "run/metrics.jsonl is shorter than when",
    ),
    "a link": ("finished", with_a_link, "run/best is a link, and no run writes any"),
    "a damaged checkpoint of an earlier stage": (
        "in_ppo",
        with_damaged_end_of_sft,
        "sft has no checkpoint of its end, but there are some of ppo, reward_model",
    ),
    "damaged metrics": (
        "in_ppo",
        edited("metrics.jsonl", lambda lines: b"x" + lines[1:]),
        "metrics.jsonl: damaged; put the file back",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_resume_changes_nothing(case, request, tmp_path, capsys):
    fixture, damage, message = REFUSED[case]
    out = request.getfixturevalue(fixture)
    damage(out, tmp_path)
    before = bytes_of(out)
    assert resume("quickstart" if fixture == "in_ppo" else "sft", out, "--keep_last", 1) == 2
    found = capsys.readouterr()
    assert message in found.err
    assert bytes_of(out) == before
    if case == "of another version":
        assert "step-000005: written by another version" in found.out
    if case == "a damaged checkpoint of an earlier stage":
        for name in ("ppo", "reward_model"):  # as the message says
            (out / "checkpoints" / name).rename(tmp_path / name)
        assert resume("quickstart", out) == 0


def test_a_run_killed_before_its_first_checkpoint_starts_anew(stopped, whole):
    shutil.rmtree(stopped / "checkpoints")
    assert resume("sft", stopped) == 0
    found, wanted = (
        {k: v for k, v in result(out).items() if "step-000012" not in k}
        for out in (stopped, whole["sft"])
    )
    assert found == wanted


def test_lines_of_others_stay_and_lines_that_are_missing_are_missed(work, whole, tmp_path, capsys):
    out = tmp_path / "run"
    assert start("ppo", work, out, stop_at=5) == 143
    (out / "notes.jsonl").write_text("mine", encoding="utf-8")
    samples = (out / "samples.jsonl").read_bytes()
    (out / "samples.jsonl").unlink()
    assert resume("ppo", out) == 2
    assert f"{out}/samples.jsonl is shorter than when" in capsys.readouterr().err
    (out / "samples.jsonl").write_bytes(samples)
    assert resume("ppo", out) == 0
    assert (out / "notes.jsonl").read_text(encoding="utf-8") == "mine"
    (out / "notes.jsonl").unlink()
    assert result(out) == result(whole["ppo"])


def test_a_refused_change_is_not_written_down(stopped, tmp_path, capsys):
    (tmp_path / "other.jsonl").write_text(
        "".join(json.dumps({"prompt": f"red {i}", "chosen": "ball"}) + "\n" for i in range(28)),
        encoding="utf-8",
    )
    record = read_record(stopped)
    other = ["--data", tmp_path / "other.jsonl", "--allow_config_change"]
    assert resume("sft", stopped, *other) == 2
    assert "had other data" in capsys.readouterr().err
    assert read_record(stopped) == record
    assert resume("sft", stopped) == 0


def test_an_option_that_the_run_did_not_know_had_its_default(stopped):
    record = read_record(stopped)
    del record["config"]["RunOptions"]["plain"]
    (stopped / "run.json").write_text(json.dumps(record), encoding="utf-8")
    assert resume("sft", stopped, "--plain") == 2
    assert resume("sft", stopped) == 0


def test_other_rates_are_used_and_not_only_told(stopped):
    other = ["--learning_rate", "1e-7", "--weight_decay", "0.25", "--allow_config_change"]
    assert resume("sft", stopped, *other) == 0
    rates = [row["learning_rate"] for row in rows_of(stopped)]
    assert max(rates[5:]) <= 1e-7 < min(rates[1:5])
    record = json.loads(next(stopped.glob("checkpoints/*/*14/checkpoint.json")).read_text("utf-8"))
    groups = record["state"]["optimizer"]["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.25, 0.0}


@pytest.mark.parametrize("successor", [True, False])
def test_what_was_renamed_and_not_yet_replaced_is_put_back(successor, stopped, capsys):
    newest = checkpoints(stopped / "checkpoints/sft")[-1]
    old = newest.with_name(f".{newest.name}-4711-old")
    shutil.copytree(newest, old)
    if not successor:
        shutil.rmtree(newest)
    reopen_run(stopped)
    assert newest.exists()
    assert not old.exists()
    told = "removed, since it was only half" if successor else "put back, since what should have"
    assert told in capsys.readouterr().out


def test_no_step_is_written_twice_where_max_kl_ends_the_run(work, tmp_path, monkeypatch):
    written, begin = [], checkpoint.begin

    def watched(folder, *args, **options):
        written.append((folder.name, options["finished"]))
        return begin(folder, *args, **options)

    monkeypatch.setattr(checkpoint, "begin", watched)
    assert start("ppo", work, tmp_path / "run", "--max_kl", "1e-9", "--save_every", "1") == 0
    names = [name for name, _ in written]
    assert sorted(set(names)) == names
    assert [finished for _, finished in written] == [False] * (len(names) - 1) + [True]
    assert len(names) < 10


def test_a_signal_while_the_last_checkpoint_is_completed_is_heard(
    work, tmp_path, monkeypatch, capsys
):
    identity = checkpoint._identity

    def signalled(file):
        if "step-000014" in str(file):
            os.kill(os.getpid(), signal.SIGTERM)
        return identity(file)

    monkeypatch.setattr(checkpoint, "_identity", signalled)
    assert start("sft", work, tmp_path / "run") == 143
    assert "after step 14 of 14 of sft; saved; go on with" in capsys.readouterr().err


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("locked", flush=True)
input()
"""


def test_two_processes_do_not_go_on_with_one_run(stopped):
    folder._held.clear()
    other = [sys.executable, "-c", HOLD, stopped / ".lock"]
    with subprocess.Popen(other, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(BadInput, match="another process is at this run; wait until it ends"):
            reopen_run(stopped)
        process.kill()
    reopen_run(stopped)


def test_samples_are_written_anew_behind_a_line_that_was_cut(tmp_path):
    log = MetricsLog(lambda: tmp_path)
    log.add_samples("ppo", 1, [{"x": 1}])
    log.add_samples("test", 0, [{"x": 2}])
    with (tmp_path / "samples.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"stage": "te')
    log.add_samples("test", 0, [{"x": 3}], anew=True)
    rows = [json.loads(row) for row in (tmp_path / "samples.jsonl").read_text("utf-8").splitlines()]
    assert [(row["stage"], row["x"]) for row in rows] == [("ppo", 1), ("test", 3)]
    assert [path.name for path in tmp_path.iterdir()] == ["samples.jsonl"]


USERS = [
    *("checkpoints/good-model/model.pt", "checkpoints/ppo-good/step-000100/weights.safetensors"),
    *("checkpoints/notes.txt", "checkpoints/sft/step-000006-good/a", "checkpoints/sft/step-42/a"),
    *("checkpoints/sft/.mine-123/a", ".cache-123/a", "mine/.sft-123/a", "best/mine/model.pt"),
    *("checkpoints/ppo/mine/a", "notes.md"),
]


def with_files(run, names=USERS):
    for name in names:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("mine", encoding="utf-8")


def test_what_the_user_has_put_into_a_run_stays_when_it_is_resumed(stopped, capsys):
    with_files(stopped)
    (stopped / "checkpoints/ppo/step-000002").mkdir()  # of a later stage, half deleted
    noted = stopped / "checkpoints/sft/step-000004/notes.md"
    noted.write_text("mine", encoding="utf-8")
    assert resume("sft", stopped, "--keep_last", "1") == 2
    assert "there are some of ppo, which would be lost" in capsys.readouterr().err
    shutil.rmtree(stopped / "checkpoints/ppo/step-000002")
    assert resume("sft", stopped, "--keep_last", "1") == 0
    assert {(stopped / name).read_text(encoding="utf-8") for name in USERS} == {"mine"}
    assert noted.read_text(encoding="utf-8") == "mine"
    found = [path.name for path in checkpoints(stopped / "checkpoints/sft")]
    assert found == ["step-000004", "step-000014"]
    told = capsys.readouterr().out
    for name in ("good-model", "ppo-good", "notes.txt", "ppo/mine", "sft/step-42", "sft/.mine-123"):
        assert f"left alone, since no run wrote it: {stopped}/checkpoints/{name}\n" in told
    assert f"{noted}\n" in told
    assert f"{stopped}/mine" not in told


@pytest.mark.parametrize("algorithm", ["sft", "ppo"])
def test_overwriting_removes_what_the_run_wrote_and_leaves_what_the_user_did(
    algorithm, work, whole, tmp_path, capsys
):
    out = shutil.copytree(whole[algorithm], tmp_path / "run")
    (out / "best/sft").mkdir(parents=True)
    shutil.copy(out / "run.json", out / "best/sft/config.json")
    (out / ".sft-77-old").mkdir()
    (out / ".sft-77-old/model.pt").touch()
    (out / "empty").mkdir()
    users = [*USERS, f"{algorithm}/README.md", "checkpoints/sft/step-000012/notes.md"]
    with_files(out, users)
    kept = clear(out)
    assert sorted(str(path.relative_to(out)) for path in kept) == sorted([*users, ".lock"])
    assert (out / "empty").is_dir()
    assert not any((out / name).exists() for name in ("best/sft", ".sft-77-old", "metrics.jsonl"))
    (out / "run.json").touch()
    assert start(algorithm, work, out, *ONE_STEP[algorithm], "--overwrite") == 0
    assert f"left in {out}, since no run wrote it: {out}/.cache-123/a, " in capsys.readouterr().out
    assert {(out / name).read_text(encoding="utf-8") for name in users} == {"mine"}
    assert (out / algorithm / "model.safetensors").exists()


def test_what_the_user_has_put_beside_a_model_survives_a_kill_while_it_is_replaced(stopped):
    for name in ("model.pt", "config.json"):
        with_files(stopped, [f".sft-4711-old/{name}", f"sft/{name}"])
    with_files(stopped, [".sft-4711-old/README.md"])
    reopen_run(stopped)
    assert not (stopped / ".sft-4711-old").exists()
    left = {path.name for path in (stopped / "sft").iterdir()}
    assert left == {"README.md", "config.json", "model.pt"}


def test_what_a_kill_left_is_removed(finished, capsys):
    left = finished / "checkpoints/sft/.step-000012-4711"
    left.mkdir()
    assert resume("sft", finished) == 0
    assert not left.exists()
    assert f"removed, since it was only half written: {left}" in capsys.readouterr().out


def test_of_another_command(whole, capsys):
    assert resume("dpo", whole["sft"]) == 2
    assert "was started by another command: it has no DPOConfig but" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "run.json cannot be read"),
        ('{"config": []}', "run.json cannot be read"),
        ('{"config": {"RunOptions": 1}}', "config holds no options"),
        (
            '{"config": {"RunOptions": {"limit": "many"}, "SFTConfig": {}}}',
            "limit cannot be 'many'",
        ),
        ('{"config": {"RunOptions": {}, "SFTConfig": {"epochs": -1}}}', "epochs is -1"),
    ],
)
def test_a_record_that_no_run_wrote(content, message, tmp_path, capsys):
    (tmp_path / "run.json").write_text(content, encoding="utf-8")
    assert resume("sft", tmp_path) == 2
    assert message in capsys.readouterr().err


def follow_with(folder, name, values, *, done=0, stage="ppo"):
    """Steps with these values of a metric; at which the best model was kept."""
    kept = []

    def save(best):
        assert best == folder / "best" / stage
        best.mkdir(parents=True, exist_ok=True)
        kept.append(shot.state.step)

    shot = counting_stage(stage, step=done, total=done + len(values))
    shot = replace(shot, save_model=save)
    log = log_in(folder, keep_best=name)
    log.follow(shot, counted(shot, [{name: value} for value in values]), show=())
    return kept


@pytest.mark.parametrize(
    ("stage", "name", "values", "best"),
    [
        ("sft", "eval/loss", [3.0, 1.0, 2.0, 1.0, 0.5], [1, 2, 5]),
        ("dpo", "eval/loss", [3.0, 1.0, math.nan, math.inf, 2.0], [1, 2]),
        ("ppo", "eval/score", [1.0, 3.0, math.nan, 2.0, 4.0], [1, 2, 5]),
        ("ppo", "eval/k1", [3.0, 4.0, 2.0], [1, 3]),
    ],
)
def test_the_best_model_is_kept(stage, name, values, best, tmp_path):
    assert follow_with(tmp_path, name, values, stage=stage) == best
    told = json.loads((tmp_path / f"best/{stage}/best.json").read_text(encoding="utf-8"))
    assert told == {"metric": name, "step": best[-1], "value": values[best[-1] - 1]}
    assert not list(tmp_path.glob("checkpoints/*"))


def test_a_metric_that_never_came_is_told(tmp_path, capsys):
    log = log_in(tmp_path, keep_best="eval/scores")
    log.follow(counting_stage(total=1), [{"eval/score": 1.0}], show=())
    assert "--keep_best eval/scores: ppo never measured it" in capsys.readouterr().out


def test_what_was_best_before_a_resume_stays_the_best_of_its_metric(tmp_path):
    assert follow_with(tmp_path, "eval/score", [1.0, 4.0, 3.0]) == [1, 2]
    assert follow_with(tmp_path, "eval/score", [3.5, 5.0], done=3) == [5]
    assert follow_with(tmp_path, "eval/score", [4.5], done=4) == [5]  # step 5 was given up
    assert follow_with(tmp_path, "eval/k1", [9.0, 8.0], done=5) == [6, 7]  # no score counts
    (tmp_path / "best/ppo/best.json").write_text("{", encoding="utf-8")
    assert follow_with(tmp_path, "eval/k1", [9.0], done=7) == [8]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_may_be_the_best_is_what_the_stages_measure(algorithm, whole):
    names = {name for row in rows_of(whole[algorithm]) for name in row}
    measured = {name for name in names if name.startswith("eval/")}
    assert measured == {f"eval/{name}" for name in stage_modules()[algorithm].MEASURED}


SUM = ["0.5*a.py:f", "b.py:g"]


@pytest.mark.parametrize(
    ("given", "configs", "name", "fine"),
    [
        ({}, [SFTConfig], "eval/perplexity", True),
        ({}, [SFTConfig], "eval/score", False),
        ({}, [SFTConfig], "eval/loss ", False),
        ({}, [DPOConfig], "eval/perplexity", True),  # SFT comes first
        ({"model": "sft"}, [DPOConfig], "eval/perplexity", False),
        ({}, [PPOConfig], "eval/ties", True),  # the reward model too
        ({"reward": SUM}, [PPOConfig], "eval/ties", False),
        ({"reward_model": "bert"}, [PPOConfig], "eval/ties", False),
        ({"reward_model": "bert"}, [PPOConfig], "eval/gold_reward", True),
        ({"reward_model": "bert"}, [PPOConfig], "eval/reward/a.py:f", False),
        ({"reward_model": "bert"}, [SFTConfig], "eval/gold_reward", False),
        ({"model": "sft"}, [SFTConfig, RewardConfig, PPOConfig, DPOConfig], "eval/loss", True),
        ({"model": "sft"}, [SFTConfig, RewardConfig, PPOConfig, DPOConfig], "eval/nope", False),
        ({}, [SFTConfig], None, True),
    ],
)
def test_the_best_of_what_no_stage_measures_is_refused_at_the_start(
    given, configs, name, fine, tmp_path
):
    options = (OnlineOptions if "reward" in given else RunOptions)(**given, keep_best=name)
    log = partial(
        folder.start_log,
        tmp_path / "run",
        options,
        *(config() for config in configs),
        monitors=["gold_reward"],
    )
    if fine:
        log()
    else:
        with pytest.raises(BadInput, match=f"--keep_best {name} is measured by no stage of this r"):
            log()
    assert not (tmp_path / "run").exists()


def test_nothing_can_be_the_best_without_held_out_rows(tmp_path, capsys):
    log = log_in(tmp_path, keep_best="eval/score")
    shot = replace(counting_stage(total=1), heldout=[])
    with pytest.raises(BadInput, match="--keep_best eval/score: ppo has no held-out rows to measu"):
        log.follow(shot, [{"score": 1.0}], show=())
    assert log.rows == []
    assert capsys.readouterr().err == ""  # no bar that the error would stand behind
    log.follow(replace(shot, stage="sft"), [{"loss": 1.0}], show=())
    log.follow(shot, [{"score": 1.0}], show=())  # too late to refuse it
    assert "ppo has no held-out rows to measure it on" in capsys.readouterr().out


def test_other_held_out_rows_are_told(tmp_path, capsys):
    red, blue = (PromptExample(text, torch.tensor([2])) for text in ("red", "blue"))
    shot = replace(counting_stage(step=4), heldout=[red])
    path = saved(tmp_path, shot=shot)
    Checkpoint(path).restore(shot)
    assert capsys.readouterr().out == ""
    Checkpoint(path).restore(replace(shot, heldout=[red, blue]))
    assert "ppo: the held-out rows are others than until step 4, so what eval/ says before and" in (
        capsys.readouterr().out
    )


def test_another_file_of_a_reward_function_is_told(work, tmp_path, capsys):
    reward, out = tmp_path / "mine.py", tmp_path / "run"
    reward.write_text("def f(prompts, responses):\n    return [1.0] * len(prompts)\n", "utf-8")
    options = [x for x in command_line("ppo", work) if not x.endswith("reward_model")]
    options += ["--reward", f"2*{reward}:f", "--skip_preflight", "--out", out]
    assert run("ppo", *options, stop_at=5) == 143
    told = f"ppo: the file of {reward}:f was changed since step 5, so its rewards may be others"
    for change, lines in [("", 0), ("# another\n", 1)]:
        again = shutil.copytree(out, tmp_path / f"again{lines}")
        reward.write_text(reward.read_text("utf-8") + change, "utf-8")
        assert resume("ppo", again) == 0
        assert capsys.readouterr().out.count(told) == lines


# Several stages


@pytest.fixture(scope="module")
def whole_in_ppo(work, tmp_path_factory):
    out = tmp_path_factory.mktemp("quick") / "run"
    options = quick(work, 4, "--save_every", 1, "--keep_last", 2, "--out", out)
    assert run("quickstart", *options, stop_at=3, stage="ppo") == 143
    return out


@pytest.fixture
def in_ppo(whole_in_ppo, tmp_path):
    """A quickstart that was stopped in the third step of its third stage."""
    return shutil.copytree(whole_in_ppo, tmp_path / "run")


def stages_of(out):
    return sorted(path.name for path in out.glob("checkpoints/*") if checkpoints(path))


@pytest.mark.usefixtures("interruptible")
def test_fewer_steps_than_are_done_are_done(in_ppo, capsys):
    fewer, ctrl_c = ["--sft_epochs", "1", "--allow_config_change"], {"number": signal.SIGINT}
    assert resume("quickstart", in_ppo, *fewer, stop_at=4, stage="ppo", **ctrl_c) == 130
    assert stages_of(in_ppo) == ["ppo", "reward_model", "sft"]
    assert resume("quickstart", in_ppo) == 0
    assert "ppo: continued after step 4 of 4" in capsys.readouterr().out


def test_a_refused_change_in_a_later_stage_is_not_written_down(in_ppo):
    record = read_record(in_ppo)
    shorter = ["--max_length", "15", "--max_response_tokens", "5", "--allow_config_change"]
    assert resume("quickstart", in_ppo, *shorter) == 2
    assert read_record(in_ppo) == record
    assert resume("quickstart", in_ppo) == 0


def test_without_checkpoints_a_stop_saves_nothing_that_is_no_use(work, tmp_path, capsys):
    options = quick(work, 4, "--save_every", 0, "--out", tmp_path)
    assert run("quickstart", *options, stop_at=3, stage="ppo") == 143
    assert "after step 3 of 4 of ppo; not saved" in capsys.readouterr().err
    assert stages_of(tmp_path) == []


def test_a_run_that_has_begun_meanwhile_is_not_replaced(finished):
    before = bytes_of(finished)
    with pytest.raises(BadInput, match="another run has begun there; give another folder, or --ov"):
        folder.open_run(finished, RunOptions())
    assert bytes_of(finished) == before


def test_a_folder_that_cannot_be_flushed_need_not_be(tmp_path, monkeypatch):
    fsync = os.fsync

    def only_files(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    assert Checkpoint(saved(tmp_path)).step == 4


def test_an_object_among_the_columns_is_the_same_in_another_process():
    one, other = (PromptExample("red", torch.tensor([2]), {"image": object()}) for _ in range(2))
    assert fingerprint([one]) == fingerprint([other])


class Picture:
    """Shows where it is in the memory, and not what it holds."""

    def __init__(self, content):
        self.content = content

    def __repr__(self):
        return f"<Picture at 0x{id(self):X}>"

    def tobytes(self):
        return self.content


@pytest.mark.parametrize(
    "column",
    [
        lambda last: np.append(np.zeros(2000), [last, *[0] * 2000]),
        lambda last: torch.tensor([1 + last / 2**20]),
        lambda last: [{"a": np.append(np.zeros(2000), [last, *[0] * 2000])}, ("b",)],
        lambda last: Picture(bytes([last])),
    ],
)
def test_what_a_column_holds_is_compared_and_not_what_it_shows(column):
    one, same, other = (
        fingerprint([PromptExample("red", torch.tensor([2]), {"x": column(last)})])
        for last in (1, 1, 2)
    )
    assert one == same
    assert one != other
