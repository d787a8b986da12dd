"""The forecast before a long run: its size, what moves it, and its words."""

from __future__ import annotations

import pytest

from utils.core.estimates import Estimate, estimate_extraction, estimate_training, pass_fraction

RESNET50 = 25_600_000 * 4  # bytes of its checkpoint


def test_a_network_of_known_speed_is_forecast_within_a_factor_of_three():
    """ResNet-50 at 224 pixels answers about 5 photographs per second and core in float32."""
    found = estimate_extraction([RESNET50], 1000, batch_size=32, cores=1)
    assert 1000 / 5 / 3 < found.seconds < 1000 / 5 * 3


def test_what_makes_it_longer_and_larger():
    few = estimate_extraction([RESNET50] * 3, 200, batch_size=32, cores=2)
    assert estimate_extraction([RESNET50] * 15, 200, batch_size=32, cores=2).seconds == pytest.approx(5 * few.seconds)
    assert estimate_extraction([RESNET50] * 3, 200, batch_size=1, cores=2).seconds > few.seconds
    assert estimate_extraction([RESNET50] * 3, 200, batch_size=32, on_cuda=True).seconds < few.seconds
    assert estimate_extraction([RESNET50] * 3, 200, batch_size=32, img_size=32, cores=2).seconds < few.seconds / 10
    decoding = estimate_extraction([RESNET50] * 3, 200, batch_size=32, to_decode=200, cores=2)
    assert decoding.seconds > few.seconds
    assert decoding.megabytes - few.megabytes == pytest.approx(200 * 255 * 255 * 4 / 1e6)  # 4:3, three bytes a pixel


def test_a_training_of_known_speed_is_forecast_within_a_factor_of_three():
    """ResNet-50 learns from about 1.7 photographs of 224 pixels per second and core: forward, backward, step."""
    found = estimate_training([RESNET50], 1000, epochs=10, kept=5, batch_size=32, cores=1)
    assert 10_000 / 1.7 / 3 < found.seconds < 10_000 / 1.7 * 3


def test_what_makes_a_training_longer_and_larger():
    one = estimate_training([RESNET50], 200, epochs=10, kept=5, batch_size=32, cores=2)
    assert estimate_training([RESNET50], 200, epochs=30, kept=5, batch_size=32, cores=2).seconds == pytest.approx(
        3 * one.seconds
    )
    assert (
        estimate_training([RESNET50], 200, epochs=10, kept=5, batch_size=32, cores=9).seconds == one.seconds
    )  # on one core
    both = estimate_training([RESNET50] * 2, 200, epochs=10, kept=5, batch_size=32, cores=2)
    assert both.seconds == one.seconds  # side by side
    three = estimate_training([RESNET50] * 3, 200, epochs=10, kept=5, batch_size=32, cores=2)
    assert three.seconds == pytest.approx(1.5 * one.seconds)
    assert estimate_training([RESNET50], 200, epochs=10, kept=5, batch_size=32, on_cuda=True).seconds < one.seconds
    # Five files stay; a progress file that holds them, too, is there for each of two at a time.
    assert three.megabytes == pytest.approx((5 * 3 + (7 + 5) * 2) * RESNET50 / 1e6)


def test_a_pass_of_equal_networks_costs_a_third_of_an_epoch_each():
    """A step of training is worth three forward passes; the cost grows with the weights and with the area."""
    network = (RESNET50, 224)
    assert pass_fraction([network], network, epochs=1) == pytest.approx(1 / 3)
    assert pass_fraction([network] * 3, network, epochs=10) == pytest.approx(1 / 10)
    assert pass_fraction([(RESNET50, 448)], network, epochs=1) == pytest.approx(4 / 3)
    assert pass_fraction([network], (RESNET50 // 2, 224), epochs=1) == pytest.approx(2 / 3)


def test_nothing_to_run_is_no_time():
    assert estimate_extraction([], 0, batch_size=32) == Estimate(0, 0)
    assert estimate_training([], 100, epochs=10, kept=5, batch_size=32) == Estimate(0, 0)


@pytest.mark.parametrize(
    ("estimate", "words"),
    [
        (Estimate(4.4, 0.2), "about 4 s and 1 MB"),
        (Estimate(89, 12), "about 89 s and 12 MB"),
        (Estimate(5400, 3400), "about 90 min and 3400 MB"),
    ],
)
def test_words(estimate, words):
    assert str(estimate) == words
