"""README.md and docs/: the tables of settings are those of the scripts, the commands exist."""

import importlib
import re

import pytest
from conftest import ROOT

from pipeline.settings import flag_of, settings_of

README = (ROOT / "README.md").read_text(encoding="utf-8")
BOTH = README + (ROOT / "docs" / "HOW_IT_WORKS.md").read_text(encoding="utf-8")
NAMES = ("build_dataset", "train_llama", "test_llama", "evaluations", "merge_llama")


def table_of(name):
    """The table of a script's settings as it stands in the README: name, default, comment."""
    module = importlib.import_module(name)
    rows = [f"| {name}.py | default | |", "|---|---|---|"]
    for setting, comment in settings_of(module).items():
        value = getattr(module, setting)
        shown = " ".join(value) if isinstance(value, list | tuple) else value
        rows.append(f"| `{setting}` | {shown} | {comment} |".replace("|  |", "| |"))
    return "\n".join(rows)


@pytest.mark.parametrize("name", NAMES)
def test_the_settings_are_those_of_the_script(name):
    assert f"\n{table_of(name)}\n" in README, f"README.md should say:\n\n{table_of(name)}\n"


def test_files_and_flags_that_they_name_exist():
    for file in set(re.findall(r"\b[\w/.]+\.(?:py|sh|yaml|jinja|png|md)\b", BOTH)):
        ours = not file.startswith("outputs/") and file not in ("loss.png", "convert_hf_to_gguf.py")
        assert not ours or (ROOT / file).exists(), file
    flags = {flag_of(setting) for name in NAMES for setting in settings_of(importlib.import_module(name))}
    known = flags | {flag.replace("--", "--no-", 1) for flag in flags}
    others = "num_processes config_file nproc_per_node private outtype outfile port dtype enable-lora max-lora-rank"
    known |= {f"--{name}" for name in f"{others} lora-modules".split()}
    assert set(re.findall(r"--[a-z][\w-]+", BOTH)) <= known
