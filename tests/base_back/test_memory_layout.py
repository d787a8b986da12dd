import pytest
import timm
import torch
from torch import nn

from utils.memory_layout import memory_format
from utils.stage_features import StageFeatures


@pytest.mark.parametrize("is_trained", [True, False])
def test_networks_of_timm_run_channels_last(is_trained):
    network = timm.create_model("mobilenetv3_small_050", num_classes=3)
    assert memory_format(network, is_trained=is_trained) == torch.channels_last
    with_stages = StageFeatures(network, 3, 32)
    assert memory_format(with_stages, is_trained=is_trained) == torch.channels_last


def test_a_network_of_another_source_stays_contiguous():
    class Reshaping(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 32, 3)

        def forward(self, images):
            return self.conv(images).view(len(images), -1)

    assert memory_format(Reshaping(), is_trained=False) == torch.contiguous_format


def test_a_strided_pointwise_convolution_of_few_channels_is_not_trained_channels_last():
    """MobileOne's first layer has one beside its 3 x 3 convolution: oneDNN issue 6035."""
    network = timm.create_model("mobileone_s0", num_classes=3)
    assert memory_format(network, is_trained=True) == torch.contiguous_format
    assert memory_format(network, is_trained=False) == torch.channels_last


def test_groups_count_by_their_own_channels():
    network = timm.create_model("mobilenetv3_small_050", num_classes=3)
    network.conv_stem = nn.Conv2d(48, 48, 1, stride=2, groups=16)
    assert memory_format(network, is_trained=True) == torch.contiguous_format
    network.conv_stem = nn.Conv2d(48, 48, 1, stride=2)
    assert memory_format(network, is_trained=True) == torch.channels_last
