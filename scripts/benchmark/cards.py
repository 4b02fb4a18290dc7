"""What cards can do at most, from their maker's data sheets: the peaks that benchmarks compare with."""

from typing import NamedTuple


class Card(NamedTuple):
    """The peaks of a card: dense bf16 products, and bytes to and from its memory, per second."""

    flops: float
    bytes: float


# The SXM versions: NVIDIA H100 (80 GB HBM3), H200 (141 GB HBM3e) and A100 (80 GB HBM2e) Tensor Core GPU data sheets.
CARDS: dict[str, Card] = {
    "H100": Card(989e12, 3.35e12),
    "H200": Card(989e12, 4.8e12),
    "A100": Card(312e12, 2.039e12),
}


def card_of(device_name: str) -> Card | None:
    """Return the card in a device's full name, as "NVIDIA H100 80GB HBM3"; None if it is not known here."""
    return next((card for name, card in CARDS.items() if name in device_name), None)
