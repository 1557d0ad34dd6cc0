"""test_llama.py --server: the test rows asked of a server of OpenAI's protocol."""

import math
import re
import shlex
import time
from contextlib import suppress
from pathlib import Path

import openai

from pipeline.attention import MAX_NLL
from pipeline.files import digest, only_run_in, read_json, rows_of
from pipeline.script import command, fail, say
from pipeline.server import ERRORS, HALF_A_CHARACTER, NO_ROOM, NoAnswer, Server, as_dict, without_thoughts
from pipeline.testing import predictions
from pipeline.tokens import encode, end_tokens

# Settings that bind a server's answers, beside its model and the rows: not where it was reached
OF_SERVER = ("server_api", "server_max_examples", "server_thought_tokens", "swap_answers")
NO_SUCH = (400, 404, 405, 422, 501)  # an endpoint, or a form of a prompt
CAUSES = {  # why a server reads so many tokens more than the run
    0: "the same",
    1: "probably a second BOS; serve the folder's own tokenizer, and a template that writes one",
    -1: "probably no BOS; serve the folder's own tokenizer, or let the server put one in front",
    "more": "another chat template, or a system prompt; serve the folder's own chat_template.jinja",
}
FIRST_TOKENS = 32  # that the first requests ask for: some models refuse fewer than 16
FEWEST = 1 / 2  # of the tokens expected of another tokenizer: with fewer, the server has cut the prompt
# Other tokenizers cut digits, capitals, accents and brackets otherwise
PROBE = "In 1987, naïve Zürich-Cafés sold 12345678 x_iPhones {a: [0.25]}; 東京 don't!?\nAnswer:"
LOGPROBS = ({"prompt_logprobs": 0}, {"echo": True, "logprobs": 0})  # vLLM's, and OpenAI's of old


class NoLogProbability(NoAnswer):
    """The server gives log-probabilities, but a token of this row has none."""


class Tested(Server):
    """The model of a server, asked as test_llama.py asks its own: greedily, for the same tokens."""

    def __init__(self, args, tokenizer, ends):
        super().__init__("server", args.server, args.server_model, args.server_concurrency, args.server_timeout)
        self.tokenizer, self.ends, self.thought_tokens = tokenizer, ends, args.server_thought_tokens
        order = ("chat", "text") if tokenizer.chat_template else ("text", "chat")
        self.forms = {"completions": ("text",), "chat": ("chat",)}.get(args.server_api, order)
        self.model = self.model or self.only_model()

    def only_model(self):
        try:
            names = [model["id"] for model in self.client.get("/models", cast_to=object)["data"]]
        except (openai.APIError, ValueError, LookupError, TypeError) as error:
            reason = self.why(error) if isinstance(error, openai.APIError) else "its answer is no list of models"
            fail(f"{self.name} does not say what it serves ({reason}): check --server, give --server-model")
        if len(names) != 1 or not isinstance(names[0], str) or HALF_A_CHARACTER.search(names[0]):
            fail(f"{self.name} serves {len(names)} models ({', '.join(map(str, names[:5]))}): give --server-model")
        return names[0]

    def request(self, row):
        """The path and the body of a request for a row's answer."""
        messages = [{"role": "user", "content": row["prompt"]}]
        if self.form == "chat":
            return "/chat/completions", {"messages": messages}
        if self.form == "token ids":
            return "/completions", {"prompt": row["prompt_ids"]}
        text = row["prompt"]
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            if self.tokenizer("a").input_ids[0] == self.tokenizer.bos_token_id:  # the server puts one there, too
                text = text.removeprefix(self.tokenizer.bos_token)
        return "/completions", {"prompt": text}

    def read_more(self, row):
        """How many tokens more than the run the server reads of a prompt; None: it does not say. Raises ERRORS."""
        options = {"max_tokens": FIRST_TOKENS + self.thought_tokens, "temperature": 0}
        answer = self.send(*self.request(row), options)
        if not answer.choice:
            raise NoAnswer(answer.problem)
        return answer.read - len(row["prompt_ids"]) if answer.read else None

    def take_form(self, forms, row):
        """Set the first form in which the server takes a row's prompt; read_more of it. Raises ERRORS."""
        for form in forms:
            self.form = form
            try:
                return self.read_more(row)
            except (openai.APIStatusError, NoAnswer) as error:
                if form == forms[-1] or getattr(error, "status_code", 400) not in NO_SUCH:
                    raise

    def begin(self, row):
        """Find out, with PROBE and the first row, how the server is to be asked, and say whether it reads the same."""
        ids = encode(self.tokenizer, {"id": ["probe"], "prompt": [PROBE], "completion": [" a"]})["prompt_ids"][0]
        probe = {"prompt": PROBE, "prompt_ids": ids}
        try:
            more_of_probe = self.more = self.take_form(self.forms, probe)
            measured = probe
            with suppress(*ERRORS):  # where the probe is taken, a row may be refused for what it says
                more_of_row = self.read_more(row)
                if more_of_row is not None:
                    measured, self.more = row, more_of_row
            self.same_tokens = more_of_probe is not None and self.more == more_of_probe
            # of a prompt's tokens, as the run counts them, that another tokenizer makes of it
            self.share = min(1, 1 + (self.more or 0) / len(measured["prompt_ids"]))
            say(self.reading(len(measured["prompt_ids"])))
            if self.form == "text" and self.same_tokens:  # ids are never read as another text, but must mean the same
                self.more = self.take_form(("token ids", "text"), probe) or 0
        except ERRORS as error:
            flags = "--server, --server-model, --server-api and, for a reasoning model, --server-thought-tokens"
            fail(f"{self.name} gives no answers ({self.why(error)}): check {flags}")
        say(f"{self.name} is asked by {self.form}")

    def reading(self, tokens):
        """A sentence on what the server reads of a prompt that has so many tokens for the run."""
        if self.more is None:
            return f"{self.name} does not say how many tokens it reads: whether it reads the same is not known"
        cause = CAUSES.get(self.more, CAUSES["more"])
        if self.form == "chat" and not self.tokenizer.chat_template:
            cause = "it puts a chat template around, without which the run was trained; try --server-api completions"
        if not self.same_tokens:
            cause = "it has another tokenizer, for it reads other prompts otherwise: another model's answers"
        return f"{self.name} reads {tokens + self.more} tokens of the first prompt, the run {tokens}: {cause}"

    def ask(self, row):
        """What is known of a row after its answer, under the names of the predictions file; raises ERRORS."""
        options = {"temperature": 0, "max_tokens": row["new"] + self.thought_tokens}
        if self.same_tokens:
            options["stop_token_ids"] = self.ends  # of vLLM; others know the model's own
        stop = {"stop": ["\n"]} if row["one_line"] and not self.thought_tokens else {}
        answer = self.answer_to(row, options | stop)
        if stop and not answer.text.strip():  # a line's end in front has stopped it: an answer may be behind
            answer = self.answer_to(row, options)
        text, cut_off = answer.text.strip(), answer.cut_off
        if self.thought_tokens or (answer.written or 0) > row["new"]:  # no room for them, or no limit was kept
            ends = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
            if len(ends) > row["new"]:
                text, cut_off = text[: ends[row["new"] - 1][1]], True
        if row["one_line"]:
            cut_off = cut_off and "\n" not in text
            text = text.split("\n")[0].strip()
        return {"prediction": text, "new_tokens": answer.written, "hit_max_new_tokens": cut_off}

    def answer_to(self, row, options):
        """The server's Answer to a whole prompt; raises ERRORS, NoAnswer where the server has cut the prompt."""
        answer = self.send(*self.request(row), options)
        text, end = without_thoughts(answer.text, begun=True)
        endless = self.thought_tokens and answer.cut_off and not (end or answer.thoughts)
        problem = answer.problem or (NO_ROOM if endless or (end and not text.strip()) else "")
        if problem:
            remedy = ": give them room, --server-thought-tokens 2000 or more" if problem == NO_ROOM else ""
            raise NoAnswer(problem + remedy)
        tokens = len(row["prompt_ids"])
        fewest = tokens + self.more if self.same_tokens else FEWEST * self.share * tokens
        if answer.read and answer.read < fewest:
            raise NoAnswer(f"it read only {answer.read} tokens of the prompt, which it must have cut")
        return answer._replace(text=text)

    def gives_losses(self, row):
        """Whether the server gives the prompt's log-probabilities, tried with one row; it may break on that."""
        for way in LOGPROBS if self.same_tokens else ():
            self.logprobs = way
            try:
                self.loss(row, once=True)
                return True
            except NoLogProbability:
                return True
            except ERRORS:
                pass
        return False

    def loss(self, row, once=False):
        """{"nll": negative log likelihood (nats) of a row's completion}; raises ERRORS."""
        start, ids = len(row["prompt_ids"]), row["prompt_ids"] + row["completion_ids"]
        options = {"max_tokens": 1, "temperature": 0}
        choice = self.send("/completions", {"prompt": ids} | self.logprobs, options, once).choice
        try:
            if "echo" in self.logprobs:
                given = choice["logprobs"]["token_logprobs"]
                more = self.more if self.form == "token ids" else 0  # put in front, such as a BOS
                whole = given[0] is None and len(given) - more in (len(ids), len(ids) + 1)
                values = given[start + more : len(ids) + more] if whole else None
            else:
                given = choice["prompt_logprobs"]
                values = [given[place][str(ids[place])]["logprob"] for place in range(start, len(ids))]
            sound = all(type(value) in (int, float) and -MAX_NLL < value < 0.01 for value in values)
        except (LookupError, TypeError):
            raise NoAnswer("it gives no log-probabilities of the prompt") from None
        if not sound:
            raise NoLogProbability("a token of the completion has no log-probability")
        return {"nll": -math.fsum(values)}


def ask_rows(served, ask, key, task, rows, path, run):
    """Ask for what is not known under `key` of a task's rows, appending each answer to its work file; the errors."""
    done = predictions.examples_done(path, run)
    served.kept += len(done)
    # what got no answer is not scored
    wanted = rows if key == "prediction" else [row for row in rows if row["place"] in done]
    undone = [row for row in wanted if key not in done.get(row["place"], {})]

    def keep(row, known):
        predictions.append_work(path, run, [(row["place"], {"tokens": len(row["completion_ids"])} | known)])

    return served.ask_all(undone, ask, keep, f"{task} {key}")


def ask_for_losses(served, shortest, asked, paths, run):
    """Ask for the perplexity of what got an answer; how many rows have none, though the server gives them."""
    if not served.gives_losses(shortest):
        say("perplexity: not given by this server")
        return 0
    errors = []
    with suppress(SystemExit):  # it said that no more come, and the answers count all the same
        for task, rows in asked.items():
            errors += ask_rows(served, served.loss, "nll", task, rows, paths[task], run)
    missing = sum("nll" not in row for task in asked for row in predictions.examples_done(paths[task], run).values())
    if missing:
        reason = f" ({served.reasons(errors)})" if errors else ""
        say(f"perplexity: not given for {missing} rows{reason}, so not for their task; the same command asks again "
            "(with --server-concurrency 1 where the server breaks on several at once)")  # fmt: skip
    return missing


def ask_tasks(served, asked, parts, paths, run):
    """Ask for all rows, write the predictions files; the errors of rows without an answer."""
    shortest = min((rows[0] for rows in asked.values()), key=lambda row: len(row["prompt_ids"]))
    served.begin(shortest)
    started, errors = time.time(), []
    for task in asked:
        errors += ask_rows(served, served.ask, "prediction", task, asked[task], paths[task], run)
    say(f"the answers took {time.time() - started:.1f} s")
    # now that the answers are there: some servers break on it
    missing = ask_for_losses(served, shortest, asked, paths, run)
    any_answer = any(predictions.examples_done(paths[task], run) for task in asked)
    for task in asked:
        if any_answer:
            predictions.write_predictions(task, parts[task], None, paths[task], run, {})
            say(f"wrote {paths[task]}")
        if not errors and not missing:
            predictions.remove_work(paths[task])
    if served.refused:
        say(f"options left out, for the server refuses them: {', '.join(sorted(served.refused))}")
    if errors:
        reason = f"{len(errors)} requests got no answer ({served.reasons(errors)})"
        say(f"{reason}: those rows are left out; give the same command again to ask for them")
    return errors


def comparison(args, paths):
    """The command that compares the server's predictions with those of all other tests of the same rows."""
    words = ["evaluations.py", "--output-dir", f"{args.output_dir}/served", "--predictions"]
    for task, path in paths.items():
        wanted = {name: read_json(path)["settings"].get(name) for name in ("rows", "swap_answers")}
        for file in sorted(Path(args.output_dir).glob(f"{task}_predictions*.json")):
            settings = as_dict(read_json(file).get("settings"))
            if wanted == {name: settings.get(name) for name in wanted}:
                name = file.stem.partition("_predictions")[2].strip("_")
                words.append(f"{name or 'tested'}={file}")
    return f"{command('python')} {shlex.join(words)}"


def test_server(args, tasks, base, tokenizer, rows):
    """Ask args.server for the rows that have no answer yet and show what came; exit 1 where answers are missing.

    tasks: {task: {"one_line", "new"}} of those with rows.
    """
    served = Tested(args, tokenizer, sorted(end_tokens(base, tokenizer)))
    run = {"server": True, "model": served.model, "adapter": "none", "rows": rows._fingerprint}
    run["chat_template"] = digest(tokenizer.chat_template)
    for setting, value in vars(args).items():
        if setting in OF_SERVER or setting.endswith("_max_new_tokens"):
            run[setting] = value
    name = args.name or re.sub(r"[^\w-]+", "-", Path(served.model).name) or "model"
    name += "-model" if name.endswith("swapped") else ""  # a file of that name is one of --swap-answers
    paths = predictions.paths_of(tasks, args.output_dir, name, args.swap_answers)
    parts = {task: rows_of(rows, task) for task in tasks}
    asked, errors = {}, []
    with only_run_in(args.output_dir):
        for task, path in paths.items():
            if predictions.finished(args, path, run) and not predictions.work_files(path):
                say(f"{path} is finished, by the same settings on the same rows: nothing to do")
            elif parts[task]:
                first_rows = predictions.encoded(tokenizer, parts[task])[: args.server_max_examples or None]
                first_rows.sort(key=lambda row: len(row["prompt_ids"]))  # the first ones are taken, if any are
                asked[task] = [row | tasks[task] for row in first_rows]
        if asked:
            errors = ask_tasks(served, asked, parts, paths, run)
            say(", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in served.counts.items()))
            price = served.counts["prompt_tokens"] * args.server_input_price
            price += served.counts["completion_tokens"] * args.server_output_price
            if price:
                say(f"price: {price / 1e6:,.4g}")
    written = {task: path for task, path in paths.items() if read_json(path).get("settings") == run}
    if written:
        predictions.show(written.values(), rows)
        if not args.swap_answers:  # evaluations.py scores those beside the plain ones
            say(f"\nhow many predictions are equal to those of other tests: {comparison(args, written)}")
    if errors:
        raise SystemExit(1)
