"""Where a model's files are: in a folder, or in a repository of the Hugging Face hub that is fetched into its cache first.

The one place that talks to the hub, in front of every command that starts replicas. These then read a folder, so on a
cluster of several machines the cache has to be one that all of them see at the same place (`HF_HOME` on a shared disk).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.errors import CheckpointError

FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.ttf")
"""What of a repository is fetched: weights, tokenizer, template, and the font that video frames are marked in."""

_REPOSITORY = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\w[\w./-]*))?", re.ASCII)


def with_local_folders(config: ClusterConfig, report: Callable[[str], None]) -> ClusterConfig:
    """The same configuration with a folder as the `path` of every model, see `local_folder`."""
    models = tuple(dataclasses.replace(model, path=local_folder(model.path, report)) for model in config.models)
    return dataclasses.replace(config, models=models)


def local_folder(path: str, report: Callable[[str], None]) -> str:
    """The folder that `path` stands for; a repository's files are fetched unless they are in the cache.

    Args:
        path: a folder, or the name of a repository as `owner/name` or `owner/name@revision`; a folder wins.
        report: is told before something is fetched.

    Returns:
        `path` itself where it exists, or is no name of a repository.

    Raises:
        CheckpointError: the repository is not there, or not in the cache and cannot be fetched.
    """
    repository = _REPOSITORY.fullmatch(path)
    if repository is None or Path(path).exists():
        return path
    import huggingface_hub
    from huggingface_hub import errors

    name, revision = repository["name"], repository["revision"]
    report(f"fetching {path} from the Hugging Face hub, unless it is in its cache")
    try:
        return str(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(FILES)))
    except errors.RevisionNotFoundError:
        why = f"repository {name} of the Hugging Face hub has no revision {revision!r}; name a branch, tag or commit"
    except errors.RepositoryNotFoundError:  # gated ones, too
        why = (
            f"the Hugging Face hub shows no repository {name}; check its name, "
            "or `hf auth login` with an account that may read it"
        )
    except errors.LocalEntryNotFoundError:
        setting = " (HF_HUB_OFFLINE is set)" if huggingface_hub.constants.is_offline_mode() else ""
        why = (
            f"not all of it is in the cache, and the Hugging Face hub cannot be reached{setting}; "
            f"`{_command(name, revision)}` where it can be, and copy the folder here or name it"
        )
    except Exception as e:  # what its HTTP client raises is no part of the library's interface
        why = f"the Hugging Face hub did not give it: {_first_line(e)}; try again, what has arrived is kept"
    raise CheckpointError(f"{path}: no such folder, and {why}")


def cached_folder(path: str) -> str:
    """As `local_folder`, but fetches nothing: `path` itself where the cache has not all of it."""
    repository = _REPOSITORY.fullmatch(path)
    if repository is None or Path(path).exists():
        return path
    import huggingface_hub
    from huggingface_hub import errors

    try:
        name, revision = repository["name"], repository["revision"]
        found = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=list(FILES), local_files_only=True
        )
    except (errors.LocalEntryNotFoundError, OSError, ValueError):
        return path
    return str(found)


def _command(name: str, revision: str | None) -> str:
    return f"hf download {name}" + (f" --revision {revision}" if revision else "")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
