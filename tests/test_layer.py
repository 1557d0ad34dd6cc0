"""pipeline/training/layer.py: layers that keep less, and a loss in chunks, have the numbers of PEFT and autograd."""

import json
import os
import shutil
import signal
import time

import pytest
import torch
from conftest import FIXTURES, assert_refused, run, start
from peft import get_peft_model
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

import train_llama
from pipeline import lora, machine, models
from pipeline.attention import choose_attention
from pipeline.training import estimate, layer
from pipeline.training.estimate import LOSS_CHUNK, WAYS
from pipeline.training.trainer import QLoRATrainer, lora_config

LENGTHS = [37, 5, 64, 22]


def build(name="tiny_llama3", dtype=torch.float32, *flags):
    """A 4-bit Llama for training on packed rows, with an adapter that is not zero."""
    torch.manual_seed(0)
    model = models.load_model(str(FIXTURES / name), load_in_4bit=True, dtype=dtype)
    model = get_peft_model(model, lora_config(train_llama.parse_args(flags))).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter.float()) * 0.02
    model.set_attn_implementation(choose_attention("packed"))
    return model


def rows_of(model, lengths=LENGTHS):
    """Inputs of packed rows, the positions with a label and the labels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (sum(lengths),), generator=generator)
    kept = (torch.rand(len(ids) - 1, generator=generator) < 0.2).nonzero()[:, 0]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    inputs = {"input_ids": ids[None], "position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
    inputs |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": max(lengths)}
    return inputs, kept, ids[1:][kept]


def gradients(model, loss):
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten().double() for p in model.parameters() if p.requires_grad])


def by_peft(model):
    inputs, kept, labels = rows_of(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=model.dtype == torch.bfloat16):
        logits = model(**inputs, logits_to_keep=kept, use_cache=False).logits[0]
    return gradients(model, cross_entropy(logits.float(), labels, reduction="sum"))


def by_layer(model, way, fused=True, **options):
    lora.fuse_lora(model)
    layer.prepare(model, way, fused, **options)
    inputs, kept, labels = rows_of(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=model.dtype == torch.bfloat16):
        loss = model(**inputs, kept=kept, labels=labels, use_cache=False).loss
    return gradients(model, loss)


def apart(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("name", ["tiny_llama3", "tiny_llama2"])
@pytest.mark.parametrize("order", ["of a CPU", "of a GPU"])
def test_every_way_to_keep_less_has_the_loss_and_gradients_of_peft(name, order, monkeypatch):
    if order == "of a GPU":  # of the thin products
        monkeypatch.setattr(lora, "thin_product", torch.matmul)
        monkeypatch.setattr(layer, "thin_product", torch.matmul)
    loss, expected = by_peft(build(name))
    half_off = apart(by_peft(build(name, torch.bfloat16))[1], expected)
    assert 1e-3 < half_off < 0.1
    for way, fused in [(None, False), *((way, True) for way in WAYS)]:
        found, grads = by_layer(build(name), way, fused)
        assert found == pytest.approx(loss, rel=1e-6) and apart(grads, expected) < 2e-6, way
        _, half = by_layer(build(name, torch.bfloat16), way, fused)
        assert apart(half, expected) < 1.05 * half_off, way  # in bf16 no further from float32 than PEFT's


def test_what_is_computed_again_is_the_same_to_the_last_bit():
    for dtype in (torch.float32, torch.bfloat16):
        off, *others = (by_layer(build(dtype=dtype), way)[1] for way in WAYS)
        assert all(torch.equal(off, other) for other in others)


def test_the_elementwise_work_in_pieces_is_that_of_the_whole_and_of_autograd(monkeypatch):
    gate, up, grad = torch.randn(3, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gate.requires_grad_(), up.requires_grad_()
    product = torch.nn.functional.silu(gate) * up
    expected = [product.detach(), *torch.autograd.grad(product, [gate, up], grad)]
    monkeypatch.setattr(layer, "PIECE", 300)
    found = [x.detach().clone() for x in (gate, up, grad)]
    layer.swiglu_back_in_pieces_(*found)
    for place, value in zip((1, 0, 2), expected, strict=True):  # up, gate, grad become product and both gradients
        assert torch.allclose(found[place], value, rtol=1e-12, atol=1e-12)


def test_behind_the_last_layer_s_attention_only_labelled_tokens_go_on():
    for way, fused in ((None, False), ("off", True), ("on", True)):
        model, seen = build(), []
        layers = model.get_base_model().model.layers
        for one in layers:
            one.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output.shape[1]))
        by_layer(model, way, fused)
        _, kept, _ = rows_of(model)
        assert seen == [sum(LENGTHS)] * (len(layers) - 1) + [len(kept)]


@pytest.mark.parametrize("way", WAYS)
def test_packed_rows_have_the_gradients_of_the_same_rows_one_by_one(way):
    _, packed = by_layer(build(), way)
    model = build()
    layer.prepare(model, way, True)
    inputs, kept, labels = rows_of(model)
    starts = inputs["cu_seq_lens_q"].tolist()
    for first, end in zip(starts, starts[1:], strict=False):
        here = (kept >= first) & (kept < end)
        bounds = torch.tensor([0, end - first], dtype=torch.int32)
        row = {"input_ids": inputs["input_ids"][:, first:end], "position_ids": torch.arange(end - first)[None]}
        row |= {"cu_seq_lens_q": bounds, "kept": kept[here] - first, "labels": labels[here]}
        model(**row, use_cache=False).loss.backward()
    alone = torch.cat([p.grad.flatten().double() for p in model.parameters() if p.requires_grad])
    assert apart(packed, alone) < 2e-6


@pytest.mark.parametrize("way", WAYS)
def test_a_second_backward_pass_fails_loudly(way):
    model = build()
    layer.prepare(model, way, True)
    inputs, kept, labels = rows_of(model)
    loss = model(**inputs, kept=kept, labels=labels, use_cache=False).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward pass"):
        loss.backward()


@pytest.mark.parametrize("labels", [1, LOSS_CHUNK, 2 * LOSS_CHUNK + 7])
def test_the_loss_in_chunks_is_that_of_all_logits(labels):
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(labels, 24, generator=generator), torch.randn(99, 24, generator=generator) * 3
    gold = torch.randint(0, 99, (labels,), generator=generator)
    hidden.requires_grad_()
    loss = 0.7 * layer.ChunkedLoss.apply(hidden, head, gold)
    loss.backward()
    exact = hidden.detach().double().requires_grad_()
    expected = 0.7 * cross_entropy(exact @ head.T.double(), gold, reduction="sum")
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert apart(hidden.grad.double(), exact.grad) < 1e-6
    with torch.no_grad():
        assert layer.ChunkedLoss.apply(hidden, head, gold).item() == pytest.approx(expected.item() / 0.7, rel=1e-6)


def test_in_float16_a_small_gradient_of_the_loss_is_not_rounded_away():
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(99, 24, generator=generator).half()
    hidden = (head[[5]] * 1.5).requires_grad_()  # nearly certain of token 5
    (1000 * layer.ChunkedLoss.apply(hidden, head, torch.tensor([5]))).backward()
    exact = hidden.detach().double().requires_grad_()
    (1000 * cross_entropy(exact @ head.T.double(), torch.tensor([5]))).backward()
    assert 1e-8 < exact.grad.abs().max() / 1000 < 1e-5
    assert apart(hidden.grad.double(), exact.grad) < 0.1


def fusable_with(monkeypatch=None, flags=(), **config):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64, **config))
    return lora.fusable(get_peft_model(model, lora_config(train_llama.parse_args(flags))))


def test_layers_are_fused_where_lora_alone_is_on_all_seven_linear_layers(monkeypatch):
    assert fusable_with()
    assert fusable_with(flags=["--target-modules", *(f"{name}_proj" for name in "qkvo"), "gate_proj", "up_proj",
                               "down_proj"])  # fmt: skip
    assert not fusable_with(flags=["--lora-dropout", "0.1"])
    assert not fusable_with(flags=["--target-modules", "q_proj", "v_proj"])
    assert not fusable_with(attention_bias=True) and not fusable_with(mlp_bias=True)
    assert not fusable_with(hidden_act="gelu")
    monkeypatch.setattr(machine, "under_fsdp", lambda: True)
    assert not fusable_with()


def test_what_needs_fused_layers_is_refused_without_them(dataset, tmp_path):
    shutil.copytree(dataset / "dataset", tmp_path / "dataset")
    arguments = ["--model", FIXTURES / "tiny_llama3", "--lora-dropout", 0.1, "--output-dir", tmp_path]
    for more in ([], ["--dry-run"]):
        result = run("train_llama.py", *arguments, "--activation-checkpointing", "mlp", *more)
        assert_refused(result, "--activation-checkpointing mlp needs LoRA on all linear layers, without dropout")


def test_trainings_that_keep_less_end_with_the_same_adapter_a_killed_one_too(dataset, tmp_path):
    adapters, losses = [], []
    for way in WAYS:
        output = tmp_path / way
        shutil.copytree(dataset / "dataset", output / "dataset")
        command = ["--model", FIXTURES / "tiny_llama3", "--max-length", 300, "--activation-checkpointing", way]
        command += ["--save-steps", 2, "--logging-steps", 1, "--output-dir", output, "--num-train-epochs", 0.5]
        if way == "on":
            process = start("train_llama.py", *command, streams=[tmp_path / "said", tmp_path / "said"])
            while not (output / "checkpoints" / "checkpoint-2" / "whole.json").exists():
                assert process.is_alive()
                time.sleep(0.01)
            os.kill(process.pid, signal.SIGKILL)
            process.join(60)
            assert not (output / "adapter").exists()
        result = run("train_llama.py", *command)
        assert result.returncode == 0 and ("resuming from" in result.stdout) == (way == "on"), result.stderr
        adapters.append(load_file(output / "adapter" / "adapter_model.safetensors"))
        log = map(json.loads, (output / "adapter" / "log.jsonl").read_text().splitlines())
        losses.append([entry["loss"] for entry in log if "loss" in entry])
    off, mlp, on, host = adapters
    for found in (on, host):
        assert all(torch.equal(found[name], mlp[name]) for name in mlp)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    largest = max(weight.abs().max() for weight in off.values())
    assert max((off[name] - mlp[name]).abs().max() for name in off) < 0.02 * largest


@pytest.mark.parametrize("before, now, taken", [("on", "off mlp on", "on"), ("off", "mlp on", "mlp")])
def test_a_run_that_resumes_keeps_what_auto_came_to_or_says_that_it_cannot(
    before, now, taken, dataset, tmp_path, monkeypatch, capsys
):
    shutil.copytree(dataset / "dataset", tmp_path / "dataset")
    command = ["--model", FIXTURES / "tiny_llama3", "--max-length", 300, "--max-steps", 2, "--save-steps", 1]
    command = [*map(str, command), "--output-dir", str(tmp_path)]
    save = QLoRATrainer._save_checkpoint

    def save_and_end(*arguments):
        save(*arguments)
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(estimate, "fits", lambda *sizes, **_: sizes[4] == before)
        patch.setattr(QLoRATrainer, "_save_checkpoint", save_and_end)
        with pytest.raises(SystemExit):
            train_llama.main(command)
    monkeypatch.setattr(estimate, "fits", lambda *sizes, **_: sizes[4] in now.split())
    capsys.readouterr()
    train_llama.main(command)
    said = capsys.readouterr().out
    assert "resuming from" in said
    assert json.loads((tmp_path / "adapter/run.json").read_text())["settings"]["activation_checkpointing"] == taken
    assert (f"--activation-checkpointing {taken} now, {before} before" in said) == (taken != before)
