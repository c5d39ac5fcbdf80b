"""The report of a run: it holds itself together, says what the files say, and escapes the rest."""

import itertools
import json
import math
import re
import runpy
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html import unescape
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import pytest
from tolerances import FP64

from rlhf_min.errors import BadInput
from rlhf_min.harness.report import curves, figures
from rlhf_min.harness.report.curves import Curve, Range, excursion
from rlhf_min.harness.report.figures import printable
from rlhf_min.harness.report.page import calibration, page, write_report
from rlhf_min.harness.report.texts import changed
from rlhf_min.harness.run.layout import stage_modules
from rlhf_min.harness.run.reading import read_run

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "examples/results/quickstart-seed-0.json"
MODELS = json.loads(RESULTS.read_text("utf-8")).keys() - {"seed", "reward_model"}
VOID = {"meta", "br"}
NO_MORE = dict.fromkeys(("results", "samples", "tokens", "reward_model"))
SCRIPT = "<script>alert('x')</script>&amp;"
CURVES = [curve for module in stage_modules().values() for curve in module.CURVES]
SHOWN = [curve for curve in CURVES if curve.stage in ("sft", "reward_model", "ppo", "dpo")]
ESCAPED = "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;&amp;amp;"


# A run's folder as the commands write it


def ppo_row(step, **changes):
    """A healthy step of PPO."""
    row = {
        "stage": "ppo", "step": step, "score": 0.02 * step, "gold_reward": 2 + 0.03 * step,
        "kl": 0.1 * step, "k1": 0.1 * step, "k3": 0.09 * step, "rollout_entropy": 1 - 0.01 * step,
        "clip_fraction": 0.05, "value_clip_fraction": 0.01, "value_loss": 0.5 / step,
        "explained_variance": 0.01 * step, "response_length": 10.0 + 0.1 * step, "value": 0.5,
        "return": 0.6, "reward": 0.1, "time/sample": 0.25, "time/score": 0.5, "time/update": 1.0,
        "time/tokens_per_second": 5000.0 + step,
    }  # fmt: skip
    if step % 10 == 0:
        row |= {"eval/score": 0.02 * step, "eval/response_length": 10.0}
    return row | changes


def token(text, **changes):
    row = {
        "token": text, "id": 5, "logprob": -1.0, "ref_logprob": -1.5, "kl": 0.5, "reward": -0.05,
        "value": 0.25, "advantage": 0.75, "return": 1.0, "new_logprob": -0.5, "ratio": 1.6487,
        "clipped": True,
    }  # fmt: skip
    return row | changes


def token_record(row, step=40, rows=2, **changes):
    record = {
        "stage": "ppo", "step": step, "row": row, "rows": rows, "prompt": "2 < 3?",
        "response": "yes", "score": 1.5, "gold_reward": 4.0, "kl_coef": 0.1, "gamma": 1.0,
        "lam": 0.95, "clip": 0.2, "whitened": True,
        "tokens": [token("yes"), token("<end>", advantage=-0.25, clipped=False, value=0.5)],
    }  # fmt: skip
    return record | changes


def sample(step, response, **more):
    row = {"stage": "ppo", "step": step, "prompt": "What is 3 plus 4?", "response": response}
    return row | {"score": 0.5, "gold_reward": 3.0} | more


def write_run(folder, **files):
    """Everything a quickstart leaves, or what is given instead; None leaves a file out."""
    stages = [
        {"stage": stage, "step": step, "epoch": step / 40, "time/seconds": 0.5} | metrics
        for step in range(1, 41)
        for stage, metrics in {
            "sft": {"loss": 2 / step, **({"eval/loss": 2.5 / step} if step % 20 == 0 else {})},
            "reward_model": {"accuracy": 0.9 - 0.3 / step},
            "dpo": {"accuracy": 0.8, "chosen_rewards": -0.01 * step, "rejected_rewards": -step},
        }.items()
    ]
    content = {
        "run": {
            "config": {
                "PPOConfig": {"steps": 40, "kl_control": "fixed", "kl_target": 6.0, "seed": 3},
                "SFTConfig": {"epochs": 1},
            },
            "versions": {"torch": "2.0"},
            "threads": 2,
        },
        "metrics": [*stages, *(ppo_row(step) for step in range(1, 41))],
        "results": json.loads(RESULTS.read_text("utf-8")),
        "samples": [
            sample(0, "It is 8 I think."),
            sample(40, "It is 7."),
            *(
                {**sample(0, f"{model} says 7."), "stage": "evaluation", "model": model}
                for model in ("sft", "ppo", "dpo")
            ),
        ],
        "tokens": [token_record(0), token_record(1), token_record(0, step=10)],
        "reward_model": {"chosen": [2.0, 1.0, 0.5, 3.0], "rejected": [0.0, 1.5, 0.0, -1.0]},
    } | files
    folder.mkdir(exist_ok=True)
    for name, value in content.items():
        if isinstance(value, list):
            text = "".join(json.dumps(row) + "\n" for row in value)
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        elif value is not None:
            (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "quickstart")


@pytest.fixture(scope="module")
def text(folder):
    """The page of one run."""
    return page([read_run(folder)])


@pytest.fixture(scope="module")
def pages(folder, text):
    """That page, and the one of two runs over each other."""
    shutil.copytree(folder, folder.parent / "second")
    return [text, page([read_run(folder), read_run(folder.parent / "second")])]


class Parsed(HTMLParser):
    """Opening tags with their attributes, texts with the path to them, and what was unbalanced."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.texts, self.wrong = [], [], [], []
        self.feed(text)
        self.close()
        self.wrong += self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"/{tag}")

    def handle_data(self, data):
        self.texts.append((tuple(self.open), data))


def all_text(parsed):
    return " ".join(text for path, text in parsed.texts if "style" not in path)


def svgs(text):
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def paths(svg, name):
    """The coordinates of each shape of a kind: x, y, x, y, ..."""
    found = svg.iterfind(f".//g[@class='{name}']/path")
    return [[float(x) for x in re.findall(r"-?[\d.]+", path.get("d"))] for path in found]


def words(svg):
    """Each text of a figure, and where it stands."""
    return {t.text: (float(t.get("x")), float(t.get("y"))) for t in svg.iter("text")}


def paragraphs(text, start):
    found = re.findall(r"<p(?: [^>]*)?>.*?</p>", text, re.DOTALL)
    plain = [unescape(re.sub("<.*?>", "", paragraph)) for paragraph in found]
    return [p for p in plain if p.startswith(start)]


# The page as a file


def test_tags_are_balanced_and_names_are_used_once(pages):
    for text in pages:
        parsed = Parsed(text)
        assert parsed.wrong == []
        assert text.startswith("<!doctype html>\n<html")
        ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
        assert len(ids) == len(set(ids)) > 20
        for _, attributes in parsed.tags:
            assert set(attributes.get("aria-labelledby", "").split()) <= set(ids)


def test_nothing_is_loaded_and_nothing_runs(pages):
    for text in pages:
        assert not re.search(r"https?:|url\(|@import|@font-face", text)
        for name, attributes in Parsed(text).tags:
            assert name not in ("script", "link", "img", "iframe", "object", "embed", "base")
            assert not {"src", "srcset", "xlink:href"} & set(attributes)
            assert attributes.get("href", "#").startswith("#")  # a dot, of the same figure
            assert not [key for key in attributes if key.startswith("on")]


def test_every_figure_is_xml_with_a_size_a_title_and_something_in_it(pages):
    for text in pages:
        found = svgs(text)
        assert len(found) == text.count("<svg") > 12
        for svg in found:
            assert float(svg.get("width")) > 0
            assert float(svg.get("height")) > 0
            assert svg.get("role") == "img"
            title, description = svg.find("title"), svg.find("desc")
            assert title.text
            assert re.search(r"\d", description.text)  # the number is said too
            shapes = [e for e in svg.iter() if e.tag in ("path", "use")]
            assert shapes
            for shape in shapes:
                for value in shape.attrib.values():
                    assert not re.search("nan|inf", value)


def test_curves_lie_between_the_margins_and_use_the_room(text):
    left, right = figures.LEFT, figures.WIDTH - figures.RIGHT
    top, bottom = figures.TOP, figures.HEIGHT - figures.BOTTOM
    curves = [svg for svg in svgs(text) if "step" in words(svg)]
    assert len(curves) == len(SHOWN)
    for svg in curves:
        numbers = [number for path in paths(svg, "line") for number in path]
        assert min(numbers[::2]) == pytest.approx(left, abs=0.1)
        assert max(numbers[::2]) == pytest.approx(right, abs=0.1)
        assert top <= min(numbers[1::2]) <= max(numbers[1::2]) <= bottom


def test_every_colour_of_a_figure_is_one_that_both_themes_have(text):
    for svg in svgs(text):
        styles = " ".join(e.get("style", "") for e in svg.iter())
        found = set(re.findall(r"var\(--(\w+)\)", styles))
        assert "#" not in styles
        assert set() < found <= set(figures.PALETTE)
    for theme in (0, 1):
        for name, colours in figures.PALETTE.items():
            assert f"--{name}: {colours[theme]};" in text.split("@media")[theme]


def test_the_page_is_the_same_each_time_and_not_too_large(folder, text):
    mine = {"text.usetex": True, "font.size": 30, "axes.facecolor": "red", "lines.marker": "x"}
    with matplotlib.rc_context(mine):  # the user's settings are for the user's own figures
        assert page([read_run(folder)]) == text
    assert max(map(len, re.findall(r"<svg.*?</svg>", text, re.DOTALL))) < 8000
    assert len(text) < 100_000


def test_the_templates_are_part_of_the_package():
    lines = (ROOT / "pyproject.toml").read_text("utf-8").splitlines()
    assert '"rlhf_min.harness.report" = ["templates/*"]' in lines
    templates = resources.files("rlhf_min.harness.report") / "templates"
    names = {file.name for file in templates.iterdir()}
    assert names == {"page.html", "parts.html", "style.css"}


# Text of others


def test_text_from_data_and_models_is_escaped_everywhere(tmp_path):
    folder = write_run(
        tmp_path / "a<b>",
        metrics=None,
        samples=[
            sample(0, SCRIPT, prompt=SCRIPT),
            sample(40, f"{SCRIPT} {SCRIPT}", prompt=SCRIPT),
            {**sample(0, SCRIPT), "stage": "evaluation", "model": "<i>"},
        ],
        tokens=[
            token_record(0, prompt=SCRIPT, response=SCRIPT, tokens=[token(SCRIPT), token("x")])
        ],
        run={"config": {SCRIPT: {SCRIPT: SCRIPT}}, "versions": {"a": SCRIPT}},
    )
    text = page([read_run(folder)])
    assert "<script" not in text
    assert "<i>" not in text
    assert "a<b>" not in text
    assert text.count(ESCAPED) > 10
    parsed = Parsed(text)
    assert parsed.wrong == []
    assert "script" not in {tag for tag, _ in parsed.tags}
    assert SCRIPT in all_text(parsed)


def test_the_name_of_a_run_is_a_text_in_figures_too(tmp_path):
    names = ['"><i>$x$', "\x07\udcff.5"]
    rows = [{"stage": "sft", "step": step, "loss": 2 / step} for step in (1, 2)]
    runs = [read_run(write_run(tmp_path / name, metrics=rows, **NO_MORE)) for name in names]
    text = page(runs)
    assert Parsed(text).wrong == []
    assert "<i>" not in text
    (svg,) = svgs(text)
    assert {'"><i>$x$', "\\x07\\udcff.5"} <= set(words(svg))


# What it says


def test_the_table_has_the_numbers_of_results_json(text):
    results = json.loads(RESULTS.read_text("utf-8"))
    table = text[text.index("<h2>Results") :]
    rows = {}
    for line in re.findall("<tr>.*?</tr>", table[: table.index("</table>")], re.DOTALL):
        name, *cells = re.findall("<t[hd].*?</t[hd]>", line, re.DOTALL)
        rows[re.sub("<.*?>", "", name)] = [re.sub("<.*?>", "", cell) for cell in cells]
    assert rows.pop("")[:3] == ["sft", "ppo", "dpo"]
    names = {
        "score": "score", "gold reward": "gold_reward", "correct": "correct", "polite": "polite",
        "brief": "brief", "win rate by score": "win_rate", "win rate by gold": "gold_win_rate",
        "KL, nats": "kl", "BLEU": "bleu", "ROUGE-1": "rouge1", "ROUGE-2": "rouge2",
        "ROUGE-L": "rougeL", "length, tokens": "response_length", "ended by EOS": "eos_rate",
        "ties by score": "ties", "ties by gold": "gold_ties", "distinct-1": "distinct_1",
        "distinct-2": "distinct_2", "repeated 4-grams": "repeated_4",
    }  # fmt: skip
    assert list(rows) == list(names)
    for title, name in names.items():
        for model, cell in zip(("sft", "ppo", "dpo"), rows[title], strict=False):
            found = results[model][name]
            wanted = [found["mean"], *found["ci95"]] if isinstance(found, dict) else [found]
            digits = 1 if name in ("bleu", "response_length") else 3
            shown = re.findall(r"-?\d+\.\d+", cell)
            assert shown == [f"{x:.{digits}f}" for x in wanted]


def with_estimates(**models):
    """The results with other means and intervals of half the given width."""
    results = json.loads(RESULTS.read_text("utf-8"))
    for model, estimates in models.items():
        for name, (mean, half) in estimates.items():
            results[model][name] = {"mean": mean, "ci95": [mean - half, mean + half], "n": 600}
    return results


def test_the_first_sentences_say_what_matters(tmp_path):
    results = with_estimates(
        sft={"score": (0.025, 0.08), "gold_reward": (2.876, 0.14)},
        ppo={"score": (1.159, 0.04), "gold_reward": (4.625, 0.08), "kl": (2.615, 0.13)},
    )
    text = page([read_run(write_run(tmp_path / "r", results=results))])
    first = text[: text.index("<h2>Results")]
    ppo, *_, sft, reward_model, verdict = paragraphs(first, "")[: len(MODELS) + 2]
    assert ppo == (
        "ppo: score 1.159, above sft's 0.025; gold reward 4.625, above sft's 2.876; 2.615 nats "
        "from the reference."
    )
    assert sft == "SFT: held-out loss 0.125 at step 20, 0.062 at step 40, in nats per token."
    assert re.match(
        r"Reward model: ranks 0\.8\d\d \[.*\] of 2000 held-out pairs right", reward_model
    )
    assert verdict == "Nothing stands out: all 12 curves stayed in their range."


def test_why_a_measure_is_missing_stands_below_the_table(tmp_path):
    results = json.loads(RESULTS.read_text("utf-8"))
    for model in ("sft", "ppo"):
        del results[model]["bleu"]
        results[model]["notes"] = {"bleu": f"BLEU needs 4 words {SCRIPT}"}
    text = page([read_run(write_run(tmp_path / "r", metrics=None, results=results))])
    assert f"sft, ppo: BLEU needs 4 words {ESCAPED}" in text


def test_intervals_that_overlap_are_called_so(tmp_path):
    results = with_estimates(
        sft={"score": (0.025, 0.08)}, ppo={"score": (0.1, 0.1)}, dpo={"score": (-1.0, 0.2)}
    )
    text = page([read_run(write_run(tmp_path / "r", metrics=None, results=results))])
    told, other, *_ = paragraphs(text[: text.index("<h2>Results")], "")
    assert "score -1.000, below sft's 0.025" in other
    assert "score 0.100, against sft's 0.025 with overlapping intervals" in told


def test_gold_is_named_only_where_it_was_measured(tmp_path, text):
    assert "gold" in text.lower()
    own = json.loads(RESULTS.read_text("utf-8"))
    for name in (*MODELS, "reward_model"):
        own[name] = {k: v for k, v in own[name].items() if "gold" not in k}
    rows = [{k: v for k, v in ppo_row(step).items() if "gold" not in k} for step in range(1, 41)]
    plain = write_run(
        tmp_path / "own",
        metrics=rows,
        results=own,
        samples=[{"stage": "ppo", "step": 40, "prompt": "a", "response": "b", "score": 1.0}],
        tokens=[{k: v for k, v in token_record(0).items() if k != "gold_reward"}],
    )
    assert "gold" not in page([read_run(plain)]).lower()


# Ranges


def test_a_curve_that_leaves_its_range_is_marked_there(tmp_path):
    rows = [ppo_row(step, k1=20.0 if 25 <= step < 35 else 2.0) for step in range(1, 41)]
    text = page([read_run(write_run(tmp_path / "r", metrics=rows))])
    (told,) = paragraphs(text, "From 2.000 at step 1 to 2.000 at step 40. It left")
    assert told.endswith("range at step 25 with 20.000 and was back at step 35. Range: -1 to 15.")
    assert "1 thing to look at; 1 of 8 curves left their range." in paragraphs(text, "1 thing")
    assert "PPO: the curve of KL to the reference left its range from step 25 to step 35" in text
    marked = [svg for svg in svgs(text) if svg.find(".//g[@class='mark']") is not None]
    assert [svg.find("title").text for svg in marked] == ["PPO: KL to the reference"]
    (svg,) = marked
    texts = list(svg.iter("text"))
    xs = {t.text: float(t.get("x")) for t in texts if "middle" in t.get("style")}
    ys = {t.text: float(t.get("y")) for t in texts if "end" in t.get("style")}
    assert "step 25" in words(svg)
    # The ring lies where the axis has 25: a quarter of the way from 20 to 40.
    (ring,) = svg.iterfind(".//g[@class='mark']//use")
    assert float(ring.get("x")) == pytest.approx(0.75 * xs["20"] + 0.25 * xs["40"], abs=0.1)
    # Above 15, which lies between the ticks 10 and 20, and below -1, it is shaded. The texts of
    # the ticks stand a little below their lines.
    below, above = paths(svg, "outside")
    offset = (ys["10"] + ys["20"]) / 2 - max(above[1::2])
    assert 2 < offset < 6
    assert ys["0"] - offset < min(below[1::2]) < ys["0"] - offset + 10


def test_a_range_is_drawn_from_where_its_line_begins_and_shaded_at_its_edge_only(tmp_path):
    rows = [
        {"stage": "sft", "step": step, "loss": 60 / step}
        | ({"eval/loss": 2 - step / 60} if step % 15 == 0 else {})
        for step in range(1, 61)
    ]
    (svg,) = svgs(page([read_run(write_run(tmp_path / "r", metrics=rows, **NO_MORE))]))
    (outside,), (held_out, _) = paths(svg, "outside"), paths(svg, "line")
    assert min(outside[::2]) == pytest.approx(held_out[0], abs=0.1)
    assert max(outside[::2]) == figures.WIDTH - figures.RIGHT
    assert max(outside[1::2]) - min(outside[1::2]) == pytest.approx(figures.EDGE, abs=0.2)


def test_a_healthy_curve_has_no_mark(text):
    assert not any(svg.find(".//g[@class='mark']") is not None for svg in svgs(text))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 1, 1, 1], None),
        ([1, 9, 9, 1], None),  # two in a row are noise
        ([1, 9, 9, 9, 1], (1, 4)),
        ([1, -9, 9, -9, 1], (1, 4)),  # outside on either side
        ([1, 1, 1, 9], (3, None)),  # the end of the run cuts it short
        ([9, 9, 9], (0, None)),
        ([1, math.nan, math.nan, math.nan], (1, None)),
        ([9, 9, 1, 9, 9, 9], (3, None)),
    ],
)
def test_excursions(values, expected):
    assert excursion(values, low=0, high=2) == expected


def test_limits_by_hand():
    assert Range(-1, 15).limits([7.0]) == (-1, 15)
    assert Range(0.1, 2, of="starts").limits([3.0, 9.0]) == (pytest.approx(0.3, abs=FP64), 6)
    # changes of 1, 2, 4: the usual one is 2
    assert Range(low=-3, of="steps").limits([10.0, 11.0, 9.0, 13.0]) == (4.0, math.inf)
    assert Range(low=-3, of="steps").limits([10.0]) == (10.0, math.inf)


def verdict(tmp_path, title, **series):
    rows = [
        ppo_row(i + 1, **{name: values[i] for name, values in series.items()}) for i in range(40)
    ]
    run = read_run(write_run(tmp_path / "r", metrics=rows))
    (curve,) = [c for c in CURVES if c.stage == "ppo" and c.title == title]
    return curve.status(run)


@pytest.mark.parametrize(
    ("title", "metric", "healthy", "ill"),
    [
        ("Score", "score", [1 + i % 2 for i in range(40)], [1.0 - i for i in range(40)]),
        ("Gold reward", "gold_reward", [4.0] * 40, [4 - 0.1 * i for i in range(40)]),
        ("KL to the reference", "k1", [5.0] * 40, [-0.1 * i for i in range(40)]),
        ("Entropy", "rollout_entropy", [0.5] * 40, [0.8**i for i in range(40)]),
        ("Clipped tokens", "clip_fraction", [0.1] * 40, [0.01 * i for i in range(40)]),
        ("Value loss", "value_loss", [0.2] * 40, [0.2 + 0.1 * i for i in range(40)]),
        (
            "Explained variance of the returns", "explained_variance",
            [-0.1] * 40, [-0.05 * i for i in range(40)],
        ),
        ("Response length", "response_length", [20.0] * 40, [20.0 + i for i in range(40)]),
    ],
)  # fmt: skip
def test_every_curve_of_ppo_can_be_healthy_and_ill(tmp_path, title, metric, healthy, ill):
    assert verdict(tmp_path, title, **{metric: healthy}).left is None
    found = verdict(tmp_path, title, **{metric: ill})
    step, value = found.left
    assert value == ill[step - 1]
    assert 1 < step < 40
    assert f"at step {step}" in found.sentence
    assert found.sentence.endswith(" and did not come back.")


def test_an_adaptive_kl_may_go_to_twice_its_target(tmp_path):
    rows = [ppo_row(step, k1=17.0) for step in range(1, 41)]
    (curve,) = [c for c in CURVES if c.stage == "ppo" and c.title == "KL to the reference"]
    for control, left in (("fixed", True), ("adaptive", False)):
        config = {"config": {"PPOConfig": {"kl_control": control, "kl_target": 9.0}}}
        run = read_run(write_run(tmp_path / control, metrics=rows, run=config))
        assert (curve.status(run).left is not None) == left


def test_every_curve_says_what_is_healthy_in_one_sentence(text):
    assert len({curve.key for curve in CURVES}) == len(CURVES)
    for curve in CURVES:
        assert curve.healthy.endswith(".")
        assert ". " not in curve.healthy
    for curve in SHOWN:
        assert f"Healthy: {curve.healthy}" in unescape(text)


def test_another_stage_is_shown_as_its_file_says(tmp_path, monkeypatch):
    """Without a headline and findings of its own, which it may leave out."""
    healthy = Curve(
        "another", "Spread", "nats", (("spread", "spread"),), "Low.", Range(high=1), "do"
    )
    module = SimpleNamespace(STAGE="another", TITLE="ANOTHER", ROWS="prompts", CURVES=[healthy])
    modules = stage_modules() | {"another": module}
    monkeypatch.setattr(curves, "stage_modules", lambda: modules)
    rows = [{"stage": "another", "step": step, "spread": float(step)} for step in range(1, 6)]
    run = read_run(write_run(tmp_path / "r", metrics=rows, **NO_MORE))
    text = page([run])
    (svg,) = svgs(text)
    assert svg.find("title").text == "ANOTHER: spread"
    assert "<h2>ANOTHER, step by step</h2>" in text
    assert "ANOTHER: the curve of spread left its range from step 2 to the end: 2.000" in text


# Parts


def test_changed_words():
    old, new = changed("It is 5 . Bye", "It is 6 now. Bye")
    assert old == [("", "It is"), ("", " "), ("del", "5 ."), ("", " Bye")]
    assert new == [("", "It is"), ("", " "), ("ins", "6 now."), ("", " Bye")]
    assert changed("Yes", "Yes sir") == ([("", "Yes")], [("", "Yes"), ("", " "), ("ins", "sir")])
    assert changed("same words", "same words") == ([("", "same words")], [("", "same words")])
    assert changed("", "new") == ([], [("ins", "new")])
    assert changed("<b>", "") == ([("del", "<b>")], [])


def test_samples_stand_side_by_side_with_both_rewards(text):
    part = text[text.index("Samples of PPO") : text.index("Token by token")]
    assert "before: score +0.50, gold 3.00" in part
    assert "step 40: score +0.50, gold 3.00" in part
    assert "It is <del>8 I think.</del>" in part
    assert "It is <ins>7.</ins>" in part
    part = text[text.index("Samples of the test") : text.index("Samples of PPO")]
    for model in ("sft", "ppo", "dpo"):
        assert f"{model}: score +0.50, gold 3.00" in part
    assert "<ins>dpo</ins> says 7." in part
    assert "<del>" not in part


def test_many_prompts_are_folded_away(tmp_path):
    many = [sample(0, "yes", prompt=f"question {i}") for i in range(11)]
    text = page([read_run(write_run(tmp_path / "r", metrics=None, samples=many))])
    before, _, after = text.partition("<summary>3 more</summary>")
    assert before.count('<div class="prompt">question') == 8
    assert after.count('<div class="prompt">question') == 3


def test_responses_that_ended_the_run_stand_apart(tmp_path):
    rows = [
        sample(0, "before it", prompt="a"),
        sample(30, "after it", prompt="a"),
        sample(33, "far away", prompt="b", kl=41.5),
    ]
    text = page([read_run(write_run(tmp_path / "r", metrics=None, samples=rows))])
    part, _, far = text[text.index("Samples of PPO") :].partition("Furthest from the reference")
    assert "step 30: score +0.50, gold 3.00" in part
    assert "far away" not in part
    assert "step 33: score +0.50, gold 3.00, KL 41.50 nats" in far
    assert "far away" in far


def test_calibration_by_hand():
    margins = [math.log(3)] * 3 + [-math.log(3)] + [4.0, -0.01, 0.0]
    found = calibration(margins)
    assert [share.n for _, share in found] == [2, 4, 1]  # 0.5 to 0.6, 0.7 to 0.8, 0.9 to 1
    assert [share.mean for _, share in found] == [0, 0.75, 1]
    assert found[1][0] == pytest.approx(0.75, abs=FP64)
    assert found[0][0] == pytest.approx((0.5 + 1 / (1 + math.exp(-0.01))) / 2, abs=FP64)


def test_the_reward_model_is_told_beside_the_length_rules(text):
    results = json.loads(RESULTS.read_text("utf-8"))["reward_model"]
    (told,) = paragraphs(text, "It ranks")
    for name in ("accuracy", "longer_wins", "shorter_wins"):
        assert f"{100 * results[name]['mean']:.1f}%" in told
    (margins,) = paragraphs(text, "1 of 4 pairs are ranked wrong")
    assert "the median margin is 1.250" in margins  # of 2, -0.5, 0.5 and 4


def test_the_histogram_has_every_pair_once():
    values = [-2.0, -0.1, 0.0, 0.1, 0.1, 5.0]
    svg = ElementTree.fromstring(figures.histogram("m", "Margins", "6 pairs", values))
    heights = [max(bar[1::2]) - min(bar[1::2]) for bar in paths(svg, "bar")]
    unit = min(heights)
    assert sum(round(height / unit) for height in heights) == len(values)
    bars = svg.findall(".//g[@class='bar']/path")
    wrong = ["--c1" in bar.get("style") for bar in bars]
    assert sum(round(h / unit) for h, w in zip(heights, wrong, strict=True) if w) == 2


def test_tokens_are_rows_with_readable_numbers(text):
    part = text[text.index("Token by token") :]
    line = next(m for m in re.findall("<tr>.*?</tr>", part) if ">yes<" in m)
    cells = re.findall("<td.*?>(.*?)</td>", line)
    assert cells == [
        *("-1.000", "-1.500", "+0.500", "-0.050", "0.250", "+0.750", "1.000", "1.649"),
        "clipped",
    ]
    assert '<td class="token plus" style="--a:0.50">+0.750</td>' in line
    assert '<span class="token plus" style="--a:0.50">yes</span>' in part
    assert '<td class="token minus" style="--a:0.17">-0.250</td>' in part


def test_a_page_has_room_for_a_few_steps_and_responses(tmp_path):
    many = [token_record(row, step, rows=9) for step in range(10, 130, 10) for row in range(9)]
    text = page([read_run(write_run(tmp_path / "many", metrics=None, tokens=many))])
    # 12 steps: the places 0, 2.75, 5.5, 8.25 and 11 are the nearest whole ones
    assert re.findall(r"<summary>PPO, step (\d+)", text) == ["90", "70", "40", "10"]
    assert "<h3>PPO, step 120</h3>" in text
    assert text.count("its 2 tokens") == 5 * 4
    long = [token_record(row, tokens=[token("a")] * 250) for row in range(4)]
    text = page([read_run(write_run(tmp_path / "long", metrics=None, tokens=long))])
    assert text.count("its 250 tokens") == 2  # a third one would be 750


def test_one_advantage_is_computed_before_the_readers_eyes(tmp_path):
    first = token("a", reward=-0.1, value=0.3, **{"return": 0.3 + (-0.1 + 0.5 - 0.3) + 0.95 * 0.4})
    last = token("b", reward=0.9, value=0.5, **{"return": 0.9})
    record = token_record(0, rows=1, tokens=[first, last])
    text = page([read_run(write_run(tmp_path / "r", metrics=None, tokens=[record]))])
    assert len(paragraphs(text, "By hand, token 1 of the first response, with gamma 1 and")) == 1
    delta, advantage, total, _ = re.findall("<li><code>(.*?)</code>", text)
    assert delta.endswith("-0.1000 + 1 * 0.5000 - 0.3000 = 0.1000")
    assert advantage.endswith("0.1000 + 0.95 * 0.4000 = 0.4800")
    assert total == "return = A + value = 0.7800; the table has 0.7800"


def group_record(row, scale, **changes):
    """Of a group with rewards 3, 0 and 1.5: mean 1.5, of the others 0.75, deviation 1.5."""
    record = token_record(row, stage="grpo", group=[3.0, 0.0, 1.5], place=row, scale=scale)
    for name in ("gamma", "lam", "whitened"):
        del record[name]
    made = {"leave_one_out": 2.25, "none": 1.5, "group": 1.5 / 1.5001, "batch": 1.25}[scale]
    record["tokens"] = [token("yes", advantage=made), token("<end>", advantage=made)]
    for x in record["tokens"]:
        del x["value"]
    return record | changes


@pytest.mark.parametrize(
    ("scale", "last"),
    [
        ("leave_one_out", "advantage = R - mean = 3.0000 - 0.7500 = 2.2500; the table has 2.2500"),
        ("none", "advantage = R - mean = 3.0000 - 1.5000 = 1.5000; the table has 1.5000"),
        (
            "group",
            "advantage = (R - mean) / (deviation + 0.0001) = (3.0000 - 1.5000) / 1.5001 = 0.9999; "
            "the table has 0.9999",
        ),
        (
            "batch",
            "advantage = (R - mean) / (deviation of all R of the rollout + 0.0001), of 1.5000; "
            "the table has 1.2500",
        ),
    ],
)
def test_an_advantage_in_a_group_is_computed_before_the_readers_eyes(tmp_path, scale, last):
    records = [group_record(row, scale) for row in (0, 1)]
    text = page([read_run(write_run(tmp_path / "r", metrics=None, tokens=records))])
    said = "By hand, the first response, of a group of 3 to the same prompt; R is the sum of its re"
    assert len(paragraphs(text, said)) == 1
    lines = re.findall("<li><code>(.*?)</code>", text)
    assert lines[0] == (
        "mean of the others = (0.0000 + 1.5000) / 2 = 0.7500"
        if scale == "leave_one_out"
        else "mean of the group = (3.0000 + 0.0000 + 1.5000) / 3 = 1.5000"
    )
    assert lines[-1] == last
    part = text[text.index("Token by token") :]
    assert ">return<" in part
    assert ">value<" not in part
    assert Parsed(text).wrong == []


def test_each_stage_that_samples_is_shown_token_by_token(tmp_path):
    records = [token_record(0), group_record(0, "none"), group_record(1, "none", step=10)]
    folder = write_run(tmp_path / "r", metrics=None, tokens=records)
    text = page([read_run(folder)])
    part = text[text.index("Token by token") :]
    assert re.findall("<h3>(.*?, step .*?)</h3>", part) == ["PPO, step 40", "GRPO, step 40"]
    assert re.findall("<summary>(.*?, step .*?)</summary>", part) == ["GRPO, step 10"]
    assert part.count("By hand, ") == 2
    assert part.count(">value<") == part[: part.index("GRPO, step 40")].count(">value<") > 0


def test_the_metrics_of_the_last_step_are_computed_again_from_its_tokens(text):
    part = text[text.index("from tokens.jsonl") :]
    rows = re.findall('<th scope="row">(.*?)</th><td>(.*?)</td><td>(.*?)</td>', part)
    found = {name: (float(ours), float(theirs)) for name, ours, theirs in rows[:6]}
    assert found == {
        "score": (1.5, 0.8),
        "kl": (1.0, 4.0),  # two tokens of 0.5 in each response
        "reward": (-0.1, 0.1),
        "value": (0.375, 0.5),
        "return": (1.0, 0.6),
        "response_length": (2.0, 14.0),
    }


def test_time_and_configuration(text):
    assert re.search(r'scope="row">ppo</th><td>40</td><td>70.0</td>', text)  # 40 of 1.75 s
    assert "sample 10.0, score 20.0, update 40.0" in text
    assert '<th scope="row">kl_control</th><td>fixed</td>' in text
    assert '<th scope="row">torch</th><td>2.0</td>' in text
    assert '<th scope="row">threads</th><td>2</td>' in text


# Unfinished, damaged, several


def test_a_killed_run_has_a_report_and_says_what_is_missing(tmp_path):
    folder = write_run(
        tmp_path / "killed",
        metrics=[ppo_row(step) for step in range(1, 18)],
        **dict.fromkeys(("results", "samples", "tokens", "reward_model")),
    )
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as out:
        out.write('{"stage": "ppo", "step": 18, "sco')
    text = write_report(folder).read_text(encoding="utf-8")
    parsed = Parsed(text)
    assert parsed.wrong == []
    lines = ["".join(x) for x in re.findall("<li>(.*?)</li>", re.sub("</?span.*?>", "", text))]
    assert lines == [
        f"PPO: is unfinished: at step 17 of 40; go on with --resume {folder}",
        "metrics.jsonl, line 18: cut or damaged, passed over.",
        "No results table: there is no results.json.",
        "No samples: there is no samples.jsonl.",
        "No token view: there is no tokens.jsonl.",
        "No model sizes and rows, and what was said of them: there is no notes.json.",
    ]
    assert len(svgs(text)) == 8
    assert "Results" not in text


@pytest.mark.parametrize("limit", [1.8, 1.7, "inf"])  # the last step has 1.7
def test_a_run_that_max_kl_ended_is_not_called_unfinished(limit, tmp_path):
    config = {"PPOConfig": {"steps": 40, "max_kl": limit}}
    folder = write_run(
        tmp_path / "far",
        run={"config": config, "versions": {}, "threads": 2},
        metrics=[ppo_row(step) for step in range(1, 18)] + [ppo_row(18, k1=1.75)],
    )
    text = page([read_run(folder)])
    ended, unfinished = text.count("PPO: was ended by "), text.count("PPO: is unfinished")
    assert (ended, unfinished) == ((1, 0) if limit == 1.7 else (0, 1))


def test_what_html_does_not_allow_is_shown_as_an_escape():
    shown = printable('<p title="\x07">a\x00b\x1b[2J\tc\n\x85\ufffe</p>')
    assert shown == '<p title="\\x07">a\\x00b\\x1b[2J\tc\n\\x85\\ufffe</p>'


def test_what_is_learned_by_heart_is_told(tmp_path):
    rows = [
        {"stage": "sft", "step": step, "loss": 2 / step}
        | ({"eval/loss": 1 + step / 10} if step % 2 == 0 else {})
        for step in range(1, 13)
    ]
    text = page([read_run(write_run(tmp_path / "one", metrics=rows, **NO_MORE))])
    assert paragraphs(text, "1 thing to look at; 1 of 1 curves left")
    assert "SFT: the held-out loss turned up after step 2" in text
    assert "Held out: From 1.200 at step 2 to 2.200 at step 12." in text


def test_one_curve_is_one(tmp_path):
    rows = [{"stage": "sft", "step": step, "loss": 2 / step} for step in range(1, 9)]
    folder = write_run(tmp_path / "one", metrics=rows, **NO_MORE)
    said = ["Nothing stands out: the one curve stayed in its range."]
    assert paragraphs(page([read_run(folder)]), "Nothing") == said


def test_a_run_with_nothing_but_its_configuration(tmp_path):
    names = ("metrics", "results", "samples", "tokens", "reward_model")
    folder = write_run(tmp_path / "begun", **dict.fromkeys(names))
    text = page([read_run(folder)])
    assert Parsed(text).wrong == []
    assert "No curves and times: there is no metrics.jsonl." in text
    assert "<svg" not in text


def test_a_single_step_has_a_curve(tmp_path):
    text = page([read_run(write_run(tmp_path / "one", metrics=[ppo_row(1)], tokens=None))])
    assert Parsed(text).wrong == []
    (score,) = [svg for svg in svgs(text) if svg.find("title").text == "PPO: score"]
    assert len(list(score.iter("use"))) == 1


def test_numbers_that_were_not_finite_are_left_out(tmp_path):
    rows = [ppo_row(step, value_loss=None if step == 5 else 1.0) for step in range(1, 11)]
    tokens = [token_record(0, rows=1, tokens=[token("a", ref_logprob=None, kl=None), token("b")])]
    text = page([read_run(write_run(tmp_path / "r", metrics=rows, tokens=tokens))])
    assert Parsed(text).wrong == []
    assert text.count("<td>not finite</td>") == 2
    assert "By hand" not in text


def test_a_step_that_was_written_twice_counts_once(tmp_path):
    rows = [ppo_row(1), ppo_row(2), ppo_row(3, score=9.0), ppo_row(3, score=0.5)]
    samples = [sample(40, "old words"), sample(40, "new words")]
    records = [token_record(0, score=7.0), token_record(1), token_record(0, score=8.0)]
    folder = write_run(tmp_path / "r", metrics=rows, samples=samples, tokens=records)
    run = read_run(folder)
    assert run.series("ppo", "score") == ([1, 2, 3], [0.02, 0.04, 0.5])
    assert [record["score"] for record in run.tokens] == [8.0, 1.5]
    text = page([run])
    assert "new words" in text
    assert "old words" not in text


def test_a_long_curve_is_thinned_without_losing_its_peaks(tmp_path):
    rows = [{"stage": "sft", "step": step, "loss": float(step == 500)} for step in range(1000)]
    (svg,) = svgs(page([read_run(write_run(tmp_path / "r", metrics=rows, **NO_MORE))]))
    ((band,), (curve,)) = (paths(svg, name) for name in ("band", "line"))
    assert len(curve) == 2 * figures.MOST_POINTS
    assert band[1::2].count(min(band[1::2])) == 1
    assert min(curve[1::2]) > min(band[1::2]) + 50  # a mean of thirteen values, one of them 1


def test_folders_without_a_run_are_refused(tmp_path):
    with pytest.raises(BadInput, match=r"holds no run.json, metrics.jsonl or results.json"):
        read_run(tmp_path)


@pytest.fixture
def make_report(monkeypatch, capsys):
    """Runs the command and returns its exit code, what it printed, and its errors."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["make_report.py", *map(str, arguments)])
        code = 0
        try:
            runpy.run_path(str(ROOT / "examples/make_report.py"), run_name="__main__")
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def test_make_report_lays_runs_over_each_other(tmp_path, make_report):
    first = write_run(tmp_path / "first")
    rows = [ppo_row(step, k1=20.0) for step in range(1, 41)]
    config = {"config": {"PPOConfig": {"steps": 40, "kl_control": "fixed", "seed": 4}}}
    second = write_run(tmp_path / "second", metrics=rows, run=config)
    assert make_report(first, second, "--out", tmp_path / "both.html")[0] == 0
    text = (tmp_path / "both.html").read_text(encoding="utf-8")
    assert Parsed(text).wrong == []
    (kl,) = [svg for svg in svgs(text) if svg.find("title").text == "PPO: KL to the reference"]
    lines = kl.findall(".//g[@class='line']/path")
    assert ["var(--c0)" in line.get("style") for line in lines] == [True, False]
    assert ["var(--c1)" in line.get("style") for line in lines] == [False, True]
    assert {"first", "second"} <= set(words(kl))
    assert paragraphs(text, "first: ")[0].endswith(": all 12 curves stayed in their range.")
    left = " 1 thing to look at; 1 of 8 curves left their range."
    assert paragraphs(text, "second: ")[0].endswith(left)
    assert "PPO: the curve of KL to the reference left its range from step 1 to the end" in text
    for i, name in enumerate(("first", "second")):  # a run has one colour, here and there
        assert f'<th scope="col" class="c{i}">{name}: ppo</th>' in text
        assert f'<b class="c{i}">{name}: </b>' in text
    assert '<th scope="row">PPOConfig.seed</th><td>3</td><td>4</td>' in text
    assert "PPOConfig.steps" not in text  # equal in both


def test_make_report_of_one_run_writes_into_its_folder(tmp_path, make_report):
    folder = write_run(tmp_path / "run", metrics=[ppo_row(1), ppo_row(40)], tokens=None)
    code, printed, _ = make_report(folder)
    assert code == 0
    assert "run: No token view: there is no tokens.jsonl." in printed
    kept = json.loads((folder / "findings.json").read_text("utf-8"))
    assert kept["findings"] == []
    for sentence in kept["told"]:
        assert f"  run: {sentence}\n" in printed
    assert (folder / "report.html").read_text("utf-8") == page([read_run(folder)])
    assert (folder / "curves.svg").is_file()


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ([], "holds no run.json, metrics.jsonl or results.json, so it is not a run"),
        (["--out", "notes.txt"], "--out notes.txt must end in .html"),
        (["--out", "no/such.html"], "--out no/such.html: cannot be written"),
    ],
)
def test_make_report_refuses_in_one_line(tmp_path, monkeypatch, make_report, out, message):
    monkeypatch.chdir(tmp_path)
    folder = write_run(tmp_path / "run") if out else tmp_path
    code, _, errors = make_report(folder, *out)
    assert code == 2
    assert errors.startswith("error: ")
    assert message in errors
    assert errors.count("\n") == 1


# Colours


def colours(theme):
    """The palette of a theme, as shares of red, green and blue."""
    return {
        name: tuple(int(pair[theme == "dark"][i : i + 2], 16) / 255 for i in (1, 3, 5))
        for name, pair in figures.PALETTE.items()
    }


def linear(colour):
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]


def luminance(colour):
    r, g, b = linear(colour)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_all_that_is_written_stands_out_from_the_paper(theme):
    """WCAG 2.1, 1.4.3: a contrast of 4.5 for text."""
    found = colours(theme)
    paper = luminance(found["paper"])
    names = ["text", "muted", "alarm", *(f"c{i}" for i in range(figures.INKS))]
    for name in names:
        light, dark = sorted([luminance(found[name]), paper], reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, name


# Machado et al. 2009, full protanopia and deuteranopia, on linear RGB.
BLIND = {
    "none": [(1, 0, 0), (0, 1, 0), (0, 0, 1)],
    "protan": [
        (0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ],
    "deutan": [
        (0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ],
}  # fmt: skip


def lab(rgb):
    """CIE L*a*b* of linear RGB, white D65."""
    to_xyz = [(0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505)]
    x, y, z = (
        sum(a * b for a, b in zip(row, rgb, strict=True)) / white
        for row, white in zip(to_xyz, (0.9505, 1.0, 1.089), strict=True)
    )
    fx, fy, fz = (max(t, 0) ** (1 / 3) if t > 0.008856 else 7.787 * t + 4 / 29 for t in (x, y, z))
    return 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)


@pytest.mark.parametrize("sight", BLIND)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_lines_can_be_told_apart_by_everyone(theme, sight):
    """Apart by 15 in CIE76, clearly another colour; the two that most figures have, by 60."""
    found = colours(theme)
    seen = []
    for i in range(figures.INKS):
        rgb = linear(found[f"c{i}"])
        seen.append(
            lab([sum(a * b for a, b in zip(row, rgb, strict=True)) for row in BLIND[sight]])
        )
    for (i, a), (j, b) in itertools.combinations(enumerate(seen), 2):
        assert math.dist(a, b) > (60 if (i, j) == (0, 1) else 15), f"c{i} and c{j}"


# In a browser

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
in_browser = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")


@in_browser
@pytest.mark.parametrize("width", [400, 1280])
def test_a_browser_shows_it_without_errors_and_without_scrolling_sideways(tmp_path, width):
    texts = {"prompt": "w" * 300, "response": " ".join(["word"] * 80) + " " + "x" * 300}
    folder = write_run(
        tmp_path / ("long-name-" * 12),
        samples=[sample(0, texts["response"], prompt=texts["prompt"]), sample(40, "y")],
        tokens=[token_record(0, **texts), group_record(0, "group", **texts)],
    )
    # In a frame of that width, since a window cannot be as narrow as a phone.
    report = json.dumps(page([read_run(folder)])).replace("</", "<\\/")
    outer = tmp_path / "outer.html"
    outer.write_text(
        f"""<!doctype html><meta charset=utf-8><iframe width={width} height=900></iframe><script>
        const frame = document.querySelector("iframe");
        frame.onload = () => {{
          const page = frame.contentDocument;
          for (const details of page.querySelectorAll("details")) details.open = true;
          const wide = page.documentElement.scrollWidth - page.documentElement.clientWidth;
          const shown = [...page.querySelectorAll("svg")].every(s => s.getBBox().width > 0);
          document.title = `too wide by ${{wide}}, figures shown: ${{shown}}`;
        }};
        frame.srcdoc = {report};
        </script>""",
        encoding="utf-8",
    )
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
            "--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=5000", "--window-size=1400,1000", "--dump-dom", outer.as_uri(),
        ],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "<title>too wide by 0, figures shown: true</title>" in done.stdout
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
