"""scripts/generate_token_labels.py: its labels, exit codes, resuming, and what it refuses.

Most tests call its body; those about the command line, exit codes, signals and ranks run the program.
"""

import contextlib
import logging
import os
import re
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import formats
import huggingface_hub.constants
import numpy as np
import programs
import pytest
import timm
import torch
from PIL import Image
from programs import FAILED, ROOT, STOPPED, USAGE
from torch import nn

from volo.data.sources.folders import scan_class_folders
from volo.models import create_model, load_checkpoint
from volo.runtime.program import DONE, UsageError
from volo.token_labels.generation.label_blocks import BlockFolder
from volo.token_labels.generation.labeller import Labeller
from volo.token_labels.generation.options import GenerateOptions
from volo.token_labels.generation.run import run_generation
from volo.token_labels.generation.teacher import Teacher, timm_logits
from volo.token_labels.generation.teacher_factory import WeightsNotFetched
from volo.token_labels.generation.teacher_input import TeacherInput, read_chunks
from volo.token_labels.pt_folder import PublishedLabels
from volo.token_labels.store import TokenLabelStore, label_key

GENERATE = ROOT / "scripts" / "generate_token_labels.py"
CLASSES = tuple(f"class_{i}" for i in range(8))
SIZES = ((40, 30), (30, 40), (36, 36), (64, 24))  # (width, height) of the images of a class
NUM_IMAGES = len(CLASSES) * len(SIZES)
ARCHITECTURE = {name: value for name, value in programs.SMALL["model"].items() if isinstance(value, list)}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As in the programs that are started, so that sums are the same to the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def quiet_logger():
    yield
    logger = logging.getLogger("volo")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Eight classes of four noise images, each of another shape."""
    root = tmp_path_factory.mktemp("images")
    for number, name in enumerate(CLASSES):
        (root / name).mkdir()
        for i, (width, height) in enumerate(SIZES):
            rng = np.random.default_rng(10 * number + i)
            small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
            small.resize((width, height), Image.Resampling.BICUBIC).save(root / name / f"{i}.v1.png")
    return root


def random_teacher(model: nn.Module) -> nn.Module:
    """Add noise to every weight, so that predictions differ between images."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def volo(tmp_path_factory) -> Path:
    """A checkpoint of a small VOLO as train.py writes it."""
    model = random_teacher(create_model("volo_nano", img_size=32, num_classes=8, **ARCHITECTURE, stem_hidden_dim=8))
    config = {
        "model": {**programs.SMALL["model"], "num_classes": 8, "qkv_bias": None},
        "augment": {"mean": MEAN, "std": STD},
        "eval": {"interpolation": "bilinear"},
    }
    path = tmp_path_factory.mktemp("volo") / "best.pt"
    wrong = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    state = {"state_dict": wrong, "state_dict_ema": model.state_dict(), "evaluated_weights": "ema"}
    torch.save({**state, "classes": list(CLASSES), "config": config}, path)
    return path


@pytest.fixture(scope="module")
def cnn(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cnn") / "weights.pth"
    torch.save(random_teacher(timm.create_model("test_resnet", num_classes=8)).state_dict(), path)
    return path


def options(images: Path, output: Path, teacher: str, checkpoint: Path | None, **more) -> GenerateOptions:
    path = None if checkpoint is None else str(checkpoint)
    sizes = {"batch_size": 3, "block_size": 7, "workers": 0, "device": "cpu", "cache": "none"}
    return GenerateOptions(str(images), str(output), teacher, path, **{**sizes, **more})


def words(given: GenerateOptions) -> list[str]:
    pairs = ((name, value) for name, value in vars(given).items() if value is not None)
    return [
        word for name, value in pairs for word in (f"--{name}", str(value).lower() if value is True else str(value))
    ]


def content(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.iterdir()}


# ------------------------------------------------------------------------------------------------------ the labels


def expected_labels(model: nn.Module, tokens_of, images: Path, size, resample, mean, std, k: int):
    """Top scores and classes of every image, and top-1 and top-5 hits, image by image and with only Pillow."""
    labels, right = {}, Counter()
    for number, name in enumerate(CLASSES):
        for path in sorted((images / name).iterdir()):
            image = Image.open(path).convert("RGB").resize(size(*Image.open(path).size), resample)
            pixels = torch.from_numpy(np.asarray(image).astype(np.float32) / 255)  # [H, W, 3]
            batch = ((pixels - torch.tensor(mean)) / torch.tensor(std)).permute(2, 0, 1)[None]
            with torch.no_grad():
                order = model(batch)[0].argsort(descending=True).tolist()
                best = tokens_of(batch).topk(k, dim=-1)  # [h, w, k]
            right.update(top1=order[0] == number, top5=number in order[:5])
            labels[f"{name}/{path.stem}"] = [part.permute(2, 0, 1).numpy() for part in best]
    return labels, right


def assert_labels(labels, expected: dict) -> None:
    entries = labels.find(list(expected))
    assert sorted(entries) == list(range(len(expected)))
    for entry, (scores, classes) in zip(entries, expected.values(), strict=True):
        label = labels.read(entry)
        np.testing.assert_array_equal(label.classes, classes)
        np.testing.assert_allclose(label.scores, scores, rtol=2e-3, atol=2e-3)  # float16


def assert_accuracy(out: str, right: Counter) -> None:
    top1, top5 = right["top1"], right["top5"]
    assert 0 < top1 < top5 < NUM_IMAGES, "a teacher that is neither always right nor always wrong"
    assert out.splitlines()[-1].endswith(
        f": top-1 {100 * top1 / NUM_IMAGES:.3f} % ({top1} of {NUM_IMAGES}), "
        f"top-5 {100 * top5 / NUM_IMAGES:.3f} % ({top5} of {NUM_IMAGES})"
    )


def test_labels_of_a_volo_checkpoint(images, volo, tmp_path, capsys):
    assert run_generation(options(images, tmp_path / "labels", "volo_nano", volo, top_k=3)) == DONE
    out = capsys.readouterr().out
    model = create_model("volo_nano", img_size=32, num_classes=8, **ARCHITECTURE, stem_hidden_dim=8).eval()
    load_checkpoint(model, volo, use_ema=True)

    def tokens(batch):
        return model.aux_head(model.forward_features(batch)[:, 1:]).reshape(4, 4, 8)

    labels, right = expected_labels(
        model, tokens, images, lambda w, h: (32, 32), Image.Resampling.BILINEAR, MEAN, STD, k=3
    )
    store = TokenLabelStore(tmp_path / "labels")
    assert_labels(store, labels)
    assert_accuracy(out, right)
    header = store.header
    assert (header.covers, header.top_k, header.classes, header.entries) == ("whole_image", 3, CLASSES, NUM_IMAGES)
    assert header.teacher.startswith("volo_nano, weights ")
    assert [path.name for path in tmp_path.iterdir()] == ["labels"]


def test_labels_of_a_cnn_have_the_aspect_ratio_of_their_image(images, cnn, tmp_path, capsys):
    assert run_generation(options(images, tmp_path / "labels", "timm:test_resnet", cnn, img_size=96, top_k=5)) == DONE
    model = timm.create_model("test_resnet", num_classes=8).eval()
    model.load_state_dict(torch.load(cnn))
    inputs = {(40, 30): (96, 96), (30, 40): (96, 96), (36, 36): (96, 96), (64, 24): (160, 64)}

    def tokens(batch):
        return model.fc(model.forward_features(batch).permute(0, 2, 3, 1))[0]

    labels, right = expected_labels(
        model,
        tokens,
        images,
        lambda *size: inputs[size],
        Image.Resampling[model.pretrained_cfg["interpolation"].upper()],
        model.pretrained_cfg["mean"],
        model.pretrained_cfg["std"],
        k=5,
    )
    store = TokenLabelStore(tmp_path / "labels")
    assert_labels(store, labels)
    assert_accuracy(capsys.readouterr().out, right)
    assert [store.key(i) for i in range(NUM_IMAGES)] == sorted(labels)
    assert Counter(store.read(i).scores.shape for i in range(NUM_IMAGES)) == {(5, 3, 3): 24, (5, 2, 5): 8}


class Colours(nn.Module):
    """A classifier that predicts the brightest channel; a cell is the mean of 8 x 8 pixels."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward_features(self, images):
        return self.scale * nn.functional.avg_pool2d(images, 8)

    def forward_head(self, features):
        return features.mean((2, 3))


@pytest.mark.parametrize("keeps_aspect", [True, False])
@pytest.mark.parametrize("covers", ["whole_image", "center_crop"])
def test_rows_and_columns_of_the_map_match_the_image(keeps_aspect, covers, tmp_path):
    """Left red, right blue; top green, bottom blue: each cell predicts the colour at its place."""
    pixels = np.zeros((2, 50, 100, 3), dtype=np.uint8)
    pixels[0, :, :50, 0] = pixels[0, :, 50:, 2] = 255
    pixels[1, :25, :, 1] = pixels[1, 25:, :, 2] = 255
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    Image.fromarray(pixels[0]).save(tmp_path / "a/sides.png")
    Image.fromarray(pixels[1]).save(tmp_path / "b/halves.png")
    records = scan_class_folders(str(tmp_path), ("a", "b"))
    given = TeacherInput((32, 32), keeps_aspect, 8, "bicubic")
    teacher = Teacher("colours", Colours(), timm_logits, 3, given, (0, 0, 0), (1, 1, 1))
    labeller = Labeller(teacher, records, torch.device("cpu"), torch.no_grad, 1, 2, "fail")
    chunks, _ = read_chunks(records, [range(2)], given, covers=covers, exif="ignore", workers=0)
    (_, sides), (_, halves) = labeller.block(chunks).labels

    rows, cols = (3, 6) if keeps_aspect and covers == "whole_image" else (4, 4)
    assert sides.classes.shape == (1, rows, cols)
    np.testing.assert_array_equal(sides.classes[0], [[0] * (cols // 2) + [2] * (cols // 2)] * rows)
    assert (halves.classes[0, : rows // 2] == 1).all()
    assert (halves.classes[0, (rows + 1) // 2 :] == 2).all()
    np.testing.assert_allclose(sides.scores[0, :, 0], 10, atol=0.1)


def test_published_format_holds_the_same_labels(images, volo, tmp_path):
    for layout in ("packed", "published"):
        given = options(images, tmp_path / layout, "volo_nano", volo, format=layout, covers="center_crop")
        assert run_generation(given) == DONE
    tensor = torch.load(tmp_path / "published" / CLASSES[0] / "0.pt")  # the image is called 0.v1.png
    assert tensor.dtype == torch.float16 and tensor.shape == (2, 5, 4, 4)
    packed, published = TokenLabelStore(tmp_path / "packed"), PublishedLabels(tmp_path / "published")
    assert packed.header.covers == "center_crop"
    keys = [packed.key(entry) for entry in range(len(packed))]
    for entry, other in enumerate(published.find(keys)):
        for a, b in zip(packed.read(entry), published.read(other), strict=True):
            np.testing.assert_array_equal(a, b)


def test_image_orientation_is_recorded(images, cnn, tmp_path, capsys):
    for layout in ("packed", "published"):
        given = options(images, tmp_path / layout, "timm:test_resnet", cnn, img_size=64, exif="apply", format=layout)
        assert run_generation(given) == DONE
    assert TokenLabelStore(tmp_path / "packed").header.exif == "apply"
    # A folder of files cannot say it; who packs it can.
    assert (
        f"pack_token_labels.py --source {tmp_path / 'published'} --covers whole_image --exif apply\n"
        in capsys.readouterr().out
    )


def test_size_and_class_count_of_a_bare_volo_file_are_taken_from_it(images, tmp_path):
    model = create_model("volo_nano", img_size=(48, 32), num_classes=8)
    torch.save({"module." + key: value for key, value in model.state_dict().items()}, tmp_path / "bare.pth")
    given = options(images, tmp_path / "labels", "volo_nano", tmp_path / "bare.pth", top_k=1)
    assert run_generation(given) == DONE
    assert TokenLabelStore(tmp_path / "labels").read(0).scores.shape == (1, 6, 4)


# ---------------------------------------------------------------------------------------- interruptions, processes


@pytest.fixture(scope="module")
def uninterrupted(images, cnn, tmp_path_factory) -> dict[str, bytes]:
    """The store of one uninterrupted process."""
    output = tmp_path_factory.mktemp("uninterrupted") / "labels"
    assert run_generation(options(images, output, "timm:test_resnet", cnn)) == DONE
    return content(output)


def test_labels_of_an_archive_are_those_of_the_folder(images, cnn, uninterrupted, tmp_path):
    archive = formats.write_tar_of_tars(tmp_path / "train.tar", formats.files_of(images), tmp_path)
    assert run_generation(options(archive, tmp_path / "labels", "timm:test_resnet", cnn)) == DONE
    assert content(tmp_path / "labels") == uninterrupted


class Held:
    """The images, with a pipe in place of the 17th, at which a run waits in the third block of seven."""

    def __init__(self, images: Path, root: Path):
        self.root = root
        for path in images.glob("*/*"):
            place = root / path.relative_to(images)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(path)
        self.image = images / CLASSES[4] / "0.v1.png"
        self.pipe = root / CLASSES[4] / "0.v1.png"
        self.pipe.unlink()
        os.mkfifo(self.pipe)

    def send(self, signum: int, process: int) -> None:
        """Send a signal to the process when it reads the pipe; then close the pipe."""
        end = None
        while end is None:
            os.kill(process, 0)  # raises if it has ended
            with contextlib.suppress(OSError):  # nobody has opened the pipe for reading yet
                end = os.open(self.pipe, os.O_WRONLY | os.O_NONBLOCK)
            os.sched_yield()
        os.kill(process, signum)
        os.close(end)

    def restore(self) -> None:
        self.pipe.unlink()
        self.pipe.symlink_to(self.image)


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, STOPPED)])
def test_a_run_resumes_after_a_signal_with_the_same_store(signum, code, images, cnn, uninterrupted, tmp_path, capsys):
    held = Held(images, tmp_path / "held")
    given = options(held.root, tmp_path / "labels", "timm:test_resnet", cnn)
    started = programs.start(GENERATE, *words(given), cwd=tmp_path, waits_for_pipes=True)
    held.send(signum, started.pids[0])
    (ended,) = started.finish()
    assert ended.code == code, ended.err
    assert not (tmp_path / "labels").exists()
    blocks = [path.name for path in (tmp_path / "labels.parts").glob("block*")]
    assert sorted(blocks) == ["block-000000.npz", "block-000001.npz"]

    held.restore()
    assert run_generation(given) == DONE
    out = capsys.readouterr().out
    assert "2 of 5 blocks are done" in out
    assert f"labels  step {NUM_IMAGES - 14}/{NUM_IMAGES - 14} " in out
    assert content(tmp_path / "labels") == uninterrupted
    assert not (tmp_path / "labels.parts").exists()


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_and_one_resumes(images, cnn, uninterrupted, tmp_path, capsys):
    held = Held(images, tmp_path / "held")
    given = options(held.root, tmp_path / "labels", "timm:test_resnet", cnn)
    started = programs.start(GENERATE, *words(given), cwd=tmp_path, waits_for_pipes=True, ranks=2)
    held.send(signal.SIGTERM, started.pids[0])
    ended = started.finish()
    assert [process.code for process in ended] == [STOPPED, STOPPED], ended
    assert not (tmp_path / "labels").exists()
    held.restore()
    assert run_generation(given) == DONE
    assert "3 of 5 blocks are done" in capsys.readouterr().out  # one of the first process, two of the second
    assert content(tmp_path / "labels") == uninterrupted


@pytest.mark.slow
def test_two_processes_make_the_same_store(images, cnn, uninterrupted, tmp_path):
    command = words(options(images, tmp_path / "labels", "timm:test_resnet", cnn, workers=1))
    main, other = programs.start(GENERATE, *command, cwd=tmp_path, ranks=2).finish()
    main.assert_done()
    other.assert_done()
    assert content(tmp_path / "labels") == uninterrupted
    assert "top-1 " in main.out and f" of {NUM_IMAGES})" in main.out.splitlines()[-1]
    assert other.out == ""


def test_a_full_disk_is_reported_and_the_run_can_be_resumed(images, cnn, tmp_path):
    given = options(images, tmp_path / "labels", "timm:test_resnet", cnn, img_size=320)
    full = programs.run(GENERATE, *words(given), cwd=tmp_path, largest_file=4000)
    full.assert_failed(FAILED, "disk is full")
    assert (tmp_path / "labels.parts").exists() and not (tmp_path / "labels").exists()
    assert run_generation(given) == DONE


def test_blocks_of_other_options_weights_or_images_are_not_mixed(images, cnn, tmp_path):
    given = options(images, tmp_path / "labels", "timm:test_resnet", cnn)
    _leave_parts(given, tmp_path)
    fewer = tmp_path / "fewer"
    for name in CLASSES:
        (fewer / name).mkdir(parents=True)
        (fewer / name / "one.png").symlink_to(images / name / "0.v1.png")
    changes = {
        "covers": {"covers": "center_crop"},
        "top_k": {"top_k": 4},
        "img_size": {"img_size": 128},
        "exif": {"exif": "apply"},
        "precision": {"precision": "bf16"},
        "weights": {"teacher_checkpoint": None, "random_weights": True},
        "list of images": {"images": str(fewer)},
    }
    for name, change in changes.items():
        with pytest.raises(UsageError, match=f"other options: {name} was"):
            run_generation(replace(given, **change))
    assert len(BlockFolder(tmp_path / "labels.parts", NUM_IMAGES, 7, 5).remaining()) == 4


def _leave_parts(given: GenerateOptions, place: Path) -> None:
    """Leave one of five blocks, as a run does that was stopped in the middle; its finished labels go to "done"."""
    assert run_generation(given) == DONE
    (place / "labels").rename(place / "done")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockFolder, "write", _first_block_only(BlockFolder.write))
        with pytest.raises(KeyboardInterrupt):
            run_generation(given)


def _first_block_only(write):
    def writing(self, number, block):
        if number:
            raise KeyboardInterrupt
        write(self, number, block)

    return writing


def test_a_damaged_block_is_named_and_made_again(images, cnn, tmp_path):
    given = options(images, tmp_path / "labels", "timm:test_resnet", cnn)
    _leave_parts(given, tmp_path)
    block = tmp_path / "labels.parts" / "block-000000.npz"
    data = bytearray(block.read_bytes())
    data[100] ^= 1
    block.write_bytes(data)
    with pytest.raises(ValueError, match=r"block-000000\.npz is damaged"):
        run_generation(given)
    assert not (tmp_path / "labels").exists()
    block.unlink()
    assert run_generation(given) == DONE
    assert content(tmp_path / "labels") == content(tmp_path / "done")


# ------------------------------------------------------------------------------------------------------ bad images


@pytest.fixture
def broken_images(images, tmp_path) -> Path:
    root = tmp_path / "broken"
    for name in CLASSES:
        (root / name).mkdir(parents=True)
        (root / name / "good.png").symlink_to(images / name / "0.v1.png")
    for name in CLASSES[2:4]:
        (root / name / "bad.png").write_bytes(b"not an image")
    return root


def test_an_unreadable_image_is_an_error_or_is_skipped_and_listed(broken_images, volo, tmp_path, capsys):
    given = options(broken_images, tmp_path / "labels", "volo_nano", volo)
    with pytest.raises(ValueError, match=r"class_2/bad\.png.*--on_error skip"):
        run_generation(given)
    capsys.readouterr()
    given = options(broken_images, tmp_path / "labels", "volo_nano", volo, on_error="skip")
    assert run_generation(given) == DONE
    out = capsys.readouterr().out
    assert "2 images are unreadable" in out
    assert out.splitlines()[-1].endswith(" of 8)")
    listed = (tmp_path / "labels.skipped.txt").read_text().splitlines()
    assert [re.search(r"class_\d/bad\.png", line)[0] for line in listed] == ["class_2/bad.png", "class_3/bad.png"]
    keys = [label_key(f"{name}/{file}.png") for name in CLASSES[2:4] for file in ("good", "bad")]
    assert (TokenLabelStore(tmp_path / "labels").find(keys) >= 0).tolist() == [True, False, True, False]


def test_scores_that_are_not_finite_are_named(images, tmp_path):
    model = timm.create_model("test_resnet", num_classes=8)
    with torch.no_grad():
        model.fc.bias[3] = 70000  # beyond float16
    torch.save(model.state_dict(), tmp_path / "large.pth")
    with pytest.raises(ValueError, match=r"scores of class_0/0\.v1\.png are not finite"):
        run_generation(options(images, tmp_path / "labels", "timm:test_resnet", tmp_path / "large.pth"))


# ----------------------------------------------------------------------------------------------------- wrong usage


def test_wrong_options_end_with_code_2_and_the_reason(images, cnn, tmp_path):
    def refused(*messages: str, **change) -> None:
        given = vars(options(images, tmp_path / "labels", "timm:test_resnet", cnn)) | change
        command = [w for k, v in given.items() if v is not None for w in (f"--{k}", str(v))]
        programs.run(GENERATE, *command, cwd=tmp_path).assert_failed(USAGE, *messages)
        assert not (tmp_path / "labels.parts").exists()

    refused("covers", "hole_image", covers="hole_image")
    refused("--geometry", "now called covers", geometry="reference")
    refused("--top_k is 9", "8 classes", top_k=9)


def test_wrong_numbers_are_refused_by_name(images, cnn, tmp_path):
    for name, value in {"top_k": 0, "batch_size": 0, "block_size": 0, "workers": -1, "img_size": 0}.items():
        with pytest.raises(ValueError, match=f"--{name} is {value}"):
            options(images, tmp_path / "labels", "timm:test_resnet", cnn, **{name: value})
    with pytest.raises(ValueError, match="exclude each other"):
        options(images, tmp_path / "labels", "timm:test_resnet", cnn, random_weights=True)
    with pytest.raises(ValueError, match="--teacher volo_d1 .*--teacher_checkpoint"):
        options(images, tmp_path / "labels", "volo_d1", None)


REFUSED = {
    "missing images": ({"images": "/no/such"}, "--images is '/no/such'"),
    "missing checkpoint": ({"teacher_checkpoint": "/no/such"}, "--teacher_checkpoint is '/no/such'"),
    "class list": ({"class_list": "/no/such"}, "--class_list is '/no/such'"),
    "imagenet classes": ({"class_list": "imagenet"}, "8 of 8 folders"),
    "misspelt timm name": ({"teacher": "timm:test_resnut"}, "did you mean test_resnet"),
    "misspelt tag": ({"teacher": "timm:test_resnet.r160"}, "Invalid pretrained tag (r160)"),
    "unknown teacher": ({"teacher": "test_resnet"}, "give timm:NAME"),
    "other weights": ({"teacher": "timm:test_vit"}, "weights.pth does not fit"),
    "no EMA": ({"weights": "ema"}, "no EMA weights"),
    "small": ({"img_size": 32}, "one cell"),
}


def test_pretrained_weights_that_cannot_be_downloaded_are_not_wrong_usage(images, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(WeightsNotFetched, match="timm:test_resnet .*--teacher_checkpoint FILE"):
        run_generation(options(images, tmp_path / "labels", "timm:test_resnet", None))


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_invalid_options_are_refused_before_any_work(change, message, images, cnn, tmp_path):
    given = vars(options(images, tmp_path / "labels", "timm:test_resnet", cnn)) | change
    with pytest.raises(UsageError, match=re.escape(message)):
        run_generation(GenerateOptions(**given))
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_of_other_classes_is_refused(images, volo, cnn, tmp_path):
    fewer = tmp_path / "classes.txt"
    fewer.write_text("\n".join((*CLASSES, "ninth")))
    for teacher, path in (("volo_nano", volo), ("timm:test_resnet", cnn)):
        with pytest.raises(UsageError, match="has 8 classes, .* has 9"):
            run_generation(options(images, tmp_path / "labels", teacher, path, class_list=str(fewer)))
    fewer.write_text("\n".join(reversed(CLASSES)))
    with pytest.raises(UsageError, match="class 0 is 'class_0' in .*best.pt .*'class_7'"):
        run_generation(options(images, tmp_path / "labels", "volo_nano", volo, class_list=str(fewer)))
    with pytest.raises(UsageError, match="is a volo_nano; give --teacher volo_nano"):
        run_generation(options(images, tmp_path / "labels", "volo_tiny", volo))


def test_an_existing_output_is_not_touched(images, cnn, tmp_path):
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "mine").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        run_generation(options(images, tmp_path / "labels", "timm:test_resnet", cnn))
    (tmp_path / "other.parts").mkdir()
    (tmp_path / "other.parts" / "mine").write_text("mine")
    with pytest.raises(UsageError, match="other.parts exists"):
        run_generation(options(images, tmp_path / "other", "timm:test_resnet", cnn))
    assert (tmp_path / "labels/mine").exists() and (tmp_path / "other.parts/mine").exists()


@pytest.mark.parametrize("name", ["../../x", "/proc/x", "a/../../../x"])
def test_label_files_stay_in_the_output(name, tmp_path, cnn):
    """A class out of a .cls file is the folder of an image in flat shards."""
    files = {f"{i}.jpg": b"image" for i in range(2)} | {"0.cls": name.encode(), "1.cls": b"other"}
    formats.write_tar(tmp_path / "all.tar", files)
    (tmp_path / "classes.txt").write_text(f"{name}\nother\n")
    given = options(
        *(tmp_path / "all.tar", tmp_path / "labels", "timm:test_resnet", cnn),
        **{"format": "published", "class_list": str(tmp_path / "classes.txt")},
    )
    with pytest.raises(UsageError, match="all.tar: .* may lead out of its folder"):
        run_generation(given)
    assert not (tmp_path / "labels").exists()


def test_two_images_that_would_share_a_label_are_refused(images, cnn, tmp_path):
    for name in CLASSES:
        (tmp_path / "twins" / name).mkdir(parents=True)
        (tmp_path / "twins" / name / "a.x.png").symlink_to(images / name / "0.v1.png")
    (tmp_path / "twins" / CLASSES[1] / "a.y.jpg").symlink_to(images / CLASSES[1] / "1.v1.png")
    given = options(tmp_path / "twins", tmp_path / "labels", "timm:test_resnet", cnn, format="published")
    with pytest.raises(UsageError, match=r"class_1/a\.x\.png and class_1/a\.y\.jpg would both be called 'class_1/a'"):
        run_generation(given)
    given = options(tmp_path / "twins", tmp_path / "labels", "timm:test_resnet", cnn)
    assert run_generation(given) == DONE
