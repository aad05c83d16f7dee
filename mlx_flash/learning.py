"""Learn from text which experts come next: `layers.foresight`, fitted to a model.

Every layer's input and choice are recorded while the model reads text. Then two linear
maps of the input are fitted for each layer. What the next layer chooses is told by
logistic regression; its threshold is the one at which `PRECISION` of the guesses are
right on text that was not fitted to. How soon experts are wanted again is told by ridge
regression of the share of the next tokens that use them, where the next token counts
most. (Foreseeing experts by the layers before: Eliseev and Mazur, arXiv 2312.17238,
with the next layer's own router in the place of a fitted map.)
Shapes: T tokens, D model width, n units of a layer, m of the next one, K of a token.
"""

import contextlib
import tempfile
from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from .errors import FlashError
from .layers.foresight import Foresight
from .layers.kinds import EXPERT
from .progress import bars
from .tracing import PIECE_TOKENS, cut_text

PRECISION = 0.75
HELD_OUT = 0.2  # of the tokens, the last ones
SOON = 3  # tokens in which what is foreseen counts half
RIDGE = 0.05  # of the tokens
STEPS, BATCH, RATE = 400, 512, 3e-3


class Heard:
    """What one layer was given and chose: x [T, D] and marks [T, n].

    x lies in a file that has no name, and that `files` closes: of all layers of a
    large model it would take gigabytes of memory that nobody gave.
    """

    def __init__(self, units: int, files: contextlib.ExitStack):
        self._units = units
        self._dims = 0
        self._file = files.enter_context(tempfile.TemporaryFile())
        self._marks: list[np.ndarray] = []

    def hear(self, x: mx.array, ids: mx.array) -> None:
        marks = np.zeros((len(x), self._units), bool)
        np.put_along_axis(marks, np.array(ids).astype(np.intp), True, axis=1)
        self._dims = x.shape[1]
        self._file.write(np.array(x.astype(mx.float32)).astype(np.float16).tobytes())
        self._marks.append(marks)

    @property
    def x(self) -> np.ndarray:
        self._file.seek(0)
        values = np.frombuffer(self._file.read(), np.float16)
        return values.reshape(-1, self._dims).astype(np.float32)

    @property
    def marks(self) -> np.ndarray:
        return np.concatenate(self._marks)


def learn(
    model, pieces: list[list[int]], progress: bool | None = True
) -> tuple[list[Foresight], dict]:
    """Foresight of every layer of a loaded mixture of experts.

    Args:
        model: From `load`.
        pieces: Token ids of texts that do not go on from one to the next.

    Returns:
        A `Foresight` for each layer; facts measured on the last fifth of the text:
        `precision` and `recall` of the guesses for each layer but the first, `tokens`.

    Raises:
        FlashError: If its units are no experts, or there is too little text.
    """
    flash = model.flash
    if flash.kind is not EXPERT:
        raise FlashError(
            f"{flash.folder} is cut into {flash.kind.name}s. Only of experts can be "
            "learned which come next: the predictors of neurons tell it already, and "
            "of blocks all are needed."
        )
    if len(pieces) < 5:
        raise FlashError(
            f"The text has {sum(map(len, pieces))} tokens, too few to learn from. "
            f"Give at least {5 * PIECE_TOKENS:,}, better 16,000."
        )
    with contextlib.ExitStack() as files:
        heard = [Heard(x.units, files) for x in flash.manifest.whole_layers]
        _record(model, pieces, heard, progress)
        return _fit(model, pieces, heard, progress)


def _fit(
    model, pieces: list[list[int]], heard: list[Heard], progress: bool | None
) -> tuple[list[Foresight], dict]:
    flash = model.flash
    lengths = [len(piece) for piece in pieces]
    held = sum(lengths[int(len(pieces) * (1 - HELD_OUT)) :])
    learned: list[Foresight] = []
    precisions: list[float] = []
    recalls: list[float] = []
    layers = list(zip(heard, [*heard[1:], None], strict=True))
    for i, (layer, following) in enumerate(bars(layers, "learning", progress)):
        units = flash.manifest.whole_layers[i].units
        more = None if following is None else following.marks.shape[1]
        x = layer.x
        one = Foresight(x.shape[1], units, more)
        half_life = flash.kind.half_life
        _fit_keep(one, x, layer.marks, lengths, half_life)
        if following is not None:
            precision, recall = _fit_ahead(one, x, following.marks, held)
            precisions.append(round(precision, 3))
            recalls.append(round(recall, 3))
        learned.append(one)
    facts = {"tokens": sum(lengths), "precision": precisions, "recall": recalls}
    return learned, facts


def _record(
    model, pieces: list[list[int]], heard: list[Heard], progress: bool | None
) -> None:
    layers = model.flash.layers
    try:
        for layer, listener in zip(layers, heard, strict=True):
            layer.watch(listener.hear)
        for piece in bars(pieces, "reading", progress):
            mx.eval(model(mx.array([piece])))
    finally:
        for layer in layers:
            layer.watch(None)


def sampled_pieces(
    model, tokenizer, tokens: int, progress: bool | None = True
) -> list[list[int]]:
    """Text that the model makes up itself, for where nobody gives any."""
    from .generation import stream_generate

    start = tokenizer.encode("", add_special_tokens=True)[:1] or [0]
    ends = set(getattr(tokenizer, "eos_token_ids", None) or [tokenizer.eos_token_id])
    pieces: list[list[int]] = []
    count = max(tokens // PIECE_TOKENS, 5)
    for _ in bars(range(count), "sampling text", progress):
        piece = list(start)
        while len(piece) < PIECE_TOKENS:
            steps = stream_generate(
                model,
                tokenizer,
                list(piece),
                max_tokens=PIECE_TOKENS - len(piece),
                sampler=mx.random.categorical,
            )
            piece += [step.token for step in steps]
            if piece[-1] in ends and len(piece) < PIECE_TOKENS:
                piece += start
        pieces.append(piece[:PIECE_TOKENS])
    return pieces


def text_pieces(tokenizer, text: str, tokens: int) -> list[list[int]]:
    """A text's first tokens, cut as `trace` cuts them, without a short last piece."""
    pieces = cut_text(tokenizer, text, tokens)
    return [piece for piece in pieces if len(piece) == len(pieces[0])]


def _fit_ahead(
    one: Foresight, x: np.ndarray, marks: np.ndarray, held: int
) -> tuple[float, float]:
    """Fit `ahead`; (precision, recall) of it as it is stored, on held-out tokens."""
    fit = slice(0, len(x) - held)
    mean, scale = x[fit].mean(axis=0), x[fit].std(axis=0) + 1e-6
    weights = {
        "w": mx.zeros((marks.shape[1], x.shape[1])),
        "b": mx.zeros(marks.shape[1]),
    }

    def loss(weights: dict, x: mx.array, target: mx.array) -> mx.array:
        scores = x @ weights["w"].T + weights["b"]
        return nn.losses.binary_cross_entropy(scores, target)

    step = mx.value_and_grad(loss)
    rate = optim.cosine_decay(RATE, STEPS)
    optimizer = optim.AdamW(learning_rate=rate, weight_decay=0.01)
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        rows = rng.choice(fit.stop, min(BATCH, fit.stop), replace=False)
        batch = mx.array((x[rows] - mean) / scale)
        _, grads = step(weights, batch, mx.array(marks[rows]))
        weights = optimizer.apply_gradients(grads, weights)
        mx.eval(weights, optimizer.state)
    weight = np.array(weights["w"]) / scale
    bias = np.array(weights["b"]) - weight @ mean
    assert one.ahead is not None
    _store(one.ahead, weight, bias)
    rest, truth = mx.array(x[fit.stop :]), marks[fit.stop :]
    cut = _cut_for_precision(np.array(one.ahead(rest)), truth)
    one.ahead.bias = one.ahead.bias - cut
    guess = np.array(one.next_scores(rest)) > 0
    both = (guess & truth).sum()
    return float(both / max(guess.sum(), 1)), float(both / max(truth.sum(), 1))


def _cut_for_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """The least score above which PRECISION of the guesses are right."""
    order = np.argsort(-scores, axis=None)
    right = np.cumsum(truth.ravel()[order]) / np.arange(1, truth.size + 1)
    enough = np.flatnonzero(right >= PRECISION)
    last = enough[-1] if len(enough) else 0
    return float(scores.ravel()[order[last]])


def _fit_keep(
    one: Foresight,
    x: np.ndarray,
    marks: np.ndarray,
    lengths: list[int],
    half_life: int,
) -> None:
    """Fit `keep`, on the scale on which LRFU's sum counts one."""
    used = marks.astype(np.float32)
    wanted = _faded(used, lengths, SOON, backwards=True)
    lately = _faded(used, lengths, half_life)
    # Regressed alone first, so that no ridge shrinks what LRFU knows already
    centred = lately - lately.mean(axis=0)
    weight = float((centred * wanted).sum() / max((centred**2).sum(), 1e-9))
    weight = max(weight, 1e-3)
    rest = wanted - weight * lately
    mean, scale = x.mean(axis=0), x.std(axis=0) + 1e-6
    rows = (x - mean) / scale
    gram = rows.T @ rows + RIDGE * len(rows) * np.eye(rows.shape[1])
    solved = np.linalg.solve(gram, rows.T @ (rest - rest.mean(axis=0))).T
    solved = solved / scale
    bias = rest.mean(axis=0) - solved @ mean
    _store(one.keep, solved / weight, bias / weight)


def _faded(
    used: np.ndarray, lengths: list[int], half_life: int, backwards: bool = False
) -> np.ndarray:
    """Of each token, the share of those before (or after) it that used a unit.

    A token counts half as much as one that is `half_life` nearer; what comes before
    includes the token itself, as LRFU counts it.
    """
    keep = 2.0 ** (-1 / half_life)
    out = np.zeros_like(used)
    for rows in _runs(lengths):
        total = np.zeros(used.shape[1], np.float32)
        for t in reversed(rows) if backwards else rows:
            if backwards:
                out[t] = total
                total = total * keep + used[t] * (1 - keep)
            else:
                total = total * keep + used[t] * (1 - keep)
                out[t] = total
    return out


def _runs(lengths: list[int]) -> Iterator[range]:
    begin = 0
    for length in lengths:
        yield range(begin, begin + length)
        begin += length


def _store(linear: nn.Module, weight: np.ndarray, bias: np.ndarray) -> None:
    """Give a linear layer these values, quantised where it is."""
    array = mx.array(weight.astype(np.float32))
    if isinstance(linear, nn.QuantizedLinear):
        packed = mx.quantize(array, linear.group_size, linear.bits)
        linear.weight, linear.scales, linear.biases = packed
    else:
        linear.weight = array
    linear.bias = mx.array(bias.astype(np.float32))
