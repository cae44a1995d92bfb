"""Batches of images: functions of number and key alone, normalised as torchvision does, broken ones stood in for."""

import numpy as np
import pytest
import torch

from headway.pretrain import config
from headway.pretrain.data.images.samples import ImageSamples
from headway.pretrain.data.images.sources import open_images
from headway.pretrain.data.samples import make_keys
from headway.pretrain.errors import DataError, JobError
from headway.tests import oracles

EVERYTHING = config.Augment(crop=0.3, shift=0.125, rotate=30, shear=10, flip=True, mixup=0.8, cutmix=1.0)


@pytest.fixture
def photos(tmp_path, files):
    """A folder of 10 whole images in two classes."""
    for seed in range(10):
        place = tmp_path / "photos" / f"class{seed % 2}" / f"{seed}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(files.png(seed))
    return tmp_path / "photos"


def samples_of(path, data, augment=None, heldout=False, **options):
    source = open_images(config.Source(path=str(path)), data)
    numbers = source.side(heldout, options.get("labelled", True))
    return ImageSamples(source, numbers, data.images, augment, **options)


def test_heldout_pixels_are_torchvisions(photos, settings, files):
    oracles.timm()
    from torchvision.transforms import v2

    data = settings(heldout=0.0)
    images = data.images.model_copy(update={"mean": (0.4, 0.5, 0.6), "std": (0.2,)})
    samples = samples_of(photos, data.model_copy(update={"images": images}))
    rows = samples.rows(np.arange(10), np.zeros(10, np.int64))
    transform = v2.Compose(
        [
            v2.Resize(16, v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(16),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.4, 0.5, 0.6), (0.2, 0.2, 0.2)),
        ]
    )
    theirs = torch.stack([transform(samples.source.raw(i)[0]) for i in range(10)]).numpy()
    assert rows["pixels"].dtype == np.float32
    # Ours is rounded once. Theirs takes four steps in fp32, of which two come before the division by 0.2 (values up to
    # 1: 2 x 5 x 2^-24) and two after it or for the constants (values up to 3: 2 x 3 x 2^-23).
    np.testing.assert_allclose(rows["pixels"], theirs, rtol=0, atol=11 * 2**-23)
    assert rows["label"].tolist() == [0] * 5 + [1] * 5
    assert set(rows) == {"pixels", "label"}


def test_digits_are_untouched_by_eight(settings):
    samples = samples_of("sklearn:digits", settings(size=8, channels=1, heldout=1 / 3), heldout=True)
    rows = samples.rows(np.arange(len(samples)), np.zeros(len(samples), np.int64))
    raw = np.stack([np.asarray(samples.source.raw(i)[0]) for i in samples.numbers.tolist()])
    np.testing.assert_array_equal(rows["pixels"][:, 0], ((raw / 255 - 0.5) / 0.5).astype(np.float32))


@pytest.mark.parametrize("threads", [1, 3])
def test_a_sample_depends_on_its_number_and_key_alone(photos, settings, threads):
    data = settings(heldout=0.0)
    numbers = np.arange(10).repeat(3)
    keys = make_keys("photos", 1, numbers.tolist(), [0, 1, 2] * 10)
    whole = samples_of(photos, data, EVERYTHING, threads=2).rows(numbers, keys)
    assert set(whole) == {"pixels", "label", "partner", "share"}
    assert (whole["pixels"].dtype, whole["share"].dtype) == (np.float32, np.float32)
    assert (whole["label"].dtype, whole["partner"].dtype) == (np.int64, np.int64)
    again = samples_of(photos, data, EVERYTHING, threads=threads)
    order = np.random.default_rng(0).permutation(30)
    for part in np.array_split(order, 7):
        for name, values in again.rows(numbers[part], keys[part]).items():
            np.testing.assert_array_equal(values, whole[name][part])
    assert len(np.unique(whole["pixels"].reshape(30, -1), axis=0)) == 30  # epochs differ


def test_partners_are_even_over_the_side_and_never_held_out(settings):
    data = settings(size=8, channels=1, heldout=0.99)
    samples = samples_of("sklearn:digits", data, config.Augment(mixup=1.0))
    count, n = len(samples), 4000
    assert count < 30
    keys = make_keys("digits", 0, range(n), [0] * n)
    partner = samples.rows(np.zeros(n, np.int64), keys)["partner"]
    shares = np.bincount(samples.source.labels[samples.numbers], minlength=10) / count
    # 5 deviations of a binomial share.
    assert (
        np.abs(np.bincount(partner, minlength=10) / n - shares) <= 5 * np.sqrt(shares * (1 - shares) / n)
    ).all()


def test_a_mixed_sample_is_its_share_of_two_augmented_ones(settings):
    data = settings(size=8, channels=1)
    keys, numbers = make_keys("digits", 0, range(50), [0] * 50), np.arange(50)
    plain = samples_of("sklearn:digits", data, config.Augment(shift=0.125)).rows(numbers, keys)
    mixed = samples_of("sklearn:digits", data, config.Augment(shift=0.125, mixup=1.0)).rows(numbers, keys)
    share = mixed["share"][:, None, None, None]
    partner = (mixed["pixels"] - share * plain["pixels"]) / (1 - share)
    # What is left is an image: its values are levels of 255, up to fp32's rounding over 1 - share.
    levels = (partner + 1) * 127.5
    assert (np.abs(levels - levels.round()) <= 1e-3 / (1 - share)).all()
    assert np.array_equal(mixed["label"], plain["label"])


def break_some(photos):
    for name in ("class0/2.png", "class0/4.png", "class1/9.png"):
        (photos / name).write_bytes((photos / name).read_bytes()[:200])


def test_broken_images_stop_or_are_stood_in_for(photos, settings):
    whole = samples_of(photos, settings(heldout=0.0)).rows(np.arange(10), np.zeros(10, np.int64))
    break_some(photos)
    samples = samples_of(photos, settings(heldout=0.0))
    with pytest.raises(DataError, match=r"photos/class0/2\.png: .*data\.on_error=skip"):
        samples.rows(np.arange(10), np.zeros(10, np.int64))
    samples = samples_of(photos, settings(heldout=0.0, on_error="skip"))
    for _ in range(2):
        rows = samples.rows(np.arange(10), np.zeros(10, np.int64))
        # Sorted by name: 0 2 4 6 8 | 1 3 5 7 9. 2 and 4 become 6; 9, the last, becomes the first.
        stand_in = [0, 3, 3, 3, 4, 5, 6, 7, 8, 0]
        for name in rows:
            np.testing.assert_array_equal(rows[name], whole[name][stand_in])
        assert samples.source.skipped == 3
        assert [line.split(": ")[0].split("photos/")[1] for line in samples.source.skipped_first] == [
            "class0/2.png",
            "class0/4.png",
            "class1/9.png",
        ]


def test_nothing_but_broken_images_is_an_error(photos, settings):
    for path in photos.rglob("*.png"):
        path.write_text("text")
    samples = samples_of(photos, settings(heldout=0.0, on_error="skip"))
    with pytest.raises(
        DataError, match=r"10 images in a row are broken, one of them .*class0/0\.png: cannot"
    ):
        samples.rows(np.array([3]), np.array([0]))


def test_unlabelled_samples_are_pixels(tmp_path, files, settings):
    (tmp_path / "flat").mkdir()
    for seed in range(4):
        (tmp_path / "flat" / f"{seed}.png").write_bytes(files.png(seed))
    samples = samples_of(tmp_path / "flat", settings(heldout=0.0), labelled=False)
    assert set(samples.rows(np.arange(4), np.zeros(4, np.int64))) == {"pixels"}


def test_the_identity_is_of_the_files(photos, settings, files):
    first = samples_of(photos, settings(heldout=0.0)).identity
    assert (first["images"], first["size"]) == (10, 16)
    (photos / "class0" / "2.png").rename(photos / "class0" / "3.png")
    assert samples_of(photos, settings(heldout=0.0)).identity != first


@pytest.mark.parametrize(
    ("augment", "labelled", "fault"),
    [
        (config.Augment(shift=0.01), True, r"objective\.augment\.shift = 0\.01: is 0 pixels.*0\.0625"),
        (config.Augment(shift=1.0), True, "is 16 pixels"),
        (config.Augment(mixup=0.2), False, r"objective\.augment\.mixup = 0\.2: .*Nearest legal choice: 0"),
        (config.Augment(cutmix=0.2), False, r"objective\.augment\.cutmix"),
    ],
)
def test_settings_that_do_nothing_are_refused(photos, settings, augment, labelled, fault):
    with pytest.raises(JobError, match=fault):
        samples_of(photos, settings(heldout=0.0), augment, labelled=labelled)


def test_an_empty_side_is_refused(photos, settings):
    with pytest.raises(DataError, match="no image on this side"):
        samples_of(photos, settings(heldout=0.0), heldout=True)
