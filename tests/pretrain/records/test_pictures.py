"""Pictures of layers of attention: every cell's grey is what its weight says."""

import io

import numpy as np
import pytest
from PIL import Image

from headway.pretrain.records.attention_maps import AttentionMaps
from headway.pretrain.records.pictures import CELL, GAP, HEADS, LAYERS, draw_layers, png_of


def test_a_layer_is_its_heads_beside_each_other():
    weights = np.random.default_rng(0).dirichlet(np.ones(12), (2, 3, 12)).astype(np.float32)
    weights[1, 2, 5, 5] = np.nan  # drawn as 0
    pictures = draw_layers(AttentionMaps([str(i) for i in range(12)], weights))
    assert list(pictures) == [0, 1]
    scale = CELL // 12
    for layer, picture in pictures.items():
        page = np.asarray(Image.open(io.BytesIO(picture.png)))[::scale, ::scale]
        assert page.shape == (12, 3 * 12 + 2 * GAP)
        for head in range(3):
            found = page[:, head * (12 + GAP) :][:, :12]
            expected = np.round(255 * np.sqrt(np.nan_to_num(weights[layer, head].astype(np.float64))))
            assert np.array_equal(found, expected)
        assert picture.caption.startswith("entropy in bits by head: 1: ")


@pytest.mark.parametrize("size", [1, 3])
def test_many_layers_and_heads_are_thinned_out(size):
    weights = np.full((40, 50, size, size), 1 / size)
    pictures = draw_layers(AttentionMaps(["x"] * size, weights))
    assert len(pictures) == LAYERS
    assert {0, 39} <= pictures.keys()
    page = Image.open(io.BytesIO(pictures[39].png))
    assert page.width == (HEADS * (size + GAP) - GAP) * (CELL // size)


def test_a_data_uri_gives_back_its_bytes():
    assert png_of("data:image/png;base64,iVBO") == b"\x89PN"
