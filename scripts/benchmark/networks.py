"""What the options --networks and --variants of a benchmark name."""

from collections.abc import Collection
from dataclasses import dataclass

from volo.models.architecture import get_architecture


@dataclass(frozen=True)
class Network:
    """A network to run: its name, its image side in pixels and the batch size."""

    name: str
    side: int
    batch: int

    def __str__(self) -> str:
        return f"{self.name}:{self.side}:{self.batch}"


def networks_of(option: str) -> list[Network]:
    """Return the networks of --networks; ValueError if one is not NAME:IMAGE_SIDE:BATCH of a network there is."""
    networks = []
    for word in option.split(","):
        name, *numbers = word.strip().split(":")
        if len(numbers) != 2 or not all(number.isdecimal() and int(number) for number in numbers):
            raise ValueError(
                f"--networks has {word!r}; each is NAME:IMAGE_SIDE:BATCH, with numbers above 0, as volo_d1:224:128"
            )
        network = Network(name, *map(int, numbers))
        get_architecture(name).stage_grids(network.side)  # refuses what cannot be made
        networks.append(network)
    return networks


def variants_of(option: str, names: Collection[str]) -> list[str]:
    """Return the names at the positions that --variants lists; ValueError if there is no such position."""
    words = [word.strip() for word in option.split(",")]
    for word in words:
        if not (word.isdecimal() and int(word) < len(names)):
            raise ValueError(f"--variants has {word!r}; each is a position from 0 to {len(names) - 1}")
    return [list(names)[int(word)] for word in words]
