"""All folder and file names of a workspace; no other module builds these paths."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from utils.core.errors import UserError

SPLITS = ("train", "val", "test")
CONFIG_NAME = "config.yaml"
EXTERNAL = "external-"
"""Prefix of the split name of an external set, whose images are outside the workspace; the set's name follows."""


@dataclass(frozen=True)
class Workspace:
    """The base pipeline's folders, which are only read, and this project's, in the same root or in `output`."""

    base: Path
    """Root; paths in records are relative to it."""
    split_dir: Path
    checkpoints: Path
    metrics: Path
    kfold: Path
    deployment: Path
    """The base pipeline's exports; this project's are in `exports`."""
    image_cache: Path
    """Decoded images; in `output` if there is one, else shared with the base pipeline."""
    logs: Path
    output: Path | None = None
    """Folder for everything that this project writes; None: the root."""

    @classmethod
    def from_settings(cls, settings: ModuleType, output: str | None = None) -> Workspace:
        """The workspace described by BASE-BACK's `config.settings`.

        Everything that this project writes goes to `output`, or, if that is None, to the folder in the environment
        variable DBT_ENSEMBLE_DIR. Raises UserError if that is not a folder.
        """
        base = Path(settings.BASE_DIR)
        output_folder = _output(output, base)
        placed = getattr(settings, "IMAGE_CACHE_DIR", None) or os.environ.get("DBT_IMAGE_CACHE_DIR")
        image_cache = Path(placed or base / "image_cache").absolute()
        return cls(
            base=base,
            split_dir=Path(settings.SPLIT_DIR),
            checkpoints=Path(settings.CKPT_DIR),
            metrics=Path(settings.METRICS_DIR),
            kfold=Path(settings.KFOLD_DIR),
            deployment=Path(settings.DEPLOY_DIR),
            image_cache=output_folder / image_cache.name
            if output_folder and image_cache.is_relative_to(base)
            else image_cache,
            logs=output_folder / "debug_logs" if output_folder else Path(settings.DEBUG_LOG_DIR),
            output=output_folder,
        )

    @property
    def root(self) -> Path:
        """The folder of everything that this project writes."""
        return self.output or self.base

    @property
    def has_images(self) -> bool:
        """Whether any split has a class folder; a base pipeline may create empty splits."""
        return any(path.is_dir() for split in SPLITS for path in (self.split_dir / split).glob("[!.]*"))

    @property
    def exists(self) -> bool:
        """Whether the base pipeline or this project has written here; other folders get no lock and no log."""
        return any(folder.is_dir() for folder in (self.split_dir, self.checkpoints, self.kfold, self.ensembles))

    def relative(self, path: Path) -> str:
        """`path` in the format of records: relative to the root with `/`, or absolute if it is outside."""
        return path.relative_to(self.base).as_posix() if path.is_relative_to(self.base) else path.as_posix()

    # files of the base pipeline --------------------------------------------------------------------------------------
    def checkpoint(self, backbone: str, role: str) -> Path:
        """`role`: final, finetune_best, head_best, fold<k>, snapshot<k>."""
        return self.checkpoints / f"{backbone}_{role}.pth"

    def training_metrics(self, backbone: str) -> Path:
        """The base pipeline's metrics of one backbone."""
        return self.metrics / f"{backbone}_training_metrics.json"

    def base_oof(self, backbone: str) -> Path:
        """Out-of-fold predictions written by the base pipeline."""
        return self.kfold / f"{backbone}_oof_predictions.npz"

    def kfold_results(self, backbone: str) -> Path:
        """Fold accuracies; the out-of-fold predictions, if any, are in the same folder."""
        return self.kfold / f"{backbone}_kfold_results.json"

    def class_mapping(self, backbone: str) -> Path:
        """Names of the outputs, recorded by an export."""
        return self.deployment / backbone / "class_mapping.json"

    @property
    def pipeline_summary(self) -> Path:
        """Metrics of the base pipeline's last run."""
        return self.metrics / "pipeline_summary.json"

    @property
    def recovery_state(self) -> Path:
        """The base pipeline's record of finished units."""
        return self.checkpoints / ".recovery_state.json"

    @property
    def training_progress(self) -> Path:
        """`<backbone>_train.pth` or `<backbone>_fold<k>.pth` for each unfinished training."""
        return self.checkpoints / ".progress"

    # files of this project -------------------------------------------------------------------------------------------
    @property
    def derived_checkpoints(self) -> Path:
        """Folder of derived weights: the base pipeline's checkpoint folder, unless there is an output."""
        return self.output / "checkpoints" if self.output else self.checkpoints

    def derived_checkpoint(self, backbone: str, role: str) -> Path:
        """`role`: uniform_soup, greedy_soup, wise_ft, distilled."""
        return self.derived_checkpoints / f"{backbone}_{role}.pth"

    @property
    def pretrained_weights(self) -> Path:
        """Networks downloaded, or put there by the user: `ORG/NAME` of each hub repository."""
        return self.root / "pretrained_weights"

    @property
    def ensembles(self) -> Path:
        """The folder of everything that this project writes except metrics and exports."""
        return self.root / "ensembles"

    @property
    def lock(self) -> Path:
        """Lock file, which names the process that is writing."""
        return self.ensembles / ".lock"

    @property
    def catalog(self) -> Path:
        """The members that `discover` lists."""
        return self.ensembles / "ensemble_catalog.json"

    @property
    def config(self) -> Path:
        """The stored configuration: that of the last building command, which later commands use."""
        return self.ensembles / CONFIG_NAME

    @property
    def digests(self) -> Path:
        """Cached digests of files."""
        return self.ensembles / "digests.json"

    @property
    def audit(self) -> Path:
        """Copies across splits, shortcuts and empty images."""
        return self.ensembles / "audit.json"

    @property
    def exported_files(self) -> Path:
        """Digests of the files written by exports of this workspace."""
        return self.ensembles / "exported_files.json"

    @property
    def latency(self) -> Path:
        """Measured latencies of members' networks."""
        return self.ensembles / "latency.json"

    @property
    def crossfit_folds(self) -> Path:
        """The workspace's cross-fitting folds of the out-of-sample rows."""
        return self.ensembles / "crossfit_folds.npz"

    @property
    def all_predictions(self) -> Path:
        """One folder per member."""
        return self.ensembles / "predictions"

    @property
    def all_oof(self) -> Path:
        """One file per member."""
        return self.ensembles / "oof_predictions"

    @property
    def all_embeddings(self) -> Path:
        """One folder per member."""
        return self.ensembles / "fusion_embeddings"

    def predictions(self, member: str, split: str) -> Path:
        """Folder of one member's arrays on one split."""
        return self.all_predictions / member / split

    def fold_predictions(self, member: str, split: str) -> Path:
        """Mean of the outputs of one member's fold networks on one split; its record is in the same folder."""
        return self.predictions(member, split) / "folds.npy"

    def external_splits(self, member: str) -> list[str]:
        """Splits of external sets for which one member has arrays."""
        folders = (self.all_predictions / member).glob(f"{EXTERNAL}*")
        return sorted(folder.name for folder in folders if folder.is_dir())

    def oof(self, member: str) -> Path:
        """Validated out-of-fold predictions of one member."""
        return self.all_oof / f"{member}.npz"

    @property
    def all_training_data(self) -> Path:
        """One file per declared member with a list of training images."""
        return self.ensembles / "training_data"

    def training_data(self, member: str) -> Path:
        """Digests of the images that one member's weights were trained on."""
        return self.all_training_data / f"{member}.npz"

    def embeddings(self, member: str, split: str) -> Path:
        """Embeddings of one member on one split; their record is in the same folder."""
        return self.all_embeddings / member / f"{split}.npy"

    def embeddings_record(self, member: str, split: str) -> Path:
        """Ids, classes and member digest of the embeddings."""
        return self.all_embeddings / member / f"{split}_record.json"

    @property
    def models(self) -> Path:
        """One folder per saved ensemble."""
        return self.ensembles / "models"

    def ensemble(self, name: str) -> Path:
        """Folder of one saved ensemble."""
        return self.models / name

    def ensemble_predictions(self, name: str, split: str) -> Path:
        """Predictions of one ensemble for a split, stored by `evaluate`."""
        return self.ensemble(name) / f"predictions_{split}.npz"

    def tuned_checkpoint(self, ensemble: str, member: str) -> Path:
        """Weights of a member's network fine-tuned by a fusion."""
        return self.ensemble(ensemble) / f"{member}.pth"

    def end_to_end(self, ensemble: str) -> Path:
        """Folder of an unfinished joint training of networks and head."""
        return self.ensembles / "end_to_end" / ensemble

    def soup(self, backbone: str) -> Path:
        """Record of averaging one backbone's checkpoints."""
        return self.ensembles / "soups" / f"{backbone}.json"

    def view_choice(self, member: str) -> Path:
        """Record of the views of test-time augmentation selected for one member on out-of-sample rows."""
        return self.ensembles / "tta" / f"{member}.json"

    def view_choices(self) -> list[Path]:
        """The records of all selections of views, sorted by member."""
        return sorted((self.ensembles / "tta").glob("*.json"))

    def view_outputs(self, member: str) -> Path:
        """Out-of-sample logits of one member by groups of views."""
        return self.ensembles / "tta" / f"{member}_views.npz"

    def view_oof(self, member: str) -> Path:
        """Out-of-fold predictions of one member with the selected views."""
        return self.ensembles / "tta" / f"{member}_oof.npz"

    def distillation(self, name: str) -> Path:
        """Folder of one student's targets, training progress, controls and record."""
        return self.ensembles / "distillation" / name

    @property
    def left_out(self) -> Path:
        """Record of pruned ensembles whose budget allows no member."""
        return self.ensembles / "pruning.json"

    @property
    def snapshots(self) -> Path:
        """Record of the trainings of the snapshots."""
        return self.ensembles / "snapshots.json"

    @property
    def scores(self) -> Path:
        """Folder of all outputs of `evaluate`."""
        return (self.output / "metrics_output" if self.output else self.metrics) / "ensembles"

    @property
    def exports(self) -> Path:
        """One folder per exported ensemble, next to the base pipeline's exports unless there is an output."""
        return self.output / "deployment_models" if self.output else self.deployment

    def ensemble_metrics(self, name: str, split: str) -> Path:
        """Scores of one ensemble; those of the test split have the plain name."""
        return self.scores / name / _by_split("metrics", split)

    def member_metrics(self, member: str, split: str) -> Path:
        """Scores of one member."""
        return self.scores / "members" / member / _by_split("metrics", split)

    def ranking(self, split: str) -> Path:
        """Ranking of members and ensembles."""
        return self.scores / _by_split("ranking", split)

    def ranking_table(self, split: str, suffix: str) -> Path:
        """The ranking as a table for papers: csv, md or tex."""
        return self.ranking(split).with_suffix(f".{suffix}")

    def plot(self, name: str, kind: str, split: str) -> Path:
        """A plot of one ensemble's scores, or of a member's with the name `members/<member>`."""
        return self.scores / name / f"{kind}{'' if split == 'test' else f'_{split}'}.png"

    def confusion_counts(self, metrics: Path) -> Path:
        """Counts of a confusion matrix that is too large for the `metrics.json` at `metrics`."""
        return metrics.with_name(f"{metrics.stem.replace('metrics', 'confusion_matrix')}.npz")

    def external_set(self, name: str) -> Path:
        """Record of one external set: ranked models, omitted images and matched classes."""
        return self.scores / "external" / name / "external.json"

    def external_sets(self) -> list[Path]:
        """The records of all evaluated external sets, sorted by name."""
        return sorted((self.scores / "external").glob("*/external.json"))

    def external_metrics(self, external_set: str, model: str) -> Path:
        """Scores of one model on an external set; for a member, `model` is `members/<member>`."""
        return self.external_set(external_set).parent / model / "metrics.json"

    def class_table(self, metrics: Path, kind: str, suffix: str) -> Path:
        """`per_class`, `confusion_matrix` or `curves` as csv, md or tex beside the `metrics.json` at `metrics`."""
        return metrics.with_name(f"{metrics.stem.replace('metrics', kind)}.{suffix}")

    def label_issues(self, suffix: str) -> Path:
        """Labels that are probably wrong (csv), and the method that detected them (json)."""
        return self.scores / f"label_issues.{suffix}"

    def report(self, split: str) -> Path:
        """The report of an evaluation; that of the test split has the plain name."""
        return self.ensembles / "report" / ("index.html" if split == "test" else f"index_{split}.html")

    def report_maps(self, split: str) -> Path:
        """Class-activation maps of the example images in the report of the split."""
        return self.report(split).with_name("maps.json" if split == "test" else f"maps_{split}.json")

    @property
    def log_file(self) -> Path:
        """Messages of all commands, with tracebacks of bugs."""
        return self.logs / "ensemble_orchestrator.log"


def remembered_config(base: Path, output: str | None) -> Path:
    """`Workspace.config` of the workspace at `base`, before any settings of the base pipeline are read."""
    return (_output(output, base) or base) / "ensembles" / CONFIG_NAME


def _output(option: str | None, base: Path) -> Path | None:
    requested = option or os.environ.get("DBT_ENSEMBLE_DIR")
    if not requested:
        return None
    folder = Path(os.path.abspath(os.path.expanduser(requested)))
    if folder.exists() and not folder.is_dir():
        source = "--output" if option else "DBT_ENSEMBLE_DIR"
        raise UserError(f"{source} {folder}: a file; expected a folder, which is created if it does not exist")
    return None if folder == base else folder


def _by_split(stem: str, split: str) -> str:
    return f"{stem}.json" if split == "test" else f"{stem}_{split}.json"
