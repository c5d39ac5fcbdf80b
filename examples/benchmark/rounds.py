"""Let sides work in turn, and see that they have done the same work."""

import contextlib
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

from benchmark.sides import Killed, Played, Side, Worker, environment
from benchmark.workloads import Task
from rlhf_min.errors import require

TOLERANCE = 1e-4  # of losses and the like in fp32: absolute, beyond 1 relative
Rates = dict[str, dict[str, float]]  # FLOP/s by precision, then by part
Gaps = dict[str, tuple[float, float]]  # how far apart a figure is in the first and the last round


@dataclass(frozen=True)
class Comparison:
    """Sides that work in turn, and whom of them to compare.

    `pairs` are ours and theirs for each precision that is reported.
    """

    workload: str
    opponent: str
    pairs: dict[str, tuple[Side, Side]]
    large_blocks: bool = False

    @property
    def name(self) -> str:
        """Of the opponent and of the conditions."""
        return self.opponent + (" with large blocks" if self.large_blocks else "")

    @property
    def groups(self) -> list[list[Side]]:
        """The sides that work in turn: an opponent after all of ours that are compared with it."""
        by_opponent: dict[Side, list[Side]] = {}
        for ours, theirs in self.pairs.values():
            by_opponent.setdefault(theirs, []).append(ours)
        return [[*ours, theirs] for theirs, ours in by_opponent.items()]


@dataclass
class Outcome:
    """What the sides of a comparison did, and how fast the machine multiplied meanwhile."""

    comparison: Comparison
    task: Task
    played: dict[Side, Played]
    rates: Rates
    gaps: dict[str, Gaps] = field(default_factory=dict)  # by precision of ours


def play(comparison: Comparison, task: Task, *, rounds: int, threads: int) -> Outcome:
    """A warm-up each, then rounds in strict alternation. Only one process works at a time."""
    variables = environment(threads=threads, large_blocks=comparison.large_blocks)
    played: dict[Side, Played] = {}
    measured: dict[str, list[dict[str, float]]] = {}
    for sides in comparison.groups:
        played |= {side: Played(side) for side in sides}
        precisions = dict.fromkeys(side.precision.split()[0] for side in sides)
        gauge_side = Side("gauge", "gauge", ",".join(precisions), sys.executable)
        with contextlib.ExitStack() as stack:
            gauge = stack.enter_context(Worker(gauge_side, task, variables))
            workers: dict[Side, Worker] = {}
            for side in sides:
                with noting_death(played[side]):
                    workers[side] = stack.enter_context(Worker(side, task, variables))
                    played[side].ready = workers[side].ready
            for number in range(rounds + 1):
                name = f"{comparison.workload} against {comparison.name}"
                print(f"{name}: round {number} of {rounds}", file=sys.stderr, flush=True)
                for side, worker in workers.items():
                    if not played[side].killed:
                        with noting_death(played[side]):
                            played[side].rounds.append(worker.round())
                for precision, parts in gauge.round().items():
                    measured.setdefault(precision, []).append(parts)
    rates = {
        precision: {part: statistics.median(rate[part] for rate in found) for part in found[0]}
        for precision, found in measured.items()
    }
    return Outcome(comparison, task, played, rates)


@contextlib.contextmanager
def noting_death(played: Played) -> Iterator[None]:
    """A side that is killed is left out from then on; the others go on."""
    try:
        yield
    except Killed as error:
        played.killed = str(error)


def check_same_work(outcome: Outcome) -> None:
    """See that both sides of each pair did what the task says, and note how far apart they came.

    Args:
        outcome: gets the `gaps` of each pair that lived.

    Raises:
        BadInput: if tokens or optimizer steps differ, or both are in fp32 and a loss of the first
            round does.
    """
    wanted = outcome.task.expected()
    for precision, (ours, theirs) in outcome.comparison.pairs.items():
        one, other = outcome.played[ours], outcome.played[theirs]
        if one.killed or other.killed:
            continue
        for played in (one, other):
            for answer in played.rounds:
                require(
                    (answer["tokens"], answer["steps"]) == (wanted.tokens, wanted.steps),
                    f"{played.side.name} did other work in {outcome.task.workload}: "
                    f"{answer['tokens']} tokens and {answer['steps']} optimizer steps instead of "
                    f"{wanted.tokens} and {wanted.steps}",
                )
        gaps = {
            figure: (_gap(one, other, figure, 0), _gap(one, other, figure, -1))
            for figure in one.rounds[0]["figures"]
            if figure in other.rounds[0]["figures"]
        }
        for figure, (first, _) in gaps.items():
            require(
                first <= TOLERANCE or not ours.precision == theirs.precision == "fp32",
                f"{ours.name} and {theirs.name} did other work in {outcome.task.workload}: "
                f"{figure} differs by {first:.1e} in the first round",
            )
        outcome.gaps[precision] = gaps


def _gap(one: Played, other: Played, figure: str, number: int) -> float:
    x, y = (played.rounds[number]["figures"][figure] for played in (one, other))
    return abs(x - y) / max(1, abs(y))
