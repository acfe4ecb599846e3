# What a person would type. DATA=<folder in MMRec layout> makes the demo use that data.
.PHONY: help setup demo check test drill lint format dags doctor clean lint-infra test-infra locks sbom audit rehearse

JOBS := .venv/bin/python -m
AIRFLOW := .venv-airflow/bin/python -m
# One thread: on small tensors a second one waits more than it works.
FAST := OMP_NUM_THREADS=1 $(JOBS) pytest -q -m 'not slow'
# About half of the fast unit tests by time; the other half is the rest of tests/unit.
HALF := tests/unit/experiments tests/unit/training tests/unit/refine tests/unit/graph

help:
	@sed -n 's/^\([a-z-]*\):.*## */  make \1	/p' Makefile

setup: ## make both environments, see to Java
	@infra/local/setup.sh

demo: setup ## build, judge, serve a recommender through Airflow: MovieLens 100K, or DATA=folder
	@.venv/bin/crane demo $(if $(DATA),--data "$(DATA)")

check: setup ## style, types, imports and the fast unit tests, side by side: a minute and a half
	@mkdir -p .crane/logs; trap 'kill $$lint $$half' INT TERM; \
	$(MAKE) --no-print-directory lint >.crane/logs/check-lint.log 2>&1 & lint=$$!; \
	$(FAST) $(HALF) >.crane/logs/check-half.log 2>&1 & half=$$!; \
	$(FAST) tests/unit $(addprefix --ignore=,$(HALF)); rest=$$?; \
	wait $$half; half=$$?; wait $$lint; lint=$$?; cat .crane/logs/check-half.log .crane/logs/check-lint.log; \
	[ $$((rest | half | lint)) -eq 0 ]

test: lint ## every check: style, types, imports, unit, Spark, end to end, Airflow; the jobs' tests beside the others
	@mkdir -p .crane/logs; trap 'kill $$jobs' INT TERM; \
	$(JOBS) pytest -m 'not drill' tests/jobs >.crane/logs/test-jobs.log 2>&1 & jobs=$$!; \
	$(AIRFLOW) pytest tests/dags --confcutdir=tests/dags; dags=$$?; \
	$(JOBS) pytest -m 'not drill' --ignore=tests/jobs --ignore=tests/dags --ignore=tests/infra; rest=$$?; \
	wait $$jobs; jobs=$$?; cat .crane/logs/test-jobs.log; [ $$((jobs | dags | rest)) -eq 0 ]

drill: setup ## the long drills: real scheduler, PostgreSQL, MLflow; kills, outages, crowds (apt-get install postgresql)
	$(JOBS) pytest -q -m drill tests/drills tests/jobs

lint: setup ## ruff, mypy, import contracts, shellcheck
	$(JOBS) ruff check .
	$(JOBS) ruff format --check .
	$(JOBS) mypy
	.venv/bin/lint-imports --no-logo
	.venv/bin/shellcheck infra/*.sh infra/local/*.sh docker/*.sh tests/bench/*.sh .ci/run

format: setup ## let ruff rewrite the code
	$(JOBS) ruff format .
	$(JOBS) ruff check --fix .

dags: setup ## the tests of the DAGs alone
	$(AIRFLOW) pytest tests/dags --confcutdir=tests/dags

INFRA := .venv-infra/bin
LOCKS := airflow spark torch-cpu torch-cuda

$(INFRA)/.made: pyproject.toml
	python3 -m venv .venv-infra
	$(INFRA)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(INFRA)/python -m pip install --quiet --group infra
	touch $@

lint-infra: $(INFRA)/.made ## images, manifests of every overlay, Terraform: hadolint, kubernetes-validate, checkov ...
	@infra/lint.sh

test-infra: $(INFRA)/.made ## each of these tools finds a planted fault
	$(INFRA)/python -m pytest tests/infra --confcutdir=tests/infra

locks: $(INFRA)/.made ## the images' dependency locks from pyproject.toml
	docker/lock.sh

sbom: $(INFRA)/.made ## a CycloneDX bill of materials per lock, in build/sbom
	mkdir -p build/sbom
	for lock in $(LOCKS); do $(INFRA)/cyclonedx-py requirements docker/locks/$$lock.txt -o build/sbom/$$lock.json || exit; done

audit: $(INFRA)/.made ## known vulnerabilities of what the locks name
	for lock in $(LOCKS); do $(INFRA)/pip-audit --disable-pip --requirement docker/locks/$$lock.txt || exit; done

rehearse: ## install the images' locks without an engine, run a retrain from them (20 minutes)
	docker/rehearse.sh

doctor: setup ## what works on this machine and how to mend the rest
	@.venv/bin/crane doctor

clean: ## remove what runs left behind; the environments and downloads stay
	rm -rf .crane/airflow .crane/logs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache build
	find .crane -mindepth 1 -maxdepth 1 -type d ! -name downloads -exec rm -rf {} + 2>/dev/null || true
