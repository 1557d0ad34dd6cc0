"""evaluation.html: the numbers of evaluation.json, figures of them, and every example."""

import io
import re
from pathlib import Path

import jinja2
import numpy as np

from pipeline import figures
from pipeline.scoring import significance
from pipeline.script import first_line, say


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
    return [draw(caption, "difference", "% of the examples", lines, first=1)] if others else []


def scores_of(result):
    """{system: {metric: score}} of a task, the perplexity among them where there is one."""
    scores = {}
    for name in result["intervals"]:
        scores[name] = {metric: value for metric, value in result[name].items() if not metric.endswith("signature")}
        if name in result["perplexity"]:
            scores[name]["perplexity"] = result["perplexity"][name]["perplexity"]
    return scores


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
        part = {"name": name, "rows": rows, "module": rows.task, "main": rows.task.MAIN_SCORES[0]}
        parts.append(part | {"result": report[name], "systems": list(scores), "scores": scores, "metrics": metrics})
    made_from = [made or {} for part in parts for made in part["result"]["made_from"].values()]
    return environment.get_template("evaluation.html.jinja").render(
        report=report,
        tasks=parts,
        models=list(dict.fromkeys(public_name(made["model"]) for made in made_from if "model" in made)),
        figures=drawn,
        labels={metric: label(metric) for part in parts for metric in (*part["metrics"], "judge")},
        lower_is_better=significance.LOWER_IS_BETTER,
        yes_or_no=significance.YES_OR_NO,
    )
