"""Three layers, no way back up: who imports whom, read from the syntax trees."""

import ast
import subprocess

import pytest
from conftest import ROOT

SCRIPTS = sorted(ROOT.glob("*.py"))
TASKS = sorted(ROOT.glob("tasks/*.py"))
PIPELINE = sorted(ROOT.glob("pipeline/**/*.py"))
STAGES = ("training", "testing", "scoring", "merging")
OURS = {path.stem for path in SCRIPTS} | {"tasks", "pipeline"}


def imports(path):
    """The dotted names of ours that a file imports, wherever in it, such as pipeline.files."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name} has a relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return {name for name in names if name.partition(".")[0] in OURS}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_imports_tasks_and_pipeline_and_no_other_script(path):
    assert {name.partition(".")[0] for name in imports(path)} <= {"tasks", "pipeline"}


@pytest.mark.parametrize("path", TASKS, ids=lambda path: path.name)
def test_a_task_imports_only_texts(path):
    if path.name == "__init__.py":
        assert {name.partition(".")[0] for name in imports(path)} <= {"tasks"}
    else:
        assert all(name.startswith("pipeline.texts.") for name in imports(path))


@pytest.mark.parametrize("path", PIPELINE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_pipeline_imports_no_script_and_no_task_and_a_stage_no_other_stage(path):
    room = path.relative_to(ROOT / "pipeline").parts[0]
    for name in imports(path):
        top, _, rest = name.partition(".")
        assert top == "pipeline", f"{path.name} imports {name}"
        assert rest.partition(".")[0] in {room, *rest.partition(".")[:1]} - (set(STAGES) - {room})


def test_there_is_no_circle():
    graph = {}
    for path in [*SCRIPTS, *TASKS, *PIPELINE]:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        graph[module] = {name for name in imports(path)} | {name.rpartition(".")[0] for name in imports(path)}
    done = set()

    def visit(module, above):
        assert module not in above, " imports ".join([*above, module])
        if module in graph and module not in done:
            for name in sorted(graph[module]):
                visit(name, [*above, module])
            done.add(module)

    for module in graph:
        visit(module, [])


def test_at_the_root_there_are_five_scripts_and_what_they_need():
    listed = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git repository")  # and what else is there, such as data, is the user's
    names = {line.partition("/")[0] for line in listed.stdout.splitlines() if not line.startswith(".")}
    files = {"README.md", "requirements.txt", "LICENSE", "pyproject.toml", "run.sh"}
    folders = {"tasks", "pipeline", "docs", "tests", "benchmarks"}
    scripts = {"build_dataset.py", "train_llama.py", "test_llama.py", "evaluations.py", "merge_llama.py"}
    assert names == scripts | files | folders
