# Two commands: `make demo` builds and runs a real model, `make test` checks the project.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
MODEL  := .models/SmolLM2-135M-Instruct.Q4_1.gguf
PROMPT := The three primary colours are
# Processes that share the tests.
JOBS   ?= 2

.PHONY: demo test test-gpu test-lowest lint types imports unit docs figures clean

demo: $(VENV)/.demo $(MODEL)
	$(BIN)/cushion-deploy build --model $(MODEL) --precision w8a8 --output demo
	@echo; echo "== INT8 as it ships: $(PROMPT) ..."
	@$(BIN)/cushion-deploy generate demo "$(PROMPT)" --max-new-tokens 48

test: $(VENV)/.test $(VENV)/optimum/.done $(VENV)/onnxruntime/onnxruntime_c_api.h $(MODEL)
	$(MAKE) --no-print-directory lint types imports unit

# For a machine with an NVIDIA GPU; elsewhere it prints 'not run: no GPU'.
test-gpu: $(VENV)/.test
	$(BIN)/python -m pytest -m gpu

# The suite with the lowest versions that pyproject.toml admits (torch excepted, see there). TESTS=tests/export runs a
# part. What old versions say about newer ones of others is not an error.
test-lowest: $(VENV)/lowest/.done $(MODEL)
	$(VENV)/lowest/bin/python -m pytest -n $(JOBS) -W ignore::DeprecationWarning -W ignore::FutureWarning $(TESTS)

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types:
	$(BIN)/mypy

imports:
	$(BIN)/lint-imports

unit:
	CUSHION_OPTIMUM_PYTHON=$(abspath $(VENV))/optimum/bin/python CUSHION_ORT_INCLUDE=$(abspath $(VENV))/onnxruntime \
	$(BIN)/python -m pytest -n $(JOBS)

# Static pages in .site; they request nothing from elsewhere.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

figures: demo
	$(BIN)/python bench/figures.py demo docs/figures

$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch==2.13.0
	$(PIP) install -q -c constraints.txt -e '.[cpu,build,rtx,report,chat,serve]'
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) install -q -c constraints.txt -e '.[cpu,build,openvino,rtx,cuda,report,chat,serve,sign,eval,others,test]'
	@touch $@

$(VENV)/.docs: $(VENV)/.demo
	$(PIP) install -q -c constraints.txt -e '.[docs]'
	@touch $@

# optimum wants an older transformers than this project, so it has an environment of its own.
$(VENV)/optimum/.done: tests/optimum.txt $(VENV)/.test
	$(PYTHON) -m venv $(VENV)/optimum
	$(VENV)/optimum/bin/python -m pip --disable-pip-version-check install -q -r tests/optimum.txt
	@touch $@

# For the example in C. Without npm, or without the package, its tests are skipped with the reason.
$(VENV)/onnxruntime/onnxruntime_c_api.h: examples/c/fetch_headers.py
	-$(PYTHON) examples/c/fetch_headers.py $(@D)

$(VENV)/lowest/.done: pyproject.toml
	$(PYTHON) -m venv $(VENV)/lowest
	$(VENV)/lowest/bin/python -m pip --disable-pip-version-check install -q uv
	$(VENV)/lowest/bin/uv pip install -q --python $(VENV)/lowest/bin/python --resolution lowest-direct \
		$(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS)) torch==2.13.0 \
		-e '.[cpu,build,openvino,rtx,cuda,report,chat,hub,serve,sign,eval,others,test]'
	@touch $@

$(MODEL): bench/fetch_model.py
	$(PYTHON) bench/fetch_model.py $@

clean:
	rm -rf $(VENV) .models .cushion-work .site demo
