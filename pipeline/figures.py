"""Figures: lines of a training or of an evaluation, drawn into a file."""

import json
import logging
import re
import warnings
from contextlib import suppress
from math import isfinite

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "figure",  # the same file every time
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "legend.frameon": False,
}


def read_losses(path):
    """{curve, such as loss or eval_loss: [[step, loss]]} of a training's log.jsonl, as far as it can be read."""
    curves = {}
    with suppress(OSError, ValueError, KeyError, TypeError):
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            for name in entry:
                if re.fullmatch(r"loss|eval_(\w+_)?loss", name) and isfinite(entry[name]):
                    curves.setdefault(name, []).append([entry["step"], entry[name]])
    return curves


def loss_lines(curves):
    """The lines to draw of what read_losses returns."""
    lines = {}
    if sum(name.startswith("eval_") for name in curves) == 2:  # the mean of a single task is that task's
        curves = {name: points for name, points in curves.items() if name != "eval_loss"}
    for name, points in curves.items():
        label = name.replace("eval_", "validation, ").replace("_loss", "")
        steps, losses = zip(*points, strict=True)
        lines[label] = steps, losses, {"marker": "" if name == "loss" else "o"}
    return lines


def draw(file, lines, xlabel, ylabel, colors=("C0", "C1", "C2", "C3", "C4", "C5"), **options):
    """Draw lines {label: (x, y, style)} into a file, a path or a stream; options: those of matplotlib's savefig."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it writes of its font cache
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of letters that its font lacks: a browser has them
        figure = Figure(figsize=(4.2, 2.8), layout="constrained")
        axes = figure.subplots()
        axes.set(xlabel=xlabel, ylabel=ylabel)
        for i, (x, y, style) in enumerate(lines.values()):
            axes.plot(x, y, color=colors[i % len(colors)], markersize=4, **style)
        axes.set_ylim(bottom=0)
        legend = axes.legend(axes.lines, range(len(lines)), loc="lower left", bbox_to_anchor=(0, 1), ncols=2)  # above
        for text, name in zip(legend.get_texts(), lines, strict=True):
            text.set(text=name, parse_math=False)  # here: the legend leaves out a label that begins with _
        figure.savefig(file, **options)
