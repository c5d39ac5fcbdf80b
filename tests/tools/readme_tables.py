"""The tables of the READMEs that follow from the source: places, equations, conventions, files.

python tests/tools/readme_tables.py            # prints them
python tests/tools/readme_tables.py --write    # puts them between their marks in the READMEs
"""

import argparse
import ast
import re
from functools import cache
from pathlib import Path

import find_helpers  # noqa: F401
import preference_tables
import trl_tables
from test_conventions import CONVENTIONS, Convention, case
from test_house import FLOORS, PACKAGE, ROOT, SOURCES, TAG, TESTS, definitions, module_name, tree
from trl_tables import table

README, HARNESS = PACKAGE / "README.md", PACKAGE / "harness/README.md"
ROOMS = ("rows", "run", "report", "stages")


# Equations


def equations() -> str:
    """Tag, source, place, proof and counterpart of each, from the floors upwards."""
    order = [name for floor in FLOORS for name in floor]
    stated = [
        (order.index(module_name(path).partition(".")[0]), node.lineno, tag, path, node)
        for path in SOURCES
        for node in definitions(path)
        for tag in TAG.findall(ast.get_docstring(node) or "")
    ]
    head = ("equation", "source", "stated in", "proved by", "in trl")
    return table(head, [row(tag, path, node) for *_, tag, path, node in sorted(stated)])


def row(tag: str, path: Path, node: ast.FunctionDef | ast.ClassDef) -> tuple[str, ...]:
    paper, in_trl = source(ast.get_docstring(node) or "")
    places = [link(path, node.lineno, f"`{node.name}`")]
    places += [f"({n}) {link(path, line, str(line))}" for n, line in numbered(path, node)]
    return f"`{tag}`", paper, ", ".join(places), f"`{proofs(tag, node.name)[0]}`", in_trl


def link(path: Path, line: int, text: str) -> str:
    return f"[{text}]({path.relative_to(PACKAGE).as_posix()}#L{line})"


def numbered(path: Path, node: ast.FunctionDef | ast.ClassDef) -> list[tuple[str, int]]:
    """The numbers of the equation with the lines of code that compute them."""
    lines = path.read_text(encoding="utf-8").splitlines()[: node.end_lineno]
    found = [(re.findall(r"#.*?\((\d)\)", line), n) for n, line in enumerate(lines, 1)]
    return [(number, n) for numbers, n in found if n >= node.lineno for number in numbers]


def source(docstring: str) -> tuple[str, str]:
    """Of what stands under Source: the papers, and the counterpart in trl."""
    (text,) = re.findall(r"^Source: (.*?)(?:\n\n|\Z)", docstring, re.DOTALL | re.MULTILINE)
    words = " ".join(text.split()).replace("``", "`")
    paper, _, in_trl = words.removesuffix(".").partition("; trl ")
    return paper, in_trl


def proofs(tag: str, function: str) -> list[str]:
    """The tests that carry the tag. First those of the function alone, last those beside trl."""
    found = [test for test, tags in tags_of_tests().items() if tag in tags]
    return sorted(found, key=lambda test: ("parity" in test, f"::test_{function}" not in test))


@cache
def tags_of_tests() -> dict[str, set[str]]:
    return {
        f"{path.relative_to(ROOT).as_posix()}::{node.name}": {
            call.args[0].value
            for call in node.decorator_list
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.eq"
        }
        for path in TESTS
        for node in definitions(path)
    }


# Places

# What is asked for: the line that does it, and the line of the plain computation where that is
# another one.
PLACES = {
    "is EOS put after a response of the data": ("encoding/codec.py", "Read([*ids, self.tok"),
    "is the mask made, EOS included": ("data.py", "response_mask(response_lengths"),
    "are logits and tokens shifted": (
        *("speed/packing.py", "predicts = [start + P - 1"),
        *("data.py", "self.prompt_lengths[rows] - 1 + t"),
    ),
    "are rows packed, instead of padded": (
        *("speed/forward.py", "return packed(batch"),
        *("policy.py", 'inputs = {"input_ids": batch.ids'),
    ),
    "are logits divided by the temperature": ("logprobs.py", "else logits / temperature"),
    "is a token's log-probability": (
        *("logprobs.py", "logprobs = (logits.gather("),
        *("logprobs.py", "return chosen - logits.logsumexp"),
    ),
    "is the entropy": (
        *("logprobs.py", "entropy = log_total[:, 0] -"),
        *("logprobs.py", "return logits.logsumexp(-1) - mean_logit"),
    ),
    "is a value read, where its token is predicted": (
        *("policy.py", "self.value_head(hidden)"),
        *("policy.py", "entropy(logits.detach()), hidden[rows, at]"),
    ),
    "is the reference frozen": ("policy.py", "reference.requires_grad_(False)"),
    "is dropout turned off, in PPO (SFT and the reward model keep it)": (
        *("online.py", "disable_dropout(policy)"),
    ),
    "do policy and reference score the responses": ("rollout.py", "output = policy(rows, "),
    "is the KL of each token estimated": ("rollout.py", "kls = kl_estimate("),
    "is a token drawn": ("sampling.py", "tokens = _inverse_cdf("),
    "are keys and values kept while sampling": (
        *("sampling.py", "hidden = cache.hidden_states("),
        *("sampling.py", "hidden = policy.lm.base_model("),
    ),
    "does a sampled response end": ("sampling.py", "going = (tokens != eos_id)"),
    "is it seen whether a response ended by EOS": ("rollout.py", "ended=torch.tensor("),
    "is a response without EOS penalised": ("online.py", "scores - config.eos_penalty"),
    "is the reward model put to mean 0, variance 1": ("reward.py", "reward_model.rescale("),
    "are scores normalised by a running mean (off)": ("ppo.py", "moments.normalise("),
    "are rewards whitened, mean kept (off)": ("ppo.py", "rewards = masked_scale("),
    "does the KL enter the reward": ("kl.py", "-kl_coef * at_least_float32(kl)"),
    "does the score enter the reward": ("kl.py", "rewards.scatter_add(1, last"),
    "is GAE's recursion": ("advantages.py", "next_advantage = delta + gamma"),
    "are advantages whitened, over the whole rollout": ("ppo.py", "advantages = masked_whiten("),
    "does an update end early": ("online.py", "> config.stop_kl:"),
    "is the ratio clipped": ("losses.py", "ratio.clamp(1 - clip, 1 + clip)"),
    "is the value clipped": ("losses.py", "new_values.clamp(values - clip"),
    "is PPO's loss averaged, over the tokens of a minibatch": ("ppo.py", ".count) / tokens"),
    "are the other losses averaged, over the tokens or pairs of a batch": (
        *("optim.py", "optimizer.backward(found.loss"),
    ),
    "are policy and value loss added up": ("ppo.py", "config.value_coef * value_loss.loss"),
    "is a response set beside the others of its group, in RLOO": (
        *("advantages.py", "(groups - others)"),
    ),
    "is it set beside its group's mean, in GRPO": (
        *("advantages.py", "centred = groups - groups.mean"),
    ),
    "is GRPO's loss averaged, over each response first": (
        *("losses.py", "loss = (sums / lengths"),
    ),
    "is the loss of a pair chosen": ("dpo.py", "match config.loss:"),
    "does a pair's loss see means per token (SimPO, ORPO)": ("dpo.py", "x / lengths[i % 2]"),
    "does the chosen response's SFT loss come in (off in DPO)": ("dpo.py", "config.sft_coef * sft"),
    "is DPO's loss": ("preference_losses.py", "loss = -(1 - label_smoothing)"),
    "is KTO's loss": ("preference_losses.py", "loss = torch.where(labels, desirable"),
    "does a prompt of KTO meet another one's response": (
        *("kto.py", "SFTExample(x.prompt_ids, examples[row"),
    ),
    "is the reward model's loss": ("losses.py", "loss = -logsigmoid(difference"),
}


def places() -> str:
    """The one line that does what is asked for."""
    rows = []
    for what, (file, code, *plain) in PLACES.items():
        line, shown = place(file, code)
        rows.append((f"{what}?", line, shown, place(*plain)[0] if plain else ""))
    return table(("where ...", "line", "code", "plain"), rows)


def place(name: str, code: str) -> tuple[str, str]:
    lines = (PACKAGE / name).read_text(encoding="utf-8").splitlines()
    found = [(n, line.strip()) for n, line in enumerate(lines, 1) if code in line]
    assert len(found) == 1, f"{len(found)} lines of {name} hold {code!r}; mend it in PLACES"
    [(number, line)] = found
    return link(PACKAGE / name, number, f"`{name}:{number}`"), f"`{line.partition('  #')[0]}`"


# Conventions


def conventions() -> str:
    """What is done here and elsewhere, and the number that it decides."""
    head = ("convention", "here", "elsewhere", "the number", "test")
    return table(head, [cells(key, convention) for key, convention in CONVENTIONS.items()])


def cells(key: str, convention: Convention) -> tuple[str, ...]:
    others = [f"{x.what} ({x.who}): `{x.number:g}`" for x in convention.elsewhere]
    here = f"{convention.here}: `{convention.number:g}`"
    tests = [f"`[{case(key, other)}]`" for other in convention.elsewhere]
    return convention.title, here, "; ".join(others), convention.meaning, ", ".join(tests)


# Files


def files(*folders: str) -> str:
    """The files of some folders, with what their docstrings begin with."""
    top = PACKAGE / Path(folders[0]).parent
    rows = []
    for path in SOURCES:
        told = " ".join((ast.get_docstring(tree(path)) or "").partition("\n\n")[0].split())
        if path.parent.relative_to(PACKAGE).as_posix() in folders and path.stem != "__init__":
            name = path.relative_to(top).as_posix()
            rows.append((f"[`{name}`]({name})", told.replace("``", "`")))
    return table(("file", "what is in it"), rows)


# The README that holds a section, and what makes it
SECTIONS = {
    "places": (README, places),
    "equations": (README, equations),
    "conventions": (README, conventions),
    "beside": (README, lambda: files("encoding", "loading", "speed", "world")),
    "files": (HARNESS, lambda: files(*(f"harness/{room}" for room in ROOMS))),
    **{name: (trl_tables.PAGE, make) for name, make in trl_tables.MADE.items()},
    **{name: (preference_tables.PAGE, make) for name, make in preference_tables.MADE.items()},
}


def put(text: str, name: str, content: str) -> str:
    """The text with this content between the marks of a section."""
    begin, end = f"<!-- begin:{name} -->\n", f"<!-- end:{name} -->"
    before, begun, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    assert (begun, ended) == (begin, end), f"the README has no place for {name}"
    return f"{before}{begin}{content}\n{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="Write them into the READMEs.")
    write = parser.parse_args().write
    for name, (readme, make) in SECTIONS.items():
        if write:
            text = put(readme.read_text(encoding="utf-8"), name, make())
            readme.write_text(text, encoding="utf-8")
        else:
            print(make(), end="\n\n")


if __name__ == "__main__":
    main()
