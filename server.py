"""Any server that speaks OpenAI's protocol: asked several things at once, or for the rows of test_llama.py.

Nothing is sent again that the server may still be working on. The key is OPENAI_API_KEY's, in no file or message.
"""

import math
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed

import openai

import llama
from common import fail, progress, say

WAITS = (1, 2, 4, 8, 16)  # seconds before a request is sent again to a busy server
CONNECT = 30  # seconds to reach it
ERRORS = (openai.APIError, ValueError, AttributeError, LookupError, TypeError)  # the last of what is no such server
LESS_KNOWN = ("response_format", "stop_token_ids", "stop")  # left out in turn where a refusal names no option
GATEWAY_TIMEOUTS = (504, 524)  # somebody before the server has stopped waiting
NO_SUCH = (400, 404, 405, 422, 501)  # an endpoint, or a form of a prompt
CAUSES = {  # why a server reads so many tokens more than the run
    0: "the same",
    1: "probably a second BOS; serve the folder's own tokenizer, and a template that writes one",
    -1: "probably no BOS; serve the folder's own tokenizer, or let the server put one in front",
    "more": "another chat template, or a system prompt; serve the folder's own chat_template.jinja",
}
BROKEN_OFF = ("content_filter", "abort", "error")  # reasons to finish that leave no answer
WAYS = {"text": "text", "chat": "chat", "ids": "token ids"}  # a prompt goes
# Other tokenizers cut digits, capitals, accents and brackets otherwise
PROBE = "In 1987, naïve Zürich-Cafés sold 12345678 x_iPhones {a: [0.25]}; 東京 don't!?\nAnswer:"
LOGPROBS = ({"prompt_logprobs": 0}, {"echo": True, "logprobs": 0})  # vLLM's, and OpenAI's of old


class Server:
    """A model behind a server; `sent` and `usages` count what it took, `refused` holds options it does not take."""

    def __init__(self, name, url, model, concurrency, timeout):
        self.name, self.model, self.at_once = f"the {name} at {url}", model, concurrency
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not re.fullmatch(r"[!-~]+" if "api.openai.com" in url else r"[!-~]*", self.key):
            fail(f"no key for the {name}: set OPENAI_API_KEY, to the key alone")
        # a server that answers one after the other works on all the others of a request before it
        limit = openai.Timeout(timeout * concurrency, connect=CONNECT)
        # the client's own retries would also send again what timed out
        self.client = openai.OpenAI(api_key=self.key or "none", base_url=url, timeout=limit, max_retries=0)
        self.places, self.lock = threading.Semaphore(concurrency), threading.Lock()
        self.sent, self.usages, self.refused = [], [], set()  # threads may append to a list
        self.speaks = False  # whether it has answered anything

    def send(self, path, asked, options, waits=None):
        """The answer, a dict, to what is `asked` with those of the `options` that the server takes; raises ERRORS."""
        refused, waits = set(self.refused), iter(WAITS if waits is None else waits)
        while True:
            taken = {name: value for name, value in options.items() if name not in refused}
            if "max_tokens" in refused & options.keys() and "max_completion_tokens" not in refused:
                taken["max_completion_tokens"] = options["max_tokens"]
            try:
                answer = self.post(path, {"model": self.model} | asked | taken)
                break
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                named = {name for name in taken if re.search(rf"\b{name}\b", str(error))}
                named = named or set([name for name in LESS_KNOWN if name in taken][:1])
                if not named:
                    raise
                refused |= named
            except (openai.RateLimitError, openai.InternalServerError, openai.APIConnectionError) as error:
                wait = next(waits, None)
                if wait is None or may_be_at_work(error):
                    raise
                time.sleep(wait)
        if not isinstance(answer, dict) or not answer.get("choices"):
            raise ValueError(f"its answer is not of OpenAI's protocol: {self.hide(str(answer))[:60]!r}")
        self.refused, self.speaks = self.refused | refused, True
        if usage := answer.get("usage"):
            self.usages.append((usage["prompt_tokens"], usage["completion_tokens"]))
        return answer

    def post(self, path, body):
        """Send a request when there is a place for it. One that timed out keeps its own: fewer go at once then."""
        self.places.acquire()
        keeps = False
        try:
            self.sent.append(path)
            return self.client.post(path, body=body, cast_to=object)
        except openai.APIError as error:
            with self.lock:
                keeps = may_be_at_work(error) and self.at_once > 1
                self.at_once -= keeps
            raise
        finally:
            if not keeps:
                self.places.release()

    def ask_all(self, items, ask, keep, title):
        """keep(item, ask(item)) for all items, as the answers come; the errors of those without one.

        The very first goes alone: a wrong key or address costs one request. Exits 2 where no more answers come.
        """
        errors, in_row, most, alone = [], 0, 2 * self.at_once, 0 if self.speaks else 1

        def outcome(item):
            try:
                answer = ask(item)
            except ERRORS as error:
                return error
            with self.lock:  # not in the loop below: what comes while a run is being stopped is kept, too
                keep(item, answer)

        def outcomes(pool):
            yield from map(outcome, items[:alone])
            for job in as_completed([pool.submit(outcome, item) for item in items[alone:]]):
                yield job.result()

        with ThreadPoolExecutor(self.at_once) as pool:
            bar = progress(outcomes(pool), title, len(items))
            try:
                for number, error in enumerate(bar):
                    in_row = in_row + 1 if error else 0
                    errors += [error] if error else []
                    refused = isinstance(error, openai.APIError) and not isinstance(error, openai.BadRequestError)
                    if in_row > most or (refused and number < alone):
                        told = f"{self.name} gives no answers ({self.why(error)})"
                        fail(f"{told}; run again to go on from those that it gave")
            finally:
                pool.shutdown(cancel_futures=True)
        return errors

    def counts(self):
        """{"requests", "prompt_tokens", "completion_tokens"} of all that was sent."""
        asked, answered = (sum(column) for column in zip((0, 0), *self.usages, strict=True))
        return {"requests": len(self.sent), "prompt_tokens": asked, "completion_tokens": answered}

    def hide(self, text):
        """Text of the server without the key, should it repeat it; a short one is a placeholder."""
        return text.replace(self.key, "[key]") if len(self.key) > 7 else text

    def why(self, error):
        """What went wrong, for a person: one line without the key (a 401's text has parts of it)."""
        name, text = type(error).__name__, str(error).split("\n")[0][:300]
        if isinstance(error, openai.AuthenticationError):
            return name
        return self.hide(f"{name}: {text}" if isinstance(error, openai.APIError) else text)


def may_be_at_work(error):
    """Whether the server may still be working on the request that failed."""
    return isinstance(error, openai.APITimeoutError) or getattr(error, "status_code", 0) in GATEWAY_TIMEOUTS


class Tested(Server):
    """The model of a server, asked as test_llama.py asks its own: greedily, for the same tokens."""

    def __init__(self, args, tokenizer, ends):
        super().__init__("server", args.server, args.server_model, args.server_concurrency, args.server_timeout)
        self.tokenizer, self.ends = tokenizer, ends
        self.form, self.same_tokens, self.logprobs = None, False, None
        order = ("chat", "text") if tokenizer.chat_template else ("text", "chat")
        self.forms = {"completions": ("text",), "chat": ("chat",)}.get(args.server_api, order)
        if not self.model:
            self.model = self.only_model()

    def only_model(self):
        try:
            names = [model["id"] for model in self.client.get("/models", cast_to=object)["data"]]
        except ERRORS as error:
            fail(f"{self.name} does not say what it serves ({self.why(error)}): check --server, give --server-model")
        if len(names) != 1:
            fail(f"{self.name} serves {len(names)} models ({', '.join(names[:5])}): give --server-model")
        return names[0]

    def request(self, row):
        """The path and the body of a request for a row's answer."""
        messages = [{"role": "user", "content": row["prompt"]}]
        if self.form == "chat":
            return "/chat/completions", {"messages": messages}
        if self.form == "ids":
            return "/completions", {"prompt": row["prompt_ids"]}
        text = row["prompt"]
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            if self.tokenizer("a").input_ids[0] == self.tokenizer.bos_token_id:  # the server puts one there, too
                text = text.removeprefix(self.tokenizer.bos_token)
        return "/completions", {"prompt": text}

    def takes(self, form, *rows):
        """How many tokens more than the run the server reads of each prompt (None: not said); []: no such form."""
        self.form, more = form, []
        try:
            for row in rows:
                usage = self.send(*self.request(row), {"max_tokens": 1, "temperature": 0}).get("usage")
                more.append(usage["prompt_tokens"] - len(row["prompt_ids"]) if usage else None)
        except openai.APIStatusError as error:
            if error.status_code not in NO_SUCH:
                raise
            self.refusal, more = error, []
        return more

    def begin(self, row):
        """Find out, with the first row and PROBE, how the server is to be asked, and say whether it reads the same."""
        probe = {"id": ["probe"], "prompt": [PROBE], "completion": [" a"]}
        probe = {"prompt": PROBE, "prompt_ids": llama.encode(self.tokenizer, probe)["prompt_ids"][0]}
        try:
            more = next(filter(None, (self.takes(form, row, probe) for form in self.forms)), None)
            if not more:
                raise self.refusal
            self.same_tokens = more[0] is not None and more[0] == more[-1]
            say(self.reading(row, more[0]))
            # ids are never read as another text, but must mean the same
            if self.form == "text" and self.same_tokens and not self.takes("ids", row):
                self.form = "text"
        except ERRORS as error:
            fail(f"{self.name} gives no answers ({self.why(error)}): check --server, --server-model and --server-api")
        say(f"{self.name} is asked by {WAYS[self.form]}")

    def reading(self, row, more):
        """A sentence on what the server reads of a prompt beside what the run reads."""
        own = len(row["prompt_ids"])
        if more is None:
            return f"{self.name} does not say how many tokens it reads: whether it reads the same is not known"
        cause = CAUSES.get(more, CAUSES["more"])
        if self.form == "chat" and not self.tokenizer.chat_template:
            cause = "it puts a chat template around, without which the run was trained; try --server-api completions"
        if not self.same_tokens:
            cause = "it has another tokenizer, for it reads other prompts otherwise: another model's answers"
        return f"{self.name} reads {own + more} tokens of the first prompt, the run {own}: {cause}"

    def ask(self, row):
        """What is known of a row after its answer, under the names of the predictions file."""
        options = {"temperature": 0, "max_tokens": row["new"]}
        options |= {"stop_token_ids": self.ends} if self.same_tokens else {}  # of vLLM; others know the model's own
        options |= {"stop": ["\n"]} if row["one_line"] else {}
        answer = self.send(*self.request(row), options)
        choice = answer["choices"][0]
        text = (choice["message"]["content"] if self.form == "chat" else choice["text"]) or ""
        if choice["finish_reason"] in BROKEN_OFF:
            raise ValueError(f"its answer ended by {choice['finish_reason']}")
        cut_off = choice["finish_reason"] == "length" and not (row["one_line"] and "\n" in text)
        text = self.hide(text.split("\n")[0] if row["one_line"] else text).strip()
        new = answer["usage"]["completion_tokens"] if answer.get("usage") else None
        return {"prediction": text, "new_tokens": new, "hit_max_new_tokens": cut_off}

    def gives_losses(self, row):
        """Whether the server tells the prompt's log-probabilities, tried with one row; it may break on that."""
        for way in LOGPROBS if self.same_tokens else ():
            self.logprobs = way
            try:
                self.loss(row, waits=())
                return True
            except ERRORS:
                pass
        return False

    def loss(self, row, waits=None):
        """{"nll": negative log likelihood (nats) of a row's completion}"""
        start, ids = len(row["prompt_ids"]), row["prompt_ids"] + row["completion_ids"]
        options = {"max_tokens": 1, "temperature": 0}
        choice = self.send("/completions", {"prompt": ids} | self.logprobs, options, waits)["choices"][0]
        if "echo" in self.logprobs:
            values = choice["logprobs"]["token_logprobs"]
            if len(values) not in (len(ids), len(ids) + 1):
                raise ValueError("its log-probabilities are not those of the prompt")
            found = values[start : len(ids)]
        else:
            known = choice["prompt_logprobs"]
            found = [known[place][str(token)]["logprob"] for place, token in enumerate(ids) if place >= start]
        return {"nll": -math.fsum(found)}
