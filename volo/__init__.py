"""volo: training and evaluation of VOLO (Vision Outlooker, arXiv 2106.13112)."""

from volo.models import create_model, list_models, load_checkpoint

__all__ = ["create_model", "list_models", "load_checkpoint"]
__version__ = "0.1.0"
