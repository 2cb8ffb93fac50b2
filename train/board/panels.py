"""What is worth looking at: the charts of a run by the names that metrics are logged under.

The page of `train/report.py` and the workspace of `train/dashboard.py` are both drawn from these lists.
"""

from dataclasses import dataclass

DENOISERS = ("unet", "student")
TRAININGS = ("autoencoder", "clip", *DENOISERS)
EVALUATIONS = {"evaluation": "unet", "autoencoder_evaluation": "autoencoder"}  # of which training; one W&B run with it
JUDGED = (*DENOISERS, "evaluation")  # who logs metrics of the images that a U-Net draws
LABELS = ("class", "box", "empty_box", "pixel", "segment")  # what the judges of labels score
RECONSTRUCTED = ("autoencoder", "autoencoder_evaluation")  # likewise of those that an autoencoder gives back


@dataclass(frozen=True, slots=True)
class Panel:
    """Metrics of one unit in one chart, against the samples seen."""

    title: str
    metrics: tuple[str, ...]
    stages: tuple[str, ...] = TRAININGS  # whose metrics.jsonl may have them
    unit: str = ""
    logarithmic: bool = False
    bounded: tuple[str, ...] = ()  # metrics that NAME_low and NAME_high enclose


@dataclass(frozen=True, slots=True)
class Images:
    """Images of one name over the training, `STAGE/samples/<name>-<samples_seen>.png` and `samples/<name>` in W&B."""

    title: str
    name: str


def in_both(*names: str) -> tuple[str, ...]:
    """Metrics of the evaluation and of the small one in the training."""
    return tuple(f"{prefix}{name}" for prefix in ("eval/", "eval/loop/") for name in names)


def distance(title: str, name: str, stages: tuple[str, ...] = JUDGED) -> Panel:
    """A Fréchet distance with its interval: of the evaluation, of the small one in the training, and what is bias."""
    measured = in_both(name) if stages is JUDGED else (f"eval/{name}",)
    return Panel(title, (*measured, f"eval/{name}_floor"), stages, bounded=measured)


SECTIONS: dict[str, tuple[Panel, ...]] = {
    "Quality": (
        distance("FID", "fid"),
        distance("Fréchet distance, EfficientNet", "fd_efficientnet"),
        distance("Fréchet distance, CLIP", "fd_clip"),
        distance("Fréchet distance, the run's own CLIP", "fd_clip_own"),
        Panel("Kernel distance, Inception (KID)", in_both("kid"), JUDGED),
        Panel("Kernel distance, EfficientNet", in_both("kd_efficientnet"), JUDGED),
        Panel("Kernel distance, CLIP", ("eval/kd_clip", "eval/kd_clip_own"), JUDGED),
        Panel("Inception Score", in_both("inception_score"), JUDGED),
        Panel("Precision and recall, Inception", in_both("precision", "recall"), JUDGED, "share"),
        Panel(
            "Precision and recall, EfficientNet",
            in_both("precision_efficientnet", "recall_efficientnet"),
            JUDGED,
            "share",
        ),
        Panel("CLIP score", ("eval/clip_score", "eval/clip_score_own"), JUDGED),
        Panel(
            "Prompt following",
            ("eval/prompt_following/kind", "eval/prompt_following/background", "eval/prompt_following/color"),
            JUDGED,
            "share",
        ),
        Panel("Label following", tuple(f"eval/label_following/{name}" for name in LABELS), JUDGED, "share"),
        Panel(
            "Accuracy of the probe on real images",
            tuple(f"probe/accuracy/{name}" for name in ("kind", "background", "color", *LABELS)),
            JUDGED,
            "share",
        ),
        Panel("Validation loss", ("eval/loss",), DENOISERS),
    ),
    "Loss": (
        Panel("Loss", ("train/loss",), logarithmic=True),
        Panel(
            "Loss by quarter of the timesteps, 4 is nearly all noise",
            tuple(f"train/loss_by_timestep/{quarter}" for quarter in (1, 2, 3, 4)),
            DENOISERS,
            logarithmic=True,
        ),
        Panel("Learning rate", ("train/lr",)),
        Panel("Gradient norm before clipping", ("train/grad_norm", "train/grad_norm_discriminator"), logarithmic=True),
    ),
    "Throughput": (
        Panel("Throughput", ("perf/images_per_s",), unit="images/s"),
        Panel("Share of the peak (MFU)", ("perf/mfu",), unit="share"),
        Panel("Arithmetic per device", ("perf/tflops_per_device",), unit="TFLOP/s"),
        Panel("Time of a step", ("perf/step_ms_p50", "perf/step_ms_p95", "perf/step_ms_p100"), unit="ms"),
        Panel("Throughput of evaluations", ("perf/pictures_per_s",), tuple(EVALUATIONS), "images/s"),
    ),
    "System": (
        Panel("Memory of the fullest process", ("perf/memory_gib",), unit="GiB"),
        Panel("Waiting for data", ("perf/data_wait_share",), unit="share"),
        Panel("Lag of the slowest rank", ("perf/slowest_rank_lag",), unit="share"),
        Panel("CPU threads", ("perf/threads",)),
        Panel("Work so far", ("perf/device_hours",), unit="device hours"),
    ),
    "Data health": (
        Panel("Samples that could not be read", ("data/skipped",), unit="share"),
        Panel("Steps left out, not finite", ("train/skipped_steps",)),
        Panel(
            "Loss scale (fp16)",
            ("train/loss_scale/unet", "train/loss_scale/generator", "train/loss_scale/clip"),
            logarithmic=True,
        ),
        Panel("Latent shards", ("latents/shards_done", "latents/shards"), ("latents",)),
    ),
    "Autoencoder": (
        Panel("PSNR of reconstructions", ("eval/psnr", "train/psnr"), RECONSTRUCTED, "dB"),
        Panel("SSIM of reconstructions", ("eval/ssim",), RECONSTRUCTED),
        Panel("Perceptual distance", ("eval/lpips", "eval/efficientnet", "train/perceptual"), RECONSTRUCTED),
        distance("rFID", "rfid", RECONSTRUCTED),
        distance("Fréchet distance of reconstructions, EfficientNet", "rfd_efficientnet", RECONSTRUCTED),
        Panel("Pixel distance", ("train/reconstruction",), ("autoencoder",), logarithmic=True),
        Panel("KL divergence", ("train/kl",), ("autoencoder",), logarithmic=True),
        Panel("Codebook in use", ("train/codebook_use", "eval/codebook_use"), ("autoencoder",), "share"),
        Panel("Adversarial losses", ("train/gan_generator", "train/gan_discriminator"), ("autoencoder",)),
        Panel("Verdicts", ("train/logits_real", "train/logits_fake"), ("autoencoder",)),
    ),
    "CLIP": (
        Panel(
            "Held-out pairs that are found",
            ("eval/retrieval_image_to_text", "eval/retrieval_text_to_image"),
            ("clip",),
            "share",
        ),
        Panel("Pairs found in the batch", ("train/in_batch_accuracy",), ("clip",), "share"),
        Panel("Scale of the similarities", ("train/logit_scale",), ("clip",)),
    ),
}

IMAGES = (
    Images("Held-out captions", "prompts"),
    Images("Evaluation", "evaluation"),
    Images("Film strips", "film"),
    Images("Reconstructions", "reconstructions"),
)


def bounds(metric: str) -> tuple[str, str]:
    """Names of the ends of a metric's confidence interval."""
    return f"{metric}_low", f"{metric}_high"


def logged_names(panel: Panel) -> tuple[str, ...]:
    """All names that a panel reads."""
    return panel.metrics + tuple(end for metric in panel.bounded for end in bounds(metric))
