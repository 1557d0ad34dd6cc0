"""Attention within packed rows, and one pass that reads whole rows."""

import functools
import inspect

from pipeline.script import say

MAX_NLL = 700  # nats a token: exp(700) is about the largest that a float holds
ATTENTIONS = ("auto", "packed", "flash_attention_2", "sdpa", "eager")


def packed_attention(module, query, key, value, mask, scaling=None, cu_seq_lens_q=None, max_length_q=None, **_):
    """Causal attention within each row of a packed sequence, for transformers' AttentionInterface.

    A dense mask over the sequence, as sdpa needs it, costs its square; this costs the sum of the rows' squares.
    query [1, heads, tokens, head_dim], key and value the same with fewer heads, cu_seq_lens_q [rows + 1]: where each
    row begins, and the end (TRL's collator passes it). Returns [1, tokens, heads, head_dim] and None.
    """
    import torch

    if cu_seq_lens_q is None:  # never guess: plain causal attention would let the rows see one another
        raise ValueError("packed attention needs to know where the rows begin (cu_seq_lens_q)")
    if query.is_cuda and query.dtype != torch.float32:
        from torch.nn.attention.varlen import varlen_attn

        # not x[0]: its backward fills a tensor with zeros for each, and the kernels after it copy that
        flat = [x.squeeze(0).transpose(0, 1) for x in (query, key, value)]
        bounds = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
        options = {"scale": scaling, "window_size": (-1, 0)} | gqa_option(varlen_attn)
        return varlen_attn(*flat, *bounds, **options)[None], None
    lengths = cu_seq_lens_q.diff().tolist()
    rows = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    attend = torch.nn.functional.scaled_dot_product_attention
    out = [attend(q, k, v, is_causal=True, scale=scaling, enable_gqa=True) for q, k, v in rows]
    return torch.cat(out, dim=2).transpose(1, 2), None


@functools.cache
def gqa_option(kernel):
    """The option of varlen_attn for fewer heads of keys than of queries; torch 2.11 has none, and allows it."""
    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(kernel).parameters else {}


def choose_attention(name):
    """Register packed_attention and resolve "auto": flash attention where it is installed, else packed attention.

    On CUDA that runs torch's varlen kernel, which needs an Ampere GPU or newer: older ones get sdpa.
    """
    import torch
    from transformers import AttentionInterface
    from transformers.utils import is_flash_attn_2_available

    AttentionInterface.register("packed", packed_attention)
    if name == "auto" and is_flash_attn_2_available():
        return "flash_attention_2"
    if name not in ("auto", "packed"):
        return name
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        say("packed attention needs a newer GPU: taking sdpa, which is slower with long sequences")
        return "sdpa"
    return "packed"


def read(model, prompts, completions, cache=None):
    """One pass over whole rows (lists of ids), flattened: nothing is padded, and no row attends to another.

    Returns the logits [tokens, vocabulary] before each completion token, all rows' in turn, and those tokens' ids.
    `model` attends by "packed", or by anything where there is one row. `cache` gets the keys and values.
    """
    import torch

    ids = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    bounds = torch.tensor([0, *map(len, ids)]).cumsum(0)
    ends = zip(completions, bounds.tolist()[1:], strict=True)
    golds = torch.cat([torch.arange(end - len(completion), end) for completion, end in ends])
    flat = torch.tensor(sum(ids, []), device=model.device)
    logits = model(
        input_ids=flat[None],
        position_ids=torch.cat([torch.arange(len(row)) for row in ids]).to(model.device)[None],
        past_key_values=cache,
        use_cache=cache is not None,
        cu_seq_lens_q=bounds.int().to(model.device),
        max_length_q=max(map(len, ids)),
        logits_to_keep=golds.to(model.device) - 1,  # of the completions only
    ).logits[0]
    return logits, flat[golds]


def losses_of(logits, golds):
    """Each gold token's negative log likelihood (nats), in float64; what `read` returns goes in."""
    import torch

    pieces = zip(logits.split(512), golds.split(512), strict=True)  # float32 copies of a few positions at a time
    losses = [torch.nn.functional.cross_entropy(part.float(), gold, reduction="none") for part, gold in pieces]
    return torch.cat(losses).double()
