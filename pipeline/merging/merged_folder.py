"""What is in a merged folder besides its weights: tokenizer, configs, Ollama's Modelfile, the model card."""

import json
import re
import shutil
from pathlib import Path

from pipeline import models
from pipeline.files import read_json
from pipeline.tokens import encode, end_tokens, write_for_others

INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")


def write_small_files(base, model, tokenizer, target, dtype, size):
    """Tokenizer (with the chat template of training, or none), index, config, generation config and Modelfile.

    The last two are greedy and end at every end token, as tested. dtype, size: of the stored weights, in bytes.
    """
    from transformers import GenerationConfig

    source = models.fetch(base)
    for path in (path for pattern in TOKENIZER_FILES for path in source.glob(pattern) if path.is_file()):
        shutil.copyfile(path, target / path.name)  # saved again, an older transformers could not read them
    if tokenizer.chat_template:
        (target / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    write_for_others(target)
    if not (target / "model.safetensors").exists():  # beside it an index is a leftover of other weights
        index = read_json(source / INDEX)
        index["metadata"] = {"total_size": size}
        (target / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (target / "config.json").write_text(json.dumps(config_of(model, dtype), indent=2) + "\n", encoding="utf-8")
    ends = sorted(end_tokens(base, tokenizer))
    # of the base's settings the limits alone: no samplers' settings, no repetition penalty
    kept = {name: getattr(model.generation_config, name) for name in ("max_length", "max_new_tokens")}
    tokens = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": ends}
    GenerationConfig(do_sample=False, **kept, **tokens).save_pretrained(target)
    (target / "Modelfile").write_text(modelfile(tokenizer, ends), encoding="utf-8")


def config_of(model, dtype):
    """config.json of the merged model; transformers 4, vLLM and llama.cpp have other names for dtype and RoPE."""
    content = model.config.to_dict()
    rope = content["rope_parameters"].copy()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": dtype, "torch_dtype": dtype}
    config |= {name: content[name] for name in (*type(model.config).__annotations__, "transformers_version")}
    theta = rope.pop("rope_theta")
    return config | {"rope_theta": theta, "rope_scaling": None if rope["rope_type"] == "default" else rope}


def licence_of(base):
    """The licence that the base's README.md names at its top, or that is known of its hub id; else "other"."""
    card = models.fetch(base, weights=False) / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    named = re.match(r"---\s*\n(?:(?!---).*\n)*?license:[ \t]*[\"']?([\w.-]+)", text)
    if named and named[1] != "other":
        return named[1]
    if metas := re.search(r"^meta-llama/.*llama-?(2|3(\.\d)?)(?!\d)", base.lower()):
        return f"llama{metas[1]}"
    return "apache-2.0" if base.lower().startswith(("huggingfacetb/smollm2", "tinyllama/tinyllama")) else "other"


def modelfile(tokenizer, ends):
    """What `ollama create` needs to ask and to stop as in training; `ends`: ids of the end tokens."""
    text = prompt = "{{ .Prompt }}"
    if tokenizer.chat_template:
        message = {"role": "user", "content": prompt}
        text = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    if tokenizer("a").input_ids[0] == tokenizer.bos_token_id:  # Ollama puts it there as the tokenizer does
        text = text.removeprefix(tokenizer.bos_token)
    row = {"id": ["sample"], "prompt": ["What is it?"], "completion": [" It is a sample."]}
    same = tokenizer(text.replace(prompt, row["prompt"][0])).input_ids == encode(tokenizer, row)["prompt_ids"][0]
    notes = [] if same else ["# Ollama reads other tokens than in training: a BOS or a blank in front."]
    stops = [f'PARAMETER stop "{token}"' for token in filter(None, tokenizer.convert_ids_to_tokens(ends))]
    greedy = ["PARAMETER temperature 0", "PARAMETER repeat_penalty 1"]  # Ollama's own are 0.8 and 1.1
    return "\n".join([*notes, "FROM .", f'TEMPLATE """{text}"""', *stops, *greedy, ""])


def model_card(output_dir, base, run, report, tasks):
    """README.md of the merged folder: model_card.md.jinja, filled in with what is of this adapter.

    tasks: {name: module}, of which the card has what the data set has.
    """
    import jinja2

    output = Path(output_dir)
    built = read_json(output / "dataset_report.json")
    rows = built.get("splits", {}).get("train", {}).get("sha256", "")[:32]
    template = Path(__file__).with_name("model_card.md.jinja").read_text(encoding="utf-8")
    options = {"trim_blocks": True, "keep_trailing_newline": True, "undefined": jinja2.ChainableUndefined}
    return jinja2.Template(template, **options).render(
        hub_id=None if Path(base).is_dir() else base,
        licence=licence_of(base),
        report=report,
        adapter=read_json(output / "adapter" / "adapter_config.json"),
        run=run,
        built=built if rows == run.get("run", {}).get("train rows") else {},
        evaluation=read_json(output / "evaluation.json"),
        tasks=tasks,
    )
