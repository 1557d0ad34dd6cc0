"""test_llama.py --swap-answers: a context says another answer, nothing else changes; reader and memory differ."""

import json
import shutil

import pytest
from conftest import assert_refused, run, snapshot, test
from datasets import Dataset, DatasetDict, load_from_disk

from tasks import swapped as swap
from tasks import trivia_qa

PROMPT = "Answer the question from the context.\n\nContext:\n{}\n\nQuestion: {}\nAnswer:"


def row(number, context, answer, *aliases, question="Which one is it?"):
    known = {"id": f"trivia_qa:{number}", "task": "trivia_qa", "answer_in_context": True}
    return known | {
        "prompt": PROMPT.format(context, question),
        "completion": f" {answer}",
        "references": [answer, *aliases],
    }


def other(*answers):
    """Rows that only lend their answers."""
    return [row(f"other {i}", "Nothing stands here.", answer) for i, answer in enumerate(answers)]


def swapped(*rows):
    """({id: row}, counts) of the rows once swapped."""
    result, counts = swap.swap_answers(rows, trivia_qa.PROMPT)
    return {one["id"].removeprefix("trivia_qa:"): one for one in result}, counts


SWAPS = {  # context, answer and aliases, the answer that is lent, what the context must say
    "everywhere, whatever the case": ("Paris. PARIS! In paris?", ["Paris"], "Rome", "Rome. Rome! In Rome?"),
    "whole words": ("Smart artists love art.", ["art"], "music", "Smart artists love music."),
    "aliases, the longest first": (
        "New York City, or New York, or NYC.",
        ["NYC", "New York", "New York City"],
        "Rome",
        "Rome, or Rome, or Rome.",
    ),
    "the official rules' blanks": (
        "Spider-Man, Spider_Man and spider\nman, not Spiderman.",
        ["Spider Man"],
        "Iron Fist",
        "Iron Fist, Iron Fist and Iron Fist, not Spiderman.",
    ),
    "an article inside": ("Alexander the Great won.", ["Alexander Great"], "Ivan Petrov", "Ivan Petrov won."),
    "the article in front stays": ("The Beatles. the Beatles.", ["The Beatles"], "The Kinks", "The Kinks. the Kinks."),
    "possessives": ("O’Hara’s and O'Hara's", ["O'Hara"], "McKay", "McKay’s and McKay's"),
    "accents": ("Café, cafe, CAFÉ", ["café"], "école", "école, cafe, école"),
    "a decomposed accent is another word": ("Jose and Jose\u0301", ["Jose"], "Anna", "Anna and Jose\u0301"),
    "other scripts": ("東京 is 東京.", ["東京"], "京都", "京都 is 京都."),
    "a dash parts words": ("1914–1918, in 1918", ["1918"], "1850", "1914–1850, in 1850"),
    "other dashes and quotation marks": ("1185–1226, «1185», 1185…", ["1185"], "1190", "1190–1226, «1190», 1190…"),
    "an answer with a dash": ("AC–DC, AC/DC and ac-dc", ["AC–DC"], "Ozzy", "Ozzy, Ozzy and Ozzy"),
    "both forms of an accent": ("café, cafe\u0301, cafe", ["café"], "école", "école, école, cafe"),
    "full-width digits": ("in １９８６, 1986", ["1986"], "1850", "in 1850, 1850"),
    "capitals of sharp s": ("Straße, STRASSE", ["Straße"], "Rome", "Rome, Rome"),
    "not before a mark": ("क, कि", ["क"], "ख", "ख, कि"),
    "inside a Chinese sentence": ("我去北京。北京大", ["北京"], "上海", "我去上海。上海大"),
    "what looks like a pattern": (r"C++ (C++)", ["C++"], r"\g", r"\g++ (\g++)"),
}


def test_a_word_that_would_stand_beside_letters_is_not_put_in():
    rows, counts = swapped(row(1, "aกรุงเทพ", "กรุงเทพ"), *other("Ünï"))
    assert not rows and counts["in another form"] == 1


@pytest.mark.parametrize(("context", "answers", "lent", "expected"), SWAPS.values(), ids=SWAPS.keys())
def test_every_form_of_the_answer_is_swapped_as_whole_words_and_nothing_else(context, answers, lent, expected):
    rows, _ = swapped(row(1, context, *answers), *other(lent))
    bare = lent.removeprefix("The ")
    assert rows["1"]["prompt"] == PROMPT.format(expected, "Which one is it?")
    assert rows["1"]["swapped"] == bare and rows["1"]["completion"] == f" {bare}"
    assert rows["1"]["references"] == answers and list(rows) == ["1"]


REFUSED = {  # context, question, answers, the answers that are lent, why not
    "not there": ("An artist.", "Which?", ["art"], ["music"], "not there"),
    "in the question": ("Art it is.", "Is it art or music?", ["art"], ["dance"], "also in the question"),
    "an alias in the question": ("Art.", "Is it painting?", ["art", "painting"], ["dance"], "also in the question"),
    "no partner": ("Art.", "Which?", ["art"], [], "without another of their kind"),
    "no year for a word": ("Art.", "Which?", ["art"], ["1990"], "without another of their kind"),
    "no name for a year": ("In 1990.", "When?", ["1990"], ["Rome"], "without another of their kind"),
    "in the context": ("Art, music.", "Which?", ["art"], ["music"], "without another of their kind"),
    "in the question as well": ("Art.", "Not music?", ["art"], ["music"], "without another of their kind"),
    "an alias": ("Art.", "Which?", ["art", "music"], ["music"], "without another of their kind"),
    "in an alias": ("York.", "Which?", ["York", "York Town"], ["Town"], "without another of their kind"),
    "around an alias": ("Old York.", "Which?", ["Old York", "York"], ["New York"], "without another of their kind"),
    "made by the swap": ("Old Mill Sea.", "Which?", ["Old Mill", "Red Sea"], ["Big Red"], "in another form"),
}


@pytest.mark.parametrize(("context", "question", "answers", "lent", "why"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_swapped_is_left_out_and_counted_by_its_reason(context, question, answers, lent, why):
    good = [row("good", "It is Oslo-on-the-Sea 1.", "1x"), row("good 2", "It is 1x.", "1x"), *other("2x")]
    rows, counts = swapped(row("bad", context, *answers, question=question), *other(*lent), *good)
    assert list(rows) == ["good 2"] and counts["swapped"] == 1
    bad, _ = swapped(*good)
    _, without = swapped(*other(*lent), *good) if lent else (None, swapped(*good)[1])
    assert {k: n for k, n in counts.items() if n != without.get(k, 0)} == {why: without.get(why, 0) + 1}
    assert list(bad) == ["good 2"]


@pytest.mark.parametrize(
    "kind",
    [["1990", "1066", "1940s"], ["three", "seven"], ["55.1%", "Seven"], ["9 mph", "$2 million"], ["art", "dance"]]
    + [["Ann Lee", "Bob Day"], ["War and Peace", "The Day after Tomorrow"]],
)
def test_a_year_stays_a_year_a_number_a_number_and_words_keep_their_count_and_capital(kind):
    kinds = ["1812", "eight", "9%", "40 years", "music", "Rome", "Cat Fox", "a long story told", "Not by Day"]
    rows = [row(i, f"It is {answer}.", answer) for i, answer in enumerate(kind)]
    rows, _ = swapped(*rows, *other(*kinds), *other("Ann", "cat dog", "fish", "1x", "20 x", "one"))
    bare = [answer.removeprefix("The ") for answer in kind]
    assert [rows[str(i)]["swapped"] for i in range(len(kind))][:-1] == bare[1:]  # the next one of the kind
    assert rows[str(len(kind) - 1)]["swapped"] in kinds


def planted(folder, predictions, name="", **settings):
    """A prediction file of 40 questions whose context says "Other i" where "True i", or "Alias i", is true."""
    examples = [
        {"id": str(i), "references": [f"True {i}", f"Alias {i}"]} | ({"swapped": f"Other {i}"} if name else {})
        for i in range(40)
    ]
    for column, answer in predictions.items():
        for i, example in enumerate(examples):
            example[column] = answer(i)
    settings = {"adapter": "a" * 16, "rows": "b" * 32, "swap_answers": {"swapped": 40} if name else False} | settings
    path = folder / f"trivia_qa_predictions{name}.json"
    path.write_text(json.dumps({"task": "trivia_qa", "settings": settings, "examples": examples}))
    return path


def memory(i):
    """30 from memory, 6 by the context, 4 of neither."""
    return f"It is the alias {i}." if i < 30 else f"Other {i}" if i < 36 else f"True {i}{i}"


def reader(i):
    """35 by the context, 2 from memory, 3 of both."""
    return f"OTHER-{i}!" if i < 35 else f"True {i}" if i < 37 else f"True {i}, not other {i}"


def evaluate(folder, *arguments):
    return run("evaluations.py", "--output-dir", folder, "--resamples", 500, *arguments)


def test_a_planted_reader_and_a_planted_memory_are_told_apart_and_the_plain_scores_stay(tmp_path):
    planted(tmp_path, {"base_prediction": memory, "prediction": reader})
    assert evaluate(tmp_path).returncode == 0
    plain = json.loads((tmp_path / "evaluation.json").read_text())
    planted(tmp_path, {"base_prediction": memory, "prediction": reader}, "_swapped")
    result = evaluate(tmp_path)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "evaluation.json").read_text())
    found = report["swapped"]
    assert found["base"] == {"follows_context": 15, "from_memory": 75, "neither_or_both": 10}
    assert found["tuned"] == {"follows_context": 87.5, "from_memory": 5, "neither_or_both": 7.5}
    tests = found["comparisons"]["tuned"]
    assert tests["follows_context"]["significant"] and tests["from_memory"]["significant"]
    counts = {name: [tests[name][key] for key in ("wins", "ties", "losses")] for name in list(tests)[:2]}
    assert counts["follows_context"] == [30, 9, 1] and counts["from_memory"] == [30, 8, 2]  # less memory is better
    assert "p_value" not in tests["neither_or_both"] and found["examples"] == 40
    assert report["trivia_qa"]["tuned"] == plain["trivia_qa"]["tuned"]
    line = next(line for line in result.stdout.splitlines() if line.startswith("follows_context"))
    assert line.split()[1:4] == ["15.00", "87.50", "+72.50"]
    assert all(len(line) <= 80 for line in result.stdout.splitlines() if "wrote" not in line)
    page = (tmp_path / "evaluation.html").read_text()
    for words in ("Read or remembered?", "Follows context", "87.50", "From memory"):
        assert words in page
    assert "so many give the one that is now there" in page and "Read or remembered?" in page.split("<script")[0]
    examples = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert [part["task"] for part in examples] == ["trivia_qa", "swapped"]
    assert examples[1]["main"] == "follows_context" and examples[1]["swapped"][7] == "Other 7"
    assert examples[1]["scores"]["tuned"]["from_memory"][34:38] == [0, 100, 100, 0]
    assert found["equal_predictions"] == [["base", "tuned", 0]] and "so many give" in result.stdout
    assert "too long" not in result.stdout
    path = tmp_path / "trivia_qa_predictions_swapped.json"
    content = json.loads(path.read_text())
    content["examples"][0] |= {"prediction": "", "base_prediction": "", "too_long": True}
    path.write_text(json.dumps(content))
    for told in (evaluate(tmp_path).stdout, (tmp_path / "evaluation.html").read_text()):
        assert "1 of them were too long for the model of tuned" in told


def test_swapped_files_of_any_systems_are_compared_and_of_other_swaps_or_runs_refused(tmp_path):
    (tmp_path / "b").mkdir()
    files = [planted(tmp_path, {"prediction": memory}), planted(tmp_path / "b", {"prediction": reader})]
    swaps = [planted(path.parent, {"prediction": memory}, "_swapped") for path in files]
    systems = [f"{name}={path}" for pair in (files, swaps) for name, path in zip("ab", pair, strict=True)]
    assert evaluate(tmp_path, "--predictions", *systems).returncode == 0
    found = json.loads((tmp_path / "evaluation.json").read_text())["swapped"]
    assert found["a"] == found["b"] and set(found["files"]) == {"a", "b"}
    assert_refused(evaluate(tmp_path, "--predictions", *systems[2:]), "beside the plain ones")
    swaps[1].write_text(swaps[1].read_text().replace("Other 7", "Another 7"))
    assert_refused(evaluate(tmp_path, "--predictions", *systems), "other answers were swapped in", str(swaps[0]))
    planted(tmp_path, {"prediction": memory}, "_swapped", adapter="c" * 16)
    assert_refused(
        evaluate(tmp_path), "_swapped.json", "(the adapter is another one)", "test_llama.py --swap-answers --overwrite"
    )


def test_a_swapped_question_is_never_shown_with_the_context_of_the_plain_one(dataset, tmp_path):
    shutil.copytree(dataset / "dataset", tmp_path / "dataset")
    rows = [row for row in load_from_disk(str(dataset / "dataset"))["test"] if row["task"] == "trivia_qa"]
    for name, more in (("", {}), ("_swapped", {"swapped": "Other"})):
        examples = [{"id": row["id"], "references": row["references"], "prediction": "x"} | more for row in rows]
        path = tmp_path / f"trivia_qa_predictions{name}.json"
        path.write_text(json.dumps({"task": "trivia_qa", "examples": examples}))
    assert evaluate(tmp_path).returncode == 0
    page = (tmp_path / "evaluation.html").read_text()
    plain, other = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert plain["prompts"] == [row["prompt"] for row in rows] and other["prompts"] is None


@pytest.fixture
def asks(chain, tmp_path):
    def asks(name, *rows):
        """An output dir with the adapter of `chain` and these test rows."""
        shutil.copytree(chain / "adapter", tmp_path / name / "adapter")
        DatasetDict(test=Dataset.from_list(list(rows))).save_to_disk(tmp_path / name / "dataset")
        return tmp_path / name

    return asks


@pytest.mark.parametrize("chain", ["tiny_llama3"], indirect=True)
def test_the_swapped_questions_are_asked_into_a_file_of_their_own_and_a_cut_off_run_goes_on(asks, capsys):
    chat = {"id": "samsum:1", "task": "samsum", "prompt": "Hi.", "completion": " Hi.", "references": ["Hi."]}
    chat["answer_in_context"] = True
    rows = [row(1, "Ann likes art.", "art", "Art"), row(2, "Bob is in Paris.", "Paris"), *other("music", "Rome")]
    by_hand = [row(1, "Ann likes music.", "music"), row(2, "Bob is in Rome.", "Rome")]
    out, expected = asks("out", chat, *rows), asks("expected", *by_hand)
    assert test(out) == 0 and test(expected, "--max-batch-tokens", 1) == 0
    plain = snapshot(out)
    assert test(out, "--swap-answers", "--max-batch-tokens", 1) == 0
    path = out / "trivia_qa_predictions_swapped.json"
    text, settings = path.read_text(), json.loads(path.read_text())["settings"]
    assert settings["swap_answers"] == {"swapped": 2, "not there": 2}
    assert {name: known for name, known in snapshot(out).items() if name != path.name} == plain
    same = [json.loads(file.read_text()) for file in (path, expected / "trivia_qa_predictions.json")]
    assert same[0]["perplexity"] == same[1]["perplexity"]
    for mine, its, answer, true in zip(
        same[0]["examples"], same[1]["examples"], ["music", "Rome"], rows, strict=False
    ):
        assert mine.pop("swapped") == answer and mine.pop("references") == true["references"]
        its.pop("references")
        assert mine == its
    # what a kill leaves behind: one batch, and half of another
    examples = [[i, {k: v for k, v in e.items() if k not in KEPT}] for i, e in enumerate(json.loads(text)["examples"])]
    line = json.dumps({"settings": settings, "examples": examples[:1]})
    (out / ".trivia_qa_predictions_swapped.part0.jsonl").write_text(line + "\n" + line[:40])
    path.unlink()
    capsys.readouterr()
    assert test(out, "--swap-answers", "--max-batch-tokens", 1) == 0
    assert "going on, 1 of 2 rows are there from before" in capsys.readouterr().out and path.read_text() == text
    # a limit of summaries, of which there are none, makes it no other run
    assert test(out, "--swap-answers", "--max-batch-tokens", 1, "--samsum-max-new-tokens", 7) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert test(out, "--name", "swapped") == 2 and "swap answers" in capsys.readouterr().err  # that file's own name
    assert test(out, "--swap-answers", "--name", "x", "--no-compare-with-base") == 0
    assert (out / "trivia_qa_predictions_x_swapped.json").exists() and path.read_text() == text
    assert test(asks("chats", chat), "--swap-answers") == 2
    assert "no answer can be swapped: run build_dataset.py" in capsys.readouterr().err


KEPT = ("id", "references", "answer_in_context", "swapped")  # of the rows, not of the answers
