"""Artifacts and weight files: what comes back, and that no damaged or foreign file is ever believed."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import mmap
import multiprocessing
import os
import pickle
import stat
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import attrs
import ml_dtypes
import numpy as np
import numpy.typing as npt
import psutil  # type: ignore[import-untyped]
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from jisu.compiler.errors import ArtifactError, InputError
from jisu.compiler.storage import ALIGNMENT, DTYPES, open_checkpoint, open_safetensors, release_pages, write_safetensors
from jisu.runtime import artifact as artifact_module
from jisu.runtime.artifact import (
    FORMAT,
    MAGIC,
    PAGE,
    PIECE,
    Manifest,
    Signature,
    Source,
    SymbolRange,
    TargetInfo,
    ValueInfo,
    read,
    write,
)

Array = npt.NDArray[Any]
HOST = ("avx2", "fma")
VERSION = f'"format": {FORMAT}'.encode()
WEIGHTS: Mapping[str, Array] = {
    "embed": np.arange(24, dtype=np.float32).reshape(6, 4),
    "scale": np.array([1.5, -2.0], dtype=ml_dtypes.bfloat16),
    "flag": np.array([True, False, True]),
}


def make_manifest(**changes: Any) -> Manifest:
    manifest = Manifest(
        jisu_version="0.1.0",
        kind="decoder",
        target=TargetInfo(name="cpu", triple="", features=HOST, fingerprint="f" * 8),
        producers={"numpy": np.__version__},
        entry_points=("main", "append"),
        signature=Signature(
            inputs=(ValueInfo(name="ids", dtype="int64", shape=("batch", 16)),),
            outputs=(ValueInfo(name="logits", dtype="float32", shape=("batch", 16, 97)),),
            symbols={"batch": SymbolRange(low=1, high=8)},
        ),
        meta={"eos": [1, 2], "note": "极速", "ratio": 0.5, "none": None},
    )
    return attrs.evolve(manifest, **changes)


def tensors_writer(arrays: Mapping[str, Array]) -> Callable[[BinaryIO], int]:
    spec = {name: (array.dtype, array.shape, functools.partial(np.asarray, array)) for name, array in arrays.items()}
    return lambda file: write_safetensors(file, spec)


def entries() -> dict[str, Source]:
    return {
        "library.so": b"\x7fELF not a real one",
        "weights.safetensors": tensors_writer(WEIGHTS),
        "graph.txt": b"graph main\n" * 3,
        "report.json": b"",
    }


def litter(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if "tmp" in name or name.startswith(".")]


@pytest.fixture(params=["one.jisu", "folder"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / str(request.param)
    write(path, entries(), make_manifest())
    return path


# ------------------------------------------------------------------------------------------------------- round trip


def test_what_was_written_comes_back(saved: Path) -> None:
    with read(saved, features=HOST) as artifact:
        assert attrs.evolve(artifact.manifest, files={}) == make_manifest()
        assert artifact.names == tuple(entries())
        assert artifact.bytes("graph.txt") == b"graph main\n" * 3
        assert artifact.bytes("report.json") == b""
        assert "recipe.toml" not in artifact
        with pytest.raises(ArtifactError, match="has no recipe.toml"):
            artifact.bytes("recipe.toml")
        tensors = artifact.tensors()
    assert set(tensors) == set(WEIGHTS)
    for name, expected in WEIGHTS.items():  # the mapping outlives the artifact
        value = tensors[name].numpy()
        np.testing.assert_array_equal(value, expected)
        assert value.dtype == expected.dtype and not value.flags.writeable
        assert value.ctypes.data % ALIGNMENT == 0
    with pytest.raises(ArtifactError, match="closed"):
        artifact.bytes("graph.txt")


def test_the_layout_is_what_the_documentation_says(tmp_path: Path) -> None:
    write(tmp_path / "a.jisu", entries(), make_manifest())
    data = (tmp_path / "a.jisu").read_bytes()
    assert data.startswith(MAGIC)
    length = int.from_bytes(data[6:14], "little")
    parsed = json.loads(data[14 : 14 + length])
    position = 14 + length
    for info in parsed["files"].values():
        position += -position % PAGE
        entry = data[position : position + info["bytes"]]
        pieces = [hashlib.sha256(entry[i : i + PIECE]).digest() for i in range(0, len(entry), PIECE)]
        assert hashlib.sha256(b"".join(pieces)).hexdigest() == info["hash"]
        position += info["bytes"]
    assert position == len(data)


def test_the_path_decides_between_file_and_folder(tmp_path: Path) -> None:
    kinds = {"a.jisu": False, "b": True, "llama-3.2": True, "llama-3.2-1b": True, "qwen2.5.jisu": False}
    for name, is_folder in kinds.items():
        write(tmp_path / name, {}, make_manifest())
        assert (tmp_path / name).is_dir() == is_folder
    write(f"{tmp_path}/c.jisu/", {}, make_manifest())
    assert (tmp_path / "c.jisu").is_dir()
    assert all(read(path, features=HOST).names == () for path in tmp_path.iterdir())


def test_several_weight_and_graph_entries(tmp_path: Path) -> None:
    files: dict[str, Source] = {
        "weights-00000.safetensors": tensors_writer({"a": np.ones(3)}),
        "weights-00001.safetensors": tensors_writer({"b": np.zeros(2)}),
        "graph-step.txt": b"x",
    }
    write(tmp_path / "a.jisu", files, make_manifest())
    assert sorted(read(tmp_path / "a.jisu", features=None).tensors()) == ["a", "b"]
    files["weights-00001.safetensors"] = tensors_writer({"a": np.zeros(2)})
    write(tmp_path / "a.jisu", files, make_manifest())
    with pytest.raises(ArtifactError, match="'a' stands in two"):
        read(tmp_path / "a.jisu", features=None).tensors()


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "manifest.json", "weights-1.safetensors", "a/b", ""])
def test_unknown_entry_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="no entry"):
        write(tmp_path / "a.jisu", {name: b""}, make_manifest())
    with pytest.raises(ArtifactError, match="no entry name"):
        manifest = make_manifest(files={name: artifact_module.FileInfo(bytes=0, hash="0" * 64)})
        Manifest.from_bytes(manifest.to_bytes(), "x")


def test_entries_larger_than_a_block(tmp_path: Path) -> None:
    large = np.random.default_rng(0).bytes((3 << 20) // 2 + 3)
    (tmp_path / "large").write_bytes(large)
    files: dict[str, Source] = {"library.so": tmp_path / "large", "tokenizer.json": large, "graph.txt": b"x" * 5000}
    for name in ("a.jisu", "a"):
        write(tmp_path / name, files, make_manifest(meta={"long": "y" * (3 << 19)}))
        with read(tmp_path / name, features=None) as artifact:
            assert artifact.bytes("library.so") == artifact.bytes("tokenizer.json") == large
            assert artifact.mmap("tokenizer.json").tobytes() == large and artifact.bytes("graph.txt") == b"x" * 5000
            assert len(artifact.manifest.meta["long"]) == 3 << 19


def test_same_content_gives_same_bytes(tmp_path: Path) -> None:
    for name in ("a.jisu", "b.jisu"):
        write(tmp_path / name, entries(), make_manifest())
    assert (tmp_path / "a.jisu").read_bytes() == (tmp_path / "b.jisu").read_bytes()


# --------------------------------------------------------------------------------------------------- damaged, foreign


def test_every_flipped_byte_of_a_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.jisu"
    write(path, {"graph.txt": b"abc", "recipe.toml": b"d" * 10}, make_manifest(meta={}))
    data = path.read_bytes()
    header = int.from_bytes(data[6:14], "little") + 14
    rng = np.random.default_rng(0)
    for position in [*range(header), *range(header, len(data), 37), *range(2 * PAGE - 3, len(data))]:
        damaged = bytearray(data)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=r"a\.jisu"):
            read(path, features=None)


@pytest.mark.parametrize("name", ["a.jisu", "a"])
def test_weights_that_were_found_whole_are_read_again_only_when_the_file_changed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JISU_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / name
    write(path, {"graph.txt": b"abc", "weights.safetensors": tensors_writer(WEIGHTS)}, make_manifest(meta={}))
    seen: list[str] = []
    compare = artifact_module.Artifact._compare

    def counted(self: Any, entry: str, found: str) -> None:
        seen.append(entry)
        compare(self, entry, found)

    monkeypatch.setattr(artifact_module.Artifact, "_compare", counted)

    def entries() -> set[str]:
        seen.clear()
        read(path, features=None).close()
        return set(seen)

    everything = {"graph.txt", "weights.safetensors"}
    assert entries() == entries() == everything  # too new to be sure that it won't change within a tick of the clock
    monkeypatch.setattr(artifact_module, "_SETTLED", 0.0)
    time.sleep(0.05)
    assert entries() == everything and entries() == {"graph.txt"}
    file = path if path.is_file() else path / "weights.safetensors"
    before = file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    with open(file, "r+b") as opened:
        opened.write(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a careless tool would
    with pytest.raises(ArtifactError, match="damaged"):
        read(path, features=None)
    (tmp_path / "cache" / "whole").chmod(0o500)
    data[-1] ^= 1
    file.write_bytes(data)
    assert entries() == everything


def test_without_a_home_folder_everything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("JISU_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr(artifact_module, "_SETTLED", 0.0)
    write(tmp_path / "a", {"weights.safetensors": tensors_writer(WEIGHTS)}, make_manifest(meta={}))
    time.sleep(0.05)
    assert "flag" in read(tmp_path / "a", features=None).tensors()


def test_every_flipped_byte_of_a_folder_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write(path, {"graph.txt": b"abc", "weights.safetensors": tensors_writer(WEIGHTS)}, make_manifest(meta={}))
    for file in path.iterdir():
        data = file.read_bytes()
        for position in range(len(data)):
            damaged = bytearray(data)
            damaged[position] ^= 1 << position % 8
            file.write_bytes(damaged)
            with pytest.raises(ArtifactError):
                read(path, features=None)
        file.write_bytes(data)
    read(path, features=None)


def test_every_truncation_and_extension_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.jisu"
    write(path, {"graph.txt": b"abc"}, make_manifest(meta={}))
    data = path.read_bytes()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(ArtifactError, match="empty" if length == 0 else "truncated|damaged"):
            read(path, features=None)
    path.write_bytes(data + b"\0")
    with pytest.raises(ArtifactError, match="foreign bytes"):
        read(path, features=None)


class Bomb:
    """Unpickling it creates the file `marker`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.marker),)


def test_pickles_and_zips_are_refused_unread(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    bomb = pickle.dumps(Bomb(marker))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", bomb)
    for data, kind in ((bomb, "pickle"), (archive.getvalue(), "zip")):
        path = tmp_path / "a.jisu"
        path.write_bytes(data)
        with pytest.raises(ArtifactError, match=kind):
            read(path, features=HOST)
        with pytest.raises(ArtifactError):
            open_safetensors(path)
    assert not marker.exists()


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=300))
def test_no_bytes_whatever_are_believed(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jisu"
    for prefix in (b"", MAGIC, MAGIC + len(data).to_bytes(8, "little"), MAGIC + b"\xff" * 8):
        path.write_bytes(prefix + data)
        with pytest.raises(ArtifactError):
            read(path, features=HOST)


def resign(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a folder's manifest and give it a valid checksum again."""
    parsed = json.loads((path / "manifest.json").read_bytes())
    del parsed["sha256"]
    change(parsed)
    body = json.dumps(parsed)[1:].encode()
    (path / "manifest.json").write_bytes(b'{"sha256": "' + hashlib.sha256(body).hexdigest().encode() + b'",\n' + body)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format=99), f"written in format 99, this build reads {FORMAT}"),
        (lambda m: m.update(format=1), "written in format 1, .*compile the model again"),
        (lambda m: m.update(format=0), "format 0"),
        (lambda m: m.update(format="1"), "no format version"),
        (lambda m: m.update(surprise=1), "surprise"),
        (lambda m: m.pop("target"), "target"),
        (lambda m: m.update(kind="virus"), "virus"),
        (lambda m: m.update(jisu_version=3), "expected str, got 3"),
        (lambda m: m.update(entry_points="main"), "expected a list, got 'main'"),
        (lambda m: m["signature"]["inputs"][0].update(shape=[-1]), "dimension"),
        (lambda m: m["signature"]["inputs"][0].update(shape=[1.5]), "dimension"),
        (lambda m: m["signature"]["symbols"]["batch"].update(low=9), "empty"),
        (lambda m: m["files"]["graph.txt"].update(bytes="33"), "expected int, got '33'"),
        (lambda m: m["files"]["graph.txt"].update(bytes=2**62), "33 bytes"),
        (lambda m: m["files"]["graph.txt"].update(bytes=-1), "bytes"),
        (lambda m: m["files"]["graph.txt"].update(hash="0" * 64), "damaged"),
        (lambda m: m["files"].update({"recipe.toml": {"bytes": 0, "hash": "0" * 64}}), "recipe.toml is missing"),
        (lambda m: m["files"].update({"../../etc/passwd": {"bytes": 0, "hash": "0" * 64}}), "etc/passwd"),
    ],
)
def test_manifests_are_read_strictly(tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    write(tmp_path / "a", entries(), make_manifest())
    resign(tmp_path / "a", lambda parsed: None)
    read(tmp_path / "a", features=None)
    resign(tmp_path / "a", change)
    with pytest.raises(ArtifactError, match=message):
        read(tmp_path / "a", features=None)


def test_the_version_is_told_even_without_a_valid_checksum(saved: Path) -> None:
    file = saved / "manifest.json" if saved.is_dir() else saved
    file.write_bytes(file.read_bytes().replace(VERSION, b'"format": 9'))
    with pytest.raises(ArtifactError, match="written in format 9, this build reads"):
        read(saved, features=None)


def test_a_name_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    body = make_manifest().to_bytes().partition(b"\n")[2].replace(VERSION, VERSION + b", " + VERSION)
    line = b'{"sha256": "' + hashlib.sha256(body).hexdigest().encode() + b'",\n'
    with pytest.raises(ArtifactError, match="'format' occurs twice"):
        Manifest.from_bytes(line + body, "x")


def test_other_processors_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jisu"
    target = TargetInfo(name="cpu", triple="x86_64-unknown-linux-gnu", features=("avx512f", "avx2"))
    write(path, entries(), make_manifest(target=target))
    monkeypatch.setattr("platform.machine", lambda: "AMD64")
    with pytest.raises(ArtifactError, match=r"needs avx512f, which this host lacks \(it has avx2, fma\)"):
        read(path, features=lambda: HOST)
    read(path, features=["avx512f", "avx2"]).close()
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(ArtifactError, match="compiled for x86_64-unknown-linux-gnu, this host is aarch64"):
        read(path, features=["avx512f", "avx2"])
    read(path, features=None).close()  # to be inspected


def test_only_regular_files_are_read(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(saved)
    with pytest.raises(ArtifactError, match=f"symbolic link.*{saved.name}"):
        read(tmp_path / "link", features=None)
    os.mkfifo(tmp_path / "fifo.jisu")
    with pytest.raises(ArtifactError, match="neither a regular file"):
        read(tmp_path / "fifo.jisu", features=None)
    with pytest.raises(ArtifactError, match="not a regular file"):
        open_safetensors(tmp_path / "fifo.jisu")
    with pytest.raises(FileNotFoundError, match="nothing"):
        read(tmp_path / "nothing", features=None)
    if saved.is_dir():
        (saved / "graph.txt").rename(tmp_path / "graph.txt")
        (saved / "graph.txt").symlink_to(tmp_path / "graph.txt")
        with pytest.raises(ArtifactError, match="graph.txt: is a symbolic link"):
            read(saved, features=None)
        (saved / "graph.txt").unlink()
        os.mkfifo(saved / "graph.txt")
        with pytest.raises(ArtifactError, match="graph.txt: is not a regular file"):
            read(saved, features=None)


def test_folders_that_are_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="without manifest.json"):
        read(tmp_path, features=None)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(ArtifactError, match="looks like a checkpoint"):
        read(tmp_path, features=None)


def test_a_change_after_opening_is_noticed(saved: Path) -> None:
    with read(saved, features=HOST) as artifact:
        file = saved / "graph.txt" if saved.is_dir() else saved
        data = file.read_bytes()
        with open(file, "r+b") as stream:
            stream.write(data.replace(b"graph main", b"graph mine"))
        with pytest.raises(ArtifactError, match="graph.txt is damaged"):
            artifact.bytes("graph.txt")
        with open(file, "r+b") as stream:
            stream.write(data.replace(b"ELF", b"FLE"))
        if saved.is_file():
            with pytest.raises(ArtifactError, match="library.so is damaged"):
                artifact.bytes("library.so")
        with open(file, "r+b") as stream:
            stream.truncate(1)
        with pytest.raises(ArtifactError, match="shortened"):
            artifact.bytes("graph.txt")


# ---------------------------------------------------------------------------------------------------------- writing


def test_an_interrupted_write_leaves_the_old_artifact(saved: Path) -> None:
    def interrupted(file: BinaryIO) -> None:
        file.write(b"half of it")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(saved, {**entries(), "graph.txt": interrupted}, make_manifest())
    assert litter(saved.parent) == []
    with read(saved, features=HOST) as artifact:
        assert artifact.bytes("graph.txt") == b"graph main\n" * 3


def test_a_missing_source_keeps_its_name_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent.so"):
        write(tmp_path / "a.jisu", {"library.so": tmp_path / "absent.so"}, make_manifest())
    with pytest.raises(InputError, match="plain JSON"):
        write(tmp_path / "a.jisu", {}, make_manifest(meta={"x": object()}))
    with pytest.raises(InputError, match="plain JSON"):
        write(tmp_path / "a", {}, make_manifest(meta={"x": float("nan")}))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["a.jisu", "a"])
def test_unwritable_places_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match=f"file/{name}"):
        write(tmp_path / "file" / name, entries(), make_manifest())
    with pytest.raises(FileNotFoundError, match=f"absent/{name}"):
        write(tmp_path / "absent" / name, entries(), make_manifest())

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / ".jisu-x.tmp"))

    monkeypatch.setattr("secrets.token_hex", lambda _: "x")
    monkeypatch.setattr("builtins.open", denied)
    monkeypatch.setattr(os, "mkdir", denied)
    with pytest.raises(PermissionError, match=f"'{tmp_path}/{name}'"):
        write(tmp_path / name, entries(), make_manifest())
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_names_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for name in ("a.jisu", "a"):
        with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/{name}'"):
            write(tmp_path / name, entries(), make_manifest())
    assert os.listdir(tmp_path) == []


def test_nothing_but_artifacts_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    write(folder, {}, make_manifest())  # empty: allowed
    write(folder, {"graph.txt": b"x"}, make_manifest())  # an artifact: allowed
    (folder / "cat.png").write_text("meow")
    with pytest.raises(FileExistsError, match="photos"):
        write(folder, {}, make_manifest())
    assert (folder / "cat.png").read_text() == "meow"
    thesis = tmp_path / "thesis.tex"
    thesis.write_text("all of it")
    with pytest.raises(FileExistsError, match="thesis.tex"):
        write(thesis, {}, make_manifest())
    (tmp_path / "text").write_text("x")
    with pytest.raises(NotADirectoryError, match="text"):
        write(tmp_path / "text", {}, make_manifest())
    (tmp_path / "d.jisu").mkdir()
    with pytest.raises(IsADirectoryError, match="d.jisu"):
        write(tmp_path / "d.jisu", {}, make_manifest())
    (tmp_path / "l.jisu").symlink_to(thesis)
    with pytest.raises(FileExistsError, match="l.jisu"):
        write(tmp_path / "l.jisu", {}, make_manifest())
    assert thesis.read_text() == "all of it" and litter(tmp_path) == []


@pytest.mark.parametrize("exchange", [True, False])
def test_replacing_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(artifact_module, "_exchange", lambda first, second: False)
    for text in (b"one", b"two"):
        write(tmp_path / "a", {"graph.txt": text}, make_manifest())
    assert read(tmp_path / "a", features=None).bytes("graph.txt") == b"two"
    assert os.listdir(tmp_path) == ["a"]


def test_permissions_follow_the_umask(saved: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(saved.stat().st_mode) == (0o777 if saved.is_dir() else 0o666) & ~mask


def _write_many(path: Path, text: str, count: int) -> None:
    for _ in range(count):
        write(path, {"graph.txt": text.encode() * 5000, "recipe.toml": text.encode()}, make_manifest())


@pytest.mark.parametrize("name", ["a.jisu", "a"])
def test_concurrent_writers_and_a_reader(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(path, text, 15)) for text in "xy"]
    _write_many(path, "x", 1)
    for process in writers:
        process.start()
    seen = 0
    while any(process.is_alive() for process in writers):
        try:
            with read(path, features=None) as artifact:
                assert artifact.bytes("graph.txt") == artifact.bytes("recipe.toml") * 5000
                seen += 1
        except (ArtifactError, FileNotFoundError):
            assert path.is_dir()  # a folder may be swapped between the opening of two of its files; it must never mix
    for process in writers:
        process.join()
        assert process.exitcode == 0
    assert seen and os.listdir(tmp_path) == [name]
    read(path, features=None).close()


# ---------------------------------------------------------------------------------------------------------- library


# ------------------------------------------------------------------------------------------------------- safetensors


def store(path: Path, arrays: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> None:
    spec = {name: (array.dtype, array.shape, functools.partial(np.asarray, array)) for name, array in arrays.items()}
    with open(path, "wb") as file:
        assert write_safetensors(file, spec, metadata) == file.tell()


SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@settings(max_examples=100, deadline=None)
@given(
    specs=st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda s: s.isprintable()),
        st.tuples(st.sampled_from(sorted(DTYPES)), SHAPES),
        max_size=6,
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_written_tensors_come_back(
    tmp_path_factory: pytest.TempPathFactory, specs: dict[str, tuple[str, tuple[int, ...]]], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    arrays: dict[str, Array] = {}
    for name, (code, shape) in specs.items():
        dtype = DTYPES[code]
        bits = rng.integers(0, 2, (*shape, dtype.itemsize), dtype=np.uint8)
        arrays[name] = bits.reshape(-1).view(dtype).reshape(shape)
    path = tmp_path_factory.getbasetemp() / "round.safetensors"
    store(path, arrays, {"by": "test"})
    opened = open_safetensors(path)
    assert set(opened) == set(arrays) and opened.metadata == {"by": "test"}
    for name, array in arrays.items():
        value = opened[name].numpy()
        assert (value.dtype, value.shape, opened[name].nbytes) == (array.dtype, array.shape, array.nbytes)
        assert value.tobytes() == array.tobytes()
        assert value.size == 0 or value.ctypes.data % ALIGNMENT == 0
        opened[name].release()
        assert value.tobytes() == array.tobytes()
    with safe_open(path, framework="numpy") as other:  # the reference implementation accepts the file
        assert set(arrays) <= set(other.keys())


def test_files_of_the_reference_implementation_are_read(tmp_path: Path) -> None:
    arrays: dict[str, Array] = {
        "b": np.arange(7, dtype=np.int8),
        "a": np.ones((2, 3), np.float64),
        "s": np.array(2.0, np.float32),
    }
    save_file(arrays, tmp_path / "x.safetensors")
    opened = open_safetensors(tmp_path / "x.safetensors")
    for name, array in arrays.items():
        np.testing.assert_array_equal(opened[name].numpy(), array)


def raw(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str, shape: object, begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"abc", "truncated"),
        (b"\xff" * 16, "not a safetensors file"),
        ((200).to_bytes(8, "little") + b"{}", "truncated"),
        (raw(b"[]", b""), "not a safetensors"),
        (raw(b"{" * 100, b""), "not valid JSON"),
        (raw(b'{"a":' * 99_999, b""), "not valid JSON"),
        (raw(b'{"a":\xff}', b""), "not valid JSON"),
        (raw(b'{"a":1,"a":2}', b""), "'a' occurs twice"),
        (raw({"a": 3}, b""), "needs exactly"),
        (raw({"a": {"dtype": "F32"}}, b""), "needs exactly"),
        (raw({"a": {**entry("F32", [], 0, 4), "x": 1}}, b"1234"), "needs exactly"),
        (raw({"a": entry("F33", [], 0, 4)}, b"1234"), "unknown dtype 'F33'"),
        (raw({"a": entry("F32", [-1], 0, 4)}, b"1234"), "invalid shape"),
        (raw({"a": entry("F32", [True], 0, 4)}, b"1234"), "invalid shape"),
        (raw({"a": entry("F32", 1, 0, 4)}, b"1234"), "invalid shape"),
        (raw({"a": entry("F32", [1] * 65, 0, 4)}, b"1234"), "invalid shape"),
        (raw({"a": entry("F32", [2**40, 2**40], 0, 4)}, b"1234"), "overflows"),
        (raw({"a": entry("F32", [0, 2**63 - 1], 0, 0)}, b""), "overflows"),
        (raw({"a": entry("F32", [1], 0, 5)}, b"12345"), "needs 4 bytes, has 5"),
        (raw({"a": entry("F32", [1], 0, 4)}, b"123"), "outside"),
        (raw({"a": entry("F32", [1], 4, 0)}, b"1234"), "outside"),
        (raw({"a": entry("F32", [1], 0, 4)}, b"12345"), "need 4 bytes, the file has 5"),
        (raw({"a": entry("F32", [1], 1, 5)}, b"12345"), "unused bytes"),
        (raw({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 2, 6)}, b"123456"), "overlaps"),
        (raw({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 0, 4)}, b"1234"), "overlaps"),
        (raw({"__metadata__": {"a": 1}}, b""), "__metadata__"),
    ],
)
def test_inconsistent_safetensors_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=f"x.safetensors: .*{message}"):
        open_safetensors(path)


@settings(max_examples=300, deadline=None)
@given(position=st.integers(0, 10_000), value=st.integers(0, 255))
def test_a_changed_header_is_refused_or_stays_inside_the_file(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    store(path, WEIGHTS)
    data = bytearray(path.read_bytes())
    data[position % len(data)] = value
    path.write_bytes(data)
    try:
        for tensor in open_safetensors(path).values():
            assert tensor.numpy().nbytes == tensor.nbytes <= len(data)
    except ArtifactError:
        pass


def test_writers_mistakes_are_named(tmp_path: Path) -> None:
    zeros = functools.partial(np.zeros, 3, np.float32)
    for spec, message in (
        ({"a": (np.float32, (4,), zeros)}, r"declared as float32\[4\], produced float32\[3\]"),
        ({"a": (np.float64, (3,), zeros)}, "declared as float64"),
        ({"a": (np.complex128, (3,), zeros)}, "no dtype complex128"),
        ({"__metadata__": (np.float32, (3,), zeros)}, "reserved name"),
    ):
        with pytest.raises(InputError, match=message):
            write_safetensors(io.BytesIO(), spec)


def test_undefined_booleans_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(raw({"a": entry("BOOL", [2], 0, 2)}, b"\1\2"))
    with pytest.raises(ArtifactError, match="BOOL"):
        open_safetensors(tmp_path / "x")["a"].numpy()


def test_streaming_does_not_grow_the_process(tmp_path: Path) -> None:
    path, count, size = tmp_path / "big.safetensors", 16, 4 << 20
    with open(path, "wb") as file:
        block = functools.partial(np.ones, size, np.uint8)
        write_safetensors(file, {f"w{i}": (np.uint8, (size,), block) for i in range(count)})
    process = psutil.Process()
    tensors = open_safetensors(path)
    before = process.memory_info().rss
    highest = 0
    for tensor in tensors.values():
        assert int(tensor.numpy().sum(dtype=np.int64)) == size
        highest = max(highest, process.memory_info().rss - before)
        tensor.release()
    assert highest < 3 * size, f"grew by {highest} bytes while reading {count * size}"


def test_releasing_never_loses_what_was_written(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(1 << 16))
    with open(tmp_path / "x", "rb") as file:
        private = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=np.uint8)
    private[:] = 7
    release_pages(private)
    assert private.min() == 7


def test_odd_sizes_come_last(tmp_path: Path) -> None:
    store(tmp_path / "x", {"odd": np.ones(3, np.int8), "even": np.ones(64, np.int8), "odder": np.ones(5, np.int8)})
    assert list(open_safetensors(tmp_path / "x")) == ["even", "odd", "odder"]


def test_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no model.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ArtifactError, match="pytorch_model.bin is a pickle"):
        open_checkpoint(tmp_path)
    store(tmp_path / "model.safetensors", {"a": np.ones(2)})
    assert list(open_checkpoint(tmp_path)) == ["a"]
    store(tmp_path / "m-1.safetensors", {"x": np.ones(2)})
    store(tmp_path / "m-2.safetensors", {"y": np.zeros(3)})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "m-1.safetensors", "y": "m-2.safetensors"}}))
    tensors = open_checkpoint(tmp_path)
    np.testing.assert_array_equal(tensors["y"].numpy(), np.zeros(3))
    assert set(tensors) == {"x", "y"}


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "weight_map"),
        ({"weight_map": {}}, "weight_map"),
        ({"weight_map": {"x": "../m-1.safetensors"}}, "not a plain"),
        ({"weight_map": {"x": "/etc/passwd.safetensors"}}, "not a plain"),
        ({"weight_map": {"x": 1}}, "not a plain"),
        ({"weight_map": {"x": "m-9.safetensors"}}, "m-9.safetensors is missing"),
        ({"weight_map": {"z": "m-1.safetensors"}}, "'z' is not in m-1.safetensors"),
    ],
)
def test_bad_indices_are_refused(tmp_path: Path, index: object, message: str) -> None:
    store(tmp_path / "m-1.safetensors", {"x": np.ones(2)})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("size", [0, 5000, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 5])
def test_large_entries_are_checked_piece_by_piece(size: int, tmp_path: Path) -> None:
    """However an entry is written, its hash is the same, and a changed byte in any piece is found."""
    data = np.random.default_rng(0).bytes(size)

    def portions(file: Any) -> None:
        for i in range(0, size, 5_000_011):
            file.write(data[i : i + 5_000_011])

    for name, source in (("whole", data), ("portions", portions)):
        write(tmp_path / f"{name}.jisu", {**entries(), "chat_template.jinja": source}, make_manifest())
    assert (tmp_path / "whole.jisu").read_bytes() == (tmp_path / "portions.jisu").read_bytes()
    with read(tmp_path / "whole.jisu", features=None) as artifact:
        assert artifact.bytes("chat_template.jinja") == data
    for at in {0, size // 2, size - 1} if size else ():
        raw = bytearray((tmp_path / "whole.jisu").read_bytes())
        raw[raw.index(data[: 1 << 10]) + at] ^= 1
        (tmp_path / "broken.jisu").write_bytes(raw)
        with pytest.raises(ArtifactError, match="chat_template.jinja is damaged"):
            read(tmp_path / "broken.jisu", features=None)
