"""What a training step needs is counted without running one, and the choice of what to recompute follows from it."""

import contextlib
from functools import partial

import pytest
import torch

from volo.models import create_model
from volo.models.memory import BYTES_PER_PARAMETER, choose_recompute, kept_bytes, summed

CPU = torch.device("cpu")
SHAPE = (3, 3, 64, 64)


def really_kept(network, autocast):
    """Bytes of the storages that autograd holds after a real forward pass, parameters, buffers and images apart."""
    images = torch.randn(SHAPE)
    own = {x.untyped_storage().data_ptr() for x in (*network.parameters(), *network.buffers(), images)}
    kept = {}

    def note(x):
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), autocast():
        summed(network.train()(images))
    return sum(x.untyped_storage().nbytes() for pointer, x in kept.items() if pointer not in own)


@pytest.mark.parametrize("autocast", [contextlib.nullcontext, partial(torch.autocast, "cpu", torch.bfloat16)])
@pytest.mark.parametrize("recompute", ["none", "cheap", "blocks"])
def test_as_many_bytes_as_a_real_pass_keeps(autocast, recompute):
    network = create_model("volo_nano", img_size=64, num_classes=5).eval()
    network.set_kernel("auto", torch.bfloat16 if isinstance(autocast, partial) else torch.float32)
    network.set_recompute(recompute)
    before = {name: x.clone() for name, x in network.state_dict().items()}
    counted = kept_bytes(network, SHAPE, CPU, autocast)
    assert not network.training and all(torch.equal(x, before[name]) for name, x in network.state_dict().items())
    assert counted == pytest.approx(really_kept(network, autocast), rel=0.01)  # statistics of norms in bf16 differ


def test_a_card_need_not_exist_to_be_counted_on():
    network = create_model("volo_nano", img_size=64, num_classes=5)
    network.set_kernel("eager")
    there, here = (kept_bytes(network, SHAPE, torch.device(n), contextlib.nullcontext) for n in ("cuda", "cpu"))
    assert there == pytest.approx(here, rel=0.2)  # attention has kernels of its own on each


def test_the_first_choice_that_fits_is_taken():
    network = create_model("volo_nano", img_size=64, num_classes=5)
    network.set_kernel("auto")
    state = BYTES_PER_PARAMETER * sum(p.numel() for p in network.parameters())

    def needed() -> float:
        return 1.15 * (state + kept_bytes(network, SHAPE, CPU, contextlib.nullcontext))

    rooms = {}
    for mode in ("none", "cheap", "blocks"):
        network.set_recompute(mode)
        rooms[mode] = needed()
    assert rooms["none"] > rooms["cheap"] > rooms["blocks"]
    for room, expected in [
        (rooms["none"] + 1, "none"),
        (rooms["none"] - 1, "cheap"),
        (rooms["cheap"] + 1, "cheap"),
        (rooms["cheap"] - 1, "blocks"),
        (0, "blocks"),
    ]:
        choice, count = choose_recompute(network, SHAPE, CPU, contextlib.nullcontext, int(room))
        assert choice == expected and count == pytest.approx(needed(), abs=1), "the network is left as chosen"
