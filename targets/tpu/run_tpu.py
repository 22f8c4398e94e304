"""Checks this folder's programs on a TPU and times them: `pip install "jax[tpu]" flatbuffers`, then `python run_tpu.py`.

--cpu: on JAX's processor backend; --kernels: the programs that have jisu's own kernels in them.
"""

import hashlib
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

HERE = Path(__file__).resolve().parent
WORDS = {"BOOL": "bool", "BF": "bfloat", "F": "float", "I": "int", "U": "uint"}


def main() -> None:
    manifest, form = verified("--cpu" in sys.argv), "with_kernels" if "--kernels" in sys.argv else "export"
    weights = {key: jax.device_put(array) for name in manifest["weights"] for key, array in tensors(name).items()}
    samples, state, ok = tensors("samples.safetensors"), [], []
    for p in manifest["programs"]:
        if form not in p:
            sys.exit("this folder has no programs with kernels: export it with --kernels")
        given = [samples[f"{p['name']}.{i['name']}"] for i in p["inputs"]]
        if not p["continues"]:  # where the program before ended
            state = [jax.numpy.zeros(s["shape"], s["dtype"]) for s in p["state"]]
        program = jax.export.deserialize(bytearray((HERE / p[form]).read_bytes()))
        step = jax.jit(program.call, donate_argnums=range(len(given), len(given) + len(state)))
        seconds, tokens = [], []
        for turn in range(1 + p["steps"]):  # the sample; then the sample again, or a decoder's greedy steps
            begin = time.perf_counter()
            found = jax.block_until_ready(step(*given, *state, *(weights[name] for name in p["weights"])))
            seconds.append(time.perf_counter() - begin)
            results, state = found[: len(p["outputs"])], found[len(p["outputs"]) :]
            ok += [close(p, o, r, samples) for o, r in zip(p["outputs"], results, strict=True)] if turn == 0 else []
            if p["writes"]:  # the first two inputs are tokens, and how many there were before
                given[:2] = np.asarray(results[0])[:, -1:].argmax(-1), given[1] + 1
                tokens.append(given[0][:, 0].tolist())
        ok.append(told(p, seconds[1:], tokens, manifest))
    sys.exit(0 if all(ok) else "the results are wrong")


def verified(on_cpu: bool) -> dict[str, Any]:
    """The manifest; ends the script where there is no TPU, and where a file isn't the one that was exported."""
    jax.config.update("jax_platforms", "cpu" if on_cpu else jax.config.jax_platforms)
    jax.config.update("jax_enable_x64", True)
    if jax.default_backend() != "tpu" and not on_cpu:
        sys.exit(f"JAX finds no TPU here, only {jax.default_backend()!r}; --cpu runs on the processor")
    manifest = json.loads((HERE / "manifest.json").read_text())
    for name, wanted in manifest["sha256"].items():
        if not (HERE / name).is_file() or hashlib.sha256((HERE / name).read_bytes()).hexdigest() != wanted:
            sys.exit(f"{name} is missing or damaged: copy the folder again")
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}; programs made for {manifest['chip']}")
    return manifest  # type: ignore[no-any-return]


def tensors(name: str) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file."""
    data, found = np.memmap(HERE / name, np.uint8, "r"), {}
    begin = 8 + int.from_bytes(data[:8].tobytes(), "little")
    for key, held in json.loads(data[8:begin].tobytes()).items():
        if key != "__metadata__":
            word = held["dtype"].rstrip("0123456789")
            dtype = jax.numpy.dtype(held["dtype"].replace(word, WORDS[word]))
            found[key] = data[begin:][slice(*held["data_offsets"])].view(dtype).reshape(held["shape"])
    return found


def close(program: Any, output: Any, result: Any, samples: dict[str, np.ndarray]) -> bool:
    """Whether a result is off the simulation's by no more than a part of its largest number."""
    name = f"{program['name']}.{output['name']}"
    got, want = np.asarray(result, np.float64), np.asarray(samples[name], np.float64)
    error = float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-6))
    print(f"{name} is off by {error:.2g} of its largest, {output['tolerance']} is allowed")
    return error <= output["tolerance"]  # type: ignore[no-any-return]


def told(program: Any, seconds: list[float], tokens: list[list[int]], manifest: dict[str, Any]) -> bool:
    """Says how long a program's steps took, and whether a decoder's tokens are the simulation's."""
    if seconds:
        middle, read = statistics.median(seconds), np.prod(program["inputs"][0]["shape"])  # a decoder's tokens
        speed = f"; {read / middle:.1f} tokens/s" if program["state"] else ""
        print(f"{program['name']}: {middle * 1e3:.3f} ms, median of {len(seconds)}{speed}")
    wanted = manifest.get("tokens", []) if tokens else []
    same = tokens[: len(wanted)] == wanted
    if wanted:
        print(f"tokens: {tokens[: len(wanted)]}, {'as' if same else 'NOT as'} in the simulation")
    return same


if __name__ == "__main__":
    main()
