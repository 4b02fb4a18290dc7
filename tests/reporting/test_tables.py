"""Tables of plain text: cells as they are given, in columns that line up."""

from volo.reporting import text_table


def test_cells_stand_as_they_are_given():
    table = text_table(
        ["dataset", "images", "top-1", "difference"],
        [["imagenet", "50,000", 84.148, "+0.05"], ["real", "46,837", "88.900", None], ["v2", 9, 100, "-1"]],
        align="lrrr",
    )
    assert table.splitlines() == [
        "dataset      images    top-1    difference",
        "---------  --------  -------  ------------",
        "imagenet     50,000   84.148         +0.05",
        "real         46,837   88.900             -",
        "v2                9      100            -1",
    ]


def test_text_is_on_the_left_and_a_table_may_be_empty():
    assert text_table(["a", "b"], [["x", "y"], ["long", "1e5"]]).splitlines() == [
        "a     b",
        "----  ---",
        "x     y",
        "long  1e5",
    ]
    assert text_table(["a", "bc"], []).splitlines()[0] == "a    bc"


def test_names_stay_in_their_cells():
    lines = text_table(["dataset", "images"], [["a\x1b[2J\nb\udce9", 1], ["Häuser", 2]]).splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == [r"a\x1b[2J\nb\udce9", "Häuser"]
