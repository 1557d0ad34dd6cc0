"""Shared by the tests: no network, a runner for the scripts, and one small chain of artifacts per tiny Llama."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
SOURCES = ["--samsum", str(FIXTURES / "samsum"), "--trivia-qa", str(FIXTURES / "trivia_qa")]
SMALL = ["--train-examples-per-task", "12", "--validation-examples-per-task", "4", "--test-examples-per-task", "6"]
SMALL += ["--max-context-words", "60"]


def run(script, *arguments, cwd=ROOT, **environment):
    """Run a script as a user would; the CompletedProcess, with text output."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=600)


def assert_refused(result, *words):
    """One sentence on stderr with these words, exit code 2, no traceback."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


def snapshot(folder):
    """Every file below the folder with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


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
