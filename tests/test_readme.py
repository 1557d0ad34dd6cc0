"""README.md and docs/: their tables of settings are those of the scripts; commands, files and sentences exist."""

import ast
import importlib
import re

import pytest
from conftest import ROOT

from pipeline.models import MODELS
from pipeline.settings import flag_of, settings_of

PAGES = {path.name: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}
ALL = "\n".join(PAGES.values())
NAMES = ("build_dataset", "train_llama", "test_llama", "evaluations", "merge_llama")


def table_of(name):
    """The table of a script's settings as docs/settings.md has it: name, default, comment."""
    module = importlib.import_module(name)
    rows = [f"| {name}.py | default | |", "|---|---|---|"]
    for setting, comment in settings_of(module).items():
        value = getattr(module, setting)
        shown = " ".join(value) if isinstance(value, list | tuple) else value
        rows.append(f"| `{setting}` | {shown} | {comment} |".replace("|  |", "| |"))
    return "\n".join(rows)


def texts_in_the_code():
    """Every text in the scripts and in pipeline/, of an f-string the parts between its fields."""
    for path in [*ROOT.glob("*.py"), *(ROOT / "pipeline").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


@pytest.mark.parametrize("name", NAMES)
def test_the_settings_are_those_of_the_script(name):
    assert f"\n{table_of(name)}\n" in PAGES["settings.md"], f"docs/settings.md should say:\n\n{table_of(name)}\n"


def test_files_and_flags_that_they_name_exist():
    made = ("loss.png", "convert_hf_to_gguf.py")  # a file of a run, and one of llama.cpp
    for file in set(re.findall(r"\b[\w/.]+\.(?:py|sh|yaml|jinja|png|md)\b", ALL)):
        assert file.startswith("outputs/") or file in made or (ROOT / file).exists(), file
    flags = {flag_of(setting) for name in NAMES for setting in settings_of(importlib.import_module(name))}
    known = flags | {flag.replace("--", "--no-", 1) for flag in flags}
    others = "num_processes config_file nproc_per_node private outtype outfile port dtype enable-lora max-lora-rank"
    others += " lora-modules help index-url local-dir variants train-examples output dialogues"
    known |= {f"--{name}" for name in others.split()}
    assert set(re.findall(r"--[a-z][\w-]+", ALL)) <= known


def test_models_that_they_name_by_a_key_exist():
    keys = set(re.findall(r"--model ((?:smollm|llama)[\w.-]+)", ALL))
    assert "smollm2-135m-instruct" in keys and keys - {"smollm2"} <= MODELS.keys()


def test_every_page_is_named_in_readme_and_readme_is_short():
    assert all(f"docs/{name}" in PAGES["README.md"] for name in PAGES if name != "README.md")
    assert len(PAGES["README.md"].splitlines()) <= 120


def test_what_goes_wrong_is_quoted_as_the_scripts_say_it():
    code = set(texts_in_the_code())
    quoted = re.findall(r"```\n(.*?)\n```", PAGES["when_it_goes_wrong.md"], re.DOTALL)
    sentences = "\n".join(quoted).splitlines()
    assert len(sentences) > 12
    for sentence in sentences:
        for part in re.split("…|[:;] ", sentence):  # the scripts put a sentence together at colons
            fixed = part.strip(" (),:;")
            assert any(fixed in text for text in code), f"{fixed!r} of: {sentence}"
