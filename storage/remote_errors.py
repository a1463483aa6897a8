"""obstore's errors as ours: what is not there, what is denied, and what may pass.

Only of some of a service's answers obstore makes an error of its own kind, and of a listing's none; so the status is
taken from the message. Trouble that may pass is the network's, 5xx, 408 and 429; any other 4xx, and a redirect that
does not say where to, stay as they are however often they are asked for. The message quotes the URL, with its user,
password and signature, and the server's page: ours has the reason alone.
"""

import re
from typing import Literal, TypeAlias

from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

from storage.errors import ArtifactNotFound, RemoteError, SparsemillError

Done: TypeAlias = Literal["read", "written", "listed"]

_DENIED = (PermissionDeniedError, UnauthenticatedError, PermissionError)
_DENIED_STATUSES, _NOT_FOUND, _NO_SUCH_RANGE = (401, 403), 404, 416
_BUSY_STATUSES, _SERVERS = (408, 429), 500
_REDIRECTED = 301


def explained(error: Exception, done: Done, *, where: str, in_folder: bool) -> SparsemillError:
    """What an error of obstore's, or of the disk's, comes to.

    Args:
        error: the error.
        done: what was not.
        where: the object or prefix, as people may see it.
        in_folder: whether the remote is a folder.
    """
    status = status_of(error)
    if isinstance(error, FileNotFoundError) or status == _NOT_FOUND:
        if done == "read":
            return ArtifactNotFound("the remote does not have this file", where=where)
        kind = "folder" if in_folder else "bucket or container"
        return RemoteError(f"the remote has no such {kind}", where=where, found=reason(error), remedy="make it first")
    if status == _NO_SUCH_RANGE and done == "read":
        expected = "the range that was asked for"
        return RemoteError("the remote has a shorter file", where=where, found=reason(error), expected=expected)
    denied = isinstance(error, _DENIED) or status in _DENIED_STATUSES
    rights = "the rights on the folder" if in_folder else "the credentials in the environment, or the service's profile"
    return RemoteError(
        f"the remote could not be {done}", where=where, found=reason(error),
        transient=not denied and (status is None or status >= _SERVERS or status in _BUSY_STATUSES),
        remedy=f"look at {rights}" if denied else None,
    )  # fmt: skip


def reason(error: Exception) -> str:
    """What went wrong, from an error's first line, without addresses and without what a server wrote."""
    line = str(error).partition("\n")[0]
    text = re.sub(r"\S*://\S*", "...", re.split(r"[<{]", line)[0]).strip(" :")
    return f"{type(error).__name__}: {text}"


def status_of(error: Exception) -> int | None:
    """The HTTP status that an error quotes; None where there was no answer, or it broke off."""
    line = str(error).partition("\n")[0]
    if "redirect without LOCATION" in line:
        return _REDIRECTED  # its number is not told
    found = re.search(r"status code: (\d{3})", line)
    return int(found[1]) if found else None
