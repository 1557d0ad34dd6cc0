"""merge_llama.py: the merged model is PEFT's, whatever the adapter; what is not is found, and nothing is lost."""

import ast
import gc
import json
import math
import os
import re
import resource
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import FIXTURES, PROCESSES, TASKS, run, snapshot
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import merge_llama
import tasks
import test_llama as tester
from pipeline import machine, models
from pipeline.files import load_rows, only_run_in, sha256
from pipeline.merging import merged_folder, tensors, verify
from pipeline.tokens import END_TOKENS, encode, load_tokenizer

TOKENIZER = ["tokenizer.json", "tokenizer_config.json"]
LLAMAS = ("tiny_llama2", "tiny_llama3")


def merge(out, *arguments):
    """merge_llama.py in this process, by default into the bases' own float32; its exit code."""
    try:
        merge_llama.main(["--output-dir", str(out), "--merge-dtype", "float32", *map(str, arguments)])
    except SystemExit as error:
        return error.code
    return 0


def make_base(folder, name, dtype=torch.float32, shard="5GB"):
    """A tiny Llama's folder in another dtype and layout."""
    model = AutoModelForCausalLM.from_pretrained(FIXTURES / name, dtype=dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    for path in FIXTURES.joinpath(name).glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def make_adapter(folder, base, trained_in_4bit=False, run=(), **options):
    """A LoRA adapter of random numbers, saved by PEFT, and a run.json that says what it was trained on."""
    torch.manual_seed(0)
    options = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding" in name:
            parameter.data.normal_(0, 0.02)
    model.save_pretrained(folder, save_embedding_layers=False)
    content = {"settings": {"load_in_4bit": trained_in_4bit}} | dict(run)
    (folder / "run.json").write_text(json.dumps(content))


OLD = {"old": b"still here", "merge.json": b'{"sha256": {"old": "of no matter"}}'}


@pytest.fixture
def out(dataset, tmp_path):
    """An output dir with a data set, a sharded float32 copy of tiny_llama2 as base, and an old merged folder."""
    (tmp_path / "out" / "merged").mkdir(parents=True)
    for name, content in OLD.items():
        (tmp_path / "out" / "merged" / name).write_bytes(content)
    (tmp_path / "out" / "dataset").symlink_to(dataset / "dataset")
    make_base(tmp_path / "base", "tiny_llama2", shard="300KB")
    return tmp_path / "out"


def stands(out):
    """Whether the old merged folder is still there, alone."""
    return snapshot(out / "merged") == OLD and not (out / ".merged.new").exists()


def tensors_of(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def report(folder):
    return json.loads((folder / "merge.json").read_text())


def assert_within_a_rounding_step(actual, expected):
    """`expected` in float32: float32 to 1e-6, 16 bit to one step and nearly always the nearest number."""
    if actual.dtype == torch.float32:
        assert (actual - expected).abs().max() <= 1e-6
        return
    limits = torch.finfo(actual.dtype)
    float32_sums = 1e-7 * expected.abs().max()  # whose order is free, and shows where base and update cancel
    step = limits.eps * expected.abs() + limits.smallest_normal * limits.eps + float32_sums
    assert ((actual.float() - expected).abs() <= step).all()
    assert (actual == expected.to(actual.dtype)).float().mean() > 0.999


PATTERNS = {"rank_pattern": {"q_proj": 4, r"layers\.0\.mlp\.up_proj": 16}, "alpha_pattern": {"o_proj": 3}}
ADAPTERS = [
    ("tiny_llama3", torch.float32, "float32", "400KB", {"r": 8}),  # tied embeddings
    ("tiny_llama3", torch.bfloat16, "bfloat16", "5GB", {"r": 64, "use_rslora": True} | PATTERNS),
    ("tiny_llama2", torch.float32, "float16", "100KB", {"r": 64, "use_rslora": True, "lora_alpha": 5}),
    ("tiny_llama2", torch.bfloat16, "float32", "100KB", {"r": 8} | PATTERNS),
    ("tiny_llama2", torch.float16, "bfloat16", "5GB", {"r": 8, "target_modules": ["q_proj", "down_proj", "lm_head"]}),
]


@pytest.mark.parametrize("name, stored, dtype, shard, options", ADAPTERS)
def test_every_tensor_is_that_of_pefts_merge_and_the_others_are_the_bases(
    name, stored, dtype, shard, options, out, tmp_path
):
    base = make_base(tmp_path / "model", name, stored, shard)
    make_adapter(out / "adapter", base, trained_in_4bit=True, **options)
    assert merge(out, "--check-rows", 2, "--merge-dtype", dtype) == 0
    assert report(out / "merged")["merge_base"] == "16bit"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = PeftModel.from_pretrained(model, out / "adapter").merge_and_unload().state_dict()
    merged, before, changed = tensors_of(out / "merged"), tensors_of(base), 0
    assert merged.keys() == before.keys() and len(merged) > 15
    for key, tensor in merged.items():
        assert tensor.dtype == getattr(torch, dtype)
        if torch.equal(expected[key], before[key].float()):
            assert torch.equal(tensor.view(torch.uint8), before[key].to(tensor.dtype).view(torch.uint8))
        else:
            changed += 1
            assert_within_a_rounding_step(tensor, expected[key])
    assert changed == len(load_file(out / "adapter" / "adapter_model.safetensors")) // 2
    for path in base.glob("*.safetensors"):
        with safe_open(path, "pt") as one, safe_open(out / "merged" / path.name, "pt") as two:
            assert set(one.keys()) == set(two.keys()) and two.metadata() == {"format": "pt"}
    for path in base.glob("*.index.json"):
        index = json.loads((out / "merged" / path.name).read_text())
        assert index["weight_map"] == json.loads(path.read_text())["weight_map"]
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in merged.values())
    config = json.loads((out / "merged" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == report(out / "merged")["dtype"] == dtype
    assert AutoModelForCausalLM.from_pretrained(out / "merged").dtype == getattr(torch, dtype)
    assert not (out / "merged" / "old").exists()


@pytest.mark.parametrize("targets", ["all-linear", ["v_proj"]])
def test_4bit_is_pefts_merge_into_the_base_as_loaded_in_4_bits(targets, out, tmp_path, monkeypatch):
    # as on a GPU; NF4 is made of float32 there too
    monkeypatch.setattr(machine, "compute_dtype", lambda: torch.bfloat16)
    make_adapter(out / "adapter", tmp_path / "base", trained_in_4bit=True, target_modules=targets)
    assert merge(out, "--merge-base", "4bit") == 0 and report(out / "merged")["merge_base"] == "4bit"
    model = models.load_model(str(tmp_path / "base"), load_in_4bit=True, dtype="float32").dequantize()
    expected = PeftModel.from_pretrained(model, out / "adapter").merge_and_unload().state_dict()
    before, differ = tensors_of(tmp_path / "base"), set()
    for name, tensor in tensors_of(out / "merged").items():
        assert (tensor - expected[name]).abs().max() <= 1e-6
        if not torch.equal(tensor, before[name]):
            differ.add(name)
    assert differ == {name for name in before if "proj" in name}


def logits_of(model, prompts, wholes):
    """Those before each completion token, row by row."""
    with torch.no_grad():
        pairs = zip(prompts, wholes, strict=True)
        return torch.cat([model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1] for prompt, ids in pairs])


@pytest.mark.parametrize("into", ["16bit", "4bit"])
def test_the_figures_are_those_of_the_whole_models(into, out, tmp_path, capsys):
    make_adapter(out / "adapter", tmp_path / "base", trained_in_4bit=True)
    assert merge(out, "--merge-base", into, "--merge-dtype", "bfloat16", "--check-rows", 5) == 0
    lines = capsys.readouterr().out.split("\n")
    with_paths = ("merging ", "wrote ", "it is ")
    assert all(len(line) <= 80 for line in lines if not line.startswith(with_paths))
    advice = re.compile("to test it, too: .*python test_llama.py --model")
    assert any(map(advice.search, lines)) == (into == "16bit")
    content = report(out / "merged")
    assert content["check_rows"] == 5 and content["trained_on"] == "4bit" and content["merge_base"] == into
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    rows = load_rows(out, "validation")
    of_tasks = [[row for row in rows if row["task"] == task] for task in TASKS]
    rows = [row for pair in zip(*of_tasks, strict=True) for row in pair][:5]
    prompts = [tokenizer(row["prompt"]).input_ids for row in rows]
    wholes = [tokenizer(row["prompt"] + row["completion"]).input_ids + [tokenizer.eos_token_id] for row in rows]
    gold = torch.cat([torch.tensor(whole[len(prompt) :]) for prompt, whole in zip(prompts, wholes, strict=True)])
    assert content["answer_tokens"] == len(gold)

    def merged(kind, dtype):
        base = models.load_model(str(tmp_path / "base"), load_in_4bit=kind == "4bit")
        model = PeftModel.from_pretrained(base.dequantize() if kind == "4bit" else base, out / "adapter")
        return logits_of(model.merge_and_unload().to(dtype).float(), prompts, wholes)

    base = models.load_model(str(tmp_path / "base"), load_in_4bit=into == "4bit")
    adapter = logits_of(PeftModel.from_pretrained(base, out / "adapter"), prompts, wholes)
    entropy = torch.nn.functional.cross_entropy
    assert content["adapter_perplexity"] == pytest.approx(entropy(adapter, gold).exp().item(), rel=1e-3)
    assert content["comparison"].keys() == {"float32", "bfloat16"} and "largest_activation" not in content
    for name in content["comparison"]:
        logits = merged(into, getattr(torch, name))
        difference = (adapter - logits).abs()
        expected = {
            "largest_logit_difference": difference.max(),
            "mean_logit_difference": difference.mean(),
            "relative_difference": difference.mean() / adapter.std(),
            "equal_greedy_tokens": (adapter.argmax(-1) == logits.argmax(-1)).float().mean(),
            "merged_perplexity": entropy(logits, gold).exp(),
        }
        # a weight between two numbers of 16 bit may go to either
        expected = {name: pytest.approx(value.item(), rel=0.05, abs=1e-5) for name, value in expected.items()}
        assert content["comparison"][name] == expected
        line = next(line for line in lines if line.startswith(f"merged {name}"))
        assert f"{content['comparison'][name]['merged_perplexity']:.4g}" in line
        assert (" (written)" in line) == (name == "bfloat16")
    off = {name: figures["relative_difference"] for name, figures in content["comparison"].items()}
    assert off["float32"] < 1e-5 < off["bfloat16"]


def test_layers_that_have_no_room_stay_on_the_disk_with_the_same_logits(out, tmp_path, monkeypatch):
    """Rows of several lengths in one pass, too: none sees another."""
    rows = {"prompt_ids": [[1, 5, 6, 7], [1, 3], [1, *range(20, 40)]], "completion_ids": [[8, 9], [4], [9, 9, 2]]}
    pairs = zip(*rows.values(), strict=True)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        alone = torch.cat([model(torch.tensor([p + c])).logits[0, len(p) - 1 : -1] for p, c in pairs])

    def read(offload):
        model = verify.load_merged(tmp_path / "base", offload, None, "float32")
        return verify.logits_of(model, rows)[0], getattr(model, "hf_device_map", {})

    whole, _ = read(tmp_path / "nothing")
    assert torch.allclose(whole, alone, atol=1e-5)
    size = sum(path.stat().st_size for path in shards(tmp_path / "base"))
    little = SimpleNamespace(available=int(0.9 * size), total=size)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: little)
    logits, places = read(tmp_path / "offloaded")
    assert torch.equal(logits, whole)
    assert "disk" in places.values() and "cpu" in places.values()


def test_where_memory_holds_no_float32_the_folder_is_compared_all_the_same(out, tmp_path, capsys, monkeypatch):
    make_adapter(out / "adapter", tmp_path / "base")
    size, seen, read = sum(path.stat().st_size for path in shards(tmp_path / "base")), [], verify.logits_of
    monkeypatch.setattr(verify, "logits_of", lambda model, ids: (seen.append(model.dtype), read(model, ids))[1])
    for room in (1.5 * size, 0.5 * size):  # for 16 bit; not for that either
        monkeypatch.setattr(machine, "host_memory", lambda room=room: machine.LIBRARIES + room)
        assert merge(out, "--merge-dtype", "auto") == 0
        assert "no room for the model in float32" in capsys.readouterr().out
        assert list(report(out / "merged")["comparison"]) == ["float16"]
    assert seen == [torch.bfloat16] * 4
    real = verify.compare
    monkeypatch.setattr(verify, "compare", lambda one, two, golds: real(one, two + 0.11 * one.std(), golds))
    assert merge(out, "--merge-dtype", "auto") == 1
    assert "error: the merge failed its check (the logits are 0.11 of" in capsys.readouterr().err


@pytest.mark.parametrize(
    "gpu, host, place",
    [(40, 9, ("cuda:0", "float32")), (24, 90, ("cuda:0", torch.bfloat16)), (15, 90, ("cpu", "float32")),
     (15, 20, ("cpu", "bfloat16")), (15, 17, (None, torch.bfloat16)), (0, 90, ("cpu", "float32")),
     (0, 20, ("cpu", "bfloat16")), (0, 17, (None, "bfloat16"))],
)  # fmt: skip
def test_an_8b_model_is_compared_where_it_has_room(gpu, host, place, monkeypatch, capsys):
    sizes = [SimpleNamespace(stat=lambda: SimpleNamespace(st_size=4.015e9))] * 4  # in 16 bit
    monkeypatch.setattr(models, "weight_files", lambda base: sizes)
    monkeypatch.setattr(machine, "compute_dtype", lambda: torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu > 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (gpu * 1e9, 80e9))
    monkeypatch.setattr(machine, "host_memory", lambda: host * 1e9)
    assert verify.roomy_place("base") == place
    assert ("on the CPU, which takes longer" in capsys.readouterr().out) == (gpu > 0 and place[0] == "cpu")


def test_one_model_is_in_memory_at_a_time(out, tmp_path, monkeypatch):
    def count():
        gc.collect()
        return sum(type(thing) is LlamaForCausalLM for thing in gc.get_objects())

    make_adapter(out / "adapter", tmp_path / "base", trained_in_4bit=True)
    before, seen = count(), []
    for module, name in ((models, "load_model"), (verify, "load_merged")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, **o: (seen.append(count()), real(*a, **o))[1])
    assert merge(out, "--check-rows", 1) == 0
    assert seen == [before] * 2


def test_a_validation_row_that_training_dropped_as_too_long_is_not_checked(out, tmp_path):
    make_adapter(out / "adapter", tmp_path / "base", trained_in_4bit=True)
    tokenizer = load_tokenizer(str(tmp_path / "base"))
    rows = load_rows(out, "validation")
    lengths = [len(p) + len(c) for p, c in zip(*encode(tokenizer, rows[:]).values(), strict=True)]
    run = {"settings": {"max_length": sorted(lengths)[1]}}
    args = merge_llama.parse_args(["--output-dir", str(out), "--check-rows", "8"])
    tokenizer.model_max_length = 10**6
    assert sorted(merge_llama.check_rows(args, run, tokenizer)[0]["id"]) == sorted(
        row["id"] for row, length in zip(rows, lengths, strict=True) if length <= run["settings"]["max_length"]
    )


def test_rounding_is_reported_and_not_refused(out, tmp_path, capsys):
    """Eight random layers with large weights make much of it: by more than the old limits, and the merge is right."""
    torch.manual_seed(0)
    base = make_base(tmp_path / "rough", "tiny_llama2", torch.bfloat16)
    config = LlamaConfig.from_pretrained(base, initializer_range=0.5, num_hidden_layers=8)
    LlamaForCausalLM(config).bfloat16().save_pretrained(base)
    make_adapter(out / "adapter", base)
    assert merge(out, "--check-rows", 8, "--merge-dtype", "bfloat16") == 0
    figures = report(out / "merged")["comparison"]
    assert figures["bfloat16"]["relative_difference"] > 0.02 and figures["bfloat16"]["equal_greedy_tokens"] < 0.95
    assert figures["float32"]["relative_difference"] < 1e-4


def flip(path, tensor=None):
    """Flip the highest bit but one of the first number of a tensor (by default the first) in a safetensors file."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        entry = header[tensor or min(header, key=lambda name: header[name]["data_offsets"])]
        width = {"F32": 4, "BF16": 2, "F16": 2}[entry["dtype"]]
        file.seek(8 + size + entry["data_offsets"][0] + width - 1)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 0x40]))


def assert_unverified(out, capsys, *words):
    error = capsys.readouterr().err
    assert all(word in error for word in ("failed its check", *words)), error
    assert stands(out)
    marked = out / "merged.unverified"
    json.loads((marked / "merge.json").read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert report(marked)["verified"] is False and words[0] in " ".join(report(marked)["problems"])
    card = (marked / "README.md").read_text()
    assert "UNVERIFIED" in card.split("\n#")[0] and words[0] in card


def shards(base):
    return sorted(base.glob("*.safetensors"))


def change_file(path, change):
    """Save a safetensors file again after `change(its tensors)`."""
    content = load_file(path)
    change(content)
    save_file(content, path, metadata={"format": "pt"})


def first_of(base, fresh):
    return fresh / shards(base)[0].name


def widen(content):
    content.update({name: tensor.double() for name, tensor in content.items()})


SPOILT = {
    "a bit of the base": (lambda base, fresh: flip(shards(base)[0]), "differs from"),
    "a bit of the merged": (lambda base, fresh: flip(first_of(base, fresh)), "differs from"),
    "a wider dtype": (lambda base, fresh: change_file(first_of(base, fresh), widen), "has another dtype"),
    "a cut-off file": (lambda base, fresh: os.truncate(first_of(base, fresh), 3000), "cannot be loaded"),
    "a missing file": (lambda base, fresh: first_of(base, fresh).unlink(), "cannot be loaded"),
    "no config": (lambda base, fresh: (fresh / "config.json").write_text("{}"), "cannot be loaded"),
}


def before_the_check(monkeypatch, change):
    """Have `change()` called between merge and check."""
    real = verify.wrong_tensors
    monkeypatch.setattr(verify, "wrong_tensors", lambda *a: (change(), real(*a))[1])


@pytest.mark.parametrize("what", list(SPOILT))
def test_what_changes_between_merge_and_check_is_found(what, out, tmp_path, capsys, monkeypatch):
    make_adapter(out / "adapter", tmp_path / "base")
    change, words = SPOILT[what]
    before_the_check(monkeypatch, lambda: change(tmp_path / "base", out / ".merged.new"))
    assert merge(out) == 1
    assert_unverified(out, capsys, words)


def test_ctrl_c_is_one_line_and_leaves_the_old_folder(out, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        assert (out / ".merged.new" / "config.json").is_file()
        raise KeyboardInterrupt

    make_adapter(out / "adapter", tmp_path / "base")
    monkeypatch.setattr(verify, "wrong_tensors", interrupted)
    assert merge(out) == 130
    assert "interrupted: " in capsys.readouterr().err and stands(out)


WRONG = ["layers.0.mlp.up_proj", "layers.1.input_layernorm", "norm", "embed_tokens"]
WRONG = [*(f"model.{name}.weight" for name in WRONG), "lm_head.weight"]


def test_a_tensor_that_was_merged_wrong_is_named(out, tmp_path, capsys, monkeypatch):
    make_adapter(out / "adapter", tmp_path / "base", target_modules=["up_proj"])
    name, index = None, json.loads((tmp_path / "base" / "model.safetensors.index.json").read_text())["weight_map"]

    def wrong(content):
        content[name].view(-1)[content[name].view(-1).abs().argmax()] += 2e-6

    before_the_check(monkeypatch, lambda: change_file(out / ".merged.new" / index[name], wrong))
    for name in WRONG:
        assert merge(out, "--check-rows", 1) == 1
        assert_unverified(out, capsys, name, "differs from")


def test_a_wrong_scale_and_an_adapter_that_changes_after_it_was_loaded_are_found(out, tmp_path, capsys, monkeypatch):
    make_adapter(out / "adapter", tmp_path / "base")
    real, path = tensors.changes_of, out / "adapter" / "adapter_model.safetensors"

    def scaled(*arguments):
        return {name: (a, b, 1.01 * scale) for name, (a, b, scale) in real(*arguments).items()}

    with monkeypatch.context() as patch:
        patch.setattr(tensors, "changes_of", scaled)
        assert merge(out) == 1
        assert_unverified(out, capsys, "model.layers.0.", "differs from PEFT's merge")
        patch.setattr(verify, "wrong_tensors", lambda *a: [])  # the logits alone tell, too
        assert merge(out, "--merge-dtype", "bfloat16") == 1
        assert_unverified(out, capsys, "in float32 the logits are ")
    monkeypatch.setattr(tensors, "changes_of", lambda *a: (flip(path), real(*a))[1])
    assert merge(out) == 1
    assert_unverified(out, capsys, "differs from PEFT's merge")


@pytest.mark.parametrize("matrix", [0, 1])  # A, B
def test_a_transposed_matrix_of_the_adapter_is_found(matrix, out, tmp_path, capsys, monkeypatch):
    make_adapter(out / "adapter", tmp_path / "base", r=64, target_modules=["q_proj"])  # 64 x 64: any way fits
    real = tensors.changes_of

    def turned(*arguments):
        changes = {name: list(change) for name, change in real(*arguments).items()}
        for change in changes.values():
            change[matrix] = change[matrix].T.contiguous()
        return changes

    monkeypatch.setattr(tensors, "changes_of", turned)
    for dtype in merge_llama.DTYPES:
        assert merge(out, "--merge-dtype", dtype) == 1
        assert_unverified(out, capsys, "q_proj.weight differs from PEFT's merge")
    monkeypatch.setattr(verify, "wrong_tensors", lambda *_: [])
    assert merge(out) == 1
    assert_unverified(out, capsys, "in float32 the logits are ")


@pytest.mark.parametrize("off", [2e-4, math.nan])
def test_logits_that_are_not_base_and_adapters_in_float32_fail(off, out, tmp_path, capsys, monkeypatch):
    make_adapter(out / "adapter", tmp_path / "base")
    real = verify.compare
    monkeypatch.setattr(verify, "compare", lambda one, two, golds: real(one, two + off * one.std(), golds))
    assert merge(out) == 1
    assert_unverified(out, capsys, "of their deviation from base and adapter's")


def test_a_base_with_another_tokenizer_than_the_adapters_is_found(out, tmp_path, capsys):
    make_adapter(out / "adapter", tmp_path / "base")
    AutoTokenizer.from_pretrained(tmp_path / "base").save_pretrained(out / "adapter")
    path = tmp_path / "base" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": None}))  # which puts BOS in front
    assert merge(out) == 1
    assert_unverified(out, capsys, "makes other tokens than the adapter's")


@pytest.mark.parametrize("name, code", [("model.norm.weight", 2), ("model.embed_tokens.weight", 0)])
def test_numbers_that_are_none_are_refused_but_where_a_token_never_occurs(name, code, out, tmp_path, capsys):
    base = make_base(tmp_path / "model", "tiny_llama2", torch.bfloat16)
    make_adapter(out / "adapter", base)

    def spoil(tensors):
        tensors[name].view(-1)[-64:] = math.nan  # the last row

    assert merge(out, "--merge-dtype", "auto") == 0
    plain = report(out / "merged")["rounding"]
    change_file(base / "model.safetensors", spoil)
    capsys.readouterr()
    assert merge(out, "--merge-dtype", "auto") == code
    if code:
        assert f"numbers in {name} that are not finite: get it again" in capsys.readouterr().err
    else:
        assert capsys.readouterr().out.count("warning: 64 numbers in the embeddings of the base are not finite") == 1
        assert tensors_of(out / "merged")[name][-1].isnan().all() and report(out / "merged")["verified"]
        counts = report(out / "merged")["rounding"]
        assert report(out / "merged")["dtype"] == "float16" and counts["not_finite"] == 64
        assert counts["too_large"] == 0 and counts["weights"] == plain["weights"]
        for key in ("too_small", "not_adapted_yet_changed"):  # of the numbers that are left
            assert plain[key] - 64 <= counts[key] <= plain[key]


def test_auto_takes_float16_where_it_holds_every_weight_and_else_bfloat16(out, tmp_path, capsys):
    base = make_base(tmp_path / "model", "tiny_llama2", torch.bfloat16)
    make_adapter(out / "adapter", base)
    whole, name, weights = base / "model.safetensors", "model.norm.weight", None

    def auto(change, *arguments):
        before = whole.read_bytes()
        change_file(whole, lambda content: change(content[name]))
        code = merge(out, "--merge-dtype", "auto", "--check-rows", 1, *arguments)
        whole.write_bytes(before)
        json.loads((out / "merged" / "merge.json").read_text(), parse_constant=pytest.fail)  # NaN is no JSON
        return code

    assert auto(lambda w: None) == 0
    plain = report(out / "merged")["rounding"]["not_adapted_yet_changed"]
    before = tensors_of(base)
    assert plain == sum((t.half().bfloat16() != t).sum() for key, t in before.items() if "proj" not in key) > 0
    for change, dtype in {
        (lambda w: w.view(-1)[:1].fill_(5e-8)): "float16",  # a trace
        (lambda w: w.view(-1)[:1].fill_(65280.0)): "float16",  # bfloat16's next is 65536
        (lambda w: w.view(-1)[:1].fill_(65536.0)): "bfloat16",
        (lambda w: w.view(-1)[:30].fill_(-5e-8)): "bfloat16",
    }.items():
        assert auto(change) == 0
        content = report(out / "merged")
        assert content["dtype"] == dtype and {t.dtype for t in tensors_of(out / "merged").values()} == {
            getattr(torch, dtype)
        }
        weights = content["rounding"]["weights"]
        assert weights == sum(t.numel() for t in tensors_of(out / "merged").values())
    assert 30 / weights > merge_llama.TRACE > 1 / weights
    capsys.readouterr()
    assert auto(lambda w: w[:1].fill_(1e5), "--merge-dtype", "float16") == 2
    assert "1 merged weights are beyond the range of float16: give --merge-dtype bfloat16" in capsys.readouterr().err
    assert auto(lambda w: w[:3].fill_(0.1 * 2**-14), "--merge-dtype", "float16") == 0  # has fewer bits there
    assert report(out / "merged")["rounding"]["not_adapted_yet_changed"] == plain + 3
    assert "warning" not in capsys.readouterr().out


REFUSED = {
    "use_dora": True,
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [1],
    "bias": "all",
    "target_parameters": ["x"],
    "fan_in_fan_out": True,
    "layer_replication": [[0, 1]],
    "peft_type": "IA3",
    "init_lora_weights": "pissa",
    "use_what_comes": True,
}


def test_what_is_more_than_lora_is_refused_by_name(out, tmp_path, capsys):
    make_adapter(out / "adapter", tmp_path / "base")
    path = out / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    capsys.readouterr()  # what loading the base printed
    for name, value in REFUSED.items():
        path.write_text(json.dumps(config | {name: value}))
        assert merge(out) == 2
        assert name in (error := capsys.readouterr().err) and "does not merge" in error and error.count("\n") == 1
    assert stands(out)


def change_adapter(change):
    return lambda base, adapter: change_file(adapter / "adapter_model.safetensors", change)


def change_config(**settings):
    def apply(base, adapter):
        content = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(content | settings))

    return apply


def pickled(base, adapter):
    for path in [*shards(base), base / "model.safetensors.index.json"]:
        path.unlink()
    (base / "pytorch_model.bin").write_bytes(b"a pickle")


def retyped(base, adapter):
    narrow = torch.float8_e4m3fn
    change_file(shards(base)[1], lambda c: c.update({name: tensor.to(narrow) for name, tensor in c.items()}))


def renamed(base, adapter):
    """As transformers saves a LlamaModel: it loads, and its tensors are called otherwise."""
    for path in shards(base):
        content = {name.removeprefix("model."): tensor for name, tensor in load_file(path).items()}
        save_file(content, path, metadata={"format": "pt"})
    index = base / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"model.', '"'))


UP = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
BROKEN = {
    "a missing shard": (lambda b, a: shards(b)[1].unlink(), "has no model-00002-of-"),
    "a cut-off shard": (lambda b, a: os.truncate(shards(b)[1], 5000), "cannot load the model in "),
    "only pickles": (pickled, "a pickle: convert"),
    "8-bit weights": (retyped, "take its 16-bit weights"),
    "other names": (renamed, "names its weights as AutoModel saves them"),
    "a quantised base": (change_config(quantization_config={"quant_method": "gptq"}), "is quantised"),
    "a config of another shape": (change_config(intermediate_size=9), "its config.json asks for [64, 9]"),
    "more layers": (change_config(num_hidden_layers=3), "lacks weights"),
    "another model": (change_config(model_type="gpt2"), "is a gpt2 model"),
    "a tensor of another shape": (change_adapter(lambda c: c.update({UP: c[UP][:, :9].clone()})), "does not load"),
    "a tensor too few": (change_adapter(lambda c: c.pop(UP)), "does not load"),
    "trained embeddings": (change_adapter(lambda c: c.update(embed=torch.ones(2))), "does not load"),
    "no number": (change_adapter(lambda c: c[UP].fill_(float("nan"))), "up_proj.weight is not finite"),
}


@pytest.mark.parametrize("what", list(BROKEN))
def test_a_broken_base_or_adapter_is_one_sentence_and_nothing_is_lost(what, out, tmp_path, capsys):
    make_adapter(out / "adapter", tmp_path / "base")
    change, words = BROKEN[what]
    change(tmp_path / "base", out / "adapter")
    assert merge(out) == 2
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert error.startswith("error: ") and words in error, error
    assert stands(out)


def test_tied_lm_head_and_trained_embeddings_are_refused(out, tmp_path, capsys):
    base = make_base(tmp_path / "tied", "tiny_llama3")
    for target in ("lm_head", "embed_tokens"):
        make_adapter(out / "adapter", base, target_modules=["q_proj", target])
        assert merge(out) == 2
        assert f"{target}, no linear layer of its own" in capsys.readouterr().err and stands(out)
        shutil.rmtree(out / "adapter")


def identified(base):
    """What run.json of a new adapter says of what it was made from."""
    return {
        "run": {"weights": models.weights_identity(str(base)), "train rows": "a" * 32, "validation rows": "b" * 32}
    }


def test_another_base_or_adapter_than_run_json_names_is_refused(out, tmp_path, capsys):
    base = tmp_path / "base"
    make_adapter(out / "adapter", base, run=identified(base))
    path, now = out / "adapter" / "adapter_model.safetensors", models.weights_identity(str(base))
    flip(shards(base)[-1])
    assert merge(out) == 2 and stands(out)
    error = capsys.readouterr().err
    assert "(the base's weights are others)" in error and str(base) in error and "run train_llama.py again" in error
    flip(shards(base)[-1])  # back again
    run = json.loads((out / "adapter" / "run.json").read_text())
    (out / "adapter" / "run.json").write_text(json.dumps(run | {"adapter_sha256": "0" * 64}))
    assert merge(out) == 2 and stands(out)
    error = capsys.readouterr().err
    assert "(the adapter is another one)" in error
    (out / "adapter" / "run.json").write_text(json.dumps(run | {"adapter_sha256": sha256(path)}))
    assert merge(out) == 0
    content = report(out / "merged")
    assert content["base_weights"] == now and content["adapter_sha256"] == sha256(path)
    assert content["dataset"] == {"train rows": "a" * 32, "validation rows": "b" * 32}
    assert content["trained_on"] == "16bit"  # so says run.json


def test_folders_and_dangling_links_beside_the_bases_tokenizer_are_left_there(out, tmp_path):
    base = tmp_path / "base"
    (base / "tokenizer_backup").mkdir()
    (base / "tokenizer.old").symlink_to(tmp_path / "nowhere")
    make_adapter(out / "adapter", base)
    assert merge(out) == 0
    assert [path.name for path in sorted((out / "merged").glob("tokenizer*"))] == TOKENIZER


@pytest.mark.parametrize("own", [{"lora_alpha": 64}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 3}}])
def test_settings_of_the_adapter_that_are_not_those_of_training_are_said_and_the_card_has_the_true_ones(
    own, out, tmp_path, capsys
):
    make_adapter(out / "adapter", tmp_path / "base", run={"settings": {"lora_r": 8, "lora_alpha": 16}})
    models.read_adapter(out / "adapter")
    assert capsys.readouterr().out == ""
    path = out / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    assert merge(out) == 0
    assert capsys.readouterr().out.count("scales the adapter otherwise than in training") == 1
    card = (out / "merged" / "README.md").read_text()
    assert f"| lora_alpha | {own.get('lora_alpha', 16)} |" in card and "| lora_r | 8 |" in card


@pytest.mark.parametrize("what", ["shards of other weights", "an index without shards", "a single shard"])
def test_the_weights_that_transformers_loads_are_merged_whatever_else_lies_there(what, out, tmp_path):
    base, kept = tmp_path / "base", ["model.safetensors"]
    for path in shards(base):
        if what == "shards of other weights":
            change_file(path, lambda c: c.update({name: 1.05 * tensor for name, tensor in c.items()}))
        else:
            path.unlink()
    shutil.copy(make_base(tmp_path / "whole", "tiny_llama2") / "model.safetensors", base)
    if what == "a single shard":
        kept = ["model-00001-of-00001.safetensors"]
        names = dict.fromkeys(load_file(base / "model.safetensors"), kept[0])
        (base / "model.safetensors").rename(base / kept[0])
        (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    make_adapter(out / "adapter", base)
    assert merge(out) == 0
    assert [path.name for path in shards(out / "merged")] == kept
    assert (out / "merged" / "model.safetensors.index.json").exists() == (what == "a single shard")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    expected = PeftModel.from_pretrained(model, out / "adapter").merge_and_unload().state_dict()
    loaded = AutoModelForCausalLM.from_pretrained(out / "merged").state_dict()
    assert all((loaded[name] - tensor).abs().max() < 1e-6 for name, tensor in expected.items())


def test_merged_and_adapter_and_the_output_folder_may_be_links(out, tmp_path, capsys, monkeypatch):
    make_adapter(tmp_path / "elsewhere", tmp_path / "base")
    (out / "adapter").symlink_to(tmp_path / "elsewhere")
    (out / "merged").rename(tmp_path / "big")
    (out / "merged").symlink_to(tmp_path / "big")
    (tmp_path / "link").symlink_to(out)
    for _ in range(2):
        assert merge(tmp_path / "link") == 0
        assert (out / "merged").readlink() == tmp_path / "big" and report(tmp_path / "big")["verified"]
    monkeypatch.setattr(verify, "MAX_RELATIVE_DIFFERENCE", -1)
    assert merge(out) == 1 and report(tmp_path / "merged.unverified")["verified"] is False
    assert report(out / "merged")["verified"]
    assert sorted(p.name for p in tmp_path.iterdir() if "merged" in p.name) == ["merged.unverified"]


def test_a_second_merge_into_the_folder_is_refused(out, tmp_path, capsys):
    make_adapter(out / "adapter", tmp_path / "base")
    with only_run_in(out):
        assert merge(out) == 2
    assert "is in use by" in capsys.readouterr().err and stands(out)


def test_no_adapter_is_a_sentence_and_makes_no_folder(tmp_path, capsys):
    assert merge(tmp_path / "typo") == 2
    assert "run train_llama.py first" in capsys.readouterr().err and not (tmp_path / "typo").exists()
    for wrong in (["--check-rows", "0"], ["--merge-base", "8bit"]):
        assert merge(tmp_path / "typo", *wrong) == 2
        assert wrong[0] in capsys.readouterr().err


def killed(out, name, call):
    """In a process of its own: merge, and die at the given call of the merge's or the check's function `name`."""
    module = next(module for module in (merge_llama, tensors, verify) if hasattr(module, name))
    real, calls = getattr(module, name), []

    def dying(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    setattr(module, name, dying)
    merge(out)


def test_killed_at_any_moment_nothing_looks_finished_and_the_rerun_succeeds(out, tmp_path, monkeypatch):
    make_adapter(out / "adapter", tmp_path / "base")
    moments = [("merge_tensor", 9), ("wrong_tensors", 1), ("finish", 1), ("show", 1)]
    processes = []
    for moment in moments:
        process = PROCESSES.Process(target=killed, args=(out, *moment))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, moment
        assert (out / ".merged.new").is_dir() and snapshot(out / "merged") == OLD
        processes.append((out / ".merged.new" / "merge.json").exists())
    assert processes == [False] * 3 + [True]  # the last died before the folder got its name
    (out / "merged").rename(out / ".merged.old")  # killed between the two renames: a failing rerun brings it back
    with monkeypatch.context() as patch:
        patch.setattr(merge_llama, "SMALL_FILES", 10**15)
        assert merge(out) == 2 and stands(out)
    assert merge(out) == 0 and report(out / "merged")["verified"]
    assert not list(out.glob(".merged*"))


def test_too_little_room_is_said_beforehand(out, tmp_path, capsys, monkeypatch):
    make_adapter(out / "adapter", tmp_path / "base")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    assert merge(out) == 2
    assert "0.00 GB free: make room" in capsys.readouterr().err and stands(out)


def test_a_full_disk_is_one_sentence_and_the_rerun_succeeds(out, tmp_path, capsys):
    make_adapter(out / "adapter", tmp_path / "base")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        assert merge(out) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert "cannot write" in error and "make room" in error and "Traceback" not in error and stands(out)
    assert merge(out) == 0


@pytest.mark.parametrize("name", LLAMAS)
def test_the_merged_model_predicts_what_the_adapter_predicts(name, out, tmp_path):
    base = make_base(tmp_path / "wide", name, shard="200KB")  # in float32 nothing is rounded
    (base / "merge.json").write_text(json.dumps({"adapter_sha256": "e" * 64}))  # itself the merge of an older run
    make_adapter(out / "adapter", base, trained_in_4bit=True)
    for path in base.glob("tokenizer*"):
        shutil.copy(path, out / "adapter")
    assert merge(out, "--merge-base", "4bit") == 0
    short = ["--output-dir", out, "--no-compare-with-base", "--samsum-max-new-tokens", "12"]
    for more in (["--name", "adapter"], ["--name", "merged", "--model", out / "merged", "--no-load-in-4bit"]):
        result = run("test_llama.py", *short, *more)
        assert result.returncode == 0, result.stderr
    for task in TASKS:
        paths = [out / f"{task}_predictions_{name}.json" for name in ("adapter", "merged")]
        one, two = (json.loads(path.read_text()) for path in paths)
        assert [e["prediction"] for e in one["examples"]] == [e["prediction"] for e in two["examples"]]
        assert one["merged_from"] is None and two["merged_from"] == one["settings"]["adapter"]
        assert one["perplexity"]["tuned"]["nll_sum"] == pytest.approx(two["perplexity"]["tuned"]["nll_sum"], rel=1e-5)


PROMPTS = {
    "samsum": "Summarize the dialogue.\n\nDialogue:\n{dialogue}\n\nSummary:",
    "trivia_qa": "Answer the question from the context.\n\nContext:\n{context}\n\nQuestion: {question}\nAnswer:",
}


def inv_freq(config):
    return LlamaForCausalLM(config).model.rotary_emb.inv_freq


ROPES = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 3.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 512},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("form", ["as transformers 5 writes it", "as transformers 4 wrote it"])
def test_a_reader_that_knows_rope_theta_and_rope_scaling_alone_turns_by_the_same_angles(kind, form, tmp_path):
    base, rope = make_base(tmp_path / "base", "tiny_llama2"), {"rope_type": kind} | ROPES[kind]
    content = json.loads((base / "config.json").read_text())
    content.pop("rope_parameters", None)
    old = {"rope_theta": 1e3, "rope_scaling": None if kind == "default" else rope}
    new = {"rope_parameters": rope | {"rope_theta": 1e3}}
    (base / "config.json").write_text(json.dumps(content | (new if "5" in form else old)))
    model = models.load_model(str(base), load_in_4bit=False)
    written = json.loads(json.dumps(merged_folder.config_of(model, "float16")))
    assert written["rope_theta"] == 1e3 and (written["rope_scaling"] is None) == (kind == "default")
    assert kind == "default" or rope.items() <= written["rope_scaling"].items()
    older = {name: value for name, value in written.items() if name != "rope_parameters"}
    newer = {name: value for name, value in written.items() if name not in ("rope_theta", "rope_scaling")}
    for read in (older, newer):
        assert torch.equal(inv_freq(LlamaConfig.from_dict(read)), model.model.rotary_emb.inv_freq)
    assert not torch.equal(inv_freq(LlamaConfig.from_dict(content)), model.model.rotary_emb.inv_freq)


def test_a_merged_config_says_of_the_head_what_the_weights_are_and_no_switch_of_the_base(out, tmp_path):
    def another_head(tensors):
        tensors["lm_head.weight"] = 1.1 * tensors["model.embed_tokens.weight"]

    for tied in (True, False):
        base = make_base(tmp_path / str(tied), "tiny_llama3")
        if not tied:  # though config.json says so: transformers takes both
            change_file(base / "model.safetensors", another_head)
        switches = {
            "architectures": ["LlamaModel"],
            "use_cache": False,
            "output_attentions": True,
            "torchscript": True,
        }
        change_config(tie_word_embeddings=True, _attn_implementation="eager", **switches)(base, None)
        shutil.rmtree(out / "adapter", ignore_errors=True)
        make_adapter(out / "adapter", FIXTURES / "tiny_llama3")
        assert merge(out, "--model", base) == 0
        written = json.loads((out / "merged" / "config.json").read_text())
        assert written["tie_word_embeddings"] is tied and written["architectures"] == ["LlamaForCausalLM"]
        assert written["use_cache"] is True and not written.keys() & {*switches} - {"architectures", "use_cache"}
        assert written["head_dim"] == 32 and written["num_key_value_heads"] == 2
        model = AutoModelForCausalLM.from_pretrained(out / "merged")
        same = torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
        assert same is tied is (model.lm_head.weight is model.model.embed_tokens.weight)


def test_a_head_of_its_own_is_merged_though_the_config_calls_it_tied(out, tmp_path):
    base = make_base(tmp_path / "model", "tiny_llama3")
    change_file(base / "model.safetensors", lambda t: t.update({"lm_head.weight": 2 * t["model.embed_tokens.weight"]}))
    make_adapter(out / "adapter", base, target_modules=["lm_head"])
    assert merge(out) == 0
    changed = tensors_of(out / "merged")["lm_head.weight"] - tensors_of(base)["lm_head.weight"]
    assert changed.abs().max() > 0


def test_frequencies_in_the_files_of_early_llamas_are_no_obstacle(out, tmp_path):
    base = make_base(tmp_path / "model", "tiny_llama2", torch.float16)
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
    change_file(base / "model.safetensors", lambda tensors: tensors.update(old))
    make_adapter(out / "adapter", base)
    assert merge(out, "--merge-dtype", "auto") == 0 and report(out / "merged")["verified"]


def test_a_base_that_was_moved_is_named_by_model_and_known_by_its_weights(out, tmp_path, capsys):
    base = make_base(tmp_path / "model", "tiny_llama2")
    make_adapter(out / "adapter", base, run=identified(base))
    base.rename(tmp_path / "moved")
    assert merge(out) == 2 and "unknown model" in capsys.readouterr().err
    assert merge(out, "--model", tmp_path / "moved") == 0
    assert report(out / "merged")["base_model"] == "moved" and (out / "merged" / "config.json").is_file()
    other = make_base(tmp_path / "other", "tiny_llama2", torch.float16)
    assert merge(out, "--model", other) == 2
    assert "give --model where it is now" in capsys.readouterr().err
    assert report(out / "merged")["base_model"] == "moved"


@pytest.mark.parametrize(
    "readme, licence",
    [("---\nlanguage: en\nlicense: llama3.1\n---\nA card", "llama3.1"), ("---\nlicense: 'MIT'\n---\n", "MIT"),
     ("A card\nlicense: mit\n", "other"), ("---\nlanguage: en\n---\nlicense: mit\n", "other"),
     ("---\nlicense: other\nlicense_name: own\n---\n", "other"), ("---\nlicense:\n- mit\n---\n", "other"),
     (None, "other")],
)  # fmt: skip
def test_the_licence_is_the_one_that_the_bases_readme_names(readme, licence, out, tmp_path):
    if readme is not None:
        (tmp_path / "base" / "README.md").write_text(readme)
    card = card_of(out, str(tmp_path / "base"))
    assert f"license: {licence}\n" in card
    assert ("which is Meta's" in card) == (licence == "llama3.1")


def built_by(out, prompts=PROMPTS, **sources):
    """dataset_report.json of the rows that `identified` names."""
    built = {"sources": sources, "prompts": prompts, "settings": {"max_context_words": 77}}
    built["splits"] = {"train": {"sha256": "a" * 64}, "test": {"sha256": "b" * 64}}
    (out / "dataset_report.json").write_text(json.dumps(built))


LOCAL = {"source": "/secret/place/samsum", "revision": None, "licence": "CC BY-NC-ND 4.0"}


@pytest.mark.parametrize("name", LLAMAS)
def test_the_folder_ends_at_every_end_token_holds_no_code_and_its_cards_example_runs(
    name, out, tmp_path, monkeypatch, capsys
):
    base = make_base(tmp_path / "model", name)
    (base / "generation_config.json").unlink()  # whatever the base says
    make_adapter(out / "adapter", base, run=identified(base))
    built_by(out, samsum=LOCAL)
    if name == "tiny_llama3":  # once as a user does
        result = run("merge_llama.py", "--output-dir", out, fresh=True)
        assert result.returncode == 0 and result.stderr == "", result.stderr
    else:
        assert merge(out) == 0
    merged = out / "merged"
    names = {path.name for path in merged.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "README.md", "merge.json"} <= names
    assert {name.rsplit(".")[-1] for name in names} == {"json", "md", "safetensors", "Modelfile"}
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in merged.iterdir())
    content = report(merged)
    assert content["sha256"] == {n: sha256(merged / n) for n in names - {"merge.json"}}
    generation = json.loads((merged / "generation_config.json").read_text())
    vocabulary = AutoTokenizer.from_pretrained(merged).get_vocab()
    assert set(generation["eos_token_id"]) >= {vocabulary[t] for t in END_TOKENS if t in vocabulary}
    assert generation["do_sample"] is False and "temperature" not in generation
    card = (merged / "README.md").read_text()
    assert not any(str(path) in card + json.dumps(content) for path in (base, out, Path.home(), "/secret"))
    assert "license: other" in card and "local folder" in card and "datasets:" not in card  # the rows are invented
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    monkeypatch.chdir(merged)
    capsys.readouterr()
    scope = {}
    exec(compile(code, "card", "exec"), scope)
    assert capsys.readouterr().out.count("\n") == 1
    assert scope["prompt"].startswith("Answer the question") and "\nSummary:\n" in card


def test_chat_template_tokenizer_model_and_the_bases_own_settings_are_kept(out, tmp_path):
    base = tmp_path / "base"
    template = "{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}"
    path = base / "tokenizer_config.json"  # where older folders have it
    of_5 = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<unk>"]}
    older = {"chat_template": template, "add_eos_token": True}  # which transformers 5 does not obey, and others do
    path.write_text(json.dumps(json.loads(path.read_text()) | older | of_5))
    for name in ("tokenizer.model", "vocab.json", "merges.txt"):
        (base / name).write_bytes(b"pieces")
    (base / "pytorch_model.bin").write_bytes(b"a pickle")
    generation = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 77}
    generation |= {"min_p": 0.1, "early_stopping": True, "repetition_penalty": 1.3, "max_length": 77}
    (base / "generation_config.json").write_text(json.dumps(generation))
    change_config(auto_map={"AutoModel": "code.X"}, rms_norm_eps=1e-4, eos_token_id=[2, 66])(base, None)
    make_adapter(out / "adapter", base)
    assert merge(out) == 0
    merged = out / "merged"
    assert (merged / "chat_template.jinja").read_text() == template
    written = json.loads((merged / "tokenizer_config.json").read_text())
    assert not older.keys() & written.keys() and written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == ["<unk>"] and "extra_special_tokens" not in written
    assert all((merged / name).read_bytes() == b"pieces" for name in ("tokenizer.model", "vocab.json", "merges.txt"))
    assert not (merged / "pytorch_model.bin").exists()
    written = json.loads((merged / "config.json").read_text())
    assert "auto_map" not in written and written["rms_norm_eps"] == 1e-4
    assert written["dtype"] == written["torch_dtype"] == "float32"
    generation = json.loads((merged / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 77]  # as transformers and test_llama.py: config.json's do not count
    tokens = {f"{name}_token_id" for name in ("bos", "pad", "eos")}
    assert generation.keys() <= tokens | {"do_sample", "max_length", "transformers_version"}
    assert generation["do_sample"] is False and generation["max_length"] == 77


def card_of(out, base, run=(), **report):
    """The model card of a merge that passed its check."""
    given = {
        "verified": True,
        "base_model": base,
        "trained_on": "4bit",
        "merge_base": "4bit",
        "dtype": "bfloat16",
        "check_rows": 2,
        "answer_tokens": 9,
        "comparison": {"bfloat16": {"equal_greedy_tokens": 0.99}},
        "versions": {"transformers": "5"},
        "problems": [],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "fetch", lambda base, weights: Path(base))  # no hub
        run = {"adapter_sha256": "c" * 64} | dict(run)
        return merged_folder.model_card(out, base, run, given | report, tasks.TASKS)


def test_the_card_of_a_hub_model_and_hub_data_names_both_and_their_licences(out):
    licences = {"meta-llama/Meta-Llama-3-8B": "llama3", "meta-llama/Llama-2-7b-hf": "llama2"}
    licences |= {"HuggingFaceTB/SmolLM2-135M": "apache-2.0", "TinyLlama/TinyLlama_v1.1": "apache-2.0"}
    licences |= {"meta-llama/Llama-3.1-8B": "llama3.1", "someone/Llama-3-8B": "other"}
    for base, licence in licences.items():
        card = card_of(out, base)
        assert f"license: {licence}\n" in card and f"base_model: {base}\n" in card
        assert ("begins with" in card) == licence.startswith("llama3")
        assert ("which is Meta's" in card) == licence.startswith("llama")
    built_by(out, samsum={"source": "knkarthick/samsum", "revision": "1" * 40, "licence": "CC BY-NC-ND 4.0"})
    trained = {"run": {"train rows": "a" * 32}, "best_step": 5, "settings": {"seed": 3, "lora_dropout": 0.0}}
    card = card_of(out, base, trained)
    assert 'datasets: ["knkarthick/samsum"]\n' in card and "| samsum, CC BY-NC-ND 4.0 | https://hugging" in card
    assert "trivia_qa, C" not in card and "local folder" not in card and "at most 77 words" in card
    assert "| best_step | 5 |" in card and "| lora_dropout | 0.0 |" in card and "| seed | 3 |" in card
    assert card.startswith("---\nlanguage: en\n")


TRAINED = {"run": {"train rows": "a" * 32}}


@pytest.mark.parametrize("revision", [None, "1" * 40])
def test_the_card_of_your_own_data_claims_no_licence_and_shows_your_prompt(revision, out):
    prompt = "Put {word} into \\boxed{{}}"
    own = {"source": "someone/words", "revision": revision, "licence": tasks.TASKS["own"].LICENCE}
    built_by(out, {"own": prompt}, own=own)
    card = card_of(out, "someone/model", TRAINED)
    assert "no licence is recorded" in card and "no licence claimed" in card and "your own" not in card
    assert "\nlanguage" not in card
    assert ("| https://huggingface.co/datasets/someone/words |" in card) == bool(revision)
    assert "published ones" not in card and "77 words" not in card and "CC BY" not in card and "colon" not in card
    assert 'r"""Put {word} into \\boxed{}"""' in card and "max_new_tokens=256)\n" in card
    assert "print(text.strip())\n" in card and "first line counts" not in card and '"stop"' not in card


@pytest.mark.parametrize("prompt", ['"""{x}""" it', 'Say "{x}"', "{x}\\", '```\n{x}\n```\nIs it "so"?', "\\b {x}"])
def test_the_example_of_the_card_is_python_whatever_your_prompt_has(prompt, out):
    built_by(out, {"own": prompt}, own=LOCAL | {"licence": tasks.TASKS["own"].LICENCE})
    card = card_of(out, "someone/model", TRAINED)
    code = card.split("\n```python\n")[1].split("\n```\n")[0]
    [value] = re.findall(r"^prompt = (.*?)\n(?:inputs|messages) = ", code, re.DOTALL | re.MULTILINE)
    assert ast.literal_eval(value) == prompt
    fence = "````" if "```" in prompt else "```"
    assert f"\n{fence}\n{prompt}\n{fence}\n" in card


def test_the_card_of_several_tasks_says_of_each_what_counts_and_how_long_it_may_be(out):
    own = LOCAL | {"licence": tasks.TASKS["own"].LICENCE}
    built_by(out, PROMPTS | {"own": "{prompt}"}, samsum=LOCAL, trivia_qa=LOCAL, own=own)
    card = card_of(out, "someone/model", TRAINED)
    assert "samsum is CC BY-NC-ND 4.0: no commercial use" in card and "For own, data of whoever" in card
    assert "Of an answer the first line counts, of a summary and a completion all of it." in card
    assert "max_new_tokens=256)  # 96 for a summary, 24 for an answer\n" in card
    assert '  # of an answer: print(text.strip().split("\\n")[0])\n' in card
    built_by(out, {"samsum": PROMPTS["samsum"]}, samsum=LOCAL)
    card = card_of(out, "someone/model", TRAINED)
    assert "Nora: Are you coming" in card and "max_new_tokens=96)\n" in card and "an answer the first" not in card


def test_each_recipe_of_the_card_is_followed_by_the_command_that_checks_it(out):
    built_by(out, samsum=LOCAL)
    (out / "adapter").mkdir()
    (out / "adapter" / "adapter_config.json").write_text('{"r": 2, "rank_pattern": {"q_proj": 12}}')
    card = card_of(out, "someone/model", chat_template=True)
    recipes = card.split("## Serve, and check")[1].split("## Scores")[0]
    servers = [line for line in recipes.split("\n") if re.match("vllm|python convert|ollama|transformers", line)]
    checks = re.findall(r"^python test_llama.py --server (\S+)", recipes, re.MULTILINE)
    assert len(servers) == len(checks) == 5
    assert "--max-lora-rank 16 " in recipes and "--chat-template outputs/adapter/chat_template.jinja\n" in recipes
    assert "--chat-template" not in card_of(out, "someone/model")
    options = [command.split()[2:] for command in re.findall(r"^python test_llama.py .*", recipes, re.MULTILINE)]
    for words in options:
        tester.parse_args(words[: words.index("#")] if "#" in words else words)


def test_of_another_data_set_the_card_says_nothing(out):
    built_by(out, samsum=LOCAL)
    for rows in ("a" * 31 + "b", "a" * 16, None):
        card = card_of(out, "someone/model", {"run": {"train rows": rows}} if rows else {})
        assert "CC BY" not in card and "Summarize" not in card and "```python" not in card and "77" not in card
        assert "not recorded here" in card


def test_scores_of_another_adapter_base_or_data_set_are_not_the_cards(out):
    intervals, systems = dict.fromkeys(("exact_match", "f1", "perplexity"), [0, 9]), ("base", "tuned")
    part = {"examples": 6, "base": {"exact_match": 1, "f1": 2}, "tuned": {"exact_match": 33.3, "f1": 4}}
    part |= {"perplexity": dict.fromkeys(systems, {"perplexity": 5}), "intervals": dict.fromkeys(systems, intervals)}
    own = {"adapter": "c" * 16, "weights": "w" * 16, "rows": "b" * 32, "4_bit": False}
    others = [{"adapter": "d" * 16}, {"adapter": "none"}, {"weights": "x" * 16}, {"rows": "d" * 32}, {"rows": ""}]
    built_by(out, samsum=LOCAL)
    run = {"weights": "w" * 16, "run": {"train rows": "a" * 32}}
    for other in ({}, *others):
        made = {"tuned": own | other, "base": own | {"adapter": "none"}}
        (out / "evaluation.json").write_text(json.dumps({"trivia_qa": part | {"made_from": made}, "settings": {}}))
        card = card_of(out, "someone/model", run)
        assert ("| trivia_qa, 6 | exact_match | 1.00 [0.00, 9.00] | 33.30 [0.00, 9.00] |\n" in card) == (not other)
        assert ("Not measured" in card) == bool(other)
        assert "adapter on the base in 4 bits" not in card  # trained so, tested otherwise
    for unknown in ({"trivia_qa": part}, {"trivia_qa": part | {"made_from": {"tuned": None}}}, {"trivia_qa": None}):
        (out / "evaluation.json").write_text(json.dumps(unknown))
        assert "Not measured" in card_of(out, "someone/model", run)


def test_files_of_yours_in_merged_are_not_lost(out, tmp_path, capsys):
    make_adapter(out / "adapter", tmp_path / "base")
    (out / "merged" / "thesis.txt").write_text("mine")
    assert merge(out) == 2 and "merged has files that are not of a merge (thesis.txt): move" in capsys.readouterr().err
    (out / "merged" / "thesis.txt").rename(tmp_path / "thesis.txt")
    assert merge(out) == 0 and merge(out) == 0
    (out / "merged" / ".DS_Store").write_text("nobody's")
    (out / "merged" / "merge.json").write_text('{"sha256": 5}')
    assert merge(out) == 2 and "files that are not of a merge (Modelfile, README.md" in capsys.readouterr().err
    shutil.rmtree(out / "merged")
    assert merge(out) == 0
    (out / "merged" / ".DS_Store").write_text("nobody's")
    assert merge(out) == 0
    (out / "merged" / "tuned.gguf").write_text("made of it")
    assert merge(out) == 2 and "(tuned.gguf)" in capsys.readouterr().err and (out / "merged/tuned.gguf").exists()
