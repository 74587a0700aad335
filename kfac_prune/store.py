"""Output folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kfac_prune.errors import InputError


def check_output(out: str, *, overwrite: bool, need_bytes: int = 0) -> Path:
    """Make sure, before long work, that a folder can be written.

    Args:
        out: the folder.
        overwrite: an existing non-empty folder may be replaced.
        need_bytes: that must be free on its file system.

    Returns:
        Its absolute path.

    Raises:
        InputError: it exists, is a file, cannot be created, or the disk is too full.
    """
    try:
        target = Path(out).expanduser().resolve()  # a link to a folder: that folder is written, the link stays
        if target.exists() and not target.is_dir():
            raise InputError(f"--out {out} is a file; name a folder")
        if target.is_dir() and any(target.iterdir()) and not overwrite:
            raise InputError(f"--out {out} exists and is not empty; choose another folder, or add --overwrite")
        if target.is_mount():
            raise InputError(f"--out {out} is a mount point, which cannot be replaced; name a folder below it")
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


@contextmanager
def new_folder(out: str, *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside ``out`` that becomes ``out`` when the block ends well, and vanishes when it fails.

    A folder that is replaced stays as it was until the new one is complete.
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
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
