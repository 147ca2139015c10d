"""Files that appear complete or not at all: writing, copying and linking them, JSON, hashes. Needs only the standard
library, so that errors can be reported before torch is installed.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_READ = (".json", ".jinja", ".model", ".safetensors", ".bin", ".pt")  # suffixes of what the tools read in a checkpoint
PARTIAL = ".partial"  # suffix of a temporary file, beside the file that it becomes

CHUNK_BYTES = 1 << 26


class ConversionError(ValueError):
    """Why a conversion cannot continue, in one line that says what to do."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ConversionError: It cannot be read, is not JSON, or is not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConversionError(f"{path} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path} is not JSON ({error}); fetch it again.") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} must hold a JSON object, not {type(content).__name__}.")
    return content


def json_bytes(content: dict[str, Any], sort_keys: bool = True) -> bytes:
    """A JSON file as all tools write it."""
    return (json.dumps(content, indent=2, ensure_ascii=False, sort_keys=sort_keys) + "\n").encode()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file as `write_file` does."""
    write_file(path, [json_bytes(content)])


def check_not_lfs_pointer(path: Path) -> None:
    """Refuse what git leaves in place of a large file that was not downloaded.

    Raises:
        ConversionError: The file is a Git LFS pointer.
    """
    if is_lfs_pointer(path):
        raise ConversionError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder.")


def is_lfs_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(23) == b"version https://git-lfs"


def check_links(folder: Path) -> None:
    """Refuse a checkpoint whose files are links to places outside of it, which would be published with it.

    huggingface_hub's cache is allowed, where the files of a snapshot are links to blobs of the repository, or to blobs
    that repositories share.

    Raises:
        ConversionError: A file that the tools may read is such a link.
    """
    inside = folder.resolve()
    roots = [inside]
    if inside.parent.name == "snapshots":
        repository = inside.parent.parent
        roots += [repository / "blobs", repository.parent / "blobs"]
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix in _READ and path.is_symlink() and not any(root in path.resolve().parents for root in roots):
            raise ConversionError(f"{path} is a link to {path.resolve()}, outside of its folder: copy the file there.")


def hash_file(path: Path, *hashes: Any, progress: Callable[[int], object] | None = None) -> None:
    """Feed a file to hash objects of hashlib, reading it once; `progress` is called with the size of each block."""
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            for digest in hashes:
                digest.update(block)
            if progress is not None:
                progress(len(block))


@contextmanager
def _os_errors_of(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConversionError(
            f"{path.name} cannot be written to {path.parent} ({error.strerror}): make room or choose another "
            "target, then run the same command again; finished files are kept."
        ) from error


@contextmanager
def new_file(path: Path, times_of: Path | None = None) -> Iterator[IO[bytes]]:
    """Open a file that gets its name, replacing a file of that name, once its content is complete and on disk.

    Links in the place of either are replaced, never followed (CWE-59).

    Args:
        path: The file.
        times_of: A file whose modification time and permissions it gets.

    Raises:
        ConversionError: The file cannot be written. Nothing is left of it then, or after any other exception.
    """
    partial = path.with_name(path.name + PARTIAL)
    with _os_errors_of(path):
        try:
            partial.unlink(missing_ok=True)  # of an interrupted run
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
            with open(os.open(partial, flags, 0o666), "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if times_of is not None:
                shutil.copystat(times_of, partial)
            os.replace(partial, path)
            _sync_folder(path.parent)
        finally:
            with suppress(OSError):
                partial.unlink()


def _sync_folder(folder: Path) -> None:
    """Flush a rename to disk, where the system can (Windows cannot open folders)."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_file(path: Path, content: Iterable[bytes | memoryview], bar: Any = None) -> None:
    """Write a file as `new_file` does. A file (no link) that already exists must have the same content, and is kept.

    Raises:
        ConversionError: The file exists with other content (nothing is overwritten), or the disk is full.
    """
    if path.exists() and not path.is_symlink():
        with _os_errors_of(path), path.open("rb") as file:
            for chunk in content:
                if file.read(len(chunk)) != chunk:
                    raise _differs(path)
                _advance(bar, len(chunk))
            if file.read(1):
                raise _differs(path)
        return
    with new_file(path) as file:
        for chunk in content:
            file.write(chunk)
            _advance(bar, len(chunk))


def _differs(path: Path) -> ConversionError:
    return ConversionError(
        f"{path} exists already and is not what this conversion would write: choose an empty target folder, or delete "
        "that file."
    )


def _advance(bar: Any, count: int) -> None:
    if bar is not None:
        bar.update(count)


def read_chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def link_or_copy(source: Path, target: Path, bar: Any = None) -> None:
    """Hard-link a file, or copy it where that is impossible (another file system, Windows without the right).

    Args:
        source: The file; symbolic links, as in huggingface_hub's cache, are resolved.
        target: Its new name, which must be free.
        bar: A progress bar that is advanced by the bytes.
    """
    try:
        os.link(source.resolve(), target)
        _advance(bar, target.stat().st_size)
    except OSError:
        copy_file(source, target, bar)


def copy_file(source: Path, target: Path, bar: Any = None) -> None:
    """Copy a file and its modification time as `new_file` does; file systems that can share blocks do.

    Raises:
        ConversionError: There is no room, or the file cannot be written.
    """
    source, done = source.resolve(), 0
    with source.open("rb") as read, new_file(target, times_of=source) as write:
        if shutil.disk_usage(target.parent).free < source.stat().st_size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        while count := _copy_chunk(read, write, done):
            done += count
            _advance(bar, count)


def _copy_chunk(read: IO[bytes], write: IO[bytes], offset: int) -> int:
    """Copy up to `CHUNK_BYTES` from an offset; returns how many, 0 at the end."""
    try:  # Btrfs, XFS and others share the blocks instead of writing them again
        return os.copy_file_range(read.fileno(), write.fileno(), CHUNK_BYTES, offset, offset)
    except (AttributeError, OSError) as error:  # not on this system, or not between these two file systems
        if getattr(error, "errno", None) in DISK_FULL:
            raise
    read.seek(offset)
    write.seek(offset)
    count = write.write(read.read(CHUNK_BYTES))
    write.flush()
    return count
