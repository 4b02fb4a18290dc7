"""The programs on a real device: a run that is stopped and resumed, label generation, a student, evaluation."""

import json
import os
import signal

import programs
import pytest
import torch
from programs import STOPPED, TRAIN, VALIDATE

pytestmark = pytest.mark.cuda

DEVICE = os.environ.get("VOLO_GPU_TESTS_DEVICE", "cuda")
GENERATE = programs.ROOT / "scripts" / "generate_token_labels.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with images, a recipe for the device, and a run "whole" that was never stopped."""
    folder = tmp_path_factory.mktemp("programs")
    images = programs.make_images(folder / "images", train=16)
    programs.write_recipe(
        folder / "recipe.yaml",
        images,
        model={"drop_path_rate": 0.1},
        data={"workers": 1},
        augment={"erase_prob": 0.5},
        ema={"enabled": True, "decay": 0.9},
        schedule={"epochs": 3, "warmup_epochs": 1, "per_step": True},
        train={"device": DEVICE, "name": "whole", "output": "runs"},
    )
    programs.run(TRAIN, "--config", folder / "recipe.yaml", cwd=folder).assert_done()
    return folder


def weights(folder, name):
    return torch.load(folder / "runs" / name / "last.pt", weights_only=True, map_location="cpu")["state_dict"]


def test_stopped_and_resumed(folder):
    words = ("--config", folder / "recipe.yaml", "--train.name", "stopped")
    run = programs.start(TRAIN, *words, cwd=folder)
    run.follow("epoch 2/3  step 2/")
    os.kill(run.pids[0], signal.SIGTERM)
    assert run.finish()[0].code == STOPPED
    programs.run(TRAIN, *words, cwd=folder).assert_done()
    whole, stopped = weights(folder, "whole"), weights(folder, "stopped")
    for name, weight in whole.items():
        # Not bit for bit: cuDNN's gradients of convolutions may differ from run to run.
        torch.testing.assert_close(stopped[name], weight, rtol=0, atol=2e-3, msg=name)


def test_labels_and_student(folder):
    train = folder / "images" / "train"
    teacher = folder / "runs" / "whole"
    programs.run(
        GENERATE, "--images", train, "--teacher", "volo_nano",
        "--teacher_checkpoint", teacher / "best.pt", "--output", folder / "labels", "--top_k", "3",
        "--device", DEVICE, cwd=folder,
    ).assert_done()  # fmt: skip
    for geometry in ("aligned", "published"):
        order = {"aligned": "timm", "published": "published"}[geometry]
        words = ("--token_label.root", folder / "labels", "--token_label.geometry", geometry, "--augment.order", order)
        programs.run(
            TRAIN, "--config", folder / "recipe.yaml", "--train.name", geometry, *words, cwd=folder
        ).assert_done()


def test_every_precision_evaluates_alike(folder):
    top1 = {}
    for precision in ("fp32", "bf16", "fp16"):
        programs.run(
            VALIDATE, "--config", folder / "runs/whole/config.yaml", "--checkpoint", folder / "runs/whole/best.pt",
            "--train.precision", precision, "--output", folder / precision, cwd=folder,
        ).assert_done()  # fmt: skip
        top1[precision] = json.loads((folder / precision / "results.json").read_text())[0]["top1"]
    assert max(top1.values()) - min(top1.values()) < 9, top1  # of 12 images, one may change sides
