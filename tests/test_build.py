"""What is settled before the first step: the batch over the processes, what a resumed run may change, the images."""

import logging
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from volo.build import load_splits
from volo.cli import config_to_dict
from volo.config import Config, MixConfig, ModelConfig, TrainConfig
from volo.data.sources.base import FolderSource, PackedNames
from volo.data.sources.records import ImageRecords, Splits
from volo.engine.batch_layout import BatchLayout
from volo.engine.run_folder import check_same_images, check_same_run, default_name

# -------------------------------------------------------------------------------------------------- batch plan


def plan(total: int, most: int, world: int, cutmix: float = 0.0) -> BatchLayout:
    train = TrainConfig(batch_size=total, device_batch_size=most)
    return BatchLayout.of(Config(train=train, mix=MixConfig(cutmix=cutmix)), world)


@given(total=st.integers(1, 3000), most=st.integers(1, 300), world=st.integers(1, 64), cutmix=st.booleans())
def test_a_plan_multiplies_out_or_names_batches_that_do(total, most, world, cutmix):
    pairs = 2 if cutmix else 1
    assume(most >= pairs)
    try:
        made = plan(total, most, world, float(cutmix))
    except ValueError as error:
        assert total % (world * pairs), "nothing stood in the way"
        named = [int(n) for n in re.findall(r"\d+", str(error).split("nearest that do:")[-1])]
        if total < world:
            assert f"Start at most {total} processes" in str(error)
            return
        smaller, larger = ([n for n in named if n < total], [n for n in named if n > total])
        assert larger == [min(n for n in range(total + 1, total + 2 * world + 1) if n % (world * pairs) == 0)]
        assert smaller == [n for n in range(max(total - 2 * world, 1), total) if n % (world * pairs) == 0][-1:]
        for near in named:
            plan(near, most, world, float(cutmix))
    else:
        assert made.micro_batches * made.micro_size * world == total == made.global_size
        assert made.micro_size <= most and made.micro_size % pairs == 0
        share = total // world
        fewer = [n for n in range(1, made.micro_batches) if share % (n * pairs) == 0 and share // n <= most]
        assert not fewer, "fewer passes would do"


@pytest.mark.parametrize(
    ("total", "most", "world", "cutmix", "expected"),
    [
        (1024, 128, 8, 0.0, (1, 128)),  # the published 224 recipes
        (1024, 128, 1, 0.0, (8, 128)),
        (1024, 100, 1, 0.0, (16, 64)),
        (384, 48, 8, 0.0, (1, 48)),
        (10, 6, 1, 0.0, (2, 5)),
        (10, 6, 1, 1.0, (5, 2)),  # two passes of five would leave an image without a partner
        (7, 128, 7, 0.0, (1, 1)),
        (127, 64, 1, 0.0, (127, 1)),
    ],
)
def test_plans_by_hand(total, most, world, cutmix, expected):
    made = plan(total, most, world, cutmix)
    assert (made.micro_batches, made.micro_size) == expected


@pytest.mark.parametrize(
    ("total", "most", "world", "cutmix", "message"),
    [
        (3, 128, 4, 0.0, "less than one image each. Start at most 3 processes or raise train.batch_size to 4"),
        (10, 128, 4, 0.0, "does not divide over 4 processes; the nearest that do: 8 and 12"),
        (6, 128, 2, 1.0, "into pairs for MixUp and CutMix, over 2 processes; the nearest that do: 4 and 8"),
        (1, 128, 1, 1.0, "over 1 processes; the nearest that do: 2"),
        (8, 1, 1, 1.0, "train.device_batch_size is 1, but MixUp and CutMix pair"),
    ],
)
def test_batches_that_cannot_be(total, most, world, cutmix, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan(total, most, world, cutmix)


# ---------------------------------------------------------------------------------------------------- resuming


def test_what_a_resumed_run_may_change(caplog):
    config = Config()
    saved = config_to_dict(config)
    check_same_run(saved, config)
    assert not caplog.records

    with caplog.at_level(logging.WARNING, "volo"):
        kept = replace(config.data, cache="none")
        changed = replace(config, optim=replace(config.optim, lr=0.5), train=TrainConfig(output="x"), data=kept)
        check_same_run(saved, changed)
    assert [r.getMessage() for r in caplog.records] == ["resuming with a change: optim.lr was 0.0016 and is now 0.5"]


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("model", {"num_classes": 10}, "model.num_classes was 1000 and is now 10"),
        ("model", {"layers": [1, 1]}, "model.layers was None and is now [1, 1]"),
        ("train", {"batch_size": 512}, "train.batch_size was 1024 and is now 512"),
        ("train", {"seed": 1}, "train.seed was 42 and is now 1"),
        ("optim", {"name": "lamb"}, "optim.name was adamw and is now lamb"),
        ("ema", {"enabled": True}, "ema.enabled was False and is now True"),
    ],
)
def test_what_it_may_not_change(section, changes, message):
    config = Config()
    changed = replace(config, **{section: replace(getattr(config, section), **changes)})
    with pytest.raises(ValueError, match=re.escape(message)):
        check_same_run(config_to_dict(config), changed)


def splits(images: int, classes: tuple[str, ...] = ("cat", "dog")) -> Splits:
    paths = [f"cat/{i}.png" for i in range(images)]
    return Splits(
        ImageRecords(FolderSource("", PackedNames.of(paths)), np.zeros(images, dtype=np.int64), classes), None, classes
    )


def test_the_images_a_run_resumes_with(caplog):
    state = {"classes": ["cat", "dog"], "train_images": 80}
    check_same_images(state, splits(80), batch_size=32)
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "volo"):
        check_same_images(state, splits(95), batch_size=32)  # two steps an epoch, as before
    assert "on 80 training images; now there are 95" in caplog.records[0].getMessage()
    caplog.clear()
    for digest, warnings in ((splits(80).train.labels_digest(), 0), ("of other labels", 1)):
        with caplog.at_level(logging.WARNING, "volo"):
            check_same_images(state | {"train_labels": digest}, splits(80), batch_size=32)
        assert ["have other labels than before" in r.getMessage() for r in caplog.records] == [True] * warnings
    for images in (63, 96):
        with pytest.raises(ValueError, match=f"now there are {images}.*another number of steps"):
            check_same_images(state, splits(images), batch_size=32)
    with pytest.raises(ValueError, match="on other classes .2 from 'cat' to 'dog'; now 2 from 'dog' to 'cat'"):
        check_same_images(state, splits(80, ("dog", "cat")), batch_size=32)


# ------------------------------------------------------------------------------------------------------ images


def test_images_are_listed_once_and_the_classes_are_the_networks(make_image_folder, tmp_path, tiny_config):
    make_image_folder({"a": 2, "b": 1, "c": 1}, "train")
    make_image_folder({"a": 1, "c": 1}, "val")
    config = tiny_config(data={"root": str(tmp_path)})
    found = load_splits(config)
    assert (len(found.train), len(found.val), found.classes) == (4, 2, ("a", "b", "c"))
    assert found.val.labels.tolist() == [0, 2]
    assert load_splits(tiny_config(data={"root": str(tmp_path), "val_split": "none"})).val is None
    with pytest.raises(ValueError, match="gives 3 classes.*model.num_classes is 4.*--model.num_classes 3"):
        load_splits(tiny_config(data={"root": str(tmp_path)}, model={"num_classes": 4}))
    with pytest.raises(ValueError, match="data.val_split .* is 'test', but"):
        load_splits(tiny_config(data={"root": str(tmp_path), "val_split": "test"}))


def test_names_of_run_folders():
    assert default_name(Config()) == "volo_d1_224"
    assert default_name(Config(model=ModelConfig(name="volo_nano", img_size=[32, 48]))) == "volo_nano_32x48"
