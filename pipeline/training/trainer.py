"""The training: TRL's SFTTrainer with this project's loss, validation, log and checkpoints; all else is TRL's."""

import json
import logging
import math
import signal
import time
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, set_seed
from transformers.integrations.liger import apply_liger_kernel
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from pipeline import lora, machine
from pipeline.attention import choose_attention
from pipeline.files import write_manifest, write_whole
from pipeline.script import duration, fail, first_line, is_main, out_of_memory, say
from pipeline.training import layer
from pipeline.training.estimate import SAVERS, labelled

# settings that TRL has by the same name
SAME_NAMES = ("num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate")
SAME_NAMES += ("warmup_steps", "logging_steps", "eval_steps", "save_steps", "report_to", "seed")


def lora_config(settings):
    return LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear" if settings.target_modules == ["all-linear"] else settings.target_modules,
        task_type="CAUSAL_LM",
    )


def sft_config(settings, fused):
    """TRL's settings of a run whose "auto" ones are settled; fused layers have checkpointing of their own."""
    cuda = torch.cuda.is_available()
    dtype = machine.compute_dtype()
    return SFTConfig(
        **{name: getattr(settings, name) for name in SAME_NAMES},
        output_dir=str(Path(settings.output_dir) / "checkpoints"),
        max_steps=settings.max_steps or -1,
        lr_scheduler_type="cosine",
        optim="adamw_torch_fused",  # 8-bit and paged ones save little of a LoRA's memory, and cost time
        dataset_kwargs={"skip_prepare_dataset": True},  # sequences come tokenised and packed
        activation_checkpointing=settings.activation_checkpointing == "on" and not fused,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=not cuda,
        logging_nan_inf_filter=False,  # it would hide them from watch
        eval_strategy="steps",
        metric_for_best_model="eval_loss",
        save_total_limit=settings.save_total_limit + 1,  # the newest one counts only after the oldest went
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=cuda,
        disable_tqdm=True,
    )


class QLoRATrainer(SFTTrainer):
    """Trains an adapter on packed sequences `train`, validates it on {task: packed sequences} `validation`.

    settings: train_llama.py's. fused: whether layers are those of layer.py. run: what the checkpoints belong to.
    seconds: what earlier sessions of this run took.
    """

    def __init__(self, settings, model, tokenizer, train, validation, fused=False, run=None, seconds=0.0):
        self.settings, self.run, self.seconds = settings, run, seconds
        self.tokens, self.stop_signal = 0, None
        model.set_attn_implementation(choose_attention(settings.attn_implementation))
        # the Trainer sorts checkpoints of one second by their numbers instead
        logging.getLogger("transformers.trainer_utils").addFilter(lambda record: "mtime" not in record.msg)
        if settings.use_liger_kernel == "on":  # but its loss, which would compute the logits of all tokens
            logging.getLogger("liger_kernel").setLevel(logging.ERROR)  # names each of its back ends that is not here
            apply_liger_kernel(model, {"fused_linear_cross_entropy": False})
        for config in (model.config, model.generation_config):  # or transformers would, with a word about it
            config.pad_token_id, config.bos_token_id = tokenizer.pad_token_id, tokenizer.bos_token_id
        set_seed(settings.seed)  # the adapter is drawn at random below
        super().__init__(
            model,
            sft_config(settings, fused),
            train_dataset=train,
            eval_dataset=validation,
            processing_class=tokenizer,
            data_collator=DataCollatorForLanguageModeling(tokenizer.pad_token_id, padding_free=True),
            peft_config=lora_config(settings),
        )
        self.remove_callback(PrinterCallback)
        self.add_callback(Watch(self))
        config = self.model.peft_config["default"]
        config.target_modules = sorted(config.target_modules)  # a set would be saved in any order
        for parameter in self.model.parameters():
            if parameter.requires_grad:  # TRL makes them bf16, in which small updates are lost
                parameter.data = parameter.data.float()
        if not settings.lora_dropout and not machine.under_fsdp():  # FSDP takes weights away before the backward pass
            lora.fuse_lora(self.model)
        layer.prepare(self.model, settings.activation_checkpointing, fused, settings.use_liger_kernel == "on")

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
        say(f"step {self.state.global_step:>5}  validation loss {losses}{' (best mean so far)' if best else ''}")
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.control.should_save |= best
        self.control.should_training_stop |= not best and out_of_patience(self.state, self.settings)
        self.mark += time.time() - started  # not training time
        return metrics

    def validation_loss(self, rows):
        """Mean negative log likelihood over the labelled tokens of `rows`, shared out among the processes."""
        sums = torch.zeros(2, dtype=torch.float64)
        for start in range(0, len(rows), self.accelerator.num_processes):
            place = start + self.accelerator.process_index
            # past the end the last one, uncounted: FSDP needs as many passes of every process
            inputs = self._prepare_inputs(self.data_collator([rows[min(place, len(rows) - 1)]]))
            with torch.no_grad(), self.compute_loss_context_manager():
                total, count = summed_loss(self.model_wrapped, inputs)
            if place < len(rows):
                sums += torch.tensor([total.item(), count], dtype=torch.float64)
        total, count = self.accelerator.reduce(sums.to(self.args.device), "sum").tolist()
        return total / count

    def probe(self):
        """Pass over the longest rows and those with most labels: memory ends now or never. Seconds of the slower."""
        size, seconds = self.args.per_device_train_batch_size, []
        sizes = [(len(row), labelled(row)) for row in self.train_dataset["labels"]]
        longest = sorted(range(len(sizes)), key=lambda row: sizes[row])[-size:]
        most_labels = sorted(range(len(sizes)), key=lambda row: sizes[row][::-1])[-size:]
        own = [self.args.device] if self.args.device.type == "cuda" else []  # by default those of all GPUs
        self.model_wrapped.train()
        for batch in {tuple(sorted(longest)), tuple(sorted(most_labels))}:
            began = time.time()
            inputs = self._prepare_inputs(self.data_collator([self.train_dataset[row] for row in batch]))
            with torch.random.fork_rng(own), self.compute_loss_context_manager():
                loss = self.compute_loss(self.model_wrapped, inputs)
                self.accelerator.backward(loss)
            if not torch.isfinite(loss):
                if self.state.global_step:
                    self.diverged(f"loss {loss.item()}")
                reason = f"the loss is {loss.item()} before the first step"
                fail(f"{reason}: the base has weights that are no numbers, or too large: get it again, or another")
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
        tokens = self.all_tokens()
        speed = (tokens - self.state.num_input_tokens_seen) / (time.time() - self.mark)
        self.state.num_input_tokens_seen = tokens
        logs |= {"tokens": tokens, "tokens_per_second": speed, "memory_gb": machine.peak_memory()}
        self.mark = time.time()
        super().log(logs, start_time)
        self.watch(logs)
        figures = f"loss {logs['loss']:.4f}  grad {logs['grad_norm']:.2f}  lr {logs['learning_rate']:.1e}"
        self.say_step(f"{figures}  {speed:,.0f} tokens/s ")

    def say_step(self, more=""):
        """The step that has ended, and the time left by those of this session."""
        step, last = self.state.global_step, self.state.max_steps
        left = (time.time() - self.started) / (step - self._initial_global_step) * (last - step)
        say(f"step {step:>5}/{last}  {more}{duration(left)} left")

    def watch(self, logs):
        """Stop a run that learns nothing."""
        scaler = self.accelerator.scaler  # in float16 it leaves out a step that overflows, and scales the loss down
        overflow = not math.isfinite(logs["grad_norm"]) and (scaler is None or scaler.get_scale() < 1)
        if not math.isfinite(logs["loss"]) or overflow:
            self.diverged(f"loss {logs['loss']:g}, gradient norm {logs['grad_norm']:g}")
        losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry][-3:]
        if losses == [0, 0, 0]:
            remedy = "nothing is learned; look at the completions of the data set, or try --no-load-in-4bit"
            fail(f"the loss was exactly 0 three times up to step {self.state.global_step}: {remedy}")

    def diverged(self, what):
        remedy = "lower --learning-rate or raise --warmup-steps, and start again with --overwrite"
        kept = "until then older checkpoints and adapter are still there"
        fail(f"training diverged at step {self.state.global_step} ({what}): {remedy}; {kept}")

    def is_save_due(self):
        return 0 < self.settings.save_minutes <= (time.time() - self.saved) / 60

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
            Trainer._save_checkpoint(self, model, trial)  # TRL's adds a model card
            self.accelerator.wait_for_everyone()
            if is_main():
                content = {"run": self.run, "seconds": self.seconds + started - self.started}
                content["activation_checkpointing"] = self.settings.activation_checkpointing  # what "auto" came to
                write_manifest(folder, content)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch's and safetensors' for a full disk
            remedy = "make room, then give the same command again; the checkpoints before it are whole"
            fail(f"cannot write {folder} ({first_line(error)}): {remedy}", in_any_process=True)
        self.saved = time.time()
        self.mark += self.saved - started


def summed_loss(model, inputs):
    """Negative log likelihood (nats) of a flattened batch's labelled tokens, and their number; by layer.prepare."""
    labels = inputs["labels"][0, 1:]
    kept = (labels != -100).nonzero()[:, 0]
    inputs = {key: value for key, value in inputs.items() if key != "labels"}
    return model(**inputs, kept=kept, labels=labels[kept], use_cache=False).loss, len(kept)


def out_of_patience(state, settings):
    """Whether EARLY_STOPPING_PATIENCE validations went by without a lower loss."""
    validated = [entry["step"] for entry in state.log_history if "eval_loss" in entry]
    since_best = sum(step > state.best_global_step for step in validated)
    return 0 < settings.early_stopping_patience <= since_best


def log_lines(history):
    """The losses in a log, as lines of JSON, keys sorted as those that a checkpoint gave back."""
    losses = [entry for entry in history if "loss" in entry or "eval_loss" in entry]
    return "".join(json.dumps(entry, sort_keys=True) + "\n" for entry in losses)


class Watch(TrainerCallback):
    """Where training begins, where a step ends, and where something is logged."""

    def __init__(self, trainer):
        self.trainer, self.log = trainer, None
        self.printed = 0  # when a line was: the first step prints one

    def on_train_begin(self, args, state, control, **kwargs):
        seconds = self.trainer.probe()
        self.trainer.started = self.trainer.mark = self.trainer.saved = time.time()
        if args.device.type == "cpu":  # where a step may take minutes; a GPU's first pass is slower than the others
            passes = (state.max_steps - state.global_step) * args.gradient_accumulation_steps
            say(f"about {duration(passes * seconds)} left, or less: the longest rows were timed")
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
        if not control.should_log and time.time() - self.printed > 60:
            self.printed = time.time()
            self.trainer.say_step()

    def on_log(self, args, state, control, **kwargs):
        self.printed = time.time()
        if is_main() and self.log:
            with self.log.open("a") as file:
                file.write(log_lines(state.log_history[-1:]))


def catch_signals(trainer):
    """A terminal's signals and a batch system's end the run after a checkpoint; a second one ends it at once."""

    def note(number, frame):
        trainer.stop_signal = number
        signal.signal(number, signal.SIG_DFL)
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        say(f"{name}: stopping after this step, with a checkpoint; a second signal stops at once, without one")

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup has it ignored
            signal.signal(number, note)


def train_until_done(trainer, checkpoint):
    """Run trainer.train, from the folder of a checkpoint or None; what ends it early ends the script in a sentence."""
    if checkpoint:
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if state.global_step >= state.max_steps or out_of_patience(state, trainer.settings):
            trainer.state, trainer.started = state, time.time()
            return  # killed before its adapter was written; the Trainer would make one step more
    catch_signals(trainer)
    try:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    except Exception as error:
        if not out_of_memory(error):
            raise
        where = "GPU memory" if "CUDA" in str(error) else "memory"
        fail(f"out of {where} ({first_line(error)}): {SAVERS}", in_any_process=True)
    state = trainer.state
    if trainer.stop_signal and state.global_step < state.max_steps:
        say(f"stopped at step {state.global_step} of {state.max_steps}: the same command resumes from there")
        raise SystemExit(128 + trainer.stop_signal)
