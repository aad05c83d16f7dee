"""Draw docs/architecture.svg: the way of one token through a layer.

    python docs/draw_architecture.py

Every file that the picture names is one of the package; tests/test_readme.py checks it.
"""

from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 1000, 560
INK, FAINT, PAPER = "#1f2933", "#7b8794", "#ffffff"
PARTS = {"gate row": "#f2b880", "up row": "#8cc5e3", "down column": "#a8d5a2"}
FONT = "Helvetica, Arial, sans-serif"

drawn: list[str] = []


def text(x, y, words, size=14, color=INK, weight="normal", anchor="start"):
    drawn.append(
        f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}" '
        f'font-weight="{weight}" text-anchor="{anchor}">{escape(words)}</text>'
    )


def box(x, y, width, height, fill=PAPER, line=INK, dash="", radius=6):
    drawn.append(
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}" '
        f'fill="{fill}" stroke="{line}" stroke-dasharray="{dash}"/>'
    )


def arrow(*points):
    way = " ".join(f"{x},{y}" for x, y in points)
    drawn.append(
        f'<polyline points="{way}" fill="none" stroke="{INK}" stroke-width="2" '
        'marker-end="url(#head)"/>'
    )


def step(x, y, number):
    """A numbered dot; the legend below the picture says what happens there."""
    drawn.append(f'<circle cx="{x}" cy="{y}" r="11" fill="{INK}"/>')
    text(x, y + 5, str(number), 13, PAPER, "bold", "middle")


def place(x, width, title, below):
    """A column: a place where bytes can be."""
    box(x, 16, width, 400, "#f5f7fa", "#cbd2d9", radius=10)
    text(x + 16, 44, title, 18, weight="bold")
    text(x + 16, 64, below, 13, FAINT)


def draw_flash():
    place(16, 280, "Flash", "all of the model")
    box(32, 84, 248, 56)
    text(46, 108, "resident.safetensors", 13)
    text(46, 128, "predictors.safetensors", 13)
    text(32, 174, "ffn/layer_07.safetensors", 14, weight="bold")
    text(32, 192, "a bundle for each unit: one read brings it", 12, FAINT)
    for row, name in enumerate(("unit 0", "unit 1", "unit 2", "unit 3", "…")):
        y = 204 + 38 * row
        text(32, y + 19, name, 12, FAINT)
        for column, (part, color) in enumerate(PARTS.items()):
            x = 76 + 68 * column
            box(x, y, 68, 28, color, radius=0)
            if row == 0:
                text(x + 34, y + 18, part, 10, anchor="middle")


def draw_memory():
    place(376, 270, "Memory", "as much as --memory allows")
    box(392, 84, 238, 56)
    text(406, 108, "resident weights", 13)
    text(406, 128, "attention, norms, router, predictors", 12, FAINT)
    text(392, 174, "slots of layer 7", 14, weight="bold")
    text(392, 192, "an MLX array for each part", 12, FAINT)
    for row, state in enumerate(("VALID", "VALID", "READING", "EMPTY", "VALID")):
        y = 204 + 38 * row
        for column, color in enumerate(PARTS.values()):
            fill = {"VALID": color, "READING": "#e4e7eb", "EMPTY": PAPER}[state]
            dash = "" if state == "VALID" else "4 3"
            box(392 + 56 * column, y, 48, 28, fill, INK, dash, 0)
        text(566, y + 19, state, 12, FAINT)


def draw_mlx():
    place(726, 258, "MLX", "a layer of mlx-lm's own model")
    for y, words in ((92, "attention"), (360, "next layer")):
        box(762, y, 186, 40)
        text(855, y + 25, words, anchor="middle")
    box(762, 172, 186, 148)
    text(855, 196, "FFN from flash", weight="bold", anchor="middle")
    text(855, 226, "which units?", 13, anchor="middle")
    text(855, 243, "predictor, router or all", 12, FAINT, "normal", "middle")
    text(855, 282, "multiply from slots", 13, anchor="middle")
    text(855, 299, "join what each wave gives", 12, FAINT, "normal", "middle")
    arrow((855, 132), (855, 168))
    arrow((855, 320), (855, 356))


def draw_ways():
    arrow((280, 112), (388, 112))
    text(336, 104, "at loading", 12, FAINT, anchor="middle")
    arrow((630, 112), (758, 112))
    arrow((762, 234), (634, 234))
    arrow((386, 282), (290, 282))
    arrow((284, 312), (388, 312))
    arrow((634, 290), (758, 290))
    step(686, 216, 1)
    step(336, 264, 2)
    step(336, 331, 3)
    step(686, 309, 4)


def draw_legend():
    steps = (
        (
            "The FFN asks for units: all, or those that its predictor or router names.",
            "layers/neuron.py, layers/expert.py, layers/block.py",
        ),
        (
            "The bookkeeping finds units that are in no slot, and gives each a slot.",
            "memory/slot_cache.py",
        ),
        (
            "32 threads read their bundles around the page cache, straight into slots.",
            "storage/reader.py",
        ),
        (
            "MLX multiplies one wave of units while the next wave is read.",
            "memory/slots.py, memory/fence.py",
        ),
    )
    for i, (words, files) in enumerate(steps):
        y = 450 + 30 * i
        step(32, y - 5, i + 1)
        text(54, y, words)
        text(984, y, files, 12, FAINT, anchor="end")


def picture() -> str:
    drawn.clear()
    for draw in (draw_flash, draw_memory, draw_mlx, draw_ways, draw_legend):
        draw()
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" font-family="{FONT}">',
        '<defs><marker id="head" markerWidth="8" markerHeight="8" refX="5" refY="4" '
        f'orient="auto"><path d="M0,1 L6,4 L0,7 z" fill="{INK}"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="{PAPER}"/>',
    )
    return "\n".join([*head, *drawn, "</svg>"]) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("architecture.svg").write_text(picture())
