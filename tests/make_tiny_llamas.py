"""Build the two tiny Llamas of the tests and the demo: tests/fixtures/tiny_llama3 and tests/fixtures/tiny_llama2.

tiny_llama3 has the tokenizer behaviour of Meta-Llama-3-8B at 2,048 tokens (byte-level BPE, Llama 3's pre-tokenizer,
exactly one BOS, no pad token, two end tokens) and is pre-trained for some minutes on invented text, long enough to
look things up in what it has read. tiny_llama2 has that of Llama-2-7b-hf (SentencePiece-style BPE with byte fallback,
no pad token) and random weights. The seed defines the weights, those of tiny_llama3 up to the CPU's rounding.

Reads nothing; its texts come from make_fixtures.py. Writes the two model folders under --out.

    python tests/make_tiny_llamas.py
    python tests/make_tiny_llamas.py --only tiny_llama2 --out /tmp/another --seed 1
"""

import argparse
import json
import math
import random
from itertools import islice
from pathlib import Path

from make_fixtures import pretraining_texts

# (optimizer steps, sequences a step, tokens a sequence, share of the sequences that say random tokens over and over)
STAGES = [(250, 8, 256, 1.0), (2500, 8, 256, 0.125), (600, 4, 512, 0.0)]
TEXTS = 20000  # documents; read again, reshuffled, when used up
LEARNING_RATE = 2e-3
WARMUP_STEPS = 60
WEIGHT_DECAY = 0.05

LLAMA3_SIZE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},  # as in Llama 3
}
LLAMA2_SIZE = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
MAX_POSITIONS = 2048

LLAMA3_VOCABULARY = 2048
LLAMA3_SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(4)),
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|reserved_special_token_4|>",
    "<|eot_id|>",
    *(f"<|reserved_special_token_{i}|>" for i in (5, 6)),
]
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_TOKENIZER_CONFIG = {
    "bos_token": "<|begin_of_text|>",
    "clean_up_tokenization_spaces": True,
    "eos_token": "<|end_of_text|>",
    "model_input_names": ["input_ids", "attention_mask"],
    "model_max_length": MAX_POSITIONS,
    "tokenizer_class": "PreTrainedTokenizerFast",
}

LLAMA2_VOCABULARY = 1200
LLAMA2_SPECIAL = ["<unk>", "<s>", "</s>"]
LLAMA2_TOKENIZER_CONFIG = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "</s>",
    "legacy": False,
    "model_max_length": 1000000000000000019884624838656,
    "pad_token": None,
    "sp_model_kwargs": {},
    "tokenizer_class": "LlamaTokenizer",
    "unk_token": "<unk>",
}


def llama3_tokenizer(texts):
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=True, trim_offsets=True, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=LLAMA3_VOCABULARY - len(LLAMA3_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # after the training, so that these get the last ids, as in Llama 3
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in LLAMA3_SPECIAL])
    bos = LLAMA3_SPECIAL[0]
    template = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
    level = processors.ByteLevel(trim_offsets=True, add_prefix_space=False, use_regex=True)
    tokenizer.post_processor = processors.Sequence([level, template])
    return tokenizer


def llama2_tokenizer(texts):
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    learner = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    trainer = trainers.BpeTrainer(
        vocab_size=LLAMA2_VOCABULARY,
        special_tokens=LLAMA2_SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)],
        limit_alphabet=80,
        show_progress=False,
    )
    # Llama 2 has no pre-tokenizer, yet a piece never spans two words: learn the merges word by word
    learner.train_from_iterator((f"▁{word}" for text in texts for word in text.split()), trainer)
    learned = json.loads(learner.to_str())
    learned["added_tokens"] = learned["added_tokens"][: len(LLAMA2_SPECIAL)]  # the bytes are plain pieces
    tokenizer = Tokenizer.from_str(json.dumps(learned))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def new_model(size, vocabulary, bos, eos, seed):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=1e-5,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=None,
        **size,
    )
    return LlamaForCausalLM(config).float()


def set_copying_heads(model):
    """Sets two heads in each of the layers 0 and 1 so that the model starts out able to copy from what it has read.

    Copying takes two heads in a row: one marks each token with its predecessor, one looks for the mark of the present
    token and says what stands there (Olsson et al. 2022, "In-context Learning and Induction Heads"). A model of this
    size did not find such a pair in seven million tokens; one set by hand becomes sharp in half a million.

    Layer 0: every embedding gets the same direction added, and query and key read nothing else, so that RoPE alone
    decides: with the query turned back by one position the score is the sum over pairs of cos((distance - 1) * theta).
    The value, 32 directions of the token before, is written to 32 other directions. Layer 1: the query reads the first
    of these, the key the others, in the pairs that RoPE turns so slowly that distance does not matter; what is found
    is written where it was read, as a vote for that token. The second pair of heads does the same in 64 further ones.
    """
    import torch

    config, embedding = model.config, model.model.embed_tokens.weight
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    hidden, width, half = config.hidden_size, config.head_dim, config.head_dim // 2
    theta = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)
    scale, shared, fast = 0.08, 0.35, theta > 0.01  # of the embeddings, of their common direction, pairs of layer 0
    query = torch.cat([torch.cos(theta) * fast, -torch.sin(theta) * fast])
    key = torch.cat([fast.float(), torch.zeros(half)])
    slow = torch.cat([~fast, ~fast]).float()
    with torch.no_grad():
        direction = torch.sign(torch.randn(hidden))
        embedding.copy_(scale * (torch.randn_like(embedding) + shared * direction))
        size = math.sqrt(12 * math.sqrt(width)) / (shared / math.sqrt(1 + shared**2) * hidden)  # 12 nats a pair
        basis = torch.linalg.qr(torch.randn(hidden, hidden)).Q
        for group in range(config.num_key_value_heads):
            shared_rows = slice(group * width, (group + 1) * width)
            head = group * config.num_attention_heads // config.num_key_value_heads
            rows = slice(head * width, (head + 1) * width)
            token = basis[group * width : (group + 1) * width]
            mark = basis[hidden // 2 + group * width : hidden // 2 + (group + 1) * width]
            first.q_proj.weight[rows] = size * torch.outer(query, direction)
            first.k_proj.weight[shared_rows] = size * torch.outer(key, direction)
            first.v_proj.weight[shared_rows] = token
            first.o_proj.weight[:, rows] = 2 * scale * mark.T
            second.q_proj.weight[rows] = 2 * slow[:, None] * token
            second.k_proj.weight[shared_rows] = 2 * slow[:, None] * mark
            second.v_proj.weight[shared_rows] = token
            second.o_proj.weight[:, rows] = 12 * scale * token.T


def read_forever(documents, bos, rng):
    """The tokens of all documents, a BOS at the head of each, in a new order every time round."""
    while True:
        for i in rng.sample(range(len(documents)), len(documents)):
            yield bos
            yield from documents[i]


def batches(documents, bos, seed):
    """Packed sequences (rows, tokens), each stage's steps in turn; labels are the inputs."""
    import torch

    rng = random.Random(seed)
    stream = read_forever(documents, bos, rng)
    for steps, rows, length, echoes in STAGES:
        for _ in range(steps):
            block = list(islice(stream, rows * length))
            sequences = [block[row * length : (row + 1) * length] for row in range(rows)]
            for row in range(round(rows * echoes)):
                period = rng.randint(6, length * 2 // 3)  # one length only would teach to count, not to look
                said = rng.choices(sequences[row], k=period)
                sequences[row] = (said * (length // period + 1))[:length]
            yield torch.tensor(sequences)


def rate(step):
    """Share of LEARNING_RATE: a linear warm-up, then a cosine from 1 to 0.02."""
    total = sum(steps for steps, *_ in STAGES)
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return 0.02 + 0.49 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / (total - WARMUP_STEPS)))


def pretrain(model, documents, bos, seed):
    import torch
    from torch.nn import functional

    torch.set_num_threads(1)  # another number rounds differently
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    for step, batch in enumerate(batches(documents, bos, seed), 1):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), batch[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}  loss {loss.item():.4f}", flush=True)


def save(folder, model, tokenizer, special, tokenizer_config, eos):
    """Write a folder as the hub has it: bfloat16 weights, tokenizer.json and tokenizer_config.json."""
    import torch
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=eos,
        do_sample=True,
        temperature=0.6,
        top_p=0.9,
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    decoder = {str(tokenizer.token_to_id(token)): {"content": token} | flags for token in special}
    text = json.dumps({"added_tokens_decoder": decoder} | tokenizer_config, indent=2)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def build_llama3(folder, seed):
    texts = list(pretraining_texts(seed, TEXTS))
    tokenizer = llama3_tokenizer(texts[:4000])
    documents = [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    bos, end, turn = map(tokenizer.token_to_id, ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"))
    model = new_model(LLAMA3_SIZE, tokenizer.get_vocab_size(), bos, end, seed)
    set_copying_heads(model)
    pretrain(model, documents, bos, seed)
    save(folder, model, tokenizer, LLAMA3_SPECIAL, LLAMA3_TOKENIZER_CONFIG, [end, turn])


def build_llama2(folder, seed):
    tokenizer = llama2_tokenizer(pretraining_texts(seed, 3000))
    bos, end = map(tokenizer.token_to_id, ("<s>", "</s>"))
    model = new_model(LLAMA2_SIZE, tokenizer.get_vocab_size(), bos, end, seed)
    save(folder, model, tokenizer, LLAMA2_SPECIAL, LLAMA2_TOKENIZER_CONFIG, end)


BUILDERS = {"tiny_llama3": build_llama3, "tiny_llama2": build_llama2}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "fixtures")
    parser.add_argument("--only", choices=BUILDERS, nargs="+", default=list(BUILDERS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in args.only:
        BUILDERS[name](args.out / name, args.seed)
        print(f"wrote {args.out / name}")


if __name__ == "__main__":
    main()
