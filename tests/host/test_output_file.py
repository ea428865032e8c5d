"""Writing: what is there afterwards, whatever was there before, and what is refused before the work begins."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pi2rt._errors import OutputError, RequestError
from pi2rt.formats.calibration import write_calibration
from pi2rt.host import output_file as _output_file
from pi2rt.host.output_file import OutputFile, follow_links
from pi2rt.planner.pack.convert import convert
from pi2rt.runtime.trace import Trace
from tests.support.limited import run_limited
from tests.support.tiny_models import TinyModel, write_gguf


def write(path: Path | str, data: bytes = b"new", **options: bool) -> None:
    with OutputFile(path, **options) as file:
        file.write(data)
        file.commit()


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_new_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "new")
    finally:
        os.umask(before)
    assert names(tmp_path) == ["new"]
    assert (tmp_path / "new").read_bytes() == b"new"
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640


@pytest.mark.parametrize("seeks", [False, True])
def test_a_file_that_is_replaced_keeps_its_mode(tmp_path: Path, seeks: bool) -> None:
    path = tmp_path / "old"
    path.write_bytes(b"old")
    path.chmod(0o604)
    inode = path.stat().st_ino
    write(path, seeks=seeks)
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o604
    assert path.stat().st_ino != inode
    assert names(tmp_path) == ["old"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_file_that_is_replaced_keeps_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "old"
    path.write_bytes(b"old")
    os.chown(path, 12, 34)
    write(path)
    assert (path.stat().st_uid, path.stat().st_gid, path.read_bytes()) == (12, 34, b"new")


def test_what_is_not_finished_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "old"
    path.write_bytes(b"old")
    with contextlib.suppress(KeyboardInterrupt), OutputFile(path) as file:
        file.write(b"half")
        assert path.read_bytes() == b"old"
        raise KeyboardInterrupt
    with OutputFile(path) as file:  # nor what was not committed
        file.write(b"half")
    assert (names(tmp_path), path.read_bytes()) == (["old"], b"old")


def test_links_stay_and_what_they_lead_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    target = tmp_path / "there" / "target"
    link, second = tmp_path / "link", tmp_path / "second"
    link.symlink_to("there/target")
    second.symlink_to(link)
    for data in (b"first", b"again"):  # at first it dangles
        write(second, data)
        assert (second.is_symlink(), link.is_symlink(), target.is_symlink()) == (True, True, False)
        assert target.read_bytes() == data
    assert names(tmp_path / "there") == ["target"]


def test_another_name_of_a_file_keeps_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"old")
    os.link(tmp_path / "one", tmp_path / "two")
    write(tmp_path / "one")
    assert ((tmp_path / "one").read_bytes(), (tmp_path / "two").read_bytes()) == (b"new", b"old")


def test_dots_behind_a_link_are_those_of_its_target(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to("a/b")
    write(tmp_path / "link" / ".." / "new")
    assert names(tmp_path / "a") == ["b", "new"]


@pytest.fixture
def device(tmp_path: Path) -> Path:
    """Another name of /dev/full."""
    try:
        os.mknod(tmp_path / "full", 0o666 | stat.S_IFCHR, os.makedev(1, 7))
        (tmp_path / "full").open("rb").close()
    except OSError as error:
        pytest.skip(f"no device can be made here: {error}")
    return tmp_path / "full"


def test_a_device_stays(device: Path) -> None:
    with pytest.raises(OutputError, match="full: cannot be written: No space left on device"):
        write(device)
    assert stat.S_ISCHR(device.lstat().st_mode)
    assert names(device.parent) == ["full"]


def test_dev_null_takes_everything() -> None:
    write("/dev/null", bytes(1 << 20))
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize("behind_a_link", [False, True])
def test_a_fifo_is_written_into(tmp_path: Path, behind_a_link: bool) -> None:
    os.mkfifo(tmp_path / "fifo")
    path = tmp_path / "fifo"
    if behind_a_link:
        path = tmp_path / "link"
        path.symlink_to("fifo")
    output = OutputFile(path)  # nobody reads it yet
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "fifo").read_bytes()))
    reader.start()
    with output as file:
        file.write(bytes(1 << 20))
        file.write(b"end")
        file.commit()
    reader.join()
    assert got == [bytes(1 << 20) + b"end"]
    assert stat.S_ISFIFO((tmp_path / "fifo").lstat().st_mode)


def test_a_fifo_that_nobody_reads_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_output_file, "PATIENCE_S", 0.05)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OutputError, match="fifo: cannot be written: nobody reads it"):
        write(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(OutputError, match=r"nobody has read from it for 0\.05 s"):
            write(tmp_path / "fifo", bytes(1 << 20))
    finally:
        os.close(reader)
    with pytest.raises(OutputError, match="fifo: cannot be written: nobody reads it"):
        write(tmp_path / "fifo")


def test_a_descriptor_of_this_process_is_written_into_where_it_is(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+b") as file:
        file.write(b"before ")
        file.flush()
        for path in (f"/proc/self/fd/{file.fileno()}", f"/dev/fd/{file.fileno()}"):
            write(path)
        file.write(b" after")
        file.flush()
    assert (tmp_path / "file").read_bytes() == b"before newnew after"
    assert names(tmp_path) == ["file"]


def test_a_descriptor_is_held_from_the_beginning(tmp_path: Path) -> None:
    first, second = os.pipe(), os.pipe()
    number = first[1]
    output = OutputFile(f"/proc/self/fd/{number}")
    os.dup2(second[1], number)  # the number is another's now
    with output as file:
        file.write(b"new")
        file.commit()
    output.close()
    os.set_blocking(second[0], False)
    with pytest.raises(BlockingIOError):
        os.read(second[0], 3)
    assert os.read(first[0], 3) == b"new"
    for fd in (*first, *second):
        os.close(fd)


def test_a_shared_pipe_keeps_its_mode(tmp_path: Path) -> None:
    read, write_end = os.pipe()
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096)
    got: list[bytes] = []

    def drain() -> None:
        while data := os.read(read, 1000):
            got.append(data)

    reader = threading.Thread(target=drain)
    reader.start()
    write(f"/proc/self/fd/{write_end}", bytes(100_000))
    assert os.get_blocking(write_end)
    os.close(write_end)
    reader.join()
    os.close(read)
    assert b"".join(got) == bytes(100_000)


def test_a_socket_that_was_handed_over_is_written_into() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        write(f"/dev/fd/{theirs.fileno()}")
        assert ours.recv(10) == b"new"


class Refused:
    """Paths that cannot be written to, by what is wrong with them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "file").write_bytes(b"old")
        (folder / "loop").symlink_to("loop")
        (folder / "dangling").symlink_to("absent/file")
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(folder / "socket"))
        os.mkfifo(folder / "fifo")

    CASES = (
        (".", "it is a directory"),
        ("", "it is a directory"),
        ("file/", "there is no such folder"),
        ("new/", "there is no such folder"),
        ("absent/x", "its folder does not exist"),
        ("dangling", "its folder does not exist"),
        ("file/x", "Not a directory"),
        ("loop", "Too many levels of symbolic links"),
        ("socket", "is a socket, not a file"),
        ("n" * 256, "File name too long"),
        ("n" * 250, "its name is too long"),
        ("a\0b", "a path cannot have a NUL in it"),
    )
    STREAMED = (
        ("/proc/self/fd/987", "there is no open descriptor 987"),
        ("/proc/self/fd/0", "descriptor 0 is open for reading"),
    )
    SEEKING = (
        ("fifo", "is a FIFO, not a file; choose another name"),
        ("/dev/null", "is a device, not a file; choose another name"),
        ("/dev/stdout", "it is a descriptor of this process, and this takes a file; choose another name"),
    )


@pytest.mark.parametrize(
    ("path", "problem", "seeks"),
    [
        *((*case, False) for case in Refused.CASES + Refused.STREAMED),
        *((*case, True) for case in Refused.CASES + Refused.SEEKING),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_cannot_be_written_to_is_refused_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, problem: str, seeks: bool
) -> None:
    refused = Refused(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = names(tmp_path)
    null = os.open("/dev/null", os.O_RDONLY)
    path = path.replace("fd/0", f"fd/{null}")
    problem = problem.replace("descriptor 0 ", f"descriptor {null} ")
    for given in (path, path if path.startswith("/") or not path else f"{refused.folder}/{path}"):
        with pytest.raises(RequestError) as error:
            OutputFile(given, seeks=seeks)
        assert problem in str(error.value)
        assert Path(given).name.rstrip("/") in str(error.value) or "\0" in given
    os.close(null)
    assert names(tmp_path) == before
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_file_is_replaced_only_if_it_may_be(tmp_path: Path) -> None:
    path = tmp_path / "file"
    output = OutputFile(path, overwrite=False)
    with output as file:
        path.write_bytes(b"another's")  # meanwhile
        with pytest.raises(RequestError, match=r"file is there already; .*--force"):
            file.commit()
    with pytest.raises(RequestError, match="is there already"):
        OutputFile(path, overwrite=False)
    assert (names(tmp_path), path.read_bytes()) == (["file"], b"another's")


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder of ours that a stranger can look into."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


STRANGER = """
from pi2rt.host.output_file import OutputFile
become_stranger()
OutputFile(sys.argv[1])
"""


def test_a_folder_that_takes_no_new_files(open_folder: Path) -> None:
    (open_folder / "file").write_bytes(b"old")
    (open_folder / "file").chmod(0o666)
    for name in ("file", "new"):
        done = run_limited(STRANGER, open_folder / name)
        assert (
            f"RequestError: {open_folder / name}: cannot be written: Permission denied: no file can be made in "
            f"{open_folder}; choose another folder"
        ) in done.stderr


def test_a_file_of_somebody_else_in_a_sticky_folder(open_folder: Path) -> None:
    (open_folder / "file").write_bytes(b"old")
    (open_folder / "file").chmod(0o666)
    open_folder.chmod(0o1777)
    done = run_limited(STRANGER, open_folder / "file")
    assert (
        "cannot be written: it belongs to another user, and in a sticky folder it cannot be replaced"
        in done.stderr
    )
    assert run_limited(STRANGER, open_folder / "new").returncode == 0
    assert names(open_folder) == ["file"]


@pytest.mark.parametrize("error", ["ENOLCK", "EOPNOTSUPP", "ENOSYS"])
def test_a_file_system_without_locks(tmp_path: Path, error: str) -> None:
    program = f"""
from pi2rt.host.output_file import OutputFile
refuse("flock", errno.{error})
with OutputFile(sys.argv[1], seeks=True) as file:
    print(os.listdir(os.path.dirname(sys.argv[1])))
    os.pwrite(file.fd, b"new", 0)
    file.commit()
"""
    done = run_limited(program, tmp_path / "pack")
    assert done.returncode == 0, done.stderr
    assert ".part" in done.stdout
    assert ".pack.part" not in done.stdout  # which another one may be writing
    assert f"RuntimeWarning: {tmp_path / 'pack'}: its file system has no locks (" in done.stderr
    assert (names(tmp_path), (tmp_path / "pack").read_bytes()) == (["pack"], b"new")


def test_a_part_that_was_left_behind_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / ".file.part").write_bytes(bytes(100))
    with OutputFile(tmp_path / "file", seeks=True) as file:
        os.pwrite(file.fd, b"new", 0)
        with pytest.raises(OutputError, match="another process is writing it"):
            OutputFile(tmp_path / "file", seeks=True)
        file.commit()
    assert (names(tmp_path), (tmp_path / "file").read_bytes()) == (["file"], b"new")


def test_two_that_write_the_same_file_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with OutputFile(path) as first, OutputFile(path) as second:
        first.write(b"first")
        second.write(b"second")
        second.commit()
        first.commit()
    assert (names(tmp_path), path.read_bytes()) == (["file"], b"first")


def test_what_a_path_leads_to(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "a").symlink_to("b")
    assert follow_links(tmp_path / "link") == tmp_path / "b"
    assert follow_links("/dev/stdout") == Path(f"/proc/{os.getpid()}/fd/1")
    assert follow_links("/proc/self/fd/77") == Path(f"/proc/{os.getpid()}/fd/77")
    assert follow_links("/") == Path("/")
    (tmp_path / "b").symlink_to("link")
    with pytest.raises(OSError, match="Too many levels") as error:
        follow_links(tmp_path / "link")
    assert error.value.errno == errno.ELOOP


def test_every_writer_goes_this_way(tmp_path: Path) -> None:
    """A pack cannot be written into a FIFO; what is written front to back can."""
    os.mkfifo(tmp_path / "fifo")
    model = write_gguf(tmp_path / "m.gguf", TinyModel())
    with pytest.raises(RequestError, match="is a FIFO, not a file"):
        convert(model, tmp_path / "fifo", overwrite=True)
    (tmp_path / "link").symlink_to("pack")
    convert(model, tmp_path / "link")
    assert ((tmp_path / "link").is_symlink(), (tmp_path / "pack").is_file()) == (True, True)
    (tmp_path / "trace").symlink_to("t.json")
    Trace().write(tmp_path / "trace")
    assert ((tmp_path / "trace").is_symlink(), (tmp_path / "t.json").is_file()) == (True, True)
    with pytest.raises(RequestError, match="it is a directory"):
        write_calibration(tmp_path, None)  # type: ignore[arg-type]  # it does not come so far
