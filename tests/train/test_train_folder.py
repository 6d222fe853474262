"""The folder of a training, whose end may be cut short: it is never taken for another's, nor gone on with."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from entmtp.common.errors import ModelError
from entmtp.train import folder


def fill(work: Path) -> None:
    folder.check(work)
    folder.begin(work, "mine")
    (work / "text-000.npz").write_bytes(b"text")
    (work / "heads" / "deep").mkdir(parents=True)
    (work / "heads" / "checkpoint.safetensors").write_bytes(b"heads")
    (work / "states.hidden").write_bytes(b"states")


def removed_by_one_who_dies(work: Path, at: int) -> bool:
    """Whether it was all removed before the `at`-th change of the disk, at which the process ends."""
    child = os.fork()
    if child == 0:
        left = at

        def dies(event: str, args: object) -> None:
            nonlocal left
            if event in ("os.remove", "os.rmdir", "os.rename"):
                if left == 0:
                    os._exit(9)
                left -= 1

        sys.addaudithook(dies)
        try:
            folder.remove(work)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork, in which to die, on Windows")
def test_a_removal_that_is_cut_short(tmp_path: Path) -> None:
    """At every step: the next training of whatever kind begins anew, in an empty folder."""
    for at in range(20):
        work = tmp_path / str(at)
        fill(work)
        done = removed_by_one_who_dies(work, at)
        assert done is not work.exists()
        if done:
            break
        whole = (work / "texts.digest").is_file() and (work / "texts.digest").read_text() == "mine\n"
        assert whole is (at == 0)
        folder.check(work)
        folder.begin(work, "mine" if whole else "another")
        assert whole or [p.name for p in work.iterdir()] == ["texts.digest"]
        folder.remove(work)
        assert not work.exists()
    assert at > 7


def test_whose_folder_it_is(tmp_path: Path) -> None:
    work = tmp_path / "work"
    fill(work)
    folder.begin(work, "mine")
    assert folder.n_bytes(work) == 4 + 5 + 6 + 5
    with pytest.raises(ModelError, match="texts in it belong to another training"):
        folder.begin(work, "another")
    folder.begin(work, "another", restart=True)
    assert [p.name for p in work.iterdir()] == ["texts.digest"]
    (work / "texts.digest").unlink()
    (work / "thesis").mkdir()
    with pytest.raises(ModelError, match="files of others"):
        folder.check(work)
    with pytest.raises(ModelError, match="this is a file"):
        (tmp_path / "file").touch()
        folder.check(tmp_path / "file")


@pytest.mark.skipif(os.name == "nt", reason="Windows makes links for administrators alone")
def test_a_folder_on_another_disk(tmp_path: Path) -> None:
    """A link to one stays, and so does what a link in it leads to."""
    disk, work = tmp_path / "disk", tmp_path / "work"
    disk.mkdir()
    (tmp_path / "mine").mkdir()
    work.symlink_to(disk)
    fill(work)
    (work / "link").symlink_to(tmp_path / "mine")
    folder.remove(work)
    assert work.is_symlink() and list(disk.iterdir()) == [] and (tmp_path / "mine").is_dir()
    fill(work)
