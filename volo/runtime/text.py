"""Showing text that others wrote: names of files, classes and archive members may hold anything."""

import re

# Control characters (with the escape sequences that they begin), line and paragraph separators, marks that turn the
# direction of writing, and lone surrogates, which stand for bytes of file names that are not UTF-8.
_RAW = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, keep: str = "") -> str:
    r"""Return ``text`` with what a terminal would obey, or cannot encode, written as in Python: ``\x1b``, ``\n``.

    Letters of any script stay, and so does what is escaped already.

    Args:
        text: One line.
        keep: Characters that stay nevertheless: a line feed, for text of several lines that are our own.
    """
    return _RAW.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)
