"""Training of the members' networks together with the heads of a fusion: in blocks, or all at once where they fit.

A block holds the networks that are in memory and move; of all others the head reads embeddings that were kept. With one
network per block memory does not grow with the members (block coordinate descent; Tseng 2001). After every block the
state lies on disk, so that a training that was killed goes on from there and ends with equal weights on the CPU.
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

from utils.core.artifacts import read_record, write_json
from utils.core.errors import UserError
from utils.networks import training_memory
from utils.networks.memory import out_of_memory
from utils.numeric.metrics import accuracy, log_loss
from utils.training.image_views import seed_of
from utils.training.joint_networks import Course, FusionHeads, Moving, Part, in_memory
from utils.training.optimization import step_with_clipped_gradients
from utils.training.progress import TrainingProgress, copied_weights

logger = logging.getLogger("disease_pipeline")

OWN_SHARE = 0.3  # of the loss of each network's own classifier, as auxiliary ones have it (Szegedy et al. 2015)
WEIGHT_DECAY = 0.01  # of the heads
FORM = {"files": dict, "history": list, "blocks": list, "key": str}
FROM_START = 0  # the epoch in which nothing has moved yet


@dataclass(frozen=True)
class Tuned:
    """Outcome of a training: the epoch with the least log-loss on val; 0: nothing was better than not to move."""

    heads: list[dict[str, np.ndarray]]
    epoch: int
    history: list[dict[str, float]]
    """Of each epoch, the untouched one first: val_log_loss, val_accuracy and, from the second on, train_loss."""
    blocks: list[list[str]]
    twice: list[str]
    """Networks whose blocks were computed twice to save memory."""
    step_bytes: dict[str, int]
    """What a step of each network fills: weights, gradients, moments and activations."""
    folder: Path

    def weights(self, name: str) -> dict[str, Tensor]:
        """A member's weights at the chosen epoch, read from disk; only where that is not 0."""
        record = torch.load(self.folder / _file(self.epoch, name), map_location="cpu", weights_only=True)
        return record["weights"]  # type: ignore[no-any-return]


def train(
    parts: Sequence[Part],
    head: FusionHeads,
    course: Course,
    *,
    folder: Path,
    key: str,
    device: str,
    batch_size: int,
    budget: int | None = None,
) -> Tuned:
    """Train the networks and the heads together; what is under way is kept in `folder` under `key`.

    `budget`: bytes that a step may fill, the machine's where None. Whether all networks move at once follows from
    what a step of each fills, which is measured first. Raises UserError when the loss stops being a number, and for
    a network whose step does not fit, one image at a time.
    """
    run = _Run(parts, head, course, folder, key, device)
    if not run.resumed():
        run.begin(budget if budget is not None else training_memory.memory_budget(device), batch_size)
    return run.finish()


def _file(epoch: int, name: str) -> str:
    return f"epoch{epoch}-{name}.pth"


def _moved(epoch: int, number: int) -> str:
    return f"epoch{epoch}-block{number}-heads.pth"


class _Run:
    """A training under way: what has moved how far, in memory and on disk."""

    def __init__(
        self, parts: Sequence[Part], head: FusionHeads, course: Course, folder: Path, key: str, device: str
    ) -> None:
        self.parts = {part.name: part for part in parts}
        self.head, self.course, self.folder, self.key, self.device = head.to(device), course, folder, key, device
        self.on_cuda = torch.device(device).type == "cuda"
        self.scaler = torch.amp.GradScaler("cuda", enabled=self.on_cuda)
        self.optimizer = torch.optim.AdamW(head.heads.parameters(), lr=course.lr, weight_decay=WEIGHT_DECAY)
        self.embeddings = {part.name: part.embeddings for part in parts}
        lessons = parts[0].lessons
        self.labels = torch.from_numpy(lessons.album.images.labels)
        self.steps = len(lessons)
        self.state: dict[str, Any] = {}

    # from the beginning, or from where it stopped ---------------------------------------------------------------------

    def begin(self, budget: int, batch_size: int) -> None:
        """Decide by measurement how many networks move at once."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        filled, twice = {}, []
        for name, part in self.parts.items():
            with in_memory([part], [None], self.course, self.device) as (moving,):
                filled[name] = moving.step_bytes(batch_size)
                if filled[name] > budget:
                    with training_memory.activation_checkpointing(moving.model) as count:
                        less = moving.step_bytes(batch_size)
                    if count and less < filled[name]:
                        logger.info(
                            "%s: a step fills %.0f MB, %.0f MB when its %d blocks are computed twice",
                            *(name, filled[name] / 1e6, less / 1e6, count),
                        )
                        filled[name] = less
                        twice.append(name)
        together = sum(filled.values()) <= budget
        logger.info(
            "a step of all %d networks fills %.0f MB of %.0f MB: %s",
            *(len(filled), sum(filled.values()) / 1e6, budget / 1e6),
            "they move together" if together else "they move one after the other",
        )
        self.state = {
            "key": self.key,
            "blocks": [list(self.parts)] if together else [[name] for name in self.parts],
            "twice": twice,
            "step_bytes": filled,
            "chunks": 1,
            "epoch": FROM_START + 1,
            "block": 0,
            "loss": 0.0,
            "files": {},
            "heads": None,
            "best": {"epoch": FROM_START},
            "history": [self._exam()],
        }
        self._keep_heads(FROM_START, 0)

    def resumed(self) -> bool:
        """Whether there is a training of this key on disk, which is taken up; another, or a damaged one, goes."""
        path = self.folder / "state.json"
        state = read_record(path, remedy=f"Remove {self.folder}", form=FORM) if path.is_file() else None
        if state is None or state["key"] != self.key:
            return False
        kept = {}
        for name, file in state["files"].items():  # one at a time: each holds a network with its optimizer
            own = self._read(file)
            if own is None:
                return False
            kept[name] = own["train"], own["val"]
            del own
        if any(self._read(file) is None for file in self._of_best(state)) or not self._take_heads(state["heads"]):
            return False
        self.state = state
        self.embeddings |= kept
        logger.info("resumed at epoch %d of %d, block %d", state["epoch"], self.course.epochs, state["block"] + 1)
        return True

    # one block after the other ----------------------------------------------------------------------------------------

    def finish(self) -> Tuned:
        """Go on to the last epoch."""
        state = self.state
        while state["epoch"] <= self.course.epochs:
            loss = self._one_block(state["epoch"], state["block"])
            state["loss"] += loss / len(state["blocks"])
            epoch, number = state["epoch"], state["block"]
            state["block"] += 1
            if state["block"] == len(state["blocks"]):
                self._end_of_epoch(epoch)
            self._keep_heads(epoch, number)
        self._take_heads(state["best"]["heads"])
        return Tuned(
            heads=_arrays(self.head),
            epoch=state["best"]["epoch"],
            history=state["history"],
            blocks=state["blocks"],
            twice=state["twice"],
            step_bytes=state["step_bytes"],
            folder=self.folder,
        )

    def _end_of_epoch(self, epoch: int) -> None:
        state = self.state
        row = self._exam() | {"train_loss": state["loss"]}
        state["history"].append(row)
        if row["val_log_loss"] < min(entry["val_log_loss"] for entry in state["history"][:-1]):
            state["best"] = {"epoch": epoch}
        logger.info(
            "end to end, epoch %d/%d: train loss %.4f, val log-loss %.4f accuracy %.4f",
            *(epoch, self.course.epochs, row["train_loss"], row["val_log_loss"], row["val_accuracy"]),
        )
        state |= {"epoch": epoch + 1, "block": 0, "loss": 0.0}

    def _one_block(self, epoch: int, number: int) -> float:
        """Train one block's networks and the heads for an epoch; gives the heads' mean loss per image."""
        while True:
            try:
                return self._trained(epoch, number)
            except (RuntimeError, MemoryError) as error:
                names = ", ".join(self.state["blocks"][number])
                if not out_of_memory(error):
                    raise
                if self.state["chunks"] >= self.parts[self.state["blocks"][number][0]].lessons.batch_size // 2:
                    raise UserError(
                        f"{names}: a step does not fit into memory, two images at a time. Leave out the largest: "
                        "--set backbones.exclude=[NAME]; or train heads alone: --set runs.fusion.end_to_end=false"
                    ) from error
                self.state["chunks"] *= 2
                logger.warning("%s: memory ran out; batches are taken in %d parts", names, self.state["chunks"])
            # The error, which holds the memory by its traceback, is gone here.
            self._take_heads(self.state["heads"])

    def _trained(self, epoch: int, number: int) -> float:
        names = self.state["blocks"][number]
        parts = [self.parts[name] for name in names]
        files = [self.state["files"].get(name) for name in names]
        saved = [self._read(file) if file else None for file in files]
        with in_memory(parts, saved, self.course, self.device) as moving, ExitStack() as stack:
            del saved
            for one in moving:
                if one.part.name in self.state["twice"]:
                    stack.enter_context(training_memory.activation_checkpointing(one.model))
            # What networks draw while they train follows from the place, so that nothing of it has to be saved.
            torch.manual_seed(seed_of(self.course.seed, "end to end", epoch, number))
            loss = self._epoch(moving, epoch, number)
            for one in moving:
                several = len(self.state["blocks"]) > 1  # else nobody reads the kept embeddings of train images
                train = one.seen(one.part.lessons.album) if several else one.part.embeddings[0]
                self.embeddings[one.part.name] = (train, one.seen(one.part.exam))
                kept = dict(zip(("train", "val"), self.embeddings[one.part.name], strict=True))
                file = _file(epoch, one.part.name)
                TrainingProgress(self.folder / file, self.key).save(one.state() | kept)
                self.state["files"][one.part.name] = file
        return loss

    def _epoch(self, moving: Sequence[Moving], epoch: int, number: int) -> float:
        self.head.train()
        lessons = {one.part.name: one.part.lessons for one in moving}
        views = {name: own.drawn(epoch) for name, own in lessons.items()}
        total, count = 0.0, 0
        plan = next(iter(lessons.values())).plan(epoch)  # all draw the same batches from one seed
        for step, batch in enumerate(plan):
            self._set_rate(epoch, number, step)
            for optimizer in (self.optimizer, *(one.optimizer for one in moving)):
                optimizer.zero_grad(set_to_none=True)
            chunks = max(1, min(self.state["chunks"], len(batch.rows) // 2))
            for places in torch.arange(len(batch.rows)).tensor_split(chunks):
                shown = replace(batch, rows=batch.rows[places], plain=batch.plain[places])
                images = [
                    lessons[one.part.name].shown(shown, views[one.part.name], one.part.spec.img_size) for one in moving
                ]
                heads, own = self._losses(moving, images, shown.rows)
                if not torch.isfinite(heads + own):
                    raise UserError(
                        f"end to end: the loss became {(heads + own).item()} in epoch {epoch}; try a lower rate: "
                        f"--set runs.fusion.fusion_config.lr={self.course.lr / 10:g}"
                    )
                self.scaler.scale((heads + own) * len(places) / len(batch.rows)).backward()
                total, count = total + heads.item() * len(places), count + len(places)
            for model, optimizer in ((self.head, self.optimizer), *((one.model, one.optimizer) for one in moving)):
                step_with_clipped_gradients(self.scaler, optimizer, model)
            self.scaler.update()
            for one in moving:
                one.schedule.step()
        return total / count

    def _losses(self, moving: Sequence[Moving], images: Sequence[Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of the heads, and what the networks' own classifiers add."""
        labels = self.labels[rows].to(self.device)
        read = {name: train[rows].to(self.device) for name, (train, _) in self._still(moving)}
        own = labels.new_zeros((), dtype=torch.float32)
        with torch.autocast("cuda") if self.on_cuda else nullcontext():
            for one, shown in zip(moving, images, strict=True):
                logits, read[one.part.name] = one.answer(shown)
                own = own + OWN_SHARE * one.criterion(logits.float(), labels) / len(moving)
        scores = self.head([read[name].float() for name in self.parts])
        smoothing = self.course.label_smoothing
        said = [F.cross_entropy(each, labels, label_smoothing=smoothing) for each in scores]
        return torch.stack(said).mean(), own

    def _still(self, moving: Sequence[Moving]) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
        active = {one.part.name for one in moving}
        return ((name, kept) for name, kept in self.embeddings.items() if name not in active)

    def _set_rate(self, epoch: int, number: int, step: int) -> None:
        """Of the heads: half a cosine over all blocks of all epochs."""
        blocks = len(self.state["blocks"])
        done = ((epoch - 1) * blocks + number + step / self.steps) / (self.course.epochs * blocks)
        for options in self.optimizer.param_groups:
            options["lr"] = self.course.lr * (1 + math.cos(math.pi * done)) / 2

    # what is kept -----------------------------------------------------------------------------------------------------

    def _exam(self) -> dict[str, float]:
        self.head.eval()
        with torch.no_grad():
            scores = self.head([self.embeddings[name][1].to(self.device) for name in self.parts])
            said = torch.stack([torch.softmax(each.double(), dim=1) for each in scores]).mean(dim=0).cpu().numpy()
        labels = next(iter(self.parts.values())).exam.images.labels
        return {"val_log_loss": log_loss(said, labels), "val_accuracy": accuracy(said, labels)}

    def _keep_heads(self, epoch: int, number: int) -> None:
        """Write the heads, then the state that names all files; what it does not name goes."""
        state = self.state
        state["heads"] = _moved(epoch, number)
        if state["best"]["epoch"] == epoch:
            state["best"]["heads"] = state["heads"]
        record = {
            "weights": copied_weights(self.head.heads.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        TrainingProgress(self.folder / state["heads"], self.key).save(record)
        write_json(self.folder / "state.json", state)
        named = {"state.json", state["heads"], *state["files"].values(), *self._of_best(state)}
        for path in self.folder.iterdir():
            if path.name not in named:
                path.unlink()

    def _of_best(self, state: Mapping[str, Any]) -> list[str]:
        """Files of the best epoch so far; the untouched networks have none of their own."""
        best = state["best"]
        networks = [_file(best["epoch"], name) for name in self.parts] if best["epoch"] != FROM_START else []
        return [best["heads"], *networks]

    def _read(self, file: str) -> dict[str, Any] | None:
        """What a file of this training holds; None, said in words, where it is damaged or of another."""
        return TrainingProgress(self.folder / file, self.key).load()

    def _take_heads(self, file: str) -> bool:
        """Go on from heads that were kept; whether they could be read."""
        saved = self._read(file)
        if saved is None:
            return False
        self.head.heads.load_state_dict(saved["weights"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        return True


def _arrays(head: FusionHeads) -> list[dict[str, np.ndarray]]:
    return [
        {name: tensor.detach().cpu().numpy().astype(np.float32) for name, tensor in own.state_dict().items()}
        for own in head.heads
    ]
