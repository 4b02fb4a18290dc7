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
        images: Folder with one folder of images per class, such as the train folder of ImageNet; or what training reads
            instead: a tar archive, shards ("train-{000..146}.tar", a folder of them, a URL).
        output: Where the labels go. Finished blocks wait in OUTPUT.parts until all of them are there.
        teacher: timm:NAME for a model of timm, or one of our own (volo_d1 ... volo_d5, volo_tiny, volo_nano).
        teacher_checkpoint: Weights of the teacher; without it a timm teacher takes its pretrained weights.
        weights: Which weights of that file; auto takes those that chose the best checkpoint in files
            of train.py, raw in others.
        random_weights: Use an untrained teacher, to try the command; its labels say nothing.
        labels: Labels of images that are not sorted into classes, as data.train_labels of the training.
        class_list: Class names in index order: "folders" (sorted folders of images), "imagenet" (the 1,000 ILSVRC2012
            synsets) or a text file, one name per line.
        covers: "whole_image": the whole image is resized to the teacher's input, without a crop, so that the map
            covers what training takes it to cover. A convolutional teacher gets the image in its own aspect ratio
            (up to 4:1), in about as many pixels as img_size has; a teacher with a fixed grid (VOLO, ViT) gets it
            squeezed to img_size. "center_crop": shorter side to img_size, centre crop, as the published labels.
        img_size: Side of the teacher's input in pixels, or [height, width]; by default that of its configuration
            (for timm its test size), or of the checkpoint.
        top_k: Classes kept per cell.
        format: "packed" writes one memory-mapped store; "published" a folder of .pt files as the published code reads.
        batch_size: Images per forward pass of a process.
        block_size: Images between two saves of a process; as many may have to be labelled again after a kill.
        workers: Processes that read images, per process that labels; by default one per core, up to 8.
        timeout_seconds: Longest wait for images from these processes (a network file system may hang for ever); 0 for
            no limit.
        precision: Arithmetic of the features; the classifier is always in fp32. auto is bf16 on CUDA, fp32 on the CPU.
        device: auto takes CUDA if there is a GPU.
        on_error: An unreadable image: "fail" names it and stops; "skip" lists it, and it gets no label.
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
            _require(getattr(self, name) >= 1, f"--{name} is {getattr(self, name)}; at least 1")
        _require(self.workers is None or self.workers >= 0, f"--workers is {self.workers}; 0 or more")
        _require(self.timeout_seconds >= 0, f"--timeout_seconds is {self.timeout_seconds}; 0 or more")
        sides = [self.img_size] if isinstance(self.img_size, int) else self.img_size or [1]
        _require(
            len(sides) <= 2 and min(sides) >= 1,
            f"--img_size is {self.img_size}; give a side in pixels or [height,width]",
        )
        _require(
            not (self.random_weights and self.teacher_checkpoint),
            "--random_weights and --teacher_checkpoint exclude each other",
        )
        _require(
            self.teacher.startswith("timm:") or self.random_weights or self.teacher_checkpoint is not None,
            f"--teacher {self.teacher} needs its weights: give --teacher_checkpoint FILE (or a teacher of timm, "
            "--teacher timm:NAME, which can fetch its own)",
        )

    @property
    def image_hw(self) -> tuple[int, int] | None:
        """Height and width of ``img_size``, or None."""
        if self.img_size is None:
            return None
        sides = [self.img_size] if isinstance(self.img_size, int) else self.img_size
        return sides[0], sides[-1]
