"""Servers whose replies are drawn at random from all forms seen: what came is scored, and nothing else is.

SEEDS=200 in the environment draws that many runs; a failing one is named by its number.
"""

import json
import os
import random
import socket

import pytest
from test_judge import GOOD, judge, write  # noqa: F401
from test_server import TASKS, Fake, Handler, ask, limit, read, says  # noqa: F401

from pipeline.scoring import judge as judging

SEEDS = range(int(os.environ.get("SEEDS", 4)))
NO_REPLY = "close"
WHOLE = ["stop", "STOP", "eos", "eos_token", "end_turn", "stop_sequence", "COMPLETE", "FinishReason.STOP"]
CUT_OFF = ["length", "max_tokens", "MAX_TOKENS", "model_length"]
NO_END = [None, "", "content_filter", "tool_calls", "error", "abort", "SAFETY", "insufficient_system_resource", 3]
USAGES = [None, {}, [], "12", 7, {"prompt_tokens": None}, {"prompt_tokens": "9"}, {"prompt_tokens": -1},
          {"completion_tokens": 1.5}, {"prompt_tokens": [1]}]  # fmt: skip


def choice(text, chat, finish="stop", **more):
    body = {"message": {"role": "assistant", "content": text} | more} if chat else {"text": text} | more
    return body | {"finish_reason": finish}


def reply(rng, text, chat, tokens, cut):
    """(whether it is an answer, what the server sends: (status, body, headers), or NO_REPLY)

    tokens: of the prompt. cut: as many as a server reads that cuts it, or None.
    """
    usage = {"prompt_tokens": tokens, "completion_tokens": 5}
    good = [
        lambda: choice(text, chat, rng.choice(WHOLE)),
        lambda: choice(text, chat, rng.choice(CUT_OFF)),
        lambda: choice(f"\n {text}", chat),
        lambda: choice(f"<think>So it {text[:3]}</think>\n\n{text}", chat),
        lambda: choice([{"type": "thinking", "thinking": ["Hm."]}, {"type": "text", "text": text}], chat),
        lambda: choice(text, chat, error=None, refusal=None, reasoning_content="I see."),
    ]
    none = [
        lambda: choice(text, chat, rng.choice(NO_END)),
        lambda: choice(None, chat),
        lambda: choice("", chat, "length"),
        lambda: choice(f"{text} \ud83d", chat),
        lambda: choice("<think>Let me see", chat, rng.choice(["stop", "length"])),
        lambda: choice(text, chat) | {"error": {"code": 502, "message": "upstream"}},
        lambda: {"message": {"content": None, "refusal": "I cannot."}, "finish_reason": "stop"},
        lambda: {"message": {"content": "", "reasoning_content": "Hm."}, "finish_reason": "stop"},
        lambda: {"finish_reason": "stop"},
        lambda: choice(5, chat),
        lambda: choice([{"type": "refusal", "refusal": "I cannot."}], chat),
        lambda: choice([{"type": "thinking", "thinking": []}, "x"], chat, rng.choice(["stop", "length"])),
        lambda: choice(None, chat, tool_calls=[{"id": "1"}]),
        lambda: "text",
        lambda: None,
    ]
    sent = [  # whole replies
        (200, {"choices": []}),
        (200, {"error": {"message": "busy"}}),
        (200, {"choices": [choice(text, chat)], "error": "broken"}),
        (200, []),
        (200, "fine"),
        (200, None),
        (200, b"<html>login</html>"),
        (200, b'{"choices": [{"text": "a'),
        (200, b"[" * 50_000),
        (200, b'\xff\xfe{"choices": 1}'),
        (200, b""),
        (204, b""),
        (400, {"error": {"message": f"'max_tokens' is too large: {tokens}"}}),
        (400, {"error": {"message": f"max_tokens={tokens} cannot be greater than 7, which is not supported"}}),
        (422, {"detail": [{"type": "too_long", "loc": ["body", "prompt"], "msg": "too long", "input": "stop"}]}),
        (200, b"no gzip", {"Content-Encoding": "gzip"}),
        (200, b"short", {"Content-Length": "900"}),
        (302, b"", {"Location": "/v1/elsewhere"}),
        (400, b"no"),
        (413, b"too large"),
        (500, b"oops"),
        (429, {"error": {"message": "slow down"}}, {"Retry-After": "0.01"}),
        (429, {"error": {"message": "slow down"}}, {"retry-after-ms": "20"}),
        (429, {"error": "slow down"}, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}),
        (503, {"error": {"message": "loading"}}, {"Retry-After": "x"}),
        NO_REPLY,
    ]
    kind = rng.random()
    if kind < 0.5:
        usage = rng.choice([usage, usage, *USAGES, {"input_tokens": tokens, "output_tokens": 4}])
        return True, (200, {"choices": [rng.choice(good)()], "usage": usage})
    if kind < 0.75:
        return False, (200, {"choices": [rng.choice(none)()], "usage": usage})
    if kind < 0.8 and cut:
        return False, (200, {"choices": [choice(text, chat)], "usage": usage | {"prompt_tokens": cut}})
    return False, rng.choice(sent)


class Strange(Fake):
    """Replies by the seed until it is mended; `were_answers`: whether its last reply to each prompt was an answer."""

    def __init__(self, seed, mended=False):
        self.rng, self.mended = random.Random(seed), mended
        self.were_answers, self.judges = {}, False
        self.first_are_good = self.rng.random() < 0.8
        super().__init__()
        self.RequestHandlerClass = StrangeHandler
        self.chat_only, self.takes_ids = self.rng.random() < 0.5, self.rng.random() < 0.5

    def next_reply(self, path, body):
        if path == "/v1/models" or "prompt_logprobs" in body or "echo" in body:
            return self.answer(path, body)
        chat = path.endswith("/chat/completions")
        if self.judges:
            asked, text, tokens = body["messages"][1]["content"].split(judging.REMINDER)[0], GOOD, 0
        else:
            status, plain = self.answer(path, body)
            if status != 200:
                return status, plain
            asked = body.get("prompt") or body["messages"][0]["content"]
            tokens = plain["usage"]["prompt_tokens"]
            ids = asked if isinstance(asked, list) else self.tokenizer(asked).input_ids
            text, asked = says(ids), json.dumps(ids)
        counts, sent = True, (200, {"choices": [choice(text, chat)], "usage": {"prompt_tokens": tokens}})
        first = not self.judges and limit(body) not in (96, 24)
        if not self.mended and not (first and self.first_are_good):
            # a server that cut the first prompts, too, may as well have another tokenizer
            cut = tokens - 1 if self.first_are_good and tokens else None
            counts, sent = reply(self.rng, text, chat, tokens, cut)
        if not first:
            self.were_answers[asked] = counts
        return sent


class StrangeHandler(Handler):
    def do_GET(self):
        self.reply(*(self.server.answer(self.path, {}) if self.path == "/v1/models" else (404, {})))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            sent = self.server.next_reply(self.path, body)
        if sent == NO_REPLY:
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        status, content, *headers = sent
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        plain = {"Content-Type": "application/json", "Content-Length": str(len(content))}
        for name, value in (plain | dict(*headers)).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def strange(request, monkeypatch):
    server = Strange(request.param)
    yield server
    server.shutdown()
    server.server_close()


def predicted(folder, tokenizer):
    """{ids of a prompt as JSON: its prediction} in the files that there are."""
    from datasets import load_from_disk

    prompts = {row["id"]: row["prompt"] for row in load_from_disk(str(folder / "dataset" / "test"))}
    found = {}
    for task in TASKS:
        if (folder / f"{task}_predictions_tuned-1.json").exists():
            for example in read(folder, task)["examples"]:
                found[json.dumps(tokenizer(prompts[example["id"]]).input_ids)] = example["prediction"]
    return found


@pytest.mark.parametrize("strange", SEEDS, indirect=True)
def test_rows_are_scored_by_the_answers_that_came_and_the_same_command_gets_the_others(strange, ask, tmp_path):  # noqa: F811
    code, output = ask(strange.url)
    assert code in (0, 1, 2) and "Traceback" not in output
    found = predicted(tmp_path, strange.tokenizer)
    if code == 2:
        assert "gives no answers (" in output and not found
    else:
        answered = {asked for asked, counts in strange.were_answers.items() if counts}
        assert found.keys() == answered and (code == 1) == (len(answered) < 12), output
    assert all(text == says(json.loads(asked)) for asked, text in found.items())
    strange.mended = True
    code, output = ask(strange.url)
    found = predicted(tmp_path, strange.tokenizer)
    assert code == 0 and len(found) == 12, output
    assert all(text == says(json.loads(asked)) for asked, text in found.items())
    assert not list(tmp_path.glob(".*part*"))


@pytest.mark.parametrize("strange", SEEDS, indirect=True)
def test_judgements_are_those_that_came_and_the_same_command_gets_the_others(strange, judge, tmp_path):  # noqa: F811
    strange.judges = True
    write(tmp_path, [(f"base {i}", f"right {i}") for i in range(8)])
    code, output, report = judge(strange.url)
    assert code in (0, 2) and "Traceback" not in output
    if code == 0:
        scores = report["trivia_qa"]["per_example"]
        given = sum(score is not None for system in scores.values() for score in system["judge"])
        assert given == sum(strange.were_answers.values()) and report["trivia_qa"]["judge"]["unanswered"] == 16 - given
        assert given == 16 or "the same command asks for them again" in output
    strange.mended = True
    code, output, report = judge(strange.url)
    assert code == 0, output
    assert all(score == 75 for system in report["trivia_qa"]["per_example"].values() for score in system["judge"])
