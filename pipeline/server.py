"""Any server that speaks OpenAI's protocol: asked several things at once, and what it says checked once, here.

Nothing is sent again that the server may still be working on. The key is OPENAI_API_KEY's, in no file or message.
"""

import functools
import os
import re
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx2
import openai

from pipeline.script import fail, first_line, progress, say

WAITS = (1, 2, 4, 8, 16)  # seconds before a request is sent again to a busy server that names no time
LONGEST_WAIT = 600  # seconds that a server may ask to be left alone; a longer time ends the request
CONNECT = 30  # seconds to reach it
REFUSED_AT_FIRST = 20  # requests, one after the other, after which a server that answers none is given up
OF_ONE_REQUEST = (400, 413, 422)  # statuses of a refusal that says nothing of other requests
GATEWAY_TIMEOUTS = (504, 524)  # somebody before the server has stopped waiting
LIMITS = ("max_tokens", "max_completion_tokens")  # names of the limit of an answer: one is always sent
FOUND_OUT = ("response_format", "stop_token_ids", "stop")  # left out in turn where a refusal names no option
# What a refusal says of an option that the server does not have, whatever its value.
UNKNOWN = re.compile(
    r"unsupported|n(o|.)t (support|accept|permitted|allowed|available|implemented)|unrecogni[sz]ed|unknown|unexpected"
    r"|extra|deprecated|invalid (parameter|argument|field|key)|no (such|parameter|field|option)\b",
    re.IGNORECASE,
)
EXTRA = re.compile(r"""extra_forbidden['"], ['"]loc['"]: [\[(]['"]body['"], ['"](\w+)""")  # pydantic's
# Servers' names for an answer that is whole, and for one that its limit cut off, without case and `_`.
WHOLE = ("stop", "eos", "eostoken", "endturn", "endofturn", "stopsequence", "stoptoken", "complete", "done")
CUT_OFF = ("length", "maxtokens", "maxnewtokens", "maxlength", "maxoutputtokens", "modellength", "tokenlimit")
# What a model's thoughts begin with, and what they end with.
THINK = r"(?:seed:)?(?:think|thinking|thoughts?|reasoning)\b"
THOUGHTS = re.compile(
    rf"\s*([<\[◁]{THINK}|<\|(begin_of_thought|start_thinking)\|>|<\|channel\|>analysis|<details type=.reasoning)",
    re.IGNORECASE,
)
THOUGHTS_END = re.compile(
    rf"[<\[◁]/{THINK}[>\]▷]|<\|end_(of_thought|thinking)\|>|<\|channel\|>final<\|message\|>|</details>", re.IGNORECASE
)
# What may be around the answer behind them.
FRAMES = [(f"<{name}>", f"</{name}>") for name in ("answer", "response")]
FRAMES += [("<|START_RESPONSE|>", "<|END_RESPONSE|>"), ("<|begin_of_solution|>", "<|end_of_solution|>")]
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
OF_CLIENT = (*PROXIES, "SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID")
HALF_A_CHARACTER = re.compile("[\ud800-\udfff]")  # of a surrogate pair: JSON can say it, UTF-8 cannot
NO_ROOM = "its tokens went into thoughts, and none into an answer"


class NoAnswer(Exception):
    """The server has replied, but not with an answer; str() is the reason, for a person."""


ERRORS = (openai.APIError, NoAnswer)  # why a request has no answer


class Answer(NamedTuple):
    """What a server says, checked. `text` counts only where `problem`, why it is no answer, is empty."""

    text: str
    problem: str
    cut_off: bool  # by the limit of its tokens
    thoughts: bool  # whether it thought, apart from the text
    read: int | None  # tokens of the prompt, as the server counts them; None: not known
    written: int | None
    choice: dict


def read_answer(reply, hide=str):
    """The Answer in a server's reply, of whatever form; raises NoAnswer where it is not of OpenAI's protocol.

    hide: takes the key out of a text.
    """
    choices = as_dict(reply).get("choices")
    choice = as_dict(choices[0] if isinstance(choices, list) and choices else None)
    message = as_dict(choice.get("message"))
    text, refusal = message.get("content") if message else choice.get("text"), message.get("refusal")
    if isinstance(text, list):  # of parts, some of which are thoughts or a refusal
        parts = [as_dict(part) for part in text]
        refusal = refusal or next((part["refusal"] for part in parts if part.get("refusal")), None)
        parts = [part for part in parts if part.get("type", "text") in ("text", "output_text")]
        text = "".join(part["text"] for part in parts if isinstance(part.get("text"), str)) or None
    error = as_dict(reply).get("error") or choice.get("error")
    if not (choice or error) or not isinstance(text, str | None):
        raise NoAnswer(f"its answer is not of OpenAI's protocol: {hide(str(reply))[:60]!r}")
    answer, thoughts = without_thoughts(hide(text or ""))
    thoughts = bool(thoughts or message.get("reasoning_content") or message.get("reasoning"))
    reason = re.sub("[^a-z]", "", str(choice.get("finish_reason")).rpartition(".")[2].lower())
    problem = ""
    if error:
        problem = f"it reports an error: {hide(str(error))[:100]}"
    elif refusal:
        problem = f"it refuses: {hide(str(refusal))[:100]}"
    elif reason not in (*WHOLE, *CUT_OFF):
        problem = f"its answer ended by {hide(str(choice.get('finish_reason')))[:40]}"
    elif (thoughts and not answer.strip()) or (reason in CUT_OFF and not answer):
        problem = NO_ROOM
    elif text is None:
        problem = "its answer has no text"
    elif HALF_A_CHARACTER.search(text):
        problem = "its answer has half a character"
    read, written = tokens_of(as_dict(reply.get("usage")))
    return Answer(answer, problem, reason in CUT_OFF, thoughts, read, written, choice)


def as_dict(value):
    return value if isinstance(value, dict) else {}


def tokens_of(usage):
    """Tokens read and written, by either of their names; None where that is no number: information costs no answer."""
    for names in (("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens")):
        counts = [usage[name] for name in names if type(usage.get(name)) is int and usage[name] >= 0]
        yield counts[0] if counts else None


def without_thoughts(text, begun=False):
    """What follows the thoughts that a text begins with, "" where they never end, and whether there are any.

    begun: a template may have begun them, so that only their end is in the text, or not even that.
    """
    ends = [end for end in THOUGHTS_END.finditer(text) if not begun or end[0].lower() != "</details>"]
    begun = begun and ends and not re.search(rf"[<\[◁]{THINK}", text[: ends[0].start()], re.IGNORECASE)
    if not THOUGHTS.match(text) and not begun:
        return text, False
    return without_frame(text[ends[-1].end() :] if ends else ""), True


def without_frame(answer):
    """What one of FRAMES is around; the answer as it is where there is none, or nothing in it."""
    for begin, end in FRAMES:
        inner = answer.lstrip().removeprefix(begin)
        if inner != answer.lstrip():
            inner = inner.rpartition(end)[0] if end in inner else inner
            return inner if inner.strip() else answer
    return answer


class TimedStream(httpx2.SyncByteStream):
    """The bytes of an answer until the time `end`; httpx2's own time limit starts again with each piece of it."""

    def __init__(self, stream, end):
        self.stream, self.end = stream, end

    def __iter__(self):
        for piece in self.stream:
            if time.monotonic() > self.end:
                raise httpx2.ReadTimeout("its answer arrives too slowly")
            yield piece

    def close(self):
        self.stream.close()


def limit_time(seconds, response):
    """For httpx2, which calls it with each response before its bytes are read."""
    response.stream = TimedStream(response.stream, time.monotonic() + seconds)


def open_client(name, url, key, limit):
    """The openai.OpenAI; exits 2, naming the variable, where the environment has what it cannot use."""
    try:
        # the client's own retries would also send again what timed out
        http = openai.DefaultHttpxClient(event_hooks={"response": [functools.partial(limit_time, limit.read)]})
        client = openai.OpenAI(api_key=key or "none", base_url=url, timeout=limit, max_retries=0, http_client=http)
        str(client.default_headers).encode("ascii")  # the only letters that can be sent
        return client
    except Exception as error:  # the libraries have a kind for each variable
        given = " or ".join(variable for variable in OF_CLIENT if variable in os.environ)
        fail(f"the {name} cannot be asked ({first_line(error)}): correct {given or 'its address'}, or unset it")


def proxy_for(url):
    """The variable that names the proxy between here and `url`, or None."""
    address, proxies = urlsplit(url), getproxies()
    kind = next((kind for kind in (address.scheme, "all") if kind in proxies), None)
    return f"{kind.upper()}_PROXY" if kind and not proxy_bypass(address.hostname) else None


class Server:
    """A model behind a server."""

    def __init__(self, name, url, model, concurrency, timeout):
        proxy = proxy_for(url)
        self.name = f"the {name} at {url}" + (f", through the proxy of {proxy}," if proxy else "")
        self.model, self.at_once = model, concurrency
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not re.fullmatch(r"[!-~]+" if "api.openai.com" in url else r"[!-~]*", self.key):
            fail(f"no key for the {name}: set OPENAI_API_KEY, to the key alone")
        # a server that answers one after the other works on all the others of a request before it
        self.client = open_client(name, url, self.key, openai.Timeout(timeout * concurrency, connect=CONNECT))
        self.places, self.lock = threading.Semaphore(concurrency), threading.Lock()
        self.counts = {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0}  # of all that was sent
        self.refused, self.accepted = set(), set()  # options, by what the server has said so far
        self.answered, self.answered_at, self.timeout = 0, time.monotonic(), timeout
        self.kept = 0  # answers that count, those of earlier runs among them
        self.silent_until, self.stopping = 0.0, threading.Event()

    def send(self, path, asked, options, once=False):
        """The Answer to what is `asked` with those of the `options` that the server takes; raises ERRORS.

        once: what fails is not sent again, but for a server that is busy.
        """
        dropped, tries = set(self.refused), 0
        while True:
            taken = with_a_limit(options, dropped)
            try:
                answer = read_answer(self.post(path, {"model": self.model} | asked | taken), self.hide)
                break
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                # a limit that was taken once is known: the refusal is about its value
                unknown = unknown_options(error, taken) - self.accepted.intersection(LIMITS)
                if not unknown or dropped | unknown >= set(LIMITS):
                    raise
                dropped |= unknown
            except (openai.RateLimitError, openai.InternalServerError, openai.APIConnectionError) as error:
                if not self.wait(error, 0 if once else len(WAITS), tries):
                    raise
                tries += 1
        with self.lock:
            self.accepted |= taken.keys()
            self.refused |= dropped - self.accepted  # what it took once it only refused in one row
            self.answered += 1
            self.answered_at = time.monotonic()
            self.counts["prompt_tokens"] += answer.read or 0
            self.counts["completion_tokens"] += answer.written or 0
        return answer

    def wait(self, error, most, tries):
        """Wait before a request is sent again, all requests for as long as the server asks; False: do not send it.

        most: how many tries more there may be. A server that is busy is asked again as long as it answers any.
        """
        now = time.monotonic()
        headers = error.response.headers if isinstance(error, openai.APIStatusError) else None
        asked_for = self.client._parse_retry_after_header(headers) or 0  # reads Retry-After's forms
        if isinstance(error, openai.RateLimitError) and "insufficient_quota" not in str(error):
            silence = min(self.silent_until, self.answered_at + LONGEST_WAIT)
            again = now - max(self.answered_at, silence) < self.timeout
        else:
            again = tries < most and not may_be_at_work(error)
        if not again or asked_for > LONGEST_WAIT:
            return False
        with self.lock:
            if asked_for > 1 and now + asked_for > self.silent_until + 1:
                say(f"{self.name} asks to wait for {asked_for:.0f} s")
            if now + asked_for > self.silent_until:  # NaN is not
                self.silent_until = now + asked_for
        return not self.stopping.wait(WAITS[min(tries, len(WAITS) - 1)])

    def post(self, path, body):
        """Send a request when there is a place for it. One that timed out keeps its own: fewer go at once then."""
        self.places.acquire()
        keeps = False
        try:
            while (left := self.silent_until - time.monotonic()) > 0:
                if self.stopping.wait(left):
                    raise NoAnswer("the run was stopped while it waited")
            with self.lock:
                self.counts["requests"] += 1
            return self.client.post(path, body=body, cast_to=object)
        except openai.APIError as error:
            with self.lock:
                keeps = may_be_at_work(error) and self.at_once > 1
                self.at_once -= keeps
            raise
        except (ValueError, RecursionError, LookupError) as error:  # JSON that is broken, or nested without end
            raise NoAnswer(f"its answer cannot be read ({first_line(error)})") from None
        finally:
            if not keeps:
                self.places.release()

    def ask_all(self, items, ask, keep, title):
        """keep(item, ask(item)) for all items, as the answers come; the errors of those without one.

        The very first goes alone: a wrong key or address costs one request. Exits 2 where no more answers come.
        """
        errors, pool = [], ThreadPoolExecutor(self.at_once)
        failures_in_a_row = 0
        give_up_after = 2 * self.at_once
        sent_alone = 0 if self.answered else 1
        self.answered_at = time.monotonic()

        def outcome(item):
            try:
                answer = ask(item)
            except ERRORS as error:
                return error
            with self.lock:  # not in the loop below: what comes while a run is being stopped is kept, too
                keep(item, answer)
                self.kept += 1

        def outcomes():
            yield from map(outcome, items[:sent_alone])
            for job in as_completed([pool.submit(outcome, item) for item in items[sent_alone:]]):
                yield job.result()

        try:
            for number, error in enumerate(progress(outcomes(), title, len(items)), 1):
                if not error:
                    failures_in_a_row = 0
                    continue
                errors.append(error)
                # refusals of one request each end a run only where there was never anything else
                of_one = isinstance(error, NoAnswer) or getattr(error, "status_code", 0) in OF_ONE_REQUEST
                failures_in_a_row = 0 if of_one and self.kept else failures_in_a_row + 1
                most = max(give_up_after, REFUSED_AT_FIRST) if of_one else give_up_after
                if failures_in_a_row > most or (not of_one and number <= sent_alone):
                    reason = f"{self.name} gives no answers ({self.why(error)})"
                    fail(f"{reason}; run again to go on from those that it gave")
        except KeyboardInterrupt:
            if self.answered:  # the first request goes without the pool
                say("\nwaiting for the answers that are under way, to keep them; Ctrl-C again ends at once")
            raise
        finally:
            self.stopping.set()
            try:
                pool.shutdown(cancel_futures=True)
            except KeyboardInterrupt:
                os._exit(130)  # what was kept is on the disk
            self.stopping.clear()
        return errors

    def reasons(self, errors):
        """Why requests got no answer, in a line: the most frequent reasons, with how many requests had each."""
        often = Counter(map(self.why, errors)).most_common(3)
        return "; ".join(f"{reason} ({count} times)" if len(errors) > count else reason for reason, count in often)

    def hide(self, text):
        """Text of the server without the key, should it repeat it; a short one, or a word, is a placeholder."""
        return text.replace(self.key, "[key]") if len(self.key) > 7 and re.search(r"\d", self.key) else text

    def why(self, error):
        """What went wrong, for a person: one line without the key (a 401's text has parts of it)."""
        if isinstance(error, NoAnswer):
            return str(error)
        name, text = type(error).__name__, self.hide(words_of(error)).split("\n")[0][:300]
        return name if isinstance(error, openai.AuthenticationError) else f"{name}: {text}"


def with_a_limit(options, dropped):
    """The options without those dropped; a dropped limit of tokens goes by its other name."""
    taken = {name: value for name, value in options.items() if name not in dropped}
    for name, other in (LIMITS, LIMITS[::-1]):
        if name in options and name in dropped:
            taken[other] = options[name]
    return taken


def unknown_options(error, taken):
    """The options that a refusal calls unknown. It may name no option: then the next of FOUND_OUT is tried."""
    found = taken.keys() & set(EXTRA.findall(str(error.body)))
    any_named = bool(found)
    for sentence in re.split(r"(?<=[.!?;])\s|\n", words_of(error)):
        numbers = set(re.findall(r"(?<![\w.-])\d+(?![\w-])", sentence))
        for name in taken:
            if not re.search(rf"(?<!\w){name}(?!\w)", sentence):
                continue
            any_named = True
            # another number than its own in a sentence on a limit is about its value, for this row or for all
            of_value = name in LIMITS and numbers - {str(taken[name])}
            if not of_value and (UNKNOWN.search(sentence) or re.search(rf"\bno\W+{name}", sentence)):
                found.add(name)
    return found if any_named else set([name for name in FOUND_OUT if name in taken][:1])


def words_of(error):
    """What the server says of an error, but not its status nor what it repeats; or what the client says."""
    if not isinstance(error, openai.APIStatusError):
        cause = str(error.__cause__ or "")
        if "CERTIFICATE" in cause:
            given = [name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if name in os.environ]
            cause += f": see to {' '.join(given)}" if given else ": set SSL_CERT_FILE to its certificate"
        return f"{error} {cause}".strip()
    if isinstance(error.body, str):
        return error.body
    body = as_dict(error.body)
    detail = body.get("detail")  # FastAPI's
    if isinstance(detail, list):
        return "\n".join(f"{part.get('msg')}: {part.get('loc')}" for part in map(as_dict, detail))
    message = body.get("message") or detail or error.response.text
    return f"{message} ({body['param']})" if body.get("param") else str(message)


def may_be_at_work(error):
    """Whether the server may still be working on the request that failed."""
    return isinstance(error, openai.APITimeoutError) or getattr(error, "status_code", 0) in GATEWAY_TIMEOUTS
