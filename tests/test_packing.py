"""train_llama.py, the numbers of a step: packed rows are worth what they are alone, the loss is a mean over tokens."""

import inspect
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import FIXTURES, run
from datasets import load_from_disk
from peft import get_peft_model
from safetensors.torch import load_file
from torch.nn.attention import varlen
from transformers.loss.loss_utils import ForCausalLMLoss

import train_llama
from pipeline import lora, models
from pipeline.attention import packed_attention
from pipeline.lora import fuse_lora
from pipeline.tokens import load_tokenizer
from pipeline.training.trainer import QLoRATrainer, lora_config, summed_loss

BOTH = pytest.mark.parametrize("name", ["tiny_llama3", "tiny_llama2"])


def make_trainer(dataset, output, name="tiny_llama3", arguments=(), attention="auto"):
    """(trainer, tokenised rows) on the fixture's rows, in 4-bit and float32, without dropout."""
    arguments = ["--model", str(FIXTURES / name), "--max-length", "700", "--output-dir", str(output), *arguments]
    arguments += ["--per-device-train-batch-size", "1", "--activation-checkpointing", "off"]
    args = train_llama.parse_args(arguments)
    rows = {split: load_from_disk(str(dataset / "dataset"))[split] for split in ("train", "validation")}
    tokenizer = load_tokenizer(args.model)
    tokens = train_llama.tokenize(rows["train"], tokenizer, args.max_length, "train")
    validation = train_llama.tokenize(rows["validation"], tokenizer, args.max_length, "validation")
    by_task = train_llama.validation_sets(rows["validation"], tokenizer, args)
    model = models.load_model(args.model, load_in_4bit=True)
    args.attn_implementation = attention
    made = QLoRATrainer(args, model, tokenizer, train_llama.pack(tokens, args), by_task)
    for parameter_name, parameter in made.model.named_parameters():
        if "lora_B" in parameter_name:  # PEFT starts with zeros, and with them lora_A has no gradient
            torch.nn.init.normal_(parameter, std=0.05)
    return made, tokens, validation


def loss_and_gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def alone(model, rows):
    """Summed loss of rows one by one by transformers' own loss, in eager attention without a packing in sight."""
    total, base = 0, model.get_base_model()
    for module in (*base.model.layers, base.lm_head):  # as transformers made them
        vars(module).pop("forward", None)
    base.loss_function = ForCausalLMLoss
    for row in rows:
        ids, labels = (torch.tensor([row[key]]) for key in ("input_ids", "labels"))
        total = total + model(input_ids=ids, labels=labels).loss * (labels != -100).sum()
    return total


def largest_difference(gradients, expected):
    """Of any element, as a fraction of the largest gradient of its tensor."""
    return max(((gradients[key] - grad).abs().max() / grad.abs().max()).item() for key, grad in expected.items())


@BOTH
@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_a_packed_batch_has_the_loss_and_gradients_of_its_rows_alone(attention, name, dataset, tmp_path):
    trainer, tokens, _ = make_trainer(dataset, tmp_path, name, attention=attention)
    model, rows = trainer.model.train(), list(tokens)[:7]
    packed = train_llama.pack(tokens.select(range(7)), trainer_args(max_length=4096))
    assert len(packed) == 1 and sorted(packed[0]["seq_lengths"]) == sorted(len(row["input_ids"]) for row in rows)
    batch = trainer.data_collator([packed[0]])
    total, count = summed_loss(model, dict(batch))
    assert count == sum(label != -100 for row in rows for label in row["labels"])
    loss, gradients = loss_and_gradients(model, total)
    without = {"cu_seq_lens_q": torch.tensor([0, batch["input_ids"].shape[1]]), "position_ids": None}
    _, contaminated = loss_and_gradients(model, summed_loss(model, dict(batch) | without)[0])
    model.set_attn_implementation("eager")
    expected, expected_gradients = loss_and_gradients(model, alone(model, rows))
    assert loss == pytest.approx(expected, rel=1e-4)
    assert all(gradient.abs().max() > 0 for gradient in expected_gradients.values())
    assert largest_difference(gradients, expected_gradients) < 1e-4
    assert largest_difference(contaminated, expected_gradients) > 1e-2  # it would notice lost boundaries


def lora_step(in_4bit, fused, half):
    """Loss and gradients of one step; half: as mixed precision has it, bf16 weights, float32 adapter, autocast."""
    ids = torch.randint(0, 2000, (2, 60), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = models.load_model(str(FIXTURES / "tiny_llama3"), in_4bit)
    args = train_llama.parse_args(["--lora-r", "4", "--lora-alpha", "12"])
    model = get_peft_model(model, lora_config(args)).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
        elif half and not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.bfloat16()
    if fused:
        fuse_lora(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss_and_gradients(model, loss)


@pytest.mark.parametrize("on", ["CPU", "GPU"])
@pytest.mark.parametrize("in_4bit", [True, False])
def test_fused_lora_has_the_loss_and_gradients_of_pefts_own(in_4bit, on, monkeypatch):
    if on == "GPU":  # its order of the thin products
        monkeypatch.setattr(lora, "thin_product", torch.matmul)
    loss, gradients = lora_step(in_4bit, fused=False, half=False)
    fused_loss, fused_gradients = lora_step(in_4bit, fused=True, half=False)
    assert fused_loss == pytest.approx(loss, rel=1e-6)
    assert largest_difference(fused_gradients, gradients) < 1e-5
    off = []
    for fused in (False, True):  # in bf16 as far from float32 as PEFT's, not further
        half_loss, found = lora_step(in_4bit, fused, half=True)
        assert half_loss == pytest.approx(loss, rel=0.01)
        assert all(gradient.dtype == torch.float32 for gradient in found.values())
        off.append(sum(((found[key] - grad).norm() / grad.norm()).item() for key, grad in gradients.items()))
    assert off[1] < 1.1 * off[0] < 0.1 * len(gradients)


def trainer_args(**changes):
    args = train_llama.parse_args([])
    return type(args)(**vars(args) | changes)


def test_packed_attention_refuses_to_guess_where_rows_begin():
    query = torch.zeros(1, 2, 5, 4)
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        packed_attention(None, query, query, query, None)


def test_packing_keeps_every_row_whole(dataset, tmp_path):
    tokenizer = load_tokenizer(str(FIXTURES / "tiny_llama3"))
    rows = load_from_disk(str(dataset / "dataset"))["train"]
    tokens = train_llama.tokenize(rows, tokenizer, 512, "train")
    pieces = []
    for sequence in train_llama.pack(tokens, trainer_args(max_length=512)):
        assert len(sequence["input_ids"]) <= 512
        start = 0
        for length in sequence["seq_lengths"]:
            part = slice(start, start := start + length)
            pieces.append((tuple(sequence["input_ids"][part]), tuple(sequence["labels"][part])))
    assert sorted(pieces) == sorted((tuple(row["input_ids"]), tuple(row["labels"])) for row in tokens)


def test_validation_loss_is_a_mean_over_tokens_not_over_batches(dataset, tmp_path):
    trainer, _, validation = make_trainer(dataset, tmp_path, arguments=["--lora-dropout", "0.5"])
    trainer.mark = 0
    trainer.model.train()  # as a step leaves it: there is no dropout in a validation
    metrics = trainer.evaluate()
    model = trainer.model.eval()
    model.set_attn_implementation("eager")
    losses = {}
    for task in ("samsum", "trivia_qa"):
        rows = [row for row in validation if row["task"] == task]
        tokens = sum(label != -100 for row in rows for label in row["labels"])
        with torch.no_grad():
            losses[task] = alone(model, rows).item() / tokens
            means = [alone(model, [row]).item() / sum(label != -100 for label in row["labels"]) for row in rows]
        assert metrics[f"eval_{task}_loss"] == pytest.approx(losses[task], rel=1e-5)
        assert sum(means) / len(means) != pytest.approx(losses[task], rel=5e-5)
    assert metrics["eval_loss"] == pytest.approx(sum(losses.values()) / 2, rel=1e-4)


def test_processes_share_an_odd_number_of_validation_rows_without_counting_any_twice(dataset, tmp_path):
    trainer, tokens, _ = make_trainer(dataset, tmp_path)
    rows, sums = list(tokens.select(range(3))), []
    trainer.model.eval()

    def share(world, index):
        reduce = lambda values, how: sums.append(values) or values  # noqa: E731
        trainer.accelerator = SimpleNamespace(num_processes=world, process_index=index, reduce=reduce)
        trainer.validation_loss(rows)
        return sums.pop()

    assert share(2, 0) + share(2, 1) == pytest.approx(share(1, 0), rel=1e-6)


def test_the_probe_leaves_weights_gradients_and_random_numbers_as_they_were(dataset, tmp_path):
    trainer, _, _ = make_trainer(dataset, tmp_path, arguments=["--lora-dropout", "0.1"])
    before = {name: p.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    seen = []
    compute_loss = trainer.compute_loss

    def look(model, inputs):
        seen.append((inputs["input_ids"].numel(), int((inputs["labels"] != -100).sum())))
        return compute_loss(model, inputs)

    trainer.compute_loss = look
    sizes = [(len(row), sum(label != -100 for label in row)) for row in trainer.train_dataset["labels"]]
    state = torch.get_rng_state()
    assert trainer.probe() > 0
    assert torch.equal(torch.get_rng_state(), state)
    longest, most = max(sizes), max(sizes, key=lambda size: size[::-1])
    assert longest != most and sorted(seen) == sorted([longest, most])
    assert trainer.tokens == 0
    for name, p in trainer.model.named_parameters():
        if p.requires_grad:
            assert torch.equal(p, before[name]) and (p.grad is None or not p.grad.any())


def trained(dataset, output, *arguments):
    shutil.copytree(dataset / "dataset", output / "dataset")
    arguments = ["--model", FIXTURES / "tiny_llama2", "--max-length", 256, "--warmup-steps", 0, *arguments]
    result = run("train_llama.py", *arguments, "--learning-rate", "1e-2", "--output-dir", output)
    assert result.returncode == 0, result.stderr
    return load_file(output / "adapter" / "adapter_model.safetensors")


def test_batch_size_and_accumulation_can_be_traded(dataset, tmp_path):
    size, passes = "--per-device-train-batch-size", "--gradient-accumulation-steps"
    one = trained(dataset, tmp_path / "one", "--max-steps", 3, size, 1, passes, 4)
    two = trained(dataset, tmp_path / "two", "--max-steps", 3, size, 4, passes, 1)
    assert all(torch.allclose(one[key], two[key], atol=1e-5) for key in one)
    other = trained(dataset, tmp_path / "other", "--max-steps", 3, size, 1, passes, 1)
    assert not all(torch.allclose(one[key], other[key], atol=1e-3) for key in one)


def test_the_best_adapter_is_kept_and_patience_ends_the_run(dataset, tmp_path):
    arguments = ["--num-train-epochs", 40, "--eval-steps", 2, "--early-stopping-patience", 2, "--save-steps", 100]
    arguments += ["--gradient-accumulation-steps", 2, "--logging-steps", 1, "--warmup-steps", 4]
    arguments += ["--lora-r", 4, "--lora-alpha", 12, "--target-modules", "q_proj", "up_proj", "down_proj"]
    shutil.copytree(dataset / "dataset", tmp_path / "dataset")
    model = ["--model", FIXTURES / "tiny_llama3", "--max-length", 512, "--learning-rate", "3e-2"]
    result = run("train_llama.py", *model, *arguments, "--output-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "adapter" / "run.json").read_text())
    log = [json.loads(line) for line in (tmp_path / "adapter" / "log.jsonl").read_text().splitlines()]
    losses = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}
    assert summary["best_step"] == min(losses, key=losses.get) == summary["steps"] - 4
    assert summary["eval_loss"] == losses[summary["best_step"]]
    best = tmp_path / "checkpoints" / f"checkpoint-{summary['best_step']}"
    kept, written = (load_file(folder / "adapter_model.safetensors") for folder in (best, tmp_path / "adapter"))
    assert all(torch.equal(kept[key], written[key]) and written[key].dtype == torch.float32 for key in kept)
    steps = [entry for entry in log if "loss" in entry]
    assert [entry["step"] for entry in steps] == list(range(1, summary["steps"] + 1))
    rates = [entry["learning_rate"] for entry in steps]
    assert rates[:5] == pytest.approx([0, 0.0075, 0.015, 0.0225, 0.03])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    config = json.loads((best / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 12, ["down_proj", "q_proj", "up_proj"])
    for key in ("learning_rate", "grad_norm", "tokens", "tokens_per_second", "memory_gb"):
        assert all(entry[key] >= 0 for entry in steps)


class OnGPU(torch.Tensor):
    is_cuda = True


@pytest.mark.parametrize("parameter", ["enable_gqa", None], ids=["torch 2.13", "torch 2.11"])
def test_on_a_gpu_torch_s_kernel_is_called_as_it_documents_and_gives_the_same(parameter, monkeypatch):
    called = []

    def kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, **more):
        called.append(more)
        assert (max_q, max_k, window_size) == (5, 5, (-1, 0)) and torch.equal(cu_seq_q, cu_seq_k)
        rows, starts = [], cu_seq_q.tolist()
        for start, end in zip(starts, starts[1:], strict=False):
            q, k, v = (x[start:end].as_subclass(torch.Tensor).double() for x in (query, key, value))
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q, k) * scale
            future = torch.ones(end - start, end - start).triu(1).bool()
            rows.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -torch.inf).softmax(-1), v))
        return torch.cat(rows).to(query.dtype)

    own = inspect.signature(varlen.varlen_attn)
    assert {"enable_gqa", "scale", "window_size"} < own.parameters.keys()  # of the torch that is pinned
    kept = [one for name, one in own.parameters.items() if parameter or name != "enable_gqa"]
    kernel.__signature__ = own.replace(parameters=kept)
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    query, key, value = (torch.randn(1, heads, 9, 16, dtype=torch.bfloat16) for heads in (4, 2, 2))
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    options = {"mask": None, "scaling": 0.3, "cu_seq_lens_q": bounds, "max_length_q": 5}
    here, _ = packed_attention(None, query.float(), key.float(), value.float(), **options)
    there, _ = packed_attention(None, *(x.as_subclass(OnGPU) for x in (query, key, value)), **options)
    assert called == [{"enable_gqa": True} if parameter else {}]
    assert there.shape == (1, 9, 4, 16) and there.dtype == torch.bfloat16
    assert torch.allclose(here, there.as_subclass(torch.Tensor).float(), atol=0.02)
