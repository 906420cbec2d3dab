# The template's own verbs. The generated project has a Makefile of its own.
.DEFAULT_GOAL := help
.PHONY: help demo test test-faults test-hosts test-rehearsal test-slow try lint bench bench-train bench-serve record picture

PYTHON ?= python3
READY := .venv/.ready
PROJECT := build/image_classifier
IN_PROJECT := $(MAKE) --no-print-directory -C $(PROJECT)

help: ## this list
	@$(PYTHON) -c "import re; [print(f'  make {v:12} {t}') for v, t in re.findall(r'(?m)^([a-z-]+):.*?## (.*)', open('Makefile').read())]"

$(READY): pyproject.toml
	@$(PYTHON) "{{cookiecutter.project_slug}}/pipelines/environment.py" --group dev

demo: $(READY) ## bake the template into build/ and there: data, train-local, evaluate, predict, serve-local (ARGS go to train-local)
	@$(PYTHON) -c "import shutil; shutil.rmtree('$(PROJECT)', ignore_errors=True)"
	@.venv/bin/cookiecutter . --no-input --output-dir build
	@$(IN_PROJECT) data ARGS=
	@$(IN_PROJECT) train-local
	@$(IN_PROJECT) evaluate ARGS=
	@$(IN_PROJECT) predict IMAGE=data/raw/digits/4/0780.png ARGS=
	@$(IN_PROJECT) serve-local IMAGE=data/raw/digits/4/0780.png ARGS=
	@echo "in $(PROJECT):"
	@cd $(PROJECT) && .venv/bin/python -c "from pipelines import runs; print(runs.describe(runs.find(None)))"

try: $(READY) ## lint, types and tests of ROOM=cloud, as many as fit into a minute, those that failed first (ALL=1: the whole room)
	@.venv/bin/python -m tests.room "$$ROOM"

test: $(READY) ## tests of the template, and those of the project that it generates
	@.venv/bin/python -m pytest -n 2 --no-loadscope-reorder -m "not faults and not hosts and not rehearsal and not slow" $(ARGS)

test-faults: $(READY) ## kills, truncated checkpoints, full disks and hung peers, injected into real training jobs
	@.venv/bin/python -m pytest -m faults $(ARGS)

test-rehearsal: $(READY) ## the stand-in for AWS: its own tests, all verbs of a project in it, and accidents
	@.venv/bin/python -m pytest -m "rehearsal and not slow" $(ARGS)

test-slow: $(READY) ## what is too long for CI: every pair of options, lowest versions, benchmarks, fuzzing, a soak (over an hour)
	@.venv/bin/python -m pytest -m slow $(ARGS)

test-hosts: $(READY) ## the handlers under Ray Serve, and under TorchServe with the PyTorch toolkit, which needs Java 17
	@.venv/bin/python -m pytest -m hosts $(ARGS)

bench: $(READY) ## all benchmarks: start-up, training, other loaders, scaling, serving: keeps docs/benchmarks.md (ARGS="--rounds 5")
	@.venv/bin/python benchmarks/startup.py $(ARGS)
	@.venv/bin/python benchmarks/train.py $(ARGS)
	@.venv/bin/python benchmarks/loaders.py $(ARGS)
	@.venv/bin/python benchmarks/scaling.py $(ARGS)
	@.venv/bin/python benchmarks/serve.py $(ARGS)

bench-train: $(READY) ## what training costs here, alone (ARGS="--rounds 5", ARGS="--cifar10 FOLDER")
	@.venv/bin/python benchmarks/train.py $(ARGS)

bench-serve: $(READY) ## what serving costs here, and other servers (ARGS="--rounds 5 --runs 2", ARGS="--soak 10")
	@.venv/bin/python benchmarks/serve.py $(ARGS)

record: $(READY) ## record README's commands in a terminal: keeps docs/recording.svg
	@.venv/bin/uv run --quiet --no-project --python .venv/bin/python --with "pyte>=0.8,<0.9" benchmarks/record.py

picture: $(READY) ## the top of the report that `make demo` wrote, for the READMEs; needs Chromium
	@.venv/bin/python benchmarks/picture.py

lint: $(READY) ## ruff and mypy on hooks, tests and benchmarks (the generated project is linted by the tests)
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy
