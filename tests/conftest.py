"""Small configs, image folders and batches that several tests share."""

import signal
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from volo.config import Config
from volo.data.dataset import Batch
from volo.token_labels.aligned import AlignedMaps

# The tensors of most tests are too small to share: on a busy machine a second thread is mostly waited for.
torch.set_num_threads(1)

# A shell starts what it puts into the background with SIGINT ignored, nohup with SIGHUP ignored, and programs inherit
# that: the tests that send these signals would wait for ever.
for _signum in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(_signum) == signal.SIG_IGN:
        signal.signal(_signum, signal.default_int_handler if _signum == signal.SIGINT else signal.SIG_DFL)

# One block a stage on 8 x 8 and 4 x 4 cells, 51,000 parameters: a step takes a few milliseconds.
TINY_MODEL = {
    "name": "volo_nano",
    "img_size": 32,
    "num_classes": 3,
    "layers": [1, 1, 1, 1],
    "embed_dims": [16, 32, 32, 32],
    "num_heads": [2, 2, 2, 2],
    "stem_hidden_dim": 8,
}


def tiny_config(**sections: dict) -> Config:
    """A config of a tiny network, with the options of ``sections`` set: tiny_config(optim={"lr": 1e-2})."""
    sections["model"] = TINY_MODEL | sections.get("model", {})
    sections["train"] = {"batch_size": 4, "device": "cpu", "precision": "fp32"} | sections.get("train", {})
    sections["data"] = {"cache": "none"} | sections.get("data", {})
    defaults = Config()
    return Config(**{name: type(getattr(defaults, name))(**options) for name, options in sections.items()})


def make_batch(size: int, seed: int = 0, side: int = 32, num_classes: int = 3) -> Batch:
    """A batch of noise, with an erase box in every other image."""
    rng = np.random.default_rng(seed)
    boxes = [(2, 3, 9, 12) if i % 2 else (0, 0, 0, 0) for i in range(size)]
    return Batch(
        images=torch.from_numpy(rng.integers(256, size=(size, 3, side, side), dtype=np.uint8)),
        labels=torch.from_numpy(rng.integers(num_classes, size=size)),
        erase_boxes=torch.tensor(boxes).reshape(size, 4),
        noise_seeds=torch.from_numpy(rng.integers(2**40, size=size)),
        indices=torch.arange(size),
        notes=torch.zeros(size, dtype=torch.int64),
        failures=[],
    )


def make_label_maps(images: int, tokens: int, per_token: int = 1, cells: int = 9, k: int = 2) -> AlignedMaps:
    """Label maps of noise, of which each token takes ``per_token`` cells."""
    return AlignedMaps(
        scores=torch.rand(images, k, cells),
        classes=torch.randint(3, (images, k, cells)),
        cells=torch.randint(cells, (images, tokens, per_token)),
        weights=torch.full((images, tokens, per_token), 1 / per_token),
        class_weights=torch.full((images, cells), 1 / cells),
        valid=torch.rand(images, tokens) > 0.1,
    )


@pytest.fixture(name="tiny_config", scope="session")
def tiny_config_fixture():
    return tiny_config


@pytest.fixture(name="make_batch", scope="session")
def make_batch_fixture():
    return make_batch


@pytest.fixture(name="make_label_maps", scope="session")
def make_label_maps_fixture():
    return make_label_maps


@pytest.fixture
def make_image_folder(tmp_path):
    """Return a function that writes ``counts[class name]`` noise images into a folder a class; gives its path."""

    def make(counts: dict[str, int], split: str = "train", side: int = 32) -> str:
        rng = np.random.default_rng(len(split))
        for class_name, count in counts.items():
            folder = tmp_path / split / class_name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(256, size=(side, side, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
        return str(tmp_path / split)

    return make


@pytest.fixture
def install_apex(tmp_path, monkeypatch):
    """Return a function that puts a package apex, of the given files, in front of any that is installed."""

    def forget() -> None:
        for module in [name for name in sys.modules if name.split(".")[0] == "apex"]:
            del sys.modules[module]

    def install(**files: str) -> None:
        package = tmp_path / "stand-in" / "apex"
        package.mkdir(parents=True)
        for name, text in {"__init__": "", **files}.items():
            (package / f"{name}.py").write_text(text)
        forget()
        monkeypatch.syspath_prepend(package.parent)

    yield install
    forget()
