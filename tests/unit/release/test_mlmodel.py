from pathlib import Path

import pytest
import yaml

from crane_core import serving
from crane_core.errors import ArtifactError
from crane_core.release.mlmodel import LOADER, served_folder


def write(folder: Path, **changes) -> Path:
    flavor = {"loader_module": LOADER, "data": "data/crane", "env": {"conda": "conda.yaml"}, "code": None} | changes
    (folder / "MLmodel").write_text(yaml.safe_dump({"flavors": {"python_function": flavor}}))
    return folder


def test_the_loader_is_the_one_that_registered_models_name():
    assert LOADER == serving.__name__ == "crane_core.serving"
    assert "_load_pyfunc" in serving.__all__


def test_the_folder_of_the_data(tmp_path):
    assert served_folder(write(tmp_path)) == tmp_path / "data" / "crane"


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"loader_module": "planted"}, "its loader is 'planted'"),
        ({"code": "code"}, "its MLmodel asks for code"),
        ({"data": "data/.."}, r"its data lie in 'data/\.\.'"),
    ],
)
def test_anything_else_is_refused(tmp_path, changes, found):
    with pytest.raises(ArtifactError, match=found):
        served_folder(write(tmp_path, **changes))
