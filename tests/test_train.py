"""train_llama.py: the tokens are right for both families, bad input ends in one sentence."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import sentencepiece
import torch
from conftest import FIXTURES, assert_refused, run, snapshot
from datasets import load_from_disk

import train_llama
from pipeline import models
from pipeline.tokens import load_tokenizer

BOTH = pytest.mark.parametrize("name", ["tiny_llama3", "tiny_llama2"])


@BOTH
def test_one_bos_in_front_and_eos_as_the_last_label(name, dataset):
    tokenizer = load_tokenizer(str(FIXTURES / name))
    rows = load_from_disk(str(dataset / "dataset"))["train"]
    for row in train_llama.tokenize(rows, tokenizer, 4096, "train"):
        assert row["input_ids"].count(tokenizer.bos_token_id) == 1 and row["input_ids"][0] == tokenizer.bos_token_id
        assert row["labels"][-1] == tokenizer.eos_token_id
        assert len(row["labels"]) == len(row["input_ids"])


@BOTH
def test_the_prompt_has_the_same_tokens_in_training_and_in_generation(name, dataset):
    tokenizer = load_tokenizer(str(FIXTURES / name))
    rows = load_from_disk(str(dataset / "dataset"))["train"]
    for row, tokens in zip(rows, train_llama.tokenize(rows, tokenizer, 4096, "train"), strict=True):
        masked = [i for i, label in zip(tokens["input_ids"], tokens["labels"], strict=True) if label == -100]
        assert masked == tokenizer(row["prompt"]).input_ids
        labels = [label for label in tokens["labels"] if label != -100]
        assert tokenizer.decode(labels[:-1]).strip() == row["completion"].strip()


def test_a_llama_2_folder_with_tokenizer_model_alone_has_its_pieces(dataset, tmp_path, capsys):
    rows = load_from_disk(str(dataset / "dataset"))["train"]
    texts = [line for row in rows for line in (row["prompt"] + row["completion"]).splitlines()]
    shutil.copy(FIXTURES / "tiny_llama2" / "config.json", tmp_path)
    options = {"vocab_size": 400, "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
    options |= {"remove_extra_whitespaces": False, "minloglevel": 2}  # as Llama 2's
    with (tmp_path / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=file, **options)
    with pytest.raises(SystemExit):
        load_tokenizer(str(tmp_path))
    assert "no tokenizer_config.json" in capsys.readouterr().err
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": True, "legacy": False}))
    tokenizer = load_tokenizer(str(tmp_path))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for row, tokens in zip(rows, train_llama.tokenize(rows, tokenizer, 9999, "train"), strict=True):
        whole = row["prompt"] + row["completion"]
        assert tokens["input_ids"] == [pieces.bos_id(), *pieces.encode(whole), pieces.eos_id()]


@BOTH
def test_no_token_is_added_and_a_pad_token_is_there(name):
    tokenizer = load_tokenizer(str(FIXTURES / name))
    config = json.loads((FIXTURES / name / "config.json").read_text())
    assert len(tokenizer) <= config["vocab_size"]
    assert tokenizer.pad_token_id is not None


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


def test_a_model_that_is_none(dataset, tmp_path):
    for model in ("llama9", "./nowhere"):
        assert_refused(run("train_llama.py", "--model", model, "--output-dir", dataset), f"unknown model {model}")
    (tmp_path / "empty").mkdir()
    assert_refused(run("train_llama.py", "--model", tmp_path / "empty", "--output-dir", dataset), "no config.json")
    result = run("train_llama.py", "--model", "nobody/nothing", "--output-dir", dataset)
    assert_refused(result, "cannot load nobody/nothing", "network")


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does, by the owner's name: the same status for gated and for missing, told by a header."""

    def do_GET(self):
        code = "GatedRepo" if "/gated/" in self.path else "RepoNotFound"
        self.send_response(403 if code == "GatedRepo" else 401)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


GATED = "gated/401-model is gated: accept its licence at https://huggingface.co/gated/401-model, then run: "
TYPO = "there is no model nobody/gated-typo on the hub"


@pytest.mark.parametrize("model, words", [("gated/401-model", GATED), ("nobody/gated-typo", TYPO)])
def test_a_gated_model_and_a_missing_one_are_told_apart(model, words, dataset, tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        environment = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0"}
        environment["HF_HUB_CACHE"] = str(tmp_path)
        result = run("train_llama.py", "--model", model, "--output-dir", dataset, **environment)
        hub.shutdown()
    assert_refused(result, words, "hf auth login")


def test_one_model_has_one_name_and_a_path_with_gated_in_it_is_not_called_gated(dataset, tmp_path, monkeypatch):
    shutil.copytree(FIXTURES / "tiny_llama3", tmp_path / "aggregated-401")
    monkeypatch.chdir(tmp_path)
    names = ["aggregated-401", "./aggregated-401", "aggregated-401/", str(tmp_path / "aggregated-401")]
    assert {models.find_model(name) for name in names} == {str(tmp_path / "aggregated-401")}
    (tmp_path / "aggregated-401" / "model.safetensors").unlink()
    result = run("train_llama.py", "--model", tmp_path / "aggregated-401", "--output-dir", dataset)
    assert_refused(result, "aggregated-401 has no model.safetensors", "get the missing file")
    assert "is gated" not in result.stderr


def test_a_base_that_cannot_be_merged_is_refused_at_once(dataset, tmp_path):
    for folder in ("pickled", "quantised"):
        shutil.copytree(FIXTURES / "tiny_llama3", tmp_path / folder)
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    config = json.loads((tmp_path / "quantised" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "quantised" / "config.json").write_text(json.dumps(config))
    for folder, words in (("pickled", "convert it to safetensors"), ("quantised", "take the 16-bit model")):
        for arguments in ([], ["--dry-run"]):
            result = run("train_llama.py", "--model", tmp_path / folder, *arguments, "--output-dir", dataset)
            assert_refused(result, words)


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


def test_a_tokenizer_without_bos_is_taken_as_it_is_and_two_are_refused(dataset, tmp_path):
    for name in ("none", "two"):
        shutil.copytree(FIXTURES / "tiny_llama3", tmp_path / name)
        path = tmp_path / name / "tokenizer.json"
        content = json.loads(path.read_text())
        if name == "none":
            content["post_processor"] = None
        else:
            bos = next(
                part for part in content["post_processor"]["processors"] if part["type"] == "TemplateProcessing"
            )
            bos["single"].insert(0, bos["single"][0])
        path.write_text(json.dumps(content))
    shutil.copytree(dataset / "dataset", tmp_path / "out" / "dataset")
    tiny = ["--max-steps", 1, "--max-length", 512, "--output-dir", tmp_path / "out"]
    assert_refused(run("train_llama.py", "--model", tmp_path / "two", *tiny), "BOS in front twice")
    assert run("train_llama.py", "--model", tmp_path / "none", *tiny).returncode == 0
    rows = load_from_disk(str(dataset / "dataset"))["train"]
    tokenizer = load_tokenizer(str(tmp_path / "none"))
    for row in train_llama.tokenize(rows, tokenizer, 4096, "train"):
        assert tokenizer.bos_token_id not in row["input_ids"] and row["labels"][-1] == tokenizer.eos_token_id
