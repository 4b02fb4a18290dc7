"""README and docs/: their commands run as they stand, and the links, files, options and numbers in them are true.

A page's shell commands are run in the order of the page, on a few images and a tiny network: the paths and options of
the page stay, the options in SHRINK come before them. Launchers are taken off: one process runs the program.
"""

import importlib.util
import re
import shlex
from functools import cache
from pathlib import Path

import formats
import numpy as np
import pytest
import torch
from programs import FAILED, ROOT, picture, run

import volo
from volo.cli import build_parser, parse, parse_options
from volo.config import Config
from volo.published_results import all_published

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
SECTIONS = Config.__dataclass_fields__
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

# Commands of other programs, which are not run here: exactly these.
OTHER_PROGRAMS = {
    "source .venv/bin/activate",
    "pre-commit install",
    "git clone https://github.com/NVIDIA/apex && cd apex",
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation .",
}
# Scripts that tests of their own run: tests/scripts/, and below the one for the page of options.
RUN_ELSEWHERE = {
    "scripts/slurm_train.sh",
    "scripts/soak.py",
    "scripts/quickstart.sh",
    "scripts/test.sh",
    "docs/make_options.py",
} | {f"scripts/benchmark/{name}.py" for name in ("model", "loader", "step", "roofline")}


def commands(name: str) -> list[str]:
    """Return the shell commands of a page, each on one line and without comments."""
    lines = []
    for language, block in FENCED.findall(TEXT[name]):
        if language == "bash":
            joined = block.replace("\\\n", " ").splitlines()
            lines += [" ".join(re.sub(r"(^|\s)#.*", "", line).split()) for line in joined]
    return [line for line in lines if line]


def program_of(command: str) -> tuple[str, list[str]]:
    """Return the program of ours that a command runs, by its path in the repository, and the program's own words."""
    words = [word for word in shlex.split(command) if not re.match(r"[A-Z_]+=", word)]
    if words[0] == "./distributed_train.sh":
        assert int(words[1]) >= 1
        return "train.py", words[2:]
    place = next((i for i, word in enumerate(words) if word.endswith((".py", ".sh"))), None)
    assert place is not None, f"not a program of ours: {command}"
    assert words[0] in ("python", "torchrun", "bash", "sbatch"), command
    return words[place], words[place + 1 :]


# ------------------------------------------------------------------------------------------------- commands

SHRINK = {
    "model.layers": "[1,1,1,1]",
    "model.embed_dims": "[16,32,32,32]",
    "model.num_heads": "[2,2,2,2]",
    "model.stem_hidden_dim": 8,
    "train.batch_size": 4,
    "train.device_batch_size": 4,
    "train.device": "cpu",
    "schedule.epochs": 1,
    "schedule.warmup_epochs": 0,
    "schedule.cooldown_epochs": 0,
    "eval.batch_size": 16,
    "data.workers": 0,
    "data.cache": "cache",
}
NETWORK = {"layers": [1, 1, 1, 1], "embed_dims": [16, 32, 32, 32], "num_heads": [2, 2, 2, 2], "stem_hidden_dim": 8}
SYNSETS = ("n01440764", "n01443537", "n02119789")
COUNTS = {"train": 7, "val": 5}


def synset_images(split: str) -> dict[str, bytes]:
    """Return the files of a split of three synsets by class/name, under official names."""
    made = {}
    for i in range(COUNTS[split]):
        synset = SYNSETS[i % 3]
        name = f"ILSVRC2012_val_{i + 1:08d}.JPEG" if split == "val" else f"{synset}_{i}.JPEG"
        made[f"{synset}/{name}"] = formats.encoded(picture("disc", i, (40 + i, 36)))
    return made


def make_imagenet(folder: Path) -> None:
    for split in COUNTS:
        for name, content in synset_images(split).items():
            (folder / split / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / split / name).write_bytes(content)


def make_ilsvrc2012(folder: Path) -> None:
    """The three official archives."""
    formats.write_tar_of_tars(folder / "ILSVRC2012_img_train.tar", synset_images("train"), folder.parent)
    val = synset_images("val")
    formats.write_tar(folder / "ILSVRC2012_img_val.tar", {name.split("/")[1]: val[name] for name in val})
    truth = [name.split("/")[0] for name in sorted(val, key=lambda name: name.split("/")[1])]
    formats.write_devkit(folder / formats.DEVKIT, list(SYNSETS), truth)


def make_imagenet_v2(folder: Path) -> None:
    for i in range(3):
        (folder / str(i)).mkdir(parents=True)
        picture("cross", i).save(folder / str(i) / "a.jpeg")


def make_pets(folder: Path) -> None:
    for split, count in (("train", 2), ("val", 1)):
        for number in range(37):
            for i in range(count):
                path = folder / split / f"breed_{number:02d}" / f"{i}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture("disc", number + i).save(path)


def make_published_labels(folder: Path) -> None:
    for name in synset_images("train"):
        path = (folder / name).with_suffix(".pt")
        path.parent.mkdir(parents=True, exist_ok=True)
        maps = np.stack([np.full((5, 18, 18), 9.0), np.arange(5)[:, None, None] + np.zeros((5, 18, 18))])
        torch.save(torch.from_numpy(maps).half(), path)


def make_store(folder: Path) -> None:
    make_published_labels(folder.parent / "loose")
    words = ("--source", folder.parent / "loose", "--output", folder, "--class_list", "imagenet")
    run(ROOT / "scripts/pack_token_labels.py", *words, cwd=folder.parent).assert_done()


def make_checkpoint(path: Path) -> None:
    """Weights as the published files have them, of a tiny network of this name."""
    model = volo.create_model(f"volo_{path.name[:2]}", img_size=32, **NETWORK)
    torch.save({"state_dict": model.state_dict(), "epoch": 300}, path)


# What a page's commands read and no command before them made.
MAKERS = {
    "/data/imagenet": make_imagenet,
    "/data/ilsvrc2012": make_ilsvrc2012,
    "/data/imagenetv2-matched-frequency-format-val": make_imagenet_v2,
    "/data/imagenetv2-threshold0.7-format-val": make_imagenet_v2,
    "/data/pets": make_pets,
    "/data/imagenet-labels": make_store,
    "label_top5_train_nfnet": make_published_labels,
    **{f"d{n}_{side}_{top1}.pth.tar": make_checkpoint for n, side, top1 in [(1, 224, 84.2), (1, 384, 85.2)]},
    "d5_512_87.07.pth.tar": make_checkpoint,
}


class Shell:
    """Runs the commands of a page, one after the other, in a folder of their own."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("configs", "scripts"):
            (folder / name).symlink_to(ROOT / name)

    def run(self, command: str) -> None:
        program, words = program_of(command)
        self.make_inputs(words)
        words = [str(self.folder) + word if word.startswith("/data/") else word for word in words]
        name = Path(program).stem
        if name in ("train", "validate", "show_batch"):
            words = self.shrunk(words, trains=name == "train")
        elif name == "generate_token_labels":
            words += ["--workers", "0", "--cache", "none", "--device", "cpu"]
            if "timm:dm_nfnet_f6" in words:  # 438 M parameters, which are not here
                words[words.index("timm:dm_nfnet_f6")] = "timm:test_resnet"
                words += ["--random_weights", "true", "--img_size", "64"]
        elif name == "prepare_imagenet" and words[0] != "verify":
            words += ["--expect_train", COUNTS["train"], "--expect_val", COUNTS["val"], "--cache", "cache"]
        ended = run(ROOT / program, *words, cwd=self.folder)
        if "verify" in words:  # the archives made here are not the official ones
            ended.assert_failed(FAILED, "ILSVRC2012_img_train.tar")
        else:
            ended.assert_done()

    def make_inputs(self, words: list[str]) -> None:
        for before, word in zip(["", *words], words, strict=False):
            made = next((name for name in MAKERS if word == name or word.startswith(f"{name}/")), None)
            path = self.folder / str(made).lstrip("/")
            if made and before != "--output" and not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                MAKERS[made](path)

    def shrunk(self, words: list[str], trains: bool) -> list[str]:
        """Return the words of a program that reads recipes, with SHRINK between the recipe and its own options."""
        config = words[words.index("--config") + 1]
        assert (self.folder / config).is_file(), config
        recipe = Path(config).stem
        side = "32" if recipe.endswith("_224") else "64"
        smaller = [f"--{option}={value}" for option, value in SHRINK.items()] + ["--model.img_size", side]
        if trains:
            smaller += ["--train.name", recipe]
            named = dict(zip(words, words[1:], strict=False)).get("--train.name", recipe)
            finished = self.folder / "runs" / named
            if finished.exists():  # by a command before this one
                finished.rename(finished.with_name(f"{named}-before-{len(list(finished.parent.iterdir()))}"))
        if any(word.endswith("/data/shards") for word in words):  # whose classes are numbered from the three there are
            words += ["--data.class_list", "folders", "--model.num_classes", "3"]
        return ["--config", config, *smaller, *words]


def is_ours(command: str) -> bool:
    return command not in OTHER_PROGRAMS


def is_run_here(command: str) -> bool:
    if not is_ours(command):
        return False
    program, _ = program_of(command)
    assert (ROOT / program).is_file(), f"{program} does not exist: {command}"
    return program not in RUN_ELSEWHERE


def stories() -> list:
    """Return the name of each page with the commands that no page before it has."""
    seen, found = set(), []
    for name in TEXT:
        new = [command for command in filter(is_run_here, commands(name)) if command not in seen]
        seen.update(new)
        if new:
            found.append(pytest.param(new, id=name, marks=pytest.mark.slow))
    return found


@pytest.mark.parametrize("story", stories())
def test_commands_run_in_the_order_of_their_page(story, tmp_path):
    shell = Shell(tmp_path)
    for command in story:
        shell.run(command)


@pytest.mark.parametrize("name", TEXT)
def test_options_of_every_command_exist(name, monkeypatch):
    """As the page has them: with the recipe's own sizes, which are too large to be run."""
    monkeypatch.chdir(ROOT)
    for command in filter(is_ours, commands(name)):
        program, words = program_of(command)
        if program == "train.py":
            config, _ = parse(recipe_parser(), words)
            assert config.train.batch_size % config.train.device_batch_size == 0
        elif program.startswith("scripts/benchmark/"):
            options = make_options().programs()[program.removeprefix("scripts/")]
            parse_options(options, words, prog=program, usage="", description="")


@cache
def make_options():
    """Return the module that writes the page of options."""
    spec = importlib.util.spec_from_file_location("make_options", ROOT / "docs/make_options.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def recipe_parser():
    return build_parser("train.py", "")


# ------------------------------------------------------------------------------------- options, files, links


@pytest.mark.parametrize("name", [name for name in TEXT if name != "options.md"])
def test_options_in_the_text_exist_and_take_their_values(name):
    for code in re.findall(r"`([^`\n]+)`", FENCED.sub("", TEXT[name])):
        for section, field, value in re.findall(r"(?:^|--|\s)([a-z_]+)\.([a-z_]+)(?: ([^ -][^ ]*))?(?=$| )", code):
            if section not in SECTIONS or (section, field) in {("train", "py"), ("data", "md")}:
                continue
            options = SECTIONS[section].default_factory
            assert field in options.__dataclass_fields__, f"{name}: {section}.{field}"
            if value and value.islower() and field not in ("root", "train_split", "val_split"):
                needed = ["--ema.enabled=true"] if (section, field, value) == ("eval", "weights", "ema") else []
                parse(recipe_parser(), [f"--{section}.{field}={value}", *needed])


@pytest.mark.parametrize("name", TEXT)
def test_files_in_the_text_exist(name):
    rooms = r"(?:volo|tests|scripts|configs|docs)"
    for path in re.findall(rf"(?<![\w/.-])({rooms}/[\w/.*-]*\w)", TEXT[name]):
        assert list(ROOT.glob(path)), f"{name}: {path}"


def test_what_the_map_of_behaviours_names_is_defined_there():
    rows = re.findall(r"^\| [^|]+ \| (`volo/.*) \|$", TEXT["development.md"], re.MULTILINE)
    assert len(rows) > 30
    for row in rows:
        for group in row.split("; "):
            path, *names = re.findall(r"`([^`]+)`", group)
            source = (ROOT / path).read_text(encoding="utf-8")
            for name in names:
                assert re.search(rf"^ *(?:def|class) {name}\b|^{name}\b", source, re.MULTILINE), f"{path}: {name}"


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", TEXT[page.name]):
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked.read_text(encoding="utf-8")), target


def test_the_front_page_lists_every_page():
    assert set(re.findall(r"\]\((?:docs/)?([\w]+\.md)\)", TEXT["README.md"])) >= {page.name for page in PAGES[1:]}


# ------------------------------------------------------------------------------------------ generated, numbers


def test_the_page_of_options_is_what_the_code_says():
    same = make_options().page() == TEXT["options.md"]
    assert same, "docs/options.md is out of date: run python docs/make_options.py"


def rows(name: str) -> dict[str, list[str]]:
    """Return the cells of a page's table rows that begin with the name of a model, behind that name."""
    found = {}
    for line in re.findall(r"^\| (VOLO-D\d \d+ .*) \|$", TEXT[name], re.MULTILINE):
        first, *cells = [cell.strip() for cell in line.split("|")]
        found[first.lower().replace("-", "_").replace(" ", "_")] = cells
    return found


def test_published_numbers_are_those_of_the_file():
    front, evaluation = rows("README.md"), rows("evaluation.md")
    assert set(front) == set(evaluation) == {row.key for row in all_published()}
    for row in all_published():
        top1 = {dataset: f"{accuracy.top1:.2f}" for dataset, accuracy in row.timm.items()}
        params = f"{row.params / 1e6:.1f} M"
        crop = f"{row.official_crop_pct} / {row.timm_crop_pct}"
        recipe = f"[`{row.key}`](configs/{row.key}.yaml)"
        assert front[row.key] == [recipe, params, f"{row.paper_top1} / {top1['imagenet']}", crop]
        measured = [top1["imagenet"], top1["real"], top1["v2-matched-frequency"]]
        assert evaluation[row.key] == [params, f"{row.gmacs:g}", f"{row.paper_top1}", *measured, crop]
