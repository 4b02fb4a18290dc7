"""Training steps with train.compile: one graph each for network and loss, compiled once, in the first step."""

import functools
from dataclasses import replace

import pytest
import torch
from processes import run_group
from torch._dynamo.utils import counters

from volo.build import make_network
from volo.config import Config
from volo.data.dataset import Batch
from volo.engine.batch_layout import BatchLayout
from volo.engine.learner import Learner
from volo.runtime.distributed import World
from volo.token_labels.published import PublishedMaps


def published_maps(images: int) -> PublishedMaps:
    """Random label maps, each with its own crop box."""
    corners = torch.rand(images, 4).sort(dim=1).values * 3
    return PublishedMaps(torch.rand(images, 2, 3, 3), torch.randint(3, (images, 2, 3, 3)), corners)


@pytest.mark.slow
@pytest.mark.parametrize("geometry", ["aligned", "published"])
def test_many_steps_compile_once(tiny_config, make_batch, make_label_maps, geometry):
    """Boxes of MixToken and MixUp change from step to step, as does the number of classes per token."""
    torch._dynamo.reset()
    sections = {
        "mix": {"mixup": 0.8, "cutmix": 1.0},
        "token_label": {"root": "labels", "ground_truth": "published", "geometry": geometry},
        "augment": {"order": "published"} if geometry == "published" else {},
        "optim": {"name": "momentum"},
    }
    learners = {}
    for compiled in (True, False):
        config = tiny_config(**sections, train={"compile": compiled, "batch_size": 6})
        learners[compiled] = Learner(
            config,
            World(0, 1, 0, torch.device("cpu")),
            BatchLayout.of(config, 1),
            make_network(config, World(0, 1, 0, torch.device("cpu"))),
        )
        learners[compiled].wrapped.train()
    counters.clear()  # of the trial of the compiler
    for step in range(9):
        batch = make_batch(6, step)
        per_token = (2, 3, 5)[step % 3]  # no size by chance like another
        maps = make_label_maps(6, 16, per_token) if geometry == "aligned" else published_maps(6)
        batch.sidecar = maps
        losses = {name: learner.forward_backward(batch, 0, step, 0).total for name, learner in learners.items()}
        for learner in learners.values():
            learner.optimizer_step(1e-3, step)
        torch.testing.assert_close(losses[True], losses[False], rtol=1e-4, atol=1e-5)
        assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"], dict(counters["graph_break"])


def steps_of_two_processes(rank: int, size: int, config: Config, batches: list[Batch]) -> dict:
    """Losses of compiled and eager steps, and the graphs that there were after each step."""
    # What the tracer accepts is in question, not what inductor makes of it, for which one process is enough.
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    world, layout = World(rank, size, rank, torch.device("cpu")), BatchLayout.of(config, size)
    losses, graphs, of_ema, breaks = {}, [], [], {}
    for compiled in (True, False):
        chosen = replace(config, train=replace(config.train, compile=compiled))
        learner = Learner(chosen, world, layout, make_network(chosen, world))
        learner.wrapped.train()
        counters.clear()  # of the trial of the compiler
        losses[compiled] = []
        for step, batch in enumerate(batches):
            for micro in range(layout.micro_batches):
                losses[compiled].append(learner.forward_backward(batch, 0, step, micro).total.item())
            learner.optimizer_step(1e-3, step)
            graphs.append(counters["stats"]["unique_graphs"])
        breaks |= counters["graph_break"]
        assert learner.ema is not None
        counters.clear()
        with torch.no_grad():
            learner.ema.module.eval()(learner.inputs(batches[0], 0, 0, 0).images)
        of_ema.append(counters["stats"]["unique_graphs"])
    return {"losses": losses, "graphs": graphs, "ema": of_ema, "breaks": breaks}


@pytest.mark.slow
@pytest.mark.parametrize("passes", [1, 2])
def test_many_steps_of_two_processes_compile_once(tiny_config, make_batch, make_label_maps, passes):
    config = tiny_config(
        mix={"mixup": 0.8, "cutmix": 1.0},
        token_label={"root": "labels", "ground_truth": "published"},
        optim={"name": "momentum"},
        ema={"enabled": True, "decay": 0.9},
        train={"batch_size": 12 * passes, "device_batch_size": 6},
    )
    batches = [make_batch(6, seed) for seed in range(6)]
    for step, batch in enumerate(batches):
        batch.sidecar = make_label_maps(6, 16, (5, 7, 11)[step % 3])  # no size by chance like another
    for result in run_group(steps_of_two_processes, config, batches)[2]:
        assert result["losses"][True] == pytest.approx(result["losses"][False], rel=1e-4)
        assert not result["breaks"]
        assert result["ema"] == [1, 0], "its evaluation is compiled, too"
        assert result["graphs"] == [2] * 6 + [0] * 6  # of network and loss; none without the compiler
