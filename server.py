"""Any server that speaks OpenAI's protocol: asked several things at once.

Nothing is sent again that the server may still be working on. The key is OPENAI_API_KEY's, in no file or message.
"""

import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed

import openai

from common import fail, progress

WAITS = (1, 2, 4, 8, 16)  # seconds before a request is sent again to a busy server
CONNECT = 30  # seconds to reach it
ERRORS = (openai.APIError, ValueError, AttributeError, LookupError, TypeError)  # the last of what is no such server
LESS_KNOWN = ("response_format", "stop_token_ids", "stop")  # left out in turn where a refusal names no option
GATEWAY_TIMEOUTS = (504, 524)  # somebody before the server has stopped waiting


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
                named = {name for name in taken if re.search(rf"\b{name}\b", told_by(error))}
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
        name, text = type(error).__name__, told_by(error).split("\n")[0][:300]
        if isinstance(error, openai.AuthenticationError):
            return name
        return self.hide(f"{name}: {text}" if isinstance(error, openai.APIError) else text)


def told_by(error):
    """What the server said of an error; the client's text has only what is of OpenAI's form, not FastAPI's detail."""
    unsaid = isinstance(error, openai.APIStatusError) and str(error) == f"Error code: {error.status_code}"
    return f"{error} - {error.response.text}" if unsaid else str(error)


def may_be_at_work(error):
    """Whether the server may still be working on the request that failed."""
    return isinstance(error, openai.APITimeoutError) or getattr(error, "status_code", 0) in GATEWAY_TIMEOUTS
