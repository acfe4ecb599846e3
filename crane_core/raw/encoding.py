"""Encode raw text or pictures into item features `features/<modality>/*.parquet` by a sentence-transformers model.

The extra `encode` installs what it needs. Only items without a vector are encoded: on the next day, and when a call is
repeated after a kill.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from PIL import Image

from crane_core.errors import ConfigError, DataError
from crane_core.progress import track
from crane_core.raw.checks import check_items
from crane_core.raw.files import FEATURES_FOLDER, check_modality, list_items
from crane_core.raw.pictures import PICTURE_SUFFIXES, load_picture, take_pictures
from crane_core.schema import FEATURES, ITEM_ID, REASON
from crane_core.storage.artifacts import sha256_file
from crane_core.storage.local import LocalStorage
from crane_core.storage.lock import locked_or_refused

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
logger = logging.getLogger(__name__)
RECORD_FILE = "_encoder.json"
"""File with the specification that a modality was begun with."""
WEIGHTS, FILES = "weights", "files"
"""Keys of `RECORD_FILE` besides the fields of `EncoderSpec`: the SHA-256 of the weights, and of each model file."""
SET_ASIDE = "_set_aside.parquet"
"""File with the items that have no vector, and why. Files that begin with an underscore are not read as features."""
UNUSED = ("*.md", ".*", "pytorch_model*.bin", "openvino/*", "*.h5", "*.msgpack", "*.onnx", "*.ot")
"""Files of a model that do not affect its vectors: documentation, and weights in formats that are not loaded."""
PART_ROWS = 4096
"""Items in a file: a kill loses the vectors of one file at most."""


@dataclass(frozen=True)
class EncoderSpec:
    """The model of a modality, and the columns or pictures that it encodes.

    Attributes:
        model: name or folder of a sentence-transformers model.
        columns: text columns of the catalog, joined by line breaks; empty for pictures.
        pictures: folder of pictures `<item_id>.jpg` (or another of `PICTURE_SUFFIXES`); empty
            for text and with a column.
        picture_column: column of the catalog with the paths of the pictures below the raw data.
    """

    model: str
    columns: tuple[str, ...] = ()
    pictures: str = ""
    picture_column: str = ""

    @property
    def reads(self) -> list[str]:
        """Columns of the catalog that are read."""
        return [*self.columns, *filter(None, [self.picture_column])]

    @property
    def takes(self) -> Literal["image", "text"]:
        """Kind of the model's input."""
        return "image" if self.pictures or self.picture_column else "text"

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"columns": list(self.columns)}


@dataclass(frozen=True)
class Encoded:
    """Numbers of the items of the catalog, by result.

    Attributes:
        found: items that had a vector.
        made: items that were encoded now.
        set_aside: reason to the number of items without a vector; the items are in `SET_ASIDE`.
    """

    found: int
    made: int
    set_aside: dict[str, int]


def encode(root: Path, modality: str, spec: EncoderSpec, batch_size: int = 64, device: str = "cpu") -> Encoded:
    """Encode the items of the catalog that have no vector yet.

    Args:
        root: folder of the raw data, with `items/*.parquet`.
        modality: name of the modality.
        spec: model and columns or pictures, the same in every call for the modality.
        batch_size: items in a batch of the model.
        device: device of the model.

    Raises:
        ConfigError: the extra is not installed; there is no such model or device; the model does not take text or
            pictures; the name cannot be a folder; the features were made by another specification, or the model or its
            tokenizer has changed; or another call is encoding the modality.
        DataError: there is no catalog, no such column or no such folder.
    """
    folder = root / FEATURES_FOLDER / modality
    if Path(modality).name != modality or modality[0] in "._":
        raise ConfigError(
            f"{modality!r} is no name of a folder that etl.features reads.",
            "Give --modality a name without '/' that does not begin with '.' or '_'.",
        )
    check_modality(modality, folder)
    if batch_size < 1:
        raise ConfigError(f"A batch of {batch_size} items.", "Give --batch-size 1 or more, for example 64.")
    catalog = _catalog(root, spec)
    if spec.pictures and not Path(spec.pictures).is_dir():
        raise DataError(
            f"There is no folder of pictures {spec.pictures}.",
            "Give --pictures a folder of ITEM_ID.jpg, .jpeg, .png or .webp files.",
        )
    with exclusive(folder):
        return _encode(root, folder, catalog, spec, batch_size, device)


def _encode(root: Path, folder: Path, catalog: ds.Dataset, spec: EncoderSpec, batch_size: int, device: str) -> Encoded:
    recorded = _check_origin(folder, spec)
    known = _known(folder)
    ids = pc.unique(catalog.to_table([ITEM_ID])[ITEM_ID].cast(pa.string()).drop_null())
    num_items, found = len(ids), int(pc.sum(pc.is_in(ids, known)).as_py() or 0)
    aside: dict[str, list[str]] = {}
    model = None
    if recorded is None or found < num_items:
        source, model = load_model(spec, device)
        _keep_origin(folder, recorded, spec, source, model)
    elif Path(spec.model).is_dir():
        _check_files(folder, recorded, spec, _digests(Path(spec.model)))
    items = _items(root, catalog, spec, set(known.to_pylist()), aside)
    # One past the last number: if a part was removed, the parts behind it must not be overwritten.
    number = max((int(path.stem.removeprefix("part-")) for path in folder.glob("part-*.parquet")), default=-1) + 1
    made = 0
    parts = range(-(-(num_items - found) // PART_ROWS))
    for _ in track(parts, len(parts), f"encode_{folder.name}", logger):
        names: list[str] = []
        vectors: list[np.ndarray] = []
        while model is not None and len(names) < PART_ROWS:
            # The model groups texts by length, so it gets many. Of pictures it gets one batch, to limit the memory.
            rows = PART_ROWS - len(names)
            is_text = spec.takes == "text"
            some = list(itertools.islice(items, rows)) if is_text else take_pictures(items, min(batch_size, rows))
            if not some:
                break
            inputs = [given for _, given in some]
            vectors += list(model.encode(inputs, batch_size=batch_size, show_progress_bar=False))
            names += [name for name, _ in some]
        finite = [bool(np.isfinite(vector).all()) for vector in vectors]
        aside.setdefault("non_finite", []).extend(itertools.compress(names, (not good for good in finite)))
        good = [list(itertools.compress(column, finite)) for column in (names, vectors)]
        if good[0]:
            columns = [pa.array(column, field.type) for column, field in zip(good, FEATURES, strict=True)]
            _write(folder / f"part-{number:06d}.parquet", pa.table(columns, FEATURES))
            number += 1
        made += len(good[0])
    if number == 0:
        _write(folder / f"part-{number:06d}.parquet", FEATURES.empty_table())
    _write(folder / SET_ASIDE, _reasons(aside))
    return Encoded(found, made, {reason: len(names) for reason, names in sorted(aside.items()) if names})


def _catalog(root: Path, spec: EncoderSpec) -> ds.Dataset:
    files = list_items(root)
    if not files:
        raise DataError(
            f"{root} holds no catalog, items/*.parquet.",
            "Deliver items/*.parquet with the column item_id and the columns that shall be encoded.",
        )
    for footer in check_items(files):
        missing = [name for name in spec.reads if name not in footer.types]
        if missing:
            raise DataError(
                f"{footer.file.path} ({footer.num_rows} rows) has no column {', '.join(missing)}; "
                f"it has {', '.join(footer.types)}.",
                f"Let --{'columns' if spec.columns else 'picture-column'} name a column that exists, or deliver it.",
            )
    return ds.dataset([str(file.path) for file in files], format="parquet")


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the lock of a modality. Two calls at a time would encode the same items and write files of the same name.

    Raises:
        ConfigError: another process holds it.
    """
    # The lock file lies beside the folder, so that a refused call does not leave an empty modality.
    with locked_or_refused(folder.parent / f".{folder.name}.lock") as held:
        if not held:
            raise ConfigError(
                f"Another call is making {folder}.",
                "Wait until the other crane encode has ended, or end it; then run this one again.",
            )
        yield


def _check_origin(folder: Path, spec: EncoderSpec) -> dict[str, Any] | None:
    """Return the record of the specification that the modality was begun with, None if it is new.

    Raises:
        ConfigError: it was begun with another specification, or by other means.
    """
    data = LocalStorage(folder).read(RECORD_FILE)
    recorded = None if data is None else EncoderSpec("").as_json() | json.loads(data)
    if recorded is not None and recorded != recorded | spec.as_json():
        raise ConfigError(
            f"{folder} was encoded with {json.dumps({name: recorded[name] for name in spec.as_json()})}, now "
            f"{json.dumps(spec.as_json())}: vectors of two models do not compare.",
            "Give the modality another name with --modality, or remove the folder.",
        )
    if recorded is None and LocalStorage(folder).names(""):
        raise ConfigError(
            f"{folder} holds features that were not made here.", "Give the modality another name with --modality."
        )
    return recorded


def _keep_origin(
    folder: Path, recorded: dict[str, Any] | None, spec: EncoderSpec, source: Path, model: SentenceTransformer
) -> None:
    """Record the specification and the checksums of the model.

    Raises:
        ConfigError: the model differs from the one that is recorded.
    """
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    weights, files = digest.hexdigest(), _digests(source)
    if recorded is not None:
        _check_files(folder, recorded, spec, files)
        if recorded[WEIGHTS] != weights:
            raise _changed(folder, spec, "weights")
    LocalStorage(folder).write(RECORD_FILE, json.dumps({**spec.as_json(), WEIGHTS: weights, FILES: files}).encode())


def _check_files(folder: Path, recorded: dict[str, Any], spec: EncoderSpec, files: dict[str, str]) -> None:
    """Refuse a model whose files differ from the record; old records hold no files and are accepted."""
    then = recorded.get(FILES, files)
    changed = sorted(name for name in then.keys() | files.keys() if then.get(name) != files.get(name))
    if changed:
        raise _changed(folder, spec, ", ".join(changed))


def _changed(folder: Path, spec: EncoderSpec, what: str) -> ConfigError:
    return ConfigError(
        f"{spec.model} is not the model that {folder} was encoded with, it has other {what}: vectors of two models do "
        "not compare.",
        "Bring the former model back, give the modality another name with --modality, or remove the folder.",
    )


def _digests(source: Path) -> dict[str, str]:
    """Return the SHA-256 of each file that affects the vectors of a model, its tokenizer included."""
    names = {path.relative_to(source).as_posix(): path for path in sorted(source.rglob("*")) if path.is_file()}
    return {name: sha256_file(path) for name, path in names.items() if not any(fnmatch(name, each) for each in UNUSED)}


def _known(folder: Path) -> pa.Array:
    """Return the items that have a vector."""
    names = [pq.read_table(path, columns=[ITEM_ID])[ITEM_ID] for path in sorted(folder.glob("part-*.parquet"))]
    chunks = [chunk for column in names for chunk in column.chunks]
    return pa.concat_arrays(chunks) if chunks else pa.array([], pa.string())


def load_model(spec: EncoderSpec, device: str) -> tuple[Path, SentenceTransformer]:
    """Load a model; return its folder, for a name that in the cache of the hub, and the model.

    Raises:
        ConfigError: the extra is not installed, there is no such model or device, or it does not take the input.
    """
    try:
        from huggingface_hub import snapshot_download
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ConfigError(
            f"Encoding needs sentence-transformers ({error}).",
            "Install the extra: pip install 'crane-pipeline[encode]'.",
        ) from error
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"There is no device {device!r} here ({error}).",
            "Give --device cpu, or --device cuda on a machine with a GPU.",
        ) from error
    try:
        source = spec.model
        if not Path(source).is_dir():
            name = source if "/" in source else f"sentence-transformers/{source}"
            source = snapshot_download(name, ignore_patterns=list(UNUSED))
        # Safetensors only: loading a pickle would run what it holds.
        model = SentenceTransformer(source, device=device, model_kwargs={"use_safetensors": True})
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{spec.model!r} is no sentence-transformers model that can be loaded ({error}).",
            "Give --model a name of the Hugging Face hub, or a folder with modules.json and safetensors weights.",
        ) from error
    if not model.supports(spec.takes):
        raise ConfigError(
            f"{spec.model!r} takes {', '.join(map(str, model.modalities))}, not {spec.takes}.",
            f"Give --model a sentence-transformers model that takes {spec.takes}.",
        )
    return Path(source), model


def _items(
    root: Path, catalog: ds.Dataset, spec: EncoderSpec, known: set[str], aside: dict[str, list[str]]
) -> Iterator[tuple[str, str | Image.Image]]:
    """Yield each item without a vector once, with its input for the model; put items without an input into `aside`."""
    for batch in catalog.to_batches(columns=[ITEM_ID, *spec.reads], batch_size=PART_ROWS):
        for row in batch.to_pylist():
            name = row.pop(ITEM_ID)
            if not name or not name.strip() or name in known:
                continue
            known.add(name)
            given, reason = _input(root, spec, name, row)
            if given is None:
                aside.setdefault(reason, []).append(name)
            else:
                yield name, given


def _input(root: Path, spec: EncoderSpec, name: str, row: dict[str, Any]) -> tuple[str | Image.Image | None, str]:
    """Return the input of the model for an item, or None and the reason."""
    if spec.pictures:
        return load_picture(Path(spec.pictures), (f"{name}{suffix}" for suffix in PICTURE_SUFFIXES))
    text, reason = _text(row)
    return load_picture(root, filter(None, [text])) if spec.picture_column else (text, reason)


def _text(row: dict[str, Any]) -> tuple[str | None, str]:
    """Return the text of an item, or None and the reason."""
    lines = [str(value).strip() for value in row.values() if value is not None]
    return "\n".join(line for line in lines if line) or None, "no_text"


def _reasons(aside: dict[str, list[str]]) -> pa.Table:
    names = [name for _, names in sorted(aside.items()) for name in names]
    reasons = [reason for reason, names in sorted(aside.items()) for _ in names]
    return pa.table({ITEM_ID: pa.array(names, pa.string()), REASON: pa.array(reasons, pa.string())})


def _write(path: Path, table: pa.Table) -> None:
    """Write a table under a hidden name and rename it, so that readers see complete files only."""
    hidden = path.parent / f".{path.name}"
    pq.write_table(table, hidden)
    hidden.replace(path)
