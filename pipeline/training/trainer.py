"""The training step: TRL's SFTTrainer with this project's loss, validation, log and checkpoints; all else is TRL's."""

import json
import math
import shutil
import signal
import time
from datetime import timedelta
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.nn.functional import cross_entropy
from transformers import PrinterCallback, Trainer, TrainerCallback
from trl import SFTTrainer

from pipeline.files import write_manifest, write_whole
from pipeline.machine import peak_memory
from pipeline.script import fail, first_line, is_main, say
from pipeline.training.estimate import labelled


class QLoRATrainer(SFTTrainer):
    """Trains on packed sequences, validates on {task: packed sequences}.

    run: what the checkpoints belong to. seconds: what earlier sessions of this run took. patience: validations
    without a lower loss after which training ends; 0 = never. save_minutes: between checkpoints; 0 = never by time.
    """

    def __init__(self, *args, run, seconds, patience, save_minutes, **kwargs):
        super().__init__(*args, **kwargs)
        self.run, self.seconds, self.patience, self.save_minutes = run, seconds, patience, save_minutes
        self.tokens, self.stop_signal = 0, None
        self.remove_callback(PrinterCallback)
        self.add_callback(Watch(self))
        config = self.model.peft_config["default"]
        config.target_modules = sorted(config.target_modules)  # a set would be saved in any order
        for parameter in self.model.parameters():
            if parameter.requires_grad:  # TRL makes them bf16, in which small updates are lost
                parameter.data = parameter.data.float()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The training loss: a mean over the labelled tokens of the whole accumulated batch of all processes."""
        self.tokens += inputs["input_ids"].numel()
        total, count = summed_loss(model, inputs)
        count = count if num_items_in_batch is None else num_items_in_batch
        return total / count * self.accelerator.num_processes  # DDP divides the gradients by it

    def floating_point_ops(self, inputs):  # the Trainer would walk the model for it at every pass
        return 0

    def evaluate(self, *args, **kwargs):
        """Validation loss per task, nats per completion token over all its rows; their mean is eval_loss."""
        started = time.time()
        self.model_wrapped.eval()
        metrics = {f"eval_{task}_loss": self.validation_loss(rows) for task, rows in self.eval_dataset.items()}
        losses = ", ".join(f"{task} {metrics[f'eval_{task}_loss']:.4f}" for task in self.eval_dataset)
        metrics["eval_loss"] = sum(metrics.values()) / len(metrics)
        if not math.isfinite(metrics["eval_loss"]):  # none would be the best
            self.diverged(f"validation loss {losses}")
        best = self.state.best_metric is None or metrics["eval_loss"] < self.state.best_metric
        self.log(metrics)
        say(f"step {self.state.global_step:>5}  validation loss {losses}{' (best so far)' if best else ''}")
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.control.should_save |= best
        self.control.should_training_stop |= not best and out_of_patience(self.state, self.patience)
        self.mark += time.time() - started  # not training time
        return metrics

    def validation_loss(self, rows):
        """Mean negative log likelihood over the labelled tokens of `rows`, shared out among the processes."""
        world, sums = self.accelerator.num_processes, torch.zeros(2, dtype=torch.float64)
        for start in range(0, len(rows), world):  # every process as many passes, as FSDP needs
            mine = start + self.accelerator.process_index
            inputs = self._prepare_inputs(self.data_collator([rows[min(mine, len(rows) - 1)]]))
            with torch.no_grad(), self.compute_loss_context_manager():
                total, count = summed_loss(self.model_wrapped, inputs)
            sums += torch.tensor([total.item(), count], dtype=torch.float64) * (mine < len(rows))
        total, count = self.accelerator.reduce(sums.to(self.args.device), "sum").tolist()
        return total / count

    def probe(self):
        """Pass over the longest rows and those with most labels: memory fails now or never. Seconds of the slower."""
        size, seconds = self.args.per_device_train_batch_size, []
        sizes = [(len(row), labelled(row)) for row in self.train_dataset["labels"]]
        longest = sorted(range(len(sizes)), key=lambda i: sizes[i])[-size:]
        most_labels = sorted(range(len(sizes)), key=lambda i: sizes[i][::-1])[-size:]
        own = [self.args.device] if self.args.device.type == "cuda" else []  # by default those of all GPUs
        self.model_wrapped.train()
        for batch in {tuple(sorted(longest)), tuple(sorted(most_labels))}:
            began = time.time()
            inputs = self._prepare_inputs(self.data_collator([self.train_dataset[i] for i in batch]))
            with torch.random.fork_rng(own), self.compute_loss_context_manager():
                self.accelerator.backward(self.compute_loss(self.model_wrapped, inputs))
            self.model_wrapped.zero_grad()
            seconds.append(time.time() - began)
        self.tokens = 0  # these do not count
        return max(seconds)

    def all_tokens(self):
        """Tokens trained on so far, by all processes and sessions."""
        tokens = torch.tensor(self.tokens, device=self.args.device)
        return self._initial_num_input_tokens_seen + int(self.accelerator.reduce(tokens, "sum"))

    def log(self, logs, start_time=None):
        """Add tokens, speed and memory to a training entry, print it, and stop a run that learns nothing."""
        if "loss" not in logs:
            return super().log(logs, start_time)
        seen, self.state.num_input_tokens_seen = self.state.num_input_tokens_seen, self.all_tokens()
        speed = (self.state.num_input_tokens_seen - seen) / (time.time() - self.mark)
        logs |= {"tokens": self.state.num_input_tokens_seen, "tokens_per_second": speed, "memory_gb": peak_memory()}
        self.mark = time.time()
        super().log(logs, start_time)
        self.watch(logs)
        loss, norm, rate = (logs[name] for name in ("loss", "grad_norm", "learning_rate"))
        self.say_step(f"loss {loss:.4f}  grad {norm:.2f}  lr {rate:.1e}  {speed:,.0f} tokens/s ")

    def say_step(self, more=""):
        """The step that has ended, and the time left by those of this session."""
        step, last = self.state.global_step, self.state.max_steps
        left = (time.time() - self.started) / (step - self._initial_global_step) * (last - step)
        say(f"step {step:>5}/{last}  {more}{timedelta(seconds=round(left))} left")

    def watch(self, logs):
        """Stop a run that learns nothing, instead of letting it go on for hours."""
        scaler = self.accelerator.scaler  # in float16 it leaves out a step that overflows, and scales the loss down
        overflow = not math.isfinite(logs["grad_norm"]) and (scaler is None or scaler.get_scale() < 1)
        if not math.isfinite(logs["loss"]) or overflow:
            self.diverged(f"loss {logs['loss']:g}, gradient norm {logs['grad_norm']:g}")
        losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry][-3:]
        if losses == [0, 0, 0]:
            remedy = "nothing is learned; look at the completions of the data set, or try --no-load-in-4bit"
            fail(f"the loss was exactly 0 three times up to step {self.state.global_step}: {remedy}")

    def diverged(self, what):
        remedy = "lower --learning-rate or raise --warmup-steps and start again with --overwrite"
        kept = "older checkpoints and adapter stay"
        fail(f"training diverged at step {self.state.global_step} ({what}): {remedy}; {kept}")

    def is_save_due(self):
        return 0 < self.save_minutes <= (time.time() - self.saved) / 60

    def _save(self, output_dir=None, state_dict=None):
        """Of a model save the adapter alone: the Trainer would add the tokenizer and a pickle of its arguments."""
        if self.args.should_save:  # for embeddings, PEFT's default asks the hub whether the vocabulary has grown
            self.model.save_pretrained(output_dir, state_dict=state_dict, save_embedding_layers=False)

    def _save_checkpoint(self, model, trial):
        """The Trainer's checkpoint, then the manifest that makes it count."""
        started = time.time()
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if not all(p.isfinite().all() for p in self.model.parameters() if p.requires_grad):
            self.diverged("a weight is no number")
        self.state.num_input_tokens_seen = self.all_tokens()
        try:
            if is_main():
                shutil.rmtree(folder, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            Trainer._save_checkpoint(self, model, trial)  # TRL's adds a model card
            self.accelerator.wait_for_everyone()
            if is_main():
                write_manifest(folder, {"run": self.run, "seconds": self.seconds + started - self.started})
        except (OSError, RuntimeError, SafetensorError) as error:  # torch's and safetensors' for a full disk
            remedy = "make room, then give the same command again; the checkpoints before it are whole"
            fail(f"cannot write {folder} ({first_line(error)}): {remedy}", in_any_process=True)
        self.saved = time.time()
        self.mark += self.saved - started


def summed_loss(model, inputs):
    """Negative log likelihood (nats) of the labelled tokens of a flattened batch, and how many those are."""
    labels = inputs["labels"][0, 1:]
    kept = (labels != -100).nonzero()[:, 0]
    inputs = {key: value for key, value in inputs.items() if key != "labels"}
    # those of a tenth of the tokens: TRL's loss makes all of them on a CPU
    logits = model(**inputs, logits_to_keep=kept, use_cache=False).logits[0]
    return cross_entropy(logits.float(), labels[kept], reduction="sum"), len(kept)


def out_of_patience(state, patience):
    """Whether so many validations went by without a lower loss."""
    steps = [entry["step"] for entry in state.log_history if "eval_loss" in entry]
    since_best = sum(step > state.best_global_step for step in steps) if state.best_global_step else 0
    return 0 < patience <= since_best


def log_lines(history):
    """The losses in a log, as lines of JSON, keys sorted as those that a checkpoint gave back."""
    losses = [entry for entry in history if "loss" in entry or "eval_loss" in entry]
    return "".join(json.dumps(entry, sort_keys=True) + "\n" for entry in losses)


class Watch(TrainerCallback):
    """Where training begins, where a step ends, and where something is logged."""

    def __init__(self, trainer):
        self.trainer, self.log = trainer, None

    def on_train_begin(self, args, state, control, **kwargs):
        seconds = self.trainer.probe()
        self.trainer.started = self.trainer.mark = self.trainer.saved = time.time()
        self.told = 0  # the first step is told
        if args.device.type == "cpu":  # where a step may take minutes; a GPU's first pass is slower than the others
            passes = (state.max_steps - state.global_step) * args.gradient_accumulation_steps
            left = timedelta(seconds=round(passes * seconds))
            say(f"{left} left at most, by a pass over the longest rows")
        self.log = Path(args.output_dir) / "log.jsonl"
        if is_main():  # without what a killed run logged after its last checkpoint
            write_whole(self.log, log_lines(state.log_history))

    def on_step_end(self, args, state, control, **kwargs):
        stop, due = self.trainer.stop_signal or 0, is_main() and self.trainer.is_save_due()
        if args.world_size > 1:  # all of them at the same step
            stop, due = self.trainer.accelerator.reduce(torch.tensor([stop, due], device=args.device), "sum").tolist()
        control.should_save |= bool(due)
        if stop and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
            self.trainer.stop_signal = self.trainer.stop_signal or signal.SIGTERM  # of another process
        # The Trainer's sum of losses is in no checkpoint: none may be taken within the span of a log entry.
        control.should_log |= control.should_save or control.should_evaluate
        if not control.should_log and time.time() - self.told > 60:
            self.told = time.time()
            self.trainer.say_step()

    def on_log(self, args, state, control, **kwargs):
        self.told = time.time()
        if is_main() and self.log:
            with self.log.open("a") as file:
                file.write(log_lines(state.log_history[-1:]))


def catch_signals(trainer):
    """A terminal's signals and a batch system's end the run after a checkpoint; a second one ends it at once."""

    def note(number, frame):
        trainer.stop_signal = number
        signal.signal(number, signal.SIG_DFL)
        say(f"{signal.Signals(number).name}: saving a checkpoint first")

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup has it ignored
            signal.signal(number, note)
