"""Unsloth's and LLaMA-Factory's part of gpu.py: tokens/s and peak memory of their trainers on train_llama.py's rows.

python benchmarks/peers/gpu_peer.py PEER WAY MODEL DATA STEPS LENGTH

DATA holds the rows twice: tokens.json (input_ids and labels) and alpaca/ as LLaMA-Factory reads them. WAY is one of
WAYS of the peer. Steps are of 8 rows, or packed of 4 times LENGTH tokens. The last line printed is JSON.
"""

import json
import os
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

WAYS = {
    "unsloth": {"checkpointing": "unsloth", "no checkpointing": False},
    "llamafactory": {
        "as shipped": {},
        "neat_packing": {"packing": True, "neat_packing": True, "per_device_train_batch_size": 4},
        "neat_packing, Liger": {"packing": True, "neat_packing": True, "per_device_train_batch_size": 4,
                                "enable_liger_kernel": True},
        "neat_packing, Liger, no checkpointing": {
            "packing": True, "neat_packing": True, "per_device_train_batch_size": 4, "enable_liger_kernel": True,
            "disable_gradient_checkpointing": True},
    },
}  # fmt: skip
peer, way, base, data, steps, length = sys.argv[1:]
steps, length, data = int(steps), int(length), Path(data)
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
if peer == "unsloth":
    from unsloth import FastLanguageModel  # it changes the libraries that come after it

import torch  # noqa: E402
from transformers import Trainer, TrainerCallback  # noqa: E402

useful, speeds, losses, on_gpu = [0], [], [], torch.cuda.is_available()


def counted(step):
    """A trainer's training_step that adds the batch's tokens without the padding at the end of rows to `useful`."""

    def training_step(self, model, inputs, *more):
        ids, pad = inputs["input_ids"], self.processing_class.pad_token_id
        tail = (ids.flip(-1) != pad).int().cumsum(-1) == 0  # at most an end of a text too many
        useful[0] += ids.numel() - int(tail.sum())
        return step(self, model, inputs, *more)

    return training_step


class Speed(TrainerCallback):
    """Useful tokens of each step over its time."""

    def on_train_begin(self, *args, **kwargs):
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def on_step_begin(self, *args, **kwargs):
        if on_gpu:
            torch.cuda.synchronize()
        self.began, self.before = time.time(), useful[0]

    def on_step_end(self, *args, **kwargs):
        if on_gpu:
            torch.cuda.synchronize()
        speeds.append((useful[0] - self.before) / (time.time() - self.began))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            losses.append(round(float(logs["loss"]), 4))


def unsloth(checkpointing):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = FastLanguageModel.from_pretrained(
        base, max_seq_length=length, load_in_4bit=True, dtype=torch.bfloat16
    )
    model = FastLanguageModel.get_peft_model(
        model, r=8, lora_alpha=16, target_modules=LINEAR, use_gradient_checkpointing=checkpointing
    )
    config = SFTConfig(output_dir=str(data / "out"), max_steps=steps, per_device_train_batch_size=4, max_length=length,
                       gradient_accumulation_steps=1, packing=True, learning_rate=2e-4, optim="adamw_8bit", bf16=True,
                       logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
                       gradient_checkpointing=bool(checkpointing))  # fmt: skip
    rows = Dataset.from_list(json.loads((data / "tokens.json").read_text()))
    SFTTrainer.training_step = counted(SFTTrainer.training_step)
    trainer = SFTTrainer(model=model, processing_class=tokenizer, train_dataset=rows, args=config, callbacks=[Speed()])
    trainer.train()


def llamafactory(more):
    from llamafactory.train.tuner import run_exp

    Trainer.training_step = counted(Trainer.training_step)
    settings = {
        "stage": "sft", "do_train": True, "finetuning_type": "lora", "model_name_or_path": base, "template": "empty",
        "quantization_bit": 4, "double_quantization": True, "lora_rank": 8, "lora_alpha": 16, "lora_dropout": 0.0,
        "lora_target": "all", "dataset_dir": str(data / "alpaca"), "dataset": "train", "cutoff_len": length,
        "output_dir": str(data / "out"), "overwrite_output_dir": True, "max_steps": steps, "learning_rate": 2e-4,
        "report_to": "none", "overwrite_cache": True, "logging_steps": 1, "save_strategy": "no", "bf16": on_gpu,
        "use_cpu": not on_gpu,
    }  # fmt: skip
    run_exp(settings | more, callbacks=[Speed()])


os.environ["DISABLE_VERSION_CHECK"] = "1"
globals()[peer](WAYS[peer][way])
found = {"tokens_per_second": statistics.median(speeds[2:]), "losses": losses}
found["versions"] = {name: version(name) for name in (peer, "torch", "transformers", "trl", "peft", "bitsandbytes")}
if on_gpu:
    found["peak_allocated_gb"] = torch.cuda.max_memory_allocated() / 1e9
print(json.dumps(found), flush=True)
