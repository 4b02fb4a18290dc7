"""Models by name."""

from pathlib import Path

from volo.models.architecture import ImageSize, get_architecture
from volo.models.volo import VOLO
from volo.models.weights import load_checkpoint


def create_model(
    name: str,
    *,
    img_size: ImageSize = 224,
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
    checkpoint: str | Path | None = None,
    **architecture,
) -> VOLO:
    """Return a VOLO with fresh weights, or with those of a checkpoint (arXiv 2106.13112, table 2).

    Args:
        name: One of ``list_models()``.
        img_size: Image side in pixels, or (height, width); for D1 ... D5 divisible by 16.
        num_classes: Number of classes.
        in_chans: Channels of an image.
        drop_path_rate: Stochastic depth of the last block, in [0, 1).
        checkpoint: File to load with ``load_checkpoint``.
        architecture: Any field of ``Architecture``, which overrides the named architecture's.

    Raises:
        ValueError: Unknown name or field (with the nearest valid one), impossible sizes, or a checkpoint that
            does not fit.
    """
    model = VOLO(
        get_architecture(name, **architecture),
        img_size=img_size,
        num_classes=num_classes,
        in_chans=in_chans,
        drop_path_rate=drop_path_rate,
    )
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model
