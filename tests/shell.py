"""Running shell scripts with a small recording program in the place of Python."""

import os
import subprocess
import sys
from pathlib import Path

PLACE = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
RENDEZVOUS = ("RDZV_ENDPOINT", "RDZV_ID", "RDZV_BACKEND")


def run(*words, env=None, **options) -> subprocess.CompletedProcess:
    return subprocess.run([str(w) for w in words], env=env, capture_output=True, text=True, **options)


def clean_env(**changes: str) -> dict[str, str]:
    """The environment without the variables that the scripts read (the tests themselves may run under them)."""
    dropped = (
        *PLACE,
        *RENDEZVOUS,
        "PYTHON",
        "VOLO_EXIT_FILE",
        "VOLO_LAUNCHER",
        "MAX_RESTARTS",
        "OMP_NUM_THREADS",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT",
    )
    kept = {k: v for k, v in os.environ.items() if k not in dropped}
    return kept | {k: str(v) for k, v in changes.items()}


def program(path: Path, body: str) -> Path:
    """An executable Python program at ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable}\nimport json, os, signal, sys\nfrom pathlib import Path\n{body}")
    path.chmod(0o755)
    return path
