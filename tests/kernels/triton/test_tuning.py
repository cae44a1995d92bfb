"""The cache of measured tiles: what cannot be read is told, and costs nothing but speed."""

import pytest

from headway.tests.kernels.triton.finding import find_triton

pytestmark = pytest.mark.skipif(not find_triton(), reason="Triton is neither installed nor among the oracles")


def test_a_damaged_cache_is_told_and_defaults_are_taken(tmp_path, monkeypatch):
    from headway.kernels.triton import tuning

    monkeypatch.setenv("HEADWAY_CACHE", str(tmp_path))
    assert tuning._known() == {}
    tuning.cache_file().write_text('{"NVIDIA')
    with pytest.warns(UserWarning, match=r"kernels\.json: choices of tiles are not used: .*; remove it"):
        assert tuning._known() == {}
