"""What every script does the same way: settings, errors, whole files, words of a text. Imports nothing heavy."""

import argparse
import errno
import fcntl
import functools
import hashlib
import inspect
import io
import json
import math
import os
import re
import shutil
import signal
import string
import subprocess
import sys
import time
import unicodedata
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

MANIFEST = "whole.json"  # makes a folder count
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MEMORY_ENDS = re.compile(r"(out of|not enough|allocate) memory|bad_alloc|map segment|start new thread", re.IGNORECASE)
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")  # torchrun's, and all are numbers
LAUNCHER = re.compile(r"(LOCAL_)?(RANK|WORLD_SIZE)|(PMI|(OMPI|MV2)_COMM_WORLD)_(RANK|SIZE)")  # that accelerate reads
SEVERAL = ("train_llama.py", "test_llama.py")  # scripts that may be several processes
TASKS = ("samsum", "trivia_qa")
WITHOUT_BLANKS = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")  # begin of characters' names
PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "‘’´`", " "))


def settings_of(module):
    """{name: comment, or ""} of the constants between `# Settings` and `# Fixed` of a script."""
    block = inspect.getsource(module).split("\n# Settings", 1)[1].split("\n# Fixed\n", 1)[0]
    return dict(re.findall(r"^([A-Z]\w+)\b[^=\n]*=(?:.*?  # (.*))?", block, re.MULTILINE))


def parse_settings(module, argv=None, choices=None):
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
    choices = dict.fromkeys(settings, (str,)) | (choices or {})
    for name in choices:
        if name not in settings:
            parser.error(f"{name} is missing from the settings: put its line back")
        value = getattr(module, name)
        options = {"default": value, "help": (settings[name] or " ").replace("%", "%%")}
        if value in ("", (), []):
            options["help"] += "%(default).0s"  # else argparse tells an empty default
        if bool in choices[name]:
            options["action"] = argparse.BooleanOptionalAction
        elif list in choices[name]:
            options["nargs"] = "+"
        parser.add_argument(flag_of(name), **options)
    args = parser.parse_args(argv)
    if sys.flags.optimize > 1:
        parser.error("PYTHONOPTIMIZE=2 (python -OO) takes away what libraries read of themselves: unset it")
    for name, value in vars(args).items():
        allowed = choices[name.upper()]
        try:
            setattr(args, name, checked(value, allowed))
        except (TypeError, ValueError):  # also what Python cannot convert
            number = "number from 0" if 0 in allowed else "number above 0"
            words = {int: f"a whole {number}", float: f"a {number}", bool: "True, False", str: "a text in UTF-8"}
            kinds = [str(words.get(one, one)) for one in allowed if one not in (0, list)]
            wanted = f"a list of {', '.join(kinds) or 'texts in UTF-8'}" if list in allowed else " or ".join(kinds)
            parser.error(f"{flag_of(name)} must be {wanted}, not {value!r}")
    if vars(args).get("output_dir") == "":
        parser.error("--output-dir must not be empty")
    return args


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
        good, value = isinstance(value, str | int | Path), str(value)
    else:
        number = float(value)
        value = int(number) if int in allowed and number.is_integer() else number
        below = 2**31 if int in allowed else math.inf
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


def settle_environment(script):
    """Make sound what libraries read of the shell; exits 2 where that names processes that no launcher started."""
    os.environ["MPLBACKEND"] = "agg"  # no window; a notebook's shell names a backend that is not installed here
    found = {name: value for name, value in os.environ.items() if LAUNCHER.fullmatch(name)}
    sizes = [name for name, value in found.items() if "SIZE" in name and value.strip() not in ("", "-1", "1")]
    try:  # whether all is there that torchrun and its like set, and makes sense
        numbers = {"LOCAL_WORLD_SIZE": 1} | os.environ
        rank, local_rank, size, _, _ = (int(numbers[name]) for name in LAUNCHED)
        launched = "MASTER_ADDR" in os.environ and 0 <= rank < size and 0 <= local_rank < size
        launched &= size > 1 or "TORCHELASTIC_RUN_ID" in os.environ  # else it is alone: no meeting
    except (KeyError, ValueError):
        launched = False
    if sizes and not launched:
        remedy = f"unset {' '.join(found)}, or start the script with torchrun or accelerate launch"
        reason = f"the environment speaks of several processes ({', '.join(sizes)}), but not as a launcher does"
        fail(f"{reason}: {remedy}", in_any_process=True)
    if "WORLD_SIZE" in sizes and script not in SEVERAL:
        fail(f"{script} is one process: start it with python, not with torchrun or accelerate launch")
    if "WORLD_SIZE" in sizes and "TORCHELASTIC_RUN_ID" not in os.environ:  # by hand: it may wait without a word
        waiting = "process {RANK} of {WORLD_SIZE} waits for the others at {MASTER_ADDR}:{MASTER_PORT}"
        print(waiting.format_map(os.environ), file=sys.stderr)
    for name in [name for name in os.environ if name.startswith("ACCELERATE_") or name in found]:
        if not launched or name not in (*found, "ACCELERATE_USE_FSDP"):
            del os.environ[name]  # the scripts choose types and devices, whatever `accelerate config` was given


def is_main():
    """Whether this process is the only one or the first of several: it alone prints and writes."""
    return int(os.environ.get("RANK", 0)) == 0


def say(message=""):
    """Print on the main process; a reader that went away (`| head`, a closed terminal) ends no run."""
    if is_main():
        try:
            print(message, flush=True)
        except OSError:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115


class Lines(tqdm):
    """A progress bar that prints lines: for a file, which nobody watches."""

    monitor_interval = 0  # no thread that would draw in between

    def display(self, msg=None, pos=None):
        if msg is None:  # else tqdm wipes the bar away
            with suppress(OSError):
                print(self, file=sys.stderr, flush=True)


def progress(*args, **kwargs):
    """tqdm of the main process: a bar on a terminal, else a line, at most every minute."""
    kwargs |= {"disable": not is_main(), "leave": False}
    if sys.stderr.isatty():
        return tqdm(*args, **kwargs)
    return Lines(*args, file=io.StringIO(), mininterval=60, delay=60, miniters=1, **kwargs)


def fail(message, in_any_process=False):
    """Print one sentence on stderr and exit with code 2. in_any_process: one of several may be alone in it."""
    error = sys.exc_info()[1]
    if out_of_memory(error) and "memory" not in message:  # the caller took it for something else
        raise error
    if in_any_process or is_main():
        print(f"error: {message}", file=sys.stderr, flush=True)
    else:  # a launcher ends all processes with the first that ends: let the main one speak before
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))
        time.sleep(5)
    raise SystemExit(2)


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def out_of_memory(error):
    """Whether an exception says that memory has ended, a GPU's or the host's: most libraries have no class for it."""
    local = isinstance(error, RuntimeError | ImportError | OSError) or type(error).__name__ == "SafetensorError"
    return isinstance(error, MemoryError) or (local and bool(MEMORY_ENDS.search(str(error))))  # no server's memory


def script(main):
    """Decorator of a script's main: what the machine does to it (Ctrl-C, a full disk) ends in one sentence, too."""

    @functools.wraps(main)
    def wrapped(argv=None):
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError, ValueError):  # a stream that a test or a notebook put there
                stream.reconfigure(errors="replace", line_buffering=True)  # a terminal that is not UTF-8
        settle_environment(Path(main.__code__.co_filename).name)
        try:
            return main(argv)
        except KeyboardInterrupt:
            print("\ninterrupted: what stood there before still stands; the same command goes on", file=sys.stderr)
            raise SystemExit(130) from None
        except Exception as error:
            if out_of_memory(error):
                whose, remedy = "machine", "raise its limit (ulimit -v, a container's), or take a smaller model"
                if "CUDA" in str(error):
                    whose, remedy = "GPU", 'hide it (CUDA_VISIBLE_DEVICES="") to work on the CPU'
                reason = f"the {whose}'s memory is too small ({first_line(error)})"
                fail(f"{reason}: end what else runs there, or {remedy}", in_any_process=True)
            if not isinstance(error, OSError):
                raise
            where = f"{error.filename2 or error.filename}: " if error.filename else ""
            remedy = "make room" if error.errno in FULL else "see to that, or give another --output-dir"
            reason = f"{where}{error.strerror or first_line(error)}"
            fail(f"cannot go on ({reason}): {remedy}, then give the same command again", in_any_process=True)

    return wrapped


def sha256(path):
    """Hexadecimal digest of a file, read in pieces: a model's shard need not fit into memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path):
    """The JSON object in a file; {} where there is none, or a broken one."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def sync(path):
    """Have a file on the disk before it counts; returns whether its mount knows how."""
    with path.open("rb") as file:
        try:
            os.fsync(file.fileno())
            return True
        except OSError as error:
            if error.errno in (*FULL, errno.EIO):
                raise
            return False


def write_whole(path, text):
    """Write a text file beside its place, then rename it: it appears whole or not at all."""
    path = Path(path).resolve()
    beside = path.with_name(f".{path.name}.new")
    try:
        beside.write_text(text, encoding="utf-8")
        sync(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def put_back(path):
    """Give a folder its name back if a kill left it beside its place, or remove it there; returns that place."""
    path = Path(path).resolve()
    old = path.with_name(f".{path.name}.old")
    if os.path.ismount(path):  # else the rename fails, after the work
        fail(f"{path} is a mount, which cannot be replaced: make it a link to a folder on that disk")
    if old.exists() and not path.exists():
        old.rename(path)
    shutil.rmtree(old, ignore_errors=True)
    return old


@contextmanager
def whole_folder(path):
    """A new folder beside `path` that takes its place when the block ends well, and goes when it does not."""
    path = Path(path).resolve()  # of a link, the target is replaced
    fresh, old = path.with_name(f".{path.name}.new"), put_back(path)
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        yield fresh
        for file in filter(Path.is_file, fresh.rglob("*")):  # on the disk before the folder gets its name
            sync(file)
        if path.exists():
            path.rename(old)  # a kill here leaves it beside its place: the next call puts it back
        fresh.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


@contextmanager
def only_run_in(folder):
    """Make `folder` if need be and lock it for this run; exits 2 where another run has it. A kill leaves no lock."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    handle, missing = os.open(folder, os.O_RDONLY), []
    try:
        try:
            if is_main():
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"{folder} is in use by {holder_of(handle)}: wait for it, or give another --output-dir")
        except OSError:  # a mount that has none; which number it gives differs
            missing.append("locks")
        if is_main():
            with whole_folder(folder / ".probe") as fresh:  # what cannot be done fails now, not after the work
                (fresh / "file").touch()
                if not sync(fresh / "file"):
                    missing.append("fsync")
            shutil.rmtree(folder / ".probe")  # what a kill leaves of it, the next run removes
        if missing:
            risk = "start no second run there, and give a command again that a crash of the machine ended"
            say(f"warning: the file system of {folder} has no {' and no '.join(missing)}: {risk}")
        yield
    finally:
        os.close(handle)


def holder_of(handle):
    """The command that holds the lock on an open file, as Linux tells it."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/locks").read_text().splitlines():
            process, inode = line.split()[4:6]
            if inode.endswith(f":{os.fstat(handle).st_ino}"):
                command = Path(f"/proc/{process}/cmdline").read_text().split("\0")
                name = next((Path(word).name for word in command if word.endswith(".py")), command[0])
                return f"{name} (process {process})"
    return "another run"


def write_manifest(folder, content):
    """Write MANIFEST into a folder, last: `content`, and the SHA-256 of every file that is there."""
    files = {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}
    write_whole(folder / MANIFEST, json.dumps(content | {"sha256": files}, indent=1) + "\n")


def read_manifest(folder):
    """The manifest of a folder, {} where there is none, and the names of files that are not what it says they are."""
    manifest = read_json(folder / MANIFEST)
    try:
        return manifest, [name for name, digest in manifest["sha256"].items() if sha256(folder / name) != digest]
    except (OSError, KeyError, TypeError, AttributeError):
        return {}, ["unfinished"]


def refuse_another(what, old, new, remedy):
    """Exit 2 where two identities (flat dicts) differ, with every difference by name."""
    changed = [name for name in new if old.get(name) != new[name]]
    differences = [f"{name.replace('_', ' ')} {old.get(name, 'unknown')} there, {new[name]} now" for name in changed]
    if differences:
        fail(f"{what} is of another run ({'; '.join(differences)}): {remedy}")


def versions(*packages):
    return {name: version(name) for name in packages} | {"python": sys.version.split()[0]}


def git_commit():
    """The commit of the scripts' repository, or None where there is none."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "--verify", "HEAD"]
    with suppress(OSError):  # no git
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


@functools.cache  # every metric asks for the same texts
def normalize_answer(text):
    """The official TriviaQA normalisation: `_` and punctuation become blanks, lower case, no a/an/the, single blanks.

    Source: github.com/mandarjoshi90/triviaqa, evaluation/triviaqa_evaluation.py. Punctuation is ASCII's and ‘ ’ ´ `:
    “ ” and dashes stay. SQuAD's rules differ: they delete punctuation ("Spider-Man" is "spider man" here).
    """
    text = text.replace("_", " ").lower().translate(PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


normalized = normalize_answer.__wrapped__  # past its cache, which would keep every context in memory


class WordTable(dict):
    """For str.translate: what is no letter, digit or mark ends a word; full-width forms become the plain ones."""

    def __missing__(self, code):
        char = unicodedata.normalize("NFKC", chr(code)) if 0xFF00 < code < 0xFFA0 else chr(code)
        kind, name = unicodedata.category(char), unicodedata.name(char, "")
        if kind == "Me" or (kind == "Cf" and name != "ZERO WIDTH SPACE") or name.startswith("VARIATION SELECTOR"):
            self[code] = ""  # invisible inside a word
        elif kind[0] not in "LNM":
            self[code] = " "
        else:  # where a script has no blanks between words, every character is a word
            self[code] = f" {char} " if kind[0] != "N" and name.startswith(WITHOUT_BLANKS) else char
        return self[code]


WORDS = WordTable()


def words_of(text):
    """The words of a text in any script, a blank between them: no punctuation, no case, no a/an/the."""
    words = unicodedata.normalize("NFC", text).casefold().translate(WORDS).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def holds(text, answers):
    """Whether one of the answers stands in a text as whole words in a row; one without a word stands nowhere."""
    text = f" {words_of(text)} "
    return any(f" {words} " in text for words in map(words_of, answers) if words)
