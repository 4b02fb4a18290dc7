"""scripts/quickstart.sh, with a small recording program in the place of Python."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from programs import ROOT
from shell import clean_env, program, run

# Answers for train.py (through torchrun) and validate.py; what it reads from results.json is read for real.
FAKE_RUN = """
words = sys.argv[1:]
log = Path(os.environ["RECORD"])
if words[0] == "-c" and "torch" in words[1]:
    print(2)  # importing PyTorch takes longer than all the rest
elif words[0] == "-c":
    os.execv(sys.executable, [sys.executable, *words])
elif words[:2] == ["-m", "torch.distributed.run"]:
    log.open("a").write(json.dumps(words) + "\\n")
    run = Path(words[words.index("--train.output") + 1], words[words.index("--train.name") + 1])
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text("")
    code = int(os.environ.get("TRAIN_CODE", 0))
    Path(os.environ["VOLO_EXIT_FILE"]).write_text(str(code))
    sys.exit(code and 1)
elif words[0] == "validate.py":
    log.open("a").write(json.dumps(words) + "\\n")
    folder = Path(words[words.index("--checkpoint") + 1]).parent
    (folder / "results.json").write_text(json.dumps([{"top1": float(os.environ["TOP1"])}]))
elif words[0] in ("scripts/make_digits.py", "scripts/generate_token_labels.py"):
    log.open("a").write(json.dumps(words) + "\\n")
else:
    sys.exit(f"unexpected: {words}")
"""


class Quickstart:
    """quickstart.sh in a folder of its own, with a program in the place of .venv's Python."""

    def __init__(self, folder: Path):
        self.root = folder / "a checkout"
        (self.root / "scripts").mkdir(parents=True)
        shutil.copy(ROOT / "scripts/quickstart.sh", self.root / "scripts")
        shutil.copy(ROOT / "distributed_train.sh", self.root)
        (self.root / "scripts/setup.sh").write_text("exit 0\n")
        program(self.root / ".venv/bin/python", FAKE_RUN)
        self.log = folder / "log"

    def __call__(self, *words: str, top1: float = 99.0, **env: str) -> subprocess.CompletedProcess:
        given = {"RECORD": self.log, "TOP1": top1, "CUDA_VISIBLE_DEVICES": ""} | env
        return run("bash", self.root / "scripts/quickstart.sh", *words, env=clean_env(**given), cwd="/")

    def done(self) -> list[list[str]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture
def quickstart(tmp_path) -> Quickstart:
    return Quickstart(tmp_path)


def test_quickstart_trains_teacher_and_student(quickstart):
    done = quickstart("--schedule.epochs", "3")
    assert (done.returncode, done.stderr) == (0, "")
    digits, teacher, generate, student, validate = quickstart.done()
    assert digits == ["scripts/make_digits.py", "--output", "data/digits"]
    for train, name in ((teacher, "teacher"), (student, "student")):
        assert train[train.index("--nproc_per_node") + 1] == "2"
        assert train[train.index("--config") + 1] == "configs/quickstart.yaml"
        assert train[train.index("--train.output") + 1] == "runs/quickstart"
        assert train[train.index("--train.name") + 1] == name
        assert train[-2:] == ["--schedule.epochs", "3"]
    assert "--token_label.root" not in teacher
    assert student[student.index("--token_label.root") + 1] == generate[generate.index("--output") + 1]
    assert generate[generate.index("--teacher_checkpoint") + 1] == "runs/quickstart/teacher/best.pt"
    assert generate[generate.index("--images") + 1] == "data/digits/train"
    assert validate[validate.index("--checkpoint") + 1] == "runs/quickstart/student/best.pt"
    assert "runs/quickstart/student/curves.png" in done.stdout
    assert "configs/volo_d1_224.yaml" in done.stdout


def test_quickstart_again_leaves_the_earlier_run_as_it_is(quickstart):
    for name in ("quickstart", "quickstart-2"):
        (quickstart.root / "runs" / name).mkdir(parents=True)
        (quickstart.root / "runs" / name / "best.pt").write_text("mine")
    assert quickstart().returncode == 0
    _, teacher, generate, student, validate = quickstart.done()
    assert teacher[teacher.index("--train.output") + 1] == "runs/quickstart-3"
    assert generate[generate.index("--output") + 1] == "runs/quickstart-3/labels"
    assert student[student.index("--train.output") + 1] == "runs/quickstart-3"
    assert validate[validate.index("--checkpoint") + 1] == "runs/quickstart-3/student/best.pt"
    for name in ("quickstart", "quickstart-2"):
        assert [p.name for p in (quickstart.root / "runs" / name).iterdir()] == ["best.pt"]


def test_quickstart_fails_below_98_percent(quickstart):
    assert quickstart(top1=98.0).returncode == 0
    done = quickstart(top1=97.99)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "quickstart.sh: error: top-1 is 97.99 %; at least 98 % was expected"


@pytest.mark.parametrize("code", [1, 75])
def test_quickstart_ends_with_the_exit_code_of_training(quickstart, code):
    assert quickstart(TRAIN_CODE=str(code)).returncode == code
    assert len(quickstart.done()) == 2  # nothing was evaluated
