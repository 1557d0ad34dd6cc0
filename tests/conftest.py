"""Shared by the tests: no network, a runner for the scripts, and one small chain of artifacts per tiny Llama."""

import multiprocessing
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import test_llama
from pipeline import models

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # the models are tiny, and other tests run beside
ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
TRANSFORMERS = Path(sys.executable).parent / "transformers"  # the command
TASKS = ("samsum", "trivia_qa")  # of the fixtures
SOURCES = ["--samsum", str(FIXTURES / "samsum"), "--trivia-qa", str(FIXTURES / "trivia_qa")]
SMALL = ["--train-examples-per-task", "12", "--validation-examples-per-task", "4", "--test-examples-per-task", "6"]
SMALL += ["--max-context-words", "60"]


# Most of a short run is importing these: the runs are forked from a process that has done so, and done nothing else.
PROCESSES = multiprocessing.get_context("forkserver")
PRELOADED = ["transformers.models.llama.modeling_llama", "trl.trainer.sft_trainer", "bitsandbytes", "peft", "datasets"]
PROCESSES.set_forkserver_preload([*PRELOADED, "matplotlib.figure", "nltk.stem.porter", "sacrebleu.metrics"])


def run(script, *arguments, cwd=ROOT, fresh=False, **environment):
    """Run a script as a user would; the CompletedProcess, with text output. fresh: in an interpreter of its own."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    if fresh or environment:
        environment = os.environ | environment
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("stdout", "stderr")]
        process = start(script, *arguments, streams=streams, cwd=cwd)
        process.join(600)
        assert process.exitcode is not None, f"{command} takes longer than 600 s"
        return subprocess.CompletedProcess(command, process.exitcode, *(path.read_text() for path in streams))


def start(script, *arguments, streams, cwd=ROOT):
    """Start a script, or TRANSFORMERS, its output into the two files `streams`; the multiprocessing.Process."""
    for path in streams:
        path.touch()
    command = [str(ROOT / script), *map(str, arguments)]
    process = PROCESSES.Process(target=run_forked, args=(command, str(cwd), dict(os.environ), streams))
    process.start()
    return process


def run_forked(command, cwd, environment, streams):
    """In the forked process: become the command."""
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    # of whatever kind they now are
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in a shell's background
    multiprocessing.set_start_method("fork", force=True)  # a command of its own has not inherited another
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv, sys.path[0] = command, str(ROOT)
    runpy.run_path(command[0], run_name="__main__")


def assert_refused(result, *words):
    """One sentence on stderr with these words, exit code 2, no traceback."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


def snapshot(folder):
    """Every file below the folder with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


@pytest.fixture(autouse=True)
def hub_forgotten():
    """Each test has another hub's cache."""
    models.download.cache_clear()


@pytest.fixture
def moments():
    """A random.Random of another seed in every run, which pytest prints of a test that fails; SEED=... repeats it."""
    seed = int(os.environ.get("SEED", random.SystemRandom().randrange(10**6)))
    print(f"random moments: SEED={seed} repeats them")
    return random.Random(seed)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """An output dir in which build_dataset.py has run on a few fixture rows."""
    output = tmp_path_factory.mktemp("dataset")
    result = run("build_dataset.py", *SOURCES, *SMALL, "--output-dir", output)
    assert result.returncode == 0, result.stderr
    return output


@pytest.fixture(scope="session", params=["tiny_llama3", "tiny_llama2"])
def chain(request, dataset, tmp_path_factory):
    """An output dir in which build, train and test have run, for each tiny Llama in turn."""
    output = tmp_path_factory.mktemp(request.param)
    shutil.copytree(dataset, output, dirs_exist_ok=True)
    train = ["--model", FIXTURES / request.param, "--max-steps", "3", "--max-length", "512", "--warmup-steps", "0"]
    train += ["--logging-steps", "1"]
    result = run("train_llama.py", *train, "--learning-rate", "1e-2", "--output-dir", output)
    assert result.returncode == 0, result.stderr
    result = run("test_llama.py", "--samsum-max-new-tokens", "8", "--output-dir", output)
    assert result.returncode == 0, result.stderr
    return output


def copied(chain, tmp_path, predictions=False):
    """A copy of the chain's output dir, without its predictions unless asked for."""
    shutil.copytree(chain, tmp_path / "out")
    for path in [] if predictions else (tmp_path / "out").glob("*_predictions.json"):
        path.unlink()
    return tmp_path / "out"


def test(out, *arguments):
    """test_llama.py in this process; its exit code."""
    try:
        test_llama.main(["--output-dir", str(out), *map(str, arguments)])
    except SystemExit as error:
        return error.code
    return 0


test.__test__ = False


@pytest.fixture
def out(chain, tmp_path):
    return copied(chain, tmp_path)


@pytest.fixture
def refused(capsys):
    def refused(*arguments):
        """The one sentence with which test_llama.py exits with 2."""
        capsys.readouterr()
        assert test(*arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    return refused
