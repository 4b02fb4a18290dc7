"""From the command line to a :class:`volo.config.Config`.

Precedence: the defaults of ``volo/config.py``, then the recipe given with ``--config``, then ``--section.field
value``, wherever on the line they stand. Unknown names and wrong types end with exit code 2, before any work.
"""

import difflib
import re
import sys
from dataclasses import asdict, fields
from pathlib import Path

import yaml
from jsonargparse import ArgumentParser

from volo.config import Config

USAGE_EXIT_CODE = 2


class RecipeParser(ArgumentParser):
    """An argument parser whose errors are short and name the nearest valid option."""

    def error(self, message, ex=None):
        hint = self._nearest(str(message))
        if not self.exit_on_error:
            raise ValueError(f"{message}{hint}") from ex
        print(f"Every option with its meaning: {self.prog} --help", file=sys.stderr)
        print(f"{self.prog}: error: {message}{hint}", file=sys.stderr)
        sys.exit(USAGE_EXIT_CODE)

    def _nearest(self, message: str) -> str:
        group = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
        if group:
            wanted = f"{group[1]}.{group[2]}"
        else:
            found = re.search(r"(?:unrecognized arguments: --|Option ')([\w.]+)", message)
            if not found:
                return ""
            wanted = found[1]
        close = difflib.get_close_matches(wanted, self._option_names(), n=1, cutoff=0.5)
        return f". Did you mean {close[0]}?" if close else ""

    def _option_names(self) -> list[str]:
        return [a.dest for a in self._actions if a.dest not in ("help", "print_config")]


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


def parse(parser: RecipeParser, argv: list[str]) -> tuple[Config, dict]:
    """Parse ``argv``; return the config and the values of the arguments the caller added to ``parser``.

    Exits with code 2 and a message when something is unknown, of a wrong type or contradicts another option.
    """
    try:
        values = vars(parser.instantiate(parser.parse_args(_recipe_first(argv))))
        sections = {f.name: values.pop(f.name) for f in fields(Config)}
        config = Config(**sections)
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    values.pop("config", None)
    return config, values


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


def config_to_dict(config: Config) -> dict:
    """Return ``config`` as nested dictionaries of plain values, for YAML files and checkpoints."""
    return asdict(config)


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config as YAML that ``--config`` reads back to an equal config."""
    path.write_text(yaml.safe_dump(config_to_dict(config), sort_keys=False))


def load_config(values: dict) -> Config:
    """Return the :class:`Config` of nested dictionaries, such as those kept in a checkpoint.

    Raises ValueError where a field is unknown or of a wrong type.
    """
    parser = build_parser("config", "")
    parser.exit_on_error = False
    sections = vars(parser.instantiate(parser.parse_object(values)))
    return Config(**{f.name: sections[f.name] for f in fields(Config)})
