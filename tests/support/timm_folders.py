"""Small networks of timm as people keep them: a folder with `config.json` and weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ARCHITECTURE = "test_resnet"


def save_folder(
    folder: Path,
    classes: Sequence[str],
    *,
    architecture: str = ARCHITECTURE,
    label_names: object = None,
    seed: int = 0,
    fit: Callable[[Any], None] = lambda network: None,
    **arguments: Any,
) -> Any:
    """Write a network by timm's own `save_for_hf`; returns the network in evaluation mode.

    Its weights are random but for what `fit(network)` changes. `label_names` is the class list of the configuration;
    None leaves it out.
    """
    import timm
    import torch
    from timm.models import save_for_hf

    torch.manual_seed(seed)
    network = timm.create_model(architecture, num_classes=len(classes), **arguments).eval()
    fit(network)
    config = {} if label_names is None else {"label_names": label_names}
    save_for_hf(network, folder, model_config=config, safe_serialization=True)
    return network


def change_config(folder: Path, changes: Mapping[str, Any], *, remove: Sequence[str] = ()) -> None:
    """Change entries of a folder's `config.json`."""
    path = folder / "config.json"
    record = {name: value for name, value in json.loads(path.read_text()).items() if name not in remove}
    path.write_text(json.dumps(record | dict(changes)))


def fit_head(
    network: Any, files: Sequence[Path], labels: Sequence[int], preprocessing: Any, *, c: float = 10.0
) -> None:
    """Fit the classifier of a network to images that a `Preprocessing` prepares; the rest keeps its random weights.

    `c` is the inverse of the regularisation; a large one gives networks that are too sure, each in its own way.
    """
    import numpy as np
    import torch
    from PIL import Image
    from sklearn.linear_model import LogisticRegression

    batch = []
    for file in files:
        with Image.open(file) as image:
            square = preprocessing.resizing().square(image)
        square = square[..., ::-1] if preprocessing.channels == "BGR" else square
        batch.append(((square / 255 - preprocessing.mean) / preprocessing.std).transpose(2, 0, 1))
    with torch.inference_mode():
        pixels = torch.from_numpy(np.stack(batch).astype(np.float32))
        features = network.forward_head(network.forward_features(pixels), pre_logits=True).numpy()
    mean, scale = features.mean(0), features.std()
    head = LogisticRegression(C=c, max_iter=2000).fit((features - mean) / scale, labels)
    weight = head.coef_ / scale
    with torch.no_grad():
        network.get_classifier().weight.copy_(torch.from_numpy(weight))
        network.get_classifier().bias.copy_(torch.from_numpy(head.intercept_ - weight @ mean))
