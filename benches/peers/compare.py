#!/usr/bin/env python3
"""How fast is a bulk job in Spanwise, in llama.cpp and in vLLM, on this machine and side by side?

    cargo bench --bench bulk_job -- rows > rows.jsonl
    python benches/peers/fetch.py --into FOLDER
    python benches/peers/compare.py --peers FOLDER --rows rows.jsonl [--engines llama.cpp,vllm] [--pairs 9]

The job is that of benches/bulk_job: chat prompts, greedy, 128 new tokens each, the end-of-sequence token ignored, weights in
bf16, two threads. Every engine renders them with the model's own template, and must report as many prompt tokens as Spanwise.

`--peers` is where `fetch.py` has put the others. They stay loaded and take the job in turn with Spanwise, whose
process is started anew each time: its seconds are those from the first request to the last result, as the others' are, and
those of the whole process stand beside them. CPU seconds are those of the engine's processes; a pair beside which others
had more than 5 % of the processors is not counted. llama.cpp has a slot for each row, 64 at most. `--log` gathers pairs of several sittings.
"""

import argparse
import concurrent.futures
import json
import math
import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

THREADS = 2
# llama.cpp was fastest with these of those that were tried for 256 rows: 32, 64, 128 slots. A smaller job has as many
# as it has rows, so that neither idle slots nor their contexts are in its way.
MOST_SLOTS = 64
SLOT_TOKENS = 640
# Rows of the job that is not counted, before the others: some compile at their first steps.
WARM_UP_ROWS = 8
MOST_FOREIGN = 0.05


class Spanwise:
    """A process for each job, as a user starts it."""

    def __init__(self, args):
        self.name = f"spanwise on {args.devices}" + (f", {args.replicas} replicas" if args.replicas > 1 else "")
        self.program = args.spanwise
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="compare-"))
        (self.folder / "job.toml").write_text(
            f'[model]\npath = "{args.model.resolve()}"\n'
            f'[pipeline]\ndevices = {json.dumps(args.devices.split(","))}\nmax_sequences = 256\n'
            f"replicas = {args.replicas}\n"
            '[job]\ninput = "input.jsonl"\noutput = "out"\n'
        )

    def run(self, rows):
        (self.folder / "input.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        begun = time.perf_counter()
        job = str(self.folder / "job.toml")
        command = [self.program, "run", job, "--fresh", "--progress", "none"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        whole = time.perf_counter() - begun
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        manifest = json.loads((self.folder / "out/manifest.json").read_text())
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        tokens = manifest["tokens"]
        return Job(tokens["prompt"], tokens["generated"], manifest["timings"]["run_seconds"], cpu, whole)

    def close(self):
        shutil.rmtree(self.folder)


class LlamaCpp:
    """llama-server, asked by as many connections as it has slots."""

    name = "llama.cpp"
    port = 18571

    def __init__(self, args, num_rows):
        self.slots = min(MOST_SLOTS, num_rows)
        command = [
            str(args.peers / "llama.cpp/bin/llama-server"), "--model", str(args.peers / "model.gguf"),
            "--host", "127.0.0.1", "--port", str(self.port), "--threads", str(THREADS), "--parallel", str(self.slots),
            "--ctx-size", str(self.slots * SLOT_TOKENS), "-no-kvu", "--cache-ram", "0",
        ]  # fmt: skip
        log = open(args.peers / "llama-server.log", "w")
        self.process = subprocess.Popen(command, stdout=log, stderr=log)
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5)
                return
            except OSError:
                if self.process.poll() is not None:
                    sys.exit(f"error: llama-server ended; see {log.name}")
                time.sleep(0.5)
        sys.exit("error: llama-server does not answer")

    def ask(self, row):
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/chat/completions",
            json.dumps(row["body"] | {"cache_prompt": False}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=3600) as answer:
            usage = json.load(answer)["usage"]
        return usage["prompt_tokens"], usage["completion_tokens"]

    def run(self, rows):
        cpu, begun = cpu_seconds(self.process.pid), time.perf_counter()
        # Longest first: the order that llama.cpp was fastest with.
        with concurrent.futures.ThreadPoolExecutor(self.slots) as pool:
            answers = list(pool.map(self.ask, sorted(rows, key=lambda row: -len(json.dumps(row["body"])))))
        seconds = time.perf_counter() - begun
        prompt, generated = map(sum, zip(*answers))
        return Job(prompt, generated, seconds, cpu_seconds(self.process.pid) - cpu, None)

    def close(self):
        self.process.terminate()
        self.process.wait()


class Vllm:
    """vLLM's own offline class in a process of its own, which takes a job for each line it reads."""

    name = "vllm"

    def __init__(self, args, _num_rows):
        script = pathlib.Path(__file__).parent / "vllm_worker.py"
        command = [str(args.peers / "vllm/bin/python"), str(script), str(args.model.resolve())]
        environment = dict(os.environ, VLLM_CPU_OMP_THREADS_BIND="0-1", VLLM_CPU_KVCACHE_SPACE="4", HF_HUB_OFFLINE="1")
        log = open(args.peers / "vllm.log", "w")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        )
        self.answer()

    def answer(self):
        for line in self.process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        sys.exit("error: vLLM's process ended; see vllm.log")

    def run(self, rows):
        cpu = cpu_seconds(self.process.pid)
        self.process.stdin.write(json.dumps([row["body"] for row in rows]) + "\n")
        self.process.stdin.flush()
        answer = self.answer()
        cpu = cpu_seconds(self.process.pid) - cpu
        return Job(answer["prompt"], answer["generated"], answer["seconds"], cpu, None)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class Job:
    """What a job took: tokens, seconds from its first request to its last result, CPU seconds, a whole process."""

    def __init__(self, prompt, generated, seconds, cpu, whole):
        self.prompt, self.generated, self.seconds, self.cpu, self.whole = prompt, generated, seconds, cpu, whole
        self.rate = generated / seconds


def cpu_seconds(pid):
    """CPU seconds of a process and of all that descend from it."""
    ticks, total, children = os.sysconf("SC_CLK_TCK"), {}, {}
    for entry in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
        except (OSError, IndexError):
            continue
        children.setdefault(int(fields[1]), []).append(int(entry.name))
        total[int(entry.name)] = (int(fields[11]) + int(fields[12])) / ticks
    family, seconds = [pid], 0.0
    while family:
        member = family.pop()
        seconds += total.get(member, 0.0)
        family += children.get(member, [])
    return seconds


def machine_busy_seconds():
    """CPU seconds that anybody has had, and that the host has taken away."""
    fields = list(map(int, open("/proc/stat").readline().split()[1:9]))
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def timed(engine, rows):
    """The job, and the share of the processors that others had beside it."""
    busy, begun, own = machine_busy_seconds(), time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    job = engine.run(rows)
    own_after = resource.getrusage(resource.RUSAGE_SELF)
    ours = job.cpu + own_after.ru_utime + own_after.ru_stime - own.ru_utime - own.ru_stime
    capacity = (time.perf_counter() - begun) * os.cpu_count()
    foreign = max(0.0, machine_busy_seconds() - busy - ours) / capacity
    wanted = sum(row["body"]["max_tokens"] for row in rows)
    if job.generated != wanted:
        sys.exit(f"error: {engine.name} generated {job.generated} tokens, expected {wanted}")
    whole = f", {job.whole:.1f} s with its start" if job.whole else ""
    print(
        f"  {engine.name:<18} {job.seconds:6.2f} s{whole}, {job.rate:7.0f} generated tokens/s, "
        f"{job.cpu:6.1f} CPU s, {100 * foreign:.1f} % foreign",
        flush=True,
    )
    return job, foreign


def compare(ours, peer, rows, pairs, log):
    """Pairs of jobs in turn; their ratios, those of earlier sittings in the log before them."""
    for engine in (ours, peer):
        timed(engine, rows[:WARM_UP_ROWS])
    lines = log.read_text().splitlines() if log and log.exists() else []
    earlier = [entry["ratio"] for entry in map(json.loads, lines) if [ours.name, peer.name] == entry["engines"]]
    ratios = []
    for pair in range(pairs):
        print(f" pair {pair + 1}", flush=True)
        (a, a_foreign), (b, b_foreign) = timed(ours, rows), timed(peer, rows)
        if a.prompt != b.prompt:
            sys.exit(f"error: {a.prompt} tokens of prompts in {ours.name}, {b.prompt} in {peer.name}")
        if max(a_foreign, b_foreign) > MOST_FOREIGN:
            print("  not counted: others were at work", flush=True)
            continue
        ratios.append(a.rate / b.rate)
        if log:
            entry = {"engines": [ours.name, peer.name], "rates": [a.rate, b.rate], "ratio": ratios[-1]}
            with open(log, "a") as file:
                file.write(json.dumps(entry) + "\n")
    return earlier + ratios


def interval(ratios):
    """Order statistics around the median: the narrowest that hold it with 95 %, or else all, and their chance."""
    ordered, n = sorted(ratios), len(ratios)

    def chance(out):
        return 1 - 2 * sum(math.comb(n, below) for below in range(out + 1)) / 2**n

    out = next((out for out in range((n - 1) // 2, -1, -1) if chance(out) >= 0.95), 0)
    return ordered[out], ordered[n - 1 - out], max(0.0, chance(out))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peers", type=pathlib.Path, required=True, help="the folder that fetch.py has filled")
    parser.add_argument("--rows", type=pathlib.Path, required=True, help="chat rows, as benches/bulk_job prints them")
    parser.add_argument("--model", type=pathlib.Path, default="models/smollm2-135m", help="SmolLM2-135M as safetensors")
    parser.add_argument("--spanwise", default="target/release/spanwise", help="the program")
    parser.add_argument("--devices", default="cpu:0", help="Spanwise's devices, joined by commas")
    parser.add_argument("--replicas", type=int, default=1, help="Spanwise's pipelines, each on its share of the devices")
    parser.add_argument("--engines", default="llama.cpp,vllm", help="the peers, joined by commas")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--log", type=pathlib.Path, help="where pairs are gathered")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.rows.read_text().splitlines()]
    kinds = {kind.name: kind for kind in (LlamaCpp, Vllm)}
    for name in args.engines.split(","):
        peer, ours = kinds[name](args, len(rows)), Spanwise(args)
        print(f"{ours.name} against {peer.name}, {len(rows)} rows", flush=True)
        try:
            ratios = compare(ours, peer, rows, args.pairs, args.log)
        finally:
            peer.close()
            ours.close()
        if ratios:
            low, high, chance = interval(ratios)
            print(
                f"{ours.name} / {peer.name}: median {statistics.median(ratios):.2f} of {len(ratios)} pairs, "
                f"{low:.2f} to {high:.2f} holds it with {100 * chance:.0f} %"
            )


if __name__ == "__main__":
    main()
