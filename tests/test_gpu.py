"""What a GPU machine would see, with GPUs pretended: one process on one GPU, types of old GPUs."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import FIXTURES, ROOT, run, start
from datasets import DatasetDict, load_from_disk

import test_llama
import train_llama
from pipeline.training import trainer

SECOND = {"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


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
    for name, value in SECOND.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("set_device", "_lazy_init", "get_device_properties", "get_device_capability", "current_device"):
        monkeypatch.setattr(torch.cuda, name, touch)
    with pytest.raises(Touched) as first:
        script.main(
            [*(["--model", str(FIXTURES / "tiny_llama3")] * (script is train_llama)), "--output-dir", str(dataset)]
        )
    assert first.value.args == (1,) and first.traceback[-2].name == "own_gpu"


@pytest.fixture
def forgotten():
    """After a test with pretended GPUs: no other is to find them in accelerate's memory."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Begun(Exception):
    """How far a pretended GPU takes a training: its trainer is made, its first step not."""


def decided(dataset, output, monkeypatch, capability, environment):
    """train_llama.main() where two GPUs are pretended: the trainer, the own GPU, what from_pretrained was told."""
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from transformers import AutoModelForCausalLM, PreTrainedModel

    own, told, load = [], {}, AutoModelForCausalLM.from_pretrained
    gpu = SimpleNamespace(major=capability[0], minor=capability[1], total_memory=16e9)
    pretended = {
        "is_available": lambda: True,
        "device_count": lambda: len(os.environ["CUDA_VISIBLE_DEVICES"].split(",")),
        "set_device": lambda device: own.append(int(str(device).split(":")[-1])),  # 1, or cuda:1
        "current_device": lambda: (own or [0])[-1],
        "get_device_capability": lambda device=None: capability,
        "get_device_properties": lambda device=None: gpu,
        "get_device_name": lambda device=None: "pretended",
        "manual_seed_all": lambda seed: None,
        "_check_bf16_tensor_supported": lambda device: True,  # by emulation
    }
    for name, function in pretended.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name, value in {"CUDA_VISIBLE_DEVICES": "0,1", **environment}.items():
        monkeypatch.setenv(name, value)

    def from_pretrained(model, **options):
        told.update(options)
        return load(model, **options | {"device_map": "cpu"})

    def train(trainer, **_):
        raise Begun(trainer)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(PreTrainedModel, "dequantize", lambda model: model)  # there is room, but no GPU to do it on
    monkeypatch.setattr(trainer.QLoRATrainer, "train", train)
    monkeypatch.setattr(trainer, "catch_signals", lambda trainer: None)  # they are the tests' own
    shutil.copytree(dataset / "dataset", output / "dataset")
    if environment:
        torch.distributed.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    with pytest.raises(Begun) as begun:
        train_llama.main(["--model", str(FIXTURES / "tiny_llama3"), "--output-dir", str(output)])
    return begun.value.args[0], own[-1], told


HOPPER, TURING = ((9, 0), torch.bfloat16, "packed"), ((7, 5), torch.float16, "sdpa")


@pytest.mark.parametrize("gpu", [HOPPER, TURING], ids=["hopper", "turing"])
@pytest.mark.parametrize("environment", [{}, SECOND], ids=["plain", "second of two processes"])
def test_main_trains_on_its_own_gpu_in_a_type_that_it_has(
    environment, gpu, dataset, tmp_path, monkeypatch, capsys, forgotten
):
    capability, dtype, attention = gpu
    made, own, told = decided(dataset, tmp_path, monkeypatch, capability, environment)
    index = int(environment.get("LOCAL_RANK", 0))
    assert own == index and told["device_map"] == {"": index} and made.args.device == torch.device("cuda", index)
    assert made.args.n_gpu == 1 and made.args.world_size == (2 if environment else 1)
    assert ("taking one of 2 GPUs" in capsys.readouterr().out) == (not environment)
    assert torch.cuda.is_bf16_supported()  # by emulation, which is not meant
    assert told["dtype"] == told["quantization_config"].bnb_4bit_compute_dtype == dtype
    with made.accelerator.autocast():
        assert torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == dtype
    scaler = made.accelerator.scaler
    assert scaler.is_enabled() if dtype == torch.float16 else scaler is None
    assert made.model.config._attn_implementation == attention
    assert {p.dtype for p in made.model.parameters() if p.requires_grad} == {torch.float32}
    assert made.model.get_input_embeddings().weight.dtype == dtype
    assert made.args.optim == "adamw_torch_fused"


def test_every_stage_of_the_gpu_benchmark_runs_on_a_cpu(tmp_path, monkeypatch, dataset):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu

    step = {"train": 2, "validation": 3, "test": 4}

    def build(bench, name):
        if not (output := bench.folder / name).exists():
            parts = load_from_disk(str(dataset / "dataset"))
            few = {split: part.select(range(0, len(part), step[split])) for split, part in parts.items()}
            short = {split: part.map(lambda row: {"prompt": row["prompt"][-150:]}) for split, part in few.items()}
            DatasetDict(short).save_to_disk(str(output / "dataset"))
        return output

    def forked(bench, name, command):
        script, *arguments = command[1:]
        if script == "-c":
            script = bench.folder / f"{name}.py"
            script.write_text(arguments.pop(0))
        result = run(script, *arguments)
        assert result.returncode == 0, result.stderr
        return 1.0, result.stdout

    def popen(command, **_):
        process = start(*command[1:], streams=[tmp_path / "log", tmp_path / "log"])
        return SimpleNamespace(poll=lambda: process.exitcode, send_signal=lambda _: process.kill(), wait=process.join)

    monkeypatch.setattr(gpu.Bench, "build", build)
    monkeypatch.setattr(gpu.Bench, "run", forked)  # most of a short command is importing torch
    monkeypatch.setattr(gpu, "subprocess", SimpleNamespace(Popen=popen, DEVNULL=None))
    monkeypatch.setattr(gpu, "TINY", [*gpu.TINY, "--max-steps", 4, "--eval-steps", 4, "--save-steps", 1])
    monkeypatch.setattr(gpu, "KILLED_AT", 1)
    monkeypatch.setattr(gpu, "LAYERS", 2)
    monkeypatch.setattr(gpu, "STEPS", 2)
    only = ["trl sft packed", "mlp", "card of 24 GB"]
    where = ["--folder", str(tmp_path), "--results", str(tmp_path / "gpu.json")]
    gpu.main(["--shape", "tiny", *where, "--only", *only])
    text = (tmp_path / "gpu.json").read_text()
    assert '"error"' not in text, text
    found = json.loads(text)
    assert found["rates"]["tflops"] > 0
    assert set(found["stage_seconds"]) == set(gpu.STAGES) and len(found["training"]) == len(only)
    assert all(run["tokens_per_second"] > 0 for run in found["training"].values())
    assert found["profile"]["8192 x 1, off"]["launches"] > 0
    passes = {name: run for name, run in found["layers"].items() if "tokens" in run}
    assert len(passes) == 6 and all(run["gradient_beside_not_fused"] < 1e-5 for run in passes.values())
    assert all(run["loss"] == pytest.approx(7.6, abs=0.1) for run in found["training"].values())
    assert found["chain"]["killed"] == {
        "went_on": True,
        "largest_difference": 0,
        "largest_weight": pytest.approx(0.1, abs=0.1),
    }
    assert found["chain"]["alone"]["same_predictions"] == 1 and found["chain"]["merge"]["nll_difference"] < 0.05
    assert found["float16"]["eval_loss"] < 10
    assert set(found["commands"]) == {"train", "test tuned", "merge", "test merged"}
    assert len(found["exactness"]) == 4
    assert all(run["packed_gradient_beside_float32"] < 1e-4 for run in found["exactness"].values())
    (row,) = found["longest"].values()
    assert row["of_the_estimate"] == 1 and row["tokens_per_second"] > 0
