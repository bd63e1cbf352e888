"""Special files, hostile names and bombs: refused or read, never waited for, never more memory than is documented."""

import os
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cases import THOROUGH, documented, tried
from test_fuzz_images import png as png_header
from test_fuzz_user_data import STRUCT, ingested, png

from nf_pipeline.config import DataConfig, resolve_config
from nf_pipeline.data.images import open_images
from nf_pipeline.errors import ConfigError, DataError
from nf_pipeline.samples import InputSpec

# Folders may have names that no text encoding knows: bytes stand for themselves.
HOSTILE_NAMES = (
    b"new\nline.png",
    b"\xff\xfe.png",
    b"x" * 251 + b".png",
    b"..png",
    b"a b'\"$(x).png",
    b"\x1b[31m.png",
    b"-rf.png",
)


def class_folders(root: Path) -> Path:
    """Makes an image folder with two classes of five images."""
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for idx in range(5):
            (root / name / f"{idx}.png").write_bytes(png(idx))
    return root


def test_image_files_with_hostile_names_are_ingested(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "images")
    for name in HOSTILE_NAMES:
        tried("data: hostile folders")
        with open(os.fsencode(folder / "a") + b"/" + name, "wb") as file:
            file.write(png(1))
    os.mkdir(os.fsencode(folder) + b"/c\n\xff")
    for idx in range(3):
        (Path(os.fsdecode(os.fsencode(folder) + b"/c\n\xff")) / f"{idx}.png").write_bytes(png(idx))
    assert isinstance(ingested(folder), list)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path is limited to some 100 bytes
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def link_out(path: Path) -> None:
    secret = path.parent.parent.parent / "secret.png"
    secret.write_bytes(png(9))
    path.symlink_to(secret)


def link_up(path: Path) -> None:
    path.symlink_to("../../../../../../../../etc/passwd")


def link_loop(path: Path) -> None:
    path.symlink_to(path.name)


def link_to_folder(path: Path) -> None:
    path.symlink_to(path.parent.parent)


def zip_file(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../inside.png", png(1))


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**30)


SPECIAL = (fifo, unix_socket, link_out, link_up, link_loop, link_to_folder, zip_file, device, sparse)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("make", SPECIAL)
@pytest.mark.parametrize("name", ["x.png", "x.zip", "x"])
def test_image_folder_with_a_special_file_names_it_or_skips_it(
    tmp_path: Path, make: Callable[[Path], None], name: str
) -> None:
    tried("data: hostile folders")
    folder = class_folders(tmp_path / "images")
    make(folder / "a" / name)
    outcome = ingested(folder)
    assert isinstance(outcome, DataError) and name in str(outcome), outcome
    assert isinstance(ingested(folder, on_bad_image="skip"), list)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("make", SPECIAL)
@pytest.mark.parametrize("name", ["x.parquet", "train", "class", "x.png"])
def test_special_file_beside_or_as_the_data_is_explained(
    tmp_path: Path, make: Callable[[Path], None], name: str
) -> None:
    tried("data: hostile folders")
    folder = class_folders(tmp_path / "images")
    make(folder / name)
    for source in (folder, folder / name, folder / name / "inside.png"):
        outcome = ingested(source)
        assert isinstance(outcome, list | DataError), outcome
        config = DataConfig(source=str(source), on_bad_image="skip", decode_threads=1)
        documented(lambda config=config: list(open_images(config, InputSpec(shape=(1, 6, 6)))))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("make", [*SPECIAL, Path.mkdir])
@pytest.mark.parametrize("name", ["run.toml", "run.json"])
def test_config_that_is_a_special_file_is_explained(tmp_path: Path, make: Callable[[Path], None], name: str) -> None:
    tried("config: special files")
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    make(inner / name)
    with pytest.raises(ConfigError, match=name) as caught:
        resolve_config(file=inner / name)
    assert caught.value.fix


def test_image_folder_that_is_nested_too_deeply_is_an_error(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "images")
    here = os.getcwd()
    try:
        os.chdir(folder / "a")
        for _ in range(1500):
            os.mkdir("d")
            os.chdir("d")
        Path("deep.png").write_bytes(png(1))
    finally:
        os.chdir(here)
    try:
        outcome = ingested(folder)
    finally:
        remove_chain(folder / "a")
    assert isinstance(outcome, DataError | list), outcome


def remove_chain(folder: Path) -> None:
    """Removes what shutil cannot: its recursion is too deep for Python."""
    subprocess.run(["rm", "-rf", str(folder)], check=True, timeout=60)


def bomb_of_labels(path: Path) -> None:
    """Sixteen million equal labels, a few kB of file."""
    with pq.ParquetWriter(path, pa.schema([("image", STRUCT), ("label", pa.int64())]), compression="zstd") as writer:
        rows = 2**20
        batch = pa.table({"image": pa.nulls(rows, STRUCT), "label": pa.array(np.zeros(rows, np.int64))})
        for _ in range(16):
            writer.write_table(batch)


def bomb_of_label_texts(path: Path) -> None:
    """Rows that all have the same label of a megabyte."""
    labels = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), pa.array(["x" * 2**20]))
    pq.write_table(pa.table({"image": pa.nulls(100_000, STRUCT), "label": labels}), path, store_schema=False)


def bomb_of_images(path: Path) -> None:
    """Rows that are all the same image of 32 MiB, which the file holds once."""
    cells = pa.DictionaryArray.from_arrays(
        pa.array([0] * 40, pa.int32()), pa.array([os.urandom(2**14) * 2**11], pa.binary())
    )
    table = pa.table({"image": cells, "label": [0, 1] * 20})
    pq.write_table(table, path, store_schema=False, compression="zstd", dictionary_pagesize_limit=2**30)


def bomb_of_zeros(path: Path) -> None:
    """One image of 140 MB of zeros, compressed."""
    cells = pa.array([b"\0" * 140_000_000] + [b"x"] * 19, pa.binary())
    table = pa.table({"image": cells, "label": [0, 1] * 10})
    pq.write_table(table, path, compression="zstd", use_dictionary=False)


def bomb_of_pixels(path: Path) -> None:
    """Nested lists of which one has 140 million equal pixels."""
    num = 140_000_000
    ends = np.concatenate([[0], np.full(20, num)]).astype(np.int32)
    inner = pa.ListArray.from_arrays(pa.array(ends), pa.array(np.zeros(num, np.uint8)))
    cells = pa.ListArray.from_arrays(pa.array(np.arange(21, dtype=np.int32)), inner)
    pq.write_table(pa.table({"image": cells, "label": [0, 1] * 10}), path, compression="zstd")


def bomb_of_png(path: Path) -> None:
    """Images whose headers claim 4 G pixels, and one of 64 M that decodes."""
    cells = [{"bytes": png_header(65_535, 65_535, 8, 6, b"\0" * 1000), "path": None}] * 20
    pq.write_table(pa.table({"image": pa.array(cells, STRUCT), "label": [0, 1] * 10}), path)


BOMBS = (bomb_of_labels, bomb_of_label_texts, bomb_of_images, bomb_of_zeros, bomb_of_pixels, bomb_of_png)
SLOW_BOMBS = (bomb_of_pixels,)  # to write; `make fuzz` tries them too
LIMIT_BYTES = 2**30
READ = """
import resource, sys
import pyarrow.parquet, numpy, PIL.Image
from nf_pipeline.cli import main
from nf_pipeline.config import validate_config
from nf_pipeline.data.ingest import ingest
from nf_pipeline.errors import DataError
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.store import open_store
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + int(sys.argv[3]),) * 2)
data = {"source": sys.argv[1], "decode_threads": 1, "on_bad_image": "skip"}
config = validate_config({"memory": {"budget_bytes": 1}, "storage": {"uri": sys.argv[2]}, "data": data})
try:
    list(ingest(open_store(sys.argv[2]), RunLayout("r"), config, "a"))
except DataError as error:
    print(f"DataError: {error}")
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("make", BOMBS if THOROUGH else [make for make in BOMBS if make not in SLOW_BOMBS])
def test_parquet_bomb_is_refused_within_bounded_memory(tmp_path: Path, make: Callable[[Path], None]) -> None:
    tried("data: bombs under RLIMIT_AS")
    file = tmp_path / "bomb.parquet"
    make(file)
    assert file.stat().st_size < 3 * 2**20
    command = [sys.executable, "-c", READ, str(file), str(tmp_path / "store"), str(LIMIT_BYTES)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment, check=False)
    assert ended.returncode == 0 and ended.stdout.startswith("DataError"), (ended.stdout, ended.stderr[-2000:])
    assert "bomb.parquet" in ended.stdout and "Fix:" in ended.stdout
