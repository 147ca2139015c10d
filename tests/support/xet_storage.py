"""The storage behind the Hub, as the Xet protocol sees it: xorbs, which are blocks of chunks, and files made of them.

A client cuts files into chunks by their content, sends the chunks that are new in xorbs, then a shard, which says of
which ranges of chunks each file consists. Formats: https://huggingface.co/docs/xet (shard, xorb, api). Chunks must be
sent uncompressed, as HF_XET_XORB_COMPRESSION_POLICY=none makes the client do.
"""

import hashlib
import struct
from dataclasses import dataclass, field
from typing import Any, NamedTuple


ENTRY = struct.Struct("<32s4I")  # of every table of a shard
END = b"\xff" * 32  # the hash in the last entry of a table
HAS_VERIFICATION, HAS_SHA256 = 1 << 31, 1 << 30


class Term(NamedTuple):
    """A range of chunks of a xorb."""

    xorb: str
    start: int
    end: int
    size: int  # bytes of content


def as_text(digest: bytes) -> str:
    """A hash as it stands in paths and in JSON: four little-endian numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", digest))


@dataclass
class Storage:
    """Xorbs and files by hash; the content of files by SHA-256."""

    xorbs: dict[str, bytes] = field(default_factory=dict)
    files: dict[str, list[Term]] = field(default_factory=dict)
    ids: dict[str, str] = field(default_factory=dict)  # SHA-256 -> hash in `files`

    def add_shard(self, shard: bytes) -> dict[str, bytes]:
        """Register the files of a shard, whose xorbs must be here: their content by SHA-256.

        Raises:
            ValueError: A file's content does not have its SHA-256.
            KeyError: A xorb is missing.
        """
        at, added = 48, {}
        while True:
            digest, flags, count, *_ = ENTRY.unpack_from(shard, at)
            if digest == END:
                return added
            at += ENTRY.size
            entries = [ENTRY.unpack_from(shard, at + ENTRY.size * i) for i in range(count)]
            terms = [Term(as_text(xorb), start, end, size) for xorb, _, size, start, end in entries]
            at += ENTRY.size * count * (2 if flags & HAS_VERIFICATION else 1)
            if not flags & HAS_SHA256:
                raise ValueError("a file without SHA-256")
            sha256 = as_text(shard[at : at + 32])
            at += ENTRY.size
            added[sha256] = b"".join(self._content(term) for term in terms)
            if hashlib.sha256(added[sha256]).hexdigest() != sha256:
                raise ValueError("the content of a file does not have its SHA-256")
            self.files[as_text(digest)], self.ids[sha256] = terms, as_text(digest)

    def _bounds(self, xorb: str) -> list[int]:
        """Where each chunk of a xorb starts, and where the last one ends."""
        data, bounds = self.xorbs[xorb], [0]
        while bounds[-1] < len(data):
            header = data[bounds[-1] : bounds[-1] + 8]  # version, size, compression, size of the content
            if header[4]:
                raise ValueError("a compressed chunk")
            bounds.append(bounds[-1] + 8 + int.from_bytes(header[1:4], "little"))
        return bounds

    def _content(self, term: Term) -> bytes:
        bounds = self._bounds(term.xorb)[term.start : term.end + 1]
        return b"".join(self.xorbs[term.xorb][a + 8 : b] for a, b in zip(bounds, bounds[1:], strict=False))

    def reconstruction(self, file_id: str, url: str) -> dict[str, Any]:
        """How to put a file together: its terms, and where the bytes of their xorbs are, below `url`."""
        terms = self.files[file_id]
        fetch: dict[str, list[dict[str, Any]]] = {}
        for term in terms:
            bounds, span = self._bounds(term.xorb), {"start": term.start, "end": term.end}
            place = {"start": bounds[term.start], "end": bounds[term.end] - 1}  # inclusive
            fetch.setdefault(term.xorb, []).append({"range": span, "url": f"{url}/{term.xorb}", "url_range": place})
        parts = [{"hash": t.xorb, "unpacked_length": t.size, "range": {"start": t.start, "end": t.end}} for t in terms]
        return {"offset_into_first_range": 0, "terms": parts, "fetch_info": fetch}
