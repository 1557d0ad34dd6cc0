"""All five scripts: flags mirror settings, unknown flags are refused, nothing heavy runs for --help."""

import importlib
import re
import subprocess
import sys

import pytest
from conftest import ROOT, assert_refused, run

NAMES = ["build_dataset", "train_llama", "test_llama", "evaluations", "merge_llama"]


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_has_its_flag_with_that_default(name):
    module = importlib.import_module(name)
    block = (ROOT / f"{name}.py").read_text().split("# Settings")[1].split("# Fixed")[0]
    settings = re.findall(r"^([A-Z][A-Z0-9_]*) =", block, flags=re.MULTILINE)
    args = vars(module.parse_args([]))
    assert settings and {s.lower() for s in settings} == set(args)
    for setting in settings:
        assert args[setting.lower()] == getattr(module, setting)


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_flag_and_an_abbreviated_one_are_refused(name):
    assert_refused(run(f"{name}.py", "--no-such-flag"), "--no-such-flag")
    assert_refused(run(f"{name}.py", "--output-di", "x"), "--output-di")


@pytest.mark.parametrize("name", NAMES)
def test_help_imports_nothing_heavy(name):
    code = (
        f"import sys, {name}\n"
        f"try: {name}.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'peft', 'trl', 'evaluate', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_every_bar_is_common_progress_and_every_line_common_say():
    for path in ROOT.glob("*.py"):
        text = path.read_text()
        assert "tqdm(" not in text or path.name == "common.py", path.name
        lines = re.findall(r"^.*\bprint\(.*$", text, re.MULTILINE)
        assert all("flush=True" in line or "file=sys.stderr" in line for line in lines), path.name


def test_pytest_never_collects_test_llama():
    others = [f"--ignore={path}" for path in ROOT.glob("tests/test_*.py") if path.name != "test_readme.py"]  # torch's
    command = [sys.executable, "-m", "pytest", "--collect-only", *others, "."]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert "test_readme.py::" in result.stdout and "\ntest_llama.py" not in result.stdout
