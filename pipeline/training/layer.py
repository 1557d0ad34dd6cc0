"""A Llama's decoder layer as it is trained: what it keeps for the backward pass, and a loss without all logits.

No token without a label has a loss: behind the last layer's attention only the labelled ones go on. Where LoRA is on
all seven linear layers, the layer keeps less than autograd would: projections of one input share it, a norm's input
stands for its output, and the MLP keeps no product of gate and up. What it computes again is the caller's choice:

    off    nothing but norms and the product of gate and up
    mlp    the MLP, too
    on     all of the layer, of which only the input is kept
    host   the same, with that input in the host's memory
"""

import contextlib
import functools

import torch
import transformers.models.llama.modeling_llama as modeling  # of which Liger replaces apply_rotary_pos_emb
from torch.nn.functional import silu

from pipeline.lora import thin_product, weight_of
from pipeline.training.estimate import LOSS_CHUNK, PIECE

LOSS_SCALE = 1024  # of the gradient made forward: without it float16 would round the small ones to 0


class LoRALinears:
    """Linear layers of one input x [tokens, in], each with its LoRA: x W' + scale x A' B', and the way back."""

    def __init__(self, modules, dtype):
        self.layers = [module.get_base_layer() for module in modules]
        self.a = torch.cat([module.lora_A["default"].weight for module in modules]).to(dtype)
        self.bs = [module.lora_B["default"].weight.to(dtype) for module in modules]
        self.scale = modules[0].scaling["default"]

    def forward(self, x):
        """The outputs, and x A' of all of them."""
        inner, outputs = thin_product(x, self.a.T), []
        for layer, b, part in zip(self.layers, self.bs, inner.chunk(len(self.bs), 1), strict=True):
            # the thin product first: adding it to the large one would read and write that once more
            outputs.append(((part * self.scale) @ b.T).addmm_(x, weight_of(layer, x.dtype).T))
        return outputs, inner

    def input_gradient(self, grads, needed=True):
        """The gradients of x and of x A'."""
        thin = torch.cat([thin_product(grad, b) for grad, b in zip(grads, self.bs, strict=True)], 1).mul_(self.scale)
        if not needed:
            return None, thin
        grad_x = thin @ self.a
        for grad, layer in zip(grads, self.layers, strict=True):
            grad_x.addmm_(grad, weight_of(layer, grad.dtype))
        return grad_x, thin

    def weight_gradients(self, grads, x, inner, thin):
        """The gradients of each A and each B, in turn."""
        found, count = [], len(grads)
        for grad, part, grad_a in zip(grads, inner.chunk(count, 1), (thin.T @ x).chunk(count), strict=True):
            found += [grad_a, thin_product(grad.T, part).mul_(self.scale)]
        return found


def weights_of(modules):
    return [part["default"].weight for module in modules for part in (module.lora_A, module.lora_B)]


def saved_once(ctx):
    """The tensors kept for a backward pass, which overwrites them: a second one fails here."""
    if ctx.spent:
        raise RuntimeError("a second backward pass over a layer that keeps its tensors for one")
    ctx.spent = True
    return ctx.saved_tensors


class Projections(torch.autograd.Function):
    """The outputs [1, tokens, out] of modules with one input, x = norm(before), of which `before` is kept."""

    @staticmethod
    def forward(ctx, x, before, norm, modules, *weights):
        ctx.linear, ctx.norm, ctx.spent = LoRALinears(modules, x.dtype), norm, False
        outputs, inner = ctx.linear.forward(x[0])
        ctx.save_for_backward(before, inner)
        return tuple(output[None] for output in outputs)

    @staticmethod
    def backward(ctx, *grads):
        before, inner = saved_once(ctx)
        grads, x = [grad[0] for grad in grads], ctx.norm(before)[0]
        grad_x, thin = ctx.linear.input_gradient(grads, ctx.needs_input_grad[0])
        grad_x = None if grad_x is None else grad_x[None]
        return grad_x, None, None, None, *ctx.linear.weight_gradients(grads, x, inner, thin)


def swiglu_back_(gate, up, grad):
    """Turn up into silu(gate) up, gate and grad (of that product) into the gradients of gate and up; all flat."""
    act, grad_act = silu(gate), grad * up
    torch.ops.aten.silu_backward.grad_input(grad_act, gate, grad_input=gate)
    up.mul_(act)
    grad.mul_(act)


def swiglu_back_in_pieces_(*tensors):
    for parts in zip(*(tensor.split(PIECE) for tensor in tensors), strict=True):
        swiglu_back_(*parts)


class GatedMLP(torch.autograd.Function):
    """The output of an MLP of x = norm(before), of which `before` is kept, and gate and up where keep says so."""

    @staticmethod
    def forward(ctx, x, before, norm, mlp, keep, swiglu, *weights):
        ctx.mlp, ctx.norm, ctx.swiglu, ctx.spent = mlp, norm, swiglu, False
        output, kept = mlp_forward(mlp, x[0])
        ctx.save_for_backward(before, *(kept if keep else ()))
        return output[None]

    @staticmethod
    def backward(ctx, grad):
        before, *kept = saved_once(ctx)
        grad_x, *grads = mlp_back(ctx.mlp, ctx.swiglu, ctx.norm(before)[0], grad[0], kept)
        return grad_x[None], None, None, None, None, None, *grads


def mlp_parts(mlp, dtype):
    return LoRALinears([mlp.gate_proj, mlp.up_proj], dtype), LoRALinears([mlp.down_proj], dtype)


def mlp_forward(mlp, x):
    """The output of an MLP, and what its backward pass needs: gate, up and the products of both parts with A."""
    first, last = mlp_parts(mlp, x.dtype)
    (gate, up), inner = first.forward(x)
    (output,), inner_last = last.forward(silu(gate).mul_(up))
    return output, (gate, up, inner, inner_last)


def mlp_back(mlp, swiglu, x, grad, kept=()):
    """The gradients of an MLP's input x [tokens, hidden] and of its A's and B's, from the gradient of its output."""
    first, last = mlp_parts(mlp, x.dtype)
    if kept:
        gate, up, inner, inner_last = kept
    else:
        (gate, up), inner = first.forward(x)
    grad_product, thin = last.input_gradient([grad])
    swiglu(gate.view(-1), up.view(-1), grad_product.view(-1))
    product, grads = up, [gate, grad_product]
    if not kept:
        inner_last = thin_product(product, last.a.T)
    last_grads = last.weight_gradients([grad], product, inner_last, thin)
    del up, product, kept
    grad_x, thin = first.input_gradient(grads)
    return grad_x, *first.weight_gradients(grads, x, inner, thin), *last_grads


def after_attention(layer, fused, x, position_embeddings, attention_mask=None, kept=None, **rest):
    """x [1, tokens, hidden] with what a layer's attention adds to it; where `kept` is given, of those tokens alone."""
    attention, norm = layer.self_attn, layer.input_layernorm
    modules = [attention.q_proj, attention.k_proj, attention.v_proj]
    normed = norm(x)
    if fused:
        parts = Projections.apply(normed, x.detach(), norm, modules, *weights_of(modules))
    else:
        parts = [module(normed) for module in modules]
    query, key, value = (part.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for part in parts)
    query, key = modeling.apply_rotary_pos_emb(query, key, *position_embeddings)
    name = attention.config._attn_implementation
    attend = modeling.ALL_ATTENTION_FUNCTIONS.get_interface(name, modeling.eager_attention_forward)
    output = attend(attention, query, key, value, attention_mask, scaling=attention.scaling, **rest)[0].flatten(2)
    if kept is not None:
        x, output = x[:, kept], output[:, kept]
    return x + attention.o_proj(output)


class FromInput(torch.autograd.Function):
    """A layer's output, with its input alone kept: all but the MLP's last product is computed again backward."""

    @staticmethod
    def forward(ctx, x, layer, swiglu, kwargs, *weights):
        ctx.layer, ctx.swiglu, ctx.kwargs, ctx.spent = layer, swiglu, kwargs, False
        ctx.save_for_backward(x)
        middle = after_attention(layer, True, x, **kwargs)
        return middle + mlp_forward(layer.mlp, layer.post_attention_layernorm(middle)[0])[0]

    @staticmethod
    def backward(ctx, grad):
        layer, x = ctx.layer, saved_once(ctx)[0].detach().requires_grad_(ctx.needs_input_grad[0])
        with torch.enable_grad():
            middle = after_attention(layer, True, x, **ctx.kwargs)
            normed = layer.post_attention_layernorm(middle)
        grad_normed, *mlp_grads = mlp_back(layer.mlp, ctx.swiglu, normed.detach()[0], grad[0])
        wanted = [x, *weights_of(attention_modules(layer))][not x.requires_grad :]
        grads = list(torch.autograd.grad([middle, normed], wanted, [grad, grad_normed[None]]))
        grad_x = grads.pop(0) if x.requires_grad else None
        return grad_x, None, None, None, *grads, *mlp_grads


def attention_modules(layer):
    attention = layer.self_attn
    return [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]


def mlp_modules(layer):
    return [layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj]


def fused_forward(layer, way, swiglu, last, x, kept=None, **kwargs):
    """In place of LlamaDecoderLayer.forward, for packed rows [1, tokens, hidden]."""
    kwargs |= {"kept": kept if last else None}
    weights = weights_of(mlp_modules(layer))
    if way in ("on", "host"):
        host = torch.autograd.graph.save_on_cpu(pin_memory=x.is_cuda) if way == "host" else contextlib.nullcontext()
        with host:
            return FromInput.apply(x, layer, swiglu, kwargs, *weights_of(attention_modules(layer)), *weights)
    x, norm = after_attention(layer, True, x, **kwargs), layer.post_attention_layernorm
    return x + GatedMLP.apply(norm(x), x.detach(), norm, layer.mlp, way == "off", swiglu, *weights)


def last_forward(layer, x, **kwargs):
    """In place of the last LlamaDecoderLayer.forward, where layers are not fused."""
    x = after_attention(layer, False, x, **kwargs)
    return x + layer.mlp(layer.post_attention_layernorm(x))


class ChunkedLoss(torch.autograd.Function):
    """Summed negative log likelihood (nats) of the tokens `gold` [labels] after the states `hidden` [labels, width].

    head: the matrix [vocabulary, width], which is frozen. The logits of all labels would be the largest tensor there
    is: they are made of LOSS_CHUNK labels at a time, and the gradient of `hidden` at once.
    """

    @staticmethod
    def forward(ctx, hidden, head, gold):
        total, grads = torch.zeros((), device=hidden.device), []
        for part, token in zip(hidden.split(LOSS_CHUNK), gold[:, None].split(LOSS_CHUNK), strict=True):
            logits = (part @ head.T).float()
            logits -= logits.amax(1, keepdim=True)  # all of it in place
            gold_logits = logits.gather(1, token)
            sums = logits.exp_().sum(1, keepdim=True)
            total += (sums.log() - gold_logits).sum()
            if ctx.needs_input_grad[0]:
                grad = logits.div_(sums).scatter_add_(1, token, torch.full_like(sums, -1)).mul_(LOSS_SCALE)
                grads.append(grad.to(part.dtype) @ head)
        ctx.save_for_backward(torch.cat(grads) if grads else hidden)
        return total

    @staticmethod
    def backward(ctx, grad):
        (hidden_grad,) = ctx.saved_tensors
        return (hidden_grad.float() * (grad / LOSS_SCALE)).to(hidden_grad.dtype), None, None


def chunked_loss(head, logits, labels, **_):
    """For the loss_function of a LlamaForCausalLM whose head gives the hidden states on as they are."""
    return ChunkedLoss.apply(logits[0], head.weight, labels)


def prepare(model, way, fused, kernels=False):
    """Change the layers and the loss of a PEFT model for training on packed rows, called with `kept` and `labels`.

    kept: the positions of a row that have a label; labels: the next tokens there. way: one of estimate.WAYS, for fused
    layers. kernels: the element-wise work of the MLP's backward pass is one compiled kernel.
    """
    base = model.get_base_model()
    layers = base.model.layers
    swiglu = torch.compile(swiglu_back_, dynamic=True) if kernels else swiglu_back_in_pieces_
    layers[-1].forward = functools.partial(last_forward, layers[-1])
    for layer in layers if fused else ():
        layer.forward = functools.partial(fused_forward, layer, way, swiglu, layer is layers[-1])
    base.lm_head.forward = lambda hidden: hidden
    base.loss_function = functools.partial(chunked_loss, base.lm_head)
