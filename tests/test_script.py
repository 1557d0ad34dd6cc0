"""What every script does the same way: progress, launchers, and one sentence where the machine ends a run."""

import errno
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SMALL, SOURCES, assert_refused, run

import build_dataset
import evaluations
import merge_llama
import test_llama
from pipeline import models
from pipeline.script import fail, first_line, is_main, progress, say, script, settle_environment


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
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and message.count("error:") == 1
    assert "the GPU's memory is too small (CUDA out of memory" in message and "missing or broken" not in message


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


def test_a_closed_stderr_and_a_user_that_there_is_not_are_no_tracebacks(tmp_path):
    command = f"{shlex.quote(sys.executable)} build_dataset.py {shlex.join([*SOURCES, *SMALL])} --num-proc 1 2>&-"
    result = subprocess.run(
        ["bash", "-c", f"{command} --output-dir {tmp_path}"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0 and (tmp_path / "dataset").is_dir()
    result = run("train_llama.py", "--model", "~nobody-of-this-name/llama", "--output-dir", tmp_path, "--dry-run")
    assert_refused(result, "unknown model ~nobody-of-this-name/llama")


class PanicException(BaseException):
    """Of a library in Rust: no Exception."""


def test_threads_that_a_library_in_rust_cannot_start_are_a_sentence(capsys):
    @script
    def main(argv=None):
        raise PanicException('The global thread pool: WouldBlock, message: "Resource temporarily unavailable"')

    with pytest.raises(SystemExit, match="2"):
        main()
    assert "the machine's memory is too small" in capsys.readouterr().err


def test_a_level_of_logs_in_the_shell_is_not_for_torch(monkeypatch):
    monkeypatch.setenv("LOGLEVEL", "info")
    settle_environment("train_llama.py")
    assert "LOGLEVEL" not in os.environ


def test_of_an_error_the_line_below_a_heading_is_told_too():
    assert first_line(ValueError("\nfield 'eps':\n    1e-5 is a text\nmore")) == "field 'eps': 1e-5 is a text"
    assert first_line(ValueError("one\ntwo")) == "one" and first_line(ValueError("one:")) == "one:"
    assert first_line(ValueError()) == "ValueError"
