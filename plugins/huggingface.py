"""Models from the Hugging Face Hub: ``hf:ORG/REPO/FILE.gguf``, through ``huggingface_hub`` (the extra
``hf``).

The hub's client runs in a child process: its own threads and retries cannot be cancelled from outside, a
process can. The token, the endpoint and the proxies are the client's own affair (``HF_TOKEN``,
``HF_ENDPOINT``).
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from pi2rt._errors import DownloadError, ModelNotFoundError
from pi2rt.catalogue import Source
from pi2rt.catalogue.download import LEASHED, bytes_on_disk

_POLL_S = 0.1


def fetch(rest: str, directory: Path, progress: Source.Progress) -> Path:
    """Downloads ``ORG/REPO/FILE`` (FILE may lie in folders) into ``directory``. See
    ``pi2rt.catalogue.Source``.

    Raises:
        ModelNotFoundError: the name is malformed, or the hub has no such repository or file.
        DownloadError: huggingface_hub is missing or failed.
    """
    parts = rest.split("/")
    if len(parts) < 3:
        raise ModelNotFoundError(
            f"'hf:{rest}' must be hf:ORG/REPO/FILE, for example hf:ORG/REPO/model.Q4_K_M.gguf"
        )
    if importlib.util.find_spec("huggingface_hub") is None:
        raise DownloadError(
            f"fetching 'hf:{rest}' needs huggingface_hub; install it with: pip install 'pi2rt[hf]'"
        )
    report = directory / "report"
    command = [
        *LEASHED,
        __name__,
        "/".join(parts[:2]),
        "/".join(parts[2:]),
        str(directory),
    ]
    with open(report, "wb") as output:
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
            process_group=0,
        )
    total = 0
    try:
        while child.returncode is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_POLL_S)
            total = total or int(_messages(report).get("total", 0))
            done = bytes_on_disk(directory)
            progress(min(done, total) if total else done, total)
    finally:
        if child.poll() is None:
            child.kill()
        child.communicate()  # waits, and closes the pipe that leashes it
    said = _messages(report)
    if "path" in said:
        return Path(said["path"])
    if said.get("errno"):
        raise OSError(said["errno"], os.strerror(said["errno"]))
    if "missing" in said:
        raise ModelNotFoundError(f"'hf:{rest}': {said['missing']}")
    lines = report.read_text(errors="replace").split("\n")
    reason = said.get("error") or next((line for line in reversed(lines) if line.strip()), "no output")
    raise DownloadError(f"'hf:{rest}': {reason}")


def _messages(report: Path) -> dict[str, Any]:
    """What the child has said so far; the hub's own warnings share the file and are passed over."""
    said: dict[str, Any] = {}
    for line in report.read_bytes().split(b"\n")[:-1]:
        if line.startswith(b'{"pi2rt":'):
            said.update(json.loads(line)["pi2rt"])
    return said


def _child(repository: str, file: str, directory: str) -> None:
    from huggingface_hub import errors as hub
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    def say(**fields: object) -> None:
        print(json.dumps({"pi2rt": fields}), flush=True)

    try:
        metadata = get_hf_file_metadata(hf_hub_url(repository, file))
        size = int(metadata.size or 0)
        say(total=size)
        status = os.statvfs(directory)
        if size > status.f_bavail * status.f_frsize:
            say(errno=errno.ENOSPC)
            return
        say(path=hf_hub_download(repository, file, local_dir=directory))
    except (hub.RepositoryNotFoundError, hub.EntryNotFoundError, hub.HFValidationError) as error:
        say(missing=_first_line(error))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            say(errno=error.errno)
        else:
            say(error=_first_line(error))
    except Exception as error:  # whatever the hub's client throws is one line to the user
        say(error=_first_line(error))


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


if __name__ == "__main__":
    _child(*sys.argv[1:])
