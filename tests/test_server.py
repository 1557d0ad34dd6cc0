"""test_llama.py --server: what a server answers is written down as it came, once; what it reads otherwise is said."""

import contextlib
import json
import math
import re
import shlex
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import httpx2
import openai
import pytest
from conftest import FIXTURES
from datasets import Dataset, DatasetDict, load_from_disk
from transformers import AutoTokenizer

import evaluations
import test_llama as tester
from pipeline import server as asking
from pipeline.testing import served
from tasks import trivia_qa

KEY = "sk-test-0123456789-secret"
TASKS = ("samsum", "trivia_qa")
ROWS = 12  # of both tasks


class Fake(ThreadingHTTPServer):
    """An OpenAI-compatible server with the tiny Llama's tokenizer; the attributes say what it does."""

    daemon_threads = True

    def __init__(self):
        self.seen, self.lock, self.at_once, self.most = [], threading.Lock(), 0, 0
        self.tokenizer = AutoTokenizer.from_pretrained(FIXTURES / "tiny_llama3")
        self.takes_ids, self.chat_only, self.refuses, self.logprobs, self.more = True, False, (), None, 0
        self.trouble = lambda prompt, times: None  # or (status, message), or "close"
        self.finish, self.fastapi = "stop", False
        self.reads, self.thoughts, self.front, self.silent = None, "", "", False
        self.last, self.odd, self.cut = lambda asked: "", {}, ()
        self.written, self.drips = 5, lambda body: False
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def answer(self, path, body):
        """(status, JSON) of a request."""
        if path == "/v1/models":
            return 200, {"data": [{"id": "models/tuned-1"}]}
        chat, prompt = path.endswith("/chat/completions"), body.get("prompt")
        if self.chat_only and not chat:
            return 404, {"error": {"message": "This is a chat model"}}
        if chat:
            prompt = body["messages"][0]["content"]
        if isinstance(prompt, list) and not self.takes_ids:
            return 400, {"error": {"message": "prompt must be a string."}}
        if named := [name for name in self.refuses if name in body]:
            told = f"Unsupported parameter: '{named[0]}'"
            return 400, {"detail": told} if self.fastapi else {"error": {"message": told}}
        ids = prompt if isinstance(prompt, list) else self.tokenizer(prompt).input_ids + [0] * self.more
        text = "" if self.silent else f"{self.front} {says(ids)} \nand on{self.last(json.dumps(ids))}"
        finish = self.finish
        if self.thoughts != "":  # which take 200 tokens
            text, finish = ((self.thoughts or "") + text, finish) if limit(body) > 200 else ("", "length")
        if "stop" in body:
            text = text.split("\n")[0]
        choice = {"finish_reason": finish} | ({"message": {"content": text}} if chat else {"text": text})
        if "prompt_logprobs" in body and self.logprobs == "vllm":
            given = [{str(token): {"logprob": logprob(token)}, "1": {"logprob": 0.0}} for token in ids]
            choice["prompt_logprobs"] = [None] + [
                one | {str(token): {"logprob": logprob(token)}} for one, token in zip(given[1:], ids[1:], strict=True)
            ]
        if body.get("echo") and self.logprobs == "echo":
            choice["logprobs"] = {"token_logprobs": [None, *map(logprob, ids[1:]), -9.0]}
        if body.get("echo") and self.logprobs == "echo without the first":
            choice["logprobs"] = {"token_logprobs": [*map(logprob, ids[1:]), -9.0]}
        if json.dumps(ids) in self.odd:  # of the last token
            for values in (choice.get("prompt_logprobs"), choice.get("logprobs", {}).get("token_logprobs")):
                if values:
                    value = self.odd[json.dumps(ids)]
                    values[len(ids) - 1] = {str(ids[-1]): {"logprob": value}} if self.logprobs == "vllm" else value
        read = 1 if json.dumps(ids) in self.cut and limit(body) == 96 else min(len(ids), self.reads or len(ids))
        usage = {"prompt_tokens": read, "completion_tokens": self.written, "total_tokens": 0}
        return 200, {"choices": [choice], "usage": usage}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply(*self.server.answer(self.path, {}))

    def do_POST(self):
        fake = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = json.dumps(body.get("prompt") or body.get("messages"))
        with fake.lock:
            times = sum(entry["asked"] == prompt and entry["max"] == limit(body) for entry in fake.seen)
            fake.seen.append({"path": self.path, "body": body, "asked": prompt, "max": limit(body)})
            fake.at_once += 1
            fake.most = max(fake.most, fake.at_once)
        trouble = fake.trouble(body, times)
        with fake.lock:
            fake.at_once -= 1
        if trouble == "close":
            self.connection.shutdown(socket.SHUT_RDWR)
        elif fake.drips(body):  # a blank now and then, as some servers keep a connection open
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(80):
                    self.wfile.write(b" ")
                    time.sleep(0.1)
        elif trouble:
            self.reply(trouble[0], {"error": {"message": trouble[1]}}, *trouble[2:])
        else:
            self.reply(*fake.answer(self.path, body))

    def reply(self, status, content, headers=()):
        content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


def limit(body):
    return body.get("max_tokens") or body.get("max_completion_tokens") or 0


def says(ids):
    return f"answer {sum(ids) % 9973}"


def logprob(token):
    return -(token % 7) / 10 - 0.05


def answers_asked(fake):
    """The prompts of the requests for answers: not of the first tries, nor for losses."""
    return [entry["asked"] for entry in fake.seen if is_for_an_answer(entry["body"])]


def is_for_an_answer(body):
    return limit(body) not in (1, served.FIRST_TOKENS)


@pytest.fixture
def fake():
    fake = Fake()
    yield fake
    fake.shutdown()
    fake.server_close()


@pytest.fixture
def ask(dataset, tmp_path, monkeypatch, capsys):
    """Run test_llama.py against a server: (exit code, what it printed)."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(asking, "WAITS", (0.02, 0.02))
    (tmp_path / "dataset").symlink_to(dataset / "dataset")

    def run(url, *more, model=FIXTURES / "tiny_llama3"):
        arguments = ["--model", model, "--server", url, "--output-dir", tmp_path, *more]
        try:
            tester.main(list(map(str, arguments)))
            code = 0
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        for path in tmp_path.glob("*.json*"):
            assert KEY not in path.read_text()
        assert KEY not in out + err
        return code, out + err

    return run


def read(folder, task, name="tuned-1"):
    return json.loads((folder / f"{task}_predictions_{name}.json").read_text())


def files(folder):
    return [(folder / f"{task}_predictions_tuned-1.json").read_bytes() for task in TASKS]


@pytest.fixture
def rows(dataset):
    """{id: (row, ids of its prompt, ids of its completion)} by the tokenizer alone."""
    tokenizer = AutoTokenizer.from_pretrained(FIXTURES / "tiny_llama3")
    known = {}
    for row in load_from_disk(str(dataset / "dataset" / "test")):
        prompt = tokenizer(row["prompt"]).input_ids
        whole = tokenizer(row["prompt"] + row["completion"]).input_ids + [tokenizer.eos_token_id]
        known[row["id"]] = row, prompt, whole[len(prompt) :]
    assert len(known) == ROWS
    return known


@pytest.mark.parametrize("kind", ["vllm", "echo", "echo without the first", None])
def test_the_same_tokens_are_asked_and_each_answer_stands_at_its_row(kind, fake, ask, rows, tmp_path):
    fake.logprobs, given = kind, kind in ("vllm", "echo")
    code, output = ask(fake.url)
    assert code == 0, output
    for task in TASKS:
        content = read(tmp_path, task)
        assert content["model"] == "models/tuned-1" and content["left_out"] == []
        of_task = [row_id for row_id in rows if row_id.startswith(task)]
        assert [example["id"] for example in content["examples"]] == of_task
        losses = []
        for example in content["examples"]:
            row, prompt, completion = rows[example["id"]]
            text = says(prompt) + (" \nand on" if task == "samsum" else "")
            assert example["prediction"] == text and example["references"] == row["references"]
            losses.append(-sum(map(logprob, completion)))
            assert example.get("nll") == (pytest.approx(losses[-1]) if given else None)
        figures = content["perplexity"]["tuned"]
        tokens = sum(len(rows[row_id][2]) for row_id in of_task)
        expected = math.exp(sum(losses) / tokens) if given else None
        assert figures.get("perplexity") == (pytest.approx(expected) if given else None)
    assert ("perplexity: not given by this server" in output) == (not given)
    asked = answers_asked(fake)
    assert sorted(asked) == sorted(json.dumps(prompt) for _, prompt, _ in rows.values())  # each once, as ids
    for entry in fake.seen:
        assert entry["body"]["temperature"] == 0 and entry["body"]["model"] == "models/tuned-1"
    limits = {limit(entry["body"]) for entry in fake.seen}
    assert limits == {1, served.FIRST_TOKENS, tester.SAMSUM_MAX_NEW_TOKENS, tester.TRIVIA_QA_MAX_NEW_TOKENS}
    assert f"{len(fake.seen)} requests, " in output


def test_a_finished_run_asks_nothing_and_another_needs_overwrite(fake, ask, tmp_path):
    assert ask(fake.url)[0] == 0
    before, sent = files(tmp_path), len(fake.seen)
    code, output = ask(fake.url)
    assert code == 0 and len(fake.seen) == sent and output.count("nothing to do") == 2
    code, output = ask(fake.url, "--samsum-max-new-tokens", 7)
    assert code == 2 and "samsum max new tokens 96 there, 7 now" in output and files(tmp_path) == before


def test_where_ids_are_refused_the_text_is_sent_and_where_completions_are_the_chat(fake, ask, rows, tmp_path):
    fake.takes_ids = False
    assert ask(fake.url, "--name", "text")[0] == 0
    assert sorted(answers_asked(fake)) == sorted(json.dumps(row["prompt"]) for row, _, _ in rows.values())
    fake.chat_only, fake.more, fake.seen = True, 9, []
    code, output = ask(fake.url, "--name", "chat")
    assert code == 0 and {entry["path"] for entry in fake.seen if is_for_an_answer(entry["body"])} == {
        "/v1/chat/completions"
    }
    assert "it puts a chat template around" in output
    code, output = ask(fake.url, "--name", "no", "--server-api", "completions")
    assert code == 2 and "This is a chat model" in output and "--server-api" in output


@pytest.mark.parametrize("refused", ["temperature", "max_tokens", "stop", "stop_token_ids"])
def test_a_parameter_that_is_refused_is_left_out_once_and_for_all(refused, fake, ask, tmp_path):
    fake.refuses = (refused,)
    code, output = ask(fake.url, "--server-concurrency", 1)
    assert code == 0 and f"options left out, for the server refuses them: {refused}" in output
    assert sum(refused in entry["body"] for entry in fake.seen) == 1
    assert len(fake.seen) == 3 + ROWS + 2 + 1  # first tries, answers, tries of log-probabilities, and the refused one
    if refused == "max_tokens":
        assert {limit(entry["body"]) for entry in fake.seen if "max_completion_tokens" in entry["body"]} == {
            1,
            32,
            96,
            24,
        }
    assert all("\n" not in example["prediction"] for example in read(tmp_path, "trivia_qa")["examples"])


def test_what_a_server_says_in_another_form_than_openais_is_read_and_told(fake, ask):
    fake.fastapi, fake.refuses = True, ("temperature",)
    code, output = ask(fake.url, "--server-concurrency", 1)
    assert code == 0 and "options left out, for the server refuses them: temperature\n" in output
    fake.refuses = ("model",)
    code, output = ask(fake.url, "--name", "other")
    assert code == 2 and "Unsupported parameter: 'model'" in output


@pytest.mark.parametrize(
    "refusal",
    ["'max_tokens' or 'max_completion_tokens' is too large: {max}. This model's maximum context length is 9 tokens.",
     "max_tokens={max} cannot be greater than 16", "This model does not support max_tokens above 16",
     "Prompt is too long: lower max_tokens", "max_tokens is not allowed to exceed the remaining context"],
)  # fmt: skip
def test_a_refusal_of_a_value_costs_its_row_alone(refusal, fake, ask, rows, tmp_path):
    long = max((json.dumps(prompt) for _, prompt, _ in rows.values()), key=len)

    def trouble(body, times):
        if is_for_an_answer(body) and json.dumps(body["prompt"]) == long:
            return 400, refusal.format(max=limit(body))

    fake.trouble = trouble
    code, output = ask(fake.url)
    assert code == 1 and "1 requests got no answer (BadRequestError" in output and "options left out" not in output
    assert all("max_tokens" in entry["body"] for entry in fake.seen)
    assert sum(len(read(tmp_path, task)["left_out"]) for task in TASKS) == 1


EXTRA = {
    "type": "extra_forbidden",
    "loc": ["body", "max_tokens"],
    "msg": "Extra inputs are not permitted",
    "input": 96,
}
TAKEN = {"temperature": 0, "max_tokens": 96, "stop": ["\n"]}


@pytest.mark.parametrize(
    "body, unknown",
    [({"error": {"message": "Unsupported parameter: 'max_tokens' is not supported with o1-mini. Use 'x' instead."}},
      "max_tokens"),
     ({"error": "Unsupported parameter: max_tokens", "status": 400}, "max_tokens"),
     ({"detail": [EXTRA]}, "max_tokens"),
     ({"object": "error", "message": {"detail": [EXTRA]}, "code": 400}, "max_tokens"),
     ({"object": "error", "message": str([EXTRA]), "code": 400}, "max_tokens"),
     ({"error": {"message": "does not support parameters: ['max_tokens'], for model=mistral-7b"}}, "max_tokens"),
     ({"error": {"message": "Extra inputs are not permitted, field: 'max_tokens', value: 96"}}, "max_tokens"),
     ({"error": {"message": "This model doesn't support the temperature field."}}, "temperature"),
     ({"error": {"message": "`temperature` is deprecated for this model."}}, "temperature"),
     ({"error": {"message": "Unsupported value: 'temperature' does not support 0. Only the default (1) is."}},
      "temperature"),
     ({"error": {"message": "Unrecognized request argument supplied", "param": "stop"}}, "stop"),
     ({"error": {"message": "max_tokens=96 is not supported, at most 16"}}, None),
     ({"error": {"message": "max_tokens must be at least 1, got 0"}}, None)],
)  # fmt: skip
def test_an_option_is_unknown_where_the_refusal_says_so_of_the_option(body, unknown):
    response = httpx2.Response(400, json=body, request=httpx2.Request("POST", "http://127.0.0.1/v1"))
    client = openai.OpenAI(api_key="none", base_url="http://127.0.0.1/v1")
    error = client._make_status_error_from_response(response)
    assert asking.unknown_options(error, TAKEN) == ({unknown} if unknown else set())


@pytest.mark.parametrize(
    "content, text, problem",
    [("<think duration='3'>So.</think>Paris", "Paris", ""), ("◁think▷So.◁/think▷Paris", "Paris", ""),
     ("<|begin_of_thought|>So.<|end_of_thought|>Paris", "Paris", ""), ("<|begin_of_thought|>So", "", asking.NO_ROOM),
     ("<|channel|>analysis<|message|>So.<|end|><|start|>assistant<|channel|>final<|message|>Paris", "Paris", ""),
     ([{"type": "reasoning", "text": "So."}, {"type": "text", "text": "Paris"}], "Paris", ""),
     ([{"type": "reasoning", "text": "So."}], "", "its answer has no text"),
     ("<reasoning>So.</reasoning>\n<answer>Paris</answer>\n", "Paris", ""),
     ("<think>So.</think><answer>Paris", "Paris", ""), ("<think>So.</think><response>Paris</response>", "Paris", ""),
     ("<|START_THINKING|>So.<|END_THINKING|><|START_RESPONSE|>Paris<|END_RESPONSE|>", "Paris", ""),
     ("<think>So.</think><answer>Paris</answer> That is all.", "Paris", ""),
     ("<think>So.</think><answer>a <answer>b</answer> c</answer>", "a <answer>b</answer> c", ""),
     ("<think>So.</think><answer></answer>Paris", "<answer></answer>Paris", ""),
     ("<answer>Paris</answer>", "<answer>Paris</answer>", ""), ("<think></think>a <answer>", "a <answer>", ""),
     ("<b>Paris</b>", "<b>Paris</b>", ""), ("I think Paris", "I think Paris", "")],
)  # fmt: skip
def test_thoughts_of_every_family_are_no_answer(content, text, problem):
    answer = asking.read_answer({"choices": [{"message": {"content": content}, "finish_reason": "stop"}]})
    assert (answer.text, answer.problem) == (text, problem)


def test_thoughts_that_a_template_begins_have_no_beginning():
    for text, rest in (("So.</thought>Paris", ("Paris", True)), ("Paris", ("Paris", False))):
        assert asking.without_thoughts(text, begun=True) == rest
    answer = "<label>spam</label><reasoning>it sells</reasoning>"  # an answer of that form
    assert asking.without_thoughts(answer, begun=True) == (answer, False)


def test_a_chat_template_that_adds_tokens_shifts_no_log_probability(fake, ask, rows, tmp_path):
    fake.logprobs, fake.more = "echo", 1
    assert ask(fake.url, "--server-api", "chat")[0] == 0
    for example in read(tmp_path, "samsum")["examples"]:
        assert example["nll"] == pytest.approx(-sum(map(logprob, rows[example["id"]][2])))


def test_a_placeholder_for_a_key_stays_in_the_predictions(fake, ask, rows, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "anything")
    fake.last = lambda asked: " for anything"
    assert ask(fake.url)[0] == 0
    assert all(one["prediction"].endswith(" for anything") for one in read(tmp_path, "samsum")["examples"])


def test_thoughts_that_a_template_begins_and_the_limit_cuts_off_are_no_answer(fake, ask, tmp_path):
    fake.finish = "length"
    code, output = ask(fake.url, "--server-thought-tokens", 300)
    assert code == 1 and "12 requests got no answer (its tokens went into thoughts" in output


def test_a_model_called_by_a_dot_gets_files_of_its_own(fake, ask, tmp_path):
    assert ask(fake.url, "--server-model", ".")[0] == 0
    assert read(tmp_path, "samsum", "model")["model"] == "." and not (tmp_path / "samsum_predictions.json").exists()


def test_refused_rows_never_keep_the_others_from_being_asked(fake, ask, rows, tmp_path):
    """The shortest are refused for what they say, and a first run ends before the second task."""
    prompts = sorted((prompt for row_id, (_, prompt, _) in rows.items() if row_id.startswith("samsum")), key=len)
    refused = [json.dumps(prompt) for prompt in prompts[:4]]

    def trouble(body, times):
        if json.dumps(body["prompt"]) in refused:
            return 400, "The response was filtered"
        return (401, "no") if broken and limit(body) == 24 else None

    fake.trouble, broken = trouble, True
    assert ask(fake.url, "--server-concurrency", 1)[0] == 2
    broken = False
    for _ in range(2):
        code, output = ask(fake.url, "--server-concurrency", 1)
        assert code == 1 and "4 requests got no answer (BadRequestError: The response was filtered)" in output
        assert [len(read(tmp_path, task)["examples"]) for task in TASKS] == [2, 6]


def test_another_tokenizer_may_make_a_quarter_of_the_tokens(fake, ask, tmp_path):
    whole = AutoTokenizer.from_pretrained(FIXTURES / "tiny_llama3")
    fake.tokenizer = lambda text: SimpleNamespace(input_ids=whole(text).input_ids[::4])
    code, output = ask(fake.url)
    assert code == 0 and "it has another tokenizer" in output


def test_log_probabilities_are_waited_for_where_the_server_is_busy(fake, ask, tmp_path):
    fake.logprobs, busy = "vllm", []

    def trouble(body, times):
        if "prompt_logprobs" in body and len(busy) < 2:
            busy.append(1)
            return 429, "slow down", {"Retry-After": "0.01"}

    fake.trouble = trouble
    assert ask(fake.url)[0] == 0
    assert all(read(tmp_path, task)["perplexity"]["tuned"]["perplexity"] > 1 for task in TASKS)


def test_an_option_refused_in_one_row_is_asked_again_with_the_next(fake, ask, rows):
    odd = [json.dumps(prompt) for row_id, (_, prompt, _) in rows.items() if row_id.startswith("trivia_qa")][2]

    def trouble(body, times):
        if is_for_an_answer(body) and json.dumps(body["prompt"]) == odd and "stop" in body:
            return 400, "Unsupported parameter: 'stop'"

    fake.trouble = trouble
    code, output = ask(fake.url, "--server-concurrency", 1)
    assert code == 0 and "options left out" not in output
    without = [entry for entry in fake.seen if limit(entry["body"]) == 24 and "stop" not in entry["body"]]
    assert [entry["asked"] for entry in without] == [odd]


def test_one_limit_of_tokens_is_always_sent(fake, ask):
    fake.refuses = ("max_tokens", "max_completion_tokens")
    code, output = ask(fake.url)
    assert code == 2 and "gives no answers (BadRequestError" in output
    assert all(limit(entry["body"]) for entry in fake.seen)


def test_a_prompt_that_the_server_has_cut_has_no_answer(fake, ask, rows, tmp_path, capsys):
    whole = sorted(len(prompt) for row_id, (_, prompt, _) in rows.items() if row_id.startswith("samsum"))[3]
    fake.reads = whole
    code, output = ask(fake.url)
    assert code == 1 and f" requests got no answer (it read only {whole} tokens of the prompt" in output
    kept = {one["id"] for task in TASKS for one in read(tmp_path, task)["examples"]}
    fake.reads = max(len(prompt) for row_id, (_, prompt, _) in rows.items() if row_id.startswith("trivia_qa"))
    fake.cut = [json.dumps(prompt) for row_id, (_, prompt, _) in rows.items() if row_id.startswith("samsum")]
    assert ask(fake.url, "--name", "one")[0] == 1  # a task without any answer
    content = read(tmp_path, "samsum", "one")
    assert (
        content["examples"] == [] and len(content["left_out"]) == 6 and read(tmp_path, "trivia_qa", "one")["examples"]
    )
    with pytest.raises(SystemExit, match="2"):
        evaluations.main(
            ["--predictions", f"one={tmp_path}/samsum_predictions_one.json", "--output-dir", str(tmp_path)]
        )
    assert "no row of samsum is in all files" in capsys.readouterr().err
    assert kept == {row_id for row_id, (_, prompt, _) in rows.items() if len(prompt) <= whole}


@pytest.mark.parametrize(
    "thoughts",
    ["<think>\nLet me see,\nonce.</think>\n\n", *(f"Let me\n</{name}>\n" for name in ("think", "thought")), None],
)
def test_a_model_that_thinks_needs_room_and_its_thoughts_are_no_prediction(thoughts, fake, ask, rows, tmp_path):
    fake.thoughts, fake.chat_only = thoughts, True
    code, output = ask(fake.url)
    assert code == 1 and "12 requests got no answer (its tokens went into thoughts" in output
    assert "--server-thought-tokens" in output and not list(tmp_path.glob("*.json"))
    code, output = ask(fake.url, "--server-thought-tokens", 300, "--samsum-max-new-tokens", 3)
    assert code == 0
    tokenizer = AutoTokenizer.from_pretrained(FIXTURES / "tiny_llama3")
    for example in read(tmp_path, "trivia_qa")["examples"]:
        assert example["prediction"] == says(rows[example["id"]][1])
    for example in read(tmp_path, "samsum")["examples"]:  # of its own limit, without the room for thoughts
        words = says(rows[example["id"]][1])
        assert words.startswith(example["prediction"]) and example["hit_max_new_tokens"]
        assert len(tokenizer(example["prediction"], add_special_tokens=False).input_ids) == 3


def test_an_answer_behind_a_line_end_is_read_and_an_empty_one_counted(fake, ask, rows, tmp_path):
    fake.front = "\n \n"
    code, output = ask(fake.url)
    assert code == 0 and "empty_predictions" not in output
    for example in read(tmp_path, "trivia_qa")["examples"]:
        assert example["prediction"] == says(rows[example["id"]][1])
    fake.front, fake.silent = "", True
    assert ask(fake.url, "--name", "silent")[0] == 0
    assert [read(tmp_path, task, "silent")["perplexity"]["tuned"]["empty_predictions"] for task in TASKS] == [6, 6]


def test_half_a_character_is_no_answer_and_costs_no_other(fake, ask, rows, tmp_path):
    half = [json.dumps(prompt) for row_id, (_, prompt, _) in rows.items() if row_id.startswith("samsum")][1]
    fake.last = lambda asked: "\ud83d" if asked == half else ""
    code, output = ask(fake.url)
    assert code == 1 and "1 requests got no answer (its answer has half a character)" in output
    fake.last = lambda asked: ""
    assert ask(fake.url)[0] == 0 and [len(read(tmp_path, task)["examples"]) for task in TASKS] == [6, 6]


@pytest.mark.parametrize(
    "kind, odd", [*(("vllm", odd) for odd in (float("nan"), -math.inf, -9999, None, "x", True, 0.5)), ("echo", -9999)]
)
def test_what_is_no_log_probability_gives_its_row_no_perplexity(kind, odd, fake, ask, rows, tmp_path, monkeypatch):
    fake.logprobs = kind
    row = [row for row_id, row in rows.items() if row_id.startswith("samsum")][3]
    fake.odd = {json.dumps(row[1] + row[2]): odd}
    code, output = ask(fake.url)
    assert code == 0 and "perplexity: not given for 1 rows (a token of the completion has no log-prob" in output
    assert "perplexity" not in read(tmp_path, "samsum")["perplexity"]["tuned"]
    assert read(tmp_path, "trivia_qa")["perplexity"]["tuned"]["perplexity"] > 1
    fake.odd = {}
    assert ask(fake.url)[0] == 0 and read(tmp_path, "samsum")["perplexity"]["tuned"]["perplexity"] > 1


def test_the_work_goes_on_at_another_port(fake, ask, tmp_path):
    fake.trouble = lambda body, times: (500, "down") if len(answers_asked(fake)) > 5 else None
    assert ask(fake.url, "--server-concurrency", 1)[0] == 2
    other = Fake()
    assert ask(other.url)[0] == 0 and len(answers_asked(other)) == ROWS - 5
    assert ask(fake.url)[0] == 0  # finished
    other.shutdown()
    other.server_close()


@pytest.mark.parametrize("header, seconds", [("Retry-After", "0.4"), ("retry-after-ms", "400")])
def test_a_server_that_names_a_time_is_left_alone_for_it_by_all(header, seconds, fake, ask):
    refused, asked = [], []

    def trouble(body, times):
        now = time.monotonic()
        if is_for_an_answer(body) and len(asked) == 4 and not refused:
            refused.append(now)
            return 429, "slow down", {header: seconds}
        asked.extend([now] if is_for_an_answer(body) else [])

    fake.trouble = trouble
    code, output = ask(fake.url, "--server-concurrency", 2)
    assert code == 0 and len(asked) == ROWS
    # a request may have been under way
    assert sum(refused[0] + 0.05 < moment < refused[0] + 0.39 for moment in asked) == 0


def test_a_server_that_asks_for_too_long_a_time_is_not_waited_for(fake, ask):
    fake.trouble = lambda body, times: (429, "come back tomorrow", {"Retry-After": "86400"})
    code, output = ask(fake.url)
    assert code == 2 and "come back tomorrow" in output and len(fake.seen) == 1


def test_a_server_that_asks_to_wait_again_and_again_is_given_up(fake, ask, monkeypatch):
    monkeypatch.setattr(asking, "LONGEST_WAIT", 1)
    fake.trouble = lambda body, times: (429, "slow down", {"Retry-After": "0.2"})
    code, output = ask(fake.url, "--server-timeout", 0.3)
    assert code == 2 and "gives no answers (RateLimitError: slow down" in output and 3 < len(fake.seen) < 9


def test_a_certificate_that_is_not_known_is_told_with_what_to_do(monkeypatch):
    error = openai.APIConnectionError(request=httpx2.Request("POST", "https://127.0.0.1/v1"))
    error.__cause__ = ValueError("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed certificate")
    for variable in asking.OF_CLIENT:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("OPENAI_ORG_ID", "org")
    assert asking.words_of(error).endswith("self-signed certificate: set SSL_CERT_FILE to its certificate")
    monkeypatch.setenv("SSL_CERT_DIR", "/nowhere")
    assert asking.words_of(error).endswith("self-signed certificate: see to SSL_CERT_DIR")


def test_a_server_that_takes_one_at_a_time_answers_all(fake, ask):
    busy = threading.Lock()

    def trouble(body, times):
        if not busy.acquire(blocking=False):
            return 429, "one at a time"
        time.sleep(0.05)
        busy.release()

    fake.trouble = trouble
    code, output = ask(fake.url)
    assert code == 0, output


@pytest.mark.parametrize(
    "variable, value",
    [("HTTP_PROXY", "socks5://127.0.0.1:1"), ("ALL_PROXY", "socks://x:1"), ("HTTPS_PROXY", "host:80:80"),
     ("SSL_CERT_FILE", "/nowhere/x.pem"), ("SSL_CERT_FILE", __file__), ("OPENAI_ORG_ID", "Zürich")],
)  # fmt: skip
def test_a_variable_that_the_client_cannot_use_is_named(variable, value, fake, ask, monkeypatch):
    monkeypatch.setenv(variable, value)
    code, output = ask(fake.url)
    assert code == 2 and variable in output and output.count("error: ") == 1 and not fake.seen


def test_a_proxy_between_is_named_where_no_answer_comes(fake, ask, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("HTTP_PROXY", "http://user:secret@127.0.0.1:9")
    code, output = ask(fake.url)
    assert code == 2 and "through the proxy of HTTP_PROXY" in output and "secret" not in output


@pytest.mark.parametrize("died", ["close", (401, f"no {KEY}"), (500, "out of memory")])
def test_stopped_in_the_middle_it_goes_on_and_writes_the_same_bytes(died, fake, ask, tmp_path):
    fake.logprobs = "vllm"
    assert ask(fake.url)[0] == 0
    whole = files(tmp_path)
    for path in tmp_path.glob("*.json"):
        path.unlink()
    fake.seen = []
    fake.trouble = lambda body, times: died if len(answers_asked(fake)) > 5 else None
    code, output = ask(fake.url, "--server-concurrency", 1)
    assert code == 2 and "gives no answers (" in output and "run again to go on" in output
    assert not list(tmp_path.glob("*.json"))
    answered = set(answers_asked(fake)[:5])
    fake.seen, fake.trouble = [], lambda body, times: None
    code, output = ask(fake.url, "--server-concurrency", 3)
    assert code == 0 and not answered & set(answers_asked(fake)) and len(answers_asked(fake)) == ROWS - 5
    assert files(tmp_path) == whole and not list(tmp_path.glob(".*part*"))


def test_a_server_that_drops_a_connection_now_and_then_costs_nothing(fake, ask, tmp_path):
    assert ask(fake.url)[0] == 0
    whole = files(tmp_path)
    troubles = ["close", (429, "slow down"), (503, "loading")]
    fake.seen = []
    fake.trouble = lambda body, times: troubles[len(fake.seen) % 3] if times == 0 and is_for_an_answer(body) else None
    assert ask(fake.url, "--overwrite")[0] == 0 and files(tmp_path) == whole


def test_failures_here_and_there_do_not_end_a_run():
    def ask(item):
        if item % 8 == 0:
            raise asking.NoAnswer("no such row")
        return item

    kept = []
    server = asking.Server("server", "http://127.0.0.1:9/v1", "", concurrency=4, timeout=1)
    errors = server.ask_all(list(range(1, 81)), ask, lambda *one: kept.append(one), "")
    assert len(errors) == 10 and sorted(kept) == [(item, item) for item in range(1, 81) if item % 8]


def test_rows_without_an_answer_are_counted_left_out_and_asked_for_again(fake, ask, rows, tmp_path, capsys):
    fake.logprobs = "vllm"
    too_long, broken = [json.dumps(prompt) for i, (_, prompt, _) in rows.items() if i.startswith("samsum")][2:4]

    def trouble(body, times):
        if not is_for_an_answer(body):
            return None
        prompt = json.dumps(body["prompt"])
        return {too_long: (400, "too long"), broken: (200, "no answer")}.get(prompt)

    fake.trouble = trouble
    code, output = ask(fake.url)
    assert code == 1 and "2 requests got no answer (" in output
    content = read(tmp_path, "samsum")
    assert len(content["left_out"]) == 2 and len(content["examples"]) == 4
    assert all(example["prediction"].startswith("answer ") for example in content["examples"])
    # evaluations.py compares what all have
    whole = {"task": "samsum", "examples": [{"id": row_id, "references": row["references"], "prediction": "x"}
             for row_id, (row, _, _) in rows.items() if row_id.startswith("samsum")]}  # fmt: skip
    whole["perplexity"] = {"tuned": {"perplexity": 2.0}}  # of all its rows: no figure of those compared
    (tmp_path / "whole.json").write_text(json.dumps(whole))
    names = [f"other={tmp_path}/whole.json", f"served={tmp_path}/samsum_predictions_tuned-1.json"]
    evaluations.main(["--predictions", *names, "--resamples", "50", "--output-dir", str(tmp_path / "evaluated")])
    assert "2 rows left out" in capsys.readouterr().out
    evaluated = json.loads((tmp_path / "evaluated" / "evaluation.json").read_text())["samsum"]
    assert evaluated["examples"] == 4 and evaluated["perplexity"].keys() == {"served"}
    fake.seen, fake.trouble = [], lambda body, times: None
    code, output = ask(fake.url)
    assert code == 0 and len(answers_asked(fake)) == 2 and len(read(tmp_path, "samsum")["examples"]) == 6
    assert read(tmp_path, "samsum")["left_out"] == []


@pytest.mark.parametrize("more, words", [(0, ": the same"), (1, "a second BOS"), (12, "or a system prompt")])
def test_what_the_server_reads_otherwise_is_said_before_the_rows_are_asked(more, words, fake, ask, tmp_path):
    fake.more = more
    code, output = ask(fake.url)
    first = output.split("\n")[1]
    assert code == 0 and words in first and "tokens of the first prompt, the run " in first
    assert "is asked by token ids" in output


def test_a_model_called_swapped_is_not_taken_for_swapped_answers(fake, ask, tmp_path):
    assert ask(fake.url, "--server-model", "my/swapped")[0] == 0
    assert read(tmp_path, "trivia_qa", "swapped-model")["model"] == "my/swapped"


def test_ids_are_never_sent_to_another_tokenizer(fake, ask, tmp_path):
    fake.tokenizer = AutoTokenizer.from_pretrained(FIXTURES / "tiny_llama2")
    fake.logprobs = "vllm"
    code, output = ask(fake.url)
    assert code == 0 and "it has another tokenizer" in output and "perplexity: not given" in output
    assert all(isinstance(entry["body"]["prompt"], str) for entry in fake.seen)
    assert not any("stop_token_ids" in entry["body"] for entry in fake.seen)


def test_answers_cut_by_the_limit_are_counted_but_not_those_that_ended_at_their_line(fake, ask, tmp_path):
    fake.finish, fake.refuses = "length", ("stop",)
    assert ask(fake.url)[0] == 0
    counts = [read(tmp_path, task)["perplexity"]["tuned"]["hit_max_new_tokens"] for task in TASKS]
    assert counts == [6, 0]


@pytest.mark.parametrize("reason", ["content_filter", "abort", "error"])  # the last two are vLLM's
def test_an_answer_that_the_server_broke_off_is_none(reason, fake, ask, tmp_path):
    fake.finish = reason
    code, output = ask(fake.url)
    assert code == 1 and f"12 requests got no answer (its answer ended by {reason})" in output
    assert not list(tmp_path.glob("*_predictions_*.json"))


def test_a_server_that_breaks_on_log_probabilities_still_gives_its_predictions(fake, ask, tmp_path):
    dead = []

    def trouble(body, times):
        dead.extend([1] if "prompt_logprobs" in body else [])
        return "close" if dead else None

    fake.trouble = trouble
    code, output = ask(fake.url)
    assert code == 0 and "perplexity: not given by this server" in output
    assert [len(read(tmp_path, task)["examples"]) for task in TASKS] == [6, 6]
    assert len(fake.seen) == 3 + ROWS + 2  # no try was repeated


def test_one_that_breaks_on_several_log_probabilities_still_gives_its_predictions_and_then_the_rest(
    fake, ask, tmp_path
):
    fake.logprobs = "vllm"
    assert ask(fake.url)[0] == 0
    whole, fake.seen = files(tmp_path), []
    asked = []

    def trouble(body, times):
        asked.extend([1] if "prompt_logprobs" in body else [])
        return "close" if len(asked) > 2 else None

    fake.trouble = trouble
    code, output = ask(fake.url, "--overwrite", "--server-concurrency", 1)
    assert code == 0 and "perplexity: not given for 11 rows" in output and "samsum_predictions_tuned-1.json" in output
    assert [len(read(tmp_path, task)["examples"]) for task in TASKS] == [6, 6]
    assert "perplexity" not in read(tmp_path, "trivia_qa")["perplexity"]["tuned"]
    fake.seen, fake.trouble = [], lambda body, times: None
    assert ask(fake.url)[0] == 0 and files(tmp_path) == whole
    assert not answers_asked(fake) and not list(tmp_path.glob(".*part*"))


def test_a_slow_server_is_waited_for_and_nothing_is_sent_twice(fake, ask, tmp_path):
    one = threading.Lock()

    def trouble(body, times):
        with one:
            time.sleep(0.15 if is_for_an_answer(body) else 0)  # 6 at once take 0.9 s: more than the limit for each

    fake.trouble = trouble
    code, output = ask(fake.url, "--server-concurrency", 6, "--server-timeout", 0.5)
    assert code == 0, output
    assert len(answers_asked(fake)) == ROWS and 2 <= fake.most <= 6


def test_after_a_time_out_fewer_go_at_once_and_the_row_is_not_sent_again(fake, ask, rows, tmp_path):
    stuck = [json.dumps(prompt) for i, (_, prompt, _) in rows.items() if i.startswith("samsum")][1]

    def trouble(body, times):
        if is_for_an_answer(body):
            time.sleep(2.5 if json.dumps(body["prompt"]) == stuck else 0.15)

    fake.trouble = trouble
    code, output = ask(fake.url, "--server-concurrency", 2, "--server-timeout", 0.5)
    assert code == 1 and "1 requests got no answer (APITimeoutError" in output
    assert answers_asked(fake).count(stuck) == 1 and len(answers_asked(fake)) == ROWS
    assert fake.most == 2  # with the one that the server still works on


def test_an_answer_that_comes_in_drops_is_given_up_after_the_time_out(fake, ask, rows, tmp_path):
    stuck = [json.dumps(prompt) for i, (_, prompt, _) in rows.items() if i.startswith("samsum")][1]
    fake.drips = lambda body: is_for_an_answer(body) and json.dumps(body["prompt"]) == stuck
    started = time.time()
    code, output = ask(fake.url, "--server-concurrency", 2, "--server-timeout", 0.5)
    assert code == 1 and "1 requests got no answer (APITimeoutError" in output
    assert time.time() - started < 7 and answers_asked(fake).count(stuck) == 1


def test_an_answer_beyond_the_limit_is_cut_where_a_server_keeps_none(fake, ask, rows, tmp_path):
    fake.last, fake.written = (lambda asked: " word" * 300), 300
    assert ask(fake.url)[0] == 0
    tokenizer = fake.tokenizer
    for example in read(tmp_path, "samsum")["examples"]:
        tokens = len(tokenizer(example["prediction"], add_special_tokens=False).input_ids)
        assert example["hit_max_new_tokens"] and 90 <= tokens <= 96 and example["new_tokens"] == 300


def test_no_more_examples_than_asked_for(fake, ask, rows, tmp_path):
    prices = ("--server-input-price", 1e6, "--server-output-price", 2e6)
    code, output = ask(fake.url, "--server-max-examples", 2, *prices)
    read_tokens, written = (
        int(n.replace(",", "")) for n in re.findall(r"([\d,]+) (?:prompt|completion) tokens", output)
    )
    assert written == 5 * len(fake.seen) and f"price: {read_tokens + 2 * written:,.4g}\n" in output
    assert code == 0 and len(answers_asked(fake)) == 4
    content = read(tmp_path, "samsum")
    assert len(content["examples"]) == 2 and len(content["left_out"]) == 4
    code, output = ask(fake.url, "--server-max-examples", 3)
    assert code == 2 and "server max examples 2 there, 3 now" in output


def test_the_last_line_is_the_command_that_counts_equal_predictions(fake, ask, tmp_path, capsys):
    assert ask(fake.url)[0] == 0
    content = read(tmp_path, "samsum")
    content["examples"][3]["prediction"] = "answer is 1"
    (tmp_path / "samsum_predictions_mine 1.json").write_text("{}")  # not of these rows
    (tmp_path / "samsum_predictions.json").write_text(json.dumps(content))
    content["examples"][4]["prediction"] = "answer is 1"
    (tmp_path / "samsum_predictions_merged.json").write_text(json.dumps(content))
    [last] = [line for line in ask(fake.url)[1].split("\n") if "evaluations.py " in line]
    evaluations.main(shlex.split(last.split("evaluations.py ")[1]))
    assert "equal predictions of tested and merged: 5 of 6" in capsys.readouterr().out
    found = json.loads((tmp_path / "served" / "evaluation.json").read_text())["samsum"]
    expected = [["tested", "merged", 5], ["tested", "tuned-1", 5], ["merged", "tuned-1", 4]]
    assert found["equal_predictions"] == expected


def test_swapped_questions_are_asked_into_a_file_of_their_own_and_compared_with_the_local_one(fake, ask, tmp_path):
    rows = []
    for number, answer in enumerate(("Paris", "Rome")):
        prompt = trivia_qa.PROMPT.format(context=f"Bob is in {answer}.", question="Where?")
        row = {"id": f"trivia_qa:{number}", "task": "trivia_qa", "prompt": prompt, "completion": f" {answer}"}
        rows.append(row | {"references": [answer]})
    (tmp_path / "dataset").unlink()
    DatasetDict(test=Dataset.from_list(rows)).save_to_disk(tmp_path / "dataset")
    assert ask(fake.url, "--swap-answers")[0] == 0
    tokenizer = AutoTokenizer.from_pretrained(FIXTURES / "tiny_llama3")
    swapped = [rows[0]["prompt"].replace("Paris", "Rome"), rows[1]["prompt"].replace("Rome", "Paris")]
    assert sorted(answers_asked(fake)) == sorted(map(str, tokenizer(swapped).input_ids))
    content = read(tmp_path, "trivia_qa", "tuned-1_swapped")
    assert [(one["references"], one["swapped"]) for one in content["examples"]] == [
        (["Paris"], "Rome"),
        (["Rome"], "Paris"),
    ]
    code, output = ask(fake.url, "--swap-answers")
    assert code == 0 and "nothing to do" in output
    code, output = ask(fake.url, "--name", "tuned-1_swapped")  # that file's own name
    assert code == 2 and "swap answers" in output


def test_own_rows_are_asked_too_and_their_answers_end_as_the_data_set_says(fake, ask, rows, tmp_path):
    known = [row | {"task": "own", "id": f"own:{row_id}"} for row_id, (row, _, _) in list(rows.items())[:2]]
    (tmp_path / "dataset").unlink()
    DatasetDict(test=Dataset.from_list(known)).save_to_disk(tmp_path / "dataset")
    for one_line in (False, True):
        fake.seen = []
        tasks = {"own": {"prompt": "{prompt}", "one_line": one_line}}
        (tmp_path / "dataset" / "tasks.json").write_text(json.dumps(tasks))
        assert ask(fake.url, "--overwrite")[0] == 0
        answers = [entry["body"] for entry in fake.seen if is_for_an_answer(entry["body"])]
        assert [(limit(body), "stop" in body) for body in answers] == 2 * [(tester.OWN_MAX_NEW_TOKENS, one_line)]
        assert all(("\n" in one["prediction"]) != one_line for one in read(tmp_path, "own")["examples"])
    assert [path.name for path in tmp_path.glob("*_predictions_*")] == ["own_predictions_tuned-1.json"]


@pytest.mark.parametrize(
    "url, words",
    [("localhost:8000", "http(s)://host/path"), (f"http://x:{KEY}@host/v1", "http(s)://host"),
     ("http://127.0.0.1:80OO/v1", "http(s)://host"), ("http://[::1/v1", "http(s)://host"),
     ("http://127.0.0.1:9/v1", "check --server")],
)  # fmt: skip
def test_a_wrong_address_is_one_sentence(url, words, ask):
    code, output = ask(url)
    assert code == 2 and words in output and output.count("error: ") == 1
