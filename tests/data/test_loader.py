"""Order, sharding and workers: every step has the same samples for any number of processes and workers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from volo.config import AugmentConfig
from volo.data.dataset import Batch, TrainImages
from volo.data.loader import EpochBatches, eval_loader, train_loader
from volo.data.pixels.decode import Note, UnreadableImage, from_image, read_image
from volo.data.pixels.transforms import EvalTransform, TrainTransform
from volo.data.sources.folders import scan_class_folders
from volo.runtime.rng import generator, torch_seed

SETTINGS = settings(max_examples=80, deadline=None)


@st.composite
def layouts(draw) -> dict:
    world, micro, chunk = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    global_batch = world * micro * chunk
    return {
        "num_samples": global_batch * draw(st.integers(1, 5)) + draw(st.integers(0, global_batch - 1)),
        "seed": draw(st.integers(0, 2**31)),
        "global_batch": global_batch,
        "world_size": world,
        "micro_batches": micro,
    }


def indices(batches: EpochBatches, epoch: int, start: int = 0) -> list[list[int]]:
    keys = list(batches.keys(epoch, start))
    assert all(key_epoch == epoch for batch in keys for key_epoch, _ in batch)
    return [[index for _, index in batch] for batch in keys]


@SETTINGS
@given(layouts(), st.integers(0, 50))
def test_an_epoch_is_the_head_of_its_permutation(layout, epoch):
    ranks = [EpochBatches(**layout, rank=rank) for rank in range(layout["world_size"])]
    first = ranks[0]
    order = first.permutation(epoch)
    assert sorted(order) == list(range(layout["num_samples"]))
    assert first.steps_per_epoch * layout["global_batch"] + first.left_out == layout["num_samples"]

    # Rebuild the global order: step, then micro-batch, then rank.
    per_rank = [indices(batches, epoch) for batches in ranks]
    assert {len(mine) for mine in per_rank} == {first.steps_per_epoch * layout["micro_batches"]}
    rebuilt = [index for position in zip(*per_rank, strict=True) for chunk in position for index in chunk]
    assert rebuilt == order[: len(rebuilt)].tolist()
    assert len(rebuilt) == first.steps_per_epoch * layout["global_batch"] == len(set(rebuilt))


@SETTINGS
@given(layouts(), st.integers(0, 5), st.data())
def test_starting_late_gives_the_tail(layout, epoch, data):
    batches = EpochBatches(**layout, rank=data.draw(st.integers(0, layout["world_size"] - 1)))
    start = data.draw(st.integers(0, batches.steps_per_epoch))
    assert indices(batches, epoch, start) == indices(batches, epoch)[start * layout["micro_batches"] :]


def test_epochs_and_seeds_differ():
    batches = EpochBatches(50, 1, 10)
    assert indices(batches, 0) != indices(batches, 1) != indices(EpochBatches(50, 2, 10), 1)


def test_batch_sizes_that_cannot_be_divided_are_refused():
    assert EpochBatches(8, 0, 8).steps_per_epoch == 1
    with pytest.raises(ValueError, match="train.batch_size is 9, .* 8 training images"):
        EpochBatches(8, 0, 9)
    with pytest.raises(ValueError, match="train.batch_size is 8, .* 3 processes times 1 .*a multiple of 3"):
        EpochBatches(80, 0, 8, world_size=3)


FIELDS = ("images", "labels", "erase_boxes", "noise_seeds", "indices", "notes")


def same(a: Batch, b: Batch) -> bool:
    return a.failures == b.failures and all(torch.equal(getattr(a, f), getattr(b, f)) for f in FIELDS)


@pytest.fixture
def records(make_folder):
    folder = make_folder({"a": 9, "b": 8, "c": 6})
    return scan_class_folders(folder, ("a", "b", "c"))


TRANSFORM = TrainTransform(AugmentConfig(), (16, 24))


def test_any_number_of_workers_gives_the_same_batches(records):
    options = dict(seed=5, global_batch=6, micro_batches=2)
    loaders = [train_loader(records, TRANSFORM, workers=workers, **options) for workers in (0, 1, 2)]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    for epoch in (0, 1):
        runs = [list(loader.epoch(epoch)) for loader in loaders]
        assert [len(run) for run in runs] == [6, 6, 6]
        for plain, one, two in zip(*runs, strict=True):
            assert same(plain, one) and same(plain, two)
        assert [b.indices.tolist() for b in runs[0]] == indices(EpochBatches(23, **options), epoch)
    # A loader that was left in the middle of an epoch can start again at any step.
    for loader in loaders:
        next(loader.epoch(1))
        late = list(loader.epoch(1, start_step=1))
        assert len(late) == 4 and all(map(same, late, runs[0][2:]))
    assert torch.equal(state, torch.get_rng_state())  # the global generator was not used
    assert loaders[0].steps_per_epoch == 3 and loaders[0].left_out == 5


def test_batches_follow_from_their_keys(records):
    for batch in train_loader(records, TRANSFORM, seed=5, global_batch=8).epoch(2):
        assert batch.images.shape == (8, 3, 16, 24) and batch.images.dtype == torch.uint8
        assert batch.labels.dtype == batch.erase_boxes.dtype == batch.noise_seeds.dtype == torch.int64
        assert batch.labels.tolist() == [records.labels[i] for i in batch.indices]
        for row, index in enumerate(batch.indices.tolist()):
            image, notes = read_image(records.read(index), records.name(index))
            plan = TRANSFORM.draw(generator(5, "augment", 2, index), *image.size)
            np.testing.assert_array_equal(batch.images[row].numpy(), TRANSFORM.apply(from_image(image), plan))
            assert tuple(batch.erase_boxes[row].tolist()) == plan.erase and batch.notes[row] == notes == 0
            assert batch.noise_seeds[row] == torch_seed(5, "erase", 2, index)


WITH_ERASING = TrainTransform(AugmentConfig(erase_prob=0.7), (16, 24))


def steps_of(records, worlds: int, micro_batches: int, workers: int) -> list[dict[int, dict]]:
    """Return, for each step of epoch 1, the fields of every sample of all ranks, by the sample's index."""
    steps = [{}, {}]
    for rank in range(worlds):
        loader = train_loader(
            records,
            WITH_ERASING,
            seed=8,
            global_batch=12,
            world_size=worlds,
            rank=rank,
            micro_batches=micro_batches,
            workers=workers,
            epochs=2,
        )
        for number, batch in enumerate(loader.epoch(1)):
            for row, index in enumerate(batch.indices.tolist()):
                step = steps[number // micro_batches]
                assert index not in step, "a sample is seen twice"
                step[index] = {name: getattr(batch, name)[row] for name in FIELDS}
    return steps


@pytest.mark.parametrize(("worlds", "micro_batches", "workers"), [(1, 3, 0), (2, 1, 0), (3, 4, 2)])
def test_a_step_has_the_same_pixels_on_any_number_of_processes(make_folder, worlds, micro_batches, workers):
    """And the same labels, erase boxes and noise seeds."""
    records = scan_class_folders(make_folder({"a": 9, "b": 9, "c": 8}), ("a", "b", "c"))  # two steps, two left out
    expected = steps_of(records, worlds=1, micro_batches=1, workers=0)
    found = steps_of(records, worlds, micro_batches, workers)
    assert any(sample["erase_boxes"].any() for sample in expected[0].values())
    for step, other in zip(expected, found, strict=True):
        assert len(step) == 12 and step.keys() == other.keys()
        for index, sample in step.items():
            assert all(torch.equal(sample[name], other[index][name]) for name in FIELDS), index


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("epoch", "start"), [(0, 2), (1, 1), (1, 4)])
def test_skipped_steps_are_not_read(records, monkeypatch, tmp_path, workers, epoch, start):
    """Resuming in the middle of an epoch reads the remaining samples, each once, and no others."""
    read = tmp_path / "read"
    get = TrainImages.__getitem__

    def noted(self, key):
        with open(read, "a") as file:  # appended to by every worker
            print(*key, file=file)
        return get(self, key)

    monkeypatch.setattr(TrainImages, "__getitem__", noted)
    options = dict(seed=5, global_batch=4, micro_batches=2)
    loader = train_loader(records, TRANSFORM, workers=workers, epochs=2, **options)
    late = list(loader.epoch(epoch, start_step=start))
    if epoch == 0:
        late += loader.epoch(1)
    due = [tuple(key) for keys in EpochBatches(23, **options).keys(epoch, start) for key in keys]
    if epoch == 0:
        due += [tuple(key) for keys in EpochBatches(23, **options).keys(1) for key in keys]
    assert [index for batch in late for index in batch.indices.tolist()] == [index for _, index in due]
    assert sorted(tuple(map(int, line.split())) for line in read.read_text().splitlines()) == sorted(due)


def test_first_images_are_those_of_the_step(records):
    loader = train_loader(records, TRANSFORM, seed=1, global_batch=6, micro_batches=2)
    whole = list(loader.epoch(1))
    for most in (1, 2, 3, 4):
        first = loader.first_images(1, 2, most)
        assert len(first) == min(most, 3)
        assert all(torch.equal(getattr(first, name), getattr(whole[4], name)[:most]) for name in FIELDS)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 11, 12, 13])
def test_evaluation_sees_every_image_once(make_folder, world, count):
    folder = make_folder({"a": count})
    records = scan_class_folders(folder, ("a", "b"))
    transform, seen = EvalTransform((16, 16), 0.96, "bicubic"), []
    for rank in range(world):
        loader = eval_loader(records, transform, batch_size=2, rank=rank, world_size=world)
        batches = list(loader)
        assert [b.indices.tolist() for b in batches] == [b.indices.tolist() for b in loader]
        assert len(loader) == len(batches) == -(-len(loader.indices) // 2)
        mine = [i for batch in batches for i in batch.indices.tolist()]
        assert mine == list(range(rank, count, world))
        seen += mine
    assert sorted(seen) == list(range(count))


def test_evaluation_batches_with_any_number_of_workers(records):
    transform = EvalTransform((16, 24), 0.96, "bicubic")
    plain = list(eval_loader(records, transform, batch_size=5))
    for workers in (1, 2):
        loader = eval_loader(records, transform, batch_size=5, workers=workers)
        for _ in range(2):
            assert all(map(same, plain, list(loader)))
    image, _ = read_image(records.read(7), records.name(7))
    np.testing.assert_array_equal(plain[1].images[2].numpy(), transform(image))
    assert not plain[0].erase_boxes.any()


def break_files(records, *which: int) -> list[str]:
    paths = [records.location(i) for i in which]
    for path in paths:
        Path(path).write_bytes(Path(path).read_bytes()[:60])
    return paths


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_file_stops_training_with_its_name(records, workers):
    (path,) = break_files(records, 4)
    with pytest.raises(UnreadableImage, match=f"^cannot read {path}: .*data.on_error") as caught:
        list(train_loader(records, TRANSFORM, seed=0, global_batch=23, workers=workers).epoch(0))
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_file_stops_evaluation_with_its_name(records, workers):
    path, _ = break_files(records, 4, 5)
    loader = eval_loader(records, EvalTransform((16, 16), 1.0, "bicubic"), batch_size=6, workers=workers)
    with pytest.raises(UnreadableImage, match=rf"^cannot read {path}: .* \(and 1 more\)"):
        list(loader)


def test_skipping_in_training_uses_another_image(records):
    broken = {*range(2, 12), 17}
    paths = break_files(records, *sorted(broken))
    options = dict(seed=9, global_batch=23, on_error="skip")
    (batch,) = train_loader(records, TRANSFORM, **options).epoch(1)
    (other,) = train_loader(records, TRANSFORM, workers=2, **options).epoch(1)
    assert same(batch, other)
    assert len(batch) == 23 and not broken & set(batch.indices.tolist())
    assert batch.labels.tolist() == [records.labels[i] for i in batch.indices]
    # Each broken file is reported once for itself, and again if it was drawn as a replacement.
    reported = [failure.split(": ")[0].removeprefix("cannot read ") for failure in batch.failures]
    assert set(reported) == set(paths) and len(reported) > len(paths)
    # Readable samples are unaffected.
    order = EpochBatches(23, 9, 23).permutation(1)
    rows = [row for row, index in enumerate(order) if index not in broken]
    assert batch.indices[rows].tolist() == order[rows].tolist()
    replaced = [row for row, index in enumerate(order) if index in broken]
    dataset = TrainImages(records, TRANSFORM, 9, "skip", "ignore")
    for row in replaced:
        np.testing.assert_array_equal(dataset[1, int(order[row])].image, batch.images[row].numpy())


def test_skipping_gives_up_if_nothing_can_be_read(records):
    break_files(records, *range(23))
    loader = train_loader(records, TRANSFORM, seed=0, global_batch=2, on_error="skip")
    with pytest.raises(UnreadableImage, match="No replacement"):
        next(loader.epoch(0))


def test_skipping_in_evaluation_counts_failures(records):
    paths = break_files(records, 3, 4, 22)
    loader = eval_loader(records, EvalTransform((16, 16), 1.0, "bicubic"), batch_size=2, workers=1, on_error="skip")
    batches = list(loader)
    seen = [i for batch in batches for i in batch.indices.tolist()]
    assert seen == [i for i in range(23) if i not in (3, 4, 22)]
    failures = [failure for batch in batches for failure in batch.failures]
    assert [path in failure for path, failure in zip(paths, failures, strict=True)] == [True] * 3
    assert len(batches[-1]) == 0  # its only image was unreadable
    assert len(seen) + len(failures) == len(records)


def test_notes_reach_the_batch(records, make_picture):
    make_picture(0).convert("CMYK").save(records.location(0), format="JPEG")
    (batch,) = eval_loader(records, EvalTransform((16, 16), 1.0, "bicubic"), batch_size=50, workers=1)
    assert batch.notes[0] == Note.CMYK | Note.OTHER_FORMAT and not batch.notes[1:].any()
    assert batch.note_counts() == {"cmyk": 1, "other_format": 1}


def test_orientation_is_applied_if_configured(records, make_picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    make_picture(0).save(records.location(0), exif=exif)
    transform = EvalTransform((16, 16), 1.0, "bicubic")
    upright = next(iter(eval_loader(records, transform, batch_size=1, exif="apply"))).images[0]
    np.testing.assert_array_equal(upright.numpy(), transform(make_picture(0).transpose(Image.Transpose.ROTATE_270)))
    stored = next(iter(eval_loader(records, transform, batch_size=1))).images[0]
    np.testing.assert_array_equal(stored.numpy(), transform(make_picture(0)))
