"""A training step never waits for the device.

Run on PyTorch's meta device, whose tensors have shapes and no values: whatever asks a device tensor for its values
(item, nonzero, a boolean mask as index, a copy to the host) cannot run there. On a GPU it would run, and wait.
"""

import pytest
import torch

from volo.build import make_network
from volo.config import Config
from volo.engine.batch_layout import BatchLayout
from volo.engine.learner import Learner
from volo.runtime.distributed import World
from volo.token_labels.published import PublishedMaps

META = torch.device("meta")


@pytest.fixture
def generators_of_the_host(monkeypatch):
    """The meta device has no generators; use the host's."""
    make = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": make())


@pytest.mark.parametrize("ask", [lambda x: x[0].item(), lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: x.cpu()])
def test_the_meta_device_tells(ask):
    with pytest.raises((RuntimeError, NotImplementedError)):
        ask(torch.ones(3, device=META))


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"mix": {"mixup": 0.8, "cutmix": 1.0, "mode": "elem"}, "optim": {"name": "momentum", "clip_grad": 1.0}},
        {"mix": {"cutmix": 1.0, "mix_token": False}, "optim": {"name": "lamb", "clip_grad": 0.1, "clip_mode": "value"}},
        {"token_label": {"root": "labels", "ground_truth": "published", "smoothing": "published"}},
        {"token_label": {"root": "labels"}, "mix": {"mixup": 0.8, "mode": "pair"}},
        {"token_label": {"root": "labels", "geometry": "published"}, "augment": {"order": "published"}},
        {"train": {"batch_size": 8, "device_batch_size": 4, "channels_last": True, "recompute": "blocks"}},
        {"ema": {"enabled": True}, "optim": {"name": "momentum", "clip_grad": 0.1, "clip_mode": "agc"}},
    ],
)
def test_a_step_waits_for_nothing(sections, tiny_config, make_batch, make_label_maps, generators_of_the_host):
    # Fused AdamW has no code for this device.
    sections = {"optim": {"name": "momentum"}, "model": {"drop_path_rate": 0.2}} | sections
    config: Config = tiny_config(**sections)
    learner = Learner(
        config, World(0, 1, 0, META), BatchLayout.of(config, 1), make_network(config, World(0, 1, 0, META))
    )
    learner.wrapped.train()
    size = learner.layout.micro_size
    batch = make_batch(size)
    batch.erase_boxes.zero_()  # erasing fills boxes with a generator of the device
    if config.token_label.geometry == "published":
        boxes = torch.tensor([[0.5, 1.0, 3.0, 2.0]]).expand(size, 4)
        batch.sidecar = PublishedMaps(torch.rand(size, 2, 4, 5), torch.zeros(size, 2, 4, 5).long(), boxes)
    elif config.token_label.root:
        batch.sidecar = make_label_maps(size, learner.grid[0] * learner.grid[1])
    for step in range(3):
        for micro in range(learner.layout.micro_batches):
            loss = learner.forward_backward(batch, 0, step, micro).total
        norm = learner.optimizer_step(1e-3, step)
    assert (loss.device, norm.device) == (META, META)
