"""Running train.py, validate.py and the launcher as a user runs them, and what they run on.

A program spends seconds on imports, and the tests start some eighty. Most of them therefore run in a child forked
from one process that has already imported everything: in every other respect a process of its own, with its own
arguments, environment, folder, output and exit code. Tests that go through torchrun start a new interpreter.
"""

import atexit
import gc
import json
import os
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

ROOT = Path(__file__).parents[1]
TRAIN, VALIDATE, LAUNCHER = ROOT / "train.py", ROOT / "validate.py", ROOT / "distributed_train.sh"
DONE, FAILED, USAGE, STOPPED = 0, 1, 2, 75

CLASSES = ("cross", "disc", "stripes")
# What torchrun and the launcher read from the environment.
_LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "NNODES",
    "RDZV_ENDPOINT",
    "PYTHON",
)


# ------------------------------------------------------------------------------------------------- images


def picture(kind: str, seed: int, size: tuple[int, int] = (26, 22)) -> Image.Image:
    """A noisy colour picture of width and height ``size`` that shows a cross, a disc or stripes somewhere."""
    rng = np.random.default_rng(seed)
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    top, left = rng.uniform(0.35, 0.65, 2) * (height, width)
    shape = {
        "cross": (abs(y - top) < 2.5) | (abs(x - left) < 2.5),
        "disc": np.hypot(y - top, x - left) < 0.3 * height,
        "stripes": (x + y + seed) % 6 < 3,
    }[kind]
    ground, colour = rng.uniform(0, 90, 3), rng.uniform(150, 255, 3)
    values = np.where(shape[..., None], colour, ground) + rng.normal(0, 10, (height, width, 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def make_images(root: Path, train: int = 12, val: int = 4) -> Path:
    """Write ``train`` and ``val`` pictures per class, in the layout of ImageNet; return ``root``."""
    for split, count in (("train", train), ("val", val)):
        for index, kind in enumerate(CLASSES):
            folder = root / split / kind
            folder.mkdir(parents=True)
            for i in range(count):
                seed = 1000 * index + i + (500 if split == "val" else 0)
                picture(kind, seed, (24 + i % 5, 20 + i % 7)).save(folder / f"{kind}_{i:02d}.jpg", quality=95)
    return root


# ------------------------------------------------------------------------------------------------ recipes

# 0.1 M parameters on 32 x 32 images: a step of 12 images takes some 20 ms.
SMALL = {
    "model": {
        "name": "volo_nano",
        "img_size": 32,
        "num_classes": len(CLASSES),
        "layers": [1, 1, 1, 1],
        "embed_dims": [16, 32, 32, 32],
        "num_heads": [2, 2, 2, 2],
        "stem_hidden_dim": 8,
    },
    "data": {"workers": 0, "cache": "none"},
    "optim": {"lr": 2e-3},
    "schedule": {"epochs": 2, "warmup_epochs": 0, "cooldown_epochs": 0},
    "eval": {"batch_size": 5},
    "train": {"batch_size": 12, "device": "cpu", "log_every_steps": 1, "name": "run"},
}


def write_recipe(path: Path, images: Path, **sections: dict) -> Path:
    """Write SMALL on ``images``, with ``sections`` over it, as YAML; runs are written to "runs" beside the file."""
    recipe = {name: {**SMALL.get(name, {}), **sections.get(name, {})} for name in {**SMALL, **sections}}
    recipe["data"] = {"root": str(images), **recipe["data"]}
    recipe["train"] = {"output": str(path.parent / "runs"), **recipe["train"]}
    path.write_text(yaml.safe_dump(recipe))
    return path


# ----------------------------------------------------------------------------------------------- programs


@dataclass
class Finished:
    """Exit code and output of a program."""

    code: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        """Last line on stderr."""
        return self.err.strip().splitlines()[-1] if self.err.strip() else ""

    def assert_done(self) -> "Finished":
        assert self.code == DONE, f"exit code {self.code}\n{self.out}\n{self.err}"
        return self

    def assert_failed(self, code: int, *words: str) -> "Finished":
        """Check the exit code, and that one short last line gives the reason and contains all ``words``."""
        shown = f"exit code {self.code}\n{self.out}\n{self.err}"
        assert self.code == code, shown
        assert "Traceback" not in self.out + self.err, shown
        assert "error: " in self.last_line, shown
        assert len(self.last_line) < 600, shown
        for word in words:
            assert word in self.last_line, f"{word!r} is not in: {self.last_line}\n{shown}"
        return self


def environment(**changes: str) -> dict[str, str]:
    """The environment of a program: one thread, and no launcher variables of the tests' own process."""
    kept = {name: value for name, value in os.environ.items() if name not in _LAUNCHER_VARIABLES}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **changes}


def wait_for_pipes(patch: Callable = setattr) -> None:
    """Let this process wait for pipes, which it would refuse: a pipe stands for a file on storage that hangs.

    Args:
        patch: What replaces an attribute of a module; ``monkeypatch.setattr`` restores it.
    """
    from volo.data.sources import folders
    from volo.runtime import files
    from volo.token_labels import pt_folder

    patch(files, "open_regular", os.open)
    patch(folders, "_require_regular", lambda entry: None)
    patch(pt_folder, "refuse_special", lambda status: None)


def start(
    program: Path,
    *words,
    cwd: Path,
    ranks: int = 1,
    largest_file: int | None = None,
    waits_for_pipes: bool = False,
    **env: str,
) -> "Started":
    """Start train.py or validate.py in forked processes.

    Args:
        program: TRAIN or VALIDATE.
        words: The command line.
        cwd: The folder it starts in; created if missing.
        ranks: Number of processes; more than one get the environment that torchrun would give them.
        largest_file: Size in bytes beyond which a write fails, as on a full disk.
        waits_for_pipes: See :func:`wait_for_pipes`.
        env: Changes to :func:`environment`.
    """
    cwd.mkdir(exist_ok=True)
    scratch = tempfile.mkdtemp(prefix="volo")
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    job = {
        "program": str(program),
        "words": [str(word) for word in words],
        "cwd": str(cwd),
        "scratch": scratch,
        "largest_file": largest_file,
        "waits_for_pipes": waits_for_pipes,
        "ranks": [],
    }
    for rank in range(ranks):
        torchrun = {**rendezvous, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        files = {name: f"{scratch}/{name}{rank}" for name in ("out", "err")}
        job["ranks"].append({**files, "env": environment(**torchrun, **env)})
    return Started(job, _forker())


def run(program: Path, *words, **options) -> "Finished":
    """Run a program in one process and wait for it; options as in :func:`start`."""
    return start(program, *words, **options).finish()[0]


def launch(*words, cwd: Path, **env: str) -> subprocess.Popen:
    """Start ``words`` in a new interpreter and its own process group, stdout and stderr in pipes."""
    return subprocess.Popen(
        [str(word) for word in words],
        cwd=cwd,
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, seen: str = "") -> Finished:
    """Wait for a process from :func:`launch`; ``seen`` is what was already read of its stdout."""
    try:
        out, err = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"{process.args} did not end:\n{seen + out}\n{err}") from None
    return Finished(process.returncode, seen + out, err)


def torchrun(num_processes: int, program: Path, *words) -> list[str]:
    """The command line of ``program`` on ``num_processes`` processes of this machine."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"),
        *(str(program), *map(str, words)),
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ------------------------------------------------------------------------------------ the process that forks


class Started:
    """A program that runs in one or more forked processes; ``pids`` are theirs, by rank."""

    def __init__(self, job: dict, forker: "_Forker"):
        self._forker = forker
        self._files = [(rank["out"], rank["err"]) for rank in job["ranks"]]
        self._scratch = job["scratch"]
        os.mkfifo(self._files[0][0])  # so that it can be followed without polling
        self.pids: list[int] = forker.ask(job)
        self._out = open(self._files[0][0], encoding="utf-8", errors="replace")  # noqa: SIM115
        self.seen = ""

    def follow(self, words: str) -> str:
        """Read the output of rank 0 up to a line that contains ``words``; return that line."""
        for line in self._out:
            self.seen += line
            if words in line:
                return line
        ended = self.finish()[0]
        raise AssertionError(f"no line with {words!r}; exit code {ended.code}:\n{ended.out}\n{ended.err}")

    def follow_to_the_end(self) -> None:
        """Read the output of rank 0 until that process ends."""
        self.seen += self._out.read()

    def finish(self) -> list[Finished]:
        """Wait for every rank to end."""
        self.follow_to_the_end()
        self._out.close()
        codes = self._forker.answer()
        outs = [self.seen, *(_text(out) for out, _ in self._files[1:])]
        errs = [_text(err) for _, err in self._files]
        shutil.rmtree(self._scratch)
        return [Finished(*ended) for ended in zip(codes, outs, errs, strict=True)]


def _text(path: str) -> str:
    return Path(path).read_text(encoding="utf-8", errors="replace")


class _Forker:
    """A process that has imported what the programs need and forks the processes of one job at a time."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=ROOT,
            env=environment(PYTHONPATH=os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(self._process.communicate)  # closes its stdin, which ends it

    def ask(self, job: dict) -> list[int]:
        """Start ``job``; return the process ids."""
        print(json.dumps(job), file=self._process.stdin, flush=True)
        return self.answer()

    def answer(self) -> list[int]:
        return json.loads(self._process.stdout.readline())


@cache
def _forker() -> _Forker:
    return _Forker()


def _serve() -> None:
    import matplotlib.pyplot  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401

    import volo.training
    import volo.validation  # noqa: F401

    gc.freeze()  # otherwise the collector of every child would touch, and so copy, everything imported
    for line in sys.stdin:
        job = json.loads(line)
        pids = []
        for rank in job["ranks"]:
            pids.append(os.fork())
            if pids[-1] == 0:
                _become(job, rank)
                return
        print(json.dumps(pids), flush=True)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps(codes), flush=True)


def _become(job: dict, rank: dict) -> None:
    """Turn this forked child into the program."""
    for descriptor, name in ((0, os.devnull), (1, rank["out"]), (2, rank["err"])):
        file = os.open(name, os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, descriptor)
        os.close(file)
    os.setpgid(0, 0)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(rank["env"])
    if job["largest_file"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"],) * 2)
    if job["waits_for_pipes"]:
        wait_for_pipes()
    sys.argv = [job["program"], *job["words"]]
    sys.path.insert(0, str(Path(job["program"]).parent))  # as Python does
    runpy.run_path(job["program"], run_name="__main__")


if __name__ == "__main__":
    _serve()
