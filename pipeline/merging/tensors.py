"""What an adapter makes of its base's weights: merged tensor by tensor, written shard by shard."""

from collections import Counter
from contextlib import suppress

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipeline import models
from pipeline.files import read_json
from pipeline.script import fail, first_line, progress

QUANTISED = "_proj.weight"  # how the names of the weights end that models.load_model quantises
# What adapter_config.json may have besides PEFT's defaults: what a later PEFT invents is refused, too.
FOLLOWED = (
    *("base_model_name_or_path", "peft_version", "task_type", "inference_mode", "auto_mapping"),
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying"),
)


def refuse_more_than_lora(folder):
    """Exit 2, naming it, on anything in adapter_config.json that is more than LoRA on linear layers."""
    plain = LoraConfig().to_dict()
    strange = [
        f"{name} {value}"
        for name, value in read_json(folder / "adapter_config.json").items()
        # of init_lora_weights "gaussian" leaves the base's weights as they are; PiSSA, OLoRA and so on do not
        if value and name not in FOLLOWED and value not in (plain.get(name), "gaussian")
    ]
    if strange:
        fail(f"{folder} has {', '.join(strange)}, which this script does not merge: use PEFT's merge_and_unload")


def changes_of(model, folder):
    """{weight: (A, B, scale)} of what the adapter changes; PEFT resolved rank, alpha, their patterns and rsLoRA."""
    lora = load_file(folder / "adapter_model.safetensors")
    changes = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        tied = name == "lm_head" and model.config.tie_word_embeddings
        if tied or not hasattr(layer.get_base_layer(), "in_features"):
            fail(f"the adapter in {folder} trains {name}, no linear layer of its own: use PEFT's merge_and_unload")
        a, b = (lora[f"base_model.model.{name}.lora_{matrix}.weight"] for matrix in "AB")
        changes[f"{name}.weight"] = a, b, layer.scaling["default"]
    return changes


def merge_tensor(name, stored, changes, into):
    """`stored`, a base weight [out, in], with scale x B A added, in float32; as it is where nothing changes it.

    into: "4bit": `stored` as models.load_model quantises it, and back; "16bit".
    """
    weight = stored
    if into == "4bit" and name.endswith(QUANTISED):
        weight = stored.float().to("cuda" if torch.cuda.is_available() else "cpu")
        weight = dequantize_4bit(*quantize_4bit(weight, quant_type="nf4", compress_statistics=True)).cpu()
    if name in changes:
        a, b, scale = changes[name]
        weight = weight.float().addmm(b.float(), a.float(), alpha=scale)
    return weight


def finite(tensor):
    """Whether all of its numbers are finite; isfinite().all() takes a CPU many times as long."""
    return all(end.isfinite() for end in tensor.aminmax())


def merged_tensors(path, changes, into):
    """(name, the base's tensor in `path`, what the adapter makes of it) in turn; see merge_tensor."""
    for name, stored in models.tensors_in(path):
        if name != "model.embed_tokens.weight" and not finite(stored):  # there it may be rows of unused tokens
            fail(f"{path.name} of the base has numbers in {name} that are not finite: get it again")
        weight = merge_tensor(name, stored, changes, into)
        if weight is not stored and not finite(weight):
            fail(f"merged, {name} is not finite: run train_llama.py again, with a lower learning rate")
        yield name, stored, weight


def rounded_away(stored, weight, rounded):
    """How many numbers of `weight` its rounded copy does not hold, by kind."""
    count = torch.count_nonzero  # the sum of a bool tensor takes a CPU twenty times as long
    limits = torch.finfo(rounded.dtype)
    smallest = limits.smallest_normal * limits.eps
    not_finite = count(~weight.isfinite())
    counts = {
        "weights": weight.numel(),
        "not_finite": not_finite,
        "too_large": count(~rounded.isfinite()) - not_finite,
        "too_small": count((weight.abs() < smallest) & (weight != 0)),
    }
    if weight is stored:
        counts["not_adapted_yet_changed"] = count((rounded.to(stored.dtype) != stored) & (stored == stored))
    return {name: int(number) for name, number in counts.items()}


def merge(base, changes, into, fresh, dtype):
    """Write the merged shards of `base` into `fresh`, rounded to `dtype`; returns what rounded_away counts in all."""
    counts = Counter()
    # the base's own names and shards: its index holds for the merged folder too
    for path in progress(models.weight_files(base), "merging", unit="shard"):
        tensors, target = {}, fresh / path.name
        for name, stored, weight in merged_tensors(path, changes, into):
            tensors[name] = weight.to(getattr(torch, dtype))
            counts.update(rounded_away(stored, weight, tensors[name]))
        try:
            save_file(tensors, target, metadata={"format": "pt"})
        except SafetensorError as error:  # how a full disk reaches us
            fail(f"cannot write {target} ({first_line(error)}): make room, then give the same command again")
        with suppress(OSError):  # some mounts have no permissions
            target.chmod(0o644)  # a server may be another user
    return counts
