"""Every error pi2rt raises on purpose, in one place. Each says whether it is a usage error.

Usage errors carry ``exit_status = 2``: the command line prints them as one line and exits with it. All others, of pi2rt
or of the system, exit with 1.
"""

from __future__ import annotations


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
    """Prompt plus requested tokens exceed the context. Nothing is ever truncated silently.

    Args:
        prompt_tokens: of the prompt.
        max_tokens: how many more were asked for.
        context: what both together may have.
        at_least: ``prompt_tokens`` is a lower bound: a prompt that is far too long is not tokenised to its end.
    """

    def __init__(self, prompt_tokens: int, max_tokens: int, context: int, *, at_least: bool = False) -> None:
        least = "at least " if at_least else ""
        super().__init__(
            f"prompt of {least}{prompt_tokens} tokens plus max_tokens={max_tokens} exceeds the context of {context} "
            f"tokens; shorten the prompt by {least}{prompt_tokens + max_tokens - context} tokens, lower max_tokens, or "
            f"open the runtime with a larger context"
        )
        self.prompt_tokens, self.max_tokens, self.context = prompt_tokens, max_tokens, context
        self.at_least = at_least


class MemoryBudgetError(Pi2rtError):
    """The model does not fit into the memory there is; the message says by how much and what it is made of.

    Args:
        pack_fits: whether a pack of the model, which it is not, would fit.
    """

    exit_status = 2

    def __init__(self, message: str, *, pack_fits: bool = False) -> None:
        super().__init__(message)
        self.pack_fits = pack_fits


class SystemLimitError(Pi2rtError):
    """The operating system refused a thread, an open file or memory; the message names the limit and its value.

    Args:
        doing: what was attempted.
        problem: which limit was met, and what to do.
    """

    def __init__(self, doing: str, problem: str) -> None:
        super().__init__(f"{doing}: {problem}")
        self.doing, self.problem = doing, problem


class OutputError(Pi2rtError):
    """Writing to a file, a device or standard output failed: no space, or nobody reads it. Of a regular file, what was
    there before is still there.

    Args:
        path: where to.
        problem: why, and what to do.
    """

    def __init__(self, path: object, problem: str) -> None:
        super().__init__(f"{path}: cannot be written: {problem}")
        self.path, self.problem = str(path), problem


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
