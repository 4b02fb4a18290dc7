"""Checkpoints: every format in, the position embedding resized, and nothing loaded in part."""

import argparse
import logging
import os
import pickle
import struct
import warnings
import zipfile
from collections import OrderedDict

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from volo.models import create_model, load_checkpoint, read_checkpoint, weights


def states_equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def copied(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def assert_refused(model, path, *messages, **options):
    """``path`` is a ValueError that names the file and says ``messages``, and the model stays as it was."""
    before = copied(model)
    with pytest.raises(ValueError) as info:
        load_checkpoint(model, path, **options)
    for message in (path.name, *messages):
        assert message in str(info.value)
    assert states_equal(before, model.state_dict())


# --- formats ---------------------------------------------------------------------------------------------


def published(state):
    """What timm's training loop of 2021 saved, options included."""
    return {
        "epoch": 309,
        "arch": "volo_d1",
        "state_dict": OrderedDict(state),
        "optimizer": {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-3}]},
        "version": 2,
        "args": argparse.Namespace(lr=1e-3, data_dir="/x", mean=None, aug=["a"]),
        "amp": {"loss_scaler0": {"loss_scale": 65536.0, "unskipped": 0}},
        "metric": 84.2,
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_published_file(zipped, tmp_path, make_small):
    source, target = make_small(seed=1), make_small(seed=2)
    path = tmp_path / "d1_224_84.2.pth.tar"
    torch.save(published(source.state_dict()), path, _use_new_zipfile_serialization=zipped)
    report = load_checkpoint(target, path)
    assert states_equal(target.state_dict(), source.state_dict())
    assert (report.path, report.used) == (path, "state_dict")
    assert (report.resized_pos_embed, report.dropped_heads, report.num_classes) == (None, False, 7)
    assert report.metadata["epoch"] == 309
    assert report.metadata["metric"] == 84.2
    assert "optimizer" not in report.metadata
    assert str(report) == f"weights from {path} (state_dict, epoch 309)"


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin", ".pth.tar"])
def test_bare_weights_of_timm(suffix, tmp_path, make_small):
    model = make_small(seed=2)
    arch = model.architecture
    other = timm.models.volo.VOLO(
        layers=arch.layers, img_size=32, num_classes=7, stem_hidden_dim=arch.stem_hidden_dim,
        embed_dims=arch.embed_dims, num_heads=arch.num_heads, mlp_ratio=arch.mlp_ratios,
        downsamples=arch.downsample_after, outlook_attention=arch.outlook_stages,
    ).eval()  # fmt: skip
    path = tmp_path / f"model{suffix}"
    if suffix == ".safetensors":
        save_file(other.state_dict(), path, metadata={"format": "pt"})
    else:
        torch.save(other.state_dict(), path)
    report = load_checkpoint(model, path)
    assert (report.used, report.metadata) == ("raw", {})
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.eval()(images), other(images))


def test_own_file_with_ema(tmp_path, make_small):
    raw, ema, target = make_small(seed=1), make_small(seed=2), make_small(seed=3)
    path = tmp_path / "last.pt"
    file = {"state_dict": raw.state_dict(), "state_dict_ema": ema.state_dict(), "epoch": 4, "classes": ["a", "b"]}
    torch.save(file | {"config": {"optim": {"lr": 0.1, "betas": [0.9, 0.99]}}, "scaler": None}, path)
    assert load_checkpoint(target, path).used == "state_dict"
    assert states_equal(target.state_dict(), raw.state_dict())
    report = load_checkpoint(target, path, use_ema=True)
    assert states_equal(target.state_dict(), ema.state_dict())
    assert "state_dict_ema, epoch 4" in str(report)
    assert report.metadata == {
        "epoch": 4,
        "classes": ["a", "b"],
        "config": {"optim": {"lr": 0.1, "betas": [0.9, 0.99]}},
    }


@pytest.mark.parametrize("file", ["raw", "without", "none"])
def test_ema_asked_for_and_not_there(file, tmp_path, make_small):
    model = make_small()
    state = model.state_dict()
    path = tmp_path / "last.pt"
    torch.save(
        {"raw": state, "without": {"state_dict": state}, "none": {"state_dict": state, "state_dict_ema": None}}[file],
        path,
    )
    assert_refused(model, path, "has no EMA weights", "without use_ema", use_ema=True)


def test_only_ema_in_the_file(tmp_path, make_small):
    model = make_small()
    torch.save({"state_dict_ema": model.state_dict()}, tmp_path / "ema.pt")
    assert_refused(model, tmp_path / "ema.pt", "use_ema=True")
    load_checkpoint(model, tmp_path / "ema.pt", use_ema=True)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers(prefix, tmp_path, make_small):
    source, target = make_small(seed=1), make_small(seed=2)
    state = {prefix + key: tensor for key, tensor in source.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "a.pth.tar")
    load_checkpoint(target, tmp_path / "a.pth.tar")
    assert states_equal(target.state_dict(), source.state_dict())


def test_half_precision_file(tmp_path, make_small):
    source, target = make_small(seed=1), make_small(seed=2)
    path = tmp_path / "half.safetensors"
    save_file({key: t.half() if t.is_floating_point() else t for key, t in source.state_dict().items()}, path)
    load_checkpoint(target, str(path))
    assert target.head.weight.dtype == torch.float32
    torch.testing.assert_close(target.state_dict(), source.state_dict(), atol=1e-3, rtol=1e-3)


def test_create_model_loads(tmp_path):
    source = create_model("volo_nano", img_size=32, num_classes=10)
    torch.save(source.state_dict(), tmp_path / "nano.pth")
    model = create_model("volo_nano", img_size=32, num_classes=10, checkpoint=tmp_path / "nano.pth")
    assert states_equal(model.state_dict(), source.state_dict())


# --- another size, another number of classes -------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 16, (48, 80)])
def test_position_embedding_is_resized(size, tmp_path, make_small):
    source, target = make_small((64, 32), seed=1), make_small(size, seed=2)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "a.pth")
    report = load_checkpoint(target, tmp_path / "a.pth")
    rows, cols = (size, size) if isinstance(size, int) else size
    assert report.resized_pos_embed == ((4, 2), (rows // 16, cols // 16))
    assert f"resized from 4x2 to {rows // 16}x{cols // 16}" in str(report)
    expected = F.interpolate(
        source.pos_embed.detach().permute(0, 3, 1, 2),
        size=(rows // 16, cols // 16),
        mode="bicubic",
        align_corners=False,
        antialias=False,
    ).permute(0, 2, 3, 1)
    assert torch.equal(target.pos_embed, expected)
    rest = [{k: v for k, v in m.state_dict().items() if k != "pos_embed"} for m in (source, target)]
    assert states_equal(*rest)


def test_heads_of_another_number_of_classes_are_dropped_and_it_says_so(tmp_path, make_small, caplog):
    source, target = make_small(num_classes=7, seed=1), make_small(num_classes=5, seed=2)
    heads = {key: tensor for key, tensor in copied(target).items() if "head" in key}
    assert len(heads) == 4
    torch.save(source.state_dict(), tmp_path / "a.pth")
    with caplog.at_level(logging.INFO):
        report = load_checkpoint(target, tmp_path / "a.pth")
    assert report.dropped_heads
    assert report.num_classes == 7
    assert "heads dropped: theirs have 7 classes" in str(report)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "heads dropped" in caplog.text
    expected = source.state_dict() | heads
    assert states_equal(target.state_dict(), expected)


# --- files that do not fit -------------------------------------------------------------------------------


def test_missing_and_unexpected_keys_are_listed(tmp_path, make_small):
    model = make_small()
    state = make_small(seed=1).state_dict()
    del state["norm.bias"]
    state["extra.weight"] = torch.zeros(2)
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    assert_refused(
        model, tmp_path / "a.pth", "1 missing: norm.bias.", "1 unexpected: extra.weight.", "nothing was loaded"
    )


def test_long_lists_are_cut_after_ten(tmp_path, make_small):
    model = make_small()
    state = make_small(seed=1).state_dict()
    gone = [key for key in state if key.startswith("network.0")]
    torch.save({k: v for k, v in state.items() if k not in gone}, tmp_path / "a.pth")
    assert_refused(model, tmp_path / "a.pth", f"{len(gone)} missing: {', '.join(gone[:10])} ...")


def test_a_token_head_more_or_less_is_no_silent_matter(tmp_path, make_small):
    with_head, without = make_small(), make_small(return_dense=False)
    torch.save(with_head.state_dict(), tmp_path / "with.pth")
    torch.save(without.state_dict(), tmp_path / "without.pth")
    assert_refused(without, tmp_path / "with.pth", "2 unexpected: aux_head.weight, aux_head.bias")
    assert_refused(with_head, tmp_path / "without.pth", "2 missing: aux_head.weight, aux_head.bias")


def test_shapes_that_differ_are_listed(tmp_path, make_small):
    model = make_small()
    torch.save(make_small(stem_hidden_dim=16).state_dict(), tmp_path / "a.pth")
    assert_refused(model, tmp_path / "a.pth", "patch_embed.conv.0.weight (file [16, 3, 7, 7], model [8, 3, 7, 7])")


def test_another_model_is_named(tmp_path, make_small):
    nano = create_model("volo_nano", img_size=64, num_classes=3, in_chans=1)
    torch.save(nano.state_dict(), tmp_path / "a.pth")
    assert_refused(make_small(), tmp_path / "a.pth", "The file looks like volo_nano.")
    published = create_model("volo_d1", img_size=32, num_classes=1000)
    torch.save({"state_dict": published.state_dict()}, tmp_path / "d1.pth.tar")
    wrong = create_model("volo_tiny", img_size=32, num_classes=1000)
    assert_refused(wrong, tmp_path / "d1.pth.tar", "of another shape", "The file looks like volo_d1.")
    custom = make_small(layers=(1, 1, 1))
    torch.save(custom.state_dict(), tmp_path / "b.pth")
    with pytest.raises(ValueError) as info:
        load_checkpoint(make_small(), tmp_path / "b.pth")
    assert "looks like" not in str(info.value)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"epoch": 3, "optimizer": {}},
        {"state_dict": {}},
        {"state_dict": [1, 2]},
        {"state_dict": {"norm.bias": "text"}},
    ],
)
def test_a_dict_without_weights(content, tmp_path, make_small):
    torch.save(content, tmp_path / "a.pt")
    assert_refused(make_small(), tmp_path / "a.pt", "no weights")


def quantized(shape):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        return torch.quantize_per_tensor(torch.ones(shape), 0.1, 0, torch.qint8)


@pytest.mark.filterwarnings("ignore")  # torch's, about quantized and sparse tensors
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("norm.bias", "text", "norm.bias in state_dict is a str instead of a tensor"),
        ("norm.bias", None, "norm.bias in state_dict is a NoneType"),
        ("norm.bias", {"norm.bias": torch.zeros(2)}, "norm.bias in state_dict is a dict"),
        (3, torch.zeros(2), "3 in state_dict is named by a int"),
        (("norm", "bias"), torch.zeros(2), "('norm', 'bias') in state_dict is named by a tuple"),
        (b"norm.bias", torch.zeros(2), "b'norm.bias' in state_dict is named by a bytes"),
        ("a\nb", torch.zeros(2), "1 unexpected: 'a\\nb'."),
        ("norm.bias", torch.zeros(2, device="meta"), "norm.bias in state_dict is an empty (meta) tensor"),
        ("norm.bias", torch.zeros(2, 2).to_sparse(), "norm.bias in state_dict is a sparse tensor"),
        ("norm.bias", quantized(2), "norm.bias in state_dict is a quantized tensor"),
        ("norm.bias", torch.zeros(64, dtype=torch.bool), "norm.bias in state_dict is a tensor of torch.bool"),
        ("norm.bias", torch.zeros(64, dtype=torch.complex64), "norm.bias in state_dict is a tensor of torch.complex64"),
        ("norm.bias", torch.zeros(0), "norm.bias in state_dict is a tensor without values, [0]"),
        ("pos_embed", torch.zeros(1, 0, 0, 64), "pos_embed in state_dict is a tensor without values, [1, 0, 0, 64]"),
        ("pos_embed", torch.zeros(1).expand(1, 1 << 20, 1 << 20, 64), "of which the file has 4 bytes"),
        ("head.weight", torch.zeros(()), "head.weight (file [], model ["),
        ("head.weight", torch.zeros(3), "head.weight (file [3], model ["),
    ],
)
def test_an_entry_that_is_no_weight_is_named(key, value, message, tmp_path, make_small):
    model = make_small()
    torch.save({"state_dict": {**model.state_dict(), key: value}}, tmp_path / "a.pt")
    assert_refused(model, tmp_path / "a.pt", message)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e300])
@pytest.mark.parametrize("key", ["norm.bias", "pos_embed", "patch_embed.conv.1.running_var"])
def test_a_weight_that_is_not_finite_is_named(key, wrong, tmp_path, make_small):
    model = make_small()
    state = {name: tensor.double() for name, tensor in copied(model).items()}
    state[key].view(-1)[0] = wrong
    torch.save({"state_dict_ema": state}, tmp_path / "a.pt")
    size = state[key].numel()
    assert_refused(model, tmp_path / "a.pt", f"1 of {size} values of {key} are NaN or infinite", use_ema=True)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_integers_are_no_weights(dtype, tmp_path, make_small):
    model = make_small()
    state = copied(model)
    state["norm.bias"] = state["norm.bias"].to(dtype)
    state["pos_embed"] = torch.zeros(1, 3, 3, state["pos_embed"].shape[-1], dtype=dtype)
    torch.save(state, tmp_path / "a.pt")
    assert_refused(model, tmp_path / "a.pt", f"2 not of floats: pos_embed ({dtype}), norm.bias ({dtype}).")


def test_something_else_than_a_dict(tmp_path, make_small):
    torch.save(torch.zeros(3), tmp_path / "a.pt")
    assert_refused(make_small(), tmp_path / "a.pt", "holds a Tensor")


# --- files that cannot be read ---------------------------------------------------------------------------


def test_no_file_a_folder_and_an_empty_file(tmp_path, make_small):
    model = make_small()
    assert_refused(model, tmp_path / "none.pth", "does not exist")
    (tmp_path / "folder.pth").mkdir()
    assert_refused(model, tmp_path / "folder.pth", "is a folder")
    (tmp_path / "empty.pth").touch()
    assert_refused(model, tmp_path / "empty.pth", "is empty (0 bytes)")


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.98])
def test_truncated_file(form, part, tmp_path, make_small):
    model = make_small()
    path = tmp_path / ("a.safetensors" if form == "safetensors" else "a.pth")
    if form == "safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save({"state_dict": model.state_dict()}, path, _use_new_zipfile_serialization=form == "zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    assert_refused(model, path, "truncated, corrupt")
    path.write_bytes(whole[:-1])
    assert_refused(model, path, "truncated, corrupt")


def test_one_flipped_bit(tmp_path, make_small):
    """torch.load reads this file without a word; the checksums in it tell."""
    model, path = make_small(), tmp_path / "a.pth"
    model.head.bias.data.fill_(1234.5)
    torch.save(model.state_dict(), path)
    content = bytearray(path.read_bytes())
    content[content.index(struct.pack("<f", 1234.5))] ^= 1
    path.write_bytes(content)
    assert_refused(model, path, "corrupt", "checksum")


@pytest.mark.parametrize("content", [b"<html>404</html>", b"hello " * 20, b"PK\x03\x04 no archive", b"\x00" * 64])
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_some_other_file(content, name, tmp_path, make_small):
    (tmp_path / name).write_bytes(content)
    assert_refused(make_small(), tmp_path / name, "no checkpoint")


def nested(how):
    value = [1.0]
    for _ in range(22 if how == "many times" else 200):
        value = [value, value] if how == "many times" else {"a": value}
    return value


@pytest.mark.parametrize("how", ["many times", "deep"])
def test_nested_metadata_is_bounded(how, tmp_path, make_small):
    model = make_small()
    torch.save({"state_dict": model.state_dict(), "extra": nested(how)}, tmp_path / "a.pt")
    assert_refused(model, tmp_path / "a.pt", "nested more than 100 deep or have more than 2,000,000 values")


def test_a_file_that_unpacks_to_far_more_is_refused(tmp_path, make_small):
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(1 << 20))
    assert_refused(make_small(), path, "unpacks to 1,048,576 bytes")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_listing_of_the_tensors_is_bounded(suffix, tmp_path, make_small, monkeypatch):
    monkeypatch.setattr(weights, "_LARGEST_LISTING", 1000)
    model, path = make_small(), tmp_path / f"a{suffix}"
    (torch.save if suffix == ".pt" else save_file)(model.state_dict(), path)
    assert_refused(model, path, "allowed are 1,000")


class Trap:
    """Calls ``function(*args)`` when it is unpickled."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


# A number is the protocol of a bare pickle, without torch's wrapping; 0 is text, and looks like any other text.
@pytest.mark.parametrize("form", ["zip", "legacy", 0, 2, 4, 5])
@pytest.mark.parametrize("function", [os.mkdir, eval])
def test_code_in_a_file_is_not_executed(form, function, tmp_path, make_small):
    model, path, mark = make_small(), tmp_path / "a.pth.tar", tmp_path / "executed"
    trap = Trap(os.mkdir, str(mark)) if function is os.mkdir else Trap(eval, f"__import__('os').mkdir({str(mark)!r})")
    content = {"state_dict": model.state_dict(), "epoch": trap}
    if isinstance(form, str):
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    else:
        path.write_bytes(pickle.dumps({"epoch": trap}, protocol=form))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about the pickle protocol
        assert_refused(model, path, "nothing was executed", "no checkpoint" if form == 0 else "plain tensors")
        with pytest.raises(ValueError, match="nothing was executed"):
            read_checkpoint(path)
    assert not mark.exists()
    if form == "zip":  # the trap is a real one
        torch.load(path, weights_only=False)
        assert mark.exists()
