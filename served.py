"""test_llama.py --server: the test rows asked of a server of OpenAI's protocol."""

import math
import os
import re
import textwrap
import time
from contextlib import suppress
from functools import partial
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import openai

import common
import llama
from common import fail, first_line, say
from predictions import (
    append_work,
    examples_done,
    finished,
    paths_of,
    remove_work,
    show,
    template_of,
    work_files,
    write_predictions,
)
from server import ERRORS, Server

# What binds a server's answers
OF_SERVER = ("server", "server_api", "server_max_examples", "samsum_max_new_tokens", "trivia_qa_max_new_tokens")
OF_SERVER += ("swap_answers",)
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
# Words before two answers part: with SmolLM2-135M in float16 over 300, in q8_0 18 to 23; through NF4 3, untuned 0
ROUNDING = 10
RESAMPLES = 10_000  # of the intervals
LOGPROBS = ({"prompt_logprobs": 0}, {"echo": True, "logprobs": 0})  # vLLM's, and OpenAI's of old


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


def rows_to_ask(args, task, rows, tokenizer):
    """What server.Tested needs of each of the first SERVER_MAX_EXAMPLES rows of a task, as dicts."""
    rows = rows.select(range(min(len(rows), args.server_max_examples or len(rows))))
    try:
        ids = llama.encode(tokenizer, rows.to_dict()) if len(rows) else {}
    except ValueError as error:
        fail(f"cannot test: {first_line(error)}")
    known = {"one_line": task == "trivia_qa", "new": getattr(args, f"{task}_max_new_tokens")}
    asked = [row | known | {"place": place} for place, row in enumerate(rows)]
    return [row | {key: values[row["place"]] for key, values in ids.items()} for row in asked]


def open_server(args, base, tokenizer):
    """The server.Tested, with the end tokens of the local test."""
    from transformers import GenerationConfig

    try:
        config = GenerationConfig.from_pretrained(base)
    except OSError:  # an older folder has none
        config = GenerationConfig.from_model_config(llama.load_config(base))
    ends = llama.end_tokens(SimpleNamespace(generation_config=config), tokenizer)
    return Tested(args, tokenizer, sorted(ends))


def ask_rows(served, ask, key, task, rows, path, run):
    """Ask for what is not known under `key` of a task's rows, appending each answer to its work file; the errors."""
    done = examples_done(path, run)
    undone = [row for row in rows if key not in done.get(row["place"], {})]
    if key == "nll":  # what got no answer is not scored
        undone = [row for row in undone if row["place"] in done]
    if not undone:
        return []
    with path.with_name(f".{path.stem}.part0.jsonl").open("a") as file:

        def keep(row, known):
            append_work(file, run, [(row["place"], {"tokens": len(row["completion_ids"])} | known)])

        return served.ask_all(undone, ask, keep, f"{task} {key}")


def ask_server(args, base, tokenizer, rows):
    """Ask the server of args.server for the rows that have no answer yet; the paths of the files, and the errors."""
    served = open_server(args, base, tokenizer)
    run = {"model": served.model, "adapter": "none", "rows": rows._fingerprint}
    run["chat_template"] = template_of(tokenizer)
    run |= {name: value for name, value in vars(args).items() if name in OF_SERVER}
    name = args.name or re.sub(r"[^\w-]+", "-", Path(served.model).name)
    paths = paths_of(args.output_dir, name, args.swap_answers)
    parts = {task: llama.rows_of(rows, task) for task in paths}
    asked = {}
    for task, path in paths.items():
        if finished(args, path, run) and not work_files(path):
            say(f"{path} is finished, by the same settings on the same rows: nothing to do")
        elif parts[task]:
            asked[task] = rows_to_ask(args, task, parts[task], tokenizer)
    errors, everything = [], sum(asked.values(), [])
    if everything:
        served.begin(min(everything, key=lambda row: len(row["prompt_ids"])))
    started = time.time()
    for task in asked:
        errors += ask_rows(served, served.ask, "prediction", task, asked[task], paths[task], run)
    if everything:
        say(f"the answers took {time.time() - started:.1f} s")
    missing = 0
    if everything and served.gives_losses(everything[0]):  # now that the answers are there: some servers break on it
        with suppress(SystemExit):  # it said that no more come, and the answers count all the same
            for task in asked:
                ask_rows(served, served.loss, "nll", task, asked[task], paths[task], run)
        missing = sum("nll" not in row for task in asked for row in examples_done(paths[task], run).values())
        if missing:
            told = f"perplexity: not given for {missing} rows, which the same command asks for again"
            say(f"{told} (with --server-concurrency 1 where the server breaks on several at once)")
    elif everything:
        say("perplexity: not given by this server")
    for task in asked:
        if examples_done(paths[task], run):
            write_predictions(task, parts[task], None, paths[task], run, {})
            say(f"wrote {paths[task]}")
        if not errors and not missing:
            remove_work(paths[task])
    if everything:
        counts = served.counts()
        say(", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in counts.items()))
        price = counts["prompt_tokens"] * args.server_input_price
        if price := price + counts["completion_tokens"] * args.server_output_price:
            say(f"price: {price / 1e6:,.4g}")
    if served.refused:
        say(f"options left out, for the server refuses them: {', '.join(sorted(served.refused))}")
    if errors:
        told = f"{len(errors)} requests got no answer ({served.why(errors[0])})"
        say(f"{told}: those rows are left out; give the same command again to ask for them")
    return [path for path in paths.values() if path.exists()], errors


def nearest_test(args, served):
    """The path of the local test of the same prompts that is nearest, and (its, the server's) prediction of each row.

    The adapter in 4 bits, as tested by default, is another model than the adapter merged into the 16-bit base.
    """
    task, found = served["task"], []
    same = ("rows", "chat_template", "swap_answers", f"{task}_max_new_tokens")
    for path in sorted(Path(args.output_dir).glob(f"{task}_predictions*.json")):
        local = common.read_json(path)
        settings = local.get("settings") or {}
        if "server" not in settings and all(settings.get(key) == served["settings"][key] for key in same):
            known = {example["id"]: example["prediction"] for example in local["examples"]}
            pairs = [(known[example["id"]], example["prediction"]) for example in served["examples"]]
            found.append((sum(mine == its for mine, its in pairs), path, pairs))
    return max(found, key=lambda test: test[0])[1:] if found else (None, [])


def untuned(args, local):
    """Whether a local test was one of the base alone, of the adapter in OUTPUT_DIR."""
    base = common.read_json(Path(args.output_dir) / "adapter" / "run.json").get("run", {}).get("weights")
    return local["settings"].get("adapter") == "none" and local["settings"].get("weights", "") == base


def words_before_parting(pairs):
    """How many words equal answers go on for, on average, before they part; inf: they never do."""
    words, parted = 0, 0
    for mine, its in pairs:
        both = zip(mine.split(), its.split(), strict=False)
        words += sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both))
        parted += mine != its
    return words / parted if parted else math.inf


def score_differences(task, served, pairs):
    """{score: [its difference, the ends of its 95 % interval]} of the server's answers to the tested ones, by row."""
    import metrics
    import significance

    references = [example["references"] for example in served["examples"]]
    mine, its = zip(*pairs, strict=True)
    scores = {"ROUGE-1": lambda texts: metrics.rouge(texts, references)["rouge1"]}
    if task == "trivia_qa":
        kinds = {"exact match": metrics.exact_match_score, "F1": metrics.f1_score}
        scores = {name: partial(metrics.best, kind, references=references) for name, kind in kinds.items()}
    gaps = np.array([np.subtract(score(its), score(mine)) for score in scores.values()]).T
    means = significance.resampled_sums(gaps, RESAMPLES, seed=0) / len(gaps)
    ends = (significance.interval(column) for column in means.T)
    return {name: [gap, *end] for name, gap, end in zip(scores, gaps.mean(0), ends, strict=True)}


def compare(args, paths):
    """Say of each task whether a server's predictions are those of the local test, and how far its scores are off."""
    files = []
    for path in paths:
        served = common.read_json(path)
        here, pairs = nearest_test(args, served)
        if not here:
            continue
        equal, words = sum(mine == its for mine, its in pairs), words_before_parting(pairs)
        verdict = "as tested"
        if equal < len(pairs):
            verdict = "differs by rounding" if words >= ROUNDING else "differs"
            verdict += f" (on average they part once in {words + 1:.0f} words)"
        if untuned(args, common.read_json(here)):
            verdict = "it answers as the base without its adapter"
        told = f"{equal} of {len(pairs)} predictions equal those of {here}"
        say(f"\n{served['task']}: {verdict}; {told}")
        files += [f"tested={here}", f"served={path}"]
        if equal == len(pairs):
            continue
        differences = score_differences(served["task"], served, pairs)
        said = [f"{name} {gap:+.1f} [{low:+.1f}, {high:+.1f}]" for name, (gap, low, high) in differences.items()]
        say(f"  its scores beside the tested ones, with 95 % intervals: {', '.join(said)}")
        place = next(i for i, (mine, its) in enumerate(pairs) if mine != its)
        start = len(os.path.commonprefix(pairs[place]))
        say(f"  the first other one: {served['examples'][place]['id']}, from character {start}")
        for name, text in zip(("here", "server"), pairs[place], strict=True):
            say(f"  {name:<10} {textwrap.shorten(text[start:], 67, placeholder='...')}")
    if files and not args.swap_answers:  # evaluations.py tells those beside the plain ones
        told = "all scores, with tests"
        say(f"{told}: python evaluations.py --predictions {' '.join(files)} --output-dir {args.output_dir}/served")


def test_server(args, base, tokenizer, rows, prompts):
    """Ask for the rows, show what came, beside the local test where that stands; exit 1 where answers are missing."""
    with common.only_run_in(args.output_dir):
        paths, errors = ask_server(args, base, tokenizer, rows)
    if paths:
        show([common.read_json(path) for path in paths], prompts)
        compare(args, paths)
    if errors:
        raise SystemExit(1)
