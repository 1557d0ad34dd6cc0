"""Perplexity and greedy predictions are those of transformers, in whatever batches."""

import contextlib
import json
import math
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import FIXTURES, copied, test
from datasets import DatasetDict, load_from_disk
from test_testing import base_of, column, prompts_of, read, same_columns
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import test_llama as tester
from pipeline import machine, models
from pipeline.attention import choose_attention
from pipeline.files import rows_of
from pipeline.testing import decoding, predictions
from pipeline.testing.decoder import Decoder
from pipeline.tokens import end_tokens, load_tokenizer

TASKS = ("samsum", "trivia_qa")
BOTH = pytest.mark.parametrize("name", ["tiny_llama3", "tiny_llama2"])
ONE = pytest.mark.parametrize("chain", ["tiny_llama3"], indirect=True)
SHORT = ["--samsum-max-new-tokens", "8"]


def test_perplexity_is_that_of_transformers_own_loss_row_by_row_whatever_the_batch_budget(
    chain, tmp_path, monkeypatch
):
    out = copied(chain, tmp_path, predictions=True)
    for budget in (1, 700):
        assert test(out, *SHORT, "--max-batch-tokens", budget, "--name", budget) == 0
    monkeypatch.setattr(tester, "choose_attention", lambda name: "sdpa")  # an old GPU, without packed attention
    assert test(out, *SHORT, "--name", "sdpa") == 0
    tokenizer, data = prompts_of(base_of(chain), chain)
    model = models.load_adapter(models.load_model(base_of(chain), load_in_4bit=True), chain / "adapter")
    for task in TASKS:
        losses, bases, counts, text = [], [], [], ""
        for row in rows_of(data, task):
            prompt = tokenizer(row["prompt"]).input_ids
            ids = tokenizer(row["prompt"] + row["completion"]).input_ids + [tokenizer.eos_token_id]
            labels = [-100] * len(prompt) + ids[len(prompt) :]
            inputs = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}
            counts.append(len(ids) - len(prompt))
            text += row["completion"]
            with torch.inference_mode():
                losses.append(model(**inputs).loss.item() * counts[-1])
                with model.disable_adapter():
                    bases.append(model(**inputs).loss.item() * counts[-1])
        for name in ("", "_1", "_700", "_sdpa"):
            for system, prefix, expected in (("tuned", "", losses), ("base", "base_", bases)):
                figures = read(out, task, name)["perplexity"][system]
                assert column(out, task, prefix + "nll", name) == pytest.approx(expected, rel=1e-5)
                assert figures["perplexity"] == pytest.approx(math.exp(sum(expected) / sum(counts)), rel=1e-4)
                bits = sum(expected) / math.log(2) / len(text.encode())
                assert figures["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
                assert figures["tokens"] == sum(counts) and figures["examples"] == len(counts)
            assert sum(losses) != sum(bases) and column(out, task, "tokens", name) == counts
            same_columns(out, out, "prediction", "base_prediction", name=name)


def test_figures_of_a_case_done_by_hand():
    rows = [{"nll": nats * math.log(2), "tokens": tokens} for nats, tokens in ((6, 3), (2, 1))]
    rows = [row | {"hit_max_new_tokens": row["tokens"] == 1} for row in rows]
    figures = predictions.perplexity(rows, "", [" two wörds", " one"])  # 11 bytes and 4
    assert figures["perplexity"] == pytest.approx(4) and figures["hit_max_new_tokens"] == 1
    assert figures["bits_per_byte"] == pytest.approx(8 / 15)
    assert figures["word_perplexity"] == pytest.approx(2 ** (8 / 3))


@BOTH
def test_a_model_that_knows_nothing_has_the_vocabulary_size_as_perplexity(name):
    model = models.load_model(str(FIXTURES / name), load_in_4bit=False)
    model.get_output_embeddings().weight.data.zero_()
    choose_attention("packed")  # registers it
    with torch.inference_mode():
        nll, _ = decoding.read_rows(model, [[1, 5, 6], [1, 5]], [[7, 8], list(range(3, 1003))], "packed")
    assert math.exp(sum(nll) / 1002) == pytest.approx(model.config.vocab_size, rel=1e-6)


def generated(model, prompts, new, ends):
    """What transformers' generate writes behind each prompt alone, its end included."""
    options = {"do_sample": False, "max_new_tokens": new, "eos_token_id": sorted(ends), "pad_token_id": 0}
    alone = [model.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p)), **options) for p in prompts]
    return [ids[0, len(prompt) :].tolist() for ids, prompt in zip(alone, prompts, strict=True)]


def test_a_row_in_a_batch_is_predicted_and_scored_as_alone_and_as_by_generate(chain, monkeypatch):
    base = base_of(chain)
    model, _ = decoding.load_system(base, chain / "adapter", True, compare=True)
    tokenizer, data = prompts_of(base, chain)
    choose_attention("packed")  # registers it
    prompts = tokenizer(list(data["prompt"])).input_ids
    prompts += [sum(prompts[:6], []), prompts[0][:3], prompts[1][:2], prompts[0][:1]]
    completions = [prompts[(i + 1) % 12][1 : 2 + 3 * i] for i in range(len(prompts))]
    ends = {tokenizer.eos_token_id, *tokenizer("a e s. , ? and the Tom").input_ids[1:]}  # else random models go on
    end_of = decoding.answer_end(tokenizer, ends, one_line=False)
    assert len({len(p) for p in prompts}) > 10 and max(map(len, prompts)) > 60 * min(map(len, prompts))
    write, sizes, ended = model.greedy_decoder.write, [], []
    bar = SimpleNamespace(update=ended.append)
    monkeypatch.setattr(model.greedy_decoder, "write", lambda ids, *rest: sizes.append(len(ids)) or write(ids, *rest))
    with torch.inference_mode():
        together = decoding.test_rows(model, prompts, completions, "packed", 24, end_of, bar)
        assert sum(ended) == len(prompts) and len(ended) > 1  # the bar moves as rows end, not at the batch's end
        sizes.clear()
        monkeypatch.setattr(decoding, "STRIDE", 3)
        monkeypatch.setattr(decoding, "READ_TOKENS", 100)
        often = decoding.test_rows(model, prompts, completions, "packed", 23, end_of, bar)
        assert sizes == sorted(sizes)[::-1] and len(set(sizes)) > 2  # rows that have ended are left out
        pairs, steps, step = zip(prompts, completions, strict=True), [], model.greedy_decoder.step
        monkeypatch.setattr(model.greedy_decoder, "step", lambda: steps.append(1) or step())
        alone = [decoding.test_rows(model, [p], [c], "packed", 24, end_of, bar)[0] for p, c in pairs]
        expected = generated(model, prompts, 24, ends)
    assert len({len(ids) for ids in expected}) > 2  # rows leave the batch at different times
    assert [ids for _, ids in together] == [ids for _, ids in alone] == expected
    assert [ids for _, ids in often] == [ids[:23] for ids in expected]
    assert len(steps) == sum(map(len, expected))  # none is behind an end
    assert [nll for nll, _ in together] == pytest.approx([nll for nll, _ in alone], rel=1e-5)


class Tape(TorchDispatchMode):
    """In place of a torch.cuda.CUDAGraph: a capture's operations, which a replay repeats on the very same tensors.

    As on a GPU, what Python decided at the capture remains, and Python cannot ask for a number.
    """

    def __init__(self):
        super().__init__()
        self.operations, self.replays = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        if not all(isinstance(part, torch.Tensor) for part in tree_leaves(out)):
            raise RuntimeError("operation not permitted when stream is capturing")
        self.operations.append((function, args, kwargs or {}, out))
        return out

    def replay(self):
        self.replays += 1
        for function, args, kwargs, out in self.operations:
            for old, new in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():  # neither a view nor in place
                    old.copy_(new)

    def pool(self):
        return "pool"


@pytest.fixture
def captures(chain, monkeypatch):
    """A model whose steps are captured, a function that switches its adapter off, and the Tapes that it has made."""
    model, adapter_off = decoding.load_system(base_of(chain), chain / "adapter", True, compare=True)
    decoder, tapes = model.greedy_decoder, []
    decoder.captures = True

    def graph(tape, pool, capture_error_mode):
        context = capturing(tape)
        context.capture_stream = stream
        return context

    @contextlib.contextmanager
    def capturing(tape):
        kept = [(tensor, tensor.clone()) for tensor in (decoder.place, *decoder.inputs.values())]
        try:
            with tape:
                yield
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904, as torch does
        finally:
            for tensor, value in kept:  # a capture computes nothing
                tensor.copy_(value)
        tapes.append(tape)

    stream = SimpleNamespace(wait_stream=lambda other: None)
    fakes = {"CUDAGraph": Tape, "graph": graph, "stream": contextlib.nullcontext, "graph_pool_handle": lambda: "pool"}
    fakes |= {"current_stream": lambda: stream, "current_device": lambda: 0}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    yield model, adapter_off, tapes


def some_prompts(chain):
    """Prompts of 3 to 240 tokens, tokens at which random models end, and the tokenizer."""
    tokenizer, data = prompts_of(base_of(chain), chain)
    choose_attention("packed")  # registers it
    ids = sum(tokenizer(list(data["prompt"])).input_ids, [])
    prompts = [ids[5 * length : 6 * length] for length in (240, 90, 41, 17, 8, 3)]
    return prompts, {tokenizer.eos_token_id, *tokenizer("a e s. , ? and the Tom").input_ids[1:]}, tokenizer


def decoded(model, prompts, new, ends, tokenizer):
    """The same by in_halves."""
    end_of, bar = decoding.answer_end(tokenizer, ends, one_line=False), SimpleNamespace(update=lambda n: None, n=0)
    rows = decoding.in_halves(model, prompts, [[5]] * len(prompts), "packed", new, end_of, bar=bar)
    return [ids for _, ids in rows]


def strides(rows, texts, off):
    """(rows rounded, places rounded, adapter off) of each stride of a batch of prompts that writes these texts."""
    for written in (16, 32, 40):
        if going := sum(len(ids) > written - (16 if written < 40 else 8) for ids in texts):
            places = max(map(len, rows)) - 1 + written
            yield next(size for size in (1, 2, 4, 8) if size >= going), 256 if places <= 256 else 512, off


def test_captured_steps_write_what_generate_writes_with_the_adapter_and_without_in_turn(captures, chain):
    model, adapter_off, tapes = captures
    prompts, ends, tokenizer = some_prompts(chain)
    found, steps = set(), 0
    with torch.inference_mode():
        for turn, rows in enumerate((prompts[1:4], prompts, prompts[:5], prompts)):
            if turn == 1:  # it needs more memory, and what was captured goes
                found = set()
            texts = {}
            for off, switch in ((False, contextlib.nullcontext), (True, adapter_off), (False, contextlib.nullcontext)):
                for memory in model.greedy_decoder.memory.values():
                    memory.fill_(math.nan)  # as of another batch, whose numbers ran over
                with switch():
                    texts[off] = generated(model, rows, 40, ends)
                    assert decoded(model, rows, 40, ends, tokenizer) == texts[off]
                found |= set(strides(rows, texts[off], off))
                steps += sum(min(16, 40 - start) for start in (0, 16, 32) if max(map(len, texts[off])) > start)
                assert set(model.greedy_decoder.graphs) == found
                assert sum(tape.replays for tape in tapes) + len(tapes) == steps  # the first of each is the warm-up
            assert texts[False] != texts[True]
    assert {places for _, places, _ in found} == {256, 512} and len(tapes) < steps / 8
    assert len({len(ids) % 16 for ids in texts[False]}) > 2 and len({size for size, *_ in found}) > 1


def test_no_more_graphs_are_kept_than_max_graphs(captures, chain, monkeypatch):
    monkeypatch.setattr("pipeline.testing.decoder.MAX_GRAPHS", 2)
    model, _, tapes = captures
    prompts, _, tokenizer = some_prompts(chain)
    ends = {tokenizer.eos_token_id}  # nearly all go on to the last token
    with torch.inference_mode():
        for rows in (prompts, prompts[3:], prompts):
            assert decoded(model, rows, 40, ends, tokenizer) == generated(model, rows, 40, ends)
            assert len(model.greedy_decoder.graphs) == 2
            assert list(model.greedy_decoder.graphs.values()) == tapes[-2:]


def test_where_a_step_cannot_be_captured_it_runs_as_it_is_and_that_is_said_once(captures, chain, monkeypatch, capsys):
    model, _, tapes = captures
    decoder, ended, (prompts, ends, tokenizer) = model.greedy_decoder, [], some_prompts(chain)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *pool: ended.append(pool), raising=False)
    step = decoder.step
    with torch.inference_mode():
        decoded(model, prompts, 40, ends, tokenizer)
        assert tapes and "captured" not in capsys.readouterr().out
        monkeypatch.setattr(decoder, "step", lambda: step() or decoder.place.item())  # Python asks for a number
        for rows in (prompts[3:], prompts):
            assert decoded(model, rows, 40, ends, tokenizer) == generated(model, rows, 40, ends)
            assert not decoder.graphs and not decoder.memory
    said = capsys.readouterr().out
    assert said.count("cannot be captured") == 1 and "(operation not permitted when stream is capturing)" in said
    assert ended == [(0, "pool")]


@pytest.mark.parametrize("where", ["capture", "replay"])
def test_memory_that_ends_at_a_graph_halves_the_batch(where, captures, chain, monkeypatch, capsys):
    model, _, tapes = captures
    decoder, left, (prompts, ends, tokenizer) = model.greedy_decoder, [], some_prompts(chain)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *pool: None, raising=False)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: left.append([*decoder.memory, *decoder.graphs]))
    enter, replay = Tape.__enter__, Tape.replay

    def capture_small(tape):
        if decoder.layers[0].shape[1] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return enter(tape)

    def replay_small(tape):
        if decoder.layers[0].shape[1] > 4:
            raise torch.AcceleratorError("CUDA error: out of memory")
        replay(tape)

    if where == "capture":
        monkeypatch.setattr(Tape, "__enter__", capture_small)
    else:
        monkeypatch.setattr(Tape, "replay", replay_small)
    with torch.inference_mode():
        assert decoded(model, prompts, 40, ends, tokenizer) == generated(model, prompts, 40, ends)
    assert capsys.readouterr().out.count("halved") == 1 and tapes and left == [[]]


def test_another_error_of_a_graph_is_no_lack_of_memory(captures, chain, monkeypatch):
    def replay(tape):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Tape, "replay", replay)
    prompts, ends, tokenizer = some_prompts(chain)
    with torch.inference_mode(), pytest.raises(torch.AcceleratorError, match="illegal"):
        decoded(captures[0], prompts, 40, ends, tokenizer)


def test_batches_hold_every_row_once_and_no_more_than_their_budget(monkeypatch):
    lengths = [random.Random(0).randint(2, 400) for _ in range(200)] + [5000]
    ids = [{"place": i, "prompt_ids": [1] * (length - 1), "completion_ids": [1]} for i, length in enumerate(lengths)]
    monkeypatch.setattr(predictions, "encoded", lambda tokenizer, rows, shots: rows)
    found = tester.plan("samsum", ids, None, 1, 5000, 2000)
    assert sorted(row["place"] for batch in found for row in batch) == list(range(201))
    assert all(row["length"] == lengths[row["place"]] for batch in found for row in batch)
    assert all(len(batch) * max(row["length"] for row in batch) <= 2000 for batch in found if len(batch) > 1)
    assert found[0][0]["length"] == 5000 and len(found) < 40


@ONE
def test_an_answer_ends_at_the_line_and_keeps_what_shares_its_last_token(chain, out, monkeypatch):
    tokenizer = load_tokenizer(str(chain / "adapter"))
    ends = end_tokens(base_of(chain), tokenizer)
    assert {tokenizer.convert_tokens_to_ids(t) for t in ("<|end_of_text|>", "<|eot_id|>")} <= ends
    last = next(i for i in range(len(tokenizer)) if tokenizer.decode([i]).startswith(".\n"))
    name, more = tokenizer([" Lydbrook", " more"], add_special_tokens=False).input_ids
    ids = [*name, last, *more, last]
    monkeypatch.setattr(decoding, "test_rows", lambda model, prompts, *rest: [(1.0, ids) for _ in prompts])
    limits = ["--trivia-qa-max-new-tokens", len(ids), "--samsum-max-new-tokens", len(ids)]
    assert test(out, *limits) == 0
    assert set(column(out, "trivia_qa", "prediction")) == {"Lydbrook."}
    assert not any(column(out, "trivia_qa", "hit_max_new_tokens"))  # it ended with the last token it was allowed
    assert all(column(out, "samsum", "hit_max_new_tokens"))  # a summary does not end with a line


@ONE
def test_where_an_answer_ends_is_read_as_the_rows_were_built_whatever_todays_task_says(
    chain, out, monkeypatch, refused
):
    tokenizer = load_tokenizer(str(chain / "adapter"))
    ids = tokenizer("Paris\nand on", add_special_tokens=False).input_ids
    monkeypatch.setattr(decoding, "test_rows", lambda model, prompts, *rest: [(1.0, ids) for _ in prompts])
    limits = ["--trivia-qa-max-new-tokens", len(ids), "--samsum-max-new-tokens", len(ids)]
    path = out / "dataset" / "tasks.json"
    for ends in ({"samsum": True, "trivia_qa": False}, {"samsum": False, "trivia_qa": True}):
        path.write_text(json.dumps({task: {"prompt": "", "one_line": one_line} for task, one_line in ends.items()}))
        assert test(out, *limits, "--overwrite") == 0
        for task, one_line in ends.items():
            assert set(column(out, task, "prediction")) == {"Paris" if one_line else "Paris\nand on"}
            assert set(column(out, task, "hit_max_new_tokens")) == {not one_line}
    path.write_text('{"samsum": {"prompt": ""}}')
    assert "cannot use the prompt of samsum" in refused(out, *limits, "--overwrite")
    path.unlink()  # an older data set: as the tasks are today
    assert test(out, *limits, "--overwrite") == 0
    assert set(column(out, "trivia_qa", "prediction")) == {"Paris"}
    assert set(column(out, "samsum", "prediction")) == {"Paris\nand on"}


@pytest.mark.parametrize("name", ["tiny_llama3", "tiny_llama2"])
@pytest.mark.parametrize(
    "front, answer",
    [("\n\n", "Paris"), (" \n \n", "Paris."), ("\n", ". Paris"), ("", "Paris is"), (" ", "Paris")],
)
def test_line_ends_in_front_of_an_answer_do_not_end_it(name, front, answer):
    tokenizer = load_tokenizer(str(FIXTURES / name))
    ids, behind = (tokenizer(text, add_special_tokens=False).input_ids for text in (front + answer + "\n", "and on"))
    end_of = decoding.answer_end(tokenizer, {tokenizer.eos_token_id}, one_line=True)
    length = end_of(ids + behind)
    assert tokenizer.decode(ids[:length]).strip() == answer and "\n" in tokenizer.decode(ids[length - 1 : length])
    assert all(end_of(ids[:i]) is None for i in range(length))
    assert end_of([*ids[:1], tokenizer.eos_token_id]) in (1, 2)  # an end token ends it anywhere
    assert end_of([tokenizer.eos_token_id]) == 1
    summary = decoding.answer_end(tokenizer, {tokenizer.eos_token_id}, one_line=False)
    assert summary(ids + behind) is None and summary([*ids, tokenizer.eos_token_id]) == len(ids) + 1


@ONE
def test_a_model_that_begins_with_a_line_end_is_read_on_and_empty_predictions_are_counted(chain, out, monkeypatch):
    """The model's own greedy answers, in front of which each row is made to write two line ends, or only these."""
    assert test(out) == 0
    plain = column(out, "trivia_qa", "prediction")
    tokenizer = load_tokenizer(str(chain / "adapter"))
    [line_end] = tokenizer("\n", add_special_tokens=False).input_ids
    step, begin = Decoder.step, Decoder.begin
    first, talks = [0], True

    def begin_counting(decoder, layers, new):
        first[0] = layers[0][0].shape[2]
        begin(decoder, layers, new)

    def after_line_ends(decoder):
        """Line ends first; then, where `talks`, what the model writes behind them."""
        step(decoder)
        if decoder.place - first[0] <= 2 or not talks:
            decoder.inputs[decoder.layers[0].shape[1]][0] = line_end

    monkeypatch.setattr(Decoder, "begin", begin_counting)
    monkeypatch.setattr(Decoder, "step", after_line_ends)
    assert test(out, "--overwrite") == 0
    assert sum(map(bool, column(out, "trivia_qa", "prediction"))) >= sum(map(bool, plain)) > 0
    talks = False
    assert test(out, "--overwrite", "--trivia-qa-max-new-tokens", 20) == 0
    figures = read(out, "trivia_qa")["perplexity"]["tuned"]
    rows = len(column(out, "trivia_qa", "prediction"))
    assert figures["empty_predictions"] == figures["hit_max_new_tokens"] == rows > 0


@ONE
def test_a_batch_too_large_for_memory_is_halved_and_a_row_too_large_is_said(chain, out, monkeypatch, refused):
    test_rows, sizes = decoding.test_rows, []

    def small(model, prompts, *rest, limit=2):
        sizes.append(len(prompts))
        if len(prompts) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return test_rows(model, prompts, *rest)

    monkeypatch.setattr(decoding, "test_rows", small)
    assert test(out, *SHORT) == 0
    assert max(sizes) == 6 and sizes.count(2) + sizes.count(1) > 6
    same_columns(out, chain, "prediction")
    same_columns(out, chain, "nll", rel=1e-5)
    monkeypatch.setattr(decoding, "test_rows", lambda *rest: small(*rest, limit=0))
    assert "one row is too much for the GPU's memory" in refused(out, *SHORT, "--overwrite")


SHOTS = ["--adapter", "none", "--shots", 3, "--name", "shots", "--samsum-max-new-tokens", 40]


@ONE
def test_behind_plain_examples_an_answer_ends_at_its_line_unless_answers_in_train_have_several(
    chain, out, tmp_path, monkeypatch, capsys
):
    tokenizer = load_tokenizer(str(chain / "adapter"))
    ids = tokenizer("Paris\n\nSummarise this", add_special_tokens=False).input_ids
    monkeypatch.setattr(decoding, "test_rows", lambda model, prompts, *rest: [(1.0, ids) for _ in prompts])
    assert test(out, *SHOTS) == 0 and "run on into" not in capsys.readouterr().out
    assert set(column(out, "samsum", "prediction", "_shots")) == {"Paris"}
    data = load_from_disk(str(out / "dataset"))
    lines = data["train"].map(lambda row: {"completion": row["completion"].replace(". ", ".\n")})
    assert any("\n" in row["completion"] for row in rows_of(lines, "samsum"))
    other = tmp_path / "other"
    DatasetDict(data | {"train": lines}).save_to_disk(str(other / "dataset"))
    shutil.copy(out / "dataset" / "tasks.json", other / "dataset")
    assert test(other, *SHOTS, "--model", base_of(chain)) == 0
    assert "samsum: its answers have several lines" in capsys.readouterr().out
    assert set(column(other, "samsum", "prediction", "_shots")) == {"Paris\n\nSummarise this"}
    assert set(column(other, "trivia_qa", "prediction", "_shots")) == {"Paris"}


def test_unpacking_the_4_bit_weights_once_changes_no_number(chain, monkeypatch):
    base, ids = models.read_adapter(chain / "adapter"), torch.arange(20, 60)[None]
    unpacked, _ = decoding.load_system(base, chain / "adapter", True, compare=True)
    need = 4 * unpacked.num_parameters()  # bytes, unpacked in float32, in half of what this process can have
    for free, room in ((2 * need, False), (2.1 * need, True)):
        monkeypatch.setattr(machine, "host_memory", lambda free=free: free)
        assert decoding.has_room(unpacked) is room
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # each process unpacks its own
    assert not decoding.has_room(unpacked)
    packed, _ = decoding.load_system(base, chain / "adapter", True, compare=True)
    kinds = [{type(module).__name__ for module in model.modules()} for model in (packed, unpacked)]
    assert any("4bit" in name for name in kinds[0]) and not any("4bit" in name for name in kinds[1])
    with torch.no_grad():
        assert torch.equal(packed(input_ids=ids).logits, unpacked(input_ids=ids).logits)


@pytest.mark.parametrize("free, room", [(19e9, False), (34e9, True)])  # of 24 and 40 GB, 8B in 4 bit taken off
def test_a_gpu_gets_unpacked_weights_only_where_a_batch_fits_beside_them(free, room, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80e9))
    assert decoding.has_room(SimpleNamespace(num_parameters=lambda: 8.03e9, device="cuda:0")) is room
