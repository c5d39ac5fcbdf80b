"""What a run says and leaves when its numbers go wrong."""

import errno
import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from counting import counting_stage
from safetensors import SafetensorError
from safetensors.torch import load_file
from small import BALL, DEMONSTRATIONS, ONE, PROMPTS, RED, lengths, small_policy
from tolerances import EXACT

from rlhf_min import ppo, reward, sft
from rlhf_min.encoding.pairs import TextPair
from rlhf_min.errors import NonFinite
from rlhf_min.harness.cli import command
from rlhf_min.harness.run.atomic import saving
from rlhf_min.harness.run.faults import LAST_METRICS, explained, save_nonfinite
from rlhf_min.harness.run.saved_models import save_policy
from rlhf_min.harness.run.system_errors import out_of_memory
from rlhf_min.harness.stages import sft as sft_stage

# The batch


def test_a_batch_of_demonstrations_is_saved_with_its_texts(tmp_path):
    policy = small_policy(dtype=torch.float32)
    config = sft.SFTConfig(batch_size=8)
    state = sft.new_state(policy, DEMONSTRATIONS, config)
    steps = sft.train(policy, config, state)
    metrics = [{"step": 1, **next(steps)}]
    policy.lm.transformer.ln_f.register_forward_hook(lambda *given: given[-1] * math.nan)
    stage = replace(
        counting_stage("sft", policy=policy),
        state=state,
        texts=[],
        save_model=partial(save_policy, policy),
        alone=partial(sft_stage.alone, policy),
    )
    with (
        pytest.raises(NonFinite, match="step 1: loss is not finite in batch row") as caught,
        explained(tmp_path, metrics, stage),
    ):
        next(steps)
    file, model = tmp_path / "nonfinite-step-1.json", tmp_path / "last_good/sft"
    assert str(caught.value).endswith(f"; the batch is in {file}, the model in {model}")
    assert "\n" not in str(caught.value)
    files = {file.name, "nonfinite-step-1.safetensors", "last_good"}
    assert {f.name for f in tmp_path.iterdir()} == files
    kept, given = load_file(model / "model.safetensors"), policy.lm.state_dict()
    assert len(kept) > 10
    for name, weight in kept.items():
        assert torch.equal(weight.view(torch.int32), given[name].view(torch.int32))
    record = json.loads(file.read_text(encoding="utf-8"))
    assert (record["step"], record["tensor"], record["rows"]) == (1, "loss", list(range(8)))
    assert record["metrics"] == metrics
    tensors = load_file(tmp_path / "nonfinite-step-1.safetensors")
    for example, x in zip(caught.value.batch, record["batch"], strict=True):
        for name in ("prompt_ids", "response_ids"):
            assert torch.equal(tensors[x[name]["tensor"]], getattr(example, name))
            assert x[name]["text"] == policy.decode(getattr(example, name))
    (red,) = [x for x in record["batch"] if x["prompt_ids"]["text"] == "red ball"]
    assert tensors[red["prompt_ids"]["tensor"]].tolist() == [RED, BALL]
    assert red["response_ids"]["text"] == "one"
    assert tensors[red["response_ids"]["tensor"]][0] == ONE


def test_a_rollout_is_saved_with_all_that_was_known_of_it(tmp_path):
    policy = small_policy(critic="shared")
    config = ppo.PPOConfig(steps=4, batch_size=6, minibatch_size=3, max_new_tokens=4)
    state = ppo.new_state(policy, PROMPTS, config)
    steps = ppo.train(policy, small_policy(seed=1), lengths, config, state)
    next(steps)
    policy.lm.transformer.h[0].mlp.c_fc.weight.register_hook(lambda g: g * math.inf)
    with pytest.raises(NonFinite) as caught, explained(tmp_path, [], counting_stage()):
        next(steps)
    error = caught.value
    record = json.loads((tmp_path / f"nonfinite-step-{error.step}.json").read_text("utf-8"))
    tensors = load_file(tmp_path / f"nonfinite-step-{error.step}.safetensors")
    batch, rollout = record["batch"], error.batch.rollout
    assert batch["rollout"]["responses"] == rollout.responses
    for name in ("rewards", "advantages", "returns"):
        assert torch.equal(tensors[batch[name]["tensor"]], getattr(error.batch, name))
    for name in ("scores", "logprobs", "ref_logprobs", "kl", "values", "ended"):
        assert torch.equal(tensors[batch["rollout"][name]["tensor"]], getattr(rollout, name))
    found = tensors[batch["rollout"]["sequences"]["ids"]["tensor"]]
    assert torch.equal(found, rollout.sequences.ids)


def test_what_json_has_no_word_for_becomes_text(tmp_path):
    ids = TextPair(torch.ones(3), 1, 1, False)
    pair = reward.RewardExample("red", "one", "two", math.nan, ids, ids)
    columns = {"when": {1, 2}.__class__, 3: (math.inf, None, True)}
    rows = [{"step": i, "loss": math.nan} for i in range(LAST_METRICS + 5)]
    file = save_nonfinite(NonFinite(7, "loss", [pair, columns], [0]), tmp_path, rows)
    text = file.read_text(encoding="utf-8")
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record["batch"][0]["margin"] == "nan"
    assert record["batch"][1] == {"when": "<class 'set'>", "3": ["inf", None, True]}
    assert [row["step"] for row in record["metrics"]] == list(range(5, LAST_METRICS + 5))


def test_a_batch_that_cannot_be_saved_does_not_hide_the_error(tmp_path):
    folder = tmp_path / "gone"
    with (
        pytest.raises(NonFinite, match=r"step 3: loss is not .*; not all could be saved: .*gone"),
        explained(folder, [], counting_stage()),
    ):
        raise NonFinite(3, "loss", [torch.ones(2)])


# PPO


def test_each_rollout_can_be_looked_at_when_it_has_been_learned_from():
    policy, seen = small_policy(critic="shared", dtype=torch.float32), []
    config = ppo.PPOConfig(steps=2, batch_size=3, minibatch_size=3, max_new_tokens=3)
    state = ppo.new_state(policy, PROMPTS, config)
    ref_policy = small_policy(seed=1, dtype=torch.float32)
    steps = ppo.train(policy, ref_policy, lengths, config, state, on_rollout=seen.append)
    for step, metrics in enumerate(steps, 1):
        assert len(seen) == step
        assert metrics["score"] == pytest.approx(float(seen[-1].rollout.scores.mean()), abs=EXACT)


# Memory


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate"),
    ],
)
def test_memory_that_runs_out_is_told_on_one_line(error):
    told = out_of_memory(error)
    assert told.startswith("out of memory")
    assert "\n" not in told
    for option in ("--max_tokens", "--gradient_checkpointing", "--batch_size", "--minibatch_size"):
        assert option in told


def test_the_allocator_itself_is_understood():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert "allocate" in out_of_memory(caught.value)


def test_another_error_is_not_taken_for_memory():
    assert out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "a file of the run: No space left on"),
        (OSError(errno.EROFS, "Read-only file system", "a/b.png"), "a/b.png: Read-only file syst"),
        (OSError(errno.EFBIG, "File too large", b"a/\xff"), r"a/\udcff: File too large; make room"),
        (
            OSError(errno.EMFILE, "Too many open files", "a"),
            "a: Too many open files; let more file",
        ),
        (OSError(errno.ECHILD, "No child processes"), "a file of the run: No child processes; "),
        (OSError("a library's own\nwords"), "a file of the run: a library's own words; look"),
        (OSError(), "a file of the run: OSError; look"),
    ],
)
def test_whatever_the_system_refuses_is_told_on_one_line(error, told, capsys):
    @command
    def main():
        raise error

    with pytest.raises(SystemExit, match="2"):
        main()
    said = capsys.readouterr().err
    assert said.startswith(f"error: {told}")
    assert said.endswith("; what was saved before is as it was\n")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("cause", "cure"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "make room: df, quota, ulimit -f"),
        (SafetensorError("I/O error: File too large (os error 27)"), "make room: df, quota, …"),
        (OSError(errno.EMFILE, "Too many open files"), "let more files be open: ulimit -n"),
        (RuntimeError("file write failed"), "look at this path and at its disk"),
    ],
)
def test_what_could_not_be_saved_says_what_helps(cause, cure, capsys, tmp_path):
    @command
    def main():
        with saving(tmp_path / "sft"):
            raise cause

    with pytest.raises(SystemExit, match="2"):
        main()
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path}/sft: could not be saved: ")
    assert f"; {cure.removesuffix('…')}" in said
    assert said.count("\n") == 1


def test_threads_that_there_are_none_of_are_told_on_one_line(capsys):
    @command
    def main():
        raise RuntimeError("can't start new thread")

    with pytest.raises(SystemExit, match="1"):
        main()
    assert capsys.readouterr().err.startswith("error: the system gives no further thread; end ")


def test_an_error_of_ours_keeps_its_traceback():
    @command
    def main():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        main()
