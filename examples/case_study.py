"""A network of 10 million parameters, pruned and quantized to the equivalent of fewer than 5 million, as accurate as before.

    pip install "jisu[examples]"                # matplotlib, whose fonts are the data
    python examples/case_study.py               # about eleven minutes of one core; --quick for a look

Ten layers, 1000 inputs (25 x 40 pixels), 100 outputs (characters). The data are characters in the 16 text fonts that matplotlib
ships, each turned, moved, scaled and noised at random; test images are other draws than those that were trained on.
It prints, for the dense network and for each recipe: parameters that aren't zero, bytes, accuracy with its standard
error, and how long one image takes. A run is repeatable: everything random has a seed.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jisu

WIDTH, HEIGHT = 25, 40
CHARACTERS = (
    "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    "αβγδεζηθλμξπρστφχψωΓΔΘΛΞΠΣΦΨΩ+=@#&%$?!"
)  # fmt: skip
FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
)
FINE = 3  # glyphs are drawn so many times larger than the images that are made of them
RECIPES: dict[str, Any] = {
    "dense": None,
    "pruned 50 %": {"prune": [{"sparsity": 0.5}]},
    "int8": {"quantize": [{"scheme": "int8", "activations": "int8"}]},
    "int4": {"quantize": [{"scheme": "int4", "group": 40}]},
    "pruned 50 %, int8": {
        "prune": [{"sparsity": 0.5}],
        "quantize": [{"scheme": "int8", "activations": "int8"}],
    },
    "pruned 50 %, int4": {"prune": [{"sparsity": 0.5}], "quantize": [{"scheme": "int4", "group": 40}]},
}


# --- Data ----------------------------------------------------------------------------------------------------------


def glyphs() -> Tensor:
    """Every character in every font, float32 [characters, fonts, HEIGHT, WIDTH], ink is 1."""
    import matplotlib
    from matplotlib.ft2font import FT2Font

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    height, width = FINE * HEIGHT, FINE * WIDTH
    drawn = torch.zeros(len(CHARACTERS), len(FONTS), height, width)
    for j, name in enumerate(FONTS):
        font = FT2Font(str(folder / f"{name}.ttf"))
        font.set_size(FINE * 20, 72)
        for i, character in enumerate(CHARACTERS):
            font.set_text(character)
            font.draw_glyphs_to_bitmap()
            image = torch.from_numpy(np.array(font.get_image(), np.float32) / 255)
            # All stand on one line, as in a text, so that their heights tell them apart.
            top = max(0, round(0.7 * height) - (image.shape[0] - font.get_descent() // 64))
            left = max(0, (width - image.shape[1]) // 2)
            image = image[: height - top, : width - left]
            drawn[i, j, top : top + image.shape[0], left : left + image.shape[1]] = image
    return F.avg_pool2d(drawn, FINE)


def images(drawn: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """`count` images float32 [count, 1000] and their characters int64 [count]."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    labels = torch.randint(len(CHARACTERS), (count,), generator=generator)
    fonts = torch.randint(len(FONTS), (count,), generator=generator)
    angle, size = uniform(-0.12, 0.12), uniform(0.9, 1.1)
    cos, sin, ratio = angle.cos() / size, angle.sin() / size, HEIGHT / WIDTH
    moves = torch.stack([uniform(-2, 2) * 2 / WIDTH, uniform(-2, 2) * 2 / HEIGHT], 1)
    turn = torch.stack([torch.stack([cos, -sin * ratio], 1), torch.stack([sin / ratio, cos], 1)], 1)
    places = torch.cat([turn, moves[:, :, None]], 2)
    result = torch.empty(count, HEIGHT * WIDTH)
    for part in torch.arange(count).split(1000):
        grid = F.affine_grid(places[part], [len(part), 1, HEIGHT, WIDTH], align_corners=False)
        result[part] = F.grid_sample(drawn[labels[part], fonts[part], None], grid, align_corners=False).flatten(1)
    result += 0.1 * torch.randn(result.shape, generator=generator)
    return result, labels


# --- The network ---------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Ten linear layers; the eight in the middle add to what they read."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(HEIGHT * WIDTH, width)
        self.middle = nn.ModuleList(nn.Linear(width, width) for _ in range(8))
        self.last = nn.Linear(width, len(CHARACTERS))

    def forward(self, x: Tensor) -> Tensor:
        """Logits float32 [batch, 100] of images float32 [batch, 1000]."""
        x = F.relu(self.first(x))
        for layer in self.middle:
            x = x + 0.5 * F.relu(layer(x))
        return self.last(x)


def train(drawn: Tensor, width: int, steps: int, batch: int, seed: int) -> Network:
    """A network trained on `steps` batches of images, no two of which are the same."""
    torch.manual_seed(seed)
    network = Network(width)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.15)
    begin = time.perf_counter()
    for step in range(steps):
        x, labels = images(drawn, batch, seed=1_000_000 * (seed + 1) + step)
        loss = F.cross_entropy(network(x), labels, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1} of {steps}: loss {loss:.3f}, {time.perf_counter() - begin:.0f} s", flush=True)
    return network.eval()


def trained(drawn: Tensor, options: argparse.Namespace, width: int, steps: int, batch: int) -> Network:
    """The network, trained now or read from where an earlier run kept it."""
    path: Path | None = options.weights
    if path is not None and path.exists():
        network = Network(width)
        network.load_state_dict(torch.load(path, weights_only=True))
        return network.eval()
    network = train(drawn, width, steps, batch, options.seed)
    if path is not None:
        torch.save(network.state_dict(), path)
    return network


# --- Compressing and measuring ---------------------------------------------------------------------------------------


@attrs.frozen
class Row:
    """What a recipe gives: parameters that stay, bytes of all weights, accuracy and its standard error, time of one image."""

    name: str
    parameters: int
    bytes: int
    accuracy: float
    stderr: float
    latency_s: float


def measure(
    name: str, network: Network, recipe: Any, calibration: Any, test: tuple[Tensor, Tensor], threads: int
) -> Row:
    """Compile the network by a recipe, and run the program on all test images, and on one."""
    calibrated = recipe is not None and jisu.Recipe.resolve(recipe).calibrated
    program = jisu.compile(
        network, example_inputs=(test[0][:2],), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},),
        recipe=recipe, calibration=calibration if calibrated else None, num_threads=threads,
    )  # fmt: skip
    right = torch.cat([program(x).argmax(1) for x in test[0].split(1000)]) == test[1]
    accuracy = float(right.float().mean())
    seconds = [_timed(program, test[0][:1]) for _ in range(100)]
    kept = {row["name"]: row["kept"] for row in program.explain()["sparse"]}
    parameters = sum(p.numel() * kept.get(n.removesuffix(".weight"), 1) for n, p in network.named_parameters())
    error = math.sqrt(accuracy * (1 - accuracy) / len(right))
    return Row(name, round(parameters), program.weights_bytes, accuracy, error, statistics.median(seconds))


def _timed(program: jisu.Program, x: Tensor) -> float:
    begin = time.perf_counter()
    program(x)
    return time.perf_counter() - begin


def show(rows: list[Row]) -> None:
    """Print the table."""
    print(f"\n{'':20}{'parameters':>12}{'bytes':>12}{'accuracy':>19}{'of dense':>10}{'one image':>12}")
    for row in rows:
        accuracy = f"{row.accuracy:.4f} ± {row.stderr:.4f}"
        print(
            f"{row.name:20}{row.parameters:>12,}{row.bytes:>12,}{accuracy:>19}{row.accuracy / rows[0].accuracy:>10.4f}"
            f"{row.latency_s * 1e3:>9.3f} ms"
        )


def main() -> None:
    """Train, compress, measure, print; the exit code is 1 where no recipe is both small and accurate enough."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small network, hardly trained: a look at what happens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="threads of the compiled programs")
    parser.add_argument("--weights", type=Path, help="where the trained weights are kept, or read if they are there")
    options = parser.parse_args()
    width, steps, batch, tests, calls = (80, 300, 100, 1000, 1) if options.quick else (1040, 700, 150, 10_000, 8)
    drawn = glyphs()
    network = trained(drawn, options, width, steps, batch)
    test = images(drawn, tests, seed=options.seed)
    calibration = [(x,) for x in images(drawn, 250 * calls, seed=options.seed + 500_000)[0].split(250)]
    chosen = [name for name in RECIPES if not (options.quick and "int4" in name)]
    rows = [measure(name, network, RECIPES[name], calibration, test, options.threads) for name in chosen]
    show(rows)
    # The last layer, whose outputs are the answer, is left dense: of the whole network 4.96 of 9.81 million parameters stay.
    dense, limit = rows[0], (0.55 if options.quick else 0.51) * rows[0].parameters
    good = [row for row in rows if row.parameters <= limit and row.accuracy >= 0.97 * dense.accuracy]
    if not good:
        raise SystemExit("no recipe halves the parameters and keeps 0.97 of the accuracy")
    best = min(good, key=lambda r: r.bytes)
    print(
        f"\nsmallest of those that halve the parameters and keep 0.97 of the accuracy: {best.name}, "
        f"{best.bytes / dense.bytes:.1%} of the dense bytes"
    )


if __name__ == "__main__":
    main()
