"""The five architectures with attention, built on timm's model classes."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from timm.layers import HybridEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitConvCfg, MaxxVitTransformerCfg
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem
from torch import nn

from models.backbone import Backbone, ImageRule
from models.blocks import DistilledClassifier


class CustomViTHybrid(Backbone):
    """Vision transformer with a convolutional stem instead of a patch embedding (Xiao et al. 2021).

    `(B, 3, img_size, img_size)` -> logits `(B, num_classes)`. The stem has BatchNorm.
    """

    fixed_img_size: ClassVar = True
    image_rules: ClassVar = {"full": ImageRule(32, 16), "tiny": ImageRule(16, 8)}
    # `tiny` trains on a few hundred batches: too few for timm's small initial weights and position embeddings.
    plans: ClassVar = {
        "full": {
            "stem": (48, 96, 192, 384),
            "embed_dim": 384,
            "depth": 10,
            "num_heads": 6,
            "drop_path_rate": 0.1,
        },
        "tiny": {
            "stem": (16, 32, 80),
            "embed_dim": 80,
            "depth": 2,
            "num_heads": 4,
            "mlp_ratio": 2.0,
            "weight_init": "jax",
            "position_std": 0.4,
        },
    }

    def build(self, stem: tuple[int, ...], position_std: float = 0.02, **plan: Any) -> nn.Module:
        """Vision transformer of one size; its stem halves the resolution once for each width in `stem`."""
        convolutions = ConvStem(depth=len(stem), channels=stem, stride=(2,) * len(stem))
        network: Any = VisionTransformer(
            img_size=self.img_size,
            num_classes=self.num_classes,
            embed_layer=partial(HybridEmbed, backbone=convolutions, proj=False),
            patch_size=1,
            **plan,
        )
        nn.init.trunc_normal_(network.pos_embed, std=position_std)
        nn.init.trunc_normal_(network.head.weight, std=0.02)
        return network


class CustomSwinTransformer(Backbone):
    """Swin transformer: attention in windows that shift from block to block (Liu et al. 2021).

    `(B, 3, img_size, img_size)` -> logits `(B, num_classes)`. Side of the windows in tokens: for `full` that of the
    last stage's feature map (7 at 224 pixels), at most 14; for `tiny` 4.
    """

    fixed_img_size: ClassVar = True
    image_rules: ClassVar = {"full": ImageRule(64, 32), "tiny": ImageRule(32, 32)}
    # `tiny`: see CustomViTHybrid.
    plans: ClassVar = {
        "full": {
            "patch_size": 4,
            "embed_dim": 96,
            "depths": (2, 2, 4, 2),
            "num_heads": (3, 6, 12, 24),
            "drop_path_rate": 0.1,
        },
        "tiny": {
            "patch_size": 4,
            "embed_dim": 48,
            "depths": (2, 1),
            "num_heads": (4, 8),
            "mlp_ratio": 1.0,
            "drop_path_rate": 0.0,
            "weight_init": "jax",
            "position_std": 0.6,
        },
    }

    def build(self, position_std: float = 0.02, **plan: Any) -> nn.Module:
        """Swin transformer of one size, with a window size that divides the feature map of every stage."""
        network = SwinTransformer(
            img_size=self.img_size, num_classes=self.num_classes, window_size=self.window(), **plan
        )
        for name, parameter in network.named_parameters():
            if name.endswith("relative_position_bias_table"):
                nn.init.trunc_normal_(parameter, std=position_std)
        nn.init.trunc_normal_(network.head.fc.weight, std=0.02)
        return network

    def window(self) -> int:
        """Side length of the attention windows in tokens."""
        if self.size == "tiny":
            return 4
        last_map = self.img_size // 32
        return max(window for window in range(1, 15) if last_map % window == 0)


class CustomCoAtNet(Backbone):
    """CoAtNet: convolution stages first, then transformer stages with relative position (Dai et al. 2021).

    `(B, 3, img_size, img_size)` -> logits `(B, num_classes)`. The stem and the convolution stages have BatchNorm.
    """

    fixed_img_size: ClassVar = True
    image_rules: ClassVar = {"full": ImageRule(32, 32), "tiny": ImageRule(16, 8)}
    plans: ClassVar = {
        "full": {
            "embed_dim": (64, 128, 256, 512),
            "depths": (2, 2, 4, 2),
            "block_type": ("C", "C", "T", "T"),
            "stem_width": (32, 64),
            "dim_head": 32,
            "expand_ratio": 4.0,
        },
        "tiny": {
            "embed_dim": (32, 64),
            "depths": (1, 2),
            "block_type": ("C", "T"),
            "stem_width": (8, 16),
            "dim_head": 16,
            "expand_ratio": 2.0,
            "stride_mode": "pool",
        },
    }

    def build(self, dim_head: int, expand_ratio: float, stride_mode: str = "dw", **plan: Any) -> nn.Module:
        """CoAtNet of one size."""
        config = MaxxVitCfg(
            conv_cfg=MaxxVitConvCfg(expand_ratio=expand_ratio, stride_mode=stride_mode),
            transformer_cfg=MaxxVitTransformerCfg(dim_head=dim_head, expand_ratio=expand_ratio),
            **plan,
        )
        return MaxxVit(config, img_size=self.img_size, num_classes=self.num_classes)


class CustomDeiTStyle(Backbone):
    """Vision transformer with a class token, a distillation token and a head for each (Touvron et al. 2021).

    `(B, 3, img_size, img_size)` -> logits `(B, num_classes)`, the mean of both heads in train and eval mode. The
    embedding is the concatenation of both tokens, so `num_features` is twice the token width.
    """

    fixed_img_size: ClassVar = True
    image_rules: ClassVar = {"full": ImageRule(32, 16), "tiny": ImageRule(16, 8)}
    # `tiny`: see CustomViTHybrid.
    plans: ClassVar = {
        "full": {"patch_size": 16, "embed_dim": 384, "depth": 10, "num_heads": 6, "drop_path_rate": 0.1},
        "tiny": {
            "patch_size": 8,
            "embed_dim": 96,
            "depth": 2,
            "num_heads": 4,
            "mlp_ratio": 2.0,
            "weight_init": "jax",
            "position_std": 0.4,
        },
    }

    def build(self, position_std: float = 0.02, **plan: Any) -> nn.Module:
        """Vision transformer of one size with two extra tokens; `classifier` holds the two heads."""
        network: Any = VisionTransformerDistilled(img_size=self.img_size, num_classes=0, **plan)
        nn.init.trunc_normal_(network.pos_embed, std=position_std)
        self.classifier = DistilledClassifier(network.embed_dim, self.num_classes)
        network.head_hidden_size = 2 * network.embed_dim
        return network

    def forward_head(self, features: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Tokens `(B, 2 + patches, D)` -> logits, or with `pre_logits` both tokens `(B, 2 D)`."""
        embedding = features[:, :2].flatten(1)
        return embedding if pre_logits else self.classifier(embedding)

    def get_classifier(self) -> DistilledClassifier:
        """The module that holds `head` and `head_dist`."""
        return self.classifier


class CustomMaxViT(Backbone):
    """MaxViT: each block is a convolution, attention in local windows and attention on a sparse grid (Tu et al. 2022).

    `(B, 3, img_size, img_size)` -> logits `(B, num_classes)`. The side of windows and grids is 1/32 (`full`) or 1/8
    (`tiny`) of the image's: 7 at 224 pixels, 4 at 32.
    """

    fixed_img_size: ClassVar = True
    image_rules: ClassVar = {"full": ImageRule(64, 32), "tiny": ImageRule(16, 8)}
    plans: ClassVar = {
        "full": {
            "embed_dim": (64, 128, 256, 512),
            "depths": (1, 2, 3, 1),
            "stem_width": (64, 64),
            "dim_head": 32,
            "expand_ratio": 4.0,
            "partition_ratio": 32,
        },
        "tiny": {
            "embed_dim": (16, 48),
            "depths": (1, 1),
            "stem_width": (8, 12),
            "dim_head": 16,
            "expand_ratio": 2.0,
            "partition_ratio": 8,
            "stride_mode": "pool",
        },
    }

    def build(
        self, dim_head: int, expand_ratio: float, partition_ratio: int, stride_mode: str = "dw", **plan: Any
    ) -> nn.Module:
        """MaxViT of one size."""
        config = MaxxVitCfg(
            block_type=("M",) * len(plan["depths"]),
            conv_cfg=MaxxVitConvCfg(expand_ratio=expand_ratio, stride_mode=stride_mode),
            transformer_cfg=MaxxVitTransformerCfg(
                dim_head=dim_head, expand_ratio=expand_ratio, partition_ratio=partition_ratio, use_nchw_attn=False
            ),
            **plan,
        )
        return MaxxVit(config, img_size=self.img_size, num_classes=self.num_classes)
