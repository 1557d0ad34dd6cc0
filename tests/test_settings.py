"""A script's settings: edited in the block or given as flags, they are meant, or refused in one sentence."""

from types import ModuleType

import pytest

from pipeline.settings import parse_settings

BLOCK = '''"""A script.

More of it.
"""

# Settings: edit here
LIMIT = 3  # rows; 50 % of them
RATE = 0.5
STEPS = 10  # of warming up; 0 = none
SEED = 0
NAMES = ["a"]  # some of a, b
FLAG = False
MODE = None  # True, False; None: as it comes

# Fixed
OTHER = 1
'''
CHOICES = {"LIMIT": (int,), "RATE": (float,), "STEPS": (0, int), "SEED": (0, int), "NAMES": (list, "a", "b")}
CHOICES |= {"FLAG": (bool,), "MODE": (bool, None)}


def module_of(path, text):
    path.write_text(text)
    module = ModuleType(path.stem)
    module.__file__ = str(path)
    exec(compile(text, path, "exec"), vars(module))
    return module


@pytest.fixture
def module(tmp_path):
    """The script BLOCK as a module."""
    return module_of(tmp_path / "block.py", BLOCK)


EDITED = {  # a line of the settings, what it is edited to, a flag, the settings that come of it
    "a whole number for a number": ("RATE = 0.5", "RATE = 3", "--rate=3.5", {"rate": 3}, {"rate": 3.5}),
    "a number for a whole one": ("LIMIT = 3", "LIMIT = 1e3", "--limit=7", {"limit": 1000}, {"limit": 7}),
    "0 with another comment": (
        "STEPS = 10  # of warming up; 0 = none",
        "STEPS = 0  # no",
        "--steps=0",
        {"steps": 0},
        {},
    ),
    "0 without a comment": (
        "STEPS = 10  # of warming up; 0 = none",
        "STEPS = 0",
        "--steps=2",
        {"steps": 0},
        {"steps": 2},
    ),
    "a number in quotes": ("LIMIT = 3", 'LIMIT = "4"', "--limit=5", {"limit": 4}, {"limit": 5}),
    "a tuple for a list": (
        'NAMES = ["a"]',
        'NAMES = ("a", "b")',
        "--names=b",
        {"names": ("a", "b")},
        {"names": ["b"]},
    ),
    "several lines": (
        '["a"]',
        '[  # one\n    "a",\n    "b",\n]',
        "--names=a",
        {"names": ["a", "b"]},
        {"names": ["a"]},
    ),
    "an annotation": ("RATE = 0.5", "RATE: float = 0.25", "--rate=2", {"rate": 0.25}, {"rate": 2}),
    "other blanks": ("SEED = 0", "SEED=7 #%s of 100 %", "--seed=0", {"seed": 7}, {"seed": 0}),
    "a # in a text": ("SEED = 0", 'SEED = 0\nDIR = "a  # b"', "--dir=# 1", {"dir": "a  # b"}, {"dir": "# 1"}),
    "a comment that begins like the end": (
        "SEED = 0",
        "# Fixed seed of the paper\nSEED = 5",
        "--seed=6",
        {"seed": 5},
        {"seed": 6},
    ),
    "a path": ("SEED = 0", 'SEED = 0\nDIR = __import__("pathlib").Path("a")', "--dir=2", {"dir": "a"}, {"dir": "2"}),
}


@pytest.mark.parametrize(("line", "edited", "flag", "then", "given"), EDITED.values(), ids=EDITED.keys())
def test_a_setting_edited_in_any_way_python_allows_is_meant_as_it_was(
    line, edited, flag, then, given, tmp_path, capsys
):
    assert line in BLOCK
    module = module_of(tmp_path / "edited.py", BLOCK.replace(line, edited))
    plain = parse(module)
    assert {name: plain[name] for name in then} == then
    assert plain | then | given == parse(module, flag)
    with pytest.raises(SystemExit, match="0"):
        parse(module, "--help")


def test_a_tilde_behind_a_flag_is_the_home_which_no_shell_writes_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    module = module_of(tmp_path / "edited.py", BLOCK.replace("SEED = 0", 'SEED = 0\nDIR = "~/a"'))
    assert parse(module)["dir"] == "/home/me/a" and parse(module, "--dir=~/b")["dir"] == "/home/me/b"
    assert parse(module, "--dir=a~/b")["dir"] == "a~/b"


WRONG = ["LIMIT = 2.5", "LIMIT = True", "LIMIT = None", "LIMIT = 0  # 0 = none", 'LIMIT = "many"', 'FLAG = "False"']
WRONG += [
    "RATE = [1]",
    'NAMES = "a"',
    "NAMES = []",
    "NAMES = None",
    "MODE = 3",
    "SEED = -1",
    "STEPS = []",
    "STEPS = False",
]


@pytest.mark.parametrize("edited", WRONG)
def test_a_setting_edited_to_what_it_cannot_be_is_refused_in_one_sentence(edited, tmp_path, capsys):
    name = edited.split(" =")[0]
    text = "".join(f"{edited}\n" if line.startswith(f"{name} =") else f"{line}\n" for line in BLOCK.splitlines())
    with pytest.raises(SystemExit, match="2"):
        parse(module_of(tmp_path / "edited.py", text))
    assert f"error: --{name.lower()} must be " in capsys.readouterr().err


SAID = {  # a setting's choices, what it is edited to, what the sentence says that it must be
    "None for a text": ((str,), None, "must be a text in UTF-8, not None"),
    "a text for a list of words": ((list, "a", "b"), "a", "must be a list of a, b, not 'a'"),
    "a text for a list": ((list,), "a", "must be a list of texts in UTF-8, not 'a'"),
    "no texts": ((list,), [], "must be a list of texts in UTF-8, not []"),
    "half a character": ((str,), "e\udce9", "must be a text in UTF-8, not 'e\\udce9'"),
    "half a character in a list": ((0, list), ["e\udce9"], "must be a list of texts in UTF-8, not ['e\\udce9']"),
}


@pytest.mark.parametrize(("allowed", "value", "message"), SAID.values(), ids=SAID.keys())
def test_a_setting_that_cannot_be_meant_is_refused_in_plain_words(allowed, value, message, module, capsys):
    module.NAMES = value
    with pytest.raises(SystemExit, match="2"):
        parse_settings(module, [], {**CHOICES, "NAMES": allowed})
    assert f"error: --names {message}\n" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["LIMIT = 3", "SEED = 0", "FLAG = False"])
def test_a_setting_that_was_taken_out_of_the_block_is_missing_in_one_sentence(line, tmp_path, capsys):
    module = module_of(tmp_path / "edited.py", BLOCK.replace(line, f"# {line}"))
    with pytest.raises(SystemExit, match="2"):
        parse(module)
    name = line.split(" =")[0]
    assert f"error: {name} is missing from the settings: put its line back" in capsys.readouterr().err


def test_a_list_that_may_be_empty_says_so_with_a_0(module):
    module.NAMES = []
    assert parse_settings(module, [], CHOICES | {"NAMES": (0, list)}).names == []


def parse(module, *argv):
    return vars(parse_settings(module, argv, choices=CHOICES))


def test_flags_come_from_the_settings_block_and_nothing_else(module, capsys):
    assert parse(module) == {
        "limit": 3,
        "rate": 0.5,
        "steps": 10,
        "seed": 0,
        "names": ["a"],
        "flag": False,
        "mode": None,
    }
    argv = ["--limit", "7", "--rate", "1e-3", "--steps", "0", "--names", "a", "b", "--flag", "--no-mode"]
    assert parse(module, *argv) == {
        "limit": 7,
        "rate": 0.001,
        "steps": 0,
        "seed": 0,
        "names": ["a", "b"],
        "flag": True,
        "mode": False,
    }
    with pytest.raises(SystemExit):
        parse(module, "--help")
    shown = capsys.readouterr().out
    assert "rows; 50 % of them (default: 3)" in shown and "A script." in shown and "--other" not in shown


BAD = [["--limit", "0"], ["--limit", "-1"], ["--limit", "2.5"], ["--limit", "99999999999"], ["--rate", "nan"],
       ["--rate", "inf"], ["--rate", "1e100"],
    ["--rate", "-0.1"], ["--rate", "0"], ["--names", "a", "c"], ["--lim", "3"], ["--other", "2"]]  # fmt: skip


@pytest.mark.parametrize("argv", BAD)
def test_values_that_cannot_be_meant_are_refused(argv, module, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(module, *argv)
    assert stopped.value.code == 2 and argv[0] in capsys.readouterr().err


@pytest.mark.parametrize("name, value", [("NAMES", ["a", "x"]), ("LIMIT", 0), ("RATE", 0.0), ("LIMIT", -1)])
def test_a_constant_edited_to_a_value_that_cannot_be_meant_is_refused_too(name, value, module, capsys):
    setattr(module, name, value)
    with pytest.raises(SystemExit):
        parse(module)
    assert f"--{name.lower()} must be " in capsys.readouterr().err


def test_a_constant_edited_to_none_is_refused_where_none_means_nothing(module, capsys):
    module.RATE = None
    with pytest.raises(SystemExit) as stopped:
        parse(module)
    assert stopped.value.code == 2 and "--rate must be a number above 0, not None" in capsys.readouterr().err


def test_a_setting_may_be_a_word_or_a_number(module, capsys):
    def parse(*argv):
        return parse_settings(module, argv, choices=CHOICES | {"SIZE": ("auto", float)}).size

    path, module.SIZE = module.__file__, "auto"
    with open(path) as file:
        text = file.read().replace("SEED = 0", 'SIZE = "auto"\nSEED = 0')
    with open(path, "w") as file:
        file.write(text)
    assert parse() == "auto" and parse("--size", "2") == 2.0 and parse("--size", "3e9") == 3e9
    module.SIZE = 5e-4  # edited
    assert parse() == 5e-4 and parse("--size", "auto") == "auto"
    module.SIZE = 0.0
    with pytest.raises(SystemExit):
        parse()
    assert "--size must be auto or a number above 0, not 0.0" in capsys.readouterr().err
    for wrong in ("fast", "0", "-1", "nan", "inf"):
        with pytest.raises(SystemExit):
            parse("--size", wrong)
        assert "--size must be" in capsys.readouterr().err
    module.SIZE = "fast"
    with pytest.raises(SystemExit):
        parse()
    assert "--size must be auto or a number above 0, not 'fast'" in capsys.readouterr().err
