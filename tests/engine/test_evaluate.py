"""Evaluation: exact counts on any number of processes, compared with counting image by image; ImageNet-ReaL.

N images, C classes.
"""

import json
import logging
import math
import pkgutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import run_group
from timm.data import RealLabelsImagenet
from torch import nn

from volo.data.dataset import Batch
from volo.data.loader import eval_loader
from volo.data.pixels.transforms import EvalTransform
from volo.data.sources.base import FolderSource, PackedNames
from volo.data.sources.records import ImageRecords, imagenet_classes
from volo.engine.evaluate import Accuracy, Evaluation, ReaLLabels, evaluate
from volo.runtime.errors import DataError

CPU = torch.device("cpu")
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
SIDE = 32
# One more and one fewer than multiples of 2 and 3 processes and of batches of 2; fewer images than processes.
SIZES = (1, 2, 5, 6, 7, 11, 12, 13)


def small_model(num_classes: int) -> nn.Module:
    """Pool, normalise, classify: images get different answers, and training mode would change them."""
    torch.manual_seed(5)
    layers = nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.BatchNorm1d(48), nn.Dropout(0.5), nn.Linear(48, num_classes)
    model = nn.Sequential(*layers)
    nn.init.normal_(model[-1].weight, std=2.0)
    return model.train()


def chosen(records: ImageRecords, indices: list[int], folder: Path | None = None) -> ImageRecords:
    names = PackedNames.of(records.name(i) for i in indices)
    source = FolderSource(str(folder or records.source.root), names)
    return replace(records, source=source, labels=records.labels[indices])


def first(records: ImageRecords, count: int) -> ImageRecords:
    return chosen(records, list(range(count)))


def evaluate_images(
    records: ImageRecords, batch_size: int = 2, rank: int = 0, size: int = 1, on_error: str = "fail", **options
) -> Evaluation | None:
    transform = EvalTransform((SIDE, SIDE), 1.0, "bicubic")
    loader = eval_loader(
        records, transform, batch_size=batch_size, rank=rank, world_size=size, workers=0, on_error=on_error
    )
    return evaluate(small_model(len(records.classes)), loader, CPU, MEAN, STD, **options)


def answers_by_hand(records: ImageRecords) -> list[tuple[list[int], list[float]]]:
    """Predictions, best first, and logits, image by image."""
    model = small_model(len(records.classes)).eval()
    answers = []
    for i in range(len(records)):
        pixels = np.asarray(Image.open(records.location(i)).convert("RGB"), dtype=np.float64) / 255
        image = torch.tensor((pixels - MEAN) / STD).permute(2, 0, 1)[None].float()
        logits = model(image)[0].double().tolist()
        answers.append((sorted(range(len(logits)), key=lambda c: -logits[c]), logits))
    return answers


def count_by_hand(records: ImageRecords) -> Accuracy:
    top1 = top5 = loss = 0
    for (ranked, logits), label in zip(answers_by_hand(records), records.labels, strict=True):
        top1 += ranked[0] == label
        top5 += label in ranked[:5]
        loss += math.log(sum(math.exp(value) for value in logits)) - logits[label]
    return Accuracy(len(records), top1, top5, loss)


def assert_counts(found: Accuracy, expected: Accuracy) -> None:
    counts = expected.images, expected.top1_correct, expected.top5_correct
    assert (found.images, found.top1_correct, found.top5_correct) == counts
    assert found.loss_sum == pytest.approx(expected.loss_sum, rel=1e-5)


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> ImageRecords:
    """13 images of 7 classes, two of them palette images, under the names of ImageNet's first validation files."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(3)
    names = [f"ILSVRC2012_val_{i + 1:08d}.png" for i in range(13)]
    for i, name in enumerate(names):
        image = Image.fromarray(rng.integers(256, size=(SIDE, SIDE, 3), dtype=np.uint8))
        (image.quantize(200) if i in (4, 11) else image).save(folder / name)
    labels = rng.integers(7, size=13)
    return ImageRecords(FolderSource(str(folder), PackedNames.of(names)), labels, tuple("abcdefg"))


# -------------------------------------------------------------------------------------------------- one process


@pytest.mark.parametrize("size", SIZES)
def test_one_process_counts_every_image_once(records, size):
    assert_counts(evaluate_images(first(records, size)).labels, count_by_hand(first(records, size)))


def test_the_count_by_hand_has_right_and_wrong_images(records):
    expected = count_by_hand(records)
    assert 0 < expected.top1_correct < expected.top5_correct < expected.images


@pytest.mark.parametrize("batch_size", [1, 3, 13, 100])
def test_the_batch_size_changes_nothing(records, batch_size):
    batches = []
    found = evaluate_images(records, batch_size, on_batch=lambda: batches.append(1))
    assert_counts(found.labels, count_by_hand(records))
    assert len(batches) == -(-13 // batch_size)


@pytest.mark.parametrize("num_classes", [2, 4, 5])
def test_with_five_classes_or_fewer_top5_is_always_right(records, num_classes):
    few = replace(records, classes=records.classes[:num_classes], labels=records.labels % num_classes)
    found = evaluate_images(few).labels
    assert_counts(found, count_by_hand(few))
    assert found.top5_correct == 13 and found.top5 == 100.0


def test_percentages():
    accuracy = Accuracy(images=8, top1_correct=1, top5_correct=5, loss_sum=6.0)
    assert (accuracy.top1, accuracy.top5, accuracy.loss) == (12.5, 62.5, 0.75)
    nothing = Accuracy(0, 0, 0)
    assert all(math.isnan(value) for value in (nothing.top1, nothing.top5, nothing.loss))


def test_the_model_is_left_unchanged(records):
    transform = EvalTransform((SIDE, SIDE), 1.0, "bicubic")
    for training in (True, False):
        model = small_model(7).train(training)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        evaluate(model, eval_loader(records, transform, batch_size=4), CPU, MEAN, STD)
        assert model.training == training
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_an_interrupted_evaluation_returns_no_numbers(records):
    asked = []
    assert evaluate_images(records, should_stop=lambda: asked.append(0) or len(asked) == 3) is None
    assert len(asked) == 3


def test_unusual_images_are_counted(records):
    assert evaluate_images(records).notes == {"palette": 2}


# ------------------------------------------------------------------------------------------- several processes


def shared_counts(rank: int, size: int, records: ImageRecords, broken: ImageRecords) -> dict:
    """All counts of one process group."""
    logged, handler = [], logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())
    logging.getLogger("volo").addHandler(handler)
    try:
        failure = evaluate_images(broken, rank=rank, size=size)
    except DataError as error:
        failure = str(error)
    logging.getLogger("volo").removeHandler(handler)
    of_imagenet = replace(records, classes=imagenet_classes())
    return {
        "sizes": [evaluate_images(first(records, n), rank=rank, size=size) for n in SIZES],
        "skipping": evaluate_images(broken, rank=rank, size=size, on_error="skip"),
        "failing": failure,
        "logged at once": [line for line in logged if "finish their share" in line],
        "stopped on the last rank": evaluate_images(
            records, rank=rank, size=size, should_stop=lambda: rank == size - 1
        ),
        "real": evaluate_images(of_imagenet, rank=rank, size=size, real=ReaLLabels(records)),
    }


@pytest.fixture(scope="module")
def broken(records, tmp_path_factory) -> ImageRecords:
    """The images, the third and the last truncated."""
    folder = tmp_path_factory.mktemp("broken")
    for i, name in enumerate(records.names):
        data = records.read(i)
        (folder / name).write_bytes(data[:60] if i in (2, 12) else data)
    return chosen(records, list(range(len(records))), folder)


@pytest.fixture(scope="module")
def groups(records, broken) -> dict[int, list[dict]]:
    return {1: [shared_counts(0, 1, records, broken)]} | run_group(shared_counts, records, broken, sizes=(3, 2))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_counts_are_exact_on_every_rank(groups, records, processes):
    for found in groups[processes]:
        for size, evaluation in zip(SIZES, found["sizes"], strict=True):
            assert_counts(evaluation.labels, count_by_hand(first(records, size)))
            assert evaluation.notes == ({"palette": (size > 4) + (size > 11)} if size > 4 else {})


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_unreadable_images_are_left_out_and_counted(groups, records, broken, processes):
    readable = [i for i in range(13) if i not in (2, 12)]
    expected = count_by_hand(chosen(records, readable))
    for found in groups[processes]:
        assert_counts(found["skipping"].labels, expected)
        skipped = found["skipping"].skipped
        assert sorted(line.split(":")[0][-14:-4] for line in skipped) == ["l_00000003", "l_00000013"]
        assert "00000003.png" in found["failing"] or "00000013.png" in found["failing"]
    # Image 2 belongs to the last of 3 ranks or the first of 2, image 12 to the first; a rank stops at its first.
    images_read = {1: [], 2: [1, 0], 3: [1, 0, 1]}[processes]
    assert [len(found["logged at once"]) for found in groups[processes]] == (images_read or [0])


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_all_ranks_stop_if_one_does(groups, processes):
    assert [found["stopped on the last rank"] for found in groups[processes]] == [None] * processes


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_real_labels_are_counted_in_the_same_pass(groups, records, processes):
    of_imagenet = replace(records, classes=imagenet_classes())
    lists = json.loads(pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json"))[:13]
    guesses = [ranked for (ranked, _), labels in zip(answers_by_hand(of_imagenet), lists, strict=True) if labels]
    right = [set(labels) for labels in lists if labels]
    top1 = sum(ranked[0] in labels for ranked, labels in zip(guesses, right, strict=True))
    top5 = sum(bool(labels & set(ranked[:5])) for ranked, labels in zip(guesses, right, strict=True))
    for found in groups[processes]:
        assert_counts(found["real"].labels, count_by_hand(of_imagenet))
        real = found["real"].real
        assert (real.images, real.top1_correct, real.top5_correct) == (len(right), top1, top5)
        assert math.isnan(real.loss)


# ------------------------------------------------------------------------------------------------ ImageNet-ReaL

OFFICIAL = [f"ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(50_000)]


def official(paths: list[str]) -> ImageRecords:
    return ImageRecords(
        FolderSource("", PackedNames.of(paths)), np.zeros(len(paths), dtype=np.int64), imagenet_classes()
    )


def test_46837_of_50000_count():
    assert ReaLLabels(official(OFFICIAL)).counted == 46_837
    in_folders = [f"n01440764/{name}" for name in OFFICIAL[::-1][:100]]
    flat = ReaLLabels(official(OFFICIAL[::-1][:100]))
    assert ReaLLabels(official(in_folders)).label_sets == flat.label_sets, "labels go by name, wherever the file is"


class Table(nn.Module):
    """Return row n of a table of logits [N, C] for the image whose first two channels encode n."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits = logits

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        low, high = images[:, 0, 0, 0].round(), images[:, 1, 0, 0].round()
        return self.logits[(256 * high + low).long()]


def numbered(numbers: np.ndarray) -> Batch:
    pixels = np.stack([numbers % 256, numbers // 256, numbers * 0], axis=1).astype(np.uint8)
    zeros = torch.zeros(len(numbers), dtype=torch.int64)
    return Batch(
        images=torch.from_numpy(pixels)[:, :, None, None],
        labels=zeros,
        erase_boxes=torch.zeros(len(numbers), 4, dtype=torch.int64),
        noise_seeds=zeros,
        indices=torch.from_numpy(numbers),
        notes=zeros,
        failures=[],
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_real_equals_timms_on_random_predictions(seed):
    """Correct is any of an image's labels among the predictions; timm in its file order, ours in another."""
    rng = np.random.default_rng(seed)
    count = 2000
    real = ReaLLabels(official(OFFICIAL[:count]))
    logits = rng.normal(size=(count, 1000))
    for row, labels in enumerate(real.label_sets):
        if labels and rng.random() < 0.8:  # often one of the labels, near the top or at it
            logits[row, rng.choice(sorted(labels))] = rng.uniform(2, 5)
    logits = torch.from_numpy(logits).float()

    theirs = RealLabelsImagenet(OFFICIAL)
    theirs.add_result(logits)
    order = rng.permutation(count)
    batches = [numbered(part) for part in np.array_split(order, 7)]
    found = evaluate(Table(logits), batches, CPU, [0.0] * 3, [1 / 255] * 3, real=real).real
    assert found.images == len(theirs.is_correct[1]) == real.counted < count
    assert (found.top1_correct, found.top5_correct) == (sum(theirs.is_correct[1]), sum(theirs.is_correct[5]))
    assert found.top1 == pytest.approx(theirs.get_accuracy(1)) and found.top5 == pytest.approx(theirs.get_accuracy(5))
    assert 0 < found.top1_correct < found.top5_correct < found.images


@pytest.mark.parametrize(
    "name", ["cat.JPEG", "ILSVRC2012_val_00000000.JPEG", "ILSVRC2012_val_00050001.JPEG", "ILSVRC2012_val_x.JPEG"]
)
def test_real_needs_official_names(name):
    with pytest.raises(ValueError, match=f"go by the official file names.*{name} has another name"):
        ReaLLabels(official([OFFICIAL[0], f"n01440764/{name}"]))
