"""Token labels: a teacher's top scores for every cell of an image, and the way from there to dense targets.

store (the packed file format, read by all workers and ranks at once) and writer; published (the folder of .pt files
of the published code); opening (either of them, checked against a data set); pack (one into the other).
"""

from volo.token_labels.opening import check_covers, open_labels
from volo.token_labels.published import PublishedLabels
from volo.token_labels.store import StoreHeader, TokenLabelMap, TokenLabelStore, label_key
from volo.token_labels.writer import StoreWriter

__all__ = [
    "PublishedLabels",
    "StoreHeader",
    "StoreWriter",
    "TokenLabelMap",
    "TokenLabelStore",
    "check_covers",
    "label_key",
    "open_labels",
]
