"""Item features from raw text or pictures: `features/<modality>/*.parquet`, made by a sentence-transformers model.

The extra `encode` installs what it needs. Items that have a vector are left alone, so that a call that was killed, or
that of the next day, makes only what is missing.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import warnings
from collections.abc import Iterable, Iterator
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
from crane_core.schema import FEATURES, ITEM_ID, REASON
from crane_core.storage.artifacts import sha256_file
from crane_core.storage.local import LocalStorage
from crane_core.storage.lock import locked_or_refused

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

RECIPE = "_encoder.json"
WEIGHTS, FILES = "weights", "files"
"""In the recipe that is kept, beside what the user gave: the SHA-256 of the model's numbers, wherever they come from,
and of each of its files."""
SET_ASIDE = "_set_aside.parquet"
"""Names that begin with an underscore are no features."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
FORMATS = ("JPEG", "PNG", "WEBP")
"""No others, whatever a file is called: Pillow hands PostScript to a program of the system."""
UNUSED = ("*.md", ".*", "pytorch_model*.bin", "openvino/*", "*.h5", "*.msgpack", "*.onnx", "*.ot")
"""Files of a model that decide no vector: documentation, and weights in formats that are not loaded."""
PIXELS = 32_000_000
"""Pictures are read into memory until they have as many, a batch at most."""
PART_ROWS = 4096
"""Items whose vectors are written at once: what a kill costs at most."""


@dataclass(frozen=True)
class Recipe:
    """What the vectors of a modality are made of, and by what.

    Attributes:
        model: name or folder of a sentence-transformers model.
        columns: text columns of the catalog, joined by lines; empty for pictures.
        pictures: folder of pictures `<item_id>.jpg` and the like; empty for text and where a column names them.
        picture_column: column of the catalog that names the pictures, as paths below the raw data.
    """

    model: str
    columns: tuple[str, ...] = ()
    pictures: str = ""
    picture_column: str = ""

    @property
    def reads(self) -> list[str]:
        """Columns of the catalog."""
        return [*self.columns, *filter(None, [self.picture_column])]

    @property
    def takes(self) -> Literal["image", "text"]:
        return "image" if self.pictures or self.picture_column else "text"

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"columns": list(self.columns)}


@dataclass(frozen=True)
class Encoded:
    """What became of the items of the catalog.

    Attributes:
        found: had a vector.
        made: have one now.
        set_aside: why the others have none, and how many; they and the reason are in `SET_ASIDE`.
    """

    found: int
    made: int
    set_aside: dict[str, int]


def encode(root: Path, modality: str, recipe: Recipe, batch_size: int = 64, device: str = "cpu") -> Encoded:
    """Make the vectors that the items of the catalog lack.

    Args:
        root: folder of the raw data, `items/*.parquet` in it.
        modality: name of the features.
        recipe: how; the one the modality was begun with.
        batch_size: items the model sees at once.
        device: where it runs.

    Raises:
        ConfigError: the extra is not installed, there is no such model or device, the model does not take what it is
            given, the name is that of no folder, the features have another origin (the model or its tokenizer may
            have changed), or another call makes them.
        DataError: there is no catalog, no such column or no such folder.
    """
    folder = root / FEATURES_FOLDER / modality
    check_modality(modality, folder)
    if Path(modality).name != modality or modality[0] in "._":
        raise ConfigError(
            f"{modality!r} is no name of a folder that etl.features reads.",
            "Give --modality a name without '/' that does not begin with '.' or '_'.",
        )
    if batch_size < 1:
        raise ConfigError(f"A batch of {batch_size} items.", "Give --batch-size 1 or more, for example 64.")
    catalog = _catalog(root, recipe)
    if recipe.pictures and not Path(recipe.pictures).is_dir():
        raise DataError(
            f"There is no folder of pictures {recipe.pictures}.",
            "Give --pictures a folder of ITEM_ID.jpg, .jpeg, .png or .webp files.",
        )
    with _alone(folder):
        return _encode(root, folder, catalog, recipe, batch_size, device)


def _encode(root: Path, folder: Path, catalog: ds.Dataset, recipe: Recipe, batch_size: int, device: str) -> Encoded:
    told = _check_origin(folder, recipe)
    known = _known(folder)
    ids = pc.unique(catalog.to_table([ITEM_ID])[ITEM_ID].cast(pa.string()).drop_null())
    num_items, found = len(ids), int(pc.sum(pc.is_in(ids, known)).as_py() or 0)
    aside: dict[str, list[str]] = {}
    model = None
    if told is None or found < num_items:
        source, model = _load(recipe, device)
        _keep_origin(folder, told, recipe, source, model)
    elif Path(recipe.model).is_dir():
        _check_files(folder, told, recipe, _digests(Path(recipe.model)))
    items = _items(root, catalog, recipe, set(known.to_pylist()), aside)
    # One past the last: a part that somebody has removed leaves a gap, and no other may be overwritten.
    number = max((int(path.stem.removeprefix("part-")) for path in folder.glob("part-*.parquet")), default=-1) + 1
    made = 0
    parts = range(-(-(num_items - found) // PART_ROWS))
    for _ in track(parts, len(parts), f"encode_{folder.name}", logger):
        names: list[str] = []
        vectors: list[np.ndarray] = []
        while model is not None and len(names) < PART_ROWS:
            # Texts of like length go together, so it helps to see many.
            rows = PART_ROWS - len(names)
            is_text = recipe.takes == "text"
            some = list(itertools.islice(items, rows)) if is_text else _pictures(items, min(batch_size, rows))
            if not some:
                break
            contents = [content for _, content in some]
            vectors += list(model.encode(contents, batch_size=batch_size, show_progress_bar=False))
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


def _catalog(root: Path, recipe: Recipe) -> ds.Dataset:
    files = list_items(root)
    if not files:
        raise DataError(
            f"{root} holds no catalog, items/*.parquet.",
            "Deliver items/*.parquet with the column item_id and the columns that shall be encoded.",
        )
    for footer in check_items(files):
        missing = [name for name in recipe.reads if name not in footer.types]
        if missing:
            raise DataError(
                f"{footer.file.path} ({footer.num_rows} rows) has no column {', '.join(missing)}; "
                f"it has {', '.join(footer.types)}.",
                f"Give --{'columns' if recipe.columns else 'picture-column'} what it has, or deliver it with that.",
            )
    return ds.dataset([str(file.path) for file in files], format="parquet")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two calls at a time would make the same items, and parts of the same name. A lock ends with its process."""
    # Beside the folder: a call that is refused must not leave a modality without a file.
    with locked_or_refused(folder.parent / f".{folder.name}.lock") as held:
        if not held:
            raise ConfigError(
                f"Another call is making {folder}.",
                "Wait until the other crane encode has ended, or end it; then run this one again.",
            )
        yield


def _check_origin(folder: Path, recipe: Recipe) -> dict[str, Any] | None:
    """What the modality was begun with, None for a new one; refused if it is another recipe."""
    data = LocalStorage(folder).read(RECIPE)
    told = None if data is None else Recipe("").as_json() | json.loads(data)
    if told is not None and told != told | recipe.as_json():
        raise ConfigError(
            f"{folder} was encoded with {json.dumps({name: told[name] for name in recipe.as_json()})}, now "
            f"{json.dumps(recipe.as_json())}: vectors of two models do not compare.",
            "Give the modality another name with --modality, or remove the folder.",
        )
    if told is None and LocalStorage(folder).names(""):
        raise ConfigError(
            f"{folder} holds features that were not made here.", "Give the modality another name with --modality."
        )
    return told


def _keep_origin(
    folder: Path, told: dict[str, Any] | None, recipe: Recipe, source: Path, model: SentenceTransformer
) -> None:
    """Write down with what the modality is begun; refuse another model under the name of the former."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    weights, files = digest.hexdigest(), _digests(source)
    if told is not None:
        _check_files(folder, told, recipe, files)
        if told[WEIGHTS] != weights:
            raise _changed(folder, recipe, "weights")
    LocalStorage(folder).write(RECIPE, json.dumps({**recipe.as_json(), WEIGHTS: weights, FILES: files}).encode())


def _check_files(folder: Path, told: dict[str, Any], recipe: Recipe, files: dict[str, str]) -> None:
    """Refuse a model with other files; features of before they were written down have told none."""
    then = told.get(FILES, files)
    changed = sorted(name for name in then.keys() | files.keys() if then.get(name) != files.get(name))
    if changed:
        raise _changed(folder, recipe, ", ".join(changed))


def _changed(folder: Path, recipe: Recipe, what: str) -> ConfigError:
    return ConfigError(
        f"{recipe.model} has become another model than {folder} was encoded with, by other {what}: vectors of two "
        "models do not compare.",
        "Bring the former model back, give the modality another name with --modality, or remove the folder.",
    )


def _digests(source: Path) -> dict[str, str]:
    """The files that decide what a model does, its tokenizer's among them: name to SHA-256."""
    names = {path.relative_to(source).as_posix(): path for path in sorted(source.rglob("*")) if path.is_file()}
    return {name: sha256_file(path) for name, path in names.items() if not any(fnmatch(name, each) for each in UNUSED)}


def _known(folder: Path) -> pa.Array:
    names = [pq.read_table(path, columns=[ITEM_ID])[ITEM_ID] for path in sorted(folder.glob("part-*.parquet"))]
    chunks = [chunk for column in names for chunk in column.chunks]
    return pa.concat_arrays(chunks) if chunks else pa.array([], pa.string())


def _load(recipe: Recipe, device: str) -> tuple[Path, SentenceTransformer]:
    """The folder of a model, that of the hub's cache for a name, and the model."""
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
        source = recipe.model
        if not Path(source).is_dir():
            name = source if "/" in source else f"sentence-transformers/{source}"
            source = snapshot_download(name, ignore_patterns=list(UNUSED))
        # Safetensors only: loading a pickle would run what it holds.
        model = SentenceTransformer(source, device=device, model_kwargs={"use_safetensors": True})
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{recipe.model!r} is no sentence-transformers model that can be loaded ({error}).",
            "Give --model a name of the Hugging Face hub, or a folder with modules.json and safetensors weights.",
        ) from error
    if not model.supports(recipe.takes):
        raise ConfigError(
            f"{recipe.model!r} takes {', '.join(map(str, model.modalities))}, not {recipe.takes}.",
            f"Give --model a sentence-transformers model that takes {recipe.takes}.",
        )
    return Path(source), model


def _items(
    root: Path, catalog: ds.Dataset, recipe: Recipe, known: set[str], aside: dict[str, list[str]]
) -> Iterator[tuple[str, str | Image.Image]]:
    """Every item without a vector, once, with what the model takes; those that have nothing usable go aside."""
    for batch in catalog.to_batches(columns=[ITEM_ID, *recipe.reads], batch_size=PART_ROWS):
        for row in batch.to_pylist():
            name = row.pop(ITEM_ID)
            if not name or not name.strip() or name in known:
                continue
            known.add(name)
            content, reason = _content(root, recipe, name, row)
            if content is None:
                aside.setdefault(reason, []).append(name)
            else:
                yield name, content


def _content(root: Path, recipe: Recipe, name: str, row: dict[str, Any]) -> tuple[str | Image.Image | None, str]:
    """What the model takes of an item, or None and why."""
    if recipe.pictures:
        return _picture(Path(recipe.pictures), (f"{name}{suffix}" for suffix in SUFFIXES))
    text, reason = _text(row)
    return _picture(root, filter(None, [text])) if recipe.picture_column else (text, reason)


def _text(row: dict[str, Any]) -> tuple[str | None, str]:
    """The text of an item, or None and why."""
    lines = [str(value).strip() for value in row.values() if value is not None]
    return "\n".join(line for line in lines if line) or None, "no_text"


def _pictures(items: Iterator[tuple[str, Any]], most: int) -> list[tuple[str, Any]]:
    """The next pictures, as many as memory may hold at once."""
    some: list[tuple[str, Any]] = []
    pixels = 0
    # The next one is not known before it is read: what it adds stays below Pillow's own limit.
    while len(some) < most and pixels < PIXELS and (item := next(items, None)) is not None:
        some.append(item)
        pixels += item[1].width * item[1].height
    return some


def _picture(folder: Path, names: Iterable[str]) -> tuple[Image.Image | None, str]:
    """The first picture there is of some names below a folder, loaded, in RGB, or None and why."""
    try:
        path = next((path for name in names if (path := folder / name).is_file()), None)
    except OSError:  # One that is too long for the name of a file.
        path = None
    if path is None:
        return None, "no_picture"
    if not path.resolve().is_relative_to(folder.resolve()):
        return None, "outside_folder"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                return image.convert("RGB"), ""
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return None, "broken_picture"


def _reasons(aside: dict[str, list[str]]) -> pa.Table:
    names = [name for _, names in sorted(aside.items()) for name in names]
    reasons = [reason for reason, names in sorted(aside.items()) for _ in names]
    return pa.table({ITEM_ID: pa.array(names, pa.string()), REASON: pa.array(reasons, pa.string())})


def _write(path: Path, table: pa.Table) -> None:
    """Under a hidden name first: whoever reads the folder meanwhile sees whole files only."""
    hidden = path.parent / f".{path.name}"
    pq.write_table(table, hidden)
    hidden.replace(path)
