"""train_llama.py: the tokens are right for both families, bad input ends in one sentence."""

import json
import shutil

import pytest
import torch
from conftest import FIXTURES, assert_refused, run, snapshot
from datasets import load_from_disk
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import train_llama
from pipeline import models
from pipeline.tokens import load_tokenizer
from pipeline.training import estimate


def test_rows_that_are_too_long_are_dropped_and_counted_never_cut(dataset, capsys):
    tokenizer = load_tokenizer(str(FIXTURES / "tiny_llama3"))
    rows = load_from_disk(str(dataset / "dataset"))["train"]
    lengths = sorted(len(row["input_ids"]) for row in train_llama.tokenize(rows, tokenizer, 4096, "train"))
    kept = train_llama.tokenize(rows, tokenizer, lengths[-3], "train")
    assert sorted(len(row["input_ids"]) for row in kept) == [n for n in lengths if n <= lengths[-3]]
    assert "rows are longer than" in capsys.readouterr().out


def test_an_evaluation_in_between_does_not_change_the_gradients():
    model = models.load_model(str(FIXTURES / "tiny_llama3"), load_in_4bit=True)
    embeddings = model.get_input_embeddings().weight.requires_grad_(True)
    ids = torch.arange(20, 60)[None]

    def gradient():
        model.train()
        embeddings.grad = None
        model(input_ids=ids, labels=ids).loss.backward()
        return embeddings.grad.clone()

    before = gradient()
    with torch.no_grad():
        model.eval()(input_ids=ids)
    assert torch.equal(gradient(), before)


@pytest.mark.parametrize("chain", ["tiny_llama3"], indirect=True)
def test_weights_that_are_unpacked_once_give_the_very_adapter_that_packed_ones_give(chain, tmp_path, monkeypatch):
    noted = json.loads((chain / "adapter" / "run.json").read_text())
    unpacked, unpack = [], LlamaForCausalLM.dequantize
    monkeypatch.setattr(LlamaForCausalLM, "dequantize", lambda model: unpacked.append(model.dtype) or unpack(model))
    trained = []
    for room in (True, False):
        out = tmp_path / str(room)
        shutil.copytree(chain / "dataset", out / "dataset")
        if not room:
            monkeypatch.setattr(estimate, "fits_unpacked", lambda *_: False)
        steps = ["--max-steps", "3", "--max-length", "512", "--warmup-steps", "0", "--logging-steps", "1"]
        train_llama.main(["--model", noted["base_model"], *steps, "--learning-rate", "1e-2", "--output-dir", str(out)])
        trained.append(load_file(out / "adapter" / "adapter_model.safetensors"))
        assert json.loads((out / "adapter" / "run.json").read_text())["settings"]["load_in_4bit"]
    assert unpacked == [torch.float32] and all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_the_adapter_folder_is_whole(chain):
    adapter = chain / "adapter"
    names = ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "run.json", "log.jsonl", "loss.png"]
    assert all((adapter / name).is_file() for name in names)
    assert json.loads((adapter / "run.json").read_text())["steps"] == 3
    assert any("loss" in json.loads(line) for line in (adapter / "log.jsonl").read_text().splitlines())
    assert not list(adapter.glob("*.bin"))


def test_scores_are_written(chain):
    result = run("evaluations.py", "--output-dir", chain)
    assert result.returncode == 0, result.stderr
    assert (chain / "evaluation.json").is_file()


TINY = ["--model", FIXTURES / "tiny_llama3"]


def test_a_missing_predecessor_is_named(dataset, tmp_path):
    assert_refused(
        run("train_llama.py", *TINY, "--output-dir", tmp_path), "no dataset at", "run build_dataset.py first"
    )
    assert_refused(run("merge_llama.py", "--output-dir", tmp_path), "no adapter at", "run train_llama.py first")
    assert_refused(run("evaluations.py", "--output-dir", tmp_path), "run test_llama.py first")


def test_a_dataset_of_another_schema_or_without_rows(dataset, tmp_path):
    data = load_from_disk(str(dataset / "dataset"))
    data.rename_column("completion", "answer").save_to_disk(str(tmp_path / "a" / "dataset"))
    assert_refused(run("train_llama.py", *TINY, "--output-dir", tmp_path / "a"), "has no column completion")
    data["validation"] = data["validation"].select([])
    data.save_to_disk(str(tmp_path / "b" / "dataset"))
    assert_refused(run("train_llama.py", *TINY, "--output-dir", tmp_path / "b"), "validation of", "is empty")


@pytest.mark.parametrize("flag", ["--lora-r=0", "--max-steps=-1", "--lora-dropout=1", "--learning-rate=0"])
def test_a_flag_out_of_range(flag, dataset):
    assert_refused(run("train_llama.py", *TINY, flag, "--output-dir", dataset), flag.split("=")[0])


def test_flash_attention_that_is_not_here_is_said_before_a_model_is_loaded(dataset):
    result = run("train_llama.py", "--attn-implementation", "flash_attention_2", "--output-dir", dataset)
    assert_refused(result, "--attn-implementation flash_attention_2", "pip install flash-attn")


def test_tokens_beyond_the_vocabulary_are_said_before_hours_of_training(dataset, tmp_path):
    shutil.copytree(FIXTURES / "tiny_llama2", tmp_path / "base")
    tokenizer = load_tokenizer(str(FIXTURES / "tiny_llama2"))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "base")
    shutil.copytree(dataset, tmp_path / "out")
    for flag in ("--overwrite", "--dry-run"):
        result = run("train_llama.py", "--model", tmp_path / "base", flag, "--output-dir", tmp_path / "out")
        assert_refused(result, "[PAD]", "resize the model, and save it")


def test_a_run_that_diverges_leaves_the_old_adapter(chain, tmp_path):
    shutil.copytree(chain, tmp_path / "out")
    before = snapshot(tmp_path / "out" / "adapter")
    arguments = ["--model", FIXTURES / "tiny_llama2", "--max-steps", 3, "--max-length", 512, "--warmup-steps", 0]
    arguments += ["--learning-rate", "1e30", "--overwrite"]
    result = run("train_llama.py", *arguments, "--output-dir", tmp_path / "out")
    assert_refused(result, "training diverged", "--learning-rate")
    assert snapshot(tmp_path / "out" / "adapter") == before


def test_the_training_loss_of_a_run_is_a_mean_over_its_steps():
    history = [{"step": 4, "loss": 2.0}, {"step": 4, "eval_loss": 9.0}, {"step": 5, "loss": 7.0}]
    assert train_llama.mean_training_loss(history) == pytest.approx((4 * 2.0 + 7.0) / 5)
