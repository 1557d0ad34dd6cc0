"""How test_llama.py loads a model and lets it answer: each prompt is read once, for loss and prediction.

A prompt is read unpadded; a Decoder continues from its keys and values, STRIDE tokens at a time: after each stride the
rows that have ended are left out. On 60 dialogues and a CPU, transformers' generate and a pass for the loss take 3.4
times as long (benchmarks/testing.py).
"""

import contextlib
import functools
import math
import os

import torch
from transformers import DynamicCache

from pipeline import machine, models
from pipeline.attention import MAX_NLL, choose_attention, losses_of, read
from pipeline.script import fail, first_line, out_of_memory, say
from pipeline.testing import predictions

READ_TOKENS = 4096  # of a pass over whole rows
FEW_ROWS = 8  # that a CPU multiplies faster as W x'
STRIDE = 16  # new tokens of a batch after which the rows that have ended leave it
LENGTH_STEP = 256  # captured steps are for a multiple of this many places
MAX_GRAPHS = 32  # captured steps that are kept
WINDOW = 1024  # tokens of the general text that are read at once


def load_system(base, folder, in_4bit, compare):
    """The LlamaForCausalLM, with the adapter of `folder` where there is one, and a context that switches that off.

    4-bit weights are unpacked at every use, or once where there is room: the same numbers (bitsandbytes computes them
    in that type), in four times the memory on a GPU, eight times on a CPU.
    """
    model = models.load_model(base, in_4bit).eval()
    if in_4bit and has_room(model):
        model = models.unpack(model)
    few_rows_first(model)
    model.greedy_decoder = Decoder(model)
    if not folder:
        return model, None
    from pipeline.lora import fuse_lora  # and PEFT

    # each alone: a row of NaN in the embeddings, of a token that never occurs, spoils no other
    ids = torch.arange(0, model.config.vocab_size, model.config.vocab_size // 64 + 1, device=model.device)[:, None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        tuned = models.load_adapter(model, folder)
        for name, parameter in tuned.named_parameters():  # as in training; PEFT would cast each input to float32
            if ".lora_" in name:
                parameter.data = parameter.data.to(model.dtype)
        fuse_lora(tuned)
        with tuned.disable_adapter():
            change = (model(input_ids=ids).logits - before).nan_to_num().abs().max() / before.nan_to_num().abs().max()
    # PiSSA and its kin take a part out of the base; others bring a matrix or biases of their own
    if compare and not change < 0.01:
        reason = f"the adapter in {folder} changes its base when it is loaded, as PiSSA does"
        fail(f"{reason}: give --no-compare-with-base, and test the base by itself with --model {base} --name base")
    return tuned.get_base_model(), tuned.disable_adapter


def has_room(model):
    """Whether all of the weights fit unpacked: on a GPU beside the packed ones and 8 GB for a batch, else in half."""
    if torch.cuda.is_available():
        return 2 * model.num_parameters() + 8e9 < torch.cuda.mem_get_info(model.device)[0]
    return 4 * model.num_parameters() < machine.host_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", 1)) / 2


class Decoder:
    """Greedy decoding of a batch, one token of every row at a time. To the model's attention it is the cache.

    A GPU computes a step faster than Python launches its kernels: on CUDA they are captured as one graph, per number
    of rows and places, and replayed. A graph reads and writes where it did when it was captured, so everything a step
    uses stays at its address: `place`, `inputs`, and `memory`, which all batches share.
    """

    def __init__(self, model):
        self.model, self.captures = model, model.device.type == "cuda"
        self.place = torch.zeros(1, dtype=torch.long, device=model.device)  # of the tokens that are read next
        self.inputs = {}  # {rows: [next ids, first places that are no padding], [2, rows, 1]}
        self.clear()

    def clear(self):
        """Give the memory back."""
        self.layers, self.memory, self.graphs, self.room = [], {}, {}, 0

    def size(self, rows, places):
        """(rows, places) of the batch in memory: captured, both are rounded up, as each size is a capture.

        Rows to a power of two: they leave once half of them have ended. Blank ones cost a GPU little, as a step takes
        as long as reading the weights.
        """
        if not self.captures:
            return rows, places
        return 1 << (rows - 1).bit_length(), math.ceil(places / LENGTH_STEP) * LENGTH_STEP

    def begin(self, layers, new):
        """Take over the prompts' keys and values, [rows, heads, places, head_dim], to which `new` tokens are added."""
        self.layers = layers
        # switched off in Python, of which a graph knows nothing: it always computes with the adapter, or never
        self.adapter_off = any(getattr(part, "disable_adapters", None) is True for part in self.model.modules())
        rows, _, places, _ = layers[0][0].shape
        room = math.prod(self.size(rows, places + new))
        if self.captures and room > self.room:
            self.memory, self.graphs, self.room = {}, {}, room

    def keep(self, rows, filled, more):
        """Keep these rows, whose first `filled` places are in use, with at least `more` places behind them.

        Blank places are 0, as attention multiplies them by 0: whatever was there before could be NaN.
        """
        rows_now, places = self.size(len(rows), filled + more)
        index = torch.tensor(rows, device=self.place.device)
        for number, parts in enumerate(self.layers):  # one at a time: the old keys and values go
            kept = [part[index, :, :filled] for part in parts]  # copies: old and new may share memory
            shape = (2, rows_now, kept[0].shape[1], places, kept[0].shape[3])
            if not self.captures:
                self.layers[number] = kept[0].new_zeros(shape)
            else:
                if number not in self.memory:
                    self.memory[number] = kept[0].new_empty(2, self.room * shape[2] * shape[4])
                self.layers[number] = self.memory[number][:, : math.prod(shape[1:])].view(shape).zero_()
            for whole, part in zip(self.layers[number], kept, strict=True):
                whole[: len(rows), :, :filled] = part
        self.place.fill_(filled)

    def update(self, keys, values, layer, *_, **__):
        """Called by the model's attention: add a token's keys and values, return all."""
        for whole, new in zip(self.layers[layer], (keys, values), strict=True):
            whole.index_copy_(2, self.place, new)
        return self.layers[layer]

    def step(self):
        """Read the next id of every row, and replace it by the one that follows; nothing here waits for the GPU."""
        _, rows, _, places, _ = self.layers[0].shape
        ids, starts = self.inputs[rows]
        places = torch.arange(places, device=ids.device)
        seen = (starts <= places) & (places <= self.place)
        options = {"position_ids": self.place - starts, "attention_mask": seen[:, None, None]}
        logits = self.model(input_ids=ids, past_key_values=self, **options).logits[:, -1]
        ids.copy_(logits.argmax(-1, keepdim=True))
        self.place += 1

    def write(self, ids, starts, more, all_ended):
        """The `more` ids behind `ids` of each row; where looking costs no time, fewer once all_ended(the new ids)."""
        _, rows, _, places, _ = self.layers[0].shape
        inputs = self.inputs.setdefault(rows, self.place.new_zeros(2, rows, 1))
        blank = [0] * (rows - len(ids))
        inputs.copy_(torch.tensor([ids + blank, starts + blank])[..., None])
        key, written = (rows, places, self.adapter_off), []
        for _ in range(more):
            if key in self.graphs:
                self.graphs[key].replay()
            elif not self.captures:
                self.step()
            elif graph := capture(self.step, list(self.graphs.values())):
                self.graphs = dict([*self.graphs.items(), (key, graph)][-MAX_GRAPHS:])
            else:
                self.captures, self.memory, self.graphs = False, {}, {}
            written.append(inputs[0, : len(ids)].clone())
            if not self.captures and all_ended(torch.cat(written, dim=1).tolist()):
                break
        return torch.cat(written, dim=1).tolist()


def capture(step, graphs):
    """Do a step, and return it as a CUDA graph that shares its memory with `graphs`; None where that is impossible."""
    with on_side_stream() as side:
        step()  # what a first call sets up cannot be captured
        graph, pool = torch.cuda.CUDAGraph(), graphs[0].pool() if graphs else torch.cuda.graph_pool_handle()
        try:  # a step's temporary tensors are all that is in the pool: graphs that take turns can share it
            with torch.cuda.graph(graph, pool, side, capture_error_mode="thread_local"):  # whatever other threads do
                step()
            return graph
        except RuntimeError as error:
            with contextlib.suppress(RuntimeError):  # else, in torch 2.13, empty_cache() and more would fail
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            error = error.__context__ or error  # else that the capture has failed
            if out_of_memory(error):
                raise error
            say(f"a step cannot be captured as a CUDA graph, so decoding takes longer ({first_line(error)})")


@contextlib.contextmanager
def on_side_stream():
    """One stream for all captures: each stream that multiplies gets a workspace of its own, for good."""
    side, current = side_stream(), torch.cuda.current_stream()
    side.wait_stream(current)
    try:
        with torch.cuda.stream(side):
            yield side
    finally:
        current.wait_stream(side)


side_stream = functools.cache(lambda: torch.cuda.Stream())


def few_rows_first(model):
    """On a CPU, compute the products of a few rows as W x': as x W' they take MKL up to seven times as long.

    Testing 6 + 6 rows of SmolLM2-135M on two cores took 44 s with it and 49 without, the dialogues 16 and 22.
    """
    if model.device.type == "cpu":
        for module in model.modules():
            if type(module) is torch.nn.Linear and module.bias is None:
                module.forward = functools.partial(linear, module)


def linear(module, x):
    rows = x.flatten(0, -2)
    if 1 < len(rows) <= FEW_ROWS:
        return (module.weight @ rows.T).T.contiguous().view(*x.shape[:-1], -1)
    return torch.nn.functional.linear(x, module.weight)


def read_rows(model, prompts, completions, attention):
    """Each completion's negative log likelihood (nats), and the prompts' keys and values, padded left.

    Whole rows are read in passes of about READ_TOKENS: on a CPU larger ones wait for memory.
    """
    model.set_attn_implementation(attention)
    nll, caches, start = [], [], 0
    sizes = [len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True)]
    while start < len(sizes):
        end = start + 1
        while end < len(sizes) and sum(sizes[start : end + 1]) <= READ_TOKENS:
            end += 1
        part = slice(start, end)
        caches.append(DynamicCache())
        logits, golds = read(model, prompts[part], completions[part], caches[-1])
        losses = losses_of(logits, golds).split([len(gold) for gold in completions[part]])
        nll += [row_losses.sum().item() for row_losses in losses]
        start = end
    return nll, padded(caches, prompts, completions)


def padded(caches, prompts, completions):
    """Each layer's keys and values, [rows, heads, longest prompt - 1, head_dim], padded left, without last tokens."""
    sizes = torch.tensor([len(p) + len(c) for p, c in zip(prompts, completions, strict=True)])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    offsets = torch.arange(lengths.max() - 1) - (lengths.max() - lengths)[:, None]
    places = (sizes.cumsum(0) - sizes)[:, None] + offsets.clamp(min=0)  # padding repeats a row's first token
    places = places.to(caches[0].layers[0].device)
    layers = []
    for parts in zip(*(cache.layers for cache in caches), strict=True):
        keys, values = (torch.cat([getattr(part, name)[0] for part in parts], dim=1) for name in ("keys", "values"))
        layers.append([flat[:, places].transpose(0, 1) for flat in (keys, values)])
        for part in parts:
            part.keys = part.values = None
    return layers


def test_rows(model, prompts, completions, attention, new, end_of, bar):
    """nll (nats) and greedy prediction (list of at most `new` ids, an ending one included) of each row.

    end_of: the answer_end of the task. bar: moves by one for each row that has ended.
    """
    decoder = model.greedy_decoder
    nll, layers = read_rows(model, prompts, completions, attention)
    model.set_attn_implementation("sdpa")
    width = max(map(len, prompts))
    decoder.begin(layers, new)
    written = [[] for _ in prompts]
    going = left = list(range(len(prompts)))  # places of the rows that have not ended; left: of these in the batch
    for length in range(0, new, STRIDE):
        going = [going[i] for i in left]
        more = min(STRIDE, new - length)
        decoder.keep(left, width - 1 + length, more)

        def all_ended(ids, going=going):
            return all(end_of(written[place] + row) is not None for place, row in zip(going, ids, strict=True))

        last_ids = [(prompts[place] + written[place])[-1] for place in going]
        starts = [width - len(prompts[place]) for place in going]
        for place, ids in zip(going, decoder.write(last_ids, starts, more, all_ended), strict=True):
            written[place] += ids
        left = [i for i, place in enumerate(going) if end_of(written[place]) is None]
        bar.update(len(going) - len(left))
        if not left:
            break
    decoder.layers = []
    bar.update(len(left))
    return [(loss, row[: end_of(row)]) for loss, row in zip(nll, written, strict=True)]


def in_halves(model, prompts, completions, *options, bar):
    """test_rows, of half the rows at a time where GPU memory ends."""
    before = bar.n
    try:
        return test_rows(model, prompts, completions, *options, bar)
    except (torch.OutOfMemoryError, torch.AcceleratorError) as error:  # the latter from a graph
        if not out_of_memory(error):
            raise
        if len(prompts) == 1:
            reason = f"one row is too much for the GPU's memory ({first_line(error)})"
            fail(f"{reason}: try --load-in-4bit", in_any_process=True)
    model.greedy_decoder.clear()
    torch.cuda.empty_cache()
    say(f"{len(prompts)} rows are too much for the GPU's memory: halved; try a lower --max-batch-tokens")
    bar.n, middle = before, len(prompts) // 2
    first = in_halves(model, prompts[:middle], completions[:middle], *options, bar=bar)
    return first + in_halves(model, prompts[middle:], completions[middle:], *options, bar=bar)


def answer_end(tokenizer, ends, one_line):
    """The function that a prediction's ids go to: how many go to its end, that one included, or None.

    ends: ids that end a text. one_line: a line's end does, too, behind something that is not blank.
    """
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    decode = functools.cache(lambda token: tokenizer.decode([token], **options))

    def end_of(ids):
        blank = True
        for length, token in enumerate(ids, 1):
            text = decode(token) if one_line else ""
            if token in ends or "\n" in (text.lstrip() if blank else text):
                return length
            blank = blank and not text.strip()

    return end_of


def test_batch(model, tokenizer, rows, attention, new, ends, one_line, bar):
    """What is known of each row after it, under the names of the predictions file."""
    prompts = [row["prompt_ids"] for row in rows]
    completions = [row["completion_ids"] for row in rows]
    end_of = answer_end(tokenizer, ends, one_line)
    results = []
    tested = in_halves(model, prompts, completions, attention, new, end_of, bar=bar)
    for row, (nll, ids) in zip(rows, tested, strict=True):
        if not nll < MAX_NLL * len(row["completion_ids"]):  # NaN too
            reason = f"{row['id']} has a log-likelihood of {-nll}: the model diverged"
            fail(f"{reason}, train it again with a lower learning rate", in_any_process=True)
        kept = [token for token in ids if token not in ends]
        text = tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
        result = {"prediction": text.split("\n")[0].strip() if one_line else text, "nll": nll}
        results.append(result | {"new_tokens": len(ids), "hit_max_new_tokens": end_of(ids) is None})
    return results


def test_general_text(text, tokenizer, model, adapter_off, run):
    """{system: perplexity of the text, nll_sum (nats), tokens}"""
    model.set_attn_implementation(choose_attention("packed"))
    ids = tokenizer(text, split_special_tokens=True, verbose=False).input_ids
    front = ids[:1] if ids[0] == tokenizer.bos_token_id else []  # of each window
    step = min(WINDOW, model.config.max_position_embeddings) - len(front)
    parts = [front + ids[start : start + step] for start in range(len(front), len(ids), step)]
    parts = [part for part in parts if len(part) > 1]
    figures, tokens = {}, sum(len(part) - 1 for part in parts)
    if not tokens:
        fail("the text of --general-text is too short: it has a single token")
    for system, prefix in predictions.systems(run).items():
        with adapter_off() if prefix else contextlib.nullcontext(), torch.inference_mode():
            nll = sum(losses_of(*read(model, [part[:1]], [part[1:]])).sum().item() for part in parts)
        if not nll < MAX_NLL * tokens:  # NaN too
            fail(f"the general text has a log-likelihood of {-nll}: the {system} model diverged")
        figures[system] = {"perplexity": math.exp(nll / tokens), "nll_sum": nll, "tokens": tokens}
    return figures
