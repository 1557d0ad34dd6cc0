"""Unsloth's and LLaMA-Factory's part of gpu.py: tokens/s, peak memory and loss of their trainers on its rows.

python benchmarks/peers/gpu_peer.py PEER WAY MODEL DATA STEPS LENGTH SCORED

DATA holds the rows twice: tokens.json (input_ids and labels) and alpaca/ as LLaMA-Factory reads them. WAY is one of
WAYS of the peer. Steps are of 4 packed rows of LENGTH tokens; the loss after them is that of the first SCORED rows.
The last line printed is JSON.
"""

import importlib.util
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

FAST = {"disable_gradient_checkpointing": True}
WAYS = {
    "unsloth": {"checkpointing": "unsloth", "no checkpointing": False},
    "llamafactory": {"neat_packing, Liger": {}, "neat_packing, Liger, no checkpointing": FAST},
}
peer, way, base, data, steps, length, scored = sys.argv[1:]
steps, length, data = int(steps), int(length), Path(data)
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
if peer == "unsloth":
    from unsloth import FastLanguageModel  # it changes the libraries that come after it

import torch  # noqa: E402
from transformers import Trainer  # noqa: E402

sys.path.append(str(Path(__file__).resolve().parent.parent))
from speed import Speed, counted  # noqa: E402

on_gpu = torch.cuda.is_available()
rows = json.loads((data / "tokens.json").read_text())
speed = Speed(rows[: int(scored)])


def unsloth(checkpointing):
    """Returns the attention that it takes."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    from unsloth.utils import attention_dispatch

    model, tokenizer = FastLanguageModel.from_pretrained(
        base, max_seq_length=length, load_in_4bit=True, dtype=torch.bfloat16
    )
    model = FastLanguageModel.get_peft_model(
        model, r=8, lora_alpha=16, target_modules=LINEAR, use_gradient_checkpointing=checkpointing
    )
    config = SFTConfig(output_dir=str(data / "out"), max_steps=steps, per_device_train_batch_size=4, max_length=length,
                       gradient_accumulation_steps=1, packing=True, learning_rate=2e-4, optim="adamw_8bit", bf16=True,
                       lr_scheduler_type="cosine", warmup_steps=0, logging_steps=1, save_strategy="no",
                       report_to="none", disable_tqdm=True, gradient_checkpointing=bool(checkpointing))  # fmt: skip
    SFTTrainer.training_step = counted(SFTTrainer.training_step)
    SFTTrainer(model=model, processing_class=tokenizer, train_dataset=Dataset.from_list(rows), args=config,
               callbacks=[speed]).train()  # fmt: skip
    names = {"HAS_FLASH_ATTENTION": "flash-attn", "HAS_XFORMERS": "xformers"}  # in its order
    return next((names[name] for name in names if getattr(attention_dispatch, name, False)), "sdpa, dense mask")


def llamafactory(more):
    """Returns the attention that it takes."""
    from llamafactory.train.tuner import run_exp

    Trainer.training_step = counted(Trainer.training_step)
    attention = "fa2" if importlib.util.find_spec("flash_attn") else "sdpa"
    settings = {
        "stage": "sft", "do_train": True, "finetuning_type": "lora", "model_name_or_path": base, "template": "empty",
        "quantization_bit": 4, "double_quantization": True, "lora_rank": 8, "lora_alpha": 16, "lora_dropout": 0.0,
        "lora_target": "all", "dataset_dir": str(data / "alpaca"), "dataset": "train", "cutoff_len": length,
        "output_dir": str(data / "out"), "overwrite_output_dir": True, "max_steps": steps, "learning_rate": 2e-4,
        "lr_scheduler_type": "cosine", "report_to": "none", "overwrite_cache": True, "logging_steps": 1,
        "save_strategy": "no", "bf16": on_gpu, "use_cpu": not on_gpu, "packing": True, "neat_packing": True,
        "per_device_train_batch_size": 4, "enable_liger_kernel": on_gpu, "flash_attn": attention,
    }  # fmt: skip
    run_exp(settings | more, callbacks=[speed])
    return attention


os.environ["DISABLE_VERSION_CHECK"] = "1"
speed.found["attention"] = globals()[peer](WAYS[peer][way])
names = (peer, "torch", "transformers", "trl", "peft", "bitsandbytes")
print(json.dumps(speed.found | {"versions": {name: version(name) for name in names}}), flush=True)
