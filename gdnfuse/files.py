"""Files that the user names: checked before any work, and replaced as a whole or not at all."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gdnfuse.errors import GdnfuseError


def check_writable(file: Path) -> None:
    """Raise before any work if the file cannot be written. Nothing is changed."""
    if file.is_dir():
        raise GdnfuseError(f"Cannot write {file}: it is a folder.")
    if file.exists() and not file.is_file():
        raise GdnfuseError(f"Cannot write {file}: it is not a regular file.")
    folder = file.resolve().parent
    if not folder.is_dir():
        raise GdnfuseError(f"Cannot write {file}: there is no folder {file.parent}.")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise GdnfuseError(f"Cannot write {file}: {e.strerror}.") from e


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A temporary file to write to. It replaces the file when everything is written. A symbolic link stays a link."""
    target = file.resolve()
    own = f"{os.getpid()}.{threading.get_ident()}"
    partial = target.with_name(f".{target.stem}.{own}{target.suffix}")  # the suffix decides the format of a plot
    try:
        yield partial
        partial.replace(target)
    except OSError as e:
        raise GdnfuseError(f"Cannot write {file}: {e.strerror}.") from e
    finally:
        partial.unlink(missing_ok=True)
