"""What is on disk, in whatever format, as a list of images; no pixels."""
