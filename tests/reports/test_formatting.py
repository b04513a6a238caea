"""Numbers for people, and other people's text in Markdown."""

import pytest

from ssm_zoo.harness.published import without_folders
from ssm_zoo.reports.markdown import code, fenced, number, ranges, seconds, short, table

HOME = "/" + "home"  # in two parts: no file of this repository names a path of a machine


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{HOME}/me/bin/ssm-zoo distill {HOME}/me/r.yaml out", "ssm-zoo distill r.yaml out"),
        (
            f"--set teacher={HOME}/me/model data.train=[{HOME}/a.txt,b/c.txt]",
            "--set teacher=model data.train=[a.txt,b/c.txt]",
        ),
        (f"'{HOME}/me/a b'", "'a b'"),
        ("~/runs/x ../data/y ./z", "x ../data/y ./z"),
        (r"C:\Users\me\x.yaml ~\x.yaml \\host\share\y.yaml", "x.yaml x.yaml y.yaml"),
        (r"--separator '\n\n' out", r"--separator '\n\n' out"),
        ("https://example.org/a/b org/name 1/2", "https://example.org/a/b org/name 1/2"),
    ],
)
def test_absolute_paths_lose_their_folders(text: str, expected: str):
    assert without_folders(text) == expected


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [([], ""), ([3], "3"), ([0, 1], "0, 1"), ([0, 1, 2, 5, 7, 8, 9], "0-2, 5, 7-9")],
)
def test_runs_of_layers_are_joined(numbers: list[int], expected: str):
    assert ranges(numbers) == expected


def test_code_is_one_line_that_nothing_closes():
    assert code("a``b\n c") == "```a``b c```"
    assert code("`a") == "`` `a ``"
    assert code(" \n") == "—"
    assert fenced("a\n````\nb\n", "sh") == "`````sh\na\n````\nb\n`````"


def test_numbers_are_rounded_and_none_is_a_dash():
    assert [number(value, sign=True) for value in (0.00004, -0.25, 1234.5, None)] == [
        "+0.0000",
        "-0.2500",
        "+1,234.5000",
        "—",
    ]
    assert [short(value) for value in (0.0123456, 1.5, 999.6, 12345.6, None)] == [
        "0.0123",
        "1.5",
        "1,000",
        "12,346",
        "—",
    ]
    assert [seconds(value) for value in (0.0, 0.04, 9.94, 1234.5)] == ["0", "0.0", "9.9", "1,234"]


def test_a_bar_in_a_cell_is_escaped():
    assert (
        table(("a", "b", "c"), [("x|y", "1", "2")], left=2) == "| a | b | c |\n| --- | --- | ---: |\n| x\\|y | 1 | 2 |"
    )
