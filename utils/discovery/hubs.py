"""Networks from the Hugging Face hub, downloaded once into the workspace; if offline, the error names each file.

Only `config.json`, `preprocessor_config.json` and one weights file are downloaded, never code.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from utils.core.errors import UserError, did_you_mean
from utils.discovery.model_folders import CONFIG, PREPROCESSOR, WEIGHTS, is_complete

logger = logging.getLogger("disease_pipeline")

REPOSITORY = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*?)(?:@(?P<revision>[\w.-]+))?")
"""`ORG/NAME` or `ORG/NAME@REVISION`"""
ENDPOINT = "https://huggingface.co"
PATIENCE_S = 5.0  # timeout in seconds after which the hub counts as unreachable


def download(repository: str, weights_dir: Path, where: str) -> Path:
    """The folder below `weights_dir` with the files of a repository; missing files are downloaded.

    Raises UserError, whose message starts with `where`, for an invalid name, for a repository or file that does not
    exist, and if the hub is unreachable; the message then tells which files to download and where to put them.
    """
    match = REPOSITORY.fullmatch(repository)
    if match is None:
        raise UserError(f"{where}: {repository!r} is no name of the hub; expected ORG/NAME or ORG/NAME@REVISION")
    folder = weights_dir.joinpath(*repository.split("/"))
    if is_complete(folder):
        return folder
    endpoint = os.environ.get("HF_ENDPOINT", ENDPOINT).rstrip("/")
    reason = _unreachable(endpoint)
    if reason is not None:
        raise UserError(f"{where}: {reason}. {_by_hand(endpoint, repository, folder)}")
    _fetch(match["name"], match["revision"], folder, endpoint, where, _by_hand(endpoint, repository, folder))
    logger.info("%s: downloaded into %s", repository, folder)
    return folder


def _by_hand(endpoint: str, repository: str, folder: Path) -> str:
    name, _, revision = repository.partition("@")
    address = f"{endpoint}/{name}" + (f"/tree/{revision}" if revision else "")
    return (
        f"Download {CONFIG}, {WEIGHTS[0]} (or {WEIGHTS[1]}) and, if there is one, {PREPROCESSOR} from {address} where "
        f"there is network, put them into {folder}, and repeat the command"
    )


def _unreachable(endpoint: str) -> str | None:
    """The reason why the hub is unreachable, or None. The hub's client would retry for 20 s."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set, so nothing is downloaded"
    if not endpoint.startswith(("https://", "http://")):
        return f"HF_ENDPOINT is {endpoint!r}, no address of a hub"
    import ssl  # imported here, since it takes half of this module's import time
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=PATIENCE_S):
            return None
    except urllib.error.HTTPError:  # the hub responds
        return None
    except (OSError, ValueError) as error:
        cause = getattr(error, "reason", error)
        if isinstance(cause, ssl.SSLError):  # the hub's client uses other certificates
            return None
        return f"{endpoint} cannot be reached ({cause})"


def _fetch(name: str, revision: str | None, folder: Path, endpoint: str, where: str, by_hand: str) -> None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError

    def has_fetched(filename: str) -> bool:
        try:
            hf_hub_download(
                name, filename, revision=revision, local_dir=folder, endpoint=endpoint, etag_timeout=PATIENCE_S
            )
        except EntryNotFoundError as error:
            if isinstance(error, FileNotFoundError):  # LocalEntryNotFoundError: the connection was lost
                raise
            return False
        return True

    try:
        if not has_fetched(CONFIG):
            raise UserError(f"{where}: {endpoint}/{name} has no {CONFIG}; expected a repository of a timm network")
        has_fetched(PREPROCESSOR)
        if not any(has_fetched(weights) for weights in WEIGHTS[:2]):
            raise UserError(f"{where}: {endpoint}/{name} has neither {WEIGHTS[0]} nor {WEIGHTS[1]}")
    except RepositoryNotFoundError as error:
        raise UserError(f"{where}: {endpoint} has no repository {name}, or it needs a token (hf auth login)") from error
    except (OSError, HfHubHTTPError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{where}: not downloaded ({first_line}). {by_hand}") from error


def repository_of(architecture: str, where: str) -> tuple[str, int]:
    """(repository, number of classes) of timm's pretrained weights. Raises UserError if the hub has none."""
    import timm

    config = timm.get_pretrained_cfg(architecture)
    if config is None or not config.hf_hub_id:
        names = timm.list_pretrained()
        raise UserError(
            f"{where}: timm {timm.__version__} names no weights on the hub for {architecture}"
            f"{did_you_mean(architecture, names, '.')} Declare a file of weights: NAME=timm:{architecture}@FILE"
        )
    return str(config.hf_hub_id), int(config.num_classes)
