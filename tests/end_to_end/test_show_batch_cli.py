"""The picture of a batch: scripts/show_batch.py, and batch.png, which every run writes at its start."""

import io

import numpy as np
import pytest
from PIL import Image
from programs import CLASSES, ROOT, TRAIN, USAGE, run, write_recipe
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from volo.token_labels.store import TokenLabelMap
from volo.token_labels.writer import StoreWriter

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("token_labels")]

SHOW_BATCH = ROOT / "scripts" / "show_batch.py"
# One plain colour per image; the classes are those of the small recipe.
COLOURS = {
    "cross/red": (230, 20, 20),
    "cross/green": (20, 160, 20),
    "disc/blue": (20, 20, 230),
    "disc/yellow": (220, 220, 20),
    "stripes/violet": (160, 20, 200),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Five images of one colour each, and label maps that say "disc" in every cell."""
    root = tmp_path_factory.mktemp("colours")
    for split in ("train", "val"):
        for name, colour in COLOURS.items():
            (root / split / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 30), colour).save(root / split / f"{name}.png")
    scores = np.full((1, 3, 4), 9, np.float16)
    header = {"teacher": "made by hand", "covers": "whole_image", "top_k": 1, "num_classes": 3, "classes": CLASSES}
    with StoreWriter(root / "labels", **header) as writer:
        for name in COLOURS:
            writer.add(name, TokenLabelMap(scores, np.full((1, 3, 4), CLASSES.index("disc"), np.int16)))
    return root


@pytest.fixture
def recipe(images, tmp_path):
    """Steps of all five images, in their own colours."""
    return write_recipe(
        tmp_path / "recipe.yaml",
        images,
        augment={"rand_augment": "none", "erase_prob": 0.0},
        schedule={"epochs": 1},
        train={"batch_size": 5},
    )


def shown(picture: Image.Image) -> set[str]:
    """Names of the images whose colour covers 150 x 150 pixels or more."""
    pixels = np.asarray(picture.convert("RGB")).astype(int)
    # The panel beside it shows the same image under its token labels: paler, so it does not count.
    near = {name: (abs(pixels - colour) < 12).all(2) for name, colour in COLOURS.items()}
    return {name for name, mask in near.items() if mask.sum() >= 150 * 150}


@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_image_has_its_panels(images, recipe, tmp_path, count):
    words = ("--config", recipe, "--num_images", count, "--output", tmp_path / "batch.png")
    sizes = {}
    for kind, labels in (("plain", ()), ("labelled", ("--token_label.root", images / "labels"))):
        ended = run(SHOW_BATCH, *words, *labels, cwd=tmp_path / kind).assert_done()
        assert f"{tmp_path / 'batch.png'}: epoch 0, step 0" in ended.out
        picture = Image.open(tmp_path / "batch.png")
        sizes[kind] = picture.size
        assert len(shown(picture)) == count
    # A panel is 512 pixels wide and high, and up to 616 with title, names and margins.
    panels = {kind: [round(side / 560) for side in size] for kind, size in sizes.items()}
    assert panels == {
        "plain": {1: [1, 1], 2: [2, 1], 5: [4, 2]}[count],
        "labelled": {1: [2, 1], 2: [4, 1], 5: [4, 3]}[count],
    }


def test_the_start_of_a_run_shows_its_first_batch(images, recipe, tmp_path):
    """batch.png and TensorBoard hold what the script draws for the same step."""
    words = ("--config", recipe, "--token_label.root", images / "labels")
    run(TRAIN, *words, cwd=tmp_path).assert_done()
    png = (tmp_path / "runs/run/batch.png").read_bytes()
    assert len(shown(Image.open(io.BytesIO(png)))) == 4

    events = EventAccumulator(str(tmp_path / "runs/run"), size_guidance={"images": 0})
    events.Reload()
    (event,) = events.Images("batch")
    assert event.step == 0
    logged = Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB")
    assert np.array_equal(np.asarray(logged), np.asarray(Image.open(io.BytesIO(png)).convert("RGB")))

    run(SHOW_BATCH, *words, "--num_images", 4, cwd=tmp_path).assert_done()
    assert (tmp_path / "batch.png").read_bytes() == png
    run(SHOW_BATCH, *words, "--num_images", 4, "--epoch", 1, cwd=tmp_path).assert_done()
    assert (tmp_path / "batch.png").read_bytes() != png


def test_a_run_without_labels_shows_its_first_batch_too(recipe, tmp_path):
    run(TRAIN, "--config", recipe, cwd=tmp_path).assert_done()
    assert len(shown(Image.open(tmp_path / "runs/run/batch.png"))) == 4


def test_what_cannot_be_shown_is_refused(images, recipe, tmp_path):
    words = ("--config", recipe)
    run(SHOW_BATCH, *words, "--step", 1, cwd=tmp_path).assert_failed(USAGE, "--step is 1", "0 ... 0")
    run(SHOW_BATCH, *words, "--step", -1, cwd=tmp_path).assert_failed(USAGE, "--step is -1")
    none = tmp_path / "none"
    run(SHOW_BATCH, *words, "--token_label.root", none, cwd=tmp_path).assert_failed(USAGE, str(none))
    assert not list(tmp_path.glob("*.png"))
