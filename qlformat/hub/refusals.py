"""What a hub refuses, or fails to do, as one line for the user. No line ever holds a token."""

from __future__ import annotations

import re

from qlformat.errors import QlfError

RETRIED = frozenset((408, 425, 429, 500, 502, 503, 504))
"""Statuses that another try may not meet again."""

_QUERY = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]*")
_USER = re.compile(r"(https?://)[^\s/@]+@")
_SECRETS = (re.compile(r"hf_[A-Za-z0-9_-]{4,}"), re.compile(r"(?i)bearer\s+[^\s'\",]+"))
_MOST = 200


class HubError(QlfError):
    """A hub refused, failed, or could not be reached."""


class Conflict(HubError):
    """The branch is not where it was when the work began."""


def token() -> str | None:
    """The user's token, from HF_TOKEN or from where `hf auth login` puts it."""
    from huggingface_hub import get_token

    return get_token()


def scrub(text: str, secret: str | None = None) -> str:
    """Text for a message: its first line, without a token, the query of an address or a name and password in one."""
    line = next((part.strip() for part in text.splitlines() if part.strip()), "")
    if secret:
        line = line.replace(secret, "***")
    for pattern in _SECRETS:
        line = pattern.sub("***", line)
    line = _USER.sub(r"\1", _QUERY.sub(r"\1", line))
    return line if len(line) <= _MOST else f"{line[: _MOST - 3]}..."


def status_of(error: BaseException) -> int | None:
    """HTTP status of an exception of the client, or of what it was made from."""
    seen: BaseException | None = error
    while seen is not None:
        status = getattr(getattr(seen, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        seen = seen.__cause__
    return None


def is_unreachable(error: BaseException) -> bool:
    """Whether no answer came: the connection was refused, broke, or took too long."""
    from huggingface_hub import errors as hub

    lost = (hub.HfHubHTTPError.__bases__[0], ConnectionError, TimeoutError)  # the first: the HTTP library's own base
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, hub.OfflineModeIsEnabled):
            return False
        if isinstance(seen, lost) and status_of(seen) is None:
            return True
        # `EntryNotFound` of the local cache is what the client makes of a HEAD request that got no answer.
        if isinstance(seen, hub.LocalEntryNotFoundError) and seen.__cause__ is None:
            return True
        seen = seen.__cause__
    return False


def waits_for(error: BaseException) -> float | None:
    """Seconds that the hub asks to wait (Retry-After), where it does."""
    seen: BaseException | None = error
    while seen is not None:
        headers = getattr(getattr(seen, "response", None), "headers", None)
        value = headers.get("Retry-After") if headers is not None else None
        if isinstance(value, str) and value.isascii() and value.isdigit():
            return float(value)
        seen = seen.__cause__
    return None


def refusal(error: Exception, name: str, host: str, *, tries: int = 1) -> HubError | None:
    """One line for a failure of the hub; None for what is none.

    Args:
        error: raised by the client.
        name: of the repository, with what was asked of it.
        host: the hub's address.
        tries: how often it was tried.
    """
    from huggingface_hub import errors as hub

    status = status_of(error)
    again = f", also after {tries} tries" if tries > 1 else ""
    if isinstance(error, hub.OfflineModeIsEnabled):
        return HubError(f"{name}: HF_HUB_OFFLINE keeps the hub from being asked; unset it")
    if isinstance(error, hub.HFValidationError):
        return HubError(f"{name}: {scrub(str(error))}")
    if status in (401, 403):
        return _not_allowed(status, error, name, host)
    if isinstance(error, hub.GatedRepoError):
        return HubError(f"{name} is gated: accept its terms on {host} and log in with `hf auth login`")
    if isinstance(error, hub.RevisionNotFoundError):
        return HubError(f"{name}: the repository has no such branch, tag or commit (any more); check the revision")
    if isinstance(error, hub.RepositoryNotFoundError):
        return HubError(f"found no repository {name} on {host}; check the spelling, or log in if it is private")
    if status is not None:
        return _answered(status, error, name, host, again)
    if is_unreachable(error):
        return HubError(f"{host} cannot be reached ({_reason(error)}){again}; check the connection and run it again")
    if isinstance(error, hub.EntryNotFoundError):
        return HubError(f"{name}: the repository lacks this file")
    return None


def _not_allowed(status: int, error: Exception, name: str, host: str) -> HubError:
    if token() is None:
        return HubError(f"{name}: {host} wants a token and none was found; run `hf auth login` or set HF_TOKEN")
    if status == 401:
        return HubError(f"{name}: {host} does not accept the token; make a new one there and run `hf auth login`")
    said = _said(error)
    return HubError(
        f"{name}: the token has no right to do this on {host}{f' ({said})' if said else ''}; use one that may write"
    )


def _answered(status: int, error: Exception, name: str, host: str, again: str) -> HubError:
    said = _said(error)
    why = f" ({said})" if said else ""
    if status == 507:
        return HubError(f"{name}: the disk of {host} is full{why}; free some space there and run it again")
    if status == 413:
        return HubError(f"{name}: this is larger than {host} accepts{why}")
    if status == 429:
        wait = waits_for(error)
        when = f"in {wait:.0f} s" if wait else "later"
        return HubError(f"{name}: {host} asks for fewer requests (429){again}; run it again {when}")
    if status >= 500:
        return HubError(f"{name}: {host} answers {status}{again}{why}; run it again later")
    return HubError(f"{name}: {host} refuses this with {status}{why}")


def _said(error: BaseException) -> str:
    """What the hub itself said about it."""
    seen: BaseException | None = error
    while seen is not None:
        said = getattr(seen, "server_message", None)
        if isinstance(said, str) and said:
            return scrub(said, token())
        seen = seen.__cause__
    return ""


def _reason(error: BaseException) -> str:
    seen = error
    while seen.__cause__ is not None:
        seen = seen.__cause__
    return scrub(str(seen), token()) or type(seen).__name__
