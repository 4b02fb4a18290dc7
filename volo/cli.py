"""From the command line to a :class:`volo.config.Config`.

Precedence: the defaults of ``volo/config.py``, then the recipe given with ``--config``, then ``--section.field
value``, wherever on the line they stand. Unknown names and wrong types end with exit code 2, before any work.
"""

import difflib
import re
import sys
from dataclasses import asdict, fields
from pathlib import Path
from types import UnionType
from typing import Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser

from volo.config import REMOVED_FIELDS, RENAMED_VALUES, Config
from volo.runtime.exit_codes import USAGE, forgo_restarts, leave_for_launcher
from volo.runtime.text import printable

_DEEPEST, _MOST_VALUES = 20, 100_000  # of a recipe, aliases followed; far beyond any
_Options = TypeVar("_Options")


class RecipeParser(ArgumentParser):
    """An argument parser whose errors are short and name the nearest valid option."""

    options_class: type = Config  # whose fields its options are

    def error(self, message, ex=None) -> NoReturn:
        hint = self._nearest(str(message))
        message = _in_one_line(str(message), self.options_class)
        if not self.exit_on_error:
            raise ValueError(f"{message}{hint}") from ex
        message, hint = printable(message), printable(hint)  # a config file may be anybody's
        print(f"Every option with its meaning: {self.prog} --help", file=sys.stderr)
        print(f"{self.prog}: error: {message}{hint}", file=sys.stderr)
        leave_for_launcher(USAGE, f"{message}{hint}")
        forgo_restarts()
        sys.exit(USAGE)

    def _nearest(self, message: str) -> str:
        group = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
        if group:
            wanted = f"{group[1]}.{group[2]}"
        else:
            found = re.search(r"(?:unrecognized arguments: --|Option ')([\w.-]+)", message)
            if not found:
                return ""
            wanted = found[1].replace("-", "_")  # options of scripts once had hyphens
        section, _, name = wanted.partition(".")
        if remedy := REMOVED_FIELDS.get((section, name)):
            return f". That option was removed: {remedy}"
        if wanted == "geometry":  # of the scripts for token labels
            return ". It is now called covers, with the values whole_image and center_crop"
        if wanted == "token_label.size":  # an option of the published code
            return ". It follows from the network's grid (14 x 14 tokens for D1 at 224 px), whatever the maps have"
        names = self._option_names()
        in_section = [name for name in names if name.startswith(wanted.split(".")[0] + ".")]
        close = difflib.get_close_matches(wanted, in_section or names, n=1, cutoff=0.5)
        return f". Did you mean {close[0]}?" if close else ""

    def _option_names(self) -> list[str]:
        no_fields = {"help", "print_config", *(section.name for section in fields(Config))}
        return [a.dest for a in self._actions if a.dest not in no_fields]


def build_parser(prog: str, description: str) -> RecipeParser:
    """Return a parser of every option of :class:`Config`, plus ``--config``."""
    parser = RecipeParser(
        prog=prog,
        description=description,
        usage=f"{prog} --config RECIPE.yaml [--section.field VALUE ...]",
        allow_abbrev=False,  # a shortened name is a typing error here, not a guess
    )
    parser.add_argument("--config", action="config", help="Recipe in YAML; options on the line override it.")
    parser.add_class_arguments(Config)
    return parser


def parse_options(
    options_class: type[_Options], argv: list[str], *, prog: str, usage: str | None, description: str
) -> _Options:
    """Return the options of a script, a dataclass, from its command line; without ``usage``, it is made from them.

    Exits with code 2 and a message when something is unknown, of a wrong type or contradicts another option.
    """
    usage = f"{prog} {usage}" if usage else None
    parser = RecipeParser(prog=prog, description=description, usage=usage, allow_abbrev=False)
    parser.options_class = options_class
    parser.add_class_arguments(options_class)
    try:
        return options_class(**vars(parser.parse_args(argv)))
    except ValueError as error:
        parser.error(str(error))


def parse_command(commands: dict[str, type[_Options]], argv: list[str], *, prog: str, description: str) -> _Options:
    """Return the options of a script with commands: an instance of the class of the command that ``argv`` begins with.

    Exits as :func:`parse_options` does.
    """
    summaries = {name: (options_class.__doc__ or "").splitlines()[0] for name, options_class in commands.items()}
    if argv and argv[0] in commands:
        return parse_options(
            commands[argv[0]], argv[1:], prog=f"{prog} {argv[0]}", usage=None, description=summaries[argv[0]]
        )
    parser = RecipeParser(prog=prog, description=description, allow_abbrev=False)
    subcommands = parser.add_subcommands(required=True, dest="command", metavar="COMMAND")
    for name, summary in summaries.items():
        subcommands.add_subcommand(name, RecipeParser(), help=summary)
    parser.parse_args(argv)
    parser.error(f"give one of {', '.join(commands)} first")


def parse(parser: RecipeParser, argv: list[str]) -> tuple[Config, dict]:
    """Parse ``argv``; return the config and the values of the arguments the caller added to ``parser``.

    Exits with code 2 and a message when something is unknown, of a wrong type or contradicts another option.
    """
    argv = _recipe_first(argv)
    try:
        for recipe in _recipes(argv):
            _check_recipe(recipe)
        argv = [_upgraded_recipe(word) for word in argv]
        parsed = parser.parse_args(argv)
        _refuse_null(parsed)
        values = vars(parser.instantiate(parsed))
        sections = {f.name: values.pop(f.name) for f in fields(Config)}
        config = Config(**sections)
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    values.pop("config", None)
    return config, values


def _refuse_null(parsed) -> None:
    """Raise ValueError for an option that is null and may not be; the parser takes null for any."""
    for section, kind in get_type_hints(Config).items():
        for name, wanted in get_type_hints(kind).items():
            values = getattr(parsed, section, None)
            if getattr(values, name, "missing") is None and type(None) not in get_args(wanted):
                raise ValueError(
                    f"{section}.{name} is null; it takes {_in_words(wanted)}. Leave it out for the default"
                )


def _recipe_first(argv: list[str]) -> list[str]:
    # jsonargparse applies arguments in order, so an option in front of --config would lose against the recipe.
    recipes, rest, i = [], [], 0
    while i < len(argv):
        if argv[i] == "--config":
            recipes += argv[i : i + 2]
            i += 2
        elif argv[i].startswith("--config="):
            recipes.append(argv[i])
            i += 1
        else:
            rest.append(argv[i])
            i += 1
    return recipes + rest


def _recipes(argv: list[str]) -> list[Path]:
    joined = [word.removeprefix("--config=") for word in argv if word.startswith("--config=")]
    apart = [argv[i + 1] for i, word in enumerate(argv[:-1]) if word == "--config"]
    return [Path(name) for name in joined + apart if Path(name).is_file()]


def _check_recipe(path: Path) -> None:
    """Refuse what YAML accepts but nobody means: a key given twice, a section without fields."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    except RecursionError as error:
        raise ValueError(_too_much(path)) from error
    _require_small(root, path)
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path} holds no options. A recipe has sections, such as optim, with fields under them")
    for name, section in _pairs(root, f"{path}: ").items():
        if isinstance(section, yaml.MappingNode):
            _pairs(section, f"{path}: {name}.")
        elif name in (f.name for f in fields(Config)):
            raise ValueError(f"{path}: {name} is a section, so it needs fields under it; leave it out for the defaults")


def _require_small(root: yaml.Node | None, path: Path) -> None:
    """Raise ValueError if what follows the aliases of a recipe would take ages or exhaust the stack."""
    level: list[yaml.Node] = [root] if root else []
    values = 0
    for _ in range(_DEEPEST):
        nested = [node for node in level if isinstance(node, yaml.CollectionNode)]
        values += sum(len(node.value) for node in nested)
        if values > _MOST_VALUES:
            break
        if not nested:
            return
        level = []
        for node in nested:
            level += [one for pair in node.value for one in pair] if isinstance(node, yaml.MappingNode) else node.value
    raise ValueError(_too_much(path))


def _too_much(path: Path) -> str:
    return (
        f"{path} is no recipe: its values are nested more than {_DEEPEST} deep, or more than {_MOST_VALUES:,}. A "
        "recipe has sections, such as optim, with fields under them"
    )


def _pairs(mapping: yaml.MappingNode, where: str) -> dict[str, yaml.Node]:
    pairs: dict[str, yaml.Node] = {}
    for key, value in mapping.value:
        if key.value in pairs:
            raise ValueError(f"{where}{key.value} is given twice, again in line {key.start_mark.line + 1}; keep one")
        pairs[key.value] = value
    return pairs


def _in_one_line(message: str, options_class: type) -> str:
    """Return a parser's message as one line; one about a wrong type in the words of the options."""
    key = re.search(r'Parser key "(?:(\w+)\.)?(\w+)"', message)
    value = re.search(r"(?:Got|Given) value: (.*)", message)
    hints = get_type_hints(options_class)
    if key and key[1]:
        hints = get_type_hints(hints[key[1]]) if key[1] in hints else {}
    if not key or not value or key[2] not in hints:
        return " ".join(message.split())
    wanted = _in_words(hints[key[2]])
    name = f"{key[1]}.{key[2]}" if key[1] else f"--{key[2]}"
    if new := RENAMED_VALUES.get((key[1], key[2]), {}).get(value[1].strip("'")):
        return f"{name} {value[1]} is now called {new}; it takes {wanted}"
    return f"{name} is {value[1]}; it takes {wanted}"


def _in_words(kind) -> str:
    """Return the type of an option as an error message says it; None, which an unset option is, is left out."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(map(str, args))
    if origin in (Union, UnionType):
        return " or ".join(_in_words(part) for part in args if part is not type(None))
    return str(kind) if args else kind.__name__


def upgraded(values: dict) -> dict:
    """Return the sections of a config that an earlier version saved, with the current names."""
    return {
        section: {
            name: RENAMED_VALUES.get((section, name), {}).get(value, value) if isinstance(value, str) else value
            for name, value in (options or {}).items()
            if (section, name) not in REMOVED_FIELDS
        }
        for section, options in values.items()
    }


def _upgraded_recipe(word: str) -> str:
    """Return a word of the command line; for a recipe whose values need a change, the changed text.

    In every recipe YAML's booleans become the words that were written where a word is wanted. The config.yaml of an
    earlier version's run folder gets the current names. It has every section, which no recipe has: in a recipe an old
    name is an error that names the new one.
    """
    option, _, path = word.rpartition("=")
    if option not in ("", "--config") or not path.endswith(".yaml") or not Path(path).is_file():
        return word
    values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        return word
    new = {section: _with_words(section, options) for section, options in values.items()}
    if {field.name for field in fields(Config)} <= set(values):
        new = upgraded(new)
    if new == values:
        return word
    return f"{option}={_dump(new)}" if option else _dump(new)


def _with_words(section: str, options):
    """Return the options of a section with "off" for false, for example, where "off" is a value and false is none."""
    if not isinstance(options, dict) or section not in get_type_hints(Config):
        return options
    kinds = get_type_hints(get_type_hints(Config)[section])
    new = dict(options)
    for name, value in options.items():
        if isinstance(value, bool) and get_origin(kinds.get(name)) is Literal:
            spellings = ("on", "yes") if value else ("off", "no")
            new[name] = next((word for word in spellings if word in get_args(kinds[name])), value)
    return new


def _dump(values: dict) -> str:
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def config_to_dict(config: Config) -> dict:
    """Return ``config`` as nested dictionaries of plain values, for YAML files and checkpoints."""
    return asdict(config)


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config as YAML that ``--config`` reads back to an equal config."""
    path.write_text(_dump(config_to_dict(config)), "utf-8")


class _Dumper(yaml.SafeDumper):
    """Quotes text such as 5e-5, a string to PyYAML but a number to the parser that reads recipes."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.[\d_]+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_config(values: dict) -> Config:
    """Return the :class:`Config` of nested dictionaries, such as those kept in a checkpoint.

    Raises ValueError if a field is unknown or of a wrong type.
    """
    parser = build_parser("config", "")
    parser.exit_on_error = False
    parsed = parser.parse_object(upgraded(values))
    _refuse_null(parsed)
    sections = vars(parser.instantiate(parsed))
    return Config(**{f.name: sections[f.name] for f in fields(Config)})
