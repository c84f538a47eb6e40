# Each target runs in the active environment; `make PYTHON=.venv/bin/python test` names another one.
PYTHON ?= python
CHECKED = d3llm_hf trainers tests

.PHONY: help quality style types test test-full test-all transformers-matrix vllm-tests engines-dry-run portability common-tests leaderboard autoregressive wheel clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 22

quality:  ## check style without changing a file
	$(PYTHON) -m ruff check $(CHECKED)
	$(PYTHON) -m ruff format --check $(CHECKED)

style:  ## fix style in place
	$(PYTHON) -m ruff check --fix $(CHECKED)
	$(PYTHON) -m ruff format $(CHECKED)

types:  ## check types
	$(PYTHON) -m mypy

test:  ## the default tests: CPU, offline
	$(PYTHON) -m pytest

test-full:  ## what the default tests leave out of large products, and all drawn examples
	$(PYTHON) -m pytest -m "(full or drawn) and not slow and not gpu and not hub" --hypothesis-profile=full

test-all:  ## everything that needs neither a GPU nor the Hub: with the slow ones, too
	$(PYTHON) -m pytest -m "not gpu and not hub" --hypothesis-profile=full

transformers-matrix:  ## models, decoding, export and training under the transformers that pyproject.toml admits
	.ci/transformers_matrix

vllm-tests:  ## the vLLM plugin inside vLLM on a CPU, in an environment of its own (minutes to install, minutes to run)
	python3 -m venv build/vllm
	build/vllm/bin/python -m pip install --quiet --no-deps -r tests/engines/vllm-requirements.txt -e .
	D3LLM_VLLM_PYTHON=$(CURDIR)/build/vllm/bin/python $(PYTHON) -m pytest -n 0 -m slow tests/engines/test_vllm.py

engines-dry-run:  ## whether the package installs beside the serving engines of docs/engines.md (pip resolves, only)
	.ci/engines_dry_run

portability:  ## tests of `test` and `test-full` on other kernels, with one and two threads, another base seed (hours)
	$(PYTHON) tests/support/portability.py

common-tests:  ## transformers' own model tests on our models (fetches transformers' source distribution)
	$(PYTHON) tests/common/run_common_tests.py

leaderboard:  ## measure the embedded checkpoints with all methods (an hour of one core; resumable)
	OMP_NUM_THREADS=1 $(PYTHON) -m d3llm_hf sweep d3llm-llada-teacher d3llm-llada --dtype float32 --device cpu \
	    --methods d3llm dparallel fast_dllm dinfer local_leap entropy_bound dkv llada dream --set block_length=16 \
	    --grid entropy_threshold=0.1,0.2,0.4,0.8 --grid confidence_threshold=0.95,0.9,0.8,0.6 \
	    --grid entropy_bound=0.003,0.01,0.03,0.1 --grid steps=64,16 --num-samples 500 -o docs/leaderboard/points.jsonl
	OMP_NUM_THREADS=1 $(PYTHON) -m d3llm_hf sweep d3llm-block --dtype float32 --device cpu \
	    --methods d3llm d2f dparallel fast_dllm dinfer local_leap entropy_bound llada dream --set block_length=16 \
	    --grid entropy_threshold=0.1,0.2,0.4,0.8 --grid confidence_threshold=0.95,0.9,0.8,0.6 \
	    --grid entropy_bound=0.003,0.01,0.03,0.1 --grid steps=64,16 --num-samples 500 -o docs/leaderboard/points.jsonl
	$(PYTHON) -m d3llm_hf leaderboard docs/leaderboard/points.jsonl -o docs/leaderboard \
	    --title "Embedded checkpoints: accuracy under parallelism"

AGAINST = d3llm_hf/evaluation/results/autoregressive.jsonl
BLOCKS = block_length=16
autoregressive:  ## measure the embedded checkpoints beside their causal twin (minutes of one core; resumable)
	for batch in 1 8; do OMP_NUM_THREADS=1 $(PYTHON) -m d3llm_hf sweep d3llm-causal d3llm-llada d3llm-llada-teacher \
	    --methods ar ar_prompt_lookup lookup-3=ar_prompt_lookup:prompt_lookup_num_tokens=3 \
	    d3llm-0.1=d3llm:$(BLOCKS),entropy_threshold=0.1 d3llm-0.4=d3llm:$(BLOCKS),entropy_threshold=0.4 \
	    d3llm-0.4-cached=d3llm:$(BLOCKS),entropy_threshold=0.4,kv_cache=delayed,cache_delay=1 \
	    one-by-one=llada:$(BLOCKS),kv_cache=dual --no-grid --num-samples 300 --batch-size $$batch --dtype float32 \
	    --device cpu -o $(AGAINST) || exit 1; done
	$(PYTHON) -m d3llm_hf.evaluation.tables docs/measuring.md

wheel:  ## build dist/*.whl
	$(PYTHON) -m build --wheel

clean:
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis htmlcov .coverage
