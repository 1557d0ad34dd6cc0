"""All five scripts: flags mirror settings, unknown flags are refused, nothing heavy runs for --help."""

import importlib
import re
import subprocess
import sys

import pytest
from conftest import ROOT, assert_refused, run

from pipeline import machine, script

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


ZERO = {  # settings that may be 0
    "build_dataset": "TRAIN_EXAMPLES_PER_TASK VALIDATION_EXAMPLES_PER_TASK TEST_EXAMPLES_PER_TASK SEED NUM_PROC",
    "train_llama": "LORA_DROPOUT MAX_STEPS PER_DEVICE_TRAIN_BATCH_SIZE WARMUP_STEPS EARLY_STOPPING_PATIENCE "
    "SAVE_MINUTES SEED DRY_RUN_PRICE",
    "test_llama": "SHOTS MAX_BATCH_TOKENS SERVER_MAX_EXAMPLES SERVER_THOUGHT_TOKENS SERVER_INPUT_PRICE "
    "SERVER_OUTPUT_PRICE",
    "evaluations": "SEED JUDGE_MAX_EXAMPLES",
    "merge_llama": "",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_number_may_be_0_where_that_means_something_and_may_be_written_in_any_way(name, monkeypatch, capsys):
    module = importlib.import_module(name)
    args = vars(module.parse_args([]))
    numbers = [key.upper() for key, value in args.items() if type(value) in (int, float)]
    assert set(ZERO[name].split()) <= set(numbers)
    for number in numbers:
        allowed = number in ZERO[name].split()
        for value in ("0", 0, 0.0):
            monkeypatch.setattr(module, number, value)
            if allowed:
                assert vars(module.parse_args([]))[number.lower()] == 0
            else:
                with pytest.raises(SystemExit, match="2"):
                    module.parse_args([])
                assert f"--{number.lower().replace('_', '-')} must be " in capsys.readouterr().err
        monkeypatch.undo()
        for value in ("1", 1, 1.0):
            monkeypatch.setattr(module, number, value)
            if number != "LORA_DROPOUT":
                assert type(vars(module.parse_args([]))[number.lower()]) is type(args[number.lower()])
        monkeypatch.undo()


@pytest.mark.parametrize("name", ["swapped", "x_swapped", "Swapped", "a.b", "a/b", "a b"])
def test_no_name_of_predictions_leads_to_another_commands_files(name, capsys):
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module("test_llama").parse_args(["--name", name])
    assert "error: --name must be" in capsys.readouterr().err
    assert importlib.import_module("test_llama").parse_args(["--name", "swapped-2"]).name == "swapped-2"


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_flag_and_an_abbreviated_one_are_refused(name):
    assert_refused(run(f"{name}.py", "--no-such-flag"), "--no-such-flag")
    assert_refused(run(f"{name}.py", "--output-di", "x"), "--output-di")


@pytest.mark.parametrize(
    "words, sentence",
    [
        (
            ["--learning-rat", "3"],
            "--learning-rat is no setting here: did you mean --learning-rate? --help lists them",
        ),
        (["--qqqq"], "--qqqq is no setting here: --help lists them all"),
        (["--load-in-4bit", "False"], "--load-in-4bit takes no value: write --no-load-in-4bit"),
        (["--packing=true"], "--packing takes no value: write --packing"),
    ],
)
def test_a_flag_that_is_written_wrongly_is_answered_with_what_to_write(words, sentence, capsys):
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module("train_llama").parse_args(words)
    assert f"error: {sentence}" in capsys.readouterr().err


def test_run_sh_says_what_it_does_and_names_its_help_where_it_is_given_something_else():
    done = subprocess.run(["bash", ROOT / "run.sh", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and len(re.findall(r"^bash run\.sh( demo| test| setup)? ", done.stdout, re.M)) >= 4
    done = subprocess.run(["bash", ROOT / "run.sh", "tset"], capture_output=True, text=True)
    assert done.returncode == 2 and "bash run.sh --help" in done.stderr


def test_a_command_in_a_message_runs_with_and_without_the_environment_on_the_path(tmp_path, monkeypatch):
    programs = tmp_path / "my env" / "bin"
    programs.mkdir(parents=True)
    (programs / "hf").touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    monkeypatch.chdir(tmp_path)
    assert script.command("hf") == "'my env/bin/hf'"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert script.command("hf") == f"'{programs}/hf'"
    monkeypatch.setenv("PATH", str(programs))
    assert script.command("hf") == "hf"


@pytest.mark.parametrize("taken, threads, warned", [(91.2, None, True), (91.2, "1", False), (20, None, False)])
def test_a_busy_machine_gets_one_line_that_names_the_way_out(taken, threads, warned, monkeypatch, capsys):
    monkeypatch.delenv("OMP_NUM_THREADS")
    if threads:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.setattr("psutil.cpu_percent", lambda seconds: taken)
    machine.warn_of_load()
    said = capsys.readouterr().out
    assert (
        "take 91 % of this machine's processor time: press Ctrl-C and start again with OMP_NUM_THREADS=1 in front"
        in said
    ) == warned


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("folder", ["", "e\udce9"])
def test_an_output_folder_without_a_name_or_with_one_that_is_no_text_is_refused_at_once(name, folder, capsys):
    module = importlib.import_module(name)
    with pytest.raises(SystemExit, match="2"):
        module.parse_args(["--output-dir", folder])
    assert "error: --output-dir must " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["build_dataset", "evaluations"])
def test_without_docstrings_help_has_the_flags_and_a_run_is_refused_in_one_sentence(name):
    result = run(f"{name}.py", "--help", PYTHONOPTIMIZE="2")
    assert result.returncode == 0 and "--output-dir" in result.stdout, result.stderr
    # transformers and evaluate add to their docstrings
    assert_refused(run(f"{name}.py", PYTHONOPTIMIZE="2"), "PYTHONOPTIMIZE")


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


def test_every_bar_is_progress_and_every_line_say_of_script_py():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tasks/*.py"), *ROOT.glob("pipeline/**/*.py")]:
        text = path.read_text()
        assert "tqdm(" not in text or path.name == "script.py", path.name
        lines = re.findall(r"^.*\bprint\(.*$", text, re.MULTILINE)
        assert all("flush=True" in line or "file=sys.stderr" in line for line in lines), path.name


def test_pytest_never_collects_test_llama():
    others = [f"--ignore={path}" for path in ROOT.glob("tests/test_*.py") if path.name != "test_readme.py"]  # torch's
    command = [sys.executable, "-m", "pytest", "--collect-only", *others, "."]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert "test_readme.py::" in result.stdout and "\ntest_llama.py" not in result.stdout
