"""A small evaluation at each evaluation of a U-Net's training: `eval/loop/…`, with the functions of the large one."""

from collections.abc import Callable
from functools import partial

from conf.schema import EvaluateRun, ImageConfig, SamplingConfig, UNetRun
from conf.schema.evaluation import require_enough
from data.image_dataset import ImageDataset
from models.pipeline import DiffusionPipeline
from train.engine.metric_log import say
from train.engine.runtime import Runtime
from train.evaluation.extractors import efficientnet, inception
from train.evaluation.run import feature_cache_of, metrics_of, references_of
from train.evaluation.targets import GeneratedImages
from train.sampling.run import sampling_facts

REPLICATES = 50
GROUP = "eval/loop/"


def evaluate_in_loop(cfg: UNetRun, runtime: Runtime, model: DiffusionPipeline, samples_seen: int) -> dict[str, float]:
    """Distances of images of held-out captions, drawn with `cfg.sampling`; all processes draw their share.

    Their names say that they are of this evaluation: with another number of images they would be other numbers. There
    are none when an image is not finite: that is told, and the training goes on.
    """
    small = as_command(cfg, model)
    target = GeneratedImages(small, runtime, model, {"samples_seen": samples_seen}, refuses_broken=False)
    references = references_of(small, target, runtime)
    cache = feature_cache_of(small, target)
    if runtime.is_main:
        cache.remove()  # a killed start may have left some, whose weights nothing here tells from these
    cache.fill(target.measure, runtime, "unet")
    metrics: dict[str, float] = {}
    if runtime.is_main:
        if broken := int((~cache.whole("sound")).sum()):
            say(
                "unet",
                f"{broken} of {target.total} images are NaN or infinite: no {GROUP}… at {samples_seen:,} samples",
            )
        else:
            metrics = metrics_of(target, cache, references, REPLICATES)
        cache.remove()
    found: dict[str, float] = runtime.gather_objects(metrics)[0]
    return {name.replace("eval/", GROUP): value for name, value in found.items()}


def small_evaluation(cfg: UNetRun, runtime: Runtime) -> Callable[[DiffusionPipeline, int], dict[str, float]] | None:
    """What a U-Net's training measures at each of its evaluations; None where `evaluation.samples` is 0.

    Raises:
        UserError: what the first evaluation, hours later, would not find: held-out images, weights of an extractor.
    """
    small = cfg.evaluation
    if small.samples == 0:
        return None
    heldout = ImageDataset(f"{small.shards}/heldout", ImageConfig(), cfg.seed)
    require_enough(f"evaluation.shards={small.shards} holds {heldout.samples} in heldout/", heldout.samples, None)
    efficientnet()
    if small.inception is not None:
        inception(small.inception)
    return partial(evaluate_in_loop, cfg, runtime)


def as_command(cfg: UNetRun, model: DiffusionPipeline) -> EvaluateRun:
    """The evaluation as `train/evaluate.py` would be asked for it."""
    small, side = cfg.evaluation, cfg.model.sample_size * model.autoencoder.cfg.downscale
    heldout = f"{small.shards}/heldout"
    sampling = {name: getattr(cfg.sampling, name) for name in sampling_facts(SamplingConfig())}
    return EvaluateRun(
        run_dir=cfg.run_dir,
        name=cfg.name,
        seed=cfg.seed,
        output_dir=cfg.output_dir,
        shards=small.shards,
        captions=heldout,
        reference=heldout,
        statistics_dir=small.statistics_dir,
        unet=cfg.output_dir,
        autoencoder=cfg.autoencoder,
        clip=cfg.clip,
        images=ImageConfig(resolution=side),
        samples=small.samples,
        batch_size=small.batch_size,
        inception=small.inception,
        runtime=cfg.runtime,
        **sampling,
    )
