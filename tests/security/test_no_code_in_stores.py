"""Nothing that is read from a store or a data set can execute code: what a run writes, and hostile things to read."""

import ast
import hashlib
import io
import json
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torchvision
from PIL import Image
from planted_run import Planted

import nf_pipeline.config
from nf_pipeline.data.sources import open_source
from nf_pipeline.data.torchvision_sets import is_torchvision_name
from nf_pipeline.errors import ConfigError, DataError, NFError

PACKAGE = Path(nf_pipeline.__file__).parent

# Import by a name that is not known when the program is written, and where the name comes from.
DYNAMIC_IMPORTS = {
    "__init__": "table in the module",
    "data/__init__": "table in the module",
    "executors/base": "constants of the driver",
    "driver/doctor": "constants of the module",
    "core/factory_models": "the factory that the user named",
}


def kind_of(data: bytes) -> str:
    """Tells the format of a file by its bytes, as a program that opens it would."""
    if data[:4] == b"PAR1" == data[-4:]:
        return "parquet"
    if len(data) > 8 and (length := struct.unpack("<Q", data[:8])[0]) <= len(data) - 8:
        try:
            return "safetensors" if isinstance(json.loads(data[8 : 8 + length]), dict) else "unknown"
        except ValueError:
            pass
    try:
        text = data.decode("utf8")
    except UnicodeDecodeError:
        return "unknown"
    try:
        [json.loads(line) for line in ([text] if text.lstrip().startswith("{\n") else text.splitlines())]
        return "json"
    except ValueError:
        return "markdown" if text.startswith(("# ", "---\n")) else "unknown"


@pytest.mark.ray
@pytest.mark.s3
def test_every_object_of_a_run_is_json_parquet_safetensors_or_markdown(planted: Planted) -> None:
    kinds = {key: kind_of(data) for key, data in planted.objects().items() if key.startswith("first/")}
    by_suffix = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".safetensors": "safetensors"}
    by_suffix[".md"] = "markdown"
    assert {Path(key).suffix for key in kinds} == set(by_suffix)
    assert {key: kind for key, kind in kinds.items() if kind != by_suffix[Path(key).suffix]} == {}


@pytest.mark.parametrize(
    "data", [pickle.dumps([1]), pickle.dumps({}, protocol=0), b"PK\x03\x04" + bytes(40), b"\x93NUMPY"]
)
def test_what_could_execute_code_is_of_no_known_kind(data: bytes) -> None:
    assert kind_of(data) == "unknown"


def test_modules_are_imported_by_name_only_where_the_name_is_known() -> None:
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            if isinstance(node, ast.Attribute | ast.Name) and ast.unparse(node).endswith("import_module"):
                found.add(path.relative_to(PACKAGE).with_suffix("").as_posix())
    assert found == set(DYNAMIC_IMPORTS)


class Bomb:
    """Leaves a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.trace,)


def bomb(folder: Path) -> tuple[bytes, Path]:
    trace = folder / "exploded"
    data = pickle.dumps(Bomb(trace))
    pickle.loads(data)
    assert trace.exists(), "the bomb works"
    trace.unlink()
    return data, trace


def png(value: int) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(np.full((8, 8), value, np.uint8)).save(sink, "PNG")
    return sink.getvalue()


def hostile_table(kind: str, data: bytes) -> pa.Table:
    """Makes a data set of ten images with a pickle where programs that know Ray Data's types unpickle."""

    def field(name: str, stored: pa.DataType, extension: str, parameters: bytes) -> pa.Field:
        metadata = {"ARROW:extension:name": extension, "ARROW:extension:metadata": parameters}
        return pa.field(name, stored, metadata=metadata)

    images, labels = pa.array([png(row) for row in range(10)]), pa.array([row % 2 for row in range(10)])
    pickles = pa.array([data] * 10, pa.large_binary())
    pixels = pa.array([[1] * 64] * 10, pa.list_(pa.uint8()))
    plain = [pa.field("image", pa.binary()), pa.field("label", pa.int64())]
    if kind == "image":
        hostile = field("image", pa.large_binary(), "ray.data.arrow_pickled_object", b"")
        return pa.table([pickles, labels], schema=pa.schema([hostile, plain[1]]))
    if kind == "label":
        hostile = field("label", pa.large_binary(), "ray.data.arrow_pickled_object", b"")
        return pa.table([images, pickles], schema=pa.schema([plain[0], hostile]))
    if kind == "shape":
        hostile = field("image", pa.list_(pa.uint8()), "ray.data.arrow_tensor_v2", data)
        return pa.table([pixels, labels], schema=pa.schema([hostile, plain[1]]))
    assert kind == "nested"
    inner = field("bytes", pa.large_binary(), "ray.data.arrow_pickled_object", b"")
    struct_type = pa.struct([inner, pa.field("path", pa.string())])
    cells = pa.StructArray.from_arrays([pickles, pa.array(["a"] * 10)], fields=list(struct_type))
    return pa.table([cells, labels], schema=pa.schema([pa.field("image", struct_type), plain[1]]))


READ = """
import sys
{first}
import numpy as np
from nf_pipeline.config import DataConfig
from nf_pipeline.data.sources import open_source
from nf_pipeline.data.decode import Undecodable, decode_image
from nf_pipeline.errors import NFError
for path in sys.argv[1:]:
    try:
        source = open_source(DataConfig(source=path))
        source.labels("train"), source.class_names, source.describe()
        for _, cell in source.read("train", np.ones(source.num_rows("train"), bool), 0):
            try:
                decode_image(cell)
            except Undecodable:
                pass
        print("read")
    except NFError as error:
        print(type(error).__name__)
"""


@pytest.mark.parametrize("first", ["", "import ray.data; import ray.data.extensions"], ids=["alone", "with Ray Data"])
def test_pickles_in_a_parquet_data_set_stay_shut(first: str, tmp_path: Path) -> None:
    data, trace = bomb(tmp_path)
    kinds = ("image", "label", "shape", "nested")
    for kind in kinds:
        (tmp_path / kind).mkdir()
        pq.write_table(hostile_table(kind, data), tmp_path / kind / "train.parquet", store_schema=False)
        pq.write_table(hostile_table(kind, data), tmp_path / kind / "train-2.parquet")
    done = subprocess.run(
        [sys.executable, "-c", READ.format(first=first), *(str(tmp_path / kind) for kind in kinds)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == len(kinds)
    assert not trace.exists()


def test_changed_batch_of_cifar_is_refused_before_it_is_unpickled(tmp_path: Path) -> None:
    data, trace = bomb(tmp_path)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"):
        (folder / name).write_bytes(data)
    with pytest.raises(DataError, match="CIFAR10"):
        open_source(_data(f"torchvision:CIFAR10:{tmp_path}"))
    assert not trace.exists()


@pytest.mark.parametrize("name", ["LSUN", "LSUNClass"])
def test_data_set_that_unpickles_what_lies_beside_it_is_refused(name: str, tmp_path: Path) -> None:
    assert not is_torchvision_name(name)
    with pytest.raises(ConfigError, match=name):
        open_source(_data(f"torchvision:{name}:{tmp_path}"))


def test_only_known_data_sets_of_torchvision_unpickle() -> None:
    folder = Path(torchvision.__file__).parent / "datasets"
    found = set()
    for path in folder.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf8"))
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            called = ast.unparse(call.func)
            safe = any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in call.keywords)
            unsafe_array = any(word.arg == "allow_pickle" for word in call.keywords)
            if called in ("pickle.load", "pickle.loads") or (called == "torch.load" and not safe) or unsafe_array:
                found.add(path.name)
    # CIFAR's batches are opened only with the MD5 that torchvision knows; lsun.py is refused.
    assert found == {"cifar.py", "lsun.py"}


def test_weights_that_are_a_pickle_are_refused(tmp_path: Path) -> None:
    import safetensors.torch

    data, trace = bomb(tmp_path)
    with pytest.raises(safetensors.SafetensorError):
        safetensors.torch.load(data)
    assert not trace.exists()


def test_model_of_a_run_that_became_a_pickle_is_refused(tmp_path: Path) -> None:
    from nf_pipeline import load_model, train
    from nf_pipeline.config import resolve_config

    data, trace = bomb(tmp_path)
    small = {"data.max_train_images": 100, "train.epochs": 1, "train.unit_layers": 3, "memory.budget_bytes": "4MiB"}
    where = {"storage.uri": str(tmp_path / "runs"), "cluster.executor": "inline", "train.device": "cpu"}
    train(resolve_config(flags={**small, **where, "cluster.num_threads": 1}))
    model = tmp_path / "runs" / "run" / "model"
    weights = next(model.rglob("*.safetensors"))
    was = f"sha256:{hashlib.sha256(weights.read_bytes()).hexdigest()}"
    weights.write_bytes(data)
    for file in model.rglob("*.json"):  # somebody who may write to the store can make checksums agree
        file.write_text(file.read_text().replace(was, f"sha256:{hashlib.sha256(data).hexdigest()}"))
    with pytest.raises(NFError):
        load_model(str(tmp_path / "runs" / "run"))
    assert not trace.exists()


def _data(source: str) -> nf_pipeline.config.DataConfig:
    return nf_pipeline.config.DataConfig(source=source)
