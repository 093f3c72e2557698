"""Publish a directory as one commit: verified before, pinned to its parent, compared with the hub's hashes after."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlformat import __version__
from qlformat.errors import QlfError
from qlformat.file_names import CARD
from qlformat.hub.client import HubClient, RemoteState, parse_repo_id, quiet_client
from qlformat.hub.contents import CARD_FILES, Contents, read_contents
from qlformat.hub.examination import Examination
from qlformat.hub.plan import Plan, make_plan
from qlformat.hub.upload import Upload
from qlformat.progress import Progress

MAIN = "main"


@dataclass(frozen=True)
class PushOptions:
    """How to publish.

    Attributes:
        private: make the repository private, when it is made.
        revision: branch; made from main when there is none.
        tag: name for the new commit.
        message: of the commit.
        create_pr: propose the change instead of making it.
        card: write the model card, or renew its marked block, before.
        license_id: for the card; by default that of the source.
        allow_base_mismatch: publish an adapter though the base that it names is another one by now.
        endpoint: address of the hub; that of HF_ENDPOINT, or the public one, by default.
    """

    private: bool = False
    revision: str = MAIN
    tag: str | None = None
    message: str | None = None
    create_pr: bool = False
    endpoint: str | None = None
    card: bool = True
    license_id: str | None = None
    allow_base_mismatch: bool = False


@dataclass(frozen=True)
class PushReport:
    """What was published, or in a dry run would be.

    Attributes:
        commit: of the new state; the parent when nothing had changed; None in a dry run.
        created: whether the repository was made, or would be.
        seconds: wall time, verification included.
    """

    repo_id: str
    host: str
    revision: str
    kind: str
    plan: Plan
    commit: str | None
    url: str | None
    tag: str | None
    created: bool
    left_out: tuple[dict[str, str], ...]
    notes: tuple[str, ...]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "repo_id": self.repo_id,
            "host": self.host,
            "revision": self.revision,
            "kind": self.kind,
            "created": self.created,
            "parent": self.plan.parent,
            "commit": self.commit,
            "url": self.url,
            "tag": self.tag,
            "files": [file.as_dict() for file in self.plan.files],
            "bytes_to_send": self.plan.bytes_to_send,
            "removed": list(self.plan.removed),
            "left_out": list(self.left_out),
            "notes": list(self.notes),
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True)
class Prepared:
    """A directory and what of it is to be sent where. `send` does it.

    Its structure was verified; the values of its weights still are, by threads of the examination.
    """

    client: HubClient
    repo_id: str
    options: PushOptions
    contents: Contents
    hashes: Mapping[str, Future[str]]
    state: RemoteState | None
    new_branch: bool
    plan: Plan
    notes: tuple[str, ...]
    examination: Examination
    progress: Callable[[Progress], None] | None
    started: float = field(default_factory=time.monotonic)

    def report(self, commit: str | None = None, url: str | None = None, plan: Plan | None = None) -> PushReport:
        """What is, or was, done; without a commit, of a dry run. Waits for the verification.

        Raises:
            QlfError: the directory is not sound.
        """
        return PushReport(
            repo_id=self.repo_id,
            host=self.client.host,
            revision=self.options.revision,
            kind=self.contents.kind,
            plan=plan or self.plan,
            commit=commit,
            url=url,
            tag=self.options.tag,
            created=self.state is None,
            left_out=tuple({"name": entry.name, "reason": entry.reason} for entry in self.contents.left_out),
            notes=self.notes + self.examination.notes(),
            seconds=time.monotonic() - self.started,
        )


def prepare(
    path: str | Path,
    repo_id: str,
    options: PushOptions | None = None,
    *,
    dry: bool = False,
    threads: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Prepared:
    """Begin to verify a directory, hash its files and compare them with the repository, where nothing is changed.

    Args:
        path: directory of a 4-bit checkpoint, an adapter or a 16- or 32-bit model.
        repo_id: "ORG/NAME".
        options: how to publish.
        dry: do not write the card either, only check it.
        threads: workers; all CPUs of the process by default.
        progress: called from the workers, under a lock.

    Raises:
        QlfError: the directory's structure is not sound, or the hub cannot be asked or refuses.
    """
    started = time.monotonic()
    asked = options or PushOptions()
    if asked.create_pr and asked.revision != MAIN:
        raise QlfError(
            f"a proposed change is made to {MAIN}, found the revision {asked.revision!r}; give one of the two"
        )
    contents = read_contents(Path(path))
    examination = Examination(contents, threads, progress, allow_base_mismatch=asked.allow_base_mismatch)
    try:
        with quiet_client():  # the threads are at work: the client's library takes half a second to import
            name = _plain_name(repo_id)
            client = HubClient(asked.endpoint)
            state, new_branch = _remote(client, name, asked)
            notes = _card(client, Path(path), name, asked, state, dry=dry) if asked.card else ()
            contents = read_contents(Path(path))
            examination.structure()
            hashes = examination.hashes(contents, CARD_FILES)
        plan = make_plan(contents, hashes, state)
    except BaseException:
        examination.cancel()
        raise
    return Prepared(
        client, name, asked, contents, hashes, state, new_branch, plan, notes, examination, progress, started
    )


def send(prepared: Prepared) -> PushReport:
    """Publish what was prepared.

    The weights are sent first, by their content: nobody sees them, and what arrived is not sent again by a later run.
    Where their values turn out not to be sound, sending ends. One commit on the parent that was compared with then
    shows everything at once. A commit whose files have other hashes than those verified is taken back.

    Raises:
        Conflict: the branch has moved since; nothing was overwritten.
        HubError: the hub refused or failed; the branch is what it was, unless the line says otherwise.
        QlfError: a file changed while it was being sent.
    """
    client, repo_id, asked, state = prepared.client, prepared.repo_id, prepared.options, prepared.state
    examination, plan, new_branch = prepared.examination, prepared.plan, prepared.new_branch
    made = False
    try:
        with quiet_client():
            if state is None:
                made = _create(client, repo_id, asked)
                state, new_branch = _remote(client, repo_id, asked)
                plan = make_plan(prepared.contents, prepared.hashes, state)
            upload = Upload(
                client, repo_id, asked.revision, plan, examination, prepared.progress, new_branch=new_branch
            )
            message = asked.message or f"Publish with qlformat {__version__}"
            fingerprint = prepared.contents.fingerprint
            description = f"Fingerprint {fingerprint}" if fingerprint else ""
            commit, url = upload.run(message, description, create_pr=asked.create_pr)
            if asked.tag is not None:
                tag = asked.tag
                client.call(repo_id, lambda: client.api.create_tag(repo_id, tag=tag, revision=commit, exist_ok=True))
    except BaseException as error:
        examination.cancel()
        if made and isinstance(error, QlfError) and examination.failed.is_set():
            _remove_empty(client, repo_id, plan.parent)
        raise
    return prepared.report(commit, url, plan)


def push(
    path: str | Path,
    repo_id: str,
    options: PushOptions | None = None,
    *,
    threads: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> PushReport:
    """Verify a directory and publish it; see `prepare` and `send`."""
    return send(prepare(path, repo_id, options, threads=threads, progress=progress))


def _create(client: HubClient, repo_id: str, asked: PushOptions) -> bool:
    """Make the repository; False when somebody else has made it meanwhile."""
    from huggingface_hub.errors import HfHubHTTPError

    def ask() -> bool:
        try:
            client.api.create_repo(repo_id, private=True if asked.private else None)
        except HfHubHTTPError as error:
            if error.response.status_code == 409:
                return False
            raise
        return True

    return client.call(repo_id, ask)


def _remove_empty(client: HubClient, repo_id: str, commit: str | None) -> None:
    """Remove the repository that this push has made for what is not sound; where the hub refuses, it stays, empty."""
    with suppress(QlfError):
        state = client.state(repo_id)
        if state is not None and state.commit == commit:
            client.call(repo_id, lambda: client.api.delete_repo(repo_id))


def _plain_name(repo_id: str) -> str:
    name, revision = parse_repo_id(repo_id)
    if revision is not None:
        raise QlfError(f"found {repo_id!r}, needed ORG/NAME; give the branch with --revision")
    return name


def _remote(client: HubClient, repo_id: str, asked: PushOptions) -> tuple[RemoteState | None, bool]:
    """(what the branch holds, whether the branch must be made); (None, False) without a repository.

    Raises:
        HubError: the hub cannot be asked.
        QlfError: the repository is public and was asked to be private, or the tag is taken.
    """
    state = client.state(repo_id)
    if state is None:
        return None, asked.revision != MAIN
    if asked.private and not state.private:
        raise QlfError(f"{repo_id} is public; --private is for a new repository: change its visibility first")
    if asked.revision == MAIN and asked.tag is None:
        return state, False
    refs = client.call(repo_id, lambda: client.api.list_repo_refs(repo_id))
    if asked.tag is not None and asked.tag in {tag.name for tag in refs.tags}:
        raise QlfError(f"{repo_id} has a tag {asked.tag!r} already; choose another, or delete it first")
    if asked.revision == MAIN or asked.revision.startswith("refs/"):
        return (state, False) if asked.revision == MAIN else (client.state(repo_id, asked.revision), False)
    if asked.revision in {branch.name for branch in refs.branches}:
        return client.state(repo_id, asked.revision), False
    if asked.revision in {tag.name for tag in refs.tags}:
        raise QlfError(f"{asked.revision!r} is a tag of {repo_id}, needed a branch; tags are not moved")
    return state, True


def _card(
    client: HubClient, path: Path, repo_id: str, asked: PushOptions, state: RemoteState | None, *, dry: bool
) -> tuple[str, ...]:
    """Write the card, or in a dry run make it only; returns notes. A card that is on the hub alone is continued."""
    from qlformat.cards.writer import make_card, write_card  # who asks for none does not wait for a YAML parser

    if dry:
        card = make_card(path, name=repo_id, license_id=asked.license_id)
        old = path / CARD
        same = card is None or (old.is_file() and old.read_bytes() == card.text.encode())
        return (*(card.notes if card else ()), *(() if same else (f"{CARD} would be written or renewed",)))
    if not (path / CARD).exists() and state is not None and CARD in state.files:
        with tempfile.TemporaryDirectory(prefix="qlf-card-") as place:
            found = client.call(
                repo_id,
                lambda: client.api.hf_hub_download(repo_id, CARD, revision=state.commit, local_dir=place),
            )
            shutil.copyfile(found, path / CARD)
    return write_card(path, name=repo_id, license_id=asked.license_id)
