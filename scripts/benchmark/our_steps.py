"""Optimizer steps of ours: whole, the network's passes alone, and with the loader in front."""

from collections.abc import Callable, Iterator

import torch
from networks import Network

from volo.build import make_network, make_train_loader
from volo.config import AugmentConfig, Config, DataConfig, EmaConfig, ModelConfig, TrainConfig
from volo.data.dataset import Batch
from volo.data.loader import TrainLoader
from volo.data.sources.records import ImageRecords
from volo.engine.batch_layout import BatchLayout
from volo.engine.learner import Learner
from volo.models.memory import summed
from volo.runtime.distributed import World


class OurSteps:
    """A learner as train.py has it, and its steps.

    Args:
        network: The network, and the size of its images and batch.
        device: Where it runs.
        recompute: train.recompute.
        channels_last: train.channels_last.
        compile: train.compile.
        workers: data.workers.
    """

    def __init__(
        self,
        network: Network,
        device: torch.device,
        recompute: str,
        channels_last: bool,
        compile: bool,
        workers: int | None = None,
    ):
        self.config = Config(
            model=ModelConfig(name=network.name, img_size=network.side, drop_path_rate=0.1),
            data=DataConfig(workers=workers),
            augment=AugmentConfig(),
            ema=EmaConfig(enabled=True),
            train=TrainConfig(
                device=device.type, batch_size=network.batch, device_batch_size=network.batch, recompute=recompute,
                channels_last=channels_last, compile=compile, precision="auto",
            ),
        )  # fmt: skip
        self.world = World(0, 1, 0, device)
        self.layout = BatchLayout.of(self.config, 1)
        self.learner = Learner(self.config, self.world, self.layout, make_network(self.config, self.world))
        self.learner.wrapped.train()
        self.batch = random_batch(network.batch, network.side)
        if device.type == "cuda":
            self.batch = self.batch.pin_memory()

    def whole(self, number: int) -> None:
        """Take the step of a batch that has been read: copy, normalise, erase, passes, loss, AdamW, EMA."""
        self._step(self.batch, number)

    def passes(self, number: int) -> None:
        """Run the network forward and backward, on images that are on the device."""
        if not hasattr(self, "_images"):
            self._images = self.learner.inputs(self.batch, 0, number, 0).images
        with self.learner.precision.autocast():
            output = self.learner.wrapped(self._images)
        summed(output).backward()
        self.learner.optimizer.zero_grad(set_to_none=True)

    def loaded(self, records: ImageRecords) -> Callable[[int], None]:
        """Return the step that reads its own batch of these images, augmented by data workers."""
        batches = self._epochs(make_train_loader(self.config, records, self.world, self.layout))
        return lambda number: self._step(next(batches), number)

    def _step(self, batch: Batch, number: int) -> None:
        self.learner.forward_backward(batch, 0, number, 0)
        self.learner.optimizer_step(1e-4, number)

    def _epochs(self, loader: TrainLoader) -> Iterator[Batch]:
        for epoch in range(self.config.schedule.total_epochs):
            yield from loader.epoch(epoch)


def random_batch(images: int, side: int) -> Batch:
    """Return a batch as the loader's workers make it, of random pixels; a quarter is erased, as published."""
    batch = Batch(
        images=torch.randint(256, (images, 3, side, side), dtype=torch.uint8),
        labels=torch.randint(1000, (images,)),
        erase_boxes=torch.zeros(images, 4, dtype=torch.int64),
        noise_seeds=torch.arange(images),
        indices=torch.arange(images),
        notes=torch.zeros(images, dtype=torch.int64),
        failures=[],
    )
    batch.erase_boxes[::4] = torch.tensor([side // 4, side // 4, side // 2, side // 2])
    return batch


def whole_step(network: Network, **options) -> Callable[[int], None]:
    """Return the whole step of a new learner; options as for :class:`OurSteps`."""
    return OurSteps(network, **options).whole
