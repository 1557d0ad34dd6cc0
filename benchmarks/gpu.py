"""Measure training, testing and merging on one GPU with random Llamas of real shapes.

Speed and memory of random weights are those of real ones; only the text is noise. Each result is printed and saved as
it comes, a failure too; no stage is begun after --minutes:

    rates      16-bit matrix products and copies: what the other numbers cannot exceed
    training   the training step of train_llama.py in one process, one thing changed at a time; `trl sft` beside it
    profile    where the time of a step goes, by kernel
    chain      the scripts on the tiny model: trained, killed and gone on, tested (rows alone too), merged, checked
    float16    the tiny model trained as on a GPU without bfloat16: a scaler, sdpa
    commands   the scripts on the shape: train, test (4 bit and merged), merge
    exactness  loss and gradients of packed rows beside the same rows alone, in each type of number
    peers      Unsloth and LLaMA-Factory on the same rows, each from its folder of packages in --packages

Where there is no GPU, `--shape tiny` runs every stage on the CPU, in float32, to see that it works. 8B and 7B need
40 GB in the folder (memory will do: /dev/shm).

    python benchmarks/gpu.py --shape llama3-8B --folder /dev/shm/gpu
    python benchmarks/gpu.py --shape tiny --folder /tmp/gpu --stages training
"""

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
from pathlib import Path

from peers import FOLDER, MODEL, RESULTS, ROOT, machine, table, timed, write_alpaca
from scaling import random_model

STAGES = ("rates", "training", "profile", "chain", "float16", "commands", "exactness", "peers")
ORIGINAL = {}  # what transformers' module of the Llama held at first
STEPS = 6  # optimizer steps of a training, the first two of which are not counted
BUILD = ("--max-context-words", 300, "--test-examples-per-task", 24, "--validation-examples-per-task", 8)
TINY = ["--model", MODEL, "--learning-rate", 4e-3, "--max-length", 1024, "--gradient-accumulation-steps", 1]
TINY += ["--max-steps", 40, "--eval-steps", 20, "--save-steps", 10]
KILLED_AT = 20  # the step of the checkpoint after which the chain's second training is killed
SHAPES = {
    "tiny": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 2048},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
    "llama3-8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                  "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
    "llama2-7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
                  "num_key_value_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False},
}  # fmt: skip
# What is changed: flags of train_llama.py, attributes of its SFTConfig, and whether LoRA is fused (FusedLoRA).
SMALL = {"per_device_train_batch_size": 1, "use_liger_kernel": "off"}  # four passes of 2,048 tokens a step
LARGE = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "use_liger_kernel": "off"}
LIGER = {"use_liger_kernel": "on"}
ON = {"activation_checkpointing": "on"}
VARIANTS = {
    "2048 x 4": SMALL,
    "8192 x 1": LARGE,
    "8192 x 1, checkpointing": LARGE | ON,
    "2048 x 4, checkpointing": SMALL | ON,
    "2048 x 4, PEFT's own LoRA": SMALL | {"fused": False},
    "2048 x 4, sdpa": SMALL | {"attn_implementation": "sdpa"},
    "2048 x 4, paged 8-bit AdamW": SMALL | {"optim": "paged_adamw_8bit"},
    "as shipped, Liger installed": {},
    "2048 x 4, Liger": SMALL | LIGER,
    "8192 x 1, Liger, checkpointing": LARGE | LIGER | ON,
}
# The same model, adapter and rows under TRL's own trainer: as it comes, and at the best of its documented flags, where
# without flash attention packed rows see one another.
PACKED = {"packing": True, "activation_checkpointing": False, "per_device_train_batch_size": 4}
TRL = {
    "trl sft as shipped": {},
    "trl sft packed, 8192 x 1, no checkpointing": PACKED,
    "trl sft packed, 8192 x 1, no checkpointing, Liger": PACKED | {"use_liger_kernel": True},
}
PEERS = {  # ways of benchmarks/peers/gpu_peer.py
    "unsloth": ("checkpointing", "no checkpointing"),
    "llamafactory": ("as shipped", "neat_packing", "neat_packing, Liger", "neat_packing, Liger, no checkpointing"),
}


class Bench:
    """What the stages share; `note` keeps a result."""

    def __init__(self, args):
        import torch

        self.cuda = torch.cuda.is_available()
        self.shape, self.folder, self.results_file = args.shape, args.folder.resolve(), args.results
        self.only, self.packages = args.only, args.packages
        self.ends = time.time() + 60 * args.minutes
        gpu = torch.cuda.get_device_name() if self.cuda else None
        self.result = {"machine": machine() | {"gpu": gpu}, "shape": args.shape}

    def note(self, stage, **found):
        self.result.setdefault(stage, {}).update(found)
        print(json.dumps({stage: found}), flush=True)
        self.results_file.write_text(json.dumps(self.result, indent=1) + "\n")

    def run(self, name, command):
        """Seconds of a command that sees the GPU; its output goes to a file; raises where it fails."""
        command, log, started = list(map(str, command)), self.folder / f"{name}.txt", time.time()
        with log.open("w") as file:
            status = subprocess.run(command, stdout=file, stderr=file, cwd=ROOT).returncode
        if status:
            raise RuntimeError(f"exit code {status} of {' '.join(command)}: {log.read_text()[-1500:]}")
        return time.time() - started, log.read_text()

    def model(self):
        """The folder of the random model of the shape."""
        folder = self.folder / "model"
        if not (folder / "config.json").exists():
            import torch

            random_model(SHAPES[self.shape], folder)
            if self.cuda:
                torch.cuda.empty_cache()
        return folder

    def build(self, name):
        """OUTPUT_DIR with the fixtures' data set."""
        output = self.folder / name
        if not output.exists():
            sources = ["--samsum", ROOT / "tests/fixtures/samsum", "--trivia-qa", ROOT / "tests/fixtures/trivia_qa"]
            command = [sys.executable, "build_dataset.py", *sources, *BUILD, "--output-dir", output]
            timed(command, self.folder / "build.txt")
        return output


def synchronize(bench):
    import torch

    if bench.cuda:
        torch.cuda.synchronize()


def rates(bench):
    import torch

    size, dtype = (8192, torch.bfloat16) if bench.cuda else (512, torch.float32)
    device = "cuda" if bench.cuda else "cpu"

    def seconds(work, repeats=20):
        for _ in range(5):
            work()
        synchronize(bench)
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        synchronize(bench)
        return (time.perf_counter() - start) / repeats

    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    target = torch.empty_like(a)
    bench.note(
        "rates",
        tflops=2 * size**3 / seconds(lambda: torch.mm(a, b, out=target)) / 1e12,
        copy_gb_per_second=2 * a.nbytes / seconds(lambda: target.copy_(b)) / 1e9,
    )


def trainer_of(bench, model, **changes):
    """A trainer as train_llama.py makes it for the shape's rows, with `changes` (see VARIANTS), and its sequences."""
    import train_llama
    from pipeline import lora, models
    from pipeline.files import load_rows
    from pipeline.tokens import load_tokenizer
    from pipeline.training import trainer
    from pipeline.training.estimate import model_shape, settle

    flags = {name: changes.pop(name) for name in list(changes) if hasattr(train_llama, name.upper())}
    fused = changes.pop("fused", True)
    output = bench.build("training")
    args = train_llama.parse_args(["--model", str(bench.model()), "--output-dir", str(output)])
    vars(args).update(flags | {"max_steps": STEPS, "logging_steps": 1, "eval_steps": 10**6, "save_steps": 10**6})
    base = models.find_model(args.model)
    tokenizer = load_tokenizer(base)
    rows = {split: load_rows(output, split) for split in ("train", "validation")}
    with contextlib.redirect_stdout(io.StringIO()):
        tokens = train_llama.tokenize(rows["train"], tokenizer, args.max_length, "train")
        packed = train_llama.pack(tokens, args)
        validation = train_llama.validation_sets(rows["validation"], tokenizer, args)
    shape = model_shape(base, models.load_config(base), trainer.lora_config(args))
    config, fuse = trainer.sft_config, lora.fuse_lora

    def changed(*options):
        made = config(*options)
        for name, value in changes.items():
            setattr(made, name, value)
        return made

    trainer.sft_config = changed
    lora.fuse_lora = fuse if fused else lambda model: None
    try:
        train_llama.choose_learning_rate(args, shape)
        settle(shape, packed, args)
        made = trainer.QLoRATrainer(args, model, tokenizer, packed, validation, {})
    finally:
        trainer.sft_config, lora.fuse_lora = config, fuse
    return made, args, shape, packed


def without_liger():
    """Give transformers its own Llama back: Liger puts its kernels in place of the classes, for whoever comes next."""
    import transformers.models.llama.modeling_llama as modeling

    vars(modeling).update(ORIGINAL or vars(modeling))
    ORIGINAL.update(ORIGINAL or vars(modeling))


@contextlib.contextmanager
def restored(trainer):
    """Take adapter, checkpointing and Liger's kernels off the base model again."""
    try:
        yield
    finally:
        without_liger()
        base = trainer.model.unload()
        base.gradient_checkpointing_disable()
        for module in base.modules():
            if "Liger" in repr(vars(module).get("forward")):
                del module.forward


def measured(bench, trainer):
    """Tokens/s and peak memory of trainer.train()."""
    import torch

    if bench.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    found = {}
    if bench.cuda:
        found["peak_allocated_gb"] = torch.cuda.max_memory_allocated() / 1e9
        found["peak_reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
    entries = [entry for entry in trainer.state.log_history if "tokens_per_second" in entry]
    found["tokens_per_second"] = statistics.median(entry["tokens_per_second"] for entry in entries[2:])
    return found | {"losses": [round(entry["loss"], 4) for entry in entries]}


def training(bench):
    import gc

    from pipeline import models

    model = models.load_model(str(bench.model()), load_in_4bit=True)
    plain = [name for name in TRL if "Liger" not in name] + [name for name in VARIANTS if "Liger" not in name]
    for name in plain + [name for name in TRL | VARIANTS if "Liger" in name and bench.cuda]:
        if time.time() > bench.ends or (bench.only and not any(some in name for some in bench.only)):
            continue
        try:
            found = trl_run(bench, model, TRL[name]) if name in TRL else own_run(bench, model, VARIANTS[name])
        except Exception as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"[:500]}
        bench.note("training", **{name: found})
        gc.collect()


def own_run(bench, model, changes):
    """A training of train_llama.py, its peak beside the estimate, and the FLOP/s it comes to."""
    from pipeline.training.estimate import memory, operations, pass_size

    trainer, args, shape, packed = trainer_of(bench, model, **changes)
    with restored(trainer):
        found = measured(bench, trainer)
    on = args.activation_checkpointing == "on"
    size = pass_size(packed, args.per_device_train_batch_size)
    found["estimate_gb"] = sum(memory(shape, args, *size, on, 2 if bench.cuda else 4).values()) / 1e9
    rows = [length for lengths in packed["seq_lengths"] for length in lengths]
    labels = sum(label != -100 for row in packed["labels"] for label in row)
    found["tflops"] = operations(shape, rows, labels, on) / sum(rows) * found["tokens_per_second"] / 1e12
    return found | {"settings": {name: getattr(args, name) for name in SMALL | ON}}


def trl_run(bench, model, changes):
    trainer = trl_trainer(bench, model, changes)
    with restored(trainer):
        return measured(bench, trainer)


def trl_trainer(bench, model, changes):
    """TRL's SFTTrainer on the same rows, as prompt and completion, with the same adapter; logs tokens/s of a step."""
    import torch
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    import train_llama
    from pipeline.files import load_rows
    from pipeline.tokens import load_tokenizer
    from pipeline.training.trainer import lora_config

    class Speed(TrainerCallback):
        """Useful tokens (no padding) of a step over its time."""

        def on_step_begin(self, args, state, control, **kwargs):
            synchronize(bench)
            self.began, self.before = time.time(), self.trainer.useful

        def on_step_end(self, args, state, control, **kwargs):
            synchronize(bench)
            speed = (self.trainer.useful - self.before) / (time.time() - self.began)
            state.log_history.append({"step": state.global_step, "loss": 0.0, "tokens_per_second": speed})

    class Counting(SFTTrainer):
        def training_step(self, model, inputs, *more):
            mask = inputs.get("attention_mask")
            self.useful += int(mask.sum()) if mask is not None else inputs["input_ids"].numel()
            return super().training_step(model, inputs, *more)

    model.set_attn_implementation("sdpa")
    rows = load_rows(bench.build("training"), "train").select_columns(["prompt", "completion"])
    options = {"per_device_train_batch_size": 8, "max_length": 2048} | changes
    options |= {"max_steps": STEPS, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    options |= {"learning_rate": 2e-4, "use_cpu": not bench.cuda, "bf16": bench.cuda}
    config = SFTConfig(output_dir=str(bench.folder / "trl"), **options)
    torch.manual_seed(0)
    args = train_llama.parse_args([])
    speed = Speed()
    trainer = Counting(model, args=config, train_dataset=rows, peft_config=lora_config(args),
                       processing_class=load_tokenizer(str(bench.model())), callbacks=[speed])  # fmt: skip
    speed.trainer, trainer.useful = trainer, 0
    return trainer


def profile(bench):
    """One pass, forward and backward, of two sizes: kernels by their time, and the GPU's share of the wall time."""
    import torch
    from torch.profiler import ProfilerActivity

    from pipeline import models

    model = models.load_model(str(bench.model()), load_in_4bit=True)
    for name in ("2048 x 4", "8192 x 1", *(["as shipped, Liger installed"] if bench.cuda else [])):
        trainer, *_ = trainer_of(bench, model, **VARIANTS[name])
        with restored(trainer):
            inputs = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[0]]))

            def step(trainer=trainer, inputs=inputs):
                with trainer.compute_loss_context_manager():
                    trainer.accelerator.backward(trainer.compute_loss(trainer.model, dict(inputs)))
                synchronize(bench)

            for _ in range(2):
                step()
            start = time.perf_counter()
            step()
            wall = time.perf_counter() - start
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * bench.cuda
            with torch.profiler.profile(activities=activities) as profiler:
                step()
            events = profiler.key_averages()
            kernels = [e for e in events if str(e.device_type).endswith("CUDA")] if bench.cuda else list(events)
            time_of = (lambda e: e.self_device_time_total) if bench.cuda else (lambda e: e.self_cpu_time_total)
            total = sum(map(time_of, kernels)) / 1e6
            top = sorted(kernels, key=time_of, reverse=True)[:25]
            found = {"tokens": inputs["input_ids"].numel(), "wall_ms": wall * 1e3, "busy_ms": total * 1e3}
            found["launches"] = sum(e.count for e in kernels)
            found["kernels"] = [[e.key[:110], e.count, round(time_of(e) / 1e3, 3)] for e in top]
            bench.note("profile", **{name: found})


def exactness(bench):
    """Packed rows beside the same alone under sdpa, on the tiny model with a random adapter, and beside float32."""
    import torch
    from peft import get_peft_model
    from transformers.integrations.liger import apply_liger_kernel

    import train_llama
    from pipeline import machine, models
    from pipeline.attention import choose_attention
    from pipeline.files import load_rows
    from pipeline.lora import fuse_lora
    from pipeline.tokens import encode, load_tokenizer
    from pipeline.training.trainer import lora_config, summed_loss

    args = train_llama.parse_args([])
    tokenizer = load_tokenizer(str(MODEL))
    rows = load_rows(bench.build("training"), "train").select(range(12)).to_dict()
    ids = encode(tokenizer, rows)
    pairs = list(zip(ids["prompt_ids"], ids["completion_ids"], strict=True))
    own, truth = machine.compute_dtype, None
    kinds = {"float32": torch.float32}
    if bench.cuda:
        kinds |= {"bfloat16": torch.bfloat16, "float16": torch.float16, "bfloat16, Liger": torch.bfloat16}
    for kind, dtype in kinds.items():
        machine.compute_dtype = lambda dtype=dtype: dtype
        torch.manual_seed(0)
        model = get_peft_model(models.load_model(str(MODEL), load_in_4bit=True), lora_config(args)).train()
        machine.compute_dtype = own
        trained = [p for p in model.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.data = torch.randn_like(parameter.float()) * 0.02
        fuse_lora(model)
        if "Liger" in kind:
            apply_liger_kernel(model, {"fused_linear_cross_entropy": False})

        def loss_and_gradients(some, attention, model=model, trained=trained):
            model.get_base_model().set_attn_implementation(attention)
            bounds = torch.tensor([0] + [len(p) + len(c) for p, c in some]).cumsum(0)
            inputs = {
                "input_ids": torch.tensor([[i for p, c in some for i in p + c]]),
                "labels": torch.tensor([[i for p, c in some for i in [-100] * len(p) + c]]),
                "position_ids": torch.cat([torch.arange(len(p) + len(c)) for p, c in some])[None],
            }
            if attention == "packed":
                more = {"cu_seq_lens_q": bounds.int(), "cu_seq_lens_k": bounds.int()}
                inputs |= more | {"max_length_q": int(bounds.diff().max()), "max_length_k": int(bounds.diff().max())}
            inputs = {key: v.to(model.device) if hasattr(v, "to") else v for key, v in inputs.items()}
            model.zero_grad()
            loss, _ = summed_loss(model, inputs)
            loss.backward()
            return loss.item(), torch.cat([p.grad.flatten().double() for p in trained])

        choose_attention("packed")
        packed, packed_gradient = loss_and_gradients(pairs, "packed")
        alone = [loss_and_gradients([pair], "sdpa") for pair in pairs]
        loss, gradient = sum(loss for loss, _ in alone), sum(gradient for _, gradient in alone)
        truth = truth or (loss, gradient)

        def apart(a, b):
            return ((a - b).norm() / b.norm()).item()

        bench.note("exactness", **{kind: {
            "packed_loss_beside_alone": abs(packed / loss - 1),
            "packed_gradient_beside_alone": apart(packed_gradient, gradient),
            "alone_loss_beside_float32": abs(loss / truth[0] - 1),
            "alone_gradient_beside_float32": apart(gradient, truth[1]),
            "packed_gradient_beside_float32": apart(packed_gradient, truth[1]),
        }})  # fmt: skip


def predictions(output, name=""):
    files = [output / f"{task}_predictions{name}.json" for task in ("samsum", "trivia_qa")]
    return [example for file in files for example in json.loads(file.read_text())["examples"]]


def same(output, one, other):
    """Share of equal predictions, and the relative difference of all rows' summed log-likelihood."""
    a, b = predictions(output, one), predictions(output, other)
    nll = sum(row["nll"] for row in a) / sum(row["nll"] for row in b) - 1
    equal = sum(x["prediction"] == y["prediction"] for x, y in zip(a, b, strict=True)) / len(a)
    return {"same_predictions": equal, "nll_difference": abs(nll)}


def chain(bench):
    """The scripts as they are on the tiny model; a training that is killed ends with which adapter?"""
    from safetensors.torch import load_file

    from pipeline.files import MANIFEST

    outputs = [bench.build("chain"), bench.build("killed")]
    whole, killed = ([sys.executable, "train_llama.py", *TINY, "--output-dir", output] for output in outputs)
    seconds, said = bench.run("train", whole)
    run = json.loads((outputs[0] / "adapter" / "run.json").read_text())
    bench.note("chain", train={"seconds": seconds} | {
        key: run[key] for key in ("attention", "eval_loss", "tokens_per_second", "peak_memory_gb")})  # fmt: skip
    process = subprocess.Popen(list(map(str, killed)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    while process.poll() is None and not (outputs[1] / "checkpoints" / f"checkpoint-{KILLED_AT}" / MANIFEST).exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, said = bench.run("train_again", killed)
    adapters = [load_file(output / "adapter" / "adapter_model.safetensors") for output in outputs]
    difference = max((adapters[0][key] - adapters[1][key]).abs().max().item() for key in adapters[0])
    largest = max(tensor.abs().max().item() for tensor in adapters[0].values())
    bench.note("chain", killed={"went_on": "resuming from" in said, "largest_difference": difference,
                                "largest_weight": largest})  # fmt: skip
    test = [sys.executable, "test_llama.py", "--output-dir", outputs[0]]
    seconds, said = bench.run("test", test)
    print(said[-900:], flush=True)
    bench.run("test_alone", [*test, "--max-batch-tokens", 1, "--name", "alone", "--no-compare-with-base"])
    bench.note("chain", test={"seconds": seconds}, alone=same(outputs[0], "", "_alone"))
    seconds, said = bench.run("merge", [sys.executable, "merge_llama.py", "--output-dir", outputs[0]])
    print(said[-1500:], flush=True)
    bench.run("test_merged", [*test, "--model", outputs[0] / "merged", "--name", "merged"])
    bench.note("chain", merge={"seconds": seconds} | same(outputs[0], "", "_merged"))


def float16(bench):
    half = "import torch; from pipeline import machine; machine.compute_dtype = lambda: torch.float16; "
    half += "import train_llama; train_llama.main()"
    older = [sys.executable, "-c", half, *TINY, "--attn-implementation", "sdpa"]
    _, said = bench.run("train_half", [*older, "--output-dir", bench.build("half")])
    run = json.loads((bench.build("half") / "adapter" / "run.json").read_text())
    bench.note("float16", **{"eval_loss": run["eval_loss"], "tokens_per_second": run["tokens_per_second"]})


def commands(bench):
    """Seconds, tokens/s and peak GB of the commands at the shape."""
    output, python = bench.build("commands"), sys.executable
    train = [python, "train_llama.py", "--model", bench.model(), "--max-steps", STEPS, "--logging-steps", 1]
    seconds, _ = bench.run("train_large", [*train, "--output-dir", output])
    run = json.loads((output / "adapter" / "run.json").read_text())
    bench.note("commands", train={"seconds": seconds, "peak_gb": run["peak_memory_gb"]})

    def test(name, *options):
        if time.time() > bench.ends:
            return
        command = [python, "test_llama.py", "--output-dir", output, "--name", name, *options]
        seconds, said = bench.run(f"test_{name}", command)
        speeds = re.findall(r"^(\w+): .* ([\d,]+) tokens in ([\d.]+) s", said, re.MULTILINE)
        found = {task: int(tokens.replace(",", "")) / max(float(took), 0.05) for task, tokens, took in speeds}
        peak = float(re.search(r"peak memory ([\d.]+) GB", said)[1])
        bench.note("commands", **{f"test {name}": {"seconds": seconds, "tokens_per_second": found, "peak_gb": peak}})

    test("tuned", "--no-compare-with-base")
    if time.time() < bench.ends:
        seconds, said = bench.run("merge_large", [python, "merge_llama.py", "--output-dir", output, "--check-rows", 8])
        bench.note("commands", merge={"seconds": seconds, "said": said[-1500:]})
        test("merged", "--model", output / "merged")


def peers(bench):
    """Unsloth and LLaMA-Factory, in processes and packages of their own: they ask for older libraries than ours."""
    import train_llama
    from pipeline.files import load_rows
    from pipeline.tokens import load_tokenizer

    if not (bench.cuda and bench.packages):
        return bench.note("peers", not_run="it needs a GPU and --packages")
    args = train_llama.parse_args([])
    rows, tokenizer = load_rows(bench.build("training"), "train"), load_tokenizer(str(bench.model()))
    with contextlib.redirect_stdout(io.StringIO()):
        tokens = train_llama.tokenize(rows, tokenizer, args.max_length, "train")
    data = bench.folder / "peers"
    (data / "alpaca").mkdir(parents=True, exist_ok=True)
    (data / "tokens.json").write_text(json.dumps(tokens.select_columns(["input_ids", "labels"]).to_list()))
    write_alpaca(rows, tokenizer, data / "alpaca")
    script = ROOT / "benchmarks" / "peers" / "gpu_peer.py"
    for peer, ways in PEERS.items():
        where = bench.packages / peer
        for way in ways if where.is_dir() else ():
            if time.time() > bench.ends:
                return
            more = {
                "PYTHONPATH": where,
                "UNSLOTH_DISABLE_STATISTICS": 1,
                "UNSLOTH_COMPILE_LOCATION": data / "compiled",
            }
            command = [sys.executable, script, peer, way, bench.model(), data, STEPS, args.max_length]
            log = bench.folder / f"peer_{peer}.txt"
            with log.open("w") as file:
                done = subprocess.run(list(map(str, command)), env=os.environ | {k: str(v) for k, v in more.items()},
                                      cwd=bench.folder, text=True, stdout=subprocess.PIPE, stderr=file)  # fmt: skip
            last = [line for line in done.stdout.splitlines() if line.startswith('{"tokens_per_second"')]
            found = {"error": log.read_text()[-1500:]} if done.returncode else json.loads(last[-1])
            bench.note("peers", **{f"{peer}, {way}": found})


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama3-8B")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--only", nargs="*", help="of training: parts of the names of what to run")
    parser.add_argument(
        "--packages", type=Path, help="a folder with unsloth/ and llamafactory/, installed by --target"
    )
    parser.add_argument("--folder", type=Path, default=FOLDER / "gpu", help="for models, data and logs")
    parser.add_argument("--results", type=Path, default=RESULTS / "gpu.json")
    parser.add_argument("--minutes", type=float, default=30, help="after which no further stage begins")
    args = parser.parse_args(argv)
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    args.folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    if not bench.cuda and args.shape != "tiny":
        sys.exit("error: there is no GPU: give --shape tiny to see that every part works on the CPU")
    from pipeline import models

    models.quiet()
    for stage in args.stages:
        if time.time() > bench.ends:
            bench.note(stage, error="no time left")
            continue
        started = time.time()
        without_liger()
        try:
            globals()[stage](bench)
        except Exception as error:
            traceback.print_exc()
            bench.note(stage, error=f"{type(error).__name__}: {error}"[:2000])
        bench.note("stage_seconds", **{stage: round(time.time() - started, 1)})
    trained = bench.result.get("training", {}).items()
    found = {name: run for name, run in trained if isinstance(run, dict) and "tokens_per_second" in run}
    table(["", "tokens/s", "peak GB", "estimate, GB"],
          [[name, f"{run['tokens_per_second']:,.0f}", f"{run.get('peak_allocated_gb', 0):.2f}",
            f"{run.get('estimate_gb', 0):.2f}"] for name, run in found.items()])  # fmt: skip
    shutil.rmtree(args.folder / "model", ignore_errors=True)


if __name__ == "__main__":
    main()
