"""All five scripts in a row, and artifacts of two runs mixed: every later script refuses or marks, none mixes."""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
from conftest import FIXTURES, ROOT, SMALL, SOURCES, assert_refused, run, snapshot, start

from pipeline.files import sha256

TRAIN = ["--max-steps", "4", "--max-length", "512", "--warmup-steps", "0", "--logging-steps", "1"]
TRAIN += ["--gradient-accumulation-steps", "1", "--eval-steps", "2", "--save-steps", "2"]
TEST = ["--samsum-max-new-tokens", "6", "--trivia-qa-max-new-tokens", "4", "--max-batch-tokens", "400"]
EVALUATE = ["--resamples", "50"]
MERGE = ["--check-rows", "2"]


def succeed(script, output, *arguments):
    result = run(script, *arguments, "--output-dir", output)
    assert result.returncode == 0, result.stderr
    return result


def run_all(output, base, seed):
    """The five scripts into `output`, on rows and with an adapter of this seed."""
    succeed("build_dataset.py", output, *SOURCES, *SMALL, "--seed", seed)
    train(output, base, seed)
    succeed("test_llama.py", output, *TEST)
    succeed("evaluations.py", output, *EVALUATE)
    succeed("merge_llama.py", output, *MERGE)


def train(output, base, seed):
    succeed("train_llama.py", output, "--model", base, *TRAIN, "--learning-rate", "1e-2", "--seed", seed)


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """The output folders of two whole runs, and the base they share."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(FIXTURES / "tiny_llama3", folder / "base")
    for seed in ("1", "2"):
        run_all(folder / seed, folder / "base", seed)
    return folder


@pytest.fixture
def mixed(two_runs, tmp_path):
    """A copy of the first run in which `mixed(name, ...)` puts the second one's artifacts."""
    shutil.copytree(two_runs / "1", tmp_path / "out")

    def put(*names):
        for name in names:
            target = tmp_path / "out" / name
            if target.is_dir():
                shutil.rmtree(target)
                shutil.copytree(two_runs / "2" / name, target)
            else:
                shutil.copy(two_runs / "2" / name, target)
        return tmp_path / "out"

    return put


def card_of(output):
    return (output / "merged" / "README.md").read_text(encoding="utf-8")


def test_the_chain_says_what_each_artifact_was_made_from(two_runs):
    report, output = json.loads((two_runs / "1" / "evaluation.json").read_text()), two_runs / "1"
    adapter = json.loads((output / "adapter" / "run.json").read_text())
    for task in ("samsum", "trivia_qa"):
        assert adapter["adapter_sha256"].startswith(report[task]["made_from"]["tuned"]["adapter"])
    assert report["training"]["settings"]["seed"] == 1 and report["data"]["samsum"]["train"]["kept"] == 12
    merged = json.loads((output / "merged" / "merge.json").read_text())
    assert merged["adapter_sha256"] == adapter["adapter_sha256"]
    assert merged["base_weights"] == adapter["run"]["weights"]
    assert "ot measured" not in card_of(output) and "12" in card_of(output)
    assert report["other_adapter"] is None
    assert "Summarize the dialogue" in (output / "evaluation.html").read_text(encoding="utf-8")


def test_another_data_set_is_refused_by_training_and_testing_and_gives_the_card_no_data(mixed, two_runs):
    output = mixed("dataset", "dataset_report.json")
    result = run("train_llama.py", "--model", two_runs / "base", *TRAIN, "--learning-rate", "1e-2", "--seed", "1",
                 "--output-dir", output)  # fmt: skip
    assert_refused(result, "is of another run (the data set was built again)")
    result = run("test_llama.py", *TEST, "--output-dir", output)
    assert_refused(result, "is of another run (the data set was built again)")
    result = run("test_llama.py", *TEST, "--name", "again", "--output-dir", output)
    assert result.returncode == 0 and "was trained on another data set: it may have been trained on" in result.stdout
    succeed("evaluations.py", output, *EVALUATE)
    report = json.loads((output / "evaluation.json").read_text())
    assert report["data"] is None and report["training"]["settings"]["seed"] == 1
    succeed("merge_llama.py", output, *MERGE)
    assert "Summarize the dialogue" not in card_of(output)  # whose prompts these are is not known


def test_another_adapter_is_refused_beside_the_old_predictions_and_gets_none_of_their_scores(mixed, two_runs):
    output = mixed("adapter")
    assert_refused(run("test_llama.py", *TEST, "--output-dir", output), "adapter", "another run")
    old = "these scores are of another adapter than adapter/ has now: run test_llama.py --overwrite"
    assert old in succeed("evaluations.py", output, *EVALUATE).stdout
    assert old in (output / "evaluation.html").read_text(encoding="utf-8")
    report = json.loads((output / "evaluation.json").read_text())
    assert report["training"] is None and report["other_adapter"].startswith(old)
    named = ["--predictions", output / "samsum_predictions.json", output / "trivia_qa_predictions.json"]
    assert old not in succeed("evaluations.py", output, *EVALUATE, *named).stdout  # asked for as they are
    succeed("merge_llama.py", output, *MERGE)
    assert "ot measured" in card_of(output)
    train(output, two_runs / "base", "1")  # its own checkpoints still stand there: it puts its own adapter back
    weights = "adapter/adapter_model.safetensors"
    assert sha256(output / weights) == sha256(two_runs / "1" / weights)


@pytest.mark.parametrize("task", ["samsum", "trivia_qa"])
def test_predictions_of_one_task_by_another_adapter_are_refused(task, mixed):
    output = mixed(f"{task}_predictions.json")
    before = snapshot(output)
    assert_refused(
        run("evaluations.py", *EVALUATE, "--output-dir", output), "another run", "run test_llama.py --overwrite"
    )
    assert snapshot(output) == before


def test_predictions_of_both_tasks_by_another_adapter_are_shown_without_this_ones_training_and_data(mixed):
    output = mixed("samsum_predictions.json", "trivia_qa_predictions.json")
    assert_refused(run("test_llama.py", *TEST, "--output-dir", output), "adapter", "another run")
    succeed("evaluations.py", output, *EVALUATE)
    report = json.loads((output / "evaluation.json").read_text())
    assert report["training"] is None and report["data"] is None
    assert "Summarize the dialogue" not in (output / "evaluation.html").read_text(encoding="utf-8")
    succeed("merge_llama.py", output, *MERGE)
    assert "ot measured" in card_of(output)


def test_another_merged_folder_is_refused_beside_the_predictions_of_the_old_one(mixed):
    test = [*TEST, "--model", mixed() / "merged", "--name", "merged"]
    succeed("test_llama.py", mixed(), *test)
    output = mixed("merged")
    assert_refused(run("test_llama.py", *test, "--output-dir", output), "weights", "another run")


def test_another_evaluation_gives_the_card_no_scores(mixed):
    output = mixed("evaluation.json")
    succeed("merge_llama.py", output, *MERGE)
    assert "ot measured" in card_of(output)


def test_other_base_weights_are_refused_by_training_testing_and_merging(two_runs, tmp_path):
    shutil.copytree(two_runs / "1", tmp_path / "out")
    shutil.copytree(two_runs / "base", tmp_path / "base")
    for name in ("adapter/adapter_config.json", "adapter/run.json"):  # as if the run had been on this folder
        path = tmp_path / "out" / name
        path.write_text(path.read_text().replace(str(two_runs / "base"), str(tmp_path / "base")))
    with (tmp_path / "base" / "model.safetensors").open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\x01\x3c")
    before = snapshot(tmp_path / "out")
    result = run("train_llama.py", "--model", tmp_path / "base", *TRAIN, "--learning-rate", "1e-2", "--seed", "1",
                 "--output-dir", tmp_path / "out")  # fmt: skip
    assert_refused(result, "weights", "another run")
    for task in ("samsum", "trivia_qa"):  # no predictions of the old ones give it away
        (tmp_path / "out" / f"{task}_predictions.json").unlink()
    before = snapshot(tmp_path / "out")
    assert_refused(run("test_llama.py", *TEST, "--output-dir", tmp_path / "out"), "weights", "run.json names")
    for more in ([], ["--model", tmp_path / "base"]):  # named or not, it is another model
        result = run("merge_llama.py", *MERGE, *more, "--output-dir", tmp_path / "out")
        assert_refused(result, "weights", "run.json names")
    assert snapshot(tmp_path / "out") == before


ON_A_MOUNT = """
import errno, fcntl, os, sys
sys.path.insert(0, sys.argv[1])
def refuse(*arguments, **options):
    raise OSError(errno.EPERM, "Operation not permitted")
def change_mode(path, *arguments, change=os.chmod, **options):
    (refuse if str(path).startswith(sys.argv[2]) else change)(path, *arguments, **options)
os.chmod, os.fsync, fcntl.flock = change_mode, refuse, refuse  # Windows' disks under WSL, CIFS, gcsfuse, Lustre
import merge_llama, train_llama
train_llama.main(sys.argv[3:] + ["--output-dir", sys.argv[2]])
merge_llama.main(["--check-rows", "2", "--output-dir", sys.argv[2]])
"""
A_NOTEBOOK_S_SHELL = {
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "RANK": "1",
    "LOCAL_RANK": "0",
}


def test_an_odd_shell_and_an_odd_mount_change_no_adapter_and_no_merged_weight(two_runs, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(two_runs / "1" / "dataset", output / "dataset")
    (tmp_path / "matplotlibrc").write_bytes(b"\xff\xfe no text")
    command = [sys.executable, "-c", ON_A_MOUNT, ROOT, output, "--model", two_runs / "base", *TRAIN]
    environment = os.environ | A_NOTEBOOK_S_SHELL | {"MATPLOTLIBRC": str(tmp_path / "matplotlibrc")}
    command += ["--learning-rate", "1e-2", "--seed", "1"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    warnings = re.findall("^warning: .*", result.stdout, re.MULTILINE)
    assert ["loss.png" in line for line in warnings] == [False, True, False]  # of the mount each script's
    assert all(f"{output} has no locks and no fsync" in line for line in warnings[::2])
    for name in ("adapter/adapter_model.safetensors", "merged/model.safetensors"):
        assert (output / name).read_bytes() == (two_runs / "1" / name).read_bytes()
    names = {path.name for path in (two_runs / "1" / "adapter").iterdir()} - {"loss.png"}
    assert {path.name for path in (output / "adapter").iterdir()} == names


def test_killed_again_and_again_the_chain_ends_as_if_nothing_had_happened(two_runs, tmp_path, moments):
    """SIGKILL at random moments of train, test and merge; the same commands again end with the same artifacts."""
    output, base = tmp_path / "out", two_runs / "base"
    shutil.copytree(two_runs / "1" / "dataset", output / "dataset")
    shutil.copy(two_runs / "1" / "dataset_report.json", output)
    commands = {
        "train_llama.py": ["--model", base, *TRAIN, "--learning-rate", "1e-2", "--seed", "1"],
        "test_llama.py": TEST,
        "merge_llama.py": MERGE,
    }
    for script, arguments in commands.items():
        for _ in range(3):
            log = tmp_path / "log"
            process = start(script, *arguments, "--output-dir", output, streams=[log, log])
            time.sleep(moments.uniform(0.1, 1.5))
            process.kill()
            process.join(60)
        if script == "merge_llama.py":
            succeed("evaluations.py", output, *EVALUATE)
        succeed(script, output, *arguments)
    for name in ("adapter/adapter_model.safetensors", "samsum_predictions.json", "trivia_qa_predictions.json"):
        expected = (two_runs / "1" / name).read_bytes().replace(bytes(two_runs / "1"), bytes(output))
        same = (output / name).read_bytes() == expected
        assert same, name  # compared apart: pytest would explain the difference of the bytes for minutes
    weights = "merged/model.safetensors"
    same = (output / weights).read_bytes() == (two_runs / "1" / weights).read_bytes()
    assert same, weights
    assert not [path for path in output.rglob("*") if path.name.endswith((".new", ".old")) or "part" in path.name]
