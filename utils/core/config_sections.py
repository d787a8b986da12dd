"""The sections of the configuration file: every key with its type, its default and what it means.

Defaults are the specification's values. A description is what `config`, `config --explain` and the JSON schema print,
and what tables of the documentation are compared with.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from utils.core.config_values import (
    VIEW_GROUPS,
    Batch,
    Count,
    Dropout,
    FeatureWeight,
    FitRows,
    Flag,
    Folder,
    Fraction,
    Limit,
    Metric,
    Name,
    NameOrNone,
    Names,
    NamesOrAll,
    Pattern,
    Positive,
    Precisions,
    Shrinkage,
    Sizes,
    Text,
    Threads,
    ViewGroups,
    Workers,
    as_best,
    at_most_experts,
    differs_from_student,
    some_left,
    without_meta_fuser,
)


class Section(BaseModel):
    """A closed, frozen mapping of the file."""

    # Defaults are validated too: `num_experts: 1` is incompatible with the default of top_k.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)


class Project(Section):
    name: Text = Field(
        default="disease_classification_ensemble", description="Name of the project, shown in the report."
    )
    version: Text = Field(default="1.0", description="Version of the project, shown in the report.")


class Dataset(Section):
    img_size: Count = Field(
        default=224,
        description="Side of the square input in pixels, for networks that record none of their own.",
    )
    batch_size: Count = Field(default=32, description="Images per forward pass. Smaller values need less memory.")
    num_workers: Workers = Field(default=16, description="Threads that decode images.")
    num_threads: Threads = Field(
        default=None,
        description="Threads of one torch operation; null: one, and two for large networks (`OMP_NUM_THREADS`, where "
        "it is set).",
    )
    group_regex: Pattern = Field(
        default=None,
        description="Images whose file names give this group the same text stay in the same split and fold.",
    )


class Backbones(Section):
    """Which members are combined.

    Imported members are named in `include` like others; where it is left as printed here, all of them join. `all`
    includes every member that is not derived and whose training data is known.
    """

    include: NamesOrAll = Field(
        default=(
            *("CustomConvNeXt", "CustomEfficientNetV4", "CustomGhostNetV2", "CustomResNetMish", "CustomCSPDarkNet"),
            *("CustomInceptionV4", "CustomViTHybrid", "CustomSwinTransformer", "CustomCoAtNet", "CustomRegNet"),
            *("CustomDenseNetHybrid", "CustomDeiTStyle", "CustomMaxViT", "CustomMobileOne", "CustomDynamicConvNet"),
        ),
        description="Names of members, or `all`: every member that is not derived and whose training data is known. As "
        "printed, all imported members join.",
    )
    exclude: Annotated[Names, AfterValidator(some_left)] = Field(
        default=(),
        description="Names of members that are left out.",
    )

    @property
    def selected(self) -> tuple[str, ...]:
        """The names in `include` without `exclude`, in the file's order; none where it is `all`."""
        if isinstance(self.include, str):
            return ()
        return tuple(name for name in self.include if name not in self.exclude)


class Exports(Section):
    enable: Flag = Field(default=True, description="Whether `pipeline` exports the recommended model.")
    formats: Names = Field(
        default=("state_dict", "checkpoint", "torchscript", "onnx", "tflite"),
        description="Formats of the exported files.",
    )
    precision: Precisions = Field(default=("fp32",), description="Precisions of ONNX files; fp32 is always written.")
    input: Literal["float-nchw", "uint8-nhwc"] = Field(
        default="float-nchw",
        description="Input of exported files: cropped float images in [0, 1], or decoded ones that the graph resizes.",
    )
    onnx_exporter: Literal["tracing", "dynamo"] = Field(
        default="tracing",
        description="Which exporter of torch writes ONNX files: tracing (opset 17), or dynamo, which starts from "
        "torch.export, writes opset 18 and is much slower.",
    )
    max_members: Count | None = Field(
        default=None, description="Refuse to export an ensemble with more members; null for no limit."
    )


class ScoreEnsemble(Section):
    enable: Flag = Field(default=True, description="Whether `build-ensemble` builds votes and weighted means.")
    methods: Names = Field(
        default=("soft_voting", "hard_voting", "logit_averaging", "weighted"),
        description="Which votes are built. The calibrated ones have a fitted temperature.",
    )
    optimize_weights: Flag = Field(
        default=True,
        description="Whether `weighted` fits its weights; false gives equal weights.",
    )
    optimization_metric: Metric = Field(
        default="f1_macro", description="Metric that weights and selections optimise and that orders the ranking."
    )
    pool: Literal["auto", "linear", "log_linear"] = Field(
        default="auto",
        description="Form of `weighted`: weighted mean of probabilities, or of log-probabilities; auto takes the "
        "better on held-out rows.",
    )
    fit_rows: FitRows = Field(
        default="honest",
        description="Rows that weights are fitted on: all out-of-sample rows (`honest`), val alone, or out-of-fold "
        "rows alone.",
    )
    temperature: Literal["auto", "off", "per_member"] = Field(
        default="auto", description="Temperature scaling of the members, kept only where held-out log-loss falls."
    )
    calibration: Literal["temperature", "auto"] = Field(
        default="temperature",
        description="Calibration of the `..._calibrated` votes; auto takes vector or Dirichlet scaling where held-out "
        "log-loss falls by more than a standard error.",
    )


class ModelSoup(Section):
    enable: Flag = Field(
        default=True, description="Whether `build-ensemble` averages the checkpoints of each backbone."
    )
    methods: Names = Field(
        default=("uniform", "greedy"),
        description="How checkpoints are averaged; `wise_ft` mixes the weights before and after fine-tuning.",
    )
    recompute_bn: Flag = Field(
        default=True, description="Whether batch-norm statistics are computed anew after averaging."
    )


class SnapshotEnsemble(Section):
    enable: Flag = Field(
        default=False, description="Whether `build-ensemble` trains snapshot networks, which takes a training."
    )
    n_snapshots: Count = Field(default=5, description="Cycles of the learning rate, each of which leaves one network.")
    epochs_per_cycle: Count = Field(default=10, description="Epochs of each cycle.")


class StackingMlp(Section):
    hidden_dims: Sizes = Field(default=(256, 128), description="Widths of the hidden layers.")
    epochs: Count = Field(default=50, description="Epochs of training.")
    lr: Positive = Field(default=0.001, description="Learning rate.")
    dropout: Dropout = Field(default=0.3, description="Dropout rate of the hidden layers.")


class StackingXgb(Section):
    n_estimators: Count = Field(default=100, description="Most trees per class that are grown.")
    max_depth: Count = Field(default=6, description="Largest depth of a tree.")
    learning_rate: Shrinkage = Field(default=0.1, description="Shrinkage of each tree's contribution.")


class Stacking(Section):
    enable: Flag = Field(default=True, description="Whether `stack` builds meta-learners.")
    meta_learners: Names = Field(
        default=("lr", "xgb", "mlp"), description="Meta-learners on the members' out-of-fold predictions."
    )
    mlp_config: StackingMlp = Field(default=StackingMlp(), description="The meta-learner `mlp`.")
    xgb_config: StackingXgb = Field(default=StackingXgb(), description="The meta-learner `xgb`.")
    fit_rows: Literal["honest", "oof"] = Field(
        default="honest",
        description="Rows that meta-learners are fitted on: all out-of-sample rows (`honest`), or out-of-fold rows "
        "alone.",
    )
    fallback: Flag = Field(
        default=True,
        description="Whether a stacker is mixed with the plain mean, with a weight that held-out rows choose.",
    )
    inference_members: Literal["auto", "full", "folds"] = Field(
        default="auto",
        description="Networks that answer: the full networks, or the mean of the fold networks; auto compares them.",
    )


class FusionHead(Section):
    hidden_dims: Sizes = Field(default=(512, 256), description="Widths of the hidden layers.")
    epochs: Count = Field(default=40, description="Epochs of training.")
    lr: Positive = Field(default=0.001, description="Learning rate.")
    dropout: Dropout = Field(default=0.3, description="Dropout rate of the hidden layers.")


class Fusion(Section):
    enable: Flag = Field(
        default=True, description="Whether `fusion-train` trains classifiers on the members' embeddings."
    )
    extract_embeddings: Flag = Field(
        default=True, description="Whether missing embeddings are extracted; false uses those that are stored."
    )
    fusion_methods: Names = Field(
        default=("concat_mlp", "attention", "bilinear", "cca_aligned"), description="Classifiers on embeddings."
    )
    fusion_config: FusionHead = Field(
        default=FusionHead(), description="The heads of `concat_mlp`, `attention` and `bilinear`."
    )
    end_to_end: Flag = Field(
        default=False, description="Whether copies of the networks are trained further together with the head."
    )
    end_to_end_epochs: Count = Field(default=4, description="Epochs of joint training, with `end_to_end: true`.")
    train_embeddings: Literal["auto", "val", "aligned", "in_sample"] = Field(
        default="auto",
        description="Rows that fusion classifiers are fitted on; auto takes `aligned`, or `val` where it is clearly "
        "better on train rows.",
    )
    seeds: Count = Field(default=1, description="Trainings that are averaged.")
    label_smoothing: Dropout = Field(default=0.0, description="Share of each label that is spread over all classes.")


class Moe(Section):
    enable: Flag = Field(default=False, description="Whether `fusion-train` builds a mixture of experts.")
    num_experts: Count = Field(default=5, description="Members that the gate chooses from.")
    top_k: Annotated[Count, AfterValidator(at_most_experts)] = Field(
        default=2, description="Members that run for each image; at most `num_experts`."
    )
    gating_hidden_dim: Count = Field(default=128, description="Width of the gate's hidden layer.")
    epochs: Count = Field(default=30, description="Epochs of training the gate.")


class Cascade(Section):
    """Members run one after the other until they are confident enough.

    `max_accuracy_loss` is the allowed loss in accuracy compared with running all `max_members`.
    """

    enable: Flag = Field(default=False, description="Whether `fusion-train` builds a cascade.")
    max_members: Count = Field(default=5, description="Most members that run for one image.")
    max_accuracy_loss: Fraction = Field(
        default=0.005, description="Accuracy that may be lost compared with running all members of the cascade."
    )


class MetaMlp(Section):
    hidden_dims: Sizes = Field(default=(128, 64), description="Widths of the hidden layers.")
    epochs: Count = Field(default=30, description="Epochs of training.")
    lr: Positive = Field(default=0.001, description="Learning rate.")


class MetaFuser(Section):
    enable: Flag = Field(default=True, description="Whether `meta-fuse` builds an ensemble of ensembles.")
    input_ensembles: Annotated[NamesOrAll, AfterValidator(without_meta_fuser)] = Field(
        default=(*("soft_voting", "logit_averaging", "stacking_xgb", "fusion_concat_mlp"),),
        description="Ensembles that are fused, or `all`: every one of the configuration that is built and can be an "
        "input.",
    )
    fuser_type: Name = Field(
        default="xgb", description="The learner; `convex` weights few of many inputs in a log-linear pool."
    )
    mlp_config: MetaMlp = Field(default=MetaMlp(), description="The fusers `mlp` and `attention`.")


class Runs(Section):
    score_ensemble: ScoreEnsemble = Field(
        default=ScoreEnsemble(), description="Votes and weighted means of the members' probabilities."
    )
    model_soup: ModelSoup = Field(default=ModelSoup(), description="Averages of each backbone's checkpoints.")
    snapshot_ensemble: SnapshotEnsemble = Field(
        default=SnapshotEnsemble(), description="Networks at the end of the cycles of a cyclic learning rate."
    )
    stacking: Stacking = Field(default=Stacking(), description="Meta-learners on out-of-fold predictions.")
    fusion: Fusion = Field(default=Fusion(), description="Classifiers on the members' embeddings.")
    moe: Moe = Field(default=Moe(), description="A gate selects the few members that run for an image.")
    cascade: Cascade = Field(
        default=Cascade(),
        description="Members run one after the other until they are confident enough.",
    )
    meta_fuser: MetaFuser = Field(default=MetaFuser(), description="An ensemble of ensembles.")


class CostBudget(Section):
    max_latency_ms: Limit = Field(default=100.0, description="Most milliseconds for one image; null for no limit.")
    max_size_mb: Limit = Field(default=500.0, description="Most megabytes of checkpoints; null for no limit.")


class Pruning(Section):
    enable: Flag = Field(default=True, description="Whether `build-ensemble` searches subsets of the members.")
    methods: Names = Field(
        default=("greedy_forward", "greedy_backward", "diversity_max", "clustering"),
        description="Searches for a subset.",
    )
    target_size: Count = Field(default=7, description="Most members of a subset.")
    pick: Literal["best", "knee", "fastest"] = Field(
        default="best",
        description="Which subset of the search path is kept: the best, the one after which gains level off, or the "
        "fastest.",
    )
    cost_budget: CostBudget = Field(default=CostBudget(), description="Limits that every subset keeps.")


class Tta(Section):
    enable: Flag = Field(
        default=False,
        description="Whether `build-ensemble` averages networks over views where out-of-sample rows gain by them.",
    )
    views: ViewGroups = Field(
        default=VIEW_GROUPS, description="Groups of views that are tried: mirrored, five crops, rotations, two scales."
    )
    scope: Literal["member", "ensemble"] = Field(
        default="member", description="Whether each member has views of its own, or all of them share one choice."
    )


class Distillation(Section):
    enable: Flag = Field(default=True, description="Whether `distill` trains a student.")
    teacher: Annotated[Name, AfterValidator(as_best)] = Field(
        default="meta_fuser",
        description="Ensemble or member whose predictions the student is trained on; `best` is the recommended one.",
    )
    student: Name = Field(
        default="CustomMobileOne", description="Architecture of the student: a backbone, or `timm:ARCH`."
    )
    temperature: Positive = Field(default=4.0, description="Temperature that softens the teacher's probabilities.")
    alpha: Fraction = Field(
        default=0.5, description="Weight of the teacher's term in the loss; the labels have the rest."
    )
    epochs: Count = Field(default=50, description="Epochs of training.")
    lr: Positive = Field(default=0.001, description="Learning rate.")
    batch_size: Batch = Field(default=32, description="Images per step.")
    targets: Literal["auto", "oof", "consistent", "views"] = Field(
        default="auto",
        description="Predictions that the student is trained on: out-of-fold (`oof`), of the same mixed views "
        "(`consistent`), or of stored views (`views`).",
    )
    views: Count = Field(
        default=4,
        description="Augmented views of each image that the teacher predicts, with `targets: views`.",
    )
    mix: Literal["auto", "none", "mixup", "cutmix", "both"] = Field(
        default="auto", description="How two images of a batch are mixed."
    )
    initial_weights: Literal["auto", "random", "member", "pretrained"] = Field(
        default="auto", description="Weights that the student starts from."
    )
    feature_weight: FeatureWeight = Field(
        default=0.0,
        description="Weight of matching the teacher's embeddings by a linear map of the student's; `auto` takes 0 or "
        "1, the one of lower log-loss on val.",
    )
    seeds: Count = Field(
        default=1, description="Trainings of student and control; a verdict on the recipe needs three."
    )
    unlabeled_dir: Folder = Field(
        default=None, description="Folder of further images, without labels, that the teacher predicts."
    )
    assistant: Annotated[NameOrNone, AfterValidator(differs_from_student)] = Field(
        default=None, description="Architecture of a network between teacher and student; null for none."
    )


class Cache(Section):
    quota_gb: Limit = Field(
        default=20.0,
        description="Most gigabytes of decoded images and embeddings; the oldest are removed first. null for no limit.",
    )
