"""train_llama.py --dry-run and the watchdogs: what a run costs is told beforehand, what goes wrong in one sentence."""

import functools
import json
import math
import os
import re
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import FIXTURES, assert_refused, run
from datasets import load_from_disk
from test_packing import make_trainer
from transformers import AttentionInterface, AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

import train_llama
from pipeline import machine, models
from pipeline.lora import fuse_lora
from pipeline.training import estimate, layer
from pipeline.training.trainer import lora_config, summed_loss, train_until_done

META_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
META_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}


def without_weights(folder, sizes):
    """A hub-like folder of a Llama of Meta's size: config and tokenizer, no weights."""
    shutil.copytree(FIXTURES / "tiny_llama3", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"vocab_size": 128256, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False} | sizes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def shape_of(folder, args):
    return estimate.model_shape(str(folder), models.load_config(str(folder)), lora_config(args))


def test_a_gpu_to_estimate_for_is_refused_where_nothing_is_estimated(capsys):
    with pytest.raises(SystemExit, match="2"):
        train_llama.parse_args(["--dry-run-gpu", "4090"])
    assert capsys.readouterr().err == "error: --dry-run-gpu 4090 is for an estimate: give --dry-run, too\n"
    assert train_llama.parse_args(["--dry-run-gpu", "4090", "--dry-run"]).dry_run_gpu == "4090"


@pytest.mark.parametrize("sizes, parameters", [(META_8B, "8,030,261,248"), (META_70B, "70,553,706,496")])
def test_it_needs_no_weights_and_counts_meta_s_parameters(sizes, parameters, dataset, tmp_path):
    model = without_weights(tmp_path / "model", sizes)
    shutil.copytree(dataset / "dataset", tmp_path / "dataset")
    named = ["--dry-run-gpu", "4090", "--dry-run-price", 3600 * 83]
    result = run("train_llama.py", "--dry-run", *named, "--model", model, "--output-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    assert parameters in result.stdout
    assert ("warning: that is more than the 24 GB available" in result.stdout) == (sizes is META_70B)
    (petaflop,), (price,) = (
        [line.split()[1:] for line in result.stdout.splitlines() if line.startswith(name)]
        for name in ("petaf", "price")
    )
    for flop, cost in zip(petaflop, price, strict=True):  # 1e12 FLOP cost 1, at half of its 165 TFLOP/s
        assert float(cost.replace(",", "")) == pytest.approx(float(flop.replace(",", "")) * 1e3, rel=0.01)
    assert "time, at least, at 83 TFLOP/s" in result.stdout
    assert not (tmp_path / "adapter").exists() and not (tmp_path / "checkpoints").exists()
    assert all(len(line) <= 80 for line in result.stdout.splitlines() if not line.startswith("warning"))


# as the models' pages state them
PUBLISHED = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "TinyLlama/TinyLlama_v1.1": 1_100_048_384,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
}


@pytest.mark.parametrize("model", models.MODELS.values())
def test_the_sizes_of_every_model_of_the_table_come_to_its_published_parameters(model):
    shape = estimate.model_shape(model, estimate.known_config(model), lora_config(train_llama.parse_args([])))
    assert shape["parameters"] == PUBLISHED[model]


def test_before_there_is_a_data_set_or_access_to_the_model_it_says_what_it_assumes(dataset, tmp_path):
    here = ["--dry-run", "--dry-run-gpu", "4090", "--output-dir", tmp_path]
    result = run("train_llama.py", *here)
    assert result.returncode == 0, result.stderr
    assert "cannot load meta-llama/Meta-Llama-3-8B (the variable HF_HUB_OFFLINE is set" in result.stdout
    assert "published sizes" in result.stdout and "8,030,261,248" in result.stdout
    assert "there is no data set yet" in result.stdout and "10,000" in result.stdout and "3,350,000" in result.stdout
    assert not list(tmp_path.iterdir())
    shutil.copytree(dataset / "dataset", tmp_path / "dataset")
    result = run("train_llama.py", *here)
    assert result.returncode == 0 and "4 bytes are taken for a token" in result.stdout, result.stderr
    rows = load_from_disk(str(dataset / "dataset"))["train"]
    whole = sum(len((row["prompt"] + row["completion"]).encode()) for row in rows)
    (counts,) = [line.split()[1:] for line in result.stdout.splitlines() if line.startswith("tokens")]
    assert int(counts[-1].replace(",", "")) == pytest.approx(whole / 4, rel=0.02)
    unknown = run("train_llama.py", *here, "--model", "nobody/model")
    assert_refused(unknown, "cannot load nobody/model (the variable HF_HUB_OFFLINE")
    short = run("train_llama.py", *here, "--max-length", 20)
    assert_refused(short, "no row is left: give a larger --max-length")


def test_no_row_of_an_estimate_is_all_zeros(dataset, tmp_path):
    shutil.copytree(dataset / "dataset", tmp_path / "dataset")
    model = FIXTURES / "tiny_llama3"
    result = run("train_llama.py", "--dry-run", "--no-load-in-4bit", "--model", model, "--output-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    table = result.stdout.split("peak memory of")[1].splitlines()[1:]
    rows = [re.findall(r"  +(\S+)", line) for line in table if "  " in line]
    assert len(rows) > 4 and all(any(cell.strip("0.:") for cell in row) for row in rows)


def test_trainable_parameters_and_nf4_bytes_by_hand(tmp_path):
    shape = shape_of(without_weights(tmp_path / "model", META_8B), train_llama.parse_args([]))
    # r (in + out) of q, k, v, o, gate, up, down in 32 layers
    layer = (4096 + 4096) + 2 * (4096 + 1024) + (4096 + 4096) + 2 * (4096 + 14336) + (14336 + 4096)
    assert shape["trainable"] == 8 * layer * 32
    assert shape["linear"] == 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    parts = estimate.memory(shape, train_llama.parse_args([]), 2048, 300, "on")
    # float32: weights and gradients, AdamW's two moments
    assert parts["adapter and gradients"] == parts["optimizer"] == 2 * 4 * shape["trainable"]
    assert parts["weights"] == pytest.approx(0.516 * shape["linear"] + 2 * (2 * 128256 * 4096 + 65 * 4096), rel=1e-3)


def test_the_learning_rate_follows_the_size_unless_it_is_given(capsys):
    sizes = {135e6: 1e-3, 1.1e9: 1e-3, 1.24e9: 1e-3, 1.7e9: 5e-4, 3.2e9: 5e-4, 6.7e9: 2e-4, 8e9: 2e-4, 13e9: 2e-4}
    for parameters, rate in (sizes | {70e9: 1e-4}).items():
        args = train_llama.parse_args([])
        train_llama.choose_learning_rate(args, {"parameters": parameters})
        assert args.learning_rate == rate and f"learning rate {rate:g}, for " in capsys.readouterr().out
    args = train_llama.parse_args(["--learning-rate", "3e-3"])
    train_llama.choose_learning_rate(args, {"parameters": 8e9})
    assert args.learning_rate == 3e-3


def one_row(module, query, key, value, mask, scaling=None, **_):
    """Causal attention that keeps what CUDA's kernel keeps: its output once, as the next layer reads it."""
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(query, key, value, is_causal=True, scale=scaling, enable_gqa=True).transpose(1, 2), None


@pytest.mark.parametrize(
    "dropout, factor, in_4bit, way",
    [(0.0, 1, True, None), (0.0, 1, False, None), (0.05, 4 / 3, True, None)]
    + [(0.0, 1, True, way) for way in ("off", "mlp", "on")],
)
def test_the_activations_are_those_autograd_keeps(dropout, factor, in_4bit, way, tmp_path, monkeypatch):
    # a mask is 2 bytes in bf16 here, 1 with CUDA: the factor
    from peft import get_peft_model

    # PEFT asks, without a word of the device, for CUDA's autocast; with it, 4-bit layers take their input as it is
    enabled = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: enabled(*device) if device else True)
    args = train_llama.parse_args(["--lora-dropout", str(dropout)])
    AttentionInterface.register("one row", one_row)
    kept = []
    for layers in (1, 3):
        config = LlamaConfig(hidden_size=512, intermediate_size=1792, num_hidden_layers=layers, num_attention_heads=8,
                             num_key_value_heads=2, vocab_size=1000)  # fmt: skip
        folder = tmp_path / str(layers)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
        nf4 = nf4 if in_4bit else None
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=nf4)
        for module in model.modules():
            module.support_avx512bf16_for_cpu = False
        model.set_attn_implementation("one row")
        model = get_peft_model(model, lora_config(args)).train()
        if not dropout:
            fuse_lora(model)
        layer.prepare(model, way, fused=bool(way))
        weights, found = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

        def keep(tensor, weights=weights, found=found):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                found[storage.data_ptr()] = storage  # held, so that no address is used twice
            return tensor

        batch = {"input_ids": torch.ones(1, 384, dtype=torch.long), "use_cache": False}
        with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            model(**batch, kept=torch.tensor([383]), labels=torch.tensor([1]))
        kept.append(sum(storage.nbytes() for storage in found.values()))
    shape = shape_of(tmp_path / "1", args) | {"fusable": bool(way)}
    shape["lora_inputs"] *= factor
    one, three = (estimate.memory(shape | {"layers": n}, args, 384, 0, way or "off")["activations"] for n in (1, 3))
    assert 0.96 <= (three - one) / (kept[1] - kept[0]) <= 1  # what it leaves out: a few numbers a token


@pytest.mark.parametrize("size, passes, epochs", [(1, 2, "2"), (1, 3, "2"), (2, 5, "1.5")])
def test_it_counts_the_steps_that_the_run_then_takes(size, passes, epochs, dataset, tmp_path):
    shutil.copytree(dataset / "dataset", tmp_path / "dataset")
    arguments = ["--model", FIXTURES / "tiny_llama2", "--max-length", 300, "--gradient-accumulation-steps", passes]
    arguments += ["--per-device-train-batch-size", size, "--num-train-epochs", epochs, "--output-dir", tmp_path]
    told = run("train_llama.py", *arguments, "--dry-run").stdout
    assert run("train_llama.py", *arguments).returncode == 0
    done = json.loads((tmp_path / "adapter" / "run.json").read_text())
    for name, value in (("optimizer steps", done["steps"]), ("sequences", done["sequences"])):
        (line,) = [line for line in told.splitlines() if line.startswith(name)]
        assert int(line.removeprefix(name).split(",")[0]) == value


def test_a_run_that_learns_nothing_or_diverges_is_stopped(dataset, tmp_path, capsys):
    trainer, _, _ = make_trainer(dataset, tmp_path)
    entry = {"loss": 0.0, "grad_norm": 0.0}
    trainer.state.log_history = [entry, entry]
    trainer.watch(entry)
    trainer.state.log_history = [entry, entry, entry]
    with pytest.raises(SystemExit) as stopped:
        trainer.watch(entry)
    assert stopped.value.code == 2 and "loss was exactly 0" in capsys.readouterr().err
    for bad in ({"loss": math.nan, "grad_norm": 1.0}, {"loss": 1.0, "grad_norm": math.inf}):
        with pytest.raises(SystemExit) as stopped:
            trainer.watch(bad)
        assert stopped.value.code == 2 and "lower --learning-rate" in capsys.readouterr().err
    trainer.validation_loss = lambda rows: math.nan  # none would be the best, and no adapter kept
    with pytest.raises(SystemExit) as stopped:
        trainer.evaluate()
    assert stopped.value.code == 2 and "validation loss samsum nan" in capsys.readouterr().err


def test_out_of_gpu_memory_says_what_helps(capsys):
    trainer = SimpleNamespace(train=lambda **_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(SystemExit) as stopped:
        train_until_done(trainer, None)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and "out of GPU memory (CUDA out of memory)" in message
    assert "--activation-checkpointing on or host" in message


def test_operations_by_hand():
    shape = {"linear": 1000, "trainable": 10, "hidden": 4, "mlp": 30, "vocabulary": 50, "layers": 2, "query": 4}
    # rows of 3 and 5 tokens, 2 with a loss: the first layer reads 8 tokens, all but the last one's q, k and v read 2.
    # Frozen 4 x 500 x (8 + 2) and 4 x (500 - 3 x 120 - 16) x 6, trainable 6 x 5 x (8 + 2), head 4 x 4 x 50 x 2, and
    # attention 7 x 2 layers x 4 channels x (9 + 25)
    off = 20000 + 2976 + 300 + 1600 + 1904
    shape["fusable"] = False
    assert estimate.operations(shape, [3, 5], 2, "off") == off
    again = 10000 + 1488 + 544  # the forward pass of all but the head
    assert estimate.operations(shape, [3, 5], 2, "on") == off + again
    shape["fusable"] = True
    assert estimate.operations(shape, [3, 5], 2, "on") == off + again - 2 * 120 * 10  # and of the MLP's last product
    assert estimate.operations(shape, [3, 5], 2, "mlp") == off + 2 * 2 * 120 * 10


def test_operations_are_those_that_torch_counts(tmp_path):
    from peft import get_peft_model
    from torch.utils.flop_counter import FlopCounterMode

    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 3, "num_attention_heads": 8}
    sizes |= {"num_key_value_heads": 4, "head_dim": 64, "vocab_size": 500}
    args = train_llama.parse_args([])
    folder = without_weights(tmp_path / "model", sizes)
    shape = shape_of(folder, args)
    model = get_peft_model(AutoModelForCausalLM.from_config(models.load_config(str(folder))), lora_config(args))
    model.enable_input_require_grads()  # else the first layer passes nothing on, of which the estimate knows nothing
    fuse_lora(model)
    layer.prepare(model, "off", fused=False)
    labels = torch.full((1, 90), -100)
    labels[0, 60:] = 7
    addmm = {torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1]}  # the counter does not know it
    with FlopCounterMode(display=False, custom_mapping=addmm) as counter:
        summed_loss(model, {"input_ids": torch.ones(1, 90, dtype=torch.long), "labels": labels})[0].backward()
    found = {str(name): flop for name, flop in counter.get_flop_counts()["Global"].items()}
    products = sum(flop for name, flop in found.items() if "scaled_dot_product" not in name)
    attention = 7 * 3 * 512 * 90**2  # the counter does not halve it
    estimated = estimate.operations(shape, [90], 30, "off") - attention
    assert products == pytest.approx(estimated, rel=0.005)


def test_the_peak_is_in_the_loss_where_there_are_few_tokens_and_many_words(tmp_path):
    args = train_llama.parse_args(["--activation-checkpointing", "on"])
    shape = shape_of(without_weights(tmp_path / "model", META_8B), args)
    few, more = (estimate.memory(shape, args, 300, labels, "on")["activations"] for labels in (240, 300))
    assert more - few == 6 * 128256 * (estimate.LOSS_CHUNK - 240)  # 16-bit and float32 logits of one chunk
    peaks = [estimate.memory(shape, args, 2048, labels, "on")["activations"] for labels in (0, 2000)]
    assert peaks[0] == peaks[1]  # a layer's backward pass is more


@pytest.mark.parametrize("name", ["no_proj", "lm_head", "embed_tokens", "input_layernorm"])
def test_modules_that_are_no_linear_layers_are_refused_beside_good_ones(name, dataset):
    model = ["--model", FIXTURES / "tiny_llama2", "--target-modules", "q_proj", name]
    for arguments in ([], ["--dry-run"]):
        result = run("train_llama.py", *model, *arguments, "--output-dir", dataset)
        assert_refused(result, f"--target-modules {name}: no layer to adapt", "q_proj")


# Peaks in GB that benchmarks/layers.py counts for a training step of so many tokens, 8 % of them labelled; by whether
# there are Liger's kernels and whether layers are fused, for each way to keep less. Not fused, benchmarks/gpu.py
# measured 18.60 (off) and 7.07 (on) of 8B at 2,048 tokens on an H200, where all of the last layer was still computed.
PEAKS = {
    (False, False): {
        "1B": {1024: (2.74, 1.32), 8192: (13.98, 2.73)},
        "7B": {1024: (9.71, 4.67), 8192: (48.19, 8.02)},
        "8B": {1024: (12.03, 6.56), 8192: (53.61, 10.09)},
        "70B": {1024: (71.07, 43.01), 8192: (278.61, 55.44)},
    },
    (False, True): {
        "1B": {1024: (2.22, 1.72, 1.28, 1.24), 8192: (9.92, 5.88, 2.39, 1.94)},
        "7B": {1024: (8.27, 6.89, 4.62, 4.44), 8192: (36.98, 25.79, 7.67, 5.73)},
        "8B": {1024: (10.17, 8.39, 6.5, 6.33), 8192: (39.02, 24.53, 9.5, 7.57)},
        "70B": {1024: (61.62, 52.44, 42.89, 41.98), 8192: (204.25, 130.4, 54.5, 44.43)},
    },
    (True, False): {
        "1B": {1024: (2.36, 1.29), 8192: (10.94, 2.39)},
        "7B": {1024: (8.48, 4.62), 8192: (38.43, 7.54)},
        "8B": {1024: (10.59, 6.51), 8192: (42.17, 9.54)},
        "70B": {1024: (63.76, 42.9), 8192: (220.23, 54.57)},
    },
    (True, True): {
        "1B": {1024: (1.97, 1.48, 1.27, 1.23), 8192: (7.9, 3.89, 2.23, 1.78)},
        "7B": {1024: (7.23, 5.87, 4.59, 4.41), 8192: (28.66, 17.46, 7.3, 5.36)},
        "8B": {1024: (9.14, 7.37, 6.47, 6.3), 8192: (30.7, 16.34, 9.24, 7.3)},
        "70B": {1024: (56.35, 47.17, 42.83, 41.92), 8192: (161.77, 88.26, 53.96, 43.9)},
    },
}
SMALL = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
SIZES = {
    "1B": SMALL | {"head_dim": 64, "tie_word_embeddings": True},
    "8B": META_8B,
    "7B": META_8B | {"intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000},
    "70B": META_70B,
}


@pytest.mark.parametrize("liger, fused", PEAKS)
@pytest.mark.parametrize("name", SIZES)
def test_the_memory_estimate_is_within_3_percent(name, liger, fused, tmp_path):
    args = train_llama.parse_args([])
    args.use_liger_kernel = "on" if liger else "off"
    shape = shape_of(without_weights(tmp_path / "model", SIZES[name]), args) | {"fusable": fused}
    for tokens, peaks in PEAKS[liger, fused][name].items():
        for way, peak in zip(estimate.WAYS if fused else ("off", "on"), peaks, strict=True):
            parts = estimate.memory(shape, args, tokens, int(0.08 * tokens), way)
            assert sum(parts.values()) / 1e9 == pytest.approx(peak, rel=0.03), (tokens, way)


SETTLED = ("activation_checkpointing", "per_device_train_batch_size", "gradient_accumulation_steps")


BY_ROOM = {
    80: ("off", 4, 1),
    40: ("off", 2, 2),
    24: ("off", 1, 4),
    16: ("mlp", 1, 4),  # 14.3 GB with nothing computed again: more than can be used of 16
    12: ("on", 4, 1),
    9.5: ("on", 2, 2),
    7.9: ("host", 2, 2),
    4: ("host", 1, 4),
}


@pytest.mark.parametrize("room, settled", BY_ROOM.items())
def test_as_much_of_a_step_goes_at_once_as_fits_the_gpu(room, settled, tmp_path, monkeypatch):
    args = train_llama.parse_args([])
    shape = shape_of(without_weights(tmp_path / "model", META_8B), args)
    packed = {"labels": [[-100] * 1900 + [1] * 148] * 8}
    monkeypatch.setattr(estimate, "room_and_width", lambda args: (room * 1e9, 2))
    estimate.settle(shape, packed, args)
    assert tuple(getattr(args, name) for name in SETTLED) == settled
    given = ["--activation-checkpointing", "off", "--per-device-train-batch-size", "2"]
    args = train_llama.parse_args(given)
    estimate.settle(shape, packed, args)
    assert tuple(getattr(args, name) for name in SETTLED) == ("off", 2, 4)


@pytest.mark.parametrize("host, fits", [(4e9, True), (0.62e9, True), (0.6e9, False)])
def test_layers_inputs_go_to_the_host_only_if_it_has_room_for_them(host, fits, tmp_path, monkeypatch):
    args = train_llama.parse_args(["--activation-checkpointing", "host"])
    shape = shape_of(without_weights(tmp_path / "model", META_8B), args)
    packed = {"labels": [[-100] * 1800 + [1] * 100]}
    monkeypatch.setattr(estimate, "room_and_width", lambda args: (24e9, 2))
    monkeypatch.setattr(machine, "host_memory", lambda: host)
    # 1,900 x 4,096 x 2 bytes are taken as 2 ** 24, 32 times: 0.54 GB, of 88 % of the host's
    assert estimate.fits(shape, packed, args, 1, "host") == fits


@pytest.mark.parametrize("steps, warmup", [(1, 0), (5, 2), (19, 9), (20, 10), (999, 10)])
def test_the_warm_up_of_a_short_run_is_at_most_half_of_it(steps, warmup, monkeypatch, capsys):
    monkeypatch.setattr(estimate, "fits", lambda *_, **__: True)
    args = train_llama.parse_args(["--max-steps", str(steps)])
    estimate.settle({"fusable": True}, {"labels": [[1, 1]]}, args)
    assert args.warmup_steps == warmup
    assert (f"warm-up of {warmup} optimizer steps instead of 10" in capsys.readouterr().out) == (warmup < 10)


def test_a_cpu_takes_one_packed_row_at_a_time_and_checkpoints_where_memory_is_short(tmp_path, monkeypatch):
    shape = shape_of(without_weights(tmp_path / "model", META_8B), train_llama.parse_args([]))
    packed = {"labels": [[-100] * 1900 + [1] * 148] * 8}
    for room, checkpointing in ((64e9, "off"), (44e9, "mlp"), (18e9, "on")):
        monkeypatch.setattr(machine, "host_memory", lambda room=room: room)
        args = train_llama.parse_args([])
        estimate.settle(shape, packed, args)
        assert tuple(getattr(args, name) for name in SETTLED) == (checkpointing, 1, 4)


def from_these(path, files, read, *more):
    return files.get(os.path.normpath(path)) or read(path, *more)


def test_a_host_s_memory_is_what_its_control_group_allows(monkeypatch, tmp_path):
    free = machine.host_memory()
    assert 0 < free <= psutil.virtual_memory().total
    read = Path.read_text
    second = {"/proc/self/cgroup": "0::/box\n", "/sys/fs/cgroup/box/memory.max": f"{free // 2}\n"}
    first = {"/proc/self/cgroup": "7:memory:/a/b\n6:cpu,cpuacct:/\n"}
    first["/sys/fs/cgroup/memory/a/b/memory.limit_in_bytes"] = f"{free // 2}\n"
    for files in (first, second):
        made = {os.path.normpath(path): text for path, text in files.items()}
        monkeypatch.setattr(Path, "read_text", functools.partialmethod(from_these, made, read))
        assert machine.host_memory() == free // 2
    made["/sys/fs/cgroup/box/memory.max"] = "max\n"
    assert machine.host_memory() > free // 2


def test_a_host_s_memory_is_limited_by_every_group_above_and_in_a_container_by_the_mount(monkeypatch, tmp_path):
    free = machine.host_memory()

    def limited(groups, **limits):
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        for path, text in {"proc/self/cgroup": groups, **limits}.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text)
        return machine.host_memory(root)

    second, first = "sys/fs/cgroup", "sys/fs/cgroup/memory"
    slices = {f"{second}/a.slice/b/memory.max": "max\n", f"{second}/a.slice/memory.max": "2000000\n"}
    assert limited("0::/a.slice/b\n", **slices) == 2000000
    assert limited("0::/a.slice/b\n", **slices, **{f"{second}/a.slice/b/c/memory.max": "1\n"}) == 2000000
    assert limited("0::/docker/77\n", **{f"{second}/memory.max": "3000000\n"}) == 3000000
    assert limited("0::/../../outside\n", **{f"{second}/memory.max": "3000000\n"}) == 3000000
    assert limited("7:memory:/docker/77\n", **{f"{first}/memory.limit_in_bytes": "4000000\n"}) == 4000000
    parent = {f"{first}/a/memory.limit_in_bytes": "5000000\n"}
    parent[f"{first}/a/b/memory.limit_in_bytes"] = "9223372036854771712\n"
    assert limited("7:memory:/a/b\n6:cpu,cpuacct:/\n", **parent) == 5000000
    assert limited("0::/\n") > free // 2
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (psutil.Process().memory_info().vms + 1000000, -1))
    assert limited("0::/\n") <= psutil.Process().memory_info().rss + 1000000


def test_memory_that_ends_on_a_cpu_says_what_helps(capsys):
    error = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 6291456 bytes")
    trainer = SimpleNamespace(train=lambda **_: (_ for _ in ()).throw(error))
    with pytest.raises(SystemExit) as stopped:
        train_until_done(trainer, None)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and "out of memory (DefaultCPUAllocator" in message
    assert "--activation-checkpointing on or host" in message


def test_an_overflow_in_float16_is_the_scaler_s_business_until_it_gives_up(dataset, tmp_path, capsys):
    trainer, _, _ = make_trainer(dataset, tmp_path)
    entry = {"loss": 2.5, "grad_norm": math.inf}
    trainer.accelerator.scaler = SimpleNamespace(get_scale=lambda: 32768.0)
    trainer.watch(entry)
    trainer.accelerator.scaler.get_scale = lambda: 0.5
    with pytest.raises(SystemExit):
        trainer.watch(entry)
    assert "training diverged" in capsys.readouterr().err
