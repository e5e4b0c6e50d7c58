"""`evaluate`: figures against their definitions, and what stands in its files."""

import io
import json
import math
import threading
from pathlib import Path
from typing import Literal

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tests.tokenizers.toy_networks import toy_vgg
from torch import Tensor

from kinetok.infra.artifact import Artifact, Record, publish
from kinetok.infra.errors import ConfigError, DataError
from kinetok.infra.stage import Ref, Resources, StageContext
from kinetok.infra.storage import Folder
from kinetok.pipelines.models import open_model
from kinetok.pipelines.report import ladder
from kinetok.pipelines.report.networks import Networks
from kinetok.pipelines.report.panel import ERROR_SCALE, mp4, mp4_writer, triptych
from kinetok.pipelines.stages.clips import Clips as ClipsStage
from kinetok.pipelines.stages.evaluate import Evaluate, too_small
from kinetok.tokenizers.base import ModelConfig, Tokenizer, Tokens, TokenSpec
from kinetok.tokenizers.causal.autoencoder import CausalConfig, CausalTokenizer
from kinetok.tokenizers.causal.perceptual import load_lpips
from kinetok.tokenizers.metrics import mean_frame


class HalfConfig(ModelConfig):
    kind: Literal["half"] = "half"


class Half(Tokenizer):
    """Keeps every second pixel of an edge: an honest, weightless tokenizer 1 x 2 x 2."""

    config_class = HalfConfig

    def __init__(self, config: HalfConfig) -> None:
        super().__init__()
        self.config = config

    def spec(self) -> TokenSpec:
        return TokenSpec(tokenizer="half", weights="none", layout="grid", channels=3, temporal=1, spatial=2)

    def encode(self, video_BCTHW: Tensor) -> Tokens:
        return Tokens(video_BCTHW[..., ::2, ::2], frames=video_BCTHW.shape[2])

    def decode(self, tokens: Tokens) -> Tensor:
        return tokens.values.repeat_interleave(2, -1).repeat_interleave(2, -2)


def _context(tmp_path: Path, inputs: dict[str, Artifact | tuple[Artifact, ...]]) -> StageContext:
    return StageContext(
        name="quality",
        key="0" * 16,
        inputs=inputs,
        out=Folder(str(tmp_path / "out")),
        resources=Resources(batch_size=3),
        progress=lambda **_: None,
        stop=threading.Event(),
    )


@pytest.fixture
def base(tmp_path: Path) -> Artifact:
    """A tiny untrained tokenizer as a train artifact."""
    torch.manual_seed(0)
    folder = Folder(str(tmp_path / "base"))
    config = CausalConfig(channels=4, mult=(1, 1, 1), strides=((1, 2), (2, 2)), blocks=1, z=4, groups=2)
    CausalTokenizer(config).save_pretrained(folder.local / "model")
    record = Record(kind="train", name="base", key="b" * 16, version=1, config={}, digest="", started="2026-01-01", seconds=1.0)
    return publish(folder, record)


def _stage(**fields: object) -> Evaluate:
    return Evaluate.model_validate({"data": Ref("clips"), "models": ("base",), "panel": 2, "worst": 1, **fields})


def test_the_table_holds_the_ladder_and_its_baselines(tmp_path: Path, base: Artifact, make_clips) -> None:  # type: ignore[no-untyped-def]
    clips = make_clips(4, val=(1, 3))
    ctx = _context(tmp_path, {"data": clips, "models": (base,)})
    result = _stage().run(ctx)
    assert (result.counts.input, result.counts.written) == (4, 4)
    table = json.loads(ctx.out.read_text("table.json"))
    assert [line["name"] for line in table["ladder"]] == [ladder.DATA_MEAN, ladder.CLIP_MEAN, "base"]
    rows = pq.read_table(io.BytesIO(ctx.out.read_bytes("clips.parquet"))).to_pylist()
    assert len(rows) == 3 * 4 and {row["video"] for row in rows} == {"video-001", "video-003"}
    for line in table["ladder"]:
        mine = [row["psnr"] for row in rows if row["model"] == line["name"]]
        assert line["psnr"] == pytest.approx(sum(mine) / 4) == result.metrics[f"{line['name']}/psnr"]
    base_line = table["ladder"][-1]["cost"]
    assert base_line["latent"] == [4, 3, 4, 4], "5 frames in steps of 2, the first alone"
    seconds = 5 / 8
    assert base_line["tokens_per_second"] == pytest.approx(3 * 4 * 4 / seconds)
    assert base_line["bits_per_second"] == pytest.approx(4 * 3 * 4 * 4 * 16 / seconds)


def test_lpips_is_measured_where_weights_are_named_and_no_field_where_not(tmp_path: Path, base: Artifact, make_clips) -> None:  # type: ignore[no-untyped-def]
    """Against the network called on the very reconstructions; without weights key and table are as if it were not there."""
    inputs = {"data": make_clips(2, val=(0, 1)), "models": (base,)}
    plain = _context(tmp_path / "plain", inputs)
    assert not [name for name in _stage().run(plain).metrics if "lpips" in name] and "lpips" not in plain.out.read_text("table.json")
    assert "lpips" not in _stage().literals() and "lpips" not in pq.read_schema(io.BytesIO(plain.out.read_bytes("clips.parquet"))).names

    weights = toy_vgg(tmp_path / "vgg.safetensors")
    ctx = _context(tmp_path, inputs)
    result = _stage(lpips=weights, dtype="fp32").run(ctx)
    index = ladder.ClipIndex.open(make_clips(2, val=(0, 1)))
    video = torch.stack([torch.from_numpy(index.read_clip(row)) for row in range(4)]).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    model = open_model(base.folder / "model")
    rungs = {ladder.CLIP_MEAN: mean_frame(video), "base": model.decode(model.encode(video)).clamp(-1, 1)}
    net = load_lpips(weights)
    for name, restored in rungs.items():
        assert result.metrics[f"{name}/lpips"] == pytest.approx(float(net(restored, video).mean()), rel=1e-4) != 0
    table = json.loads(ctx.out.read_text("table.json"))
    assert table["lpips"] == weights and table["ladder"][-1]["lpips"] == result.metrics["base/lpips"]
    rows = pq.read_table(io.BytesIO(ctx.out.read_bytes("clips.parquet"))).to_pylist()
    assert sum(row["lpips"] for row in rows if row["model"] == "base") / 4 == pytest.approx(result.metrics["base/lpips"])
    same = Networks.open(Resources(batch_size=3), lpips=weights).distance(video, video)
    assert same is not None and same.tolist() == [0] * 4


def test_lpips_refuses_small_clips_and_missing_weights(tmp_path: Path, base: Artifact, make_clips) -> None:  # type: ignore[no-untyped-def]
    small = ClipsStage.model_validate({"videos": "v", "fps": 8, "frames": 5, "height": 16, "width": 8})
    assert list(too_small("vgg.safetensors", small)) == ["lpips: needs frames of 16 x 16 pixels or more, the clips have 16 x 8"]
    assert not list(too_small(None, small))
    with pytest.raises(ConfigError, match=r"lpips: .*vgg\.pth is no file here"):
        _stage(lpips=str(tmp_path / "vgg.pth")).run(_context(tmp_path, {"data": make_clips(2, val=(1,)), "models": (base,)}))


def test_panel_and_worst_clips_play(tmp_path: Path, base: Artifact, make_clips) -> None:  # type: ignore[no-untyped-def]
    ctx = _context(tmp_path, {"data": make_clips(3, val=(0, 2)), "models": (base,)})
    _stage().run(ctx)
    shown = json.loads(ctx.out.read_text("panel.json"))
    assert [entry["role"] for entry in shown] == ["panel", "panel", "worst"]
    rows = pq.read_table(io.BytesIO(ctx.out.read_bytes("clips.parquet"))).to_pylist()
    assert shown[-1]["psnr"] == min(row["psnr"] for row in rows if row["model"] == "base")
    for entry in shown:
        with av.open(io.BytesIO(ctx.out.read_bytes(entry["file"]))) as box:
            assert len(list(box.decode(video=0))) == 5


def test_a_clip_that_no_longer_decodes_is_quarantined(tmp_path: Path, base: Artifact, make_clips) -> None:  # type: ignore[no-untyped-def]
    ctx = _context(tmp_path, {"data": make_clips(3, val=(0, 1, 2), bad=(1,)), "models": (base,)})
    counts = _stage().run(ctx).counts
    assert (counts.input, counts.written, counts.quarantined) == (6, 4, 2)
    bad = pq.read_table(io.BytesIO(ctx.out.read_bytes("quarantine/000000.parquet"))).to_pylist()
    assert {row["id"].split("/")[0] for row in bad} == {"video-001"} and all(row["reason"] and row["message"] for row in bad)


def test_no_clips_is_an_error_that_says_so(tmp_path: Path, base: Artifact, make_clips) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DataError, match="val_fraction"):
        _stage().run(_context(tmp_path, {"data": make_clips(2), "models": (base,)}))


def test_figures_are_what_they_are_called() -> None:
    rung = ladder.ModelRung("half", Half(HalfConfig()), "bf16", Resources())
    video_BCTHW = torch.rand(2, 3, 4, 16, 16) * 2 - 1
    restored = rung(video_BCTHW)
    error = (restored - video_BCTHW).square().mean((1, 2, 3, 4))
    torch.testing.assert_close(ladder.clip_psnr(restored, video_BCTHW), 10 * torch.log10(4 / error))
    assert rung.cost.tokens == 2 * 4 * 8 * 8 and rung.cost.bits == rung.cost.tokens * 3 * 16
    assert restored[..., ::2, ::2].sub(video_BCTHW[..., ::2, ::2]).abs().max() > 0, "tokens were rounded to bf16"


def test_the_data_set_mean_is_the_best_standing_frame(tmp_path: Path, make_clips) -> None:  # type: ignore[no-untyped-def]
    index = ladder.ClipIndex.open(make_clips(3, val=(0, 1, 2)))
    clips = ladder.Clips(index, ladder.choose(index, "val", None, 0), 2)
    mean = ladder.average_frame(clips)
    everything = torch.stack([video for row in clips.rows if (video := clips.read(row)) is not None])
    torch.testing.assert_close(mean, everything.mean((0, 2)))


def test_a_clip_is_read_once_for_all_rungs(make_clips, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    clips = ladder.Clips(ladder.ClipIndex.open(make_clips(3, val=(0, 1, 2))), [0, 1, 2, 3, 4], 2)
    read: list[int] = []
    decode = ladder.Clips.read
    monkeypatch.setattr(ladder.Clips, "read", lambda self, row: read.append(row) or decode(self, row))
    rungs = [ladder.ClipMean(), ladder.ModelRung("half", Half(HalfConfig()), "bf16", Resources())]
    measured = list(ladder.measure(rungs, clips, Networks(torch.device("cpu"), 1)))
    assert read == clips.rows
    assert [name for name, _ in measured] == ["clip mean frame", "half"] * 3
    assert [clip.row for name, batch in measured if name == "half" for clip in batch] == clips.rows


def test_limited_clips_are_drawn_by_the_seed(make_clips) -> None:  # type: ignore[no-untyped-def]
    index = ladder.ClipIndex.open(make_clips(6, val=tuple(range(6))))
    drawn = [ladder.choose(index, "val", 5, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) == 5 and drawn[0] == sorted(drawn[0])


def test_the_error_map_is_black_where_nothing_differs() -> None:
    same = torch.zeros(3, 2, 16, 16)
    frames = triptych(same, same)
    assert frames.shape == (2, 192, 3 * 192 + 8, 3)
    pane = frames[:, :, -192:]
    assert pane.max() <= 4
    bright = triptych(same, same + ERROR_SCALE)[:, :, -192:]
    assert bright.min() >= 160 and len(mp4(frames, 8.0)) > 500
    assert math.isclose(frames[0, 0, 0, 0], 128, abs_tol=1)


def test_a_video_may_be_written_in_pieces() -> None:
    frames = np.random.default_rng(0).integers(0, 255, (9, 32, 48, 3), dtype=np.uint8)
    file = io.BytesIO()
    with mp4_writer(file, 8.0) as write:
        for piece in (frames[:1], frames[1:8], frames[8:]):
            write(piece)
    assert file.getvalue() == mp4(frames, 8.0)
