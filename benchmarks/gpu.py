"""Measure training, testing and merging on one GPU with random Llamas of real shapes.

Speed and memory of random weights are those of real ones; only the text is noise. Each result is printed and saved as
it comes, a failure too; no stage is begun after --minutes. What the results file has of the same commit, shape and GPU
is added to:

    rates      16-bit matrix products and copies: what the other numbers cannot exceed
    layers     a pass through 8 layers, for each of ACTIVATION_CHECKPOINTING and not fused; the pieces it is made of
    exactness  loss and gradients of packed rows beside transformers' of the rows alone, in each type of number
    longest    one step on the longest row that fits 24 GB by the estimate, with no more than that
    training   the training step of train_llama.py in one process, one thing changed at a time; `trl sft` beside it
    peers      Unsloth and LLaMA-Factory on the same rows, each from its folder of packages in --packages
    profile    where the time of a pass goes, by kernel
    chain      the scripts on the tiny model: trained, killed and gone on, tested (rows alone too), merged, checked
    float16    the tiny model trained as on a GPU without bfloat16: a scaler, sdpa
    commands   the scripts on the shape: train, test (4 bit and merged), merge

Where there is no GPU, `--shape tiny` runs every stage on the CPU, in float32, to see that it works. 8B and 7B need
40 GB in the folder (memory will do: /dev/shm), which keeps the random models for the next call.

    python benchmarks/gpu.py --shape llama3-8B --folder /dev/shm/gpu
    python benchmarks/gpu.py --shape tiny --folder /tmp/gpu --stages training
"""

import argparse
import contextlib
import functools
import gc
import importlib.util
import io
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import traceback
from importlib.metadata import version
from pathlib import Path

from peers import FOLDER, MODEL, RESULTS, ROOT, machine, table, timed, write_alpaca
from scaling import random_model
from speed import Speed, counted, mean_loss, now

STAGES = ("rates", "layers", "exactness", "longest", "training", "peers", "profile", "chain", "float16", "commands")
ORIGINAL = {}  # what transformers' module of the Llama held at first
STEPS = 8  # optimizer steps of a training, of which speed.WARM_UP are not counted
LAYERS = 8  # of the stage of that name
SCORED = 16  # training rows whose loss every trainer's model is asked for after its steps
CARD = 24e9  # bytes of a smaller GPU
TINY_CARD = 1.73e9  # in which the tiny shape trains a row of some hundred tokens on a CPU, libraries included
LABELLED = 0.08  # of the longest row's tokens
PEER_SECONDS = 150  # after which a peer is given up
FAILURES = (Exception, SystemExit)  # the scripts' own sentences end in the latter
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
# What is changed: settings of train_llama.py, all of a step's 8,192 tokens in one pass. Where it is `shipped` nothing
# is, and 4-bit weights are unpacked if there is room: after that they stay so. `room`: bytes of the GPU.
LARGE = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
VARIANTS = {
    "8192 x 1, off": LARGE | {"activation_checkpointing": "off"},
    "8192 x 1, mlp": LARGE | {"activation_checkpointing": "mlp"},
    "8192 x 1, on": LARGE | {"activation_checkpointing": "on"},
    "8192 x 1, host": LARGE | {"activation_checkpointing": "host"},
    "8192 x 1, off, without Liger": LARGE | {"activation_checkpointing": "off", "use_liger_kernel": "off"},
    "as shipped on a card of 24 GB": {"shipped": True, "room": CARD},
    "as shipped": {"shipped": True},
}
SETTLED = ("activation_checkpointing", "per_device_train_batch_size", "use_liger_kernel")
# The same model, adapter and rows under TRL's own trainer: as it comes, and at the best of its documented flags, where
# without flash attention packed rows see one another.
TRL = {
    "trl sft as shipped": {},
    "trl sft packed, 8192 x 1, no checkpointing": {
        "packing": True, "activation_checkpointing": False, "per_device_train_batch_size": 4},
}  # fmt: skip
PEERS = {  # ways of benchmarks/peers/gpu_peer.py
    "unsloth": ("no checkpointing", "checkpointing"),
    "llamafactory": ("neat_packing, Liger, no checkpointing", "neat_packing, Liger"),
}


class Bench:
    """What the stages share; `note` keeps a result."""

    def __init__(self, args):
        import torch

        self.cuda = torch.cuda.is_available()
        self.liger = self.cuda and importlib.util.find_spec("liger_kernel") is not None
        self.shape, self.folder, self.results_file = args.shape, args.folder.resolve(), args.results
        self.only, self.packages = args.only, args.packages
        self.ends = time.time() + 60 * args.minutes
        here = machine() | {"gpu": torch.cuda.get_device_name() if self.cuda else None}
        older = json.loads(self.results_file.read_text()) if self.results_file.is_file() else {"machine": {}}
        same = [older["machine"].get(name) for name in ("commit", "gpu")] == [here["commit"], here["gpu"]]
        self.result = older if same and older["shape"] == args.shape else {}
        self.result |= {"machine": here, "shape": args.shape}

    def note(self, stage, **found):
        self.result.setdefault(stage, {}).update(found)
        print(json.dumps({stage: found}), flush=True)
        fresh = self.results_file.with_suffix(".new")
        fresh.write_text(json.dumps(self.result, indent=1) + "\n")
        fresh.replace(self.results_file)  # a part that is stopped leaves the one before whole

    def late(self):
        return time.time() > self.ends

    def run(self, name, command):
        """Seconds of a command that sees the GPU; its output goes to a file; raises where it fails."""
        command, log, started = list(map(str, command)), self.folder / f"{name}.txt", time.time()
        limit = max(60, self.ends + 120 - started)
        with log.open("w") as file:
            status = subprocess.run(command, stdout=file, stderr=file, cwd=ROOT, timeout=limit).returncode
        if status:
            raise RuntimeError(f"exit code {status} of {' '.join(command)}: {log.read_text()[-1500:]}")
        return time.time() - started, log.read_text()

    def model(self, **sizes):
        """The folder of the random model of the shape, or of another number of layers; made where it is not there."""
        folder = self.folder / "_".join(["model", self.shape, *map(str, sizes.values())])
        if not folder.exists():
            import torch

            random_model(SHAPES[self.shape] | sizes, unfinished := self.folder / "unfinished")
            unfinished.rename(folder)
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


def seconds_of(work, repeats):
    """The median of some calls, after two that are not counted; of one on a CPU, where nothing is to be learnt."""
    import torch

    times, cuda = [], torch.cuda.is_available()
    for _ in range(2 + repeats if cuda else 1):
        start = now()
        work()
        times.append(now() - start)
    return statistics.median(times[2 * cuda :])


def rates(bench):
    import torch

    size, dtype = (8192, torch.bfloat16) if bench.cuda else (512, torch.float32)
    device = "cuda" if bench.cuda else "cpu"

    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    target = torch.empty_like(a)
    bench.note(
        "rates",
        tflops=2 * size**3 / seconds_of(lambda: torch.mm(a, b, out=target), 20) / 1e12,
        copy_gb_per_second=2 * a.nbytes / seconds_of(lambda: target.copy_(b), 20) / 1e9,
    )


@functools.cache
def data_of(bench):
    """The models' tokenizer, the training rows as text, as tokens and packed."""
    import train_llama
    from pipeline.files import load_rows
    from pipeline.tokens import load_tokenizer

    args, tokenizer = train_llama.parse_args([]), load_tokenizer(str(MODEL))
    rows = load_rows(bench.build("training"), "train")
    with contextlib.redirect_stdout(io.StringIO()):
        tokens = train_llama.tokenize(rows, tokenizer, args.max_length, "train")
    tokens = tokens.select_columns(["input_ids", "labels"])
    return tokenizer, rows, tokens, train_llama.pack(tokens, args)


def trainer_of(bench, model, packed=None, fused=None, shipped=False, **changes):
    """A trainer as train_llama.py makes it, its settings but for `changes`, the model's sizes, whether it is unpacked.

    fused: whether layers are those of layer.py, by default where train_llama.py has them so. shipped: see VARIANTS.
    """
    import train_llama
    from pipeline import models
    from pipeline.training import estimate, trainer

    tokenizer, *_, own = data_of(bench)
    packed, args = packed or own, train_llama.parse_args(["--output-dir", str(bench.folder / "trainer")])
    fixed = {"learning_rate": 2e-4, "warmup_steps": 0, "max_steps": STEPS, "logging_steps": 1}
    vars(args).update(fixed | changes)
    name = model.name_or_path
    shape = estimate.model_shape(name, models.load_config(name), trainer.lora_config(args))
    estimate.settle(shape, packed, args)
    unpacked = shipped and estimate.fits_unpacked(shape, packed, args)
    if unpacked and hasattr(model.model.layers[0].mlp.up_proj.weight, "quant_state"):
        model = model.dequantize()
    if fused is None:
        fused = estimate.fuses(shape, args.activation_checkpointing, estimate.room_and_width(args)[1])
    made = trainer.QLoRATrainer(args, model, tokenizer, packed, {}, fused)
    made.args.eval_strategy = made.args.save_strategy = "no"  # at the end there would be one of each
    return made, args, shape | {"fusable": shape["fusable"] and fused is not False}, unpacked


def without_liger():
    """Give transformers its own Llama back: Liger puts its kernels in place of the classes, for whoever comes next."""
    import transformers.models.llama.modeling_llama as modeling

    vars(modeling).update(ORIGINAL or vars(modeling))
    ORIGINAL.update(ORIGINAL or vars(modeling))


def free_memory():
    """Of the trainer before, which refers to itself; on a CPU it can wait."""
    import torch

    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


@contextlib.contextmanager
def borrowed(model):
    """A base model for one trainer: what that puts on it is taken off again, wherever it failed."""
    from peft.tuners.lora import LoraLayer

    free_memory()
    own = {module: {"forward": module.forward} for module in model.modules() if "forward" in vars(module)}
    try:
        yield
    finally:
        without_liger()
        for name, module in list(model.named_modules()):
            if isinstance(module, LoraLayer):
                model.set_submodule(name, module.get_base_layer())
        for module in model.modules():
            vars(module).pop("forward", None)  # of layer.prepare and of Liger
            vars(module).update(own.get(module, {}))
        vars(model).pop("_loss_function", None)
        vars(model).pop("peft_config", None)
        model.get_input_embeddings()._forward_hooks.clear()  # of enable_input_require_grads, which TRL calls twice
        model.gradient_checkpointing_disable()


@contextlib.contextmanager
def card(bench, room):
    """A GPU of `room` bytes, for the allocator and for what is decided by its size; None: the one that is there."""
    import torch

    from pipeline.training import estimate

    own, width = estimate.room_and_width, 2 if bench.cuda else 4
    if room:
        estimate.room_and_width = lambda args: (room, width)
    if room and bench.cuda:
        free_memory()
        torch.cuda.set_per_process_memory_fraction(min(1.0, room / torch.cuda.get_device_properties(0).total_memory))
    try:
        yield
    finally:
        estimate.room_and_width = own
        if room and bench.cuda:
            torch.cuda.set_per_process_memory_fraction(1.0)


def estimated(trainer, args, shape, unpacked=False, size=None):
    """Bytes by part that --dry-run gives for a pass of so many tokens and labels, by default a trainer's largest."""
    from pipeline.training import estimate

    width = estimate.room_and_width(args)[1]
    size = size or estimate.pass_size(trainer.train_dataset, args.per_device_train_batch_size)
    return estimate.memory(shape, args, *size, args.activation_checkpointing, width, unpacked)


def pass_of(trainer):
    """A pass over the first packed rows, forward and backward, as a function; its numbers of tokens and labels."""
    rows = trainer.train_dataset
    rows = rows.select(range(min(trainer.args.per_device_train_batch_size, len(rows))))
    inputs = trainer._prepare_inputs(trainer.data_collator(rows.to_list()))
    trainer.model.train()

    def step():
        trainer.model.zero_grad()
        with trainer.accelerator.autocast():
            loss = trainer.compute_loss(trainer.model, dict(inputs))
        trainer.accelerator.backward(loss)

    return step, (inputs["input_ids"].numel(), int((inputs["labels"] != -100).sum()))


def layers(bench):
    """Each way of layer.py, and layers that are not fused: 8,192 and 2,048 tokens, with Liger and without."""
    from pipeline import models
    from pipeline.training.estimate import WAYS

    count = min(LAYERS, SHAPES[bench.shape]["num_hidden_layers"])
    model = models.load_model(str(bench.model(num_hidden_layers=count)), load_in_4bit=True)
    pieces(bench, model)
    ways = [(False, "off"), (False, "on"), *((True, way) for way in WAYS)]
    for liger in ["on", "off"] if bench.liger else ["off"]:
        for rows in (4, 1) if bench.cuda else (1,):
            truth = None
            for fused, way in ways:
                if bench.late():
                    return
                name = f"{2048 * rows}{', Liger' * (liger == 'on')}{', not fused' * (not fused)}, {way}"
                settings = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 1}
                settings |= {"activation_checkpointing": way, "use_liger_kernel": liger}
                try:
                    with borrowed(model):
                        found, gradient = one_pass(bench, model, fused, settings)
                    truth = gradient if truth is None else truth
                    found["gradient_beside_not_fused"] = apart(gradient, truth)
                except FAILURES as error:
                    found = failed(error)
                bench.note("layers", **{name: found})


def one_pass(bench, model, fused, settings):
    """Time, memory and estimate of a pass through some layers, and the gradient of an adapter that is not zero."""
    import torch

    trainer, args, shape, _ = trainer_of(bench, model, fused=fused, **settings)
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    torch.manual_seed(0)
    for parameter in trained:
        parameter.data = torch.randn_like(parameter) * 0.02
    if args.activation_checkpointing == "on" and not fused:
        trainer.model.activation_checkpointing_enable({"use_reentrant": False})
    step, size = pass_of(trainer)
    step()
    gradient = torch.cat([parameter.grad.flatten().double().cpu() for parameter in trained])
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds, tokens = seconds_of(step, 8), size[0]
    found = {"tokens": tokens, "milliseconds": seconds * 1e3}
    found["tokens_per_second"] = tokens / seconds * shape["layers"] / SHAPES[bench.shape]["num_hidden_layers"]
    parts = estimated(trainer, args, shape, size=size)
    found["estimate_gb"] = (sum(parts.values()) - parts["optimizer"]) / 1e9  # there is none here
    if bench.cuda:
        found["peak_allocated_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return found, gradient


def pieces(bench, model):
    """Milliseconds of what layer.py puts together: its decisions, one by one."""
    import torch

    from pipeline.lora import weight_of
    from pipeline.training import layer

    linear, dtype = model.model.layers[0].mlp.up_proj, model.dtype
    weight, options = weight_of(linear, dtype), {"device": model.device, "dtype": dtype}
    for tokens in (8192, 2048) if bench.cuda else (256,):
        x, inner = (torch.randn(tokens, width, **options) for width in (weight.shape[1], 8))
        b = torch.randn(weight.shape[0], 8, **options)
        three = [torch.randn(tokens * weight.shape[0], **options) for _ in range(3)]
        works = {
            "large product alone": lambda x=x: x @ weight.T,
            "thin product first": lambda x=x, b=b, inner=inner: ((inner * 2) @ b.T).addmm_(x, weight.T),
            "large product first": lambda x=x, b=b, inner=inner: (x @ weight.T).addmm_(inner, b.T, alpha=2),
            "unpacking its weight": lambda: weight_of(linear, dtype),
            "swiglu_back_": lambda three=three: layer.swiglu_back_(*three),
            "swiglu_back_ in pieces": lambda three=three: layer.swiglu_back_in_pieces_(*three),
        }
        if bench.cuda:
            compiled = torch.compile(layer.swiglu_back_, dynamic=True)
            works["swiglu_back_ compiled"] = lambda three=three, compiled=compiled: compiled(*three)
        for name, work in works.items():
            try:
                found = {"milliseconds": seconds_of(work, 10) * 1e3}
            except FAILURES as error:
                found = failed(error)
            bench.note("layers", **{f"{name}, {tokens}": found})


def longest(bench):
    """The longest row that fits CARD by the estimate under "host", and an optimizer step on it with no more memory."""
    from datasets import Dataset

    import train_llama
    from pipeline import models
    from pipeline.training import estimate
    from pipeline.training.trainer import lora_config

    args, folder = train_llama.parse_args([]), str(bench.model())
    estimate.choose_kernels(args)
    shape = estimate.model_shape(folder, models.load_config(folder), lora_config(args))
    model = models.load_model(folder, load_in_4bit=True)

    def row(tokens):
        ids, first = [token % shape["vocabulary"] for token in range(tokens)], int((1 - LABELLED) * tokens)
        return {"input_ids": ids, "labels": [-100] * first + ids[first:], "seq_lengths": [tokens]}

    with card(bench, CARD if bench.cuda else TINY_CARD):
        low, high = 64, 2**20
        while high - low > 64:
            middle = (low + high) // 2
            fits = estimate.fits(shape, {"labels": [row(middle)["labels"]]}, args, 1, "host")
            low, high = (middle, high) if fits else (low, middle)
        for share in (1, 0.9, 0.8):  # of the estimate's, until one trains
            tokens, started = int(share * low), time.time()
            settings = {"activation_checkpointing": "host", "max_steps": 1}
            settings |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
            try:
                with borrowed(model):
                    packed = Dataset.from_list([row(tokens)])
                    trainer, args, shape, _ = trainer_of(bench, model, packed, **settings)
                    found = measured(trainer, Speed())
                    found["estimate_gb"] = sum(estimated(trainer, args, shape).values()) / 1e9
            except FAILURES as error:
                found = failed(error)
            seconds = round(time.time() - started, 1)
            bench.note("longest", **{f"{tokens} tokens": {"of_the_estimate": share, "seconds": seconds} | found})
            if "error" not in found or bench.late():
                return


def measured(trainer, speed):
    """What `speed` finds in trainer.train()."""
    from transformers import Trainer

    step = Trainer.training_step
    Trainer.training_step = counted(step)
    trainer.add_callback(speed)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
    finally:
        Trainer.training_step = step
    return speed.found


def failed(error):
    traceback.print_exc()
    return {"error": f"{type(error).__name__}: {error}"[:500]}


def training(bench):
    from pipeline import models

    model = models.load_model(str(bench.model()), load_in_4bit=True)
    names = [*list(VARIANTS)[:-2], *TRL, *list(VARIANTS)[-2:]]  # what unpacks the weights comes last
    for name in names:
        if bench.late() or (bench.only and not any(some in name for some in bench.only)):
            continue
        try:
            found = trl_run(bench, model, TRL[name]) if name in TRL else own_run(bench, model, VARIANTS[name])
        except FAILURES as error:
            found = failed(error)
        bench.note("training", **{name: found})


def own_run(bench, model, changes):
    """A training of train_llama.py, its peak beside the estimate, and the FLOP/s it comes to."""
    from pipeline.training.estimate import operations, room_and_width

    packed, scored = data_of(bench)[3], scored_rows(bench, packed=True)
    changes = dict(changes)
    with card(bench, changes.pop("room", None)), borrowed(model):
        trainer, args, shape, unpacked = trainer_of(bench, model, **changes)
        found = measured(trainer, Speed(scored, lambda _, rows: trainer.validation_loss(rows)))
        found["estimate_gb"] = sum(estimated(trainer, args, shape, unpacked).values()) / 1e9
        found["attention"], width = trainer.model.config._attn_implementation, room_and_width(args)[1]
    rows = [length for lengths in packed["seq_lengths"] for length in lengths]
    labels = sum(label != -100 for row in packed["labels"] for label in row)
    flop = operations(shape, rows, labels, args.activation_checkpointing, width)
    found["tflops"] = flop / sum(rows) * found["tokens_per_second"] / 1e12
    return found | {"settings": {name: getattr(args, name) for name in SETTLED} | {"unpacked": unpacked}}


def scored_rows(bench, packed=False):
    """The first training rows, one by one or packed: every trainer's model is asked for its loss on them."""
    import train_llama

    tokens = data_of(bench)[2]
    rows = tokens.select(range(min(SCORED, len(tokens))))
    return train_llama.pack(rows, train_llama.parse_args([])) if packed else rows.to_list()


def trl_run(bench, model, changes):
    """TRL's SFTTrainer on the same rows, as prompt and completion, with the same adapter."""
    import torch
    from transformers.utils import is_flash_attn_2_available
    from trl import SFTConfig, SFTTrainer

    import train_llama
    from pipeline.training.trainer import lora_config

    tokenizer, rows, *_ = data_of(bench)
    options = {"per_device_train_batch_size": 8, "max_length": 2048, "learning_rate": 2e-4, "warmup_steps": 0}
    options |= {"lr_scheduler_type": "cosine", "max_steps": STEPS, "logging_steps": 1, "save_strategy": "no"}
    options |= {"report_to": "none", "disable_tqdm": True, "use_cpu": not bench.cuda, "bf16": bench.cuda}
    options |= {"use_liger_kernel": bench.liger} if changes else {}
    with borrowed(model):
        model.set_attn_implementation("flash_attention_2" if is_flash_attn_2_available() else "sdpa")
        torch.manual_seed(0)
        trainer = SFTTrainer(
            model,
            args=SFTConfig(output_dir=str(bench.folder / "trl"), **options | changes),
            train_dataset=rows.select_columns(["prompt", "completion"]),
            peft_config=lora_config(train_llama.parse_args([])),
            processing_class=tokenizer,
        )
        found = measured(trainer, Speed(scored_rows(bench), mean_loss))
    return found | {"attention": model.config._attn_implementation, "liger": trainer.args.use_liger_kernel}


def profile(bench):
    """A pass, forward and backward: kernels by their time, and the GPU's share of the wall time."""
    import torch
    from torch.profiler import ProfilerActivity

    from pipeline import models

    model = models.load_model(str(bench.model()), load_in_4bit=True)
    for name in ("8192 x 1, off", "8192 x 1, on"):
        with borrowed(model):
            trainer, *_ = trainer_of(bench, model, **VARIANTS[name])
            step, size = pass_of(trainer)
            wall = seconds_of(step, 3)
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * bench.cuda
            with torch.profiler.profile(activities=activities) as profiler:
                step()
                now()
            events = profiler.key_averages()
            kernels = [e for e in events if str(e.device_type).endswith("CUDA")] if bench.cuda else list(events)
            time_of = (lambda e: e.self_device_time_total) if bench.cuda else (lambda e: e.self_cpu_time_total)
            total = sum(map(time_of, kernels)) / 1e6
            top = sorted(kernels, key=time_of, reverse=True)[:25]
            found = {"tokens": size[0], "wall_ms": wall * 1e3, "busy_ms": total * 1e3}
            found["launches"] = sum(e.count for e in kernels)
            found["kernels"] = [[e.key[:110], e.count, round(time_of(e) / 1e3, 3)] for e in top]
            bench.note("profile", **{name: found})


def apart(a, b):
    return ((a - b).norm() / b.norm()).item()


def exactness(bench):
    """Packed rows by layer.prepare, each way, beside the same rows alone by PEFT, transformers' logits and sdpa.

    On the tiny model with a random adapter; the latter in float32 are the truth.
    """
    import torch
    from peft import get_peft_model
    from torch.nn.functional import cross_entropy
    from transformers.integrations.liger import apply_liger_kernel

    import train_llama
    from pipeline import models
    from pipeline.attention import choose_attention
    from pipeline.lora import fuse_lora
    from pipeline.training import layer
    from pipeline.training.estimate import WAYS
    from pipeline.training.trainer import lora_config, summed_loss

    device, truth = "cuda" if bench.cuda else "cpu", None
    rows = [(row["input_ids"], row["labels"]) for row in data_of(bench)[2].select(range(12))]
    kinds = {"float32": torch.float32}
    if bench.cuda:
        kinds |= {"bfloat16": torch.bfloat16, "float16": torch.float16}
    if bench.liger:
        kinds["bfloat16, Liger"] = torch.bfloat16
    for kind, dtype in kinds.items():
        without_liger()
        torch.manual_seed(0)
        model = models.load_model(str(MODEL), load_in_4bit=True, dtype=dtype)
        model = get_peft_model(model, lora_config(train_llama.parse_args([]))).train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.data = torch.randn_like(parameter.float()) * 0.02

        def by_logits(inputs, model=model):
            logits = model(input_ids=inputs["input_ids"], use_cache=False).logits[0, :-1]
            return cross_entropy(logits.float(), inputs["labels"][0, 1:], reduction="sum")

        def by_layers(inputs, model=model):
            return summed_loss(model, inputs)[0]

        def loss_and_gradients(some, loss_of, model=model, trained=trained, dtype=dtype):
            lengths = torch.tensor([len(ids) for ids, _ in some])
            bounds = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int().to(device)
            inputs = {
                "input_ids": torch.tensor([sum((ids for ids, _ in some), [])], device=device),
                "labels": torch.tensor([sum((labels for _, labels in some), [])], device=device),
                "position_ids": torch.cat([torch.arange(length) for length in lengths])[None].to(device),
                **{"cu_seq_lens_q": bounds, "max_length_q": int(lengths.max())},
            }
            model.zero_grad()
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                loss = loss_of(inputs)
            loss.backward()
            return loss.item(), torch.cat([parameter.grad.flatten().double() for parameter in trained])

        model.set_attn_implementation("sdpa")
        alone = [loss_and_gradients([row], by_logits) for row in rows]
        loss, gradient = sum(loss for loss, _ in alone), sum(gradient for _, gradient in alone)
        truth = truth or (loss, gradient)
        model.set_attn_implementation(choose_attention("packed"))
        if "Liger" in kind:
            apply_liger_kernel(model, {"fused_linear_cross_entropy": False})
        fuse_lora(model)
        for way in WAYS:
            layer.prepare(model, way, True, "Liger" in kind)
            packed, packed_gradient = loss_and_gradients(rows, by_layers)
            bench.note("exactness", **{f"{kind}, {way}": {
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
        if bench.late():
            return
        command = [python, "test_llama.py", "--output-dir", output, "--name", name, *options]
        seconds, said = bench.run(f"test_{name}", command)
        speeds = re.findall(r"^(\w+): .* ([\d,]+) tokens in ([\d.]+) s", said, re.MULTILINE)
        found = {task: int(tokens.replace(",", "")) / max(float(took), 0.05) for task, tokens, took in speeds}
        peak = float(re.search(r"peak memory ([\d.]+) GB", said)[1])
        found = {"seconds": seconds, "tokens_per_second": found, "peak_gb": peak}
        captured = bench.cuda and "cannot be captured" not in said  # the step of decoder.py
        bench.note("commands", **{f"test {name}": found | {"captured": captured}})

    test("tuned", "--no-compare-with-base")
    if not bench.late():
        seconds, said = bench.run("merge_large", [python, "merge_llama.py", "--output-dir", output, "--check-rows", 8])
        bench.note("commands", merge={"seconds": seconds, "said": said[-1500:]})
        test("merged", "--model", output / "merged")


def peers(bench):
    """Unsloth and LLaMA-Factory, in processes and packages of their own: they ask for older libraries than ours."""
    if not (bench.cuda and bench.packages):
        return bench.note("peers", not_run="it needs a GPU and --packages")
    tokenizer, rows, tokens, _ = data_of(bench)
    data = bench.folder / "peers"
    (data / "alpaca").mkdir(parents=True, exist_ok=True)
    (data / "tokens.json").write_text(json.dumps(tokens.to_list()))
    write_alpaca(rows, tokenizer, data / "alpaca")
    script = ROOT / "benchmarks" / "peers" / "gpu_peer.py"
    for peer, ways in PEERS.items():
        where = bench.packages.resolve() / peer / "site-packages"  # dill takes modules anywhere else for the user's
        more = {"PYTHONPATH": where, "UNSLOTH_DISABLE_STATISTICS": 1, "UNSLOTH_COMPILE_LOCATION": data / "compiled"}
        for way in ways:
            name = f"{peer}, {way}"
            if bench.late() or not where.is_dir():
                reason = "no time left" if bench.late() else "no packages"
                bench.note("peers", **{name: bench.result.get("peers", {}).get(name, {"not_run": reason})})
                continue
            command = [sys.executable, script, peer, way, bench.model(), data, STEPS, 2048, SCORED]
            log = bench.folder / f"peer_{peer}.txt"
            try:
                with log.open("w") as file:
                    done = subprocess.run(
                        list(map(str, command)), env=os.environ | {k: str(v) for k, v in more.items()}, text=True,
                        cwd=bench.folder, stdout=subprocess.PIPE, stderr=file, timeout=PEER_SECONDS)  # fmt: skip
                last = [line for line in done.stdout.splitlines() if line.startswith('{"tokens_per_second"')]
                found = json.loads(last[-1]) if last else {"error": log.read_text()[-1500:]}
            except FAILURES as error:  # among them that it takes too long
                found = failed(error)
            bench.note("peers", **{name: found})


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama3-8B")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--only", nargs="*", help="of training: parts of the names of what to run")
    parser.add_argument("--packages", type=Path, help="a folder with PEER/site-packages for unsloth and llamafactory")
    parser.add_argument("--folder", type=Path, default=FOLDER / "gpu", help="for models, data and logs")
    parser.add_argument("--results", type=Path, default=RESULTS / "gpu.json")
    parser.add_argument("--minutes", type=float, default=30, help="after which no further stage begins")
    args = parser.parse_args(argv)
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    args.folder.mkdir(parents=True, exist_ok=True)
    pins = dict(re.findall(r"^(\w+)==([\d.]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    for name in ("transformers", "trl", "peft", "bitsandbytes"):  # torch may be another one: results name it
        if version(name) != pins[name]:
            sys.exit(f"error: {name} {version(name)} is installed, and requirements.txt asks for {pins[name]}")
    bench = Bench(args)
    if not bench.cuda and args.shape != "tiny":
        sys.exit("error: there is no GPU: give --shape tiny to see that every part works on the CPU")
    from pipeline import models

    models.quiet()
    for stage in args.stages:
        if bench.late():
            bench.note(stage, error="no time left")
            continue
        started = time.time()
        bench.result.get(stage, {}).pop("error", None)
        without_liger()
        free_memory()
        try:
            globals()[stage](bench)
        except FAILURES as error:
            traceback.print_exc()
            bench.note(stage, error=f"{type(error).__name__}: {error}"[:2000])
        bench.note("stage_seconds", **{stage: round(time.time() - started, 1)})
        bench.note("stage_tflops", **{stage: bench.result.get("rates", {}).get("tflops")})  # machines differ
    units = {"tokens_per_second": ",.0f", "peak_allocated_gb": ".2f", "estimate_gb": ".2f", "loss": ".4f"}
    runs = {f"{stage}: {name}": run for stage in ("layers", "training", "peers")
            for name, run in bench.result.get(stage, {}).items() if "tokens_per_second" in run}  # fmt: skip
    table(["", "tokens/s", "peak GB", "estimate, GB", "loss"],
          [[name, *(format(run[key], unit) if key in run else "" for key, unit in units.items())]
           for name, run in runs.items()])  # fmt: skip


if __name__ == "__main__":
    main()
