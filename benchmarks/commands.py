"""Run every command of README.md and docs/ as it stands, in a fresh clone, offline.

The commands are the lines of code blocks and the texts in backticks that begin with a program's name. Ids of the hub
are found in a hub's cache that is laid out of local folders: MODEL for each model of MODELS, SAMSUM and TRIVIA_QA for
the two data sets. After README's first chain of commands its outputs/ are kept, and each later command begins with a
copy of them. What cannot run here is listed with its reason. Exit code 1 if a command fails.

    python benchmarks/commands.py --samsum FOLDER --trivia-qa FOLDER
    python benchmarks/commands.py --samsum FOLDER --trivia-qa FOLDER --model FOLDER --only "test_llama|evaluations"
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from peers import ROOT

sys.path.insert(0, str(ROOT))
from pipeline.models import MODELS  # noqa: E402

PAGES = ("README.md", "docs/own_data.md", "docs/HOW_IT_WORKS.md", "docs/when_it_goes_wrong.md", "docs/results.md",
         "docs/settings.md", "docs/files.md")  # fmt: skip
PROGRAMS = r"python3?|bash|accelerate launch|torchrun|source|vllm|ollama|llama-server|hf|pip|OMP_NUM_THREADS=1"
CODE = re.compile(r"```\w*\n(.*?)\n```|`([^`]+)`", re.DOTALL)
SKIPPED = {  # pattern: why a command that has it is not run
    r"^(pip|python3 -m venv)": "it installs from the network",
    r"^hf ": "it needs the hub",
    r"^(vllm|ollama|llama-server)|convert_hf_to_gguf": "a program that is not installed here",
    r"--server": "it needs a server: tests/test_server.py asks one",
    r"fsdp.yaml": "it needs GPUs",
    r"run.sh test": "the tests are run by themselves",
    r"^source": "the clone's environment is this one",
}
FRESH = "rm -rf outputs/adapter outputs/checkpoints"  # another training in the same folder is refused
BEFORE = {  # pattern: what a reader of the page has done before the command
    r"train_llama.py(?!.*(--dry-run|--help|outputs/own))": FRESH,
    r"^bash run.sh$": "rm -rf outputs",
    r"--own rows.jsonl --output-dir": "rm -rf outputs/own",
    r"other/adapter": "mkdir -p other && cp -r outputs/adapter other/",
}
IN_PLACE = {
    r"make_questions.py": "mkdir -p outputs && cp -r {samsum} outputs/dialogues && cp -r {trivia_qa} outputs/questions"
}


def commands_of(text):
    """[[commands that follow one another]] of a page: a block's, or the one in backticks."""
    found = []
    for block, inline in CODE.findall(text):
        lines = block.replace("\\\n", " ").split("\n") if block else [inline.replace("\n", " ")]
        commands = [" ".join(re.sub(r"\s# .*", "", line).split()) for line in lines]
        found.append([command for command in commands if re.match(rf"({PROGRAMS}) \S", command)])
    return found


def lay_out_cache(hub, args):
    """Make a hub's cache in which every id that the scripts name is one of the folders."""
    places = {f"models--{model.replace('/', '--')}": args.model for model in MODELS.values()}
    places |= {"datasets--knkarthick--samsum": args.samsum, "datasets--mandarjoshi--trivia_qa": args.trivia_qa}
    for name, folder in places.items():
        commit = "0" * 40
        (hub / name / "refs").mkdir(parents=True)
        (hub / name / "refs" / "main").write_text(commit)
        shutil.copytree(folder, hub / name / "snapshots" / commit)
        if (config := hub / name / "snapshots" / commit / "config.json").exists():  # room for examples in prompts
            settings = json.loads(config.read_text()) | {"max_position_embeddings": 8192}
            config.write_text(json.dumps(settings))


def first(patterns, command):
    return next((value for pattern, value in patterns.items() if re.search(pattern, command)), None)


def run_or_say_why(title, command, prepared, args, clone, environment):
    """Run a command in the clone, or print why it is not run; False where it failed. prepared: after the chain."""
    if reason := first(SKIPPED, command):
        print(f"not run  {title}\n         ({reason})", flush=True)
        return True
    shell = command
    if in_place := first(IN_PLACE, command):
        shell = in_place.format(samsum=args.samsum, trivia_qa=args.trivia_qa)
    elif prepared and (before := first(BEFORE, command)):
        shell = f"{before}; {command}"
    began = time.time()
    result = subprocess.run(["bash", "-c", shell], cwd=clone, env=environment, capture_output=True, text=True)
    word = "FAILED" if result.returncode else "ok    "
    print(f"{word} {time.time() - began:6.0f} s  {title}", flush=True)
    if result.returncode:
        print(
            *(f"         {line}" for line in (result.stdout + result.stderr).splitlines()[-5:]), sep="\n", flush=True
        )
    return not result.returncode


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", type=Path, default=ROOT / "tests" / "fixtures" / "tiny_llama3")
    parser.add_argument("--samsum", type=Path, required=True, help="folder laid out as on the hub")
    parser.add_argument("--trivia-qa", type=Path, required=True, help="folder laid out as on the hub")
    parser.add_argument("--only", default="", help="pattern of the commands to run after README's first chain")
    args = parser.parse_args(argv)
    args.samsum, args.trivia_qa, args.model = (path.resolve() for path in (args.samsum, args.trivia_qa, args.model))
    place = Path(tempfile.mkdtemp(prefix="commands_"))
    clone, kept = place / "clone", place / "kept"
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    (clone / ".venv").symlink_to(Path(sys.prefix))
    lay_out_cache(place / "hub" / "hub", args)
    rows = re.search(r"```\n(\{.*?)\n```", (clone / "README.md").read_text(), re.DOTALL)[1]
    (clone / "rows.jsonl").write_text(rows + "\n")
    (clone / "dialogue.txt").write_text("Nora: Are you coming on Friday?\nPaul: Yes, by the late train.\n")
    (clone / "page.txt").write_text("The Quaren is a river. For many years its main cargo was cheese.\n")
    environment = os.environ | {"HF_HOME": str(place / "hub"), "HF_HUB_OFFLINE": "1", "TMPDIR": str(place)}
    environment["PATH"] = f"{clone / '.venv' / 'bin'}:{os.environ['PATH']}"
    environment.setdefault("OMP_NUM_THREADS", "1")  # the model is tiny: threads would wait for one another
    if not shutil.which("nvidia-smi"):
        environment["ACCELERATE_USE_CPU"] = "true"  # accelerate launch asks for it
    done, failed = set(), 0
    for page in PAGES:
        for commands in commands_of((clone / page).read_text()):
            if kept.exists() and (set(commands) <= done or not re.search(args.only, " ".join(commands))):
                continue
            if kept.exists():
                shutil.rmtree(clone / "outputs", ignore_errors=True)
                shutil.copytree(kept, clone / "outputs")
            for command in commands:
                failed += not run_or_say_why(f"{page}: {command}", command, kept.exists(), args, clone, environment)
                done.add(command)
                if "merge_llama.py" in command and not kept.exists():
                    shutil.copytree(clone / "outputs", kept)
    shutil.rmtree(place)
    print(f"{failed} commands failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
