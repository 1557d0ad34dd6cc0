"""test_llama.py --ask: the text of a user, and the prompt of the task that it is for."""

import os
import re
import sys
from pathlib import Path

from pipeline import models
from pipeline.files import built_tasks, read_json
from pipeline.script import fail, first_line, say
from pipeline.texts import clean, clean_lines, template_parts

OR_ELSE = {"--ask": ", or the text itself", "--general-text": ', or "" for none'}


def read_text(flag, value, path=None):
    """The text of a file (at `path`), of standard input (-), or with --ask the value itself; exits 2 without one."""
    try:
        if value == "-":
            text = sys.stdin.buffer.read().decode("utf-8-sig")
        elif flag != "--ask" or os.path.exists(value) or re.fullmatch(r"\S+\.(txt|md|json|csv)", value):
            text = Path(path or value).read_text(encoding="utf-8-sig")
        else:
            text = value
    except (OSError, ValueError, AttributeError) as error:  # the last one where standard input is closed
        reason = getattr(error, "strerror", None) or first_line(error)
        fail(f"cannot read {flag} {value} ({reason}): give a text file in UTF-8{OR_ELSE.get(flag, '')}")
    if not clean(text):
        fail(f"{flag} has no text: give a file that has some{OR_ELSE.get(flag, '')}")
    return re.sub(r"\A\s*\n", "", text.rstrip())  # without blank lines; blanks in front of a line may matter


def prompt_to_ask(args, tasks, adapter):
    """(task, prompt, whether the answer ends at its line's end) of ASK; exits 2 where no task fits.

    tasks: {name: module}. adapter: the folder whose run.json has the prompts that it was trained on.
    """
    text = read_text("--ask", args.ask)
    page = read_text("--context", args.context) if args.context else ""
    of_merged = read_json(Path(args.model, "merge.json")).get("tasks")
    noted = of_merged if isinstance(of_merged, dict) and of_merged else models.read_run(adapter)["tasks"]
    noted = noted or read_json(Path(args.output_dir, "dataset", "tasks.json"))
    trained_on = [task for task in tasks if task in noted] or list(tasks)
    built = built_tasks(args.output_dir, tasks, noted)
    if args.task != "auto":
        fitting = [args.task]
    elif len(trained_on) == 1 and not page:
        fitting = trained_on
    else:
        fitting = [task for task in trained_on if tasks[task].fits(text, page, built[task]["prompt"])]
    if len(fitting) != 1:
        reason = f"--ask fits {' and '.join(fitting) or 'no task'} of {', '.join(trained_on)}"
        fail(f"{reason}: a dialogue has several lines, a question one, only that has a --context; or give --task")
    [task] = fitting
    template, with_context = built[task]["prompt"], "{context}" in tasks[task].PROMPT
    if page and not with_context and "{context}" not in template:
        fail(f"--context is for a question: the prompts of {task} have none")
    if task not in trained_on:
        say(f"{task} is no task that the adapter was trained on")
    elif with_context and bool(page) != ("{context}" in template):
        say(f"{task}: unlike in training, it is asked {'with' if page else 'without'} a context")
    try:
        fields = {field for _, field in template_parts(template) if field}
        if not fields:
            raise ValueError("it has no place for a text")
        prompt = tasks[task].asked(text, page, template)
        if len(fields) > 1 and prompt == clean_lines(text):
            texts = ", ".join(sorted(fields))
            say(f"{task}: the text is asked as it is, because its prompt is made of several texts: {texts}")
        return task, prompt, built[task]["one_line"]
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        reason = f"cannot use the prompt of {task} that {adapter}/run.json or the data set names"
        fail(f"{reason} ({first_line(error)}): correct it, or train again")
