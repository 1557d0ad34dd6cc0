"""Tokenizers: the same tokens in training and in generation."""

import json
import shutil

import pytest
import sentencepiece
from conftest import FIXTURES, assert_refused, copied, run, test
from datasets import load_from_disk

import train_llama
from pipeline.tokens import END_TOKENS, encode, end_tokens, load_tokenizer, tokenizer_identity, write_for_others

BOTH = pytest.mark.parametrize("name", ["tiny_llama3", "tiny_llama2"])
ONE = pytest.mark.parametrize("chain", ["tiny_llama3"], indirect=True)


@ONE
def test_another_tokenizer_of_a_model_tested_alone_is_another_run(chain, tmp_path, refused):
    out = copied(chain, tmp_path)
    shutil.copytree(FIXTURES / "tiny_llama3", tmp_path / "model")
    alone = [out, "--model", tmp_path / "model", "--name", "alone", "--samsum-max-new-tokens", "1"]
    assert test(*alone, "--trivia-qa-max-new-tokens", "1") == 0
    path = tmp_path / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"post_processor": None}))  # no BOS in front
    assert "tokenizer " in refused(*alone, "--trivia-qa-max-new-tokens", "1")
    path.write_text(json.dumps(content))
    path = tmp_path / "model" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<|eot_id|>"}))
    assert "tokenizer " in refused(*alone, "--trivia-qa-max-new-tokens", "1")


@BOTH
def test_text_that_looks_like_a_special_token_stays_text(name):
    tokenizer = load_tokenizer(str(FIXTURES / name))
    special = set(tokenizer.all_special_ids)
    row = {"prompt": "Tom: <s></s> <|end_of_text|><|begin_of_text|> hi <unk>", "completion": " a </s> b"}
    ids = encode(tokenizer, {key: [value] for key, value in row.items()} | {"id": ["x"]})
    (prompt,), (completion,) = ids["prompt_ids"], ids["completion_ids"]
    assert [prompt[0], completion[-1]] == [tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert not special & {*prompt[1:], *completion[:-1]}
    assert tokenizer.decode(prompt[1:] + completion[:-1]).strip() == row["prompt"] + row["completion"]


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


@ONE
def test_transformers_4_knows_the_class_of_an_adapters_tokenizer(chain):
    config = json.loads((chain / "adapter" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] != "TokenizersBackend"


@pytest.mark.parametrize("legacy", [True, False])
def test_a_tokenizer_is_the_same_once_it_was_saved(legacy, tmp_path):
    base = shutil.copytree(FIXTURES / "tiny_llama2", tmp_path / "base")
    content = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(content | {"legacy": legacy}))
    tokenizer = load_tokenizer(str(base))
    tokenizer.save_pretrained(tmp_path / "saved")
    write_for_others(tmp_path / "saved")
    assert tokenizer_identity(load_tokenizer(str(tmp_path / "saved"))) == tokenizer_identity(tokenizer)


def test_a_tokenizer_that_ends_every_text_is_refused(tmp_path, capsys):
    base = shutil.copytree(FIXTURES / "tiny_llama3", tmp_path / "base")
    content = json.loads((base / "tokenizer.json").read_text())
    bos = next(part for part in content["post_processor"]["processors"] if part["type"] == "TemplateProcessing")
    eos = next(token for token in content["added_tokens"] if token["content"] == "<|end_of_text|>")
    name = eos["content"]
    bos["single"].append({"SpecialToken": {"id": name, "type_id": 0}})
    bos["special_tokens"][name] = {"id": name, "ids": [eos["id"]], "tokens": [name]}
    (base / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="2"):
        load_tokenizer(str(base))
    assert "puts EOS behind every text: mend its post_processor" in capsys.readouterr().err
    (base / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    assert load_tokenizer(str(base)).chat_template  # through which no prompt goes to the post_processor


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


@pytest.mark.parametrize("generation, config, expected", [
    ({"eos_token_id": 77}, [66], [77]),
    ({"eos_token_id": [77, 78]}, [66], [77, 78]),
    ({"eos_token_id": None}, [66], []),
    ({"do_sample": False}, [66], []),  # config.json's do not count, nor what LlamaConfig would fill in
    ({"do_sample": False}, None, []),
    (None, [66, 67], [66, 67]),
])  # fmt: skip
def test_the_ends_are_those_of_the_generation_config_or_without_one_of_the_config(
    generation, config, expected, tmp_path
):
    base = shutil.copytree(FIXTURES / "tiny_llama3", tmp_path / "base")
    content = json.loads((base / "config.json").read_text())
    content.pop("eos_token_id")
    (base / "config.json").write_text(json.dumps(content | ({"eos_token_id": config} if config else {})))
    (base / "generation_config.json").unlink(missing_ok=True)
    if generation:
        (base / "generation_config.json").write_text(json.dumps(generation))
    tokenizer = load_tokenizer(str(base))
    named = {tokenizer.convert_tokens_to_ids(token) for token in END_TOKENS} - {None, tokenizer.unk_token_id}
    assert end_tokens(str(base), tokenizer) == named | {tokenizer.eos_token_id, *expected}
