"""Output folders and artefacts of single stages, which appear whole or not at all."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kfac_prune.errors import InputError

#: What to say of a folder that may not be replaced, and of one that is not even with --overwrite.
OCCUPIED = "exists and is not empty; choose another folder, or add --overwrite"
FOREIGN = "is not empty and holds no kfac_prune.json, and --overwrite replaces only results; choose another folder"


def check_output(out: str, *, overwrite: bool, need_bytes: int = 0, occupied: str = OCCUPIED) -> Path:
    """Make sure, before long work, that a folder can be written.

    Args:
        out: the folder.
        overwrite: an existing non-empty folder may be replaced.
        need_bytes: that must be free on its file system.
        occupied: what to say where it is not empty and may not be replaced, and what to do.

    Returns:
        Its absolute path.

    Raises:
        InputError: it exists, is a file, cannot be created, or the disk is too full.
    """
    if not out.strip():
        raise InputError("--out is empty; say which folder to use")
    try:
        target = Path(out).expanduser().resolve()  # a link to a folder: that folder is written, the link stays
        if target.exists() and not target.is_dir():
            raise InputError(f"--out {out} is a file; name a folder")
        if target.is_dir() and any(target.iterdir()) and not overwrite:
            raise InputError(f"--out {out} {occupied}")
        if target.is_mount():
            raise InputError(f"--out {out} is a mount point, which cannot be replaced; name a folder below it")
        if any(used.resolve().is_relative_to(target) for used in (Path.cwd(), Path(os.path.expanduser("~")))):
            raise InputError(f"--out {out} is or holds the current folder or your home; name a folder below it")
        parent = target.parent
        while not parent.exists():
            parent = parent.parent
    except (OSError, RuntimeError) as error:  # no permission to look, a name that is too long, no such ~user
        raise InputError(f"--out {out} cannot be created: {error}") from error
    if not parent.is_dir():
        raise InputError(f"--out {out} cannot be created: {parent} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"--out {out} cannot be created: no permission to write in {parent}")
    free = shutil.disk_usage(parent).free
    if free < need_bytes:
        raise InputError(
            f"--out {out} needs about {need_bytes / 1e9:.2f} GB, and {parent} has {free / 1e9:.2f} GB free; make room"
        )
    return target


def earlier_result(out: str, names: Sequence[str]) -> bool:
    """A folder holds the first of some names, and nothing that fits none: what a command replaces without being told.

    Args:
        out: the folder.
        names: shell patterns; the first is a name.
    """
    try:
        found = {path.name for path in Path(out).expanduser().iterdir()}
    except (OSError, RuntimeError):  # no such folder; ``check_output`` tells what is wrong with others
        return False
    return names[0] in found and all(any(fnmatch.fnmatchcase(one, name) for name in names) for one in found)


def check_apart(out: str, inputs: Mapping[str, str | None]) -> None:
    """A folder that is written neither is nor holds an input of the run, nor lies within one.

    Args:
        out: the folder, which ``check_output`` has accepted.
        inputs: sources by the option that names them; those that are no file or folder here do not matter.
    """
    target = Path(out).expanduser().resolve()
    for name, source in inputs.items():
        path = os.path.expanduser(source or "")
        if not source or not os.path.exists(path):
            continue
        if Path(path).resolve().is_relative_to(target):
            raise InputError(f"--out {out} is or holds the {name} {source}, which would be lost; choose another folder")
        if target.is_relative_to(Path(path).resolve()):
            raise InputError(f"--out {out} lies within the {name} {source}; choose a folder outside of it")


#: Names with which the files of a work folder begin; a plan goes before the layers that it refers to.
STAGES = ("plan", "shrink", "reconstruction")


def work_folder(out: str) -> Path:
    """Where a run that writes to ``out`` leaves what it has finished, until ``out`` is complete."""
    target = Path(out).expanduser().resolve()
    return target.with_name(f"{target.name}.work")


def work_left(out: str) -> list[Path]:
    """The finished parts that runs that write to ``out`` have left, a plan before the layers that it refers to."""
    return [file for stage in STAGES for file in sorted(work_folder(out).glob(f"{stage}-*.safetensors"))]


def clear_work(out: str) -> None:
    """Remove what runs that write to ``out`` have left in its work folder, and nothing else that may lie there."""
    folder = work_folder(out)
    if folder.is_dir():
        partial = [file for stage in STAGES for file in folder.glob(f"{stage}-*.partial")]
        for file in (*work_left(out), *partial):  # in order, should this be interrupted
            file.unlink()
        for file in folder.glob(".tmp??????"):  # safetensors writes there first; one is left when it is killed
            file.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()


@contextmanager
def new_folder(out: str, *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside ``out`` that becomes ``out`` when the block ends well, and vanishes when it fails.

    A folder that is replaced stays as it was until the new one is complete.

    Raises:
        InputError: it cannot be written.
    """
    target = check_output(out, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        work.chmod(0o777 & ~_umask())
        yield work
        for file in work.rglob("*"):  # some writers leave files that only their owner can read
            file.chmod((0o777 if file.is_dir() else 0o666) & ~_umask())
        check_output(str(target), overwrite=overwrite)  # another run may have filled it meanwhile
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
            os.replace(target, old)
            try:
                os.replace(work, target)
            except OSError:
                os.replace(old, target)
                raise
            shutil.rmtree(old)
        else:
            os.replace(work, target)
    except (OSError, SafetensorError) as error:
        raise cannot_write(target, error) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def cannot_write(path: Path, error: Exception) -> InputError:
    """What to say of a disk that is full, or gone, when a result is due."""
    return InputError(
        f"{path} cannot be written ({error}); what was there is as before. See to the disk; what was finished is not "
        "lost: a prune that is started again with --resume goes on from there"
    )


def save_artifact(path: Path, tensors: Mapping[str, Tensor], *, key: str, record: Mapping[str, Any]) -> None:
    """Write what a stage has made: tensors and figures, with the key of what they come from and a content hash.

    Args:
        path: a .safetensors file; its folder is made.
        tensors: by name.
        key: says which run and which part of it this is.
        record: figures that JSON can hold.

    Raises:
        InputError: it cannot be written.
    """
    whole: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in storages:  # safetensors refuses two tensors in one storage
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        whole[name] = tensor
    metadata = {"key": key, "record": json.dumps(record)}
    metadata["sha256"] = _artifact_hash(whole, metadata["record"])
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(whole, partial, metadata=metadata)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise cannot_write(path, error) from error


def load_artifact(path: Path, key: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What ``save_artifact`` has written; None if there is no such file.

    Raises:
        InputError: the file is broken, or has another key.
    """
    if not path.exists():
        return None
    remedy = "run with --overwrite instead of --resume"
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        found, record, content = metadata["key"], json.loads(metadata["record"]), metadata["sha256"]
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:  # RecursionError among the last
        raise InputError(f"{path} is broken ({type(error).__name__}: {error}); {remedy}") from error
    if found != key:
        raise InputError(f"{path} is from another run: other model, data or options; {remedy}")
    if content != _artifact_hash(tensors, metadata["record"]):
        raise InputError(f"{path} is broken (its content does not have the hash that it states); {remedy}")
    return tensors, record


@dataclass(frozen=True)
class Journal:
    """The finished parts of a stage, from which a run that was interrupted goes on.

    Attributes:
        folder: of the artefacts.
        stage: name of the stage, with which their file names begin.
        key: of the run: a hash of all that decides the result.
    """

    folder: Path
    stage: str
    key: str

    def _path(self, part: str) -> Path:
        return self.folder / f"{self.stage}-{part.replace(' ', '-')}.safetensors"

    def read(self, part: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What ``write`` left of a part; None if it was not finished. Errors as ``load_artifact``."""
        return load_artifact(self._path(part), f"{self.key} {part}")

    def has(self, part: str) -> bool:
        """Whether ``write`` has left a part, of this run or another."""
        return self._path(part).exists()

    def drop_others(self) -> int:
        """Remove the stage's parts of other runs, and say how many there were; broken ones stay, to be refused."""
        others = []
        for path in sorted(self.folder.glob(f"{self.stage}-*.safetensors")):
            with suppress(SafetensorError, OSError), safe_open(path, framework="pt") as file:
                if not (file.metadata() or {}).get("key", "").startswith(f"{self.key} "):
                    others.append(path)
        for path in others:
            path.unlink()
        return len(others)

    def write(self, part: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Leave a part that is finished."""
        save_artifact(self._path(part), tensors, key=f"{self.key} {part}", record=record)


class Ledger:
    """Finished rows in a file of JSON lines, of which the first says what they belong to; rows are only ever added.

    The file is replaced as a whole, so that it is never left half written.

    Args:
        path: of the file; it need not exist.

    Attributes:
        header: the first line, or None.
        rows: all others.

    Raises:
        InputError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header: dict[str, Any] | None = None
        self.rows: list[dict[str, Any]] = []
        if not path.exists():
            return
        try:
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            if not all(isinstance(line, dict) for line in lines):
                raise ValueError("a line is not an object")
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path} cannot be read ({error}); move it away, or add --overwrite") from error
        if lines:
            self.header, *self.rows = lines

    def begin(self, header: dict[str, Any]) -> None:
        """A new file with a header alone, in the place of any other."""
        self.header, self.rows = header, []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._write()

    def add(self, row: dict[str, Any]) -> None:
        """Put a row behind the others; it is on disk when this returns."""
        self.rows.append(row)
        self._write()

    def _write(self) -> None:
        partial = self.path.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in (self.header, *self.rows))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.path)


def _artifact_hash(tensors: Mapping[str, Tensor], record: str) -> str:
    return hashlib.sha256(f"{content_hash(tensors)} {record}".encode()).hexdigest()


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
