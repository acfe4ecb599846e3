"""A job finds the artifact that was made before `crane_core` was moved into packages."""

import json
import shutil
from pathlib import Path

from jobs.ml import knn

STORE = Path(__file__).parents[1] / "worlds" / "before_move" / "store"


def test_a_stage_is_not_done_again(tmp_path, capsys):
    shutil.copytree(STORE, tmp_path / "store")
    assert knn.main(["--store", str(tmp_path / "store"), "--run", "run-1", "--part", "0"]) == 0
    entry = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (entry["status"], entry["fingerprint"]) == ("found", "05ad7cbc1e60be749ca9bd4100b18eb2")
