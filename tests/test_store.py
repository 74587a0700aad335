"""Output folders that appear whole or not at all."""

import os
import stat
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from kfac_prune import store
from kfac_prune.errors import InputError
from kfac_prune.store import check_output, load_artifact, new_folder, save_artifact


def tree(folder):
    """Every path below a folder, with the content of files."""
    return {
        path.relative_to(folder).as_posix(): path.read_text() if path.is_file() else None
        for path in Path(folder).rglob("*")
    }


@pytest.fixture
def old(tmp_path):
    """A folder with a result in it."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "precious").write_text("old")
    return folder


def fill(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "file").write_text("new")


# --- success ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["out", "a/b/out", "with space", ".hidden"])
def test_a_folder_appears_when_the_block_ends(tmp_path, name):
    target = tmp_path / name
    with new_folder(str(target), overwrite=False) as folder:
        fill(folder)
        assert not target.exists()
        assert folder.parent == target.parent  # the same file system, so that renaming is atomic
    assert tree(target) == {"sub": None, "sub/file": "new"}
    assert list(target.parent.iterdir()) == [target]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    with new_folder(str(tmp_path / "out"), overwrite=False) as folder:
        fill(folder)
    assert tree(tmp_path) == {"out": None, "out/sub": None, "out/sub/file": "new"}


def test_overwrite_replaces_the_whole_folder(old):
    with new_folder(str(old), overwrite=True) as folder:
        fill(folder)
        assert tree(old) == {"precious": "old"}
    assert tree(old.parent) == {"out": None, "out/sub": None, "out/sub/file": "new"}


def test_a_relative_path_means_the_present_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with new_folder("out", overwrite=False) as folder:
        fill(folder)
        monkeypatch.chdir("/")
    assert (tmp_path / "out" / "sub" / "file").is_file()


def test_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_output("~/out", overwrite=False) == tmp_path / "out"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_link_stays_and_its_folder_is_filled(tmp_path, overwrite):
    (tmp_path / "disk").mkdir()
    if overwrite:
        (tmp_path / "disk" / "old").write_text("old")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk")
    with new_folder(str(link), overwrite=overwrite) as folder:
        fill(folder)
    assert link.is_symlink()
    assert tree(tmp_path / "disk") == {"sub": None, "sub/file": "new"}
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "link"}


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002], ids=oct)
def test_permissions_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        with new_folder(str(tmp_path / "out"), overwrite=False) as folder:
            fill(folder)
            (folder / "sub" / "file").chmod(0o600)  # as safetensors writes them
    finally:
        assert os.umask(before) == umask  # and it is left as it was
    modes = {
        path.name: stat.S_IMODE(path.stat().st_mode) for path in [tmp_path / "out", *(tmp_path / "out").rglob("*")]
    }
    assert modes == {"out": 0o777 & ~umask, "sub": 0o777 & ~umask, "file": 0o666 & ~umask}


# --- failure ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_nothing(tmp_path, error):
    def work():
        with new_folder(str(tmp_path / "out"), overwrite=False) as folder:
            fill(folder)
            raise error

    with pytest.raises(error):
        work()
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_keeps_the_folder_that_was_to_be_replaced(old, error):
    def work():
        with new_folder(str(old), overwrite=True) as folder:
            fill(folder)
            raise error

    with pytest.raises(error):
        work()
    assert tree(old.parent) == {"out": None, "out/precious": "old"}


def test_a_failure_of_the_last_step_keeps_the_folder_that_was_to_be_replaced(old, monkeypatch):
    replace, calls = os.replace, []

    def second_fails(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("on purpose")
        replace(source, target)

    def work():
        with new_folder(str(old), overwrite=True) as folder:
            fill(folder)
            monkeypatch.setattr(store.os, "replace", second_fails)

    with pytest.raises(InputError, match=r"out cannot be written \(on purpose\)"):
        work()
    assert tree(old) == {"precious": "old"}
    assert list(old.parent.iterdir()) == [old]


@pytest.mark.parametrize("existed", [False, True], ids=["absent", "empty"])
def test_what_another_run_has_written_meanwhile_is_kept(tmp_path, existed):
    target = tmp_path / "out"
    if existed:
        target.mkdir()

    def work():
        with new_folder(str(target), overwrite=False) as folder:
            fill(folder)
            target.mkdir(exist_ok=True)
            (target / "precious").write_text("theirs")

    with pytest.raises(InputError, match="is not empty"):
        work()
    assert tree(tmp_path) == {"out": None, "out/precious": "theirs"}


# --- refusals before any work -----------------------------------------------------------------------------------


def refused(out, **options):
    """The message of the InputError, one line that names the folder; nothing may be created."""
    with pytest.raises(InputError) as caught:
        check_output(str(out), **({"overwrite": False} | options))
    assert f"--out {out}" in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_that_is_not_empty(old):
    assert "add --overwrite" in refused(old)
    with pytest.raises(InputError, match="is not empty"), new_folder(str(old), overwrite=False):
        pytest.fail("the block must not start")
    assert tree(old.parent) == {"out": None, "out/precious": "old"}
    assert check_output(str(old), overwrite=True) == old


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("used", ["here", "home"])
def test_a_folder_that_is_in_use(used, overwrite, tmp_path, monkeypatch):
    place = tmp_path / "a" / "b"
    place.mkdir(parents=True)
    if used == "here":
        monkeypatch.chdir(place)
    else:
        monkeypatch.setenv("HOME", str(place))
    for out in (place, tmp_path / "a"):
        message = refused(out, overwrite=overwrite)
        assert "current folder" in message or (not overwrite and "not empty" in message)
    assert check_output(str(place / "out"), overwrite=overwrite) == place / "out"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file(tmp_path, overwrite):
    (tmp_path / "file").write_text("text")
    assert "is a file" in refused(tmp_path / "file", overwrite=overwrite)
    assert f"{tmp_path / 'file'} is a file" in refused(tmp_path / "file" / "below" / "it", overwrite=overwrite)
    assert tree(tmp_path) == {"file": "text"}


def test_a_parent_that_cannot_be_written(tmp_path, monkeypatch):
    asked = []

    def access(path, mode):
        asked.append((Path(path), mode))
        return False

    monkeypatch.setattr(store.os, "access", access)
    assert f"no permission to write in {tmp_path}" in refused(tmp_path / "a" / "b")
    assert asked == [(tmp_path, os.W_OK | os.X_OK)]


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_a_parent_without_permissions(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0)
    try:
        assert "cannot be created" in refused(closed / "out")
        assert "cannot be created" in refused(closed / "a" / "out")
    finally:
        closed.chmod(0o700)


def test_a_parent_that_cannot_even_be_looked_into(tmp_path, monkeypatch):
    def exists(self, **options):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "exists", exists)
    assert "Permission denied" in refused(tmp_path / "out")


@pytest.mark.parametrize("out", ["x" * 300, "~no-such-user-here/out"], ids=["long", "user"])
def test_a_name_that_cannot_be(out):
    assert "cannot be created" in refused(out)


def test_a_mount_point_cannot_be_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "is_mount", lambda self: self == tmp_path)
    assert "mount point" in refused(tmp_path)
    assert check_output(str(tmp_path / "below"), overwrite=False) == tmp_path / "below"


def test_too_little_room(tmp_path, monkeypatch):
    usage = namedtuple("usage", ["total", "used", "free"])
    asked = []

    def disk_usage(path):
        asked.append(Path(path))
        return usage(10_000_000_000, 8_500_000_000, 1_500_000_000)

    monkeypatch.setattr(store.shutil, "disk_usage", disk_usage)
    message = refused(tmp_path / "a" / "out", need_bytes=1_500_000_001)
    assert message.count("1.50 GB") == 2
    assert check_output(str(tmp_path / "a" / "out"), overwrite=False, need_bytes=1_500_000_000)
    assert set(asked) == {tmp_path}
    assert tree(tmp_path) == {}


def test_only_what_runs_left_is_cleared(tmp_path):
    work = store.work_folder(str(tmp_path / "out"))
    store.clear_work(str(tmp_path / "out"))  # there is none
    work.mkdir()
    (work / "notes.txt").write_text("mine")
    for name in ("reconstruction-0000-a.safetensors", "reconstruction-0001-b.partial"):
        (work / name).touch()
    store.clear_work(str(tmp_path / "out"))
    assert [file.name for file in work.iterdir()] == ["notes.txt"]
    (work / "notes.txt").unlink()
    store.clear_work(str(tmp_path / "out"))
    assert not work.exists()


def test_an_artefact_may_hold_views_of_one_tensor(tmp_path):
    whole = torch.arange(6.0).reshape(2, 3)
    save_artifact(tmp_path / "file.safetensors", {"whole": whole, "row": whole[1], "same": whole}, key="k", record={})
    tensors, _ = load_artifact(tmp_path / "file.safetensors", "k")
    assert torch.equal(tensors["whole"], whole)
    assert torch.equal(tensors["row"], whole[1])
    assert torch.equal(tensors["same"], whole)


def test_a_write_that_was_killed_leaves_nothing_for_good(tmp_path):
    """safetensors writes to a name of its own in the same folder, which a killed process leaves behind."""
    work = store.work_folder(str(tmp_path / "out"))
    save_artifact(work / "plan-one.safetensors", {"x": torch.ones(2)}, key="k", record={})
    (work / ".tmpd5C1gq").touch()
    store.clear_work(str(tmp_path / "out"))
    assert not work.exists()
