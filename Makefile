# Short names for the usual commands; `make` alone lists them. Nothing here is needed to use the package.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

# The usual flags as variables: make train EPOCHS=3 DATA=synthetic. `=` and not `?=`, so that a variable
# of the same name in the environment (DATA, SEED) cannot change a training unseen.
DATA = auto
RECIPE =
EPOCHS =
SEED =
MAX_LR =
DATA_DIR =
DEVICE =
# Anything else, as typed: ARGS="--batch-size 256".
ARGS =
# Where benchmarks write their figures, if not to bench-results/: RESULTS=benchmarks/results publishes them.
RESULTS =

# option(flag, value): nothing when the value is empty.
option = $(if $(2), $(1) "$(2)")
data_flags = $(call option,--data,$(DATA))$(call option,--data-dir,$(DATA_DIR))
device_flags = $(call option,--device,$(DEVICE))
recipe_flags = $(call option,--recipe,$(RECIPE))$(call option,--epochs,$(EPOCHS))$(call option,--seed,$(SEED))$(call option,--max-lr,$(MAX_LR))
flags = $(recipe_flags)$(data_flags)$(device_flags)$(if $(ARGS), $(ARGS))

fasttrain = "$(BIN)/python" -m fasttrain
measure = $(if $(RESULTS),FASTTRAIN_RESULTS="$(RESULTS)" )"$(BIN)/python" -m

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup train lr-find summary evaluate predict export report compare data doctor test check bench bench-setup profile gpu-report soak tables clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

setup: $(VENV)/installed  ## install fasttrain and its tools into .venv, pinned by constraints.txt

# The stamp comes last: an install that failed half-way is tried again.
$(VENV)/installed: pyproject.toml constraints.txt
	test -x "$(BIN)/python" || $(PYTHON) -m venv "$(VENV)"
	"$(BIN)/python" -m pip install -c constraints.txt -e ".[dev]"
	touch "$@"

train: setup  ## train: RECIPE= EPOCHS= SEED= MAX_LR= DATA= DATA_DIR= DEVICE= ARGS=
	$(fasttrain) train$(flags)

lr-find: setup  ## suggest a learning rate and draw lr_find.png; the same variables
	$(fasttrain) find-lr$(flags)

summary: setup  ## print the network, layer by layer, and what it costs: DEVICE=
	$(fasttrain) summary$(device_flags)$(if $(ARGS), $(ARGS))

data: setup  ## fetch and verify the images: DATA= DATA_DIR=
	$(fasttrain) data$(data_flags)$(if $(ARGS), $(ARGS))

evaluate: setup  ## measure a checkpoint on the test images: ARGS=its path
	$(fasttrain) evaluate$(data_flags)$(device_flags)$(if $(ARGS), $(ARGS))

predict: setup  ## classify images: DEVICE= ARGS="a checkpoint's path, then images or folders"
	$(fasttrain) predict$(device_flags)$(if $(ARGS), $(ARGS))

export: setup  ## write a network for use elsewhere: DATA_DIR= ARGS="PATH --format onnx --out model.onnx"
	$(fasttrain) export$(call option,--data-dir,$(DATA_DIR))$(if $(ARGS), $(ARGS))

report: setup  ## write a run's report.html: DATA_DIR= DEVICE= ARGS=the run's folder
	$(fasttrain) report$(call option,--data-dir,$(DATA_DIR))$(device_flags)$(if $(ARGS), $(ARGS))

compare: setup  ## set runs side by side in compare.html: ARGS=their folders
	$(fasttrain) compare$(if $(ARGS), $(ARGS))

doctor: setup  ## say what this machine can do and what is missing: DEVICE=
	$(fasttrain) doctor$(device_flags)$(if $(ARGS), $(ARGS))

# One process a core; each takes its tests in order and, once done, some of another's. More than eight would wait
# for memory. ARGS="-n 0" runs all tests in one process.
test: setup  ## run the tests: ARGS="-k model"
	"$(BIN)/python" -m pytest -n auto --maxprocesses 8 --dist worksteal $(ARGS)

check: setup  ## lint and type-check
	"$(BIN)/python" -m ruff check
	"$(BIN)/python" -m ruff format --check
	"$(BIN)/python" -m mypy

bench: setup bench-setup  ## compare with the hardware and other packages, in about 12 minutes: RESULTS= ARGS=
	$(measure) benchmarks.all $(ARGS)

bench-setup: $(VENV)/bench-installed  ## install the packages that `make bench` compares with

$(VENV)/bench-installed: $(VENV)/installed
	"$(BIN)/python" -m pip install -c constraints.txt -e ".[bench]"
	touch "$@"

profile: setup  ## show where the time of a training goes: the variables of train
	$(fasttrain) profile$(flags)

gpu-report: setup  ## run every benchmark where there is a GPU: RESULTS= ARGS="--visit first"
	$(measure) benchmarks.all --plan gpu $(ARGS)

soak: setup  ## kill and resume trainings, damage and read files, for minutes: RESULTS= ARGS=
	$(measure) tests.soak $(ARGS)

tables: setup  ## print the documentation's tables from benchmarks/results
	"$(BIN)/python" -m benchmarks.tables

clean:  ## remove what was installed, built and cached; runs/ and data/ stay
	rm -rf "$(VENV)" build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find fasttrain benchmarks tests -name __pycache__ -prune -exec rm -rf {} +
