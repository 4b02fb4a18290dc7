"""The command line: precedence, types, near misses, cross-field mistakes, and help for every option."""

import re
from dataclasses import FrozenInstanceError, asdict, fields, replace
from functools import cache

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from volo.cli import build_parser, config_to_dict, load_config, parse, save_config
from volo.config import Config, OptimConfig, TrainConfig

DEFAULTS = Config()
OPTIONS = [(section.name, f.name) for section in fields(Config) for f in fields(getattr(DEFAULTS, section.name))]


@cache
def parser():
    return build_parser("train.py", "")


def config_of(*argv: str) -> Config:
    return parse(parser(), list(argv))[0]


@pytest.fixture
def error_of(capsys):
    """Return a function that parses a line which must exit with code 2, and gives the last line of stderr."""

    def run(*argv: str) -> str:
        with pytest.raises(SystemExit) as caught:
            config_of(*argv)
        assert caught.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    return run


@pytest.fixture
def recipe(tmp_path):
    def write(text: str, name: str = "recipe.yaml") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


# ------------------------------------------------------------------------------------------------ precedence


def test_nothing_given_is_the_published_recipe():
    config = config_of()
    assert config == DEFAULTS
    assert (config.optim.name, config.optim.lr, config.optim.weight_decay) == ("adamw", 1.6e-3, 0.05)
    assert (config.optim.betas, config.optim.eps) == ([0.9, 0.999], 1e-8)
    assert (config.train.batch_size, config.schedule.total_epochs, config.schedule.warmup_epochs) == (1024, 310, 20)


def test_defaults_then_recipe_then_line_wherever_it_stands(recipe):
    path = recipe("optim:\n  lr: 0.5\n  weight_decay: 0.25\n")
    expected = replace(DEFAULTS, optim=OptimConfig(lr=0.125, weight_decay=0.25))
    assert config_of("--config", path, "--optim.lr", "0.125") == expected
    assert config_of("--optim.lr", "0.125", "--config", path) == expected
    assert config_of("--optim.lr=0.125", f"--config={path}") == expected
    assert config_of("--train.seed", "7", "--config", path, "--optim.lr", "0.125").train == TrainConfig(seed=7)


def test_of_two_recipes_and_of_two_options_the_later_wins(recipe):
    first, second = recipe("optim: {lr: 0.5, eps: 0.25}\n", "a.yaml"), recipe("optim: {lr: 0.75}\n", "b.yaml")
    assert config_of("--config", first, "--config", second).optim == OptimConfig(lr=0.75, eps=0.25)
    assert config_of("--optim.lr", "1", "--optim.lr", "2").optim.lr == 2


@pytest.mark.parametrize("number", ["5e-5", "5.0e-5", "5E-5", "+5e-5", "0.00005", ".00005"])
def test_every_way_to_write_a_number_is_a_number(recipe, number):
    path = recipe(f"optim:\n  lr: {number}\n  betas: [9e-1, {number}]\nmix:\n  mixup: 8e-1\n")
    config = config_of("--config", path, "--loss.smoothing", number)
    assert config.optim.lr == config.loss.smoothing == config.optim.betas[1] == 5e-5
    assert isinstance(config.optim.lr, float) and config.mix.mixup == 0.8 and config.optim.betas[0] == 0.9


def test_values_of_every_kind_from_the_line():
    config = config_of(
        *("--model.img_size", "[32, 48]", "--model.layers", "[1,2]", "--model.outlook_stages", "[true, false]"),
        *("--train.compile", "true", "--model.checkpoint", "w.pth.tar", "--eval.crop_pct", "1"),
        *("--train.name", "2", "--model.qkv_bias", "false", "--model.drop_rate", "null"),
    )
    assert config.model.image_hw == (32, 48) and config.model.checkpoint == "w.pth.tar"
    assert config.model.architecture == {"layers": (1, 2), "outlook_stages": (True, False), "qkv_bias": False}
    assert config.train.compile is True and config.train.name == "2"
    assert config.eval.crop_pct == 1.0 and isinstance(config.eval.crop_pct, float)


def test_a_config_is_frozen():
    with pytest.raises(FrozenInstanceError):
        config_of().optim.lr = 1.0


def test_arguments_of_a_caller_are_handed_back_apart():
    own = build_parser("validate.py", "")
    own.add_argument("--real", type=bool, default=False)
    config, values = parse(own, ["--real", "true", "--optim.lr", "1"])
    assert values == {"real": True} and config.optim.lr == 1


# -------------------------------------------------------------------------------------- mistakes, exit code 2


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        (["--optim.lrr", "1"], "optim.lr"),
        (["--optimm.lr", "1"], "optim.lr"),
        (["--train.batch", "8"], "train.batch_size"),
        (["--scedule.epoch", "8"], "schedule.epochs"),
        (["--ema.enable", "true"], "ema.enabled"),
        (["--ema.update_decay", "0.9"], "ema.decay"),
        (["--data.worker=3"], "data.workers"),
        (["--conf", "x.yaml"], "config"),
    ],
)
def test_unknown_options_name_the_nearest(error_of, words, nearest):
    error = error_of(*words)
    assert words[0].split("=")[0] in error and f"Did you mean {nearest}" in error


@pytest.mark.parametrize("words", [["--optim.l", "1"], ["--optim.weight", "1"], ["--he"], ["--train.log", "2"]])
def test_shortened_names_are_refused(error_of, words):
    assert "unrecognized arguments" in error_of(*words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim:\n  lrr: 1\n", "Did you mean optim.lr?"),
        ("train:\n  batchsize: 8\n", "Did you mean train.batch_size?"),
        ("optimizer:\n  lr: 1\n", "Did you mean optim.lr?"),
        ("lr: 1\n", "lr"),
        ("optim:\n  lr: abc\n", "optim.lr is abc; it takes float"),
        ("optim: 5\n", "optim is a section"),
        ("optim:\n", "optim is a section"),
        ("optim: [1]\n", "optim is a section"),
        ("", "holds no options"),
        ("# a comment\n", "holds no options"),
        ("- optim\n", "holds no options"),
        ("optim: {lr: 1\n", "YAML"),
        ("optim: {lr: 1}\ntrain: {seed: 1}\noptim: {eps: 1}\n", "optim is given twice, again in line 3"),
        ("optim:\n  lr: 1\n  eps: 1\n  lr: 2\n", "optim.lr is given twice, again in line 4"),
        ("ema:\n  enabled: 3\n", "ema.enabled is 3; it takes bool"),
        ("model:\n  layers: 4\n", "model.layers is 4; it takes list[int]"),
        ("data:\n  on_error: ignore\n", "data.on_error is ignore; it takes fail or skip"),
        ("data:\n  on_error: off\n", "data.on_error is False; it takes fail or skip"),
        ("augment:\n  mean: [123.675, 116.28, 103.53]\n", "If yours is of 0 to 255, it is [0.485, 0.456, 0.406]"),
        ("augment:\n  std: [58.395, 57.12, 57.375]\n", "If yours is of 0 to 255, it is [0.229, 0.224, 0.225]"),
        ("augment:\n  erase_prob: 25\n", "augment.erase_prob is 25.0; it is in [0, 1]. 25 % is 0.25"),
        ("mix:\n  prob: 50\n", "mix.prob is 50.0; it is in [0, 1]. 50 % is 0.5"),
        ("optim:\n  weight_decay: 5\n", "optim.weight_decay is 5.0; it is in [0, 1]"),
    ],
)
def test_mistakes_in_a_recipe(error_of, recipe, text, message):
    assert message in error_of("--config", recipe(text))


FIELDS = [(s.name, f) for s in fields(Config) for f in fields(s.default_factory)]


@pytest.mark.parametrize("section, field", FIELDS, ids=lambda given: given if isinstance(given, str) else given.name)
def test_null_is_refused_by_name_where_it_is_no_value(error_of, recipe, section, field):
    path = recipe(f"{section}: {{{field.name}: null}}\n")
    if "None" in str(field.type):
        config, _ = parse(build_parser("train.py", ""), ["--config", path])
        assert getattr(getattr(config, section), field.name) is None
    else:
        assert f"{section}.{field.name} is null; it takes " in error_of("--config", path)


def test_what_yaml_reads_as_a_boolean_is_the_word_that_was_written(recipe):
    for spelling in ("off", "Off", '"off"'):
        path = recipe(f"token_label: {{ground_truth: {spelling}}}\ntrain: {{channels_last: off}}\n")
        config, _ = parse(build_parser("train.py", ""), ["--config", path])
        assert config.token_label.ground_truth == "off" and config.train.channels_last is False


def test_a_recipe_that_is_not_there(error_of, tmp_path):
    assert "nowhere.yaml" in error_of("--config", str(tmp_path / "nowhere.yaml"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train.batch_size", "1.5"], "train.batch_size is 1.5; it takes int"),
        (["--train.batch_size", "0"], "train.batch_size is 0"),
        (["--optim.lr", "nan"], "optim.lr"),
        (["--optim.lr=-1e-3"], "optim.lr is -0.001"),
        (["--optim.betas", "[0.9]"], "optim.betas"),
        (["--train.channels_last", "yea"], "train.channels_last is yea; it takes auto or bool"),
        (
            ["--train.precision", "fp8"],
            "train.precision is fp8; it takes auto or fp32 or tf32 or bf16 or fp16 or apex_o1",
        ),
        (["--model.layers", "[1,x]"], "model.layers"),
        (["--model.img_size", "[224]"], "model.img_size is [224]"),
        (["--model.num_classes", "1"], "model.num_classes is 1"),
        (["--model.drop_path_rate", "1"], "model.drop_path_rate is 1"),
        (["--augment.scale", "[0.5, 0.1]"], "augment.scale is [0.5, 0.1]"),
        (["--augment.std", "[0, 1, 1]"], "augment.std"),
        (["--mix.prob", "1.5"], "mix.prob is 1.5"),
        (["--ema.decay", "1"], "ema.decay is 1"),
        (["--loss.smoothing", "1"], "loss.smoothing is 1"),
        (["--optim.lr"], "expected one argument"),
        (["recipe.yaml"], "recipe.yaml"),
        # Options that contradict each other, each alone in its range:
        (["--schedule.epochs", "10"], "schedule.warmup_epochs is 20; it is between 0 and schedule.epochs (10)"),
        (["--eval.weights", "ema"], "ema.enabled is false"),
        (["--model.return_dense", "false"], "loss.dense_weight"),
        (["--model.return_mean", "true", "--loss.dense_weight", "0"], "mix.mix_token"),
    ],
)
def test_mistakes_on_the_line(error_of, words, message):
    assert message in error_of(*words)


def test_options_that_agree_pass():
    config_of("--schedule.epochs", "10", "--schedule.warmup_epochs", "10")
    config_of("--eval.weights", "ema", "--ema.enabled", "true")
    config_of("--model.return_mean", "true", "--loss.dense_weight", "0", "--mix.mix_token", "false")


# -------------------------------------------------------------------------------------------- there and back


def changed() -> Config:
    return config_of(
        *("--model.img_size", "[64,32]", "--model.layers", "[1,2]", "--model.mlp_ratios", "[2,2.5]"),
        *(
            "--optim.lr",
            "5e-5",
            "--optim.eps",
            "1e-30",
            "--train.name",
            "5e-5",
            "--data.root",
            "no",
            "--ema.decay",
            "0.1",
        ),
    )


@pytest.mark.parametrize("make", [lambda: DEFAULTS, changed])
def test_a_saved_config_reads_back_equal(tmp_path, make):
    config, path = make(), tmp_path / "config.yaml"
    save_config(config, path)
    assert config_of("--config", str(path)) == config
    assert load_config(config_to_dict(config)) == config


NUMBERS_IN_TEXT = st.from_regex(r"[-+]?[0-9]{0,2}(_[0-9])?\.?[0-9_]{0,2}([eE:][-+]?[0-9]{1,2})?", fullmatch=True)
WORDS_OF_YAML = st.sampled_from(["no", "null", "~", "true", "2026-01-01", ".inf", ".nan", "0x1F", "1:30", "- a", "# b"])


@settings(deadline=None, max_examples=15)
@given(
    lr=st.floats(1e-5, 1e300),
    name=st.text(st.characters(codec="utf-8", exclude_categories=["Cs"])) | NUMBERS_IN_TEXT | WORDS_OF_YAML,
    layers=st.none() | st.lists(st.integers(1, 99)),
    scale=st.tuples(st.floats(1e-9, 1), st.floats(1e-9, 1)),
)
@example(lr=5e-5, name="5e-5", layers=[1], scale=(1e-5, 1.0))
def test_any_values_survive_the_file(tmp_path_factory, lr, name, layers, scale):
    config = replace(
        DEFAULTS,
        optim=OptimConfig(lr=lr),
        train=TrainConfig(name=name),
        model=replace(DEFAULTS.model, layers=layers),
        augment=replace(DEFAULTS.augment, scale=sorted(scale)),
    )
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    save_config(config, path)
    assert config_of("--config", str(path)) == config


def test_load_config_refuses_what_it_does_not_know():
    values = config_to_dict(DEFAULTS)
    with pytest.raises(ValueError, match="Did you mean optim.lr"):
        load_config(values | {"optim": {"lrr": 1.0}})
    with pytest.raises(ValueError, match="optim.lr is x; it takes float"):
        load_config(values | {"optim": {"lr": "x"}})
    with pytest.raises(ValueError, match="ema.enabled is false"):
        load_config({"eval": {"weights": "ema"}})


# ------------------------------------------------------------------------------------------------------ help


@cache
def help_entries() -> dict[str, str]:
    """The entry of every option in --help, its lines joined."""
    entries = re.split(r"\n\n|\n  (?=-)", parser().format_help())
    return {entry.split()[0].removeprefix("--").rstrip(","): " ".join(entry.split()) for entry in entries}


@pytest.mark.parametrize(("section", "field"), OPTIONS, ids=[".".join(option) for option in OPTIONS])
def test_help_tells_meaning_and_default_of_every_option(section, field):
    entry = help_entries()[f"{section}.{field}"]
    meaning, default = re.search(
        r"^--\S+ (?:\{.*?\}|\S+)(?:, --\S+\+ \S+)? (.*) \(type: .*, default: (.*)\)$", entry
    ).group(1, 2)
    assert len(meaning) >= 12 and meaning.endswith("."), entry
    value = getattr(getattr(DEFAULTS, section), field)
    # A narrow terminal may break a value at a space or hyphen.
    assert default.replace(" ", "") == ("null" if value is None else str(value).replace(" ", "")), entry


def test_the_help_lists_no_option_that_is_not_there():
    listed = {name for name in help_entries() if "." in name}
    assert {f"{section}.{field}" for section, field in OPTIONS} == listed
    assert asdict(DEFAULTS).keys() == {section for section, _ in OPTIONS}


def of_an_earlier_version() -> dict:
    """The resolved config of a run of the time when the published code was called reference."""
    values = config_to_dict(replace(DEFAULTS, optim=OptimConfig(lr=5e-5)))
    values["augment"]["order"] = values["token_label"]["geometry"] = values["train"]["kernel"] = "reference"
    values["data"]["relist"] = False
    return values


def test_configs_of_earlier_versions_open_with_the_names_of_today(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(of_an_earlier_version()), encoding="utf-8")
    for config in (
        config_of("--config", str(path)),
        config_of(f"--config={path}"),
        load_config(of_an_earlier_version()),
    ):
        assert (config.augment.order, config.token_label.geometry) == ("published", "published")
        assert (config.train.kernel, config.optim.lr) == ("eager", 5e-5)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("augment.order", "reference", "augment.order reference is now called published"),
        ("token_label.geometry", "reference", "token_label.geometry reference is now called published"),
        ("token_label.geometry", "reference_sparse", "reference_sparse is now called published"),
        ("train.kernel", "reference", "train.kernel reference is now called eager"),
        ("data.relist", "true", "data.cache"),
    ],
)
def test_names_of_earlier_versions_are_refused_with_the_new_one(option, value, message, tmp_path, capsys):
    section, field = option.split(".")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{section}:\n  {field}: {value}\n", encoding="utf-8")
    for words in ([f"--{option}", value], ["--config", str(recipe)]):
        with pytest.raises(SystemExit) as ended:
            config_of(*words)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "model: " + "[" * 10_000 + "]" * 10_000,
        "model: " + "[" * 30 + "]" * 30,
        "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 18)),
        "model: &a [*a]",
    ],
)
def test_a_recipe_of_endless_values_is_refused(tmp_path, capsys, text):
    recipe = tmp_path / "deep.yaml"
    recipe.write_text(text)
    with pytest.raises(SystemExit) as info:
        parse(build_parser("train.py", ""), ["--config", str(recipe)])
    assert info.value.code == 2
    assert f"{recipe} is no recipe: its values are nested more than 20 deep" in capsys.readouterr().err.splitlines()[-1]


def test_a_config_file_cannot_speak_to_the_terminal(error_of, recipe):
    said = error_of("--config", recipe('train: {"na\\e[2Jme": x}\n'))
    assert "\x1b" not in said and r"na\x1b[2Jme" in said
