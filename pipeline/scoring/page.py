"""evaluation.html: the numbers of evaluation.json, figures of them, and every example."""

import io
import os
import re
import time
from pathlib import Path

import jinja2
import numpy as np

from pipeline import figures
from pipeline.scoring import significance
from pipeline.script import first_line, say

MANY = 10  # percent of a system's answers: where more were cut off, a sentence says so
FEW = 10  # examples: the scores of a smaller group say nothing, and are not shown


def date_of_evaluation():
    """Today, in UTC; SOURCE_DATE_EPOCH (seconds since 1970) gives the same files on any day."""
    given = re.fullmatch("[0-9]{1,11}", os.environ.get("SOURCE_DATE_EPOCH", ""))
    return time.strftime("%Y-%m-%d", time.gmtime(int(given[0]) if given else None))


def label(metric):
    words = metric.replace("_", " ").replace("rouge", "ROUGE-").replace("bleu", "BLEU")
    return words[0].upper() + words[1:]


def draw(caption, xlabel, ylabel, lines, first=0):
    """{"caption", "svg"}: lines {label: (x, y, style)} as inline SVG, from the colour number `first` on."""
    colors = [f"#0{i % 6}0404" for i in range(first, first + 6)]
    file = io.StringIO()
    figures.draw(file, lines, xlabel, ylabel, colors, format="svg", transparent=True)
    svg = file.getvalue()
    svg = re.sub(r'<metadata>.*?</metadata>|(?<=<g) id="[^"]*"', "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"#0(\d)0404", r"var(--s\1)", svg)  # the colours of the page, which know light and dark
    return {"caption": caption, "svg": svg.replace("#000000", "var(--soft)").replace("#b0b0b0", "var(--line)")}


def draw_task(task, result):
    """The figures of a task: how the main score of the others differs from that of the first system."""
    main, (first, *others), lines = task.MAIN_SCORES[0], result["intervals"], {}
    seeds = significance.by_system({name: scores[main] for name, scores in result["per_example"].items()})
    values = {name: np.mean([*scores.values()], axis=0) for name, scores in seeds.items()}
    edges = np.linspace(-105, 105, 22)  # equal scores are in the middle of a bin
    for name in others:
        share = np.histogram(values[name] - values[first], edges)[0] / result["examples"] * 100
        lines[name] = edges, [*share, share[-1]], {"drawstyle": "steps-post"}
    caption = f"Difference in {label(main)} to {first}, example by example"
    xlabel = "← worse · difference · better →"  # of no task is the first main score better where it is lower
    return [draw(caption, xlabel, "% of the examples", lines, first=1)] if others else []


def scores_of(result):
    """{system: {metric: score}} of a task, the perplexity among them where there is one."""
    scores = {}
    for name in result["intervals"]:
        scores[name] = {metric: value for metric, value in result[name].items() if not metric.endswith("signature")}
        if name in result["perplexity"]:
            scores[name]["perplexity"] = result["perplexity"][name]["perplexity"]
    return scores


def main_first(task, metrics):
    return sorted(metrics, key=lambda metric: metric not in task.MAIN_SCORES)


def p_value(p):
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def endings(result):
    """{row of the table: {system: percent of its answers}}, where any system has such answers."""
    rows = {"cut off at the limit": result["cut_off"], "empty": result["empty"]}
    return {label: shares for label, shares in rows.items() if any(shares.values())}


def notes(name, task, result):
    """Sentences on what makes the scores of a task's systems less than they seem."""
    sentences = []
    for system, count in result["too_long"].items():
        reason = f"{count:,} of them were too long for the model of {system}"
        sentences.append(f"{reason}: they count as empty answers, and not in its perplexity")
    often = {system: percent for system, percent in result["cut_off"].items() if percent > MANY}
    if often:
        setting = f"{getattr(task, 'OF', name).upper()}_MAX_NEW_TOKENS of test_llama.py"
        shares = ", ".join(f"{percent:.0f} % of {system}'s" for system, percent in often.items())
        sentences.append(f"Answers cut off at the limit, {setting}: {shares}")
    first, *others = result["bits"]
    unlike = [system for system in others if {result["bits"][first], result["bits"][system]} == {4, 16}]
    if unlike:
        bits, their_bits = result["bits"][first], result["bits"][unlike[0]]
        reason = f"{first} ran in {bits} bits, {', '.join(unlike)} in {their_bits}"
        sentences.append(f"{reason}: part of the difference is quantisation")
    if result["examples"] < FEW:
        sentences.append(f"Of only {result['examples']} examples no interval or test can be trusted")
    return [f"{sentence}." for sentence in sentences]


def tokens_of(system):
    """[[loss of the reference in nats per token, its tokens, tokens of the prediction]], None where not known."""
    losses = system.losses or [(0, 0)] * len(system.predictions)
    per_token = [round(nll / tokens, 4) if nll and tokens else None for nll, tokens in losses]
    return [[loss, tokens, new] for loss, (_, tokens), new in zip(per_token, losses, system.new_tokens, strict=True)]


def shown_examples(task, rows, result):
    """What the page's script knows of a task's examples."""
    return {
        "task": task,
        "main": rows.task.MAIN_SCORES[0],
        "short": rows.task.ONE_LINE,
        "id": result["ids"],
        "references": rows.column("references"),
        "prompts": rows.column("prompt"),
        "inside": rows.column("answer_in_context") if result["groups"] else None,
        "swapped": rows.column("swapped"),
        "predictions": {name: system.predictions for name, system in rows.systems.items()},
        "cut": {name: system.cut_off for name, system in rows.systems.items()},
        "tokens": {name: tokens_of(system) for name, system in rows.systems.items()},
        "scores": result["per_example"],
        "reasons": result["judge"]["reasons"] if "judge" in result else None,
    }


def public_name(value):
    """Of a path its name, since where it is on this machine is nobody's business; anything else as it is."""
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "./", "../", "~")) else value


def page(report, tasks):
    """The text of evaluation.html: the numbers of `report` and the texts of `tasks`, in evaluation.html.jinja."""
    folder = jinja2.FileSystemLoader(Path(__file__).resolve().parent)
    environment = jinja2.Environment(loader=folder, autoescape=True, trim_blocks=True, finalize=public_name)
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}  # jinja2 sorts keys: the first system is first
    drawn, parts = {}, []
    try:
        drawn = {name: draw_task(rows.task, report[name]) for name, rows in tasks.items()}
        if report["training"] and report["training"]["loss"]:
            lines = figures.loss_lines(report["training"]["loss"])
            drawn["loss"] = [draw("Loss by optimizer step", "step", "loss, nats per token", lines)]
    except Exception as error:  # a matplotlibrc that it cannot read, a font that is not here
        say(f"warning: evaluation.html lacks figures: matplotlib cannot draw them ({first_line(error)})")
    for name, rows in tasks.items():
        scores = scores_of(report[name])
        metrics = list(dict.fromkeys(metric for by_metric in scores.values() for metric in by_metric))
        metrics = main_first(rows.task, metrics)
        part = {"name": name, "rows": rows, "module": rows.task, "main": rows.task.MAIN_SCORES[0]}
        tested = [metric for metric in metrics if metric in rows.task.MAIN_SCORES]
        part |= {"tested": tested, "exploratory": metrics[len(tested) :]}
        part |= {"endings": endings(report[name]), "notes": notes(name, rows.task, report[name])}
        part |= {"data": shown_examples(name, rows, report[name])}
        parts.append(part | {"result": report[name], "systems": list(scores), "scores": scores, "metrics": metrics})
    made_from = [made or {} for part in parts for made in part["result"]["made_from"].values()]
    return environment.get_template("evaluation.html.jinja").render(
        report=report,
        tasks=parts,
        models=list(dict.fromkeys(str(public_name(made["model"])) for made in made_from if "model" in made)),
        systems=list(dict.fromkeys(name for part in parts for name in part["data"]["predictions"])),
        figures=drawn,
        labels={metric: label(metric) for part in parts for metric in (*part["metrics"], "judge")},
        lower_is_better=significance.LOWER_IS_BETTER,
        no_better_end=significance.NO_BETTER_END,
        yes_or_no=significance.YES_OR_NO,
        few=FEW,
        p_value=p_value,
    )
