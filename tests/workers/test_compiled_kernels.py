"""Every Triton kernel compiles for the GPUs we know, in all variants that occur, with few spilled registers.

No GPU is needed: the kernels' own wrappers are called on tensors that are never read, and each launch only
compiles. Types, specializations and shared memory are therefore those of a run. The number of rows does not
change the variant, so a worker compiles all variants when it starts. The file is also a script that prints
the table. It works in an environment with another Triton, too:

    python tests/workers/test_compiled_kernels.py
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

KERNELS = {
    *("_split", "_merge", "_rms_norm", "_rotate_halves", "_silu_mul", "_quantize_rows", "_attend"),
    "_grouped_product",
}
CAPABILITIES = (80, 89, 90)
TRITON_ON_GPUS = "3.6.0"  # what torch 2.11 comes with

# Bytes that a thread spills at most, by kernel and capability; 0 for all others.
SPILLS = {("_split", 89): 16, ("_split", 90): 300}
SPILLS_IN_FP32 = {("_attend", 89): 32}
REGISTERS = 255  # of a thread, at most
# Bytes of a program, at most. GPUs of capability 8.6 run what those of 8.0 and 8.9 do, and have no more.
SHARED = {80: 99 << 10, 89: 99 << 10, 90: 227 << 10}


class Compiled(NamedTuple):
    """A kernel of one variant, compiled."""

    kernel: str
    variant: str
    capability: int
    registers: int
    spilled: int
    shared: int


def compile_all(capabilities: Sequence[int]) -> Iterator[Compiled]:
    """Compiles each variant for each capability."""
    import torch
    from triton.runtime.jit import JITFunction

    compiled: list[tuple[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.append((self.__name__, kernel))
        return kernel

    JITFunction.run = compile_only  # type: ignore[method-assign]
    for capability in capabilities:
        _pretend(capability)
        for variant, launch in _launches(torch, capability):
            compiled.clear()
            launch()
            for name, kernel in compiled:
                registers, spilled = _resources(kernel.asm["cubin"])
                yield Compiled(name, variant, capability, registers, spilled, kernel.metadata.shared)


def variants() -> Iterator[tuple[str, str]]:
    """For each launch, with several numbers of rows: the kernel and variant, and Triton's key of the compiled
    specialization. Nothing is compiled."""
    import torch
    import triton

    found: list[tuple[str, str]] = []

    def note(*, key: str, fn: Any, **_: Any) -> bool:
        found.append((fn.name.split(".")[-1], key))
        return True

    triton.knobs.runtime.jit_cache_hook = note
    _pretend(90)
    for num_rows in (64, 33, 17, 16, 1):
        for variant, launch in _launches(torch, 90, num_rows):
            found.clear()
            launch()
            yield from ((f"{kernel}, {variant}", key) for kernel, key in found)


def _pretend(capability: int) -> None:
    """Lets Triton compile for a GPU that is not here."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Driver:
        def get_current_device(self) -> int:
            return capability  # kernels are cached by device

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

    driver.set_active(Driver())  # type: ignore[arg-type]


def _launches(torch: Any, capability: int, num_rows: int = 64) -> Iterator[tuple[str, Any]]:
    """Calls of the wrappers at the shapes of LLaDA-8B and LLaDA-MoE, in all variants that occur."""
    from remask.workers.attention.varlen import DeviceShadows
    from remask.workers.head import Statistics
    from remask.workers.kernels import elementwise, head, shadow_attention
    from remask.workers.kernels.experts import experts

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32

    def fused(dtype: Any, needs: frozenset[str]) -> None:
        head.fused_statistics(
            torch.empty(num_rows, 4096, dtype=dtype),
            torch.empty(126464, 4096, dtype=dtype),
            live_N=torch.empty(num_rows, dtype=torch.int32),
            count=torch.empty(1, dtype=torch.int32),
            given_N=torch.empty(num_rows, dtype=torch.int64),
            temperature_N=torch.empty(num_rows),
            keys_N=torch.empty(num_rows, dtype=torch.int64),
            mask_id=126336,
            needs=needs,
            out=Statistics.blank(num_rows, torch.device("cpu")),
        )

    def shadows(dtype: Any, num_kv_heads: int) -> None:
        main = torch.empty(512, num_kv_heads, 128, dtype=dtype)
        shadow_attention.shadow_attention(
            torch.empty(num_rows, 32, 128, dtype=dtype),
            main,
            main,
            main[:num_rows],
            main[:num_rows],
            DeviceShadows(
                tiles=torch.empty(2, 6, dtype=torch.int32),
                holes=torch.empty(num_rows, dtype=torch.int32),
                is_key=torch.empty(num_rows, dtype=torch.bool),
                sees=torch.empty(num_rows, dtype=torch.int8),
                spans=(),
            ),
        )

    def routed(dtype: Any) -> None:
        experts(
            torch.empty(num_rows, 2048, dtype=dtype),
            torch.empty(num_rows, 8, dtype=dtype),
            torch.zeros(num_rows, 8, dtype=torch.int64),
            torch.empty(64, 2048, 2048, dtype=dtype),
            torch.empty(64, 2048, 1024, dtype=dtype),
        )

    both = ("margin", "entropy")
    for needs in ((), ("margin",), ("entropy",), both):
        name = f"bf16, {'+'.join(needs) or 'no more'}"
        yield name, lambda needs=needs: fused(bf16, frozenset(needs))
    for name, dtype in (("fp16", fp16), ("fp32", fp32)):
        yield name, lambda dtype=dtype: fused(dtype, frozenset(both))
    for name, dtype in (("bf16", bf16), ("fp16", fp16), ("fp32", fp32)):
        rows = torch.empty(num_rows, 4096, dtype=dtype)
        tables = torch.empty(2, num_rows, 1, 128).unbind()
        yield name, lambda x=rows: elementwise.rms_norm(x, x[0], 1e-5)
        yield name, lambda x=rows, t=tables: elementwise.rotate_halves(x.view(-1, 32, 128), *t)
        yield name, lambda d=dtype: elementwise.silu_mul(torch.empty(num_rows, 24576, dtype=d))
        yield name, lambda d=dtype: shadows(d, 32)
        yield f"{name}, experts", lambda d=dtype: routed(d)
        yield f"{name}, grouped heads", lambda d=dtype: shadows(d, 4)
    if capability >= 89:
        for size in (4096, 12288):
            yield (
                f"bf16, {size} columns",
                lambda size=size: elementwise.quantize_rows(torch.empty(num_rows, size, dtype=bf16)),
            )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and the bytes of its stack, where spilled registers go."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    return int(found[0]), int(found[1])


def printed(what: Sequence[str], cache: Path, path: Path | None = None) -> list[Any]:
    """The output of the script with some arguments, in a process without the interpreter; `path` leads to
    another Triton."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(path)] * (path is not None) + [environment.get("PYTHONPATH", "")]
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, __file__, *what]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def compiled_with(path: Path | None, cache: Path, capabilities: Sequence[int]) -> list[Compiled]:
    return [Compiled(*row) for row in printed(["--json", *map(str, capabilities)], cache, path)]


def check(kernels: list[Compiled]) -> None:
    assert {kernel.kernel for kernel in kernels} == KERNELS
    for kernel in kernels:
        assert kernel.registers <= REGISTERS, kernel
        spills = SPILLS_IN_FP32 if "fp32" in kernel.variant else SPILLS
        assert kernel.spilled <= spills.get((kernel.kernel, kernel.capability), 0), kernel
        assert kernel.shared <= SHARED[kernel.capability], kernel


def test_no_number_of_rows_makes_another_variant_of_a_kernel(tmp_path: Path) -> None:
    keys: dict[str, list[str]] = {}
    for variant, key in printed(["--variants"], tmp_path):
        keys.setdefault(variant, []).append(key)
    assert {variant.split(",")[0] for variant in keys} == KERNELS
    for variant, found in keys.items():
        assert len(found) == 5 * len(set(found)), variant


by_generation = pytest.mark.parametrize(
    "capabilities", [(90,), pytest.param((80, 89), marks=pytest.mark.long)], ids=["hopper", "older"]
)


@pytest.mark.slow
@pytest.mark.timeout(600)
@by_generation
def test_every_kernel_compiles_with_few_spills(tmp_path: Path, capabilities: tuple[int, ...]) -> None:
    check(compiled_with(None, tmp_path, capabilities))


@pytest.mark.slow
@pytest.mark.timeout(900)
@by_generation
def test_every_kernel_compiles_with_the_triton_of_gpu_machines(
    tmp_path: Path, capabilities: tuple[int, ...]
) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    other = tmp_path / "triton"
    done = subprocess.run([*command, other, f"triton=={TRITON_ON_GPUS}"], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"triton {TRITON_ON_GPUS} cannot be installed here: {done.stderr[-200:]}")
    check(compiled_with(other, tmp_path / "cache", capabilities))


if __name__ == "__main__":
    asked = [int(argument) for argument in sys.argv[1:] if argument.isdigit()] or CAPABILITIES
    found = list(variants() if "--variants" in sys.argv else compile_all(asked))
    if len(sys.argv) > 1:
        sys.stdout.write(json.dumps(found))
    else:
        import triton

        sys.stdout.write(f"Triton {triton.__version__}\n")
        for row in found:
            sys.stdout.write(
                f"sm_{row.capability} {row.kernel:15} {row.variant:36} {row.registers:3} registers, "
                f"{row.spilled:4} bytes spilled, {row.shared:6} bytes shared\n"
            )
