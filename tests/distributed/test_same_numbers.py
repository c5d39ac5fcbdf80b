"""Runs of several processes have the numbers of one: weights, metrics and sampled tokens.

Three launches by ``torchrun`` make all runs: of one process, of two, and of three. Those of two are
saved on the way, and taken up by one and by three.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import whole_runs
from launch import in_processes, torchrun
from tolerances import EXACT, SHARED

from rlhf_min import distributed
from rlhf_min.optim import Optimizer

SECONDS = 170.0
SCRIPT = Path(whole_runs.__file__)
EACH_RUN = pytest.mark.parametrize("name", whole_runs.RUNS)
KINDS = pytest.mark.parametrize("kind", ["parallel", "sharded"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone():
    """By this process."""
    return {name: whole_runs.whole(name) for name in whole_runs.RUNS}


@pytest.fixture(scope="module")
def one(folder, two):
    """By a single process of torchrun; it goes on with what two have saved."""
    return launched(1, folder, "--resume", two)


@pytest.fixture(scope="module")
def two(folder):
    return launched(2, folder, "--save", "--sharded")


@pytest.fixture(scope="module")
def three(folder, two):
    return launched(3, folder, "--resume", two, "--sharded")


def launched(n, folder, *arguments, gpus=False):
    """The folder of what n processes found."""
    out = folder / str(n)
    torchrun(n, SCRIPT, out, *arguments, seconds=SECONDS, gpus=gpus)
    return out


def furthest(found, expected):
    """How far apart two runs are, at their worst number."""
    assert found.sampled == expected.sampled
    assert len(found.metrics) == len(expected.metrics)
    pairs = [
        (row[name], value)
        for row, other in zip(found.metrics, expected.metrics, strict=True)
        for name, value in other.items()
        if row.keys() == other.keys()
    ]
    assert len(pairs) == sum(map(len, expected.metrics))
    pairs += zip(found.after, expected.after, strict=True)
    assert found.weights.keys() == expected.weights.keys()
    weights = [(found.weights[name] - x).abs().max() for name, x in expected.weights.items()]
    numbers, others = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    return float(torch.stack([*weights, (numbers - others).abs().max()]).max())


def of_each_process(folder, n):
    """What each found, if there are so many."""
    processes = whole_runs.read(folder)
    assert len(processes) == n
    return processes


@EACH_RUN
def test_the_runs_are_such_that_sharing_them_could_go_wrong(name, monkeypatch):
    """Of several micro-batches in some steps and of one in others, with gradients that are cut."""
    backward, step, calls, steps = Optimizer.backward, Optimizer.step, [], []

    def counted(self, loss):
        calls.append(1)
        backward(self, loss)

    def noted(self, *batch_and_metrics):
        norm = step(self, *batch_and_metrics)
        steps.append((len(calls), norm > self.max_grad_norm))
        calls.clear()
        return norm

    monkeypatch.setattr(Optimizer, "backward", counted)
    monkeypatch.setattr(Optimizer, "step", noted)
    found = whole_runs.whole(name)
    assert len(found.metrics) >= 4
    assert max(n for n, _ in steps) >= 3
    assert min(n for n, _ in steps) == 1
    assert any(cut for _, cut in steps)
    assert any(key.startswith("eval/") for key in found.metrics[-1])
    assert bool(found.sampled) == name.startswith(("ppo", "grpo", "rloo"))
    if found.sampled:
        assert len({tuple(row) for row in found.sampled}) > 10
        assert len({len(row) for row in found.sampled}) > 2


@EACH_RUN
def test_one_process_of_torchrun_is_no_torchrun(name, alone, one):
    (found,) = of_each_process(one / "parallel", 1)
    assert furthest(found[name], alone[name]) == EXACT


@EACH_RUN
@KINDS
@pytest.mark.parametrize("n", [2, 3])
def test_several_processes_have_the_numbers_of_one(n, kind, name, alone, two, three):
    first, *others = of_each_process((two if n == 2 else three) / kind, n)
    assert furthest(first[name], alone[name]) <= SHARED
    assert [furthest(other[name], first[name]) for other in others] == [EXACT] * (n - 1)


def test_two_processes_again_have_their_bits_again(two, tmp_path):
    """Here without torchrun."""
    in_processes(
        2, lambda: whole_runs.write(tmp_path, whole_runs.all_found(sharded=False)), seconds=SECONDS
    )
    first = whole_runs.read(two / "parallel")[0]
    for found in of_each_process(tmp_path, 2):
        apart = {name: furthest(found[name], first[name]) for name in whole_runs.RUNS}
        assert apart == dict.fromkeys(whole_runs.RUNS, EXACT)


@pytest.mark.parametrize("name", ["sft", "ppo"])
@KINDS
def test_two_forks_have_the_numbers_of_one(name, kind, tmp_path):
    def work():
        distributed._world.sharded = kind == "sharded"
        whole_runs.write(tmp_path, {name: whole_runs.whole(name)})

    in_processes(2, work)
    expected = whole_runs.whole(name)
    for found in of_each_process(tmp_path, 2):
        assert furthest(found[name], expected) <= SHARED


def rest_of(found):
    """What comes after it was saved."""
    rows = len(found.sampled) * whole_runs.STOP // len(found.metrics)
    return replace(found, metrics=found.metrics[whole_runs.STOP :], sampled=found.sampled[rows:])


@EACH_RUN
@KINDS
@pytest.mark.parametrize("n", [1, 3])
def test_what_two_have_saved_others_take_up(n, kind, name, alone, one, three):
    """One process, or three whose weights are split if those of the two were not."""
    how = "sharded" if n == 3 and kind == "parallel" else "parallel"
    folder = (one if n == 1 else three) / how / f"resumed-{kind}"
    for found in of_each_process(folder, n):
        assert furthest(found[name], rest_of(alone[name])) <= SHARED


@EACH_RUN
def test_what_is_saved_does_not_say_who_saved_it(name, two, tmp_path):
    whole_runs.saved(name, tmp_path)
    expected = {file.name: file.stat().st_size for file in tmp_path.glob("*/*.safetensors")}
    for kind in ("parallel", "sharded"):
        saved = (two / kind / "saved" / name).glob("*/*")
        files = {file.name: file.stat().st_size for file in saved}
        assert files.pop("checkpoint.json")
        assert files == expected


# What only two GPUs can show. It was never run.


def two_gpus_only(test):
    """Marks it."""
    there = torch.cuda.device_count() >= 2
    return pytest.mark.cuda(pytest.mark.skipif(not there, reason="there are no two GPUs")(test))


@pytest.fixture(scope="module")
def one_gpu(folder):
    return launched(1, folder / "cuda", "--device", "cuda", gpus=True)


@pytest.fixture(scope="module")
def two_gpus(folder):
    return launched(2, folder / "cuda", "--device", "cuda", "--save", "--sharded", gpus=True)


@two_gpus_only
@EACH_RUN
@KINDS
def test_two_gpus_have_the_numbers_of_one(kind, name, one_gpu, two_gpus):
    """By NCCL."""
    (expected,) = of_each_process(one_gpu / "parallel", 1)
    first, second = of_each_process(two_gpus / kind, 2)
    assert furthest(first[name], expected[name]) <= SHARED
    assert furthest(second[name], first[name]) == EXACT


@two_gpus_only
@EACH_RUN
@KINDS
def test_what_two_gpus_have_saved_one_takes_up(kind, name, folder, one_gpu, two_gpus):
    out = folder / "cuda" / "taken up"
    if not out.exists():
        arguments = out, "--device", "cuda", "--resume", two_gpus
        torchrun(1, SCRIPT, *arguments, seconds=SECONDS, gpus=True)
    (expected,) = of_each_process(one_gpu / "parallel", 1)
    (found,) = of_each_process(out / "parallel" / f"resumed-{kind}", 1)
    assert furthest(found[name], rest_of(expected[name])) <= SHARED
