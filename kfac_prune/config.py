"""The recipe of a run: every choice a user can make, as a validated dataclass."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

import yaml

from kfac_prune.errors import InputError, shown
from kfac_prune.options import check_type, option

#: Curvatures from the gradients of whole sequences, for single weights only.
SEQUENCE_METHODS = ("ek-fac", "woodfisher", "m-fac")
#: Methods of the field, for single weights only.
BASELINES = ("sparsegpt", "wanda", "alps", "llm-surgeon")
METHODS = ("kfac", "layerwise", "obd", "magnitude", *SEQUENCE_METHODS, *BASELINES)
#: Added to each curvature factor, as a fraction of its mean diagonal, where the recipe leaves it open.
DAMPING, STRUCTURED_DAMPING = 0.03, 0.001
#: Epochs of the reconstruction, where the recipe leaves them open and there are windows enough.
RECONSTRUCT = 5
#: Windows that a causal language model writes itself for that, per calibration window, where the recipe leaves it open.
OWN_TEXT = 2
KINDS = ("ffn", "heads")
#: What each method can allocate by. Loss curves there are for G ⊗ A alone; global thresholds where the curvature is an
#: estimate of the Fisher (or, for magnitude, by custom).
ALLOCATIONS = {
    "kfac": ("curves", "uniform", "global"),
    "layerwise": ("uniform",),
    "obd": ("uniform", "global"),
    "magnitude": ("uniform", "global", "owl"),
    **dict.fromkeys(SEQUENCE_METHODS, ("uniform", "global")),
    "sparsegpt": ("uniform", "owl"),
    "wanda": ("uniform", "owl"),
    "alps": ("uniform", "owl"),
    "llm-surgeon": ("global", "uniform"),
}


def parse_pattern(text: str) -> tuple[int, int] | None:
    """``"2:4"`` → (2, 4); ``"unstructured"`` → None.

    Raises:
        InputError: anything else, or an n:m that is not 1 <= n < m <= 64.
    """
    if text == "unstructured":
        return None
    match = re.fullmatch(r"([0-9]{1,3}):([0-9]{1,3})", text)
    if match is None:
        raise InputError(f"pattern {shown(text)} is neither 'unstructured' nor of the form n:m, such as 2:4")
    n, m = int(match[1]), int(match[2])
    if not 1 <= n < m <= 64:
        raise InputError(f"pattern {text} would keep {n} of every {m} weights; needs 1 <= n < m <= 64")
    return n, m


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a run of ``kfac-prune prune``; field names are the option names.

    Raises:
        InputError: from the constructor, naming the field, the value and the remedy.
    """

    model: str = option("", "model to prune: a local folder in Hugging Face format, or a hub id")
    data: str = option(
        "", "calibration text: a .txt, .jsonl or .json file, a folder of them, or a hub data set name[:config]"
    )
    out: str = option("", "folder for the results")
    objective: str = option(
        "auto",
        "what the model should go on computing: the distribution of tokens, that of classes, or the sentence embedding "
        "(½ squared distance of the vectors); for the last two every document is one sequence; auto = what the "
        "checkpoint's architecture is for, or an embedding where files of sentence-transformers come with it",
        choices=("auto", "tokens", "classes", "embedding"),
    )
    eval_data: str | None = option(
        None, "held-out text to measure on, same forms as --data; default: the last tenth of --data, not calibrated on"
    )
    separator: str | None = option(
        None, r"what stands between two documents of a text file, e.g. '\n\n'; default: a text file is one running text"
    )
    text_field: str = option("text", "field of a JSON object or data set row that holds the text")
    samples: int = option(128, "calibration windows")
    eval_samples: int = option(64, "held-out windows to measure on")
    seqlen: int = option(256, "tokens per window, at most the model's context length")
    batch_size: int = option(4, "windows per forward pass")
    sparsity: float | None = option(
        None,
        "fraction of the prunable weights to remove, in [0, 1); less than an n:m pattern removes leaves some layers "
        "dense, which the predicted losses choose; default: 0.5, or all that an n:m pattern removes",
    )
    pattern: str = option(
        "unstructured", "'unstructured', or n:m = keep n of every m consecutive weights in a row, e.g. 2:4"
    )
    permute: bool | None = option(
        None,
        "with an n:m pattern: first reorder FFN units, head dimensions and the residual stream so that the groups keep "
        "more; the dense model's function and the architecture stay the same; default: on for kfac with an n:m pattern",
    )
    structured: str | None = option(
        None,
        "make the model smaller instead of sparse, by removing 'ffn' (hidden units), 'heads' (KV groups and query "
        "heads) or 'ffn,heads'; --sparsity is then the fraction of the blocks' weights to remove; default: none",
    )
    target_params: int | None = option(
        None, "with --structured, instead of --sparsity: parameters the model is to have; default: none"
    )
    target_latency: float | None = option(
        None,
        "with --structured, instead of --sparsity: milliseconds that one forward pass over one window of --seqlen "
        "tokens is to take on this device; default: none",
    )
    widths: str | None = option(
        None,
        "with --structured: uniform = one size for all blocks, a plain configuration that every server loads; "
        "per-layer = a size for each, which needs trust_remote_code or kfac_prune.load; default: both are built, the "
        "better kept",
        choices=("uniform", "per-layer"),
    )
    multiple: int | None = option(
        None, "with --structured: FFN widths are multiples of this; default: 64 for widths from 2048, else 8"
    )
    shots: int | None = option(
        None,
        "with --structured: cuts on the way to the target, with the curvature estimated anew before each; default: 1, "
        "and where more than 0.05 nats per token are lost and no reconstruction follows also 3, kept unless worse by "
        "5 %. Sparse, for kfac: "
        "the shots after the first correct masks and weights with curvature and gradient of the pruned model, each "
        "kept only where held-out calibration windows are better for it; default: 1, and 3 where more than 0.05 nats "
        "per token are predicted to be lost, no reconstruction follows and there are 16 windows or more",
    )
    method: str = option(
        "kfac",
        "curvature: kfac = G x A (Optimal Brain Surgeon), layerwise = I x A, obd = its diagonal, magnitude = I; from "
        "gradients of whole sequences ek-fac = K-FAC's eigenvectors, woodfisher = blocks, m-fac = low rank; "
        "or sparsegpt, wanda, alps, llm-surgeon, as in their papers, to compare with",
        choices=METHODS,
    )
    allocation: str | None = option(
        None,
        "sparsity per layer: curves = least predicted loss, uniform = the same everywhere, global = one saliency "
        "threshold, owl = less for blocks with more outlying activations (for magnitude, wanda, sparsegpt, alps); "
        "default: curves for kfac and unstructured, global for llm-surgeon and unstructured, else uniform",
        choices=("curves", "uniform", "global", "owl"),
    )
    refit: bool | None = option(
        None,
        "after pruning, refit layers in closed form to what the dense model has in its residual stream, masks chosen "
        "anew; faster than --reconstruct and less good; default: for kfac and layerwise on where they are not "
        "reconstructed",
    )
    reconstruct: int | None = option(
        None,
        "epochs over the calibration windows in which the weights left in each block learn to bring its output back to "
        "the dense model's, one block at a time; 0 = off; default: "
        f"{RECONSTRUCT} for kfac and layerwise from 16 windows on, unless there is --refit; else 0",
    )
    reconstruct_unit: str = option(
        "block",
        "what --reconstruct trains at a time: whole blocks, or sublayers (attention, then FFN; less memory)",
        choices=("block", "sublayer"),
    )
    own_text: int | None = option(
        None,
        "windows that the dense model writes itself, per calibration window, for --reconstruct to learn on beside the "
        f"text; epochs take no more steps for it; 0 = none; default: {OWN_TEXT} for causal language models (1 for two "
        "epochs, 0 for one), unless there is --offload; else 0",
    )
    recover_epochs: int = option(
        0,
        "at the end, epochs over the calibration windows in which all weights that are left learn together to give the "
        "dense model's outputs, masks fixed; needs memory for training the whole model; stops early, and reported "
        "apart from the one-shot figures; 0 = off",
    )
    streams: str = option(
        "cpu",
        "where --reconstruct keeps the activations between blocks: main memory, the device's own, or files in the "
        "folder for temporary files (TMPDIR)",
        choices=("cpu", "device", "disk"),
    )
    include: tuple[str, ...] = option(
        (), "take only layers whose name matches this shell pattern (repeatable); default: all"
    )
    ignore: tuple[str, ...] = option(
        (), "leave layers dense whose name matches this shell pattern (repeatable); default: none"
    )
    damping: float | None = option(
        None,
        "added to each curvature factor, as a fraction of its mean diagonal, in (0, 1]; default: 0.03, with "
        "--structured 0.001",
    )
    fisher: str = option(
        "sampled",
        "labels of the Fisher: sampled from the model (true Fisher), or the text's own (empirical)",
        choices=("sampled", "empirical"),
    )
    seed: int = option(0, "of window positions and sampled labels; the same seed gives the same bytes")
    device: str = option("auto", "torch device: cpu, cuda, cuda:1, ...; auto = cuda if there is one")
    dtype: str = option(
        "auto", "to load the model in; auto = the checkpoint's", choices=("auto", "float32", "bfloat16", "float16")
    )
    offload: bool = option(
        False,
        "for models larger than the device: blocks stay in main memory and come to the device one at a time, with the "
        "forward pass run again for every backward pass; not with --structured, --shots, --own-text and "
        "--recover-epochs",
    )
    max_memory: float | None = option(
        None,
        "GiB that the curvature of several layers may take at a time; where more is needed every block runs twice, "
        "and what is finished waits in main memory or, on a CPU, in files in the folder for temporary files (TMPDIR); "
        "not with --shots of sparse models; default: half of what is free on a GPU, no limit on a CPU",
    )
    skip_bad_batches: bool = option(
        False, "leave out, and count, calibration batches on which the model computes NaN or infinity"
    )
    overwrite: bool = option(
        False,
        "replace --out, if it holds an earlier result, once the new one is complete; and begin anew: what an "
        "interrupted run has left in OUT.work is dropped, unless there is --resume",
    )
    resume: bool = option(
        False,
        "go on where an interrupted run with the same options had got to, from what it left in OUT.work; also with "
        "--overwrite, which then only lets an earlier result in --out be replaced",
    )
    trust_remote_code: bool = option(False, "run model code that comes with the checkpoint")

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            check_type(f, getattr(self, f.name))
        for name in ("model", "data", "out"):
            if not getattr(self, name).strip():
                flag = "" if name == "model" else f" with --{name}"
                raise InputError(f"{name} is empty; say{flag} which {'folder' if name == 'out' else name} to use")
        for name, least in (("samples", 1), ("eval_samples", 1), ("seqlen", 2), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.own_text is not None and not 0 <= self.own_text <= 100:
            raise InputError(f"own_text is {self.own_text}; it must be at least 0 and at most 100")
        for name in ("reconstruct", "recover_epochs"):
            epochs = getattr(self, name) or 0
            if epochs < 0:
                raise InputError(f"{name} is {epochs}; it must be at least 0")
            if epochs and self.samples < 10:
                reason = "holds a tenth of the windows out and needs at least 10"
                raise InputError(f"{name} {reason}; samples is {self.samples}")
        if self.seed >= 2**63:
            raise InputError(f"seed is {self.seed}; it must be at least 0 and below 2^63")
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            hint = f" ({self.sparsity:g} % is {self.sparsity / 100:g})" if 1 < self.sparsity < 100 else ""
            raise InputError(f"sparsity is {self.sparsity}; it must be at least 0 and below 1{hint}")
        if self.damping is not None and not 0 < self.damping <= 1:
            raise InputError(f"damping is {self.damping}; it must be above 0 and at most 1")
        if self.permute and self._implied is None:
            raise InputError(
                f"permute reorders the groups of an n:m pattern, and pattern is {self.pattern}; add a pattern such as "
                "2:4, or drop permute"
            )
        if self.max_memory is not None:
            if not 0 < self.max_memory < float("inf"):
                raise InputError(f"max_memory is {self.max_memory}; it must be above 0, in GiB")
            if self.structured is None and (self.shots or 1) > 1:
                raise InputError(
                    f"max_memory takes a few layers at a time; shots {self.shots} needs them all; drop one"
                )
        if self.offload:
            whole = {"structured": self.structured, "recover_epochs": self.recover_epochs}
            whole |= {
                "own_text": self.own_text and self.reconstruct != 0,
                "shots": (self.shots or 1) > 1,
                "method": self.method in (*SEQUENCE_METHODS, "llm-surgeon"),
            }
            if given := [name for name, value in whole.items() if value]:
                what = f"{given[0]} {getattr(self, given[0])}"
                raise InputError(
                    f"offload brings single blocks to the device; {what} needs the whole model there; drop one of them"
                )
        self._check_allocation()
        self._check_structured()

    def _check_allocation(self) -> None:
        """Pattern, sparsity, allocation and method fit together."""
        implied = self._implied
        if implied is not None and self.sparsity is not None and self.sparsity > implied + 1e-6:
            raise InputError(
                f"pattern {self.pattern} removes {implied:.4g} of the weights, but sparsity is {self.sparsity}; leave "
                "sparsity out, or give less to leave some layers dense"
            )
        if self._partly_dense and "curves" not in ALLOCATIONS[self.method]:
            raise InputError(
                f"sparsity {self.sparsity} is less than pattern {self.pattern} removes: measured losses tell which "
                f"layers stay dense, and method {self.method} has none; use kfac or leave sparsity out"
            )
        if self.allocation is None:
            return
        if self.allocation not in ALLOCATIONS[self.method]:
            allowed = f"use {' or '.join(ALLOCATIONS[self.method])}"
            if self.allocation == "owl":
                raise InputError(f"allocation owl is not for method {self.method}, whose losses tell more; {allowed}")
            needs = "loss curves" if self.allocation == "curves" else "losses that compare across layers"
            raise InputError(
                f"allocation {self.allocation} needs {needs}, which method {self.method} does not give; {allowed}"
            )
        only = "curves" if self._partly_dense else "uniform"
        if implied is not None and self.allocation != only:
            what = "leaves layers dense" if self._partly_dense else "fixes every layer's sparsity"
            raise InputError(f"pattern {self.pattern} {what}; allocation can only be {only}")

    @property
    def _implied(self) -> float | None:
        """The sparsity of the pattern."""
        groups = parse_pattern(self.pattern)
        return 1 - groups[0] / groups[1] if groups else None

    @property
    def _partly_dense(self) -> bool:
        """Less is to be removed than the pattern does."""
        return self._implied is not None and self.sparsity is not None and self.sparsity < self._implied - 1e-6

    def _check_structured(self) -> None:
        """The options of structured pruning fit together."""
        own = {name: getattr(self, name) for name in ("target_params", "target_latency", "widths", "multiple")}
        given = [name for name, value in own.items() if value is not None]
        if self.shots is not None and not 0 < self.shots <= 1000:
            raise InputError(f"shots is {self.shots}; it must be above 0 and at most 1000")
        if self.structured is None:
            if given:
                raise InputError(f"{given[0]} is an option of structured pruning; add structured, such as 'ffn,heads'")
            if self.shots is not None and self.shots > 1 and self.method != "kfac":
                raise InputError(
                    f"shots is {self.shots}, and method {self.method} does not correct a sparse model; use kfac, or "
                    "one shot"
                )
            return
        kinds = self.kinds
        if not kinds or len(set(kinds)) < len(kinds) or not set(kinds) <= set(KINDS):
            raise InputError(f"structured is {shown(self.structured)}; it must be 'ffn', 'heads' or 'ffn,heads'")
        if self.method in (*BASELINES, *SEQUENCE_METHODS):
            others = " or ".join(m for m in METHODS if m not in (*BASELINES, *SEQUENCE_METHODS))
            raise InputError(f"method {self.method} prunes single weights, structured removes units; use {others}")
        if self.pattern != "unstructured" or self.allocation is not None:
            name = "pattern" if self.pattern != "unstructured" else "allocation"
            raise InputError(
                f"{name} {getattr(self, name)} is for sparse weights, structured removes whole units; drop one"
            )
        targets = [n for n in ("sparsity", "target_params", "target_latency") if getattr(self, n) is not None]
        if len(targets) > 1:
            raise InputError(f"{' and '.join(targets)} each say how much to remove; give one of them")
        for name in given:
            value = own[name]
            if not isinstance(value, str) and not 0 < value < float("inf"):
                raise InputError(f"{name} is {value}; it must be above 0")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of groups that ``structured`` names."""
        return tuple(part.strip() for part in (self.structured or "").split(",") if part.strip())

    @property
    def cuts(self) -> int | None:
        """Of a resolved recipe, the shots in which a smaller model is cut; None leaves them to what they lose."""
        return self.shots or (1 if self.reconstruct else None)  # before a reconstruction more bring little

    def resolved(self) -> Recipe:
        """The same recipe with all that a rule decides filled in."""
        sparsity: float | None = 0.5 if self.sparsity is None else self.sparsity
        allocation: str | None = self.allocation or ALLOCATIONS[self.method][0]
        if self._implied is not None and not self._partly_dense:
            sparsity, allocation = self._implied, "uniform"
        repairs, reconstruct, refit = self.method in ("kfac", "layerwise"), self.reconstruct, self.refit
        if reconstruct is None:  # it takes the place of the refit
            reconstruct = RECONSTRUCT if repairs and not refit and self.samples >= 16 else 0
        if refit is None:
            refit = repairs and not reconstruct
        permute = self.method == "kfac" and self._implied is not None if self.permute is None else self.permute
        damping = (STRUCTURED_DAMPING if self.structured else DAMPING) if self.damping is None else self.damping
        if self.structured:
            open_target = self.target_params is None and self.target_latency is None
            sparsity, allocation = (sparsity if open_target else None), None
        filled: dict[str, Any] = {"permute": permute, "refit": refit, "reconstruct": reconstruct, "damping": damping}
        return dataclasses.replace(self, sparsity=sparsity, allocation=allocation, **filled)

    def to_yaml(self) -> str:
        """The recipe as YAML, one field per line."""
        fields = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        return yaml.safe_dump(fields, sort_keys=False)  # non-ASCII escaped: PyYAML folds some of it otherwise
