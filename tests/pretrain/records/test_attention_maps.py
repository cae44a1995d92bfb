"""Attention maps: the pictures hold the weights, the numbers tell heads apart."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from headway.pretrain.records.attention_maps import AttentionMaps, describe_head, draw_heads


def decode(uri: str) -> np.ndarray:
    prefix = "data:image/png;base64,"
    assert uri.startswith(prefix)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri[len(prefix) :]))))


def random_weights(layers: int, heads: int, size: int) -> np.ndarray:
    weights = np.random.default_rng(0).exponential(size=(layers, heads, size, size)) ** 3
    return weights / weights.sum(-1, keepdims=True)


def test_weights_can_be_read_back_from_the_pictures():
    weights = random_weights(2, 3, 20)
    drawn = draw_heads(AttentionMaps(["x"] * 20, weights))
    assert [len(layer) for layer in drawn["layers"]] == [3, 3]
    for layer, pictures in zip(weights, drawn["layers"], strict=True):
        for w_SS, head in zip(layer, pictures, strict=True):
            back_SS = (decode(head["picture"]) / 255.0) ** 2
            # A level is off by at most 1/2: |d(v/255)^2| <= (v + 1/4) / 255^2, with v <= 255 sqrt(w) + 1/2.
            bound_SS = (255 * np.sqrt(w_SS) + 0.75) / 255**2
            assert (np.abs(back_SS - w_SS) <= bound_SS).all()


def test_numbers_of_known_heads():
    size = 16
    previous = np.eye(size, k=-1)
    previous[0, 0] = 1
    uniform = np.full((size, size), 1 / size)
    first = np.zeros((size, size))
    first[:, 0] = 1
    assert describe_head(previous) == pytest.approx(
        {"entropy": 0, "reach": 15 / 16, "first": 2 / 16}, abs=1e-12
    )
    # The mean distance of two uniform places among n is (n^2 - 1) / 3n.
    assert describe_head(uniform) == pytest.approx({"entropy": 4, "reach": 255 / 48, "first": 1 / 16})
    assert describe_head(first) == pytest.approx({"entropy": 0, "reach": 7.5, "first": 1}, abs=1e-12)


def test_what_is_not_a_weight_is_drawn_as_nothing():
    weights = np.zeros((1, 1, 2, 2))
    weights[0, 0] = [[np.nan, np.inf], [-1, 2]]
    (picture,) = (head["picture"] for head in draw_heads(AttentionMaps(["a", "b"], weights))["layers"][0])
    assert decode(picture).tolist() == [[0, 0], [0, 255]]


def test_long_texts_are_cut_and_say_so():
    drawn = draw_heads(AttentionMaps(["x"] * 50, random_weights(1, 4, 50)), pixels=4 * 30 * 30)
    assert (drawn["size"], drawn["cut"], len(drawn["tokens"])) == (30, 50, 30)
    assert decode(drawn["layers"][0][0]["picture"]).shape == (30, 30)


def test_tokens_and_weights_must_agree():
    with pytest.raises(ValueError, match=r"expected \[layers, heads, 3, 3\]"):
        AttentionMaps(["a", "b", "c"], np.zeros((1, 1, 2, 2)))


def test_marks_of_tokenizers_become_readable():
    tokens = ["\u2581def", "\u0120x", "<0x0A>", "\u010a"]
    assert draw_heads(AttentionMaps(tokens, random_weights(1, 1, 4)))["tokens"] == [" def", " x", "\n", "\n"]
