"""`bench peers-moe` and `peers-dense`: engines in processes of their own."""

import sys

import numpy as np
import pytest

from mlx_flash import FlashError
from mlx_flash.bench.peers import dense, engines, experts, side_by_side
from mlx_flash.bench.peers.guest import qwen3_gguf, script

JOB = {"memory": 1000, "prompt_tokens": 4, "warm_up": 1, "tokens": 2, "vocab": 96}


def measured(**figures) -> engines.Measured:
    names = engines.Measured.__dataclass_fields__
    usual = dict.fromkeys(names, 1.0) | {"best": [1, 2], "facts": {}}
    return engines.Measured(**(usual | figures))


def test_engines_read_the_same_prompt_and_agree(tmp_path):
    report = experts.run(
        tmp_path,
        layers=2,
        memory="60%",
        prompt_tokens=40,
        tokens=4,
        rounds=1,
        only=("mlx_flash", "mlx_lm"),
    )
    direct, cached, resident = report.rows
    assert all("error" not in row.more for row in report.rows), report.markdown()
    assert direct.more["agree"] == cached.more["agree"] == "6 of 6"
    (run,) = report.facts["runs"][direct.name]
    assert 0 < run["peak_bytes"] <= report.facts["budget_bytes"]
    (whole,) = report.facts["runs"][resident.name]
    assert whole["peak_bytes"] > report.facts["model_bytes"]
    if sys.platform == "linux":
        assert run["prompt_asked"] > 0 and run["growth_bytes"] > 0


@pytest.mark.slow
def test_ours_runs_a_dense_model_in_blocks(tmp_path):
    report = dense.run(
        tmp_path,
        layers=1,
        memory="70%",
        prompt_tokens=8,
        tokens=2,
        rounds=1,
        only=("mlx_flash", "mlx_lm"),
    )
    assert [row.more["agree"] for row in report.rows] == ["4 of 4"] * 3


def test_an_engine_that_is_nowhere_says_how_to_install_it(tmp_path):
    nowhere = engines.Engine("other", "other", "no-such-package")
    with pytest.raises(FlashError, match="pip install .* no-such-package"):
        engines.python_of(nowhere, ())


def test_no_python_is_refused():
    nowhere = engines.Engine("other", "other", "no-such-package")
    with pytest.raises(FlashError, match="cannot be run.*--python"):
        engines.python_of(nowhere, ("/no/such/python",))


def test_a_python_that_has_the_engine_is_found():
    assert engines.python_of(engines.OURS, ("/no/such/python",)) == sys.executable


def test_memory_is_fitted_to_the_peak(monkeypatch):
    tried = []

    def measure(engine, python, job):
        tried.append(job["memory"])
        return measured(peak_bytes=job["memory"] + 300)

    monkeypatch.setattr(engines, "measure", measure)
    assert engines.fit(engines.OURS, "python", JOB) == 700
    assert tried == [500, 700]


def test_an_engine_that_cannot_get_so_low_keeps_its_nearest(monkeypatch):
    peaks = iter([3000, 2500, 2600, 2600])
    monkeypatch.setattr(engines, "measure", lambda *_: measured(peak_bytes=next(peaks)))
    assert engines.fit(engines.OURS, "python", JOB) == 1000 // 20


def test_an_engine_that_refuses_little_memory_is_offered_more(monkeypatch):
    tried = []

    def measure(engine, python, job):
        tried.append(job["memory"])
        if job["memory"] < 700:
            raise FlashError("53 MB is the minimum.")
        return measured(peak_bytes=job["memory"] + 250)

    monkeypatch.setattr(engines, "measure", measure)
    assert engines.fit(engines.OURS, "python", JOB) == 750
    assert tried == [500, 750]


def test_an_engine_that_refuses_all_memory_is_told(monkeypatch):
    def measure(engine, python, job):
        raise FlashError("It needs a GPU.")

    monkeypatch.setattr(engines, "measure", measure)
    with pytest.raises(FlashError, match="needs a GPU"):
        engines.fit(engines.OURS, "python", JOB)


def test_figures_are_differences_of_marks():
    marks = [
        {"s": s, "cpu_s": 2 * s, "disk": 10 * s, "asked": 100 * s}
        for s in (0.0, 5.0, 6.0, 8.0, 10.0)
    ]
    found = {"marks": marks, "best": [], "peak_bytes": 7, "growth_bytes": 8, "more": 9}
    run = engines.Measured.of(found, warm_up=1)
    assert (run.prompt_s, run.prompt_cpu_s, run.prompt_disk) == (5, 10, 50)
    assert (run.tokens_per_s, run.token_asked) == (0.5, 200)
    assert run.facts == {"more": 9}


def test_rows_have_medians_with_their_spread():
    runs = [measured(prompt_s=s, best=[1, 3]) for s in (3.0, 1.0, 2.0)]
    runs[0].facts["hit_rate"] = 0.5
    row = side_by_side.row_of("ours", runs, [measured()])
    assert row.more["prompt_s"] == "2.0 (1.0 to 3.0)"
    assert row.more["agree"] == "1 of 2"
    assert row.more["hit_rate"] == "50.0"


def test_a_run_that_fails_leaves_its_reason(tmp_path, monkeypatch):
    def fail(*_):
        raise FlashError("ended badly")

    monkeypatch.setattr(side_by_side, "measure", fail)
    job = JOB | {"path": str(tmp_path), "scratch": str(tmp_path)}
    rows, _ = side_by_side.compare([engines.OURS], job, "1MB", 10, 1, ())
    assert rows[0].more["error"] == "ended badly"


def test_unknown_engines_are_named(tmp_path):
    with pytest.raises(FlashError, match="No engine is called vllm. Try bigrig, boyle"):
        side_by_side.report(
            "experts", "", engines.MOE, tmp_path, JOB, "50%", 1, ("vllm",), ()
        )


def test_a_script_is_the_same_for_all_and_goes_on_past_its_end():
    one, two = script.Script(JOB), script.Script(JOB)
    assert one.prompt == two.prompt and len(one.prompt) == 4
    taken = [one.take(0) for _ in range(one.steps + script.AHEAD)]
    assert len(taken) == 4 + script.AHEAD


@pytest.mark.parametrize(
    "name, expected",
    [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.norm.weight", "output_norm.weight"),
        ("lm_head.weight", "output.weight"),
        ("model.layers.3.self_attn.q_norm.weight", "blk.3.attn_q_norm.weight"),
        ("model.layers.3.mlp.down_proj.weight", "blk.3.ffn_down.weight"),
        ("model.layers.3.input_layernorm.weight", "blk.3.attn_norm.weight"),
    ],
)
def test_names_of_tensors_in_a_gguf(name, expected):
    assert qwen3_gguf.gguf_name(name) == expected


def test_a_gguf_has_every_weight(tmp_path):
    gguf = pytest.importorskip("gguf")
    from mlx_flash.bench.synthetic import plain_weights, write_checkpoint

    config = dense.CONFIG | {"num_hidden_layers": 1, "hidden_size": 64}
    folder = write_checkpoint(tmp_path / "m", config, plain_weights("float32"))
    qwen3_gguf.write_gguf(str(folder), tmp_path / "m.gguf")
    tensors = gguf.GGUFReader(tmp_path / "m.gguf").tensors
    assert "blk.0.attn_k_norm.weight" in {tensor.name for tensor in tensors}
    assert all(tensor.data.dtype == np.float32 for tensor in tensors)
