"""distributed_train.sh, with a small recording program in the place of Python; one test uses the real torchrun."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from programs import ROOT
from shell import clean_env, program, run

RECORD = """
Path(os.environ["RECORD"]).write_text(json.dumps({"argv": sys.argv, "env": dict(os.environ)}))
"""


@contextmanager
def started(*words, env: dict[str, str]):
    """A running process, which is terminated if the test fails."""
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        except BaseException:
            process.terminate()
            raise


class Launcher:
    """distributed_train.sh in a folder of its own, with a program in the place of Python."""

    def __init__(self, folder: Path):
        self.root = folder / "a checkout"
        self.root.mkdir()
        shutil.copy(ROOT / "distributed_train.sh", self.root)
        self.script = self.root / "distributed_train.sh"
        self.record = folder / "record.json"
        self.scratch = folder / "scratch"
        self.scratch.mkdir()
        self.python = folder / "bin" / "python"

    def env(self, **changes: str) -> dict[str, str]:
        given = {"PYTHON": self.python, "RECORD": self.record, "TMPDIR": self.scratch} | changes
        return clean_env(**given)

    def __call__(self, *words, body: str = "", **env: str) -> subprocess.CompletedProcess:
        if not self.python.exists():
            program(self.python, RECORD + body)
        return run(self.script, *words, env=self.env(**env))

    def seen(self) -> dict:
        return json.loads(self.record.read_text())


@pytest.fixture
def launcher(tmp_path) -> Launcher:
    return Launcher(tmp_path)


def test_launcher_forwards_every_argument_as_it_is(launcher):
    words = ["--config", "configs/a b.yaml", "--train.name", "", "--data.root", "$HOME/*", 'say "hi"', "a\nb"]
    assert launcher(4, *words).returncode == 0
    argv = launcher.seen()["argv"][1:]
    expected = ["-m", "torch.distributed.run", "--nproc_per_node", "4", "--max_restarts", "3", "--standalone"]
    assert argv == [*expected, str(launcher.root / "train.py"), *words]


def test_launcher_runs_in_the_current_folder(launcher, tmp_path):
    """Relative paths on the command line are the user's."""
    program(launcher.python, 'Path(os.environ["RECORD"]).write_text(os.getcwd())')
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert run(launcher.script, 1, env=launcher.env(), cwd=elsewhere).returncode == 0
    assert Path(launcher.record.read_text()) == elsewhere


def test_launcher_passes_the_numa_binding_on_if_torchrun_knows_it(launcher):
    knows = 'print("--numa-binding {node,socket}" if "--help" in sys.argv else "")'
    assert launcher(2, "--config", "x.yaml", body=knows, NUMA_BINDING="node").returncode == 0
    argv = launcher.seen()["argv"]
    assert argv[argv.index("--numa-binding") : argv.index("--numa-binding") + 2] == ["--numa-binding", "node"]
    assert argv.index("--numa-binding") < argv.index(str(launcher.root / "train.py"))
    launcher.python.unlink()
    refused = launcher(2, "--config", "x.yaml", NUMA_BINDING="node")
    assert refused.returncode == 2 and "this torchrun has no --numa-binding" in refused.stderr


@pytest.mark.parametrize(
    ("env", "place"),
    [
        ({}, ["--standalone"]),
        ({"NNODES": "1", "MASTER_ADDR": "left over", "MASTER_PORT": "1"}, ["--standalone"]),
        (
            {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "1234"},
            ["--nnodes", "2", "--node_rank", "1", "--master_addr", "node0", "--master_port", "1234"],
        ),
        (
            {"NNODES": "3", "NODE_RANK": "0", "MASTER_ADDR": "10.0.0.1"},
            ["--nnodes", "3", "--node_rank", "0", "--master_addr", "10.0.0.1", "--master_port", "29500"],
        ),
        (
            {"NNODES": "2", "RDZV_ENDPOINT": "node0:29400"},
            ["--nnodes", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "node0:29400", "--rdzv_id", "volo"],
        ),
        (
            {"NNODES": "2", "RDZV_ENDPOINT": "h:1", "RDZV_ID": "job 7", "RDZV_BACKEND": "etcd-v2", "NODE_RANK": "1"},
            [*["--nnodes", "2", "--rdzv_backend", "etcd-v2", "--rdzv_endpoint", "h:1", "--rdzv_id"], "job 7"],
        ),
    ],
)
def test_launcher_passes_the_rendezvous_on(launcher, env, place):
    assert launcher(2, "--config", "x.yaml", **env).returncode == 0
    argv = launcher.seen()["argv"]
    start = argv.index("--max_restarts") + 2
    assert argv[start : argv.index(str(launcher.root / "train.py"))] == place


@pytest.mark.parametrize(
    ("words", "env", "message"),
    [
        ([], {}, "give N"),
        (["0"], {}, "'0'"),
        (["-1"], {}, "'-1'"),
        (["eight"], {}, "'eight'"),
        (["--config", "x.yaml"], {}, "'--config'"),
        (["2"], {"NNODES": "two"}, "NNODES is 'two'"),
        (["2"], {"NNODES": "0"}, "NNODES is '0'"),
        (["2"], {"NNODES": "2", "MASTER_ADDR": "a"}, "NODE_RANK is ''"),
        (["2"], {"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}, "NODE_RANK is '2'; with NNODES=2 it is 0 ... 1"),
        (["2"], {"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR"),
        (["2"], {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        (["2"], {"RDZV_ENDPOINT": "a:1"}, "NNODES"),
        (["2"], {"MAX_RESTARTS": "many"}, "MAX_RESTARTS is 'many'"),
    ],
)
def test_launcher_refuses_wrong_usage_before_any_work(launcher, words, env, message):
    done = launcher(*words, **env)
    assert done.returncode == 2
    usage, error = done.stderr.splitlines()
    assert usage.startswith("usage: distributed_train.sh N ")
    assert message in error
    assert not launcher.record.exists()


def test_launcher_reports_a_port_in_use(launcher):
    launcher.python = Path(sys.executable)
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        place = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        done = launcher(1, **place)
    assert done.returncode == 1
    [message] = done.stderr.splitlines()
    assert f"port {port} cannot be used on this machine" in message
    assert "MASTER_PORT" in message


def test_launcher_shares_the_cores_among_the_processes(launcher):
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for processes, threads in ((1, cores), (cores, 1), (cores + 1, 1)):
        assert launcher(processes).returncode == 0
        assert launcher.seen()["env"]["OMP_NUM_THREADS"] == str(threads)
    assert launcher(1, OMP_NUM_THREADS="7").returncode == 0
    assert launcher.seen()["env"]["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(
    ("torchrun_code", "recorded", "code"),
    [
        (0, None, 0),
        (0, "0", 0),
        (1, None, 1),
        (1, "75", 75),
        (1, "2\n", 2),
        (1, "0", 1),  # rank 0 was done, another rank failed afterwards
        (1, "", 1),
        (1, "garbage", 1),
        (137, None, 137),
    ],
)
def test_launcher_ends_with_the_exit_code_of_rank_0(launcher, torchrun_code, recorded, code):
    body = ""
    if recorded is not None:
        body = f"Path(os.environ['VOLO_EXIT_FILE']).write_text({recorded!r})\n"
    assert launcher(2, body=body + f"sys.exit({torchrun_code})").returncode == code
    assert list(launcher.scratch.iterdir()) == []  # the file with the code is gone


def test_launcher_chooses_the_interpreter(launcher, tmp_path):
    on_path = program(tmp_path / "path" / "python", RECORD)
    env = launcher.env(PYTHON="", PATH=f"{on_path.parent}:{os.environ['PATH']}")
    assert run(launcher.script, 1, env=env).returncode == 0
    assert launcher.seen()["argv"][0] == str(on_path)
    in_venv = program(launcher.root / ".venv/bin/python", RECORD)
    assert run(launcher.script, 1, env=env).returncode == 0
    assert launcher.seen()["argv"][0] == str(in_venv)
    assert launcher(1).returncode == 0
    assert launcher.seen()["argv"][0] == str(launcher.python)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1], ids=lambda s: s.name)
def test_launcher_forwards_a_signal_and_waits(launcher, signum):
    """Like torchrun, the program in its place ends some time after the signal, with exit code 1."""
    expected = signal.SIGINT if signum == signal.SIGINT else signal.SIGTERM
    body = f"""
    signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.{expected.name}}})
    os.kill(os.getpid(), signal.SIGUSR1)  # to every process of a job; it must not end torchrun
    print(f"ready {{os.getpgrp() == os.getpid()}}", flush=True)
    signal.sigwait({{signal.{expected.name}}})
    Path(os.environ["VOLO_EXIT_FILE"]).write_text("75")
    print("saved", flush=True)
    sys.exit(1)
    """
    program(launcher.python, "\n".join(line.strip() for line in body.splitlines()))
    with started(launcher.script, "1", env=launcher.env()) as process:
        # A process group of its own: Ctrl-C in a terminal must reach torchrun through the script alone.
        assert process.stdout.readline() == "ready True\n"
        process.send_signal(signum)
        assert process.stdout.readline() == "saved\n"
        assert process.wait() == 75
    assert list(launcher.scratch.iterdir()) == []


def test_launcher_spares_the_attempts_that_would_end_alike(launcher):
    """The program in the place of torchrun would start another attempt, were it not told to end."""
    body = """
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
left = Path(os.environ["VOLO_EXIT_FILE"])
left.write_text("2")
for attempt, reason in enumerate(("a lost peer", "a wrong option")):
    Path(f"{left}.reason.{attempt:04d}").write_text(reason)
for _ in range(3):  # from every rank
    os.kill(int(os.environ["VOLO_LAUNCHER"]), signal.SIGUSR2)
signal.sigwait({signal.SIGTERM})
sys.exit(1)
"""
    done = launcher(2, body=body, MAX_RESTARTS="7")
    assert (done.returncode, done.stderr) == (2, "distributed_train.sh: error: a wrong option\n")
    assert "--max_restarts 7" in " ".join(launcher.seen()["argv"])
    assert list(launcher.scratch.iterdir()) == []


@pytest.mark.slow
def test_launcher_starts_a_refused_command_once(launcher):
    """The real torchrun, whose processes refuse their options."""
    launcher.python = Path(sys.executable)
    (launcher.root / "train.py").write_text((ROOT / "train.py").read_text())
    done = launcher(2, "--no.such.option", "1", PYTHONPATH=str(ROOT))
    assert done.returncode == 2
    assert 1 <= done.stderr.count("train.py: error: ") <= 2, done.stderr  # once a process, unless ended before
    assert "no.such.option" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_launcher_with_the_real_torchrun(launcher):
    """Two ranks wait for SIGTERM, which reaches them through script and torchrun; rank 0 leaves 75."""
    launcher.python = Path(sys.executable)
    program(
        launcher.root / "train.py",
        """
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
line = json.dumps([os.environ["RANK"], os.environ["WORLD_SIZE"], sys.argv[1:]])
os.write(1, line.encode() + b"\\n")  # at once: print may mix the lines of two ranks
signal.sigwait({signal.SIGTERM})
if os.environ["RANK"] == "0":
    Path(os.environ["VOLO_EXIT_FILE"]).write_text("75")
sys.exit(75)
""",
    )
    with started(launcher.script, "2", "--train.name", "a b", env=launcher.env()) as process:
        lines = [json.loads(process.stdout.readline()) for _ in range(2)]
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate()
    assert sorted(lines) == [["0", "2", ["--train.name", "a b"]], ["1", "2", ["--train.name", "a b"]]]
    assert process.returncode == 75, errors
