#!/usr/bin/env python
"""What scripts/gpu_session.sh needs besides the other programs: photographs to read, and the summary.

    python scripts/benchmark/gpu_session.py photographs FOLDER COUNT    FOLDER/train/<class>/ and FOLDER/val/<class>/
    python scripts/benchmark/gpu_session.py summary FOLDER              prints it, and writes FOLDER/session.json

FOLDER of a summary has steps.tsv (name, exit code, seconds, last line), the JSON files of step.py by step, and runs/.
Exit code 1 if a step failed.
"""

import csv
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from output import cpu_name, print_table
from PIL import Image


def photographs(folder: Path, count: int) -> int:
    """Write ``count`` JPEG files of ImageNet's usual size, a tenth of them to evaluate on, in ten classes."""
    with ProcessPoolExecutor() as pool:
        list(pool.map(partial(write_photograph, folder), range(count), chunksize=50))
    print(f"{count:,} photographs: {folder}")
    return 0


def write_photograph(folder: Path, number: int) -> None:
    """Write smooth noise, which has the size of a photograph on disk, too (about 103 kB)."""
    rng = np.random.default_rng(number)
    path = folder / ("val" if number // 10 % 10 == 0 else "train") / f"c{number % 10}" / f"{number}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = Image.fromarray(rng.integers(256, size=(94, 125, 3), dtype=np.uint8))
    coarse.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=92)


def summary(folder: Path) -> int:
    """Print every step and its numbers, and write them to one file."""
    with open(folder / "steps.tsv", newline="") as file:
        steps = [
            dict(zip(("step", "exit code", "seconds", "last line"), row, strict=True))
            for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        ]
    measured = {}
    for name in (row["step"] for row in steps):
        if (folder / f"{name}.json").exists():
            measured[name] = json.loads((folder / f"{name}.json").read_text())
        elif (folder / "runs" / name / "metrics.csv").exists():
            measured[name] = {
                "title": f"{name}: training, log line by log line",
                "rows": log_lines(folder / "runs" / name),
            }
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else f"no GPU, {cpu_name()}"
    print(f"{card}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    print_table([{**row, "last line": row["last line"].strip()[:70]} for row in steps])
    for result in measured.values():
        print(f"\n{result['title']}")
        print_table(result["rows"])
    found = {"card": card, "torch": torch.__version__, "cuda": torch.version.cuda, "steps": steps, "measured": measured}
    (folder / "session.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"\nall of it: {folder / 'session.json'}")
    return int(any(row["exit code"] != "0" for row in steps))


def log_lines(run: Path) -> list[dict]:
    """Return throughput and share of the time spent waiting for images at the last ten log lines of a run."""
    with open(run / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train/images_per_s"]]
    return [
        {
            "step": int(row["step"]),
            "images/s": round(float(row["train/images_per_s"])),
            "data_wait, %": round(100 * float(row["train/data_wait"]), 1),
        }
        for row in rows[-10:]
    ]


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["photographs", folder, count]:
            sys.exit(photographs(Path(folder), int(count)))
        case ["summary", folder]:
            sys.exit(summary(Path(folder)))
    sys.exit(__doc__)
