"""Is a merged folder what base and adapter are? Every tensor against PEFT's merge, then the models' logits."""

import tempfile

import torch
from bitsandbytes.functional import dequantize_4bit
from peft.tuners.lora import LoraLayer
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from pipeline import machine, models
from pipeline.attention import MAX_NLL, choose_attention, read
from pipeline.script import progress, say

# Mean logit difference over the logits' standard deviation, nothing rounded: a real model's is 1e-6. Beside it the
# limit where memory allows 16 bit alone, in which rounding costs 0.025: that finds another model altogether.
MAX_RELATIVE_DIFFERENCE = 1e-4
MAX_RELATIVE_DIFFERENCE_16BIT = 0.1
ROWS_AT_A_TIME = 8  # in one pass: layers that lie on the disk are read once for all of them


def merged_by_peft(layer, stored):
    """What a merged weight must be, by its module in base + adapter: in float32, or `stored` where nothing changes."""
    adapted = isinstance(layer, LoraLayer)
    base_weight = getattr(layer.get_base_layer() if adapted else layer, "weight", None)
    expected = stored
    if hasattr(base_weight, "quant_state"):
        expected = dequantize_4bit(base_weight.data, base_weight.quant_state).cpu()
    if adapted:  # PEFT's own merge of 4-bit layers would quantise the sum again, so only its update is asked for
        expected = expected.float() + layer.get_delta_weight("default").float().cpu()
    return expected


def wrong_tensors(model, base, fresh, dtype):
    """Sentences on the tensors in `fresh` that are not those of `model`, base and adapter under PEFT, in `dtype`."""
    layers, limits = dict(model.named_modules()), torch.finfo(getattr(torch, dtype))
    for path in models.weight_files(base):
        pairs = zip(models.tensors_in(path), models.tensors_in(fresh / path.name), strict=True)
        for (name, stored), (same_name, merged) in pairs:
            expected = merged_by_peft(layers.get(name.removesuffix(".weight")), stored)
            if (same_name, merged.dtype, merged.shape) != (name, getattr(torch, dtype), stored.shape):
                yield f"{same_name} has another dtype, shape or name than {name} of the base"
            elif expected is stored:
                if not torch.equal(merged.view(torch.uint8), stored.to(merged.dtype).view(torch.uint8)):
                    yield f"{name} differs from the base, and should not"
            else:
                off = (merged.float() - expected).abs()
                # a step of rounding is fine, and 1e-6 of the largest value: float32 sums depend on their order
                slack = 1e-6 * expected.abs().max() + limits.smallest_normal * limits.eps
                if not (off <= limits.eps * expected.abs() + slack).all():  # NaN: no
                    yield f"{name} differs from PEFT's merge, by up to {off.max().item():.3g}"


def roomy_place(base):
    """(device or None, type) with room for a whole model: float32 if possible, 16 bit on a GPU rather than a CPU."""
    size = sum(path.stat().st_size for path in models.weight_files(base))  # of 16-bit files
    room, free, dtype = machine.host_memory() - machine.LIBRARIES, 0, "bfloat16"
    if torch.cuda.is_available():
        free, dtype = torch.cuda.mem_get_info()[0], machine.compute_dtype()
    places = [("cuda:0", "float32", 2.4 * size < free), ("cuda:0", dtype, 1.2 * size < free)]  # a fifth: activations
    places += [("cpu", "float32", 2 * size < room), ("cpu", "bfloat16", size < room), (None, dtype, True)]
    device, dtype = next(place for *place, fits in places if fits)
    if device == "cpu" and free:
        say("no room for the model on the GPU: it is compared on the CPU, which takes longer")
    if dtype != "float32":
        say("no room for the model in float32: its logits are compared in 16 bit, which tells less")
    return device, dtype


def load_tuned(base, folder, into, device, dtype):
    """Base and adapter as PEFT computes them; device None: on the GPU where there is one."""
    if into == "4bit":  # NF4 is made of float32, and where merge_tensor makes it: a CPU's is another in its last bits
        options = {"dtype": "float32"}
    else:
        options = {"dtype": dtype} | ({"device_map": {"": device}} if device else {})
    model = models.load_model(base, into == "4bit", **options)
    return models.load_adapter(model, folder).get_base_model()


def load_merged(folder, offload, device, dtype):
    """The merged model as a user loads it; device None: layers without room go to the disk, into `offload`."""
    places = {"device_map": {"": device} if device else "auto", "offload_folder": offload}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **places)


def logits_of(model, ids):
    """Logits [answer tokens, vocabulary] before each completion token of all rows, and those tokens' ids."""
    attention = choose_attention("packed")
    model.set_attn_implementation(attention)
    step = ROWS_AT_A_TIME if attention == "packed" else 1
    found = []
    with torch.inference_mode():
        for start in progress(range(0, len(ids["prompt_ids"]), step), "checking"):
            part = slice(start, start + step)
            logits, golds = read(model, ids["prompt_ids"][part], ids["completion_ids"][part])
            found.append((logits.float().cpu(), golds.cpu()))
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def perplexity(logits, golds):
    return cross_entropy(logits, golds).double().clamp(max=MAX_NLL).exp().item()  # JSON has no infinity


def compare(tuned, merged, golds):
    """How far the merged model's logits [tokens, vocabulary] are from base and adapter's, and its perplexity."""
    apart = (tuned - merged).abs()
    return {
        "merged_perplexity": perplexity(merged, golds),
        "largest_logit_difference": apart.max().item(),
        "mean_logit_difference": apart.mean().item(),
        "relative_difference": (apart.mean() / tuned.std()).item(),
        "equal_greedy_tokens": (tuned.argmax(-1) == merged.argmax(-1)).float().mean().item(),
    }


def compare_folder(fresh, dtype, unrounded, ids, tuned, golds, place):
    """({type: figures} of the merged folder, loaded in `place`; sentences on logits that cannot come from rounding).

    As stored, and, if `place` has room for float32, by the `unrounded` weights, too: (name, tensor) in turn.
    """
    exact = "float32" in place
    with tempfile.TemporaryDirectory() as offload:
        model = load_merged(fresh, offload, *place)
        comparison = {dtype: compare(tuned, logits_of(model, ids)[0], golds)}
        if exact and dtype != "float32":
            parameters = dict(model.named_parameters())
            for name, weight in unrounded:
                if name in parameters:  # a tied head has none of its own
                    parameters[name].data.copy_(weight)
            comparison["float32"] = compare(tuned, logits_of(model, ids)[0], golds)
    limit = MAX_RELATIVE_DIFFERENCE if exact else MAX_RELATIVE_DIFFERENCE_16BIT
    off = comparison["float32" if exact else dtype]["relative_difference"]
    sentence = f"{'in float32 ' if exact else ''}the logits are {off:.3g} of their deviation from base and adapter's"
    return comparison, [] if off <= limit else [sentence]  # NaN is beyond it
