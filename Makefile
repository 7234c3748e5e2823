PYTHON ?= python3
# Nothing here needs the Hub; offline, its client does not go looking for it.
export HF_HUB_OFFLINE = 1
# Building, saving, loading and probing ensembles, from the command line too.
QUICK = tests/test_dependencies.py tests/test_golden.py tests/test_wheel.py tests/modeling \
        $(addprefix tests/concat_ensemble/,members features probes commands)
# Of them, those that are found are tried by `make dist`, each in an environment of about 6 GB. With
# DIST_PACKAGES=.venv/lib/python3.11/site-packages the dependencies are taken from there.
DIST_PYTHONS ?= 3.11 3.12 3.13

help:            ## what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/:/'
demo: .venv/installed    ## the paper's claim on real digits, with controls, in minutes (SMOKE=1: the same path in under one)
	.venv/bin/python -m concat_ensemble.experiments.compare scattered_digits --output runs/demo $(if $(SMOKE),--smoke)
test: .venv/installed    ## all tests but the slow ones, on all cores
	.venv/bin/python -m pytest -n logical --dist loadfile $(PYTEST)
quick: .venv/installed   ## the tests of building, saving, loading and probing ensembles
	.venv/bin/python -m pytest -n logical --dist loadfile $(QUICK) $(PYTEST)
lowest:          ## the same with the lowest versions that pyproject.toml declares, in .venv-lowest (needs uv)
	uv venv -q --clear --python 3.11 .venv-lowest
	uv pip install -q --python .venv-lowest --resolution lowest-direct -e '.[train,export,test]'
	uv pip install -q --python .venv-lowest pip  # which a test uses; any version
	LOWEST_VERSIONS=1 .venv-lowest/bin/python -m pytest -n logical --dist loadfile $(QUICK) $(PYTEST)
gpu: .venv/installed     ## what needs a CUDA device: its tests, and the table of tests/benchmarks/gpu.py in runs/gpu
	.venv/bin/python -m pytest -m gpu -n 0
	.venv/bin/python tests/benchmarks/gpu.py --output runs/gpu
check: .venv/installed   ## lint, formatting, types, and the list of files in CONTRIBUTING.md
	.venv/bin/ruff check && .venv/bin/ruff format --check && .venv/bin/pyright && .venv/bin/python docs/list_files.py --check
docs: .venv/installed    ## the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict
dist:            ## sdist and wheel in dist/, checked, and tried in a new environment of each Python (DIST_PYTHONS="3.11")
	rm -rf dist
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/pip install --disable-pip-version-check -q build twine
	.venv-dist/bin/python -m build
	.venv-dist/bin/twine check --strict dist/*
	.venv-dist/bin/python tests/try_wheel.py dist $(DIST_PYTHONS) $(if $(DIST_PACKAGES),--packages $(DIST_PACKAGES))
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --disable-pip-version-check -q -c constraints.txt -e '.[train,test,export]'
	@touch $@

.PHONY: help demo test quick lowest gpu check docs dist
