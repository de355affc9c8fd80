"""File systems that lack something: locks (flock answers ENOSYS or ENOTSUP), fsync of directories (EINVAL, ENOTSUP)."""

import errno
import fcntl
import os
import shutil
import stat
from threading import Timer
from types import SimpleNamespace

import pytest

from sftmix.cli import main
from sftmix.disk import cache
from sftmix.pipeline.lock import Hold
from sftmix.words.errors import ConfigError, InUseError, NoSpaceError
from tests.tiny import weights


def fails(code: int):
    def call(*_, **__):
        raise OSError(code, os.strerror(code))

    return call


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flock not supported")
def test_a_lock_that_a_killed_process_left_is_named(monkeypatch, tiny, tmp_path, capsys):
    """Where there are no locks, a file stands for one, and stays behind: who waits for it is told which it is."""
    monkeypatch.setattr(fcntl, "flock", fails(errno.ENOSYS))
    words = ["run", *tiny.options, "--out", str(tmp_path / "run"), "--training.max_steps", "2"]
    assert main([*words, "--data.cache_dir", str(tmp_path / "cache")]) == 0
    (tmp_path / "run" / ".lock").touch()
    capsys.readouterr()
    assert main(words) != 0
    assert f"{tmp_path / 'run' / '.lock'} of a killed one stays" in capsys.readouterr().err


@pytest.mark.parametrize(("umask", "others"), [(0o022, 0o044), (0o027, 0o040), (0o077, 0)])
def test_who_may_read_a_run_is_for_the_user_to_say(umask, others, tiny, tmp_path):
    """safetensors lets a file's owner alone read it, tempfile does so with a directory: a cache may be for several."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o1777)  # as /tmp: what is made in it is not so
    before = os.umask(umask)
    try:
        words = ["--data.cache_dir", str(tmp_path / "cache"), "--training.max_steps", "2", "--checkpoint.every", "2"]
        assert main(["run", *tiny.options, *words, "--out", str(tmp_path / "run")]) == 0
    finally:
        os.umask(before)
    written = [path for name in ("run", "cache") for path in (tmp_path / name).rglob("*")]
    assert {path.suffix for path in written} >= {".safetensors", ".json", ".arrow", ".parquet"}
    assert {path for path in written if path.stat().st_mode & 0o066 != others and path.name != ".lock"} == set()


def test_a_run_is_made_where_files_have_no_rights(monkeypatch, tiny, tmp_path):
    """As on file systems of Windows, where chmod answers EPERM."""
    monkeypatch.setattr(os, "chmod", fails(errno.EPERM))
    words = ["--data.cache_dir", str(tmp_path / "cache"), "--training.max_steps", "2", "--checkpoint.every", "2"]
    assert main(["run", *tiny.options, *words, "--out", str(tmp_path / "run")]) == 0
    assert weights(tmp_path / "run")


def test_a_run_is_held_where_locks_are_not_supported(monkeypatch, tmp_path):
    """As some file systems of networks answer: like ENOSYS, by a file that is there."""
    monkeypatch.setattr(fcntl, "flock", fails(errno.ENOTSUP))
    with Hold(tmp_path) as hold:
        hold.status()
        with (
            pytest.raises(InUseError, match=r"the file .*\.lock\.held of a killed one stays: delete it"),
            Hold(tmp_path),
        ):
            pass
    with Hold(tmp_path):
        pass


def test_who_waits_for_rows_says_for_what(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cache, "PATIENCE", 0.1)
    with (tmp_path / ".rows.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # as another process does
        Timer(0.5, held.close).start()
        cache.get_or_build(str(tmp_path), "rows", lambda _: {})
    assert f"waiting for a process that makes {tmp_path / 'rows'}" in capsys.readouterr().err


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP])
def test_a_directory_is_committed_where_none_can_be_synced(code, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "fsync", fails(code))
    assert cache.get_or_build(str(tmp_path), "rows", lambda _: {"n": 1})[1] == {"n": 1}


def test_another_error_of_the_disk_does_not_ask_for_space(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "fsync", fails(errno.EROFS))
    with pytest.raises(ConfigError, match=r"Read-only file system\. Mend that, or choose another place with"):
        cache.get_or_build(str(tmp_path), "rows", lambda _: {})


@pytest.mark.slow
def test_checkpoints_are_kept_where_no_directory_can_be_synced(monkeypatch, tiny, tmp_path):
    def fsync(descriptor, real=os.fsync):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            fails(errno.EINVAL)()
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    assert main(["run", *tiny.options, "--out", str(tmp_path / "run"), "--checkpoint.every", "2"]) == 0
    assert weights(tmp_path / "run")
    assert list((tmp_path / "run" / "train" / "checkpoints").glob("step-*"))


def test_without_checkpoints_the_model_must_have_room_before_it_is_trained(monkeypatch, tiny, tmp_path, capsys):
    """With them, the same command goes on when there is room again; without, all would be lost at the end."""
    usage = SimpleNamespace(total=1 << 40, used=1 << 40, free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    words = ["run", *tiny.options, "--checkpoint.every", "0", "--objective", "NTP", "--out", str(tmp_path / "run")]
    assert main(words) == NoSpaceError.exit_code
    assert "too little room for what is to be saved in" in capsys.readouterr().err
    assert not (tmp_path / "run" / "train" / "metrics.jsonl").exists()
