"""Joint training of the members' networks with the heads of a fusion: in blocks, or all networks at once.

A block consists of the networks that are in memory and train; for all other networks the heads read stored embeddings.
With one network per block, memory does not grow with the number of members (block coordinate descent; Tseng 2001). The
state is written after every block, so that an interrupted training resumes there and, on the CPU, ends with equal
weights.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from utils import base_back
from utils.core.artifacts import read_record, write_json
from utils.core.errors import UserError
from utils.core.links import require_unlinked
from utils.core.progress_bar import progress_bar
from utils.networks import training_memory
from utils.networks.memory import out_of_memory
from utils.numeric.metrics import accuracy, log_loss
from utils.training.batch_schedule import derived_seed
from utils.training.joint_networks import (
    FusionHeads,
    JointMember,
    JointTrainingSettings,
    TrainableMember,
    loaded_members,
)
from utils.training.optimization import step_with_clipped_gradients
from utils.training.progress import TrainingProgress, copied_weights

logger = logging.getLogger("disease_pipeline")

AUXILIARY_WEIGHT = 0.3  # weight of the loss of the networks' own classifiers (Szegedy et al. 2015)
WEIGHT_DECAY = 0.01  # of the heads
FORM = {"files": dict, "history": list, "blocks": list, "key": str}
INITIAL_EPOCH = 0  # the state before any training


@dataclass(frozen=True)
class JointTrainingResult:
    """The state with the lowest log-loss on val; epoch 0 if no epoch improves on the networks before training."""

    heads: list[dict[str, np.ndarray]]
    epoch: int
    history: list[dict[str, float]]
    """By epoch, from 0: val_log_loss, val_accuracy and, from 1, train_loss."""
    blocks: list[list[str]]
    recomputed: list[str]
    """Networks with activation checkpointing, whose blocks are computed twice to save memory."""
    step_bytes: dict[str, int]
    """Bytes that a step of each network needs: weights, gradients, moments and activations."""
    threads: int | None
    """Intra-op threads of the training; None on a GPU."""
    folder: Path

    def weights(self, name: str) -> dict[str, Tensor]:
        """A member's weights at the selected epoch, read from disk; only for an epoch other than 0."""
        record = torch.load(self.folder / _network_file(self.epoch, name), map_location="cpu", weights_only=True)
        weights: dict[str, Tensor] = record["weights"]
        return weights


def train(
    members: Sequence[JointMember],
    head: FusionHeads,
    settings: JointTrainingSettings,
    *,
    folder: Path,
    key: str,
    device: str,
    batch_size: int,
    budget: int | None = None,
) -> JointTrainingResult:
    """Train the networks and the heads together, and keep the state in `folder` under `key`.

    `budget` is the number of bytes that a step may need; None: that of the machine. The step of each network is
    measured first, and all networks train at once if the sum is within the budget.

    Raises UserError if the loss is not finite, and for a network whose step does not fit into memory even with the
    smallest part of a batch.
    """
    run = _JointTraining(members, head, settings, folder, key, device)
    if not run.resumed():
        run.begin(budget if budget is not None else training_memory.memory_budget(device), batch_size)
    with base_back.load_bundled("threads").intra_op_threads(run.state["threads"]):
        return run.finish()


def _network_file(epoch: int, name: str) -> str:
    return f"epoch{epoch}-{name}.pth"


def _heads_file(epoch: int, block: int) -> str:
    return f"epoch{epoch}-block{block}-heads.pth"


class _JointTraining:
    """A joint training in progress: its state in memory and on disk."""

    def __init__(
        self,
        members: Sequence[JointMember],
        head: FusionHeads,
        settings: JointTrainingSettings,
        folder: Path,
        key: str,
        device: str,
    ) -> None:
        self.members = {member.name: member for member in members}
        self.head, self.settings, self.device = head.to(device), settings, device
        self.folder, self.key = folder, key
        self.on_cuda = torch.device(device).type == "cuda"
        self.scaler = torch.amp.GradScaler("cuda", enabled=self.on_cuda)
        self.optimizer = torch.optim.AdamW(head.heads.parameters(), lr=settings.lr, weight_decay=WEIGHT_DECAY)
        self.embeddings = {member.name: member.embeddings for member in members}
        batch_schedule = members[0].batch_schedule
        self.labels = torch.from_numpy(batch_schedule.image_source.images.labels)
        self.steps = len(batch_schedule)
        self.state: dict[str, Any] = {}

    # start or resume --------------------------------------------------------------------------------------------------

    def begin(self, budget: int, batch_size: int) -> None:
        """Start from the beginning; determine by measurement how many networks train at once."""
        require_unlinked(self.folder / "state.json")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        step_bytes, recomputed, threads = {}, [], []
        rule = base_back.load_bundled("threads")
        for name, member in self.members.items():
            with loaded_members([member], [None], self.settings, self.device) as (network,):
                size = member.spec.img_size
                threads.append(rule.threads_of_network("end to end", network.model, size, self.device))
                step_bytes[name] = network.step_bytes(batch_size)
                if step_bytes[name] > budget:
                    with training_memory.activation_checkpointing(network.model) as n_blocks:
                        reduced = network.step_bytes(batch_size)
                    if n_blocks and reduced < step_bytes[name]:
                        logger.info(
                            "%s: a step needs %.0f MB, %.0f MB with activation checkpointing of its %d blocks",
                            *(name, step_bytes[name] / 1e6, reduced / 1e6, n_blocks),
                        )
                        step_bytes[name] = reduced
                        recomputed.append(name)
        fits = sum(step_bytes.values()) <= budget
        logger.info(
            "a step of all %d networks needs %.0f MB of %.0f MB: %s",
            *(len(step_bytes), sum(step_bytes.values()) / 1e6, budget / 1e6),
            "they train together" if fits else "they train one after the other",
        )
        self.state = {
            "key": self.key,
            "blocks": [list(self.members)] if fits else [[name] for name in self.members],
            "twice": recomputed,
            "step_bytes": step_bytes,
            "threads": max(filter(None, threads), default=None),  # number of threads of the largest network
            "chunks": 1,
            "epoch": INITIAL_EPOCH + 1,
            "block": 0,
            "loss": 0.0,
            "files": {},
            "heads": None,
            "best": {"epoch": INITIAL_EPOCH},
            "history": [self._validate()],
        }
        self._save(INITIAL_EPOCH, 0)

    def resumed(self) -> bool:
        """Resume the training of this key from disk; False if there is none, or it has another key or is damaged."""
        path = self.folder / "state.json"
        state = read_record(path, remedy=f"Remove {self.folder}", form=FORM) if path.is_file() else None
        if state is None or state["key"] != self.key:
            return False
        embeddings = {}
        for name, file in state["files"].items():  # one at a time, since each contains a network with its optimizer
            saved = self._read(file)
            if saved is None:
                return False
            embeddings[name] = saved["train"], saved["val"]
            del saved
        if any(self._read(file) is None for file in self._best_files(state)) or not self._load_heads(state["heads"]):
            return False
        state.setdefault("threads", None)  # missing in states of earlier versions
        self.state = state
        self.embeddings |= embeddings
        logger.info("resumed at epoch %d of %d, block %d", state["epoch"], self.settings.epochs, state["block"] + 1)
        return True

    # training ---------------------------------------------------------------------------------------------------------

    def finish(self) -> JointTrainingResult:
        """Train to the last epoch."""
        state = self.state
        blocks = (self.settings.epochs + 1 - state["epoch"]) * len(state["blocks"]) - state["block"]
        with progress_bar(blocks, "end to end", unit="block") as advance:
            while state["epoch"] <= self.settings.epochs:
                loss = self._train_block(state["epoch"], state["block"])
                state["loss"] += loss / len(state["blocks"])
                epoch, block = state["epoch"], state["block"]
                state["block"] += 1
                if state["block"] == len(state["blocks"]):
                    self._end_epoch(epoch)
                self._save(epoch, block)
                advance(1)
        self._load_heads(state["best"]["heads"])
        return JointTrainingResult(
            heads=self.head.arrays(),
            epoch=state["best"]["epoch"],
            history=state["history"],
            blocks=state["blocks"],
            recomputed=state["twice"],
            step_bytes=state["step_bytes"],
            threads=state["threads"],
            folder=self.folder,
        )

    def _end_epoch(self, epoch: int) -> None:
        state = self.state
        row = self._validate() | {"train_loss": state["loss"]}
        state["history"].append(row)
        if row["val_log_loss"] < min(entry["val_log_loss"] for entry in state["history"][:-1]):
            state["best"] = {"epoch": epoch}
        logger.info(
            "end to end, epoch %d/%d: train loss %.4f, val log-loss %.4f accuracy %.4f",
            *(epoch, self.settings.epochs, row["train_loss"], row["val_log_loss"], row["val_accuracy"]),
        )
        state |= {"epoch": epoch + 1, "block": 0, "loss": 0.0}

    def _train_block(self, epoch: int, block: int) -> float:
        """Train one block for an epoch, in smaller parts of a batch if memory runs out; returns the heads' loss."""
        while True:
            try:
                return self._train_loaded(epoch, block)
            except (RuntimeError, MemoryError) as error:
                names = ", ".join(self.state["blocks"][block])
                if not out_of_memory(error):
                    raise
                first_member = self.members[self.state["blocks"][block][0]]
                if self.state["chunks"] >= first_member.batch_schedule.batch_size // 2:
                    raise UserError(
                        f"{names}: a step on two images does not fit into memory. Leave out the largest: "
                        "--set backbones.exclude=[NAME]; or train heads alone: --set runs.fusion.end_to_end=false"
                    ) from error
                self.state["chunks"] *= 2
                logger.warning("%s: memory ran out; each batch is split into %d parts", names, self.state["chunks"])
            # Outside the except block, where the traceback would keep the memory allocated.
            self._load_heads(self.state["heads"])

    def _train_loaded(self, epoch: int, block: int) -> float:
        names = self.state["blocks"][block]
        members = [self.members[name] for name in names]
        files = [self.state["files"].get(name) for name in names]
        saved = [self._read(file) if file else None for file in files]
        with loaded_members(members, saved, self.settings, self.device) as networks, ExitStack() as stack:
            del saved
            for network in networks:
                if network.member.name in self.state["twice"]:
                    stack.enter_context(training_memory.activation_checkpointing(network.model))
            # Random numbers of the networks are seeded by epoch and block, so that no generator state has to be saved.
            torch.manual_seed(derived_seed(self.settings.seed, "end to end", epoch, block))
            loss = self._train_epoch(networks, epoch, block)
            several = len(self.state["blocks"]) > 1  # a single block needs no stored embeddings of train images
            for network in networks:
                member = network.member
                train = network.embed(member.batch_schedule.image_source) if several else member.embeddings[0]
                val = network.embed(member.validation_set)
                self.embeddings[member.name] = (train, val)
                file = _network_file(epoch, member.name)
                self._write(file, network.state() | {"train": train, "val": val})
                self.state["files"][member.name] = file
        return loss

    def _train_epoch(self, networks: Sequence[TrainableMember], epoch: int, block: int) -> float:
        """Train one epoch; returns the heads' mean loss per image."""
        self.head.train()
        schedules = [network.member.batch_schedule for network in networks]
        views = [schedule.epoch_views(epoch) for schedule in schedules]
        total, count = 0.0, 0
        for step, batch in enumerate(schedules[0].batches(epoch)):  # all schedules share a seed and have equal batches
            self._set_lr(epoch, block, step)
            for optimizer in (self.optimizer, *(network.optimizer for network in networks)):
                optimizer.zero_grad(set_to_none=True)
            n_parts = max(1, min(self.state["chunks"], len(batch.rows) // 2))
            for indices in torch.arange(len(batch.rows)).tensor_split(n_parts):
                part = replace(batch, rows=batch.rows[indices], unaugmented=batch.unaugmented[indices])
                images = [
                    schedule.load(part, schedule_views, network.member.spec.preprocessing)
                    for network, schedule, schedule_views in zip(networks, schedules, views, strict=True)
                ]
                head_loss, auxiliary_loss = self._losses(networks, images, part.rows)
                loss = head_loss + auxiliary_loss
                if not torch.isfinite(loss):
                    raise UserError(
                        f"end to end: the loss became {loss.item()} in epoch {epoch}; set a lower rate: "
                        f"--set runs.fusion.fusion_config.lr={self.settings.lr / 10:g}"
                    )
                self.scaler.scale(loss * len(indices) / len(batch.rows)).backward()
                total, count = total + head_loss.item() * len(indices), count + len(indices)
            step_with_clipped_gradients(self.scaler, self.optimizer, self.head)
            for network in networks:
                step_with_clipped_gradients(self.scaler, network.optimizer, network.model)
            self.scaler.update()
            for network in networks:
                network.lr_schedule.step()
        return total / count

    def _losses(
        self, networks: Sequence[TrainableMember], images: Sequence[Tensor], rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of the heads, and weighted mean cross-entropy of the networks' classifiers."""
        labels = self.labels[rows].to(self.device)
        embeddings = {name: train[rows].to(self.device) for name, (train, _) in self._stored_embeddings(networks)}
        auxiliary_loss = labels.new_zeros((), dtype=torch.float32)
        with torch.autocast("cuda") if self.on_cuda else nullcontext():
            for network, batch_images in zip(networks, images, strict=True):
                logits, embeddings[network.member.name] = network.forward(batch_images)
                classifier_loss = network.criterion(logits.float(), labels)
                auxiliary_loss = auxiliary_loss + AUXILIARY_WEIGHT * classifier_loss / len(networks)
        scores = self.head([embeddings[name].float() for name in self.members])
        smoothing = self.settings.label_smoothing
        losses = [F.cross_entropy(head_scores, labels, label_smoothing=smoothing) for head_scores in scores]
        return torch.stack(losses).mean(), auxiliary_loss

    def _stored_embeddings(self, networks: Sequence[TrainableMember]) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
        """Embeddings of the members whose networks are not in memory."""
        loaded = {network.member.name for network in networks}
        return ((name, embeddings) for name, embeddings in self.embeddings.items() if name not in loaded)

    def _set_lr(self, epoch: int, block: int, step: int) -> None:
        """Set the heads' learning rate: a cosine decay over all blocks of all epochs."""
        n_blocks = len(self.state["blocks"])
        fraction = ((epoch - 1) * n_blocks + block + step / self.steps) / (self.settings.epochs * n_blocks)
        for options in self.optimizer.param_groups:
            options["lr"] = self.settings.lr * (1 + math.cos(math.pi * fraction)) / 2

    def _validate(self) -> dict[str, float]:
        """Log-loss and accuracy of the heads' mean probabilities on val."""
        self.head.eval()
        with torch.no_grad():
            scores = self.head([self.embeddings[name][1].to(self.device) for name in self.members])
            by_head = [torch.softmax(head_scores.double(), dim=1) for head_scores in scores]
            probabilities = torch.stack(by_head).mean(dim=0).cpu().numpy()
        labels = next(iter(self.members.values())).validation_set.images.labels
        return {"val_log_loss": log_loss(probabilities, labels), "val_accuracy": accuracy(probabilities, labels)}

    # files ------------------------------------------------------------------------------------------------------------

    def _save(self, epoch: int, block: int) -> None:
        """Write the heads, then the state that names all files; remove other files."""
        state = self.state
        state["heads"] = _heads_file(epoch, block)
        if state["best"]["epoch"] == epoch:
            state["best"]["heads"] = state["heads"]
        record = {
            "weights": copied_weights(self.head.heads.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        self._write(state["heads"], record)
        write_json(self.folder / "state.json", state)
        named = {"state.json", state["heads"], *state["files"].values(), *self._best_files(state)}
        for path in self.folder.iterdir():
            if path.name not in named:
                path.unlink()

    def _best_files(self, state: Mapping[str, Any]) -> list[str]:
        """Files of the best epoch so far; empty for the initial networks."""
        best = state["best"]
        if best["epoch"] == INITIAL_EPOCH:
            return [best["heads"]]
        return [best["heads"], *(_network_file(best["epoch"], name) for name in self.members)]

    def _write(self, file: str, record: Mapping[str, Any]) -> None:
        TrainingProgress(self.folder / file, self.key).save(record)

    def _read(self, file: str) -> dict[str, Any] | None:
        """The content of a file of this training; None, with a warning, if it is damaged or has another key."""
        return TrainingProgress(self.folder / file, self.key).load()

    def _load_heads(self, file: str) -> bool:
        """Restore heads, optimizer and scaler; False if the file is damaged or has another key."""
        saved = self._read(file)
        if saved is None:
            return False
        self.head.heads.load_state_dict(saved["weights"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        return True
