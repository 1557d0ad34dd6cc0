"""The floor of peers.py: QLoRA as one writes it by hand, padded batches of 8 rows in random order, no checkpointing.

python benchmarks/peers/plain_loop.py MODEL TOKENS.json OUTPUT LEARNING_RATE WARMUP_STEPS
"""

import json
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    get_cosine_schedule_with_warmup,
)

base, tokens, output, rate, warmup = sys.argv[1:]
torch.manual_seed(0)
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=nf4, device_map="cpu")
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
tokenizer = AutoTokenizer.from_pretrained(base)
tokenizer.pad_token = tokenizer.eos_token
rows, collate = json.loads(Path(tokens).read_text()), DataCollatorForSeq2Seq(tokenizer)
loader = torch.utils.data.DataLoader(rows, batch_size=8, shuffle=True, collate_fn=collate)
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=float(rate), weight_decay=0.0)
schedule = get_cosine_schedule_with_warmup(optimizer, int(warmup), len(loader))
start = time.time()
for batch in loader:
    model(**batch, use_cache=False).loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
run = {"seconds": time.time() - start, "steps": len(loader)}
model.save_pretrained(output)
Path(output, "run.json").write_text(json.dumps(run))
