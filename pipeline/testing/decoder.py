"""One new token for every row of a batch: keys and values that stay in place, and on CUDA a captured step."""

import contextlib
import math

import torch

from pipeline.script import first_line, out_of_memory, say

LENGTH_STEP = 256  # captured steps are for a multiple of this many places
MAX_GRAPHS = 32  # captured steps that are kept


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
    graph, pool = torch.cuda.CUDAGraph(), graphs[0].pool() if graphs else torch.cuda.graph_pool_handle()
    capturing = torch.cuda.graph(graph, pool, capture_error_mode="thread_local")  # whatever other threads do
    side, current = capturing.capture_stream, torch.cuda.current_stream()  # torch's own, the same for all captures
    side.wait_stream(current)
    try:
        with torch.cuda.stream(side):  # also around the capture: one that fails does not put the stream back
            step()  # what a first call sets up cannot be captured
            try:  # a step's temporary tensors are all that is in the pool: graphs that take turns can share it
                with capturing:  # waits for the GPU
                    step()
                return graph
            except RuntimeError as error:
                # a capture that cannot be ended would leave empty_cache() failing in torch 2.13
                with contextlib.suppress(RuntimeError, AttributeError):
                    torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
                error = error.__context__ or error  # else that the capture has failed
                if out_of_memory(error):
                    raise error
                say(f"a step cannot be captured as a CUDA graph, so decoding takes longer ({first_line(error)})")
    finally:
        current.wait_stream(side)
