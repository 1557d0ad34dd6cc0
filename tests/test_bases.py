"""Which bases are taken: what could not be trained, tested and merged is refused before anything slow happens."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from conftest import FIXTURES
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import train_llama
from pipeline import models
from pipeline.files import load_rows, sha256
from pipeline.tokens import encode, end_tokens, load_tokenizer, tokenizer_of

TINY = FIXTURES / "tiny_llama3"  # its head is tied to its embeddings


def make_base(folder, change=None, **config):
    """A copy of tiny_llama3 with its tensors changed by `change(tensors)`, and settings put into its config.json."""
    shutil.copytree(TINY, folder)
    if change:
        tensors = load_file(folder / "model.safetensors")
        save_file(change(tensors) or tensors, folder / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | config))
    return folder


@pytest.fixture
def refused(dataset, tmp_path, capsys):
    def refused(base):
        """The one sentence with which train_llama.py exits with 2, with and without --dry-run."""
        sentences = set()
        for more in ([], ["--dry-run"]):
            capsys.readouterr()
            (tmp_path / "out").mkdir(exist_ok=True)
            if not (tmp_path / "out" / "dataset").exists():
                (tmp_path / "out" / "dataset").symlink_to(dataset / "dataset")
            with pytest.raises(SystemExit) as error:
                train_llama.main(["--model", str(base), "--output-dir", str(tmp_path / "out"), *more])
            assert error.value.code == 2
            sentences.add(capsys.readouterr().err)
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["dataset"]
        (sentence,) = sentences
        assert sentence.startswith("error: ") and sentence.count("\n") == 1
        return sentence

    return refused


def without_prefix(tensors):
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def retyped(dtype):
    """With the weights of one layer in that type."""

    def change(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].to(dtype)

    return change


def added(name, *shape, dtype=torch.bfloat16):
    return lambda tensors: tensors.update({name: torch.ones(shape, dtype=dtype)})


Q_BIAS = "model.layers.0.self_attn.q_proj.bias"
REFUSED = {
    "saved by AutoModel": (without_prefix, {}, "without model. in front: load it by AutoModelForCausalLM, and save"),
    "by AutoModel, with no head": (without_prefix, {"tie_word_embeddings": False}, "lacks weights (lm_head.weight"),
    "a buffer of bools": (added("model.mask", 4, dtype=torch.bool), {}, "has model.mask, for which its config.json"),
    "layers that config.json does not count": (None, {"num_hidden_layers": 2}, "has model.layers.2."),
    "biases that config.json does not name": (added(Q_BIAS, 128), {}, f"has {Q_BIAS}, for which"),
    "biases that are not there": (None, {"attention_bias": True}, "lacks weights (model.layers.0.self_attn."),
    "a head that gives rewards": (added("score.weight", 1, 128), {}, "has score.weight, for which"),
    "another vocabulary": (None, {"vocab_size": 2100}, "has lm_head.weight"),
    "more heads of keys": (None, {"num_key_value_heads": 4}, "k_proj.weight as [64, 128], its config.json asks for ["),
    "8-bit floats": (retyped(torch.float8_e4m3fn), {}, "as F8_E4M3: take its 16-bit weights"),
    "8-bit integers": (retyped(torch.int8), {}, "as I8: take its 16-bit weights"),
    "a quantised model": (None, {"compression_config": {"quant_method": "x"}}, "is quantised: take the 16-bit model"),
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_a_base_that_could_not_be_merged_is_refused_before_training(what, refused, tmp_path):
    change, config, words = REFUSED[what]
    if what == "another vocabulary":
        words = "has model.embed_tokens.weight as [2048, 128], its config.json asks for [2100, 128]"
    assert words in refused(make_base(tmp_path / "base", change, **config))


def test_what_automodel_saved_can_be_saved_again_as_the_sentence_says(refused, tmp_path):
    base = make_base(tmp_path / "base")
    AutoModel.from_pretrained(base).save_pretrained(base)
    assert "load it by AutoModelForCausalLM" in refused(base)
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(base)
    models.check_weights(str(base), models.load_config(str(base)))


def test_frequencies_of_early_llamas_and_both_copies_of_a_tied_head_are_taken(tmp_path):
    def early(tensors):
        tensors |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(16) for i in range(4)}
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        return tensors

    base = str(make_base(tmp_path / "base", early))
    ids = torch.arange(20)[None]
    logits = [models.load_model(folder, load_in_4bit=False)(ids).logits for folder in (base, str(TINY))]
    assert torch.equal(*logits)


def test_an_adapter_that_lies_in_the_bases_folder_is_not_loaded_with_it(tmp_path):
    base, ids = str(make_base(tmp_path / "base")), torch.arange(20)[None]
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(TINY), LoraConfig(init_lora_weights=False))
    model.save_pretrained(base)
    loaded = [models.load_model(folder, load_in_4bit=False) for folder in (base, str(TINY))]
    assert loaded[0].state_dict().keys() == loaded[1].state_dict().keys()
    assert torch.equal(loaded[0](ids).logits, loaded[1](ids).logits)
    assert models.weights_identity(base) == models.weights_identity(str(TINY))


def test_a_pickle_beside_an_adapter_is_named(refused, tmp_path):
    base = make_base(tmp_path / "base")
    (base / "model.safetensors").rename(base / "adapter_model.safetensors")
    (base / "pytorch_model.bin").write_bytes(b"a pickle")
    assert "only pytorch_model.bin, a pickle: convert it" in refused(base)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["[]", "{", "\ufeff{}"])
def test_a_broken_settings_file_of_the_base_is_named_before_any_work(name, content, refused, tmp_path):
    base = make_base(tmp_path / "base")
    (base / name).write_text(content, encoding="utf-8")
    assert f"{name} is empty, or no JSON object in plain UTF-8" in refused(base)


@pytest.mark.parametrize("ends", [[2037, -1, 10**9, 2048, "x", None, [3]], -1, 10**9, "x", []])
def test_end_tokens_that_the_tokenizer_does_not_have_are_left_out(ends, tmp_path):
    base, tokenizer = make_base(tmp_path / "base"), load_tokenizer(str(TINY))
    found = []
    for named in (None, ends):
        (base / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
        found.append(end_tokens(str(base), tokenizer))
    assert found[0] == found[1]
    assert {type(end) for end in found[1]} == {int}


SWITCHES = {
    "attn_implementation": "flash_attention_2",
    "_attn_implementation": "eager",
    "return_dict": False,
    "use_return_dict": False,
    "use_cache": False,
    "output_attentions": True,
    "output_hidden_states": True,
    "torchscript": True,
    "problem_type": "whatever",
    "pruned_heads": {"0": [1]},
    "attention_dropout": 0.5,
    "pretraining_tp": 2,
    "tie_encoder_decoder": True,
    "is_decoder": False,
    "num_labels": 1,
    "chunk_size_feed_forward": 3,
    "auto_map": {"AutoModelForCausalLM": "code.Model"},
    "architectures": ["LlamaForSequenceClassification"],
    "dtype": "float8_e4m3fn",
}


def test_switches_that_other_tools_left_in_the_config_are_not_obeyed(tmp_path):
    base, ids = str(make_base(tmp_path / "base", **SWITCHES)), torch.arange(20)[None]
    configs = [models.load_config(folder).to_dict() | {"_name_or_path": ""} for folder in (base, str(TINY))]
    assert configs[0] == configs[1]
    loaded = [models.load_model(folder, load_in_4bit=False) for folder in (base, str(TINY))]
    outputs = [model.train()(input_ids=ids) for model in loaded]
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    assert outputs[0].keys() == outputs[1].keys()
    assert load_tokenizer(base)("a b").input_ids == load_tokenizer(str(TINY))("a b").input_ids


LINEAR = {"type": "linear", "factor": 2.0}
ROPES = [
    ({"rope_theta": 1000.0}, {"rope_type": "default", "rope_theta": 1000.0}),
    ({"rope_theta": 1e3, "rope_scaling": LINEAR}, {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e3}),
]


@pytest.mark.parametrize("old, new", ROPES)
def test_rope_is_read_under_its_older_names(old, new, tmp_path):
    base = make_base(tmp_path / "base")
    content = json.loads((base / "config.json").read_text())
    del content["rope_parameters"]
    (base / "config.json").write_text(json.dumps(content | old))
    assert models.load_config(str(base)).rope_parameters.items() >= new.items()


@pytest.mark.parametrize("kind", ["nowhere", "in special_tokens_map.json alone", "empty, as BOS and UNK"])
def test_a_tokenizer_without_an_end_token_is_one_sentence_before_any_work(kind, refused, tmp_path):
    base = make_base(tmp_path / "base")
    path = base / "tokenizer_config.json"
    content = json.loads(path.read_text())
    end = content.pop("eos_token")
    if kind.startswith("empty"):
        content |= {"eos_token": "", "bos_token": "", "unk_token": ""}
    elif kind.startswith("in"):
        (base / "special_tokens_map.json").write_text(json.dumps({"eos_token": end}))
    path.write_text(json.dumps(content))
    assert "names no end token: set eos_token in its tokenizer_config.json" in refused(base)


def test_other_special_tokens_may_be_empty(tmp_path):
    base = make_base(tmp_path / "base")
    path = base / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": "", "unk_token": "", "pad_token": ""}))
    tokenizer = load_tokenizer(str(base))
    assert tokenizer.bos_token is None and tokenizer.pad_token == tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(str(tmp_path / "saved"))("a b").input_ids == tokenizer("a b").input_ids


@pytest.mark.parametrize("positions, max_length", [(170, 512), (170, 160), (2048, 170), (100, 512)])
def test_rows_beyond_the_models_positions_are_dropped_and_counted(positions, max_length, dataset, tmp_path, capsys):
    base = str(make_base(tmp_path / "base", max_position_embeddings=positions))
    tokenizer, rows = tokenizer_of(base, None), load_rows(dataset, "train")
    ids = encode(tokenizer, rows.to_dict())
    lengths = [len(prompt) + len(end) for prompt, end in zip(ids["prompt_ids"], ids["completion_ids"], strict=True)]
    limit = min(positions, max_length)
    kept = [length for length in lengths if length <= limit]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "dataset").symlink_to(dataset / "dataset")
    dry_run = ["--model", base, "--dry-run", "--max-length", str(max_length), "--output-dir", str(tmp_path / "out")]
    more = f"the model has {positions} positions)" if positions < max(lengths) else f"--max-length {max(lengths)} "
    if not kept:
        with pytest.raises(SystemExit) as error:
            train_llama.main(dry_run)
        assert error.value.code == 2
        assert f"error: train: every row is longer than {limit} tokens ({more}" in capsys.readouterr().err
        return
    assert len(kept) < len(lengths)
    train_llama.main(dry_run)
    dropped = f"train: {len(lengths) - len(kept)} of {len(lengths)} rows are longer than {limit} tokens"
    assert f"{dropped} and were dropped ({more}" in capsys.readouterr().out
    assert sorted(map(len, train_llama.tokenize(rows, tokenizer, max_length, "train")["input_ids"])) == sorted(kept)


def cached(hub, commit, **blobs):
    """tiny_llama3 in a hub cache as own/tiny: each file a link to a blob, of the weights named by its SHA-256."""
    folder = hub / "models--own--tiny"
    snapshot = folder / "snapshots" / commit
    for place in (folder / "blobs", folder / "refs", snapshot):
        place.mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    for path in TINY.iterdir():
        name = blobs.get(path.stem) or (sha256(path) if path.suffix == ".safetensors" else f"etag-of-{path.stem}")
        shutil.copy(path, folder / "blobs" / name)
        (snapshot / path.name).symlink_to(f"../../blobs/{name}")
    return snapshot


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


LONGER = {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}
NUMBERS = [{"rms_norm_eps": 1e-3}, {"hidden_act": "gelu"}, {"rope_parameters": LONGER}]
NAMES = {"transformers_version": "4.40.0", "torch_dtype": "float32", "dtype": None, "use_cache": False, "name": "x"}
NAMES |= {"_name_or_path": "/elsewhere", "pad_token_id": 7, "initializer_range": 0.01, "rope_scaling": None}


def test_settings_that_change_numbers_are_part_of_a_bases_identity_and_others_are_not(tmp_path):
    same = models.weights_identity(str(make_base(tmp_path / "same", **NAMES)))
    assert same == models.weights_identity(str(TINY))
    others = [models.weights_identity(str(make_base(tmp_path / str(i), **own))) for i, own in enumerate(NUMBERS)]
    assert len({same, *others}) == 4


def test_rope_by_which_a_token_depends_on_the_rows_beside_it_is_refused(tmp_path, capsys):
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 64}
    base = make_base(
        tmp_path / "base", rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "factor": 16.0} | factors
    )
    with pytest.raises(SystemExit):
        models.load_config(str(base))
    assert "its rope_type is longrope" in capsys.readouterr().err


def test_rope_under_its_older_names_is_the_same_identity(tmp_path):
    bases = [make_base(tmp_path / name, **own) for name, own in (("new", {"rope_parameters": LONGER}), ("old", {}))]
    content = json.loads((bases[1] / "config.json").read_text())
    del content["rope_parameters"], content["head_dim"]  # as many heads as make it the same
    content |= {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    (bases[1] / "config.json").write_text(json.dumps(content))
    assert models.weights_identity(str(bases[0])) == models.weights_identity(str(bases[1]))


def test_a_hub_models_identity_is_that_of_its_files_whatever_the_commit(hub, monkeypatch):
    expected = models.weights_identity(str(TINY))
    with monkeypatch.context() as patch:
        patch.setattr(models, "sha256", lambda path: pytest.fail("16 GB were read for what a name says"))
        assert models.weights_identity("own/tiny") == expected if cached(hub, "1" * 40) else None
        cached(hub, "2" * 40)
        (hub / "models--own--tiny" / "snapshots" / ("2" * 40) / "README.md").write_text("new")
        assert models.weights_identity("own/tiny") == expected
    cached(hub, "3" * 40, model="an-etag-that-is-no-sha256")
    assert models.weights_identity("own/tiny") == expected
    snapshot = cached(hub, "4" * 40)
    (snapshot / "model.safetensors").unlink()
    shutil.copy(TINY / "model.safetensors", snapshot)  # a file system without links
    assert models.weights_identity("own/tiny") == expected


def test_a_hub_model_keeps_its_name(hub):
    cached(hub, "1" * 40)
    model = models.load_model("own/tiny", load_in_4bit=False)
    assert model.name_or_path == model.config.name_or_path == "own/tiny"
    assert load_tokenizer("own/tiny").eos_token == "<|end_of_text|>"


def test_a_part_of_a_model_in_the_cache_is_told_from_a_model_that_lacks_a_file(hub, capsys):
    snapshot = cached(hub, "1" * 40)
    (snapshot / "model.safetensors").unlink()
    words = "own/tiny has no model.safetensors"
    for listed in (False, True):
        if listed:
            (hub / "models--own--tiny" / "trees").mkdir()
            (hub / "models--own--tiny" / "trees" / f"{'1' * 40}.json").write_text("[]")
        with pytest.raises(SystemExit, match="2"):
            models.weight_files("own/tiny")
        said = capsys.readouterr().err
        assert (f"{words}: get" if listed else f"{words} (not all of its files may be in the hub's cache") in said


def test_a_base_with_weights_that_are_no_numbers_is_named_before_the_first_step(dataset, tmp_path, capsys):
    def broken(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")

    shutil.copytree(dataset / "dataset", tmp_path / "out" / "dataset")
    base = str(make_base(tmp_path / "base", broken))
    with pytest.raises(SystemExit, match="2"):
        train_llama.main(["--model", base, "--max-length", "512", "--output-dir", str(tmp_path / "out")])
    assert "the loss is nan before the first step: the base has weights that are no numbers" in capsys.readouterr().err


@pytest.mark.parametrize("safe", [True, False])
def test_a_pickle_in_the_cache_is_refused_only_where_the_hub_has_nothing_else(safe, tmp_path, monkeypatch, capsys):
    shutil.copytree(TINY, tmp_path / "cache", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "cache" / "pytorch_model.bin").write_bytes(b"a pickle")  # an older tool fetched it

    def fetched(model, revision, allow_patterns):
        if safe and "*.safetensors" in allow_patterns:
            shutil.copy(TINY / "model.safetensors", tmp_path / "cache")
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    config = models.load_config("own/tiny")
    if safe:
        models.check_weights("own/tiny", config)
        assert models.load_model("own/tiny", load_in_4bit=False).name_or_path == "own/tiny"
    else:
        with pytest.raises(SystemExit):
            models.check_weights("own/tiny", config)
        assert "a pickle: convert it to safetensors" in capsys.readouterr().err
