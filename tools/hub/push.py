"""Compares a folder with a repository on the Hub, and makes the repository equal to it with one commit."""

import hashlib
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from tqdm import tqdm

from tools.hub.errors import NameTaken, RemoteCheckFailed, TargetMoved


TOOL = "upload_to_hub.py"  # in the title of every commit that this tool makes: so it knows its own repositories

# Files that would be loaded instead of ours, or beside them: other weights, other code, other tokenizers.
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
    foreign: bool = False  # holds files, and no commit of this tool
    files: dict[str, RepoFile] = field(default_factory=dict)


@dataclass
class Change:
    """One line of the plan."""

    state: str  # new, changed, same, deleted, kept
    path: str
    size: int  # bytes
    sha256: str  # empty for a file on the Hub whose hash is not known there
    git_sha1: str = ""  # how git names the content, and the Hub a file that is not in LFS


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
            f"{len(self.having('kept'))} not touched."
        )
        return "\n".join(lines)


def _bytes(count: int) -> str:
    return tqdm.format_sizeof(count, "B", 1000)


def look(api: HfApi, repo_id: str, revision: str) -> Target:
    """What is on the Hub now."""
    try:
        info = api.model_info(repo_id, revision=revision)
        has_revision = True
    except RepositoryNotFoundError:
        return Target(repo_id, revision, exists=False, has_revision=revision == "main")
    except RevisionNotFoundError:
        info = api.model_info(repo_id)  # the branch will start where the default branch is
        has_revision = False
    tree = api.list_repo_tree(repo_id, recursive=True, revision=info.sha)
    files = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    foreign = bool(files.keys() - {".gitattributes"})
    if foreign:
        foreign = not any(TOOL in commit.title for commit in api.list_repo_commits(repo_id, revision=info.sha))
    return Target(repo_id, revision, True, has_revision, info.sha, bool(info.private), foreign, files)


def make_plan(folder: Path, names: list[str], target: Target, progress: bool = True) -> Plan:
    """Hash the files of a repository-to-be and compare them with the target."""
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
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
            sha1.update(block)
            bar.update(len(block))
    return Change("", path.name, size, sha256.hexdigest(), sha1.hexdigest())


def _is_same(change: Change, there: RepoFile) -> bool:
    return there.lfs.sha256 == change.sha256 if there.lfs else there.blob_id == change.git_sha1


def _differences(plan: Plan, files: dict[str, RepoFile]) -> list[str]:
    """The paths in which a tree differs from what the plan says it should be."""
    ours = {change.path: change for change in plan.having("new", "changed", "same")}
    wrong = [path for path, change in ours.items() if path not in files or not _is_same(change, files[path])]
    return wrong + [change.path for change in plan.having("deleted") if change.path in files]


def _tree(api: HfApi, repo_id: str, commit: str) -> dict[str, RepoFile]:
    tree = api.list_repo_tree(repo_id, recursive=True, revision=commit)
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def push(api: HfApi, plan: Plan, title: str, private: bool, create_pr: bool = False) -> str:
    """Make the repository equal to the plan.

    Large files go first and change nothing by themselves; those that arrived in an earlier, interrupted run are not
    sent again. Then one commit switches everything over.

    Args:
        api: The client.
        plan: From `make_plan`.
        title: What the commit is called; must name this tool.
        private: Whether a repository that does not exist yet becomes private.
        create_pr: Whether to open a pull request instead of writing to the revision.

    Returns:
        The hash of the commit; the target's head if there is nothing to change.

    Raises:
        NameTaken: The repository was made by somebody while the plan was.
        TargetMoved: The revision was.
    """
    target = plan.target
    if not target.exists:
        try:
            api.create_repo(target.repo_id, private=private)
        except HfHubHTTPError as error:
            if error.response.status_code == 409:
                raise NameTaken(f"{target.repo_id} exists already, and this token may not see it.") from error
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
    api.preupload_lfs_files(target.repo_id, additions=operations, revision=target.revision, create_pr=create_pr)
    _check_not_moved(api, target)
    return _commit(api, plan, [*operations, *deletions], title, create_pr)


def _addition(folder: Path, change: Change) -> CommitOperationAdd:
    operation = CommitOperationAdd(change.path, folder / change.path)
    operation.upload_info.sha256 = bytes.fromhex(change.sha256)  # known already: the client need not read it again
    return operation


def _check_not_moved(api: HfApi, target: Target) -> None:
    # The client sends parent_commit with the commit only: without changes a stale one would pass in silence.
    if api.model_info(target.repo_id, revision=target.revision).sha != target.head:
        raise TargetMoved(f"Somebody committed to {target.repo_id} ({target.revision}) meanwhile: run this again.")


def _commit(api: HfApi, plan: Plan, operations: list[Any], title: str, create_pr: bool) -> str:
    """Commit; where the answer is lost, look whether the commit arrived before trying again."""
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
                raise TargetMoved(f"Somebody committed to {target.repo_id} ({target.revision}): run this again.")
            return head
    raise AssertionError("the last attempt returns or raises")


def check_hashes(api: HfApi, plan: Plan, commit: str) -> None:
    """Compare the files of a commit, by the Hub's hashes, with the plan.

    Raises:
        RemoteCheckFailed: Files are missing or differ.
    """
    if wrong := _differences(plan, _tree(api, plan.target.repo_id, commit)):
        raise RemoteCheckFailed(
            f"{plan.target.repo_id} at {commit} is not what was sent ({', '.join(wrong)}): run this again."
        )
