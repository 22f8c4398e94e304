"""Checks the programs of this folder on a TPU and times them; with --cpu, on this machine's processor.

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


def load(jax: Any, manifest: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The compiled programs, the weights (in the device's memory) and the samples."""
    from safetensors import safe_open
    from safetensors.numpy import load_file

    for name, wanted in manifest["sha256"].items():
        with open(HERE / name, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != wanted:
                sys.exit(f"{name} is damaged: copy the folder again")
    programs = {}
    for p in manifest["programs"]:
        call = jax.export.deserialize(bytearray((HERE / p["export"]).read_bytes())).call
        programs[p["name"]] = jax.jit(call, donate_argnums=tuple(p["donated"]))
    weights = {}
    for name in manifest["weights"]:
        with safe_open(HERE / name, framework="flax") as file:
            weights |= {key: jax.device_put(file.get_tensor(key)) for key in file.keys()}
    return programs, weights, load_file(HERE / "samples.safetensors")


def main() -> None:
    import jax
    import numpy as np

    on_cpu = "--cpu" in sys.argv or os.environ.get("JISU_PLATFORM") == "cpu"
    if on_cpu:
        jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)
    if not (HERE / "manifest.json").is_file():
        sys.exit(f"{HERE} holds no manifest.json: run this script where `jisu export` wrote it")
    if jax.default_backend() != "tpu" and not on_cpu:
        sys.exit(f"JAX finds no TPU here, only {jax.default_backend()!r}; --cpu runs on the processor")
    manifest = json.loads((HERE / "manifest.json").read_text())
    programs, weights, samples = load(jax, manifest)
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}; programs made for {manifest['chip']}")
    failed, state, length, given, results = False, {}, 0, {}, []
    for p in manifest["programs"]:  # each on its sample; what it leaves in the caches, the next one may read
        if not p["sample"]["continues"]:
            state = {i["name"]: jax.numpy.zeros(i["shape"], i["dtype"]) for i in p["inputs"] if i["state"]}
        given = {i["name"]: samples[f"{p['name']}.{i['name']}"] for i in p["inputs"] if not i["state"]}
        results = programs[p["name"]](*(given | state).values(), *(weights[w] for w in p["weights"]))
        state = {o["name"]: r for o, r in zip(p["outputs"], results) if o["updates"] is not None}
        for output, result in zip(p["outputs"], results):
            if output["updates"] is None:
                got, want = (np.asarray(a).astype(np.float64) for a in (result, samples[f"{p['name']}.{output['name']}"]))
                error = float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-6))
                failed |= not error <= output["tolerance"]
                print(f"{p['name']}: {output['name']} is off by {error:.2g} of its largest; {output['tolerance']} is allowed")
    if failed:
        sys.exit("the results are wrong")
    if "generate" not in manifest:
        return
    p = next(p for p in manifest["programs"] if p["name"] == manifest["generate"]["program"])
    step, held = programs[p["name"]], [weights[w] for w in p["weights"]]
    length, tokens, times = int(given["length"][0]) + 1, [], []
    for _ in range(manifest["generate"]["steps"]):
        ids = np.asarray(results[0])[:, -1].argmax(-1)[:, None].astype(np.int64)
        tokens.append(ids[:, 0].tolist())
        begin = time.perf_counter()
        given |= {"input_ids": ids, "length": np.array([length])}
        results = jax.block_until_ready(step(*(given | state).values(), *held))
        state = {o["name"]: r for o, r in zip(p["outputs"], results) if o["updates"] is not None}
        times.append(time.perf_counter() - begin)
        length += 1
    wanted, seconds = manifest["generate"]["tokens"], statistics.median(times)
    read = sum(a.nbytes for a in (*held, *state.values()))
    print(f"tokens: {tokens[: len(wanted)]} ({'as' if tokens[: len(wanted)] == wanted else 'NOT as'} in the simulation)")
    print(f"{p['name']}: {seconds * 1e3:.3f} ms (median of {len(times)}), {manifest['batch'] / seconds:.1f} tokens/s; "
          f"{read} bytes of weights and caches, {read / seconds / 1e9:.2f} GB/s if all are read")  # fmt: skip


if __name__ == "__main__":
    main()
