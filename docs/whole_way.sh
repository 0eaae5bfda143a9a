#!/usr/bin/env bash
# The whole way, from a base model and data to routed answers, each step by its command:
#     docs/whole_way.sh MODEL TASKS OUTPUT TASK...
# MODEL is a model's folder, TASKS a folder of task folders (train.jsonl, test.jsonl, meta.json), OUTPUT a new folder, and every
# TASK one of TASKS. Steps, rows and batch sizes are read from STEPS, GATE_STEPS, ROWS and BATCH; EMBEDDER names a
# sentence-transformers model for the methods that route by the query's text, which are left out without one.
# A run that was stopped goes on where it was: finished experts are kept, stored answers are reused.
set -euo pipefail
[ $# -ge 4 ] || { echo "usage: $0 MODEL TASKS OUTPUT TASK..." >&2; exit 2; }

model=$1 tasks=$2 output=$3
shift 3
moerge=${MOERGE:-moerge}
training=(--batch-size "${BATCH:-8}" --template '{instruction}\n{input}\n' --no-progress)
experts=() folders=()

# what a task asks for, of its meta.json
instruction() { python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["instruction"])' "$tasks/$1/meta.json"; }

for task in "$@"; do
  expert=$output/experts/$task
  data=$tasks/$task/train.jsonl
  experts+=("$expert") folders+=("$tasks/$task")
  if [ ! -e "$expert/moerge_gates.safetensors" ]; then
    # a LoRA of the task, and the gates that say which tokens it is for (PHATGOOSE)
    [ -e "$expert/adapter_model.safetensors" ] ||
      $moerge train-expert "$model" --data "$data" --output "$expert" --steps "${STEPS:-200}" "${training[@]}"
    $moerge train-gates "$model" "$expert" --data "$data" --steps "${GATE_STEPS:-100}" "${training[@]}"
  fi
done

# what there is now
$moerge list "${experts[@]}"

# the methods, the base and the bounds on the same rows, with every answer kept
methods=base,merged,phatgoose,arrow_phatgoose,oracle_dataset,best_individual
text=()
if [ -n "${EMBEDDER:-}" ]; then
  for task in "$@"; do
    $moerge describe --adapter "$output/experts/$task" --examples "$tasks/$task/train.jsonl" --index 100 --overwrite \
      --embedder "$EMBEDDER" --instruction "$(instruction "$task")"
  done
  methods+=,retrieval,glider_code
  text=(--embedder "$EMBEDDER")
fi
asked=(--model "$model" --experts "${experts[@]}" --tasks "${folders[@]}" --limit "${ROWS:-50}" --no-progress)
asked+=(--template '{instruction}\n{input}\n')
$moerge eval "${asked[@]}" "${text[@]}" --methods "$methods" --cost --output "$output/eval"

# where the tokens go, as pictures and in one prompt
$moerge inspect "${asked[@]}" --methods phatgoose --results "$output/eval/results.json" --output "$output/inspect"
head -n 1 "$tasks/$1/test.jsonl" > "$output/row.jsonl"
question=$(python3 -c 'import json, sys; print(json.loads(sys.stdin.readline())["input"])' < "$output/row.jsonl")
routed=(--experts "${experts[@]}" --method phatgoose --instruction "$(instruction "$1")" --template '{instruction}\n{input}\n')
$moerge explain "$model" "$question" "${routed[@]}" --no-progress --html "$output/explain.html"

# answers to many prompts, as JSON lines with the experts' shares
$moerge generate --model "$model" "${routed[@]}" --prompts "$output/row.jsonl" --json --trace --max-new-tokens 8 \
  > "$output/answers.jsonl"

# one adapter of all of them, for engines that do not route
[ -e "$output/merged" ] || $moerge merge --experts "${experts[@]}" --output "$output/merged"
