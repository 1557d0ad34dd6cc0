"""Llamas: finding, checking, loading, and the adapter on one."""

import functools
import json
import logging
import os
import re
import warnings
from pathlib import Path

from pipeline import machine
from pipeline.files import MANIFEST, digest, hub_has_listed, read_json, sha256
from pipeline.script import command, fail, first_line, out_of_memory, say, why_no_download

MODELS = {
    # free to download; Apache 2.0
    "smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B",
    "tinyllama": "TinyLlama/TinyLlama_v1.1",
    # gated: Meta's own licences, to be accepted at the models' pages
    "llama2": "meta-llama/Llama-2-7b-hf",
    "llama2-13b": "meta-llama/Llama-2-13b-hf",
    "llama3": "meta-llama/Meta-Llama-3-8B",
    "llama3.1": "meta-llama/Llama-3.1-8B",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama3.2-3b": "meta-llama/Llama-3.2-3B",
}
SMALL_FILES = ("*.json", "tokenizer*", "*.jinja", "README.md")  # what is fetched of a hub repository first
# Adapters, as PEFT names them, that are not in the layers alone, or in layers of another kind.
OTHER_ADAPTERS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE")
OTHER_ADAPTERS += ("SHADOW", "ADALORA", "POLY", "XLORA")
FLOATS = ("F64", "F32", "F16", "BF16")  # types of weights, as safetensors calls them
COMPUTED = "rotary_emb.inv_freq"  # in the files of early Llamas, and no longer read
NO_NUMBERS = ("initializer_range", "bos_token_id", "eos_token_id", "pad_token_id")  # settings that change no number


def quiet():
    """Turn the libraries' noise down: progress bars, deprecations of their own calls; their warnings stay."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl|peft|bitsandbytes")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # says that its optional CPU kernels are not installed
    unpacking = logging.getLogger("transformers.integrations.bitsandbytes")
    unpacking.addFilter(lambda record: "are dequantized in" not in record.msg)  # the type was chosen


def find_model(model):
    """The hub id, or the absolute path of the local folder, that `model` names; exits 2 where it can be neither."""
    model = MODELS.get(model, model)
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            fail(f"{model} has no config.json: give a folder laid out like a model's hub repository")
        return os.path.abspath(folder)
    if (folder.parent / "adapter").is_dir():
        fail(f"there is no folder {model}: run merge_llama.py first, or check its name")
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        fail(f"unknown model {model}: neither one of {', '.join(MODELS)}, nor a hub id (owner/name), nor a folder")
    return model


def fetch(model, weights=True):
    """The local folder with a model's files: its own, or of a hub id the hub cache's, downloaded where need be."""
    folder, problem = try_to_fetch(model, weights)
    if problem:
        fail(problem)
    return folder


def try_to_fetch(model, weights):
    """(the local folder with a model's files, "") or (None, a sentence that says why there is none)."""
    if Path(model).is_dir():
        return Path(model), ""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        folder = download(model, SMALL_FILES)
        # of the same commit, by which the cache names a folder
        return download(model, (*SMALL_FILES, "*.safetensors"), folder.name) if weights else folder, ""
    except GatedRepoError:  # before the next one: it is one of its kind
        remedy = f"accept its licence at https://huggingface.co/{model}, then run: {command('hf')} auth login"
        return None, f"{model} is gated: {remedy}"
    except RepositoryNotFoundError:
        remedy = f"check the name, or run: {command('hf')} auth login"
        return None, f"there is no model {model} on the hub, or it is private: {remedy}"
    except Exception as error:  # a dozen kinds, from a hub that cannot be reached to a full disk
        remedy = "check the name and the network, or give a local folder"
        return None, f"cannot load {model} ({why_no_download(error)}): {remedy}"


@functools.cache  # asked once in a run: the repository may change meanwhile
def download(model, patterns, revision=None):
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))


def weight_files(model):
    """The safetensors files that transformers loads of a model, sorted: a whole one goes before an index."""
    folder = fetch(model)
    shards, index = [folder / "model.safetensors"], folder / "model.safetensors.index.json"
    pickles = [*folder.glob("*.bin"), *folder.glob("*.pth")]
    if pickles and not shards[0].is_file() and not index.is_file():
        reason = f"{model} has no model.safetensors{incomplete(model)}, only {pickles[0].name}, a pickle"
        fail(f"{reason}: convert it to safetensors")
    if index.is_file() and not shards[0].is_file():
        try:
            names = json.loads(index.read_text())["weight_map"].values()
            shards = sorted({folder / Path(name).name for name in names})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            fail(f"{model} has a broken {index.name} ({first_line(error)}): get it again")
    for path in shards:
        if not path.is_file():
            fail(f"{model} has no {path.name}{incomplete(model)}: get the missing file")
    return shards


def incomplete(model):
    """Words for a message where nobody could ask the hub which files a model should have; else ""."""
    if Path(model).is_dir() or hub_has_listed(fetch(model, weights=False)):
        return ""
    return " (not all of its files may be in the hub's cache, and the hub was not asked or cannot be reached)"


def tensors_in(path):
    """(name, tensor) in turn, each opened for it alone: what was read of a mapped file counts as memory."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        names = sorted(file.keys())
    for name in names:
        with safe_open(path, "pt") as file:
            yield name, file.get_tensor(name)


def weights_identity(model):
    """What a model computes, by content: the first digits of the SHA-256 of each file and of its settings, by +."""
    files = [path.resolve() for path in weight_files(model)]
    # the hub's cache names a file by its SHA-256
    parts = [path.name if re.search("/blobs/[0-9a-f]{64}$", str(path)) else sha256(path) for path in files]
    config = load_config(model)
    settings = {name: getattr(config, name) for name in type(config).__annotations__ if name not in NO_NUMBERS}
    parts.append(digest(json.dumps(settings, sort_keys=True)))
    return "+".join(part[:16] for part in parts)


def load_failed(model, error):
    if out_of_memory(error):  # script() reports it
        raise error
    where = "in " if Path(model).is_dir() else ""
    reason = f"cannot load the model {where}{model} ({first_line(error)})"
    fail(f"{reason}: a file of it is missing or broken{incomplete(model)}")


def load_config(model):
    """The model's config, of a Llama's own settings alone; exits 2 where it is no Llama's, or of quantised weights."""
    folder = fetch(model, weights=False)
    from transformers import LlamaConfig

    # a Llama's own settings alone: what other tools' sessions left there, such as output_attentions, is not obeyed
    names = {*LlamaConfig.__annotations__, "rope_theta", "rope_scaling", "tokenizer_class"}
    names -= {"use_cache", "attention_dropout", "pretraining_tp"}
    try:
        for path in (folder / name for name in ("config.json", "generation_config.json", "tokenizer_config.json")):
            if path.is_file() and not read_json(path):  # transformers would find it late, or take other settings
                fail(f"{path} is empty, or no JSON object in plain UTF-8 without a BOM: save it so, or get it again")
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if content.get("model_type") != "llama":
            fail(f"{model} is a {content.get('model_type', 'nameless')} model: these scripts train Llamas")
        if content.get("quantization_config") or content.get("compression_config"):
            fail(f"{model} is quantised: take the 16-bit model it was made from")
        config = LlamaConfig(**{name: content[name] for name in names & content.keys()}, name_or_path=model)
        if config.rope_parameters["rope_type"] == "longrope":
            reason = "its rope_type is longrope, by which a row depends on the rows that are read with it"
            fail(f"cannot use {model} ({reason}): take another model")
        return config
    except Exception as error:
        load_failed(model, error)


def check_weights(model, config):
    """Exit 2 unless the weight files have what the config asks for and nothing else; reads their headers alone."""
    import torch
    from safetensors import safe_open
    from transformers import LlamaForCausalLM

    found = {}
    try:
        for path in weight_files(model):
            with safe_open(path, "pt") as file:
                parts = {name: file.get_slice(name) for name in set(file.keys()) if not name.endswith(COMPUTED)}
                found |= {name: (part.get_shape(), part.get_dtype()) for name, part in parts.items()}
        with torch.device("meta"):
            expected = {name: list(tensor.shape) for name, tensor in LlamaForCausalLM(config).state_dict().items()}
        if config.tie_word_embeddings:  # then it need not be there
            found.setdefault("lm_head.weight", (expected["lm_head.weight"], FLOATS[0]))
    except Exception as error:
        load_failed(model, error)
    again = "load it by AutoModelForCausalLM, and save that"
    if {"embed_tokens.weight", "lm_head.weight"} <= found.keys():
        fail(f"{model} names its weights as AutoModel saves them, without model. in front: {again}")
    if missing := expected.keys() - found.keys():
        fail(f"{model} lacks weights ({min(missing)}, {len(missing)} in all): get it again, or mend its config.json")
    for name, (shape, kind) in sorted(found.items()):
        if name not in expected:
            fail(f"{model} has {name}, for which its config.json has no place: mend that file, or {again}")
        if shape != expected[name]:
            fail(f"{model} has {name} as {shape}, its config.json asks for {expected[name]}: mend that file")
        if kind not in FLOATS:
            fail(f"{model} has {name} as {kind}: take its 16-bit weights")


def load_model(model, load_in_4bit, **options):
    """The base model: NF4 with double quantisation, or unquantised; by default in compute_dtype on the own device.

    options go to from_pretrained. Exits 2 where check_weights does.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = load_config(model)
    check_weights(model, config)
    dtype = options.get("dtype") or machine.compute_dtype()
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype if machine.under_fsdp() else torch.uint8,  # FSDP shards only tensors of one dtype
    )
    device = {"": int(os.environ.get("LOCAL_RANK", 0)) if torch.cuda.is_available() else "cpu"}
    options = {"dtype": dtype, "device_map": None if machine.under_fsdp() else device} | options
    options["quantization_config"] = nf4 if load_in_4bit else None
    options["adapter_kwargs"] = {"subfolder": "config.json"}  # where none can be: one beside the base is not loaded
    try:
        loaded = AutoModelForCausalLM.from_pretrained(fetch(model), config=config, **options)
    except Exception as error:
        load_failed(model, error)
    loaded.name_or_path = loaded.config.name_or_path = model  # not its place in the hub's cache
    # transformers keeps a head apart that differs from the embeddings, whatever the config says
    loaded.config.tie_word_embeddings = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    for module in loaded.modules():
        # bitsandbytes 0.50.2 repacks the weights in a CPU's first evaluation, for a bf16 kernel without a backward:
        # what is trained after that gets no gradient through the base. Keep the float32 path, which has one.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return loaded


def read_adapter(folder):
    """The base model that a PEFT adapter's folder names; exits 2 where the adapter is missing or broken."""
    config = Path(folder) / "adapter_config.json"
    if not config.is_file():
        fail(f"no adapter at {folder}: run train_llama.py first, or give --output-dir")
    settings = read_json(config)
    base = settings.get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        fail(f"cannot read {config}, or it names no base model: run train_llama.py again")
    kind = "aLoRA" if settings.get("alora_invocation_tokens") else settings.get("peft_type")
    if kind in (*OTHER_ADAPTERS, "aLoRA"):
        fail(f"{folder} is an adapter of the type {kind}, which these scripts cannot use")
    if not (Path(folder) / "adapter_model.safetensors").is_file():
        fail(f"no adapter_model.safetensors in {folder}: run train_llama.py again")
    alpha = read_run(folder)["settings"].get("lora_alpha")  # an adapter from elsewhere does not say
    if alpha and (settings.get("lora_alpha") != alpha or settings.get("use_rslora") or settings.get("alpha_pattern")):
        say(f"warning: {config} scales the adapter otherwise than in training: it is taken as that file says")
    return base


def read_run(folder):
    """What train_llama.py noted of an adapter, as in run.json; "settings", "run", "tasks" are {} where it did not."""
    run, checkpoint = read_json(Path(folder) / "run.json"), read_json(Path(folder) / MANIFEST)
    if not run:
        run = {"settings": checkpoint.get("run"), "run": checkpoint.get("run")}
    return run | {name: run[name] if isinstance(run.get(name), dict) else {} for name in ("settings", "run", "tasks")}


def load_adapter(model, folder):
    """`model` with the LoRA adapter of `folder` on it, ready for inference."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    try:
        model = PeftModel.from_pretrained(model, str(folder)).eval()
        # with LoRA on lm_head or embed_tokens PEFT saves that layer's own matrix as well, older versions not always
        least = set(get_peft_model_state_dict(model, save_embedding_layers=False))
        most = set(get_peft_model_state_dict(model, save_embedding_layers=True))
        with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
            if not least <= set(file.keys()) <= most:  # PEFT only warns, and leaves such layers as in the base
                raise ValueError("its tensors are not those that its config names")
        return model
    except Exception as error:  # a cut-off file, or shapes of another base
        reason = re.sub(r"\s+", " ", str(error)).strip()[:300] or type(error).__name__  # PEFT's are of many lines
        fail(f"the adapter in {folder} does not load onto its base ({reason}): run train_llama.py again")
