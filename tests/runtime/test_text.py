"""Names that others wrote, shown: nothing in them reaches the terminal as a command."""

import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from volo.runtime.text import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x1b]0;title\x07.jpg", r"\x1b[2J\x1b]0;title\x07.jpg"),
        ("a\nerror: b\r\tc\0\x7f", r"a\nerror: b\r\tc\x00\x7f"),
        ("\x9b31m\u2028\u202egpj.x", r"\x9b31m\u2028\u202egpj.x"),
        ("caf\udce9", r"caf\udce9"),
        ("Straße, 日本　語, naïve, 👩‍🔬, \\x1b, C:\\new", "Straße, 日本　語, naïve, 👩‍🔬, \\x1b, C:\\new"),
    ],
)
def test_what_a_terminal_obeys_is_escaped_and_letters_stay(text, shown):
    assert printable(text) == shown


@given(st.text(st.characters() | st.characters(categories=["Cs", "Cc"])))
@example("\ud800\n\x1b")
def test_any_text_is_shown_in_one_line_that_can_be_encoded(text):
    shown = printable(text)
    shown.encode()
    assert not any(unicodedata.category(one) in ("Cc", "Cs", "Zl", "Zp") for one in shown)
    assert len(shown.splitlines()) <= 1 and printable(shown) == shown
    assert printable(text, keep="\n").split("\n") == [printable(line) for line in text.split("\n")]
