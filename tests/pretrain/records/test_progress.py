"""What is printed, on a terminal and in a log."""

import io

import pytest

from headway.pretrain.records.progress import ProgressDisplay, clock, describe, short


def row(step: int) -> dict:
    return {"step": step, "loss": 3.21449, "tokens_per_second": 12_345.6, "mfu": 0.412, "step_seconds": 0.5}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_at_first_and_last_and_every_twentieth():
    stream = io.StringIO()
    display = ProgressDisplay(1000, stream=stream, every_seconds=1e9)
    for step in range(1, 1001):
        display.step(row(step))
    display.close()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "step 1/1000  loss 3.214  12.3k tok/s  MFU 41%  8:20 left"
    assert lines[-1] == "step 1000/1000  loss 3.214  12.3k tok/s  MFU 41%"
    assert len(lines) == 21
    assert not any("\x1b" in line for line in lines)


def test_slow_steps_get_a_line_each():
    stream = io.StringIO()
    display = ProgressDisplay(1000, start=10, stream=stream, every_seconds=0)
    for step in (11, 12, 13):
        display.step(row(step))
    assert len(stream.getvalue().splitlines()) == 3


def test_text_is_not_taken_for_markup():
    stream = io.StringIO()
    ProgressDisplay(1, stream=stream).say("[red]x[/red] [/]")
    assert stream.getvalue() == "[red]x[/red] [/]\n"


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    display = ProgressDisplay(10, stream=stream)
    display.step(row(4))
    display.say("a word between")
    display.close()
    text = stream.getvalue()
    assert "4/10" in text
    assert "loss 3.214" in text
    assert "0:03 left" in text
    assert "a word between" in text


def test_a_step_may_lack_everything_but_its_number():
    assert describe({"step": 1}) == ""
    assert describe({"step": 1, "loss": float("nan"), "mfu": None}) == "loss nan"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (999.9, "1k"),
        (12_345, "12.3k"),
        (4.934e6, "4.93M"),
        (1.5e12, "1.5T"),
        (float("inf"), "inf"),
    ],
)
def test_numbers_are_short(number, text):
    assert short(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00"), (59.6, "1:00"), (151, "2:31"), (93909, "26:05:09"), (float("nan"), "?")],
)
def test_time_is_a_clock(seconds, text):
    assert clock(seconds) == text
