"""Every folder and file name of a workspace, in one place; nobody else joins these paths."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from utils import base_back

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Workspace:
    """The base pipeline's folders, which are read, and `ensembles/`, which is ours."""

    base: Path
    """Root; records hold paths relative to it."""
    split_dir: Path
    checkpoints: Path
    metrics: Path
    kfold: Path
    deployment: Path
    image_cache: Path
    logs: Path

    @classmethod
    def of_settings(cls) -> Workspace:
        """The workspace that the mounted BASE-BACK's settings name; loads them, without torch."""
        settings = base_back.settings()
        base = Path(settings.BASE_DIR)
        return cls(
            base=base,
            split_dir=Path(settings.SPLIT_DIR),
            checkpoints=Path(settings.CKPT_DIR),
            metrics=Path(settings.METRICS_DIR),
            kfold=Path(settings.KFOLD_DIR),
            deployment=Path(settings.DEPLOY_DIR),
            image_cache=Path(getattr(settings, "IMAGE_CACHE_DIR", base / "image_cache")),
            logs=Path(settings.DEBUG_LOG_DIR),
        )

    def relative(self, path: Path) -> str:
        """`path` as records name it: below the root with `/`, else absolute."""
        return path.relative_to(self.base).as_posix() if path.is_relative_to(self.base) else path.as_posix()

    # what the base pipeline left -------------------------------------------------------------------------------------
    def checkpoint(self, backbone: str, role: str) -> Path:
        """`role`: final, finetune_best, head_best, fold<k>, snapshot<k>."""
        return self.checkpoints / f"{backbone}_{role}.pth"

    def training_metrics(self, backbone: str) -> Path:
        """The base pipeline's figures of one backbone."""
        return self.metrics / f"{backbone}_training_metrics.json"

    def base_oof(self, backbone: str) -> Path:
        """Out-of-fold predictions as the base pipeline wrote them."""
        return self.kfold / f"{backbone}_oof_predictions.npz"

    def kfold_results(self, backbone: str) -> Path:
        """Fold accuracies; beside them, where the pipeline keeps them, the out-of-fold predictions."""
        return self.kfold / f"{backbone}_kfold_results.json"

    def class_mapping(self, backbone: str) -> Path:
        """Names of the outputs, as an export recorded them."""
        return self.deployment / backbone / "class_mapping.json"

    @property
    def pipeline_summary(self) -> Path:
        """Figures of the base pipeline's last run."""
        return self.metrics / "pipeline_summary.json"

    @property
    def recovery_state(self) -> Path:
        """What the base pipeline had finished."""
        return self.checkpoints / ".recovery_state.json"

    # ours ------------------------------------------------------------------------------------------------------------
    @property
    def ensembles(self) -> Path:
        """The folder that holds everything of ours but metrics and exports."""
        return self.base / "ensembles"

    @property
    def catalog(self) -> Path:
        """What discovery found."""
        return self.ensembles / "ensemble_catalog.json"

    @property
    def digests(self) -> Path:
        """Remembered digests of files."""
        return self.ensembles / "digests.json"

    @property
    def crossfit_folds(self) -> Path:
        """The workspace's folds over the honest rows."""
        return self.ensembles / "crossfit_folds.npz"

    def predictions(self, member: str, split: str) -> Path:
        """Folder of one member's arrays on one split."""
        return self.ensembles / "predictions" / member / split

    def oof(self, member: str) -> Path:
        """Validated out-of-fold predictions of one member."""
        return self.ensembles / "oof_predictions" / f"{member}.npz"

    def embeddings(self, member: str, split: str) -> Path:
        """Embeddings of one member on one split; the record lies beside it."""
        return self.ensembles / "fusion_embeddings" / member / f"{split}.npy"

    def embeddings_record(self, member: str, split: str) -> Path:
        """Ids, classes and member digest of the embeddings."""
        return self.ensembles / "fusion_embeddings" / member / f"{split}_record.json"

    @property
    def models(self) -> Path:
        """One folder per saved ensemble."""
        return self.ensembles / "models"

    def ensemble(self, name: str) -> Path:
        """Folder of one saved ensemble."""
        return self.models / name

    def ensemble_metrics(self, name: str, split: str) -> Path:
        """Scores of one ensemble; those of the test split have the plain name."""
        return self.metrics / "ensembles" / name / _by_split("metrics", split)

    def member_metrics(self, member: str, split: str) -> Path:
        """Scores of one member."""
        return self.metrics / "ensembles" / "members" / member / _by_split("metrics", split)

    def ranking(self, split: str) -> Path:
        """Members and ensembles in order."""
        return self.metrics / "ensembles" / _by_split("ranking", split)

    @property
    def log_file(self) -> Path:
        """Messages of every command, with the traceback of whatever was a bug."""
        return self.logs / "ensemble_orchestrator.log"


def _by_split(stem: str, split: str) -> str:
    return f"{stem}.json" if split == "test" else f"{stem}_{split}.json"
