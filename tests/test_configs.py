"""The recipes in configs/: every one parses, the paper's carry the published numbers, their headers are true."""

import re
import shlex
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

from volo.cli import build_parser, parse
from volo.config import _NOT_ARCHITECTURE, ModelConfig
from volo.models.architecture import Architecture, get_architecture
from volo.published_results import all_published

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
PAPER = [r for r in RECIPES if r.stem.startswith("volo_")]

# Written down from the published commands (D1-D3), and, marked "ours", what we chose where none is published.
#   recipe: global batch, images a GPU, learning rate, drop path, image side, crop ratio
PUBLISHED = {
    "volo_d1_224": (1024, 128, 1.6e-3, 0.1, 224, 0.96),
    "volo_d1_384": (512, 64, 8e-6, 0.1, 384, 0.96),
    "volo_d2_224": (1024, 128, 1e-3, 0.2, 224, 0.96),
    "volo_d2_384": (384, 48, 8e-6, 0.2, 384, 0.96),
    "volo_d3_224": (1024, 128, 1e-3, 0.5, 224, 0.96),
    "volo_d3_448": (240, 30, 8e-6, 0.5, 448, 0.96),
}
OURS = {
    "volo_d4_224": (1024, 128, 1e-3, 0.5, 224, 1.15),
    "volo_d4_448": (240, 30, 8e-6, 0.5, 448, 1.15),
    "volo_d5_224": (1024, 128, 8e-4, 0.75, 224, 1.15),
    "volo_d5_448": (240, 30, 8e-6, 0.75, 448, 1.15),
    "volo_d5_512": (240, 30, 8e-6, 0.75, 512, 1.15),
}


@cache  # building the parser takes longer than all the checks
def load(*arguments: str):
    return parse(build_parser("train.py", ""), list(arguments))[0]


def header(recipe: Path) -> dict[str, str]:
    """The fields of the comment at the top, each with its continuation lines."""
    found: dict[str, str] = {}
    name = ""
    for line in recipe.read_text().splitlines():
        if not line.startswith("#"):
            break
        if start := re.match(r"# ([a-z][a-z ]*): +(.*)", line):
            name = start[1]
            found[name] = start[2]
        elif name:
            found[name] += "\n" + line[1:].strip()
    return found


def commands(recipe: Path) -> list[list[str]]:
    """The words of every command in the header."""
    lines = header(recipe)["command"].replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines]


def test_the_eleven_models_and_two_small_ones_have_a_recipe():
    names = {r.stem for r in RECIPES}
    assert names == {p.key for p in all_published()} | {"quickstart", "cifar10"}
    assert names == set(PUBLISHED) | set(OURS) | {"quickstart", "cifar10"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.stem)
def test_recipe_parses_and_its_network_fits_its_image_size(recipe):
    config = load("--config", str(recipe))
    architecture = get_architecture(config.model.name, **config.model.architecture)
    assert architecture.stage_grids(config.model.image_hw)[-1] > (1, 1)


@pytest.mark.parametrize("recipe", PAPER, ids=lambda r: r.stem)
def test_paper_recipe_has_the_published_values(recipe):
    batch, device_batch, lr, drop_path, side, crop_pct = (PUBLISHED | OURS)[recipe.stem]
    config = load("--config", str(recipe))
    assert (config.train.batch_size, config.train.device_batch_size) == (batch, device_batch)
    assert config.train.batch_size == 8 * config.train.device_batch_size  # eight GPUs, nothing accumulated
    assert (config.optim.name, config.optim.lr) == ("adamw", lr)
    assert (config.optim.betas, config.optim.eps, config.optim.clip_grad) == ([0.9, 0.999], 1e-8, 0)
    assert (config.model.drop_path_rate, config.model.image_hw) == (drop_path, (side, side))
    assert config.model.num_classes == 1000
    assert config.model.architecture == {}  # the paper's network, nothing changed
    assert (config.eval.crop_pct, config.eval.interpolation) == (crop_pct, "bicubic")
    assert config.data.class_list == "imagenet"
    assert config.train.seed == 42
    assert not config.ema.enabled
    assert config.loss.smoothing == 0.1
    assert (config.loss.cls_weight, config.loss.dense_weight) == (1.0, 0.5)
    assert (config.mix.mix_token, config.mix.mixup, config.mix.cutmix) == (True, 0, 0)
    assert (config.token_label.geometry, config.token_label.smoothing) == ("published", "published")
    assert config.token_label.ground_truth == ("off" if config.model.img_size == 224 else "published")


@pytest.mark.parametrize("recipe", PAPER, ids=lambda r: r.stem)
def test_paper_recipe_augments_as_published(recipe):
    augment = load("--config", str(recipe)).augment
    assert (augment.order, augment.crop) == ("published", "random_resized")
    assert (augment.scale, augment.ratio) == ([0.08, 1.0], [0.75, 4 / 3])
    assert (augment.hflip, augment.vflip, augment.erase_prob) == (0.5, 0, 0.25)
    assert (augment.rand_augment, augment.interpolation) == ("rand-m9-mstd0.5-inc1", "random")
    assert (augment.mean, augment.std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@pytest.mark.parametrize("recipe", PAPER, ids=lambda r: r.stem)
def test_paper_recipe_has_the_published_schedule(recipe):
    config = load("--config", str(recipe))
    schedule = config.schedule
    assert (schedule.warmup_lr, schedule.per_step) == (1e-6, False)
    lengths = (schedule.epochs, schedule.warmup_epochs, schedule.cooldown_epochs, schedule.total_epochs)
    if config.model.img_size == 224:
        assert lengths == (300, 20, 10, 310)
        assert (schedule.min_lr, config.optim.weight_decay) == (1e-5, 0.05)
        assert not config.eval.before_training
    else:
        assert lengths == (30, 5, 10, 40)
        assert (schedule.min_lr, config.optim.weight_decay) == (4e-6, 1e-8)
        assert config.eval.before_training
    assert config.model.checkpoint is None  # the user's path, on the command line


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.stem)
def test_header_has_its_fields(recipe):
    assert list(header(recipe))[:5] == ["paper row", "command", "hardware", "expected", "duration"]
    epochs = load("--config", str(recipe)).schedule.total_epochs
    assert header(recipe)["duration"].startswith(f"{epochs} epochs")


@pytest.mark.parametrize("recipe", PAPER, ids=lambda r: r.stem)
def test_header_tells_the_published_row_and_what_is_ours(recipe):
    row = next(p for p in all_published() if p.key == recipe.stem)
    told = header(recipe)
    assert f"resolution {row.resolution}, {row.params / 1e6:.1f} M parameters" in told["paper row"]
    assert f"top-1 {row.paper_top1} %" in told["paper row"]
    assert f"top-1 {row.paper_top1} %" in told["expected"]
    assert load("--config", str(recipe)).eval.crop_pct == row.official_crop_pct
    device_batch = (PUBLISHED | OURS)[recipe.stem][1]
    assert f"{device_batch} images each" in told["hardware"]
    published = recipe.stem in PUBLISHED
    assert told["hardware"].startswith("8 GPUs") == published
    assert ("ours" in told) != published
    assert ("# ours" in recipe.read_text().partition("\nmodel:")[2]) != published


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.stem)
def test_the_commands_of_the_header_work(recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    parsed = 0
    for words in commands(recipe):
        if "--config" not in words:
            assert words == ["bash", "scripts/quickstart.sh"]
            continue
        if words[0] == "./distributed_train.sh":
            assert int(words[1]) >= 1
            arguments = words[2:]
        else:
            arguments = words[words.index("train.py") + 1 :]
        assert Path(words[words.index("--config") + 1]) == recipe.relative_to(ROOT)
        config = load(*arguments)
        assert config.optim == load("--config", str(recipe)).optim
        fine_tunes = recipe in PAPER and config.model.img_size != 224
        assert (config.model.checkpoint is not None) == fine_tunes
        parsed += 1
    assert parsed >= 1
    if recipe in PAPER:
        assert sorted(words[0] for words in commands(recipe)) == ["./distributed_train.sh", "torchrun"]


def test_the_small_recipes_do_not_change_what_an_image_shows():
    digits = load("--config", str(ROOT / "configs/quickstart.yaml"))
    assert (digits.augment.hflip, digits.augment.vflip) == (0, 0)  # a mirrored digit is no digit
    cifar = load("--config", str(ROOT / "configs/cifar10.yaml"))
    assert (cifar.augment.hflip, cifar.augment.shift_pixels) == (0.5, 4)
    assert (cifar.model.name, cifar.optim.lr, cifar.train.batch_size) == ("volo_tiny", 7e-4, 64)
    for config in (digits, cifar):
        assert (config.augment.crop, config.augment.rand_augment, config.augment.erase_prob) == ("shift", "none", 0)
        assert (config.model.num_classes, config.model.img_size, config.eval.crop_pct) == (10, 32, 1.0)
        assert config.mix.mix_token


def test_every_architecture_field_can_be_set_in_a_recipe():
    recipe_fields = {f.name for f in fields(ModelConfig)} - set(_NOT_ARCHITECTURE)
    assert recipe_fields == {f.name for f in fields(Architecture)}
