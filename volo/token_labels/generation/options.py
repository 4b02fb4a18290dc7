"""The options of scripts/generate_token_labels.py; nothing heavy is imported here, so that --help answers at once."""

from dataclasses import dataclass
from typing import Literal


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


@dataclass(frozen=True)
class GenerateOptions:
    """What to label, by which teacher, and where the labels go.

    Args:
        images: Folder with one folder of images per class, such as the train folder of ImageNet; or anything else that
            training reads: a tar archive, or shards ("train-{000..146}.tar", a folder of them, a URL).
        output: Store or folder to write. Finished blocks are kept in OUTPUT.parts until all are done.
        teacher: timm:NAME for a model of timm, or a model of this package (volo_d1 ... volo_d5, volo_tiny, volo_nano).
        teacher_checkpoint: Weights of the teacher; by default a timm teacher uses its pretrained weights.
        weights: Which weights of that file to use; "auto" uses those that the best checkpoint was chosen by if the
            file is from train.py, and otherwise "raw".
        random_weights: Use an untrained teacher, to try the command; its labels are meaningless.
        labels: Labels of images that are not sorted into classes, as data.train_labels of the training.
        class_list: Class names in index order: "folders" (sorted folders of images), "imagenet" (the 1,000 ILSVRC2012
            synsets) or a text file, one name per line.
        covers: "whole_image" resizes the whole image to the teacher's input, without a crop. A convolutional teacher
            sees the image in its own aspect ratio (up to 4:1), in about as many pixels as img_size has; a teacher with
            a fixed grid (VOLO, ViT) sees it squeezed to img_size. "center_crop" resizes the shorter side to img_size
            and takes the centre crop, as for the published labels.
        img_size: Side of the teacher's input in pixels, or [height, width]; by default that of its configuration
            (for timm its test size), or of the checkpoint.
        top_k: Number of classes kept per cell; the others count as scores of 0, so with few classes keep all.
        format: "packed" writes one memory-mapped store; "published" a folder of .pt files for the published code.
        batch_size: Images per forward pass of a process.
        block_size: Images between two saves of a process; up to this many are labelled again after a kill.
        workers: Number of processes that read images, per labelling process; by default one per core, up to 16.
        timeout_seconds: Longest wait for images from these processes (a network file system may hang forever); 0 for
            no limit.
        precision: Precision of the features; the classifier always computes in fp32. "auto" is bf16 on CUDA and fp32
            on the CPU.
        device: "auto" uses CUDA if there is a GPU.
        on_error: What to do with an unreadable image: "fail" names it and stops; "skip" lists it and gives it no label.
        exif: "ignore" orientation tags or "apply" them; as data.exif of the training.
        cache: Folder that keeps listings and indices, as data.cache of the training.
    """

    images: str
    output: str
    teacher: str
    teacher_checkpoint: str | None = None
    weights: Literal["auto", "raw", "ema"] = "auto"
    random_weights: bool = False
    labels: str | None = None
    class_list: str = "folders"
    covers: Literal["whole_image", "center_crop"] = "whole_image"
    img_size: int | list[int] | None = None
    top_k: int = 5
    format: Literal["packed", "published"] = "packed"
    batch_size: int = 64
    block_size: int = 1024
    workers: int | None = None
    timeout_seconds: float = 600.0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    on_error: Literal["fail", "skip"] = "fail"
    exif: Literal["ignore", "apply"] = "ignore"
    cache: str = "auto"

    def __post_init__(self):
        for name in ("top_k", "batch_size", "block_size"):
            _require(getattr(self, name) >= 1, f"--{name} is {getattr(self, name)}; it should be 1 or more")
        _require(self.workers is None or self.workers >= 0, f"--workers is {self.workers}; it should be 0 or more")
        _require(self.timeout_seconds >= 0, f"--timeout_seconds is {self.timeout_seconds}; it should be 0 or more")
        sides = [self.img_size] if isinstance(self.img_size, int) else self.img_size or [1]
        _require(
            len(sides) <= 2 and min(sides) >= 1,
            f"--img_size is {self.img_size}; give a side in pixels or [height,width]",
        )
        _require(
            not (self.random_weights and self.teacher_checkpoint),
            "--random_weights and --teacher_checkpoint exclude each other; give one of them",
        )
        _require(
            self.teacher.startswith("timm:") or self.random_weights or self.teacher_checkpoint is not None,
            f"--teacher {self.teacher} has no weights. Give --teacher_checkpoint FILE, or a teacher of timm with "
            "pretrained weights (--teacher timm:NAME)",
        )

    @property
    def image_hw(self) -> tuple[int, int] | None:
        """Height and width of ``img_size``, or None."""
        if self.img_size is None:
            return None
        sides = [self.img_size] if isinstance(self.img_size, int) else self.img_size
        return sides[0], sides[-1]
