"""What goes on around the steps: the progress bar, and stopping on a signal."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator

import torch
from tqdm import tqdm
from transformers import TrainerCallback

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_LINES = 20  # of progress, where there is no terminal for a bar


class StopCallback(TrainerCallback):
    """Stops the run with a checkpoint where Ctrl-C was pressed (or SIGTERM came); a second time stops at once.

    Args:
        alone: this is the only process. Launchers send each process the signal that it has from the terminal already,
            so with several of them a second one means nothing (torchrun itself ends them 30 seconds later).
    """

    def __init__(self, alone: bool = True):
        self.alone = alone
        self.asked = self.stopped = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, the first signal is noted instead of raised. Does nothing outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        if self.asked and self.alone:
            raise KeyboardInterrupt
        if not self.asked:
            print("deltamem: stopping after this step" + "; once more stops at once" * self.alone, file=sys.stderr)
        self.asked = True

    def on_step_end(self, args, state, control, **kwargs):
        if self._anybody(args) and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True

    def _anybody(self, args) -> bool:
        """Whether any process was told to stop: all of them have to stop at the same step."""
        if args.world_size == 1:
            return self.asked
        flag = torch.tensor(float(self.asked), device=args.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag)


class FiniteCallback(TrainerCallback):
    """Ends the run before a step that would make the weights NaN or Inf.

    Args:
        check: raises where a loss or gradient is not finite.
    """

    def __init__(self, check: Callable[[], None]):
        self.check = check

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.check()


class ProgressCallback(TrainerCallback):
    """A bar over the steps with loss, gates and speed; some plain lines where stderr is no terminal.

    Args:
        shown: False shows nothing.
    """

    def __init__(self, shown: bool = True):
        self.shown, self.bar = shown, None

    def on_train_begin(self, args, state, control, **kwargs):
        if self.shown and state.is_world_process_zero and sys.stderr.isatty():
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", dynamic_ncols=True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not self.shown or not state.is_world_process_zero or not logs:
            return
        if "answer_loss" in logs:
            self._step(state, logs)
        else:
            text = ", ".join(f"{name.removeprefix('eval_')} {value:.6g}" for name, value in logs.items())
            tqdm.write(text, file=sys.stderr)

    def _step(self, state, logs) -> None:
        figures = {
            "loss": f"{logs['answer_loss']:.4f}",
            "β": f"{logs['mean_beta']:.3f}",
            "tok/s": f"{logs['tokens_per_second']:,.0f}",
        }
        if self.bar is not None:
            self.bar.set_postfix(figures, refresh=False)
            self.bar.update(state.global_step - self.bar.n)
        elif state.global_step % max(1, state.max_steps // _LINES) == 0 or state.global_step == state.max_steps:
            text = ", ".join(f"{name} {value}" for name, value in figures.items())
            tqdm.write(f"step {state.global_step} of {state.max_steps}: {text}", file=sys.stderr)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def checking(numbers: Iterable, shown: bool) -> Iterable:
    """``numbers`` under a bar that says that data is being checked."""
    return tqdm(numbers, desc="checking data", unit="example", disable=not (shown and sys.stderr.isatty()), leave=False)
