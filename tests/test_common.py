"""common.py: what every script does the same way: settings, whole files and folders, sentences, the normaliser."""

import errno
import fcntl
import io
import os
import re
import signal
import subprocess
import sys
import time
import unicodedata
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import ROOT

import build_dataset
import evaluations
import merge_llama
import test_llama
from pipeline import models
from pipeline.files import only_run_in, read_manifest, refuse_another, whole_folder, write_manifest, write_whole
from pipeline.script import fail, is_main, progress, say, script, settle_environment
from pipeline.settings import parse_settings
from pipeline.texts import WITHOUT_BLANKS, holds, normalize_answer, words_of

BLOCK = '''"""A script.

More of it.
"""

# Settings: edit here
LIMIT = 3  # rows; 50 % of them
RATE = 0.5
STEPS = 10  # of warming up; 0 = none
SEED = 0
NAMES = ["a"]  # some of a, b
FLAG = False
MODE = None  # True, False; None: as it comes

# Fixed
OTHER = 1
'''


CHOICES = {"LIMIT": (int,), "RATE": (float,), "STEPS": (0, int), "SEED": (0, int), "NAMES": (list, "a", "b")}
CHOICES |= {"FLAG": (bool,), "MODE": (bool, None)}


def module_of(path, text):
    path.write_text(text)
    module = ModuleType(path.stem)
    module.__file__ = str(path)
    exec(compile(text, path, "exec"), vars(module))
    return module


@pytest.fixture
def module(tmp_path):
    """The script BLOCK as a module."""
    return module_of(tmp_path / "block.py", BLOCK)


EDITED = {  # a line of the settings, what it is edited to, a flag, the settings that come of it
    "a whole number for a number": ("RATE = 0.5", "RATE = 3", "--rate=3.5", {"rate": 3}, {"rate": 3.5}),
    "a number for a whole one": ("LIMIT = 3", "LIMIT = 1e3", "--limit=7", {"limit": 1000}, {"limit": 7}),
    "0 with another comment": (
        "STEPS = 10  # of warming up; 0 = none",
        "STEPS = 0  # no",
        "--steps=0",
        {"steps": 0},
        {},
    ),
    "0 without a comment": (
        "STEPS = 10  # of warming up; 0 = none",
        "STEPS = 0",
        "--steps=2",
        {"steps": 0},
        {"steps": 2},
    ),
    "a number in quotes": ("LIMIT = 3", 'LIMIT = "4"', "--limit=5", {"limit": 4}, {"limit": 5}),
    "a tuple for a list": (
        'NAMES = ["a"]',
        'NAMES = ("a", "b")',
        "--names=b",
        {"names": ("a", "b")},
        {"names": ["b"]},
    ),
    "several lines": (
        '["a"]',
        '[  # one\n    "a",\n    "b",\n]',
        "--names=a",
        {"names": ["a", "b"]},
        {"names": ["a"]},
    ),
    "an annotation": ("RATE = 0.5", "RATE: float = 0.25", "--rate=2", {"rate": 0.25}, {"rate": 2}),
    "other blanks": ("SEED = 0", "SEED=7 #%s of 100 %", "--seed=0", {"seed": 7}, {"seed": 0}),
    "a # in a text": ("SEED = 0", 'SEED = 0\nDIR = "a  # b"', "--dir=# 1", {"dir": "a  # b"}, {"dir": "# 1"}),
    "a comment that begins like the end": (
        "SEED = 0",
        "# Fixed seed of the paper\nSEED = 5",
        "--seed=6",
        {"seed": 5},
        {"seed": 6},
    ),
    "a path": ("SEED = 0", 'SEED = 0\nDIR = __import__("pathlib").Path("a")', "--dir=2", {"dir": "a"}, {"dir": "2"}),
}


@pytest.mark.parametrize(("line", "edited", "flag", "then", "given"), EDITED.values(), ids=EDITED.keys())
def test_a_setting_edited_in_any_way_python_allows_is_meant_as_it_was(
    line, edited, flag, then, given, tmp_path, capsys
):
    assert line in BLOCK
    module = module_of(tmp_path / "edited.py", BLOCK.replace(line, edited))
    plain = parse(module)
    assert {name: plain[name] for name in then} == then
    assert plain | then | given == parse(module, flag)
    with pytest.raises(SystemExit, match="0"):
        parse(module, "--help")


WRONG = ["LIMIT = 2.5", "LIMIT = True", "LIMIT = None", "LIMIT = 0  # 0 = none", 'LIMIT = "many"', 'FLAG = "False"']
WRONG += [
    "RATE = [1]",
    'NAMES = "a"',
    "NAMES = []",
    "NAMES = None",
    "MODE = 3",
    "SEED = -1",
    "STEPS = []",
    "STEPS = False",
]


@pytest.mark.parametrize("edited", WRONG)
def test_a_setting_edited_to_what_it_cannot_be_is_refused_in_one_sentence(edited, tmp_path, capsys):
    name = edited.split(" =")[0]
    text = "".join(f"{edited}\n" if line.startswith(f"{name} =") else f"{line}\n" for line in BLOCK.splitlines())
    with pytest.raises(SystemExit, match="2"):
        parse(module_of(tmp_path / "edited.py", text))
    assert f"error: --{name.lower()} must be " in capsys.readouterr().err


SAID = {  # a setting's choices, what it is edited to, what the sentence says that it must be
    "None for a text": ((str,), None, "must be a text in UTF-8, not None"),
    "a text for a list of words": ((list, "a", "b"), "a", "must be a list of a, b, not 'a'"),
    "a text for a list": ((list,), "a", "must be a list of texts in UTF-8, not 'a'"),
    "no texts": ((list,), [], "must be a list of texts in UTF-8, not []"),
    "half a character": ((str,), "e\udce9", "must be a text in UTF-8, not 'e\\udce9'"),
    "half a character in a list": ((0, list), ["e\udce9"], "must be a list of texts in UTF-8, not ['e\\udce9']"),
}


@pytest.mark.parametrize(("allowed", "value", "told"), SAID.values(), ids=SAID.keys())
def test_a_setting_that_cannot_be_meant_is_refused_in_plain_words(allowed, value, told, module, capsys):
    module.NAMES = value
    with pytest.raises(SystemExit, match="2"):
        parse_settings(module, [], {**CHOICES, "NAMES": allowed})
    assert f"error: --names {told}\n" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["LIMIT = 3", "SEED = 0", "FLAG = False"])
def test_a_setting_that_was_taken_out_of_the_block_is_missing_in_one_sentence(line, tmp_path, capsys):
    module = module_of(tmp_path / "edited.py", BLOCK.replace(line, f"# {line}"))
    with pytest.raises(SystemExit, match="2"):
        parse(module)
    name = line.split(" =")[0]
    assert f"error: {name} is missing from the settings: put its line back" in capsys.readouterr().err


def test_a_list_that_may_be_empty_says_so_with_a_0(module):
    module.NAMES = []
    assert parse_settings(module, [], CHOICES | {"NAMES": (0, list)}).names == []


def parse(module, *argv):
    return vars(parse_settings(module, argv, choices=CHOICES))


def test_flags_come_from_the_settings_block_and_nothing_else(module, capsys):
    assert parse(module) == {
        "limit": 3,
        "rate": 0.5,
        "steps": 10,
        "seed": 0,
        "names": ["a"],
        "flag": False,
        "mode": None,
    }
    argv = ["--limit", "7", "--rate", "1e-3", "--steps", "0", "--names", "a", "b", "--flag", "--no-mode"]
    assert parse(module, *argv) == {
        "limit": 7,
        "rate": 0.001,
        "steps": 0,
        "seed": 0,
        "names": ["a", "b"],
        "flag": True,
        "mode": False,
    }
    with pytest.raises(SystemExit):
        parse(module, "--help")
    shown = capsys.readouterr().out
    assert "rows; 50 % of them (default: 3)" in shown and "A script." in shown and "--other" not in shown


BAD = [["--limit", "0"], ["--limit", "-1"], ["--limit", "2.5"], ["--limit", "99999999999"], ["--rate", "nan"],
       ["--rate", "inf"],
    ["--rate", "-0.1"], ["--rate", "0"], ["--names", "a", "c"], ["--lim", "3"], ["--other", "2"]]  # fmt: skip


@pytest.mark.parametrize("argv", BAD)
def test_values_that_cannot_be_meant_are_refused(argv, module, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(module, *argv)
    assert stopped.value.code == 2 and argv[0] in capsys.readouterr().err


@pytest.mark.parametrize("name, value", [("NAMES", ["a", "x"]), ("LIMIT", 0), ("RATE", 0.0), ("LIMIT", -1)])
def test_a_constant_edited_to_a_value_that_cannot_be_meant_is_refused_too(name, value, module, capsys):
    setattr(module, name, value)
    with pytest.raises(SystemExit):
        parse(module)
    assert f"--{name.lower()} must be " in capsys.readouterr().err


def test_a_constant_edited_to_none_is_refused_where_none_means_nothing(module, capsys):
    module.RATE = None
    with pytest.raises(SystemExit) as stopped:
        parse(module)
    assert stopped.value.code == 2 and "--rate must be a number above 0, not None" in capsys.readouterr().err


def test_a_setting_may_be_a_word_or_a_number(module, capsys):
    def parse(*argv):
        return parse_settings(module, argv, choices=CHOICES | {"SIZE": ("auto", float)}).size

    path, module.SIZE = module.__file__, "auto"
    with open(path) as file:
        text = file.read().replace("SEED = 0", 'SIZE = "auto"\nSEED = 0')
    with open(path, "w") as file:
        file.write(text)
    assert parse() == "auto" and parse("--size", "2") == 2.0 and parse("--size", "3e9") == 3e9
    module.SIZE = 5e-4  # edited
    assert parse() == 5e-4 and parse("--size", "auto") == "auto"
    module.SIZE = 0.0
    with pytest.raises(SystemExit):
        parse()
    assert "--size must be auto or a number above 0, not 0.0" in capsys.readouterr().err
    for wrong in ("fast", "0", "-1", "nan", "inf"):
        with pytest.raises(SystemExit):
            parse("--size", wrong)
        assert "--size must be" in capsys.readouterr().err
    module.SIZE = "fast"
    with pytest.raises(SystemExit):
        parse()
    assert "--size must be auto or a number above 0, not 'fast'" in capsys.readouterr().err


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


def test_where_nobody_watches_a_line_a_minute_takes_the_bars_place(monkeypatch, capsys):
    clock = [1e9]
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])

    def printed(rows, seconds):
        for _ in progress(range(rows), "merging", unit="shard"):
            clock[0] += seconds
        return capsys.readouterr().err

    text = printed(200, 7)
    assert "\r" not in text and text.isascii() and text.endswith("\n")
    lines = [
        re.search(r"^merging: .*\| (\d+)/200 \[(\d\d:\d\d)<\d\d:\d\d, +7.00s/shard]$", line)
        for line in text.splitlines()
    ]
    assert [line[1] for line in lines] == [str(9 * minute) for minute in range(1, 23)]  # each 9th row ends after 63 s
    assert [line[2] for line in lines[:3]] == ["01:03", "02:06", "03:09"]
    assert len(printed(3, 600).splitlines()) == 3  # slow ones: each
    assert printed(8, 7) == ""  # ended before
    monkeypatch.setenv("RANK", "1")
    assert printed(200, 7) == ""
    monkeypatch.setenv("RANK", "0")
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    printed(2, 7)
    assert "\rmerging:  50%" in terminal.getvalue() and "\n" not in terminal.getvalue()


SCRIPT = """
import sys
from pipeline.script import fail, say, script
@script
def main(argv=None):
    {body}
main()
"""


def outcome(body, **environment):
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(body=body)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def test_a_full_disk_and_ctrl_c_end_in_one_sentence():
    full = outcome("open('/dev/full', 'w', buffering=1).write('x\\n')")
    assert full.returncode == 2 and "No space left on device): make room" in full.stderr
    stopped = outcome("raise KeyboardInterrupt")
    assert stopped.returncode == 130 and "interrupted" in stopped.stderr
    assert all("Traceback" not in result.stderr for result in (full, stopped))


def test_a_full_gpu_ends_in_one_sentence_wherever_it_is_met(capsys):
    def main(argv):
        models.load_failed("base", torch.OutOfMemoryError("CUDA out of memory. Tried\nto"))

    with pytest.raises(SystemExit) as stopped:
        script(main)()
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and told.count("error:") == 1
    assert "the GPU's memory is too small (CUDA out of memory" in told and "missing or broken" not in told


MEMORY = [
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
    ),
    RuntimeError("unable to mmap 269060552 bytes from file </model.safetensors>: Cannot allocate memory (12)"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("can't start new thread"),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", MEMORY, ids=lambda error: str(error)[:30])
def test_a_host_without_memory_ends_in_one_sentence_whatever_a_library_takes_it_for(error, capsys):
    def loading(argv):
        models.load_failed("base", error)

    def working(argv):
        raise error

    def reading(argv):
        try:
            raise error
        except Exception:
            fail("cannot read train: run build_dataset.py again")

    for main in (loading, working, reading):
        with pytest.raises(SystemExit) as stopped:
            script(main)()
        message = capsys.readouterr().err
        assert stopped.value.code == 2 and message.count("error:") == 1
        assert "memory is too small" in message and "missing or broken" not in message and "again" not in message


def test_an_error_that_is_not_the_machine_s_is_raised(capsys):
    def main(argv):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        script(main)()
    assert capsys.readouterr().err == ""


TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
MPI = ("PMI_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")


@pytest.fixture
def shell(monkeypatch):
    """Sets the environment's variables of a launcher and of accelerate to these alone, and settles them."""

    def settle(script="train_llama.py", **variables):
        for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
            monkeypatch.delenv(name)
        for name in (*TORCHRUN, *MPI, "LOCAL_WORLD_SIZE", *variables):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        settle_environment(script)
        return {name: os.environ[name] for name in variables if name in os.environ}

    monkeypatch.setenv("MPLBACKEND", "before")  # is put back
    yield settle
    for name in (*TORCHRUN, *MPI):
        os.environ.pop(name, None)


def test_what_a_launcher_sets_is_kept(shell):
    assert shell(**TORCHRUN) == TORCHRUN and not is_main()
    first = TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    assert shell(**first) == first and is_main()
    alone = first | {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "none"}  # --nproc_per_node 1
    assert shell(**alone) == alone and shell("merge_llama.py", **alone) == alone


@pytest.mark.parametrize(
    "left",
    [
        {"RANK": "", "WORLD_SIZE": ""},
        {"RANK": "1"},
        {"LOCAL_RANK": "0"},
        {"LOCAL_RANK": "-1", "WORLD_SIZE": "1"},
        {"RANK": "first"},
        {"PMI_RANK": "0", "PMI_SIZE": "1"},
        {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "worker-0", "MASTER_PORT": "23456"},  # a pod of Kubernetes
        TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"},
        TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
    ],
    ids=str,
)
def test_what_is_left_of_a_launcher_in_a_shell_leaves_a_run_in_one_process(left, shell):
    assert not set(shell(**left)) - {"MASTER_ADDR", "MASTER_PORT"} and is_main()


@pytest.mark.parametrize(
    "left",
    [
        {"WORLD_SIZE": "2"},
        {"WORLD_SIZE": "two"},
        {"RANK": "1", "WORLD_SIZE": "2"},
        {"RANK": "", "WORLD_SIZE": "2"},
        TORCHRUN | {"RANK": "2"},
        TORCHRUN | {"LOCAL_RANK": "second"},
        TORCHRUN | {"LOCAL_WORLD_SIZE": ""},
        TORCHRUN | {"MASTER_PORT": ""},
        {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
        {"PMI_SIZE": "2"},
    ],
    ids=str,
)
def test_processes_that_no_launcher_started_are_refused_by_the_variables_names(left, shell, capsys):
    with pytest.raises(SystemExit) as stopped:
        shell(**left)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and message.count("error:") == 1 and "torchrun" in message
    assert all(name in message for name in left if not name.startswith("MASTER"))


def test_what_accelerate_was_configured_for_changes_nothing_but_fsdp_under_a_launcher(shell):
    configured = {
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_USE_CPU": "true",
        "ACCELERATE_USE_FSDP": "true",
    }
    assert shell(**configured) == {}
    assert shell(**configured, **TORCHRUN) == {"ACCELERATE_USE_FSDP": "true"} | TORCHRUN


def test_a_figure_opens_no_window_whatever_the_shell_says(shell):
    assert shell(MPLBACKEND="module://matplotlib_inline.backend_inline") == {"MPLBACKEND": "agg"}


@pytest.mark.parametrize("script", [build_dataset, merge_llama, evaluations, test_llama])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_script_that_is_one_process_says_so_once_under_a_launcher(
    script, rank, shell, monkeypatch, tmp_path, capsys
):
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)  # for the main process to speak first
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    shell(**TORCHRUN | {"RANK": rank})
    with pytest.raises(SystemExit) as stopped:
        script.main(["--output-dir", str(tmp_path / "out"), *["--server", "http://x"] * (script is test_llama)])
    assert stopped.value.code == 2 and not (tmp_path / "out").exists()
    message = capsys.readouterr().err
    assert ("process: start" in message, bool(waited)) == (rank == "0", rank == "1")


def test_under_torchrun_every_process_ends_with_2_and_one_of_them_says_why(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [ROOT / "evaluations.py", "--output-dir", tmp_path / "out"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode and result.stderr.count("error: evaluations.py is one process") == 1
    assert "exitcode  : 2" in result.stderr and "exitcode  : 1 " not in result.stderr


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


def test_a_terminal_that_was_closed_ends_no_run(monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(sys, "stdout", Closed())
    say("step 1")
    say("step 2")


def test_a_terminal_that_is_not_utf8_and_a_reader_that_goes_away():
    assert outcome("print('žluť 😀')", PYTHONIOENCODING="ascii").stdout == "?lu? ?\n"
    code = SCRIPT.format(body="[say('line') for _ in range(99999)]; open(sys.argv[1], 'w').write('done')")
    command = f'{sys.executable} -c "$CODE" $FILE | head -n 1; cat $FILE'
    environment = os.environ | {"CODE": code, "FILE": os.path.join(os.environ.get("TMPDIR", "/tmp"), f"{os.getpid()}")}
    result = subprocess.run(command, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True)
    os.unlink(environment["FILE"])
    assert result.stdout == "line\ndone" and result.stderr == ""


OFFICIAL = {  # worked out by hand from the official script's five steps
    "The  Spider-Man": "spider man",
    "a–b": "–b",
    "“The Office”": "“ office”",
    "it’s an_owl": "it s owl",
    "A.B.C.": "b c",
    "Åre, the `Alps´!": "åre alps",
}


@pytest.mark.parametrize("text", OFFICIAL)
def test_answers_are_normalised_by_the_official_rules(text):
    assert normalize_answer(text) == OFFICIAL[text]


HELD = {  # a text and an answer that stands in it
    "between dashes": ("Jochi (1185–1226), nine", "1185"),
    "before a dash": ("in 1986—when", "1986"),
    "in quotation marks": ("„Paris“, «Paris», “Paris”", "Paris"),
    "before an ellipsis": ("Paris…", "Paris"),
    "before a footnote": ("Paris[3]", "Paris"),
    "an arrow and a degree": ("→20°", "20"),
    "an answer in quotation marks": ("She said yes.", "“Yes”"),
    "an answer with a dash": ("AC/DC, the band", "AC–DC"),
    "marks of money": ("It costs $5 or 5€.", "£5"),
    "an apostrophe": ("O’Neill’s", "O'Neill"),
    "points": ("in the U.S.", "U. S."),
    "an underscore": ("New_York", "New York"),
    "an accent in two characters": ("a cafe\u0301", "café"),
    "an accent in one character": ("a café", "cafe\u0301"),
    "full-width digits": ("は１９８６年に", "1986"),
    "capitals of sharp s": ("STRASSE", "Straße"),
    "a soft hyphen": ("Pa\u00adris", "Paris"),
    "Hindi": ("यह पूर्व प्रधान मंत्री थे।", "पूर्व प्रधान"),
    "Hindi with a joiner": ("क्\u200dष", "क्ष"),
    "Arabic punctuation": ("باريس، لندن", "باريس"),
    "Chinese in a sentence": ("小明今天去了北京。", "北京"),
    "Japanese beside Latin": ("東京はNHKの", "NHK"),
    "Japanese of two characters": ("カ\u3099ラス", "ガラス"),
    "Thai in a sentence": ("ฉันไปกรุงเทพวันนี้", "กรุงเทพ"),
}
NOT_HELD = {  # a text and an answer that does not stand in it
    "inside a word": ("The party", "art"),
    "inside a number": ("119860", "1986"),
    "before a mark": ("कि", "क"),
    "another letter": ("cafe", "café"),
    "a power": ("10²", "102"),
    "a fraction": ("2½", "21"),
    "half of a Korean word": ("서울대학교", "서울"),
    "no word": ("— … !", "—"),
    "an article": ("the a", "the"),
    "nothing": ("", ""),
    "an emoji": ("a ☀️ day", "❤️"),
}


@pytest.mark.parametrize(("text", "answer"), HELD.values(), ids=HELD.keys())
def test_an_answer_in_any_script_is_found_between_whatever_is_no_letter_digit_or_mark(text, answer):
    assert holds(text, ["nothing of it", answer]) and holds(text, [words_of(answer)])


@pytest.mark.parametrize(("text", "answer"), NOT_HELD.values(), ids=NOT_HELD.keys())
def test_an_answer_inside_a_word_or_without_a_word_is_found_nowhere(text, answer):
    assert not holds(text, [answer])


def test_of_all_characters_those_that_end_a_word_are_no_letters_digits_or_marks():
    for char in map(chr, range(0x20, 0x3000)):
        kind, word = unicodedata.category(char), unicodedata.name(char, "").startswith(WITHOUT_BLANKS)
        invisible = kind in ("Cf", "Me") and char != "\u200b"  # soft hyphens and joiners, the frames of keycaps
        if not word and unicodedata.is_normalized("NFC", char):
            inside = kind[0] in "LNM" or invisible
            assert holds(f"is{char}1986{char}b", ["1986"]) != inside, hex(ord(char))
