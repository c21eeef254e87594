import io

import pytest

from repo_jax.terminal import colorful, paint, size_words, time_words


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    "variables, stream, colors",
    [
        ({}, Terminal(), True),
        ({}, io.StringIO(), False),
        ({"NO_COLOR": "1"}, Terminal(), False),
        ({"NO_COLOR": ""}, Terminal(), True),
        ({"TERM": "dumb"}, Terminal(), False),
    ],
)
def test_colours_are_for_terminals_and_for_those_who_want_them(monkeypatch, variables, stream, colors):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert colorful(stream) == colors
    assert paint("x", "red", stream) == ("\x1b[31mx\x1b[0m" if colors else "x")


def test_times_and_sizes_are_said_in_the_units_people_use():
    given = {0.4: "0 s", 45: "45 s", 60: "1 min 0 s", 200: "3 min 20 s", 18600: "5 h 10 min", 187200: "2 d 4 h"}
    given |= {3599.6: "1 h 0 min", 86399: "1 d 0 h"}
    assert {seconds: time_words(seconds) for seconds in given} == given
    assert size_words(3.5 * 2**20) == "3.5 MiB" and size_words(15.4 * 2**30) == "15.4 GiB"
