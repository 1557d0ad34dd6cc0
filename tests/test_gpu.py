"""What a GPU machine would see, with GPUs pretended: one process on one GPU, types of old GPUs."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from conftest import FIXTURES, ROOT

import llama
import test_llama
import train_llama


@pytest.mark.parametrize("visible, first", [(None, "0"), ("3,5", "3")])
def test_of_several_gpus_a_plain_process_takes_the_first(visible, first, dataset, monkeypatch, capsys):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "0,1")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    counted = lambda: len(os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(","))  # noqa: E731
    monkeypatch.setattr(torch.cuda, "device_count", counted)
    train_llama.main(["--model", str(FIXTURES / "tiny_llama3"), "--dry-run", "--output-dir", str(dataset)])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == first and torch.cuda.device_count() == 1
    assert "taking one of 2 GPUs" in (said := capsys.readouterr().out)
    assert "accelerate launch --num_processes 2 train_llama.py" in said
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")


class Touched(Exception):
    pass


@pytest.mark.parametrize("script", [train_llama, test_llama])
def test_a_launched_process_is_on_its_own_gpu_before_anything_touches_cuda(script, tmp_path, dataset, monkeypatch):
    def touch(device=None):
        raise Touched(device)

    if script is test_llama:
        monkeypatch.setattr(test_llama, "choose_system", lambda args: (None, None, True, None))
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("set_device", "_lazy_init", "get_device_properties", "get_device_capability", "current_device"):
        monkeypatch.setattr(torch.cuda, name, touch)
    with pytest.raises(Touched) as first:
        script.main(
            [*(["--model", str(FIXTURES / "tiny_llama3")] * (script is train_llama)), "--output-dir", str(dataset)]
        )
    assert first.value.args == (1,) and first.traceback[-2].name == "own_gpu"


def test_a_turing_gpu_computes_in_float16_with_a_scaler_and_sdpa(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    properties = SimpleNamespace(major=7, minor=5, total_memory=16e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
    assert torch.cuda.is_bf16_supported()  # by emulation
    assert llama.compute_dtype() == torch.float16
    assert llama.choose_attention("auto") == "sdpa"
    config = train_llama.sft_config(train_llama.parse_args(["--per-device-train-batch-size", "1"]))
    assert config.fp16 and not config.bf16


@pytest.mark.parametrize("stage", ["rates", "exactness"])
def test_stages_of_the_gpu_benchmark_run_on_a_cpu(stage, tmp_path, monkeypatch, dataset):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu

    monkeypatch.setattr(gpu.Bench, "build", lambda self, name: dataset)
    arguments = ["--shape", "tiny", "--folder", tmp_path, "--results", tmp_path / "gpu.json", "--stages", stage]
    gpu.main(list(map(str, arguments)))
    found = json.loads((tmp_path / "gpu.json").read_text())[stage]
    assert "error" not in found and found.get("tflops", 1) > 0
    assert found.get("float32", {"packed_gradient_beside_alone": 0})["packed_gradient_beside_alone"] < 1e-4
