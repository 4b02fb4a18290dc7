"""Kill a run at random moments, start it again, and compare what it ends with to a run that was never disturbed.

    python scripts/soak.py --config configs/quickstart.yaml --images data/digits --output /tmp/soak

Killed with SIGKILL are a rank, a data worker, the whole process group, and torchrun itself; which, and after how long,
is drawn from the seed. torchrun restarts what it can; otherwise the same command is given again, as a user would. Runs
follow one another until there were enough kills. Exit code 1 if a run does not end with the very weights, average,
optimizer state and metrics of the undisturbed one, or leaves processes behind.
"""

import contextlib
import csv
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from volo.cli import parse_options
from volo.reporting import text_table

ROOT = Path(__file__).resolve().parents[1]
VICTIMS = ("rank", "data worker", "process group", "torchrun")
_IN_USE = "is in use by"  # for a moment after torchrun was killed: its processes save and leave
_TIMING = ("train/images_per_s", "train/data_wait")


@dataclass(frozen=True)
class SoakOptions:
    """Kills, restarts, and a comparison.

    Args:
        config: The recipe.
        images: Folder of the images, data.root of the runs.
        output: Folder of the runs; it must not exist yet.
        kills: Least number of kills.
        processes: Processes of a run.
        epochs: Epochs of a run.
        longest_seconds: Longest time between two kills.
        seed: Of the draws: whom to kill, and when.
        give_up_minutes: Longest time of the whole.
    """

    config: str
    images: str
    output: str
    kills: int = 30
    processes: int = 2
    epochs: int = 20
    longest_seconds: float = 20.0
    seed: int = 0
    give_up_minutes: float = 60.0


@dataclass
class Tally:
    """What was done to the runs so far."""

    kills: Counter = field(default_factory=Counter)
    commands: int = 0
    runs: int = 0

    @property
    def total(self) -> int:
        return sum(self.kills.values())


def main() -> int:
    usage = "--config RECIPE --images FOLDER --output FOLDER [options]"
    options = parse_options(SoakOptions, sys.argv[1:], prog="soak.py", usage=usage, description=__doc__ or "")
    deadline = time.monotonic() + 60 * options.give_up_minutes
    rng, tally = random.Random(options.seed), Tally()
    output = Path(options.output)
    output.mkdir(parents=True)
    undisturbed = start(options, "undisturbed")
    if undisturbed.wait() != 0:
        raise SystemExit(f"soak.py: error: the undisturbed run failed, see {output / 'undisturbed.out'}")
    wrong = []
    while tally.total < options.kills:
        tally.runs += 1
        name = f"run-{tally.runs}"
        disturb_to_the_end(options, name, rng, tally, deadline)
        differences = compare(output / "undisturbed", output / name) + left_over(options.output, name)
        wrong += [f"{name}: {what}" for what in differences]
        print(f"{name}: {tally.total} kills so far, {'differs' if differences else 'bit-identical'}", flush=True)
    rows = [[victim, tally.kills[victim]] for victim in VICTIMS]
    rows += [["commands", tally.commands], ["runs", tally.runs], ["differences", len(wrong)]]
    print(text_table(["killed", "times"], rows, align="lr"))
    for what in wrong:
        print(what)
    return 1 if wrong else 0


def start(options: SoakOptions, name: str) -> subprocess.Popen:
    """Give the command of a run, in a process group of its own."""
    words = [ROOT / "distributed_train.sh", options.processes, "--config", options.config]
    words += ["--data.root", options.images, "--train.output", options.output, "--train.name", name]
    words += ["--schedule.epochs", options.epochs, "--schedule.warmup_epochs", 1, "--data.workers", 1]
    with open(Path(options.output) / f"{name}.out", "a") as out:
        return subprocess.Popen(
            [str(word) for word in words],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHON": sys.executable, "MAX_RESTARTS": "3"},
            start_new_session=True,
        )


def disturb_to_the_end(options: SoakOptions, name: str, rng: random.Random, tally: Tally, deadline: float) -> None:
    """Give the command until it ends with exit code 0, and kill something of it now and then."""
    out = Path(options.output) / f"{name}.out"
    launcher = None
    while True:
        if launcher is None:
            launcher = start(options, name)
            tally.commands += 1
        wait = rng.uniform(0.5, options.longest_seconds) if tally.total < options.kills else deadline - time.monotonic()
        try:
            code = launcher.wait(wait)
        except subprocess.TimeoutExpired:
            if time.monotonic() > deadline:
                end(everyone(launcher))
                late = f"not at the end after {options.give_up_minutes:g} minutes"
                raise SystemExit(f"soak.py: error: {late}, see {out}") from None
            kill(launcher, rng, tally)
            continue
        if code == 0:
            return
        if code == 2 and _IN_USE not in out.read_text()[-2000:]:
            raise SystemExit(f"soak.py: error: the command was refused, see {out}")
        launcher = None


def kill(launcher: subprocess.Popen, rng: random.Random, tally: Tally) -> None:
    """Kill something of a run, if it is there yet."""
    found = everyone(launcher)
    victim = rng.choice(VICTIMS)
    if pids := found[victim]:
        end(found if victim == "process group" else {victim: [rng.choice(pids)]})
        tally.kills[victim] += 1


def everyone(launcher: subprocess.Popen) -> dict[str, list[int]]:
    """Return the processes of a run by kind; those of "process group" are its head, and there once there are ranks."""
    torchruns = children(launcher.pid)
    ranks = [pid for torchrun in torchruns for pid in children(torchrun)]
    workers = [pid for rank in ranks for pid in children(rank)]
    head = [launcher.pid] if ranks else []
    return {"rank": ranks, "data worker": workers, "process group": head, "torchrun": torchruns}


def end(processes: dict[str, list[int]]) -> None:
    for pid in sum(processes.values(), []):
        with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
            os.kill(pid, signal.SIGKILL)


def children(parent: int) -> list[int]:
    """Return the processes that ``parent`` has started and that are still there."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return sorted(found)


def left_over(output: str, name: str) -> list[str]:
    """Return the processes of a finished run that are still there after half a minute."""
    words = f"--train.output\0{output}\0--train.name\0{name}\0".encode()
    found = []
    for _ in range(60):
        found = []
        for line in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if words in line.read_bytes():
                    found.append(f"process {line.parent.name} is left over")
        if not found:
            break
        time.sleep(0.5)
    return found


def compare(one: Path, other: Path) -> list[str]:
    """Return what differs between two finished runs."""
    states = [torch.load(run / "last.pt", weights_only=True) for run in (one, other)]
    parts = ("state_dict", "state_dict_ema", "optimizer", "progress")
    differences = [part for part in parts if not equal(*(state.get(part) for state in states))]
    tables = []
    for run in (one, other):
        with open(run / "metrics.csv", newline="") as file:
            tables.append([{**row, **dict.fromkeys(_TIMING)} for row in csv.DictReader(file)])
    return differences + ([] if tables[0] == tables[1] else ["metrics.csv"])


def equal(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


if __name__ == "__main__":
    sys.exit(main())
