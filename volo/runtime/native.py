"""The project's C++ files as libraries: compiled on first use, kept in torch's extension cache, found again.

The compiler is called directly. torch.utils.cpp_extension would ask for ninja and the headers of Python and torch,
which these files do without; it waits forever for the lock of a build that was killed; and if machines share a home
folder, it would load what was built for another CPU. Here the library's name says what it was built from and for, and
it gets that name only when it is complete. Processes that start together may each build it: the same file every time.
"""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from volo.runtime.files import user_cache

_FLAGS = ["-std=c++17", "-march=native", "-fPIC", "-shared"]
_SECONDS = 300  # a compiler that takes longer is hung


class NoLibrary(Exception):
    """A library that cannot be compiled, loaded or used here; the message is one line."""


class NativeLibrary:
    """A library, or the reason why it is unavailable; determined on first use, once per process.

    Args:
        what: Subject of that reason, as it begins a sentence: "The CPU kernel of outlook attention".
        load: Returns the library with the types of its functions set, or raises NoLibrary.
    """

    def __init__(self, what: str, load: Callable[[], ctypes.CDLL]):
        self._what = what
        self._load = load
        self.forget()

    def unavailable_reason(self) -> str | None:
        """Return None if the library can be used, else a sentence that says why not. The first call may build it."""
        if self._library is None and self._reason is None:
            try:
                self._library = self._load()
            except NoLibrary as error:
                self._reason = f"{self._what} cannot be built: {error}"
        return self._reason

    def get(self) -> ctypes.CDLL:
        """Return the library. Ask :meth:`unavailable_reason` first: without a library this is a bug."""
        if self._library is None:
            reason = self.unavailable_reason()
            assert self._library is not None, reason
        return self._library

    def forget(self) -> None:
        """Try again at the next use, as a new process would."""
        self._library: ctypes.CDLL | None = None
        self._reason: str | None = None


def library(source: Path, flags: Sequence[str], name: str) -> ctypes.CDLL:
    """Return the library of a C++ file; the call may compile it.

    Args:
        source: The file.
        flags: Compiler options, beside those that every file gets.
        name: What the library's file name begins with.

    Raises:
        NoLibrary: No compiler, one that fails or hangs, no cache folder or one that cannot be written, or a library
            that does not load although it was just built.
    """
    try:
        path = _build(source, [*_FLAGS, *flags], name)
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # of another machine or libc, or overwritten
            path.unlink(missing_ok=True)
            return ctypes.CDLL(str(_build(source, [*_FLAGS, *flags], name)))
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        raise NoLibrary(str(error)) from error


def _build(source: Path, flags: list[str], name: str) -> Path:
    """Return the path of the library for this source, compiler and CPU; compile it if it is not there yet."""
    compiler = _compiler()
    # The macros of the compiler name its version and every extension of this CPU that it will use.
    macros = _run([*compiler, *flags, "-x", "c++", "-dM", "-E", os.devnull])
    key = hashlib.sha256("\0".join([source.read_text(), *flags, macros]).encode()).hexdigest()[:16]
    path = _cache_folder() / f"{name}_{key}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="build-", dir=path.parent) as folder:
            built = Path(folder, path.name)
            _run([*compiler, *flags, str(source), "-o", str(built)])
            built.replace(path)
    return path


def _cache_folder() -> Path:
    """Return where torch keeps extensions, without importing its loader, which warns on machines without CUDA."""
    if named := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(named, "volo")
    cache = user_cache()
    if cache is None:
        raise RuntimeError("this user has no home to keep a compiled library in; set TORCH_EXTENSIONS_DIR to a folder")
    return cache / "torch_extensions/volo"


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
