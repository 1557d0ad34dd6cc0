"""test_llama.py: perplexity is the textbook's, predictions are each row's own, nothing is lost when it is killed."""

import io
import json
import math
import re
import shutil
import sys

import pytest
import torch
from conftest import FIXTURES, assert_refused, copied, run, snapshot, test
from datasets import DatasetDict, load_from_disk
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import test_llama as tester
from pipeline import models
from pipeline.files import rows_of
from pipeline.testing import predictions
from pipeline.tokens import encode, load_tokenizer

TASKS = ("samsum", "trivia_qa")
BOTH = pytest.mark.parametrize("name", ["tiny_llama3", "tiny_llama2"])
ONE = pytest.mark.parametrize("chain", ["tiny_llama3"], indirect=True)
SHORT = ["--samsum-max-new-tokens", "8"]


def read(folder, task, name=""):
    return json.loads((folder / f"{task}_predictions{name}.json").read_text(encoding="utf-8"))


def column(folder, task, key, name=""):
    return [example[key] for example in read(folder, task, name)["examples"]]


def base_of(chain):
    return models.read_adapter(chain / "adapter")


def prompts_of(model_folder, out):
    return load_tokenizer(str(model_folder)), load_from_disk(str(out / "dataset"))["test"]


def same_columns(out, other, *keys, name="", other_name="", **tolerance):
    """Whether both have the same there, in both tasks; numbers as nearly as `tolerance` of pytest.approx says."""
    for task in TASKS:
        for key in keys:
            expected = column(other, task, key, other_name)
            assert column(out, task, key, name) == (pytest.approx(expected, **tolerance) if tolerance else expected)


@ONE
def test_own_rows_are_tested_like_the_others_into_a_file_of_that_name(chain, tmp_path, capsys, refused):
    """The rows of trivia_qa under another name: the same answers."""
    out, rows = tmp_path / "out", rows_of(load_from_disk(str(chain / "dataset"))["test"], "trivia_qa")
    own = rows.map(lambda row: {"task": "own", "id": row["id"].replace("trivia_qa", "own")})
    DatasetDict(test=own).save_to_disk(str(out / "dataset"))
    (out / "dataset" / "tasks.json").write_text(json.dumps({"own": {"prompt": "{prompt}", "one_line": True}}))
    arguments = ["--adapter", chain / "adapter", "--own-max-new-tokens", tester.TRIVIA_QA_MAX_NEW_TOKENS]
    assert test(out, *arguments) == 0
    assert re.search(r"\nown perplexity +[\d.,]+ +[\d.,]+\n", capsys.readouterr().out)
    assert [path.name for path in out.glob("*_predictions*")] == ["own_predictions.json"]
    for key in ("prediction", "base_prediction", "nll", "base_nll", "new_tokens", "hit_max_new_tokens"):
        assert column(out, "own", key) == column(chain, "trivia_qa", key)
    settings = read(out, "own")["settings"]
    assert [name for name in settings if "new_tokens" in name] == ["own_max_new_tokens"]  # of the tasks with rows
    assert test(out, *arguments, "--samsum-max-new-tokens", 7) == 0 and "nothing to do" in capsys.readouterr().out
    assert "own max new tokens 24 there, 25 now" in refused(out, *arguments[:-1], 25)
    DatasetDict(test=rows).save_to_disk(str(tmp_path / "next" / "dataset"))
    shutil.rmtree(out / "dataset")
    (tmp_path / "next" / "dataset").rename(out / "dataset")
    assert test(out, *arguments[:2], "--overwrite") == 0  # without own rows, no file of theirs stays
    assert [path.name for path in out.glob("*_predictions*")] == ["trivia_qa_predictions.json"]


SHOTS = ["--adapter", "none", "--shots", 3, "--name", "shots", "--samsum-max-new-tokens", 40]


def texts_with_examples(out, task):
    """[(prompt with the examples of a predictions file in front, completion)] of a task's test rows."""
    data = load_from_disk(str(out / "dataset"))
    examples = {row["id"]: row["prompt"] + row["completion"] + "\n\n" for row in data["train"]}
    front = "".join(examples[row_id] for row_id in read(out, task, "_shots")["settings"]["shot_ids"][task])
    return [(front + row["prompt"], row["completion"]) for row in rows_of(data["test"], task)]


@BOTH
def test_solved_train_examples_are_in_front_of_each_prompt_and_the_loss_is_that_of_the_completion(
    name, dataset, tmp_path
):
    out = tmp_path / "out"
    shutil.copytree(dataset, out)
    model_alone = ["--model", FIXTURES / name]
    assert test(out, *SHOTS, *model_alone) == 0
    assert test(out, *SHORT, *model_alone, "--name", "base") == 0
    tokenizer, data = load_tokenizer(str(FIXTURES / name)), load_from_disk(str(out / "dataset"))
    model = models.load_model(str(FIXTURES / name), load_in_4bit=False)
    settings = read(out, "samsum", "_shots")["settings"]
    assert settings["shots"] == 3 and "shots" not in read(out, "samsum", "_base")["settings"]
    for task in TASKS:
        ids = encode(tokenizer, rows_of(data["train"], task).to_dict())
        sizes = [len(prompt + completion) for prompt, completion in zip(*ids.values(), strict=True)]
        size_of = dict(zip(rows_of(data["train"], task)["id"], sizes, strict=True))
        shots = settings["shot_ids"][task]
        assert len(set(shots)) == 3 and max(size_of[shot] for shot in shots) <= sorted(sizes)[len(sizes) // 2]
        assert settings["shot_tokens"][task] == sum(size_of[shot] for shot in shots)
        losses = []
        for prompt, completion in texts_with_examples(out, task):
            start = len(tokenizer(prompt).input_ids)
            whole = torch.tensor([[*tokenizer(prompt + completion).input_ids, tokenizer.eos_token_id]])
            labels = whole.clone()
            labels[:, :start] = -100
            with torch.inference_mode():
                losses.append(model(whole, labels=labels).loss.item() * (whole.shape[1] - start))
        assert column(out, task, "nll", "_shots") == pytest.approx(losses, rel=1e-4)
        assert column(out, task, "tokens", "_shots") == column(out, task, "tokens", "_base")
        assert column(out, task, "nll", "_shots") != column(out, task, "nll", "_base")


@ONE
def test_an_interrupted_run_with_examples_resumes_and_another_number_of_them_is_another_run(
    chain, out, monkeypatch, capsys, refused
):
    monkeypatch.setattr(predictions, "write_predictions", lambda *rest: (_ for _ in ()).throw(RuntimeError))
    with pytest.raises(RuntimeError):
        test(out, *SHOTS)
    monkeypatch.undo()
    capsys.readouterr()
    assert test(out, *SHOTS) == 0 and "samsum: going on, 6 of 6 rows are there" in capsys.readouterr().out
    assert test(out, *SHOTS) == 0 and capsys.readouterr().out.count("nothing to do") == 2
    before = snapshot(out)
    assert "shots 3 there, 2 now" in refused(out, *SHOTS, "--shots", 2)
    assert "shots 3 there, 0 now" in refused(out, *SHOTS, "--shots", 0)
    assert snapshot(out) == before
    assert test(out, *SHOTS, "--overwrite", "--shots", 0) == 0
    assert "shots 0 there, 3 now" in refused(out, *SHOTS)


@ONE
def test_examples_are_refused_with_an_adapter_with_a_server_and_where_train_has_too_few(chain, out, refused):
    assert "--shots is for a model without an adapter" in refused(out, "--shots", 3)
    assert "--shots is for a model that is loaded here" in refused(
        out, "--shots", 3, "--server", "http://localhost/v1"
    )
    assert "--shots 7 needs 14 train rows of samsum" in refused(out, *SHOTS, "--shots", 7)


@ONE
def test_rows_that_examples_make_too_long_are_counted(chain, out, tmp_path, capsys):
    assert test(out, *SHOTS) == 0
    tokenizer = load_tokenizer(str(chain / "adapter"))
    texts = texts_with_examples(out, "samsum")
    lengths = [len(tokenizer(prompt).input_ids) + 40 for prompt, _ in texts]
    limit = sorted(lengths)[2]  # so that three of six fit
    shutil.copytree(FIXTURES / "tiny_llama3", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": limit}))
    assert test(out, *SHOTS, "--model", tmp_path / "model", "--overwrite") == 0
    assert "samsum: 3 of 6 rows do not fit" in capsys.readouterr().out
    assert len(read(out, "samsum", "_shots")["too_long"]) == 3


@ONE
def test_the_base_alone_and_the_merged_model_beside_the_adapter(chain, tmp_path):
    out = copied(chain, tmp_path, predictions=True)
    assert test(out, *SHORT, "--adapter", "none", "--name", "base") == 0
    merged = models.load_adapter(models.load_model(base_of(chain), load_in_4bit=False), chain / "adapter")
    merged.merge_and_unload().save_pretrained(tmp_path / "merged")
    load_tokenizer(base_of(chain)).save_pretrained(tmp_path / "merged")
    assert test(out, *SHORT, "--model", tmp_path / "merged", "--name", "merged") == 0
    other = ["--adapter", chain / "adapter", "--no-load-in-4bit", "--no-compare-with-base", "--name", "sixteen"]
    assert test(out, *SHORT, *other) == 0
    for task in TASKS:
        assert column(out, task, "prediction", "_base") == column(out, task, "base_prediction")
        assert column(out, task, "nll", "_base") == column(out, task, "base_nll")
        assert read(out, task, "_merged")["adapter"] is None
        assert set(read(out, task, "_sixteen")["perplexity"]) == {"tuned"}
    same_columns(out, out, "prediction", name="_merged", other_name="_sixteen")
    same_columns(out, out, "nll", name="_merged", other_name="_sixteen", rel=1e-4)


@ONE
def test_what_is_missing_or_of_another_model_is_said_in_one_sentence(chain, dataset, out, tmp_path, refused):
    assert_refused(run("test_llama.py", "--output-dir", tmp_path), "no dataset at", "run build_dataset.py first")
    assert "run train_llama.py first" in refused(dataset)
    other = ["--model", FIXTURES / "tiny_llama2", "--adapter", chain / "adapter"]
    assert "it is another model's" in refused(out, *other)
    shutil.copytree(out / "adapter", tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    error = refused(out, *other[:-1], tmp_path / "bare")
    assert "does not load onto its base" in error and "size mismatch" in error
    path = out / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(dict(list(tensors.items())[4:]), path, metadata={"format": "pt"})
    error = refused(out)
    assert "tensors are not those" in error and "run train_llama.py again" in error
    save_file({name: tensor * math.nan for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    assert "the general text has a log-likelihood of nan: the tuned model diverged" in refused(out, *SHORT)
    assert "has a log-likelihood of nan: the model diverged" in refused(out, *SHORT, "--general-text", "")
    tokenizer = load_tokenizer(str(FIXTURES / "tiny_llama2"))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(peft_adapter(tmp_path / "adapter", ["q_proj"]))
    assert "[PAD]" in refused(out, "--adapter", tmp_path / "adapter")
    data = load_from_disk(str(dataset / "dataset"))
    data["test"] = data["test"].map(lambda row: {"task": "xsum"})
    data.save_to_disk(str(tmp_path / "other" / "dataset"))
    assert "unknown task xsum" in refused(tmp_path / "other")
    assert not list(out.glob("*_predictions.json"))


@ONE
def test_a_model_that_no_row_fits_is_refused_with_the_setting(chain, out, tmp_path, refused):
    shutil.copytree(FIXTURES / "tiny_llama3", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100}))
    error = refused(out, "--model", tmp_path / "model", "--adapter", chain / "adapter")
    assert "no row of samsum fits the model's 100 tokens" in error and "--samsum-max-new-tokens" in error
    assert not list(out.glob("*predictions*"))


@ONE
def test_a_row_too_long_for_the_model_is_left_out_counted_and_named(chain, tmp_path, monkeypatch):
    data, out = load_from_disk(str(chain / "dataset")), tmp_path / "out"
    shown, _, long, *_ = rows_of(data["test"], "samsum")["id"]
    data["test"] = data["test"].map(lambda row: {"prompt": row["prompt"] * (60 if row["id"] == long else 1)})
    data["test"] = data["test"].map(lambda row: {"references": ["caf\u00e9 \u2615"]} if row["id"] == shown else {})
    data.save_to_disk(str(out / "dataset"))
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)  # one that is not UTF-8
    assert test(out, *SHORT, "--adapter", chain / "adapter") == 0
    printed = terminal.buffer.getvalue().decode()
    assert "samsum: 1 of 6 rows do not fit the model's" in printed and "caf? ?" in printed
    assert all(len(line) <= 80 for line in printed.splitlines() if not line.startswith(("wrote ", "warning: ")))
    file, before = read(out, "samsum"), read(chain, "samsum")["examples"]
    assert file["too_long"] == [long] and read(out, "trivia_qa")["too_long"] == []
    left = file["examples"].pop(2)
    assert left["id"] == long and left["too_long"] and left["prediction"] == left["base_prediction"] == ""
    del before[2]
    assert [(e["id"], e["prediction"]) for e in file["examples"]] == [(e["id"], e["prediction"]) for e in before]
    assert file["perplexity"]["tuned"]["examples"] == file["perplexity"]["base"]["examples"] == 5
    assert file["perplexity"]["tuned"]["nll_sum"] == pytest.approx(sum(e["nll"] for e in before), rel=1e-5)
    rows, (tokenizer, _) = rows_of(data["test"], "samsum"), prompts_of(base_of(chain), chain)
    whole = encode(tokenizer, rows.to_dict())
    longest = max(len(prompt + gold) for prompt, gold in zip(*whole.values(), strict=True))
    for limit, fitting in ((longest - 1, 5), (longest, 6)):
        assert len(tester.plan("samsum", rows, tokenizer, 1, limit, 1)) == fitting


@ONE
def test_a_base_that_asks_for_sampling_and_penalties_is_read_greedily_all_the_same(chain, out, tmp_path):
    shutil.copytree(FIXTURES / "tiny_llama3", tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    wishes = {"do_sample": True, "temperature": 9.0, "repetition_penalty": 9.0, "min_new_tokens": 7}
    path.write_text(json.dumps(json.loads(path.read_text()) | wishes))
    assert test(out, *SHORT, "--model", tmp_path / "model", "--adapter", chain / "adapter") == 0
    same_columns(out, chain, "prediction", "base_prediction")


def peft_adapter(folder, targets, **options):
    """`folder` with an adapter of tiny_llama2 as PEFT saves it, not 0."""
    torch.manual_seed(0)
    model = models.load_model(str(FIXTURES / "tiny_llama2"), load_in_4bit=False)
    options = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": targets} | options
    model = get_peft_model(model, LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "lora_" in name and "init_lora_weights" not in options:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("flag", ["--max-batch-tokens=-1", "--samsum-max-new-tokens=0", "--name=../x"])
def test_a_flag_out_of_range(flag, tmp_path):
    assert_refused(run("test_llama.py", flag, "--output-dir", tmp_path), flag.split("=")[0])


@ONE
def test_the_general_text_is_whatever_file_is_given_or_none(chain, tmp_path, refused, monkeypatch, capsys):
    out = copied(chain, tmp_path, predictions=True)
    (tmp_path / "own.txt").write_text("A text of nobody's, shorter than a window.\n", encoding="utf-8")
    assert "general text" in refused(out, *SHORT, "--general-text", tmp_path / "own.txt")  # of another run
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_bytes(b" \n")
    for name in ("missing.txt", "latin.txt"):
        error = refused(out, *SHORT, "--general-text", tmp_path / name, "--name", "x")
        assert f"cannot read --general-text {tmp_path / name}" in error and "UTF-8" in error
    error = refused(out, *SHORT, "--general-text", "no.txt", "--name", "x")
    assert error.startswith("error: cannot read --general-text no.txt (No such file") and 'or "" for none' in error
    empty = refused(out, *SHORT, "--general-text", tmp_path / "empty.txt", "--name", "x")
    assert "--general-text has no text" in empty
    monkeypatch.chdir(tmp_path)  # the default is found beside the script all the same
    assert test(out, *SHORT) == 0
    output = capsys.readouterr().out
    assert "nothing to do" in output and re.search(r"\ngeneral text perplexity +[\d.,]+ +[\d.,]+\n", output)
    keep = ["--overwrite", "--samsum-max-new-tokens", "1"]
    assert test(out, *keep, "--general-text", "own.txt", "--no-compare-with-base") == 0
    tokenizer, _ = prompts_of(base_of(chain), chain)
    ids = torch.tensor([tokenizer("A text of nobody's, shorter than a window.").input_ids])
    model = models.load_adapter(models.load_model(base_of(chain), load_in_4bit=True), chain / "adapter")
    with torch.inference_mode():
        expected = {"tuned": math.exp(model(ids, labels=ids).loss.item())}
    for task in TASKS:
        figures = read(out, task)["general_text"]
        assert {name: part["perplexity"] for name, part in figures.items()} == pytest.approx(expected, rel=1e-4)
        assert figures["tuned"]["tokens"] == ids.shape[1] - 1
    capsys.readouterr()
    assert test(out, *keep, "--general-text", "", "--no-compare-with-base") == 0
    assert read(out, "samsum")["general_text"] == {} and "general text" not in capsys.readouterr().out


@ONE
def test_a_row_of_nan_in_the_embedding_of_a_token_that_never_occurs_changes_no_figure(chain, tmp_path):
    out = copied(chain, tmp_path)
    base = tmp_path / "base"
    shutil.copytree(FIXTURES / "tiny_llama3", base)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.embed_tokens.weight"][2046] = math.nan  # one of the tokens that are looked at beforehand
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert test(out, *SHORT, "--model", base, "--adapter", out / "adapter") == 0
    same_columns(out, chain, "prediction", "base_prediction")
    same_columns(out, chain, "nll", "base_nll", rel=1e-5)


def test_the_table_at_the_end_has_whole_counts_and_no_line_that_says_nothing(tmp_path, capsys):
    figures = {"perplexity": 2209.8, "word_perplexity": 1.5e8, "hit_max_new_tokens": 123_456, "empty_predictions": 0}
    tuned = figures | {"perplexity": 23.788, "word_perplexity": 2355.5, "hit_max_new_tokens": 0}
    content = {"task": "samsum", "adapter": "a", "settings": {}, "general_text": {}, "examples": []}
    for base, lines in (
        (figures, ["perplexity 2,209.8 23.788", "hit_max_new_tokens 123,456 0"]),
        (tuned, ["perplexity 23.788 23.788", "word_perplexity 2,355.5 2,355.5"]),
    ):
        path = tmp_path / "samsum_predictions.json"
        path.write_text(json.dumps(content | {"perplexity": {"tuned": tuned, "base": base}}))
        predictions.show([path], {"id": [], "prompt": []})
        printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
        assert printed[1:] == ["base tuned", *(f"samsum {line}" for line in lines)]
