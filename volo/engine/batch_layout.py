"""How the global batch is spread over processes and passes."""

from dataclasses import dataclass

from volo.config import Config


@dataclass(frozen=True)
class BatchLayout:
    """How the global batch is spread: every process takes ``micro_batches`` passes of ``micro_size`` images."""

    global_size: int
    world_size: int
    micro_batches: int
    micro_size: int

    @classmethod
    def of(cls, config: Config, world_size: int) -> "BatchLayout":
        """Plan ``train.batch_size`` over ``world_size`` processes; raise ValueError if it does not divide."""
        total, most = config.train.batch_size, config.train.device_batch_size
        if total < world_size:
            raise ValueError(
                f"train.batch_size is {total}, over {world_size} processes, less than one image each. Start at most "
                f"{total} processes or raise train.batch_size to {world_size} or more"
            )
        # MixUp and CutMix pair the images of a pass.
        pairs = 2 if config.mix.mixes_images else 1
        unit = pairs * world_size
        if total % unit:
            near = [str(n) for n in (total // unit * unit, (total // unit + 1) * unit) if n]
            what = "into pairs for MixUp and CutMix, " if pairs == 2 else ""
            raise ValueError(
                f"train.batch_size {total} does not divide {what}over {world_size} processes; the nearest that do: "
                f"{' and '.join(near)}"
            )
        if most < pairs:
            raise ValueError(
                f"train.device_batch_size is {most}, but MixUp and CutMix pair the images of a pass. Set 2 or more"
            )
        share = total // world_size
        passes = next(n for n in range(1, share + 1) if share % (n * pairs) == 0 and share // n <= most)
        return cls(total, world_size, passes, share // passes)
