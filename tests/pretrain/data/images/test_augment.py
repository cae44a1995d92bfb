"""Crops, turns, shifts, mixup and cutmix against torchvision, timm and SciPy."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from headway.kernels import random
from headway.pretrain.data.images import augment
from headway.pretrain.data.samples import make_keys
from headway.tests import oracles

N = 4000


@pytest.fixture(scope="module")
def torchvision():
    oracles.timm()
    import torchvision.transforms.v2

    return torchvision.transforms.v2


@pytest.fixture(scope="module")
def keys():
    return make_keys("photos", 0, range(N), [0] * N)


def test_draws_are_philox_of_key_purpose_and_place(keys):
    u = augment.draws(keys[:3], 2, 5)
    word = random.philox(torch.tensor(int(keys[1])), *map(torch.tensor, (4, 2, 0x696D6167, 0)))[0]
    assert u[1, 4] == (word.item() + 0.5) / 2**32
    assert np.array_equal(augment.draws(keys[2:0:-1], 2, 3), u[2:0:-1, :3])


@pytest.mark.parametrize(("height", "width"), [(60, 90), (97, 31), (8, 8)])
@pytest.mark.parametrize("least", [0.08, 0.5])
def test_crops_are_distributed_as_torchvisions(torchvision, keys, height, width, least):
    ours = [augment.crop_box(u, height, width, least) for u in augment.draws(keys, 0, augment.CROP_DRAWS)]
    torch.manual_seed(0)
    image = torch.zeros(3, height, width)
    transform = torchvision.RandomResizedCrop(8, scale=(least, 1.0))
    theirs = [transform.make_params([image]) for _ in range(N)]
    for name in augment.Box._fields:
        a, b = [getattr(box, name) for box in ours], [params[name] for params in theirs]
        # Two samples of one distribution: 24 comparisons, each of which fails by chance once in 10,000.
        assert stats.ks_2samp(a, b).pvalue > 1e-4
    assert all(0 <= b.top <= height - b.height and 0 <= b.left <= width - b.width for b in ours)


def test_an_image_in_which_no_crop_fits_gives_torchvisions_centre(torchvision, keys):
    for height, width in ((10, 100), (100, 10), (1, 1)):
        (u,) = augment.draws(keys[:1], 0, augment.CROP_DRAWS)
        ours = augment.crop_box(np.full_like(u, 0.999), height, width, 0.999)
        theirs = torchvision.RandomResizedCrop(8, scale=(0.9999, 1)).make_params(
            [torch.zeros(3, height, width)]
        )
        assert ours._asdict() == theirs


@pytest.mark.parametrize(
    ("height", "width", "size"), [(40, 56, 16), (40, 56, 64), (61, 33, 33), (16, 16, 16)]
)
def test_resizing_is_torchvisions(torchvision, files, height, width, size):
    functional, bicubic = torchvision.functional, torchvision.InterpolationMode.BICUBIC
    pixels = files.pixels(3, height, width)
    image = Image.fromarray(pixels)
    planes = torch.from_numpy(pixels).permute(2, 0, 1)
    box = augment.Box(3, 5, height // 2, width - 7)
    ours = [augment.resized_centre(image, size), augment.resized_crop(image, box, size)]
    for given, least in ((image, 0), (planes, 1)):
        centre = functional.center_crop(functional.resize(given, [size], bicubic), [size])
        crop = functional.resized_crop(given, *box, [size, size], bicubic)
        for mine, theirs in zip(ours, (centre, crop), strict=True):
            theirs = theirs.permute(1, 2, 0).numpy() if least else np.asarray(theirs)
            # The same calls of Pillow: bitwise. torch's own integer kernel may round the other way: one level.
            assert np.abs(np.asarray(mine).astype(int) - theirs).max() <= least


def test_an_image_of_the_right_size_is_untouched(files):
    pixels = files.pixels(0, 24, 24)
    assert np.array_equal(np.asarray(augment.resized_centre(Image.fromarray(pixels), 24)), pixels)


@pytest.mark.parametrize(("rotate", "shear"), [(180, 0), (0, 40), (30, 20)])
def test_turns_are_torchvisions(torchvision, files, rotate, shear):
    image, bicubic = Image.fromarray(files.pixels(0, 16, 16)), torchvision.InterpolationMode.BICUBIC
    for u in np.random.default_rng(0).random((8, 2)):
        angle, slant = ((2 * u - 1) * (rotate, shear)).tolist()
        theirs = torchvision.functional.affine(image, angle, [0, 0], 1.0, [slant, 0.0], bicubic)
        ours = augment.turned(image, u, rotate, shear)
        # One call of Pillow; matrices that differ in the last bit may round a level the other way.
        assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).max() <= 1


def test_shift_and_flip_are_torchvisions(torchvision, files, keys):
    functional = torchvision.functional
    pixels = files.pixels(0, 8, 8)
    planes = functional.pad(torch.from_numpy(pixels).permute(2, 0, 1), [2])
    seen = set()
    for u in augment.draws(keys[:500], 1, 3):
        top, left, mirrored = int(u[0] * 5), int(u[1] * 5), u[2] < 0.5
        theirs = functional.crop(planes, top, left, 8, 8)
        theirs = functional.horizontal_flip(theirs) if mirrored else theirs
        assert np.array_equal(augment.shift_and_flip(pixels, u, 2, True), theirs.permute(1, 2, 0).numpy())
        seen.add((top, left, mirrored))
    assert len(seen) == 50
    assert np.array_equal(augment.shift_and_flip(pixels, u, 0, False), pixels)


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5, 0.8, 1.0, 2.0, 8.0])
def test_shares_are_beta(keys, alpha):
    u, v = augment.draws(keys, 0, 2).T
    share = augment.symmetric_beta(u, v, alpha)
    assert ((share >= 0) & (share <= 1)).all()
    cdf = stats.beta(alpha, alpha).cdf
    # One of 10,000 samples of the distribution deviates so much. For alpha = 0.05, 8% lie closer to 1 than fp64 can
    # say, so there the lower half speaks for both.
    if alpha >= 0.2:
        assert stats.kstest(share, cdf).pvalue > 1e-4
    lower = share[share < 0.5]
    assert stats.kstest(lower, lambda x: 2 * cdf(x)).pvalue > 1e-4
    assert abs(lower.size / N - 0.5) < 5 * 0.5 / math.sqrt(N)


def test_shares_are_finite_at_the_ends():
    ends = np.array([2.0**-33, 1 - 2.0**-33])
    for alpha in (1e-3, 1.0, 1e3):
        for u in ends:
            assert np.isfinite(augment.symmetric_beta(u, np.array([*ends, 0.25, 0.5, 0.75]), alpha)).all()


def test_boxes_of_cutmix_are_timms(keys, monkeypatch):
    module = oracles.timm().data.mixup
    for size in (8, 15, 32):
        for share, y, x in augment.draws(keys[:300], 0, 3):
            centre = iter([int(y * size), int(x * size)])
            monkeypatch.setattr(module.np.random, "randint", lambda low, high, size=None: next(centre))  # noqa: B023
            (top, bottom, left, right), _ = module.cutmix_bbox_and_lam((3, size, size), share)
            assert augment.cut_box(share, y, x, size) == (top, left, bottom - top, right - left)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixing_is_timms(keys, monkeypatch, mixup, cutmix):
    """Pixels and targets of pairs, given timm's share, kind and centre of the box."""
    module = oracles.timm().data.mixup
    rng = np.random.default_rng(0)
    n, size, classes = 64, 12, 5
    first, second = rng.normal(size=(2, n, 3, size, size)).astype(np.float32)
    labels = rng.integers(0, classes, (2, n))
    u = augment.draws(keys[:n], 5, augment.MIX_DRAWS)
    mixed, share = augment.mix(first, second, u, mixup, cutmix)
    cut = u[:, 0] < (0.5 if mixup and cutmix else bool(cutmix))
    lam = augment.symmetric_beta(u[:, 1], u[:, 2], np.where(cut, cutmix or 1, mixup or 1))
    theirs = module.Mixup(mixup, cutmix, mode="elem", label_smoothing=0.0, num_classes=classes)
    for i in range(n):
        centre = iter([int(u[i, 3] * size), int(u[i, 4] * size)] * 2)
        monkeypatch.setattr(module.np.random, "randint", lambda low, high, size=None: next(centre))  # noqa: B023
        given = np.full(2, lam[i]) if cut[i] else np.full(2, lam[i], np.float32)
        monkeypatch.setattr(theirs, "_params_per_elem", lambda n: (given, np.full(2, cut[i])))  # noqa: B023
        pair = torch.from_numpy(np.stack([first[i], second[i]]))
        x, target = theirs(pair, torch.from_numpy(labels[:, i]))
        # Each product and the sum round by half a unit of fp32, 2^-24, of values below 5.
        np.testing.assert_allclose(mixed[i], x[0].numpy(), rtol=0, atol=3 * 5 * 2**-24)
        ours = np.eye(classes)[labels[0, i]] * share[i] + np.eye(classes)[labels[1, i]] * (1 - share[i])
        np.testing.assert_allclose(ours, target[0].numpy(), rtol=0, atol=2**-23)
    assert math.isclose(cut.mean(), 0.5, abs_tol=0.25) if mixup and cutmix else cut.all() == bool(cutmix)
