"""Contents of files in an S3 bucket, or in what speaks its protocol: `PREFIX/blobs/ab/abcd...`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qlformat.errors import QlfError
from qlformat.hub_server.blobs import CHUNK, is_sha256
from qlformat.hub_server.refusals import Refused

URL_SECONDS = 3600
"""How long an address that a client is sent to is valid."""
_UPLOADS = 8
_TRIES = 4
_CONNECTIONS = 64


class S3Blobs:
    """See qlformat.hub_server.blobs.Blobs. Credentials, region and endpoint are those that boto3 finds.

    Args:
        location: s3://BUCKET or s3://BUCKET/PREFIX.
        redirect: whether clients are sent to the store for contents, with an address that is valid for an hour,
            instead of getting them through this server.

    Raises:
        QlfError: boto3 is missing, the location is no such address, or the bucket cannot be used.
    """

    def __init__(self, location: str, *, redirect: bool = False) -> None:
        scheme, _, rest = location.partition("://")
        self._bucket, _, prefix = rest.partition("/")
        if scheme != "s3" or not self._bucket:
            raise QlfError(f"{location!r} is not the address of a bucket; write s3://BUCKET or s3://BUCKET/PREFIX")
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._redirect = redirect
        self._client = _client()
        self._check(location)

    def _check(self, location: str) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            self._client.head_bucket(Bucket=self._bucket)
        except ClientError as error:
            found = {"404": "there is no such bucket", "403": "these credentials may not use it"}
            reason = found.get(_code(error), f"the store answers {_code(error)}")
            raise QlfError(f"{reason}; check the bucket, AWS_* variables and AWS_ENDPOINT_URL", file=location) from None
        except (BotoCoreError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise QlfError(f"{reason}; check AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL", file=location) from None

    def put(self, file: Path, sha256: str) -> None:
        """See Blobs. An object appears under its key when all of it has arrived."""
        key = self._key(sha256)
        size = file.stat().st_size
        if self.size(sha256) == size:
            self.touch(sha256)
        else:
            with _store():
                self._client.upload_file(str(file), self._bucket, key)
            stored = self.size(sha256)
            if stored != size:
                raise Refused(503, f"the store kept {stored} of {size} bytes; try again")
        file.unlink()

    def put_many(self, files: list[tuple[Path, str]]) -> None:
        """See Blobs."""
        with ThreadPoolExecutor(_UPLOADS) as pool:
            for done in [pool.submit(self.put, file, sha256) for file, sha256 in files]:
                done.result()

    def size(self, sha256: str) -> int | None:
        """See Blobs."""
        from botocore.exceptions import ClientError

        with _store():
            try:
                return int(self._client.head_object(Bucket=self._bucket, Key=self._key(sha256))["ContentLength"])
            except ClientError as error:
                if _code(error) in ("404", "NoSuchKey", "NotFound"):
                    return None
                raise

    def chunks(self, sha256: str, start: int, stop: int) -> Iterator[bytes]:
        """See Blobs. A connection that breaks is made again, from where it broke."""
        key, tries = self._key(sha256), 0
        while start < stop:
            before = start
            try:
                for data in self._read(key, start, stop):
                    start += len(data)
                    yield data
            except _broken() as error:
                tries = tries + 1 if start == before else 1
                if tries == _TRIES:
                    raise OSError(f"the store broke off at byte {start} of {sha256}: {type(error).__name__}") from None
                time.sleep(0.2 * 2**tries)
            else:
                if start < stop:
                    raise OSError(f"the stored content {sha256} ends at byte {start}, needed {stop}")

    def _read(self, key: str, start: int, stop: int) -> Iterator[bytes]:
        from botocore.exceptions import ClientError

        try:
            found = self._client.get_object(Bucket=self._bucket, Key=key, Range=f"bytes={start}-{stop - 1}")
        except ClientError as error:
            raise OSError(f"the stored content {key} cannot be read: {_code(error)}") from None
        with contextlib.closing(found["Body"]) as body:
            yield from body.iter_chunks(CHUNK)

    def delete(self, sha256: str) -> None:
        """See Blobs."""
        with _store():
            self._client.delete_object(Bucket=self._bucket, Key=self._key(sha256))
            self._client.delete_object(Bucket=self._bucket, Key=self._mark(sha256))

    def stored(self) -> Iterator[tuple[str, int, float]]:
        """See Blobs."""
        with _store():
            marks = {name: when for name, _, when in self._listed("touched/")}
            for name, size, when in self._listed("blobs/"):
                yield name, size, max(when, marks.get(name, 0.0))

    def _listed(self, folder: str) -> Iterator[tuple[str, int, float]]:
        pages = self._client.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix + folder):
            for item in page.get("Contents", ()):
                name = item["Key"].rpartition("/")[2]
                if is_sha256(name):
                    yield name, item["Size"], item["LastModified"].timestamp()

    def touch(self, sha256: str) -> None:
        """See Blobs. The time of an object cannot be changed: that of an empty one beside it is used."""
        with _store():
            self._client.put_object(Bucket=self._bucket, Key=self._mark(sha256), Body=b"")

    def url(self, sha256: str) -> str | None:
        """See Blobs. What it leads to is never a page: a browser saves it."""
        if not self._redirect:
            return None
        values = {
            "Bucket": self._bucket,
            "Key": self._key(sha256),
            "ResponseContentType": "application/octet-stream",
            "ResponseContentDisposition": "attachment",
        }
        return str(self._client.generate_presigned_url("get_object", Params=values, ExpiresIn=URL_SECONDS))

    def _key(self, sha256: str) -> str:
        if not is_sha256(sha256):
            raise ValueError(f"{sha256!r} is not a sha256")
        return f"{self._prefix}blobs/{sha256[:2]}/{sha256}"

    def _mark(self, sha256: str) -> str:
        return f"{self._prefix}touched/{sha256}"


class _store:  # noqa: N801 (reads like contextlib.suppress)
    """Turns what goes wrong between here and the store into an answer that clients try again after."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        if isinstance(error, ClientError):
            raise Refused(
                503, f"the hub's store refused: {_code(error)}; try again, and tell who runs the hub"
            ) from error
        if isinstance(error, BotoCoreError | Boto3Error):
            raise Refused(503, "the hub's store does not answer; try again") from error


def _client() -> Any:
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ModuleNotFoundError:
        raise QlfError("boto3 is missing, which S3 needs; pip install 'qlformat[hub-s3]'") from None
    settings = Config(
        connect_timeout=10,
        read_timeout=60,
        max_pool_connections=_CONNECTIONS,
        retries={"mode": "standard", "max_attempts": _TRIES},
        signature_version="s3v4",
    )
    try:
        return boto3.client("s3", config=settings)
    except (BotoCoreError, ValueError) as error:
        raise QlfError(f"S3 cannot be used: {' '.join(str(error).split())}; check the AWS_* variables") from None


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", "an error"))


def _broken() -> tuple[type[BaseException], ...]:
    from botocore.exceptions import BotoCoreError
    from urllib3.exceptions import HTTPError

    return (BotoCoreError, HTTPError)
