"""merge_llama.py: the merged model is PEFT's, whatever the adapter; what is not is found, and nothing is lost."""

import base64
import contextlib
import json
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

import pytest
import torch
from conftest import FIXTURES, ROOT, run, snapshot
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import merge_llama
import test_llama as tester
import train_llama


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


def make_adapter(folder, base, trained_in_4bit=False, **options):
    """A LoRA adapter of random numbers, saved by PEFT, and a run.json that says what it was trained on."""
    torch.manual_seed(0)
    options = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding" in name:
            parameter.data.normal_(0, 0.02)
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "run.json").write_text(json.dumps({"settings": {"load_in_4bit": trained_in_4bit}}))


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
def test_every_tensor_is_that_of_pefts_merge_and_the_others_are_the_bases(
    name, dtype, shard, options, out, tmp_path, monkeypatch
):
    monkeypatch.setattr(merge_llama, "BLOCK", 3000)  # or these tensors were one piece each
    base = make_base(tmp_path / "model", name, dtype, shard)
    make_adapter(out / "adapter", base, **options)
    assert merge(out) == 0 and report(out / "merged")["merge_base"] == "16bit"
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
    for path in [*base.glob("*.safetensors"), *base.glob("*.index.json")]:
        size = 8 + int.from_bytes(path.read_bytes()[:8], "little") if path.suffix == ".safetensors" else None
        assert (out / "merged" / path.name).read_bytes()[:size] == path.read_bytes()[:size]
    assert not (out / "merged" / "old").exists()


@pytest.mark.parametrize("targets", ["all-linear", ["v_proj"]])
def test_4bit_is_pefts_merge_into_the_base_as_loaded_in_4_bits(targets, out, tmp_path, monkeypatch):
    monkeypatch.setattr(merge_llama, "BLOCK", 3000)
    make_adapter(out / "adapter", tmp_path / "base", trained_in_4bit=True, target_modules=targets)
    assert merge(out) == 0 and report(out / "merged")["merge_base"] == "4bit"
    model = train_llama.load_model(str(tmp_path / "base"), load_in_4bit=True).dequantize()
    expected = PeftModel.from_pretrained(model, out / "adapter").merge_and_unload().state_dict()
    before, differ = tensors(tmp_path / "base"), set()
    for name, tensor in tensors(out / "merged").items():
        assert (tensor - expected[name]).abs().max() <= 1e-6
        if not torch.equal(tensor, before[name]):
            differ.add(name)
    assert differ == {name for name in before if "proj" in name}


def test_the_figures_are_those_of_the_whole_models(out, tmp_path):
    make_adapter(out / "adapter", tmp_path / "base", trained_in_4bit=True)
    assert merge(out, "--merge-base", "16bit", "--check-rows", 5) == 0
    comparison = report(out / "merged")["comparison"]
    assert report(out / "merged")["check_rows"] == 5
    tokenizer = train_llama.load_tokenizer(str(tmp_path / "base"))
    rows = train_llama.load_rows(out, "validation")
    tasks = [[row for row in rows if row["task"] == task] for task in ("samsum", "trivia_qa")]
    rows = [row for pair in zip(*tasks, strict=True) for row in pair][:5]

    def logits(model):
        found = []
        for row in rows:
            prompt = tokenizer(row["prompt"]).input_ids
            ids = tokenizer(row["prompt"] + row["completion"]).input_ids + [tokenizer.eos_token_id]
            with torch.no_grad():
                found.append((model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1], ids[len(prompt) :]))
        return torch.cat([x for x, _ in found]), torch.tensor(sum((gold for _, gold in found), []))

    four = train_llama.load_model(str(tmp_path / "base"), load_in_4bit=True).dequantize()
    adapter, gold = logits(PeftModel.from_pretrained(four, out / "adapter"))
    merged, _ = logits(AutoModelForCausalLM.from_pretrained(out / "merged"))
    figures = comparison["to_the_model_trained"]["merged 16bit"]
    difference = (adapter - merged).abs()
    assert figures["largest_logit_difference"] == pytest.approx(difference.max().item(), rel=1e-3)
    assert figures["mean_logit_difference"] == pytest.approx(difference.mean().item(), rel=1e-3)
    assert figures["relative_difference"] == pytest.approx((difference.mean() / adapter.std()).item(), rel=1e-3)
    same = (adapter.argmax(-1) == merged.argmax(-1)).float().mean().item()
    assert figures["equal_greedy_tokens"] == pytest.approx(same)
    perplexity = torch.nn.functional.cross_entropy
    for key, some in {"adapter 4bit": adapter, "merged 16bit": merged}.items():
        assert comparison["answer_perplexity"][key] == pytest.approx(perplexity(some, gold).exp().item(), rel=1e-4)
    assert comparison["to_the_model_trained"]["merged 4bit"]["largest_logit_difference"] < 1e-3
    assert comparison["merged_to_adapter"]["largest_logit_difference"] < 1e-3


def test_the_other_base_is_reported_as_if_it_had_been_merged_into(out, tmp_path):
    base = make_base(tmp_path / "half", "tiny_llama2", torch.bfloat16)
    make_adapter(out / "adapter", base)
    (out / "adapter" / "run.json").unlink()  # an adapter from elsewhere: taken for one of QLoRA
    found = {}
    for kind in ("16bit", "4bit"):
        assert merge(out, "--merge-base", kind, "--check-rows", 4) == 0
        assert report(out / "merged")["trained_on"] == "4bit"
        found[kind] = report(out / "merged")["comparison"]
    other, own = found["16bit"]["to_the_model_trained"]["merged 4bit"], found["4bit"]["merged_to_adapter"]
    assert own["mean_logit_difference"] > 1e-4  # bf16 rounds
    assert other == pytest.approx(own, rel=0.02)


def flip(path, tensor=None):
    """Flip the lowest bit of one number of a tensor in a safetensors file."""
    header, start = merge_llama.header_of(path)
    tensor = tensor or next(iter(header))
    with path.open("r+b") as file:
        file.seek(start + header[tensor]["data_offsets"][0])
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


def assert_unverified(out, capsys, *words):
    error = capsys.readouterr().err
    assert all(word in error for word in ("failed its check", *words)), error
    assert stands(out)
    marked = out / "merged.unverified"
    assert report(marked)["verified"] is False and words[0] in " ".join(report(marked)["problems"])
    assert "UNVERIFIED" in (marked / "README.md").read_text().split("\n#")[0]


@pytest.mark.parametrize("what", ["adapter", "base", "merged"])
def test_one_bit_changed_between_merge_and_verification_is_found(what, out, tmp_path, capsys, monkeypatch):
    make_adapter(out / "adapter", tmp_path / "base")
    path = {"adapter": out / "adapter" / "adapter_model.safetensors",
            "base": shards(tmp_path / "base")[0],
            "merged": out / ".merged.new" / shards(tmp_path / "base")[0].name}[what]  # fmt: skip
    verify = merge_llama.verify
    monkeypatch.setattr(merge_llama, "verify", lambda *a: (flip(path), verify(*a))[1])
    assert merge(out) == 1
    assert_unverified(out, capsys, path.name, "has changed since")


def test_a_merged_file_that_cannot_be_read_is_unverified(out, tmp_path, capsys, monkeypatch):
    make_adapter(out / "adapter", tmp_path / "base")
    path, verify = out / ".merged.new" / shards(tmp_path / "base")[1].name, merge_llama.verify
    monkeypatch.setattr(merge_llama, "verify", lambda *a: (os.truncate(path, 3000), verify(*a))[1])
    assert merge(out) == 1
    assert_unverified(out, capsys, "cannot be loaded")


def test_ctrl_c_is_one_line_and_leaves_the_old_folder(out, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        assert (out / ".merged.new" / "config.json").is_file()
        raise KeyboardInterrupt

    make_adapter(out / "adapter", tmp_path / "base")
    monkeypatch.setattr(merge_llama, "verify", interrupted)
    assert merge(out) == 130
    assert "interrupted; " in capsys.readouterr().err and stands(out)


WRONG = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight", "model.norm.weight",
         "model.embed_tokens.weight", "lm_head.weight"]  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_tensor_that_was_merged_wrong_is_named(name, out, tmp_path, capsys, monkeypatch):
    """Its file is as it was written: only the comparison of the tensors can tell."""
    make_adapter(out / "adapter", tmp_path / "base", target_modules=["up_proj"])
    real = merge_llama.merge

    def wrong(*arguments):
        digests, seconds = real(*arguments)
        for path in (out / ".merged.new").glob("*.safetensors"):
            content = load_file(path)
            if name in content:
                content[name].view(-1)[content[name].view(-1).abs().argmax()] += 2e-6
                save_file(content, path, metadata={"format": "pt"})
            digests[path] = train_llama.sha256(path)
        return digests, seconds

    monkeypatch.setattr(merge_llama, "merge", wrong)
    assert merge(out) == 1
    assert_unverified(out, capsys, name, "differs from")


def test_a_wrong_scale_is_found(out, tmp_path, capsys, monkeypatch):
    make_adapter(out / "adapter", tmp_path / "base")
    real = merge_llama.check_shapes
    monkeypatch.setattr(merge_llama, "check_shapes", lambda *a: {key: 1.01 * scale for key, scale in real(*a).items()})
    assert merge(out) == 1
    assert_unverified(out, capsys, "model.layers.0.", "differs from PEFT's merge")


def test_figures_beyond_the_thresholds_fail(out, tmp_path, capsys, monkeypatch):
    make_adapter(out / "adapter", tmp_path / "base")
    monkeypatch.setattr(merge_llama, "MIN_EQUAL_TOKENS", 1.1)
    assert merge(out) == 1
    assert_unverified(out, capsys, "greedy tokens")
    fine = {"relative_difference": 0.001, "equal_greedy_tokens": 1.2}
    nan = float("nan")
    assert not list(merge_llama.beyond(fine, [2, 2]))
    for bad in [fine | {"relative_difference": 0.03}, fine | {"relative_difference": nan}]:
        assert len(list(merge_llama.beyond(bad, [2, 2]))) == 1
    assert all(len(list(merge_llama.beyond(fine, pair))) == 1 for pair in ([2, 2.1], [2.1, 2], [nan, 2]))


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


def shards(base):
    return sorted(base.glob("*.safetensors"))


def pickled(base, adapter):
    for path in [*shards(base), base / "model.safetensors.index.json"]:
        path.unlink()
    (base / "pytorch_model.bin").write_bytes(b"a pickle")


def retyped(base, adapter):
    content = load_file(shards(base)[1])
    save_file({name: t.to(torch.float8_e4m3fn) for name, t in content.items()}, shards(base)[1])


UP = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
BROKEN = {
    "a missing shard": (lambda b, a: shards(b)[1].unlink(), "has no model-00002-of-"),
    "a cut-off shard": (lambda b, a: os.truncate(shards(b)[1], 5000), "broken model-00002-of-"),
    "an index that lies": (
        change_json("model.safetensors.index.json", lambda c: c["weight_map"].update(x=min(c["weight_map"].values()))),
        "has no x in model-"),
    "only pickles": (pickled, "a pickle: convert"),
    "8-bit weights": (retyped, "take its 16-bit weights"),
    "a quantised base": (change_json("config.json", lambda c: c.update(quantization_config={"quant_method": "gptq"})),
                         "is quantised"),
    "a config of another shape": (change_json("config.json", lambda c: c.update(intermediate_size=9)), "config asks"),
    "a short context": (change_json("config.json", lambda c: c.update(max_position_embeddings=9)), "no validation"),
    "more layers": (change_json("config.json", lambda c: c.update(num_hidden_layers=3)), "has no for model.layers.2."),
    "another model": (change_json("config.json", lambda c: c.update(model_type="gpt2")), "is a gpt2 model"),
    "a tensor of another shape": (change_adapter(lambda c: c.update({UP: c[UP][:, :9].clone()})), "of another base"),
    "a tensor too few": (change_adapter(lambda c: c.pop(UP)), "has no for " + UP),
    "trained embeddings": (change_adapter(lambda c: c.update(embed=torch.ones(2))), "for embed, its config"),
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


FORKS = """
import os, sys
import bitsandbytes, peft, torch, tqdm, transformers, merge_llama, train_llama
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        merge_llama.main(["--output-dir", line.strip()])
        os._exit(0)
    print(pid, flush=True)
    os.waitpid(pid, 0)
    print("ended", flush=True)
"""


def test_killed_at_any_moment_nothing_looks_finished_and_the_rerun_succeeds(out, tmp_path):
    tokenizer = shutil.copytree(FIXTURES / "tiny_llama2", tmp_path / "large")
    (tokenizer / "model.safetensors").unlink()
    config = LlamaConfig.from_pretrained(tokenizer, hidden_size=512, intermediate_size=1536, num_hidden_layers=4,
                                         head_dim=128, dtype="float32")  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "large", max_shard_size="20MB")
    make_adapter(out / "adapter", tmp_path / "large")
    fresh, last = out / ".merged.new", shards(tmp_path / "large")[-1].name
    moments = [lambda: any(path.stat().st_size > 0 for path in fresh.glob("*.safetensors")),
               lambda: (fresh / last).is_file(), lambda: (fresh / "generation_config.json").is_file()]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", FORKS], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True, bufsize=1, env=environment) as helper:  # fmt: skip
        for reached in moments:
            print(out, file=helper.stdin, flush=True)
            pid = int(helper.stdout.readline())
            deadline = time.time() + 60
            while not reached():
                assert time.time() < deadline and not (out / "merged" / "merge.json").exists()
            os.kill(pid, signal.SIGKILL)
            assert helper.stdout.readline() == "ended\n"
            assert fresh.is_dir() and not (fresh / "merge.json").exists()
            assert snapshot(out / "merged") == {"old": b"still here"}
        helper.stdin.close()
    (out / "merged").rename(out / ".merged.old")  # killed between the two renames: a failing rerun brings it back
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge_llama, "SMALL_FILES", 10**15)
        assert merge(out) == 2 and stands(out)
    assert merge(out) == 0 and report(out / "merged")["verified"]
    assert not list(out.glob(".merged*"))


def test_too_little_room_is_said_beforehand(out, tmp_path, capsys, monkeypatch):
    make_adapter(out / "adapter", tmp_path / "base")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10**6})())
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


def float32_chain(chain, tmp_path):
    """A chain's output dir whose base is stored in float32: there nothing is rounded."""
    out, adapter = tmp_path / "chain", chain / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    base = make_base(tmp_path / "wide", Path(config["base_model_name_or_path"]).name, shard="200KB")
    shutil.copytree(adapter, out / "adapter")
    (out / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    (out / "dataset").symlink_to(chain / "dataset")
    return out


def test_the_merged_model_predicts_what_the_adapter_predicts(chain, tmp_path, monkeypatch):
    out = float32_chain(chain, tmp_path)
    assert merge(out) == 0  # in 4 bits, as it was trained
    short = ["--output-dir", str(out), "--no-compare-with-base", "--samsum-max-new-tokens", "12"]
    tester.main([*short, "--name", "adapter"])
    tester.main([*short, "--name", "merged", "--model", str(out / "merged"), "--no-load-in-4bit"])
    for task in train_llama.TASKS:
        one, two = (
            json.loads((out / f"{task}_predictions_{name}.json").read_text()) for name in ("adapter", "merged")
        )
        assert [e["prediction"] for e in one["examples"]] == [e["prediction"] for e in two["examples"]]
        assert one["perplexity"]["tuned"]["nll_sum"] == pytest.approx(two["perplexity"]["tuned"]["nll_sum"], rel=1e-5)


def test_the_folder_ends_at_every_end_token_holds_no_code_and_its_cards_example_runs(
    chain, tmp_path, monkeypatch, capsys
):
    if chain.name.startswith("tiny_llama3"):  # once as a user does
        result = run("merge_llama.py", "--output-dir", chain)
        assert result.returncode == 0 and result.stderr == "", result.stderr
        assert all(len(line) <= 80 for line in result.stdout.split("\n"))
    else:
        assert merge(chain) == 0
    merged = chain / "merged"
    names = {path.name for path in merged.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "README.md", "merge.json"} <= names
    assert {name.rsplit(".")[-1] for name in names} == {"json", "md", "safetensors"}
    content = report(merged)
    assert content["sha256"] == {n: train_llama.sha256(merged / n) for n in names - {"merge.json"}}
    generation = json.loads((merged / "generation_config.json").read_text())
    vocabulary = AutoTokenizer.from_pretrained(merged).get_vocab()
    assert set(generation["eos_token_id"]) >= {vocabulary[t] for t in tester.END_TOKENS if t in vocabulary}
    assert generation["do_sample"] is False and "temperature" not in generation
    card = (merged / "README.md").read_text()
    assert not any(str(path) in card + json.dumps(content) for path in (FIXTURES, chain, Path.home()))
    assert "license: other" in card and "local folder" in card and "datasets:" not in card  # the rows are invented
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    monkeypatch.chdir(merged)
    capsys.readouterr()
    exec(compile(code, "card", "exec"), {})
    assert capsys.readouterr().out.count("\n") == 1


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
    assert generation["eos_token_id"] == [2, 66, 77]
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

    make_adapter(out / "adapter", tmp_path / "base")
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
        monkeypatch.setattr(merge_llama, "MIN_EQUAL_TOKENS", 1.1)
        assert merge(out, "--push-to-hub", "me/tuned") == 1 and not server.seen
    finally:
        server.shutdown()
        server.server_close()


def test_the_card_of_a_hub_model_and_hub_data_names_both_and_their_licences(out, tmp_path):
    source = {"source": "knkarthick/samsum", "revision": "1" * 40}
    built = {"sources": {"samsum": source}, "settings": {"max_context_words": 77}}
    (out / "dataset_report.json").write_text(json.dumps(built))
    arguments = merge_llama.parse_args(["--output-dir", str(out)])
    one = {"equal_greedy_tokens": 0.99}
    given = {"verified": True, "trained_on": "4bit", "merge_base": "4bit", "dtypes": ["bfloat16"], "check_rows": 2,
             "answer_tokens": 9, "comparison": {"merged_to_adapter": one}, "problems": []}  # fmt: skip
    licences = {"meta-llama/Meta-Llama-3-8B": "llama3", "meta-llama/Llama-2-7b-hf": "llama2",
                "meta-llama/Llama-3.1-8B": "llama3.1", "someone/Llama-3-8B": "other"}  # fmt: skip
    for base, licence in licences.items():
        card = merge_llama.model_card(arguments, base, {"best_step": 5}, given)
        assert f"license: {licence}\n" in card and f"base_model: {base}\n" in card
        assert ("begins with" in card) == licence.startswith("llama3")
    assert "Not measured" in card
    part = {"examples": 6, "base": {"exact_match": 1, "f1": 2}, "tuned": {"exact_match": 33.3, "f1": 4},
            "perplexity": {name: {"perplexity": 5} for name in ("base", "tuned")},
            "intervals": {name: dict.fromkeys(merge_llama.SHOWN["trivia_qa"], [0, 9])
                          for name in ("base", "tuned")}}  # fmt: skip
    for seconds, found in {7: True, 8: False}.items():  # scores of another training are not this model's
        scores = {"trivia_qa": part, "training": {"facts": {"seconds": seconds}}}
        (out / "evaluation.json").write_text(json.dumps(scores))
        assert ("33.30 [0.00, 9.00]" in merge_llama.model_card(arguments, base, {"seconds": 7}, given)) == found
    assert "- knkarthick/samsum\n" in card and "datasets/knkarthick/samsum)" in card and "trivia_qa]" not in card
    assert "at most 77 words" in card and "weights kept from step | 5 |" in card and "local folder" not in card


def test_llama3_ends_at_each_of_its_end_tokens_whatever_the_base_says(tmp_path):
    source = shutil.copytree(FIXTURES / "tiny_llama3", tmp_path / "base")
    (source / "generation_config.json").unlink()
    (target := tmp_path / "merged").mkdir()
    tokenizer = train_llama.load_tokenizer(str(source))
    merge_llama.write_small_files(source, tokenizer, target)
    ids = json.loads((target / "generation_config.json").read_text())["eos_token_id"]
    assert set(tokenizer.convert_ids_to_tokens(ids)) >= {"<|end_of_text|>", "<|eot_id|>"}
