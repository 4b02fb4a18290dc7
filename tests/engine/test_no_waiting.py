"""Training steps, evaluations and label generation never wait for the device.

Run on PyTorch's meta device, whose tensors have shapes and no values: whatever asks a device tensor for its values
(item, nonzero, a boolean mask as index, a copy to the host) cannot run there. On a GPU it would run, and wait. So would
a copy from the host that is not asked to be asynchronous, which :class:`NoBlockingCopies` refuses.
"""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from volo.build import make_network
from volo.config import Config
from volo.data.sources.folders import scan_class_folders
from volo.engine.batch_layout import BatchLayout
from volo.engine.evaluate import evaluate
from volo.engine.learner import Learner
from volo.runtime.distributed import World
from volo.token_labels.generation.labeller import Labeller
from volo.token_labels.generation.teacher import Teacher, timm_logits
from volo.token_labels.generation.teacher_input import TeacherInput, read_chunks
from volo.token_labels.published import PublishedMaps

META = torch.device("meta")


class BlockingCopy(Exception):
    """A copy from host to device was not asked to be asynchronous."""


class NoBlockingCopies(TorchDispatchMode):
    """Raises BlockingCopy for a copy between devices without ``non_blocking``."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default:
            source, target, asynchronous = args[0].device, kwargs.get("device"), kwargs.get("non_blocking", False)
        elif function is torch.ops.aten.copy_.default:
            source, target, asynchronous = args[1].device, args[0].device, (*args[2:], kwargs.get("non_blocking"))[0]
        else:
            return function(*args, **kwargs)
        if target is not None and torch.device(target) != source and not asynchronous:
            raise BlockingCopy(f"{function} from {source} to {target}")
        return function(*args, **kwargs)


@pytest.mark.parametrize(
    "copy",
    [
        lambda x: x.to(META),
        lambda x: torch.empty(3, device=META).copy_(x),
        lambda x: torch.empty(3, device=META).add_(x.to(META)),
    ],
)
def test_blocking_copies_are_noticed(copy):
    with pytest.raises(BlockingCopy), NoBlockingCopies():
        copy(torch.ones(3))
    with NoBlockingCopies():
        torch.ones(3).to(META, non_blocking=True)
        torch.empty(3, device=META).copy_(torch.ones(3), non_blocking=True)
        torch.ones(3).to(torch.float64)


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
    learner.inputs(batch, 0, 0, 0)  # copies constants to the device, once
    with NoBlockingCopies():
        for step in range(3):
            for micro in range(learner.layout.micro_batches):
                loss = learner.forward_backward(batch, 0, step, micro).total
            norm = learner.optimizer_step(1e-3, step)
    assert (loss.device, norm.device) == (META, META)


class _Logits(nn.Module):
    def forward(self, images):  # [B, 3, H, W]
        return images.flatten(1)[:, :7]


def test_an_evaluation_waits_only_at_its_end(make_batch, generators_of_the_host):
    batches, seen = [make_batch(3), make_batch(1), make_batch(3)], []
    for batch in batches:
        batch.erase_boxes.zero_()
    mean, std = [0.5] * 3, [0.2] * 3
    with pytest.raises(BlockingCopy, match="from meta to cpu"), NoBlockingCopies():  # of the sums
        evaluate(_Logits(), batches, META, mean, std, on_batch=lambda: seen.append(1))
    assert len(seen) == len(batches)


class _Teacher(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, device=META))

    def forward_features(self, images):  # [B, 3, H, W]
        return self.scale * nn.functional.avg_pool2d(images, 8)

    def forward_head(self, features):
        return features.mean((2, 3))


def test_label_generation_waits_only_at_the_end_of_a_block(make_image_folder):
    records, seen = scan_class_folders(make_image_folder({"a": 2, "b": 2, "c": 1}), ("a", "b", "c")), []
    given = TeacherInput((32, 32), True, 8, "bicubic")
    teacher = Teacher("own", _Teacher(), timm_logits, 3, given)
    chunks, _ = read_chunks(records, [range(5)], given, covers="center_crop", exif="ignore", workers=0)
    labeller = Labeller(teacher, records, META, torch.no_grad, 1, 2, "fail")
    with pytest.raises(BlockingCopy, match="from meta to cpu"), NoBlockingCopies():  # of the scores
        labeller.block(chunks, seen.append)
    assert seen == [2, 2, 1]
