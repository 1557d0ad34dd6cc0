"""Files and folders appear whole or not at all, on whatever disk."""

import errno
import fcntl
import os
import shutil
from pathlib import Path

import pytest

from pipeline.files import only_run_in, read_manifest, refuse_another, whole_folder, write_manifest, write_whole
from pipeline.script import script


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "folder"
    with whole_folder(target) as fresh:
        (fresh / "a").write_text("first")
        assert not target.exists()
    with pytest.raises(KeyError), whole_folder(target) as fresh:
        (fresh / "a").write_text("second")
        raise KeyError
    assert (target / "a").read_text() == "first" and os.listdir(tmp_path) == ["folder"]


def test_a_kill_between_the_last_two_renames_is_mended_by_the_next_call(tmp_path):
    (tmp_path / ".folder.old").mkdir()
    (tmp_path / ".folder.old" / "a").write_text("first")
    (tmp_path / ".folder.new").mkdir()
    with pytest.raises(KeyError), whole_folder(tmp_path / "folder"):
        assert (tmp_path / "folder" / "a").read_text() == "first"
        raise KeyError
    assert (tmp_path / "folder" / "a").read_text() == "first"


def test_what_a_link_points_to_is_replaced(tmp_path):
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    with whole_folder(tmp_path / "link") as fresh:
        assert fresh.parent == tmp_path / "disk"  # a rename does not cross disks
        (fresh / "a").write_text("new")
    write_whole(tmp_path / "link" / "b", "text")
    assert (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path / "disk" / "real")) == ["a", "b"] and os.listdir(tmp_path / "disk") == ["real"]


def test_a_manifest_knows_every_file(tmp_path):
    (tmp_path / "a").write_text("one")
    assert read_manifest(tmp_path) == ({}, ["unfinished"])
    write_manifest(tmp_path, {"run": 1})
    assert read_manifest(tmp_path)[1] == []
    (tmp_path / "a").write_text("two")
    assert read_manifest(tmp_path)[1] == ["a"]


def test_each_difference_to_another_run_is_named_also_what_that_one_lacks(capsys):
    refuse_another("it", {"rate": 1, "gone": 2}, {"rate": 1}, "")
    with pytest.raises(SystemExit):
        refuse_another("it", {"rate": 1, "gone": 2}, {"rate": 3, "lora_r": 8}, "mend it")
    differences = "(rate 1 there, 3 now; lora r unknown there, 8 now)"
    assert capsys.readouterr().err == f"error: it is of another run {differences}: mend it\n"


def test_a_hash_is_named_by_what_it_stands_for_and_going_on_is_offered_only_where_settings_alone_differ(capsys):
    old = {"train rows": "a" * 32, "validation rows": "b" * 32, "examples": 6, "tokenizer": "c" * 16, "rate": 1}
    for changes, said in (
        ({"rate": 2}, "(rate 1 there, 2 now): resume it, or mend it"),
        ({"train rows": "d" * 32, "validation rows": "e" * 32, "examples": 4},
         "(the data set was built again; examples 6 there, 4 now): mend it"),
        ({"tokenizer": "d" * 16}, "(the tokenizer or its chat template is another one): mend it"),
        ({"chat_template": "d" * 16}, f"(chat template unknown there, {'d' * 16} now): resume it, or mend it"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            refuse_another("it", old, old | changes, "mend it", "resume it, or ")
        assert capsys.readouterr().err == f"error: it is of another run {said}\n"


def test_what_an_earlier_run_left_and_cannot_be_removed_is_said_before_the_work(tmp_path, monkeypatch, capsys):
    (tmp_path / "merged").mkdir()
    (tmp_path / ".merged.old").mkdir()
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors=False: None)
    with pytest.raises(SystemExit), whole_folder(tmp_path / "merged"):
        pytest.fail("the work began")
    assert ".merged.old, which was left by an earlier run, cannot be removed" in capsys.readouterr().err


def test_a_link_to_a_disk_that_is_not_there_is_refused_before_the_work(tmp_path, capsys):
    (tmp_path / "adapter").symlink_to(tmp_path / "disk" / "adapter")
    with pytest.raises(SystemExit), whole_folder(tmp_path / "adapter"):
        pytest.fail("the work began")
    assert f"adapter is a link into {tmp_path}/disk, which is not there: mount that disk" in capsys.readouterr().err
    assert not (tmp_path / "disk").exists()


def test_a_link_to_what_is_not_there_yet_is_followed(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    with pytest.raises(FileNotFoundError), only_run_in(tmp_path / "link"):
        pytest.fail("a disk that is not there was taken for a folder")
    (tmp_path / "disk").mkdir()
    with only_run_in(tmp_path / "link"):
        write_whole(tmp_path / "link" / "a", "text")
    assert (tmp_path / "disk" / "real" / "a").read_text() == "text"


def refusing(number):
    def refuse(*arguments, **options):
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.EPERM])
def test_a_mount_without_locks_and_fsync_takes_a_run_with_one_warning(number, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fcntl, "flock", refusing(number))
    monkeypatch.setattr(os, "fsync", refusing(number))
    with only_run_in(tmp_path / "out"):
        warned = capsys.readouterr().out  # before any work
        with whole_folder(tmp_path / "out" / "dataset") as fresh:
            (fresh / "rows").write_text("rows")
        write_whole(tmp_path / "out" / "report.json", "{}")
    assert warned.count("warning:") == 1 and f"{tmp_path}/out has no locks and no fsync" in warned
    assert capsys.readouterr().out == ""
    assert (tmp_path / "out" / "dataset" / "rows").read_text() == "rows"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["dataset", "report.json"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_loses_what_is_written_is_no_mount_without_fsync(number, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", refusing(number))
    with pytest.raises(OSError, match=os.strerror(number)):
        write_whole(tmp_path / "report.json", "{}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call, number", [("mkdir", errno.EACCES), ("open", errno.EACCES), ("rename", errno.ENOSYS)])
def test_a_folder_that_cannot_take_a_result_is_named_before_the_work(call, number, tmp_path, monkeypatch, capsys):
    @script
    def main(argv=None):
        with only_run_in(tmp_path):
            raise AssertionError("it worked")

    monkeypatch.setattr(*{"open": (Path, "open")}.get(call, (os, call)), refusing(number))
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2 and os.strerror(number) in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
