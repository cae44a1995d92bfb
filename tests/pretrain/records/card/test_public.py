"""What a card shows of settings: no folders, and nothing that a table or a page would take for its own."""

import pytest

from headway.pretrain.records.card.public import cell, public, public_name


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/home/someone/data/text.jsonl", "text.jsonl"),
        ("~/corpus/*.txt", "*.txt"),
        ("data/books/", "books"),
        ("stdlib:", "stdlib"),
        ("sklearn:digits", "sklearn:digits"),
    ],
)
def test_sources_have_names(path, name):
    assert public_name(path) == name


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/home/someone/run", ".../run"),
        ("~/cache", ".../cache"),
        ([{"path": "/data/x.jsonl", "weight": 2.0}], '[{"path": ".../x.jsonl", "weight": 2.0}]'),
        ("gpt/tiny", "gpt/tiny"),
        (None, "null"),
        (True, "true"),
        (0.1, "0.1"),
    ],
)
def test_absolute_paths_are_cut(value, shown):
    assert public(value) == shown


def test_cells_keep_to_themselves():
    hostile = "a | b\n| `c` <script>alert(1)</script> &amp;"
    assert cell(hostile) == "a \\| b \\| 'c' &lt;script>alert(1)&lt;/script> &amp;amp;"
