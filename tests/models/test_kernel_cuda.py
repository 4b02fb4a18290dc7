"""The CUDA kernels of outlook attention, where there is no GPU: interpreted, compiled ahead of time, and counted."""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from volo.models.kernels import cuda, traffic

ROOT = Path(__file__).parents[2]
D1, D5, D5_512 = (28, 6), (28, 12), (64, 12)  # side of the grid, heads; heads have 32 channels
needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is for Linux with CUDA")


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("tests", ["bytes", "not bytes"])
def test_under_the_interpreter(tests):
    """Everything in triton_interpreter.py, which is too slow for one process and needs a Triton of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", "-k", tests]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("triton_interpreter.py"))],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 5
    assert not re.search(r"failed|skipped", done.stdout)


# ------------------------------------------------------------------------------------------------- ahead of time


def compiled(direction, layer, dtype, capability):
    """Return the kernel that such a layer starts, compiled for a GPU of this compute capability, and its warps."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from volo.models.kernels import cuda_kernels

    side, heads = layer
    tiling = cuda.tile(direction, (128, side, side), heads, 32, (3, 2, 1), dtype.itemsize)
    constants = cuda.constants(tiling, heads, 32, (3, 2, 1))
    kernel = getattr(cuda_kernels, direction)
    element = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    pointers = [name for name in kernel.arg_names if name in ("value", "logits", "out") or name.startswith("grad")]
    types = {name: "i32" for name in kernel.arg_names} | {name: element for name in pointers}
    types |= {name: "constexpr" for name in constants}
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in pointers}  # as torch allocates
    source = ASTSource(kernel, types, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": tiling.num_warps}), tiling.num_warps


def resources(binary, folder):
    """Return what a thread of the binary uses, by the program that comes with Triton: REG, STACK, LOCAL and more."""
    import triton.backends.nvidia

    program = Path(triton.backends.nvidia.__file__).with_name("bin") / "cuobjdump"
    path = folder / "kernel.cubin"
    path.write_bytes(binary.asm["cubin"])
    text = subprocess.run([program, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", text)}


@needs_triton
@pytest.mark.parametrize(
    ("layer", "dtype", "capability"),
    [
        *((D1, torch.bfloat16, capability) for capability in (80, 90, 100)),
        (D1, torch.float32, 90),
        (D1, torch.float16, 80),
        (D5_512, torch.bfloat16, 90),
        (D5_512, torch.float32, 90),
    ],
    ids=str,
)
@pytest.mark.slow
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_compiled_without_spills(direction, layer, dtype, capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))  # it is really compiled, every time
    binary, num_warps = compiled(direction, layer, dtype, capability)
    used = resources(binary, tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0, "registers are spilled"
    assert used["REG"] * num_warps * 32 <= 65536, "more registers than a multiprocessor has"
    assert binary.metadata.shared <= 99 * 1024, "more than consumer GPUs have"
    assert "atomic" not in binary.asm["ttgir"]


# ------------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("side", "heads"), [D1, D5, D5_512])
def test_bytes_against_the_least_possible(side, heads, dtype):
    for direction, limit in (("forward", 1.2), ("backward", 1.5)):
        for batch in (128, 32):
            layer = (direction, (batch, side, side), heads, 32, (3, 2, 1))
            least = traffic.least_bytes(*layer, dtype.itemsize)
            assert sum(traffic.kernel_bytes(*layer, dtype.itemsize).values()) <= limit * least
            assert traffic.unfold_bytes(*layer, dtype) > 8 * least


def test_least_bytes_by_hand():
    # 3 x 3 cells of 2 heads of 4 channels, 2 x 2 windows of 81 logits a head, 2 bytes each, 5 images.
    layer = ((5, 3, 3), 2, 4, (3, 2, 1), 2)
    cells, logits = 5 * 9 * 8 * 2, 5 * 4 * 2 * 81 * 2
    assert traffic.least_bytes("forward", *layer) == 2 * cells + logits
    assert traffic.least_bytes("backward", *layer) == 3 * cells + 2 * logits


def test_unfold_bytes_by_hand(monkeypatch):
    """A softmax between a view and a sum: softmax reads and writes 24 bytes, the sum reads 24 and writes 4."""

    def stand_in(value, logits, **_):
        return value.transpose(0, 1).softmax(-1).sum()

    monkeypatch.setattr(traffic, "outlook_attention", stand_in)
    assert traffic.unfold_bytes("forward", (1, 1, 1), 1, 6, (1, 1, 0), torch.float32) == 24 + 24 + 24 + 4


def test_small_batches_are_divided_among_enough_programs():
    for batch, chunks in ((22, 1), (11, 2), (1, 3)):  # 6 heads; 132 programs are enough, 4 of 14 rows the least
        tiling = cuda.tile("forward", (batch, 28, 28), 6, 32, (3, 2, 1), 2)
        assert (tiling.chunks, tiling.tiles, tiling.lanes) == (chunks, 1, 16)


def test_table():
    lines = traffic.table().splitlines()
    assert len(lines) == 2 + 4 * 2 * 2
    assert len({line.count("|") for line in lines}) == 1


# ------------------------------------------------------------------------------------------------- where it runs


@pytest.mark.slow
def test_answers_without_triton():
    """Nothing imports Triton before a kernel is started: machines without it can ask why there is none."""
    code = (
        "import sys; sys.modules['triton'] = None; import torch\n"
        "from volo.models.kernels import cuda\n"
        "print(cuda.unavailable_reason()); print(cuda.supports(3, 2, 1, 32, torch.bfloat16))\n"
        "torch.cuda.is_available = lambda: True; print(cuda.unavailable_reason())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    expected = [r"None|No CUDA device was found", "True", "Triton is not installed.*"]
    for line, pattern in zip(done.stdout.splitlines(), expected, strict=True):
        assert re.fullmatch(pattern, line)


def test_why_not(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.version, "hip", None, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.2.0")
    assert cuda.unavailable_reason() == "Triton 3.2 is too old: 3.3 or later is needed, which PyTorch 2.7 brings"
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.10.0")
    assert cuda.unavailable_reason() == "Tesla T4 has compute capability 7.5, and the Triton kernels need 8.0 or more"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setenv("CC", "gcc")
    assert cuda.unavailable_reason() is None
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    assert "C compiler" in cuda.unavailable_reason()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in cuda.unavailable_reason()


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        ((3, 2, 1, 32, torch.bfloat16), True),
        ((3, 2, 1, 64, torch.float32), True),
        ((5, 1, 2, 32, torch.float32), False),
        ((3, 2, 1, 32, torch.float64), False),
        ((3, 2, 1, 200, torch.float32), False),
        ((7, 2, 3, 32, torch.bfloat16), False),
    ],
)
def test_supports(arguments, answer):
    assert cuda.supports(*arguments) is answer
