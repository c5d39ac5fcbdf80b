"""Rows for a run, the codec of a model, and what is told before the first step."""

import json

import pytest
from small import small_policy

from rlhf_min.errors import BadInput
from rlhf_min.harness.cli import RunOptions
from rlhf_min.harness.inputs import Inputs, load_inputs
from rlhf_min.harness.models import make_codec
from rlhf_min.harness.run.saved_models import save_policy
from rlhf_min.policy import Policy

CHAT = "{% for m in messages %}{{ m.content }} {% endfor %}"


def rows(n):
    """Pairs as messages, whose columns have other names."""
    return [
        {
            "talk": [{"role": "user", "content": f"one {i}"}],
            "good": [{"role": "assistant", "content": "red ball"}],
            "bad": [{"role": "assistant", "content": "two"}],
        }
        for i in range(n)
    ]


def test_load_inputs_names_columns_and_draws(tmp_path, capsys):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(rows(30)), encoding="utf-8")
    options = RunOptions(
        data=str(path), columns="prompt=talk,chosen=good,rejected=bad", limit=20, heldout_share=0.2
    )
    inputs = load_inputs(options, "dpo", seed=5)
    assert capsys.readouterr().out == (
        f"{path}: 30 rows read, 30 kept, 0 dropped; 20 of the kept were drawn (seed 5)\n"
        "  columns: prompt (talk), chosen (good), rejected (bad)\n"
        "16 rows to train on, 4 held out (split by prompt, seed 5)\n"
    )
    assert len(inputs.pairs) == 16
    assert len(inputs.heldout_pairs) == 4
    assert inputs.pairs[0]["prompt"].messages[0]["role"] == "user"
    assert inputs.demonstrations[0] == {
        "prompt": inputs.pairs[0]["prompt"],
        "response": "red ball",
    }
    assert load_inputs(options, "dpo", seed=5) == inputs
    assert load_inputs(options, "dpo", seed=6) != inputs


@pytest.mark.parametrize(
    "given",
    [{"columns": "prompt=q"}, {"split": "test"}, {"limit": 3}, {"heldout_data": "a.csv"}],
)
def test_options_for_own_rows_need_them(given):
    with pytest.raises(BadInput, match=f"--{next(iter(given))} is for your own rows; give --data"):
        load_inputs(RunOptions(**given), "sft", seed=0)


# Rows of one's own to hold out


def pair(word, **more):
    return {"question": word, "chosen": f"yes, {word}", "rejected": "no", **more}


@pytest.fixture
def two_files(tmp_path, monkeypatch):
    """Writes a.jsonl and b.jsonl, and gives the options to read both."""
    monkeypatch.chdir(tmp_path)

    def write(first, second, **options):
        for name, given in (("a.jsonl", first), ("b.jsonl", second)):
            (tmp_path / name).write_text("\n".join(map(json.dumps, given)), encoding="utf-8")
        return RunOptions(data="a.jsonl", heldout_data="b.jsonl", **options)

    return write


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "ppo", None])
def test_held_out_rows_come_from_their_own_file(two_files, stage, capsys):
    first, second = [pair(f"w{i}") for i in range(12)], [pair(w) for w in ("w3", "x", "y")]
    options = two_files(first, [*second, pair(""), pair("x")], limit=10)
    inputs = load_inputs(options, stage, seed=0)
    texts = {row["prompt"] for row in inputs.prompts} or {"w1"}
    assert texts <= {f"w{i}" for i in range(12)}
    heldout = ["w3", "x", "y"]
    train = 10  # --limit is for --data alone
    if stage == "sft":
        assert len(inputs.demonstrations) == train
        assert inputs.heldout_demonstrations == [
            {"prompt": w, "response": f"yes, {w}"} for w in heldout
        ]
    elif stage == "ppo":
        assert len(inputs.prompts) == train
        assert [row["prompt"] for row in inputs.eval_prompts] == heldout
    else:
        assert len(inputs.pairs) == train
        assert inputs.heldout_pairs == [
            {"prompt": w, "chosen": f"yes, {w}", "rejected": "no"} for w in heldout
        ]
        assert inputs.test == [{"prompt": w, "references": [f"yes, {w}"]} for w in heldout]
    out = capsys.readouterr().out
    assert "b.jsonl: 5 rows read, 3 kept, 2 dropped: prompt is empty (1: line 4), dup" in out
    assert "10 rows to train on, 3 held out (b.jsonl)\n" in out
    shared = "w3" in {row["prompt"] for row in inputs.prompts}
    assert ("warning: 1 of 3 held-out prompts are trained on too" in out) == shared


def test_prompts_in_both_files_are_counted(two_files, capsys):
    first, second = [pair(w) for w in "abc"], [pair(w) for w in ("c ", "a", "d", "e")]
    load_inputs(two_files(first, second), "dpo", seed=0)
    assert "warning: 2 of 4 held-out prompts are trained on too" in capsys.readouterr().out
    load_inputs(two_files(first, second[2:]), "dpo", seed=0)
    assert "warning" not in capsys.readouterr().out


def test_columns_of_both_files_are_named_once(two_files):
    first = [{"q": w, "a": f"yes, {w}"} for w in "abc"]
    options = two_files(first, [{"q": "d", "a": "e"}], columns="prompt=q,response=a")
    assert load_inputs(options, "sft", seed=0).heldout_demonstrations == [
        {"prompt": "d", "response": "e"}
    ]
    options = two_files(first, [{"prompt": "d", "a": "e"}], columns="prompt=q,response=a")
    with pytest.raises(BadInput, match=r"b\.jsonl: --columns says prompt=q, but there is no such"):
        load_inputs(options, "sft", seed=0)


def test_what_rewards_may_name_stands_in_both_files(two_files):
    first = [{"prompt": w, "level": 1} for w in "abc"]
    assert load_inputs(two_files(first, [{"prompt": "d", "level": 2}]), "ppo", seed=0)
    with pytest.raises(BadInput, match=r"b\.jsonl: there is no column level, which a\.jsonl has"):
        load_inputs(two_files(first, [{"prompt": "d"}]), "ppo", seed=0)


def test_the_split_of_a_folder_to_hold_out_is_test(tmp_path, capsys):
    for split in ("train", "test"):
        rows = "".join(json.dumps(pair(f"{split} {i}")) + "\n" for i in range(4))
        (tmp_path / f"{split}.jsonl").write_text(rows, encoding="utf-8")
    folder = str(tmp_path)
    inputs = load_inputs(RunOptions(data=folder, heldout_data=folder), "dpo", seed=0)
    assert [row["prompt"][:4] for row in inputs.heldout_pairs] == ["test"] * 4
    assert [row["prompt"][:5] for row in inputs.pairs] == ["train"] * 4
    assert "warning" not in capsys.readouterr().out
    options = RunOptions(data=folder, heldout_data=folder, heldout_split="train", split="test")
    inputs = load_inputs(options, "dpo", seed=0)
    assert [row["prompt"][:5] for row in inputs.heldout_pairs] == ["train"] * 4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"data": "a", "heldout_data": "b", "heldout_share": 0.1}, "takes the place of --heldout"),
        ({"data": "a", "heldout_split": "test"}, "--heldout_split is of --heldout_data"),
    ],
)
def test_options_of_held_out_rows_that_contradict_each_other(options, says):
    with pytest.raises(BadInput, match=says):
        RunOptions(**options)


def test_an_evaluation_holds_nothing_out(two_files):
    options = two_files([{"prompt": "a", "reference": "b"}], [{"prompt": "a", "reference": "b"}])
    with pytest.raises(BadInput, match="leave --heldout_data out"):
        load_inputs(options, "evaluation", seed=0)


# The codec


def test_a_chat_template_is_used_where_there_is_one(tmp_path):
    policy = small_policy()
    policy.tokenizer.chat_template = CHAT
    assert make_codec(policy, RunOptions()).template == "chat"
    save_policy(policy, tmp_path / "chat")
    loaded = Policy.from_pretrained(tmp_path / "chat", critic="none")
    assert loaded.tokenizer.chat_template == CHAT
    assert make_codec(loaded, RunOptions()).template == "chat"
    # the option goes first, and stays with the model as any other template
    assert make_codec(loaded, RunOptions(template="{prompt}")).template == "{prompt}"
    assert make_codec(loaded, RunOptions()).template == "{prompt}"
    assert make_codec(loaded, RunOptions(template="chat")).template == "chat"


def test_chat_is_refused_without_a_chat_template():
    with pytest.raises(BadInput, match="the tokenizer has no chat template"):
        make_codec(small_policy(), RunOptions(template="chat"))


# What is told


def test_rows_of_one_prompt_with_other_columns_are_all_kept_for_ppo(tmp_path):
    file = tmp_path / "rows.jsonl"
    given = [{"prompt": f"p{i // 2}", "wanted": f"w{i}"} for i in range(8)]
    file.write_text("\n".join(map(json.dumps, given)), encoding="utf-8")
    options = RunOptions(data=str(file), heldout_share=0.25)
    inputs = load_inputs(options, "ppo", seed=0)
    kept = [*inputs.prompts, *inputs.eval_prompts]
    assert sorted(kept, key=lambda row: row["wanted"]) == given
    assert len(inputs.eval_prompts) == 2


def labelled(*labels):
    return [{"prompt": f"p{i}", "answer": f"a{i}", "label": x} for i, x in enumerate(labels)]


def test_labelled_rows_of_one_prompt_stay_together(two_files, capsys):
    first = [row for i in range(4) for row in (labelled(i % 2), labelled(1 - i % 2))]
    rows = [{**row, "prompt": f"q{i}"} for i, pair in enumerate(first) for row in pair]
    inputs = load_inputs(two_files(rows, labelled(True, 0, "true")), "kto", seed=0)
    assert [(row["prompt"], row["label"]) for row in inputs.heldout_unpaired] == [
        *[("p0", True), ("p1", False), ("p2", True)]
    ]
    assert [row["prompt"] for row in inputs.unpaired] == [f"q{i}" for i in range(8)]
    # What is trained first learns the desirable ones.
    assert inputs.demonstrations == [
        {"prompt": row["prompt"], "response": row["response"]}
        for row in inputs.unpaired
        if row["label"]
    ]
    assert len(inputs.heldout_demonstrations) == 2
    assert "a0" in inputs.texts
    assert "two rows" not in capsys.readouterr().out


def test_pairs_are_taken_apart_for_kto_and_the_run_says_so(two_files, capsys):
    first, second = [pair("a"), pair("b")], [*labelled(False), *labelled(True)]
    inputs = load_inputs(two_files(first, second), "kto", seed=0)
    assert inputs.unpaired == [
        {"prompt": "a", "response": "yes, a", "label": True},
        {"prompt": "a", "response": "no", "label": False},
        {"prompt": "b", "response": "yes, b", "label": True},
        {"prompt": "b", "response": "no", "label": False},
    ]
    assert [row.place for row in inputs.unpaired] == [1, 1, 2, 2]
    assert len(inputs.heldout_unpaired) == 2
    out = capsys.readouterr().out
    assert out.endswith(
        "  each pair is two rows: chosen, label true; rejected, label false\n"
        "4 rows to train on, 2 held out (b.jsonl)\n"
    )


def test_a_new_model_needs_a_desirable_response(two_files):
    files = labelled(False, False), labelled(True)
    with pytest.raises(BadInput, match=r"no row is labelled true, so a new .* give --model$"):
        load_inputs(two_files(*files), "kto", seed=0)
    assert load_inputs(two_files(*files, model="runs/sft"), "kto", seed=0).demonstrations == []


def test_further_columns_that_are_no_texts_make_no_tokenizer():
    assert Inputs(prompts=[{"prompt": "p", "chosen": {"value": "c"}}]).texts == ["p"]


def test_rows_keep_the_places_that_they_have_in_the_file(tmp_path):
    file = tmp_path / "pairs.jsonl"
    given = [{"prompt": f"p{i}", "chosen": "red", "rejected": "two"} for i in range(12)]
    given[2]["prompt"] = ""  # dropped, and counted nevertheless
    file.write_text("\n".join(map(json.dumps, given)), encoding="utf-8")
    inputs = load_inputs(RunOptions(data=str(file), heldout_share=0.3, limit=9), "dpo", seed=0)
    assert len(inputs.pairs) == 6
    for rows in (inputs.pairs, inputs.heldout_pairs, inputs.demonstrations, inputs.test):
        assert [f"p{row.place - 1}" for row in rows] == [row["prompt"] for row in rows]
