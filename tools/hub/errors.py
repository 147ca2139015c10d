"""The ways in which an upload ends early. Each has an exit code of its own, one line of text, and loses nothing."""


class UploadError(Exception):
    """Base of all of them. `str(error)` is the one message for the user: what happened, and what to do."""

    code = 1
    meaning = "something that this tool has no name for"


class InputError(UploadError):
    code = 3
    meaning = "the weights folder, an option or the package is incomplete or wrong"


class DiskFull(UploadError):
    code = 4
    meaning = "the disk is full; make room and rerun, it continues"


class LocalCheckFailed(UploadError):
    code = 5
    meaning = "the assembled folder does not load or is not sound; nothing was uploaded"


class NotLoggedIn(UploadError):
    code = 6
    meaning = "there is no token, or the Hub does not accept it (401)"


class Forbidden(UploadError):
    code = 7
    meaning = "the token may not write there (403)"


class NotFound(UploadError):
    code = 8
    meaning = "the namespace, repository or revision does not exist (404)"


class NameTaken(UploadError):
    code = 9
    meaning = "the repository exists and was not made by this tool; --yes overwrites its files"


class NetworkLost(UploadError):
    code = 10
    meaning = "the connection dropped; rerun, finished files are not sent again"


class ServerFailed(UploadError):
    code = 11
    meaning = "the Hub answered with an error (5xx, or one it should not give); rerun later"


class TargetMoved(UploadError):
    code = 12
    meaning = "somebody else committed to the target after the plan was made; rerun for a new plan"


class RemoteCheckFailed(UploadError):
    code = 13
    meaning = "the commit is there, but its files differ from the plan or do not load"


INTERRUPTED = 130  # Ctrl-C, as shells count it
