"""The settings of a run, typed: every section of a recipe, what its keys mean, and which of them fit together.

No field here has a default. (One that is added after a release needs the value that stands for what was before: run
folders and checkpoints carry their recipe.) Everything a layout cannot do is refused here, with the arithmetic in the
message, before a process group exists.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, field_validator, model_validator

from megatron_patch.recipe.section import Section
from megatron_patch.recipe.vision import Vision


def _home(folder: Path) -> Path:
    """`~/x` as the shell would read it, which leaves `key=~/x` alone."""
    if folder == Path() or any(character < " " for character in str(folder)):  # `key=""`: a variable that was not set
        raise ValueError(f"{str(folder)!r} names no folder")
    if str(folder) in ("None", "none"):
        raise ValueError("no folder is written null")
    try:
        return folder.expanduser()
    except RuntimeError as error:
        raise ValueError(f"{folder}: {error}") from None


Folder = Annotated[Path, AfterValidator(_home)]
_YEAR = 365 * 24 * 60  # minutes


def from_ffn_switch(model: Any) -> Any:
    """Settings of a model with `num_ffns` for `shared_ffn: true | false`, which stands in recipes of before 0.2.0.

    Raises ValueError where both are given.
    """
    if not isinstance(model, Mapping) or "shared_ffn" not in model:
        return model
    if "num_ffns" in model:
        raise ValueError("num_ffns and shared_ffn are both given: they say the same, write num_ffns")
    if not isinstance(shared := model["shared_ffn"], bool):
        raise ValueError(f"shared_ffn {shared!r}: true (num_ffns 1) or false (num_ffns null) is expected")
    return {**{key: value for key, value in model.items() if key != "shared_ffn"}, "num_ffns": 1 if shared else None}


class Model(Section):
    """The architecture (paper Table 3; conflicts with the released code in docs/errata.md)."""

    num_layers: int = Field(gt=0, le=10_000, description="Decoder layers.")
    hidden_size: int = Field(gt=0, description="Width of embeddings and residuals.")
    ffn_hidden_size: int = Field(gt=0, description="Inner width of the SwiGLU FFN.")
    num_attention_heads: int = Field(gt=0, description="Query heads; as many KV heads (MHA).")
    vocab_size: int = Field(gt=0, le=65536, description="Rows are stored as uint16.")
    sequence_length: int = Field(gt=0, description="Input tokens of a row; a stored row has one more.")
    num_ffns: int | None = Field(
        ge=1, description="FFNs that the layers share: 1 is MobiLlama, 2 or more are groups; null: one for each layer."
    )
    ffn_pattern: Literal["blocks", "cycle"] = Field(
        "blocks", description="Which FFN a layer of several uses: neighbours the same one (blocks) or by turns (cycle)."
    )
    tied_embeddings: bool = Field(False, description="One matrix as embedding and output layer: not served.")
    norm_epsilon: float = Field(gt=0, description="Of every RMSNorm.")
    rope_base: float = Field(gt=0, description="Base of the rotary embedding's angles.")
    init_std: float = Field(gt=0, description="N(0, init_std) for every matrix and embedding, without depth scaling.")
    vision: Vision | None = Field(None, description="The encoder of a model that sees; null: it reads alone.")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def ffn_count(self) -> int:
        """FFNs in the whole model."""
        return self.num_ffns or self.num_layers

    @property
    def shared_ffn(self) -> bool:
        """Whether any two layers use the same FFN."""
        return self.ffn_count < self.num_layers

    def ffn_of(self, layer: int) -> int:
        """Number of the FFN that decoder layer `layer` (from 0) uses, from 0."""
        return layer % self.ffn_count if self.ffn_pattern == "cycle" else layer * self.ffn_count // self.num_layers

    @model_validator(mode="before")
    @classmethod
    def _from_switch(cls, settings: Any) -> Any:
        return from_ffn_switch(settings)

    @model_validator(mode="after")
    def _buildable(self) -> Model:
        h, n = self.hidden_size, self.num_attention_heads
        if self.tied_embeddings:
            raise ValueError(
                "tied_embeddings true is not served: embedding and output layer are two matrices here, as in the paper"
            )
        if self.ffn_count > self.num_layers:
            raise ValueError(f"num_ffns {self.num_ffns} is more than num_layers {self.num_layers}: one would be idle")
        if h % n:
            raise ValueError(
                f"hidden_size {h} / num_attention_heads {n} = {h / n:g} is not a whole number"
                + (
                    " (the paper's 0.8B width 2532 cannot be built; the released 0.8B is 2560/10240)"
                    if h == 2532
                    else ""
                )
            )
        if self.vision is not None and self.vision.placeholder_id >= self.vocab_size:
            raise ValueError(
                f"vision.placeholder_id {self.vision.placeholder_id} is not below vocab_size {self.vocab_size}"
            )
        if self.vision is not None and self.vision.tokens >= self.sequence_length:
            raise ValueError(
                f"an image of {self.vision.tokens} tokens leaves no room for text in {self.sequence_length}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head dimension {h} / {n} = {self.head_dim} is odd; rotary embedding turns pairs")
        return self


class Parallel(Section):
    """How one model is laid over ranks. Data parallel size is what remains of the world."""

    tensor: int = Field(gt=0, description="Tensor-parallel size.")
    pipeline: int = Field(gt=0, description="Pipeline stages.")
    virtual_pipeline: int = Field(gt=0, description="Model chunks a stage (interleaved 1F1B above 1).")
    sequence: bool = Field(description="Sequence parallelism of norms and residuals over the tensor group.")
    reduce_bucket: int = Field(
        ge=0, description="Parameters reduced together, during backward; 0: all of them, after it."
    )
    zero_stage: Literal[1, 2] = Field(description="1: optimizer state sharded; 2: reduced gradients too.")


class Batch(Section):
    global_batch_size: int = Field(gt=0, description="Rows a step, over all ranks.")
    micro_batch_size: int = Field(gt=0, description="Rows a rank takes through the model at once.")


class Optimizer(Section):
    """AdamW and its schedule (paper section 3.3)."""

    learning_rate: float = Field(gt=0, description="Peak, reached after the warm-up.")
    min_learning_rate: float = Field(ge=0, description="Floor of the schedule.")
    schedule: Literal["cosine", "wsd"] = Field(
        "cosine", description="cosine; or wsd: warm-up, plateau, linear decay over the last cooldown_steps."
    )
    warmup_steps: int = Field(ge=0, description="Linear from LR(0)=0.")
    decay_steps: int | None = Field(gt=0, description="Step at which the schedule meets the floor; null: last step.")
    cooldown_steps: int = Field(0, ge=0, description="Steps of wsd's decay; 0 under cosine.")
    beta1: float = Field(ge=0, lt=1, description="Decay of the first moment.")
    beta2: float = Field(ge=0, lt=1, description="Decay of the second moment.")
    epsilon: float = Field(gt=0, description="Added to the root of the second moment.")
    weight_decay: float = Field(ge=0, description="Decoupled: a step takes learning rate x this off each weight.")
    decay_everything: bool = Field(description="true: norms and embeddings decay too, as the authors ran it.")
    clip_grad_norm: float = Field(gt=0, description="Global gradient norm is clipped to this.")
    encoder_learning_rate: float | None = Field(
        None, gt=0, description="Peak of a seeing model's encoder, under the same schedule; null: learning_rate."
    )
    projector_learning_rate: float | None = Field(None, gt=0, description="The same of its projector.")
    frozen: tuple[Literal["encoder", "decoder"], ...] = Field(
        (), description="Parts of a seeing model that stay as they are; the projector is always trained."
    )

    def multiple(self, part: Literal["encoder", "projector", "decoder"]) -> float:
        """What the schedule's learning rate is multiplied by for a part of the model; 0: it is frozen."""
        if part in self.frozen:
            return 0.0
        own = {"encoder": self.encoder_learning_rate, "projector": self.projector_learning_rate}.get(part)
        return 1.0 if own is None else own / self.learning_rate

    @model_validator(mode="after")
    def _ordered(self) -> Optimizer:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(f"min_learning_rate {self.min_learning_rate} is above learning_rate {self.learning_rate}")
        if self.decay_steps is not None and self.decay_steps <= self.warmup_steps:
            raise ValueError(
                f"decay_steps {self.decay_steps} is not after warmup_steps {self.warmup_steps}: the {self.schedule} "
                "follows the warm-up"
            )
        if (self.schedule == "wsd") != (self.cooldown_steps > 0):
            raise ValueError(
                f"schedule {self.schedule} with cooldown_steps {self.cooldown_steps}: wsd decays over cooldown_steps, "
                "at least 1; cosine has none, write 0"
            )
        if self.decay_steps is not None and self.warmup_steps + self.cooldown_steps > self.decay_steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} + cooldown_steps {self.cooldown_steps} is more than decay_steps "
                f"{self.decay_steps}: there is no room for both"
            )
        return self


class Data(Section):
    folder: Folder | None = Field(description="Data set written by build_amber.py, build_chat.py or build_vision.py.")
    order_seed: int = Field(ge=0, lt=2**31, description="Segment k is permuted by seed order_seed + k (32 bits).")
    epochs: int = Field(1, gt=0, le=2**20, description="Times the rows are gone through, in another order each time.")
    reset_at_starts: bool = Field(
        False,
        description="Attention and positions begin anew at each conversation; false: they run over the whole row.",
    )
    held_out_interval: int = Field(ge=0, description="Steps between held-out losses; 0: never.")
    held_out_rows: int = Field(ge=0, description="Rows of the held-out file that are scored.")
    read_ahead: bool = Field(description="Read each segment through before its rows are asked for.")
    stage_folder: Folder | None = Field(description="Copy segments to this storage of the node first (two fit).")


class Checkpoint(Section):
    interval_steps: int = Field(ge=0, description="Steps between restart checkpoints; 0: none by steps.")
    interval_minutes: float = Field(ge=0, description="Minutes between restart checkpoints; 0: none by time.")
    keep: int = Field(gt=0, description="Restart checkpoints kept; the newest verified one always is.")
    milestone_steps: int | None = Field(
        ge=0, description="Steps between milestones, kept for ever; null: one a segment; 0: none."
    )
    full_milestone_every: int = Field(ge=0, description="Every M-th milestone holds the optimizer too; 0: none does.")


class Watchdog(Section):
    """What to do about a step that went wrong."""

    non_finite: Literal["stop", "skip"] = Field(description="NaN or infinity in loss or gradient norm.")
    spike: Literal["ignore", "log", "stop", "skip"] = Field(description="Loss above spike_zscore of the window.")
    spike_zscore: float = Field(gt=0, description="Standard deviations above the mean of the window.")
    spike_window: int = Field(ge=8, description="Steps the mean and deviation are taken over.")
    skip_limit: int = Field(  # a default: recipes from before it are in run folders and checkpoints
        default=10, gt=0, description="Updates withheld in a row after which `skip` stops, or learns the new level."
    )
    hang_minutes: float = Field(
        ge=0, le=_YEAR, description="A step longer than this dumps every stack and ends the job; 0: off."
    )
    slow_factor: float = Field(ge=0, description="A step this many medians long is logged with its rank; 0: off.")


class Run(Section):
    folder: Folder | None = Field(description="Run folder; null: runs/NAME.")
    initial_weights: Folder | None = Field(
        description="Checkpoint, e.g. an imported one, whose weights step 0 has; null: drawn from the seed."
    )
    initial_encoder: Folder | None = Field(
        None, description="Hugging Face folder of CLIP weights that a seeing model's encoder has at step 0."
    )
    steps: int | None = Field(gt=0, description="Optimizer steps; null: every whole batch of the data, each epoch.")
    log_interval: int = Field(gt=0, description="Steps between lines on standard output; log.jsonl has every step.")
    tensorboard: bool = Field(description="Write event files where tensorboard is installed.")
    loggers: tuple[Literal["wandb", "mlflow"], ...] = Field(
        default=(), description="Services that get the numbers of log.jsonl too, one run through all attempts."
    )
    wall_minutes: float = Field(ge=0, description="Stop with a checkpoint after this long; 0: no budget.")
    deterministic: bool = Field(description="Bit-reproducible kernels and collectives on GPUs.")

    @field_validator("loggers")
    @classmethod
    def _once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"named twice: {', '.join(sorted(twice))}")
        return names


class Recipe(Section):
    name: str = Field(
        pattern=r"^[^/.\x00-\x1f][^/\x00-\x1f]*$",
        description="Names the run folder: one line, no slash, no dot in front.",
    )
    seed: int = Field(ge=0, description="Initialisation is a function of (seed, parameter name).")
    precision: Literal["bf16", "fp32"] = Field(description="bf16: bf16 weights; fp32 master, moments and gradients.")
    recompute: Literal["none", "selective", "full"] = Field(
        description="selective: the FFN's activations are recomputed in backward; full: every layer's."
    )
    kernels: Literal["auto", "reference", "compiled", "triton"] = Field(
        description="auto: what is fastest on this device (megatron_patch/kernels/choice.py)."
    )
    model: Model
    parallel: Parallel
    batch: Batch
    optimizer: Optimizer
    data: Data
    checkpoint: Checkpoint
    watchdog: Watchdog
    run: Run

    @property
    def run_folder(self) -> Path:
        return self.run.folder or Path("runs") / self.name

    @property
    def row_length(self) -> int:
        """Token ids of a stored row: the inputs and the last label."""
        return self.model.sequence_length + 1

    @property
    def pads_pipeline_split(self) -> bool:
        """True where layers divide over stages only if embedding and loss count as a layer each."""
        return self.model.num_layers % (self.parallel.pipeline * self.parallel.virtual_pipeline) != 0

    @model_validator(mode="after")
    def _layout(self) -> Recipe:
        m, p, b = self.model, self.parallel, self.batch
        for what, size in (
            ("num_attention_heads", m.num_attention_heads),
            ("ffn_hidden_size", m.ffn_hidden_size),
            ("vocab_size", m.vocab_size),
        ):
            if size % p.tensor:
                raise ValueError(f"model.{what} {size} must be divisible by parallel.tensor {p.tensor}")
        if p.sequence and p.tensor == 1:
            raise ValueError("parallel.sequence needs parallel.tensor above 1: it splits rows over the tensor group")
        if p.sequence and m.sequence_length % p.tensor:
            raise ValueError(
                f"model.sequence_length {m.sequence_length} must be divisible by parallel.tensor {p.tensor}, "
                "over whose ranks sequence parallelism splits it"
            )
        if p.virtual_pipeline > 1 and p.pipeline == 1:
            raise ValueError("parallel.virtual_pipeline above 1 needs parallel.pipeline above 1")
        chunks = p.pipeline * p.virtual_pipeline
        if m.num_layers % chunks and (m.num_layers + 2) % chunks:
            raise ValueError(
                f"model.num_layers {m.num_layers} over {p.pipeline} stages x {p.virtual_pipeline} chunks: neither "
                f"{m.num_layers} / {chunks} = {m.num_layers / chunks:g} nor, with embedding and loss counted as a "
                f"layer each, {m.num_layers + 2} / {chunks} = {(m.num_layers + 2) / chunks:g} is whole"
            )
        if self.pads_pipeline_split and (m.num_layers + 2) // chunks < 2:
            raise ValueError(
                f"model.num_layers {m.num_layers} over {chunks} chunks leaves the first one the embedding and no layer"
            )
        if p.zero_stage == 2 and p.pipeline > 1:
            raise ValueError(
                f"parallel.zero_stage 2 with parallel.pipeline {p.pipeline}: a pipeline accumulates gradients over "
                "micro-batches in flight, so they cannot be released as they are reduced; use zero_stage 1"
            )
        o, steps = self.optimizer, self.run.steps
        blind = {
            "optimizer.frozen": bool(o.frozen),
            "optimizer.encoder_learning_rate": o.encoder_learning_rate is not None,
            "optimizer.projector_learning_rate": o.projector_learning_rate is not None,
            "run.initial_encoder": self.run.initial_encoder is not None,
        }
        if m.vision is None and (set_there := [key for key, is_set in blind.items() if is_set]):
            raise ValueError(f"{set_there[0]} is set, but the model has no encoder: set model.vision")
        if (
            o.decay_steps is None
            and steps is not None
            and o.cooldown_steps
            and o.warmup_steps + o.cooldown_steps > steps
        ):
            raise ValueError(
                f"optimizer.warmup_steps {o.warmup_steps} + cooldown_steps {o.cooldown_steps} is more than run.steps "
                f"{steps}: there is no room for both"
            )
        if b.micro_batch_size > b.global_batch_size:
            raise ValueError(
                f"batch.micro_batch_size {b.micro_batch_size} is larger than batch.global_batch_size "
                f"{b.global_batch_size}"
            )
        return self

    def to_yaml(self) -> str:
        """The resolved recipe; `load` reads it back to an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def differences(self, other: Recipe) -> list[str]:
        """Lines `key.path: mine -> theirs` for every setting in which two recipes differ."""
        mine, theirs = _flatten(self.model_dump(mode="json")), _flatten(other.model_dump(mode="json"))
        return [
            f"{k}: {mine.get(k)!r} -> {theirs.get(k)!r}" for k in {**mine, **theirs} if mine.get(k) != theirs.get(k)
        ]


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    return {k: v for key, sub in tree.items() for k, v in _flatten(sub, f"{prefix}.{key}" if prefix else key).items()}
