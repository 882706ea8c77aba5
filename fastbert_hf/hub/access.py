"""Talking to the Hub: who is asking and what they may do, patience with a busy server, errors in one line."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from fastbert_hf.files import is_disk_full

T = TypeVar("T")

WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each new attempt after an error of the server's own


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error, also where the client wrapped it."""
    while error is not None:
        if isinstance(error, HfHubHTTPError) and error.response is not None:
            return error.response.status_code
        error = error.__cause__
    return None


def is_unreachable(error: BaseException | None) -> bool:
    """Whether no conversation took place: offline mode, or no connection."""
    if _status(error) is not None:
        return False
    while error is not None:
        # the client's HTTP library changes its name between versions
        if isinstance(error, OfflineModeIsEnabled) or type(error).__module__.startswith("httpx"):
            return True
        error = error.__cause__
    return False


def patiently(call: Callable[..., T], *args, **kwargs) -> T:
    """Call, and again after a while where the server failed (500 to 599); downloads resume where they stopped."""
    for wait in WAITS:
        try:
            return call(*args, **kwargs)
        except (HfHubHTTPError, LocalEntryNotFoundError) as error:
            if (_status(error) or 0) < 500:
                raise
        time.sleep(wait)
    return call(*args, **kwargs)


@contextmanager
def explained(repo: str, revision: str | None = None) -> Iterator[None]:
    """Raise what goes wrong between here and the Hub as a ValueError of one line, without tokens.

    Args:
        repo, revision: what the message is about.
    Raises:
        ValueError: in place of the client's errors.
    """
    try:
        yield
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise ValueError(_refusal(error, repo, revision)) from error
    except LocalTokenNotFoundError as error:
        raise ValueError("no token: set HF_TOKEN or run `hf auth login`") from error
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ValueError(_failure(error, repo)) from error
    except ValueError:
        raise  # explained already
    except Exception as error:
        if is_disk_full(error):
            raise ValueError(f"no room on the disk for {repo}: {error}") from error
        if _status(error) is not None:  # the client wraps errors of its upload threads
            raise ValueError(_failure(error, repo)) from error
        if is_unreachable(error):
            raise ValueError(f"the Hub cannot be reached for {repo}: {type(error).__name__}") from error
        raise


def _refusal(error: Exception, repo: str, revision: str | None) -> str:
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no revision {revision!r}; expected a branch, a tag or a commit of it"
    if isinstance(error, GatedRepoError):
        return f"{repo} is gated: its owner must grant you access first"
    if isinstance(error, HFValidationError):
        return f"{repo!r} is not a repository name; expected NAMESPACE/NAME"
    return f"there is no repository {repo}, or it is private and your token (HF_TOKEN) may not see it"


def _failure(error: Exception, repo: str) -> str:
    status = _status(error)
    if status == 401:
        return f"the Hub does not accept the token (HF_TOKEN) for {repo}"
    if status == 403:
        return f"the token (HF_TOKEN) may not do this in {repo}: expected one with write access"
    if status in (409, 412):
        return f"somebody else committed to {repo} meanwhile; nothing was changed, run the command again"
    if status is not None:
        message = getattr(error, "server_message", None)
        return f"the Hub answered {status} for {repo}{f': {message}' if message else ''}"
    return f"the Hub cannot be reached, and {repo} is not, or not completely, in the cache"


def check_write_access(api: HfApi, repo: str) -> str:
    """Check, before any work, that a token is there and may write.

    Args:
        api: the client.
        repo: NAMESPACE/NAME, or NAME in one's own namespace.

    Returns:
        NAMESPACE/NAME.

    Raises:
        ValueError: no token, one that the Hub does not know or that only reads, or somebody else's namespace.
    """
    with explained(repo):
        user = patiently(api.whoami)
    if _role(user) == "read":
        raise ValueError(f"the token (HF_TOKEN) of {user['name']} only reads; expected one with write access")
    namespace, slash, _ = repo.partition("/")
    if not slash:
        return f"{user['name']}/{repo}"
    roles = {org["name"]: org.get("roleInOrg") for org in user.get("orgs") or () if "name" in org}
    if namespace != user["name"] and (namespace not in roles or roles[namespace] == "read"):
        allowed = ", ".join([user["name"], *(name for name, role in roles.items() if role != "read")])
        raise ValueError(f"{user['name']} may not write to {repo}; expected a repository of {allowed}")
    return repo


def _role(user: dict[str, Any]) -> str | None:
    return ((user.get("auth") or {}).get("accessToken") or {}).get("role")
