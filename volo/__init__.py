"""volo: training and evaluation of VOLO (Vision Outlooker, arXiv 2106.13112)."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from volo import losses
    from volo.models import create_model, list_models, load_checkpoint

__all__ = ["create_model", "list_models", "load_checkpoint", "losses"]
__version__ = "0.1.0"


def __getattr__(name: str):
    # Imported when asked for: PyTorch takes seconds, and --help or a misspelt option has no use for it.
    if name == "losses":
        return importlib.import_module("volo.losses")
    if name in __all__:
        from volo import models

        return getattr(models, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
