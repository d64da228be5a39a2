"""What a long run shows while it works, and how it is asked to stop."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: allocated on a CUDA device, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Progress:
    """A progress bar on a terminal, a line every tenth elsewhere, nothing when not `enabled`."""

    def __init__(self, enabled: bool = True):
        from rich.console import Console

        self.console = Console(stderr=True, quiet=not enabled, highlight=False)
        self.live = enabled and self.console.is_terminal

    def note(self, text: str) -> None:
        """One line that stays on the screen."""
        self.console.print(text, markup=False, soft_wrap=True)

    def logged(self, record: dict[str, Any], total: int) -> None:
        """Where there is no bar, shows every tenth of the run's records."""
        step = record["step"]
        if not self.live and (step * 10 // total != (step - 1) * 10 // total):
            parts = [f"{name} {record[name]:.4g}" for name in SHOWN if name in record]
            self.note(f"update {step}/{total}  " + "  ".join(parts))

    def track(self, items: Sequence[T], description: str) -> Iterator[T]:
        """Iterates with a bar."""
        with self.bar(description, len(items)) as update:
            for number, item in enumerate(items, 1):
                yield item
                update(number)

    @contextmanager
    def bar(self, description: str, total: int, start: int = 0) -> Iterator[Callable[..., None]]:
        """Yields update(done, loss=, prefix_accuracy=, tokens_per_second=), which moves the bar."""
        if not self.live:
            yield lambda done, **numbers: None
            return
        from rich import progress as rich

        columns = (
            rich.TextColumn("{task.description}"),
            rich.BarColumn(),
            rich.MofNCompleteColumn(),
            rich.TextColumn("{task.fields[numbers]}"),
            rich.TimeRemainingColumn(),
        )
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        with rich.Progress(*columns, console=self.console) as display:
            task = display.add_task(description, total=total, completed=start, numbers="")

            def update(done: int, **numbers: float) -> None:
                text = "  ".join(f"{NAMES[name]} {value:{FORMATS[name]}}" for name, value in numbers.items())
                memory = f"  mem {peak_memory(device) / 2**30:.2f} GiB" if numbers else ""
                display.update(task, completed=done, numbers=text + memory)

            yield update


SHOWN = (
    "loss",
    "policy_loss",
    "prefix_accuracy",
    "rollout_accuracy",
    "tokens_per_second",
    "eval_loss",
    "eval_prefix_accuracy",
    "eval_accuracy",
)
NAMES = {"loss": "loss", "prefix_accuracy": "prefix acc", "tokens_per_second": "tok/s"}
NAMES |= {"policy_loss": "loss", "rollout_accuracy": "accuracy"}
FORMATS = {"loss": ".4f", "prefix_accuracy": ".3f", "tokens_per_second": ",.0f"}
FORMATS |= {"policy_loss": ".4f", "rollout_accuracy": ".3f"}


class Interrupt:
    """While entered, the first SIGINT or SIGTERM is noted in `signal`; the second acts as usual."""

    def __init__(self) -> None:
        self.signal = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def asked(self, accelerator: Any) -> bool:
        """Whether the signal has reached any rank; all of them ask at the same place."""
        flag = torch.tensor(float(bool(self.signal)), device=accelerator.device)
        return bool(accelerator.reduce(flag, "sum") > 0)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        print("\nstopping after this update (again: at once)", file=sys.stderr, flush=True)
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def __exit__(self, *exception: object) -> None:
        self._restore()
