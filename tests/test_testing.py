"""test_llama.py: perplexity is the textbook's, predictions are each row's own, nothing is lost when it is killed."""

import contextlib
import io
import json
import math
import os
import random
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
from datasets import DatasetDict, load_from_disk
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers.cache_utils import DynamicLayer

import test_llama as tester
from pipeline import machine, models
from pipeline.attention import choose_attention
from pipeline.files import only_run_in, rows_of
from pipeline.testing import decoding, predictions
from pipeline.tokens import encode, end_tokens, load_tokenizer

TASKS = ("samsum", "trivia_qa")
BOTH = pytest.mark.parametrize("name", ["tiny_llama3", "tiny_llama2"])
ONE = pytest.mark.parametrize("chain", ["tiny_llama3"], indirect=True)
SHORT = ["--samsum-max-new-tokens", "8"]


def read(folder, task, name=""):
    return json.loads((folder / f"{task}_predictions{name}.json").read_text(encoding="utf-8"))


def column(folder, task, key, name=""):
    return [example[key] for example in read(folder, task, name)["examples"]]


def copied(chain, tmp_path, predictions=False):
    """A copy of the chain's output dir, without its predictions unless asked for."""
    shutil.copytree(chain, tmp_path / "out")
    for path in [] if predictions else (tmp_path / "out").glob("*_predictions.json"):
        path.unlink()
    return tmp_path / "out"


def test(out, *arguments):
    """test_llama.py in this process; its exit code."""
    try:
        tester.main(["--output-dir", str(out), *map(str, arguments)])
    except SystemExit as error:
        return error.code
    return 0


test.__test__ = False


@pytest.fixture
def out(chain, tmp_path):
    return copied(chain, tmp_path)


@pytest.fixture
def refused(capsys):
    def refused(*arguments):
        """The one sentence with which test_llama.py exits with 2."""
        capsys.readouterr()
        assert test(*arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    return refused


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


def assert_same_files(out, name):
    for task in TASKS:
        paths = [out / f"{task}_predictions{suffix}.json" for suffix in ("", name)]
        assert paths[0].read_bytes() == paths[1].read_bytes()


def test_perplexity_is_that_of_transformers_own_loss_row_by_row_whatever_the_batch_budget(
    chain, tmp_path, monkeypatch
):
    out = copied(chain, tmp_path, predictions=True)
    for budget in (1, 700):
        assert test(out, *SHORT, "--max-batch-tokens", budget, "--name", budget) == 0
    monkeypatch.setattr(tester, "choose_attention", lambda name: "sdpa")  # an old GPU, without packed attention
    assert test(out, *SHORT, "--name", "sdpa") == 0
    tokenizer, data = prompts_of(base_of(chain), chain)
    model = models.load_adapter(models.load_model(base_of(chain), load_in_4bit=True), chain / "adapter")
    for task in TASKS:
        losses, bases, counts, text = [], [], [], ""
        for row in rows_of(data, task):
            prompt = tokenizer(row["prompt"]).input_ids
            ids = tokenizer(row["prompt"] + row["completion"]).input_ids + [tokenizer.eos_token_id]
            labels = [-100] * len(prompt) + ids[len(prompt) :]
            inputs = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}
            counts.append(len(ids) - len(prompt))
            text += row["completion"]
            with torch.inference_mode():
                losses.append(model(**inputs).loss.item() * counts[-1])
                with model.disable_adapter():
                    bases.append(model(**inputs).loss.item() * counts[-1])
        for name in ("", "_1", "_700", "_sdpa"):
            for system, prefix, expected in (("tuned", "", losses), ("base", "base_", bases)):
                figures = read(out, task, name)["perplexity"][system]
                assert column(out, task, prefix + "nll", name) == pytest.approx(expected, rel=1e-5)
                assert figures["perplexity"] == pytest.approx(math.exp(sum(expected) / sum(counts)), rel=1e-4)
                bits = sum(expected) / math.log(2) / len(text.encode())
                assert figures["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
                assert figures["tokens"] == sum(counts) and figures["examples"] == len(counts)
            assert sum(losses) != sum(bases) and column(out, task, "tokens", name) == counts
            same_columns(out, out, "prediction", "base_prediction", name=name)


def test_figures_of_a_case_done_by_hand():
    rows = [{"nll": nats * math.log(2), "tokens": tokens} for nats, tokens in ((6, 3), (2, 1))]
    rows = [row | {"hit_max_new_tokens": row["tokens"] == 1} for row in rows]
    figures = predictions.perplexity(rows, "", [" two wörds", " one"])  # 11 bytes and 4
    assert figures["perplexity"] == pytest.approx(4) and figures["hit_max_new_tokens"] == 1
    assert figures["bits_per_byte"] == pytest.approx(8 / 15)
    assert figures["word_perplexity"] == pytest.approx(2 ** (8 / 3))


@BOTH
def test_a_model_that_knows_nothing_has_the_vocabulary_size_as_perplexity(name):
    model = models.load_model(str(FIXTURES / name), load_in_4bit=False)
    model.get_output_embeddings().weight.data.zero_()
    choose_attention("packed")  # registers it
    with torch.inference_mode():
        nll, _ = decoding.read_rows(model, [[1, 5, 6], [1, 5]], [[7, 8], list(range(3, 1003))], "packed")
    assert math.exp(sum(nll) / 1002) == pytest.approx(model.config.vocab_size, rel=1e-6)


def test_a_row_in_a_batch_is_predicted_and_scored_as_alone_and_as_by_generate(chain, monkeypatch):
    base = base_of(chain)
    model, _ = decoding.load_system(base, chain / "adapter", True, compare=True)
    tokenizer, data = prompts_of(base, chain)
    choose_attention("packed")  # registers it
    prompts = tokenizer(list(data["prompt"])).input_ids
    prompts += [sum(prompts[:6], []), prompts[0][:3], prompts[1][:2], prompts[0][:1]]
    completions = [prompts[(i + 1) % 12][1 : 2 + 3 * i] for i in range(len(prompts))]
    ends = {tokenizer.eos_token_id, *tokenizer("a e s. , ? and the Tom").input_ids[1:]}  # else random models go on
    end_of = decoding.answer_end(tokenizer, ends, one_line=False)
    assert len({len(p) for p in prompts}) > 10 and max(map(len, prompts)) > 60 * min(map(len, prompts))
    generate, sizes = model.generate, []
    monkeypatch.setattr(model, "generate", lambda ids, **options: sizes.append(len(ids)) or generate(ids, **options))
    with torch.inference_mode():
        together = decoding.test_rows(model, prompts, completions, "packed", 24, ends, end_of)
        sizes.clear()
        monkeypatch.setattr(decoding, "STRIDE", 3)
        monkeypatch.setattr(decoding, "READ_TOKENS", 100)
        often = decoding.test_rows(model, prompts, completions, "packed", 23, ends, end_of)
        assert sizes == sorted(sizes)[::-1] and len(set(sizes)) > 2  # rows that have ended are left out
        pairs = zip(prompts, completions, strict=True)
        alone = [decoding.test_rows(model, [p], [c], "packed", 24, ends, end_of)[0] for p, c in pairs]
        options = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": sorted(ends), "pad_token_id": 0}
        generated = [
            model.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p)), **options)[0, len(p) :].tolist()
            for p in prompts
        ]
    assert len({len(ids) for ids in generated}) > 2  # rows leave the batch at different times
    assert [ids for _, ids in together] == [ids for _, ids in alone] == generated
    assert [ids for _, ids in often] == [ids[:23] for ids in generated]
    assert [nll for nll, _ in together] == pytest.approx([nll for nll, _ in alone], rel=1e-5)


def test_keys_and_values_are_those_of_the_library_s_cache_and_stay_where_they_are():
    parts = torch.randn(2, 4, 2, 9, 3).split([5, 1, 2, 1], dim=3)
    room, library = decoding.Room(*parts[0], 4), DynamicLayer()
    library.update(*parts[0])
    place = room.keys.data_ptr()
    for keys, values in parts[1:]:
        for ours, theirs in zip(room.update(keys, values), library.update(keys, values), strict=True):
            assert torch.equal(ours, theirs)
        assert room.keys.data_ptr() == place and room.get_seq_length() == library.get_seq_length()
    with pytest.raises(RuntimeError):
        room.update(*parts[1])


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


def test_batches_hold_every_row_once_and_no_more_than_their_budget(monkeypatch):
    lengths = [random.Random(0).randint(2, 400) for _ in range(200)] + [5000]
    ids = [{"place": i, "prompt_ids": [1] * (length - 1), "completion_ids": [1]} for i, length in enumerate(lengths)]
    monkeypatch.setattr(predictions, "encoded", lambda tokenizer, rows, shots: rows)
    found = tester.plan("samsum", ids, None, 1, 5000, 2000)
    assert sorted(row["place"] for batch in found for row in batch) == list(range(201))
    assert all(row["length"] == lengths[row["place"]] for batch in found for row in batch)
    assert all(len(batch) * max(row["length"] for row in batch) <= 2000 for batch in found if len(batch) > 1)
    assert found[0][0]["length"] == 5000 and len(found) < 40


@ONE
def test_an_answer_ends_at_the_line_and_keeps_what_shares_its_last_token(chain, out, monkeypatch):
    tokenizer = load_tokenizer(str(chain / "adapter"))
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=1))
    ends = end_tokens(model, tokenizer)
    assert {tokenizer.convert_tokens_to_ids(t) for t in ("<|end_of_text|>", "<|eot_id|>")} <= ends
    last = next(i for i in range(len(tokenizer)) if tokenizer.decode([i]).startswith(".\n"))
    name, more = tokenizer([" Lydbrook", " more"], add_special_tokens=False).input_ids
    ids = [*name, last, *more, last]
    monkeypatch.setattr(decoding, "test_rows", lambda model, prompts, *rest: [(1.0, ids) for _ in prompts])
    limits = ["--trivia-qa-max-new-tokens", len(ids), "--samsum-max-new-tokens", len(ids)]
    assert test(out, *limits) == 0
    assert set(column(out, "trivia_qa", "prediction")) == {"Lydbrook."}
    assert not any(column(out, "trivia_qa", "hit_max_new_tokens"))  # it ended with the last token it was allowed
    assert all(column(out, "samsum", "hit_max_new_tokens"))  # a summary does not end with a line


@ONE
def test_where_an_answer_ends_is_read_as_the_rows_were_built_whatever_todays_task_says(chain, out, monkeypatch):
    tokenizer = load_tokenizer(str(chain / "adapter"))
    ids = tokenizer("Paris\nand on", add_special_tokens=False).input_ids
    monkeypatch.setattr(decoding, "test_rows", lambda model, prompts, *rest: [(1.0, ids) for _ in prompts])
    limits = ["--trivia-qa-max-new-tokens", len(ids), "--samsum-max-new-tokens", len(ids)]
    path = out / "dataset" / "tasks.json"
    for ends in ({"samsum": True, "trivia_qa": False}, {"samsum": False, "trivia_qa": True}):
        path.write_text(json.dumps({task: {"prompt": "", "one_line": one_line} for task, one_line in ends.items()}))
        assert test(out, *limits, "--overwrite") == 0
        for task, one_line in ends.items():
            assert set(column(out, task, "prediction")) == {"Paris" if one_line else "Paris\nand on"}
            assert set(column(out, task, "hit_max_new_tokens")) == {not one_line}
    path.unlink()  # an older data set: as the tasks are today
    assert test(out, *limits, "--overwrite") == 0
    assert set(column(out, "trivia_qa", "prediction")) == {"Paris"}
    assert set(column(out, "samsum", "prediction")) == {"Paris\nand on"}


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


@pytest.mark.parametrize("name", ["tiny_llama3", "tiny_llama2"])
@pytest.mark.parametrize(
    "front, answer",
    [("\n\n", "Paris"), (" \n \n", "Paris."), ("\n", ". Paris"), ("", "Paris is"), (" ", "Paris")],
)
def test_line_ends_in_front_of_an_answer_do_not_end_it(name, front, answer):
    tokenizer = load_tokenizer(str(FIXTURES / name))
    ids, behind = (tokenizer(text, add_special_tokens=False).input_ids for text in (front + answer + "\n", "and on"))
    end_of = decoding.answer_end(tokenizer, {tokenizer.eos_token_id}, one_line=True)
    length = end_of(ids + behind)
    assert tokenizer.decode(ids[:length]).strip() == answer and "\n" in tokenizer.decode(ids[length - 1 : length])
    assert all(end_of(ids[:i]) is None for i in range(length))
    assert end_of([*ids[:1], tokenizer.eos_token_id]) in (1, 2)  # an end token ends it anywhere
    assert end_of([tokenizer.eos_token_id]) == 1
    summary = decoding.answer_end(tokenizer, {tokenizer.eos_token_id}, one_line=False)
    assert summary(ids + behind) is None and summary([*ids, tokenizer.eos_token_id]) == len(ids) + 1


@ONE
def test_a_model_that_begins_with_a_line_end_is_read_on_and_empty_predictions_are_counted(chain, out, monkeypatch):
    """The model's own greedy answers, in front of which each row is made to write two line ends, or only these."""
    from transformers import LlamaForCausalLM

    assert test(out) == 0
    plain = column(out, "trivia_qa", "prediction")
    tokenizer = load_tokenizer(str(chain / "adapter"))
    [line_end] = tokenizer("\n", add_special_tokens=False).input_ids
    generate = LlamaForCausalLM.generate

    def after_line_ends(self, ids, **options):
        """Line ends first; then, where `talks`, what the model writes behind them."""
        processors = [lambda seen, scores: forced(seen, scores, ids.shape[1])]
        return generate(self, ids, logits_processor=processors, **options)

    def forced(seen, scores, width):
        if seen.shape[1] - first[0] < 2 or not talks:
            scores = scores * 0
            scores[:, line_end] = 1
        return scores

    first, talks = [0], True

    def read_rows(*arguments):
        first[0] = max(map(len, arguments[1]))
        return whole(*arguments)

    whole = decoding.read_rows
    monkeypatch.setattr(decoding, "read_rows", read_rows)
    monkeypatch.setattr(LlamaForCausalLM, "generate", after_line_ends)
    assert test(out, "--overwrite") == 0
    assert sum(map(bool, column(out, "trivia_qa", "prediction"))) >= sum(map(bool, plain)) > 0
    talks = False
    assert test(out, "--overwrite", "--trivia-qa-max-new-tokens", 20) == 0
    figures = read(out, "trivia_qa")["perplexity"]["tuned"]
    rows = len(column(out, "trivia_qa", "prediction"))
    assert figures["empty_predictions"] == figures["hit_max_new_tokens"] == rows > 0


@ONE
def test_a_batch_too_large_for_memory_is_halved_and_a_row_too_large_is_said(chain, out, monkeypatch, refused):
    test_rows, sizes = decoding.test_rows, []

    def small(model, prompts, *rest, limit=2):
        sizes.append(len(prompts))
        if len(prompts) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return test_rows(model, prompts, *rest)

    monkeypatch.setattr(decoding, "test_rows", small)
    assert test(out, *SHORT) == 0
    assert max(sizes) == 6 and sizes.count(2) + sizes.count(1) > 6
    same_columns(out, chain, "prediction")
    same_columns(out, chain, "nll", rel=1e-5)
    monkeypatch.setattr(decoding, "test_rows", lambda *rest: small(*rest, limit=0))
    assert "one row is too much for the GPU's memory" in refused(out, *SHORT, "--overwrite")


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
    assert "the same command resumes" in printed.read_text() and "Traceback" not in printed.read_text()
    result = run("test_llama.py", *arguments)
    assert result.returncode == 0, result.stderr
    assert "of them from before" in result.stdout and not list(out.glob(".*"))
    assert test(out, *arguments[:4], "--name", "undisturbed") == 0
    assert_same_files(out, "_undisturbed")


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
def test_behind_plain_examples_an_answer_ends_at_its_line_unless_answers_in_train_have_several(
    chain, out, tmp_path, monkeypatch, capsys
):
    tokenizer = load_tokenizer(str(chain / "adapter"))
    ids = tokenizer("Paris\n\nSummarise this", add_special_tokens=False).input_ids
    monkeypatch.setattr(decoding, "test_rows", lambda model, prompts, *rest: [(1.0, ids) for _ in prompts])
    assert test(out, *SHOTS) == 0 and "run on into" not in capsys.readouterr().out
    assert set(column(out, "samsum", "prediction", "_shots")) == {"Paris"}
    data = load_from_disk(str(out / "dataset"))
    lines = data["train"].map(lambda row: {"completion": row["completion"].replace(". ", ".\n")})
    assert any("\n" in row["completion"] for row in rows_of(lines, "samsum"))
    other = tmp_path / "other"
    DatasetDict(data | {"train": lines}).save_to_disk(str(other / "dataset"))
    shutil.copy(out / "dataset" / "tasks.json", other / "dataset")
    assert test(other, *SHOTS, "--model", base_of(chain)) == 0
    assert "samsum: its answers have several lines" in capsys.readouterr().out
    assert set(column(other, "samsum", "prediction", "_shots")) == {"Paris\n\nSummarise this"}
    assert set(column(other, "trivia_qa", "prediction", "_shots")) == {"Paris"}


@ONE
def test_an_interrupted_run_with_examples_resumes_and_another_number_of_them_is_another_run(
    chain, out, monkeypatch, capsys, refused
):
    monkeypatch.setattr(predictions, "write_predictions", lambda *rest: (_ for _ in ()).throw(RuntimeError))
    with pytest.raises(RuntimeError):
        test(out, *SHOTS)
    monkeypatch.undo()
    capsys.readouterr()
    assert test(out, *SHOTS) == 0 and "samsum: 6 rows, 6 of them from before" in capsys.readouterr().out
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
    assert f"samsum: 6 rows, {healed} of them from before" in capsys.readouterr().out
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
    assert "adapter config" in refused(out, *SHORT)
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
    assert all(len(line) <= 80 for line in printed.splitlines() if not line.startswith("wrote "))
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


@ONE
def test_a_base_that_asks_for_sampling_and_penalties_is_read_greedily_all_the_same(chain, out, tmp_path):
    shutil.copytree(FIXTURES / "tiny_llama3", tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    wishes = {"do_sample": True, "temperature": 9.0, "repetition_penalty": 9.0, "min_new_tokens": 7}
    path.write_text(json.dumps(json.loads(path.read_text()) | wishes))
    assert test(out, *SHORT, "--model", tmp_path / "model", "--adapter", chain / "adapter") == 0
    same_columns(out, chain, "prediction", "base_prediction")


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


@ONE
@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens", "v_proj"])
def test_an_adapter_of_another_tool_is_tested_as_peft_loads_it(layer, out, tmp_path, capsys):
    folder = peft_adapter(tmp_path / "adapter", ["q_proj", layer])  # config and weights: the base's tokenizer serves
    assert tester.choose_system(tester.parse_args(["--adapter", str(folder)]))[2] is True  # most are QLoRA's
    assumed = f"{folder} does not say how it was trained: it is tested in 4 bits, with --chat-template auto"
    assert assumed in capsys.readouterr().out
    assert test(out, "--samsum-max-new-tokens", 2, "--adapter", folder, "--no-load-in-4bit") == 0
    base = models.load_model(str(FIXTURES / "tiny_llama2"), load_in_4bit=False)
    tokenizer, data = prompts_of(FIXTURES / "tiny_llama2", out)
    ids = encode(tokenizer, rows_of(data, "samsum").to_dict())
    prompt, completion = ids["prompt_ids"][0], ids["completion_ids"][0]
    inputs = {"input_ids": torch.tensor([prompt + completion])}
    inputs["labels"] = torch.tensor([[-100] * len(prompt) + completion])
    model = PeftModel.from_pretrained(base, str(folder))
    for key, context in (("nll", contextlib.nullcontext()), ("base_nll", model.disable_adapter())):
        with context:
            expected = model(**inputs).loss.item() * len(completion)
        assert column(out, "samsum", key)[0] == pytest.approx(expected, rel=1e-5)
    assert column(out, "samsum", "nll") != pytest.approx(column(out, "samsum", "base_nll"), rel=1e-3)


@ONE
@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_an_adapter_that_changes_its_base_is_not_shown_beside_it(kind, out, tmp_path, refused):
    folder = peft_adapter(tmp_path / "adapter", ["q_proj", "v_proj"], init_lora_weights=kind)
    arguments = ["--samsum-max-new-tokens", 2, "--adapter", folder, "--no-load-in-4bit"]
    assert "--no-compare-with-base" in refused(out, *arguments) and not list(out.glob("*_predictions.json"))
    assert test(out, *arguments, "--no-compare-with-base") == 0
    assert test(out, *arguments[:2], "--model", FIXTURES / "tiny_llama2", "--name", "base") == 0
    same_columns(out, out, "nll", other_name="_base", rel=1e-4)  # untrained it is the base


KINDS = {"plain": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}, "bias": {"lora_bias": True}}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_from_elsewhere_answers_as_peft_computes_it(kind, tmp_path):
    folder = peft_adapter(tmp_path / "adapter", ["q_proj", "down_proj", "lm_head"], **KINDS[kind])
    base, ids = models.read_adapter(folder), torch.arange(20, 60)[None]
    model, off = decoding.load_system(base, folder, False, compare=False)
    by_peft = models.load_adapter(models.load_model(base, False), folder)
    with torch.no_grad():
        for some in (ids, ids[:, :5], ids[:, :1]):
            expected = by_peft(input_ids=some).logits
            torch.testing.assert_close(model(input_ids=some).logits, expected, rtol=1e-3, atol=1e-3)
            with off(), by_peft.disable_adapter():
                plain = by_peft(input_ids=some).logits
                torch.testing.assert_close(model(input_ids=some).logits, plain, rtol=1e-3, atol=1e-3)
            assert (expected - plain).abs().max() > 1


@pytest.mark.parametrize("flag", ["--max-batch-tokens=0", "--samsum-max-new-tokens=0", "--name=../x"])
def test_a_flag_out_of_range(flag, tmp_path):
    assert_refused(run("test_llama.py", flag, "--output-dir", tmp_path), flag.split("=")[0])


def test_unpacking_the_4_bit_weights_once_changes_no_number(chain, monkeypatch):
    base, ids = models.read_adapter(chain / "adapter"), torch.arange(20, 60)[None]
    unpacked, _ = decoding.load_system(base, chain / "adapter", True, compare=True)
    need = 4 * unpacked.num_parameters()  # bytes, unpacked in float32, in half of what this process can have
    for free, room in ((2 * need, False), (2.1 * need, True)):
        monkeypatch.setattr(machine, "host_memory", lambda free=free: free)
        assert decoding.has_room(unpacked) is room
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # each process unpacks its own
    assert not decoding.has_room(unpacked)
    packed, _ = decoding.load_system(base, chain / "adapter", True, compare=True)
    kinds = [{type(module).__name__ for module in model.modules()} for model in (packed, unpacked)]
    assert any("4bit" in name for name in kinds[0]) and not any("4bit" in name for name in kinds[1])
    with torch.no_grad():
        assert torch.equal(packed(input_ids=ids).logits, unpacked(input_ids=ids).logits)


@pytest.mark.parametrize("free, room", [(19e9, False), (34e9, True)])  # of 24 and 40 GB, 8B in 4 bit taken off
def test_a_gpu_gets_unpacked_weights_only_where_a_batch_fits_beside_them(free, room, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80e9))
    assert decoding.has_room(SimpleNamespace(num_parameters=lambda: 8.03e9, device="cuda:0")) is room


@ONE
def test_the_general_text_is_whatever_file_is_given_or_none(chain, tmp_path, refused, monkeypatch, capsys):
    out = copied(chain, tmp_path, predictions=True)
    (tmp_path / "own.txt").write_text("A text of nobody's, shorter than a window.\n", encoding="utf-8")
    assert "general text" in refused(out, *SHORT, "--general-text", tmp_path / "own.txt")  # of another run
    for name, content in {"missing.txt": None, "empty.txt": b" \n", "latin.txt": b"caf\xe9"}.items():
        if content:
            (tmp_path / name).write_bytes(content)
        error = refused(out, *SHORT, "--general-text", tmp_path / name, "--name", "x")
        assert f"cannot read --general-text {tmp_path / name}" in error and "UTF-8" in error
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
