"""The choice of what computes pixels: render.cpp, or Pillow, which gives the same bytes."""

from volo.data.pixels import jpeg_region, pillow_render, render


class Backend:
    """One of the two backends; both have the same two functions.

    Args:
        choice: ``augment.backend``: "native", "pillow", or "auto", which is native if it can be built.

    Attributes:
        box_needed: (plan, image_hw, out_hw) -> the part of the image that has to be decoded; None for all of it.
        render: (pixels, plan, out_hw, fill) -> the output, uint8 [3, h, w].

    Raises:
        ValueError: "native" was asked for and cannot be built.
    """

    def __init__(self, choice: str):
        reason = render.unavailable_reason() if choice != "pillow" else "as asked for"
        if reason and choice == "native":
            raise ValueError(f"augment.backend is 'native'. {reason}; give auto or pillow")
        self.native = reason is None
        module = render if self.native else pillow_render
        self.box_needed, self.render = module.box_needed, module.render
        self._reason = reason or jpeg_region.unavailable_reason()

    def __str__(self) -> str:
        if not self.native:
            return f"Pillow ({self._reason})"
        return f"native (JPEGs by whole rows, a little slower: {self._reason})" if self._reason else "native"
