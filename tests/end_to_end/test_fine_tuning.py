"""The fine-tuning recipes from a 224 px checkpoint to 384, 448 and 512 px, through train.py, with token labels.

The recipes are unchanged, resolution included, but for a small network and a short run.
"""

import csv

import numpy as np
import pytest
import torch
import yaml
from programs import ROOT, TRAIN, USAGE, picture, run
from torch.nn import functional as F

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("fine-tuning")]

SYNSETS = ("n01440764", "n02123045")  # classes 0 and 281 of 1,000
SMALL = {
    "model.layers": [1, 1, 1, 1],
    "model.embed_dims": [16, 32, 32, 32],
    "model.num_heads": [2, 2, 2, 2],
    "model.mlp_ratios": [2, 2, 2, 2],
    "model.stem_hidden_dim": 8,
    "data.workers": 0,
    "schedule.epochs": 1,
    "schedule.warmup_epochs": 0,
    "schedule.cooldown_epochs": 0,
    "eval.batch_size": 2,
    "train.batch_size": 1,
    "train.device": "cpu",
    "train.log_every_steps": 1,
    "train.name": "run",
}


def words(recipe: str, images, **more) -> list[str]:
    options = SMALL | {"data.root": images, "token_label.root": images / "labels"} | more
    pairs = (pair for name, value in options.items() for pair in (f"--{name}", str(value)))
    return ["--config", str(ROOT / f"configs/{recipe}.yaml"), *pairs]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """One image per synset and split, with label files as published: float16 [2, 5, 18, 18]."""
    root = tmp_path_factory.mktemp("imagenet")
    rng = torch.Generator().manual_seed(0)
    for synset, kind in zip(SYNSETS, ("cross", "disc"), strict=True):
        for seed, split in enumerate(("train", "val")):
            (root / split / synset).mkdir(parents=True)
            picture(kind, seed, (80, 70)).save(root / split / synset / f"{synset}_7.JPEG")
        (root / "labels" / synset).mkdir(parents=True)
        scores = 5 * torch.rand(5, 18, 18, generator=rng)
        classes = torch.rand(1000, 18, 18, generator=rng).argsort(0)[:5]
        torch.save(torch.stack([scores, classes]).half(), root / "labels" / synset / f"{synset}_7.pt")
    return root


@pytest.fixture(scope="module")
def start(images, tmp_path_factory):
    """best.pt of the 224 px recipe."""
    folder = tmp_path_factory.mktemp("start")
    run(TRAIN, *words("volo_d1_224", images), cwd=folder).assert_done()
    return folder / "runs/run/best.pt"


def bicubic(pos_embed: torch.Tensor, side: int) -> torch.Tensor:
    """[1, g, g, D] as the published code resizes it."""
    return F.interpolate(pos_embed.permute(0, 3, 1, 2), size=(side, side), mode="bicubic").permute(0, 2, 3, 1)


@pytest.mark.parametrize(("recipe", "side"), [("volo_d1_384", 24), ("volo_d3_448", 28), ("volo_d5_512", 32)])
def test_a_recipe_goes_from_224_to_a_larger_grid(recipe, side, images, start, tmp_path):
    ended = run(TRAIN, *words(recipe, images, **{"model.checkpoint": start}), cwd=tmp_path).assert_done()
    folder = tmp_path / "runs/run"
    assert f"position embedding resized from 14x14 to {side}x{side}" in ended.out
    assert f"read as published for a grid of {side}x{side} tokens" in ended.out
    assert ended.out.index("epoch 0: raw weights top-1") < ended.out.index("epoch 1/1  step 1/2")

    # The evaluation before the first step is of the given weights.
    given = torch.load(start)["state_dict"]
    best = torch.load(folder / "best.pt")
    assert best["progress"]["global_step"] == 0
    torch.testing.assert_close(best["state_dict"].pop("pos_embed"), bicubic(given.pop("pos_embed"), side))
    assert best["state_dict"].keys() == given.keys()
    assert all(torch.equal(best["state_dict"][name], tensor) for name, tensor in given.items())

    last = torch.load(folder / "last.pt")
    assert (last["progress"]["global_step"], last["state_dict"]["pos_embed"].shape) == (2, (1, side, side, 32))
    assert {group["weight_decay"] for group in last["optimizer"]["param_groups"]} == {0, 1e-8}
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    trained = [row for row in rows if row["train/lr"]]
    assert [float(row["train/lr"]) for row in trained] == [8e-6, 8e-6]
    assert all(np.isfinite(float(row[f"train/{name}"])) for row in trained for name in ("loss_cls", "loss_dense"))
    # A step of Adam moves a weight by about the learning rate at most.
    moved = max((last["state_dict"][name] - given[name]).abs().max() for name in ("head.weight", "aux_head.weight"))
    assert 1e-6 < moved < 3e-5
    assert yaml.safe_load((folder / "config.yaml").read_text())["token_label"]["ground_truth"] == "published"


def test_the_ground_truth_changes_only_the_class_target(images, start, tmp_path):
    losses = {}
    for choice in ("published", "corrected", "off"):
        more = {"model.checkpoint": start, "token_label.ground_truth": choice, "train.name": choice}
        more |= {"model.drop_path_rate": 0, "model.img_size": 96, "eval.before_training": "false"}
        run(TRAIN, *words("volo_d1_384", images, **more), cwd=tmp_path).assert_done()
        with (tmp_path / "runs" / choice / "metrics.csv").open() as file:
            first = next(csv.DictReader(file))
        losses[choice] = float(first["train/loss_cls"]), float(first["train/loss_dense"])
    assert len({dense for _, dense in losses.values()}) == 1
    assert len({cls for cls, _ in losses.values()}) == 3


def test_a_recipe_without_weights_to_start_from_is_refused(images, tmp_path):
    run(TRAIN, *words("volo_d3_448", images), cwd=tmp_path).assert_failed(USAGE, "--model.checkpoint FILE")
