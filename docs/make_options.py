#!/usr/bin/env python
"""Write docs/options.md from the dataclasses that hold the options, so that the page cannot say anything else.

python docs/make_options.py
"""

import importlib.util
import re
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from docstring_parser import parse

from volo.config import Config, ValidationOptions
from volo.prepare_imagenet.options import COMMANDS
from volo.token_labels.generation.options import GenerateOptions
from volo.token_labels.pack_options import PackOptions

PAGE = Path(__file__).with_name("options.md")
SCRIPTS = PAGE.parents[1] / "scripts"
HEAD = """\
# Options

Written by `python docs/make_options.py` from the code; do not edit.

`train.py`, `validate.py` and `scripts/show_batch.py` take every option of the sections below, in a recipe
(`--config RECIPE.yaml`) or on the command line as `--section.field VALUE`. Defaults come first, then the recipe, then
the command line. Lists are written `--model.layers "[4,4,8,2]"`. `--help` prints the same, `--print_config` what a
command resolves to. Unknown names are errors that suggest the nearest valid one.
"""


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """Return the page."""
    contents = " · ".join(f"[{section.name}](#{section.name})" for section in fields(Config))
    others = " · ".join(f"[{name}](#{re.sub(r'[^a-z_ ]', '', name).replace(' ', '-')})" for name in programs())
    parts = [HEAD, f"Recipes: {contents}\n", f"Programs: {others}\n"]
    for section in fields(Config):
        options = get_type_hints(Config)[section.name]
        parts.append(chapter(section.name, options, f"{section.name}."))
    parts += [chapter(program, options, "--") for program, options in programs().items()]
    return "\n".join(parts)


def programs() -> dict[str, type]:
    """Return the options that each program has beside those of recipes, by the program's name."""
    return {
        "validate.py": ValidationOptions,
        "show_batch.py": defined_in("show_batch.py", "ShowBatchOptions"),
        "generate_token_labels.py": GenerateOptions,
        "pack_token_labels.py": PackOptions,
        **{f"prepare_imagenet.py {command}": options for command, options in COMMANDS.items()},
        "benchmark/model.py": defined_in("benchmark/model.py", "ModelBenchmarkOptions"),
        "benchmark/step.py": defined_in("benchmark/step.py", "StepOptions"),
        "benchmark/roofline.py": defined_in("benchmark/roofline.py", "RooflineOptions"),
        "benchmark/loader.py": defined_in("benchmark/loader.py", "LoaderBenchmarkOptions"),
    }


def defined_in(script: str, name: str) -> type:
    """Return a class that a script defines."""
    spec = importlib.util.spec_from_file_location(Path(script).stem, SCRIPTS / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def chapter(title: str, options: type, prefix: str) -> str:
    """Return the heading, what the options have in common, and the table of one dataclass."""
    docs = parse(options.__doc__)
    described = [
        parameter for base in options.__mro__ if base is not object for parameter in parse(base.__doc__).params
    ]
    meanings = {parameter.arg_name: " ".join(parameter.description.split()) for parameter in described}
    hints = get_type_hints(options)
    about = " ".join(filter(None, [docs.short_description, docs.long_description])).replace("``", "`")
    rows = ["| option | type | default | meaning |", "|-|-|-|-|"]
    for field in fields(options):
        cells = (f"`{prefix}{field.name}`", type_name(hints[field.name]), default(field), meanings[field.name])
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([f"## {title}", "", " ".join(about.split()), "", *rows, ""])


def type_name(hint) -> str:
    """Return a type in words; None, which an unset option is, is left out."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in args)
    if origin is list:
        return f"list of {type_name(args[0])}"
    if origin is tuple:
        return f"{type_name(args[0])}, one or more"
    if args:  # a union
        return " or ".join(type_name(part) for part in args if part is not type(None))
    return {"str": "text"}.get(hint.__name__, hint.__name__)


def default(field: Field) -> str:
    """Return the default as it is typed on the command line."""
    if field.default is MISSING and field.default_factory is MISSING:
        return "required"
    value = field.default if field.default is not MISSING else field.default_factory()
    if value is None or value == ():
        return "unset"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, list):
        return "`[" + ", ".join(f"{number:.4g}" for number in value) + "]`"
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`{value}`" if value != "" else "empty"


if __name__ == "__main__":
    main()
