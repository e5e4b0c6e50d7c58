"""Every module of Divot against the official one, through the loader of the released checkpoints. Tolerances are the files' own."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tests import golden_files
from tests.golden_files import FOLDER, Golden
from torch import Tensor

from kinetok.tokenizers.divot import schedule
from kinetok.tokenizers.divot.checkpoints import SCHEDULE_BUFFERS, compare, load_official, load_tokenizer, published_state
from kinetok.tokenizers.divot.ddim import SamplerConfig, ddim_steps, guide, make_grid
from kinetok.tokenizers.divot.detokenizer import Detokenizer, DetokenizerConfig
from kinetok.tokenizers.divot.encoder import EncoderConfig, TokenEncoder
from kinetok.tokenizers.divot.perceiver import Perceiver, PerceiverConfig
from kinetok.tokenizers.divot.released import frame_autoencoder
from kinetok.tokenizers.divot.spacetime import SpaceTimeEncoder
from kinetok.tokenizers.divot.temporal import TemporalEncoder
from kinetok.tokenizers.divot.unet import UNetConfig, VideoUNet
from kinetok.tokenizers.divot.unet_layers import Given, ResBlock, SpatialTransformer, TemporalTransformer
from kinetok.tokenizers.divot.vit import preprocess

GROUPS = 32
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def _no_gradient() -> object:
    with torch.no_grad():
        yield


def arguments(golden: Golden) -> dict[str, Any]:
    return cast(dict[str, Any], golden.constructor)


def unet_config(numbers: dict[str, Any]) -> UNetConfig:
    return UNetConfig(
        z=numbers["in_channels"],
        channels=numbers["model_channels"],
        mult=tuple(numbers["channel_mult"]),
        blocks=numbers["num_res_blocks"],
        attention=tuple(sorted(rate.bit_length() - 1 for rate in numbers["attention_resolutions"])),
        head_width=numbers["num_head_channels"],
        context=numbers["context_dim"],
        stride=numbers["default_fs"],
    )


def loaded_unet(golden: Golden, numbers: dict[str, Any]) -> VideoUNet:
    unet = VideoUNet(unet_config(numbers)).eval()
    load_official({"": unet}, golden.state())
    return unet


def test_temporal_encoder() -> None:
    golden = golden_files.read("01_temporal_encoder")
    numbers = arguments(golden)
    model = TemporalEncoder(
        numbers["context_length"], numbers["input_dim"], numbers["width"], numbers["layers"], numbers["heads"], numbers["output_dim"]
    )
    load_official({"": model}, golden.state())
    golden.check(model(golden.tensors["in.x"]), "y")


def test_space_time_encoder_and_its_perceiver() -> None:
    golden = golden_files.read("02_spatial_temporal_down")
    numbers = arguments(golden)
    frames, dim = numbers["num_frames"], numbers["dim"]
    model = SpaceTimeEncoder(frames, numbers["num_queries"] // frames, dim, numbers["transformer_depth"], numbers["num_heads"])
    perceiver = PerceiverConfig(queries=numbers["num_queries_down"], depth=numbers["resampler_depth"])
    head = Perceiver(perceiver, dim, dim, numbers["dim_down"])
    load_official({"": model, "down_sampler.": head}, golden.state())
    features = model(golden.tensors["in.x"])
    golden.check(features, "hidden")
    golden.check(head(features), "y")


def test_perceiver() -> None:
    golden = golden_files.read("03_resampler")
    numbers = arguments(golden)
    config = PerceiverConfig(queries=numbers["num_queries"], depth=numbers["depth"], heads=numbers["heads"], head_width=numbers["dim_head"])
    model = Perceiver(config, numbers["embedding_dim"], numbers["dim"], numbers["output_dim"])
    load_official({"": model}, golden.state())
    golden.check(model(golden.tensors["in.x"]), "y")
    golden.check(model(golden.tensors["in.x"].flip(1)), "y_permuted")


def test_tokenizer_behind_the_vision_transformer() -> None:
    golden = golden_files.read("04_tokenizer_after_vit")
    numbers = arguments(golden)
    config = EncoderConfig(
        frames=numbers["num_frames"],
        temporal_width=numbers["width"],
        temporal_depth=numbers["temporal_depth"],
        pool=numbers["pool_size"],
        width=numbers["hidden_size"],
        depth=numbers["transformer_depth"],
        perceiver=PerceiverConfig(queries=numbers["down_num_tokens"], depth=numbers["resampler_depth"]),
        token_width=numbers["resampler_dim"],
    )
    model = TokenEncoder(config, numbers["input_dim"], golden.tensors["in.vit"].shape[1] - 1)
    report = load_tokenizer(model, golden.state() | {"vit_model.model.visual.proj": torch.zeros(1)})
    assert report.ignored == ("vit_model.model.visual.proj",)
    vit_BTND = golden.tensors["in.vit"].unflatten(0, (-1, numbers["num_frames"]))[:, :, 1:]
    pooled = model.pooled(vit_BTND)
    golden.check(pooled, "pooled")
    golden.check(model.norm(pooled), "pooled_normed")
    golden.check(model(vit_BTND), "y")


@pytest.mark.parametrize("name", ["05_unet", "05e_unet_full_topology"])
def test_unet(name: str) -> None:
    golden = golden_files.read(name)
    unet = loaded_unet(golden, arguments(golden))
    for case in json.loads(golden.metadata["cases"]):
        given = golden.under(f"in.{case}")
        golden.check(unet(given["x"], given["t"], given["context"], given["fs"]), f"{case}.y")
    given = golden.under("in.T4_c125")
    golden.check(unet(given["x"], given["t"], given["context"]), "T4_c125.y_default_fs")


def test_residual_block() -> None:
    golden = golden_files.read("05a_resblock")
    numbers = arguments(golden)
    model = ResBlock(numbers["channels"], numbers["out_channels"], numbers["emb_channels"], GROUPS, numbers["dropout"]).eval()
    load_official({"": model}, golden.state())
    x, time = golden.tensors["in.x"], golden.tensors["in.emb"]
    golden.check(model.spatial(x, time), "y_no_temporal")
    golden.check(model(x, Given(int(golden.metadata["frames"]), time, torch.empty(0), None)), "y")


def test_spatial_transformer() -> None:
    golden = golden_files.read("05b_spatial_transformer")
    numbers = arguments(golden)
    width = numbers["n_heads"] * numbers["d_head"]
    model = SpatialTransformer(numbers["in_channels"], numbers["n_heads"], GROUPS, numbers["context_dim"], width, split=True)
    load_official({"": model}, golden.state())
    x, context = golden.tensors["in.x"], golden.tensors["in.context"]
    for tokens in (125, 77, 64):
        second = context[:, 77:tokens] if tokens > 77 else None
        golden.check(model(x, Given(1, torch.empty(0), context[:, : min(tokens, 77)], second)), f"y_c{tokens}")


@pytest.mark.parametrize("name", ["05c_temporal_transformer", "05d_temporal_transformer_conv1d"])
def test_temporal_transformer(name: str) -> None:
    golden = golden_files.read(name)
    numbers = arguments(golden)
    width = numbers["n_heads"] * numbers["d_head"]
    model = TemporalTransformer(numbers["in_channels"], numbers["n_heads"], GROUPS, width)
    load_official({"": model}, golden.state())
    x = golden.tensors["in.x"]
    y = model(x.transpose(1, 2).flatten(0, 1), Given(x.shape[2], torch.empty(0), torch.empty(0), None))
    golden.check(y.unflatten(0, (len(x), -1)).transpose(1, 2), "y")


def test_schedule_and_conversions() -> None:
    golden = golden_files.read("06_schedule")
    golden.check(schedule.betas(), "f64_betas_before_rescale")
    golden.check(schedule.zero_terminal_snr(schedule.betas()), "f64_betas")
    golden.check(schedule.alpha_bar(), "f64_alphas_cumprod")
    assert schedule.alpha_bar()[-1] == 0
    given = golden.under("in")
    golden.check(schedule.clean(given["x"], given["v"], given["t"]), "x0_from_v")
    golden.check(schedule.noise(given["x"], given["v"], given["t"]), "eps_from_v")


def test_buffers_of_the_released_file() -> None:
    """What the published de-tokenizer keeps of its schedule, from our betas: DDPM's formulas (arXiv 2006.11239, equation 7), float64."""
    golden = golden_files.read("06_schedule")
    beta, share = schedule.zero_terminal_snr(schedule.betas()), schedule.alpha_bar()
    before = torch.cat([torch.ones(1).double(), share[:-1]])
    posterior = beta * (1 - before) / (1 - share)
    expected = {
        "betas": beta,
        "alphas_cumprod": share,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": share.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - share).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - share).log(),
        "sqrt_recip_alphas_cumprod": torch.zeros_like(share),
        "sqrt_recipm1_alphas_cumprod": torch.zeros_like(share),
        "posterior_variance": posterior,
        "posterior_log_variance_clipped": posterior.clamp(min=1e-20).log(),
        "posterior_mean_coef1": beta * before.sqrt() / (1 - share),
        "posterior_mean_coef2": (1 - before) * (1 - beta).sqrt() / (1 - share),
    }
    assert set(expected) == set(SCHEDULE_BUFFERS) == set(golden.under("out.buffer"))
    for name, values in expected.items():
        golden.check(values, f"buffer.{name}")
    at = torch.arange(schedule.STEPS)
    for used, name in zip(schedule.signal_and_noise(at), ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"), strict=True):
        golden.check(used.flatten(), f"buffer.{name}")


def test_timestep_embeddings() -> None:
    """In a process whose MKL computes alike on every CPU: where it takes a CPU's own way, the exponential of one frequency may come out an
    ulp lower, in the official function too, and that is 3e-5 at step 999."""
    check = """
        from tests import golden_files
        from kinetok.tokenizers.divot.unet import sinusoids

        golden = golden_files.read("06_schedule")
        for width in (33, 64):
            golden.check(sinusoids(golden.under("in")["t_embed"], width), f"timestep_embedding_{width}")
    """
    process = [sys.executable, "-c", textwrap.dedent(check)]
    subprocess.run(process, check=True, cwd=ROOT, env=os.environ | {"MKL_CBWR": "COMPATIBLE"})


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("spacing", ["uniform", "trailing"])
@pytest.mark.parametrize("steps", [5, 30, 50])
def test_ddim_grids(steps: int, spacing: str, half: bool) -> None:
    golden = golden_files.read("06_schedule")
    grid = make_grid(SamplerConfig.model_validate({"steps": steps, "spacing": spacing, "half": half}))
    case = f"{'fp16' if half else 'fp32'}.{'uniform' if spacing == 'uniform' else 'uniform_trailing'}.{steps}"
    assert grid.t_S.tolist() == golden.tensors[f"out.timesteps.{case.split('.', 1)[1]}"].tolist()
    golden.check(grid.alpha_S, f"f64_ddim_alphas.{case}")
    golden.check(grid.before_S, f"f64_ddim_alphas_prev.{case}")
    golden.check(grid.sigma_S, f"f64_ddim_sigmas.{case}")


def test_guidance_and_its_rescaling() -> None:
    golden = golden_files.read("06_schedule")
    for share in (0.0, 0.3, 0.7, 1.0):
        config = SamplerConfig(guidance=7.5, rescale=share)
        golden.check(guide(golden.tensors["in.c"], golden.tensors["in.u"], config), f"rescaled.{share}")
    golden.check(guide(golden.tensors["in.c"], golden.tensors["in.u"], SamplerConfig(rescale=0)), "cfg")


@pytest.mark.parametrize("name", ["07_ddim_trajectory", "07b_ddim_trajectory_trailing"])
def test_ddim_trajectories(name: str) -> None:
    golden = golden_files.read(name)
    numbers = arguments(golden)
    unet, given = loaded_unet(golden, numbers["unet"]), golden.under("in")
    sampler = numbers["sampler"]
    config = SamplerConfig(
        steps=sampler["S"],
        eta=sampler["eta"],
        guidance=sampler["unconditional_guidance_scale"],
        rescale=sampler["guidance_rescale"],
        spacing="uniform" if sampler["timestep_spacing"] == "uniform" else "trailing",
    )
    plain: Callable[[Tensor, Tensor], Tensor] = lambda x, t: unet(x, t, given["c"], given["fs"])  # noqa: E731

    def guided(x: Tensor, t: Tensor) -> Tensor:
        return guide(plain(x, t), unet(x, t, given["uc"], given["fs"]), config)

    for case, velocity, changes in (
        ("fp32", guided, {}),
        ("fp16", guided, {"half": True}),
        ("fp32_eta0", guided, {"eta": 0.0}),
        ("fp32_noguidance", plain, {"guidance": 1.0}),
    ):
        grid = make_grid(config.model_copy(update=changes))
        steps = list(ddim_steps(velocity, given["x_T"], given["noise"], grid))
        golden.check(torch.stack([x for x, _ in steps]), f"{case}.x")
        if f"out.{case}.pred_x0" in golden.tensors:
            golden.check(torch.stack([clean for _, clean in steps]), f"{case}.pred_x0")
            assert grid.t_S.flip(0).tolist() == golden.tensors[f"out.{case}.t"].flatten().tolist()
            for numbers_S, kind in ((grid.alpha_S, "alphas"), (grid.before_S, "alphas_prev"), (grid.sigma_S, "sigmas")):
                golden.check(numbers_S, f"{case}.{kind}")


def test_image_autoencoder() -> None:
    golden = golden_files.read("14_autoencoder")
    numbers = arguments(golden)["ddconfig"]
    model = frame_autoencoder(numbers["ch"], tuple(numbers["ch_mult"]), numbers["num_res_blocks"], numbers["z_channels"])
    load_official({"": model}, golden.state())
    posterior = model.model.encode(golden.tensors["in.x"]).latent_dist  # type: ignore[operator]
    golden.check(posterior.mean, "mean")
    golden.check(posterior.logvar, "logvar")
    golden.check(model.model.decode(golden.tensors["in.z"]).sample, "decoded")  # type: ignore[operator]


def test_clip_preprocessing() -> None:
    golden = golden_files.read("15_clip_preprocess")
    golden.check(preprocess(golden.tensors["in.u8"] / 127.5 - 1, 224), "y")


def test_full_size_names_and_sizes() -> None:
    published: dict[str, dict[str, list[int]]] = json.loads((FOLDER / "divot_full_size_keys.json").read_text())
    with torch.device("meta"):
        encoder = TokenEncoder(EncoderConfig(), 1280, 256)
        detokenizer = Detokenizer(DetokenizerConfig(), 256)
        autoencoder = frame_autoencoder()
    for parts, group in (
        ({"": encoder}, ("tokenizer_without_vit",)),
        (
            {"": detokenizer, "first_stage_model.": autoencoder},
            ("detokenizer.image_proj_model", "detokenizer.diffusion_model", "detokenizer.first_stage_model"),
        ),
    ):
        wanted = {name: torch.empty(shape, device="meta") for key in group for name, shape in published[key].items()}
        ours = published_state(parts)
        assert compare(ours, wanted).check().loaded == len(wanted) == len(ours)
