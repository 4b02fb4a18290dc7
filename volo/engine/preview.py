"""A picture of a training batch as the network gets it, for scripts/show_batch.py and the start of every run."""

import torch
from timm.data.imagenet_info import ImageNetInfo

from volo.data.loader import TrainLoader
from volo.data.sources.records import imagenet_classes
from volo.engine.learner import Learner
from volo.reporting.batch_picture import TokenView, draw_batch
from volo.token_labels.targets import Targets


def batch_picture(
    learner: Learner, loader: TrainLoader, class_names: tuple[str, ...], epoch: int, step: int, most: int = 4
) -> bytes | None:
    """Return a PNG of the first ``most`` images of a step, as the network gets them, with their token labels.

    Mixing is drawn for these images alone. Returns None if too few of them can be read; the step itself reports them.
    """
    if learner.config.mix.mixes_images:
        most -= most % 2  # images mix in pairs
    batch = loader.first_images(epoch, step, most)
    if len(batch) == 0 or (learner.config.mix.mixes_images and len(batch) % 2):
        return None
    inputs = learner.inputs(batch, epoch, step, micro=0)
    augment = learner.config.augment
    scale, offset = (torch.tensor(values).view(3, 1, 1) for values in (augment.std, augment.mean))
    images = (inputs.images.cpu().float() * scale + offset).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    names = readable_names(class_names)
    tokens = token_view(inputs.targets, learner.grid) if inputs.targets.num_tokens else None
    box = inputs.mix_box.tolist() if inputs.mix_box is not None else None
    return draw_batch(images, [names[label] for label in batch.labels.tolist()], names, tokens, box)


def token_view(targets: Targets, grid: tuple[int, int]) -> TokenView:
    """Return each token's most likely class, its probability, and whether the token covers part of the image."""
    shares, classes = targets.to_dense()[:, :, 2:].cpu().max(1)  # [B, N] each
    seen = targets.seen()
    assert seen is not None  # there are token targets
    return TokenView(classes.numpy(), shares.numpy(), seen.cpu().numpy(), grid)


def readable_names(class_names: tuple[str, ...]) -> list[str]:
    """Return the class names, with words for the synsets of ImageNet."""
    if not set(class_names) <= set(imagenet_classes()):
        return list(class_names)
    info = ImageNetInfo()
    return [info.label_name_to_description(name).split(",")[0] for name in class_names]
