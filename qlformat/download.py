"""Download a source model from the Hub: its safetensors, or .bin files where it has no others."""

from __future__ import annotations

from pathlib import Path

from qlformat.errors import SourceError

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_TORCH_WEIGHTS = ("pytorch_model*.bin", "pytorch_model*.bin.index.json")
_OTHERS = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", "LICEN*", "NOTICE*", "USE_POLICY*")


def download_source(repo_id: str, revision: str | None) -> Path:
    """Fetch a model repository into the Hub cache.

    Args:
        repo_id: "ORG/MODEL".
        revision: branch, tag or commit, or None for the default branch.

    Returns:
        The snapshot directory; its name is the commit.

    Raises:
        SourceError: the repository or revision does not exist, is gated, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub import errors as hub

    name = f"{repo_id}@{revision}" if revision else repo_id
    try:
        try:
            info = HfApi().model_info(repo_id, revision=revision)
        except hub.OfflineModeIsEnabled:
            return _cached(repo_id, revision, name)
        files = [sibling.rfilename for sibling in info.siblings or []]
        top_level = [file for file in files if "/" not in file]
        if not any(file.endswith((".safetensors", ".bin")) for file in top_level):
            raise SourceError(f"found no safetensors or .bin weights in {name}; give the 16-bit repository", rule="E4")
        weights = _WEIGHTS if any(file.endswith(".safetensors") for file in top_level) else _TORCH_WEIGHTS
        patterns = [*weights, *_OTHERS]
        # Weights in folders are other formats of the same model; they are not fetched.
        ignored = [f"*/*{suffix}" for suffix in (".safetensors", ".bin", ".json", ".txt", ".model")]
        return Path(snapshot_download(repo_id, revision=info.sha, allow_patterns=patterns, ignore_patterns=ignored))
    except hub.GatedRepoError:
        raise SourceError(f"{name} is gated: accept its terms on the Hub and log in with `hf auth login`") from None
    except hub.RevisionNotFoundError:
        raise SourceError(f"{repo_id} has no revision {revision!r}; check the branch, tag or commit") from None
    except hub.RepositoryNotFoundError:
        raise SourceError(
            f"found no path {name!r} and no such repository on the Hub; check the spelling, or log in if it is private"
        ) from None
    except hub.LocalEntryNotFoundError:
        raise SourceError(f"{name} is not in the cache and the Hub cannot be reached; check the connection") from None
    except Exception as error:
        # The client's HTTP library has changed its name before; its exceptions share no base class with others.
        if not isinstance(error, (hub.HfHubHTTPError, ConnectionError)) and "httpx" not in type(error).__module__:
            raise
        reason = str(error).strip().split("\n")[0][:160]
        raise SourceError(f"the Hub did not deliver {name} ({reason}); try again later") from None


def _cached(repo_id: str, revision: str | None, name: str) -> Path:
    """The snapshot in the local cache, for HF_HUB_OFFLINE."""
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
    except hub.LocalEntryNotFoundError:
        raise SourceError(
            f"{name} is no path and not in the cache; HF_HUB_OFFLINE keeps the Hub from being asked"
        ) from None
