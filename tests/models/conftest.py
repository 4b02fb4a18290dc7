"""Small networks and weights for the tests of the network."""

import pytest
import torch

from volo.models import create_model

SMALL = {
    "layers": (1, 2, 1),
    "embed_dims": (16, 24, 24),
    "num_heads": (2, 3, 3),
    "mlp_ratios": (2, 3, 2.5),
    "outlook_stages": (True, False, False),
    "downsample_after": (True, False, False),
    "stem_hidden_dim": 8,
}


def random_state(shapes, seed=0):
    """Values for every entry of a state_dict, far from any initialisation, so that each one matters.

    Weights keep the size of activations; biases, norms, embeddings and running statistics are all non-trivial.
    """
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, like in shapes.items():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(5)
        elif key.endswith("running_var"):
            state[key] = torch.rand(like.shape, generator=generator) + 0.5
        elif key in ("pos_embed", "cls_token") or like.ndim == 1:
            centre = 1.0 if key.endswith("weight") else 0.0
            state[key] = centre + 0.5 * torch.randn(like.shape, generator=generator)
        else:
            bound = (3 / like[0].numel()) ** 0.5
            state[key] = torch.empty(like.shape).uniform_(-bound, bound, generator=generator)
    return state


@pytest.fixture
def make_small():
    """A three-stage VOLO of about 50,000 parameters with random weights; fields and sizes as given."""

    def make(img_size=32, num_classes=7, seed=0, **options):
        model = create_model("volo_d1", img_size=img_size, num_classes=num_classes, **(SMALL | options))
        model.load_state_dict(random_state(model.state_dict(), seed))
        return model

    return make


@pytest.fixture(name="random_state")
def random_state_fixture():
    return random_state
