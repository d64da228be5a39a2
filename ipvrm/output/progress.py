"""What a long run shows while it works, and how it is asked to stop."""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, ClassVar, TypeVar

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
    """A progress bar on a terminal; elsewhere a line every tenth of the work and every minute; or nothing
    (`enabled` false)."""

    def __init__(self, enabled: bool = True):
        from rich.console import Console

        self.enabled = enabled
        self.console = Console(stderr=True, quiet=not enabled, highlight=False)
        self.live = enabled and self.console.is_terminal

    def note(self, text: str) -> None:
        """One line that stays on the screen."""
        self.console.print(text, markup=False, soft_wrap=True)

    def track(self, items: Sequence[T], description: str) -> Iterator[T]:
        """Iterates with a bar."""
        with self.bar(description, len(items)) as update:
            for number, item in enumerate(items, 1):
                yield item
                update(number)

    @contextmanager
    def bar(self, description: str, total: int, start: int = 0) -> Iterator[Callable[..., None]]:
        """Yields update(done, loss=, prefix_accuracy=, tokens_per_second=, ...), which moves the bar."""
        if not self.enabled:
            yield lambda done, **numbers: None  # who stands around it (`never_silent`) goes on speaking
            return
        if not self.live:
            with _Lines(self.note, description, total, start) as lines:
                yield lines.update
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
                memory = f"  mem {peak_memory(device) / 2**30:.2f} GiB" if numbers else ""
                display.update(task, completed=done, numbers=in_words(numbers) + memory)

            yield update


@contextmanager
def never_silent(command: str) -> Iterator[None]:
    """While entered, a minute without a line ends with one that says what runs, and for how long. Nothing on
    a terminal, whose user sees that by other means."""
    shown = Progress(enabled=os.environ.get("RANK", "0") == "0")
    if shown.live:
        yield
        return
    with _Lines(shown.note, command):
        yield


class _Lines:
    """What is shown where there is no terminal. While it is entered, a thread ends silences that are too
    long: one batch can take many minutes. Of several that are entered the innermost speaks."""

    spoken = 0.0  # when the last line of any of them was said
    entered: ClassVar[list["_Lines"]] = []

    def __init__(
        self, note: Callable[[str], None], description: str, total: int | None = None, start: int = 0
    ):
        self.note, self.description, self.total, self.start = note, description, total, start
        self.done, self.numbers = start, dict[str, float]()
        self.tenth, self.began = self._tenth(), time.monotonic()
        self._speak, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._end_silences, daemon=True)

    def update(self, done: int, **numbers: float) -> None:
        with self._speak:
            self.done, self.numbers = done, numbers
            tenth = self._tenth()
            if tenth != self.tenth or self._silence() >= LONGEST_SILENCE:
                self.tenth = tenth
                self._say()

    def _tenth(self) -> int:
        return self.done * 10 // max(1, self.total or 0)

    def _silence(self) -> float:
        return time.monotonic() - max(self.began, _Lines.spoken)

    def _say(self) -> None:
        _Lines.spoken = time.monotonic()
        seconds, moved = _Lines.spoken - self.began, self.done - self.start
        if self.total is None:
            self.note(f"{self.description}: {duration(seconds)} so far")
            return
        speed = f"{duration(seconds)} so far"
        if moved:
            rate = moved / max(seconds, 1e-9)
            left = f", {duration((self.total - self.done) / rate)} left" if self.done < self.total else ""
            speed = f"{rate:.3g}/s{left}"
        numbers = in_words(self.numbers)
        self.note(f"{self.description} {self.done:,}/{self.total:,}  {speed}  {numbers}".rstrip())

    def _end_silences(self) -> None:
        left = LONGEST_SILENCE
        while not self._over.wait(left):
            with self._speak:
                if _Lines.entered[-1] is self and self._silence() >= LONGEST_SILENCE:
                    self._say()
                left = LONGEST_SILENCE - min(self._silence(), 0.9 * LONGEST_SILENCE)

    def __enter__(self) -> "_Lines":
        _Lines.entered.append(self)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()
        _Lines.entered.remove(self)


def portion(total: int, most: int) -> int:
    """How many of `total` to do between two updates, at most `most`: each tenth is to have its line."""
    return max(1, min(most, total // 10))


def duration(seconds: float) -> str:
    """`42 s`, `3 min` or `2 h 05 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"


def in_words(numbers: Mapping[str, float]) -> str:
    """`loss 0.6931  tok/s 1,234`."""
    return "  ".join(f"{NAMES.get(name, name)} {value:{FORMATS[name]}}" for name, value in numbers.items())


LONGEST_SILENCE = 60.0  # seconds
NAMES = {
    "policy_loss": "loss",
    "pair_accuracy": "pair acc",
    "prefix_accuracy": "prefix acc",
    "rollout_accuracy": "accuracy",
    "tokens_per_second": "tok/s",
}
FORMATS = {
    "loss": ".4f",
    "policy_loss": ".4f",
    "pair_accuracy": ".3f",
    "prefix_accuracy": ".3f",
    "rollout_accuracy": ".3f",
    "tokens_per_second": ",.0f",
}
# SIGKILL and SIGSTOP cannot be caught; Windows has neither SIGHUP nor SIGUSR1
STOPPING = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
]


class Interrupt:
    """While entered, the first signal of `STOPPING` is noted in `signal`; the second acts as usual.

    In the main thread of commands alone (`signals_noted`): who calls a function of ours has handlers of their
    own, or Python's. A signal that is ignored (by `nohup`, say) stays so.
    """

    in_command = False

    def __init__(self) -> None:
        self.signal = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        if self.in_command and threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def asked(self, accelerator: Any) -> bool:
        """Whether a signal has reached any rank; all of them ask at the same place."""
        flag = torch.tensor(float(bool(self.signal)), device=accelerator.device)
        return bool(accelerator.reduce(flag, "sum") > 0)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        say_at_once("\nstopping after this update (again: at once)\n")
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def __exit__(self, *exception: object) -> None:
        self._restore()


@contextmanager
def signals_noted() -> Iterator[None]:
    """What runs inside is a command, in which `Interrupt` notes signals."""
    before, Interrupt.in_command = Interrupt.in_command, True
    try:
        yield
    finally:
        Interrupt.in_command = before


def say_at_once(text: str) -> None:
    """Writes a short text to the error output if that neither waits nor fails: for a signal's handler.

    Python's own streams are not to be used there: the signal may have come while they are being written to.
    """
    with contextlib.suppress(OSError, ValueError):
        _, ready, _ = select.select([], [2], [], 0)
        if ready:
            os.write(2, text.encode())
