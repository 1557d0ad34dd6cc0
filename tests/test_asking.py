"""test_llama.py --ask: a text is answered as a test row would be, through the prompt of its task."""

import io
import json
import re
import shutil
import sys

import pytest
from conftest import FIXTURES, copied, test
from test_testing import ONE, prompts_of, read

from pipeline.files import rows_of, sha256
from pipeline.texts import fields_of
from tasks import TASKS

SHORT = ["--samsum-max-new-tokens", 8]
QUESTION = "What was the main cargo on the Quaren?"
DIALOGUE = "Nora: Are you coming on Friday?\nPaul: Yes, by the late train."
PAGE = "The Quaren is a river. For many years its main cargo was cheese."


@pytest.fixture
def out(chain, tmp_path):
    """The adapter alone: no data set, no predictions."""
    out = copied(chain, tmp_path)
    shutil.rmtree(out / "dataset")
    return out


@pytest.fixture
def ask(out, capsys):
    def ask(*arguments):
        """(exit code, stdout, stderr)"""
        capsys.readouterr()
        return test(out, *SHORT, "--ask", *arguments), *capsys.readouterr()

    return ask


def answers(printed):
    """{"the base", "the fine-tuned model": what it answers}"""
    parts = printed.split("\n\n")[1:]
    heads = [part.split(":\n", 1)[0].split(" (")[0] for part in parts]
    return dict(zip(heads, [part.split(":\n", 1)[1].strip() for part in parts], strict=True))


@ONE
def test_a_dialogue_and_a_question_are_answered_as_the_test_rows_they_are_without_the_data_set(chain, ask, tmp_path):
    _, rows = prompts_of(chain / "adapter", chain)
    for task, count in (("samsum", 2), ("trivia_qa", 3)):
        examples = {example["id"]: example for example in read(chain, task)["examples"]}
        for row in rows_of(rows, task).to_list()[:count]:
            fields = fields_of(TASKS[task].PROMPT, row["prompt"])
            (tmp_path / "context.txt").write_text(fields.get("context", ""))
            (tmp_path / "dialogue").write_text(fields.get("dialogue", ""))
            given = [fields["question"], "--context", tmp_path / "context.txt"] if task == "trivia_qa" else []
            code, printed, _ = ask(*(given or [tmp_path / "dialogue"]))
            example = examples[row["id"]]
            expected = {"the base": example["base_prediction"], "the fine-tuned model": example["prediction"]}
            assert code == 0 and answers(printed) == {name: text or "(nothing)" for name, text in expected.items()}
            assert f"asked as {task}: " in printed


@ONE
def test_the_task_is_that_of_the_text_or_the_one_that_is_given(ask, out, monkeypatch, tmp_path):
    (tmp_path / "page.txt").write_text(PAGE)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(DIALOGUE.encode())))
    assert "asked as samsum" in ask("-")[1]
    assert "asked as samsum" in ask("Nora: Coming?", "--task", "samsum")[1]
    code, printed, _ = ask(QUESTION)
    assert code == 0 and "trivia_qa: unlike in training, it is asked without a context" in printed
    assert "asked as trivia_qa" in ask(f" \n\n  \n{QUESTION}\n \n")[1]
    code, printed, _ = ask(DIALOGUE, "--task", "own")
    assert code == 0 and "own is no task that the adapter was trained on" in printed
    page = ["--context", tmp_path / "page.txt"]
    code, _, error = ask(DIALOGUE, *page)
    assert code == 2 and error.startswith("error: --ask fits no task of samsum, trivia_qa: a dialogue has several")
    code, _, error = ask(DIALOGUE, "--task", "samsum", *page)
    assert code == 2 and error == "error: --context is for a question: the prompts of samsum have none\n"
    run = json.loads((out / "adapter" / "run.json").read_text())
    run["tasks"] = {"own": {"prompt": "Q: {question}\nA:", "one_line": True}}
    (out / "adapter" / "run.json").write_text(json.dumps(run))
    assert "asked as own" in ask(DIALOGUE)[1]
    run["tasks"]["own"]["prompt"] = "{context} Q: {question}"
    (out / "adapter" / "run.json").write_text(json.dumps(run))
    assert "asked as own" in ask(QUESTION, *page)[1]
    del run["tasks"]  # an adapter from elsewhere
    (out / "adapter" / "run.json").write_text(json.dumps(run))
    code, _, error = ask(DIALOGUE)
    assert code == 2 and error.startswith("error: --ask fits samsum and own of samsum, trivia_qa, own")


def test_a_merged_model_is_asked_by_the_prompts_that_it_carries(ask, tmp_path):
    merged = shutil.copytree(FIXTURES / "tiny_llama3", tmp_path / "merged")
    plain = ask(QUESTION, "--model", merged, "--task", "own")[1]
    carried = {"tasks": {"own": {"prompt": "A long prompt. Q: {question}\nA:", "one_line": True}}}
    (merged / "merge.json").write_text(json.dumps(carried))
    code, printed, _ = ask(QUESTION, "--model", merged)  # of one task alone
    assert code == 0 and "asked as own" in printed
    tokens = [int(re.search(r"asked as own: (\d+) tokens", said)[1]) for said in (plain, printed)]
    assert tokens[1] > tokens[0] + 4


def test_own_prompts_are_made_of_the_template_or_given_whole():
    own = TASKS["own"].asked
    assert own("3 + 4", "", "Q: {question}\nA:") == "Q: 3 + 4\nA:"
    assert own("as it is", "", "{prompt}") == own("as it is", "", "{a} and {b}") == "as it is"
    assert own("Who?", "A page.", "{context}\n\nQ: {question}\nA:") == "A page.\n\nQ: Who?\nA:"
    assert (
        TASKS["trivia_qa"].asked("Who?", PAGE, TASKS["trivia_qa"].CLOSED_BOOK).startswith("Answer the question from")
    )


@ONE
def test_blanks_in_front_of_the_first_line_are_read_as_in_training(ask, out, tmp_path):
    run = json.loads((out / "adapter" / "run.json").read_text())
    run["tasks"] = {"own": {"prompt": "{code}", "one_line": True}}
    (out / "adapter" / "run.json").write_text(json.dumps(run))
    (tmp_path / "code.txt").write_text("\n        x = 4\n")
    rows = [ask(text)[1] for text in ("        x = 4", tmp_path / "code.txt", "x = 4")]
    indented, of_file, plain = (int(re.search(r"asked as own: (\d+) tokens", said)[1]) for said in rows)
    assert indented == of_file > plain


@ONE
def test_a_text_for_a_prompt_of_several_texts_is_asked_as_it_is_and_that_is_said(ask, out):
    run = json.loads((out / "adapter" / "run.json").read_text())
    run["tasks"] = {"own": {"prompt": "Text: {text}\nQ: {question}\nA:", "one_line": True}}
    (out / "adapter" / "run.json").write_text(json.dumps(run))
    said = "own: the text is asked as it is, because its prompt is made of several texts: question, text\n"
    assert said in ask("Text: a\nQ: b\nA:")[1]
    run["tasks"]["own"]["prompt"] = "Q: {question}\nA:"
    (out / "adapter" / "run.json").write_text(json.dumps(run))
    assert "as it is" not in ask("b")[1]


@ONE
def test_on_other_weights_than_the_adapters_nothing_is_answered_unless_they_are_asked_for(ask, out):
    run = json.loads((out / "adapter" / "run.json").read_text())
    run["run"]["weights"] = "f" * 16
    (out / "adapter" / "run.json").write_text(json.dumps(run))
    code, _, error = ask(DIALOGUE)
    assert code == 2 and "the base's weights are others" in error
    assert ask(DIALOGUE, "--model", FIXTURES / "tiny_llama3", "--adapter", out / "adapter")[0] == 0


@ONE
def test_an_adapter_without_all_of_its_tokenizer_has_its_bases_and_another_tokenizer_a_warning(ask, out):
    path = out / "adapter" / "tokenizer.json"
    content, expected = json.loads(path.read_text()), ask(DIALOGUE)[1]
    path.write_text(json.dumps(content | {"post_processor": None}))  # no BOS
    assert "was trained with other prompts: another tokenizer" in ask(DIALOGUE)[1]
    path.unlink()
    assert ask(DIALOGUE)[1] == expected and "warning" not in expected


def test_a_merge_of_the_adapter_before_gets_a_warning(ask, out):
    merged, adapter = shutil.copytree(FIXTURES / "tiny_llama3", out / "merged"), out / "adapter"
    digest, link = sha256(adapter / "adapter_model.safetensors"), out.with_name("link")
    link.symlink_to(out)  # the same folder by another name
    for noted, warned in ((digest, False), ("f" * 64, True)):
        (merged / "merge.json").write_text(json.dumps({"adapter_sha256": noted}))
        code, printed, _ = ask(DIALOGUE, "--model", link / "merged", "--task", "samsum")
        assert code == 0 and ("was merged from another adapter than " in printed) == warned


@ONE
def test_a_long_page_is_cut_to_the_sentences_nearest_to_the_question(ask, tmp_path):
    filler = " ".join(f"Sentence {number} is about something else." for number in range(400))
    (tmp_path / "page.txt").write_text(f"{filler} {PAGE} {filler}")
    prompt = TASKS["trivia_qa"].asked(QUESTION, (tmp_path / "page.txt").read_text(), TASKS["trivia_qa"].PROMPT)
    assert "main cargo was cheese" in prompt and len(prompt.split()) < 330


@ONE
def test_what_cannot_be_asked_is_one_sentence(ask, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "empty.txt").write_text(" \n")
    for arguments, said in (
        ([" "], "--ask has no text"),
        ([""], "--ask has no text"),
        ([tmp_path / "empty.txt"], "--ask has no text"),
        ([tmp_path / "latin.txt"], f"cannot read --ask {tmp_path / 'latin.txt'} ("),
        (["dialogue.txt"], "cannot read --ask dialogue.txt (No such file or directory)"),
        ([QUESTION, "--context", "page"], "cannot read --context page (No such file"),
        ([QUESTION, "--context", tmp_path / "empty.txt"], "--context has no text"),
        ([QUESTION, "--shots", 2, "--adapter", "none"], "--ask is for a model that is loaded here"),
        ([QUESTION, "--server", "http://127.0.0.1:9/v1"], "--ask is for a model that is loaded here"),
        (["word " * 9000], "--ask is too long (its prompt has "),
        ([QUESTION, "--trivia-qa-max-new-tokens", 2040], "--ask is too long (its prompt has "),
        ([tmp_path], f"cannot read --ask {tmp_path} (Is a directory)"),
        (["-", "--context", "-"], "--ask and --context cannot both be read from standard input"),
    ):
        code, _, error = ask(*arguments)
        assert code == 2 and error.startswith(f"error: {said}") and error.count("\n") == 1, (arguments, error)


@ONE
@pytest.mark.parametrize("tasks", [
    {"samsum": "x"}, {"samsum": {"prompt": None}}, {"samsum": {"prompt": "S {dialogue.x}", "one_line": False}},
    {"samsum": {"prompt": "S {0}", "one_line": False}}, {"samsum": {"prompt": "S {dialogue", "one_line": False}},
    {"samsum": {"prompt": "S {unknown}", "one_line": False}}, {"samsum": {"prompt": "no place", "one_line": False}},
    {"samsum": {"prompt": "S {dialogue}"}}, {"samsum": {"prompt": "S {dialogue[a]}", "one_line": False}},
    {"own": {"prompt": "S {a", "one_line": False}},
])  # fmt: skip
def test_a_damaged_prompt_in_the_adapter_is_one_sentence(tasks, ask, out):
    run = json.loads((out / "adapter" / "run.json").read_text())
    (out / "adapter" / "run.json").write_text(json.dumps(run | {"tasks": tasks}))
    code, _, error = ask(DIALOGUE)
    assert code == 2 and error.startswith("error: cannot use the prompt of ") and error.count("\n") == 1


@ONE
def test_standard_input_that_is_closed_or_no_utf_8_is_one_sentence(ask, monkeypatch):
    for stream in (None, io.TextIOWrapper(io.BytesIO(b"\xff\xfeA: hi\nB: yo"), errors="surrogateescape")):
        monkeypatch.setattr(sys, "stdin", stream)
        code, _, error = ask("-")
        assert code == 2 and error.startswith("error: cannot read --ask - (") and error.count("\n") == 1
