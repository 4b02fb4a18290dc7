"""Failures that explain themselves, and what they mean for the exit code."""


class Failure(Exception):
    """Something went wrong on the way, as the message says; the program ends with exit code 1."""


class UnusableFile(ValueError):
    """A file that is damaged or refused, whatever the options are: exit code 1, even if found before any work."""
