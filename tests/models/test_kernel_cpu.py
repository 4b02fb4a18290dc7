"""The CPU kernel of outlook attention against the reference, and its build where all is not well."""

import functools
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_group

from volo.models import outlook_attention
from volo.models.kernels import cpu
from volo.runtime import native as compiled

ROOT = Path(__file__).parents[2]
reference = functools.partial(outlook_attention, kernel="eager")


@pytest.fixture(scope="module", autouse=True)
def built():
    assert cpu.unavailable_reason() is None


def draw(B, H, W, heads, d, kernel, stride, padding, dtype=torch.float64, spread=3.0):
    """Return random value, logits, gradient of the output, and the window as the kernel's last arguments."""
    generator = torch.Generator().manual_seed(0)
    h, w = ((side + 2 * padding - kernel) // stride + 1 for side in (H, W))
    value, grad = torch.randn(2, B, H, W, heads * d, generator=generator, dtype=torch.float64)
    logits = spread * torch.randn(B, h, w, heads * kernel**4, generator=generator, dtype=torch.float64)
    return value.to(dtype), logits.to(dtype), grad.to(dtype), (heads, kernel, stride, padding)


def kernel_results(value, logits, grad, window):
    """Return output, gradient of value, gradient of logits."""
    return cpu.forward(value, logits, *window), *cpu.backward(grad, value, logits, *window)


def reference_results(value, logits, grad, window):
    """Return the same from autograd through the reference, in float64."""
    names = ("num_heads", "kernel_size", "stride", "padding")
    value, logits = value.double().requires_grad_(), logits.double().requires_grad_()
    out = reference(value, logits, **dict(zip(names, window, strict=True)))
    return out.detach(), *torch.autograd.grad(out, (value, logits), grad.double())


def errors(ours, theirs):
    """Return the greatest error of each result, as a share of its greatest number, or of 1 as in the inputs."""
    return [((x - y).abs().max() / y.abs().max().clamp(min=1)).item() for x, y in zip(ours, theirs, strict=True)]


def fits(shape):
    return min(shape["H"], shape["W"]) + 2 * shape["padding"] >= shape["kernel"]


SHAPES = st.fixed_dictionaries(
    {
        "B": st.integers(1, 3),
        "H": st.integers(1, 9),
        "W": st.integers(1, 9),
        "heads": st.integers(1, 3),
        "d": st.sampled_from([1, 2, 3, 8, 17, 32, 40]),
        "kernel": st.sampled_from([1, 2, 3, 3, 5]),
        "stride": st.integers(1, 4),
        "padding": st.integers(0, 2),
    }
).filter(fits)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(SHAPES)
def test_float64_equals_reference_for_any_shape(shape):
    inputs = draw(**shape)
    for ours, theirs in zip(kernel_results(*inputs), reference_results(*inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(SHAPES)
def test_float32_equals_reference_for_any_shape(shape):
    inputs = draw(**shape, dtype=torch.float32)
    assert max(errors(kernel_results(*inputs), reference_results(*inputs))) < 1e-6


# VOLO's own windows, with one row or column of cells more and fewer than they fill; then all else.
CHOSEN = [
    (2, 8, 8, 2, 32, 3, 2, 1),
    (1, 7, 9, 3, 32, 3, 2, 1),
    (3, 1, 1, 1, 32, 3, 2, 1),
    (1, 5, 12, 2, 32, 3, 1, 1),
    (2, 6, 5, 2, 32, 3, 4, 0),
    (1, 10, 7, 3, 48, 3, 2, 1),
    (2, 9, 6, 2, 20, 5, 2, 2),
]


@pytest.mark.parametrize("shape", CHOSEN, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_each_result_is_rounded_once(shape, dtype):
    """Sums are float32: next to the exact result of the same inputs there is the rounding of the result alone."""
    inputs = draw(*shape, dtype=dtype)
    for ours, theirs in zip(kernel_results(*inputs), reference_results(*inputs), strict=True):
        assert ours.dtype == dtype
        rounding = torch.finfo(dtype).eps / 2 * theirs.abs()
        assert ((ours.double() - theirs).abs() <= rounding + 1e-6 * theirs.abs().max()).all()


def test_bfloat16_rounds_ties_to_even_as_torch_does():
    """Means of four whole numbers: sums that float32 holds exactly, many of them halfway between two bfloat16."""
    value = torch.randint(256, (2, 9, 9, 40), generator=torch.Generator().manual_seed(0)).bfloat16()
    logits = value.new_zeros(2, 10, 10, 16)
    exact = cpu.forward(value.float(), logits.float(), 1, 2, 1, 1)
    assert ((exact.view(torch.int32) & 0xFFFF) == 0x8000).sum() > 100
    assert torch.equal(cpu.forward(value, logits, 1, 2, 1, 1), exact.bfloat16())


@pytest.mark.parametrize("kernel", [3, 5])
def test_an_empty_batch_gives_empty_results(kernel):
    value, logits, grad, window = draw(2, 6, 6, 2, 32, kernel, 2, 1, torch.float32)
    results = kernel_results(value[:0], logits[:0], grad[:0], window)
    assert [x.shape for x in results] == [value[:0].shape, value[:0].shape, logits[:0].shape]


def test_layout_in_memory_does_not_matter():
    value, logits, grad, window = draw(2, 6, 7, 2, 32, 3, 2, 1, torch.float32)
    plain = kernel_results(value, logits, grad, window)
    transposed = [x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for x in (value, logits, grad)]
    shifted = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in (value, logits, grad)]
    for layout in (transposed, shifted):
        assert all(torch.equal(x, y) for x, y in zip(plain, kernel_results(*layout, window), strict=True))

    one = torch.ones((), dtype=value.dtype).expand(value.shape)  # what sum().backward() gives
    expanded, whole = (cpu.backward(grad, value, logits, *window) for grad in (one, one.clone()))
    assert all(torch.equal(x, y) for x, y in zip(expanded, whole, strict=True))


@pytest.mark.parametrize("shape", [(1, 28, 28, 5, 32, 3, 2, 1), (3, 13, 11, 3, 24, 5, 2, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_change_no_bit(shape, dtype):
    inputs = draw(*shape, dtype=dtype)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3, 64):  # 64: more than there are heads
        torch.set_num_threads(threads)
        results.append(kernel_results(*inputs))
    torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], others, strict=True))


@pytest.mark.parametrize("d", [32, 5])
@pytest.mark.parametrize("spread", [1e4, 1e30])
def test_huge_logits_do_not_overflow(d, spread):
    inputs = draw(1, 6, 5, 2, d, 3, 2, 1, torch.float32, spread)
    results = kernel_results(*inputs)
    assert all(x.isfinite().all() for x in results)
    assert max(errors(results, reference_results(*inputs))) < 1e-6


def test_the_exponential_is_exact_over_its_whole_range():
    """One head of one channel and a window of two keys: the output is the weight exp(x) / (1 + exp(x)) of the other."""
    x = torch.cat([torch.linspace(-86, 0, 20001), -torch.logspace(-7, 0, 999)])
    value = torch.tensor([0.0, 0.0, 0.0, 1.0]).view(1, 2, 2, 1).expand(len(x), 2, 2, 1)
    logits = torch.full((len(x), 1, 1, 4, 4), -torch.inf)
    logits[..., 0], logits[..., 3] = 0.0, x.view(-1, 1, 1, 1)
    weight = cpu.forward(value, logits.flatten(3), 1, 2, 1, 0)[:, 0, 0, 0].double()
    exact = torch.sigmoid(x.double())
    error = (weight - exact).abs() / exact
    assert error[x < -20].max() < 1.2e-7  # where the sum is 1, it is the error of the exponential: one rounding
    assert error.max() < 2.5e-7

    logits[:4, ..., 3] = torch.tensor([-88.0, -1e4, -3e38, -torch.inf]).view(4, 1, 1, 1)
    assert cpu.forward(value[:4], logits[:4].flatten(3), 1, 2, 1, 0)[:, 0, 0, 0].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [32, 5])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("where", [0, 1, 2], ids=["value", "logits", "grad"])
def test_numbers_that_are_not_finite_spread_as_in_the_reference(dtype, d, bad, where):
    *tensors, window = draw(2, 7, 6, 2, d, 3, 2, 1, dtype)
    tensors[where][0, 1, 2, 1] = bad
    theirs = reference_results(*tensors, window)
    for ours, exact in zip(kernel_results(*tensors, window), theirs, strict=True):
        assert torch.equal(ours.isfinite(), exact.isfinite())
        assert torch.equal(ours.isnan(), exact.isnan())
        torch.testing.assert_close(ours.double(), exact, rtol=2e-2, atol=2e-2, equal_nan=True)
    masked_key = where == 1 and bad == float("-inf")
    assert all(x.isfinite().all() for x in theirs) == masked_key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_bit_pattern_of_nan_stays_nan(dtype):
    low_bits = 0 if dtype == torch.bfloat16 else 0xFFFF
    patterns = np.array([0x7FFF0000, 0xFFFF0000, 0x7F810000, 0xFF900000], dtype=np.uint32) | low_bits
    for nan in torch.from_numpy(patterns.view(np.float32)).to(dtype):
        value, logits, grad, window = draw(1, 4, 4, 1, 32, 3, 2, 1, dtype)
        logits[0, 0, 0, 40] = nan  # of the query at the centre of the first window, which is cell (0, 0)
        out, _, grad_logits = kernel_results(value, logits, grad, window)
        assert out[0, 0, 0].isnan().all()
        assert grad_logits[0, 0, 0, 36:45].isnan().all()


# ---- the build


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """Forget what is built, as a new process would, with an empty cache folder; give its path."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    cpu._library.forget()
    yield tmp_path / "cache" / "volo"
    cpu._library.forget()


def stand_in(path, compile_with):
    """Write a compiler that answers questions as c++ does, and compiles by the shell line ``compile_with``."""
    path.write_text(f'#!/bin/sh\ncase "$*" in *-dM*) exec c++ "$@";; esac\nfor last; do :; done\n{compile_with}\n')
    path.chmod(0o755)
    return str(path)


@pytest.fixture(scope="module")
def copy(built):
    """A shell line for ``stand_in`` that takes milliseconds: it copies what the tests above used."""
    return f'cp {shlex.quote(cpu._library.get()._name)} "$last"'


def gives_right_results():
    inputs = draw(2, 5, 6, 2, 32, 3, 2, 1, torch.float32)
    assert max(errors(kernel_results(*inputs), reference_results(*inputs))) < 1e-6


def test_the_library_is_compiled_once_and_found_again(fresh, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", stand_in(tmp_path / "cxx", f'echo >> "{tmp_path}/calls"; exec c++ "$@" -O0'))
    for _ in range(2):
        cpu._library.forget()
        assert cpu.unavailable_reason() is None
        gives_right_results()
    assert (tmp_path / "calls").read_text() == "\n"
    assert [path.suffix for path in fresh.iterdir()] == [".so"]


def test_another_cpu_or_compiler_gets_its_own_library(fresh, tmp_path, monkeypatch, copy):
    for option in ("-mno-avx", "-mno-avx512f", "-DVERSION=13"):
        monkeypatch.setenv("CXX", f"{stand_in(tmp_path / 'cxx', copy)} {option}")
        cpu._library.forget()
        assert cpu.unavailable_reason() is None
    assert len(list(fresh.iterdir())) == 3


@pytest.mark.parametrize(
    ("variable", "setting", "reason"),
    [
        ("CXX", "/nonexistent -O1", "no C++ compiler was found (/nonexistent)"),
        ("PATH", "/nonexistent", "no C++ compiler was found (c++, g++, clang++)"),
        ("CXX", "false", "false failed: it ended with 1"),
    ],
)
def test_without_a_compiler_it_says_so(fresh, monkeypatch, variable, setting, reason):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv(variable, setting)
    assert reason in cpu.unavailable_reason()
    assert "\n" not in cpu.unavailable_reason()
    assert not fresh.exists()


def test_a_compilation_that_fails_gives_the_compilers_first_error(fresh, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", stand_in(tmp_path / "cxx", 'exec c++ "$@" -include missing.h'))
    assert "missing.h: No such file" in cpu.unavailable_reason()
    assert "\n" not in cpu.unavailable_reason()
    assert list(fresh.iterdir()) == []


def test_a_compiler_that_hangs_is_given_up(fresh, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", stand_in(tmp_path / "cxx", "exec tail -f /dev/null"))
    monkeypatch.setattr(compiled, "_SECONDS", 0.5)
    assert "timed out" in cpu.unavailable_reason()


def test_a_cache_that_cannot_be_written_or_loaded_is_a_reason(fresh, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", stand_in(tmp_path / "cxx", ': > "$last"'))
    assert "file too short" in cpu.unavailable_reason()  # an empty library

    cpu._library.forget()
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    assert "Not a directory" in cpu.unavailable_reason()


def build_at_once(rank, size, cache, compiler):
    os.environ |= {"TORCH_EXTENSIONS_DIR": cache, "CXX": compiler, "RANK_HERE": str(rank)}
    reason = cpu.unavailable_reason()
    gives_right_results()
    return reason


@pytest.mark.slow
def test_two_processes_may_build_at_once(tmp_path, copy):
    os.mkfifo(tmp_path / "pipe")  # opening it waits for the other process: both compile before either has a library
    meet = f'case $RANK_HERE in 0) : > "{tmp_path}/pipe";; 1) : < "{tmp_path}/pipe";; esac'
    compiler = stand_in(tmp_path / "cxx", f"{meet}; {copy}")
    assert run_group(build_at_once, str(tmp_path / "cache"), compiler, sizes=(2,))[2] == [None, None]
    assert [path.suffix for path in (tmp_path / "cache" / "volo").iterdir()] == [".so"]


NEW_PROCESS = """
import os, sys
import torch
from volo.models import create_model
from volo.models.kernels import cpu

create_model("volo_nano", img_size=32)
assert not os.path.exists(os.environ["TORCH_EXTENSIONS_DIR"]), "an import has built something"
print(cpu.unavailable_reason())
"""


@pytest.mark.slow
def test_nothing_is_built_at_import_and_a_killed_build_blocks_no_other(fresh, tmp_path, monkeypatch, copy):
    killer = stand_in(tmp_path / "killer", f'echo "$last" > "{tmp_path}/killed"; kill -9 $PPID')
    done = subprocess.run(
        [sys.executable, "-c", NEW_PROCESS], cwd=ROOT, env=os.environ | {"CXX": killer}, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert Path((tmp_path / "killed").read_text().strip()).parent.is_dir()  # what it left

    monkeypatch.setenv("CXX", stand_in(tmp_path / "cxx", copy))
    assert cpu.unavailable_reason() is None
    gives_right_results()
