"""What a prefix store saves: the time to the first token of a prompt whose beginning is known, and of each turn of a chat.

    python benchmarks/prefix.py --models 4b --json prefix.json
    python benchmarks/prefix.py --models tiny --prefix 128 --turn 70 --dtype float32 --device cpu --sides eager,gdnfuse,prefixes

Weights are random, of the published shapes. Each side runs in a process of its own (see gdnfuse/bench/workers.py): eager, eager
with flash-linear-attention, gdnfuse without a store, and `prefixes`, gdnfuse with one. Times are from the call of
`generate(max_new_tokens=1)` to its return, waited for, medians over REPEATS prompts, of sides that are not compiled over
EAGER_REPEATS. For the first token the prompt is --prefix tokens and TAIL that are new each time; for the chat it is the whole
talk, --turn tokens longer at each turn. A prompt of each kind goes before and is not timed. The store's bytes stand beside what
the model's shapes say.

No speed is reported for a side whose logits of the first tokens are off float32's by more than SLACK times eager's (see
gdnfuse/bench/measure.py). They are compared behind prefixes of up to CHECKED tokens, and of the turn behind that: enough for a
prompt's graph to pass two states that are kept, and for both to begin behind a known prefix, and the graphs are those of any
length. In float32 the whole prompt would take longer than all that is timed.

What a side has found is printed on stderr as soon as it is there, and stands in the file by then.
"""

from __future__ import annotations

import argparse
import functools
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import together
import torch
import transformers
from decode import SHARED, build
from tabulate import tabulate

import gdnfuse
from gdnfuse.bench.measure import compare_logits, difference, machine, seconds, widen
from gdnfuse.bench.workers import answer, fla_version, leave, note, run_sides, show_fla
from gdnfuse.files import replacing

SIDES = ("eager", "fla", "gdnfuse", "prefixes")
COMPILED = ("gdnfuse", "prefixes")
TAIL, REPEATS, EAGER_REPEATS = 64, 7, 2
WARM = 8  # prompts behind the prefix before those that are timed
UNKNOWN = 3  # prompts that are timed of which nothing is known
CHECKED = 2048  # tokens of the prefix that logits are compared behind, at most
KINDS = {"dynamic": {}, "static": {"cache_implementation": "static"}}


class Talk:
    """Prompts of one model, and their first tokens."""

    def __init__(self, name: str, args: argparse.Namespace):
        self.args = args
        self.model = build(name, getattr(torch, args.dtype), args.device)
        self.generator = torch.Generator(args.device)
        self.known = self.tokens(args.prefix, 1)
        self.kinds = kinds_of(args)

    def tokens(self, n: int, seed: int) -> torch.Tensor:
        self.generator.manual_seed(seed)
        shape = (self.args.batch, n)
        return torch.randint(0, self.model.config.vocab_size, shape, device=self.args.device, generator=self.generator)

    def behind(self, seed: int) -> torch.Tensor:
        """The known prefix and a tail."""
        return torch.cat([self.known, self.tokens(TAIL, seed)], 1)

    def turns(self, seed: int) -> list[torch.Tensor]:
        """The prompt of each turn of a talk."""
        talk = self.tokens(self.args.turn * self.args.turns, seed)
        return [talk[:, : self.args.turn * (i + 1)] for i in range(self.args.turns)]

    def first(self, prompt: torch.Tensor, kind: str = "dynamic") -> torch.Tensor:
        """The logits of the first token."""
        asked = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True, **KINDS[kind]}
        return self.model.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **asked).logits[0]

    def ms(self, prompt: torch.Tensor, kind: str = "dynamic") -> float:
        return 1e3 * seconds(lambda: self.first(prompt, kind), self.args.device)

    def checked(self, kind: str = "dynamic") -> torch.Tensor:
        """Logits that are compared: of a prompt behind a prefix, and of the turn behind that."""
        prompt = torch.cat([self.known[:, :CHECKED], self.tokens(TAIL, 2)], 1)
        prompts = prompt, torch.cat([prompt, self.tokens(TAIL, 3)], 1)
        return torch.stack([self.first(p, kind).float().cpu() for p in prompts])


def kinds_of(args: argparse.Namespace) -> list[str]:
    return list(KINDS) if args.kind == "both" else [args.kind]


def worker(side: str, name: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The row of a side. For "reference" the machine, and in `folder` the logits that sides are compared with."""
    show_fla(side)
    transformers.utils.logging.set_verbosity_error()
    talk = Talk(name, args)
    if side == "reference":
        eager = talk.checked()
        widen(talk.model)
        exact = talk.checked()
        torch.save({"exact": exact, "eager_error": difference(eager, exact)}, folder / SHARED)
        return {"machine": machine(args.device)}
    row: dict[str, Any] = {"side": side}
    if side == "fla":
        row["fla"] = fla_version()
    repeats = REPEATS if side in COMPILED else EAGER_REPEATS
    store = gdnfuse.PrefixStore(talk.model, max_bytes=1 << 40, tails=args.tails) if side == "prefixes" else None
    if store is not None:
        store.ahead = args.ahead
    if side in COMPILED:
        gdnfuse.compile(talk.model, inner=args.inner, prefixes=store)
    saved, found = torch.load(folder / SHARED), []
    for kind in talk.kinds:
        if side in COMPILED:
            note(str(folder), f"{kind}, first calls")
            start = time.perf_counter()
            talk.checked(kind)  # of the prompts that are compared nothing is unknown to a store the second time
            if together.quiet():
                row.setdefault("first_calls_seconds", {})[kind] = time.perf_counter() - start
        found.append(compare_logits(talk.checked(kind), saved["exact"], saved["eager_error"]))
    row |= max(found, key=lambda one: (not one["accurate"], one["error"])) | {"eager_error": saved["eager_error"]}
    leave(folder, row)
    together.turn()
    row["first_token"] = {}
    for kind in talk.kinds if row["accurate"] else ():
        note(str(folder), f"{kind}, first tokens")
        first_token(talk, kind, store, repeats, row["first_token"].setdefault(kind, {}), lambda: leave(folder, row))
    if row["accurate"]:
        note(str(folder), "chat")
        row["chat_ms"] = chat(talk, store, repeats)
    row["graphs"] = [report.summary() for report in gdnfuse.reports()]
    if store is not None:
        row["store"] = bytes_kept(talk, store)
    if args.device == "cuda":
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def first_token(
    talk: Talk, kind: str, store: gdnfuse.PrefixStore | None, repeats: int, figures: dict[str, float], say: Callable[[], None]
) -> None:
    """Milliseconds of prompts whose prefix is known to a side that has a store, and of those of which nothing is.

    Each is put into `figures`, and `say` is called behind it.
    """
    # The first leaves the prefix, and the others take it, until all is compiled and memory comes back at the same place.
    for seed in range(10, 11 + WARM * (store is not None)):
        talk.first(talk.behind(seed), kind)
    before = store.stats() if store else None
    known = [talk.ms(talk.behind(20 + i), kind) for i in range(repeats)]
    figures |= {"ms": statistics.median(known), "ms_min": min(known), "ms_max": max(known)}
    if store is not None:
        figures["tokens_taken"] = (store.stats().tokens_taken - before.tokens_taken) / repeats / talk.args.batch
        say()
        figures["key_ms"] = statistics.median(1e3 * seconds(store.key, talk.args.device) for _ in range(repeats))
        figures["open_ms"] = statistics.median(
            1e3 * seconds(lambda: store.open(talk.behind(60)), talk.args.device) for _ in range(repeats)
        )
        figures["unknown_ms"] = unknown(talk, kind, store)
        say()
        # The same where the prompt's graph leaves no states, so that calls end wherever one is wanted.
        store.in_pieces, as_it_was = True, store.in_pieces
        figures["unknown_in_pieces_ms"] = unknown(talk, kind, store)
        store.in_pieces = as_it_was
    say()


def unknown(talk: Talk, kind: str, store: gdnfuse.PrefixStore) -> float:
    """Milliseconds of prompts of which the store knows nothing and keeps everything; the first is not timed."""
    times = []
    for i in range(UNKNOWN + 1):
        store.clear()
        times.append(talk.ms(talk.behind(40 + i), kind))
    return statistics.median(times[1:])


def chat(talk: Talk, store: gdnfuse.PrefixStore | None, repeats: int) -> list[float]:
    """Milliseconds of each turn, the median over talks."""
    kind, talks = talk.kinds[0], []
    for i in range(repeats + 1):  # the first is not timed
        if store is not None:
            store.clear()
        talks.append([talk.ms(prompt, kind) for prompt in talk.turns(100 + i)])
    return [statistics.median(turn) for turn in zip(*talks[1:], strict=True)]


def bytes_kept(talk: Talk, store: gdnfuse.PrefixStore) -> dict[str, Any]:
    """What a store holds of one prompt behind the prefix, beside what the model's shapes say."""
    config, size = talk.model.config, torch.finfo(talk.model.dtype).bits // 8
    kinds = config.layer_types
    heads, K, V = config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim
    channels = 2 * config.linear_num_key_heads * K + heads * V
    state = kinds.count("linear_attention") * (4 * heads * K * V + size * channels * config.linear_conv_kernel_dim)
    token = kinds.count("full_attention") * 2 * config.num_key_value_heads * config.head_dim * size
    store.clear()
    talk.first(talk.behind(80), talk.kinds[0])
    stats, rest = store.stats(), (talk.args.prefix + TAIL) % 64
    reckoned = stats.states * state + (stats.blocks * 64 + talk.args.batch * rest) * token
    sizes = {"state_bytes": store.state_bytes, "block_bytes": store.block_bytes, "every": store.every}
    wanted = {"state_bytes_of_shapes": state, "block_bytes_of_shapes": 64 * token, "bytes_of_shapes": reckoned}
    return {"states": stats.states, "blocks": stats.blocks, "bytes": stats.device_bytes, **sizes, **wanted}


def lines(row: dict[str, Any]) -> list[str]:
    """A line on each figure of a side that is there."""
    side, first = row["side"], row.get("first_token", {})
    parts = [f"{kind}, first calls {s:.1f} s" for kind, s in row.get("first_calls_seconds", {}).items()]
    parts += [f"error {row['error']:.1e}, eager's {row['eager_error']:.1e}"] if "error" in row else []
    parts += [f"{kind}, {name.replace('_', ' ')} {x:.2f}" for kind, found in first.items() for name, x in found.items()]
    parts += [f"turns (ms) {', '.join(f'{ms:.2f}' for ms in row['chat_ms'])}"] if "chat_ms" in row else []
    return [f"{side}: {part}" for part in [*parts, *([row["failed"]] if "failed" in row else [])]]


def table(name: str, rows: Sequence[dict[str, Any]], args: argparse.Namespace) -> str:
    lines = []
    for row in rows:
        first, chat = row.get("first_token", {}), row.get("chat_ms", [])
        why = row.get("failed", "logits are wrong")
        lines.append(
            {
                "side": row["side"],
                **{f"first token, {k} (ms)": f"{first[k]['ms']:.2f}" if k in first else why for k in kinds_of(args)},
                **{f"turn {i + 1} (ms)": f"{chat[i]:.2f}" if chat else "" for i in range(args.turns)},
                "error / eager's": f"{row['error']:.1e} / {row['eager_error']:.1e}" if "error" in row else "",
            }
        )
    title = f"{name}: {args.prefix} + {TAIL} tokens, and a chat of {args.turn} tokens a turn"
    return f"{title}\n{tabulate(lines, 'keys', disable_numparse=True)}"


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="4b", help="presets, config files or `tiny`, by comma")
    parser.add_argument("--sides", default=",".join(SIDES), help=f"of {', '.join(SIDES)}")
    parser.add_argument("--prefix", type=int, default=8192, help="tokens that are known, a multiple of 64")
    parser.add_argument("--turn", type=int, default=2000, help="tokens of each turn of the chat")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--kind", default="both", choices=(*KINDS, "both"), help="of cache; the chat has the first of both")
    parser.add_argument("--tails", action="store_true", help="on a static cache what follows the prefix is one CUDA graph")
    parser.add_argument("--ahead", action="store_true", help="with --tails: it is launched before transformers prepares the call")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--timeout", type=float, help="seconds that a side may take; what it has found by then stays")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--inner", default="inductor", choices=("inductor", "aot_eager", "eager"))
    parser.add_argument("--json", metavar="FILE", help="write the figures, the machine and the versions here")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.ahead and not args.tails:
        parser.error("--ahead needs --tails, found it without")
    sides = args.sides.split(",")
    if unknown := set(sides) - set(SIDES):
        parser.error(f"unknown sides {', '.join(sorted(unknown))}; the valid ones are {', '.join(SIDES)}")
    if args.prefix <= 0 or args.prefix % 64:
        parser.error(f"--prefix must be a multiple of 64 tokens, found {args.prefix}")
    if args.worker:
        side, name, folder = args.worker
        answer(lambda: worker(side, name, args, Path(folder)))
        return 0
    data: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/prefix.py", *argv]),
        "arguments": {name: value for name, value in vars(args).items() if name != "worker"},
        "machine": {},
        "results": [],
    }
    begin = time.perf_counter()

    def show(first: dict[str, Any], rows: list[dict[str, Any]], shown: set[str]) -> None:
        """Put what there is of the last model into the data and the file, and say what of it is new."""
        data["machine"] |= first["machine"]
        data["results"][-1]["sides"] = rows
        for line in (line for row in rows for line in lines(row) if line not in shown):
            shown.add(line)
            print(f"{data['results'][-1]['model']}, {line} ({time.perf_counter() - begin:.0f} s)", file=sys.stderr, flush=True)
        if args.json:
            with replacing(Path(args.json)) as file:
                file.write_text(json.dumps(data, indent=1))

    for name in args.models.split(","):
        data["results"].append({"model": name, "sides": []})
        found = functools.partial(show, shown=set())
        first, rows = run_sides([__file__], name, sides, argv, timeout=args.timeout, found=found)
        found(first, rows)
        print(table(name, rows, args), end="\n\n", flush=True)
    return 0 if all("chat_ms" in row for result in data["results"] for row in result["sides"]) else 1


if __name__ == "__main__":
    sys.exit(main())
