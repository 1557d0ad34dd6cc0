"""The product of a layer with a LoRA adapter, as train_llama.py trains it and test_llama.py tests it."""

import functools

import torch
from bitsandbytes.functional import dequantize_4bit
from peft.tuners.lora import LoraLayer

from pipeline import machine


def thin_product(x, y):
    """x y, where y has as few columns as the rank: on a CPU as (y' x')', a thin matrix in front being faster there."""
    return (y.T @ x.T).T if x.device.type == "cpu" else x @ y


def weight_of(layer, dtype):
    """The matrix of a linear layer, unpacked where it is in 4 bits."""
    weight = layer.weight
    if hasattr(weight, "quant_state"):
        weight = dequantize_4bit(weight, weight.quant_state)
    return weight.to(dtype)


class FusedLoRA(torch.autograd.Function):
    """x W' + scale x A' B' with W frozen, in 4 bit or not, summed in place.

    PEFT copies the first product, scales the second and adds the two, forward and backward: some eight passes over
    the memory of a layer's input and output, a sixth of the time on a CPU (benchmarks/RESULTS.md).
    """

    @staticmethod
    def forward(ctx, x, a, b, layer, scale):
        y = layer(x)
        a, b = a.to(y.dtype), b.to(y.dtype)
        inner = thin_product(x.flatten(0, -2).to(y.dtype), a.T)
        y.view(-1, y.shape[-1]).addmm_(inner, b.T, alpha=scale)
        ctx.save_for_backward(x, inner, a, b)
        ctx.layer, ctx.scale = layer, scale
        return y

    @staticmethod
    def backward(ctx, grad):
        x, inner, a, b = ctx.saved_tensors
        grad, grad_x = grad.flatten(0, -2), None
        grad_inner = thin_product(grad, b).mul_(ctx.scale)
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight_of(ctx.layer, grad.dtype)).addmm_(grad_inner, a)
            grad_x = grad_x.view_as(x).to(x.dtype)
        grad_a = grad_inner.T @ x.flatten(0, -2).to(grad.dtype)
        grad_b = thin_product(grad.T, inner).mul_(ctx.scale)
        return grad_x, grad_a, grad_b, None, None


def is_plain(module):
    """Whether a module is a linear layer with LoRA alone: no dropout, no DoRA or another variant."""
    if not isinstance(module, LoraLayer) or not isinstance(module.get_base_layer(), torch.nn.Linear):
        return False
    dropout = module.training and getattr(module.lora_dropout["default"], "p", 0)
    return not module.lora_variant and not dropout and module.lora_B["default"].bias is None


def fusable(model):
    """Whether a PEFT model's layers can be those of training/layer.py: plain LoRA on all of their linear layers."""
    names = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    modules = [layer.get_submodule(name) for layer in model.get_base_model().model.layers for name in names]
    plain = all(is_plain(module) and module.get_base_layer().bias is None for module in modules)
    # FSDP takes weights away before the backward pass
    return plain and model.config.hidden_act == "silu" and not machine.under_fsdp()


def fuse_lora(model):
    """Let the linear layers of a PEFT model compute by FusedLoRA, but those with dropout, DoRA or another variant."""
    for module in model.modules():
        if is_plain(module):
            module.forward = functools.partial(fused_forward, module)


def fused_forward(module, x):
    if module.disable_adapters:
        return module.get_base_layer()(x)
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    return FusedLoRA.apply(x, a, b, module.get_base_layer(), module.scaling["default"])
