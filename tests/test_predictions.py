"""The prediction files: their form, and that no run is lost, repeated or mixed with another."""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, copied, run, snapshot, start, test
from datasets import load_from_disk
from safetensors.torch import load_file, save_file
from test_testing import column, read, same_columns

from pipeline.files import only_run_in
from pipeline.testing import predictions

TASKS = ("samsum", "trivia_qa")
ONE = pytest.mark.parametrize("chain", ["tiny_llama3"], indirect=True)
SHORT = ["--samsum-max-new-tokens", "8"]


def assert_same_files(out, name):
    for task in TASKS:
        paths = [out / f"{task}_predictions{suffix}.json" for suffix in ("", name)]
        assert paths[0].read_bytes() == paths[1].read_bytes()


def test_the_prediction_files_follow_the_contract_in_the_order_of_the_dataset(chain):
    data = load_from_disk(str(chain / "dataset"))["test"]
    for task in TASKS:
        file = read(chain, task)
        assert [e["id"] for e in file["examples"]] == [row["id"] for row in data if row["task"] == task]
        assert file["task"] == task and file["adapter"] == str(chain / "adapter")
        for example in file["examples"]:
            assert {"references", "answer_in_context", "prediction", "base_prediction", "tokens"} <= set(example)
            assert "<|" not in example["prediction"] and "</s>" not in example["prediction"]
        for system, prefix in (("tuned", ""), ("base", "base_")):
            hit = sum(column(chain, task, prefix + "hit_max_new_tokens"))
            assert file["perplexity"][system]["hit_max_new_tokens"] == hit
    assert not list(chain.glob(".*"))


@ONE
def test_stopped_by_ctrl_c_and_killed_twice_it_goes_on_and_writes_the_same_bytes(chain, out, tmp_path):
    printed = tmp_path / "printed"
    arguments = ["--max-batch-tokens", "1", "--samsum-max-new-tokens", "40", "--output-dir", out]
    for count, stop in ((1, signal.SIGINT), (3, signal.SIGKILL), (5, signal.SIGKILL)):
        process, done = start("test_llama.py", *arguments, streams=[tmp_path / "stdout", printed]), 0
        while done < count:  # of the twelve batches, counting those of a file that is whole
            assert process.is_alive(), printed.read_text()
            time.sleep(0.002)
            work = [path.read_bytes().count(b"\n") for path in out.glob(".*.jsonl") if path.exists()]
            done = sum(work) + 6 * (out / "samsum_predictions.json").exists()
        time.sleep(random.uniform(0, 0.05))
        os.kill(process.pid, stop)
        process.join()
        assert process.exitcode == (130 if stop == signal.SIGINT else -stop)
    assert "give the same command again" in printed.read_text() and "Traceback" not in printed.read_text()
    result = run("test_llama.py", *arguments)
    assert result.returncode == 0, result.stderr
    assert "of 6 rows are there from before" in result.stdout and not list(out.glob(".*"))
    assert test(out, *arguments[:4], "--name", "undisturbed") == 0
    assert_same_files(out, "_undisturbed")


@ONE
def test_two_processes_write_the_same_files_as_one(out, capsys):
    arguments = [*SHORT, "--max-batch-tokens", "400", "--output-dir", str(out)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]  # at a port of its own
    launch = [sys.executable, *torchrun, "test_llama.py", "--name", "two"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*launch, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "first process" in result.stdout and result.stdout.count("samsum perplexity") == 1
    assert test(out, *arguments[:4]) == 0
    printed = result.stdout, capsys.readouterr().out
    shares = [[int(n.replace(",", "")) for n in re.findall(r"([\d,]+) tokens in", text)] for text in printed]
    assert all(0.2 * whole < share < 0.8 * whole for share, whole in zip(*shares, strict=True))  # of the first process
    assert_same_files(out, "_two")


@ONE
@pytest.mark.parametrize("cut, healed", [(0, 6), (1, 5), (20, 5)])
def test_work_left_behind_is_used_and_a_cut_off_line_healed(cut, healed, chain, out, monkeypatch, capsys):
    monkeypatch.setattr(predictions, "write_predictions", lambda *rest: (_ for _ in ()).throw(RuntimeError))
    with pytest.raises(RuntimeError):
        test(out, *SHORT, "--max-batch-tokens", "1")
    monkeypatch.undo()
    part = out / ".samsum_predictions.part0.jsonl"
    part.write_bytes(part.read_bytes()[: -cut or None])
    if not cut:
        part.rename(out / ".samsum_predictions.part3.jsonl")
    capsys.readouterr()
    assert test(out, *SHORT, "--max-batch-tokens", "1") == 0
    assert f"samsum: going on, {healed} of 6 rows are there from before" in capsys.readouterr().out
    assert column(out, "samsum", "prediction") == column(chain, "samsum", "prediction")
    assert not list(out.glob(".*"))


@ONE
def test_a_finished_run_is_not_repeated_and_another_one_needs_overwrite(chain, tmp_path, capsys, refused):
    out = copied(chain, tmp_path, predictions=True)
    before = snapshot(out)
    work = {"settings": read(out, "samsum")["settings"], "examples": []}  # a kill came before its removal
    (out / ".samsum_predictions.part0.jsonl").write_text(json.dumps(work) + "\n")
    assert test(out, *SHORT) == 0
    assert "nothing to do" in capsys.readouterr().out and snapshot(out) == before
    assert "samsum max new tokens 8 there, 9 now" in refused(out, "--samsum-max-new-tokens", "9")
    assert snapshot(out) == before
    path = out / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"peft_version": "9", "lora_dropout": 0.3}))  # change no number
    assert test(out, *SHORT) == 0
    path.write_text(json.dumps(config | {"lora_alpha": 5}))
    assert "(the adapter's configuration is another one)" in refused(out, *SHORT)
    path.write_text(json.dumps(config))
    path = out / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor * 0.5 for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    assert "adapter" in refused(out, *SHORT)
    (out / "samsum_predictions.json").write_text('{"task": "samsum", "examples": []}')  # another system's
    assert "--overwrite" in refused(out, *SHORT)
    part = out / ".samsum_predictions.part0.jsonl"
    part.write_text(json.dumps({"settings": {"model": "another"}}) + "\n")
    assert "model another there" in refused(out, *SHORT) and part.exists()
    assert test(out, *SHORT, "--overwrite") == 0 and not part.exists()
    assert column(out, "samsum", "base_nll") == column(chain, "samsum", "base_nll")
    assert column(out, "samsum", "nll") != column(chain, "samsum", "nll")
    assert test(out, *SHORT, "--overwrite") == 0 and "nothing to do" not in capsys.readouterr().out


@ONE
def test_one_run_at_a_time_and_links_to_other_disks(chain, out, tmp_path, refused):
    (tmp_path / "link").symlink_to(out)
    (tmp_path / "elsewhere.json").write_text("{}")
    (out / "samsum_predictions.json").symlink_to(tmp_path / "elsewhere.json")
    with only_run_in(out):
        before = snapshot(out)
        assert "is in use by" in refused(tmp_path / "link", *SHORT, "--overwrite") and snapshot(out) == before
    assert test(tmp_path / "link", *SHORT, "--overwrite") == 0
    assert (out / "samsum_predictions.json").is_symlink() and not list(out.glob(".*"))
    assert json.loads((tmp_path / "elsewhere.json").read_text())["examples"] == read(chain, "samsum")["examples"]


@ONE
@pytest.mark.parametrize("size", [500, 3000])  # of the work files, of the predictions
def test_a_full_disk_is_one_sentence_and_the_rerun_succeeds(size, chain, out, refused):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        assert "make room, then give the same command again" in refused(out, *SHORT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (out / "samsum_predictions.json").exists() and not (out / ".samsum_predictions.json.new").exists()
    assert test(out, *SHORT) == 0 and not list(out.glob(".*"))
    same_columns(out, chain, "prediction")
