"""torch.compile is tried before it is relied on, and what it cannot compile runs as it is."""

import functools

import pytest
import torch
from torch import nn

from volo.runtime.compiling import compile_in_place, compile_problem, seconds_compiling


@pytest.fixture
def backend(monkeypatch):
    """Return a function that makes another function the compiler's backend."""

    def use(backend):
        torch.compiler.reset()
        compile_problem.cache_clear()
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))

    with torch._dynamo.config.patch(suppress_errors=False):  # restored afterwards
        yield use
    compile_problem.cache_clear()
    torch.compiler.reset()


def fails(graph, inputs):
    raise OSError("no compiler,\n no code")


def wrong(graph, inputs):
    return lambda *values: [output + 1 for output in graph(*values)] and [values[0].sum() * 2]


def test_the_reason_is_one_line(backend):
    backend(fails)
    problem = compile_problem("cpu")
    assert problem is not None and "no compiler, no code" in problem and "\n" not in problem


def test_wrong_numbers_are_noticed(backend):
    backend(wrong)
    assert "wrong by" in (compile_problem("cpu") or "")


def test_a_compiler_that_works_has_no_problem_and_its_time_is_known(backend):
    backend("aot_eager")
    before = seconds_compiling()
    assert compile_problem("cpu") is None
    assert seconds_compiling() > before


def test_a_network_that_cannot_be_compiled_runs_as_it_is(backend):
    backend(fails)
    network, x = nn.Linear(3, 2), torch.ones(5, 3)
    expected = network(x)
    compile_in_place(network)
    torch.testing.assert_close(network(x), expected)
