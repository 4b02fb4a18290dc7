"""What a benchmark prints and saves: tables, progress, the name of the processor, JSON."""

import json
import platform
import sys
from pathlib import Path

from volo.reporting import text_table


def print_table(rows: list[dict]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print(text_table(columns, [[str(row.get(c, "")) for c in columns] for row in rows]))


def save_json(path: str | None, title: str, rows: list[dict], notes: list[str]) -> None:
    """Write the result to ``path``, if there is one."""
    if path:
        Path(path).write_text(json.dumps({"title": title, "rows": rows, "notes": notes}, indent=2) + "\n")


def show_progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\rround {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
