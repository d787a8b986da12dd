"""The model zoo of BASE-BACK: fifteen image classifiers in two sizes."""

from models.deferred_dynamo import deferred_dynamo

with deferred_dynamo():
    from models.architectures import (
        BACKBONE_MAP,
        CustomCoAtNet,
        CustomConvNeXt,
        CustomCSPDarkNet,
        CustomDeiTStyle,
        CustomDenseNetHybrid,
        CustomDynamicConvNet,
        CustomEfficientNetV4,
        CustomGhostNetV2,
        CustomInceptionV4,
        CustomMaxViT,
        CustomMobileOne,
        CustomRegNet,
        CustomResNetMish,
        CustomSwinTransformer,
        CustomViTHybrid,
        create_custom_backbone,
        create_custom_backbone_safe,
        get_activation_fn,
    )

__all__ = [
    "BACKBONE_MAP",
    "CustomCSPDarkNet",
    "CustomCoAtNet",
    "CustomConvNeXt",
    "CustomDeiTStyle",
    "CustomDenseNetHybrid",
    "CustomDynamicConvNet",
    "CustomEfficientNetV4",
    "CustomGhostNetV2",
    "CustomInceptionV4",
    "CustomMaxViT",
    "CustomMobileOne",
    "CustomRegNet",
    "CustomResNetMish",
    "CustomSwinTransformer",
    "CustomViTHybrid",
    "create_custom_backbone",
    "create_custom_backbone_safe",
    "get_activation_fn",
]
