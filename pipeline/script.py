"""What every script does the same way: sentences, progress, one sentence where the machine ends a run."""

import errno
import functools
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MEMORY_ENDS = r"(out of|not enough|allocate) memory|bad_alloc|map segment|start new thread|global thread pool"
MEMORY_ENDS = re.compile(MEMORY_ENDS, re.IGNORECASE)
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")  # torchrun's, and all are numbers
LAUNCHER = re.compile(r"(LOCAL_)?(RANK|WORLD_SIZE)|(PMI|(OMPI|MV2)_COMM_WORLD)_(RANK|SIZE)")  # that accelerate reads
SEVERAL = ("train_llama.py", "test_llama.py")  # scripts that may be several processes


def settle_environment(script):
    """Make sound what libraries read of the shell; exits 2 where that names processes that no launcher started."""
    os.environ["MPLBACKEND"] = "agg"  # no window; a notebook's shell names a backend that is not installed here
    os.environ.pop("LOGLEVEL", None)  # common, and torch knows no other level than those in capitals
    found = {name: value for name, value in os.environ.items() if LAUNCHER.fullmatch(name)}
    sizes = [name for name, value in found.items() if "SIZE" in name and value.strip() not in ("", "-1", "1")]
    try:  # whether all is there that torchrun and its like set, and makes sense
        environment = {"LOCAL_WORLD_SIZE": 1} | os.environ
        numbers = {name: int(environment[name]) for name in LAUNCHED}
        size = numbers["WORLD_SIZE"]
        launched = "MASTER_ADDR" in os.environ and 0 <= numbers["RANK"] < size and 0 <= numbers["LOCAL_RANK"] < size
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


def duration(seconds):
    """As hours, minutes and seconds; no more than timedelta holds."""
    return str(timedelta(seconds=round(min(seconds, 1e13))))


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


def table(rows):
    """Print a table: rows of as many texts each, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        line = name.ljust(widths[0])
        for cell, width in zip(cells, widths[1:], strict=True):
            line += "  " + cell.rjust(width)
        say(line.rstrip())


class Lines(tqdm):
    """A progress bar that prints lines: for a file, which nobody watches."""

    monitor_interval = 0  # no thread that would draw in between

    def display(self, msg=None, pos=None):
        if msg is None:  # else tqdm wipes the bar away
            with suppress(OSError):
                print(self, file=sys.stderr, flush=True)


def progress(iterable=None, desc=None, total=None, **kwargs):
    """tqdm of the main process: a bar on a terminal, else a line, at most every minute; none over a single item."""
    if total is None:
        total = len(iterable)
    kwargs |= {"disable": not is_main() or total == 1, "leave": False}
    if sys.stderr.isatty():
        return tqdm(iterable, desc, total, **kwargs)
    return Lines(iterable, desc, total, file=io.StringIO(), mininterval=60, delay=60, miniters=1, **kwargs)


def fail(message, in_any_process=False):
    """Print one sentence on stderr and exit with code 2. in_any_process: one of several may be alone in it."""
    error = sys.exc_info()[1]
    if out_of_memory(error) and "memory" not in message:  # the caller took it for something else
        raise error
    if in_any_process or is_main():
        with suppress(OSError):
            print(f"error: {message}", file=sys.stderr, flush=True)
    else:  # a launcher ends all processes with the first that ends: let the main one speak before
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))
        time.sleep(5)
    raise SystemExit(2)


def first_line(error):
    """An exception's first line; a heading, which ends in a colon, goes with the line below it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 1 + lines[0].endswith(":")])[:200]


def why_no_download(error):
    """Why a hub repository's files did not come, for a person."""
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    token = f", for which see to your token ({command('hf')} auth login)"
    if type(error) is RepositoryNotFoundError:  # a gated one's is a class below
        return f"the hub has none of that name, or it is private{token}"
    cause = error.__cause__ or error
    reason, response = first_line(cause), getattr(cause, "response", None)
    if response is not None:
        words = response.headers.get("X-Error-Message", "").rstrip(".")
        reason = f"the hub answers {response.status_code}, {words}" if words else reason
        reason += token if response.status_code in (401, 403) else ""
    if not isinstance(error, LocalEntryNotFoundError):
        return reason
    if response is None:
        reason = f"the hub cannot be reached: {reason}"
    if constants.HF_HUB_OFFLINE:
        reason = "the variable HF_HUB_OFFLINE is set, so the hub is not asked"
    return f"{reason}; and not all of its files are in the hub's cache"


def out_of_memory(error):
    """Whether an exception says that memory has ended, a GPU's or the host's: most libraries have no class for it."""
    of_rust = type(error).__name__ in ("SafetensorError", "PanicException")
    local = isinstance(error, RuntimeError | ImportError | OSError) or of_rust
    return isinstance(error, MemoryError) or (local and bool(MEMORY_ENDS.search(str(error))))  # no server's memory


def script(main):
    """Decorator of a script's main: what the machine does to it (Ctrl-C, a full disk) ends in one sentence, too."""

    @functools.wraps(main)
    def wrapped(argv=None):
        sys.stderr = sys.stderr or io.StringIO()  # closed
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError, ValueError):  # a stream that a test or a notebook put there
                stream.reconfigure(errors="replace", line_buffering=True)  # a terminal that is not UTF-8
        settle_environment(Path(main.__code__.co_filename).name)
        try:
            return main(argv)
        except KeyboardInterrupt:
            kept = "older results and what this run has saved are kept"
            print(f"\ninterrupted: {kept}; give the same command again", file=sys.stderr)
            raise SystemExit(130) from None
        except BaseException as error:  # a PanicException of Rust is no Exception
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


def command(name):
    """What calls a program of this Python's environment from here: its name alone where the shell finds the same."""
    path = Path(sys.executable).with_name(name)
    if shutil.which(name) == str(path):
        return name
    here = os.path.relpath(path)
    return shlex.quote(str(path) if here.startswith("..") else here)


def versions(*packages):
    return {name: version(name) for name in packages} | {"python": sys.version.split()[0]}


def git_commit():
    """The commit of the scripts' repository, or None where there is none."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "--verify", "HEAD"]
    with suppress(OSError):  # no git
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
