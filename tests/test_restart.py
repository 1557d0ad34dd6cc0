"""train_llama.py is killed, stopped, damaged and started again: the adapter comes out as if nothing had happened."""

import functools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import FIXTURES, ROOT, assert_refused, run, snapshot, start
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState

import train_llama
from pipeline.files import load_rows
from pipeline.tokens import load_tokenizer
from pipeline.training import trainer

STEPS = 30
COMMAND = ["--model", FIXTURES / "tiny_llama2", "--max-steps", STEPS, "--max-length", 256, "--warmup-steps", 0]
COMMAND += ["--gradient-accumulation-steps", 1, "--logging-steps", 1, "--save-steps", 4, "--eval-steps", 10]
COMMAND += ["--learning-rate", "5e-3", "--lora-dropout", 0.1, "--save-total-limit", 3]
COMMAND = [str(word) for word in COMMAND]


def adapter_of(output):
    return load_file(output / "adapter" / "adapter_model.safetensors")


def assert_same_adapter(output, expected, atol=1e-6):
    actual = adapter_of(output)
    assert actual.keys() == expected.keys()
    assert all(torch.allclose(actual[key], expected[key], rtol=0, atol=atol) for key in expected)


def interrupt(output, number, step, delay=0.0, arguments=()):
    """Start the run, send it a signal `delay` seconds after it logged `step` or more; (exit code, what it printed)."""
    printed = output / "printed"
    printed.unlink(missing_ok=True)
    process = start("train_llama.py", *COMMAND, *arguments, "--output-dir", output, streams=[printed, printed])
    while not any(int(done) >= step for done in re.findall(r"^step +(\d+)/", printed.read_text(), re.MULTILINE)):
        assert process.is_alive(), printed.read_text()
        time.sleep(0.002)
    time.sleep(delay)
    os.kill(process.pid, number)
    process.join(600)
    return process.exitcode, printed.read_text()


@pytest.fixture(scope="module")
def undisturbed(dataset, tmp_path_factory):
    """An output dir in which a run went through at once."""
    output = tmp_path_factory.mktemp("undisturbed")
    shutil.copytree(dataset / "dataset", output / "dataset")
    result = run("train_llama.py", *COMMAND, "--output-dir", output)
    assert result.returncode == 0, result.stderr
    return output


def test_killed_three_times_it_ends_with_the_same_adapter(undisturbed, tmp_path, moments):
    shutil.copytree(undisturbed / "dataset", tmp_path / "dataset")
    steps = sorted(moments.sample(range(8, 22), 3))
    for step in steps:
        delay = moments.random() * 0.02
        code, printed = interrupt(tmp_path, signal.SIGKILL, step, delay)
        assert code == -signal.SIGKILL, (steps, delay, printed)
        assert not (tmp_path / "adapter").exists()
    result = run("train_llama.py", *COMMAND, "--output-dir", tmp_path)
    assert result.returncode == 0, (steps, result.stderr)
    assert "resuming from" in result.stdout, steps
    assert_same_adapter(tmp_path, adapter_of(undisturbed))
    log = [json.loads(line) for line in (tmp_path / "adapter" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "loss" in entry] == list(range(1, STEPS + 1))
    whole = json.loads((undisturbed / "adapter" / "run.json").read_text())
    assert json.loads((tmp_path / "adapter" / "run.json").read_text())["tokens"] == whole["tokens"]


def test_stopped_by_signals_then_with_a_broken_checkpoint_it_ends_with_the_same_adapter(undisturbed, tmp_path):
    shutil.copytree(undisturbed / "dataset", tmp_path / "dataset")
    code, printed = interrupt(tmp_path, signal.SIGTERM, 9)
    stopped = int(re.search(r"stopped at step (\d+) of 30", printed)[1])
    assert code == 128 + signal.SIGTERM and 9 <= stopped < STEPS
    manifest = tmp_path / "checkpoints" / f"checkpoint-{stopped}" / "whole.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"seconds": 1000}))  # as if it had taken so long
    code, printed = interrupt(tmp_path, signal.SIGINT, stopped + 5)
    assert code == 128 + signal.SIGINT and f"resuming from {tmp_path}/checkpoints/checkpoint-{stopped}" in printed
    newest = max((tmp_path / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    assert json.loads((newest / "whole.json").read_text())["seconds"] > 1000
    optimizer = newest / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:1000])
    result = run("train_llama.py", *COMMAND, "--output-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "adapter" / "run.json").read_text())["seconds"] > 1000
    assert f"{newest} is broken (optimizer.pt)" in result.stdout and "resuming from" in result.stdout
    assert_same_adapter(tmp_path, adapter_of(undisturbed))


def test_a_checkpoint_without_its_manifest_does_not_count(undisturbed, tmp_path):
    shutil.copytree(undisturbed / "dataset", tmp_path / "dataset")
    shutil.copytree(undisturbed / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / f"checkpoint-{STEPS}" / "whole.json").unlink()
    result = run("train_llama.py", *COMMAND, "--output-dir", tmp_path)
    assert f"checkpoint-{STEPS} is broken (unfinished)" in result.stdout
    assert_same_adapter(tmp_path, adapter_of(undisturbed))


@pytest.mark.parametrize("adapter", ["missing", "of other weights"])
def test_killed_between_its_last_checkpoint_and_its_adapter_it_makes_no_further_step(adapter, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    if adapter == "missing":
        shutil.rmtree(tmp_path / "adapter")
    else:  # test_llama.py and merge_llama.py say: run train_llama.py again
        shutil.copy(tmp_path / "checkpoints/checkpoint-28/adapter_model.safetensors", tmp_path / "adapter")
    result = run("train_llama.py", *COMMAND, "--output-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    assert_same_adapter(tmp_path, adapter_of(undisturbed), atol=0)
    before, after = (json.loads((path / "adapter" / "run.json").read_text()) for path in (undisturbed, tmp_path))
    assert all(before[key] == after[key] for key in ("steps", "best_step", "tokens", "train_loss", "eval_loss"))


def test_a_finished_run_says_so_and_other_settings_are_named(undisturbed, dataset, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    shutil.copytree(undisturbed / "adapter", tmp_path / "out" / ".adapter.old")  # as a kill at the very end leaves it
    result = run("train_llama.py", *COMMAND, "--output-dir", tmp_path / "out")
    assert result.returncode == 0 and "is finished" in result.stdout
    other = ["--lora-r", 4, "--learning-rate", "1e-3", "--output-dir", tmp_path / "out"]
    result = run("train_llama.py", *COMMAND, *other)
    assert_refused(result, "learning rate 0.005 there, 0.001 now", "lora r 8 there, 4 now", "--overwrite")
    shutil.rmtree(tmp_path / "out" / "adapter")
    result = run("train_llama.py", *COMMAND, *other)
    assert_refused(result, "checkpoint-30 is of another run", "learning rate 0.005 there, 0.001 now", "--overwrite")
    shutil.copytree(undisturbed / "adapter", tmp_path / "out" / "adapter")
    assert snapshot(tmp_path / "out") == before
    rows = ["--seed", 3, "--train-examples-per-task", 12, "--test-examples-per-task", 6, "--max-context-words", 60]
    sources = ["--samsum", FIXTURES / "samsum", "--trivia-qa", FIXTURES / "trivia_qa"]
    assert run("build_dataset.py", *sources, *rows, "--output-dir", tmp_path / "out").returncode == 0
    result = run("train_llama.py", *COMMAND, "--output-dir", tmp_path / "out")
    assert_refused(result, "the data set was built again; validation examples 8 there, 91 now): give --overwrite")
    assert "give its settings again" not in result.stderr
    result = run("train_llama.py", *COMMAND, "--max-steps", 2, "--overwrite", "--output-dir", tmp_path / "out")
    assert result.returncode == 0 and "step     1/2" in result.stdout
    assert json.loads((tmp_path / "out" / "adapter" / "run.json").read_text())["steps"] == 2


def test_a_run_stopped_with_overwrite_goes_on_with_it_and_without(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)  # an older adapter, of another run
    other, before = ["--lora-alpha", 8], snapshot(tmp_path / "adapter")
    arguments = [*map(str, other), "--overwrite"]
    for step, going_on in ((9, False), (14, True)):
        code, printed = interrupt(tmp_path, signal.SIGTERM, step, arguments=arguments)
        assert code == 128 + signal.SIGTERM and ("resuming from" in printed) == going_on
        assert "the same command resumes from there" in printed
        assert snapshot(tmp_path / "adapter") == before
    result = run("train_llama.py", *COMMAND, *other, "--output-dir", tmp_path)
    assert result.returncode == 0 and "resuming from" in result.stdout, result.stderr
    again = run("train_llama.py", *COMMAND, *other, "--overwrite", "--max-steps", 2, "--output-dir", tmp_path)
    assert again.returncode == 0 and "resuming from" not in again.stdout
    again = run("train_llama.py", *COMMAND, *other, "--overwrite", "--max-steps", 2, "--output-dir", tmp_path)
    assert "step     1/2" in again.stdout  # finished: --overwrite means afresh


def losses(file):
    return [entry for entry in map(json.loads, file.read_text().splitlines()) if "loss" in entry]


def test_a_run_that_nobody_watches_saves_by_time_and_its_log_grows(undisturbed, tmp_path):
    shutil.copytree(undisturbed / "dataset", tmp_path / "dataset")
    printed, log = tmp_path / "printed", tmp_path / "checkpoints" / "log.jsonl"
    seldom = ["--logging-steps", 99, "--save-steps", 99, "--output-dir", tmp_path]
    process = start("train_llama.py", *COMMAND, *seldom, "--save-minutes", 0.001, streams=[printed, printed])
    while not (log.exists() and len(losses(log)) > 3):
        assert process.is_alive(), printed.read_text()
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join(600)
    opening = printed.read_text().split("step ")[0]  # before the first step
    assert re.search(r"^training .*tiny_llama2 on \d+ rows, validating on \d+\n", opening)
    assert re.search(r"\n30 optimizer steps over \d+ packed sequences, 4-bit base, on cpu\n", opening)
    assert re.search(r"\nabout \d:\d\d:\d\d left, or less: the longest rows were timed\n", opening)
    saved = [path for path in log.parent.glob("checkpoint-*") if (path / "whole.json").exists()]
    assert {int(path.name[11:]) for path in saved} <= {entry["step"] for entry in losses(log)}  # none within a span
    assert saved and len(losses(log)) < STEPS
    result = run("train_llama.py", *COMMAND, *seldom, "--save-minutes", 0)
    assert result.returncode == 0 and "resuming from" in result.stdout, result.stderr
    resumed = int(re.search(r"resuming from \S*checkpoint-(\d+)", result.stdout)[1])
    # the first step is printed, where it is not one that is validated and logged
    assert resumed % 10 == 9 or re.search(r"\nstep +\d+/30  \d:\d\d:\d\d left\n", result.stdout)
    assert "mtime" not in result.stdout + result.stderr
    steps = [entry["step"] for entry in losses(log)]
    assert steps == sorted(set(steps)) and steps[-2:] == [20, 30]  # 0: validations alone are saved
    assert log.read_bytes() == (tmp_path / "adapter" / "log.jsonl").read_bytes()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "adapter" / name).read_bytes() == (undisturbed / "adapter" / name).read_bytes(), name
    targets = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets) and len(targets) > 6


@pytest.mark.parametrize("rank", ["0", "1"])
def test_whether_the_time_for_a_checkpoint_has_come_the_first_process_decides(rank, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    given, told = [], torch.tensor([0, 1])
    reduce = lambda own, _: given.append(own.tolist()) or told  # noqa: E731
    fake = SimpleNamespace(stop_signal=None, is_save_due=lambda: True, accelerator=SimpleNamespace(reduce=reduce))
    watch, control = trainer.Watch(fake), TrainerControl()
    watch.printed = fake.started = time.time() - 61
    fake._initial_global_step, fake.say_step = 0, functools.partial(trainer.QLoRATrainer.say_step, fake)
    args, state = SimpleNamespace(world_size=2, device="cpu"), TrainerState(global_step=3, max_steps=9)
    fake.state = state
    watch.on_step_end(args, state, control)
    assert given == [[0, int(rank == "0")]]
    assert control.should_save and control.should_log and not control.should_training_stop
    assert capsys.readouterr().out == ""
    told, control = torch.tensor([0, 0]), TrainerControl()
    watch.on_step_end(args, state, control)
    watch.on_step_end(args, state, control)
    assert not control.should_save and not control.should_log
    assert capsys.readouterr().out == ("step     3/9  0:02:02 left\n" if rank == "0" else "")  # once a minute


def test_what_a_killed_run_logs_is_what_an_undisturbed_one_logs(dataset, tmp_path):
    arguments = ["--max-steps", "14", "--logging-steps", "5", "--eval-steps", "4", "--save-steps", "6"]
    logs, orders = [], []
    for name in ("whole", "killed"):
        output = tmp_path / name
        shutil.copytree(dataset / "dataset", output / "dataset")
        if name == "killed":
            code, _ = interrupt(output, signal.SIGKILL, 8, arguments=arguments)
            assert code == -signal.SIGKILL
        assert run("train_llama.py", *COMMAND, *arguments, "--output-dir", output).returncode == 0
        lines = (output / "adapter" / "log.jsonl").read_text().splitlines()
        logs.append([entry for entry in map(json.loads, lines) if "loss" in entry])
        orders.append([list(entry) for entry in map(json.loads, lines)])
    assert orders[0] == orders[1]  # the page draws the curves in it
    assert [entry["step"] for entry in logs[0]] == [4, 5, 6, 8, 10, 12, 14] == [entry["step"] for entry in logs[1]]
    for key in ("loss", "grad_norm", "learning_rate", "tokens"):
        assert [entry[key] for entry in logs[0]] == pytest.approx([entry[key] for entry in logs[1]], rel=1e-5)


def test_outputs_checkpoints_and_adapter_may_be_links_to_another_disk(undisturbed, tmp_path):
    disk = tmp_path / "disk"
    for name in ("out", "adapter"):  # checkpoints is a link to what is not there yet
        (disk / name).mkdir(parents=True)
    (tmp_path / "out").symlink_to(disk / "out")
    shutil.copytree(undisturbed / "dataset", tmp_path / "out" / "dataset")
    for name in ("checkpoints", "adapter"):
        (tmp_path / "out" / name).symlink_to(disk / name)
    for steps in (2, 3):
        for path in (disk / "checkpoints").glob("checkpoint-*"):  # each moved to yet another disk
            path.symlink_to(path.rename(tmp_path / path.name))
        arguments = ["--max-steps", steps, "--overwrite", "--output-dir", tmp_path / "out"]
        result = run("train_llama.py", *COMMAND, *arguments)
        assert result.returncode == 0, result.stderr
        assert json.loads((disk / "adapter" / "run.json").read_text())["steps"] == steps
        assert [path.name for path in (disk / "checkpoints").glob("checkpoint-*")] == [f"checkpoint-{steps}"]
    assert all((tmp_path / "out" / name).is_symlink() for name in ("checkpoints", "adapter"))


@pytest.fixture
def handlers():
    """After a test that catches signals: what they did before."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


@pytest.mark.parametrize("number", STOPPING)
def test_what_a_terminal_or_a_batch_system_sends_asks_for_a_checkpoint(number, handlers, capsys):
    fake = SimpleNamespace(stop_signal=None)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    trainer.catch_signals(fake)
    signal.raise_signal(number)
    name = "Ctrl-C" if number == signal.SIGINT else number.name
    assert fake.stop_signal == number and f"{name}: stopping after this step" in capsys.readouterr().out
    assert signal.getsignal(number) == signal.SIG_DFL  # a second one ends it


def test_under_nohup_a_closed_terminal_does_not_stop_a_run(handlers):
    fake = SimpleNamespace(stop_signal=None)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it
    trainer.catch_signals(fake)
    signal.raise_signal(signal.SIGHUP)
    assert fake.stop_signal is None


def test_a_signal_to_one_of_several_processes_stops_all_of_them_unfinished():
    reduce = lambda own, _: torch.tensor([int(signal.SIGUSR1), 0])  # noqa: E731
    fake = SimpleNamespace(stop_signal=None, is_save_due=lambda: False, accelerator=SimpleNamespace(reduce=reduce))
    watch, control = trainer.Watch(fake), TrainerControl()
    watch.printed = time.time()
    args = SimpleNamespace(world_size=2, device="cpu")
    watch.on_step_end(args, TrainerState(global_step=3, max_steps=9), control)
    assert control.should_save and control.should_training_stop
    assert fake.stop_signal  # else it would write an adapter, as if this were the end


def test_a_second_run_in_the_same_folder_is_refused_and_a_kill_leaves_no_lock(undisturbed, tmp_path):
    shutil.copytree(undisturbed / "dataset", tmp_path / "dataset")
    printed = tmp_path / "printed"
    first = start("train_llama.py", *COMMAND, "--output-dir", tmp_path, streams=[printed, printed])
    while "step" not in printed.read_text():
        time.sleep(0.01)
    result = run("train_llama.py", *COMMAND, "--output-dir", tmp_path)
    assert_refused(result, "is in use by", f"process {first.pid}", "--output-dir")
    os.kill(first.pid, signal.SIGKILL)
    first.join(600)
    assert run("train_llama.py", *COMMAND, "--output-dir", tmp_path).returncode == 0
    assert_same_adapter(tmp_path, adapter_of(undisturbed))


def test_a_reader_that_goes_away_does_not_end_the_training(undisturbed, tmp_path):
    shutil.copytree(undisturbed / "dataset", tmp_path / "dataset")
    os.mkfifo(tmp_path / "pipe")
    streams, arguments = [tmp_path / "pipe", tmp_path / "errors"], ["--max-steps", "6", "--output-dir", tmp_path]
    process = start("train_llama.py", *COMMAND, *arguments, streams=streams)
    with (tmp_path / "pipe").open() as pipe:  # as `| head -n 1`
        assert pipe.readline()
    process.join(600)
    assert process.exitcode == 0, (tmp_path / "errors").read_text()
    assert json.loads((tmp_path / "adapter" / "run.json").read_text())["steps"] == 6


def test_weights_tokenizer_and_number_of_processes_are_part_of_a_run(undisturbed, tmp_path, monkeypatch):
    args = train_llama.parse_args(COMMAND)
    rows = {split: load_rows(undisturbed, split) for split in ("train", "validation")}
    shutil.copytree(FIXTURES / "tiny_llama2", tmp_path / "base")
    base = str(tmp_path / "base")

    def identity():
        return train_llama.run_identity(args, base, load_tokenizer(base), rows)

    first = identity()
    monkeypatch.setenv("WORLD_SIZE", "2")
    second = identity()
    with (tmp_path / "base" / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"7")
    third = identity()
    content = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(content | {"rms_norm_eps": 1e-3}))
    assert identity()["weights"] != third["weights"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(content))
    (tmp_path / "base" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    fourth = identity()
    content = json.loads((tmp_path / "base" / "tokenizer.json").read_text())
    (tmp_path / "base" / "tokenizer.json").write_text(json.dumps(content | {"post_processor": None}))
    fifth = identity()
    for before, after in ((third, fourth), (fourth, fifth)):
        assert {key for key in before if before[key] != after[key]} == {"tokenizer"}
    assert {key for key in first if first[key] != second[key]} == {"processes"}
    assert {key for key in second if second[key] != third[key]} == {"weights"}


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_best_checkpoint_that_is_no_longer_whole_is_an_error(damage, undisturbed, tmp_path, capsys):
    best = json.loads((undisturbed / "adapter" / "run.json").read_text())["best_step"]
    folder = tmp_path / "checkpoints" / f"checkpoint-{best}"
    if damage == "changed":
        shutil.copytree(undisturbed / "checkpoints", tmp_path / "checkpoints")
        with (folder / "adapter_model.safetensors").open("ab") as file:
            file.write(b"more")
    with pytest.raises(SystemExit) as stopped:
        train_llama.save_adapter(SimpleNamespace(output_dir=tmp_path), None, None, {"best_step": best})
    assert stopped.value.code == 2 and f"{folder}, the best one, is broken" in capsys.readouterr().err
    assert not (tmp_path / "adapter").exists()


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(undisturbed, tmp_path):
    shutil.copytree(undisturbed / "dataset", tmp_path / "dataset")
    interrupt(tmp_path, signal.SIGTERM, 9)
    (last,) = {max((tmp_path / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))}
    before = snapshot(last)

    printed = tmp_path / "printed"
    process = start("train_llama.py", *COMMAND, "--output-dir", tmp_path, streams=[printed, printed])
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))  # as on a full disk
    process.join(600)
    errors = printed.read_text()
    assert process.exitcode == 2 and "cannot write" in errors and "make room" in errors and "Traceback" not in errors
    assert snapshot(last) == before
    assert run("train_llama.py", *COMMAND, "--output-dir", tmp_path).returncode == 0
    assert_same_adapter(tmp_path, adapter_of(undisturbed))


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")  # at a port of its own


def launched(output, *arguments, launcher=TORCHRUN, script=None):
    script = script or ROOT / "train_llama.py"
    command = [sys.executable, *launcher, str(script), *COMMAND, "--lora-dropout", "0", *arguments]
    result = subprocess.run(
        [*map(str, command), "--output-dir", str(output)],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def one_process(dataset, tmp_path_factory):
    """The same global batch as two processes have, in one."""
    output = tmp_path_factory.mktemp("one")
    shutil.copytree(dataset / "dataset", output / "dataset")
    arguments = ["--lora-dropout", 0, "--max-steps", 8, "--gradient-accumulation-steps", 2]
    assert run("train_llama.py", *COMMAND, *arguments, "--output-dir", output).returncode == 0
    return output


# accelerate makes plain DDP of several CPU processes: accelerate/state.py has FSDP only for its list of accelerators.
# Taken for a GPU, the CPU shards the 4-bit weights over gloo as GPUs do over NCCL.
FSDP = ROOT / "pipeline" / "training" / "fsdp.yaml"
AS_GPUS = """
import sys
import accelerate.state
from accelerate.utils import DistributedType
sys.path.insert(0, {root!r})
start = accelerate.state.PartialState.__init__
def init(self, *args, **kwargs):
    start(self, *args, **kwargs)
    if self._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
        self._shared_state["distributed_type"] = DistributedType.MULTI_GPU
accelerate.state.PartialState.__init__ = init
import train_llama
from pipeline.training import trainer
make = trainer.QLoRATrainer
def checked(*args):
    made = make(*args)
    assert made.is_fsdp_enabled
    return made
trainer.QLoRATrainer = checked
train_llama.main()
"""


@pytest.mark.parametrize("kind", ["ddp", "ddp, layers computed again", "fsdp"])
def test_two_processes_follow_the_curve_of_one(kind, one_process, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(one_process / "dataset", output / "dataset")
    options = {}
    if kind == "fsdp":
        (tmp_path / "as_gpus.py").write_text(AS_GPUS.format(root=str(ROOT)))
        launcher = ("-m", "accelerate.commands.launch", "--config_file", FSDP, "--mixed_precision", "no",
                    "--main_process_port", "0")  # fmt: skip
        options = {"launcher": launcher, "script": tmp_path / "as_gpus.py"}
    way = "on" if "again" in kind else "off"
    arguments = ["--activation-checkpointing", way, "--max-steps", 8, "--save-minutes", 0.0001]
    result = launched(output, *arguments, **options)
    assert result.stdout.count("wrote ") == 1
    logs = [
        [json.loads(line) for line in (folder / "adapter" / "log.jsonl").read_text().splitlines()]
        for folder in (one_process, output)
    ]
    assert [entry["step"] for entry in logs[0]] == [entry["step"] for entry in logs[1]]
    for one, two in zip(*logs, strict=True):
        for key in ("loss", "eval_loss", "tokens"):
            assert (key in one) == (key in two) and one.get(key, 0) == pytest.approx(two.get(key, 0), rel=0.02)
    assert_same_adapter(output, adapter_of(one_process), atol=1e-5)  # sums in another order
