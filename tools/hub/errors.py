"""How an upload can fail. Each error has its own exit code and a one-line message, and loses nothing.

`explain` translates the exceptions of the libraries into these errors. Imports nothing but the standard library until
then, so that missing packages can be reported.
"""

import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from tools.convert.files import DISK_FULL, ConversionError


class UploadError(Exception):
    """Base of all of them. `str(error)` is the message for the user: what happened, and what to do."""

    code = 1
    meaning = "an error without a name"


class InputError(UploadError):
    code = 3
    meaning = "the weights folder, an option or the package is incomplete or wrong"


class DiskFull(UploadError):
    code = 4
    meaning = "the disk is full; make room and rerun to resume"


class LocalCheckFailed(UploadError):
    code = 5
    meaning = "the assembled folder is invalid or does not load; nothing was uploaded"


class NotLoggedIn(UploadError):
    code = 6
    meaning = "there is no token, or the Hub does not accept it (401)"


class Forbidden(UploadError):
    code = 7
    meaning = "the token has no write permission there (403)"


class NotFound(UploadError):
    code = 8
    meaning = "the namespace, repository or revision does not exist (404)"


class NameTaken(UploadError):
    code = 9
    meaning = "the repository exists and was not created by this tool; --yes overwrites its files"


class NetworkLost(UploadError):
    code = 10
    meaning = "the connection dropped; rerun, finished files are not sent again"


class ServerFailed(UploadError):
    code = 11
    meaning = "the Hub answered with an error (5xx, or an unexpected one); rerun later"


class TargetMoved(UploadError):
    code = 12
    meaning = "somebody else committed to the target after the plan was made; rerun for a new plan"


class RemoteCheckFailed(UploadError):
    code = 13
    meaning = "the commit exists, but its files differ from the plan or do not load"


# Requests that the Hub itself answers; all others go to its storage.
_OF_HUB = re.compile(r"/api/|\.git/info/lfs/|/resolve/")
# An error status in the text of hf_xet, whose exceptions carry nothing else.
_XET_STATUS = re.compile(r"HTTP status \w+ error \((?P<status>\d{3}) ?(?P<reason>[^)]*)\), domain: (?P<url>\S+)")

BUG = 1
INTERRUPTED = 130  # Ctrl-C, the code that shells use


def exit_codes() -> list[tuple[int, str]]:
    """Every exit code and its meaning."""
    return [
        (0, "done"),
        (2, "the command line is wrong"),
        *((error.code, error.meaning) for error in UploadError.__subclasses__()),
        (INTERRUPTED, "interrupted with Ctrl-C; rerun to resume"),
        (BUG, "a bug in this tool"),
    ]


def report(error: Exception) -> tuple[str, int]:
    """The message for the user, without the token, and the exit code; of a bug, the traceback and code 1."""
    known = explain(error)
    if known is not None:
        return _without_token(f"upload_to_hub.py: {known}"), known.code
    text = "".join(traceback.format_exception(error))
    return f"{_without_token(text)}\nThis is a bug in this tool; please report the lines above.", BUG


def explain(error: BaseException) -> UploadError | None:
    """The user's view of an exception, None for a bug in this tool."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    for cause in _chain(error):
        if isinstance(cause, UploadError):
            return cause
        if isinstance(cause, ConversionError):
            return InputError(str(cause))
        if isinstance(cause, LocalTokenNotFoundError):
            return NotLoggedIn("You are not logged in: run `hf auth login`, or set HF_TOKEN.")
        if isinstance(cause, OfflineModeIsEnabled):
            return NetworkLost("HF_HUB_OFFLINE is set: unset it to upload.")
        if isinstance(cause, HfHubHTTPError):
            response = cause.response
            reason = " ".join((cause.server_message or "").split()) or response.reason_phrase
            return _explain_status(response.status_code, response.request.url.path, reason)
        if isinstance(cause, httpx2.TransportError):
            return _lost(f"{type(cause).__name__}: {cause}")
        if isinstance(cause, OSError) and cause.errno in DISK_FULL:
            return DiskFull("The disk is full: make room and run the same command again to resume.")
        if isinstance(cause, ValueError) and "README.md" in str(cause):
            return LocalCheckFailed(f"The Hub does not accept the card: {cause}")
    answers = (_explain_answer(cause) for cause in _chain(error) if _raised_by_the_client(cause))
    return next(filter(None, answers), None)


def _explain_answer(cause: BaseException) -> UploadError | None:
    """The user's view of an error of huggingface_hub or hf_xet that has no type of its own."""
    if match := _XET_STATUS.search(str(cause)):
        return _explain_status(int(match["status"]), urlsplit(match["url"]).path, match["reason"])
    if isinstance(cause, ConnectionError) or "error sending request" in str(cause):  # of hf_xet
        return _lost(str(cause))
    if isinstance(cause, RuntimeError):  # of hf_xet
        return ServerFailed(f"The Hub's storage failed ({cause}): run the same command again later to resume.")
    if isinstance(cause, KeyError | TypeError | AttributeError | ValueError):
        return ServerFailed(
            f"The answer is not a Hub's ({type(cause).__name__}: {cause}): check HF_ENDPOINT if it is set, or a proxy "
            "that asks for a login; otherwise run the same command again later to resume."
        )
    return None


def _raised_by_the_client(error: BaseException) -> bool:
    """Whether an exception left the client in huggingface_hub, whose dataclasses are also used by configurations."""
    import huggingface_hub

    client, tools = Path(huggingface_hub.__file__).parent, Path(__file__).parents[1]
    files = [Path(frame.f_code.co_filename) for frame, _ in traceback.walk_tb(error.__traceback__)]
    known = [file for file in files if client in file.parents or tools in file.parents]
    return bool(known) and client in known[-1].parents and known[-1] != client / "dataclasses.py"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _lost(reason: str) -> NetworkLost:
    return NetworkLost(
        f"The connection to the Hub was lost ({reason}): run the same command again; finished files are not sent "
        "again."
    )


def _explain_status(status: int, path: str, reason: str) -> UploadError:
    """The user's view of an error status, which depends on what was asked for, and of whom."""
    again = "run the same command again later to resume"
    if _OF_HUB.search(path) is None:  # a link to the storage, which the Hub has signed for a while
        return ServerFailed(f"The Hub's storage answered {status} ({reason}): {again}.")
    if status == 401:
        return NotLoggedIn(
            f"The Hub does not accept the token ({reason}): run `hf auth login --force`, or set HF_TOKEN to a valid "
            "one."
        )
    if status == 403:
        return Forbidden(f"The token lacks permission ({reason}): use one that may write to this namespace.")
    if status == 404:
        return NotFound(f"The Hub found nothing there ({reason}): check --repo-id and --revision.")
    if status in (409, 412) and re.search("/commit/|/branch/", path):
        return TargetMoved(f"Somebody committed to the target in the meantime ({reason}): run the same command again.")
    return ServerFailed(f"The Hub answered {status} at {path} ({reason}): {again}.")


def _without_token(text: str) -> str:
    """The text with the user's token masked, should it ever contain it."""
    from huggingface_hub import get_token

    try:
        token = get_token()
    except Exception:  # the token cannot be determined
        return text
    return text.replace(token, "hf_***") if token else text
