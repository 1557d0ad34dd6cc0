"""merge_llama.py: the merged model is PEFT's, whatever the adapter; what is not is found, and nothing is lost."""

import base64
import contextlib
import gc
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import FIXTURES, PROCESSES, run, snapshot
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import llama
import merge_llama
from common import TASKS, only_run_in, sha256

LLAMAS = ("tiny_llama2", "tiny_llama3")


def merge(out, *arguments):
    """merge_llama.py in this process; its exit code."""
    try:
        merge_llama.main(["--output-dir", str(out), *map(str, arguments)])
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


@pytest.fixture
def out(dataset, tmp_path):
    """An output dir with a data set, a sharded float32 copy of tiny_llama2 as base, and an old merged folder."""
    (tmp_path / "out" / "merged").mkdir(parents=True)
    (tmp_path / "out" / "merged" / "old").write_text("still here")
    (tmp_path / "out" / "dataset").symlink_to(dataset / "dataset")
    make_base(tmp_path / "base", "tiny_llama2", shard="300KB")
    return tmp_path / "out"


def stands(out):
    """Whether the old merged folder is still there, alone."""
    return snapshot(out / "merged") == {"old": b"still here"} and not (out / ".merged.new").exists()


def tensors(folder):
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
    ("tiny_llama3", torch.float32, "400KB", {"r": 8}),  # tied embeddings
    ("tiny_llama3", torch.bfloat16, "5GB", {"r": 64, "use_rslora": True} | PATTERNS),
    ("tiny_llama2", torch.float32, "100KB", {"r": 64, "use_rslora": True, "lora_alpha": 5}),
    ("tiny_llama2", torch.bfloat16, "100KB", {"r": 8} | PATTERNS),
    ("tiny_llama2", torch.float16, "5GB", {"r": 8, "target_modules": ["q_proj", "down_proj", "lm_head"]}),
]


@pytest.mark.parametrize("name, dtype, shard, options", ADAPTERS)
def test_every_tensor_is_that_of_pefts_merge_and_the_others_are_the_bases(name, dtype, shard, options, out, tmp_path):
    base = make_base(tmp_path / "model", name, dtype, shard)
    make_adapter(out / "adapter", base, **options)
    assert merge(out, "--check-rows", 2) == 0 and report(out / "merged")["merge_base"] == "16bit"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = PeftModel.from_pretrained(model, out / "adapter").merge_and_unload().state_dict()
    merged, before, changed = tensors(out / "merged"), tensors(base), 0
    assert merged.keys() == before.keys() and len(merged) > 15
    for key, tensor in merged.items():
        if torch.equal(expected[key], before[key].float()):
            assert torch.equal(tensor.view(torch.uint8), before[key].view(torch.uint8))
        else:
            changed += 1
            assert_within_a_rounding_step(tensor, expected[key])
    assert changed == len(load_file(out / "adapter" / "adapter_model.safetensors")) // 2
    for path in base.glob("*.safetensors"):
        with safe_open(path, "pt") as one, safe_open(out / "merged" / path.name, "pt") as two:
            assert set(one.keys()) == set(two.keys()) and two.metadata() == {"format": "pt"}
    for path in base.glob("*.index.json"):
        assert (out / "merged" / path.name).read_bytes() == path.read_bytes()
    assert not (out / "merged" / "old").exists()


@pytest.mark.parametrize("targets", ["all-linear", ["v_proj"]])
def test_4bit_is_pefts_merge_into_the_base_as_loaded_in_4_bits(targets, out, tmp_path):
    make_adapter(out / "adapter", tmp_path / "base", trained_in_4bit=True, target_modules=targets)
    assert merge(out) == 0 and report(out / "merged")["merge_base"] == "4bit"
    model = llama.load_model(str(tmp_path / "base"), load_in_4bit=True).dequantize()
    expected = PeftModel.from_pretrained(model, out / "adapter").merge_and_unload().state_dict()
    before, differ = tensors(tmp_path / "base"), set()
    for name, tensor in tensors(out / "merged").items():
        assert (tensor - expected[name]).abs().max() <= 1e-6
        if not torch.equal(tensor, before[name]):
            differ.add(name)
    assert differ == {name for name in before if "proj" in name}


def test_the_figures_are_those_of_the_whole_models(out, tmp_path, capsys):
    make_adapter(out / "adapter", tmp_path / "base", trained_in_4bit=True)
    assert merge(out, "--merge-base", "16bit", "--check-rows", 5) == 0
    lines = capsys.readouterr().out.split("\n")
    assert all(len(line) <= 80 for line in lines if not line.startswith("wrote "))  # which ends with a path
    content = report(out / "merged")
    assert content["check_rows"] == 5 and content["trained_on"] == "4bit" and content["merge_base"] == "16bit"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    rows = llama.load_rows(out, "validation")
    tasks = [[row for row in rows if row["task"] == task] for task in TASKS]
    rows = [row for pair in zip(*tasks, strict=True) for row in pair][:5]

    def logits(model):
        found = []
        for row in rows:
            prompt = tokenizer(row["prompt"]).input_ids
            ids = tokenizer(row["prompt"] + row["completion"]).input_ids + [tokenizer.eos_token_id]
            with torch.no_grad():
                found.append((model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1], ids[len(prompt) :]))
        return torch.cat([x for x, _ in found]), torch.tensor(sum((gold for _, gold in found), []))

    merged, gold = logits(AutoModelForCausalLM.from_pretrained(out / "merged"))
    assert content["answer_tokens"] == len(gold)
    for kind in ("4bit", "16bit"):
        base = llama.load_model(str(tmp_path / "base"), load_in_4bit=kind == "4bit")
        adapter, _ = logits(PeftModel.from_pretrained(base.dequantize() if kind == "4bit" else base, out / "adapter"))
        figures, difference = content["comparison"][kind], (adapter - merged).abs()
        near = {"rel": 1e-3, "abs": 1e-5}
        assert figures["largest_logit_difference"] == pytest.approx(difference.max().item(), **near)
        assert figures["mean_logit_difference"] == pytest.approx(difference.mean().item(), **near)
        assert figures["relative_difference"] == pytest.approx((difference.mean() / adapter.std()).item(), **near)
        same = (adapter.argmax(-1) == merged.argmax(-1)).float().mean().item()
        assert figures["equal_greedy_tokens"] == pytest.approx(same)
        for key, some in {"adapter_perplexity": adapter, "merged_perplexity": merged}.items():
            perplexity = torch.nn.functional.cross_entropy(some, gold).exp().item()
            assert figures[key] == pytest.approx(perplexity, rel=1e-4)
    assert content["comparison"]["16bit"]["largest_logit_difference"] < 1e-3
    assert content["comparison"]["4bit"]["largest_logit_difference"] > 0.01


def test_layers_that_have_no_room_stay_on_the_disk_with_the_same_logits(out, tmp_path, monkeypatch):
    """Rows of several lengths in one pass, too: none sees another."""
    rows = [([1, 5, 6, 7], [8, 9]), ([1, 3], [4]), ([1, *range(20, 40)], [9, 9, 2])]
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        alone = torch.cat([model(torch.tensor([p + c])).logits[0, len(p) - 1 : -1] for p, c in rows])
    whole = merge_llama.read_merged(tmp_path / "base", rows)
    assert torch.allclose(whole, alone, atol=1e-5)
    size = sum(path.stat().st_size for path in shards(tmp_path / "base"))
    little = SimpleNamespace(available=int(0.9 * size), total=size)
    seen, real = [], merge_llama.logits_of
    monkeypatch.setattr(psutil, "virtual_memory", lambda: little)
    monkeypatch.setattr(merge_llama, "logits_of", lambda *a: (seen.append(a[0].hf_device_map), real(*a))[1])
    assert torch.equal(merge_llama.read_merged(tmp_path / "base", rows), whole)
    assert "disk" in seen[0].values() and "cpu" in seen[0].values()


def test_one_model_is_in_memory_at_a_time(out, tmp_path, monkeypatch):
    def models():
        gc.collect()
        return sum(type(thing) is LlamaForCausalLM for thing in gc.get_objects())

    make_adapter(out / "adapter", tmp_path / "base", trained_in_4bit=True)
    before, seen = models(), []
    for name in ("load_tuned", "read_merged"):
        real = getattr(merge_llama, name)
        monkeypatch.setattr(merge_llama, name, lambda *a, real=real: (seen.append(models()), real(*a))[1])
    assert merge(out, "--merge-base", "16bit", "--check-rows", 1) == 0
    assert seen == [before] * 3


def test_rounding_is_reported_and_not_refused(out, tmp_path, capsys):
    """Eight random layers with large weights make much of it: by more than the old limits, and the merge is right."""
    torch.manual_seed(0)
    base = make_base(tmp_path / "rough", "tiny_llama2", torch.bfloat16)
    config = LlamaConfig.from_pretrained(base, initializer_range=0.5, num_hidden_layers=8)
    LlamaForCausalLM(config).bfloat16().save_pretrained(base)
    make_adapter(out / "adapter", base)
    assert merge(out, "--check-rows", 8) == 0
    figures = report(out / "merged")["comparison"]["16bit"]
    assert 0.02 < figures["relative_difference"] < 0.1 and figures["equal_greedy_tokens"] < 0.95


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
    assert report(marked)["verified"] is False and words[0] in " ".join(report(marked)["problems"])
    card = (marked / "README.md").read_text()
    assert "UNVERIFIED" in card.split("\n#")[0] and words[0] in card


def shards(base):
    return sorted(base.glob("*.safetensors"))


def before_the_check(monkeypatch, change):
    """Have `change()` called between merge and check."""
    real = merge_llama.wrong_tensors
    monkeypatch.setattr(merge_llama, "wrong_tensors", lambda *a: (change(), real(*a))[1])


@pytest.mark.parametrize("what", ["base", "merged"])
def test_one_bit_changed_between_merge_and_check_is_found(what, out, tmp_path, capsys, monkeypatch):
    make_adapter(out / "adapter", tmp_path / "base")
    folder = {"base": tmp_path / "base", "merged": out / ".merged.new"}[what]
    before_the_check(monkeypatch, lambda: flip(folder / shards(tmp_path / "base")[0].name))
    assert merge(out) == 1
    assert_unverified(out, capsys, "differs from")


def test_an_adapter_that_changes_after_it_was_loaded_is_found(out, tmp_path, capsys, monkeypatch):
    make_adapter(out / "adapter", tmp_path / "base")
    real, path = merge_llama.merge, out / "adapter" / "adapter_model.safetensors"
    monkeypatch.setattr(merge_llama, "merge", lambda *a: (flip(path), real(*a))[1])
    assert merge(out) == 1
    assert_unverified(out, capsys, "differs from PEFT's merge")


@pytest.mark.parametrize("change", [lambda path: os.truncate(path, 3000), Path.unlink])
def test_a_merged_file_that_cannot_be_read_is_unverified(change, out, tmp_path, capsys, monkeypatch):
    make_adapter(out / "adapter", tmp_path / "base")
    before_the_check(monkeypatch, lambda: change(out / ".merged.new" / shards(tmp_path / "base")[1].name))
    assert merge(out) == 1
    assert_unverified(out, capsys, "cannot be loaded")


def test_a_folder_that_transformers_cannot_load_is_unverified(out, tmp_path, capsys, monkeypatch):
    make_adapter(out / "adapter", tmp_path / "base")
    before_the_check(monkeypatch, lambda: (out / ".merged.new" / "config.json").write_text("{}"))
    assert merge(out) == 1
    assert_unverified(out, capsys, "cannot be loaded")


def test_ctrl_c_is_one_line_and_leaves_the_old_folder(out, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        assert (out / ".merged.new" / "config.json").is_file()
        raise KeyboardInterrupt

    make_adapter(out / "adapter", tmp_path / "base")
    monkeypatch.setattr(merge_llama, "wrong_tensors", interrupted)
    assert merge(out) == 130
    assert "interrupted: " in capsys.readouterr().err and stands(out)


WRONG = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight", "model.norm.weight",
         "model.embed_tokens.weight", "lm_head.weight"]  # fmt: skip


def test_a_tensor_that_was_merged_wrong_is_named(out, tmp_path, capsys, monkeypatch):
    make_adapter(out / "adapter", tmp_path / "base", target_modules=["up_proj"])
    name = None

    def wrong():
        for path in (out / ".merged.new").glob("*.safetensors"):
            content = load_file(path)
            if name in content:
                content[name].view(-1)[content[name].view(-1).abs().argmax()] += 2e-6
                save_file(content, path, metadata={"format": "pt"})

    before_the_check(monkeypatch, wrong)
    for name in WRONG:
        assert merge(out, "--check-rows", 1) == 1
        assert_unverified(out, capsys, name, "differs from")


def test_a_wrong_scale_or_a_tensor_of_another_dtype_is_found(out, tmp_path, capsys, monkeypatch):
    make_adapter(out / "adapter", tmp_path / "base")
    real = merge_llama.scales_of
    with monkeypatch.context() as patch:
        patch.setattr(merge_llama, "scales_of", lambda *a: {key: 1.01 * scale for key, scale in real(*a).items()})
        assert merge(out) == 1
    assert_unverified(out, capsys, "model.layers.0.", "differs from PEFT's merge")

    def widened():
        path = out / ".merged.new" / shards(tmp_path / "base")[0].name
        save_file({name: tensor.double() for name, tensor in load_file(path).items()}, path)

    before_the_check(monkeypatch, widened)
    assert merge(out) == 1
    assert_unverified(out, capsys, "has another dtype")


@pytest.mark.parametrize("off", [0.2, math.nan])
def test_logits_far_from_base_and_adapters_fail(off, out, tmp_path, capsys, monkeypatch):
    make_adapter(out / "adapter", tmp_path / "base")
    real = merge_llama.read_merged
    monkeypatch.setattr(merge_llama, "read_merged", lambda *a: (x := real(*a)) + off * x.std())
    assert merge(out) == 1
    assert_unverified(out, capsys, "of their deviation from base and adapter's")


REFUSED = [
    ("use_dora", True), ("modules_to_save", ["lm_head"]), ("trainable_token_indices", [1]), ("bias", "all"),
    ("lora_bias", True), ("target_parameters", ["x"]), ("fan_in_fan_out", True), ("layer_replication", [[0, 1]]),
    ("peft_type", "IA3"), ("init_lora_weights", "pissa"), ("alora_invocation_tokens", [1]), ("use_what_comes", True),
]  # fmt: skip


def test_what_is_more_than_lora_is_refused_by_name(out, tmp_path, capsys):
    make_adapter(out / "adapter", tmp_path / "base")
    path = out / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    for name, value in REFUSED:
        path.write_text(json.dumps(config | {name: value}))
        assert merge(out) == 2
        assert name in (error := capsys.readouterr().err) and "does not merge" in error and error.count("\n") == 1
    assert stands(out)


def change_adapter(change):
    def apply(base, adapter):
        content = load_file(adapter / "adapter_model.safetensors")
        change(content)
        save_file(content, adapter / "adapter_model.safetensors", metadata={"format": "pt"})

    return apply


def change_json(name, change):
    def apply(base, adapter):
        content = json.loads((base / name).read_text())
        change(content)
        (base / name).write_text(json.dumps(content))

    return apply


def pickled(base, adapter):
    for path in [*shards(base), base / "model.safetensors.index.json"]:
        path.unlink()
    (base / "pytorch_model.bin").write_bytes(b"a pickle")


def retyped(base, adapter):
    content = load_file(shards(base)[1])
    save_file({name: t.to(torch.float8_e4m3fn) for name, t in content.items()}, shards(base)[1])


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
    "other names": (renamed, "name their tensors otherwise"),
    "a quantised base": (change_json("config.json", lambda c: c.update(quantization_config={"quant_method": "gptq"})),
                         "is quantised"),
    "a config of another shape": (change_json("config.json", lambda c: c.update(intermediate_size=9)),
                                  "cannot load the model in "),
    "more layers": (change_json("config.json", lambda c: c.update(num_hidden_layers=3)), "lacks weights"),
    "another model": (change_json("config.json", lambda c: c.update(model_type="gpt2")), "is a gpt2 model"),
    "a tensor of another shape": (change_adapter(lambda c: c.update({UP: c[UP][:, :9].clone()})), "does not load"),
    "a tensor too few": (change_adapter(lambda c: c.pop(UP)), "does not load"),
    "trained embeddings": (change_adapter(lambda c: c.update(embed=torch.ones(2))), "does not load"),
    "no number": (change_adapter(lambda c: c[UP].fill_(float("nan"))), "up_proj.weight is not finite"),
}  # fmt: skip


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
    for target, words in {"lm_head": "also the embeddings", "embed_tokens": "no linear layer"}.items():
        make_adapter(out / "adapter", base, target_modules=["q_proj", target])
        assert merge(out) == 2
        assert words in capsys.readouterr().err and stands(out)
        shutil.rmtree(out / "adapter")


def identified(base, out, **others):
    """What run.json of a new adapter says of what it was made from."""
    run = {"weights": llama.weights_identity(str(base)), "train rows": "a" * 32, "validation rows": "b" * 32}
    return {"run": run | others}


def test_another_base_or_adapter_than_run_json_names_is_refused(out, tmp_path, capsys):
    base = tmp_path / "base"
    make_adapter(out / "adapter", base, run=identified(base, out))
    path, now = out / "adapter" / "adapter_model.safetensors", llama.weights_identity(str(base))
    flip(shards(base)[-1])
    then = llama.weights_identity(str(base))
    assert merge(out) == 2 and stands(out)
    error = capsys.readouterr().err
    assert now in error and then in error and str(base) in error and "run train_llama.py again" in error
    flip(shards(base)[-1])  # back again
    run = json.loads((out / "adapter" / "run.json").read_text())
    (out / "adapter" / "run.json").write_text(json.dumps(run | {"adapter_sha256": "0" * 64}))
    assert merge(out) == 2 and stands(out)
    error = capsys.readouterr().err
    assert "0" * 64 in error and sha256(path) in error
    (out / "adapter" / "run.json").write_text(json.dumps(run | {"adapter_sha256": sha256(path)}))
    assert merge(out) == 0
    content = report(out / "merged")
    assert content["base_weights"] == now and content["adapter_sha256"] == sha256(path)
    assert content["dataset"] == {"train rows": "a" * 32, "validation rows": "b" * 32}


@pytest.mark.parametrize("stale", ["shards of other weights", "an index without shards"])
def test_of_two_sets_of_weights_those_that_transformers_loads_are_merged(stale, out, tmp_path):
    base = tmp_path / "base"
    for path in shards(base):
        if stale == "an index without shards":
            path.unlink()
        else:
            save_file({n: 1.05 * t for n, t in load_file(path).items()}, path, metadata={"format": "pt"})
    shutil.copy(make_base(tmp_path / "whole", "tiny_llama2") / "model.safetensors", base)
    make_adapter(out / "adapter", base)
    assert merge(out) == 0
    assert [path.name for path in shards(out / "merged")] == ["model.safetensors"]
    assert not list((out / "merged").glob("*.index.json"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    expected = PeftModel.from_pretrained(model, out / "adapter").merge_and_unload().state_dict()
    loaded = AutoModelForCausalLM.from_pretrained(out / "merged").state_dict()
    assert all((loaded[name] - tensor).abs().max() < 1e-6 for name, tensor in expected.items())


def test_a_single_shard_that_an_index_names_keeps_both(out, tmp_path):
    base = make_base(tmp_path / "single", "tiny_llama2")
    names = dict.fromkeys(load_file(base / "model.safetensors"), "model-00001-of-00001.safetensors")
    (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    make_adapter(out / "adapter", base)
    assert merge(out) == 0


def test_merged_and_adapter_and_the_output_folder_may_be_links(out, tmp_path, capsys, monkeypatch):
    make_adapter(tmp_path / "elsewhere", tmp_path / "base")
    (out / "adapter").symlink_to(tmp_path / "elsewhere")
    (out / "merged").rename(tmp_path / "big")
    (out / "merged").symlink_to(tmp_path / "big")
    (tmp_path / "link").symlink_to(out)
    for _ in range(2):
        assert merge(tmp_path / "link") == 0
        assert (out / "merged").readlink() == tmp_path / "big" and report(tmp_path / "big")["verified"]
    monkeypatch.setattr(merge_llama, "MAX_RELATIVE_DIFFERENCE", -1)
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
    for wrong in (["--push-to-hub", "me"], ["--check-rows", "0"], ["--merge-base", "8bit"]):
        assert merge(tmp_path / "typo", *wrong) == 2
        assert wrong[0] in capsys.readouterr().err


def killed(out, name, call):
    """In a process of its own: merge, and die at the given call of merge_llama's function `name`."""
    real, calls = getattr(merge_llama, name), []

    def dying(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    setattr(merge_llama, name, dying)
    merge(out)


def test_killed_at_any_moment_nothing_looks_finished_and_the_rerun_succeeds(out, tmp_path, monkeypatch):
    make_adapter(out / "adapter", tmp_path / "base")
    moments = [("merge_shard", 3), ("wrong_tensors", 1), ("finish", 1), ("show", 1)]
    processes = []
    for moment in moments:
        process = PROCESSES.Process(target=killed, args=(out, *moment))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, moment
        assert (out / ".merged.new").is_dir() and snapshot(out / "merged") == {"old": b"still here"}
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


def test_a_full_disk_is_one_sentence_and_the_rerun_succeeds(out, tmp_path, capsys, monkeypatch):
    make_adapter(out / "adapter", tmp_path / "base")
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2200k", "none", small], capture_output=True).returncode:
        pytest.skip("cannot mount a small file system")
    try:
        shutil.copytree(out, small / "out", symlinks=True)
        monkeypatch.setattr(merge_llama, "SMALL_FILES", -(10**9))
        (small / "filler").write_bytes(bytes(1_400_000))
        assert merge(small / "out") == 2
        error = capsys.readouterr().err
        assert "No space left" in error and "make room" in error and "Traceback" not in error
        assert stands(small / "out")
        (small / "filler").unlink()
        assert merge(small / "out") == 0
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.parametrize("name", LLAMAS)
def test_the_merged_model_predicts_what_the_adapter_predicts(name, out, tmp_path):
    base = make_base(tmp_path / "wide", name, shard="200KB")  # in float32 nothing is rounded
    make_adapter(out / "adapter", base, trained_in_4bit=True)
    for path in base.glob("tokenizer*"):
        shutil.copy(path, out / "adapter")
    assert merge(out) == 0
    short = ["--output-dir", out, "--no-compare-with-base", "--samsum-max-new-tokens", "12"]
    for more in (["--name", "adapter"], ["--name", "merged", "--model", out / "merged", "--no-load-in-4bit"]):
        result = run("test_llama.py", *short, *more)
        assert result.returncode == 0, result.stderr
    for task in TASKS:
        one, two = (
            json.loads((out / f"{task}_predictions_{name}.json").read_text()) for name in ("adapter", "merged")
        )
        assert [e["prediction"] for e in one["examples"]] == [e["prediction"] for e in two["examples"]]
        assert one["perplexity"]["tuned"]["nll_sum"] == pytest.approx(two["perplexity"]["tuned"]["nll_sum"], rel=1e-5)


PROMPTS = {
    "samsum": "Summarize the dialogue.\n\nDialogue:\n{dialogue}\n\nSummary:",
    "trivia_qa": "Answer the question from the context.\n\nContext:\n{context}\n\nQuestion: {question}\nAnswer:",
}


def built_by(out, **sources):
    """dataset_report.json of the rows that `identified` names."""
    built = {
        "sources": sources,
        "prompts": PROMPTS,
        "settings": {"max_context_words": 77},
        "splits": {"train": {"sha256": "a" * 64}},
    }
    (out / "dataset_report.json").write_text(json.dumps(built))


LOCAL = {"source": "/secret/place/samsum", "revision": None, "licence": "CC BY-NC-ND 4.0"}


@pytest.mark.parametrize("name", LLAMAS)
def test_the_folder_ends_at_every_end_token_holds_no_code_and_its_cards_example_runs(
    name, out, tmp_path, monkeypatch, capsys
):
    make_adapter(out / "adapter", FIXTURES / name, run=identified(FIXTURES / name, out))
    built_by(out, samsum=LOCAL)
    if name == "tiny_llama3":  # once as a user does
        result = run("merge_llama.py", "--output-dir", out)
        assert result.returncode == 0 and result.stderr == "", result.stderr
    else:
        assert merge(out) == 0
    merged = out / "merged"
    names = {path.name for path in merged.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "README.md", "merge.json"} <= names
    assert {name.rsplit(".")[-1] for name in names} == {"json", "md", "safetensors"}
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in merged.iterdir())
    content = report(merged)
    assert content["sha256"] == {n: sha256(merged / n) for n in names - {"merge.json"}}
    generation = json.loads((merged / "generation_config.json").read_text())
    vocabulary = AutoTokenizer.from_pretrained(merged).get_vocab()
    assert set(generation["eos_token_id"]) >= {vocabulary[t] for t in llama.END_TOKENS if t in vocabulary}
    assert generation["do_sample"] is False and "temperature" not in generation
    card = (merged / "README.md").read_text()
    assert not any(str(path) in card + json.dumps(content) for path in (FIXTURES, out, Path.home(), "/secret"))
    assert "license: other" in card and "local folder" in card and "datasets:" not in card  # the rows are invented
    request = json.loads(re.search(r"<<END\n(.*?)END", card, re.DOTALL)[1])
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    monkeypatch.chdir(merged)
    capsys.readouterr()
    scope = {}
    exec(compile(code, "card", "exec"), scope)
    assert capsys.readouterr().out.count("\n") == 1
    assert request["prompt"] == scope["prompt"] and request["prompt"].startswith("Answer the question")


def test_chat_template_tokenizer_model_and_the_bases_own_settings_are_kept(out, tmp_path):
    base = tmp_path / "base"
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "tokenizer.model").write_bytes(b"pieces")
    (base / "pytorch_model.bin").write_bytes(b"a pickle")
    (base / "generation_config.json").write_text(
        '{"do_sample": true, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 77}'
    )
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(
        json.dumps(config | {"auto_map": {"AutoModel": "code.X"}, "rms_norm_eps": 1e-4, "eos_token_id": [2, 66]})
    )
    make_adapter(out / "adapter", base)
    assert merge(out) == 0
    merged = out / "merged"
    assert (merged / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (merged / "tokenizer.model").read_bytes() == b"pieces" and not (merged / "pytorch_model.bin").exists()
    written = json.loads((merged / "config.json").read_text())
    assert "auto_map" not in written and written["rms_norm_eps"] == 1e-4
    generation = json.loads((merged / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 77]  # as transformers and test_llama.py: config.json's do not count
    assert not {"temperature", "top_p"} & generation.keys() and generation["do_sample"] is False


def test_transformers_serve_answers_a_completion_from_the_folder(out, tmp_path):
    make_adapter(out / "adapter", tmp_path / "base")
    assert merge(out) == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        Path(sys.executable).parent / "transformers",
        "serve",
        out / "merged",
        "--host",
        "127.0.0.1",
        "--port",
        port,
    ]
    body = {"model": str(out / "merged"), "prompt": "Answer the question.\n\nQuestion: Who?\nAnswer:", "max_tokens": 5}
    body["temperature"] = 0
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})  # fmt: skip
    client = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log,
                                   env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})  # fmt: skip
    try:
        for _ in range(600):
            with contextlib.suppress(urllib.error.URLError):
                client.open(f"http://127.0.0.1:{port}/health")
                break
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        answer = json.load(client.open(request, timeout=120))
    finally:
        process.terminate()
        process.wait(30)
    tokenizer = AutoTokenizer.from_pretrained(out / "merged")
    inputs = tokenizer(body["prompt"], return_tensors="pt")
    ids = AutoModelForCausalLM.from_pretrained(out / "merged").generate(**inputs, max_new_tokens=5)[0]
    expected = tokenizer.decode(ids[inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert answer["choices"][0]["text"] == expected


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload needs; `server.files` is what arrived."""

    def do_POST(self):
        server, body = self.server, self.rfile.read(int(self.headers["Content-Length"] or 0))
        server.seen.append((self.path, body, self.headers["Authorization"]))
        if server.refuse:
            self.answer({"error": "not yours"}, 403)
        elif self.path == "/api/repos/create":
            server.created = json.loads(body)
            self.answer({"url": f"{server.url}/me/tuned", "id": "me/tuned"})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = ["lfs" if name.endswith(".safetensors") else "regular" for name in names]
            self.answer({"files": [{"path": n, "uploadMode": m, "shouldIgnore": False, "oid": None}
                                   for n, m in zip(names, modes, strict=True)]})  # fmt: skip
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [{"oid": o["oid"], "size": o["size"],
                        "actions": {"upload": {"href": f"{server.url}/put/{o['oid']}"}}}
                       for o in json.loads(body)["objects"]]  # fmt: skip
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    server.files[line["value"]["path"]] = server.puts[line["value"]["oid"]]
            self.answer(
                {"commitUrl": f"{server.url}/me/tuned/commit/{'1' * 40}", "commitOid": "1" * 40, "success": True}
            )
        else:
            self.answer({})

    def do_PUT(self):
        self.server.puts[self.path.split("/")[-1]] = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append((self.path, b"", self.headers["Authorization"]))
        self.answer({})

    def do_GET(self):
        self.server.seen.append((self.path, b"", self.headers["Authorization"]))
        self.answer({"id": "me/tuned", "private": self.server.private, "sha": "1" * 40, "siblings": []})

    def answer(self, content, status=200):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def test_the_verified_folder_goes_to_a_private_repository_and_to_no_public_one(out, tmp_path, capsys, monkeypatch):
    from huggingface_hub import constants

    make_adapter(out / "adapter", tmp_path / "base", run=identified(tmp_path / "base", out))
    built_by(out, samsum=LOCAL)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    server.seen, server.files, server.puts, server.refuse, server.private = [], {}, {}, False, True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    try:
        assert merge(out, "--push-to-hub", "me/tuned") == 0
        assert server.created["name"] == "tuned" and server.created["visibility"] == "private"
        assert server.files == snapshot(out / "merged")
        assert "hf_secret" not in str([seen[:2] for seen in server.seen]) + str(server.files)
        assert {seen[2] for seen in server.seen if "/api/" in seen[0]} == {"Bearer hf_secret"}
        output = capsys.readouterr()
        assert "pushed to" in output.out and "hf_secret" not in output.out + output.err
        assert 'from_pretrained("me/tuned")' in (out / "merged" / "README.md").read_text()
        server.files.clear()
        server.private = False  # it was there before
        assert merge(out, "--push-to-hub", "me/tuned") == 2
        assert "public: give --no-private" in capsys.readouterr().err and not server.files
        server.refuse = True
        assert merge(out, "--push-to-hub", "me/tuned") == 2
        output = capsys.readouterr().err
        assert "cannot push to me/tuned" in output and "hf auth login" in output and "hf_secret" not in output
        assert report(out / "merged")["verified"] and not server.files
        server.seen.clear()
        monkeypatch.setattr(merge_llama, "MAX_RELATIVE_DIFFERENCE", -1)
        assert merge(out, "--push-to-hub", "me/tuned") == 1 and not server.seen
    finally:
        server.shutdown()
        server.server_close()


def card_of(out, base, run=(), **report):
    """The model card of a merge that passed its check."""
    given = {
        "verified": True,
        "base_model": base,
        "trained_on": "4bit",
        "merge_base": "4bit",
        "dtypes": ["bfloat16"],
        "check_rows": 2,
        "answer_tokens": 9,
        "comparison": {"4bit": {"equal_greedy_tokens": 0.99}},
        "versions": {"transformers": "5"},
        "problems": [],
    }
    arguments = merge_llama.parse_args(["--output-dir", str(out)])
    return merge_llama.model_card(arguments, base, {"adapter_sha256": "c" * 64} | dict(run), given | report)


def test_the_card_of_a_hub_model_and_hub_data_names_both_and_their_licences(out):
    licences = {"meta-llama/Meta-Llama-3-8B": "llama3", "meta-llama/Llama-2-7b-hf": "llama2",
                "meta-llama/Llama-3.1-8B": "llama3.1", "someone/Llama-3-8B": "other"}  # fmt: skip
    for base, licence in licences.items():
        card = card_of(out, base)
        assert f"license: {licence}\n" in card and f"base_model: {base}\n" in card
        assert ("begins with" in card) == licence.startswith("llama3")
    built_by(out, samsum={"source": "knkarthick/samsum", "revision": "1" * 40, "licence": "CC BY-NC-ND 4.0"})
    trained = {"run": {"train rows": "a" * 32}, "best_step": 5, "settings": {"seed": 3, "target_modules": ["x", "y"]}}
    card = card_of(out, base, trained)
    assert "- knkarthick/samsum\n" in card and "datasets/knkarthick/samsum) | CC BY-NC-ND 4.0 |" in card
    assert "trivia_qa]" not in card and "local folder" not in card and "at most 77 words" in card
    assert "weights kept from step | 5 |" in card and "| target_modules | x y |" in card and "| seed | 3 |" in card
    assert card.startswith("---\nlanguage: en\n")


def test_of_another_data_set_the_card_says_nothing(out):
    built_by(out, samsum=LOCAL)
    for rows in ("a" * 31 + "b", "a" * 16, None):
        card = card_of(out, "someone/model", {"run": {"train rows": rows}} if rows else {})
        assert "CC BY" not in card and "Summarize" not in card and "python" not in card and "77" not in card
        assert "not recorded here" in card


def test_scores_of_another_adapter_are_not_the_cards(out):
    part = {"examples": 6, "base": {"exact_match": 1, "f1": 2}, "tuned": {"exact_match": 33.3, "f1": 4},
            "perplexity": {name: {"perplexity": 5} for name in ("base", "tuned")},
            "intervals": {name: dict.fromkeys(("exact_match", "f1", "perplexity"), [0, 9])
                          for name in ("base", "tuned")}}  # fmt: skip
    made = {"tuned": {"adapter": "c" * 16}, "base": {"adapter": "none"}}
    for tuned, found in {"c" * 16: True, "d" * 16: False, "none": False}.items():
        made["tuned"]["adapter"] = tuned
        (out / "evaluation.json").write_text(json.dumps({"trivia_qa": part | {"made_from": made}, "settings": {}}))
        card = card_of(out, "someone/model")
        assert ("| trivia_qa, 6 | exact_match | 1.00 [0.00, 9.00] | 33.30 [0.00, 9.00] |\n" in card) == found
        assert ("Not measured" in card) == (not found)
    for unknown in ({"trivia_qa": part}, {"trivia_qa": part | {"made_from": {"tuned": None}}}, {"trivia_qa": None}):
        (out / "evaluation.json").write_text(json.dumps(unknown))
        assert "Not measured" in card_of(out, "someone/model")


def test_llama3_ends_at_each_of_its_end_tokens_whatever_the_base_says(out, tmp_path):
    base = make_base(tmp_path / "three", "tiny_llama3")
    (base / "generation_config.json").unlink()
    make_adapter(out / "adapter", base)
    assert merge(out, "--check-rows", 1) == 0
    ids = json.loads((out / "merged" / "generation_config.json").read_text())["eos_token_id"]
    tokens = AutoTokenizer.from_pretrained(base).convert_ids_to_tokens(ids)
    assert set(tokens) >= {"<|end_of_text|>", "<|eot_id|>"}
