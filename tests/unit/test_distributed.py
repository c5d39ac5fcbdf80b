"""What several processes agree on: dealt work, errors, decisions and the sum of gradients."""

import copy
import os
from functools import partial

import pytest
import torch
from launch import in_processes
from small import ids

from rlhf_min import distributed
from rlhf_min.data import SFTExample
from rlhf_min.errors import BadInput, Diverged, NonFinite
from rlhf_min.harness.run.atomic import NotWritten
from rlhf_min.harness.run.faults import _Broken

PROCESSES = pytest.mark.parametrize("n", [2, 3])
NAN = float("nan")


def everywhere(n, work):
    """What `work` returns in each of n processes, if that is the same."""
    first, *others = in_processes(n, work)
    assert others == [first] * (n - 1)
    return first


def raised_by(work):
    """The error, as an outcome that can be compared."""
    try:
        work()
    except Exception as error:
        return type(error), str(error), {k: repr(v) for k, v in vars(error).items()}
    return None


# Who is there


@PROCESSES
def test_each_process_knows_its_number(n):
    def work():
        return (
            distributed.rank(),
            distributed.size(),
            distributed.local_rank(),
            distributed.is_main(),
        )

    assert in_processes(n, work) == [(rank, n, rank, rank == 0) for rank in range(n)]


def test_after_the_end_each_is_alone():
    def work():
        distributed.end()
        return distributed.rank(), distributed.size(), distributed.agree(True)

    assert everywhere(2, work) == (0, 1, True)


def test_joining_twice_is_joining_once():
    assert in_processes(2, lambda: (distributed.start(), distributed.rank())) == [
        (None, 0),
        (None, 1),
    ]


@pytest.mark.parametrize("variables", [{}, {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}])
def test_one_process_joins_nobody(variables, monkeypatch):
    monkeypatch.setattr(os, "environ", variables)
    distributed.start()
    assert not torch.distributed.is_initialized()
    assert (distributed.rank(), distributed.size(), distributed.local_rank()) == (0, 1, 0)
    assert distributed.is_main()
    assert not distributed.is_idle()
    distributed.end()


def test_one_process_does_everything_itself():
    done = []
    assert distributed.deal(lambda x: done.append(x) or 2 * x, [3, 1, 2]) == [6, 2, 4]
    assert done == [3, 1, 2]
    assert distributed.on_main(lambda: "here") == "here"
    assert distributed.agree(True) is True
    assert distributed.agree(False) is False
    distributed.barrier()
    parameter = torch.ones(2, requires_grad=True)
    other = torch.ones(2, requires_grad=True)
    parameter.grad = gradient = torch.tensor([0.1, 0.2])
    distributed.sum_gradients([parameter, other])
    assert parameter.grad is gradient
    assert gradient.tolist() == torch.tensor([0.1, 0.2]).tolist()
    assert other.grad is None


def test_one_process_raises_what_it_met():
    met = NonFinite(3, "loss")

    def work(_=None):
        raise met

    for call in (lambda: distributed.deal(work, [1]), lambda: distributed.on_main(work)):
        with pytest.raises(NonFinite) as raised:
            call()
        assert raised.value is met


# Dealt work


@PROCESSES
def test_parts_go_round_and_results_come_back_in_order(n):
    def work():
        return [distributed.deal(lambda x: (x, distributed.rank()), range(k)) for k in range(8)]

    assert everywhere(n, work) == [[(part, part % n) for part in range(k)] for k in range(8)]


def test_each_part_is_done_once():
    def work():
        done = []
        distributed.deal(done.append, "abcde")
        return done

    assert in_processes(3, work) == [["a", "d"], ["b", "e"], ["c"]]


def test_tensors_come_back_to_the_bit():
    rng = torch.Generator().manual_seed(0)
    rows = [torch.randn(n, 3, generator=rng, dtype=torch.float64) for n in range(5)]
    rows += [rows[4].float(), rows[3].bfloat16(), rows[3] > 0, torch.tensor(7)]

    def work():
        found = zip(distributed.deal(lambda row: row.clone(), rows), rows, strict=True)
        return [x.dtype == row.dtype and torch.equal(x, row) for x, row in found]

    assert everywhere(2, work) == [True] * len(rows)


def test_what_a_part_asks_for_it_does_itself():
    """Another process is at another part, or at none: nobody would answer."""

    def work():
        def one(part):
            inner = distributed.deal(lambda x: (x, distributed.rank()), range(3))
            seen = distributed.agree(part == 1), distributed.largest(part)
            return distributed.size(), inner, seen, distributed.on_main(distributed.rank)

        return distributed.deal(one, range(2)), distributed.size()

    parts, size = everywhere(2, work)
    assert size == 2
    assert parts == [
        (1, [(x, rank) for x in range(3)], (rank == 1, rank), rank) for rank in range(2)
    ]


def test_nan_comes_back_as_nan():
    def work():
        return [str(x) for x in distributed.deal(lambda x: x, [NAN, float("inf"), -0.0])]

    assert everywhere(2, work) == ["nan", "inf", "-0.0"]


def sharded(work):
    """The same with weights that are taken for sharded."""

    def of_a_shard():
        distributed._world.sharded = True
        return work()

    return of_a_shard


@PROCESSES
def test_sharded_weights_make_as_many_rounds_everywhere(n):
    def work():
        return [rounds(parts) for parts in range(6)]

    def rounds(parts):
        done = []

        def one(part):
            done.append((part, distributed.is_idle()))
            return part, distributed.rank()

        return distributed.deal(one, range(parts)), done, distributed.is_idle()

    for rank, found in enumerate(in_processes(n, sharded(work))):
        for parts, (results, done, idle) in enumerate(found):
            mine = [(part, False) for part in range(rank, parts, n)]
            company = [(0, True)] * (-(-parts // n) - len(mine))
            assert results == [(part, part % n) for part in range(parts)]
            assert done == mine + company
            assert not idle


def test_whoever_fails_while_it_keeps_company_is_idle_no_longer():
    def work():
        def fails(_):
            if distributed.is_idle():
                raise BadInput("alone")

        met = raised_by(lambda: distributed.deal(fails, [0])) if distributed.rank() else None
        return met and met[:2], distributed.is_idle()

    assert in_processes(2, sharded(work))[1] == ((BadInput, "alone"), False)


def test_with_sharded_weights_nobody_waits_for_an_error():
    """The others stand in a forward pass: only the end of this process ends them."""

    def work():
        def fails(_):
            raise BadInput("here")

        return raised_by(lambda: distributed.deal(fails, [0, 1])) if distributed.rank() else None

    nobody, (kind, message, _) = in_processes(2, sharded(work))
    assert nobody is None
    assert (kind, message) == (BadInput, "here")


# Errors


class OfItsOwn(Exception):
    """It cannot be made from its message."""

    def __init__(self, row, column):
        super().__init__(f"row {row}, column {column}")


BATCH = [SFTExample(ids(2, 3), ids(4, 0))]
ERRORS = {
    "bad input": (BadInput("a\nb: no such file"), None),
    "not finite": (NonFinite(7, "gradient of lm.weight", BATCH, [0, 2]), None),
    "diverged": (Diverged("the policy gives NaN"), None),
    "not kept": (_Broken("sft, step 1 of 2"), None),
    "not written": (NotWritten("run: could not be saved: no space left on device"), None),
    "of the system": (FileNotFoundError(2, "No such file or directory", "rows.jsonl"), None),
    "memory": (MemoryError(), None),
    "key": (KeyError("prompt"), None),
    "torch": (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"), None),
    "of a user": (OfItsOwn(1, 2), (RuntimeError, "OfItsOwn: row 1, column 2", {})),
}


def at_once(error):
    """Raises it."""
    raise error


@pytest.mark.parametrize("row", [0, 1, 4])
def test_what_one_raises_is_raised_everywhere(row):
    def work():
        def dealt(error):
            return distributed.deal(lambda part: part if part != row else at_once(error), range(6))

        return [raised_by(partial(dealt, error)) for error, _ in ERRORS.values()]

    for rank, found in enumerate(in_processes(3, work)):
        for met, (error, elsewhere) in zip(found, ERRORS.values(), strict=True):
            here = raised_by(partial(at_once, error))
            assert met == (here if rank == row % 3 or elsewhere is None else elsewhere)


def test_what_goes_with_an_error_arrives_with_it():
    def work():
        def fails(_):
            raise NonFinite(7, "loss", BATCH, [1])

        try:
            distributed.deal(fails, [0])
        except NonFinite as error:
            [example] = error.batch
            return error.step, error.tensor, example.prompt_ids.tolist(), error.rows
        return None

    assert everywhere(2, work) == (7, "loss", [2, 3], [1])


def test_of_several_errors_that_of_the_first_part_is_raised():
    wrong = [{1, 2}, {2, 3}, {5, 3, 4}, {0, 1, 2}, {4, 5}]

    def fails_at(bad):
        return lambda part: at_once(BadInput(f"row {part}")) if part in bad else part

    def work():
        return [raised_by(partial(distributed.deal, fails_at(bad), range(6))) for bad in wrong]

    found, alone = everywhere(2, work), work()
    assert found == alone
    assert [message for _, message, _ in found] == [f"row {min(bad)}" for bad in wrong]


def test_an_error_keeps_all_it_holds_when_it_is_made_anew():
    for error, elsewhere in ERRORS.values():
        if elsewhere is None:
            again = copy.copy(error)
            assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


# What one decides


def test_the_first_alone_does_it_and_all_have_it():
    def work():
        done = []
        found = distributed.on_main(lambda: done.append(1) or {"rank": distributed.rank()})
        return found, done

    assert in_processes(3, work) == [({"rank": 0}, [1]), ({"rank": 0}, []), ({"rank": 0}, [])]


def test_what_the_first_raises_is_raised_everywhere():
    def work():
        errors = [partial(at_once, error) for error, _ in ERRORS.values()]
        return [raised_by(partial(distributed.on_main, error)) for error in errors]

    here = [raised_by(partial(at_once, error)) for error, _ in ERRORS.values()]
    elsewhere = [other or own for own, (_, other) in zip(here, ERRORS.values(), strict=True)]
    assert in_processes(2, work) == [here, elsewhere]


@PROCESSES
def test_all_agree_if_one_says_so(n):
    def work():
        said = [distributed.agree(distributed.rank() == rank) for rank in range(n)]
        return [*said, distributed.agree(False), distributed.agree(True)]

    found = everywhere(n, work)
    assert found == [True] * n + [False, True]
    assert {type(x) for x in found} == {bool}


@PROCESSES
def test_the_largest_number_that_any_gives(n):
    found = everywhere(n, lambda: [distributed.largest(x) for x in (-distributed.rank(), 2**62)])
    assert found == [0, 2**62]
    assert everywhere(n, lambda: distributed.largest(distributed.rank())) == n - 1


def test_nobody_passes_a_barrier_before_all_are_there(tmp_path):
    def work():
        (tmp_path / str(distributed.rank())).touch()
        distributed.barrier()
        return sorted(path.name for path in tmp_path.iterdir())

    assert everywhere(3, work) == ["0", "1", "2"]


# Gradients


def summed(n, gradients, *, large=2**18):
    """The sums on all processes.

    Args:
        gradients: of the process with this number, one for each parameter.
    """

    def work():
        distributed.LARGE = large
        mine = gradients(distributed.rank())
        shapes = [next(x for x in of if x is not None) for of in zip(*all_of, strict=True)]
        parameters = [torch.zeros_like(x, requires_grad=True) for x in shapes]
        for p, gradient in zip(parameters, mine, strict=True):
            p.grad = gradient
        distributed.sum_gradients(parameters)
        return [p.grad if p.grad is None else (p.grad.dtype, p.grad.tolist()) for p in parameters]

    all_of = [gradients(rank) for rank in range(n)]
    return everywhere(n, work)


F64, F32 = torch.float64, torch.float32


@PROCESSES
def test_gradients_are_summed(n):
    found = summed(n, lambda rank: [torch.tensor([1.0, 10.0 * rank]), torch.tensor([[2.0]])])
    total = sum(range(n))
    assert found == [(F32, [float(n), 10.0 * total]), (F32, [[2.0 * n]])]


@pytest.mark.parametrize("without", [0, 1, 2])
def test_a_process_without_a_gradient_adds_nothing(without):
    def gradients(rank):
        return [torch.tensor([1.0]), None if rank == without else torch.tensor([[3.0], [4.0]])]

    assert summed(3, gradients) == [(F32, [3.0]), (F32, [[6.0], [8.0]])]


def test_a_parameter_without_a_gradient_anywhere_keeps_none():
    def work():
        there, nowhere = (torch.zeros(2, requires_grad=True) for _ in range(2))
        if distributed.rank() == 1:
            there.grad = torch.tensor([1.0, 2.0])
        distributed.sum_gradients([nowhere, there])
        return nowhere.grad, there.grad.tolist()

    assert everywhere(2, work) == (None, [1.0, 2.0])


def test_nobody_has_a_gradient():
    def work():
        parameters = [torch.zeros(2, requires_grad=True)]
        distributed.sum_gradients(parameters)
        return parameters[0].grad, distributed.agree(True)

    assert everywhere(2, work) == (None, True)


@pytest.mark.parametrize("large", [1, 2, 5, 2**18])
def test_gradients_of_all_sizes_and_kinds_are_summed(large):
    def gradients(rank):
        return [
            torch.full((3, 2), 1.0 + rank, dtype=F64),
            torch.tensor(5.0 * rank, dtype=F64),
            torch.tensor([0.5, 0.25], dtype=F32),
            None if rank else torch.full((4,), 2.0, dtype=F64),
            torch.tensor([[7.0 * rank]], dtype=F64),
        ]

    assert summed(2, gradients, large=large) == [
        (F64, [[3.0, 3.0]] * 3),
        (F64, 5.0),
        (F32, [1.0, 0.5]),
        (F64, [2.0] * 4),
        (F64, [[7.0]]),
    ]


def test_large_gradients_are_summed_where_they_are_and_small_ones_in_one_message():
    def work():
        distributed.LARGE, messages = 5, []
        reduce = torch.distributed.all_reduce
        torch.distributed.all_reduce = lambda x, *rest: messages.append(x) or reduce(x, *rest)
        parameters = [torch.zeros(n, dtype=F64, requires_grad=True) for n in (4, 5, 3, 6)]
        for p in parameters:
            p.grad = torch.ones_like(p)
        distributed.sum_gradients(parameters)
        which, *sums = messages  # first which of them have a gradient
        return len(which), [x.numel() for x in sums], sums[0] is parameters[1].grad

    assert everywhere(2, work) == (4, [5, 6, 7], True)


@pytest.mark.parametrize("large", [1, 2**18])
def test_gradients_that_do_not_lie_in_a_row_are_summed(large):
    def work():
        distributed.LARGE = large
        p = torch.zeros(2, 3, requires_grad=True)
        if distributed.rank() == 0:  # the other has zeros, which do
            p.grad = torch.arange(6.0).view(3, 2).T
        distributed.sum_gradients([p])
        return p.grad.tolist()

    assert everywhere(2, work) == [[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]]


def test_sharded_weights_are_summed_elsewhere():
    def work():
        p = torch.zeros(1, requires_grad=True)
        p.grad = torch.tensor([1.0])
        distributed.sum_gradients([p])
        return p.grad.tolist()

    assert everywhere(2, sharded(work)) == [1.0]
