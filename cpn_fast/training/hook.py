"""The key ``hook``: a function of the user that gets every line of metrics.jsonl (docs/logging.md).

The first process calls it, since that process writes the lines. An exception of the function never ends a training: the
line waits and is given again before the next one.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from cpn_fast.runtime.errors import UserError
from cpn_fast.runtime.files import read_note, write_json
from cpn_fast.runtime.reading import expanded


@functools.cache
def load(name: str) -> Callable[[dict[str, Any]], object]:
    """Return the function that ``package.module:function`` or ``FILE.py:function`` names.

    Raises UserError if it cannot be imported, or does not take one argument.
    """
    source, _, attribute = name.rpartition(":")
    try:
        module = _from_file(expanded(Path(source))) if source.endswith(".py") else importlib.import_module(source)
    except (Exception, SystemExit) as error:  # the module is the user's: it may raise anything
        hint = f"; did you mean {source}.py:{attribute}?" if Path(f"{source}.py").is_file() else ""
        raise UserError(f"hook: {name} cannot be imported: {type(error).__name__}: {error}{hint}") from None
    function = getattr(module, attribute, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise UserError(f"hook: {source} has no function {attribute}; its functions are {', '.join(names) or 'none'}")
    if inspect.iscoroutinefunction(function):
        raise UserError(f"hook: {name} is async, and nothing would wait for it: give a plain function")
    try:
        inspect.signature(function).bind({})
    except TypeError as error:
        raise UserError(f"hook: {name} must take one argument, the line as a dict: {error}") from None
    except ValueError:  # a C function may have no signature
        pass
    return function


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"{path.absolute()} is no file")
    # Under its own name a file wandb.py would stand in the way of the package that it imports.
    spec = importlib.util.spec_from_file_location(f"cpn_fast_hook_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


class Hook:
    """Gives the lines to the function, in their order, each one once.

    ``hook.json``, beside metrics.jsonl in ``folder``, has the last step that was given, so that a continued training
    does not give lines twice. The function gets ``context`` with every line.
    """

    def __init__(self, name: str, folder: Path, context: dict[str, Any]) -> None:
        self.name, self.function, self.path, self.context = name, load(name), folder / "hook.json", context
        note = read_note(self.path)
        known = isinstance(note, dict) and note.get("hook") == name and isinstance(note.get("step"), int)
        self.last_step = note["step"] if known else 0
        self.waiting: deque[dict[str, Any]] = deque()
        self.failing = False

    def give(self, lines: Iterable[dict[str, Any]]) -> None:
        """Call the function with each line that it did not get yet, until it raises."""
        self.waiting += [line for line in lines if line["step"] > self.last_step]
        before = self.last_step
        while self.waiting:
            line = self.waiting[0]
            try:
                self.function({**self.context, **line})
            except (Exception, SystemExit) as error:
                if not self.failing:
                    print(f"Warning: {self._failure(line['step'], error)}", file=sys.stderr)
                self.failing = True
                break
            self.failing, self.last_step = False, line["step"]
            self.waiting.popleft()
        if self.last_step > before:
            write_json(self.path, {"hook": self.name, "step": self.last_step})

    def close(self) -> None:
        """Warn about lines that the function did not take."""
        if self.waiting:
            first, metrics = self.waiting[0]["step"], self.path.with_name("metrics.jsonl")
            print(
                f"Warning: hook {self.name} has not taken {len(self.waiting)} lines, from step {first} on; they are in "
                f"{metrics}, and the same command gives them again",
                file=sys.stderr,
            )

    def _failure(self, step: int, error: BaseException) -> str:
        frames = traceback.extract_tb(error.__traceback__)[1:]  # the first frame is ours
        where = f" ({frames[0].filename}, line {frames[0].lineno})" if frames else ""
        reason = f"{type(error).__name__}: {error}".rstrip(": ")
        return f"hook {self.name} failed at step {step}: {reason}{where}. Training goes on; the next line tries again"
