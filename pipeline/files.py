"""Files and folders that appear whole or not at all, locks, manifests, and the data set in them."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.script import FULL, fail, first_line, is_main, say

MANIFEST = "whole.json"  # makes a folder count
HASH = re.compile("[0-9a-f]{16}")
CONTENTS = {  # names in an identity whose values are hashes: the words for a difference
    **dict.fromkeys(("train rows", "validation rows", "rows"), "the data set was built again"),
    **dict.fromkeys(("adapter", "adapter_sha256"), "the adapter is another one"),
    "adapter_config": "the adapter's configuration is another one",
    "weights": "the base's weights are others",
    "tokenizer": "the tokenizer or its chat template is another one",
    "chat_template": "the chat template is another one",  # in a test; in a training it is a setting
    "general_text": "the general text is another one",
}


def sha256(path):
    """Hexadecimal digest of a file, read in pieces: a model's shard need not fit into memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(text):
    """The first digits of a text's SHA-256, or "none" where there is no text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16] if text else "none"


def read_json(path):
    """The JSON object in a file; {} where there is none, or a broken one."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def hub_has_listed(snapshot):
    """Whether the hub has said which files a folder of its cache should have; it says so whenever it is reached."""
    return Path(snapshot, f"../../trees/{Path(snapshot).name}.json").exists()


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
    link, path = path, Path(path).resolve()
    old = path.with_name(f".{path.name}.old")
    if not path.parent.is_dir():
        fail(f"{link} is a link into {path.parent}, which is not there: mount that disk, or remove the link")
    if os.path.ismount(path):  # else the rename fails, after the work
        fail(f"{path} is a mount, which cannot be replaced: make it a link to a folder on that disk")
    if old.exists() and not path.exists():
        old.rename(path)
    shutil.rmtree(old, ignore_errors=True)
    if old.exists():  # then the rename would fail, after the work
        fail(f"{old}, which was left by an earlier run, cannot be removed: remove it yourself")
    return old


@contextmanager
def whole_folder(path):
    """A new folder beside `path` that takes its place when the block ends well, and goes when it does not."""
    path = Path(path).resolve()  # of a link, the target is replaced
    fresh, old = path.with_name(f".{path.name}.new"), put_back(path)
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
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


def remove_folder(path):
    """Remove a folder, or a link to one; what cannot be removed stays."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def make_folder(path):
    """Make a folder where there is none; of a link the target, but not what that is in: its disk may not be there."""
    if path.is_symlink():
        Path(os.path.realpath(path)).mkdir(exist_ok=True)
    else:
        path.mkdir(parents=True, exist_ok=True)


@contextmanager
def only_run_in(folder):
    """Make `folder` if need be and lock it for this run; exits 2 where another run has it. A kill leaves no lock."""
    folder = Path(folder)
    make_folder(folder)
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
    """The command that has locked an open file, as Linux lists it."""
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


def refuse_another(what, old, new, remedy, resume=""):
    """Exit 2 where two identities (flat dicts) differ, with every difference by name.

    resume: what can be done, beside the remedy, where settings alone differ, or the model that one of them names.
    """
    old = old if isinstance(old, dict) else {}
    contents, settings = {}, []  # contents in the order they were found, each once
    for name in [name for name in new if old.get(name) != new[name]]:
        before, now = old.get(name, "unknown"), new[name]
        if name in CONTENTS and HASH.search(f"{before}") and HASH.search(f"{now}"):
            contents[CONTENTS[name]] = True
        else:
            settings.append(f"{name.replace('_', ' ')} {before} there, {now} now")
    if contents or settings:
        remedy = remedy if contents and old.get("model") == new.get("model") else resume + remedy
        fail(f"{what} is of another run ({'; '.join([*contents, *settings])}): {remedy}")


def load_rows(output_dir, split):
    """One split of OUTPUT_DIR/dataset as a datasets.Dataset; exits 2 where it is missing, broken, empty or foreign."""
    from datasets import List, Value, disable_caching, disable_progress_bars, load_from_disk

    disable_progress_bars()
    disable_caching()  # else the tokens of every run stay behind in dataset/
    text, folder = Value("string"), Path(output_dir) / "dataset"
    columns = {"id": text, "task": text, "prompt": text, "completion": text, "references": List(text)}
    if not folder.is_dir():
        fail(f"no dataset at {folder}: run build_dataset.py first")
    try:
        rows = load_from_disk(str(folder / split))
        # load_from_disk hashes it once more; dataset_report.json has the one that was written
        rows._fingerprint = json.loads((folder / split / "state.json").read_text())["_fingerprint"]
        missing = [name for name, kind in columns.items() if rows.features.get(name) != kind]
        missing = missing or [name for name in columns if rows.data.column(name).null_count]
    except IndexError:  # how datasets reads back a split that was saved without rows
        fail(f"{split} of {folder} is empty: run build_dataset.py with more examples")
    except Exception as error:  # whatever the libraries raise, the folder is not a whole data set
        fail(f"cannot read {split} of {folder} ({first_line(error)}): run build_dataset.py again")
    if missing:
        fail(f"{split} of {folder} has no column {', '.join(missing)}, or not as text: run build_dataset.py again")
    return rows


def rows_of(rows, task):
    return rows.filter(lambda name: name == task, input_columns="task")


def built_tasks(output_dir, tasks, noted=None):
    """{task: {"prompt": its template, "one_line": whether an answer ends at its line's end}} as the rows were built.

    tasks: {name: module}, for a data set that does not say. noted: what an adapter's run.json says of its own.
    """
    written = noted or read_json(Path(output_dir) / "dataset" / "tasks.json")
    now = {name: {"prompt": task.PROMPT, "one_line": task.ONE_LINE} for name, task in tasks.items()}
    built = {name: written.get(name, now[name]) for name in tasks}
    for name, how in built.items():
        if not isinstance(how, dict) or not (type(how.get("prompt")) is str and type(how.get("one_line")) is bool):
            remedy = "run build_dataset.py again, and train_llama.py where an adapter names it"
            fail(f"cannot use the prompt of {name} that the data set or the adapter names: {remedy}")
    return built
