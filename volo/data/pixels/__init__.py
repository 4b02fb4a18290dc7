"""From the bytes of an image to uint8 [3, H, W]."""
