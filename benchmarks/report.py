"""Fill in benchmarks/RESULTS.md from the JSON files of benchmarks/results/.

python benchmarks/report.py
"""

import json
import statistics

import jinja2
from peers import RESULTS, ROOT

HERE = ROOT / "benchmarks"
NAMES = ("training", "training_real", "testing_real", "startup", "scaling", "joint", "scoring", "merging", "gpu")
NAMES += ("gpu_before", "gpu_peers", "real_model", "served", "significance", "layers")


def load(name):
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def middle(name, runs):
    """A trainer's medians; share: of the rate of a matrix product, in percent, where it was measured."""
    values = {"tokens": "tokens_per_second", "command": "command_seconds", "peak": "peak_gb"}
    values |= {"share": "share_of_rate"} if "share_of_rate" in runs[0] else {}
    medians = {key: statistics.median(run[value] for run in runs) for key, value in values.items()}
    perplexity = statistics.median(run["perplexity"]["together"] for run in runs)
    return {"name": name, "perplexity": perplexity, "steps": runs[0]["steps"], **medians}


def behind(ours, peers):
    """A sentence on every peer that is ahead in something, by half a percent or more."""
    said = []
    for peer in peers:
        ahead = []
        if peer["tokens"] > 1.005 * ours["tokens"]:
            ahead.append(f"{peer['tokens'] / ours['tokens'] - 1:.0%} faster in the loop")
        if peer["command"] < 0.995 * ours["command"]:
            ahead.append(f"{1 - peer['command'] / ours['command']:.0%} less time for the command")
        if peer["peak"] < 0.995 * ours["peak"]:
            ahead.append(f"{1 - peer['peak'] / ours['peak']:.0%} less memory")
        if peer["perplexity"] < 0.995 * ours["perplexity"]:
            ahead.append(f"a perplexity {1 - peer['perplexity'] / ours['perplexity']:.1%} lower")
        if ahead:
            said.append(f"{peer['name']}: {', '.join(ahead)}")
    return ("; ".join(said) or "of none") + "."


def beside_peers(training):
    """What the text says of a training stage: our two rows, the peers from the fastest on, where we are behind."""
    ours, larger, *peers = [middle(name, runs) for name, runs in training["trainers"].items()]
    peers.sort(key=lambda peer: -peer["tokens"])
    return {"ours": ours, "larger": larger, "peers": peers, "behind": behind(ours, peers)}


def fault(run):
    """Why a row of a GPU's table has no numbers, behind its name; "" where it has some."""
    reason = run.get("error") or run.get("not_run")
    return f": {' '.join(reason.split())[:60]}" if reason else ""


def main():
    results = {name: load(name) for name in NAMES}
    more = {"large": load("merging_large"), "tiny": beside_peers(results["training"])}
    more["real"] = results["training_real"] and beside_peers(results["training_real"])
    if results["joint"]:  # tokens read in training: what a seed costs on any machine
        more["joint_tokens"] = {name: runs[0]["tokens"] for name, runs in results["joint"]["training"].items()}
    if results["layers"]:
        rows = results["layers"]["rows"]
        memory = [row["estimate_gb"] / row["peak_gb"] - 1 for row in rows]
        flop = [row["estimate_tflop"] / row["tflop"] - 1 for row in rows]
        more["layers_off"] = {"memory": (min(memory), max(memory)), "flop": (min(flop), max(flop))}
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=False, keep_trailing_newline=True)
    environment.filters["median"] = statistics.median
    environment.filters["thousands"] = "{:,.0f}".format
    environment.filters["figure"] = lambda part, name, form: form.format(part[name]) if name in part else ""
    environment.filters["fault"] = fault
    environment.globals["names"] = {"qlora": "QLoRA", "lora": "LoRA, 16 bit", "plain": "QLoRA, plain prompts"}
    environment.globals["score"] = lambda part: "{:.2f} [{:.2f}, {:.2f}]".format(part["score"], *part["interval"])
    environment.filters["beside"] = lambda part: "{:.1f} ({:+.1f} [{:+.1f}, {:+.1f}])".format(
        part["score"], part["difference"], *part["interval"]
    )
    template = environment.from_string((HERE / "RESULTS.md.jinja").read_text(encoding="utf-8"))
    text = template.render(**results, **more)
    (HERE / "RESULTS.md").write_text(text, encoding="utf-8")
    print(f"wrote {HERE / 'RESULTS.md'}")


if __name__ == "__main__":
    main()
