"""Compiles the kernels for GPUs that are not there, from the launches the ops would make.

The ops run on meta tensors while their launches are written down, so what is compiled is what is launched: the same
argument types, specialisations and configurations.
"""

import contextlib
import functools
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmkd.kernels import bpr_kd, emb_kd, launch, list_kd, scatter, spmm, topk

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8",
}  # fmt: skip
_TABLES = (torch.bfloat16, torch.float16, torch.float64)  # besides float32


@dataclass(frozen=True)
class Sizes:
    """Of the tensors the ops are called with. A 1, a multiple of 16 and what needs 64 bits each make another kernel."""

    users: int
    items: int
    nnz: int
    batch: int
    length: int
    modalities: int
    d: int


TIKTOK = Sizes(14343, 8690, 276637, 1024, 11, 3, 64)
# what the label says of the others -> sizes
OTHERS = {
    "d=65": Sizes(14343, 8689, 2**31 + 1, 1023, 11, 3, 65),
    "d=1 B=1 M=1": Sizes(1, 1, 1, 1, 2, 1, 1),
    "d=128 K=64": Sizes(14343, 8690, 276637, 1024, list_kd.MAX_FUSED, 3, 128),
}


@dataclass(frozen=True)
class Variant:
    """One kernel as one launch with one configuration compiles it."""

    op: str
    kernel: object
    arguments: tuple  # (name, type, constant or None, divisible by 16)
    config: triton.Config
    sizes: str = ""  # a key of OTHERS

    @property
    def name(self) -> str:
        return self.kernel.__name__.lstrip("_")

    @property
    def label(self) -> str:
        """What tells variants of one kernel apart: sizes, table type, block sizes, warps."""
        types = [t for _, t, _, _ in self.arguments]
        table = next((t[1:] for t in types if t in ("*fp64", "*bf16", "*fp16")), "fp32")
        constants = {n: c for n, t, c, _ in self.arguments if t == "constexpr" and n.startswith(("BLOCK", "KEEP"))}
        blocks = {**constants, **self.config.kwargs}
        sizes = [f"{self.sizes}:"] if self.sizes else []
        return " ".join([*sizes, table, *(f"{n.removeprefix('BLOCK_')}={c}" for n, c in blocks.items())]) + (
            f" warps={self.config.num_warps}"
        )

    @property
    def fixed(self) -> bool:
        """Whether it is the configuration that runs without a search."""
        return str(self.config) == str(launch.configs_of(self.kernel)[0])

    def compile(self, target: GPUTarget):
        """The compiled kernel for `target` (Triton keeps it in its cache)."""
        names = self.kernel.arg_names
        signature = dict.fromkeys(names, "constexpr") | {n: t for n, t, _, _ in self.arguments}
        constants = {n: c for n, t, c, _ in self.arguments if t == "constexpr"} | self.config.kwargs
        attrs = {(names.index(n),): [["tt.divisibility", 16]] for n, _, _, aligned in self.arguments if aligned}
        source = ASTSource(self.kernel, signature, constants, attrs)
        options = {"num_warps": self.config.num_warps, "num_stages": self.config.num_stages}
        return triton.compile(source, target=target, options=options)


def _argument(name: str, value, annotated: str) -> tuple:
    if isinstance(value, Tensor):
        return name, "*" + _TYPES[value.dtype], None, True
    if isinstance(value, float):
        return name, annotated or "fp32", None, False
    if isinstance(value, bool) or value is None or value == 1 or annotated == "constexpr":
        return name, "constexpr", value, False
    return name, "i32" if abs(value) < 2**31 else "i64", None, value % 16 == 0


class _Recorder:
    def __init__(self, op: str, kernel, seen: dict, sizes: str) -> None:
        self.op, self.tuner, self.seen, self.sizes = op, kernel, seen, sizes

    def __getitem__(self, grid) -> Callable:
        def write_down(*args, **kwargs) -> None:
            kernel = self.tuner.fn
            given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
            notes = {p.name: "constexpr" if p.is_constexpr else p.annotation_type for p in kernel.params}
            arguments = tuple(_argument(n, v, notes[n]) for n, v in given.items())
            for config in self.tuner.configs:
                variant = Variant(self.op, kernel, arguments, config, self.sizes)
                self.seen.setdefault((kernel.__name__, arguments, str(config)), variant)

        return write_down


@contextlib.contextmanager
def recording(op: str, seen: dict, sizes: str = "") -> Iterator[None]:
    """Launches inside are written into `seen` and do not happen."""
    rooms = (bpr_kd, emb_kd, list_kd, scatter, spmm, topk)
    before = [room.wrap_triton for room in rooms]
    for room in rooms:
        room.wrap_triton = lambda kernel: _Recorder(op, kernel, seen, sizes)
    try:
        yield
    finally:
        for room, wrap in zip(rooms, before, strict=True):
            room.wrap_triton = wrap


def _calls(dtype: torch.dtype, sizes: Sizes) -> Iterator[tuple[str, Callable[[], object]]]:
    """(op, call) for every launch a training step or an evaluation makes, on meta tensors."""
    meta, acc = torch.device("meta"), launch.accumulate_type(dtype)
    users, items, nnz, batch, length, modalities, d = astuple(sizes)

    def table(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device=meta)

    def index(*shape: int, of: torch.dtype = torch.int64) -> Tensor:
        return table(*shape, of=of)

    nodes = users + items
    graph = (index(nodes + 1), index(2 * nnz, of=torch.int32), table(nodes, of=acc))
    x, rows = table(nodes, d), index(2 * batch)
    ue, ie, b = table(users, d), table(items, d), index(batch)
    margin, one = table(batch, of=acc), table(of=acc)
    yield "propagate", lambda: spmm.propagate(*graph, x, 2, rows)
    yield "propagate", lambda: spmm.propagate_backward(*graph, table(2 * batch, d), 2, rows)
    yield "propagate", lambda: spmm.propagate(*graph, x, 2, None)
    half = (index(users + 1), index(nnz, of=torch.int32))
    value = table(nnz, of=acc)
    yield "spmm", lambda: spmm.spmm(*half, ie, None, table(users, of=acc), table(items, of=acc), None, None)
    yield "spmm", lambda: spmm.spmm(*half, ie, value, None, None, None, None)
    yield "spmm", lambda: spmm.sddmm(*half, ue, ie, None, None)
    triple = (ue, ie, b, b, b)
    for teacher in (None, margin):
        wanted = (True, True, teacher is not None)
        yield "bpr_kd", lambda teacher=teacher: bpr_kd.bpr_kd(*triple, teacher, 1.0, True)
        yield (
            "bpr_kd",
            lambda t=teacher, w=wanted: bpr_kd.bpr_kd_backward(one, one, *triple, margin, t, 1.0, True, *w),
        )
        yield "bpr_kd", lambda t=teacher: bpr_kd.bpr_kd_scores(margin, t, 1.0, True)
        yield (
            "bpr_kd",
            lambda t=teacher: bpr_kd.bpr_kd_scores_backward(one, one, margin, t, 1.0, True, True, t is not None),
        )
    yield "scatter", lambda: scatter.scatter_rows(ue, b, b, margin, ie)
    lists = (ue, ie, b, index(batch, length))
    logits, teachers = table(batch, length, of=acc), table(modalities, batch, length, of=acc)
    kd = (table(modalities, of=acc), 1.0, 1.0, 1.0, True)
    yield "list_kd", lambda: list_kd.list_scores(*lists)
    yield "list_kd", lambda: list_kd.list_scores_backward(logits, *lists, True, True)
    yield "list_kd", lambda: list_kd.list_kd(*lists, teachers, *kd)
    weights, *rest = kd
    for need_teacher in (False, True):
        yield (
            "list_kd",
            lambda n=need_teacher: list_kd.list_kd_backward(
                one, *lists, teachers, weights, logits, *rest, True, True, n
            ),
        )
    yield "list_kd", lambda: list_kd.list_kd_scores(logits, teachers, *kd)
    yield "list_kd", lambda: list_kd.list_kd_scores_backward(one, logits, teachers, *kd, True, True)
    stack, stats = table(modalities, items, d), table(items, 1 + 2 * modalities, of=acc)
    yield "emb_kd", lambda: emb_kd.emb_kd(ie, stack, weights, 2.0, False)
    yield "emb_kd", lambda: emb_kd.emb_kd_backward(one, ie, stack, weights, stats, 2.0, True, True)
    seen = (index(users + 1), index(nnz, of=torch.int32))
    yield "topk", lambda: topk.topk(ue, ie, 50, index(2048), *seen)
    yield "topk", lambda: topk.topk(ue, ie, 20, None, None, None)


@functools.cache
def variants(dtype: torch.dtype = torch.float32, sizes: str = "") -> list[Variant]:
    """Every kernel with every configuration, as the ops launch it for tables of `dtype`; `sizes`: a key of OTHERS."""
    seen: dict = {}
    for op, call in _calls(dtype, OTHERS.get(sizes, TIKTOK)):
        with recording(op, seen, sizes):
            call()
    return list(seen.values())


def _plain(found: list[Variant]) -> list[Variant]:
    """One variant for each kernel and configuration: the one that is given the most."""
    best: dict = {}
    for v in found:
        key, given = (v.name, str(v.config)), sum(t != "constexpr" for _, t, _, _ in v.arguments)
        if key not in best or given > best[key][0]:
            best[key] = (given, v)
    return [v for _, v in best.values()]


@functools.cache
def _todo() -> tuple[tuple[Variant, str], ...]:
    """(variant, target), as `rows` says."""
    plain = _plain(variants())
    found = [*plain, *(v for dtype in _TABLES for v in _plain(variants(dtype)))]
    # None for a tensor that is not given makes another kernel
    special = [v for v in variants() if v not in plain] + [v for sizes in OTHERS for v in _plain(variants(sizes=sizes))]
    found += [v for v in special if v.fixed]
    # a kernel that no table enters is the same for every type
    once = {(v.name, v.arguments, str(v.config)): v for v in reversed(found)}
    return tuple((v, arch) for v in list(once.values())[::-1] for arch in TARGETS)


def _row(position: int) -> dict:
    v, arch = _todo()[position]
    row = {"op": v.op, "kernel": v.name, "config": v.label, "arch": arch}
    return row | resources(v.compile(TARGETS[arch]), TARGETS[arch])


def rows(jobs: int = 2) -> list[dict]:
    """What the compiler made of every kernel: op, kernel, config, arch and `resources`.

    Every kernel with every configuration for every target, for tables of every type, and with the fixed configuration
    for the sizes of OTHERS and with the tensors left out that a launch may leave out.
    """
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_row, range(len(_todo())), chunksize=4))


def _tool(name: str) -> str:
    return str(Path(triton.backends.__file__).parent / "nvidia" / "bin" / name)


def resources(compiled, target: GPUTarget) -> dict[str, int]:
    """registers, shared_bytes, spill_bytes, stack_bytes and the widest global load in bits, read from what was compiled.

    AMD's spills count scalar registers too: without a stack these are kept in lanes of a vector register.
    """
    return _amd(compiled) if target.backend == "hip" else _nvidia(compiled)


def _nvidia(compiled) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        number = {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
        frame = number["STACK"] + number["LOCAL"]
        # a spill is a store to local memory; the stack frame says how much
        spilled = frame if frame and re.search(r"\bSTL\b", _run("nvdisasm", "-ndf", "-c", file.name)) else 0
    return {
        "registers": number["REG"],
        "shared_bytes": compiled.metadata.shared,
        "spill_bytes": spilled,
        "stack_bytes": number["STACK"],
        "global_load_width": max(_load_widths(compiled.asm["ptx"]), default=0),
    }


def _load_widths(ptx: str) -> list[int]:
    """Bits of every load from global memory; ptxas neither joins nor splits them."""
    direct = re.findall(r"\bld\.global[.\w:]*?(?:\.v(\d))?\.[a-z](\d+)\s", ptx)
    to_shared = re.findall(r"\bcp\.async\.c[ag]\.shared\.global[.\w:]* [^;]*?\], (0x[0-9a-f]+|\d+)", ptx)
    return [int(n or 1) * int(bits) for n, bits in direct] + [8 * int(size, 0) for size in to_shared]


def _run(tool: str, *args: str) -> str:
    return subprocess.run([_tool(tool), *args], check=True, capture_output=True, text=True).stdout


def _amd(compiled) -> dict[str, int]:
    text = compiled.asm["amdgcn"]

    def note(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", text).group(1))

    widths = re.findall(r"(?:global|buffer)_load_(?:dword(x[24])?|short|ushort|ubyte)", text)
    return {
        "registers": note("vgpr_count"),
        "shared_bytes": compiled.metadata.shared,
        "spill_bytes": 4 * (note("vgpr_spill_count") + note("sgpr_spill_count")),
        "stack_bytes": note("private_segment_fixed_size"),
        "global_load_width": max((32 * int(w[1:] or 1) if w else 32 for w in widths), default=0),
    }
