"""train_llama.py and test_llama.py: the tokens are right for both families, bad input ends in one sentence."""

import json
import math
import shutil

import pytest
import torch
from conftest import FIXTURES, assert_refused, run, snapshot
from datasets import load_from_disk

import test_llama as tester
import train_llama

BOTH = pytest.mark.parametrize("name", ["tiny_llama3", "tiny_llama2"])


@BOTH
def test_one_bos_in_front_and_eos_as_the_last_label(name, dataset):
    tokenizer = train_llama.load_tokenizer(str(FIXTURES / name))
    rows = load_from_disk(str(dataset / "dataset"))["train"]
    for row in train_llama.tokenize(rows, tokenizer, 4096, "train"):
        assert row["input_ids"].count(tokenizer.bos_token_id) == 1 and row["input_ids"][0] == tokenizer.bos_token_id
        assert row["labels"][-1] == tokenizer.eos_token_id
        assert len(row["labels"]) == len(row["input_ids"])


@BOTH
def test_the_prompt_has_the_same_tokens_in_training_and_in_generation(name, dataset):
    tokenizer = train_llama.load_tokenizer(str(FIXTURES / name))
    rows = load_from_disk(str(dataset / "dataset"))["train"]
    for row, tokens in zip(rows, train_llama.tokenize(rows, tokenizer, 4096, "train"), strict=True):
        masked = [i for i, label in zip(tokens["input_ids"], tokens["labels"], strict=True) if label == -100]
        assert masked == tokenizer(row["prompt"]).input_ids
        labels = [label for label in tokens["labels"] if label != -100]
        assert tokenizer.decode(labels[:-1]).strip() == row["completion"].strip()


@BOTH
def test_no_token_is_added_and_a_pad_token_is_there(name):
    tokenizer = train_llama.load_tokenizer(str(FIXTURES / name))
    config = json.loads((FIXTURES / name / "config.json").read_text())
    assert len(tokenizer) <= config["vocab_size"]
    assert tokenizer.pad_token_id is not None


def test_rows_that_are_too_long_are_dropped_and_counted_never_cut(dataset, capsys):
    tokenizer = train_llama.load_tokenizer(str(FIXTURES / "tiny_llama3"))
    rows = load_from_disk(str(dataset / "dataset"))["train"]
    lengths = sorted(len(row["input_ids"]) for row in train_llama.tokenize(rows, tokenizer, 4096, "train"))
    kept = train_llama.tokenize(rows, tokenizer, lengths[-3], "train")
    assert sorted(len(row["input_ids"]) for row in kept) == [n for n in lengths if n <= lengths[-3]]
    assert "rows are longer than" in capsys.readouterr().out


def test_an_evaluation_in_between_does_not_change_the_gradients():
    model = train_llama.load_model(str(FIXTURES / "tiny_llama3"), load_in_4bit=True)
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


def test_the_adapter_folder_is_whole(chain):
    adapter = chain / "adapter"
    names = ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "run.json", "log.jsonl", "loss.png"]
    assert all((adapter / name).is_file() for name in names)
    assert json.loads((adapter / "run.json").read_text())["steps"] == 3
    assert any("loss" in json.loads(line) for line in (adapter / "log.jsonl").read_text().splitlines())
    assert not list(adapter.glob("*.bin"))


def test_perplexity_equals_transformers_own_loss_row_by_row(chain):
    for task in ("samsum", "trivia_qa"):
        file = json.loads((chain / f"{task}_predictions.json").read_text())
        tokenizer = train_llama.load_tokenizer(file["model"])
        base = train_llama.load_model(file["model"], load_in_4bit=True)
        model = tester.load_adapter(base, chain / "adapter")
        rows = load_from_disk(str(chain / "dataset"))["test"].filter(lambda name, task=task: name == task, None, False,
                                                                     input_columns="task")  # fmt: skip
        nll, count = 0.0, 0
        with torch.inference_mode():
            for row in rows:
                prompt = tokenizer(row["prompt"]).input_ids
                ids = tokenizer(row["prompt"] + row["completion"]).input_ids + [tokenizer.eos_token_id]
                labels = [-100] * len(prompt) + ids[len(prompt) :]
                loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.item()
                nll += loss * (len(ids) - len(prompt))
                count += len(ids) - len(prompt)
        tuned = file["perplexity"]["tuned"]
        assert tuned["tokens"] == count
        assert tuned["perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-4)
        assert tuned["perplexity"] != file["perplexity"]["base"]["perplexity"]


def test_the_prediction_files_follow_the_contract(chain):
    data = load_from_disk(str(chain / "dataset"))["test"]
    for task in ("samsum", "trivia_qa"):
        file = json.loads((chain / f"{task}_predictions.json").read_text())
        assert [e["id"] for e in file["examples"]] == [row["id"] for row in data if row["task"] == task]
        for example in file["examples"]:
            assert {"references", "prediction", "base_prediction"} <= set(example)
            assert "<|" not in example["prediction"] and "</s>" not in example["prediction"]


def test_scores_are_written(chain):
    result = run("evaluations.py", "--output-dir", chain)
    assert result.returncode == 0, result.stderr
    assert (chain / "evaluation.json").is_file()


TINY = ["--model", FIXTURES / "tiny_llama3"]


def test_a_missing_predecessor_is_named(dataset, tmp_path):
    assert_refused(
        run("train_llama.py", *TINY, "--output-dir", tmp_path), "no dataset at", "run build_dataset.py first"
    )
    assert_refused(run("test_llama.py", "--output-dir", tmp_path), "no dataset at", "run build_dataset.py first")
    assert_refused(run("test_llama.py", "--output-dir", dataset), "no adapter at", "run train_llama.py first")
    assert_refused(run("merge_llama.py", "--output-dir", tmp_path), "no adapter at", "run train_llama.py first")
    assert_refused(run("evaluations.py", "--output-dir", tmp_path), "run test_llama.py first")


def test_a_model_that_is_none(dataset, tmp_path):
    for model in ("llama9", "./nowhere"):
        assert_refused(run("train_llama.py", "--model", model, "--output-dir", dataset), f"unknown model {model}")
    (tmp_path / "empty").mkdir()
    assert_refused(run("train_llama.py", "--model", tmp_path / "empty", "--output-dir", dataset), "no config.json")
    result = run("train_llama.py", "--model", "nobody/nothing", "--output-dir", dataset)
    assert_refused(result, "cannot load nobody/nothing", "network")


def test_a_gated_model_says_where_to_accept_the_licence(capsys):
    with pytest.raises(SystemExit):
        train_llama.explain_load_error("meta-llama/X", OSError("You are trying to access a gated repo.\n401 Client"))
    assert (
        "accept its licence at https://huggingface.co/meta-llama/X, then run: hf auth login" in capsys.readouterr().err
    )


def test_a_cut_off_model_and_a_broken_dataset(dataset, tmp_path):
    shutil.copytree(FIXTURES / "tiny_llama3", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    result = run("train_llama.py", "--model", tmp_path / "model", "--output-dir", dataset)
    assert_refused(result, "cannot load the model in", "missing or broken")
    shutil.copytree(dataset / "dataset", tmp_path / "dataset")
    next((tmp_path / "dataset" / "train").glob("data-*.arrow")).write_bytes(b"cut")
    assert_refused(run("train_llama.py", *TINY, "--output-dir", tmp_path), "cannot read train of")


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


def damaged(name, tmp_path, change):
    """A copy of the tiny Llama's folder with its config changed."""
    shutil.copytree(FIXTURES / name, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | change))
    return tmp_path / "model"


@pytest.mark.parametrize(
    "change, words", [({"num_hidden_layers": 6}, "lacks weights"), ({"model_type": "gpt2"}, "gpt2")]
)
def test_a_base_with_missing_weights_or_no_llama(change, words, dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "out")
    model = damaged("tiny_llama2", tmp_path, change)
    result = run("train_llama.py", "--model", model, "--max-steps", 1, "--output-dir", tmp_path / "out")
    assert_refused(result, words)
    assert not (tmp_path / "out" / "adapter").exists()


def test_an_adapter_without_its_tensors_is_no_adapter(chain, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(chain, tmp_path / "out")
    path = tmp_path / "out" / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(dict(list(tensors.items())[4:]), path, metadata={"format": "pt"})
    for script in ("test_llama.py", "merge_llama.py"):
        assert_refused(run(script, "--output-dir", tmp_path / "out"), "run train_llama.py again")


def test_a_run_that_diverges_leaves_the_old_adapter(chain, tmp_path):
    shutil.copytree(chain, tmp_path / "out")
    before = snapshot(tmp_path / "out" / "adapter")
    arguments = ["--model", FIXTURES / "tiny_llama2", "--max-steps", 3, "--max-length", 512, "--warmup-steps", 0]
    arguments += ["--learning-rate", "1e30", "--overwrite"]
    result = run("train_llama.py", *arguments, "--output-dir", tmp_path / "out")
    assert_refused(result, "training diverged", "--learning-rate")
    assert snapshot(tmp_path / "out" / "adapter") == before
