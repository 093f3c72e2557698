"""Telling clients on this machine where the local xet store is."""

from __future__ import annotations

import time

from starlette.responses import JSONResponse, Response

from qlformat.hub_server.asking import Ask
from qlformat.hub_server.refusals import Refused

_SECONDS = 24 * 3600


def write_token(ask: Ask) -> Response:
    """GET xet-write-token/REVISION: a view of the store for one upload."""
    ask.repo(write=True)
    if ask.hub.xet is None or not ask.local:
        raise Refused(404, "this hub has no xet store for you; set HF_HUB_DISABLE_XET=1 to use LFS")
    address, expires = ask.hub.xet.new_view(), int(time.time()) + _SECONDS
    token = "local"  # noqa: S105  # who may open the directory is up to the file system
    headers = {"X-Xet-Cas-Url": address, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(expires)}
    return JSONResponse({"accessToken": token, "exp": expires, "casUrl": address}, headers=headers)
