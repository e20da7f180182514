"""Journal: a JSON-lines file that is only appended to, and that a resumed run cuts back to where its checkpoint was."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from normkit.vocabulary.record import encode_line


class Journal:
    """Every line is one write without a buffer, so that a kill -9 loses at most half of the last one."""

    def __init__(self, path: Path):
        self.path = path
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115  closed by close(): it lives as long as the run

    @property
    def offset(self) -> int:
        """Bytes so far."""
        return os.fstat(self.file.fileno()).st_size

    def append(self, line: dict[str, Any]) -> None:
        self.file.write(encode_line(line))

    def cut(self, offset: int) -> None:
        """Drops everything behind a checkpoint's offset: the resumed run writes it again."""
        os.ftruncate(self.file.fileno(), offset)

    def sync(self) -> None:
        """Makes what was appended survive a power cut, so that a checkpoint never points behind the end of the file."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()
