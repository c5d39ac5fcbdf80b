"""The style of the house, read off the source: floors, equations, words, sizes, configs.

Every test applies to the modules that exist; none names one that has to.
"""

import ast
import dataclasses
import importlib
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "rlhf_min"
SOURCES = sorted(PACKAGE.rglob("*.py"))
EXAMPLES = sorted((ROOT / "examples").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))

FLOORS = (
    ("errors", "masking", "logprobs"),
    ("kl", "advantages", "losses", "preference_losses"),
    (
        "distributed",
        "config",
        "data",
        "encoding",
        "speed",
        "loading",
        "text_metrics",
        "estimates",
        "hf_metrics",
    ),
    ("policy", "reward_model", "sampling", "optim"),
    ("rollout", "online"),
    ("sft", "reward", "ppo", "grpo", "rloo", "dpo", "kto", "evaluation", "world"),
    ("rejection",),
)
ALGORITHMS = {"sft", "reward", "ppo", "grpo", "rloo", "dpo", "kto"}
EQUATION_FLOORS = 2  # floors 0 and 1 import nothing but torch and these
OF_EQUATIONS = {"torch", "typing", "collections.abc"}

TAG = re.compile(r"\[eq:(\w+)\]")
NUMBER = re.compile(r"(?<!\S)\((\d+)\)")  # "(1)" on its own, not the call in "zeros(1)"

# Left out, because they have another meaning of their own here: answer (the right word of a
# question), context, action, and the words that are only wrong for something else (mask, scores,
# rewards, beta).
FOREIGN_WORDS = re.compile(
    r"""(?:^|_)(?:
        quer(?:y|ies) | completions? | winners? | losers? | preferred | dispreferred
        | actors? | rm | logps | adv | ret | v?preds? | lmbda | cliprange | vf
    )(?:_|$)
    | ^(?:old_logprobs | padding_mask | target_kl | reference_model)$""",
    re.VERBOSE,
)


def of_each(paths: list[Path]):
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(ROOT)))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@cache
def comments(path: Path) -> dict[int, str]:
    """The comment of each line that has one."""
    text = path.read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {t.start[0]: t.string for t in tokens if t.type == tokenize.COMMENT}


def definitions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node


def docstrings(path: Path) -> Iterator[str]:
    for node in (tree(path), *definitions(path)):
        yield ast.get_docstring(node) or ""


def where(path: Path, node: ast.AST, what: str) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}: {what}"


# Floors


def module_name(path: Path) -> str:
    """Dotted and without the package's own name: "ppo", "world.gold", "" for __init__."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def own_modules() -> set[str]:
    written = {module_name(path) for path in SOURCES}
    packages = {path.parent.relative_to(PACKAGE).as_posix().replace("/", ".") for path in SOURCES}
    return (written | packages | {name for floor in FLOORS for name in floor}) - {".", ""}


def imports(path: Path, source: ast.Module) -> Iterator[tuple[ast.AST, bool, str]]:
    """Each import, wherever it stands: the node, whether it is our own module, and its name.

    What is taken from the package's __init__ has the name "".
    """
    package = ["rlhf_min", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            targets = [f"{base}:{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            base, _, member = target.partition(":")
            if base != "rlhf_min" and not base.startswith("rlhf_min."):
                yield node, False, base
                continue
            name = base.removeprefix("rlhf_min").removeprefix(".")
            inside = f"{name}.{member}".strip(".")
            yield node, True, inside if member and inside in own_modules() else name


def floor_of(module: str) -> int:
    """The floor of a module; the harness and __init__ stand on the roof."""
    top = module.partition(".")[0]
    for number, names in enumerate(FLOORS):
        if top in names:
            return number
    assert top in ("", "harness"), f"{module} stands on no floor"
    return len(FLOORS)


def wrong_imports(path: Path, source: ast.Module) -> list[str]:
    here = module_name(path)
    room = here.partition(".")[0]
    floor = floor_of(here)
    wrong = []
    for node, is_ours, name in imports(path, source):
        target = name.partition(".")[0]
        if not is_ours:
            if floor < EQUATION_FLOORS and not any(
                name == allowed or (allowed == "torch" and name.startswith("torch."))
                for allowed in OF_EQUATIONS
            ):
                wrong.append(where(path, node, f"floor {floor} imports {name}"))
        elif target == "harness" and room not in ("harness", ""):
            wrong.append(where(path, node, "only the harness imports the harness"))
        elif name == "" and room != "harness":
            wrong.append(where(path, node, "imports from the package's own __init__"))
        elif floor_of(name) > floor:
            wrong.append(where(path, node, f"{here} imports {name} from a higher floor"))
        elif room in ("evaluation", "world") and target in ALGORITHMS:
            wrong.append(where(path, node, f"{room} imports the algorithm {target}"))
    return wrong


@of_each(SOURCES)
def test_imports_go_down(path):
    assert wrong_imports(path, tree(path)) == []


@pytest.mark.parametrize(
    ("module", "line", "allowed"),
    [
        ("kl", "from .logprobs import entropy", True),
        ("kl", "from rlhf_min.logprobs import entropy", True),
        ("losses", "from . import kl", True),
        ("logprobs", "from torch.utils.checkpoint import checkpoint", True),
        ("kl", "import torchvision", False),
        ("kl", "import math", False),
        ("kl", "import collections", False),
        ("kl", "from .data import Sequences", False),
        ("kl", "from . import data", False),
        ("kl", "from rlhf_min import data", False),
        ("kl", "import rlhf_min.data", False),
        ("kl", "def f():\n    from .ppo import train", False),
        ("kl", "if TYPE_CHECKING:\n    from .rollout import Rollout", False),
        ("ppo", "from rlhf_min import gae", False),
        ("ppo", "from .harness.cli import main", False),
        ("evaluation", "from .dpo import DPOConfig", False),
        ("world.gold", "from ..ppo import train", False),
        ("world.gold", "from ..errors import require", True),
        ("world.gold", "from .questions import Question", True),
        ("__init__", "from .harness.run.saved_models import save_policy", True),
        ("harness.cli", "from ..ppo import train", True),
        ("harness.cli", "from .report import report", True),
        ("harness.cli", "from rlhf_min import gae", True),
    ],
)
def test_imports_go_down_sees(module, line, allowed):
    path = PACKAGE / (module.replace(".", "/") + ".py")
    assert (wrong_imports(path, ast.parse(line)) == []) == allowed


def test_imports_have_no_cycle():
    graph = {
        module_name(path): {name for _, is_ours, name in imports(path, tree(path)) if is_ours}
        for path in SOURCES
    }
    while leaves := {name for name, needs in graph.items() if not needs & graph.keys() - {name}}:
        graph = {name: needs for name, needs in graph.items() if name not in leaves}
    assert graph == {}


def test_file_names():
    assert [str(p) for p in SOURCES if p.name in ("utils.py", "common.py", "base.py")] == []


# Equations


def test_each_equation_stands_in_one_docstring_and_is_proved():
    stated = [tag for path in SOURCES for text in docstrings(path) for tag in TAG.findall(text)]
    assert sorted(stated) == sorted(set(stated)), "a tag stands in more than one docstring"
    proved = {
        argument.value
        for path in TESTS
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.eq"
        for argument in node.args
    }
    assert proved == set(stated)


def equation_numbers(path: Path, node: ast.AST) -> tuple[set[str], set[str]]:
    """The numbers in the docstring of a definition, and those in the comments of its code."""
    told = set(NUMBER.findall(ast.get_docstring(node) or ""))
    lines = range(node.lineno, node.end_lineno + 1)
    shown = {n for i, c in comments(path).items() if i in lines for n in NUMBER.findall(c)}
    return told, shown


@of_each(SOURCES)
def test_equation_numbers_reappear_on_code_lines(path):
    wrong, accounted = [], set()
    for node in definitions(path):
        text = ast.get_docstring(node) or ""
        # a docstring has equations if it has a tag, or a line that ends in a number far right
        if TAG.search(text) or re.search(r"\S {2,}\(\d+\)$", text, re.MULTILINE):
            told, shown = equation_numbers(path, node)
            accounted |= set(range(node.lineno, node.end_lineno + 1))
            if told != shown:
                wrong.append(where(path, node, f"{sorted(told)} told, {sorted(shown)} shown"))
    for line, comment in comments(path).items():
        if NUMBER.search(comment) and line not in accounted:
            wrong.append(f"{path.name}:{line}: {comment} belongs to no equation")
    assert wrong == []


# Words


def bound_names(source: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """What the code itself gives a name to; names of other libraries are theirs."""
    for node in ast.walk(source):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node, node.name
        elif isinstance(node, ast.arg):
            yield node, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node, node.attr
        elif isinstance(node, ast.alias) and node.asname:
            yield node, node.asname


@of_each(SOURCES + EXAMPLES)
def test_one_word_for_each_concept(path):
    foreign = [
        where(path, node, name)
        for node, name in bound_names(tree(path))
        if FOREIGN_WORDS.search(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower())
    ]
    assert foreign == []


# Docstrings and size


def is_public(node: ast.AST) -> bool:
    return not node.name.startswith("_")


@of_each(SOURCES)
def test_public_things_have_docstrings(path):
    missing = []
    for node in tree(path).body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or not is_public(node):
            continue
        members = node.body if isinstance(node, ast.ClassDef) else []
        methods = [m for m in members if isinstance(m, ast.FunctionDef) and is_public(m)]
        missing += [where(path, n, n.name) for n in (node, *methods) if not ast.get_docstring(n)]
    assert missing == []


@of_each(SOURCES)
def test_functions_fit_on_a_screen(path):
    long = []
    for node in definitions(path):
        if isinstance(node, ast.ClassDef):
            continue
        lines = node.end_lineno - node.lineno + 1
        if ast.get_docstring(node):
            lines -= node.body[0].end_lineno - node.body[0].lineno + 1
        if lines > 60:
            long.append(where(path, node, f"{node.name} has {lines} lines without its docstring"))
    assert long == []


MEASURING = {"compare_with_trl.py", "benchmark_vs_trl.py"}  # what is beside trl, not what is shown


def test_examples_are_short():
    long = {
        path.name: lines
        for path in (ROOT / "examples").glob("*.py")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) >= 100
    }
    assert long.keys() <= MEASURING, long


LITTLE_WORDS = set("a an and are as at be by each for from in is it of on or that the to".split())


def words_of(text: str) -> set[str]:
    """The words of a sentence or of code, names taken apart, in the singular."""
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", text).lower()
    return {word.rstrip("s") for word in re.findall(r"[a-z]{2,}", apart)} - LITTLE_WORDS


def echoes(lines: list[str], comments: dict[int, str]) -> list[str]:
    """Comments with no word that their code has not. A shape is news, and so is a heading."""
    found = []
    for number, comment in comments.items():
        code = lines[number - 1].removesuffix(comment)
        following = (line for line in lines[number:] if not line.lstrip().startswith("#"))
        said = set() if re.search(r"\([A-Z]", comment) else words_of(comment)
        if code and said and said <= words_of(code if code.strip() else next(following, "")):
            found.append(f"{number}: {comment}")
    return found


@of_each(SOURCES + EXAMPLES)
def test_no_comment_repeats_the_code(path):
    assert echoes(path.read_text(encoding="utf-8").splitlines(), comments(path)) == []


@pytest.mark.parametrize(
    ("code", "fine"),
    [
        ("    # update the running moments\n    running_moments.update(x)", False),
        ("    total = rewards.sum()  # the sum of the rewards", False),
        ("    # before the step, or the bits would differ\n    running_moments.update(x)", True),
        ("    values = head(hidden)  # values (N,)", True),
        ("# Moments\nclass RunningMoments:", True),
    ],
)
def test_no_comment_repeats_the_code_sees(code, fine):
    lines = code.splitlines()
    found = {i: line[line.index("#") :] for i, line in enumerate(lines, start=1) if "#" in line}
    assert (echoes(lines, found) == []) == fine


# What is never done


RUNS_CODE = {"trust_remote_code", "allow_pickle", "shell"}  # unless they are False


def named_values(node: ast.AST) -> Iterator[tuple[str | None, str]]:
    """What a call or a dict gives by name."""
    if isinstance(node, ast.Call):
        yield from ((k.arg, ast.unparse(k.value)) for k in node.keywords)
    if isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            yield getattr(key, "value", None), ast.unparse(value)


def forbidden(path: Path, source: ast.Module) -> list[str]:
    found = []
    for node in ast.walk(source):
        found += [
            where(path, node, f"{name}={value}")
            for name, value in named_values(node)
            if name in RUNS_CODE and value != "False"
        ]
        match node:
            case ast.Attribute(value=ast.Name(id="yaml"), attr="load" | "unsafe_load" as name):
                found.append(where(path, node, f"yaml.{name}"))
            case ast.Attribute(value=ast.Name(id="os"), attr="system" | "popen" as name):
                found.append(where(path, node, f"os.{name}"))
            case ast.Import(names=names) if any(a.name.startswith("pickle") for a in names):
                found.append(where(path, node, "pickle"))
            case ast.ImportFrom(module=str(module), names=names) if module.startswith(
                "pickle"
            ) and [a.name for a in names] != ["UnpicklingError"]:
                found.append(where(path, node, "pickle"))
            case ast.ExceptHandler(type=None):
                found.append(where(path, node, "bare except"))
            case ast.ExceptHandler(type=caught) if {"Exception", "BaseException"} & {
                name.id for name in ast.walk(caught) if isinstance(name, ast.Name)
            }:
                found.append(where(path, node, "except Exception"))
            case ast.Call(func=ast.Name(id="eval" | "exec" as name)):
                found.append(where(path, node, name))
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="load")):
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                if keywords.get("weights_only") != "True":
                    found.append(where(path, node, "torch.load without weights_only=True"))
    return found


@of_each(SOURCES + EXAMPLES)
def test_never(path):
    found = forbidden(path, tree(path))
    # One runs trl and users' scripts: whatever they raise becomes a line. The other hands it to all
    # processes.
    if "theirs" in path.parts or path.name == "distributed.py":
        found = [fault for fault in found if not fault.endswith("except Exception")]
    assert found == []


@pytest.mark.parametrize(
    ("code", "fine"),
    [
        ("import pickle", False),
        ("from pickle import dumps", False),
        ("from pickle import UnpicklingError", True),
        ("from pickle import UnpicklingError, loads", False),
        ("eval('1')", False),
        ("model.eval()", True),
        ("try:\n    f()\nexcept:\n    pass", False),
        ("try:\n    f()\nexcept Exception:\n    pass", False),
        ("try:\n    f()\nexcept (OSError, Exception) as error:\n    pass", False),
        ("try:\n    f()\nexcept OSError:\n    pass", True),
        ("torch.load(path)", False),
        ("torch.load(path, weights_only=False)", False),
        ("torch.load(path, weights_only=True)", True),
        ("AutoModel.from_pretrained(name, trust_remote_code=True)", False),
        ("AutoModel.from_pretrained(name, trust_remote_code=options.trust)", False),
        ("AutoModel.from_pretrained(name, **{'trust_remote_code': True})", False),
        ("options = {'trust_remote_code': False, **more}", True),
        ("np.load(path, allow_pickle=True)", False),
        ("np.load(path, allow_pickle=False)", True),
        ("subprocess.run(line, shell=True)", False),
        ("subprocess.run([python, '-c', code])", True),
        ("yaml.load(file)", False),
        ("yaml.safe_load(file)", True),
        ("os.system(line)", False),
    ],
)
def test_never_sees(code, fine):
    assert (forbidden(PACKAGE / "some.py", ast.parse(code)) == []) == fine


# Configs


def configs() -> list[tuple[Path, ast.ClassDef]]:
    """The dataclasses named *Config of all files that can be read."""
    return [
        (path, node)
        for path in SOURCES
        for node in tree(path).body
        if isinstance(node, ast.ClassDef)
        and node.name.endswith("Config")
        and any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
    ]


def test_config_fields_have_help():
    missing = []
    for path, node in configs():
        config = getattr(importlib.import_module(f"rlhf_min.{module_name(path)}"), node.name)
        missing += [
            where(path, node, f"{node.name}.{field.name}")
            for field in dataclasses.fields(config)
            if not field.metadata.get("help")
        ]
    assert missing == []


def test_config_fields_are_read():
    # a check in __post_init__ is no use of a field; a property that derives something from it is
    own_lines: dict[Path, set[int]] = {}
    for path, node in configs():
        for part in node.body:
            if not isinstance(part, ast.FunctionDef) or part.name == "__post_init__":
                own_lines.setdefault(path, set()).update(range(part.lineno, part.end_lineno + 1))
    read = {
        node.attr
        for path in SOURCES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Load)
        and node.lineno not in own_lines.get(path, ())
    }
    unread = [
        where(path, part, f"{node.name}.{part.target.id}")
        for path, node in configs()
        for part in node.body
        if isinstance(part, ast.AnnAssign) and part.target.id not in read
    ]
    assert unread == []
