"""Send the files of a plan and make them visible by one commit on a pinned parent."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qlformat.errors import QlfError
from qlformat.hub.client import FIRST_WAIT_SECONDS, HubClient, RemoteState
from qlformat.hub.examination import Examination
from qlformat.hub.plan import Plan, PlannedFile, differences
from qlformat.hub.refusals import RETRIED, Conflict, HubError, is_unreachable, status_of
from qlformat.hub.sending import Sending
from qlformat.progress import Progress

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

    CommitOperation = CommitOperationAdd | CommitOperationCopy | CommitOperationDelete

_MOVED = (409, 412)
"""Statuses for a commit whose parent is not the branch's head."""


class Upload:
    """One push of one plan.

    Args:
        client: the hub.
        repo_id: exists.
        revision: the branch.
        plan: what to send.
        examination: of the files; before it has ended well nothing is published.
        progress: called from the client's threads, under a lock.
        new_branch: make the branch, at the plan's parent, when everything has arrived.
    """

    def __init__(
        self,
        client: HubClient,
        repo_id: str,
        revision: str,
        plan: Plan,
        examination: Examination,
        progress: Callable[[Progress], None] | None,
        *,
        new_branch: bool,
    ) -> None:
        self._client = client
        self._repo_id = repo_id
        self._revision = revision
        self._plan = plan
        self._examination = examination
        self._progress = progress
        self._new_branch = new_branch
        self._target = f"{repo_id}@{revision}"

    def run(self, message: str, description: str, *, create_pr: bool = False) -> tuple[str, str]:
        """Send, commit and compare.

        Returns:
            (commit, its address).

        Raises:
            Conflict, HubError, QlfError: see push.send.
        """
        client, plan = self._client, self._plan
        if plan.empty and plan.parent is not None:
            self._examination.notes()
            self._make_branch()
            return plan.parent, self._url(plan.parent)
        # A branch that is yet to be made has the files of main.
        revision = None if self._new_branch or create_pr else self._revision
        sending = Sending(
            client, self._repo_id, revision, plan.to_send, self._examination, self._progress, create_pr=create_pr
        )
        with sending:
            sending.run()
            self._examination.notes()
            additions = sending.additions
            self._check_unchanged(additions)
            self._make_branch()
            if create_pr:
                found = client.call(
                    self._target, lambda: self._commit(additions, message, description, create_pr=True), tries=1
                )
                commit, url = found.oid, found.pr_url
            else:
                commit = self._commit_once(additions, message, description)
                url = self._url(commit)
        self._compare(commit, withdraw=not create_pr)
        return commit, url

    def _check_unchanged(self, additions: list[tuple[PlannedFile, CommitOperationAdd]]) -> None:
        for file, addition in additions:
            info = addition.upload_info
            if not file.local.unchanged() or (info.is_hashed and info.sha256.hex() != file.sha256):
                raise QlfError(
                    f"{file.local.name} changed while it was being sent; nothing was published: run it again"
                )

    def _make_branch(self) -> None:
        if self._new_branch:
            api, parent = self._client.api, self._plan.parent
            self._client.call(
                self._target,
                lambda: api.create_branch(self._repo_id, branch=self._revision, revision=parent, exist_ok=True),
            )

    def _commit(
        self,
        additions: list[tuple[PlannedFile, CommitOperationAdd]],
        message: str,
        description: str,
        *,
        create_pr: bool = False,
    ) -> Any:
        from huggingface_hub import CommitOperationDelete

        operations: list[CommitOperation] = [
            *(addition for _, addition in additions),
            *(CommitOperationDelete(name, is_folder=False) for name in self._plan.removed),
        ]
        return self._client.api.create_commit(
            self._repo_id,
            operations,
            commit_message=message,
            commit_description=description,
            revision=None if create_pr else self._revision,
            parent_commit=self._plan.parent,
            create_pr=create_pr,
        )

    def _commit_once(
        self, additions: list[tuple[PlannedFile, CommitOperationAdd]], message: str, description: str
    ) -> str:
        """Commit exactly once, though an answer may get lost: before a further try, the branch itself is asked."""
        client = self._client
        for attempt in range(1, client.tries + 1):
            try:
                return str(self._commit(additions, message, description).oid)
            except Exception as error:
                status = status_of(error)
                moved = status in _MOVED
                if not (moved or status in RETRIED or is_unreachable(error)):
                    raise client.explained(error, self._target, attempt) from None
                head = client.state(self._repo_id, self._revision)
                if head is not None and head.commit is not None and head.commit != self._plan.parent:
                    return self._ours_or_conflict(head)
                if moved or attempt == client.tries:
                    raise client.explained(error, self._target, attempt) from None
                time.sleep(FIRST_WAIT_SECONDS * 2 ** (attempt - 1))
        raise HubError(f"{self._target}: nothing was committed")  # tries is at least 1

    def _ours_or_conflict(self, head: RemoteState) -> str:
        """The head's commit when it is this push's, whose answer was lost."""
        if head.commit is not None and not differences(self._plan, head):
            return head.commit
        raise Conflict(
            f"{self._target} was changed by somebody else meanwhile: found the commit {head.commit}, needed "
            f"{self._plan.parent}; nothing was overwritten: look at it, then push again"
        )

    def _compare(self, commit: str, *, withdraw: bool) -> None:
        """Compare the hub's hashes with those that were verified, and take the commit back when they differ."""
        state = self._client.state(self._repo_id, commit)
        wrong = differences(self._plan, state) if state is not None else ["the repository is gone"]
        if not wrong:
            return
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        happened = f"{self._target}: after the upload {wrong[0]}{more}"
        if not withdraw:
            raise HubError(f"{happened}; close the proposed change")
        try:
            self._withdraw(commit)
        except QlfError as error:
            raise HubError(f"{happened}; and the commit {commit} could not be taken back: {error}") from None
        raise HubError(f"{happened}; the commit was taken back: run it again, or look into the hub's storage")

    def _withdraw(self, commit: str) -> None:
        """A commit on top of `commit` that has the files of the parent again."""
        from huggingface_hub import CommitOperationCopy, CommitOperationDelete

        parent = self._plan.parent
        before = self._client.state(self._repo_id, parent) if parent is not None else None
        files = before.files if before is not None else {}
        touched = [*(file.local.name for file in self._plan.to_send), *self._plan.removed]
        operations: list[CommitOperation] = [
            CommitOperationCopy(name, name, src_revision=parent)
            if name in files
            else CommitOperationDelete(name, is_folder=False)
            for name in touched
        ]
        self._client.call(
            self._target,
            lambda: self._client.api.create_commit(
                self._repo_id,
                operations,
                commit_message="Take back a commit whose files differ from those that were sent",
                revision=self._revision,
                parent_commit=commit,
            ),
            tries=1,
        )

    def _url(self, commit: str) -> str:
        return f"{self._client.host}/{self._repo_id}/tree/{commit}"
