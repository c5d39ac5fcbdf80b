"""The READMEs say what is so: links, commands, code, and figures that a command wrote."""

import argparse
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import check_quickstart
import lora_memory
import pandas as pd
import pytest
import torch
from small import bert, bert_syllables, gpt2, syllables
from test_house import EXAMPLES, SOURCES, definitions, imports, module_name, tree
from torch.distributed.run import get_args_parser
from transformers import AutoTokenizer

from rlhf_min.estimates import Estimate
from rlhf_min.harness import experiments
from rlhf_min.harness.report.results import MEASURES
from rlhf_min.harness.run.saved_models import save_policy, save_reward_model
from rlhf_min.policy import Policy
from rlhf_min.reward_model import RewardModel

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))  # as it is for the command
import frontier  # noqa: E402
import overoptimization  # noqa: E402
from benchmark import scaling  # noqa: E402

FOLDERS = (
    "",
    "rlhf_min",
    "rlhf_min/harness",
    "examples",
    "examples/benchmark",
    "examples/compare",
    "tests",
    "tests/parity",
)
FROM_TRL = "examples/compare/coming_from_trl.md"
PROCESSES = "examples/several_processes.md"
# Of each folder its README, and two pages more, by their own names.
FILES = {folder: ROOT / folder / "README.md" for folder in FOLDERS}
FILES |= {page: ROOT / page for page in (FROM_TRL, PROCESSES)}
TEXTS = {name: file.read_text(encoding="utf-8") for name, file in FILES.items()}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def blocks(folder, language=""):
    return [text for kind, text in FENCE.findall(TEXTS[folder]) if kind == language]


def each_folder():
    return pytest.mark.parametrize("folder", FILES, ids=lambda folder: folder or "front door")


# Where it leads


def test_the_front_door_is_small_and_no_readme_is_left_out():
    assert len(TEXTS[""].encode()) <= 10_000
    found = [
        path for top in ("rlhf_min", "examples", "tests") for path in (ROOT / top).rglob("README*")
    ]
    assert {path.parent.relative_to(ROOT).as_posix() for path in found} == set(FOLDERS[1:])


@each_folder()
def test_a_readme_begins_by_saying_what_it_is_for(folder):
    (sentence,) = re.match(r"# [^\n]+\n\n(\w.+?)\n\n", TEXTS[folder], re.DOTALL).groups()
    assert sentence.endswith(".")


def anchors(file):
    """What GitHub makes of the headings of a page."""
    headings = re.findall(
        r"^#+ (.+)$", FENCE.sub("", file.read_text(encoding="utf-8")), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_folder()
def test_every_link_leads_somewhere(folder):
    links = LINK.findall(FENCE.sub("", TEXTS[folder]))
    assert links
    for link in links:
        name, _, anchor = link.partition("#")
        file = FILES[folder].parent / name if name else FILES[folder]
        assert file.exists(), link
        if re.fullmatch(r"L\d+", anchor):
            assert int(anchor[1:]) <= len(file.read_text(encoding="utf-8").splitlines()), link
        elif anchor:
            assert anchor in anchors(file / "README.md" if file.is_dir() else file), link


@each_folder()
def test_the_tests_and_files_that_are_named_exist(folder):
    text = TEXTS[folder]
    for file, name in re.findall(r"`(tests/\S+\.py)::(\w+)", text):
        assert name in {node.name for node in definitions(ROOT / file)}, name
    for file in re.findall(r"\b(?:examples|tests)/[\w/.-]+\.(?:py|md|json|ipynb)\b", text):
        assert (ROOT / file).is_file(), file


def first_cells(folder, head):
    """The files and folders in the first column of a table."""
    lines = TEXTS[folder].partition(f"\n| {head} |")[2].partition("\n\n")[0].splitlines()
    return re.findall(r"`(\w+(?:\.py|/))`", " ".join(line.split(" | ")[0] for line in lines))


@pytest.mark.parametrize(
    ("folder", "head"), [("rlhf_min", "file"), ("rlhf_min/harness", "room"), ("tests", "folder")]
)
def test_the_table_of_a_folder_names_what_lies_in_it(folder, head):
    found = [path for path in (ROOT / folder).iterdir() if not path.name.startswith(("_", "."))]
    # A folder that once was a room may be left with its __pycache__ alone.
    names = {f"{path.name}/" for path in found if any(path.rglob("*.py"))}
    if folder != "tests":
        names |= {path.name for path in found if path.suffix == ".py"}
    assert sorted(first_cells(folder, head)) == sorted(names)


def test_each_room_of_the_harness_imports_what_stands_above_it():
    rooms = [
        name.strip("/").removesuffix(".py") for name in first_cells("rlhf_min/harness", "room")
    ]
    for path in (ROOT / "rlhf_min/harness").rglob("*.py"):
        here = module_name(path).split(".")[1:2]
        for _, is_ours, name in imports(path, tree(path)):
            # Of the folder of stages `run/` only looks which files there are.
            if is_ours and here and name.startswith("harness.") and name != "harness.stages":
                assert rooms.index(name.split(".")[1]) <= rooms.index(here[0]), (path.name, name)


# Commands


def test_the_shell_understands_each_block():
    script = "\n".join(text for folder in FILES for text in blocks(folder, "sh"))
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


@each_folder()
def test_an_option_that_is_named_is_known(folder):
    paths = [*SOURCES, *EXAMPLES, *(ROOT / "tests").rglob("*.py"), ROOT / ".ci/run"]
    known = re.findall(r"\w[\w-]*", "\n".join(path.read_text(encoding="utf-8") for path in paths))
    if folder == PROCESSES:
        known += [option.lstrip("-") for option in get_args_parser()._option_string_actions]
        known += ["num-gpus", "module", "ntasks-per-node"]  # of ray, deepspeed and srun
    code = blocks(folder, "sh") + re.findall(r"`([^`]+)`", FENCE.sub("", TEXTS[folder]))
    # What has a point in it, as in --actor.optim, is of another project.
    named = set(re.findall(r"(?<![\w-])--(\w[\w-]*)(?![\w.-])", "\n".join(code)))
    assert named <= {*known, "help"}


class Parsed(BaseException):
    """The command line has been read."""


def commands():
    """File and arguments of each command that is shown, in blocks and within the text."""
    for folder, text in TEXTS.items():
        shown = blocks(folder, "sh") + re.findall(r"`([^`]+)`", FENCE.sub("", text))
        for code in shown:
            code = code.replace("\\\n", " ")
            for name, value in re.findall(r"for (\w+) in (\S+)", code):
                code = code.replace(f"${name}", value)
            for part in re.split(r"&&|;|\||\n", code):
                if found := re.search(r"\b(?:python|torchrun\b.*?) (\S+\.py)(.*)", part):
                    yield found[1], *shlex.split(found[2], comments=True)


@pytest.mark.parametrize("shown", sorted(set(commands())), ids=" ".join)
def test_a_command_that_is_shown_is_understood(shown, monkeypatch):
    file, *arguments = shown
    assert (ROOT / file).is_file()
    if not re.search(r"ArgumentParser\(|parse\(__doc__", (ROOT / file).read_text(encoding="utf-8")):
        return  # it has no options, or none of its own
    parse = argparse.ArgumentParser.parse_known_args

    def parse_and_stop(self, args=None, namespace=None):
        assert parse(self, args, namespace)[1] == []  # no option is unknown
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [file, *arguments])
    monkeypatch.syspath_prepend(str((ROOT / file).parent))
    with pytest.raises(Parsed):
        runpy.run_path(str(ROOT / file), run_name="__main__")


def test_every_example_is_told_and_every_told_example_exists():
    told = set(re.findall(r"examples/(\w+\.py)", TEXTS["examples"]))
    assert told == {path.name for path in (ROOT / "examples").glob("*.py")}


# Code


def test_the_python_blocks_run(tmp_path, monkeypatch, capsys):
    save_policy(Policy(gpt2().float(), syllables()), tmp_path / "runs/quickstart/sft")
    reward_model = RewardModel(bert().float(), bert_syllables())
    save_reward_model(reward_model, tmp_path / "runs/quickstart/reward_model")
    monkeypatch.chdir(tmp_path)
    shown = blocks("rlhf_min", "python")
    shown += [code for code in blocks(FROM_TRL, "python") if "score_rollout" in code]
    names: dict = {}  # the second goes on from the first
    weights = []
    for code in shown:
        # The tiny models here have no room for 128 tokens.
        code = code.replace("max_prompt_tokens=80, max_response_tokens=48", "8, 8")
        code = code.replace("batch_size=16", "batch_size=16, max_new_tokens=8")
        exec(compile(code, "README.md", "exec"), names)
        weights.append(names["policy"].lm.transformer.wte.weight.detach().clone())
    assert not torch.equal(*weights)  # the second block trains on
    printed = capsys.readouterr().out.strip().splitlines()
    assert len(printed) == 5
    assert all(len([float(x) for x in line.split()]) == 2 for line in printed)


def test_what_goes_to_other_projects_gives_the_scores_of_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = RewardModel(bert().float(), bert_syllables())
    save_reward_model(model, tmp_path / "runs/reward/reward_model")
    save_policy(Policy(gpt2().float(), syllables()), tmp_path / "runs/sft/sft")
    row = {"prompt": "ba be", "chosen": "bi bo", "rejected": "bu"}
    Path("pairs.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    names: dict = {}
    for code in blocks(PROCESSES, "python"):
        exec(compile(code, PROCESSES, "exec"), names)

    score = float(model.score(["ba be"], ["bi bo"])[0])
    found = names["reward_func"](["ba be\nbi bo<eos>"], ["ba be\n"], ["ba be"])
    assert found["rewards"].tolist() == [pytest.approx(score)]
    (written,) = pd.read_parquet("prompts.parquet").to_dict("records")
    truth = written["reward_model"]["ground_truth"]
    assert names["compute_score"]("ours", " bi bo", truth) == pytest.approx(score)
    tokenizer = AutoTokenizer.from_pretrained("runs/sft/sft")
    assert tokenizer.apply_chat_template(written["prompt"], tokenize=False) == "ba be\n"
    assert names["friendliness"].row_wise


# Figures


def test_the_table_is_what_the_quickstart_wrote():
    results = json.loads((ROOT / "examples/results/quickstart-seed-0.json").read_text("utf-8"))
    (table,) = [text for text in blocks("") if "sft" in text and "ROUGE-L" in text]
    names = {
        "score": "score",
        "gold reward": "gold_reward",
        "correct": "correct",
        "polite": "polite",
        "brief": "brief",
        "win rate by gold": "gold_win_rate",
        "KL, nats": "kl",
        "BLEU": "bleu",
        "ROUGE-L": "rougeL",
        "length, tokens": "response_length",
    }
    models, shown = table.splitlines()[0].split(), {}
    assert models == [name for name in results if name in ("sft", "ppo", "dpo", "rloo")]
    for line in table.splitlines():
        figures = re.findall(r"(-?[\d.]+) \[(-?[\d.]+), (-?[\d.]+)\]", line)
        if len(figures) == len(models):
            title = line[: line.index(figures[0][0])].strip()
            shown[title] = [tuple(map(float, figure)) for figure in figures]
    for title, name in names.items():
        for model, (mean, lo, hi) in zip(models, shown[title], strict=True):
            found = results[model][name]
            wanted = [found["mean"], *found["ci95"]]
            digits = 1 if name in ("bleu", "response_length") else 3
            assert [f"{x:.{digits}f}" for x in wanted] == [
                f"{x:.{digits}f}" for x in (mean, lo, hi)
            ], f"{title}, {model}"


def test_the_figures_of_three_seeds_are_what_the_check_prints(capsys):
    (told,) = [text for text in blocks("examples") if text.startswith("promise")]
    files = sorted((ROOT / "examples/results").glob("quickstart-seed-*.json"))
    assert check_quickstart.main([str(file) for file in files]) == 0
    assert capsys.readouterr().out == told


def test_rejection_sampling_is_what_was_written():
    results = json.loads((ROOT / "examples/results/rejection_sampling.json").read_text("utf-8"))
    (table,) = [text for text in blocks("examples") if "random_of_n" in text]
    models, *lines = table.splitlines()
    assert len(lines) > 6
    for line in lines:
        title = line[:20].strip()
        (name,) = [key for key, shown in MEASURES.items() if shown.strip() == title]
        digits = 1 if name == "response_length" else 3
        found = [results[model][name] for model in models.split()]
        cells = [[f"{x:.{digits}f}" for x in (one["mean"], *one["ci95"])] for one in found]
        assert line[20:].split() == [
            cell for mean, lo, hi in cells for cell in (mean, f"[{lo},", f"{hi}]")
        ]


def test_the_bench_is_what_was_written():
    results = json.loads((ROOT / "examples/results/benchmark.json").read_text("utf-8"))
    (table,) = [text for text in blocks("examples/benchmark") if "times as fast" in text]
    runs, growths = results.pop("run"), results.pop("scaling")
    lines = [f"{what}: {run[what]}" for run in runs.values() for what in ("threads", "versions")]
    lines += [scaling.told(name, growth) for name, growth in growths.items()]
    for workload in results.values():
        for opponent, precisions in workload.items():
            assert f"against {opponent}\n" in table
            for precision, found in precisions.items():
                low, high = found["ratio_min"], found["ratio_max"]
                lines.append(
                    f"  {precision}: {found['ratio']:.2f} times as fast ({low:.2f}-{high:.2f}), "
                    f"{found['memory_share']:.2f} of the memory, "
                    f"{found['above_fixed_share']:.2f} of that above the fixed part"
                )
    assert len(lines) > 8
    for line in lines:
        assert line in table.splitlines()


def test_the_memory_of_adapters_is_what_was_written():
    found = json.loads((ROOT / "examples/results/lora_memory.json").read_text("utf-8"))
    told = " ".join(TEXTS["examples"].split())
    assert f"({found['parameters']:,} parameters in float32" in told
    assert f"its peak at {found['full_gb']:.2f} GB, and at {found['lora_gb']:.2f} GB" in told
    assert f"rank {found['rank']} ({found['trained']:,} parameters): a third." in told
    assert found["share"] == pytest.approx(found["lora_gb"] / found["full_gb"], abs=0.005)
    assert round(found["share"], 2) == 0.33 <= lora_memory.SHARE


def test_the_experiments_are_what_was_written():
    results = ROOT / "examples/results"
    points = json.loads((results / "frontier.json").read_text("utf-8"))["points"]
    start = [point for point in next(iter(points.values())) if point["step"] == 0]
    tables = [experiments.table({"SFT": start} | points, frontier.SHOWN)]
    points = json.loads((results / "overoptimization.json").read_text("utf-8"))["points"]
    tables.append(experiments.table(points, overoptimization.SHOWN))
    by_n = {f"best of {point['step']}": [point] for point in points["best of n"]}
    tables.append(experiments.table(by_n, {"kl_bound": "KL at most"} | overoptimization.SHOWN))
    found = json.loads((results / "arithmetic.json").read_text("utf-8"))
    columns = {
        name: {k: Estimate(x["mean"], *x["ci95"], x["n"]) for k, x in found[name].items()}
        for name in ("before", "after", "gain")
    }
    tables.append(experiments.pass_table(columns))
    shown = "".join(blocks("examples"))
    assert all(f"{table}\n" in shown for table in tables)
    files = sorted(results.glob("overoptimization*.json"))
    assert len(files) == 4
    for file in files:
        for name, verdict in json.loads(file.read_text("utf-8"))["verdicts"].items():
            assert f"| {name} | {verdict} |" in TEXTS["examples"]
