"""A script's settings: its constants as flags, checked once."""

import argparse
import difflib
import inspect
import json
import os
import re
import sys
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.script import fail


def settings_of(module):
    """{name: comment, or ""} of the constants between `# Settings` and `# Fixed` of a script."""
    block = inspect.getsource(module).split("\n# Settings", 1)[1].split("\n# Fixed\n", 1)[0]
    return dict(re.findall(r"^([A-Z]\w+)\b[^=\n]*=(?:.*?  # (.*))?", block, re.MULTILINE))


def parse_settings(module, argv, choices):
    """A script's settings as a namespace; each is a flag, its value the default, its comment the help.

    choices: {setting: what it may be}: words, int, float, bool, None, list (of the words); above 0, and not empty,
    unless 0 is among them; a setting that is not there is a text. Exits 2 on anything else, in the block as well.
    """
    parser = argparse.ArgumentParser(
        description=(module.__doc__ or "").split("\n")[0],
        usage="%(prog)s [--setting value ...]",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    settings = settings_of(module)
    allowed = dict.fromkeys(settings, (str,)) | choices
    for name in allowed:
        if name not in settings:
            parser.error(f"{name} is missing from the settings: put its line back")
        value = getattr(module, name)
        options = {"default": value, "help": (settings[name] or " ").replace("%", "%%")}
        if value in ("", (), []):
            options["help"] += "%(default).0s"  # else argparse shows an empty default
        if bool in allowed[name]:
            options["action"] = argparse.BooleanOptionalAction
        elif list in allowed[name]:
            options["nargs"] = "+"
        parser.add_argument(flag_of(name), **options)
    argv = sys.argv[1:] if argv is None else argv
    refuse_values_of_booleans(parser, argv, [flag_of(name) for name in allowed if bool in allowed[name]])
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], list(map(flag_of, settings)), 1)
        hint = f"did you mean {near[0]}? " if near else ""
        parser.error(f"{unknown[0]} is no setting here: {hint}--help lists them all")
    if sys.flags.optimize > 1:
        parser.error("PYTHONOPTIMIZE=2 (python -OO) takes away what libraries read of themselves: unset it")
    for name, value in vars(args).items():
        kinds = allowed[name.upper()]
        try:
            setattr(args, name, checked(value, kinds))
        except (TypeError, ValueError):  # also what Python cannot convert
            number = "number from 0" if 0 in kinds else "number above 0"
            words = {int: f"a whole {number}", float: f"a {number}", bool: "True, False", str: "a text in UTF-8"}
            named = [str(words.get(kind, kind)) for kind in kinds if kind not in (0, list)]
            wanted = f"a list of {', '.join(named) or 'texts in UTF-8'}" if list in kinds else " or ".join(named)
            parser.error(f"{flag_of(name)} must be {wanted}, not {value!r}")
    if vars(args).get("output_dir") == "":
        parser.error("--output-dir must not be empty")
    return args


def refuse_values_of_booleans(parser, argv, flags):
    """Exit 2 where one of these flags is given True or False, and say what to write instead."""
    for word, following in pairwise([*argv, ""]):
        flag, _, value = word.partition("=")
        value = (value or following).lower()
        if flag in flags and value in ("true", "false"):
            instead = flag if value == "true" else flag.replace("--", "--no-", 1)
            parser.error(f"{flag} takes no value: write {instead}")


def checked(value, allowed):
    """What a flag's text or a constant of the settings means, as `choices` of parse_settings allow, or ValueError."""
    if list in allowed:
        known = set(allowed) <= {0, list} or set(value) <= set(allowed)
        good = isinstance(value, list | tuple) and (value or 0 in allowed) and known
        value = type(value)(map(str, value))
    elif isinstance(value, bool):
        good = bool in allowed
    elif isinstance(value, str | None) and value in allowed:
        good = True
    elif str in allowed:
        good, value = isinstance(value, str | int | Path), os.path.expanduser(str(value))  # no shell does --flag=~/x
    else:
        number = float(value)
        value = int(number) if int in allowed and number.is_integer() else number
        below = 2**31 if int in allowed else 1e100
        good = type(value) in allowed and 0 <= value < below and (value or 0 in allowed)
    if not good:
        raise ValueError
    json.dumps(value, ensure_ascii=False).encode()  # a file's name may have bytes that are no UTF-8: ValueError
    return value


def check_url(flag, url):
    """Exit 2 where `url` is no server's address, or one with a key in it."""
    try:
        address = urlsplit(url)
        host = address.hostname if address.port != 0 else None  # no number: ValueError
    except ValueError:
        host = None
    if not host or address.scheme not in ("http", "https") or "@" in address.netloc or address.query:
        fail(f"{flag} must be http(s)://host/path alone: the key comes from OPENAI_API_KEY")


def flag_of(name):
    return f"--{name.lower().replace('_', '-')}"
