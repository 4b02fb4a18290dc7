"""Turns the bytes of an image into the network's input, uint8 [3, H, W]; no files."""
