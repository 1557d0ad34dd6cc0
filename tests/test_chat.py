"""Chat templates: training, testing, merging and serving read the same tokens, or none of them goes through one."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest
import torch
from conftest import FIXTURES, TASKS, assert_refused, run
from datasets import load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.files import load_rows
from pipeline.merging import merged_folder
from pipeline.tokens import encode, end_tokens, load_tokenizer, tokenizer_of

SHORT = ["--samsum-max-new-tokens", "8", "--trivia-qa-max-new-tokens", "8"]
MERGE = ["--check-rows", 2, "--merge-dtype", "float32"]  # as test_llama.py reckons on a CPU
# Of Llama 3, of Llama 2, and one that writes no BOS, a newline after each turn, and ends it with a token of its own.
HEADER = "'<|start_header_id|>' + {role} + '<|end_header_id|>\n\n'"
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ "
    + HEADER.format(role="message['role']")
    + " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ "
    + HEADER.format(role="'assistant'")
    + " }}{% endif %}"
)
LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'] | "
    "trim + ' [/INST]' }}{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LINES = (
    "{% for message in messages %}<|start_header_id|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|reserved_special_token_1|>\n{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant\n{% endif %}"
)
USER3 = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
USER3 += "<|start_header_id|>assistant<|end_header_id|>\n\n"
CHATS = {  # the tiny Llama, the template, and by hand what it makes of a prompt and of a completion
    "llama3": ("tiny_llama3", LLAMA3, USER3, "{}<|eot_id|>"),
    "llama2": ("tiny_llama2", LLAMA2, "<s>[INST] {} [/INST]", " {} </s>"),
    "lines": (
        "tiny_llama3",
        LINES,
        "<|start_header_id|>user\n{}<|reserved_special_token_1|>\n<|start_header_id|>assistant\n",
        "{}<|reserved_special_token_1|>",
    ),
}


def chat_model(folder, name):
    """A tiny Llama's folder with a chat template."""
    tiny, template, *_ = CHATS[name]
    shutil.copytree(FIXTURES / tiny, folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def tokens_by_hand(tokenizer, name, prompt, completion):
    """Ids of a prompt and of its completion, by the text that the template comes to."""
    asked, answer = CHATS[name][2].format(prompt), CHATS[name][3].format(completion.strip())
    ids, whole = (tokenizer(text, add_special_tokens=False).input_ids for text in (asked, asked + answer))
    return ids, whole[len(ids) :]


@pytest.mark.parametrize("name", CHATS)
def test_a_row_is_the_users_and_the_assistants_turn_as_a_chat_endpoint_reads_them(name, dataset, tmp_path):
    base = str(chat_model(tmp_path / "base", name))
    tokenizer = load_tokenizer(base)
    rows = load_from_disk(str(dataset / "dataset"))["train"]
    ids = encode(tokenizer, rows.to_dict())
    for row, prompt, completion in zip(rows, ids["prompt_ids"], ids["completion_ids"], strict=True):
        assert (prompt, completion) == tokens_by_hand(tokenizer, name, row["prompt"], row["completion"])
        messages = [{"role": "user", "content": row["prompt"]}]
        assert prompt == tokenizer.apply_chat_template(messages, add_generation_prompt=True).input_ids
        assert (prompt + completion).count(tokenizer.bos_token_id) == (name != "lines")
        assert completion[-1] in end_tokens(base, tokenizer)


@pytest.mark.parametrize("name", CHATS)
def test_examples_are_earlier_turns_as_the_template_writes_them(name, dataset, tmp_path):
    tokenizer = load_tokenizer(str(chat_model(tmp_path / "base", name)))
    data = load_from_disk(str(dataset / "dataset"))
    shots = [(row["prompt"], row["completion"]) for row in data["train"].select([0, 3])]
    earlier = []
    for prompt, completion in shots:
        earlier.append({"role": "user", "content": prompt})
        earlier.append({"role": "assistant", "content": completion.strip()})
    rows = data["test"]
    alone, ids = encode(tokenizer, rows.to_dict()), encode(tokenizer, rows.to_dict(), shots)
    assert ids["completion_ids"] == alone["completion_ids"]
    for row, prompt, completion in zip(rows, *ids.values(), strict=True):
        turns = [*earlier, {"role": "user", "content": row["prompt"]}]
        assert prompt == tokenizer.apply_chat_template(turns, add_generation_prompt=True).input_ids
        turns.append({"role": "assistant", "content": row["completion"].strip()})
        whole = tokenizer.apply_chat_template(turns).input_ids
        assert whole[: len(prompt + completion)] == prompt + completion


@pytest.mark.parametrize("name", CHATS)
def test_special_tokens_in_a_dialogue_stay_text_and_those_of_the_template_are_tokens(name, tmp_path):
    tokenizer = load_tokenizer(str(chat_model(tmp_path / "base", name)))
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    shouted = "Tom: <s></s><|eot_id|> hi <|start_header_id|>assistant<|end_of_text|><|begin_of_text|> Ann: [/INST]"
    count = {}
    for text in ("Tom: hi", shouted):
        ids = encode(tokenizer, {"id": ["x"], "prompt": [text], "completion": [f" {text} !"]})
        (prompt,), (completion,) = ids["prompt_ids"], ids["completion_ids"]
        count[text] = [sum(token in special for token in part) for part in (prompt, completion)]
        assert text in tokenizer.decode(prompt) and text in tokenizer.decode(completion[:-1])
    assert count["Tom: hi"] == count[shouted] and count[shouted][1] == 1


@pytest.mark.parametrize("setting", ["auto", "on"])
def test_off_gives_the_plain_prompt_and_on_wants_a_template(setting, dataset, tmp_path, capsys):
    base, rows = chat_model(tmp_path / "base", "llama3"), load_from_disk(str(dataset / "dataset"))["train"].to_dict()
    bare = load_tokenizer(str(FIXTURES / "tiny_llama3"))
    assert encode(load_tokenizer(str(base), "off"), rows) == encode(bare, rows)
    assert encode(load_tokenizer(str(base), setting), rows) != encode(bare, rows)
    if setting == "on":
        with pytest.raises(SystemExit):
            load_tokenizer(str(FIXTURES / "tiny_llama3"), "on")
        assert "has no chat template: take the instruct model, or give --chat-template off" in capsys.readouterr().err


UNFIT = {  # a template, and what is said of it
    "fails": ("{{ raise_exception('Roles must alternate') }}", "its chat template fails (Roles must alternate)"),
    "opens with thoughts": (LLAMA3.replace("\n\n' }}{% endif", "\n\n<think>' }}{% endif"), "does not fit"),
    "ends nothing": ("{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}", "does not fit"),
}


def test_a_template_that_does_not_fit_is_one_sentence(dataset, tmp_path):
    base, rows = chat_model(tmp_path / "base", "llama3"), load_from_disk(str(dataset / "dataset"))["train"].to_dict()
    for template, words in UNFIT.values():
        (base / "chat_template.jinja").write_text(template)
        with pytest.raises(ValueError, match=f"{re.escape(words)}.*train and test with --chat-template off"):
            encode(load_tokenizer(str(base)), rows)
    result = run("train_llama.py", "--dry-run", "--model", base, "--output-dir", dataset)
    assert_refused(result, "cannot train on train: ", "train and test with --chat-template off")


def test_a_template_that_asks_for_the_date_is_the_same_tomorrow(tmp_path):
    base = chat_model(tmp_path / "base", "llama3")
    for template in ("{{ strftime_now('%d %b %Y') }}" + LLAMA3, LLAMA3):
        (base / "chat_template.jinja").write_text(template)
        tokenizer = load_tokenizer(str(base))
        messages = [{"role": "user", "content": "hi"}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert text == ("26 Jul 2024" if template != LLAMA3 else "") + "<|begin_of_text|>" + text.split("_text|>")[-1]
        tokenizer.save_pretrained(tmp_path / "again")
        assert load_tokenizer(str(tmp_path / "again")).chat_template == tokenizer.chat_template


def read_modelfile(path):
    """{instruction or parameter: its values}, by the rules of Ollama's parser for what stands in ours."""
    found = {}
    for name, value in re.findall(
        r'^(FROM|TEMPLATE|PARAMETER \w+) (""".*?"""|".*?"|\S+)$', path, re.MULTILINE | re.DOTALL
    ):
        found.setdefault(name.removeprefix("PARAMETER "), []).append(value.strip('"'))
    return found


@pytest.mark.parametrize("name", [*CHATS, "tiny_llama3", "tiny_llama2"])
def test_the_modelfile_asks_and_stops_as_in_training(name, dataset, tmp_path):
    base = chat_model(tmp_path / "base", name) if name in CHATS else FIXTURES / name
    tokenizer = load_tokenizer(str(base))
    ends = end_tokens(str(base), tokenizer)
    text = merged_folder.modelfile(tokenizer, sorted(ends))
    found = read_modelfile(text)
    assert found["FROM"] == ["."] and found["temperature"] == ["0"] and found["repeat_penalty"] == ["1"]
    assert {tokenizer.convert_tokens_to_ids(token) for token in found["stop"]} == ends
    rows = load_from_disk(str(dataset / "dataset"))["test"]
    ids = encode(tokenizer, rows.to_dict())["prompt_ids"]
    # as llama.cpp under Ollama: special tokens in the text are tokens, and BOS comes in front as the tokenizer has it
    asked = [tokenizer(found["TEMPLATE"][0].replace("{{ .Prompt }}", prompt)).input_ids for prompt in rows["prompt"]]
    assert (asked == ids) == (not text.startswith("# Ollama reads other tokens")) == (name not in ("llama2", "lines"))


@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory):
    """The output folders of train, test and merge on one instruct model: through its chat template, and not."""
    folder = tmp_path_factory.mktemp("chats")
    base = chat_model(folder / "base", "llama3")
    model = AutoModelForCausalLM.from_pretrained(FIXTURES / "tiny_llama3", dtype="float32")
    model.save_pretrained(base)  # in float32 the server reckons as test_llama.py does
    for setting in ("auto", "off"):
        shutil.copytree(dataset, folder / setting)
        output = ["--output-dir", folder / setting]
        train = ["--model", base, "--chat-template", setting, "--max-steps", "2", "--max-length", "512"]
        train += ["--warmup-steps", "0", "--learning-rate", "1e-2", "--no-load-in-4bit"]
        for command in (["train_llama.py", *train], ["test_llama.py", *SHORT], ["merge_llama.py", *MERGE]):
            result = run(*command, *output)
            assert result.returncode == 0, result.stderr
    return folder


def examples(folder, task, name=""):
    return json.loads((folder / f"{task}_predictions{name}.json").read_text())


def test_training_testing_and_merging_go_the_same_way(runs, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(runs / "base")
    row = load_rows(runs / "auto", "test")[0]
    prompt, completion = tokens_by_hand(tokenizer, "llama3", row["prompt"], row["completion"])
    plain = tokenizer(row["prompt"]).input_ids
    parts = {"auto": (prompt, completion), "off": (plain, tokenizer(row["prompt"] + row["completion"]).input_ids)}
    parts["off"] = (plain, parts["off"][1][len(plain) :] + [tokenizer.eos_token_id])
    for setting, (asked, answer) in parts.items():
        out = runs / setting
        assert json.loads((out / "adapter" / "run.json").read_text())["chat_template"] == (setting == "auto")
        assert json.loads((out / "merged" / "merge.json").read_text())["chat_template"] == (setting == "auto")
        for folder in ("adapter", "merged"):
            assert (out / folder / "chat_template.jinja").exists() == (setting == "auto")
        model = AutoModelForCausalLM.from_pretrained(out / "merged", dtype="float32")
        labels = torch.tensor([[-100] * len(asked) + answer])
        nll = model(input_ids=torch.tensor([asked + answer]), labels=labels).loss.item() * len(answer)
        example = next(e for e in examples(out, row["task"])["examples"] if e["id"] == row["id"])
        assert example["tokens"] == len(answer) and example["nll"] == pytest.approx(nll, rel=1e-4)


def test_base_alone_and_merged_are_asked_as_the_adapter_was(runs, tmp_path):
    for setting, arguments, key in (("off", ["--adapter", "none"], "base_"), ("auto", ["--model", "merged"], "")):
        out = tmp_path / setting
        shutil.copytree(runs / setting, out)
        arguments[1] = arguments[1].replace("merged", str(out / "merged"))
        result = run("test_llama.py", *SHORT, *arguments, "--name", "other", "--output-dir", out)
        assert result.returncode == 0, result.stderr
        for task in TASKS:
            one, other = examples(out, task), examples(out, task, "_other")
            assert one["settings"]["chat_template"] == other["settings"]["chat_template"]
            assert (one["settings"]["chat_template"] == "none") == (setting == "off")
            assert [e[key + "prediction"] for e in one["examples"]] == [e["prediction"] for e in other["examples"]]
    assert_refused(run("test_llama.py", *SHORT, "--chat-template", "off", "--output-dir", out), "chat template")


@pytest.mark.parametrize("setting", ["off", "auto"])
def test_a_checkpoint_is_tested_as_it_was_trained_like_the_adapter(setting, runs, tmp_path, capsys):
    out, base = tmp_path / "out", tmp_path / "base"
    shutil.copytree(runs / setting, out)
    best = json.loads((out / "adapter" / "run.json").read_text())["best_step"]
    checkpoint_folder = out / "checkpoints" / f"checkpoint-{best}"
    ask = ["--adapter", checkpoint_folder, "--name", "checkpoint", "--output-dir", out]
    result = run("test_llama.py", *SHORT, *ask)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stdout and "does not say how it was trained" not in result.stdout
    for task in TASKS:
        adapter, checkpoint = examples(out, task), examples(out, task, "_checkpoint")
        assert adapter["settings"] == checkpoint["settings"] and adapter["examples"] == checkpoint["examples"]
        assert adapter["perplexity"] == checkpoint["perplexity"]
    shutil.copytree(runs / "base", base)
    (base / "chat_template.jinja").write_text(LINES)
    tokenizer = tokenizer_of(str(base), checkpoint_folder, setting)
    assert bool(tokenizer.chat_template) == (setting == "auto")
    warned = "was trained with other prompts: another tokenizer, or another --chat-template" in capsys.readouterr().out
    assert warned == (setting == "auto")


def test_the_cards_example_of_a_chat_model_runs(runs, monkeypatch, capsys):
    card = (runs / "auto" / "merged" / "README.md").read_text()
    assert "/v1/chat/completions" in card and "/v1/chat/completions" not in (runs / "off/merged/README.md").read_text()
    monkeypatch.chdir(runs / "auto" / "merged")
    scope = {}
    exec(compile(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], "card", "exec"), scope)
    row = {"id": ["x"], "prompt": [scope["prompt"]], "completion": [" y"]}
    assert scope["inputs"].input_ids[0].tolist() == encode(scope["tokenizer"], row)["prompt_ids"][0]
    assert capsys.readouterr().out.count("\n") == 1


@pytest.fixture(scope="module")
def serving(tmp_path_factory):
    """The address of a `transformers serve`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [Path(sys.executable).parent / "transformers", "serve", "--port", str(port)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    path = tmp_path_factory.mktemp("serve") / "log"
    with path.open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    for _ in range(600):
        with contextlib.suppress(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port)).close()
            break
        assert server.poll() is None, path.read_text()
        time.sleep(0.1)
    yield f"http://127.0.0.1:{port}/v1"
    server.terminate()
    server.wait(30)


def test_transformers_serve_answers_as_test_llama_predicted(runs, serving):
    """The chat model at /v1/chat/completions, the other at /v1/completions."""
    client = openai.OpenAI(base_url=serving, api_key="none", max_retries=0, timeout=120)
    prompts = {row["id"]: row["prompt"] for row in load_rows(runs / "auto", "test")}
    for setting in ("auto", "off"):
        options = {"model": str(runs / setting / "merged"), "temperature": 0, "max_tokens": 8}
        for task in TASKS:
            for example in examples(runs / setting, task)["examples"][:3]:
                prompt = prompts[example["id"]]
                if setting == "auto":
                    messages = [{"role": "user", "content": prompt}]
                    text = client.chat.completions.create(messages=messages, **options).choices[0].message.content
                else:
                    text = client.completions.create(prompt=prompt, **options).choices[0].text
                text = text.strip()
                assert (text.split("\n")[0].strip() if task == "trivia_qa" else text) == example["prediction"]


@pytest.mark.parametrize("setting, way", [("auto", "chat"), ("off", "text")])
def test_asked_by_test_llama_it_gives_the_predictions_of_the_local_test(setting, way, runs, serving):
    out = runs / setting
    options = ["--server", serving, "--server-model", out / "merged", "--server-concurrency", 2]
    result = run("test_llama.py", *SHORT, *options, "--output-dir", out)
    assert result.returncode == 0, result.stderr
    assert ": the same" in result.stdout and f"is asked by {way}\n" in result.stdout
    assert "options left out, for the server refuses them: stop_token_ids" in result.stdout
    for task in TASKS:
        local, served = examples(out, task), examples(out, task, "_merged")
        assert [e["prediction"] for e in served["examples"]] == [e["prediction"] for e in local["examples"]]
        assert f"tested={out}/{task}_predictions.json merged={out}/{task}_predictions_merged.json" in result.stdout
        assert {e["hit_max_new_tokens"] for e in served["examples"]} <= {True, False}


DROPPED = "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
CUT = "{% for m in messages %}{{ m.role }}: {{ (m.content | trim)[:20] }}{{ eos_token }}{% endfor %}"


@pytest.mark.parametrize("template", [DROPPED, CUT])
def test_a_template_that_drops_or_cuts_the_text_is_refused(template, tmp_path):
    tokenizer = load_tokenizer(str(chat_model(tmp_path / "model", "llama3")))
    tokenizer.chat_template = template
    row = {"id": ["x"], "prompt": ["Summarise this dialogue, please: A: hi. B: ho."], "completion": [" They greet."]}
    with pytest.raises(ValueError, match="does not write the whole text of row x"):
        encode(tokenizer, row)


def test_a_template_that_drops_what_stands_for_thoughts_in_any_row_is_refused(tmp_path):
    tokenizer = load_tokenizer(str(chat_model(tmp_path / "model", "llama3")))
    assert "message['content']" in LLAMA3
    tokenizer.chat_template = LLAMA3.replace("message['content']", "message['content'].split('</think>')[-1]")
    plain, thought = (
        {"prompt": "2 + 2?", "completion": " 4"},
        {"prompt": "3 + 3?", "completion": " <think>2 x 3</think>6"},
    )
    rows = {"id": ["a", "b"], **{key: [plain[key]] * 2 for key in plain}}
    encode(tokenizer, rows)
    with pytest.raises(ValueError, match="does not write the whole text of row b"):
        encode(tokenizer, rows | {key: [plain[key], thought[key]] for key in plain})


def test_a_template_that_drops_the_examples_is_refused(tmp_path):
    tokenizer = load_tokenizer(str(chat_model(tmp_path / "model", "llama3")))
    tokenizer.chat_template = LLAMA3.replace("in messages", "in messages[-2:]")
    row = {"id": ["x"], "prompt": ["Name the capital of Peru."], "completion": [" Lima"]}
    encode(tokenizer, row)
    with pytest.raises(ValueError, match="does not write the whole text of a solved example"):
        encode(tokenizer, row, [("Name the capital of Cuba.", " Havana")])


@pytest.mark.parametrize("template", [[{"name": "tool_use", "template": "x"}], 5])
def test_a_template_that_is_none_is_one_sentence(template, tmp_path, capsys):
    shutil.copytree(FIXTURES / "tiny_llama3", tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    with pytest.raises(SystemExit) as stopped:
        load_tokenizer(str(tmp_path / "model"))
    assert stopped.value.code == 2 and "train and test with --chat-template off" in capsys.readouterr().err
    assert load_tokenizer(str(tmp_path / "model"), "off").chat_template is None
