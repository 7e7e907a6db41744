# shellcheck shell=bash disable=SC2034  # variables are read by slurm/launch.sh
# The one file a site edits. Source it once in the shell that submits, then use sbatch as usual:
#
#     source slurm/site.sh
#     sbatch slurm/preflight.sbatch
#
# The SBATCH_* variables fill in what #SBATCH lines cannot know; the job sources this file again on its first node.
# One line with a comment behind it: a carriage return does it no harm.
grep -q $'\r' "${BASH_SOURCE[0]:-$0}" && echo 'slurm/site.sh has Windows line ends; dos2unix mends it' >&2 && return 2 #

# ---- Who pays, and where it runs (leave a line commented where the site has no such thing) ----------------------------
# export SBATCH_ACCOUNT=my-project
# export SBATCH_PARTITION=gpu
# export SBATCH_QOS=normal
# export SBATCH_RESERVATION=mobillama
# export SBATCH_CONSTRAINT=fat            # e.g. the feature that marks A100-80GB nodes
# Where the partition or QOS allows less than the days of the long templates (pretrain_*, chat_*, vision*, evaluate), which
# alone take it: their jobs put themselves back. SBATCH_TIMELIMIT would hold for every template, a check of half an hour too.
# export SITE_TIME_LIMIT=1-00:00:00
sbatch() {
    local name
    for name in TIMELIMIT SIGNAL NO_REQUEUE OPEN_MODE ARRAY_INX; do
        if [[ " $* " == *.sbatch\ * ]] && printenv "SBATCH_$name" >/dev/null; then
            echo "SBATCH_$name is set in this shell and would override the line of every template: unset it, and say" \
                "what one job needs behind sbatch (--time, --signal, ...)" >&2
            return 2
        fi
    done
    case " $* " in
    *[/\ ]pretrain_*.sbatch\ * | *[/\ ]chat_*.sbatch\ * | *[/\ ]vision*.sbatch\ * | *[/\ ]evaluate.sbatch\ *)
        command sbatch ${SITE_TIME_LIMIT:+"--time=$SITE_TIME_LIMIT"} "$@"
        ;;
    *) command sbatch "$@" ;;
    esac
}

# ---- Where things lie; all on a file system that every node sees -----------------------------------------------------
# CDPATH, a shell's own cd and zsh (whose sourced file is $0) must not change it.
SITE_REPOSITORY=$(unset CDPATH && builtin cd "$(dirname "${BASH_SOURCE[0]:-$0}")/.." && pwd)
SITE_RAW_DATA=$SITE_REPOSITORY/data/amber_raw       # Amber's train_000.jsonl ... train_359.jsonl, 7.5 TB
SITE_DATA=$SITE_REPOSITORY/data/amber               # what build_amber.sbatch makes of them, 2.5 TB
SITE_CHAT_DATA=$SITE_REPOSITORY/data/chat           # what data_tools/build_chat.py makes of conversations
SITE_ALIGN_DATA=$SITE_REPOSITORY/data/vision_align  # what data_tools/build_vision.py makes of captioned images
SITE_VISION_DATA=$SITE_REPOSITORY/data/vision       # the same of questions about images
SITE_RUNS=$SITE_REPOSITORY/runs                     # run folders: checkpoints, logs
SITE_BENCHMARKS=$SITE_REPOSITORY/benchmarks_data    # what `python -m megatron_patch eval --download` fetched
SITE_EVALUATIONS=$SITE_REPOSITORY/evaluations       # scores, one folder a checkpoint
SITE_LOGS=$SITE_REPOSITORY/logs                     # Slurm's own output of every job
# Slurm loses a job's output silently when its folder is missing, so the folder is made before anything is submitted.
mkdir -p "$SITE_LOGS"
export SBATCH_OUTPUT=$SITE_LOGS/%x-%j.out

# ---- The environment of every process --------------------------------------------------------------------------------
site_environment() {
    # One of: a conda environment made from environment.yml, the site's modules, a virtual environment.
    # module load CUDA/13.0 && source "$HOME/miniforge3/bin/activate" mobillama
    # shellcheck source=/dev/null
    source "$SITE_REPOSITORY/.venv/bin/activate"
}
# A container instead (see slurm/Dockerfile): site_environment holds `:` alone, and these the options that pyxis adds to
# srun, or a command put before python.
# pyxis/enroot: (--container-image=/shared/mobillama.sqsh --container-mounts=/shared:/shared
#                --container-workdir="$SITE_REPOSITORY")
SITE_SRUN_OPTIONS=()
SITE_WRAPPER=()             # apptainer: (apptainer exec --nv --bind /shared /shared/mobillama.sif)

# ---- How the allocation is used --------------------------------------------------------------------------------------
SITE_RANKS_PER_NODE=8       # one rank a GPU
SITE_SPARE_NODES=0          # good nodes kept idle in the allocation; preflight drops bad ones first
SITE_MOST_BAD_NODES=1       # with more bad nodes than this an attempt does not start
SITE_ATTEMPTS=3             # attempts without a new checkpoint after which a run is given up
SITE_PREFLIGHT=yes          # no: an attempt starts without checking its nodes
SITE_PREFLIGHT_OPTIONS=()   # thresholds of `python -m megatron_patch check`, e.g. (--slow 0.8)

# Called with a subject and a text when a node is found bad or a run is given up. Slurm mails the states of a job by
# itself (--mail-type in the templates); this is for what Slurm does not know.
site_alert() {
    local subject=$1 text=$2
    if command -v mail >/dev/null; then
        mail -s "$subject" "$(id -un)" <<<"$text"
    fi
}

# ---- Network: NCCL and InfiniBand ------------------------------------------------------------------------------------
# Which host cards carry NCCL's traffic. "=" is an exact list; on a DGX A100 the eight compute ports are mlx5_0-3 and
# mlx5_6-9, and the storage ports must stay out.
# export NCCL_IB_HCA="=mlx5_0,mlx5_1,mlx5_2,mlx5_3,mlx5_6,mlx5_7,mlx5_8,mlx5_9"
# Interface of the rendezvous and of NCCL's bootstrap: the one whose address the node names resolve to.
# export NCCL_SOCKET_IFNAME=ib0
# export GLOO_SOCKET_IFNAME=ib0
# RoCE only: index of the GID that speaks RoCE v2 (show_gids prints them). InfiniBand needs none.
# export NCCL_IB_GID_INDEX=3
# Lossless service level, where the fabric's administrator has set one aside.
# export NCCL_IB_SL=0
# Exponent of the InfiniBand retransmit time-out, 4.096 us x 2^n; 22 rides out a switch that fails over (default 20).
export NCCL_IB_TIMEOUT=22
# GPUDirect RDMA between a card and a GPU below the same PCIe switch only (PIX) up to the same host bridge (PHB).
# export NCCL_NET_GDR_LEVEL=PHB
# What NCCL prints into the run's logs/attempt_N/nccl, one file a process: WARN, or INFO to see rings and cards chosen.
export NCCL_DEBUG=WARN
# A collective that fails ends its process instead of spinning until the watchdog.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
# One OpenMP thread a rank: the CPUs of a rank feed its GPU, they do not compute.
export OMP_NUM_THREADS=1
# Blocks of the allocator grow instead of fragmenting; costs nothing at a fixed shape and saves a restart.
export PYTORCH_ALLOC_CONF=expandable_segments:True
# Kernels are compiled by every rank at its first start and kept here: on the node, not in a home that all nodes share.
TRITON_CACHE_DIR=/tmp/triton-$(id -un)
export TRITON_CACHE_DIR
