"""Runs the PTX of a kernel on the CPU, for kernels that Triton's interpreter does not know: those written in Gluon.

All threads of a program go through the instructions together, and what is asynchronous is done at once, so a missing barrier or
wait is not found. A branch must be taken by all or
by none. Every address must be inside a tensor. Of arithmetic, what the kernels under test use: approximate instructions are
computed exactly, and sums of products on tensor cores in float64. Subnormal numbers are kept everywhere, as on the devices.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from gdnfuse.kernels.launch.implementation import CompileSpec, _Recorder, _standing_in

TARGET = GPUTarget("cuda", 90, 32)
FIRST, APART = 1 << 20, 1 << 8  # address of the first tensor, and bytes between tensors that are in none
INTEGERS = {"s16": np.int16, "u16": np.uint16, "b16": np.uint16, "s32": np.int32, "u32": np.uint32, "b32": np.uint32}
INTEGERS |= {"s64": np.int64, "u64": np.uint64, "b64": np.uint64, "b8": np.uint8, "u8": np.uint8, "s8": np.int8}
COMPARED = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
PLAIN = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.minimum, "max": np.maximum}
IGNORED = ("griddepcontrol", "bar", "fence")


class Memory:
    """Tensors at addresses of their own."""

    def __init__(self) -> None:
        self.bytes, self.places, self.tensors = np.zeros(FIRST, np.uint8), {}, []

    def address(self, tensor: torch.Tensor) -> int:
        """Of a tensor's first element. Tensors of one storage keep their distance."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.places:
            raw = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            start = len(self.bytes) + APART
            self.places[storage.data_ptr()] = start, raw
            self.bytes = np.concatenate([self.bytes, np.zeros(APART, np.uint8), raw, np.zeros(-len(raw) % 256, np.uint8)])
        return self.places[storage.data_ptr()][0] + tensor.storage_offset() * tensor.itemsize

    def inside(self, addresses: np.ndarray, width: int) -> bool:
        spans = [(start, start + len(raw)) for start, raw in self.places.values()]
        within = np.zeros(addresses.shape, bool)
        for first, end in spans:
            within |= (addresses >= first) & (addresses + width <= end)
        return bool(within.all())

    def write_back(self) -> None:
        for start, raw in self.places.values():
            raw[:] = self.bytes[start : start + len(raw)]


class Program:
    """One program: its threads' registers, and shared memory."""

    def __init__(self, threads: int, ids: Sequence[int], parameters: Sequence[tuple[int, str]], memory: Memory, shared: int):
        self.threads, self.memory, self.shared = threads, memory, np.zeros(shared, np.uint8)
        self.parameters, self.registers = parameters, {}
        thread = np.arange(threads, dtype=np.uint64)
        self.special = {"%tid.x": thread, "%laneid": thread % 32, "global_smem": thread * 0}
        self.special |= {f"%ctaid.{axis}": thread * 0 + np.uint64(i) for axis, i in zip("xyz", (*ids, 0, 0), strict=False)}

    def bits(self, operand: str) -> np.ndarray:
        """An operand as unsigned integers of 64 bits."""
        if operand in self.special:
            return self.special[operand]
        if operand.startswith("0f"):
            return np.full(self.threads, int(operand[2:], 16), np.uint64)
        if re.match(r"-?(0x)?\d", operand):
            return np.full(self.threads, int(operand.removesuffix("U"), 0) & (2**64 - 1), np.uint64)
        return self.registers[operand]

    def read(self, operand: str, kind: str) -> np.ndarray:
        bits = self.bits(operand)
        if kind == "pred":
            return bits.astype(bool)
        if kind == "f32":
            return bits.astype(np.uint32).view(np.float32)
        if kind == "f16":
            return bits.astype(np.uint16).view(np.float16).astype(np.float32)
        if kind == "bf16":
            return (bits.astype(np.uint32) << 16).view(np.float32)
        return bits.astype(INTEGERS[kind])

    def write(self, operand: str, value: np.ndarray, kind: str, active: np.ndarray) -> None:
        if kind == "f32":
            value = np.asarray(value, np.float32).view(np.uint32)
        elif kind == "f16":
            value = np.asarray(value, np.float32).astype(np.float16).view(np.uint16)
        elif kind == "bf16":
            value = torch.from_numpy(np.array(value, np.float32)).bfloat16().view(torch.int16).numpy().view(np.uint16)
        elif kind != "pred":
            value = np.asarray(value).astype(INTEGERS[kind], copy=False)
            value = value.view(f"u{value.itemsize}")
        value = np.broadcast_to(value, self.threads).astype(np.uint64)
        self.registers[operand] = np.where(active, value, self.registers.get(operand, np.uint64(0)))

    def location(self, text: str) -> np.ndarray:
        """Of [register + offset]."""
        base, offset = re.fullmatch(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\d+)\s*)?\]", text).groups()
        return self.bits(base).astype(np.int64) + int(offset or 0)

    def loaded(self, space: np.ndarray, where: np.ndarray, width: int) -> np.ndarray:
        found = np.zeros(len(where), np.uint64)
        for i in range(width):
            found |= space[where + i].astype(np.uint64) << np.uint64(8 * i)
        return found

    def step(self, op: str, operands: list[str], active: np.ndarray) -> None:
        name, *rest = op.split(".")
        kind = rest[-1] if rest else ""
        to, given = operands[0] if operands else "", operands[1:]
        read, write = self.read, self.write
        if name in IGNORED or name in ("cp", "wgmma") and "group" in op or op.startswith("wgmma.fence"):
            return
        if name == "ld" and rest[0] == "param":
            number = int(re.search(r"_param_(\d+)", given[0])[1])
            write(to, np.full(self.threads, self.parameters[number], np.uint64), "u64", active)
        elif name in ("ld", "st"):
            width, registers = int(kind[1:]) // 8, grouped(to if name == "ld" else given[0])
            where = self.location(given[0] if name == "ld" else to)
            space = self.memory.bytes if "global" in rest else self.shared
            whole = width * len(registers)
            if "global" in rest:
                assert self.memory.inside(where[active], whole), f"{op} outside of tensors"
            assert not (where[active] % whole).any(), f"{op} at an address that is not a multiple of {whole}"
            where = np.where(active, where, 0)
            for i, register in enumerate(registers):
                if name == "ld":
                    write(register, self.loaded(space, where + i * width, width), "u64", active)
                else:
                    value = self.bits(register)
                    for k in range(width):
                        space[where[active] + i * width + k] = (value[active] >> np.uint64(8 * k)).astype(np.uint8)
        elif name == "mov":
            self.move(to, given[0], int(kind[1:]) if kind[1:].isdigit() else 32, active)
        elif name == "cvt":
            self.convert(rest, to, given, active)
        elif name == "mma":
            self.multiply(to, given, active)
        elif name == "wgmma":
            self.multiply_shared(rest, to, given, active)
        elif name == "cp":
            self.copy(self.location(to), self.location(given[0]), int(given[1], 0), given[2:], active)
        elif name in ("ldmatrix", "stmatrix"):
            self.matrices(name, op, *((to, given[0]) if name == "ldmatrix" else (given[0], to)), active)
        elif name == "shfl":
            lane = np.arange(self.threads)
            other = (
                lane ^ int(given[1], 0)
                if rest[1] == "bfly"
                else lane // 32 * 32 + (read(given[1], "u32") % 16 + lane % 32 // 16 * 16)
            )
            write(to.split("|")[0], self.bits(given[0])[other], "b32", active)
        elif name == "setp":
            write(to, COMPARED[rest[0]](read(given[0], kind), read(given[1], kind)), "pred", active)
        elif name == "selp":
            write(to, np.where(read(given[2], "pred"), self.bits(given[0]), self.bits(given[1])), "u64", active)
        elif name in LOGIC:
            write(to, LOGIC[name](read(given[0], kind), read(given[1], kind)), kind, active)
        elif name == "not":
            write(to, ~read(given[0], kind), kind, active)
        elif name in ("shl", "shr"):
            by, value = read(given[1], "u32"), read(given[0], kind)
            full = 8 * value.itemsize
            moved = (
                value << np.minimum(by, full - 1).astype(value.dtype)
                if name == "shl"
                else value >> np.minimum(by, full - 1).astype(value.dtype)
            )
            write(to, np.where((by >= full) & ((name == "shl") | (kind[0] != "s")), 0, moved), kind, active)
        elif name == "bfe":
            at, width = (int(n) for n in given[1:])
            moved = read(given[0], "u32") << np.uint32(32 - at - width)
            write(to, (moved.view(np.int32) if kind == "s32" else moved) >> (32 - width), kind, active)
        elif name == "prmt":
            both = read(given[1], "u32").astype(np.uint64) << np.uint64(32) | read(given[0], "u32").astype(np.uint64)
            selector, found = read(given[2], "u32").astype(np.uint64), np.zeros(self.threads, np.uint64)
            for i in range(4):
                chosen = selector >> np.uint64(4 * i) & np.uint64(15)
                byte = both >> (np.uint64(8) * (chosen & np.uint64(7))) & np.uint64(255)
                sign = np.where(byte >> np.uint64(7), np.uint64(255), np.uint64(0))
                found |= np.where(chosen & np.uint64(8), sign, byte) << np.uint64(8 * i)
            write(to, found, "u64", active)
        elif name == "lop3":
            a, b, c = (read(n, "b32") for n in given[:3])
            table, found = int(given[3], 0), np.zeros(self.threads, np.uint32)
            for i in range(8):
                if table >> i & 1:
                    found |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
            write(to, found, "b32", active)
        elif name in ("mul", "mad") and rest[0] == "wide":
            wide = read(given[0], kind).astype(np.int64) * read(given[1], kind).astype(np.int64)
            write(to, wide + (read(given[2], "s64") if name == "mad" else 0), "s64", active)
        elif name in ("mad", "fma"):
            a, b, c = (read(n, kind) for n in given)
            value = a.astype(np.float64) * b + c if kind == "f32" else a * b + c
            write(to, value, kind, active)
        elif name in PLAIN:
            write(to, PLAIN[name](*(read(n, kind) for n in given)), kind, active)
        elif name in ("div", "rem"):
            a, b = (read(n, kind) for n in given)
            if kind != "f32":
                quotient = np.trunc(a.astype(np.float64) / b).astype(a.dtype)
                write(to, quotient if name == "div" else a - quotient * b, kind, active)
            else:
                write(to, a / b, kind, active)
        else:
            functions = {
                "abs": np.abs,
                "neg": np.negative,
                "rsqrt": lambda x: 1 / np.sqrt(x),
                "ex2": np.exp2,
                "rcp": np.reciprocal,
            }
            write(to, functions[name](read(given[0], kind)), kind, active)

    def move(self, to: str, of: str, width: int, active: np.ndarray) -> None:
        if of.startswith("{"):
            parts = grouped(of)
            each = width // len(parts)
            value = sum(self.bits(p) % np.uint64(1 << each) << np.uint64(each * i) for i, p in enumerate(parts))
            self.write(to, value, "u64", active)
        elif to.startswith("{"):
            parts = grouped(to)
            each = width // len(parts)
            for i, part in enumerate(parts):
                self.write(part, self.bits(of) >> np.uint64(each * i) & np.uint64((1 << each) - 1), "u64", active)
        else:
            self.write(to, self.bits(of) & np.uint64((1 << width) - 1), "u64", active)

    def convert(self, rest: list[str], to: str, given: list[str], active: np.ndarray) -> None:
        into, of = rest[-2:]
        if of == "e4m3x2":
            data = self.read(given[0], "u16")
            halves = [
                torch.from_numpy((data >> 8 * i & 255).astype(np.uint8)).view(torch.float8_e4m3fn).float().numpy() for i in (1, 0)
            ]
        elif into.endswith("x2"):
            halves = [self.read(n, of) for n in given]
        else:
            self.write(to, self.read(given[0], of), into, active)
            return
        for name, half in zip(("#high", "#low"), halves, strict=True):
            self.write(name, half, into.removesuffix("x2"), active)
        self.write(to, self.registers["#high"] << np.uint64(16) | self.registers["#low"], "u64", active)

    def matrices(self, name: str, op: str, registers: str, where: str, active: np.ndarray) -> None:
        """8 × 8 matrices of 16 bits. Lane 8i + r has the address of row r of matrix i, lane 4r + t has two elements of row r."""
        assert active.all()
        start, lane = self.location(where), np.arange(self.threads)
        row, column = lane % 32 // 4, lane % 4 * 2
        for i, register in enumerate(grouped(registers)):
            at = [lane // 32 * 32 + 8 * i + row, lane // 32 * 32 + 8 * i + row]
            places = [start[at[k]] + 2 * (column + k) for k in range(2)]
            if "trans" in op:
                places = [start[lane // 32 * 32 + 8 * i + column + k] + 2 * row for k in range(2)]
            if name == "ldmatrix":
                low, high = (self.loaded(self.shared, place, 2) for place in places)
                self.write(register, low | high << np.uint64(16), "u64", active)
            else:
                for k, place in enumerate(places):
                    half = (self.bits(register) >> np.uint64(16 * k)).astype(np.uint16)
                    self.shared[place], self.shared[place + 1] = half.astype(np.uint8), (half >> 8).astype(np.uint8)

    def multiply(self, to: str, given: list[str], active: np.ndarray) -> None:
        """m16n8k16: thread 4·g + t has rows g and g + 8 of a, its columns 2t, 2t + 1 and the same plus 8, and column g of b."""
        assert active.all()
        a, b, c = (np.stack([self.bits(n) for n in grouped(text)]) for text in given)
        halves = lambda x: np.stack([x & np.uint64(0xFFFF), x >> np.uint64(16)], -1).astype(np.uint16).view(np.float16)  # noqa: E731
        warps = self.threads // 32
        a = halves(a).reshape(2, 2, warps, 8, 4, 2).transpose(2, 1, 3, 0, 4, 5).reshape(warps, 16, 16)  # k half, row half, …
        b = halves(b).reshape(2, warps, 8, 4, 2).transpose(1, 0, 3, 4, 2).reshape(warps, 16, 8)
        c = c.astype(np.uint32).view(np.float32).reshape(2, 2, warps, 8, 4).transpose(2, 0, 3, 4, 1).reshape(warps, 16, 8)
        d = (a.astype(np.float64) @ b.astype(np.float64) + c).astype(np.float32)
        d = d.reshape(warps, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, self.threads)
        for register, value in zip(grouped(to), d, strict=True):
            self.write(register, value, "f32", active)

    def multiply_shared(self, rest: list[str], to: str, given: list[str], active: np.ndarray) -> None:
        """m64nNk16 of four warps. Lane 4·g + t of a warp has rows g and g + 8 of its 16, and columns 2t, 2t + 1 of each 8."""
        assert active.all() and self.threads == 128 and given[3:] == ["1", "1", "0", "0"], given
        registers, (N, K) = grouped(to), (int(n) for n in re.fullmatch(r"m64n(\d+)k(\d+)", rest[3]).groups())
        a, b = (self.described(given[i], rows, K, rest[5 + i]) for i, rows in ((0, 64), (1, N)))
        d = np.stack([self.read(n, "f32") for n in registers]) * self.read(given[2], "pred")[0]
        # By eight columns, eight rows, place in a pair, warp, row and pair.
        d = d.reshape(N // 8, 2, 2, 4, 8, 4).transpose(3, 1, 4, 0, 5, 2).reshape(64, N)
        d = (a @ b.T + d).astype(np.float32).reshape(4, 2, 8, N // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4)
        for register, value in zip(registers, d.reshape(len(registers), self.threads), strict=True):
            self.write(register, value, "f32", active)

    def described(self, descriptor: str, rows: int, columns: int, kind: str) -> np.ndarray:
        """The matrix in shared memory of a descriptor: eight rows follow each other, the next eight are `apart`."""
        bits = int(self.bits(descriptor)[0])
        width = {1: 128, 2: 64, 3: 32}[bits >> 62]
        start, apart = (bits & 0x3FFF) << 4, (bits >> 32 & 0x3FFF) << 4
        row, column = np.arange(rows)[:, None], np.arange(columns)[None, :]
        where = start + row // 8 * apart + row % 8 * width + 2 * column
        where ^= (where >> 7 & width // 16 - 1) << 4
        half = self.loaded(self.shared, where.reshape(-1), 2).reshape(rows, columns).astype(np.uint32)
        halves = (half << 16).view(np.float32) if kind == "bf16" else half.astype(np.uint16).view(np.float16)
        return halves.astype(np.float64)

    def copy(self, to: np.ndarray, of: np.ndarray, width: int, taken: list[str], active: np.ndarray) -> None:
        """`width` bytes to shared memory, zeros after those that are taken."""
        size = self.read(taken[0], "u32") if taken else np.full(self.threads, width)
        assert set(size[active]) <= {0, width} and not ((to % width)[active].any() or (of % width)[active & (size > 0)].any())
        assert self.memory.inside(of[active & (size > 0)], width), "a copy from outside of tensors"
        for i in range(width):
            self.shared[to[active] + i] = np.where(size > 0, self.memory.bytes[np.where(size > 0, of, 0) + i], 0)[active]


def grouped(text: str) -> list[str]:
    """The registers of {a, b}, or of one."""
    return [n.strip() for n in text.strip("{} ").split(",")]


def parsed(ptx: str) -> tuple[list[tuple[str, str, list[str]]], dict[str, int]]:
    """Instructions with predicate, name and operands, and where labels are."""
    body = re.sub(r"//[^\n]*", "", ptx[ptx.index(".entry") :])
    body = body[body.index("{") + 1 : body.rindex("}")]
    instructions, labels = [], {}
    for line in re.split(r"[;\n]", body):
        line = line.strip()
        while line.startswith(("{", "}")) and not re.match(r"\{[^}]*\}\s*,", line):
            line = line[1:].strip()
        if label := re.match(r"(\$?[\w$]+):", line):
            labels[label[1]] = len(instructions)
        elif line and not line.startswith((".", "}")):
            predicate, op, operands = re.fullmatch(
                r"(@!?\S+)?\s*([a-z][\w.:]*)\s*(.*?)\s*\}?" if "{" not in line else r"(@!?\S+)?\s*([a-z][\w.:]*)\s*(.*)", line
            ).groups()
            instructions.append(
                (predicate or "", op, [m.strip() for m in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", operands)])
            )
    return instructions, labels


def run(program: Program, instructions: list[tuple[str, str, list[str]]], labels: dict[str, int]) -> None:
    everyone, at = np.ones(program.threads, bool), 0
    while at < len(instructions):
        predicate, op, operands = instructions[at]
        at += 1
        active = everyone
        if predicate:
            negated, name = predicate.startswith("@!"), predicate.lstrip("@!")
            active = program.read(name, "pred") ^ negated
        if op.split(".")[0] in ("bra", "ret"):
            assert active.all() or not active.any(), "threads take different branches"
            if active.any():
                if op == "ret":
                    return
                at = labels[operands[0]]
        elif active.any():
            program.step(op, operands, active)


class Emulated:
    """Stands in for a kernel: compiles it and runs its PTX on tensors of the CPU, one program after another."""

    launches_kernels = False

    def __init__(self, kernel: Any):
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            specs: list[CompileSpec] = []
            _Recorder(self.kernel, specs).record(*args, **kwargs)
            (spec,) = specs
            source = (GluonASTSource if self.kernel.is_gluon() else ASTSource)(
                spec.kernel, spec.signature, spec.constexprs, spec.attrs
            )
            compiled = triton.compile(source, target=TARGET, options=spec.options)
            names = [p.name for p in self.kernel.params]
            values = dict(zip(names, args, strict=False)) | kwargs
            memory, parameters = Memory(), []
            for name in names:
                if spec.signature[name] != "constexpr":
                    value = values[name]
                    if isinstance(value, torch.Tensor):
                        value = memory.address(value)
                    elif isinstance(value, float):
                        value = int(np.float32(value).view(np.uint32))
                    parameters.append(value & (2**64 - 1))
            parameters += [0, 0]  # memory for the program and for profiles, which kernels under test do not have
            instructions, labels = parsed(compiled.asm["ptx"])
            threads = 32 * compiled.metadata.num_warps
            with np.errstate(all="ignore"):
                for ids in np.ndindex(*grid):
                    run(Program(threads, ids, parameters, memory, compiled.metadata.shared + 16), instructions, labels)
            memory.write_back()

        return launch


def emulated() -> Any:
    """A context in which launches run on the CPU."""
    return _standing_in(Emulated)
