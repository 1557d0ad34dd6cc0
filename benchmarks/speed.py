"""What gpu.py measures of its own trainers and of its peers alike, each a Trainer of transformers."""

import statistics
import time
import traceback

import torch
from transformers import TrainerCallback

WARM_UP = 3  # optimizer steps that are not counted: kernels are compiled in them, and memory is allocated
useful = [0]  # tokens of all batches so far, without the padding at the end of rows


def counted(step):
    """A trainer class's training_step that adds the batch's tokens to `useful`, without waiting for the GPU."""

    def training_step(self, model, inputs, *more, **options):
        ids, pad = inputs["input_ids"], self.processing_class.pad_token_id
        padding = (ids.flip(-1) != pad).int().cumsum(-1) == 0  # at most an end of a text too many
        useful[0] += ids.numel() - padding.sum()
        return step(self, model, inputs, *more, **options)

    return training_step


def mean_loss(model, rows):
    """Nats per labelled token of the rows, each alone, by a model of transformers."""
    total = count = 0
    for row in rows:
        ids, labels = (torch.tensor([row[name]], device=model.device) for name in ("input_ids", "labels"))
        labelled = int((labels[:, 1:] != -100).sum())
        with torch.no_grad(), torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
            total += float(model(input_ids=ids, labels=labels, use_cache=False).loss) * labelled
        count += labelled
    return total / count


def now():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Speed(TrainerCallback):
    """`found`: useful tokens of a step over its time, peak memory, and the loss on `rows` after the last step."""

    def __init__(self, rows=(), loss=mean_loss):
        self.rows, self.loss, self.speeds, self.losses, self.found = rows, loss, [], [], {}

    def on_train_begin(self, *args, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_step_begin(self, *args, **kwargs):
        self.before, self.began = int(useful[0]), now()

    def on_step_end(self, *args, **kwargs):
        seconds = now() - self.began
        self.speeds.append((int(useful[0]) - self.before) / seconds)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(round(float(logs["loss"]), 4))

    def on_train_end(self, args, state, control, model=None, **kwargs):
        counted_steps = self.speeds[WARM_UP:] or self.speeds[-1:]
        self.found = {"tokens_per_second": statistics.median(counted_steps), "losses": self.losses}
        if torch.cuda.is_available():
            self.found["peak_allocated_gb"] = torch.cuda.max_memory_allocated() / 1e9
            self.found["peak_reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
        try:
            if self.rows:
                self.found["loss"] = self.loss(model, self.rows)
        except Exception as error:  # the speed is known all the same
            traceback.print_exc()
            self.found["loss_error"] = f"{type(error).__name__}: {error}"[:300]
