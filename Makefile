# Short names for the usual commands; `make` alone lists them. Nothing here is needed to use the package.

PYTHON ?= python3
VENV ?= .venv

# The usual flags as variables: make train EPOCHS=3 DATA=synthetic. `=` and not `?=`, so that a variable
# of the same name in the environment (DATA, SEED) cannot change a training unseen.
DATA = auto
RECIPE =
EPOCHS =
SEED =
MAX_LR =
DATA_DIR =
DEVICE =
# Anything else, as typed in a shell: ARGS="--batch-size 256 --out 'my runs'".
ARGS =
# Where benchmarks write their figures, if not to bench-results/: RESULTS=benchmarks/results publishes them.
RESULTS =

# Which variables a target takes, and the flag that each becomes.
train_takes = RECIPE EPOCHS SEED MAX_LR DATA DATA_DIR DEVICE ARGS
find-lr_takes = $(train_takes)
profile_takes = $(train_takes)
summary_takes = RECIPE DEVICE ARGS
data_takes = DATA DATA_DIR ARGS
evaluate_takes = DATA DATA_DIR DEVICE ARGS
predict_takes = DEVICE ARGS
export_takes = DATA DATA_DIR ARGS
report_takes = DATA DATA_DIR DEVICE ARGS
compare_takes = ARGS
watch_takes = ARGS
doctor_takes = DEVICE ARGS
test_takes = ARGS
bench_takes = RESULTS ARGS
gpu-report_takes = RESULTS ARGS
soak_takes = RESULTS ARGS

RECIPE_flag = --recipe
EPOCHS_flag = --epochs
SEED_flag = --seed
MAX_LR_flag = --max-lr
DATA_flag = --data
DATA_DIR_flag = --data-dir
DEVICE_flag = --device

# A variable that the targets do not take is refused, before anything is installed.
goals = $(or $(MAKECMDGOALS),help)
taken = $(foreach goal,$(goals),$($(goal)_takes))
given = $(foreach name,$(.VARIABLES),$(if $(filter command line,$(origin $(name))),$(name)))
refused = $(firstword $(filter-out $(taken) PYTHON VENV CC CXX SHELL MAKEFLAGS,$(given)))
nearest = import difflib, sys; print(*difflib.get_close_matches(sys.argv[1].upper(), sys.argv[2:], 1, 0.5))
ifneq ($(refused),)
suggestion := $(shell $(PYTHON) -c '$(nearest)' '$(refused)' $(taken))
$(error `make $(goals)` does not take $(refused)=$(if $(suggestion), (did you mean $(suggestion)=?)); it takes \
	$(if $(taken),$(taken:%=%=),no variables). A variable of the environment goes before `make`)
endif

# quoted: a variable's value, whatever it holds, as one word of the shell.
quoted = '$(subst ','\'',$(value $(1)))'
used = $(strip $(foreach name,$(filter-out ARGS,$($@_takes)),$(if $(value $(name)),$(name))))
flags = $(if $(used), $(foreach name,$(used),$($(name)_flag) $(call quoted,$(name))))
args = $(if $(value ARGS), $(value ARGS))
python = $(call quoted,VENV)/bin/python
fasttrain = $(python) -m fasttrain $@$(flags)$(args)
measure = $(if $(value RESULTS),FASTTRAIN_RESULTS=$(call quoted,RESULTS) )$(python) -m

# What the targets below need: a stamp in the venv, which comes last, so that a failed install is tried again.
space = $(subst ,, )
venv = $(subst $(space),\ ,$(VENV))
installed = $(venv)/installed
dev = $(venv)/dev-installed
bench = $(venv)/bench-installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup train find-lr summary data evaluate predict export watch report compare doctor profile test check \
	bench bench-setup gpu-report soak tables clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

setup: $(installed)  ## install what training needs into .venv, pinned by constraints.txt

define announcement
fasttrain: installing what training needs into $(VENV), in the versions that constraints.txt pins.
  On Linux, pip takes torch's CUDA build: 3.1 GiB to download, 5.9 GiB on disk.
  Without an NVIDIA GPU, its CPU build is enough: 0.8 GiB to download, 2.2 GiB on disk. To take that, stop this and type
    PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make $(goals)
endef
define usage
fasttrain is installed. To type `fasttrain ...` anywhere: source $(VENV)/bin/activate
Without that: $(VENV)/bin/fasttrain ..., or make: `make doctor` says what will be used here.
endef
export announcement usage
supported = import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12")

$(installed): pyproject.toml setup.py constraints.txt
	@test -e "$@" || echo "$$announcement"
	@$(python) -m pip --version >/dev/null 2>&1 || { $(PYTHON) -c '$(supported)' && $(PYTHON) -m venv $(call quoted,VENV); }
	$(python) -m pip install -c constraints.txt -e .
	@touch "$@"
	@echo "$$usage"

train: $(installed)  ## train: RECIPE= EPOCHS= SEED= MAX_LR= DATA= DATA_DIR= DEVICE= ARGS=
	$(fasttrain)

find-lr: $(installed)  ## suggest a learning rate and draw lr_find.png: the variables of train
	$(fasttrain)

summary: $(installed)  ## print the network, layer by layer, and what it costs: RECIPE= DEVICE= ARGS=
	$(fasttrain)

data: $(installed)  ## fetch and verify the images: DATA= DATA_DIR= ARGS=
	$(fasttrain)

evaluate: $(installed)  ## measure a network on its test images: DATA= DATA_DIR= DEVICE= ARGS=latest
	$(fasttrain)

predict: $(installed)  ## classify images: DEVICE= ARGS="latest cat.jpg"
	$(fasttrain)

export: $(installed)  ## write a network for use elsewhere: DATA= DATA_DIR= ARGS="latest --out model.safetensors"
	$(fasttrain)

report: $(installed)  ## write a run's report.html: DATA= DATA_DIR= DEVICE= ARGS=latest
	$(fasttrain)

watch: $(installed)  ## follow a run in the browser while it trains: ARGS=its folder
	$(fasttrain)

compare: $(installed)  ## set runs side by side in compare.html: ARGS=their folders
	$(fasttrain)

doctor: $(installed)  ## say what this machine can do and what is missing: DEVICE= ARGS=
	$(fasttrain)

profile: $(installed)  ## show where the time of a training goes: the variables of train
	$(fasttrain)

# What development needs on top: the tools of test and check, TensorBoard and ONNX.
$(dev): $(installed)
	$(python) -m pip install -c constraints.txt -e ".[dev]"
	@touch "$@"

# One process a core; each takes its tests in order and, once done, some of another's. More than eight would wait
# for memory. ARGS="-n 0" runs all tests in one process.
test: $(dev)  ## run the tests: ARGS="-k model"
	$(python) -m pytest -n auto --maxprocesses 8 --dist worksteal$(args)

check: $(dev)  ## lint and type-check
	$(python) -m ruff check
	$(python) -m ruff format --check
	$(python) -m mypy

bench: bench-setup  ## compare with the hardware and other packages, in about 12 minutes: RESULTS= ARGS=
	$(measure) benchmarks.all$(args)

bench-setup: $(bench)  ## install the packages that `make bench` compares with

$(bench): $(installed)
	$(python) -m pip install -c constraints.txt -e ".[bench]"
	@touch "$@"

gpu-report: $(dev)  ## run every benchmark where there is a GPU: RESULTS= ARGS="--visit first"
	$(measure) benchmarks.all --plan gpu$(args)

soak: $(dev)  ## kill trainings, send signals, break disks and files, for minutes: RESULTS= ARGS=--minutes=10
	$(measure) tests.soak$(args)

tables: $(installed)  ## print the documentation's tables from benchmarks/results
	$(python) -m benchmarks.tables

clean:  ## remove what was installed, built and cached; runs/ and data/ stay
	test ! -e $(installed) || rm -rf $(call quoted,VENV)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find fasttrain benchmarks tests -name __pycache__ -prune -exec rm -rf {} +
