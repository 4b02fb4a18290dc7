"""scripts/benchmark/kinds_of_work.py: operators and kernels go to the kind of work that they are part of."""

import importlib

import pytest
import torch
from programs import ROOT
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile


@pytest.fixture(scope="module")
def kinds():
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(ROOT / "scripts" / "benchmark")
        yield importlib.import_module("kinds_of_work")


def kinds_by_name(kinds, events) -> dict[str, set[str]]:
    """The kinds that each operator's own time goes to, found one event at a time."""
    found = {}
    for event in events:
        spent = kinds.times_of_kinds(_Only(events, event), cuda=False)
        found.setdefault(event.name, set()).update(kind for kind, ms in spent.items() if ms)
    return found


class _Only(list):
    """The events of a profile, of which one took any time."""

    def __init__(self, events, event):
        super().__init__(_View(other, 1000.0 if other is event else 0.0) for other in events)


class _View:
    def __init__(self, event, own: float):
        self._event, self.self_cpu_time_total = event, own

    def __getattr__(self, name):
        return getattr(self._event, name)


def test_a_profile_of_the_cpu_backward_pass_included(kinds):
    layer = torch.nn.Linear(8, 8)
    x = torch.randn(4, 8)
    with torch_profile(activities=[ProfilerActivity.CPU]) as found:
        y = layer(x).sigmoid()
        loss = kinds.in_range("loss", lambda y: (y.softmax(-1) @ y.t()).tanh().sum())(y)
        loss.backward()
        kinds.in_range("optimizer", lambda: layer.weight.detach().add_(1))()
    by_name = kinds_by_name(kinds, found.events())
    assert by_name["aten::addmm"] == {"linear layers"}
    assert by_name["aten::sigmoid_backward"] == {kinds.REST}
    # Of the loss and its gradients, products, too.
    for name in ("aten::softmax", "aten::_softmax_backward_data", "aten::tanh", "aten::tanh_backward"):
        assert by_name[name] == {"loss"}, name
    assert by_name["aten::mm"] == {"loss", "linear layers"}
    assert by_name["aten::add_"] == {"optimizer"}
    spent = kinds.times_of_kinds(found.events(), cuda=False)
    assert sum(spent.values()) == pytest.approx(sum(event.self_cpu_time_total for event in found.events()) / 1000)


def event(id: int, name: str, parent: FunctionEvent | None = None, **options) -> FunctionEvent:
    made = FunctionEvent(id, name, thread=1, start_us=10 * id, end_us=10 * id + 5, **options)
    made.cpu_parent = parent
    return made


def kernel(id: int, name: str, us: int) -> FunctionEvent:
    return FunctionEvent(id, name, thread=0, start_us=id, end_us=id + us, device_type=DeviceType.CUDA)


def launch(operator: FunctionEvent, *kernels: FunctionEvent) -> list[FunctionEvent]:
    """Let an operator launch kernels, as torch's profiler notes it; return all of them."""
    for device in kernels:
        operator.append_kernel(device.name, 0, device.time_range.elapsed_us())
    return [operator, *kernels]


def test_kernels_are_of_the_operators_that_launched_them(kinds):
    linear = event(1, "aten::linear")
    cast = event(2, "aten::copy_", event(9, "aten::to", linear))
    product = event(3, "aten::addmm", linear)
    mix = event(4, kinds.RANGE + "outlook attention")
    softmax = event(5, "aten::_softmax", mix, sequence_nr=7)
    node = event(6, "autograd::engine::evaluate_function: SoftmaxBackward0", sequence_nr=7)
    node = event(7, "SoftmaxBackward0", node, sequence_nr=7, scope=1)
    gradient = event(8, "aten::_softmax_backward_data", node)
    adam = event(10, "aten::_fused_adamw_", event(11, "Optimizer.step#AdamW.step"))
    elementwise = "void at::native::vectorized_elementwise_kernel<4, ...>"
    events = [linear, mix, node]
    events += launch(cast, kernel(20, elementwise, 100))
    events += launch(product, kernel(21, "nvjet_tst_128x256", 2000), kernel(22, elementwise, 50))
    events += launch(softmax, kernel(23, "softmax_warp_forward", 300))
    events += launch(gradient, kernel(24, "softmax_warp_backward", 700))
    events += launch(adam, kernel(25, "void at::native::multi_tensor_apply_kernel<...>", 900))
    # What has no operator goes by its own name, once.
    events += [kernel(26, "Memcpy HtoD (Pinned -> Device)", 40), kernel(27, "nvjet_tst_128x256", 500)]
    events += [kernel(28, "some_kernel", 60)]
    # The profiler shows the range on the device, too, from its first kernel to its last.
    events += launch(mix, kernel(29, mix.name, 5000))
    spent = {kind: ms for kind, ms in kinds.times_of_kinds(events, cuda=True).items() if ms}
    assert spent == pytest.approx(
        {
            "casts, copies": 0.1 + 0.04,
            "linear layers": 2.0 + 0.05 + 0.5,
            "outlook attention": 0.3 + 0.7,
            "optimizer": 0.9,
            kinds.REST: 0.06,
        }
    )


def test_an_inner_range_overrules_an_outer_one(kinds):
    optimizer = event(1, kinds.RANGE + "optimizer")
    average = event(2, "aten::_foreach_lerp_", event(3, kinds.RANGE + "EMA", optimizer))
    norm = event(4, "aten::_foreach_norm", optimizer)
    events = launch(average, kernel(20, "lerp", 300)) + launch(norm, kernel(21, "lpnorm", 100))
    spent = {kind: ms for kind, ms in kinds.times_of_kinds(events, cuda=True).items() if ms}
    assert spent == pytest.approx({"EMA": 0.3, "optimizer": 0.1})
