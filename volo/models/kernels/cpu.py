"""Outlook attention on the CPU: builds cpu.cpp on first use, keeps the library in torch's extension cache, calls it.

B images, H x W grid, C channels, h x w windows, K kernel side.

The compiler is called directly. torch.utils.cpp_extension would ask for ninja and the headers of Python and torch,
which cpu.cpp does without; it waits for ever on the lock of a build that was killed; and it would load what was built
for another CPU where machines share a home folder. Here the library's name says what it was built from and for, and
it gets that name only when it is complete. Processes that start together may each build it: the same file every time.
"""

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

_SOURCE = Path(__file__).with_suffix(".cpp")
# Two switches of -O3, to unroll the loops over a 3 x 3 window and to vectorise copies; the others double the build.
_FLAGS = ["-std=c++17", "-O2", "-fpeel-loops", "-ftree-vectorize", "-march=native", "-fopenmp", "-fPIC", "-shared"]
_SECONDS = 300  # a compiler that takes longer hangs


def forward(value: Tensor, logits: Tensor, num_heads: int, kernel_size: int, stride: int, padding: int) -> Tensor:
    """Return the mixed windows [B, H, W, C] of value [B, H, W, C] and logits [B, h, w, heads * K^4]."""
    out = _call("forward", [value, logits], [value.shape], value.shape, num_heads, kernel_size, stride, padding)
    return out[0]


def backward(
    grad: Tensor, value: Tensor, logits: Tensor, num_heads: int, kernel_size: int, stride: int, padding: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of value and logits, from that of the output [B, H, W, C]."""
    inputs, outputs = [grad, value, logits], [value.shape, logits.shape]
    grad_value, grad_logits = _call("backward", inputs, outputs, value.shape, num_heads, kernel_size, stride, padding)
    return grad_value, grad_logits


def why_not() -> str | None:
    """Return None where this kernel runs, else why it does not. The first call in a process may build it."""
    library = _library()
    return library if isinstance(library, str) else None


def _call(name: str, inputs: list[Tensor], outputs: list[torch.Size], shape: torch.Size, num_heads: int, *window: int):
    """Run a function of cpu.cpp on tensors of one dtype; return new tensors of the shapes in ``outputs``."""
    dtype = inputs[0].dtype
    assert all(x.dtype == dtype and x.device.type == "cpu" for x in inputs), [(x.dtype, x.device) for x in inputs]
    if dtype == torch.float16:  # rare on CPUs, so not worth code of its own
        results = _call(name, [x.float() for x in inputs], outputs, shape, num_heads, *window)
        return [result.half() for result in results]
    library = _library()
    assert isinstance(library, ctypes.CDLL), library
    function = getattr(library, f"{name}_{str(dtype).removeprefix('torch.')}")
    results = [torch.empty(size, dtype=dtype) for size in outputs]
    tensors = [x.contiguous() for x in inputs] + results
    B, H, W, C = shape
    numbers = (ctypes.c_int64 * 8)(B, H, W, num_heads, C // num_heads, *window)  # Shape in cpu.cpp
    function(*(ctypes.c_void_p(x.data_ptr()) for x in tensors), numbers, ctypes.c_int(torch.get_num_threads()))
    return results


@functools.cache
def _library() -> ctypes.CDLL | str:
    """Return the library, built if need be, or the sentence that says why there is none."""
    try:
        return ctypes.CDLL(str(_build()))
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        return f"The CPU kernel of outlook attention cannot be built: {error}"


def _build() -> Path:
    """Return the path of the library for this source, compiler and CPU; compile it where it is not there yet."""
    compiler = _compiler()
    # The macros of the compiler name its version and every extension of this CPU that it will use.
    macros = _run([*compiler, *_FLAGS, "-x", "c++", "-dM", "-E", os.devnull])
    key = hashlib.sha256("\0".join([_SOURCE.read_text(), *_FLAGS, macros]).encode()).hexdigest()[:16]
    library = _cache_folder() / f"outlook_attention_{key}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="build-", dir=library.parent) as folder:
            built = Path(folder, library.name)
            _run([*compiler, *_FLAGS, str(_SOURCE), "-o", str(built)])
            built.replace(library)
    return library


def _cache_folder() -> Path:
    """Return where torch keeps extensions, without importing its loader, which warns on machines without CUDA."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(cache, "torch_extensions"), "volo")


def _compiler() -> list[str]:
    """Return the compiler in CXX, which may hold options too, else the first that is installed."""
    candidates = [shlex.split(os.environ.get("CXX", ""))]
    if not candidates[0]:
        candidates = [["c++"], ["g++"], ["clang++"]]
    for candidate in candidates:
        if shutil.which(candidate[0]):
            return candidate
    names = ", ".join(candidate[0] for candidate in candidates)
    raise RuntimeError(f"no C++ compiler was found ({names}); install one or name it in CXX")


def _run(command: list[str]) -> str:
    """Return what the compiler prints. Raises RuntimeError with the first line that says error."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=_SECONDS
    )
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        lines = [line for line in lines if "error" in line.lower()] + lines
        reason = lines[0] if lines else f"it ended with {done.returncode}"
        raise RuntimeError(f"{command[0]} failed: {reason}")
    return done.stdout
