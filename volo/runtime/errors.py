"""Expected failures and their exit codes."""


class Failure(Exception):
    """The run failed for the reason in the message; the program ends with exit code 1."""


class UnusableFile(ValueError):
    """A file that is damaged or refused whatever the options are; exit code 1, even if found before any work."""


class DataError(ValueError):
    """Data that a run needs cannot be read: an unreadable image, or a failed data worker; the message is one line."""
