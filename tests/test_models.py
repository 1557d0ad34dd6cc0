"""Base models and adapters: which are found, loaded as PEFT and transformers do, and refused."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import FIXTURES, ROOT, assert_refused, run, test
from peft import AdaLoraConfig, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig
from test_testing import column, peft_adapter, prompts_of, same_columns

import test_llama as tester
from pipeline import models
from pipeline.files import rows_of
from pipeline.testing import decoding
from pipeline.tokens import encode

ONE = pytest.mark.parametrize("chain", ["tiny_llama3"], indirect=True)


@ONE
@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens", "v_proj"])
def test_an_adapter_of_another_tool_is_tested_as_peft_loads_it(layer, out, tmp_path, capsys):
    folder = peft_adapter(tmp_path / "adapter", ["q_proj", layer])  # config and weights: the base's tokenizer serves
    assert tester.choose_system(tester.parse_args(["--adapter", str(folder)]))[2] is True  # most are QLoRA's
    assumed = f"{folder} does not say how it was trained: it is tested in 4 bits, with --chat-template auto"
    assert assumed in capsys.readouterr().out
    assert test(out, "--samsum-max-new-tokens", 2, "--adapter", folder, "--no-load-in-4bit") == 0
    base = models.load_model(str(FIXTURES / "tiny_llama2"), load_in_4bit=False)
    tokenizer, data = prompts_of(FIXTURES / "tiny_llama2", out)
    ids = encode(tokenizer, rows_of(data, "samsum").to_dict())
    prompt, completion = ids["prompt_ids"][0], ids["completion_ids"][0]
    inputs = {"input_ids": torch.tensor([prompt + completion])}
    inputs["labels"] = torch.tensor([[-100] * len(prompt) + completion])
    model = PeftModel.from_pretrained(base, str(folder))
    for key, context in (("nll", contextlib.nullcontext()), ("base_nll", model.disable_adapter())):
        with context:
            expected = model(**inputs).loss.item() * len(completion)
        assert column(out, "samsum", key)[0] == pytest.approx(expected, rel=1e-5)
    assert column(out, "samsum", "nll") != pytest.approx(column(out, "samsum", "base_nll"), rel=1e-3)


@ONE
@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_an_adapter_that_changes_its_base_is_not_shown_beside_it(kind, out, tmp_path, refused):
    folder = peft_adapter(tmp_path / "adapter", ["q_proj", "v_proj"], init_lora_weights=kind)
    arguments = ["--samsum-max-new-tokens", 2, "--adapter", folder, "--no-load-in-4bit"]
    assert "--no-compare-with-base" in refused(out, *arguments) and not list(out.glob("*_predictions.json"))
    assert test(out, *arguments, "--no-compare-with-base") == 0
    assert test(out, *arguments[:2], "--model", FIXTURES / "tiny_llama2", "--name", "base") == 0
    same_columns(out, out, "nll", other_name="_base", rel=1e-4)  # untrained it is the base


KINDS = {"plain": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}, "bias": {"lora_bias": True}}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_from_elsewhere_answers_as_peft_computes_it(kind, tmp_path):
    folder = peft_adapter(tmp_path / "adapter", ["q_proj", "down_proj", "lm_head"], **KINDS[kind])
    base, ids = models.read_adapter(folder), torch.arange(20, 60)[None]
    model, off = decoding.load_system(base, folder, False, compare=False)
    by_peft = models.load_adapter(models.load_model(base, False), folder)
    with torch.no_grad():
        for some in (ids, ids[:, :5], ids[:, :1]):
            expected = by_peft(input_ids=some).logits
            torch.testing.assert_close(model(input_ids=some).logits, expected, rtol=1e-3, atol=1e-3)
            with off(), by_peft.disable_adapter():
                plain = by_peft(input_ids=some).logits
                torch.testing.assert_close(model(input_ids=some).logits, plain, rtol=1e-3, atol=1e-3)
            assert (expected - plain).abs().max() > 1


OUTSIDE = [PromptTuningConfig(num_virtual_tokens=2), PrefixTuningConfig(num_virtual_tokens=2)]
OUTSIDE += [AdaLoraConfig(total_step=9), LoraConfig(alora_invocation_tokens=[5, 6])]


@pytest.mark.parametrize("config", OUTSIDE, ids=["prompt", "prefix", "adalora", "alora"])
def test_an_adapter_that_is_not_in_the_layers_alone_is_refused_before_its_base_is_loaded(config, tmp_path, capsys):
    config.base_model_name_or_path = "owner/name"
    config.save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(SystemExit, match="2"):
        models.read_adapter(tmp_path)
    named = "aLoRA" if isinstance(config, LoraConfig) and config.peft_type == "LORA" else config.peft_type.value
    assert f"an adapter of the type {named}, which these scripts cannot use" in capsys.readouterr().err


TINY = ["--model", FIXTURES / "tiny_llama3"]


def test_a_model_that_is_none(dataset, tmp_path):
    for model in ("llama9", "./nowhere"):
        assert_refused(run("train_llama.py", "--model", model, "--output-dir", dataset), f"unknown model {model}")
    (tmp_path / "empty").mkdir()
    assert_refused(run("train_llama.py", "--model", tmp_path / "empty", "--output-dir", dataset), "no config.json")
    result = run("train_llama.py", "--model", "nobody/nothing", "--output-dir", dataset)
    assert_refused(result, "cannot load nobody/nothing", "network")


def test_a_merged_model_that_is_not_there_yet_is_no_hub_id(tmp_path, monkeypatch, capsys):
    (tmp_path / "outputs" / "adapter").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        models.find_model("outputs/merged")
    assert "there is no folder outputs/merged: run merge_llama.py first" in capsys.readouterr().err
    assert models.find_model("owner/name") == "owner/name"


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does, by the owner's name: one status for gated and for missing, and a header."""

    def do_GET(self):
        code = "GatedRepo" if "/gated/" in self.path else "RepoNotFound"
        self.send_response(403 if code == "GatedRepo" else 401)
        if "/expired/" in self.path:
            self.send_header("X-Error-Message", "Invalid credentials in Authorization header.")
        else:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


GATED = "gated/401-model is gated: accept its licence at https://huggingface.co/gated/401-model, then run: "
TYPO = "there is no model nobody/gated-typo on the hub"


EXPIRED = "the hub answers 401, Invalid credentials in Authorization header, for which see to your token ("


@pytest.mark.parametrize(
    "model, words", [("gated/401-model", GATED), ("nobody/gated-typo", TYPO), ("expired/token", EXPIRED)]
)
def test_a_gated_model_and_a_missing_one_are_told_apart(model, words, tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        environment = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0"}
        environment = os.environ | environment | {"HF_HUB_CACHE": str(tmp_path)}
        command = [sys.executable, "-c", f"from pipeline.models import fetch; fetch({model!r})"]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        hub.shutdown()
    assert_refused(result, words, "hf auth login")


def test_one_model_has_one_name_and_a_path_with_gated_in_it_is_not_called_gated(dataset, tmp_path, monkeypatch):
    shutil.copytree(FIXTURES / "tiny_llama3", tmp_path / "aggregated-401")
    monkeypatch.chdir(tmp_path)
    names = ["aggregated-401", "./aggregated-401", "aggregated-401/", str(tmp_path / "aggregated-401")]
    assert {models.find_model(name) for name in names} == {str(tmp_path / "aggregated-401")}
    (tmp_path / "aggregated-401" / "model.safetensors").unlink()
    result = run("train_llama.py", "--model", tmp_path / "aggregated-401", "--output-dir", dataset)
    assert_refused(result, "aggregated-401 has no model.safetensors", "get the missing file")
    assert "is gated" not in result.stderr


def test_a_base_that_cannot_be_merged_is_refused_at_once(dataset, tmp_path):
    for folder in ("pickled", "quantised"):
        shutil.copytree(FIXTURES / "tiny_llama3", tmp_path / folder)
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    config = json.loads((tmp_path / "quantised" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "quantised" / "config.json").write_text(json.dumps(config))
    for folder, words in (("pickled", "convert it to safetensors"), ("quantised", "take the 16-bit model")):
        for arguments in ([], ["--dry-run"]):
            result = run("train_llama.py", "--model", tmp_path / folder, *arguments, "--output-dir", dataset)
            assert_refused(result, words)


def test_a_cut_off_model_and_a_broken_dataset(dataset, tmp_path):
    shutil.copytree(FIXTURES / "tiny_llama3", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    result = run("train_llama.py", "--model", tmp_path / "model", "--output-dir", dataset)
    assert_refused(result, "cannot load the model in", "missing or broken")
    shutil.copytree(dataset / "dataset", tmp_path / "dataset")
    next((tmp_path / "dataset" / "train").glob("data-*.arrow")).write_bytes(b"cut")
    assert_refused(run("train_llama.py", *TINY, "--output-dir", tmp_path), "cannot read train of")


def damaged(name, tmp_path, change):
    """A copy of the tiny Llama's folder with its config changed."""
    shutil.copytree(FIXTURES / name, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | change))
    return tmp_path / "model"


@pytest.mark.parametrize(
    "change, words", [({"num_hidden_layers": 6}, "lacks weights"), ({"model_type": "gpt2"}, "gpt2")]
)
def test_a_base_with_missing_weights_or_no_llama(change, words, dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "out")
    model = damaged("tiny_llama2", tmp_path, change)
    result = run("train_llama.py", "--model", model, "--max-steps", 1, "--output-dir", tmp_path / "out")
    assert_refused(result, words)
    assert not (tmp_path / "out" / "adapter").exists()
