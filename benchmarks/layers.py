"""What a training step keeps and computes, for each way to keep less: the step itself, run on torch's meta device.

Any machine will do, without a GPU and without weights: every tensor has its shape, type and lifetime, and no numbers.
CUDA's and Liger's kernels have stand-ins that keep and allocate what they do. Beside it the estimate of --dry-run, and
the longest row that a GPU of 24 GB trains by it.

    python benchmarks/layers.py
    python benchmarks/layers.py --shapes 8B --tokens 8192
"""

import argparse
import itertools
import json
import sys
import types
import weakref
from pathlib import Path

import torch
from peers import RESULTS, ROOT
from peft import get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(ROOT))

import transformers.models.llama.modeling_llama as modeling  # noqa: E402

import train_llama  # noqa: E402
from pipeline import lora  # noqa: E402
from pipeline.training import estimate, layer  # noqa: E402
from pipeline.training.trainer import lora_config  # noqa: E402

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SHAPES = {
    "1B": (2048, 8192, 16, 32, 8, 128256),
    "7B": (4096, 11008, 32, 32, 32, 32000),
    "8B": (4096, 14336, 32, 32, 8, 128256),
    "70B": (8192, 28672, 80, 64, 8, 128256),
}
SHAPES = {name: dict(zip((*SIZES, "vocab_size"), sizes, strict=True)) for name, sizes in SHAPES.items()}
for untied in ("7B", "8B", "70B"):
    SHAPES[untied]["tie_word_embeddings"] = False
LABELLED = 0.08  # of the tokens


class Norm(torch.autograd.Function):
    """Liger's: keeps its input and a number a token, and works in the place of the gradient."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


class SwiGLU(torch.autograd.Function):
    """Liger's: keeps gate and up, and works in their place."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors


class Rotate(torch.autograd.Function):
    """Liger's: in place, both ways."""

    @staticmethod
    def forward(ctx, query, key):
        return query.view_as(query), key.view_as(key)

    @staticmethod
    def backward(ctx, *grads):
        return grads


class Flash(torch.autograd.Function):
    """torch's varlen attention; the backward pass adds up dq in float32, and has dk and dv of every query head."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:2], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx, grad):
        query, key, value, *_ = ctx.saved_tensors
        sums = query.new_empty(query.shape, dtype=torch.float32)
        of_all_heads = [torch.empty_like(query), torch.empty_like(query)] if query.shape != key.shape else []
        found = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        del sums, of_all_heads
        return found


def flash(module, query, key, value, mask, **_):
    return Flash.apply(*(x.squeeze(0).transpose(0, 1) for x in (query, key, value)))[None], None


class Meter(TorchDispatchMode):
    """Bytes alive on the meta device, their peak, and the FLOP of matrix products (torch's counting)."""

    def __init__(self):
        super().__init__()
        self.seen, self.alive, self.peak, self.flop = weakref.WeakSet(), 0, 0, 0

    def note(self, *tensors):
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor) and tensor.is_meta and tensor.untyped_storage() not in self.seen:
                self.seen.add(storage := tensor.untyped_storage())
                self.alive += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes()).atexit = False
        self.peak = max(self.peak, self.alive)

    def free(self, size):
        self.alive -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.note(*tree_leaves(out))
        if function._overloadpacket == torch.ops.aten.addmm_:  # torch does not count it
            self.flop += 2 * args[1].numel() * args[2].shape[1]
        elif count := flop_registry.get(function._overloadpacket):
            self.flop += count(*args, **(kwargs or {}), out_val=out)
        return out


def save_on_cpu(pin_memory):
    """torch's, where there is nothing to save."""
    return torch.autograd.graph.saved_tensors_hooks(
        lambda x: x.shape, lambda shape: torch.empty(shape, dtype=torch.bfloat16, device="meta")
    )


def unpacked(weight, shape):
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def in_4_bit(self, x):
    return torch.nn.functional.linear(x, unpacked(self.weight, self.weight.quant_state))


def build(config, args, way, fused):
    """The PEFT model of a training on the meta device, its linear layers in 4 bits."""
    liger = args.use_liger_kernel == "on"
    AttentionInterface.register("standin", flash)
    with torch.device("meta"):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
        for module in model.model.modules():
            if type(module) is torch.nn.Linear:
                shape = module.weight.shape
                packed = torch.empty(int(shape.numel() * estimate.NF4_BYTES), dtype=torch.uint8)
                module.weight = torch.nn.Parameter(packed, requires_grad=False)
                module.weight.quant_state = shape
                module.forward = types.MethodType(in_4_bit, module)
        model = get_peft_model(model, lora_config(args), low_cpu_mem_usage=True).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    base = model.get_base_model()
    for module in base.modules() if liger else ():
        if isinstance(module, modeling.LlamaRMSNorm):
            module.forward = Norm.apply
        if isinstance(module, modeling.LlamaMLP):
            module.forward = lambda x, mlp=module: mlp.down_proj(SwiGLU.apply(mlp.gate_proj(x), mlp.up_proj(x)))
    base.set_attn_implementation("standin")
    if way != "off" and not fused:
        base.activation_checkpointing_enable({"use_reentrant": False})
    if not args.lora_dropout:
        lora.fuse_lora(model)
    layer.prepare(model, way, fused, kernels=False)
    return model


def use_kernels():
    """Put what Liger's kernels keep and allocate in place of transformers' own, and the compiled one of layer.py."""
    modeling.apply_rotary_pos_emb = lambda query, key, cos, sin: Rotate.apply(query, key)
    layer.swiglu_back_ = lambda gate, up, grad: None
    real = layer.silu
    layer.silu = lambda gate: gate if gate.is_meta else real(gate)


def measured(config, shape, args, way, fused, tokens):
    """Peak GB of a pass with AdamW's two moments, and TFLOP of its matrix products; beside each the estimate."""
    model, meter = build(config, args, way, fused), Meter()
    ids = torch.empty(1, tokens, dtype=torch.long, device="meta")
    labels = ids[0, : int(LABELLED * tokens)]
    meter.note(*model.parameters())
    with meter, torch.autocast("cpu", torch.bfloat16):  # the meta device has none
        model(input_ids=ids, position_ids=ids, kept=labels, labels=labels, use_cache=False).loss.backward()
    shape = shape | {"fusable": fused}
    parts = estimate.memory(shape, args, tokens, len(labels), way)
    products = estimate.operations(shape, [1] * tokens, len(labels), way)  # rows of one token: without attention
    return {
        "peak_gb": (meter.peak + 8 * shape["trainable"]) / 1e9,
        "estimate_gb": sum(parts.values()) / 1e9,
        "tflop": meter.flop / 1e12,
        "estimate_tflop": products / 1e12,
    }


def longest(shape, args, room):
    """Tokens of the longest row that fits `room` bytes, by the estimate, with layers' inputs on the host."""
    fits, too_long = 0, 2**24
    while too_long - fits > 1:
        tokens = (fits + too_long) // 2
        parts = estimate.memory(shape, args, tokens, int(LABELLED * tokens), "host")
        fits, too_long = (tokens, too_long) if sum(parts.values()) <= estimate.USABLE * room else (fits, tokens)
    return fits


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 2048, 4096, 8192], help="of a pass")
    parser.add_argument("--results", type=Path, default=RESULTS / "layers.json")
    options = parser.parse_args()
    lora.dequantize_4bit, torch.autograd.graph.save_on_cpu = unpacked, save_on_cpu
    result = {"usable": estimate.USABLE, "rows": [], "longest": []}
    for liger in (False, True):
        if liger:
            use_kernels()
        args = train_llama.parse_args([])
        args.use_liger_kernel = "on" if liger else "off"
        for name in options.shapes:
            config = LlamaConfig(**SHAPES[name], max_position_embeddings=2**20)
            shape = estimate.model_shape(name, config, lora_config(args))
            ways = [(False, "off"), (False, "on"), *((True, way) for way in estimate.WAYS)]
            for tokens, (fused, way) in itertools.product(options.tokens, ways):
                row = {"shape": name, "tokens": tokens, "liger": liger, "fused": fused, "way": way}
                result["rows"].append(row | measured(config, shape, args, way, fused, tokens))
                print(json.dumps(result["rows"][-1]), flush=True)
            if tokens := longest(shape, args, 24e9):
                row = {"shape": name, "tokens": tokens, "liger": liger}
                result["longest"].append(row | measured(config, shape, args, "host", True, tokens))
                print(json.dumps(result["longest"][-1]), flush=True)
    options.results.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
