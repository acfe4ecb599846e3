import json
from dataclasses import asdict

import pytest

from crane_core.config_file import load_config
from crane_core.release.ledger import Draft, Ledger
from crane_core.report.run import render
from crane_core.storage.artifacts import ArtifactStore
from crane_core.storage.local import LocalStorage

CONFIG = load_config(None, ["window.start=2026-02-28", "window.end=2026-03-01"])
INTERVAL = {"mean": 0.25, "low": 0.2, "high": 0.3}
METRICS = {f"{kind}@{k}": INTERVAL for kind in ("recall", "ndcg") for k in CONFIG.evaluate.ks}
MODEL = {**METRICS, "coverage@20": 0.5, "popularity_bias@20": 1.0}


@pytest.fixture
def store(tmp_path) -> ArtifactStore:
    store = ArtifactStore(LocalStorage(tmp_path / "store"), tmp_path / "cache")
    store.start_run("run-1", CONFIG)
    return store


def publish(store: ArtifactStore, stage: str, files: dict, facts: dict | None = None) -> None:
    folder = store.cache / stage
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    manifest = {"stage": stage, "fingerprint": "f", "facts": facts or {}, "seconds": 61.0, "peak_bytes": 3 << 29}
    store.publish(folder, manifest)
    store.record("run-1", stage, {"status": "found", "fingerprint": "f", "seconds": 0.1})


def test_a_run_without_stages_says_so(store):
    page = render(store, "run-1", CONFIG, [])
    assert "Not judged" in page
    for stage in ("etl.interactions", "ml.refine", "ml.graph", "ml.train", "ml.evaluate", "ml.export"):
        assert f"has no artifact of {stage}" in page, stage
    assert page.count("Not available.") == 10


@pytest.mark.parametrize("earlier", [False, True])
def test_the_monitors_are_shown_where_the_training_has_them(store, earlier):
    seen = {"effective_rank": 7.0, "mean_cosine": 0.1, "cosine_variance": 0.2, "gradient_ranking": 0.5}
    curve = [{"epoch": epoch, "loss": 1.0, "recall@20": 0.1} | ({} if earlier else seen) for epoch in range(3)]
    facts = {"best_epoch": 1, "num_epochs": 3, "validation": {"recall@20": 0.1, "ndcg@20": 0.1}}
    publish(store, "ml.behaviour", {"curve.json": curve}, facts)
    trust = {"share": 0.5, "curve": [[0.0, 0.1], [0.5, 0.2]]}
    publish(store, "ml.train", {"curve.json": curve, "trust.json": trust}, facts)
    spread = {} if earlier else {"profile_spread": {"text": 1.27}}
    publish(store, "ml.refine", {"fit.json": {"curve": [], "mean_cosine": [0.2]} | spread}, {"modalities": ["text"]})
    page = render(store, "run-1", CONFIG, [])
    assert "Validation Recall@20 by share" in page
    for text in ("Effective rank of the users", "Variance of these cosines", "Gradient norm: ranking", "text 1.27"):
        assert (text in page) is not earlier, text


def test_a_damaged_artifact_is_named_and_the_rest_is_shown(store):
    publish(store, "ml.refine", {"fit.json": {"curve": [], "mean_cosine": [0.2]}}, {"modalities": ["text"]})
    publish(store, "ml.evaluate", {"metrics.json": {}})
    (store.storage.root / "ml.evaluate" / "f" / "metrics.json").write_text("")
    page = render(store, "run-1", CONFIG, [])
    assert "metrics.json is damaged" in page
    assert "1 modality (text)" in page


def test_cost_is_that_of_the_making(store):
    publish(store, "ml.refine", {"fit.json": {"curve": [], "mean_cosine": []}}, {"modalities": ["text"]})
    store.record("run-1", "ml.register", {"status": "done", "version": "1", "seconds": 4.0, "peak_bytes": 1 << 20})
    page = render(store, "run-1", CONFIG, [])
    assert "61.0 s" in page and "1.50 GiB" in page and "1 MiB" in page
    assert "65.0 s of work in all" in page


def test_one_epoch_one_model_and_no_slice_still_plot(store):
    metrics = {"users": 1, "models": {"crane": MODEL}, "differences": {}, "slices": {"cold_items": {"users": 0}}}
    publish(store, "ml.evaluate", {"metrics.json": metrics})
    page = render(store, "run-1", CONFIG, [])
    assert "0.2500" in page and "No slice has a test user" in page and "AUC among" not in page


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("alone", [False, True])
def test_cold_items_are_shown_where_there_are_some(store, alone, earlier):
    ranking = {"recall@20": 0.1, "ndcg@20": 0.1}
    auc = {"users": 2, "chance": 0.5, "models": {"crane": {"mean": 0.654, "low": 0.6, "high": 0.7}}}
    cold = {"items": 4321, "rows": 3, "users": 2, "chance": 0.0123, "models": {"crane": INTERVAL}}
    among = {"chance": 0.0456, "models": {"crane": {"mean": 0.789, "low": 0.7, "high": 0.8}}}
    cold |= {} if earlier else {"among_cold": among}
    metrics = {
        "users": 2,
        "models": {"crane": MODEL},
        "differences": {},
        "slices": {"cold_items": {"users": 2, "crane": ranking}},
        "cold_items": cold | {"cold_auc": None if alone else auc},
    }
    publish(store, "ml.evaluate", {"metrics.json": metrics})
    page = render(store, "run-1", CONFIG, [])
    assert "AUC among the cold items" in page and "4,321 items have no training interaction" in page
    assert "0.0123" in page
    assert ("0.7890" in page and "0.0456" in page) is not earlier
    assert ("0.654" in page) is not alone and ("no other to compare" in page) is alone


def test_names_from_outside_are_escaped(store):
    title = "<script>alert(1)</script>"
    publish(store, "ml.refine", {"fit.json": {"curve": [], "mean_cosine": []}}, {"modalities": [title]})
    page = render(store, "run-1", CONFIG, [])
    assert title not in page and "&lt;script&gt;" in page


def test_the_decision_shows_every_check(store):
    ledger = Ledger(store.storage, "crane")
    checks = [{"name": "recall@20 against lightgcn", "found": 0.21, "limit": 0.3, "sense": ">=", "passed": False}]
    entry = ledger.append(0, Draft("refuse", "1", None, "run-1", "Refused: too low.", {"checks": checks}))
    assert entry is not None
    store.record("run-1", "ml.promote", {"status": "done", "decision": "refused", "ledger": entry.seq})
    page = render(store, "run-1", CONFIG, ledger.history())
    assert "Refused" in page and "Too low." in page
    assert "Recall@20 against lightgcn" in page and "≥ 0.3000" in page and 'class="no"' in page
    assert asdict(entry)["hash"] not in page


def test_the_same_run_renders_the_same_plots(store):
    publish(store, "ml.refine", {"fit.json": {"curve": [], "mean_cosine": [0.1, 0.2]}}, {"modalities": ["text"]})
    left, right = (render(store, "run-1", CONFIG, []).split("<footer>")[0] for _ in range(2))
    assert left == right


@pytest.mark.parametrize("earlier", [False, True])
def test_a_day_with_few_events_and_days_without_a_run_are_named(store, earlier):
    quality = {"num_rows_read": 10, "quarantine": {}, "num_users": 1, "num_items": 1}
    quality |= dict.fromkeys(("num_train", "num_validation", "num_test", "num_cold_rows"), 1)
    found = {"rows": 12, "weekday_median": 100, "days_median": 90, "share": 0.12, "status": "warn"}
    publish(store, "etl.interactions", {"quality.json": quality | ({} if earlier else {"completeness": found})})
    assert "Missed." not in render(store, "run-1", CONFIG, [])
    store.start_run("before", load_config(None, ["window.start=2026-02-24", "window.end=2026-02-25"]))
    page = render(store, "run-1", CONFIG, [])
    assert ("The last day has 12 events" in page and "Incomplete?" in page) is not earlier
    assert "No run covers 2026-02-25 00:00 to 2026-02-28 00:00 UTC" in page
