import pytest

from crane_core.errors import ArtifactError
from crane_core.serving.model_folder import load_model
from crane_core.serving.probe import make_probe, smoke_test
from tests.worlds.served import recommender, write


def test_smoke_test_passes_and_catches_a_wrong_model(tmp_path):
    model = load_model(write(tmp_path / "model"))
    probe = make_probe(recommender(), 3, k=3)
    assert probe["answers"][0] == {"user_id": "ann", "item_ids": ["b", "d", "c"], "scores": [2.0, 1.0, 0.0]}

    def predict(table, params):
        return model.predict(table, params)

    assert smoke_test(predict, probe) == 3
    items = {"a": [3.0, 0.0], "b": [2.0, 2.0], "c": [3.0, 0.0], "d": [1.0, 0.0]}
    other = load_model(write(tmp_path / "other", items=items))
    with pytest.raises(ArtifactError, match="to user 'ann'"):
        smoke_test(lambda table, params: other.predict(table, params), probe)
    with pytest.raises(ArtifactError, match="no fallback"):
        smoke_test(lambda table, params: predict(table, params).assign(fallback=False), probe)
