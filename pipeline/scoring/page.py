"""evaluation.html: the numbers of evaluation.json, figures of them, and every example."""

import io
import logging
import re
import warnings
from pathlib import Path

import jinja2
import numpy as np

from pipeline.scoring.significance import LOWER_IS_BETTER, by_system
from pipeline.script import first_line, say

# what the page plots and sorts by
MAIN_SCORE = {"samsum": "rougeLsum", "trivia_qa": "f1", "swapped": "follows_context"}
STYLE = {  # of the figures
    "svg.fonttype": "none",
    "svg.hashsalt": "evaluation",  # the same file every time
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "legend.frameon": False,
}


def label(metric):
    words = metric.replace("_", " ").replace("rouge", "ROUGE-").replace("bleu", "BLEU")
    return words[0].upper() + words[1:]


def draw(caption, xlabel, ylabel, lines, first=0):
    """{"caption", "svg"}: lines {label: (x, y, style)} as inline SVG, from the colour number `first` on."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it writes of its font cache
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of letters that its font lacks: the browser has them
        figure = Figure(figsize=(4.2, 2.8), layout="constrained")
        axes = figure.subplots()
        axes.set(xlabel=xlabel, ylabel=ylabel)
        for i, (x, y, style) in enumerate(lines.values(), first):
            axes.plot(x, y, color=f"#0{i % 6}0404", markersize=4, **style)
        axes.set_ylim(bottom=0)
        legend = axes.legend(axes.lines, range(len(lines)), loc="lower left", bbox_to_anchor=(0, 1), ncols=2)  # above
        for text, name in zip(legend.get_texts(), lines, strict=True):
            text.set(text=name, parse_math=False)  # here: the legend leaves out a label that begins with _
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    svg = file.getvalue()
    svg = re.sub(r'<metadata>.*?</metadata>|(?<=<g) id="[^"]*"', "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"#0(\d)0404", r"var(--s\1)", svg)  # the colours of the page, which know light and dark
    return {"caption": caption, "svg": svg.replace("#000000", "var(--soft)").replace("#b0b0b0", "var(--line)")}


def draw_task(task, result):
    """The figures of a task: how the main score of the others differs from that of the first system."""
    (first, *others), title, lines = result["intervals"], label(MAIN_SCORE[task]), {}
    seeds = by_system({name: scores[MAIN_SCORE[task]] for name, scores in result["per_example"].items()})
    values = {name: np.mean([*scores.values()], axis=0) for name, scores in seeds.items()}
    edges = np.linspace(-105, 105, 22)  # equal scores stand in the middle of a bin
    for name in others:
        share = np.histogram(values[name] - values[first], edges)[0] / result["examples"] * 100
        lines[name] = edges, [*share, share[-1]], {"drawstyle": "steps-post"}
    caption = f"Difference in {title} to {first}, example by example"
    return [draw(caption, "difference", "% of the examples", lines, first=1)] if others else []


def draw_loss(loss):
    """The figures of the training: its loss by step, and the validation losses where there are any."""
    lines = {}
    for name, points in loss.items():
        words = name.replace("eval_", "validation, ").replace("_loss", "")
        lines[words] = (*np.array(points).T, {"marker": "" if name == "loss" else "o"})
    return [draw("Loss by optimizer step", "step", "loss, nats per token", lines)] if loss else []


def scores_of(result):
    """{system: {metric: score}} of a task, the perplexity among them where there is one."""
    scores = {}
    for name in result["intervals"]:
        scores[name] = {metric: value for metric, value in result[name].items() if not metric.endswith("signature")}
        if name in result["perplexity"]:
            scores[name]["perplexity"] = result["perplexity"][name]["perplexity"]
    return scores


def part_of(result):
    """What the template shows of a task, or of the swapped questions, in a table."""
    scores = scores_of(result)
    metrics = list(dict.fromkeys(metric for by_metric in scores.values() for metric in by_metric))
    return {"result": result, "systems": list(scores), "scores": scores, "metrics": metrics}


def public_name(value):
    """Of a path its name, since where it is on this machine is nobody's business; anything else as it is."""
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "./", "../", "~")) else value


def page(report, tasks):
    """The text of evaluation.html: the numbers of `report` and the texts of `tasks`, in evaluation.html.jinja."""
    folder = jinja2.FileSystemLoader(Path(__file__).resolve().parent)
    environment = jinja2.Environment(loader=folder, autoescape=True, trim_blocks=True, finalize=public_name)
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}  # jinja2 sorts keys: the first system is first
    figures = {}
    try:
        figures = {task: draw_task(task, report[task]) for task in tasks}
        figures["loss"] = draw_loss(report["training"]["loss"]) if report["training"] else []
    except Exception as error:  # a matplotlibrc that it cannot read, a font that is not here
        say(f"warning: evaluation.html lacks figures: matplotlib cannot draw them ({first_line(error)})")
    parts = [part_of(report[task]) | {"name": task, "rows": rows} for task, rows in tasks.items()]
    swapped = [part_of(report["swapped"])] if "swapped" in report else []
    made_from = [made or {} for part in parts for made in part["result"]["made_from"].values()]
    return environment.get_template("evaluation.html.jinja").render(
        report=report,
        tasks=parts,
        swapped=swapped,
        models=list(dict.fromkeys(public_name(made["model"]) for made in made_from if "model" in made)),
        figures=figures,
        labels={metric: label(metric) for part in parts + swapped for metric in (*part["metrics"], "judge")},
        main_score=MAIN_SCORE,
        lower_is_better=LOWER_IS_BETTER,
    )
