"""The network: VOLO, its named architectures, the outlook operator, and checkpoints in."""

from volo.models.architecture import Architecture, get_architecture, list_models
from volo.models.create import create_model
from volo.models.outlook_attention import outlook_attention
from volo.models.volo import VOLO, TokenLogits
from volo.models.weights import LoadReport, load_checkpoint, read_checkpoint

__all__ = [
    "VOLO",
    "Architecture",
    "LoadReport",
    "TokenLogits",
    "create_model",
    "get_architecture",
    "list_models",
    "load_checkpoint",
    "outlook_attention",
    "read_checkpoint",
]
