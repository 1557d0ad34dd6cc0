"""evaluation.html promises: one file that works in a browser without the network, and never runs what it shows."""

import hashlib
import html
import json
import re
import shutil

import pytest
from conftest import ROOT, run

from pipeline.scoring import page
from tasks import trivia_qa

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
ADAPTER = hashlib.sha256(b"weights").hexdigest()
NASTY = '</script><script>document.title = "run"</script></table><img src=x onerror=alert(1)> & "quoted" {{ 7 * 7 }}'


def example(i, base, tuned, reference, **more):
    return {
        "id": f"trivia_qa:{i}",
        "references": [reference, f"{reference} Town"],
        "prediction": tuned,
        "base_prediction": base,
        "answer_in_context": i % 2 == 0,
        "prompt": f"Answer.\n\nContext:\nLine {i}.\n\nQuestion: which {reference}?\nAnswer:",
    } | more


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An output dir with the page of 60 answers and 12 summaries; row 7 holds markup, row 3 is worse when tuned."""
    output = tmp_path_factory.mktemp("page")
    answers = [example(i, "Oslo", "Rome" if i % 3 else "Oslo", "Rome") for i in range(60)]
    answers[3] = example(3, "Bern", "Bonn", "Bern")
    answers[7] = example(7, NASTY, f"needle {NASTY}", NASTY, prompt=NASTY, id=f"trivia_qa:{NASTY}")
    summaries = [
        {"id": f"samsum:{i}", "references": ["Ann drinks tea."], "prompt": "Dialogue:\nAnn: tea?",
         "prediction": f"Ann drinks {'tea' if i else 'no tea'}.",
         "base_prediction": "Ann tea." if i == 1 else "Bob runs."}
        for i in range(12)
    ]  # fmt: skip
    for task, rows in (("samsum", summaries), ("trivia_qa", answers)):
        content = {
            "task": task,
            "model": NASTY,
            "examples": rows,
            "settings": {"adapter": ADAPTER[:16], "rows": "b" * 32, "model": NASTY},
        }
        (output / f"{task}_predictions.json").write_text(json.dumps(content))
    adapter = output / "adapter"
    adapter.mkdir()
    facts = {
        "adapter_sha256": ADAPTER,
        "base_model": NASTY,
        "run": {"train rows": "c" * 32},
        "steps": 2,
        "train_loss": 1.25,
        "settings": {"learning_rate": 2e-4, "note": NASTY},
    }
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    (adapter / "run.json").write_text(json.dumps(facts))
    (adapter / "log.jsonl").write_text(
        '{"loss": 2.0, "step": 1}\n{"loss": 1.0, "step": 2}\n{"eval_loss": 1.5, "step": 2}'
    )
    counts = {"train": {"available": 9, "kept": 5, "also in test": 4}}
    splits = {"test": {"sha256": "b" * 64}, "train": {"sha256": "c" * 64}}
    (output / "dataset_report.json").write_text(
        json.dumps({"tasks": {"samsum": {"counts": counts}}, "splits": splits})
    )
    result = run("evaluations.py", "--output-dir", output, "--resamples", "1000")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    return output


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine: the page is only tested where there is one (.ci/run installs it)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def tab(browser, folder):
    """The page in a fresh context; whatever the console says, an error or a request for more than the file fails."""
    context = browser.new_context()
    tab, trouble = context.new_page(), []
    tab.on("console", lambda message: trouble.append(message.text))
    tab.on("pageerror", lambda error: trouble.append(str(error)))
    tab.on("request", lambda request: trouble.append(request.url) if "evaluation.html" not in request.url else None)
    tab.on("dialog", lambda dialog: trouble.append(dialog.message))
    tab.goto((folder / "evaluation.html").as_uri())
    yield tab
    context.close()
    assert trouble == []


def shown(tab):
    """The rows of the table of examples: [task, first words, base, tuned, difference]."""
    return [row.locator("td").all_inner_texts() for row in tab.locator("#examples tr.open").all()]


def count(tab):
    """How many examples match, as the pager says."""
    return tab.locator("#where").inner_text().split(" of ")[-1]


def search(tab, text, expected):
    tab.fill("#search", text)
    tab.wait_for_function("n => document.querySelector('#where').textContent.endsWith(n)", arg=expected)


def test_search_looks_into_prompt_references_predictions_and_id(tab):
    assert count(tab) == "72" and len(shown(tab)) == 25
    for text, expected in (("samsum:11", "of 1"), ("LINE 42.", "of 1"), ("rome town", "of 58"), ("bonn", "of 1")):
        search(tab, text, expected)
    search(tab, "nowhere to be found", "no example matches")
    assert shown(tab) == []


def test_filters_for_task_outcome_and_context_do_what_they_say(tab):
    tab.select_option("#task", "samsum")
    assert count(tab) == "12" and {row[0] for row in shown(tab)} == {"samsum"}
    tab.select_option("#task", "trivia_qa")
    tab.select_option("#outcome", "-1")
    assert [row[2:] for row in shown(tab)] == [["100.0", "0.0", "−100.0"], ["100.0", "97.0", "−3.0"]]
    tab.select_option("#outcome", "0")
    assert count(tab) == "19"  # Oslo twice
    tab.select_option("#outcome", "")
    tab.select_option("#inside", "false")
    assert count(tab) == "30"


def test_answers_cut_off_or_empty_are_marked_and_can_be_filtered(browser, folder):
    """The page of three answers, of which the base's first was cut off and the tuned one's second is empty."""
    output = folder / "endings"
    output.mkdir()
    cut = [{"base_hit_max_new_tokens": i == 0, "hit_max_new_tokens": False} for i in range(3)]
    rows = [example(i, "Oslo", "" if i == 1 else "Rome", "Rome", **cut[i]) for i in range(3)]
    (output / "trivia_qa_predictions.json").write_text(json.dumps({"task": "trivia_qa", "examples": rows}))
    assert run("evaluations.py", "--output-dir", output, "--resamples", "50").returncode == 0
    tab = browser.new_page()
    tab.goto((output / "evaluation.html").as_uri())
    assert tab.locator("#examples .ended").all_inner_texts() == ["base cut off", "tuned empty"]
    for kind, title in (("cut", "base, cut off at the limit"), ("empty", "tuned, empty")):
        tab.select_option("#ended", kind)
        assert count(tab) == "1"
        tab.locator("#examples tr.open").click()
        assert title in tab.locator("#examples tr.detail h4").all_inner_texts()
    tab.close()


def test_scores_that_are_not_tested_are_folded_away_and_nothing_is_claimed_of_them(tab):
    folded = tab.locator("details", has_text="Exploratory scores").nth(1)
    assert not folded.locator("table").is_visible() and "ROUGE-1" in folded.inner_html()
    folded.locator("summary").click()
    assert "ROUGE-1" in folded.inner_text() and "wins / ties / losses" in folded.inner_text()
    for word in ("better", "worse", "not shown", "p 0", "p 1", "test", "visible from"):
        assert word not in folded.locator("table").inner_text()
    shown = tab.locator("main > .wide").nth(1).locator("tbody th").all_inner_texts()
    assert shown == ["Exact match", "F1"]


def test_sorting_by_a_score_or_the_difference_goes_both_ways_over_all_pages(tab):
    for column, index in (("tuned", 3), ("base", 2), ("diff.", 4)):
        values = []
        for _ in range(2):
            tab.locator("#examples thead button", has_text=column).click()
            seen = []
            while True:
                seen += [float(row[index].replace("−", "-").replace("+", "")) for row in shown(tab)]
                if tab.locator("#next").is_disabled():
                    break
                tab.click("#next")
            values.append(seen)
        assert len(values[0]) == 72 and len(set(values[0])) > 1
        assert values[0] == sorted(values[0], reverse=True) and values[1] == sorted(values[1])


def focused(tab):
    return tab.evaluate("document.activeElement.textContent")


def test_the_focus_stays_on_the_column_that_was_sorted(tab):
    button = tab.locator("#examples thead button", has_text="tuned")
    button.focus()
    for arrow in ("↓", "↑"):
        tab.keyboard.press("Enter")
        assert focused(tab) == f"tuned {arrow}"


def test_j_and_k_go_from_example_to_example_over_the_pages(tab):
    for key, number in (("k", 0), ("j", 1), ("j", 2), ("k", 1)):
        tab.keyboard.press(key)
        assert tab.evaluate("buttons().indexOf(document.activeElement)") == number
    tab.keyboard.press("Enter")
    assert "samsum:1" in tab.locator("#examples tr.detail").inner_text()
    for key, start in (("j", 26), ("k", 1)):
        tab.evaluate(f"buttons().at({'-1' if key == 'j' else '0'}).focus()")
        tab.keyboard.press(key)
        assert tab.locator("#where").inner_text().startswith(f"{start} to ")
    tab.focus("#search")
    tab.keyboard.press("j")
    assert tab.locator("#search").input_value() == "j"


def test_the_address_leads_back_to_filters_and_to_an_example(tab, folder):
    tab.select_option("#task", "trivia_qa")
    tab.select_option("#outcome", "-1")
    tab.locator("#examples thead button", has_text="diff.").click()
    tab.locator("#examples tr.open", has_text="Bonn").click()
    address, state = tab.url, shown(tab)
    tab.goto("about:blank")
    tab.goto(address)
    assert shown(tab) == state and "Bonn" in tab.locator("#examples tr.detail").inner_text()
    tab.locator("#examples tr.detail a").click()
    tab.locator("#where", has_text="of 60").wait_for()
    assert count(tab) == "60" and "Bonn" in tab.locator("#examples tr.detail").inner_text()
    tab.goto(f"{(folder / 'evaluation.html').as_uri()}#task=nowhere&example=nothing&sort=x")
    assert count(tab) == "72" and tab.locator("#examples tr.detail").count() == 0


def test_the_contents_lead_to_the_parts_of_the_page(tab):
    links = tab.locator("nav a").all_inner_texts()
    assert links == [heading.split(" 12 ")[0].split(" 60 ")[0] for heading in tab.locator("h2").all_inner_texts()]
    tab.select_option("#task", "samsum")
    for link in tab.locator("nav a").all():
        link.click()
        assert tab.locator(link.get_attribute("href")).count() == 1
    assert count(tab) == "12"  # the filter is still there


def test_a_row_shows_reference_base_and_tuned_before_it_is_opened_and_then_loss_and_tokens(browser, folder):
    output = folder / "losses"
    output.mkdir()
    rows = [example(i, "Oslo", "Rome", "Rome", nll=3.0, base_nll=6.0, tokens=2, new_tokens=7) for i in range(3)]
    rows[1] |= {"too_long": True, "nll": None, "base_nll": None}
    (output / "trivia_qa_predictions.json").write_text(json.dumps({"task": "trivia_qa", "examples": rows}))
    assert run("evaluations.py", "--output-dir", output, "--resamples", "50").returncode == 0
    tab = browser.new_page()
    tab.goto((output / "evaluation.html").as_uri())
    words = "reference\nRome · Rome Town\nbase\nOslo\ntuned\nRome"
    assert [row[1] for row in shown(tab)] == [words] * 3
    tab.locator("#examples tr.open").first.click()
    for loss in ("3.00", "1.50"):
        assert f"loss of the reference {loss} nats per token, 2 tokens" in tab.locator(".detail").inner_text()
    assert tab.locator(".detail small").last.inner_text().endswith(", tokens of the answer 7")
    tab.locator("#examples tr.open").nth(1).click()
    assert tab.locator(".detail").nth(1).inner_text().count("nats per token") == 0
    tab.close()


def test_no_example_wins_by_a_score_of_which_neither_end_is_better(tab):
    tab.select_option("#outcome", "1")
    better = int(count(tab))
    tab.select_option("#metric", "length_ratio")
    assert tab.locator("#outcome").is_disabled() and count(tab) == "72" and 0 < better < 72
    tab.evaluate("lowerIsBetter.push('f1')")
    tab.select_option("#task", "trivia_qa")
    tab.select_option("#metric", "f1")
    tab.select_option("#outcome", "1")
    assert {row[4] for row in shown(tab)} == {"−100.0", "−3.0"}  # where lower is better


def test_a_group_of_few_examples_has_no_scores_on_the_page(tmp_path):
    rows = [example(i, "Oslo", "Rome", "Rome", answer_in_context=i >= 9) for i in range(19)]
    (tmp_path / "trivia_qa_predictions.json").write_text(json.dumps({"task": "trivia_qa", "examples": rows}))
    assert run("evaluations.py", "--output-dir", tmp_path, "--resamples", "50").returncode == 0
    text = (tmp_path / "evaluation.html").read_text()
    assert ">in the context, 10 examples<" in text and ">not in the context, 9" not in text
    assert "Questions whose answer is not in the context: 9, too few to show their scores." in text


def test_the_date_of_an_evaluation_is_in_its_title_and_its_numbers(tab, folder, monkeypatch):
    date = json.loads((folder / "evaluation.json").read_text())["date"]
    assert tab.title().endswith(f", {date}") and date in tab.locator("main > p").first.inner_text()
    for seconds, expected in (("0", "1970-01-01"), ("1764374400", "2025-11-29")):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", seconds)
        assert page.date_of_evaluation() == expected
    for nonsense in ("", "soon", "-1", "1" * 30):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", nonsense)
        assert page.date_of_evaluation() >= date


def test_another_score_can_be_shown_and_pages_turn_both_ways(tab):
    tab.select_option("#task", "samsum")
    tab.select_option("#metric", "exact_match")
    assert [row[3] for row in shown(tab)] == ["0.0"] + ["100.0"] * 11
    tab.select_option("#task", "")
    tab.click("#next")
    assert tab.locator("#where").inner_text() == "26 to 50 of 72"
    tab.click("#previous")
    assert tab.locator("#where").inner_text() == "1 to 25 of 72" and tab.locator("#previous").is_disabled()


def test_a_row_opens_to_prompt_references_and_predictions_with_the_differing_words_marked(tab):
    tab.select_option("#task", "samsum")
    row = tab.locator("#examples tr.open").first
    row.click()
    detail = tab.locator("#examples tr.detail")
    text = detail.inner_text()
    for part in ("samsum:0", "Dialogue:\nAnn: tea?", "Ann drinks tea.", "Bob runs.", "Ann drinks no tea."):
        assert part in text
    assert detail.locator("mark").all_inner_texts() == ["Bob", "runs.", "no"]  # what the reference lacks
    row.click()
    assert tab.locator("#examples tr.detail").count() == 0


def test_of_more_than_two_systems_any_can_be_held_against_the_first(browser, folder):
    """The page of base, tuned and a third system, as evaluations.py writes it."""
    source = folder / "samsum_predictions.json"
    rows = json.loads(source.read_text())
    for row in rows["examples"]:
        row["prediction"] = "Ann drinks tea."
    (folder / "third.json").write_text(json.dumps(rows))
    files = ["--predictions", source, f"a={folder / 'third.json'}", "--resamples", "50"]
    assert run("evaluations.py", *files, "--output-dir", folder / "three").returncode == 0
    tab = browser.new_page()
    tab.goto((folder / "three" / "evaluation.html").as_uri())
    first = tab.locator("#examples tr.open").first
    assert tab.locator("#examples thead th").count() == 6 and "no tea" in first.inner_text()
    assert len(tab.locator("table.scores").all()) == 2  # all systems in one
    assert tab.locator("#examples thead th").all_inner_texts()[2:5] == ["base", "tuned", "a"]
    tab.select_option("#other", "a")
    assert first.locator("td").all_inner_texts()[4:] == ["100.0", "+100.0"]
    assert first.locator(".snippet small").all_inner_texts() == ["reference", "base", "a"]
    tab.close()


def test_markup_in_a_prediction_prompt_id_or_setting_stays_text(tab):
    search(tab, "needle", "of 1")
    assert shown(tab)[0][1].endswith(f"needle {NASTY}")
    tab.locator("#examples tr.open").click()
    detail = tab.locator("#examples tr.detail").inner_text()
    assert detail.count(NASTY) >= 5  # id, prompt, references, base, tuned
    assert tab.title().startswith(f"Evaluation of {NASTY}, 20")
    assert tab.locator("script").count() == 2 and tab.locator("img").count() == 0
    assert NASTY in tab.locator("main").inner_text()  # the model


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_text_stands_out_in_both_colour_schemes(browser, folder, scheme):
    context = browser.new_context(color_scheme=scheme, viewport={"width": 360, "height": 740})
    tab = context.new_page()
    tab.goto((folder / "evaluation.html").as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth") == 360
    scrolls = (
        "tables => tables.filter(table => table.parentElement.scrollWidth > table.parentElement.clientWidth).length"
    )
    assert tab.locator("table.scores, #examples").evaluate_all(scrolls) == 0
    assert "visible from" in tab.locator("table.scores td[data-label='visible from']").first.evaluate(
        "cell => getComputedStyle(cell, '::before').content"
    )
    contrast = """() => {
      const light = c => {
        const v = c.match(/[0-9.]+/g).slice(0, 3).map(x => x / 255);
        const [r, g, b] = v.map(x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const page = light(getComputedStyle(document.body).backgroundColor);
      const parts = ["h1", ".soft", ".better", ".worse, .none", "figure svg text", "summary"];
      return parts.map(s => document.querySelector(s)).filter(e => e).map(e => {
        const s = getComputedStyle(e), t = light(e.tagName === "text" ? s.fill : s.color);
        return (Math.max(t, page) + 0.05) / (Math.min(t, page) + 0.05);
      });
    }"""
    ratios = tab.evaluate(contrast)
    assert len(ratios) == 6 and min(ratios) > 4.5  # WCAG AA
    context.close()


def test_every_number_of_the_tables_is_in_evaluation_json(tab, folder):
    report = json.loads((folder / "evaluation.json").read_text())
    base, tuned = tab.locator("main > .wide").nth(1).locator("tbody").first.locator("tr").all()
    base, cells = base.locator("td").all_inner_texts(), tuned.locator("td").all_inner_texts()
    test, task = report["trivia_qa"]["comparisons"]["tuned"]["exact_match"], report["trivia_qa"]
    assert base[1].split("\n")[0] == f"{task['base']['exact_match']:.2f}"
    assert cells[1].split("\n")[0] == f"{task['tuned']['exact_match']:.2f}"
    low, high = test["interval"]
    assert cells[2].split("\n") == [f"{test['difference']:+.2f}", f"{low:+.2f} to {high:+.2f}"]
    assert cells[5] == f"{test['wins']} / {test['ties']} / {test['losses']}"
    assert report["training"]["loss"] == {"loss": [[1, 2.0], [2, 1.0]], "eval_loss": [[2, 1.5]]}
    assert report["data"]["samsum"]["train"] == {"available": 9, "kept": 5, "also in test": 4}
    assert "4 also in test" in tab.locator("main").inner_text()
    assert "1.25" in tab.locator("main").inner_text() and report["training"]["facts"]["train_loss"] == 1.25


def test_the_file_needs_no_network_and_is_whole_without_a_browser(folder):
    page = (folder / "evaluation.html").read_text()
    assert page.rstrip().endswith("</html>") and NASTY not in page
    for outside in ("src=", "@import", "url(http", "<link", "fetch("):
        assert outside not in page.replace("img src=x", "")


@pytest.mark.parametrize("broken", ["", "[]", '{"settings": 3, "tasks": [1]}', "\x00"])
def test_notes_of_other_scripts_that_cannot_be_read_are_left_out(tmp_path, broken):
    content = {"task": "samsum", "examples": [{"id": "x", "references": ["a"], "prediction": "a"}]}
    content |= {"settings": {"adapter": ADAPTER[:16], "rows": "b" * 32}}
    (tmp_path / "samsum_predictions.json").write_text(json.dumps(content))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_model.safetensors").write_bytes(b"weights")
    for name in ("adapter/run.json", "adapter/log.jsonl", "dataset_report.json"):
        (tmp_path / name).write_text(broken)
    (tmp_path / "dataset" / "test").mkdir(parents=True)
    (tmp_path / "dataset" / "test" / "data-00000-of-00001.arrow").write_text(broken)
    result = run("evaluations.py", "--output-dir", tmp_path, "--resamples", "50")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert "What was trained" not in (tmp_path / "evaluation.html").read_text()


@pytest.mark.parametrize("rows", [{"id": [], "references": []}, {"id": ["x"], "references": [None]}, {"id": ["x"]}])
def test_a_data_set_that_is_empty_or_not_ours_gives_no_prompts(rows, tmp_path):
    from datasets import Dataset

    Dataset.from_dict(rows).save_to_disk(tmp_path / "dataset" / "test")
    content = {"task": "samsum", "examples": [{"id": "x", "references": ["a"], "prediction": "a"}]}
    (tmp_path / "samsum_predictions.json").write_text(json.dumps(content))
    result = run("evaluations.py", "--output-dir", tmp_path, "--resamples", "50")
    assert result.returncode == 0 and result.stderr == "", result.stderr


def test_prompts_come_from_the_data_set_where_the_predictions_have_none(dataset, tmp_path):
    from datasets import load_from_disk

    shutil.copytree(dataset / "dataset", tmp_path / "dataset")
    rows = [row for row in load_from_disk(str(dataset / "dataset"))["test"] if row["task"] == "trivia_qa"]
    examples = [{"id": row["id"], "references": row["references"], "prediction": "x"} for row in rows]
    path = tmp_path / "trivia_qa_predictions.json"
    own = rows[0]["references"]
    another_build = {"rows": "0" * 32}  # other contexts, the same questions and answers
    for references, settings, expected in ((own, {}, True), (["another"], {}, False), (own, another_build, False)):
        examples[0]["references"] = references
        path.write_text(json.dumps({"task": "trivia_qa", "examples": examples, "settings": settings}))
        assert run("evaluations.py", "--output-dir", tmp_path, "--resamples", "50").returncode == 0
        page = (tmp_path / "evaluation.html").read_text()
        assert ("Answer the question from the context" in page) == expected


def test_a_gain_stands_to_the_right_of_zero_in_the_figure(monkeypatch):
    monkeypatch.setattr(page, "draw", lambda caption, xlabel, ylabel, lines, first: lines)
    scores = {"base": {"f1": [0, 0, 50, 100]}, "tuned": {"f1": [100, 50, 50, 100]}}
    result = {"intervals": dict.fromkeys(scores), "examples": 4, "per_example": scores}
    (lines,) = page.draw_task(trivia_qa, result)
    edges, shares, _ = lines["tuned"]
    shares = {edge + 5: share for edge, share in zip(edges, shares[:-1], strict=False) if share}
    assert shares == {0: 50, 50: 25, 100: 25}


def test_a_figure_says_which_side_is_better(tab):
    assert "← worse · difference · better →" in tab.locator("figure svg").first.text_content()


def test_a_page_whose_figures_cannot_be_drawn_is_written_without_them(folder, tmp_path):
    (tmp_path / "matplotlibrc").write_bytes(b"\xff\xfe no text")
    given = [str(folder / f"{task}_predictions.json") for task in ("samsum", "trivia_qa")]
    arguments = ["--resamples", "100", "--output-dir", tmp_path / "out", "--predictions", *given]
    shells = {"MATPLOTLIBRC": str(tmp_path / "matplotlibrc")}, {"MPLBACKEND": "Qt4Agg"}
    for shell, drawn in zip(shells, (False, True), strict=True):
        result = run("evaluations.py", *arguments, **shell)
        assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
        assert result.stdout.count("warning: evaluation.html lacks figures") == (not drawn)
        text = (tmp_path / "out" / "evaluation.html").read_text()
        assert ("<svg" in text) == drawn and "Difference in" not in text or drawn
        assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["samsum"]["examples"] == 12


def test_the_template_stands_beside_the_script():
    assert (ROOT / "pipeline" / "scoring" / "evaluation.html.jinja").is_file()


def predictions_of(path, prediction, **changes):
    examples = [{"references": ["the cat sat on the mat"], "prediction": prediction}] * 5
    path.write_text(json.dumps({"task": "samsum", "examples": examples} | changes))
    return path


@pytest.mark.parametrize("name", ["_mine", "模型", "نموذج", "$x_1$", "<b>&"])
def test_every_system_is_in_the_legend_by_its_name_and_no_library_warns(name, tmp_path):
    base, other = predictions_of(tmp_path / "a.json", "a cat"), predictions_of(tmp_path / "b.json", "a dog")
    result = run("evaluations.py", "--resamples", 20, "--predictions", f"base={base}", f"{name}={other}", cwd=tmp_path)
    assert result.returncode == 0 and result.stderr == ""
    page = (tmp_path / "outputs" / "evaluation.html").read_text(encoding="utf-8")
    assert re.findall(r"<text[^>]*>([^<]*)</text>", page).count(html.escape(name, quote=False)) == 1


def test_no_path_of_this_machine_is_on_the_page(folder, tmp_path):
    output = tmp_path / "nobodys-business"
    shutil.copytree(folder, output)
    secret = f"{tmp_path}/nobodys-business/llama"
    run_json = json.loads((output / "adapter" / "run.json").read_text())
    run_json |= {"base_model": secret, "settings": {"model": secret, "output_dir": "../nobodys-business/out"}}
    (output / "adapter" / "run.json").write_text(json.dumps(run_json))
    for path in output.glob("*_predictions.json"):
        content = json.loads(path.read_text())
        content["settings"]["model"] = secret
        path.write_text(json.dumps(content))
    (output / "evaluation.html").unlink()
    given = [[], ["--predictions", output / "samsum_predictions.json", output / "trivia_qa_predictions.json"]]
    for arguments in given:
        result = run("evaluations.py", "--output-dir", output, "--resamples", 20, *arguments)
        assert result.returncode == 0 and result.stderr == ""
        page = (output / "evaluation.html").read_text(encoding="utf-8")
        assert "nobodys-business" not in page and str(tmp_path) not in page
        assert "<dd>llama</dd>" in page and "<code>samsum_predictions.json</code>" in page
        assert "Evaluation of llama" in page and "<code>out</code>" in page


def test_systems_called_by_numbers_keep_their_place(tmp_path):
    rows = [{"id": str(i), "references": ["a b"], "prediction": "a", "prompt": "p"} for i in range(3)]
    names = ("base", "7", "t@1", "t@0", "reference")
    (tmp_path / "rows.json").write_text(json.dumps({"task": "samsum", "examples": rows}))
    named = [f"{name}={tmp_path}/rows.json" for name in names]
    result = run("evaluations.py", "--predictions", *named, "--output-dir", tmp_path, "--resamples", "50")
    assert result.returncode == 0, result.stderr
    assert f"const systems = {json.dumps(names)}, first" in (tmp_path / "evaluation.html").read_text()
