"""A small BASE-BACK of somebody else, written into a folder: what the mount and the commands meet outside this project.

It behaves as the public one does: every module tries a relative import and falls back to the absolute one, settings
make folders when imported, the logger writes to stdout and opens files in the working directory unless it has a
handler. Five small networks stand for the fifteen. `DBT_NUM_CLASSES` and its kin mean nothing to it.
"""

from __future__ import annotations

from pathlib import Path

from foreign_networks import ARCHITECTURES, BLOCKS, EXPORT_ENGINE, MODELS, PIPELINE, TRAINING

SETTINGS = """
import os
from pathlib import Path

_here = Path(__file__).resolve()
_root = next((folder for folder in _here.parents if folder.name == "BASE-BACK"), None)
_default = _root.parent if _root is not None else Path("F:\\\\Disease Training")
BASE_DIR = Path(os.environ.get("DBT_BASE_DIR", str(_default)))
RAW_DIR = Path(os.environ.get("DBT_RAW_DIR", str(BASE_DIR / "Data")))
SPLIT_DIR = Path(os.environ.get("DBT_SPLIT_DIR", str(BASE_DIR / "split_dataset")))
TRAIN_DIR, VAL_DIR, TEST_DIR = SPLIT_DIR / "train", SPLIT_DIR / "val", SPLIT_DIR / "test"
CKPT_DIR, PLOTS_DIR = BASE_DIR / "checkpoints", BASE_DIR / "plots_metrics"
METRICS_DIR, KFOLD_DIR = BASE_DIR / "metrics_output", BASE_DIR / "kfold_results"
DEPLOY_DIR, SMOKE_CHECK_DIR = BASE_DIR / "deployment_models", BASE_DIR / "smoke_checks"
PRETRAINED_DIR, DEBUG_LOG_DIR = BASE_DIR / "pretrained_weights", BASE_DIR / "debug_logs"
for _made in (CKPT_DIR, PLOTS_DIR, METRICS_DIR, KFOLD_DIR, DEPLOY_DIR, SMOKE_CHECK_DIR, PRETRAINED_DIR, DEBUG_LOG_DIR):
    _made.mkdir(parents=True, exist_ok=True)

BACKBONES = ["CustomConvNeXt", "CustomResNetMish", "CustomSwinTransformer", "CustomCoAtNet", "CustomDeiTStyle"]
IMG_SIZE, BATCH_SIZE, NUM_CLASSES, K_FOLDS, SEED = 224, 32, 13, 5, 42
EPOCHS_HEAD, EPOCHS_FINETUNE, PATIENCE_HEAD, PATIENCE_FT = 40, 25, 5, 5
WEIGHT_DECAY, BACKBONE_LR, HEAD_LR = 1e-4, 1e-6, 1e-3
ENABLE_KFOLD_CV = ENABLE_EXPORT = ENABLE_TRANSFER_LEARNING = True
TRANSFER_LEARNING_MODE = "fine_tuning"
EXPORT_TYPES = ["state_dict", "checkpoint", "torchscript", "onnx", "torchserve", "tensorrt", "tflite", "custom"]
EXPORT_FORMATS = list(EXPORT_TYPES)
EXPORT_CONFIG = {"onnx": {"opset_version": 13}}
DEBUG_MODE = os.environ.get("DBT_DEBUG_MODE", "false").lower() == "true"
"""

UTILS = """
import hashlib, json, logging, os, platform, random, sys, time
from datetime import datetime
from functools import partialmethod
from logging.handlers import RotatingFileHandler
from pathlib import Path

import numpy as np
import torch

try:
    from ..config.settings import DEBUG_LOG_DIR
except ImportError:
    from config.settings import DEBUG_LOG_DIR

class DedupLogger:
    def __init__(self, name="disease_pipeline"):
        self.logger = logging.getLogger(name)
        self.logger.setLevel(logging.INFO)
        self.logger.propagate = False
        self._seen = {}
        if not self.logger.handlers:
            shape = logging.Formatter("%(asctime)s | %(levelname)s | %(message)s", datefmt="%H:%M:%S")
            files = [RotatingFileHandler(file) for file in ("training.log", "training_errors.log")]
            for handler in (logging.StreamHandler(sys.stdout), *files):
                handler.setFormatter(shape)
                self.logger.addHandler(handler)
            self.logger.info("logging started")
    def _log(self, level, msg, dedupe=False):
        if dedupe and time.time() - self._seen.get(msg, 0.0) < 5.0:
            return
        self._seen[msg] = time.time()
        self.logger.log(level, msg)

    info = partialmethod(_log, logging.INFO)
    debug = partialmethod(_log, logging.DEBUG)
    warning = partialmethod(_log, logging.WARNING)
    error = partialmethod(_log, logging.ERROR)
    def exception(self, msg):
        self.logger.exception(msg)
    def log_system_info_once(self):
        self.info(str(get_device_info()), dedupe=True)

class SmokeCheckLogger:
    def __init__(self):
        self.checks = []
    def log_check(self, check_name, status, details=""):
        row = {"timestamp": datetime.now().isoformat(), "check_name": check_name, "status": status, "details": details}
        self.checks.append(row)
    def save_summary(self):
        passed = sum(check["status"] == "PASS" for check in self.checks)
        total = len(self.checks)
        summary = {"total_checks": total, "passed": passed, "failed": total - passed, "checks": self.checks}
        (DEBUG_LOG_DIR / "smoke_check_summary.json").write_text(json.dumps(summary))
        return summary
def get_device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
def get_optimal_workers():
    return max(2, min(12, int(0.8 * (os.cpu_count() or 1))))
def set_seed(seed=42):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
def compute_file_sha256(file_path: Path) -> str:
    return hashlib.sha256(Path(file_path).read_bytes()).hexdigest()
def get_device_info():
    cuda = {"cuda_available": torch.cuda.is_available(), "cuda_version": torch.version.cuda, "cudnn_version": None}
    return {"device": str(DEVICE), "platform": platform.platform(), "optimal_workers": OPTIMAL_WORKERS, **cuda}

DEVICE = get_device()
OPTIMAL_WORKERS = get_optimal_workers()
logger = DedupLogger()
smoke_checker = SmokeCheckLogger()
"""

DATASETS = """
import random, shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

try:
    from ..config.settings import IMG_SIZE, RAW_DIR, SEED, SPLIT_DIR
except ImportError:
    from config.settings import IMG_SIZE, RAW_DIR, SEED, SPLIT_DIR
from . import OPTIMAL_WORKERS, logger

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")

class WindowsCompatibleImageFolder(Dataset):
    def __init__(self, root, transform=None):
        self.root = Path(root)
        self.transform = transform
        self.classes = sorted(folder.name for folder in self.root.iterdir() if folder.is_dir())
        self.class_to_idx = {name: index for index, name in enumerate(self.classes)}
        files = [file for file in self.root.glob("*/*") if file.suffix.lower() in SUFFIXES]
        self.samples = [(str(file), self.class_to_idx[file.parent.name]) for file in files]
    def __len__(self):
        return len(self.samples)
    def __getitem__(self, index):
        path, label = self.samples[index]
        try:
            image = Image.open(path).convert("RGB")
        except Exception as error:
            logger.warning(f"unreadable: {path}: {error}", dedupe=True)
            image = Image.new("RGB", (224, 224), (128, 128, 128))
        return (self.transform(image) if self.transform else image), label

class OptimizedImageDataset(WindowsCompatibleImageFolder):
    def __init__(self, samples, class_names, transform=None):
        self.samples, self.classes, self.transform = list(samples), list(class_names), transform
        self.targets = [label for _, label in self.samples]

OptimizedTempDataset = OptimizedImageDataset

def create_optimized_transforms(size=IMG_SIZE, is_training=True):
    from torchvision import transforms
    ends = [transforms.ToTensor(), transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
    if is_training:
        return transforms.Compose([transforms.RandomResizedCrop(size, scale=(0.8, 1.0)), *ends])
    return transforms.Compose([transforms.Resize(int(size * 1.14)), transforms.CenterCrop(size), *ends])

def worker_init_fn(worker_id):
    np.random.seed(torch.initial_seed() % 2**32)

def create_optimized_dataloader(dataset, batch_size, shuffle=True, num_workers=None):
    workers = OPTIMAL_WORKERS if num_workers is None else num_workers
    more = {"persistent_workers": True, "prefetch_factor": 2, "timeout": 30} if workers else {}
    return DataLoader(dataset, batch_size, shuffle, num_workers=workers, worker_init_fn=worker_init_fn, **more)

def prepare_optimized_datasets(
    raw_dir=RAW_DIR, split_dir=SPLIT_DIR, train_ratio=0.8, val_ratio=0.1, test_ratio=0.1, seed=SEED
):
    if not Path(raw_dir).exists():
        raise FileNotFoundError(raw_dir)
    if Path(split_dir).exists() and any(Path(split_dir).iterdir()):
        return
    for folder in Path(raw_dir).iterdir():
        files = list(folder.iterdir())
        random.Random(seed).shuffle(files)
        first, second = int(train_ratio * len(files)), int((train_ratio + val_ratio) * len(files))
        for split, part in (("train", files[:first]), ("val", files[first:second]), ("test", files[second:])):
            (Path(split_dir) / split / folder.name).mkdir(parents=True, exist_ok=True)
            for file in part:
                shutil.copy2(file, Path(split_dir) / split / folder.name / file.name)

def verify_dataset_split(split_dir=SPLIT_DIR):
    names = [{file.parent.name for file in (split_dir / split).glob("*/*")} for split in ("train", "val", "test")]
    return names[0] == names[1] == names[2] and bool(names[0])
"""

CHECKPOINT_MANAGER = """
import json
from pathlib import Path

try:
    from ..config.settings import CKPT_DIR
    from ..utils import logger
except ImportError:
    from config.settings import CKPT_DIR
    from utils import logger

class CheckpointManager:
    def __init__(self, checkpoint_dir=None):
        self.checkpoint_dir = Path(checkpoint_dir or CKPT_DIR)
        self.state_file = self.checkpoint_dir / ".recovery_state.json"
    def load_pipeline_state(self):
        empty = {"completed_backbones": [], "results": {}}
        return json.loads(self.state_file.read_text()) if self.state_file.exists() else empty
    def get_completed_backbones(self):
        return self.load_pipeline_state()["completed_backbones"]
"""

MAIN = """
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from config.settings import BACKBONES
from models import create_custom_backbone_safe
from utils import logger

if __name__ == "__main__":
    for name in BACKBONES:
        logger.info(f"{name}: {type(create_custom_backbone_safe(name, 13)).__name__}")
"""

FILES = {
    "__init__.py": "",
    "config/__init__.py": "from .settings import *\n",
    "config/settings.py": SETTINGS,
    "utils/__init__.py": UTILS,
    "utils/datasets.py": DATASETS,
    "utils/checkpoint_manager.py": CHECKPOINT_MANAGER,
    "utils/visualization.py": 'print("backend, style and resolution of every plot in this process are changed")\n',
    "models/__init__.py": MODELS,
    "models/blocks.py": BLOCKS,
    "models/architectures.py": ARCHITECTURES,
    "training/__init__.py": TRAINING,
    "training/pipeline.py": PIPELINE,
    "export/__init__.py": "from .export_engine import export_to_format\n",
    "export/export_engine.py": EXPORT_ENGINE,
    "tests/__init__.py": "",
    "tests/test_suite.py": "def run_all_unit_tests():\n    return 1, 0\n",
    "main.py": MAIN,
}


def build(parent: Path, name: str = "BASE-BACK", *, img_size: int = 224) -> Path:
    """Write the package into `parent/name` and return that folder; `parent` is its default workspace.

    The public one's images have 224 pixels; networks that a test trains are content with less.
    """
    folder = parent / name
    for path, source in FILES.items():
        file = folder / "src" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        text = source.lstrip("\n").replace("= 224, 32, 13", f"= {img_size}, 32, 13")
        file.write_text(text, encoding="utf-8")
    return folder
