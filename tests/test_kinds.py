"""Whatever kind of Llama it is: train, test and merge agree with transformers and PEFT used plainly."""

import json
import math
import shutil

import pytest
import torch
from conftest import FIXTURES, ROOT, TASKS
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig, LlamaConfig

import merge_llama
import test_llama
import train_llama
from pipeline.files import load_rows
from pipeline.training import trainer

LLAMA3_2 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# name: tokenizer of, what its tokenizer_config and config have, type of the file, end tokens, BOS in front of a text
KINDS = {
    # as SmolLM2: no BOS, pad = eos, tied embeddings, heads of their own size, a vocabulary larger than the tokenizer's
    "no_bos": (
        "tiny_llama3",
        {"pad_token": "<|end_of_text|>"},
        {"tie_word_embeddings": True, "head_dim": 24, "vocab_size": 2112},
        (torch.bfloat16, "<|end_of_text|>", 0),
    ),
    # as Llama 3.1 and 3.2: scaled RoPE (so short that it acts here), several end tokens, no pad; with all biases
    "scaled_rope": (
        "tiny_llama3",
        {},
        {
            "rope_parameters": LLAMA3_2 | {"original_max_position_embeddings": 64},
            "attention_bias": True,
            "mlp_bias": True,
        },
        (torch.float32, ["<|end_of_text|>", "<|eot_id|>"], 1),
    ),
    # as many made from Llama 2: float16, pad = eos, biases of attention alone
    "float16": ("tiny_llama2", {"pad_token": "</s>"}, {"attention_bias": True}, (torch.float16, "</s>", 1)),
}


def make(folder, name):
    """A tiny Llama of that kind, its folder as the hub has it; the number of BOS in front of a text."""
    source, tokens, sizes, (dtype, ends, bos) = KINDS[name]
    folder.mkdir(parents=True)
    changes = {"tokenizer.json": {} if bos else {"post_processor": None}, "tokenizer_config.json": tokens}
    for file, change in changes.items():
        content = json.loads((FIXTURES / source / file).read_text(encoding="utf-8"))
        (folder / file).write_text(json.dumps(content | change), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ends = tokenizer.convert_tokens_to_ids(ends)
    config = LlamaConfig(
        **({"vocab_size": len(tokenizer), "initializer_range": 0.1} | sizes),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):  # else they begin as zeros
            parameter.data.normal_(0, 0.1)
    model.generation_config = GenerationConfig(eos_token_id=ends)
    model.to(dtype).save_pretrained(folder)
    return bos


def plain(base, adapter, in_4bit=True):
    """Base and adapter as transformers and PEFT load them, in float32."""
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    options = {"dtype": torch.float32, "quantization_config": nf4 if in_4bit else None}
    model = AutoModelForCausalLM.from_pretrained(base, **options)
    return PeftModel.from_pretrained(model.dequantize() if in_4bit else model, adapter).eval()


def encoded(tokenizer, row):
    prompt, whole = (tokenizer(text).input_ids for text in (row["prompt"], row["prompt"] + row["completion"]))
    return prompt, whole + [tokenizer.eos_token_id]


def nll(model, tokenizer, row):
    """Summed negative log likelihood of a row's completion and EOS, and the number of its tokens."""
    prompt, whole = encoded(tokenizer, row)
    labels = torch.tensor([[-100] * len(prompt) + whole[len(prompt) :]])
    count = len(whole) - len(prompt)
    with torch.no_grad():
        return model(torch.tensor([whole]), labels=labels).loss.item() * count, count


def perplexity(model, tokenizer, rows):
    sums = [nll(model, tokenizer, row) for row in rows]
    return math.exp(sum(loss for loss, _ in sums) / sum(count for _, count in sums))


def general_perplexity(model, tokenizer, bos):
    """Of the text in the repository, in windows of 1,024 tokens, BOS among them."""
    ids = tokenizer(
        (ROOT / "pipeline" / "testing" / "general_text.txt").read_text().strip(), add_special_tokens=False
    ).input_ids
    front, total, count = [tokenizer.bos_token_id] * bos, 0, 0
    while ids:
        part = torch.tensor([front + ids[: 1024 - bos]])
        ids = ids[1024 - bos :]
        with torch.no_grad():
            total += model(part, labels=part).loss.item() * (part.shape[1] - 1)
        count += part.shape[1] - 1
    assert count > 1024
    return math.exp(total / count)


@pytest.mark.parametrize("name", list(KINDS))
def test_the_whole_chain_is_what_transformers_and_peft_compute(name, dataset, tmp_path, monkeypatch, capsys):
    base, out = tmp_path / "base", tmp_path / "out"
    bos = make(base, name)
    shutil.copytree(dataset, out)
    where = ["--output-dir", str(out)]
    monkeypatch.setattr(trainer, "catch_signals", lambda trainer: None)  # they are the tests' own
    small = ["--model", str(base), "--max-steps", "2", "--warmup-steps", "0", "--gradient-accumulation-steps", "1"]
    train_llama.main([*small, "--dry-run", *where])
    shape = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(base).parameters())
    assert f"{shape:,}\n" in capsys.readouterr().out
    train_llama.main([*small, *where])
    run = json.loads((out / "adapter" / "run.json").read_text())
    assert run["settings"]["learning_rate"] == run["run"]["learning_rate"] == 1e-3
    test_llama.main(["--samsum-max-new-tokens", "12", *where])
    merge_llama.main(["--check-rows", "4", *where])

    tokenizer, model = AutoTokenizer.from_pretrained(base), plain(base, out / "adapter")
    splits = {split: load_rows(out, split).to_list() for split in ("validation", "test")}
    for task in TASKS:
        rows = {split: [row for row in all_rows if row["task"] == task] for split, all_rows in splits.items()}
        prompt, whole = encoded(tokenizer, rows["test"][0])
        assert prompt.count(tokenizer.bos_token_id) == whole.count(tokenizer.bos_token_id) == bos
        assert math.exp(run[f"eval_{task}_loss"]) == pytest.approx(
            perplexity(model, tokenizer, rows["validation"]), rel=1e-3
        )
        predictions = json.loads((out / f"{task}_predictions.json").read_text())
        for row, example in zip(rows["test"][:2], predictions["examples"], strict=False):
            assert example["nll"] == pytest.approx(nll(model, tokenizer, row)[0], rel=1e-4)
            with model.disable_adapter():
                assert example["base_nll"] == pytest.approx(nll(model, tokenizer, row)[0], rel=1e-4)
        assert predictions["general_text"]["tuned"]["perplexity"] == pytest.approx(
            general_perplexity(model, tokenizer, bos), rel=1e-4
        )
        with model.disable_adapter():
            assert predictions["general_text"]["base"]["perplexity"] == pytest.approx(
                general_perplexity(model, tokenizer, bos), rel=1e-4
            )
    example = json.loads((out / "samsum_predictions.json").read_text())["examples"][0]
    row = next(row for row in splits["test"] if row["id"] == example["id"])
    prompt = torch.tensor([encoded(tokenizer, row)[0]])
    written = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
    assert example["prediction"] == tokenizer.decode(written, skip_special_tokens=True).strip()
    report = json.loads((out / "merged" / "merge.json").read_text())
    assert report["verified"] and report["dtype"] == "float16" and report["merge_base"] == "16bit"
    whole = plain(base, out / "adapter", in_4bit=False)
    tasks = [[row for row in splits["validation"] if row["task"] == task][:2] for task in TASKS]
    rows = [row for pair in tasks for row in pair]
    assert report["adapter_perplexity"] == pytest.approx(perplexity(whole, tokenizer, rows), rel=1e-4)
    merged = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32)
    ends = tokenizer.convert_tokens_to_ids(KINDS[name][3][1])
    assert set(merged.generation_config.eos_token_id) >= set(ends if isinstance(ends, list) else [ends])
    ids = torch.tensor([encoded(tokenizer, rows[0])[1]])
    with torch.no_grad():
        expected = whole.merge_and_unload()(ids).logits
        assert (merged(ids).logits - expected).abs().mean() < 2e-3 * expected.std()
    again = AutoTokenizer.from_pretrained(out / "merged")
    assert encoded(again, rows[0]) == encoded(tokenizer, rows[0])
