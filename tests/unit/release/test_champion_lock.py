import pytest

from crane_core.config import Runtime
from crane_core.release.champion_lock import lock_champion
from crane_core.release.ledger import Draft
from crane_core.storage.artifacts import ArtifactStore
from crane_core.storage.lease import Lease
from crane_core.storage.local import LocalStorage
from tests.worlds.mlflow_tables import copy_tables


@pytest.fixture
def store(tmp_path) -> ArtifactStore:
    copy_tables(tmp_path / "store")
    return ArtifactStore(LocalStorage(tmp_path / "store"), tmp_path / "cache")


def test_entries_carry_the_token_of_the_lease(store):
    with lock_champion(Runtime(), store, "test") as lock:
        assert lock.champion is None and lock.finished is None
        entry = lock.write(Draft("refuse", "1", None, "run-1", "too low"))
        assert entry.fence == lock.lease.token == 1
    term = Lease(store.storage).newest()
    assert term is not None and term.released
