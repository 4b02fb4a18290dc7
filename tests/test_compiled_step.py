"""Training steps with train.compile: one graph each for network and loss, made in the first step and never again."""

import torch
from torch._dynamo.utils import counters

from volo.distributed import World
from volo.prepare import BatchPlan
from volo.step import Learner


def test_many_steps_compile_once(tiny_config, make_batch, make_label_maps):
    """Boxes of MixToken and MixUp change from step to step, and so does the number of classes that a token lists."""
    torch._dynamo.reset()
    counters.clear()
    sections = {
        "mix": {"mixup": 0.8, "cutmix": 1.0},
        "token_label": {"root": "labels", "ground_truth": "published"},
        "optim": {"name": "momentum"},
    }
    learners = {}
    for compiled in (True, False):
        config = tiny_config(**sections, train={"compile": compiled, "batch_size": 6})
        learners[compiled] = Learner(config, World(0, 1, 0, torch.device("cpu")), BatchPlan.of(config, 1), None)
        learners[compiled].wrapped.train()
    for step in range(9):
        batch = make_batch(6, step)
        batch.token_labels = make_label_maps(6, 16, per_token=(2, 3, 5)[step % 3])  # no size by chance like another
        losses = {name: learner.forward_backward(batch, 0, step, 0).total for name, learner in learners.items()}
        for learner in learners.values():
            learner.update(1e-3, step)
        torch.testing.assert_close(losses[True], losses[False], rtol=1e-4, atol=1e-5)
        assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"], dict(counters["graph_break"])
