"""Baselines: what a constant and a linear model reach."""

import numpy as np

from headway.pretrain.data.images.baselines import cut_into_patches, logistic_accuracy, mean_patch_error


def test_patches_are_those_of_the_masked_autoencoder():
    # He et al.'s code: reshape to [n, c, h, p, w, q], then "nchpwq->nhwpqc".
    pixels = np.random.default_rng(0).normal(size=(3, 2, 8, 8))
    theirs = np.einsum("nchpwq->nhwpqc", pixels.reshape(3, 2, 4, 2, 4, 2)).reshape(3, 16, 8)
    np.testing.assert_array_equal(cut_into_patches(pixels, 2, False), theirs)
    normal = cut_into_patches(pixels, 2, True)
    np.testing.assert_allclose(normal.mean(-1), 0, atol=1e-12)
    np.testing.assert_allclose(normal.var(-1, ddof=1), 1, rtol=1e-4)  # 1e-6 is added to variances above 0.01


def test_constant_predictions_err_by_the_variance():
    pixels = np.random.default_rng(0).normal(size=(50, 1, 8, 8)) + np.arange(8.0)
    patches = cut_into_patches(pixels, 4, False)
    errors = mean_patch_error(pixels, pixels, 4, False)
    # The mean's squared error on its own data is the population variance: over all patches, or at each place.
    assert np.isclose(errors.one, patches.reshape(-1, 16).var(0).mean(), rtol=1e-12)
    assert np.isclose(errors.placed, pixels.var(0).mean(), rtol=1e-12)
    assert errors.placed < errors.one
    # Normalised patches of D values that share no direction err by (D - 1) / D, their sum of squares.
    noise = np.random.default_rng(1).normal(size=(2, 4000, 1, 4, 4))
    assert abs(mean_patch_error(*noise, 4, True).one - 15 / 16) < 5e-3


def test_logistic_regression_on_digits():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    # 0.92 on the last third is what others report (scikit-learn's default, first 1,200 to train on).
    assert abs(logistic_accuracy(x[:1200], y[:1200], x[1200:], y[1200:]) - 0.92) < 0.01
