"""The choice between render.cpp and Pillow, which compute the same bytes."""

from volo.data.pixels import jpeg_region, pillow_render, render


class Backend:
    """The functions of one backend.

    Args:
        choice: ``augment.backend``: "native", "pillow", or "auto" (native if it can be built).

    Attributes:
        box_needed: (plan, image_hw, out_hw) -> the box of the image that has to be decoded; None for all of it.
        render: (pixels, plan, out_hw, fill) -> the output, uint8 [3, h, w].

    Raises:
        ValueError: The choice is "native", and it cannot be built.
    """

    def __init__(self, choice: str):
        reason = render.unavailable_reason() if choice != "pillow" else "chosen by augment.backend"
        if reason and choice == "native":
            raise ValueError(f"augment.backend is 'native'. {reason}. Give auto or pillow")
        self.native = reason is None
        module = render if self.native else pillow_render
        self.box_needed, self.render = module.box_needed, module.render
        self._reason = reason or jpeg_region.unavailable_reason()

    def __str__(self) -> str:
        if not self.native:
            return f"Pillow ({self._reason})"
        return f"native (decodes whole rows of JPEGs, a little slower: {self._reason})" if self._reason else "native"
