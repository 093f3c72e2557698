"""Who may do what: the file of tokens, and the signatures of short-lived addresses."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
import time
from dataclasses import dataclass
from pathlib import Path

from qlformat.errors import QlfError
from qlformat.hub_server.index import Repo
from qlformat.hub_server.refusals import Refused, no_repo, shown

_HASHED = "sha256:"
_MIN_LENGTH = 16

FORMAT = (
    "a line is ROLE NAME TOKEN [NAMESPACE,...]: ROLE is read or write, "
    "TOKEN a text of 16 characters or more, or sha256:HEX of one"
)


@dataclass(frozen=True)
class Identity:
    """Who asks.

    Attributes:
        name: their name, which is their own namespace.
        write: whether they may change anything.
        known: whether they showed a token, or the hub has none and trusts everyone who reaches it.
        namespaces: the only ones they may change, and see private repositories in; None is all.
    """

    name: str
    write: bool
    known: bool
    namespaces: frozenset[str] | None = None

    def may_see(self, repo: Repo) -> bool:
        """Public repositories, and the private ones of their namespaces."""
        return not repo.private or (self.known and self._has(repo.name))

    def require_read(self, repo: Repo) -> None:
        """Raise 404, as if the repository did not exist, unless they may see it."""
        if not self.may_see(repo):
            raise no_repo(repo.name)

    def require_write(self, name: str) -> None:
        """Raise 401 without a token, 403 without the right to write to NAMESPACE/NAME."""
        if not self.known:
            raise Refused(401, "this needs a token with the right to write; set HF_TOKEN or run `hf auth login`")
        if not self.write:
            raise Refused(403, f"the token of {shown(self.name)} may read only; ask for one with the right to write")
        if not self._has(name):
            allowed = ", ".join(sorted(self.namespaces or ()))
            raise Refused(403, f"the token of {shown(self.name)} may not write to {shown(name)}, only to: {allowed}")

    def _has(self, name: str) -> bool:
        return self.namespaces is None or name.partition("/")[0].lower() in self.namespaces


ANYBODY = Identity("anonymous", write=False, known=False)
OWNER = Identity("local", write=True, known=True)
"""Everyone, where the hub has no tokens."""


class Tokens:
    """The tokens of a hub.

    Args:
        file: the file of tokens, or None for a hub that trusts everyone who reaches it.

    Raises:
        QlfError: the file is missing, can be read by others though it holds plain tokens, or has a line that is wrong.
    """

    def __init__(self, file: Path | None) -> None:
        self._identities: list[tuple[bytes, Identity]] = []
        self.open = file is None
        if file is not None:
            self._read(file)

    def identify(self, authorization: str | None) -> Identity:
        """Who sent this Authorization header.

        Raises:
            Refused: 401 for a token that is not known.
        """
        if self.open:
            return OWNER
        if not authorization:
            return ANYBODY
        scheme, _, token = authorization.partition(" ")
        digest = _digest(token.strip()) if scheme.lower() == "bearer" else b""
        found = None
        for known, identity in self._identities:  # all of them, so that the time does not tell which one is near
            if hmac.compare_digest(known, digest):
                found = identity
        if found is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        return found

    def _read(self, file: Path) -> None:
        try:
            handle = os.open(file, os.O_RDONLY)
        except OSError as error:
            raise QlfError(f"the file of tokens cannot be read: {error.strerror}; {FORMAT}", file=str(file)) from None
        with os.fdopen(handle, encoding="utf-8", errors="replace") as lines:
            exposed = stat.S_IMODE(os.fstat(lines.fileno()).st_mode) & 0o077
            for number, line in enumerate(lines, 1):
                fields = line.split()
                if fields and not fields[0].startswith("#"):
                    self._add(fields, f"{file}:{number}", bool(exposed))
        if not self._identities:
            raise QlfError(f"the file has no tokens; {FORMAT}", file=str(file))

    def _add(self, fields: list[str], where: str, exposed: bool) -> None:
        # No message repeats the token.
        if not 3 <= len(fields) <= 4 or fields[0] not in ("read", "write"):
            raise QlfError(f"not a token; {FORMAT}", file=where)
        role, name, token = fields[:3]
        hashed = token.startswith(_HASHED)
        if hashed:
            try:
                digest = bytes.fromhex(token.removeprefix(_HASHED))
            except ValueError:
                digest = b""
            if len(digest) != hashlib.sha256().digest_size:
                raise QlfError(f"not a sha256 of a token; {FORMAT}", file=where)
        else:
            if exposed:
                raise QlfError(
                    "others may read this file of plain tokens; chmod 600 it, or write sha256:HEX of each", file=where
                )
            if len(token) < _MIN_LENGTH:
                raise QlfError(f"the token is shorter than {_MIN_LENGTH} characters; {FORMAT}", file=where)
            digest = _digest(token)
        namespaces = frozenset(fields[3].lower().split(",")) if len(fields) == 4 else None
        self._identities.append((digest, Identity(name, write=role == "write", known=True, namespaces=namespaces)))


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


class Signer:
    """Signs the addresses that clients send contents to, where they send no token.

    Args:
        file: the key; made if it is missing, readable by its owner only.
    """

    def __init__(self, file: Path) -> None:
        if not file.exists():
            temporary = file.with_suffix(f".{os.getpid()}")
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(handle, "wb") as out:
                out.write(secrets.token_bytes(32))
                os.fsync(out.fileno())
            os.replace(temporary, file)
        self._key = file.read_bytes()
        if len(self._key) != 32:
            raise QlfError("the hub's key is not 32 bytes; delete it and start again", file=str(file))

    def sign(self, *fields: str | int) -> str:
        """The signature of the fields."""
        text = "\n".join(str(field) for field in fields)
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()

    def check(self, signature: str, expires: int, *fields: str | int) -> None:
        """Raise 403 unless the signature is of these fields and not past its time."""
        expected = self.sign(expires, *fields)
        if not hmac.compare_digest(expected.encode(), signature.encode("utf-8", "replace")):
            raise Refused(403, "the address is not signed by this hub; ask for a new one")
        if time.time() > expires:
            raise Refused(403, "the address has expired; ask for a new one by uploading again")
