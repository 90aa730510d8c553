"""A folder of prefixes: its content, its owner, and checks that nothing was changed since it was written.

`index.json` names the files by their digests, and has a digest of its own. Tensors are in safetensors files that are never
written again. The index is replaced last, so a reader finds either the old content or the new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from gdnfuse.errors import GdnfuseError, one_line
from gdnfuse.files import replacing
from gdnfuse.generation.prefix_tree import BLOCK, TOKEN, Node, Read

FORMAT, INDEX = "gdnfuse.prefixes/2", "index.json"
BYTES_OF_A_FILE = 1 << 30


def check_writable(folder: str | os.PathLike[str]) -> tuple[Path, set[str]]:
    """A folder that prefixes can be saved to, and the files that its index names. Nothing is changed.

    Raises:
        GdnfuseError: it is not a folder, its index is of another kind, or no files can be made in it.
    """
    folder = _path(folder)
    try:
        before = _files_of(folder)
        there = next(x for x in (folder.absolute(), *folder.absolute().parents) if x.exists())
        if not there.is_dir():
            raise GdnfuseError(f"Prefixes must be written to a folder, found that {there} is a file.")
        tempfile.TemporaryFile(dir=there).close()
    except OSError as e:
        raise GdnfuseError(f"Prefixes must be written to a folder, found {one_line(e)}.") from e
    return folder, before


def write(folder: str | os.PathLike[str], owner: dict[str, str], entries: Sequence[Read]) -> None:
    """Save entries with all blocks before them.

    Args:
        folder: created if missing. If it exists, its index and the files of the index are replaced. Other files stay.
        owner: what a reader must be.
        entries: in the order in which they will be read.

    Raises:
        GdnfuseError: the folder cannot be written, or its index is of another kind. The old content is complete then.
    """
    from safetensors.torch import save_file

    folder, before = check_writable(folder)
    nodes: dict[Node, int] = {}
    for entry in entries:
        for node in entry.nodes:
            nodes.setdefault(node, len(nodes))
    body: dict[str, Any] = {"format": FORMAT, "owner": owner, "files": [], "nodes": [], "entries": []}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise GdnfuseError(f"Prefixes must be written to a folder, found {one_line(e)}.") from e
    partial = folder / f".{os.getpid()}.{threading.get_ident()}.safetensors"
    try:
        for tensors in _by_file(nodes, entries):
            save_file({name: x.contiguous().cpu() for name, x in tensors.items()}, partial)
            digest = _digest_of(partial)
            name = f"{digest[:32]}.safetensors"
            partial.replace(folder / name)
            body["files"].append({"name": name, "sha256": digest, "tensors": sorted(tensors)})
        for node in nodes:
            body["nodes"].append(nodes.get(node.parent, -1))
        for entry in entries:
            body["entries"].append([nodes[entry.nodes[-1]] if entry.nodes else -1, len(entry.tail) // TOKEN, len(entry.states)])
        text = json.dumps(body, indent=1, sort_keys=True)
        with replacing(folder / INDEX) as file:
            file.write_text(json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "body": text}))
        gone = before - {file["name"] for file in body["files"]}
    except BaseException as e:
        gone = {file["name"] for file in body["files"]} - before
        if isinstance(e, Exception) and not isinstance(e, GdnfuseError):  # an error of the file system or of safetensors
            raise GdnfuseError(f"Prefixes must be written to {folder}, found {one_line(e)}.") from e
        raise
    finally:
        for name in (partial.name, *gone):
            (folder / name).unlink(missing_ok=True)


class Saved:
    """States that were saved, as a `prefix_tree.Source`."""

    def __init__(
        self,
        tokens: bytes,
        get: Callable[[str], torch.Tensor],
        place: Callable[[torch.Tensor], torch.Tensor],
        nodes: list[int],
        entry: int,
        states: int,
    ):
        self.tokens, self._get, self._place, self._nodes, self._entry = tokens, get, place, nodes, entry
        self._states = [f"entry.{entry}.state.{i}" for i in range(states)]
        self.state_bytes = sum(get(name).nbytes for name in self._states)
        block = [get(f"node.{nodes[0]}.block").nbytes // BLOCK] if nodes else []
        rest = len(tokens) // TOKEN - len(nodes) * BLOCK
        self.token_bytes = (block or [get(f"entry.{entry}.rest").nbytes // rest])[0]

    def blocks(self, first: int, last: int) -> list[torch.Tensor]:
        return [self._place(self._get(f"node.{n}.block")) for n in self._nodes[first:last]]

    def rest(self, first: int, last: int) -> torch.Tensor:
        return self._place(self._get(f"entry.{self._entry}.rest"))

    def states(self) -> tuple[torch.Tensor, ...]:
        return tuple(self._place(self._get(name)) for name in self._states)


@contextlib.contextmanager
def reading(
    folder: str | os.PathLike[str], owner: Callable[[], dict[str, str]], device: torch.device
) -> Iterator[Iterable[Saved]]:
    """The content of a folder, in the order in which it was saved. First everything is checked to be unchanged.

    Args:
        folder: a folder that was saved to.
        owner: returns what the owner of the folder must be. It is called only if there is a folder, because it digests weights.
        device: the device to put tensors on.

    Raises:
        GdnfuseError: there is no such folder, it has another owner, or a file is missing, cut short or changed.
    """
    from safetensors import safe_open

    folder = _path(folder)
    body, owner = _body_of(folder), owner()
    for name in {**owner, **body["owner"]}:
        wanted, found = owner.get(name), body["owner"].get(name)
        if found != wanted:
            found = f"{name} {found}" if name != "weights" else "other weights or adapters"
            raise GdnfuseError(f"The prefixes in {folder} must be of this model, with {name} {wanted}, found {found}.")
    with contextlib.ExitStack() as stack:
        where: dict[str, Any] = {}
        try:
            for file in body["files"]:
                if _digest_of(folder / file["name"]) != file["sha256"]:
                    found = f"{file['name']} cut short or changed"
                    raise GdnfuseError(f"The prefixes in {folder} must be as they were saved, found {found}: save them again.")
                opened = stack.enter_context(safe_open(folder / file["name"], "pt"))
                where |= dict.fromkeys(file["tensors"], opened)
        except OSError as e:
            raise GdnfuseError(f"The prefixes in {folder} must be readable, found {one_line(e)}.") from e

        def get(name: str) -> torch.Tensor:
            return where[name].get_tensor(name)

        def place(x: torch.Tensor) -> torch.Tensor:
            return x.to(device, copy=True)  # without a copy it may be memory of the file

        def saved() -> Iterator[Saved]:
            paths: list[list[int]] = []
            keys: list[bytes] = []
            for i, parent in enumerate(body["nodes"]):
                paths.append([*(paths[parent] if parent >= 0 else []), i])
                keys.append((keys[parent] if parent >= 0 else b"") + _tokens(where[f"node.{i}.tokens"], f"node.{i}.tokens"))
            for i, (node, tail, states) in enumerate(body["entries"]):
                tokens = keys[node] if node >= 0 else b""
                tokens += _tokens(where[f"entry.{i}.tail"], f"entry.{i}.tail") if tail else b""
                yield Saved(tokens, get, place, paths[node] if node >= 0 else [], i, states)

        yield saved()


def _by_file(nodes: dict[Node, int], entries: Sequence[Read]) -> Iterator[dict[str, torch.Tensor]]:
    """All tensors by name, in groups that fit in one file."""
    tensors: dict[str, torch.Tensor] = {}
    size, blocks = 0, {node: block for entry in entries for node, block in zip(entry.nodes, entry.blocks, strict=True)}
    of_nodes = ({f"node.{i}.tokens": _as_tensor(node.key), f"node.{i}.block": blocks[node]} for node, i in nodes.items())
    for more in (*of_nodes, *map(_of_entry, enumerate(entries))):
        if tensors and size + sum(x.nbytes for x in more.values()) > BYTES_OF_A_FILE:
            yield tensors
            tensors, size = {}, 0
        tensors |= more
        size += sum(x.nbytes for x in more.values())
    if tensors:
        yield tensors


def _of_entry(item: tuple[int, Read]) -> dict[str, torch.Tensor]:
    i, entry = item
    tensors = {f"entry.{i}.state.{j}": x for j, x in enumerate(entry.states)}
    if entry.tail:
        tensors |= {f"entry.{i}.tail": _as_tensor(entry.tail), f"entry.{i}.rest": entry.rest}
    return tensors


def _as_tensor(tokens: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(tokens), dtype=torch.int64)


def _tokens(opened: Any, name: str) -> bytes:
    return opened.get_tensor(name).numpy().tobytes()


def _digest_of(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _body_of(folder: Path) -> dict[str, Any]:
    index = folder / INDEX
    try:
        text = index.read_text()
    except (OSError, UnicodeDecodeError) as e:
        raise GdnfuseError(f"Prefixes must be read from a folder that they were saved to, found {one_line(e)}.") from e
    try:
        found = json.loads(text)
        body = json.loads(found["body"])
        if body["format"] == FORMAT and hashlib.sha256(found["body"].encode()).hexdigest() == found["sha256"]:
            return body
        why = "other contents" if body["format"] == FORMAT else f"the format {body['format']}"
    except (ValueError, KeyError, TypeError):
        why = "something else"
    raise GdnfuseError(f"{index} must be an index of prefixes as {FORMAT} writes it, found {why}: save them again.")


def _path(folder: Any) -> Path:
    name = os.fspath(folder) if isinstance(folder, (str, os.PathLike)) else None
    if not isinstance(name, str) or not name or "\0" in name:
        raise GdnfuseError(f"A folder of prefixes must be named by a path, found {folder!r}.")
    return Path(folder)


def _files_of(folder: Path) -> set[str]:
    """The files that an old index names."""
    return {file["name"] for file in _body_of(folder)["files"]} if (folder / INDEX).exists() else set()
