"""Checks this folder's programs on a TPU and times them; with --cpu, on the processor; with --kernels, those with jisu's own kernels.

    pip install "jax[tpu]" flatbuffers safetensors
    python run_tpu.py
"""  # fmt: skip

import hashlib
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def tensors(name: str) -> dict[str, Any]:
    """The arrays of a file, in the device's memory."""
    from safetensors import safe_open

    with safe_open(HERE / name, framework="flax") as file:
        return {key: file.get_tensor(key) for key in file.keys()}


def main() -> None:
    import jax
    import numpy as np

    on_cpu = "--cpu" in sys.argv or os.environ.get("JISU_PLATFORM") == "cpu"
    jax.config.update("jax_platforms", "cpu" if on_cpu else jax.config.jax_platforms)
    jax.config.update("jax_enable_x64", True)
    if not (HERE / "manifest.json").is_file():
        sys.exit(f"{HERE} holds no manifest.json: run this script in the folder that `jisu export` wrote")
    if jax.default_backend() != "tpu" and not on_cpu:
        sys.exit(f"JAX finds no TPU here, only {jax.default_backend()!r}; --cpu runs on the processor")
    manifest = json.loads((HERE / "manifest.json").read_text())
    for name, wanted in manifest["sha256"].items():
        if not (HERE / name).is_file():
            sys.exit(f"{name} is missing: copy the folder again")
        with open(HERE / name, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != wanted:
                sys.exit(f"{name} is damaged: copy the folder again")
    form = "with_kernels" if "--kernels" in sys.argv else "export"
    if any(form not in p for p in manifest["programs"]):
        sys.exit("this folder has no programs with kernels: export it with --kernels")
    weights = {key: array for name in manifest["weights"] for key, array in tensors(name).items()}
    samples = tensors("samples.safetensors")
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}; programs made for {manifest['chip']}")
    wrong, state = False, {}
    for p in manifest["programs"]:  # each on its sample; one may go on with the caches that the one before left
        if not p["sample"]["continues"]:
            state = {i["name"]: jax.numpy.zeros(i["shape"], i["dtype"]) for i in p["inputs"] if i["state"]}
        given = {i["name"]: samples[f"{p['name']}.{i['name']}"] for i in p["inputs"] if not i["state"]}
        held = [weights[name] for name in p["weights"]]
        program = jax.export.deserialize(bytearray((HERE / p[form]).read_bytes()))
        run = jax.jit(program.call, donate_argnums=tuple(p["donated"]))
        results = run(*given.values(), *state.values(), *held)
        state = {o["name"]: r for o, r in zip(p["outputs"], results, strict=True) if o["updates"] is not None}
        for o, result in zip(p["outputs"], results, strict=True):
            if o["updates"] is None:
                got, want = (np.asarray(a, np.float64) for a in (result, samples[f"{p['name']}.{o['name']}"]))
                error = float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-6))
                wrong |= not error <= o["tolerance"]
                print(f"{p['name']}: {o['name']} is off by {error:.2g} of its largest, {o['tolerance']} is allowed")
        times, tokens = [], []
        for _ in range(p["steps"]):  # greedy steps of a decoder, else the same call again
            begin = time.perf_counter()
            if state:
                ids = np.asarray(results[0])[:, -1].argmax(-1)[:, None]
                given |= {"input_ids": ids.astype(np.int64), "length": np.asarray(given["length"]) + 1}
                tokens.append(ids[:, 0].tolist())
            results = jax.block_until_ready(run(*given.values(), *state.values(), *held))
            state = {o["name"]: r for o, r in zip(p["outputs"], results, strict=True) if o["updates"] is not None}
            times.append(time.perf_counter() - begin)
        if times:
            seconds, read = statistics.median(times), sum(a.nbytes for a in (*held, *state.values()))
            speed = f", {manifest['batch'] / seconds:.1f} tokens/s" if state else ""
            print(f"{p['name']}: {seconds * 1e3:.3f} ms (median of {len(times)}){speed}; {read} bytes of weights and caches, "
                  f"{read / seconds / 1e9:.2f} GB/s if all are read")  # fmt: skip
        if tokens:
            wanted, tokens = manifest["tokens"], tokens[: len(manifest["tokens"])]
            print(f"tokens: {tokens}, {'as' if tokens == wanted else 'NOT as'} in the simulation")
    sys.exit("the results are wrong" if wrong else 0)


if __name__ == "__main__":
    main()
