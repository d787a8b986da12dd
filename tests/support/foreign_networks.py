"""What learns in the small BASE-BACK of somebody else: sources of its networks, its training and its export.

`foreign_base_back` writes them into a folder. The five kinds of classifier are those that the public fifteen have.
"""

from __future__ import annotations

BLOCKS = """
from torch import nn

class ConvNeXtBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mix = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.act = nn.GELU()
    def forward(self, x):
        return x + self.act(self.mix(x))
"""

ARCHITECTURES = """
import torch
from torch import nn

from .blocks import ConvNeXtBlock

try:
    from ..utils import logger
except ImportError:
    from utils import logger

class CustomConvNeXt(nn.Module):
    def __init__(self, num_classes=1000):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.block = ConvNeXtBlock(8)
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.norm = nn.LayerNorm(128)
        self.head = nn.Linear(128, num_classes)
    def forward(self, x):
        return self.head(self.norm(self.pool(self.block(self.stem(x))).flatten(1)))

class CustomResNetMish(nn.Module):
    def __init__(self, num_classes=1000):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 4, stride=4), nn.BatchNorm2d(16), nn.Mish(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.Mish(),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(4)
        self.fc = nn.Linear(512, num_classes)
    def forward(self, x):
        return self.fc(torch.flatten(self.avgpool(self.layers(x)), 1))

class WindowMixing(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(7, width))
        self.register_buffer("relative_position_index", torch.arange(16).remainder(7))
        self.mix = nn.Linear(width, width)
    def forward(self, x):
        return x + torch.relu(self.mix(x + self.bias[self.relative_position_index]))

class CustomSwinTransformer(nn.Module):
    def __init__(self, num_classes=1000):
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 8, stride=8)
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.layers = WindowMixing(24)
        self.head = nn.Sequential(nn.Flatten(), nn.LayerNorm(384), nn.Dropout(0.1), nn.Linear(384, num_classes))
    def forward(self, x):
        return self.head(self.layers(self.pool(self.patches(x)).flatten(2).transpose(1, 2)))

class CustomCoAtNet(nn.Module):
    def __init__(self, num_classes=1000):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.ReLU())
        first = [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 32)]
        self.head = nn.Sequential(*first, nn.ReLU(), nn.Dropout(0.1), nn.Identity(), nn.Linear(32, num_classes))
    def forward(self, x):
        return self.head(self.stem(x))

class CustomDeiTStyle(nn.Module):
    def __init__(self, num_classes=1000):
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 8, stride=8)
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.norm = nn.LayerNorm(384)
        self.head = nn.Linear(384, num_classes)
        self.head_dist = nn.Linear(384, num_classes)
    def forward(self, x):
        features = self.norm(torch.relu(self.pool(self.patches(x))).flatten(1))
        return (self.head(features) + self.head_dist(features.tanh())) / 2

BACKBONE_MAP = {
    "CustomConvNeXt": CustomConvNeXt, "CustomResNetMish": CustomResNetMish,
    "CustomSwinTransformer": CustomSwinTransformer, "CustomCoAtNet": CustomCoAtNet, "CustomDeiTStyle": CustomDeiTStyle,
}

def create_custom_backbone(name, num_classes=1000):
    if name not in BACKBONE_MAP:
        raise ValueError(f"unknown backbone {name}; there are {list(BACKBONE_MAP)}")
    return BACKBONE_MAP[name](num_classes=num_classes)

def create_custom_backbone_safe(name, num_classes=1000):
    try:
        return create_custom_backbone(name, num_classes)
    except Exception as error:
        logger.error(f"{name}: {error}")
        return None
"""

MODELS = """
from .architectures import (
    BACKBONE_MAP, CustomCoAtNet, CustomConvNeXt, CustomDeiTStyle, CustomResNetMish, CustomSwinTransformer,
    create_custom_backbone, create_custom_backbone_safe,
)
from .blocks import ConvNeXtBlock
"""

PIPELINE = """
import numpy as np
import torch
from torch import nn

try:
    from ..config.settings import WEIGHT_DECAY
    from ..utils import DEVICE, logger
except ImportError:
    from config.settings import WEIGHT_DECAY
    from utils import DEVICE, logger

def _run(model, loader, criterion, device, optimizer=None):
    device = device or DEVICE
    model.to(device).train(optimizer is not None)
    losses, preds, labels, probs = 0.0, [], [], []
    for images, targets in loader:
        with torch.set_grad_enabled(optimizer is not None):
            logits = model(images.to(device))
            loss = criterion(logits, targets.to(device))
        if optimizer is not None:
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        losses += loss.item() * len(targets)
        probs.append(logits.detach().softmax(1).cpu().numpy())
        preds.append(probs[-1].argmax(1))
        labels.append(targets.numpy())
    preds, labels, probs = np.concatenate(preds), np.concatenate(labels), np.concatenate(probs)
    score = float(np.mean([(preds[labels == c] == c).mean() for c in np.unique(labels)]))
    return losses / len(labels), (preds == labels).mean(), score, score, score, preds, labels, probs
def train_epoch_optimized(model, loader, optimizer, criterion, device=None):
    return _run(model, loader, criterion, device, optimizer)
def validate_epoch_optimized(model, loader, criterion, device=None):
    return _run(model, loader, criterion, device)
def get_loss_function_for_backbone(backbone_name, num_classes):
    return nn.CrossEntropyLoss(label_smoothing=0.1 if backbone_name == "CustomCoAtNet" else 0.05)
def create_optimized_optimizer(model, lr, backbone_name):
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=WEIGHT_DECAY)
def create_improved_scheduler(optimizer, epochs, steps_per_epoch, backbone_name):
    lr = optimizer.param_groups[0]["lr"]
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5 * lr, total_steps=epochs * steps_per_epoch)
def save_checkpoint(path, model, optimizer=None, scheduler=None, extra=None):
    parts = {"model_state_dict": model, "optimizer_state_dict": optimizer, "scheduler_state_dict": scheduler}
    state = {name: part.state_dict() for name, part in parts.items() if part is not None}
    torch.save({**state, "extra": extra or {}}, path)

def _unwrap_logits(outputs):
    return outputs, None
"""

TRAINING = """
from .pipeline import (
    create_improved_scheduler, create_optimized_optimizer, get_loss_function_for_backbone, save_checkpoint,
    train_epoch_optimized, validate_epoch_optimized,
)
"""

EXPORT_ENGINE = """
import torch

try:
    from ..utils import logger
except ImportError:
    from utils import logger

def export_to_format(model, export_format, output_path, dummy_input=None):
    torch.save(model.state_dict(), output_path)
    logger.info(f"{export_format} written")
    return True
"""
