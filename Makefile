# `make help` lists the targets. Each recipe is one line: python -m recipes.<target> with its arguments.
#   make sft rm ppo ARGS="run=mine model=qwen2.5-0.5b"         ARGS goes to every recipe of the line
#   make sft rm RM_ARGS="training.learning_rate=1e-4"          SFT_ARGS, RM_ARGS, DPO_ARGS, PPO_ARGS, EVAL_ARGS to one

PYTHON ?= python3
RUN := .venv/bin/python -m

.DEFAULT_GOAL := help
.PHONY: help sft rm dpo ppo eval report overoptimization plan doctor test lint setup clean
.NOTPARALLEL:# the stages of one line run in its order, also with -j
.SHELLFLAGS := -f -c# no globbing: data.sft.path=my/*.jsonl reaches the recipe as it is

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "%-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

sft: .venv/.ready  ## fine-tune the base on demonstrations
	@$(RUN) recipes.sft $(ARGS) $(SFT_ARGS)

rm: .venv/.ready  ## train a reward model on preferences, from the SFT adapter
	@$(RUN) recipes.rm $(ARGS) $(RM_ARGS)

dpo: .venv/.ready  ## improve the SFT model on preferences, with no reward model
	@$(RUN) recipes.dpo $(ARGS) $(DPO_ARGS)

ppo: .venv/.ready  ## improve the SFT model against the reward model, under a KL penalty
	@$(RUN) recipes.ppo $(ARGS) $(PPO_ARGS)

eval: .venv/.ready  ## did it work: compare the run's policies and others by win rate, reward, KL and more
	@$(RUN) recipes.eval $(ARGS) $(EVAL_ARGS)

overoptimization: .venv/.ready  ## draw reward and gold score against the KL, for several KL penalties (BETAS=0,0.1)
	@$(RUN) recipes.overoptimization $(if $(BETAS),beta=$(BETAS)) $(ARGS) \
	  --sft $(SFT_ARGS) --rm $(RM_ARGS) --ppo $(PPO_ARGS)

plan: .venv/.ready  ## predict the peak memory of each stage, and what fits on a card (CARD=12, in GB)
	@$(RUN) recipes.plan $(if $(CARD),card=$(CARD)) $(ARGS) \
	  --sft $(SFT_ARGS) --rm $(RM_ARGS) --dpo $(DPO_ARGS) --ppo $(PPO_ARGS)

doctor: .venv/.ready  ## say what this machine is, whether the recipes work on it, and what to mend
	@$(RUN) recipes.doctor

report: .venv/.ready  ## say what a run holds: runs/<run>/report.html, one page that stands alone
	@$(RUN) recipes.report $(ARGS)

# By file: a file's tests share what is slow to make.
test: .venv/.dev  ## run the tests, on up to four cores (TEST_ARGS="-k runs" picks some)
	@$(RUN) pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(TEST_ARGS)

lint: .venv/.dev  ## check style and types
	@$(RUN) ruff check . && $(RUN) ruff format --check . && $(RUN) mypy

setup: .venv/.dev  ## set up .venv with the tested versions, the tests' own too (every target does what it needs)

clean:  ## remove .venv and caches; runs/ stays
	@rm -rf .venv .pytest_cache .ruff_cache .mypy_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last: a set-up that was broken off leaves none, and is made again from the start.
.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "RLHF Recipes needs Python 3.11 or newer, and $(PYTHON) is: $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Install one, or name it: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@[ -e $@ ] || if $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then $(PYTHON) -m venv --clear .venv; \
	  elif $(PYTHON) -c 'import virtualenv' 2>/dev/null; then $(PYTHON) -m virtualenv --clear .venv; else \
	  echo "$(PYTHON) cannot make a virtual environment with pip: its package ensurepip is missing." >&2; \
	  echo "On Debian and Ubuntu: sudo apt install python3-venv. Elsewhere, and on Colab: $(PYTHON) -m pip install virtualenv" >&2; \
	  echo "Then again: make $(MAKECMDGOALS)" >&2; exit 1; fi
	@rm -f $@
	@echo "Setting up .venv with the tested versions (once, some minutes) ..."
	@$(RUN) pip install $(if $(MAKE_TERMOUT),,--quiet) --disable-pip-version-check -c constraints.txt -e .
	@touch $@

# Judges over HTTP, benchmarks, dashboards, and tools: as much again, for who tests or changes the project.
.venv/.dev: .venv/.ready
	@echo "Adding what the tests need (once) ..."
	@$(RUN) pip install $(if $(MAKE_TERMOUT),,--quiet) --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@
