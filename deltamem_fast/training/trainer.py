"""DeltaMemTrainer: transformers' Trainer on episodes, so that accelerate runs it on whatever there is."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainingArguments

from ..adapter.files import adapter_state_dict, write_adapter
from ..adapter.record import identity_of
from ..adapter.wrappers import unwrap
from ..errors import ArgumentError
from ..memory.state import MemoryState
from .callbacks import FiniteCallback
from .checkpoints import WHOLE_NAME, mark_whole
from .data import Example
from .episode import KINDS, Episode, collate_arguments
from .log import TrainingLog
from .loss import EpisodeBatch, answer_losses, episode_loss, write_memory
from .options import TrainingOptions


class EpisodeModel(nn.Module):
    """A patched model whose forward is a whole episode, so that DDP and FSDP see one forward a backward.

    Args:
        model: patched, its adapter trainable and nothing else.
        gate_weight, gate_target: of the write-sparsity term.
    """

    accepts_loss_kwargs = True  # the Trainer counts the answers' tokens of a step for compute_loss

    def __init__(self, model: nn.Module, gate_weight: float, gate_target: float):
        super().__init__()
        self.model = model
        self.gate_weight, self.gate_target = gate_weight, gate_target
        self.config = model.config
        self._no_split_modules = unwrap(model)._no_split_modules

    def forward(self, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """The losses of an episode batch.

        Args:
            batch: the fields of an ``EpisodeBatch``.

        Returns:
            ``row_losses`` and ``row_tokens`` as in ``EpisodeLoss``, and in train mode ``answer_loss``, ``penalty``,
            ``mean_beta`` (of the written tokens) and ``saturated`` (the share of such gates), float32 [layers]; in eval
            mode ``baseline_losses``, float32 [B]: what the answers cost with an empty memory, which is the backbone
            alone.
        """
        episodes = EpisodeBatch(**batch)
        if self.training:
            found = episode_loss(self.model, episodes, self.gate_weight, self.gate_target)
            names = ("answer_loss", "penalty", "row_losses", "row_tokens")
            gates = {"mean_beta": found.gates.mean_beta(), "saturated": found.gates.saturated()}  # by layer, in order
            gates = {name: torch.stack([v.detach() for v in values.values()]) for name, values in gates.items()}
            return {name: getattr(found, name) for name in names} | gates
        losses, tokens = answer_losses(self.model, episodes, write_memory(self.model, episodes))
        empty = MemoryState.zeros(self.model, len(episodes.read_ids))
        baseline, _ = answer_losses(self.model, episodes, empty)
        return {"row_losses": losses, "row_tokens": tokens, "baseline_losses": baseline}


class Meter:
    """Sums on the device what a step's forwards found; ``take`` adds up the devices and starts anew.

    Args:
        layers: how many layers have a memory.
        device: where the sums are kept.
    """

    def __init__(self, layers: int, device: torch.device):
        self.layers = layers
        # forwards, penalty, tokens written, tokens read; losses and answer tokens by kind; β and saturation by layer.
        self.sums = torch.zeros(4 + 2 * len(KINDS) + 2 * layers, device=device, dtype=torch.float64)
        self.since: float | None = None

    def begin(self) -> None:
        """A forward begins: time runs from a step's first one, so that saving and evaluating do not count."""
        if self.since is None:
            self.since = time.perf_counter()

    @torch.no_grad()
    def add(self, found: dict[str, torch.Tensor], batch: dict[str, torch.Tensor], kinds: torch.Tensor) -> None:
        """Count one forward: what ``EpisodeModel`` returned, its batch, and each row's place in ``KINDS``."""
        written = batch["write_mask"].sum()
        by_kind = torch.zeros(2, len(KINDS), device=self.sums.device, dtype=torch.float64)
        by_kind[0].index_add_(0, kinds, found["row_losses"].double())
        by_kind[1].index_add_(0, kinds, found["row_tokens"].double())
        head = torch.stack(
            [torch.ones_like(found["penalty"]), found["penalty"], written, batch["read_mask"].sum()]
        ).double()
        gates = torch.cat([found["mean_beta"], found["saturated"]]).double() * written
        self.sums += torch.cat([head, by_kind.flatten(), gates])

    def take(self, accelerator, gate_weight: float) -> dict:
        """The step's entry for the log; every process has to call it."""
        sizes = (4, len(KINDS), len(KINDS), self.layers, self.layers)
        sums = accelerator.reduce(self.sums, "sum").cpu().split(sizes)
        (forwards, penalty, written, read), losses, counts, beta, saturated = (part.tolist() for part in sums)
        self.sums.zero_()
        seconds, self.since = time.perf_counter() - self.since, None
        answer_loss, penalty = sum(losses) / sum(counts), penalty / forwards
        entry = {"loss": answer_loss + gate_weight * penalty, "answer_loss": answer_loss, "penalty": penalty}
        for kind, loss, count in list(zip(KINDS, losses, counts))[1:]:
            if count:
                entry[f"{kind}_loss"] = loss / count
        entry["mean_beta"] = [value / max(written, 1) for value in beta]
        entry["saturated"] = [value / max(written, 1) for value in saturated]
        entry["tokens"] = int(written + read)
        entry["tokens_per_second"] = round((written + read) / seconds, 1)
        return entry


class EpisodeList(Dataset):
    """The examples of a held-out file as episodes, in their order."""

    def __init__(self, examples: Sequence[Example], build):
        self.examples, self.build = examples, build

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, place: int) -> Episode:
        return self.build(self.examples[place], "both")


class DeltaMemTrainer(Trainer):
    """Trains an adapter on episodes.

    A step's loss is the mean over all its answers' tokens, of all devices and forwards, plus gate_weight times the
    mean penalty of its forwards. Checkpoints hold the adapter in its own format instead of the model.

    Args:
        model: an EpisodeModel.
        args: transformers' arguments, as ``training_arguments`` makes them.
        train_dataset: an ``EpisodeSchedule``.
        evaluation: datasets of Episodes by the name of their file.
        log: where each step is recorded, or None.
        pad_token_id: for batches.
        callbacks: the Trainer's.
    """

    def __init__(
        self,
        model: EpisodeModel,
        args: TrainingArguments,
        train_dataset: Dataset,
        evaluation: dict[str, Dataset] | None = None,
        log: TrainingLog | None = None,
        pad_token_id: int = 0,
        callbacks=None,
    ):
        self.backbone = model.model
        self.episode_log = log
        self.evaluations: dict[int, dict] = {}
        self.gate_weight = model.gate_weight
        use_cache = model.config.use_cache
        self.meter = Meter(len(identity_of(model.model).memories), args.device)
        super().__init__(
            model=model,
            args=args,
            data_collator=partial(collate_arguments, pad_token_id=pad_token_id),
            train_dataset=train_dataset,
            eval_dataset=evaluation or None,
            callbacks=callbacks,
        )
        model.config.use_cache = use_cache  # the Trainer turns it off, and would leave the caller's model so
        self.model_accepts_loss_kwargs = True
        self.add_callback(FiniteCallback(self._check_step))
        self.remove_callback(PrinterCallback)  # which the Trainer adds where its own bar is off
        self._refuse_unsupported()

    def _refuse_unsupported(self) -> None:
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and getattr(plugin, "fsdp_version", 1) != 2:
            raise ArgumentError(
                "fsdp_version: got 1, allowed 2: its flat parameters cannot mix a frozen bfloat16 backbone with a "
                "float32 adapter"
            )
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if plugin is not None and plugin.zero_stage == 3:
            raise ArgumentError("zero_stage: got 3, allowed 0 to 2; FSDP shards a backbone's parameters")

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(train_dataset or self.train_dataset)  # the schedule has its order in itself

    # --- loss

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        batch = {name: tensor for name, tensor in inputs.items() if name != "kinds"}
        self.meter.begin()
        found = model(**batch)
        self.meter.add(found, batch, inputs["kinds"])
        # Devices average their gradients, so that each one's share of the step's tokens is scaled up by their number.
        tokens = found["row_tokens"].sum()
        share = tokens * self.accelerator.num_processes / num_items_in_batch
        penalty = found["penalty"] / self.current_gradient_accumulation_steps
        loss = share * found["answer_loss"] + self.gate_weight * penalty
        return (loss, found) if return_outputs else loss

    # --- log

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Record a step: to the log, and as plain numbers to the callbacks (tensorboard, wandb)."""
        if "learning_rate" not in logs:  # the Trainer's summary at the end
            return
        step = self.state.global_step
        figures = {name: float(logs[name]) for name in ("learning_rate", "grad_norm") if name in logs}
        args = self.args
        episodes = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        figures["epoch"] = round(step * episodes / len(self.train_dataset.examples), 6)
        super().log(flat(self._record_step(step, figures)), start_time)
        # Every checkpoint would hold them all; log.jsonl is the record.
        self.state.log_history.clear()

    def _check_step(self) -> None:
        """Raise before the optimizer takes a step with a loss or gradient that is not finite; all processes together.

        A loss scaler (float16) does without such steps by itself.
        """
        if getattr(self.accelerator, "scaler", None) is not None:
            return
        gradients = [p.grad for p in self.backbone.parameters() if p.grad is not None]
        # Of a sharded gradient each process has its part.
        gradients = [g.to_local() if hasattr(g, "to_local") else g for g in gradients]
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device=self.args.device)
        sums = torch.stack([self.meter.sums.sum().float(), norm.float()])
        loss, norm = self.accelerator.reduce(sums, "sum").tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._record_step(self.state.global_step + 1, {"grad_norm": norm})

    def _record_step(self, step: int, figures: dict[str, float]) -> dict:
        """What the meter has, with ``figures``, for the log; returns it.

        Raises where it is not finite, before a checkpoint is made of such weights, unless a loss scaler takes care of
        that; all processes see the same numbers, and raise together.
        """
        entry = {"step": step, **self.meter.take(self.accelerator, self.gate_weight), **figures}
        self._record(entry)
        for name in ("loss", "grad_norm"):
            if getattr(self.accelerator, "scaler", None) is None and not math.isfinite(entry.get(name, 0.0)):
                raise ArgumentError(
                    f"{name}: got {entry[name]} at step {entry['step']}; checkpoints in {self.args.output_dir} are "
                    "from before; allowed: another run with a lower learning rate or other data"
                )
        return entry

    def _record(self, entry: dict) -> None:
        if self.is_world_process_zero() and self.episode_log is not None:
            self.episode_log.write(entry)

    # --- evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Mean loss of the answers' tokens in each held-out file, with the memory and without; every token once."""
        found = {name: self._evaluate_file(dataset) for name, dataset in (eval_dataset or self.eval_dataset).items()}
        self.evaluations[self.state.global_step] = found
        self._record({"step": self.state.global_step, "evaluation": found})
        metrics = {f"{metric_key_prefix}_{n}_{key}": v for n, values in found.items() for key, v in values.items()}
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def _evaluate_file(self, dataset: Dataset) -> dict[str, float]:
        was_training = self.model.training
        self.model.eval()
        totals = torch.zeros(3, dtype=torch.float64, device="cpu")
        for inputs in self.get_eval_dataloader(dataset):
            inputs = self._prepare_inputs(inputs)
            found = self.model(**{name: tensor for name, tensor in inputs.items() if name != "kinds"})
            rows = [found["row_losses"], found["baseline_losses"], found["row_tokens"].float()]
            # Devices get equal numbers of episodes; what was repeated for that is left out here.
            totals += self.accelerator.gather_for_metrics(torch.stack(rows, 1)).double().sum(0).cpu()
        self.model.train(was_training)
        with_memory, without, tokens = totals.tolist()
        return {"loss": with_memory / tokens, "no_memory_loss": without / tokens, "answer_tokens": int(tokens)}

    # --- checkpoints

    def _save_checkpoint(self, model, trial) -> None:
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            (checkpoint / WHOLE_NAME).unlink(missing_ok=True)  # an older run's, which is written over
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # the other processes' parts are on the disk too
        if self.args.should_save:
            mark_whole(checkpoint, self.state.global_step)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter, in float32, with its configuration; every process has to call it."""
        weights = adapter_state_dict(self.backbone)
        if self.args.should_save:
            directory = self.args.output_dir if output_dir is None else output_dir
            write_adapter(directory, identity_of(self.backbone).config, weights, "safetensors")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        """Nothing to do: ``train`` has read the adapter before the model was wrapped or sharded."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # The Trainer's way writes the backbone too.
        from accelerate.utils import save_fsdp_optimizer

        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, "scheduler.pt"))


def flat(entry: dict) -> dict[str, float]:
    """A log entry as plain numbers by name: ``mean_beta`` is the layers' mean, ``mean_beta/3`` layer 3's."""
    numbers = {}
    for name, value in entry.items():
        if isinstance(value, list):
            numbers[name] = sum(value) / len(value)
            numbers |= {f"{name}/{layer}": number for layer, number in enumerate(value)}
        elif name not in ("step", "epoch"):
            numbers[name] = value
    return numbers


def training_arguments(options: TrainingOptions, steps: int, evaluates: bool) -> TrainingArguments:
    """The Trainer's arguments for a run of ``steps`` steps."""
    # Without a GPU, processes of a launcher that was not told so would each train for themselves.
    cpu = options.cpu or not torch.accelerator.is_available()
    arguments = TrainingArguments(
        output_dir=options.output,
        max_steps=steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulate,
        average_tokens_across_devices=True,
        learning_rate=options.lr,
        lr_scheduler_type="cosine",
        warmup_steps=round(options.warmup * steps),
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        optim="adamw_torch",
        seed=options.seed,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps" if options.save_every else "no",
        save_steps=options.save_every or 500,
        save_total_limit=options.keep,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=options.evaluate_every or steps,
        report_to=list(options.report_to) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_num_workers=options.workers,
        dataloader_pin_memory=not cpu,
        ddp_find_unused_parameters=False,
        use_cpu=cpu,
    )
    if arguments.n_gpu > 1:
        # Several GPUs in one process would get torch's DataParallel, which copies the model in every forward.
        arguments._n_gpu = 1
    return arguments
