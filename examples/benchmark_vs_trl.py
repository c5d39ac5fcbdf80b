"""Time our steps beside trl's and transformers': same models, tokens and threads, in turn.

Each side is a process of its own that is warmed up once; then they work in strict alternation. All
models have random weights, alike on all sides, and no dropout; the tokens to sample are drawn once
and imposed.

Of PPO's parts, scoring is what is neither sampling nor update: reward, reference, advantages,
statistics. Peak memory is what was resident at most after loading; its fixed part is the
interpreter with all weights and, of what is trained, the gradient and Adam's two moments.
Utilisation is the time that the necessary matrix products alone would take at the speed measured
between the rounds, over the time taken.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_min.errors import BadInput, require
from rlhf_min.harness.cli import Parser, command, require_one_process

if TYPE_CHECKING:
    from benchmark.rounds import Comparison

WORKLOADS = ("ppo", "dpo", "reward", "sampling")
SCALING = "scaling"  # of ours alone, against nobody
PRECISIONS = ("fp32", "bf16")
SIZES = ("tiny", "small", "medium")
LIBRARIES = ("torch", "transformers", "trl")
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
VERSIONS = (
    "import importlib.metadata as m, json;"
    "print(json.dumps({d.name: d.version for d in m.distributions()}))"
)


@command
def main() -> None:
    require_one_process("this command starts processes of its own")
    options = read_options()
    # Only now, since torch takes seconds to import: what can be refused is refused at once.
    from benchmark import models, scaling
    from benchmark.report import chart, entries, table
    from benchmark.rounds import Comparison, check_same_work, play
    from benchmark.workloads import Task

    comparisons = [
        comparison
        for workload in WORKLOADS
        if options.only in (None, workload)
        for comparison in plan(workload, options)
    ]
    if options.large_blocks:
        comparisons += [
            Comparison(c.workload, c.opponent, c.pairs, large_blocks=True) for c in comparisons
        ]
    run = describe(options, comparisons)
    print("\n".join(f"{name}: {value}" for name, value in run.items()), flush=True)
    results: dict[str, dict[str, dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        models.save_models(models.SIZES[options.size], Path(folder))
        if options.only in (None, SCALING):
            print()
            results[SCALING] = scaling.measure(
                options.size, folder, rounds=options.rounds, threads=options.threads
            )
        for comparison in comparisons:
            task = Task(comparison.workload, options.size, "fp32", folder)
            outcome = play(comparison, task, rounds=options.rounds, threads=options.threads)
            check_same_work(outcome)
            print("\n" + table(outcome), flush=True)
            opponents = results.setdefault(comparison.workload, {})
            opponents.setdefault(comparison.name, {}).update(entries(outcome))
    if options.out is not None:
        out = Path(options.out)
        written = add_to(out / "benchmark.json", run, results)
        chart({w: written[w] for w in WORKLOADS if w in written}, out / "benchmark.png")
        print(f"\nbenchmark.json and benchmark.png are in {out}")


def add_to(
    file: Path, run: dict[str, str], results: dict[str, dict[str, dict[str, Any]]]
) -> dict[str, Any]:
    """Write the results of these workloads; others that the file holds stay as they are.

    Returns:
        All that the file holds then; under ``run`` what is known of each workload's run.
    """
    written = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"run": {}}
    written["run"] |= dict.fromkeys(results, run)
    written |= results
    file.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    return dict(written)


def read_options() -> argparse.Namespace:
    """The command line, checked."""
    require(
        Path("/proc/self/clear_refs").exists(),
        "this measures memory by what the kernel says in /proc, so it needs Linux",
    )
    parser = Parser(__doc__)
    parser.add_argument("--only", choices=(*WORKLOADS, SCALING), help="One workload. Default: all.")
    parser.add_argument("--rounds", type=int, default=3, help="Counted ones, after a warm-up.")
    parser.add_argument(
        "--size",
        choices=SIZES,
        default="small",
        help="small: GPT-2 124M and BERT-base; medium: GPT2-medium; tiny: to try it out.",
    )
    parser.add_argument("--precisions", default="fp32,bf16", help="Ours; PPO of trl is in fp32.")
    parser.add_argument(
        "--trl-python",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATH",
        help="Pythons of the environments whose trl to compare with. Default: this one.",
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--large-blocks",
        action="store_true",
        help="Once more with glibc told to keep large blocks, on both sides.",
    )
    parser.add_argument("--out", metavar="DIR", help="Folder for benchmark.json and a chart.")
    options = parser.parse_args()
    options.precisions = options.precisions.split(",")
    require(
        set(options.precisions) <= set(PRECISIONS),
        f"--precisions {','.join(options.precisions)}: give fp32, bf16 or fp32,bf16",
    )
    require(options.rounds >= 1, f"--rounds is {options.rounds}; it must be at least 1")
    require(options.threads >= 1, f"--threads is {options.threads}; it must be at least 1")
    # Workers start in another folder, so a relative path is made absolute; links stay links.
    options.trl_python = [os.path.abspath(shutil.which(p) or p) for p in options.trl_python]
    options.environments = {}
    for python in options.trl_python or [sys.executable]:
        options.environments[python] = installed(python)
        require(
            not options.trl_python or "trl" in options.environments[python],
            f"--trl-python {python}: it has no trl",
        )
    if options.out is not None:
        try:
            Path(options.out).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"--out {options.out}: {error.strerror}") from error
    return options


def installed(python: str) -> dict[str, str]:
    """The versions of all packages in an environment.

    Raises:
        BadInput: if this is no Python.
    """
    try:
        found = subprocess.run([python, "-c", VERSIONS], capture_output=True, check=True)
        return dict(json.loads(found.stdout))
    except (OSError, subprocess.CalledProcessError, json.JSONDecodeError) as error:
        raise BadInput(
            f"--trl-python {python} is not a Python that runs; give one like .venv/bin/python"
        ) from error


def plan(workload: str, options: argparse.Namespace) -> "list[Comparison]":
    """Against whom, in which precisions. The sides of one comparison are alive together."""
    from benchmark.generate import WEIGHTS_IN_BF16
    from benchmark.rounds import Comparison
    from benchmark.sides import Side

    ours = {p: Side("rlhf_min", "ours", p, sys.executable) for p in options.precisions}
    if workload == "sampling":
        label = f"generate {installed(sys.executable)['transformers']}"
        theirs = {p: Side(label, "generate", p, sys.executable) for p in options.precisions}
        found = [Comparison(workload, label, {p: (ours[p], theirs[p]) for p in ours})]
        if "bf16" in ours:
            side = Side(label, "generate", WEIGHTS_IN_BF16, sys.executable)
            name = f"{label}, weights in bf16"
            found.append(Comparison(workload, name, {"bf16": (ours["bf16"], side)}))
        return found
    found = []
    for python, versions in options.environments.items():
        kind = trl_kind(versions.get("trl", ""), workload)
        if not kind:
            continue
        label = f"trl {versions['trl']}"
        critic = kind == "experimental"
        theirs = {
            # PPO in fp32 whatever ours is
            p: Side(label, "theirs", "fp32" if workload == "ppo" else p, python, own_critic=critic)
            for p in ours
        }
        found.append(Comparison(workload, label, {p: (ours[p], theirs[p]) for p in ours}))
    require(
        bool(found),
        f"no environment has a trl to compare {workload} with: pip install -e '.[test]', "
        "or give one with --trl-python",
    )
    return found


def trl_kind(version: str, workload: str) -> str:
    """How this version of trl does the workload; "" if it does not, or in a way not known here.

    >>> trl_kind("0.11.3", "ppo"), trl_kind("1.12.0", "ppo"), trl_kind("1.16.0", "ppo")
    ('legacy', 'experimental', '')
    """
    if version.startswith("0.11."):
        return "legacy" if workload == "ppo" else ""
    major, minor = (int(part) for part in f"{version or 0}.0".split(".")[:2])
    if major < 1 or (workload == "ppo" and (major, minor) > (1, 12)):
        return ""
    return "experimental" if workload == "ppo" else "current"


def describe(options: argparse.Namespace, comparisons: "list[Comparison]") -> dict[str, str]:
    """Machine, threads and versions, and which environments there is no use for."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")
    flags = next((x.split() for x in lines if x.startswith("flags")), [])
    able = [x for x in INSTRUCTIONS if x in flags]
    environments = {sys.executable: installed(sys.executable), **options.environments}
    versions = [
        ", ".join(f"{name} {found[name]}" for name in LIBRARIES if name in found)
        for found in environments.values()
    ]
    used = {side.python for c in comparisons for group in c.groups for side in group}
    left_out = [python for python in options.trl_python if python not in used]
    return {
        "machine": f"{cpu}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "instructions": ", ".join(able) or "none of those that matter",
        "threads": str(options.threads),
        "size": options.size,
        "rounds": f"{options.rounds} after a warm-up",
        "versions": "; ".join(versions),
        **({"nothing to compare in": ", ".join(left_out)} if left_out else {}),
    }


if __name__ == "__main__":
    main()
