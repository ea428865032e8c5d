"""Every error pi2rt raises on purpose, in one place. Each says who is to blame.

The user's mistakes carry ``exit_status = 2``: the command line prints them as one line and exits with it. Everything
else is ours or the world's and exits with 1.
"""

from __future__ import annotations

import errno
import os


class Pi2rtError(Exception):
    """Base of all errors that pi2rt raises on purpose."""

    exit_status = 1


class ModelFormatError(Pi2rtError):
    """A model file is malformed: truncated, inconsistent, or lying about a length, offset or count.

    Args:
        path: the file.
        field: what in the file is wrong, in the format's own words (``"tensor blk.0.attn_q.weight: offset"``).
        problem: what is wrong with it, with the value found and the value allowed.
    """

    exit_status = 2

    def __init__(self, path: object, field: str, problem: str) -> None:
        super().__init__(f"{path}: {field}: {problem}")
        self.path, self.field, self.problem = str(path), field, problem


class UnsupportedModelError(ModelFormatError):
    """The file is well formed, but names an architecture, tensor type or feature that pi2rt does not have."""


class ModelNotFoundError(Pi2rtError):
    """No such model name, path or source."""

    exit_status = 2


class DownloadError(Pi2rtError):
    """Fetching a model failed; nothing is left under its final name."""


class ConversionError(Pi2rtError):
    """Writing a pack failed: the disk is full, or something else was in the way; nothing is left under its name."""


class TemplateError(Pi2rtError):
    """A chat template is invalid, refused by the sandbox, or went over its size or time limit."""

    exit_status = 2


class RequestError(Pi2rtError):
    """A request asks for something that cannot be: a parameter out of range, an empty prompt."""

    exit_status = 2


class ContextOverflowError(RequestError):
    """Prompt plus requested tokens exceed the context. Nothing is ever truncated silently."""

    def __init__(self, prompt_tokens: int, max_tokens: int, context: int) -> None:
        super().__init__(
            f"prompt of {prompt_tokens} tokens plus max_tokens={max_tokens} exceeds the context of {context} tokens; "
            f"shorten the prompt by {prompt_tokens + max_tokens - context} tokens, lower max_tokens, or open the "
            f"runtime with a larger context"
        )
        self.prompt_tokens, self.max_tokens, self.context = prompt_tokens, max_tokens, context


class MemoryBudgetError(Pi2rtError):
    """The model does not fit into the memory there is; the message says by how much and what it is made of.

    Args:
        pack_fits: whether a pack of the model, which it is not, would fit.
    """

    exit_status = 2

    def __init__(self, message: str, *, pack_fits: bool = False) -> None:
        super().__init__(message)
        self.pack_fits = pack_fits


class KernelUnavailableError(Pi2rtError):
    """A kernel variant was asked for that this build lacks or this processor cannot run."""

    exit_status = 2


class ClosedError(Pi2rtError):
    """You closed it (runtime, engine, stream, actor), then used it."""


class BusyError(Pi2rtError):
    """Submitted more than the receiver takes at once: a step, or a request beyond ``max_queue``. Wait for a completion,
    then submit again."""


class ExecutorError(Pi2rtError):
    """An executor failed while it worked on an item. The cause is chained; the actor has been rebuilt, unless the
    result of one request alone was unusable.

    Args:
        actor: the name of the actor whose executor failed.
        item: the work item, as ``repr`` shows it.
    """

    def __init__(self, actor: str, item: object, problem: str) -> None:
        super().__init__(f"actor {actor!r} failed on {item}: {problem}")
        self.actor, self.item = actor, item


class PluginError(Pi2rtError):
    """A plug-in cannot be imported, or does not keep to the protocol of what it plugs into.

    Args:
        plugin: its entry point.
        problem: every defect found.
    """

    def __init__(self, plugin: str, problem: str) -> None:
        super().__init__(f"plug-in {plugin}: {problem}")
        self.plugin, self.problem = plugin, problem


class InternalError(Pi2rtError):
    """A bug in pi2rt: this should never happen. Please report it with the traceback."""


def open_failure(error: int, io: str, path: object) -> OSError:
    """Why a file cannot be opened for native reads.

    Args:
        error: an errno.
        io: "auto", "uring" or "preadv", as it was asked for.
        path: of the file.
    """
    problem = os.strerror(error)
    if io == "uring" and error == errno.EOPNOTSUPP:
        problem = (
            "io='uring': reads of its file system cannot be told not to wait (FUSE, tmpfs and network file systems), "
            "for which io_uring is of no use; take io='preadv' or 'auto'"
        )
    return OSError(error, problem, os.fspath(str(path)))


def read_failure(what: str, error: int, path: object, deadline: float | None) -> OSError:
    """What a native reader has failed with.

    Args:
        what: was read.
        error: an errno, or -1 where the file ended too early.
        path: of the file, or None.
        deadline: seconds; see ``RuntimeOptions.read_deadline``.
    """
    if error < 0:
        problem = "the file ends too early"
    elif error == errno.ETIMEDOUT and deadline is not None:
        problem = f"no read has ended for {deadline:g} s; the device does not answer"
    else:
        problem = os.strerror(error)
    return OSError(
        abs(error), f"reading {what}: {problem}", *([] if path is None else [os.fspath(str(path))])
    )
