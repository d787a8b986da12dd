"""The ten convolutional architectures, built on timm's model classes."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Any, ClassVar

from timm.layers import ConvNormAct, SqueezeExcite
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.convnext import ConvNeXt
from timm.models.cspnet import CspModelCfg, CspNet, CspStagesCfg, CspStemCfg
from timm.models.densenet import DenseNet
from timm.models.efficientnet import EfficientNet
from timm.models.ghostnet import GhostNet
from timm.models.inception_v4 import InceptionA, InceptionB, InceptionC, ReductionA, ReductionB
from timm.models.regnet import RegNet, RegNetCfg
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from models.backbone import Backbone, ImageRule
from models.blocks import PooledNetwork, RoutedBlock, scaled_conv


class CustomConvNeXt(Backbone):
    """ConvNeXt: depthwise large-kernel convolutions and inverted bottlenecks with LayerNorm (Liu et al. 2022).

    `(B, 3, H, W)` -> logits `(B, num_classes)`. The only one of the convolutional ten without BatchNorm.
    """

    image_rules: ClassVar = {"full": ImageRule(32), "tiny": ImageRule(16)}
    plans: ClassVar = {
        "full": {
            "depths": (2, 2, 6, 2),
            "dims": (96, 192, 384, 768),
            "kernel_sizes": 7,
            "patch_size": 4,
            "drop_path_rate": 0.1,
            "ls_init_value": 1e-6,
        },
        "tiny": {
            "depths": (1, 1, 1, 1),
            "dims": (24, 48, 72, 96),
            "kernel_sizes": (7, 5, 3, 3),
            "patch_size": 2,
            "output_stride": 16,
            "ls_init_value": None,
        },
    }

    def build(self, **plan: Any) -> nn.Module:
        """ConvNeXt of one size."""
        return ConvNeXt(num_classes=self.num_classes, **plan)


class CustomEfficientNetV4(Backbone):
    """EfficientNet: fused inverted residuals first, then depthwise ones with squeeze-and-excitation.

    `(B, 3, H, W)` -> logits `(B, num_classes)`. Derived from EfficientNetV2 (Tan and Le 2021) with other widths and
    depths and a wider first stage; there is no publication named V4.
    """

    image_rules: ClassVar = {"full": ImageRule(32), "tiny": ImageRule(16)}
    plans: ClassVar = {
        "full": {
            "stages": (
                "er_r2_k3_s1_e1_c32",
                "er_r3_k3_s2_e4_c48",
                "er_r3_k3_s2_e4_c80",
                "ir_r4_k3_s2_e4_c136_se0.25",
                "ir_r6_k3_s1_e6_c160_se0.25",
                "ir_r7_k3_s2_e6_c256_se0.25",
            ),
            "stem_size": 32,
            "num_features": 1280,
            "drop_path_rate": 0.1,
        },
        "tiny": {
            "stages": ("er_r1_k3_s2_e2_c24", "ir_r1_k3_s2_e4_c48_se0.25", "ir_r1_k3_s1_e4_c72_se0.25"),
            "stem_size": 16,
            "num_features": 128,
        },
    }

    def build(self, stages: tuple[str, ...], **plan: Any) -> nn.Module:
        """EfficientNet of one size; `stages` in timm's block notation (r repeats, k kernel, s stride, e expansion)."""
        blocks = decode_arch_def([[stage] for stage in stages])
        return EfficientNet(blocks, num_classes=self.num_classes, act_layer=nn.SiLU, **plan)


class CustomGhostNetV2(Backbone):
    """GhostNetV2: cheap depthwise convolutions compute half of each feature map; long-range attention gates it.

    `(B, 3, H, W)` -> logits `(B, num_classes)` (Tang et al. 2022). timm applies the gates from the third bottleneck
    on, at half resolution, so feature maps there must be at least 2 x 2.
    """

    image_rules: ClassVar = {"full": ImageRule(64), "tiny": ImageRule(16)}
    # One row per bottleneck: kernel, expanded channels, output channels, squeeze-and-excitation ratio, stride.
    plans: ClassVar = {
        "full": {
            "width": 1.4,
            "head_width": 1280,
            "cfgs": (
                ((3, 16, 16, 0, 1), (3, 48, 24, 0, 2)),
                ((3, 72, 24, 0, 1), (5, 72, 40, 0.25, 2)),
                ((5, 120, 40, 0.25, 1), (3, 240, 80, 0, 2)),
                ((3, 200, 80, 0, 1), (3, 200, 80, 0, 1), (3, 480, 112, 0.25, 1), (3, 672, 112, 0.25, 1)),
                ((5, 672, 160, 0.25, 2), (5, 960, 160, 0, 1), (5, 960, 160, 0.25, 1), (5, 960, 160, 0, 1)),
            ),
        },
        "tiny": {
            "width": 0.5,
            "head_width": 128,
            "cfgs": (((3, 32, 40, 0, 2),), ((3, 112, 80, 0.25, 2),), ((3, 288, 128, 0, 1),)),
        },
    }

    def build(self, head_width: int, **plan: Any) -> nn.Module:
        """GhostNetV2 of one size, its last convolution `head_width` channels wide."""
        network = GhostNet(num_classes=self.num_classes, version="v2", drop_rate=0.0, **plan)
        if head_width != network.head_hidden_size:
            network.conv_head = nn.Conv2d(network.pool_dim, head_width, 1)
            network.head_hidden_size = head_width
            network.reset_classifier(self.num_classes)
        return network


class CustomResNetMish(Backbone):
    """ResNet (He et al. 2016) with the Mish activation (Misra 2019) and a stem of three 3x3 convolutions.

    `(B, 3, H, W)` -> logits `(B, num_classes)`.
    """

    image_rules: ClassVar = {"full": ImageRule(32), "tiny": ImageRule(16)}
    plans: ClassVar = {
        "full": {
            "block": Bottleneck,
            "layers": (2, 3, 5, 2),
            "channels": (64, 128, 256, 512),
            "stem_width": 32,
            "avg_down": True,
            "drop_path_rate": 0.05,
        },
        "tiny": {
            "block": BasicBlock,
            "layers": (1, 1, 1, 1),
            "channels": (16, 32, 48, 64),
            "stem_width": 8,
            "output_stride": 16,
            "replace_stem_pool": True,
        },
    }

    def build(self, **plan: Any) -> nn.Module:
        """ResNet of one size."""
        return ResNet(num_classes=self.num_classes, stem_type="deep", act_layer=nn.Mish, zero_init_last=False, **plan)


class CustomCSPDarkNet(Backbone):
    """DarkNet blocks in cross-stage-partial stages: half of the channels bypass each stage (Wang et al. 2020).

    `(B, 3, H, W)` -> logits `(B, num_classes)`.
    """

    image_rules: ClassVar = {"full": ImageRule(32), "tiny": ImageRule(16)}
    plans: ClassVar = {
        "full": {
            "stem": CspStemCfg(out_chs=32, stride=1),
            "depth": (1, 2, 4, 4, 2),
            "out_chs": (64, 128, 256, 512, 1024),
            "stride": 2,
            "act_layer": "mish",
        },
        "tiny": {
            "stem": CspStemCfg(out_chs=16, stride=2),
            "depth": (1, 1, 1),
            "out_chs": (24, 48, 96),
            "stride": 2,
            "act_layer": "leaky_relu",
        },
    }

    def build(self, stem: CspStemCfg, act_layer: str, **stages: Any) -> nn.Module:
        """CSPDarkNet of one size."""
        config = CspModelCfg(
            stem=stem,
            stages=CspStagesCfg(stage_type="csp", block_type="dark", block_ratio=0.5, bottle_ratio=0.5, **stages),
            act_layer=act_layer,
        )
        return CspNet(config, num_classes=self.num_classes, zero_init_last=False)


class CustomInceptionV4(Backbone):
    """Inception-v4 (Szegedy et al. 2017): parallel branches of small and factorised convolutions, concatenated.

    `(B, 3, H, W)` -> logits `(B, num_classes)`. timm's inception and reduction blocks with a fraction `width` of the
    paper's channels, after a plain stem; `tiny` ends after Inception-B with a feature map of 3 x 3.
    """

    image_rules: ClassVar = {"full": ImageRule(64), "tiny": ImageRule(16)}
    plans: ClassVar = {
        "full": {
            "width": 0.75,
            "stem": (32, 64),
            "blocks": (InceptionA,) * 3 + (ReductionA,) + (InceptionB,) * 5 + (ReductionB,) + (InceptionC,) * 2,
            "out": 1536,
        },
        "tiny": {"width": 0.09375, "stem": (16,), "blocks": (InceptionA, ReductionA, InceptionB), "out": 1024},
    }

    def build(self, width: float, stem: tuple[int, ...], blocks: tuple[type[nn.Module], ...], out: int) -> nn.Module:
        """Inception-v4 of one size: a stem with 384 x `width` output channels, then `blocks`."""
        conv = scaled_conv(width, act_layer="relu")
        layers: list[nn.Module] = []
        channels = 3
        for stem_channels in (*stem, round(384 * width)):
            layers.append(ConvNormAct(channels, stem_channels, 3, stride=2))
            channels = stem_channels
        layers += [block(conv) for block in blocks]
        return PooledNetwork(nn.Sequential(*layers), round(out * width), self.num_classes)


class CustomRegNet(Backbone):
    """RegNet: stage widths on a quantised line and grouped convolutions of one group width (Radosavovic et al. 2020).

    `(B, 3, H, W)` -> logits `(B, num_classes)`. `full` has squeeze-and-excitation (RegNetY), `tiny` does not.
    """

    image_rules: ClassVar = {"full": ImageRule(32), "tiny": ImageRule(16)}
    plans: ClassVar = {
        "full": {
            "config": RegNetCfg(depth=20, w0=56, wa=36.0, wm=2.3, group_size=16, se_ratio=0.25),
            "drop_path_rate": 0.05,
        },
        "tiny": {
            "config": RegNetCfg(depth=4, w0=24, wa=24.0, wm=1.6, group_size=8, se_ratio=0.0, stem_width=16),
            "output_stride": 16,
        },
    }

    def build(self, config: RegNetCfg, **plan: Any) -> nn.Module:
        """RegNet of one size."""
        return RegNet(config, num_classes=self.num_classes, zero_init_last=False, **plan)


class CustomDenseNetHybrid(Backbone):
    """DenseNet (Huang et al. 2017) with squeeze-and-excitation (Hu et al. 2018).

    `(B, 3, H, W)` -> logits `(B, num_classes)`. Each layer reads the outputs of all earlier layers of its dense block;
    a channel gate after each dense block weights the concatenated channels before the transition halves them.
    """

    image_rules: ClassVar = {"full": ImageRule(32), "tiny": ImageRule(16)}
    plans: ClassVar = {
        "full": {"growth_rate": 40, "block_config": (4, 8, 16, 12), "stem_type": "deep"},
        "tiny": {"growth_rate": 16, "block_config": (2, 3, 3), "stem_type": "", "bn_size": 2, "patch_stem": True},
    }

    def build(self, patch_stem: bool = False, **plan: Any) -> nn.Module:
        """DenseNet of one size with a gate after every dense block."""
        network: Any = DenseNet(num_classes=self.num_classes, **plan)
        layers: OrderedDict[str, Any] = OrderedDict()
        for name, layer in network.features.named_children():
            if name.startswith("transition"):
                layers[name.replace("transition", "gate")] = SqueezeExcite(layer.norm.num_features, rd_ratio=1 / 16)
            layers[name] = layer
        if patch_stem:
            # On small images the strided 7x7 convolution and max pooling would take a third of the total time.
            layers["conv0"] = nn.Conv2d(3, layers["conv0"].out_channels, 4, stride=4, bias=False)
            del layers["pool0"]
        network.features = nn.Sequential(layers)
        return network


class CustomMobileOne(Backbone):
    """MobileOne (Vasu et al. 2023): depthwise and pointwise convolutions, each with several branches during training.

    `(B, 3, H, W)` -> logits `(B, num_classes)`. `timm.utils.reparameterize_model` fuses the branches of each into one
    convolution; in eval mode the outputs stay the same.
    """

    image_rules: ClassVar = {"full": ImageRule(32), "tiny": ImageRule(16)}
    plans: ClassVar = {
        "full": {"stem": 64, "depths": (2, 6, 8, 1), "widths": (96, 224, 512, 1280), "branches": 2},
        "tiny": {"stem": 24, "depths": (1, 1, 1), "widths": (64, 144, 288), "branches": 1},
    }

    def build(self, stem: int, depths: tuple[int, ...], widths: tuple[int, ...], branches: int) -> nn.Module:
        """MobileOne of one size: each layer is a depthwise 3x3 block and a pointwise one, both multi-branch."""
        stages = []
        channels = stem
        for depth, width in zip(depths, widths, strict=True):
            stage = []
            for layer in range(depth):
                stride = 2 if layer == 0 else 1
                common = {"num_conv_branches": branches}
                stage.append(ByoBlockCfg("one", d=1, c=channels, s=stride, gs=1, block_kwargs=common))
                stage.append(ByoBlockCfg("one", d=1, c=width, s=1, gs=0, block_kwargs={"kernel_size": 1, **common}))
                channels = width
            stages.append(tuple(stage))
        config = ByoModelCfg(blocks=tuple(stages), stem_type="one", stem_chs=stem)
        return ByobNet(config, num_classes=self.num_classes)


class CustomDynamicConvNet(Backbone):
    """Residual network of conditional convolutions, whose kernels are mixed per image from experts (Yang et al. 2019).

    `(B, 3, H, W)` -> logits `(B, num_classes)`.
    """

    image_rules: ClassVar = {"full": ImageRule(32), "tiny": ImageRule(16)}
    plans: ClassVar = {
        "full": {"stem": (32, 48), "widths": (48, 96, 192, 320), "depths": (2, 2, 2, 2), "experts": 4},
        "tiny": {"stem": (12, 24), "widths": (24, 48), "depths": (1, 1), "experts": 3},
    }

    def build(self, stem: tuple[int, ...], widths: tuple[int, ...], depths: tuple[int, ...], experts: int) -> nn.Module:
        """The network of one size: strided stem convolutions, then stages; all but the first halve the feature map."""
        layers: list[nn.Module] = []
        channels = 3
        for width in stem:
            layers.append(ConvNormAct(channels, width, 3, stride=2, act_layer=nn.SiLU))
            channels = width
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            for block in range(depth):
                stride = 2 if block == 0 and stage > 0 else 1
                layers.append(
                    RoutedBlock(
                        channels, width, stride=stride, experts=experts, act_layer=partial(nn.SiLU, inplace=True)
                    )
                )
                channels = width
        return PooledNetwork(nn.Sequential(*layers), channels, self.num_classes)
