"""``kr2cache cache``: what people and scripts see of the caches there are."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tiny_cache
from world import World, unpack_old_world

from kr2cache import FeatureCache
from kr2cache.cli import run
from kr2cache.errors import BusyError
from kr2cache.store import inventory
from kr2cache.store.sharing import whole_cache
from kr2cache.system import claims


def command(line: str) -> int:
    return run(["cache", *shlex.split(line)])


def answer(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, Any, str]:
    """(exit code, the JSON document, what people see) of one call with --json."""
    capsys.readouterr()
    code = command(f"{line} --json")
    captured = capsys.readouterr()
    return code, json.loads(captured.out), captured.err


@pytest.fixture
def place(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """Caches of three splits, as ``.kr2cache`` of the working folder."""
    monkeypatch.chdir(world.folder)
    for split in ("train", "dev", "test"):
        world.extract(split)
    shutil.move(world.caches, world.folder / ".kr2cache")
    return world


def folder_of(split: str) -> Path:
    (folder,) = Path(".kr2cache/udpos", split).iterdir()
    return folder


# list and info --------------------------------------------------------------------------------------------------------


def test_every_cache_is_listed_with_its_state(place: World, capsys: pytest.CaptureFixture[str]) -> None:
    with (shard := next(folder_of("dev").glob("*.h5"))).open("r+b") as file:
        file.seek(tiny_cache.byte_offset(shard, "examples/complete"))
        file.write(b"\0\0")
    next(folder_of("test").glob("*.h5")).write_bytes(b"nothing")
    code, listed, _ = answer("list", capsys)
    assert code == 0
    by_split = {Path(one["folder"]).parent.name: one for one in listed}
    assert (by_split["train"]["sequences"], by_split["train"]["complete"]) == (12, 12)
    assert (by_split["dev"]["sequences"], by_split["dev"]["complete"]) == (5, 3)
    assert "is not an HDF5 file" in by_split["test"]["problem"]
    assert command(f"info {folder_of('test')}") == 1
    assert "kr2cache cache verify" in capsys.readouterr().err
    assert by_split["train"]["bytes"] == sum(path.stat().st_size for path in folder_of("train").glob("*.h5"))
    assert (by_split["train"]["resource"], by_split["train"]["corpus"]) == ("res", "corpus")
    assert command("list") == 0
    shown = capsys.readouterr().out
    for text in ("3 of 5 complete", "cannot be read", "udpos/train/res-", "3 caches", "is not an HDF5 file"):
        assert text in shown


def test_of_caches_that_differ_in_an_id_alone_the_older_is_stale(
    place: World, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sentence is edited and extracted again; fewer layers or sentences of the same text are no reason."""
    old = folder_of("train")
    path = place.data / "train.conllu"
    text = path.read_text("utf-8")
    place.extract("train", layers="last1", cache_dir=Path(".kr2cache"))
    place.extract("train", limit=3, cache_dir=Path(".kr2cache"))
    assert not any(one["stale"] for one in answer("list", capsys)[1])
    first = next(line for line in text.splitlines() if line.startswith("1\t"))
    path.write_text(text.replace(first, first.replace("\t" + first.split("\t")[1], "\tanders", 1), 1), "utf-8")
    place.extract("train", cache_dir=Path(".kr2cache"))
    for shard in old.glob("*.h5"):
        os.utime(shard, (1_700_000_000, 1_700_000_000))
    listed = {Path(one["folder"]).name: one for one in answer("list", capsys)[1]}
    assert re.fullmatch(r"res-\w{8} is newer: 1 of 12 texts changed", listed[old.name]["stale"])
    assert listed[old.name]["written"].startswith("2023-11-1")
    assert command("list") == 0
    shown = capsys.readouterr().out
    assert f"kr2cache cache remove {old.name}" in shown
    (row,) = [line for line in shown.splitlines() if old.name in line and "stale" in line and "│" in line]
    assert "2023-11-1" in row


def test_no_cache_is_no_error(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("list") == 0
    assert "No cache in .kr2cache." in capsys.readouterr().out
    assert answer("list", capsys)[1] == []


def test_info_counts_and_measures(place: World, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of("train")
    code, about, _ = answer(f"info {folder.name}", capsys)
    assert code == 0
    cache = FeatureCache.open(folder)
    assert sum(about["lengths"]["counts"]) == 12
    edges = about["lengths"]["edges"]
    assert edges[0] <= cache.n_tokens.min()
    assert cache.n_tokens.max() < edges[-1]
    every = [np.linalg.norm(cache[name].astype(np.float64), axis=2) for name in cache.ids]
    np.testing.assert_allclose(about["norms"], np.concatenate(every, axis=1).mean(axis=1), rtol=1e-4)
    assert about["largest"][4] == max(float(np.abs(cache[name][4]).max()) for name in cache.ids)
    assert about["provenance"]["chosen"]["split"] == "train"
    assert command(f"info {folder}") == 0
    shown = capsys.readouterr().out
    for text in (
        "12 of 12 complete",
        "layers 0-4 as float16",
        "tokens per sequence",
        "mean norm",
        "█",
        cache.fingerprint,
    ):
        assert text in shown


def test_a_cache_is_found_by_the_beginning_of_its_name(place: World, capsys: pytest.CaptureFixture[str]) -> None:
    name = folder_of("train").name
    for way in (name[:-3], f"udpos/train/{name}", f"{name}/", str(folder_of("train")), f"{folder_of('train')}/"):
        assert command(f"info {way}") == 0, way
    assert command("info res-") == 1
    assert "may be" in capsys.readouterr().err
    assert command("info nothing") == 1
    assert answer("info nothing", capsys)[1]["error"]["remedy"].count("res-") == 3


# verify ---------------------------------------------------------------------------------------------------------------


def test_sound_caches_verify_with_exit_code_0(place: World, capsys: pytest.CaptureFixture[str]) -> None:
    code, found, people = answer("verify", capsys)
    assert (code, found["ok"], len(found["caches"])) == (0, True, 3)
    assert [one["sequences"] for one in found["caches"]] == [5, 6, 12]
    assert "12 sequences intact" in people


def test_damage_is_named_with_exit_code_1(place: World, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of("train")
    (shard,) = folder.glob("*.h5")
    content = bytearray(shard.read_bytes())
    content[tiny_cache.byte_offset(shard, "hidden") + 1] ^= 1
    shard.write_bytes(content)
    code, found, people = answer(f"verify {folder} {folder_of('dev')}", capsys)
    assert (code, found["ok"]) == (1, False)
    assert [one["ok"] for one in found["caches"]] == [False, True]
    assert found["caches"][0]["damaged"] == ["train-s1"]
    assert "1 sequence of 12 damaged: train-s1" in people
    assert f"kr2cache cache repair {folder} --resource FOLDER_OF_res" in people
    shard.write_bytes(b"")
    assert "Run the kr2cache extract command that made it again" in answer(f"verify {folder}", capsys)[2]


@pytest.mark.parametrize(
    ("part", "field", "told"), [("chosen", "split", False), ("chosen", "corpus", True), ("recorded", "device", True)]
)
def test_a_provenance_that_was_changed_is_found(
    place: World, capsys: pytest.CaptureFixture[str], part: str, field: str, told: bool
) -> None:
    """By its checksum; and by the fingerprint where a field decides it, should someone have taken that out."""
    folder = folder_of("dev")
    (shard,) = folder.glob("*.h5")
    with h5py.File(shard, "r+") as file:
        made = json.loads(file.attrs["provenance"])
        made[part][field] = "other"
        if not told:
            del made["header_xxh3"]
        file.attrs["provenance"] = json.dumps(made)
    code, found, _ = answer(f"verify {folder}", capsys)
    assert code == 1
    (one,) = found["caches"]
    if told:
        assert "attributes do not match their checksum" in one["unreadable"][shard.name]
    else:
        assert one["faults"] == ["its fingerprint is not that of its provenance"]


# slice, fuse, remove --------------------------------------------------------------------------------------------------


def test_slice_and_fuse_say_where_and_how_much(place: World, capsys: pytest.CaptureFixture[str]) -> None:
    name = folder_of("train").name
    (place.folder / "ids.txt").write_text("train-s3\n\ntrain-s1\n")
    code, made, people = answer(f"slice {name} --layers last2 --ids ids.txt", capsys)
    assert (code, made["made"], made["sequences"]) == (0, True, 2)
    assert FeatureCache.open(made["cache"]).ids == ["train-s1", "train-s3"]
    code, fused, people = answer(f"fuse {name} --fusion all", capsys)
    assert (code, fused["made"]) == (0, True)
    assert "(20 % of" in people
    code, again, people = answer(f"fuse {name} --fusion all", capsys)
    assert (code, again["made"], again["cache"]) == (0, False, fused["cache"])
    assert "Already complete" in people
    assert command("list") == 0
    assert "average of 0-4" in capsys.readouterr().out
    for line in (f"slice {name} --ids nowhere.txt", f"slice {name}", f"fuse {name} --fusion fuse"):
        code, document, _ = answer(line, capsys)
        assert (code, document["error"]["type"]) == (1, "ConfigError")


def test_remove_asks_and_frees(
    place: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of("dev")
    monkeypatch.setattr("typer.confirm", lambda question: False)
    assert command(f"remove {folder.name}") == 1
    assert folder.is_dir()
    asked: list[str] = []
    monkeypatch.setattr("typer.confirm", lambda question: bool(asked.append(question)) or True)
    size = sum(path.stat().st_blocks * 512 for path in folder.glob("*.h5"))
    assert command(f"remove {folder.name}") == 0
    assert re.fullmatch(r"Remove 1 cache and free .*\?", asked[0])
    assert not folder.parent.exists(), "its empty folder went with it"
    assert folder_of("train").is_dir()
    code, removed, _ = answer(f"remove --yes {folder_of('train')} {folder_of('test')}", capsys)
    assert code == 0
    assert len(removed["removed"]) == 2
    assert removed["bytes"] > size
    assert not list(Path(".kr2cache").rglob("*.h5"))


def test_remove_without_anybody_to_answer_says_so(
    place: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    folder = folder_of("dev")
    assert command(f"remove {folder.name}") == 1
    shown = " ".join(capsys.readouterr())
    assert "Nothing was removed: the question got no answer." in shown
    assert "Give --yes." in shown
    assert "Interrupted" not in shown
    assert folder.is_dir()


def test_remove_takes_nothing_that_is_not_the_caches_own(place: World, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of("dev")
    (folder / "notes.txt").write_text("mine")
    assert command(f"remove --yes {folder}") == 0
    assert "notes.txt in it is not of the cache and was kept" in capsys.readouterr().out
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    assert command("remove --yes corpus") == 1
    assert (place.folder / "corpus" / "train.conllu").is_file()


def test_what_is_being_written_is_not_removed(place: World, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of("dev")
    monkeypatch.setattr(claims, "PATIENCE_S", 0.05)
    with whole_cache(folder), pytest.raises(BusyError, match=rf"is being written by process {os.getpid()} of .* since"):
        inventory.remove(inventory.removable(folder))
    assert len(FeatureCache.open(folder)) == 5


def test_what_changed_after_the_question_is_not_removed(
    place: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of("dev")
    shard = next(folder.glob("*.h5"))

    def write_and_agree(question: str) -> bool:
        with shard.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"x")
        return True

    monkeypatch.setattr("typer.confirm", write_and_agree)
    assert command(f"remove {folder.name}") == 1
    assert "changed after you were asked: another process wrote to it." in capsys.readouterr().err
    assert shard.exists()


READ = """
import mmap, sys
with open(sys.argv[1]) as file:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
print("mapped", flush=True)
input()
"""


def test_what_a_process_reads_is_not_removed(place: World, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of("dev")
    reads = [sys.executable, "-c", READ, str(next(folder.glob("*.h5")))]
    with subprocess.Popen(reads, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        assert command(f"remove --yes {folder.name}") == 1
        assert f"is being read by process {process.pid} (" in capsys.readouterr().err
        process.communicate(b"\n")
    assert command(f"remove --yes {folder.name}") == 0


def test_looking_at_caches_imports_neither_torch_nor_transformers(place: World) -> None:
    folder = folder_of("train")
    program = (
        "import sys\nfrom kr2cache.cli import run\n"
        "for line in sys.argv[1:]:\n    assert run(['cache', *line.split()]) == 0, line\n"
        "loaded = {'torch', 'transformers', 'datasets'} & set(sys.modules)\nassert not loaded, loaded\n"
    )
    lines = ["list", f"info {folder}", "verify", f"slice {folder} --layers last2", f"fuse {folder}", "list --json"]
    lines.append(f"remove --yes {folder}")
    done = subprocess.run([sys.executable, "-c", program, *lines], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Folders written in other ways ----------------------------------------------------------------------------------------

NAME = "res-949d8033"


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Finished caches of res, ``.kr2cache`` of the working folder."""
    unpack_old_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    return (tmp_path / "caches").rename(tmp_path / ".kr2cache")


def below(folder: Path) -> set[str]:
    """What lies in it but for the files of caches."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix != ".h5"}


def test_what_is_made_of_a_cache_goes_beside_it(
    caches: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From wherever, however its folder is written; and nothing else is made."""
    root, real = caches.parent, caches / "udpos" / "train" / NAME
    (root / "elsewhere").mkdir()
    (root / "elsewhere" / "link").symlink_to(real)
    (root / "caches").symlink_to(caches)
    split = caches / "udpos" / "train"
    ways = [
        (caches / "udpos", f"train/{NAME}", ""),
        (split, NAME, ""),
        (split, f"./{NAME}/", ""),
        (split, f"../train/{NAME}", ""),
        (real, ".", ""),
        (real, f"../{NAME}/.", ""),
        (root / "elsewhere", "link", ""),
        (root / "elsewhere", "link/", ""),
        (root, f"caches/udpos/train/{NAME}/", ""),
        (root, f"udpos/train/{NAME}", ""),
        (root, NAME[:-2], "--cache-dir .kr2cache/"),
        (root / "elsewhere", NAME, "--cache-dir ../caches/"),
        (caches, NAME, "--cache-dir ."),
    ]
    before = below(root)
    names = set()
    for folder, name, where in ways:
        for line in [f"slice {name} --layers 1"] + ([f"fuse {name} --fusion all"] if name == "." else []):
            monkeypatch.chdir(folder)
            code, document, _ = answer(f"{line} {where}", capsys)
            assert code == 0, (folder, line, document)
            new = Path(document["cache"]).resolve()
            assert (new.parent, document["made"]) == (split, True), (folder, line)
            names.add(new.name)
            assert command(f"remove --yes {document['cache']}") == 0
    assert below(root) == before
    assert len(names) == 2
    code, document, _ = answer(f"slice {real} --layers 1 --cache-dir {root}/other/", capsys)
    assert Path(document["cache"]).parent == root / "other" / "udpos" / "train"


def test_a_cache_on_another_disk_stays_a_cache_of_its_folder(caches: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Moved away, a link in its place: slices go where the link is, and it is repaired and removed through it."""
    place = caches / "udpos" / "train" / NAME
    Path("disk").mkdir()
    moved = place.rename(Path("disk/moved").absolute())
    place.symlink_to(moved)
    code, document, _ = answer(f"slice {NAME} --layers 1", capsys)
    assert (code, Path(document["cache"]).parent.resolve()) == (0, place.parent)
    with whole_cache(moved), pytest.raises(BusyError, match="is being written"):
        inventory.remove(inventory.removable(place))
    code, document, _ = answer(f"slice {moved} --layers 1", capsys)
    assert (code, document["error"]["type"]) == (1, "ConfigError")
    assert "Give --cache-dir" in document["error"]["remedy"]
    assert command(f"remove --yes {NAME} .kr2cache/udpos/train/{NAME}") == 0
    assert not moved.exists()
    assert not place.is_symlink()
    assert below(Path("disk")) == set()


@pytest.mark.parametrize("way", [".", "link"])
def test_a_cache_is_looked_at_mended_and_removed_by_any_name(
    caches: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], way: str
) -> None:
    fused = caches / "udpos" / "test" / "res-55ed32a3"  # mended from the cache that it was made of
    (shard,) = fused.glob("*.h5")
    sound = shard.read_bytes()
    shard.write_bytes(
        sound[: (at := tiny_cache.byte_offset(shard, "hidden"))] + bytes([sound[at] ^ 1]) + sound[at + 1 :]
    )
    Path("link").symlink_to(fused)
    if way == ".":
        monkeypatch.chdir(fused)
    assert command(f"info {way}") == 0
    assert command(f"verify {way}") == 1
    code, document, _ = answer(f"repair {way}", capsys)
    assert (code, len(document["damaged"]), document["taken_over"]) == (0, 1, 1), document
    assert shard.read_bytes() == sound
    assert command(f"verify {way}") == 0
    assert command(f"remove --yes {way}") == 0
    assert not fused.exists()
    assert below(fused.parent) == {"res-014d9356", "res-d364acc9"}


def test_no_name_is_no_cache(caches: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("''", "/nowhere", "~nobody-of-that-name/x"):
        code, document, _ = answer(f"info {name}", capsys)
        assert (code, document["error"]["type"]) == (1, "ConfigError"), document
        assert "There is no cache" in document["error"]["message"]
