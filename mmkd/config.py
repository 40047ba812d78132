"""Every setting of a run: one tree of pydantic models, read from YAML and from ``a.b=value`` overrides."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class ConfigError(ValueError):
    """A setting that is unknown, of the wrong type or out of range; the message names its dotted path."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)


class DataConfig(_Section):
    """Where the interactions and item features come from."""

    path: str = Field("demo", description="folder or file; `demo` and `synthetic` are built in")
    format: str = Field("auto", description="file format; `auto` looks at the files")
    split: Literal["given", "random", "leave-last-out", "time"] | None = Field(
        None, description="how to make train/validation/test; empty: as given, or the format's own default"
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="further keyword arguments of mmkd.data.load, e.g. column names"
    )


class StageConfig(_Section):
    """Settings every training stage has."""

    lr: float = Field(5e-3, gt=0, le=1, description="AdamW learning rate")
    l2: float = Field(1e-4, ge=0, description="weight of the L2 term over the batch's own layer-0 rows")
    batch_size: int = Field(4096, ge=1, description="(user, positive) pairs per step")
    epochs: int = Field(100, ge=0, description="upper bound; early stopping usually ends sooner")
    eval_every: int = Field(3, ge=1, description="epochs between two looks at validation")
    patience: int = Field(4, ge=1, description="looks at validation without a better one before stopping")


class RankingConfig(StageConfig):
    """A stage whose ranking loss may look at more than one negative."""

    shared_negatives: int = Field(
        0,
        ge=0,
        description="items drawn per step that all pairs of the batch are ranked against by softmax; 0: BPR, one negative "
        "a pair",
    )


class LightGCNConfig(RankingConfig):
    """LightGCN without distillation: the row of the summary the student has to beat."""

    lr: float = Field(2e-3, gt=0, le=1, description="AdamW learning rate")
    l2: float = Field(1e-3, ge=0, description="weight of the L2 term over the batch's own layer-0 rows")
    batch_size: int = Field(2048, ge=1, description="(user, positive) pairs per step")
    epochs: int = Field(300, ge=0, description="upper bound; early stopping usually ends sooner")
    eval_every: int = Field(5, ge=1, description="epochs between two looks at validation")
    layers: int = Field(3, ge=0, le=16, description="propagation layers")
    init: Literal["xavier", "normal"] = Field("xavier", description="start of the layer-0 table (normal: std 0.1)")


class UpdateConfig(RankingConfig):
    """Fine-tuning of a finished student on new interactions (`mmkd update`, paper section 7.3.1)."""

    lr: float = Field(1e-3, gt=0, le=1, description="AdamW learning rate")
    batch_size: int = Field(1024, ge=1, description="(user, positive) pairs per step")
    epochs: int = Field(20, ge=0, description="upper bound, one epoch = as many samples as new train pairs")
    eval_every: int = Field(1, ge=1, description="epochs between two looks at validation")
    new_share: float = Field(
        0.5, ge=0, le=1, description="positives drawn from a user's new pairs; the others from all of his"
    )
    val_fraction: float = Field(0.1, ge=0, lt=1, description="share of the new pairs that chooses the epoch; 0: none")
    test_fraction: float = Field(0.1, ge=0, lt=1, description="share of the new pairs for the final table; 0: none")


class PromptConfig(_Section):
    """The prompt p = H W_P + b_P and how it enters the teacher (paper Eq. 3, 4)."""

    strength: float = Field(0.1, ge=0, description="lambda_1, weight of the prompt in the features; 0 = no prompt")
    norm: Literal["mean", "row"] = Field(
        "mean", description="scale of p p^T X: 1/I (mean), or every row to unit length (row)"
    )
    lr: float = Field(1e-4, ge=0, le=1, description="learning rate of W_P, b_P in the student's stage; 0 = frozen")


class TeacherConfig(RankingConfig):
    """The multi-modal teacher (first stage)."""

    lr: float = Field(3e-3, gt=0, le=1, description="AdamW learning rate")
    l2: float = Field(1e-3, ge=0, description="weight of the L2 term over the batch's own layer-0 rows")
    batch_size: int = Field(4096, ge=1, description="(user, positive) pairs per step")
    epochs: int = Field(300, ge=0, description="upper bound; early stopping usually ends sooner")
    eval_every: int = Field(5, ge=1, description="epochs between two looks at validation")
    layers: int = Field(3, ge=0, le=16, description="L_T, propagation layers of its id embeddings")
    feature_layers: int = Field(1, ge=1, le=8, description="times R_hat, R_hat^T are applied to the projected features")
    neighbors: int = Field(
        10,
        ge=0,
        description="k of the nearest-neighbour graphs of the modalities over which an item's id row is smoothed; 0: none",
    )
    features: Literal["raw", "center", "standardize", "unit"] = Field(
        "unit",
        description="features as they are; centred and divided by one number; every column to mean 0, std 1; or centred "
        "with every row at the same length",
    )
    feature_memory: Literal["loaded", "mapped"] = Field(
        "loaded", description="features in memory, in their stored type; or left in their file and read in every step"
    )
    feature_compute: Literal["float32", "bfloat16"] = Field(
        "float32", description="type of both factors in X W and in its gradient; bfloat16 where the processor has it"
    )
    feature_weight: float = Field(1.0, ge=0, description="omega, weight of the row-normalised F^m in E^T")
    fusion: Literal["validation", "fixed"] = Field(
        "validation",
        description="omega of modality m: as given; or that times min(1, recall of its head / recall of the id part)^power, "
        "0 where popularity ranks better, read at every look at validation; so is a modality's neighbour graph left out",
    )
    fusion_power: float = Field(2.0, ge=0, description="the power in fusion=validation")
    modality_loss: float = Field(0.1, ge=0, description="mu, weight of each modality head's own BPR")
    prompt_loss: float = Field(0.1, ge=0, description="nu, weight of the prompt's own BPR")
    dropout: float = Field(0.2, ge=0, le=0.99, description="dropout on the projected features f^m")
    weight_decay: float = Field(1e-3, ge=0, description="AdamW's decoupled decay of W^m, b^m, W_P, b_P")
    init: Literal["xavier", "normal"] = Field("xavier", description="start of the id table (normal: std 0.1)")


class StudentConfig(RankingConfig):
    """The LightGCN student (second stage)."""

    lr: float = Field(5e-4, gt=0, le=1, description="AdamW learning rate")
    encoder: Literal["lightgcn", "gcn", "mlp"] = Field(
        "lightgcn", description="LightGCN, a GCN with weights, or an MLP without the graph"
    )
    layers: int = Field(3, ge=0, le=16, description="propagation (or MLP) layers")
    init: Literal["match", "teacher", "xavier", "normal"] = Field(
        "match",
        description="layer-0 table: the one whose propagation gives the teacher's E^T; E^T itself (Algorithm 1 line 17); "
        "or random",
    )


class DistillConfig(_Section):
    """What the student learns from the teacher (paper Eq. 5, 10, 11)."""

    pair: float = Field(0.1, ge=0, description="lambda_2, weight of PairKD")
    pair_tau: float = Field(1.0, gt=0, description="temperature of PairKD")
    pair_kind: Literal["bernoulli", "positive"] = Field("bernoulli", description="full KL, or its first term only")
    list: float = Field(0.1, ge=0, description="lambda_3, weight of ListKD")
    list_tau: float = Field(1.0, gt=0, description="temperature of ListKD")
    list_alpha: float = Field(1.0, ge=0, description="weight of KL(b^T || b^S)")
    list_beta: float = Field(1.0, ge=0, description="weight of KL(q^T || q^S)")
    list_weight: Literal["coupled", "decoupled"] = Field("coupled", description="KL(q) times 1 - b+^T, or times 1")
    negatives: int = Field(10, ge=1, le=4095, description="K - 1, negatives per list; the first is BPR's")
    modality_weights: Literal["uniform", "validation"] = Field(
        "validation",
        description="weight of modality m in ListKD: 1/|M|; or that times min(1, recall of its head / recall of the teacher)^power; "
        "in EmbKD, a sum, |M| times as much",
    )
    modality_power: float = Field(2.0, ge=0, description="the power in modality_weights=validation")
    emb: float = Field(0.01, ge=0, description="lambda_4, weight of EmbKD")
    emb_gamma: float = Field(2.0, ge=1, description="gamma of EmbKD")
    emb_nodes: Literal["items", "all"] = Field("items", description="EmbKD over items, or over items and users")
    emb_sample: int | None = Field(
        1024, ge=1, description="items (and users) drawn per step for EmbKD, an unbiased estimate; empty: all of them"
    )


class EvaluationConfig(_Section):
    """How models are compared and chosen. Choosing looks at validation only."""

    ks: tuple[int, ...] = Field((10, 20, 50), min_length=1, description="cut-offs of the ranking metrics")
    metric: str = Field(
        "recall@20",
        pattern=r"^(recall|ndcg|precision|hit|mrr|map)@[1-9][0-9]*$",
        description="validation metric that stops and selects",
    )
    select: Literal["best", "last"] = Field(
        "best", description="weights to keep: best on validation, or the last epoch's (needs no validation part)"
    )


class Config(_Section):
    """All settings of ``mmkd.train``."""

    data: DataConfig = Field(default_factory=DataConfig, description="data set")
    dim: int = Field(64, ge=1, le=4096, description="d, width of all embeddings")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of everything random")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA when torch has it")
    amp: Literal["bf16"] | None = Field(
        None,
        description="bf16: what training's propagation gathers is rounded, on a GPU what the losses take too; empty: float32",
    )
    cuda_graphs: bool = Field(
        True, description="on a GPU, steps are recorded once and played back; not while they are profiled"
    )
    threads: int | None = Field(None, ge=1, description="CPU threads; empty: torch's own choice")
    prompt: PromptConfig = Field(default_factory=PromptConfig, description="prompt module")
    teacher: TeacherConfig = Field(default_factory=TeacherConfig, description="first stage")
    student: StudentConfig = Field(default_factory=StudentConfig, description="second stage")
    distill: DistillConfig = Field(default_factory=DistillConfig, description="distillation losses")
    lightgcn: LightGCNConfig = Field(default_factory=LightGCNConfig, description="the undistilled LightGCN")
    update: UpdateConfig = Field(default_factory=UpdateConfig, description="fine-tuning on new interactions")
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig, description="metrics and selection")
    model: str = Field("mmkd", description="what to train: mmkd (teacher, then student), teacher, or a baseline")
    models: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="settings of baselines by name, e.g. models.ngcf.layers=2"
    )
    baselines: tuple[str, ...] = Field(
        ("popularity", "item-knn", "lightgcn"), description="what the summary compares with; [] trains none"
    )
    checkpoint_every: int = Field(5, ge=1, description="epochs between two checkpoints")
    log: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        (), description="where the numbers go besides metrics.jsonl"
    )
    progress: bool = Field(True, description="show a progress bar")
    profile: int = Field(
        0, ge=0, description="steps of every stage to profile by op; the tables go into the run folder"
    )

    @model_validator(mode="before")
    @classmethod
    def _check_models(cls, content: Any) -> Any:
        """Names against the registry; the settings of every baseline in use are written out in full."""
        from mmkd.models.baselines import NAMES, TRAINED

        if not isinstance(content, dict):
            return content
        given = content.get("models", {})
        wanted = [content.get("model", "mmkd"), *(content.get("baselines") or ())]
        if not isinstance(given, dict) or not all(isinstance(value, dict) for value in given.values()):
            raise ValueError("models: expected a mapping of baseline names to settings, e.g. {ngcf: {layers: 2}}")
        for key, names, known in (("model or baselines", wanted, NAMES), ("models", given, tuple(TRAINED))):
            for name in names:
                if name not in known:
                    close = difflib.get_close_matches(str(name), known, n=1)
                    hint = f"did you mean '{close[0]}'? " if close else ""
                    raise ValueError(f"{key}: unknown model {name!r}; {hint}known: {', '.join(known)}")
        full = {}
        for name in dict.fromkeys((*given, *(name for name in wanted if name in TRAINED))):
            try:
                full[name] = TRAINED[name].Settings.model_validate(given.get(name, {})).model_dump()
            except ValidationError as error:
                raise ValueError(_explain(error, f"models.{name}.", TRAINED[name].Settings)) from None
        return {**content, "models": full}

    def to_yaml(self) -> str:
        """The settings as YAML text that :func:`load_config` reads back to an equal object."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Dotted paths of every setting and section, in order."""
    for name, field in model.model_fields.items():
        yield prefix + name
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from known_keys(kind, f"{prefix}{name}.")


def _nearest(path: str, model: type[BaseModel], prefix: str) -> str:
    known = list(known_keys(model, prefix))
    by_leaf = {key.rsplit(".", 1)[-1]: key for key in reversed(known)}
    close = difflib.get_close_matches(path, known, n=1, cutoff=0.6)
    if not close:
        leaf = difflib.get_close_matches(path.rsplit(".", 1)[-1], list(by_leaf), n=1, cutoff=0.6)
        close = [by_leaf[name] for name in leaf]
    return (
        f"did you mean '{close[0]}'?" if close else "known: " + ", ".join(prefix + name for name in model.model_fields)
    )


def _explain(error: ValidationError, prefix: str = "", model: type[BaseModel] | None = None) -> str:
    lines = []
    for item in error.errors():
        path = prefix + ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown setting '{path}'; {_nearest(path, model or Config, prefix)}")
        elif item["type"] == "value_error" and not item["loc"]:
            lines.append(str(item["ctx"]["error"]))
        else:
            lines.append(f"setting '{path}': {item['msg']}, got {reprlib.repr(item['input'])}")
    return "\n".join(lines)


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """``["a.b=1", ...]`` as a nested mapping; values are read as YAML.

    Raises:
        ConfigError: text without ``=``, an empty path, or a value that is no YAML.
    """
    tree: dict[str, Any] = {}
    for text in overrides:
        path, equals, value = text.partition("=")
        parts = path.strip().split(".")
        if not equals or not all(parts):
            raise ConfigError(f"override {text!r}: expected key=value with a dotted key, e.g. teacher.lr=1e-3")
        try:
            parsed = yaml.load(value, _Loader)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(f"override {text!r}: the value is not valid YAML ({error})") from error
        node = tree
        for depth, part in enumerate(parts[:-1]):
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(f"override {text!r}: '{'.'.join(parts[: depth + 1])}' was already given a value")
        node[parts[-1]] = parsed
    return tree


def _merge(base: dict[str, Any], update: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in update.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


class _Loader(yaml.SafeLoader):
    """Plain data only. Aliases are refused: nested ones make a few lines stand for any amount of memory."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"aliases (*{self.peek_event().anchor}) are not taken; write the value out")
        return super().compose_node(parent, index)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file as a mapping.

    Raises:
        ConfigError: missing, unreadable, or no mapping.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist") from None
    except (yaml.YAMLError, OSError, ValueError, OverflowError, RecursionError) as error:
        raise ConfigError(f"config file {path} is not readable YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"config file {path}: expected a mapping of settings, got {type(content).__name__}")
    return content


def load_config(source: Config | Mapping[str, Any] | str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Settings from a YAML file, a (nested) mapping or a ready ``Config``, with overrides on top.

    Raises:
        ConfigError: an unknown key (the nearest known one is named), a wrong type, or a value out of range.
    """
    if source is None:
        content: dict[str, Any] = {}
    elif isinstance(source, Config):
        content = source.model_dump()
    elif isinstance(source, Mapping):
        content = dict(source)
    elif isinstance(source, (str, Path)):
        content = read_yaml(Path(source))
    else:
        raise TypeError(f"config: expected Config, mapping, path or None, got {type(source).__name__}")
    content = _merge(content, parse_overrides(overrides))
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None
