"""The memory format of a network, determined by its layers alone, for reproducible results. Reads no settings.

timm networks run channels last, like timm's scripts with `--channels-last`. Milliseconds of CPU time per image,
contiguous and channels last (torch 2.13, AMD EPYC, one thread, batches of 16, 128 px; the two transformers 224 px):

    network                 evaluation        training step
    EfficientNet-Lite0      13.1    9.2       35.9     23.3
    EfficientNet-Lite2       9.2    7.5       53.1     36.5
    MobileNetV3-small        1.9    1.3        9.0      6.4
    MobileViTv2-050          5.8    4.7       21.3     16.4
    RegNetY-002              2.9    2.5       11.1      8.6
    ResNet-18               16.0   13.3       45.9     35.4
    ConvNeXt-atto            5.4    5.0       19.2     18.9
    Swin-tiny                145    142        364      350
    ViT-tiny                32.9   33.7       99.6    100.0

Networks of other sources stay contiguous: their code may reshape activations by `view`, which fails for channels-last
tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

BLOCK = 16  # channels per block of oneDNN's kernels with AVX-512; 8 with AVX2


def memory_format(model: nn.Module, *, is_trained: bool) -> torch.memory_format:
    """`torch.channels_last` for a timm network whose gradients oneDNN computes correctly, else `contiguous_format`.

    In channels-last format, oneDNN's weight gradient of a strided 1 x 1 convolution with fewer channels than a block
    writes beyond its buffer (uxlfoundation/oneDNN issue 6035); a network that has one is trained contiguous.
    """
    import torch

    if not _is_of_timm(model) or (is_trained and _has_unsafe_gradient(model)):
        return torch.contiguous_format
    return torch.channels_last


def _is_of_timm(model: nn.Module) -> bool:
    """Whether the network, or its trunk, was built by timm."""
    return any(hasattr(module, "pretrained_cfg") for module in (model, *model.children()))


def _has_unsafe_gradient(model: nn.Module) -> bool:
    from torch import nn

    return any(
        set(module.kernel_size) == {1} and max(module.stride) > 1 and module.in_channels // module.groups < BLOCK
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
    )
