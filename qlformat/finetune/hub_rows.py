"""Rows of a dataset on the Hub, read by the `datasets` library."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from qlformat.errors import shown
from qlformat.finetune.rows import DataError

_SPEC = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?(?::(?P<split>.+))?")
DEFAULT_SPLIT = "train"


@dataclass(frozen=True)
class HubRows:
    """An open dataset: `rows` are dicts; `revision` is its commit."""

    name: str
    repo_id: str
    revision: str | None
    split: str
    rows: Iterable[Any]


def open_dataset(spec: str, split: str | None = None) -> HubRows:
    """Download a dataset.

    Args:
        spec: ORG/NAME[@revision][:split].
        split: what to take where `spec` does not say; slices such as train[:1%] are understood.

    Raises:
        DataError: no such file or dataset, no such split, or the Hub cannot be reached.
    """
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise DataError(f"found no file {shown(spec)}; give a path, or a Hub dataset ORG/NAME[:SPLIT]")
    chosen = match["split"] or split or DEFAULT_SPLIT
    try:
        import datasets
    except ImportError:
        raise DataError("a Hub dataset needs the datasets library: pip install 'qlformat[finetune]'") from None
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hub

    repo_id, revision = match["repo"], match["revision"]
    try:
        with contextlib.suppress(hub.OfflineModeIsEnabled):  # the copy in the cache is all there is then
            revision = HfApi().dataset_info(repo_id, revision=revision).sha
        rows = datasets.load_dataset(repo_id, split=chosen, revision=revision)
    except Exception as error:
        reason = _reason(error, repo_id, chosen)
        if reason is None:
            raise
        raise DataError(reason) from None
    return HubRows(f"{repo_id}:{chosen}", repo_id, revision, chosen, rows)


def _reason(error: Exception, repo_id: str, split: str) -> str | None:
    """One line for a failure that the user can do something about, or None."""
    import datasets
    from huggingface_hub import errors as hub

    text = " ".join(str(error).split())[:200]
    if isinstance(error, hub.GatedRepoError):
        return f"{repo_id} is gated: accept its terms on the Hub and log in with `hf auth login`"
    if isinstance(error, hub.RevisionNotFoundError):
        return f"the dataset {repo_id} has no such revision; check the branch, tag or commit"
    if isinstance(error, (hub.RepositoryNotFoundError, datasets.exceptions.DatasetNotFoundError)):
        return (
            f"found no file {repo_id!r} and no such dataset on the Hub; check the spelling, or log in if it is private"
        )
    if isinstance(error, ConnectionError) or "httpx" in type(error).__module__:
        return f"the dataset {repo_id} is not in the cache and the Hub cannot be reached ({text})"
    if isinstance(error, (hub.HfHubHTTPError, datasets.exceptions.DatasetsError)):
        return f"the Hub did not deliver {repo_id}: {text}"
    if isinstance(error, ValueError):  # an unknown split, or several configurations
        return f"cannot read split {split!r} of {repo_id}: {text}"
    return None
