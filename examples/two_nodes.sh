#!/bin/bash
# Z-Image-Turbo, every weight, on two nodes of 8 GPUs without a scheduler. On the first node, from the checkout with .venv active:
#
#   bash examples/two_nodes.sh node-a node-b data.path=/shared/my_images output.dir=/shared/runs/mine
#
# DeepSpeed's launcher starts the ranks by pdsh (apt-get install pdsh), which logs in by ssh: from here both nodes must let you
# in without a password. The checkout, .venv, the model, the data and output.dir must lie at the same place on both.
#
# `python -m dopsd_fast.plan zimage_turbo_full_2nodes --gpus 8 --nodes 2 --memory 80` counts 45.83 GB on each GPU. Nodes of 4 GPUs
# need slots=4 and the argument deepspeed.config.zero_optimization.zero_hpz_partition_size=4. A stopped run continues with the same command.
#
# The hostfile was read by DeepSpeed's launcher in a test; two nodes have not been at hand.
set -eu

[ $# -ge 2 ] || { echo "usage: bash examples/two_nodes.sh NODE NODE [field=value ...]" >&2; exit 2; }
hosts=$(mktemp)
printf '%s slots=8\n' "$1" "$2" > "$hosts"
shift 2

deepspeed --hostfile "$hosts" dopsd_fast/train.py zimage_turbo_full_2nodes resume=auto "$@"
