"""Encoding by small models of random weights: equal to plain calls, resumed, extended, and bad input by reason."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from crane_core.errors import ConfigError, DataError
from crane_core.raw import encoding, pictures
from crane_core.raw.checks import check_features
from crane_core.raw.encoding import EncoderSpec, encode
from crane_core.raw.files import list_features
from jobs import cli

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("text-model")
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = [*special, *letters, *(f"##{letter}" for letter in letters)]
    BertTokenizerFast(vocab={token: number for number, token in enumerate(tokens)}).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=77, **sizes)).save_pretrained(folder)
    SentenceTransformer(modules=[Transformer(str(folder)), Pooling(16)], device="cpu").save(str(folder / "saved"))
    return str(folder / "saved")


@pytest.fixture(scope="module")
def picture_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    folder = tmp_path_factory.mktemp("picture-model")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTModel(ViTConfig(image_size=16, patch_size=8, **sizes)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    modules = [Transformer(str(folder)), Pooling(16, "cls")]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder / "saved"))
    return str(folder / "saved")


def write_catalog(raw: Path, rows: list[dict]) -> None:
    (raw / "items").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), raw / "items" / "items.parquet")


def titles(number: int) -> list[dict]:
    return [{"item_id": f"i{n}", "title": f"thing {n}", "brand": f"b{n % 7}" if n % 3 else None} for n in range(number)]


def read(raw: Path, modality: str) -> dict[str, list[float]]:
    files = sorted((raw / "features" / modality).glob("part-*.parquet"))
    rows = [row for path in files for row in pq.read_table(path).to_pylist()]
    assert len({row["item_id"] for row in rows}) == len(rows)
    return {row["item_id"]: row["vector"] for row in rows}


@pytest.mark.slow
def test_text_vectors_are_those_of_a_plain_call(text_model: str, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    write_catalog(tmp_path, titles(50))
    encoded = encode(tmp_path, "text", EncoderSpec(text_model, ("title", "brand")), batch_size=8)
    assert (encoded.found, encoded.made, encoded.set_aside) == (0, 50, {})
    found = read(tmp_path, "text")
    plain = SentenceTransformer(text_model, device="cpu").encode(["thing 0", "thing 1\nb1"], show_progress_bar=False)
    np.testing.assert_allclose([found["i0"], found["i1"]], plain, atol=1e-5)
    assert np.abs(np.subtract(*plain)).max() > 0.01
    assert len(check_features(list_features(tmp_path, ())["text"])) == 1, "what etl.features reads"


def test_only_what_is_missing_is_made(text_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "PART_ROWS", 20)
    spec = EncoderSpec(text_model, ("title",))
    write_catalog(tmp_path, titles(50))
    encode(tmp_path, "text", spec)
    before = read(tmp_path, "text")
    write_catalog(tmp_path, [*titles(70), *titles(3)])
    encoded = encode(tmp_path, "text", spec)
    assert (encoded.found, encoded.made) == (50, 20)
    after = read(tmp_path, "text")
    assert len(after) == 70 and all(after[name] == vector for name, vector in before.items())
    monkeypatch.setattr(encoding, "load_model", lambda *given: pytest.fail("nothing is missing"))
    assert encode(tmp_path, "text", spec).made == 0


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on(text_model: str, tmp_path: Path) -> None:
    write_catalog(tmp_path, titles(20_000))
    command = [sys.executable, "-m", "jobs.cli", "encode", str(tmp_path), "--modality", "text", "--model", text_model]
    command += ["--columns", "title", "--json"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    folder = tmp_path / "features" / "text"
    while not (folder / "part-000001.parquet").exists():
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = read(tmp_path, "text")
    assert 8192 <= len(kept) < 20_000
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    assert json.loads(ended.stdout) == {"found": len(kept), "made": 20_000 - len(kept), "set_aside": {}}
    found = read(tmp_path, "text")
    assert len(found) == 20_000 and all(found[name] == vector for name, vector in kept.items())


def test_items_without_text_go_aside(text_model: str, tmp_path: Path) -> None:
    rows = [{"item_id": "a", "title": " "}, {"item_id": "b", "title": None}, {"item_id": "c", "title": "x"}]
    write_catalog(tmp_path, [*rows, {"item_id": None, "title": "y"}, {"item_id": " ", "title": "z"}])
    encoded = encode(tmp_path, "text", EncoderSpec(text_model, ("title",)))
    assert encoded.made == 1 and encoded.set_aside == {"no_text": 2}
    aside = pq.read_table(tmp_path / "features" / "text" / encoding.SET_ASIDE).to_pylist()
    assert aside == [{"item_id": "a", "reason": "no_text"}, {"item_id": "b", "reason": "no_text"}]
    write_catalog(tmp_path, [{"item_id": "a", "title": "now"}, *rows[1:]])
    encoded = encode(tmp_path, "text", EncoderSpec(text_model, ("title",)))
    assert (encoded.found, encoded.made, encoded.set_aside) == (1, 1, {"no_text": 1})


def test_pictures(picture_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sentence_transformers import SentenceTransformer

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    red, grey = Image.new("RGB", (20, 30), "red"), Image.new("L", (9, 9), 77)
    red.save(pictures / "red.png")
    grey.save(pictures / "grey.jpg")
    whole = (pictures / "red.png").read_bytes()
    (pictures / "cut.png").write_bytes(whole[: len(whole) // 2])
    (pictures / "text.jpg").write_text("no picture")
    red.save(tmp_path / "outside.png")
    (pictures / "link.png").symlink_to(tmp_path / "outside.png")
    Image.new("RGB", (300, 300)).save(pictures / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    names = ["red", "grey", "cut", "text", "link", "../outside", "bomb", "none", "x" * 300]
    write_catalog(tmp_path, [{"item_id": name} for name in names])
    encoded = encode(tmp_path, "image", EncoderSpec(picture_model, pictures=str(pictures)), batch_size=1)
    assert encoded.made == 2
    assert encoded.set_aside == {"broken_picture": 3, "no_picture": 2, "outside_folder": 2}
    model = SentenceTransformer(picture_model, device="cpu")
    loaded = Image.open(pictures / "grey.jpg").convert("RGB")
    found = read(tmp_path, "image")
    np.testing.assert_allclose([found["red"], found["grey"]], model.encode([red, loaded]), atol=1e-5)


def test_pictures_named_by_a_column(picture_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    red, grey, raw = Image.new("RGB", (20, 30), "red"), Image.new("L", (9, 9), 77), tmp_path / "raw"
    (raw / "covers" / "old").mkdir(parents=True)
    red.save(raw / "covers" / "1.png")
    grey.save(raw / "covers" / "old" / "scan", "JPEG")
    red.save(tmp_path / "outside.png")
    (raw / "covers" / "link.png").symlink_to(tmp_path / "outside.png")
    (raw / "covers" / "text.png").write_text("no picture")
    named = {"a": "covers/1.png", "b": "covers/old/scan", "c": "covers/./old/../1.png", "none": None, "blank": " "}
    named |= {"up": "../outside.png", "away": str(tmp_path / "outside.png"), "link": "covers/link.png"}
    named |= {"gone": "covers/2.png", "folder": "covers", "text": "covers/text.png", "long": "x" * 300, "nul": "\0"}
    write_catalog(raw, [{"item_id": item, "cover": path} for item, path in named.items()])
    encoded = encode(raw, "image", EncoderSpec(picture_model, picture_column="cover"), batch_size=2)
    assert encoded.made == 3
    assert encoded.set_aside == {"broken_picture": 1, "no_picture": 6, "outside_folder": 3}
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for item, path in (("a", "1.png"), ("b", "old/scan"), ("c", "1.png")):
        shutil.copy(raw / "covers" / path, pictures / f"{item}.png")
    write_catalog(tmp_path / "other", [{"item_id": item} for item in "abc"])
    encode(tmp_path / "other", "image", EncoderSpec(picture_model, pictures=str(pictures)), batch_size=2)
    assert read(raw, "image") == read(tmp_path / "other", "image")
    arguments = ["encode", str(raw), "--modality", "image", "--model", picture_model, "--picture-column", "cover"]
    assert cli.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["found"] == 3
    with pytest.raises(ConfigError, match="vectors of two models do not compare"):
        encode(raw, "image", EncoderSpec(picture_model, pictures=str(pictures)))
    with pytest.raises(DataError, match="has no column photo; it has item_id, cover"):
        encode(raw, "image", EncoderSpec(picture_model, picture_column="photo"))


def test_a_modality_without_a_vector_is_empty_and_fills_later(picture_model: str, tmp_path: Path) -> None:
    raw, spec = tmp_path / "raw", EncoderSpec(picture_model, picture_column="cover")
    rows = [{"item_id": " ", "cover": "1.png"}, {"item_id": "a", "cover": None}, {"item_id": "b", "cover": "1.png"}]
    for number, expected in ((0, {}), (1, {}), (3, {"no_picture": 2})):
        write_catalog(raw, rows)
        path = raw / "items" / "items.parquet"
        pq.write_table(pq.read_table(path).slice(0, number), path)
        encoded = encode(raw, "image", spec)
        assert (encoded.found, encoded.made, encoded.set_aside) == (0, 0, expected)
        table = pq.read_table(raw / "features" / "image")
        assert table.num_rows == 0 and table.schema.names == ["item_id", "vector"]
        with pytest.raises(DataError, match=r"image has 0 rows in 1 files\. Remedy: .* features\.modalities"):
            check_features(list_features(raw, ())["image"])
    Image.new("RGB", (20, 30)).save(raw / "1.png")
    assert encode(raw, "image", spec).made == 1
    assert [footer.num_rows for footer in check_features(list_features(raw, ())["image"])] == [0, 1]
    assert list(read(raw, "image")) == ["b"]


def test_another_recipe_and_foreign_features_are_refused(text_model: str, tmp_path: Path) -> None:
    write_catalog(tmp_path, titles(3))
    encode(tmp_path, "text", EncoderSpec(text_model, ("title",)))
    with pytest.raises(ConfigError, match="vectors of two models do not compare"):
        encode(tmp_path, "text", EncoderSpec(text_model, ("title", "brand")))
    (tmp_path / "features" / "other").mkdir()
    (tmp_path / "features" / "other" / "x.parquet").write_bytes(b"")
    with pytest.raises(ConfigError, match="were not made here"):
        encode(tmp_path, "other", EncoderSpec(text_model, ("title",)))


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="holds no catalog"):
        encode(tmp_path, "text", EncoderSpec("m", ("title",)))
    write_catalog(tmp_path, titles(3))
    with pytest.raises(DataError, match="has no column name; it has item_id, title"):
        encode(tmp_path, "text", EncoderSpec("m", ("name",)))
    with pytest.raises(DataError, match="no folder of pictures"):
        encode(tmp_path, "image", EncoderSpec("m", pictures=str(tmp_path / "absent")))
    with pytest.raises(ConfigError, match="is no sentence-transformers model"):
        encode(tmp_path, "text", EncoderSpec(str(tmp_path / "absent"), ("title",)))
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ConfigError, match=r"crane-pipeline\[encode\]"):
        encode(tmp_path, "text", EncoderSpec("m", ("title",)))


def test_a_model_that_would_run_a_pickle_is_refused(text_model: str, tmp_path: Path) -> None:
    import torch

    shutil.copytree(text_model, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "model" / "pytorch_model.bin")
    write_catalog(tmp_path / "raw", titles(3))
    with pytest.raises(ConfigError, match="can be loaded"):
        encode(tmp_path / "raw", "text", EncoderSpec(str(tmp_path / "model"), ("title",)))


def test_the_command_tells_what_it_did(text_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_catalog(tmp_path, titles(5))
    arguments = ["encode", str(tmp_path), "--modality", "text", "--model", text_model, "--columns", "title"]
    assert cli.main(arguments) == 0
    assert "made      5" in capsys.readouterr().out


def test_a_removed_part_is_made_again_and_no_other_lost(
    text_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "PART_ROWS", 10)
    write_catalog(tmp_path, titles(30))
    encode(tmp_path, "text", EncoderSpec(text_model, ("title",)))
    before = read(tmp_path, "text")
    (tmp_path / "features" / "text" / "part-000000.parquet").unlink()
    encoded = encode(tmp_path, "text", EncoderSpec(text_model, ("title",)))
    assert (encoded.found, encoded.made) == (20, 10)
    after = read(tmp_path, "text")
    assert after.keys() == before.keys()
    np.testing.assert_allclose([after[name] for name in before], list(before.values()), atol=1e-5)


def test_a_second_call_at_the_same_time_is_refused(text_model: str, tmp_path: Path) -> None:
    write_catalog(tmp_path, titles(3))
    hold = "import sys; from pathlib import Path; from crane_core.raw.encoding import exclusive\n"
    hold += "with exclusive(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(tmp_path / "features" / "text")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="Another call is making"):
            encode(tmp_path, "text", EncoderSpec(text_model, ("title",)))
        other.kill()
    assert encode(tmp_path, "text", EncoderSpec(text_model, ("title",))).made == 3


def move_weights(model: Path) -> str:
    from safetensors.torch import load_file, save_file

    moved = {name: tensor + 1 for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(moved, model / "model.safetensors", {"format": "pt"})
    return "model.safetensors"


def lower(model: Path) -> str:
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["model_max_length"] = 3
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    return "tokenizer_config.json"


def rename_a_token(model: Path) -> str:
    text = (model / "tokenizer.json").read_text()
    (model / "tokenizer.json").write_text(text.replace('"##z":', '"##Z":'))
    return "tokenizer.json"


def pool_otherwise(model: Path) -> str:
    (path,) = model.glob("*_Pooling/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pooling_mode": "cls"}))
    return path.relative_to(model).as_posix()


def add_a_token(model: Path) -> str:
    (model / "added_tokens.json").write_text('{"<new>": 77}')
    return "added_tokens.json"


@pytest.mark.parametrize("change", [move_weights, lower, rename_a_token, pool_otherwise, add_a_token])
@pytest.mark.parametrize("number", [3, 4])
def test_another_model_under_the_same_name_is_refused(
    text_model: str, tmp_path: Path, change: Callable[[Path], str], number: int
) -> None:
    """Refused with and without a new item to encode; documentation may change."""
    spec = EncoderSpec(shutil.copytree(text_model, str(tmp_path / "model")), ("title",))
    write_catalog(tmp_path / "raw", titles(3))
    encode(tmp_path / "raw", "text", spec)
    (tmp_path / "model" / "README.md").write_text("other words")
    assert encode(tmp_path / "raw", "text", spec).found == 3
    name = change(tmp_path / "model")
    write_catalog(tmp_path / "raw", titles(number))
    with pytest.raises(ConfigError, match=rf"other {name}: vectors of two models do not compare"):
        encode(tmp_path / "raw", "text", spec)
    assert len(read(tmp_path / "raw", "text")) == 3


def test_a_model_of_the_hub_is_known_by_its_files(
    text_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for number in range(2):
        snapshot = shutil.copytree(text_model, cache / "models--org--tiny" / "snapshots" / (40 * str(number)))
    name = rename_a_token(snapshot)
    reference = cache / "models--org--tiny" / "refs" / "main"
    reference.parent.mkdir()
    reference.write_text(40 * "0")
    spec = EncoderSpec("org/tiny", ("title",))
    write_catalog(tmp_path / "raw", titles(3))
    assert encode(tmp_path / "raw", "text", spec).made == 3
    write_catalog(tmp_path / "raw", titles(4))
    reference.write_text(40 * "1")
    with pytest.raises(ConfigError, match=f"other {name}"):
        encode(tmp_path / "raw", "text", spec)
    reference.write_text(40 * "0")
    assert encode(tmp_path / "raw", "text", spec).made == 1


def test_features_of_before_the_files_were_kept_go_on(text_model: str, tmp_path: Path) -> None:
    write_catalog(tmp_path, titles(3))
    spec = EncoderSpec(text_model, ("title",))
    encode(tmp_path, "text", spec)
    path = tmp_path / "features" / "text" / encoding.RECORD_FILE
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({name: whole[name] for name in ("model", "columns", "pictures", "weights")}))
    write_catalog(tmp_path, titles(4))
    assert encode(tmp_path, "text", spec).made == 1
    assert json.loads(path.read_text()) == whole


def test_no_file_is_handed_to_a_program(picture_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gs").write_text(f"#!/bin/sh\necho 10 | tee {tmp_path / 'started'}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png", "EPS")
    write_catalog(tmp_path, [{"item_id": "a"}])
    assert encode(tmp_path, "image", EncoderSpec(picture_model, pictures=str(tmp_path))).set_aside == {
        "broken_picture": 1
    }
    assert not (tmp_path / "started").exists()


def test_pictures_in_memory_are_bounded(picture_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sentence_transformers import SentenceTransformer

    sizes: list[int] = []
    plain = SentenceTransformer.encode

    def counted(model: SentenceTransformer, contents: list, **given: object) -> np.ndarray:
        sizes.append(len(contents))
        return plain(model, contents, **given)

    monkeypatch.setattr(SentenceTransformer, "encode", counted)
    monkeypatch.setattr(pictures, "PIXELS", 2_500)
    for number in range(8):
        Image.new("RGB", (30, 30)).save(tmp_path / f"{number}.png")
    write_catalog(tmp_path, [{"item_id": str(number)} for number in range(8)])
    assert encode(tmp_path, "image", EncoderSpec(picture_model, pictures=str(tmp_path))).made == 8
    assert sizes == [3, 3, 2]


@pytest.mark.parametrize("name", ["../../out", "a/b", ".hidden", "_hidden"])
def test_a_modality_stays_in_its_folder(tmp_path: Path, name: str) -> None:
    write_catalog(tmp_path / "raw", titles(3))
    with pytest.raises(ConfigError, match="is no name of a folder"):
        encode(tmp_path / "raw", name, EncoderSpec("m", ("title",)))
    assert [path.name for path in (tmp_path / "raw").iterdir()] == ["items"]


def test_what_the_model_cannot_do_is_said(text_model: str, picture_model: str, tmp_path: Path) -> None:
    write_catalog(tmp_path, titles(3))
    spec = EncoderSpec(text_model, ("title",))
    with pytest.raises(ConfigError, match="no device 'nonsense'"):
        encode(tmp_path, "text", spec, device="nonsense")
    with pytest.raises(ConfigError, match="batch of 0"):
        encode(tmp_path, "text", spec, batch_size=0)
    with pytest.raises(ConfigError, match="takes image, not text"):
        encode(tmp_path, "text", EncoderSpec(picture_model, ("title",)))
    with pytest.raises(ConfigError, match="takes text, not image"):
        encode(tmp_path, "image", EncoderSpec(text_model, pictures=str(tmp_path)))


def test_ids_of_any_string_type(text_model: str, tmp_path: Path) -> None:
    for kind in (pa.string_view(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        raw = tmp_path / str(kind)[:5]
        (raw / "items").mkdir(parents=True)
        ids = pa.array(["a", "b"]).cast(kind)
        pq.write_table(pa.table({"item_id": ids, "title": ["x", "y"]}), raw / "items" / "items.parquet")
        assert [encode(raw, "text", EncoderSpec(text_model, ("title",))).made for _ in range(2)] == [2, 0]
