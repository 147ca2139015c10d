"""Compares a folder with a repository on the Hub, and makes the repository equal to it in one commit."""

import hashlib
import importlib.util
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff, validate_repo_id
from tqdm import tqdm

from tools.convert.files import hash_file
from tools.hub.errors import (
    Forbidden,
    InputError,
    NameTaken,
    NetworkLost,
    NotFound,
    NotLoggedIn,
    RemoteCheckFailed,
    ServerFailed,
    TargetMoved,
)


TOOL = "upload_to_hub.py"  # in the title of every commit of this tool, which recognises its repositories by it

# By default hf_xet retries for minutes, and waits for each connection for one: longer than anybody watches.
XET_LIMITS = {"HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "4", "HF_XET_CLIENT_CONNECT_TIMEOUT": "15s"}

_LARGE = (".safetensors", ".model")  # what the Hub stores outside of git

# Files that would be loaded instead of ours, or in addition: other weights, other code, other tokenizers.
_REPLACED = re.compile(
    r"[^/]+\.(bin|pt|pth|ckpt|pkl|safetensors|py)|[^/]+\.(bin|safetensors)\.index\.json|tokenizer\.json"
    r"|added_tokens\.json|chat_template\.json"
)


@dataclass
class Target:
    """A repository as it is on the Hub."""

    repo_id: str
    revision: str
    exists: bool  # the repository
    has_revision: bool
    head: str | None = None  # commit that the plan starts from
    private: bool = True
    foreign: bool = False  # holds files, but no commit of this tool
    files: dict[str, RepoFile] = field(default_factory=dict)


@dataclass
class Change:
    """One line of the plan."""

    state: str  # new, changed, same, deleted, kept
    path: str
    size: int  # bytes
    sha256: str  # empty for a file whose hash the Hub does not give
    git_sha1: str = ""  # the hash of the git blob, by which the Hub identifies a file that is not in LFS


@dataclass
class Plan:
    """What an upload will change."""

    target: Target
    folder: Path
    changes: list[Change]

    def having(self, *states: str) -> list[Change]:
        return [change for change in self.changes if change.state in states]

    def __str__(self) -> str:
        lines = [f"{c.state:8} {c.sha256 or '-':64} {_bytes(c.size):>9}  {c.path}" for c in self.changes]
        send = self.having("new", "changed")
        lines.append(
            f"{len(send)} files of {_bytes(sum(change.size for change in send))} are new or changed, "
            f"{len(self.having('same'))} the same, {len(self.having('deleted'))} deleted, "
            f"{len(self.having('kept'))} kept."
        )
        return "\n".join(lines)


def _bytes(count: int) -> str:
    return tqdm.format_sizeof(count, "B", 1000)


def log_in(repo_id: str, revision: str, create_pr: bool) -> tuple[HfApi, str]:
    """The client, and the full name of the repository. Checks both before the long work starts.

    Raises:
        Forbidden: The token cannot write.
        InputError: The name is not allowed.
        NotFound: The repository does not exist, and the token cannot create it.
        NotLoggedIn: There is no token, or it cannot be one.
        ServerFailed: The endpoint is no Hub.
    """
    api = HfApi()
    if (token := get_token()) and not re.fullmatch(r"[!-~]+", token):
        raise NotLoggedIn("The token holds a character that no token has, such as a curly quote: copy it again.")
    user = api.whoami()
    if not isinstance(user, dict) or not isinstance(user.get("name"), str):
        raise ServerFailed(f"{api.endpoint} does not answer as a Hub does: check HF_ENDPOINT and proxies.")
    role = ((user.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise Forbidden("The token is read-only: create one with write permission on the Hub's page of access tokens.")
    repo_id = repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise InputError(f"--repo-id {repo_id}: {error}") from error
    namespaces = [user["name"], *(organisation["name"] for organisation in user.get("orgs", []))]
    exists = fetch_target(api, repo_id, revision).exists
    if not exists and (create_pr or repo_id.split("/")[0] not in namespaces):
        raise NotFound(
            f"{repo_id} does not exist, and this token can create repositories under {', '.join(namespaces)} only."
        )
    return api, repo_id


def fetch_target(api: HfApi, repo_id: str, revision: str) -> Target:
    """The repository as it is now."""
    try:
        info = api.model_info(repo_id, revision=revision)
        has_revision = True
    except RepositoryNotFoundError:
        return Target(repo_id, revision, exists=False, has_revision=revision == "main")
    except RevisionNotFoundError:
        info = api.model_info(repo_id)  # the new branch will start at the default branch
        has_revision = False
    if info.sha is None:
        raise ServerFailed(f"{api.endpoint} names no commit of {repo_id}: run the same command again later.")
    tree = api.list_repo_tree(repo_id, recursive=True, revision=info.sha)
    files = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    foreign = bool(files.keys() - {".gitattributes"})
    if foreign:
        foreign = not any(TOOL in commit.title for commit in api.list_repo_commits(repo_id, revision=info.sha))
    return Target(repo_id, revision, True, has_revision, info.sha, bool(info.private), foreign, files)


def make_plan(folder: Path, names: list[str], target: Target, progress: bool = True) -> Plan:
    """Hash the files of an assembled folder and compare them with the target."""
    changes = []
    with tqdm(desc="hash", unit="B", unit_scale=True, leave=False, disable=not progress) as bar:
        bar.reset(sum((folder / name).stat().st_size for name in names))
        for name in sorted(names):
            change = _hashed(folder / name, bar)
            there = target.files.get(name)
            change.state = "new" if there is None else "same" if _is_same(change, there) else "changed"
            changes.append(change)
    for path, there in sorted(target.files.items()):
        if path not in names:
            state = "deleted" if _REPLACED.fullmatch(path) else "kept"
            changes.append(Change(state, path, there.size, there.lfs.sha256 if there.lfs else "", there.blob_id))
    return Plan(target, folder, changes)


def _hashed(path: Path, bar: Any) -> Change:
    size = path.stat().st_size
    sha256, sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    hash_file(path, sha256, sha1, progress=bar.update)
    return Change("", path.name, size, sha256.hexdigest(), sha1.hexdigest())


def _is_same(change: Change, there: RepoFile) -> bool:
    return there.lfs.sha256 == change.sha256 if there.lfs else there.blob_id == change.git_sha1


def _differences(plan: Plan, files: dict[str, RepoFile]) -> list[str]:
    """The paths in which a tree differs from the plan."""
    ours = {change.path: change for change in plan.having("new", "changed", "same")}
    wrong = [path for path, change in ours.items() if path not in files or not _is_same(change, files[path])]
    return wrong + [change.path for change in plan.having("deleted") if change.path in files]


def _tree(api: HfApi, repo_id: str, commit: str) -> dict[str, RepoFile]:
    tree = api.list_repo_tree(repo_id, recursive=True, revision=commit)
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def push(api: HfApi, plan: Plan, title: str, private: bool, create_pr: bool = False) -> str:
    """Make the repository equal to the plan.

    Large files are sent first and change nothing by themselves; files that an interrupted run has sent are not sent
    again. Then one commit changes everything at once.

    Args:
        api: The client.
        plan: From `make_plan`.
        title: Title of the commit; must name this tool.
        private: Whether a new repository is private.
        create_pr: Whether to open a pull request instead of writing to the revision.

    Returns:
        The hash of the commit; the target's head if there is nothing to change.

    Raises:
        NameTaken: Somebody created the repository after the plan was made.
        NetworkLost: The storage of large files cannot be reached.
        TargetMoved: Somebody committed to the revision after the plan was made.
    """
    target = plan.target
    if not target.exists:
        try:
            api.create_repo(target.repo_id, private=private)
        except HfHubHTTPError as error:
            if error.response.status_code == 409:
                raise NameTaken(f"{target.repo_id} exists already, and this token cannot read it.") from error
            raise
        target.exists = True
        target.head = api.model_info(target.repo_id).sha
    if not target.has_revision:
        api.create_branch(target.repo_id, branch=target.revision, revision=target.head)
        target.has_revision = True
    operations = [_addition(plan.folder, change) for change in plan.having("new", "changed")]
    deletions = [CommitOperationDelete(change.path, is_folder=False) for change in plan.having("deleted")]
    _check_not_moved(api, target)
    if not operations and not deletions:
        assert target.head is not None
        return target.head
    if any(operation.path_in_repo.endswith(_LARGE) for operation in operations) and _uses_xet():
        _check_storage(api, target, create_pr)
    api.preupload_lfs_files(target.repo_id, additions=operations, revision=target.revision, create_pr=create_pr)
    _check_not_moved(api, target)
    return _commit(api, plan, [*operations, *deletions], title, create_pr)


def _uses_xet() -> bool:
    """Whether the client sends large files by Xet, rather than by LFS."""
    return importlib.util.find_spec("hf_xet") is not None and not constants.HF_HUB_DISABLE_XET


def _check_storage(api: HfApi, target: Target, create_pr: bool) -> None:
    """Ask for the storage's address and reach it, as hf_xet will: its own errors come minutes later and say less.

    Raises:
        HfHubHTTPError: The Hub gives no access.
        NetworkLost: The storage cannot be reached.
        ServerFailed: The Hub names no storage.
    """
    for name, value in XET_LIMITS.items():
        os.environ.setdefault(name, value)
    revision = "None" if create_pr else quote(target.revision, safe="")
    url = f"{api.endpoint}/api/models/{target.repo_id}/xet-write-token/{revision}"
    response = http_backoff("GET", url, headers=build_hf_headers(), params={"create_pr": "1"} if create_pr else None)
    hf_raise_for_status(response)
    address = response.headers.get("X-Xet-Cas-Url", "")
    if not address.startswith("http"):
        raise ServerFailed("The Hub names no storage for large files: set HF_HUB_DISABLE_XET=1, and run it again.")
    try:
        http_backoff("GET", address, max_retries=2, retry_on_status_codes=(), timeout=10)  # any answer will do
    except httpx2.TransportError as error:
        raise NetworkLost(
            f"The Hub's storage at {address} cannot be reached ({type(error).__name__}: {error}): check a firewall or "
            "proxy, or set HF_HUB_DISABLE_XET=1; then run the same command again."
        ) from error


def _addition(folder: Path, change: Change) -> CommitOperationAdd:
    operation = CommitOperationAdd(change.path, folder / change.path)
    operation.upload_info.sha256 = bytes.fromhex(change.sha256)  # known already: saves the client another read
    return operation


def _check_not_moved(api: HfApi, target: Target) -> None:
    # The client sends parent_commit only with a commit: without changes a stale one would go unnoticed.
    if api.model_info(target.repo_id, revision=target.revision).sha != target.head:
        raise _moved(target)


def _moved(target: Target) -> TargetMoved:
    return TargetMoved(
        f"Somebody committed to {target.repo_id} ({target.revision}) in the meantime: run the same command again."
    )


def _commit(api: HfApi, plan: Plan, operations: list[Any], title: str, create_pr: bool) -> str:
    """Commit; if the answer is lost, check whether the commit arrived before retrying."""
    target = plan.target
    for wait in (1, 4, None):
        try:
            info = api.create_commit(
                target.repo_id,
                operations,
                commit_message=title,
                revision=target.revision,
                parent_commit=target.head,
                create_pr=create_pr,
            )
            return info.oid
        except (httpx2.TransportError, HfHubHTTPError) as error:
            answered = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
            # A second pull request would be worse than none.
            if wait is None or answered or create_pr:
                raise
            time.sleep(wait)
        head = api.model_info(target.repo_id, revision=target.revision).sha
        if head != target.head:
            assert head is not None
            if _differences(plan, _tree(api, target.repo_id, head)):
                raise _moved(target)
            return head
    raise AssertionError("the last attempt returns or raises")


def check_hashes(api: HfApi, plan: Plan, commit: str) -> None:
    """Compare the files of a commit, by the Hub's hashes, with the plan.

    Raises:
        RemoteCheckFailed: Files are missing or differ.
    """
    if wrong := _differences(plan, _tree(api, plan.target.repo_id, commit)):
        raise RemoteCheckFailed(
            f"{plan.target.repo_id} at {commit} is not what was sent ({', '.join(wrong)}): run the same command again."
        )
