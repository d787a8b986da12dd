"""Epochs, losses, optimizers, schedules and checkpoints of the base pipeline."""

from training.pipeline import (
    create_improved_scheduler,
    create_optimized_optimizer,
    get_loss_function_for_backbone,
    save_checkpoint,
    train_epoch_optimized,
    validate_epoch_optimized,
)

__all__ = [
    "create_improved_scheduler",
    "create_optimized_optimizer",
    "get_loss_function_for_backbone",
    "save_checkpoint",
    "train_epoch_optimized",
    "validate_epoch_optimized",
]
