"""scripts/setup.sh, with a program in the place of every Python; and the form of all shell scripts."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from programs import ROOT
from shell import clean_env, program, run

SHELL_SCRIPTS = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / "distributed_train.sh", ROOT / ".ci/run"]


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda p: p.name)
def test_shell_script_is_sound_and_executable(script):
    checked = run("bash", "-n", script)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert os.access(script, os.X_OK)
    assert script.read_text().startswith("#!/usr/bin/env bash\n")


# Does what setup.sh asks of Python, without making or installing anything. {name} tells which one it is.
FAKE_PYTHON = """
words = sys.argv[1:]
log = Path(os.environ["RECORD"])
name = Path(sys.argv[0]).name
if words[0] == "-c":
    sys.exit(name not in os.environ["WORKING"].split())
elif words == ["--version"]:
    print("Python 3.12.99")
elif words[:2] == ["-m", "venv"]:
    made = Path(words[2]) / "bin" / "python"
    made.parent.mkdir(parents=True)
    made.write_text(Path(sys.argv[0]).read_text())
    made.chmod(0o755)
    log.open("a").write(f"venv {name}\\n")
elif words[:3] == ["-m", "pip", "install"]:
    assert sys.argv[0] == ".venv/bin/python"
    assert words[-2:] == ["-r", "requirements.txt"]
    print("Collecting something>=1 (from -r requirements.txt (line 1))")
    print("  noise")
    log.open("a").write("install " + Path("requirements.txt").read_text())
    sys.exit(int(os.environ.get("PIP_CODE", 0)))
elif words != ["-m", "pip", "--version"]:
    sys.exit(f"unexpected: {words}")
"""


class SetUp:
    """setup.sh in a folder of its own, with programs in the place of every Python it looks for."""

    def __init__(self, folder: Path):
        self.root = folder / "a checkout"
        (self.root / "scripts").mkdir(parents=True)
        shutil.copy(ROOT / "scripts/setup.sh", self.root / "scripts")
        (self.root / "requirements.txt").write_text("something>=1\n")
        (self.root / "pyproject.toml").write_text("# dependencies\n")
        self.bin = folder / "bin"
        for name in ("python3", "python3.13", "python3.12", "python3.11", "python3.10"):
            program(self.bin / name, FAKE_PYTHON)
        self.log = folder / "log"

    def __call__(self, working: str = "python3 python", **env: str) -> subprocess.CompletedProcess:
        given = {"PATH": f"{self.bin}:{os.environ['PATH']}", "RECORD": self.log, "WORKING": working} | env
        return run("bash", self.root / "scripts/setup.sh", env=clean_env(**given), cwd="/")

    def done(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def set_up(tmp_path) -> SetUp:
    return SetUp(tmp_path)


def test_set_up_makes_and_installs_once(set_up):
    first = set_up()
    assert (first.returncode, first.stderr) == (0, "")
    assert "  something>=1\n" in first.stdout
    assert "noise" not in first.stdout
    second = set_up()
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert set_up.done() == ["venv python3", "install something>=1"]


@pytest.mark.parametrize("file", ["requirements.txt", "pyproject.toml"])
def test_set_up_installs_again_when_the_dependencies_changed(set_up, file):
    set_up()
    with open(set_up.root / file, "a") as changed:
        changed.write("# changed\n")
    assert set_up().returncode == 0
    assert [line for line in set_up.done() if line != "# changed"] == ["venv python3", *["install something>=1"] * 2]


def test_set_up_repeats_an_installation_that_failed(set_up):
    assert set_up(PIP_CODE="3").returncode == 3
    assert set_up().returncode == 0
    assert set_up.done() == ["venv python3", "install something>=1", "install something>=1"]


def test_set_up_uses_the_first_python_that_works(set_up):
    """A name on PATH may be a shim with nothing behind it, or another version."""
    assert set_up(working="python3.12 python3.11 python").returncode == 0
    assert set_up.done()[0] == "venv python3.12"


def test_set_up_uses_the_python_in_PYTHON(set_up):
    assert set_up(working="python3 python3.11 python", PYTHON="python3.11").returncode == 0
    assert set_up.done()[0] == "venv python3.11"


@pytest.mark.parametrize(
    ("working", "env", "message"),
    [
        ("", {}, "no Python 3.11-3.13"),
        ("python3", {"PYTHON": "python3.10"}, "PYTHON is 'python3.10'; Python 3.11, 3.12 or 3.13"),
        ("python3", {"PYTHON": "/no/such/python"}, "PYTHON is '/no/such/python'"),
    ],
)
def test_set_up_without_a_supported_python_is_an_error(set_up, working, env, message):
    done = set_up(working=working, **env)
    assert done.returncode == 1
    assert done.stderr.startswith(f"setup.sh: error: {message}")
    assert set_up.done() == []
    assert not (set_up.root / ".venv").exists()


def test_set_up_does_not_touch_a_venv_of_another_python(set_up):
    program(set_up.root / ".venv/bin/python", FAKE_PYTHON)
    done = set_up(working="python3")  # .venv's program is called python, which does not work here
    assert done.returncode == 1
    assert "move .venv away" in done.stderr
    assert set_up.done() == []
